//! `Redactor`: takes out of a report what tells which machine, or whose, it is.

use std::fs;

use peervram::backends::topology::redact_command_line;
use serde_json::Value;

/// What is replaced by what, the longest first.
pub struct Redactor(Vec<(String, String)>);

impl Redactor {
    /// Of this machine and this user: its name and id, the boot's id, the kernel's command line, home folders.
    pub fn of_this_machine() -> Self {
        let read = |file: &str| fs::read_to_string(file).ok().map(|text| text.trim().to_owned());
        let command_line = read("/proc/cmdline").map(|line| (redact_command_line(&line), line));
        let home = |name: &str| std::env::var(name).ok();
        // As root by sudo, the user's own home is not root's.
        let invited_by = home("SUDO_USER").map(|user| format!("/home/{user}"));
        Self::new([
            (read("/etc/machine-id"), "MACHINE-ID".to_owned()),
            (read("/proc/sys/kernel/random/boot_id"), "BOOT-ID".to_owned()),
            (read("/proc/sys/kernel/hostname"), "HOSTNAME".to_owned()),
            (home("HOME"), "~".to_owned()),
            (invited_by, "~".to_owned()),
            (
                command_line.clone().map(|(_, line)| line),
                command_line.map(|(redacted, _)| redacted).unwrap_or_default(),
            ),
        ])
    }

    /// What is short or common would be found in other words, too.
    fn new(secrets: impl IntoIterator<Item = (Option<String>, String)>) -> Self {
        let common = |secret: &str| secret.len() < 4 || matches!(secret, "localhost" | "/root" | "(none)");
        let mut all: Vec<(String, String)> = (secrets.into_iter())
            .filter_map(|(secret, by)| Some((secret.filter(|secret| !common(secret))?, by)))
            .collect();
        all.sort_by_key(|(secret, _)| std::cmp::Reverse(secret.len()));
        Self(all)
    }

    /// Replaces it in every string of `value`, names of fields included.
    pub fn value(&self, value: &mut Value) {
        match value {
            Value::String(text) => *text = self.text(text),
            Value::Array(values) => values.iter_mut().for_each(|value| self.value(value)),
            Value::Object(fields) => {
                let old = std::mem::take(fields);
                fields.extend(old.into_iter().map(|(name, mut value)| {
                    self.value(&mut value);
                    (self.text(&name), value)
                }));
            }
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
    }

    /// Replaces it in `text`.
    pub fn text(&self, text: &str) -> String {
        self.0.iter().fold(text.to_owned(), |text, (secret, by)| text.replace(secret, by))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_replaced_wherever_they_are() {
        let secret = |secret: &str, by: &str| (Some(secret.to_owned()), by.to_owned());
        let redactor = Redactor::new([
            secret("/people/ada", "~"),
            secret("root=/dev/ada ro", "root=... ..."),
            secret("analytical", "HOSTNAME"),
            secret("ro", "never: too short"),
            (None, "never: not known".into()),
        ]);
        let mut value = serde_json::json!({
            "file": "/people/ada/.local/state/a.json",
            "fingerprint": { "the kernel command line": "root=/dev/ada ro" },
            "on analytical": ["a", 1, null, true, "analytical-engine root"],
        });
        redactor.value(&mut value);
        assert_eq!(
            value,
            serde_json::json!({
                "file": "~/.local/state/a.json",
                "fingerprint": { "the kernel command line": "root=... ..." },
                "on HOSTNAME": ["a", 1, null, true, "HOSTNAME-engine root"],
            })
        );
    }
}
