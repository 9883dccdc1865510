//! A broker in the text form of Prometheus, as a scraper or the node exporter's text folder reads it.

use std::fmt::Write as _;
use std::path::Path;

use peervram::{Error, Result};
use peervram_programs::replace;

use super::status::{Seen, by_user, memory_state};

/// Of a broker that does not answer.
pub const DOWN: &str = "# HELP peervram_broker_up Whether the broker answers.\n\
                        # TYPE peervram_broker_up gauge\n\
                        peervram_broker_up 0\n";

const STATES: [&str; 4] = ["live", "draining", "away", "gone"];

/// The text.
pub fn text(seen: &Seen) -> String {
    let mut text = DOWN.replace("up 0", "up 1");
    let memory = "of a memory that the broker lends";
    let of_memories = |text: &mut String, name, help: &str, figure: fn(&peervram::broker::Memory) -> u64| {
        head(text, name, "gauge", help);
        for memory in &seen.memories {
            line(text, name, &[("memory", &memory.name), ("device", &memory.device)], figure(memory));
        }
    };
    of_memories(&mut text, "memory_bytes", &format!("Size {memory}."), |memory| memory.size);
    of_memories(&mut text, "free_bytes", &format!("What could be borrowed {memory}."), |memory| memory.free);
    let help = format!("The longest range that could be borrowed {memory}.");
    of_memories(&mut text, "largest_free_bytes", &help, |memory| memory.largest_free);
    let help = format!("What is free and not scrubbed yet {memory}.");
    of_memories(&mut text, "unscrubbed_bytes", &help, |memory| memory.unscrubbed);
    let help = format!("What nobody is given before a dma-buf is freed {memory}.");
    of_memories(&mut text, "quarantined_bytes", &help, |memory| memory.quarantined);

    head(&mut text, "revokes_total", "counter", &format!("How often it was taken back {memory}."));
    for memory in &seen.memories {
        let labels = [("memory", memory.name.as_str()), ("device", memory.device.as_str())];
        line(&mut text, "revokes_total", &labels, memory.generation);
    }
    head(&mut text, "memory_state", "gauge", &format!("1 for the state {memory}."));
    for memory in &seen.memories {
        for state in STATES {
            let labels =
                [("memory", memory.name.as_str()), ("device", memory.device.as_str()), ("state", state)];
            line(&mut text, "memory_state", &labels, u64::from(memory_state(memory.state) == state));
        }
    }
    let (Some(leases), Some(quarantine)) = (&seen.leases, &seen.quarantine) else { return text };
    let sums = by_user(leases);
    for (name, help, is_bytes) in
        [("leases", "Leases of a user.", false), ("lent_bytes", "What a user has.", true)]
    {
        head(&mut text, name, "gauge", help);
        for ((memory, user, state), (count, bytes)) in &sums {
            let user = user.to_string();
            let labels = [("memory", *memory), ("user", user.as_str()), ("state", *state)];
            line(&mut text, name, &labels, if is_bytes { *bytes } else { *count });
        }
    }
    let help = "Since when the oldest range of a memory is in quarantine, in seconds since the Unix epoch.";
    head(&mut text, "quarantine_since_seconds", "gauge", help);
    for memory in &seen.memories {
        let of_memory = quarantine.iter().filter(|quarantined| quarantined.memory == memory.name);
        if let Some(oldest) = of_memory.map(|quarantined| quarantined.since).min() {
            line(&mut text, "quarantine_since_seconds", &[("memory", &memory.name)], oldest);
        }
    }
    text
}

/// Replaces `file`, which everybody may read: the node exporter runs as a user of its own.
///
/// # Errors
/// It cannot be written.
pub fn write(file: &Path, text: &str) -> Result<()> {
    replace(file, 0o644, text.as_bytes())
        .map_err(|error| Error::os("write what Prometheus reads", error).on(file.display()))
}

fn head(text: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(text, "# HELP peervram_broker_{name} {help}\n# TYPE peervram_broker_{name} {kind}");
}

fn line(text: &mut String, name: &str, labels: &[(&str, &str)], figure: u64) {
    let escaped = |value: &str| value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    let labels: Vec<String> =
        labels.iter().map(|(name, value)| format!("{name}=\"{}\"", escaped(value))).collect();
    let _ = writeln!(text, "peervram_broker_{name}{{{}}} {figure}", labels.join(","));
}

#[cfg(test)]
mod tests {
    use super::super::status::tests::busy;
    use super::*;

    #[test]
    fn every_line_is_a_sample_of_a_metric_that_was_named_before() {
        let text = text(&busy());
        for line in [
            "peervram_broker_up 1",
            "peervram_broker_free_bytes{memory=\"vram\",device=\"0000:01:00.0\"} 201326592",
            "peervram_broker_largest_free_bytes{memory=\"vram\",device=\"0000:01:00.0\"} 67108864",
            "peervram_broker_revokes_total{memory=\"vram\",device=\"0000:01:00.0\"} 3",
            "peervram_broker_memory_state{memory=\"vram\",device=\"0000:01:00.0\",state=\"live\"} 1",
            "peervram_broker_memory_state{memory=\"vram\",device=\"0000:01:00.0\",state=\"away\"} 0",
            "peervram_broker_leases{memory=\"vram\",user=\"0\",state=\"draining\"} 1",
            "peervram_broker_lent_bytes{memory=\"vram\",user=\"0\",state=\"draining\"} 16777216",
            "peervram_broker_quarantine_since_seconds{memory=\"vram\"} 900",
        ] {
            assert!(text.lines().any(|seen| seen == line), "no {line} in\n{text}");
        }
        let mut typed: Vec<&str> = Vec::new();
        for line in text.lines() {
            match line.strip_prefix("# ") {
                Some(comment) if comment.starts_with("TYPE ") => {
                    let name = comment.split(' ').nth(1).unwrap();
                    assert!(!typed.contains(&name), "{name} is named twice");
                    typed.push(name);
                }
                Some(comment) => {
                    assert!(comment.starts_with("HELP ") && comment.split(' ').count() > 2, "{line}")
                }
                None => {
                    let name = line.split(['{', ' ']).next().unwrap();
                    assert_eq!(typed.last(), Some(&name), "{line}");
                    assert!(line.rsplit(' ').next().unwrap().parse::<u64>().is_ok(), "{line}");
                }
            }
        }
        assert!(text.ends_with('\n'));
    }

    #[test]
    fn values_of_labels_are_quoted() {
        let mut text = String::new();
        line(&mut text, "x", &[("a", "b\"c\\d\ne")], 1);
        assert_eq!(text, "peervram_broker_x{a=\"b\\\"c\\\\d\\ne\"} 1\n");
    }
}
