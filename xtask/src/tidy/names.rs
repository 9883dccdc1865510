//! Nothing names a path of one machine, or a registry.

use super::{Files, Violation};

/// Beginnings of paths that are somebody's own. In halves, as the words below: this file names none itself.
const OWN_PATHS: &[&str] =
    &[concat!("/ho", "me/"), concat!("/ro", "ot/"), concat!("/Us", "ers/"), concat!("/mn", "t/")];
/// Words of addresses that packages come from.
const REGISTRIES: &[&str] = &[
    concat!("registry", "+https://"),
    concat!("arti", "factory"),
    concat!("/sim", "ple/"),
    concat!("index.cra", "tes.io"),
    concat!("py", "pi."),
];
/// Files that name one on purpose, each with the reason.
const EXCEPTIONS: &[(&str, &str)] =
    &[("Cargo.lock", "cargo writes the default registry's name, which is no mirror's")];

/// Violations in these files.
pub fn check(files: &Files) -> Vec<Violation> {
    let mut violations = Vec::new();
    for (name, text) in files {
        if EXCEPTIONS.iter().any(|(exception, _)| name == exception) {
            continue;
        }
        for (number, line) in text.lines().enumerate() {
            for word in OWN_PATHS.iter().filter(|word| has_path(line, word)) {
                let what = format!("names a path below {word}, which is one machine's");
                violations.push(Violation::new(format!("{name}:{}", number + 1), what));
            }
            for word in REGISTRIES.iter().filter(|word| line.contains(**word)) {
                let what = format!("names a registry ({word}): it is the machine's to say");
                violations.push(Violation::new(format!("{name}:{}", number + 1), what));
            }
        }
    }
    violations
}

/// Whether a line has a path that begins so and goes on: the beginning alone is any user's.
fn has_path(line: &str, beginning: &str) -> bool {
    line.match_indices(beginning).any(|(at, _)| {
        let is_start = line[..at]
            .chars()
            .next_back()
            .is_none_or(|before| !before.is_alphanumeric() && !"/.-_$}".contains(before));
        let goes_on = line[at + beginning.len()..].starts_with(|c: char| c.is_alphanumeric());
        is_start && goes_on
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy::made_up;

    #[test]
    fn paths_of_one_machine_and_registries_are_found() {
        let [home, root] = [OWN_PATHS[0], OWN_PATHS[1]];
        let (page, registry) = (format!("see {home}somebody/file\n"), REGISTRIES[1]);
        let code = format!("let x = \"{root}.cache\";\nlet y = \"{root}cache\";\n");
        let settings = format!("index = \"https://{registry}.example\"\n");
        let found = check(&made_up(&[("a.md", &page), ("b.rs", &code), ("c.toml", &settings)]));
        let places: Vec<&str> = found.iter().map(|found| found.place.as_str()).collect();
        assert_eq!(places, ["a.md:1", "b.rs:2", "c.toml:1"]);
    }

    #[test]
    fn what_only_looks_like_them_is_fine() {
        let [home, root] = [OWN_PATHS[0], OWN_PATHS[1]];
        let code = format!("\"$ROOT{home}x\" sys{root}x {home} proc/1{root}etc\n");
        assert_eq!(check(&made_up(&[("a.rs", &code)])), []);
    }
}
