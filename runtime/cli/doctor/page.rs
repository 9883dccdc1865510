//! The page that people read: a section for each part of the machine, then what to do.

use std::io::{self, Write};

use peervram_programs::behind;

use super::diagnosis::Diagnosis;
use super::facts::Facts;
use super::finding::{Finding, Section, Severity};

/// As wide as a terminal is at least.
const WIDTH: usize = 80;

/// Writes it.
pub fn print(facts: &Facts, diagnosis: &Diagnosis, output: &mut impl Write) -> io::Result<()> {
    let user = match facts.user.uid {
        0 => "root".to_owned(),
        uid => format!("user {uid}"),
    };
    writeln!(output, "peervram doctor: Linux {}, as {user}", facts.kernel_release)?;
    writeln!(output)?;
    behind(output, WIDTH, "", &diagnosis.headline)?;
    for section in Section::ALL {
        let findings: Vec<&Finding> =
            diagnosis.findings.iter().filter(|finding| finding.section == section).collect();
        if findings.is_empty() {
            continue;
        }
        writeln!(output)?;
        writeln!(output, "{}", section.title())?;
        for finding in findings {
            behind(output, WIDTH, mark(finding.weight), &finding.seen)?;
            if let Some(why) = &finding.why {
                behind(output, WIDTH, "       ", why)?;
            }
        }
    }
    steps(diagnosis, output)
}

fn mark(weight: Severity) -> &'static str {
    match weight {
        Severity::Fine => "  ok   ",
        Severity::Unknown => "  ?    ",
        Severity::Hint => "  hint ",
        Severity::InTheWay => "  NO   ",
    }
}

fn steps(diagnosis: &Diagnosis, output: &mut impl Write) -> io::Result<()> {
    if diagnosis.what_to_do.is_empty() {
        return Ok(());
    }
    writeln!(output)?;
    writeln!(output, "What to do, most useful first")?;
    for (number, step) in diagnosis.what_to_do.iter().enumerate() {
        behind(output, WIDTH, &format!("  {}. ", number + 1), &step.what)?;
        for command in &step.commands {
            writeln!(output, "       {command}")?;
        }
    }
    if diagnosis.steps_left_out > 0 {
        writeln!(output, "  Then run the doctor again: {} more.", diagnosis.steps_left_out)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_lines_are_wrapped_below_their_first_word() {
        let mut page = Vec::new();
        behind(&mut page, WIDTH, "  ok   ", &"word ".repeat(20)).unwrap();
        let page = String::from_utf8(page).unwrap();
        let lines: Vec<&str> = page.lines().collect();
        assert_eq!(lines.len(), 2);
        assert!(lines.iter().all(|line| line.len() <= WIDTH), "{page}");
        assert!(lines[0].starts_with("  ok   word") && lines[1].starts_with("       word"), "{page}");
    }

    #[test]
    fn what_is_longer_than_a_line_stays_whole() {
        let mut page = Vec::new();
        let path = "/dev/".repeat(30);
        behind(&mut page, WIDTH, "  1. ", &format!("open {path}")).unwrap();
        assert!(String::from_utf8(page).unwrap().contains(&path));
    }
}
