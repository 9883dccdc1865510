//! `Matrix`: a record on a terminal, in 80 columns. Colour says nothing that words do not.

use std::io::{self, Write};

use crate::record::{Direction, Figure, Record, Verdict};
use crate::size::Size;

/// Importers beside each other.
const ACROSS: usize = 3;
/// The columns of a terminal that nobody made wider.
const WIDTH: usize = 80;

/// A record, to be printed.
pub struct Matrix<'a> {
    /// The record.
    pub record: &'a Record,
    /// Whether the terminal has colours.
    pub colour: bool,
    /// A line for each size, rather than for the smallest and the largest.
    pub every_size: bool,
}

impl Matrix<'_> {
    /// Prints it.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn print(&self, out: &mut dyn Write) -> io::Result<()> {
        self.places(out)?;
        self.matrix(out)?;
        self.lines(out)?;
        self.rest(out)
    }

    fn places(&self, out: &mut dyn Write) -> io::Result<()> {
        let machine = &self.record.machine;
        let pinned = machine.pinned_cpu.map(|cpu| format!(", pinned to CPU {cpu}")).unwrap_or_default();
        writeln!(out, "Linux {}, {} CPUs{pinned}", machine.kernel, machine.cpus)?;
        for place in &self.record.places {
            let node = place.numa_node.map_or("no NUMA node".to_owned(), |node| format!("NUMA node {node}"));
            let engines =
                if place.engines.is_empty() { "no engine".to_owned() } else { place.engines.join(", ") };
            let text = format!("{}; {node}; {engines}", place.about);
            for (number, line) in wrapped(&text, WIDTH - 15).into_iter().enumerate() {
                let name = if number == 0 { place.name.as_str() } else { "" };
                writeln!(out, "  {name:<12} {line}")?;
            }
        }
        Ok(())
    }

    /// The largest copies of each pair, by the fastest way whose bytes were right.
    fn matrix(&self, out: &mut dyn Write) -> io::Result<()> {
        let figures = &self.record.figures;
        let mut lenders: Vec<&str> = Vec::new();
        let mut importers: Vec<&str> = Vec::new();
        for figure in figures {
            for (names, name) in
                [(&mut lenders, &figure.what.lender), (&mut importers, &figure.what.importer)]
            {
                if !names.contains(&name.as_str()) {
                    names.push(name);
                }
            }
        }
        if figures.is_empty() {
            return Ok(());
        }
        writeln!(out, "\nlargest copies in GB/s, by the fastest way that was right; rows lend")?;
        for importers in importers.chunks(ACROSS) {
            write!(out, "{:<12} {:<5}", "", "")?;
            let names: String = importers.iter().map(|name| format!("  {name:<18}")).collect();
            writeln!(out, "{}", names.trim_end())?;
            for lender in &lenders {
                let mut name = *lender;
                for direction in [Direction::Read, Direction::Write, Direction::Both] {
                    let cells: Vec<Option<(String, bool)>> =
                        importers.iter().map(|importer| self.cell(lender, importer, direction)).collect();
                    if cells.iter().all(Option::is_none) {
                        continue;
                    }
                    write!(out, "{name:<12} {direction:<5}")?;
                    let cells: String = (cells.into_iter().map(Option::unwrap_or_default))
                        .map(|(text, is_wrong)| format!("  {}", self.red(&format!("{text:<18}"), is_wrong)))
                        .collect();
                    writeln!(out, "{}", cells.trim_end())?;
                    name = "";
                }
            }
        }
        Ok(())
    }

    /// What is said of a pair, and whether any of its bytes were wrong.
    fn cell(&self, lender: &str, importer: &str, direction: Direction) -> Option<(String, bool)> {
        let is_it = |figure: &&Figure| {
            let what = &figure.what;
            what.lender == lender && what.importer == importer && what.direction == direction
        };
        let of_pair: Vec<&Figure> = self.record.figures.iter().filter(is_it).collect();
        if let Some(wrong) = of_pair.iter().find(|figure| figure.verdict == Verdict::Wrong) {
            return Some((format!("WRONG {}", wrong.what.path), true));
        }
        let largest = of_pair.iter().map(|figure| figure.what.size_bytes).max()?;
        let of_largest = of_pair.iter().filter(|figure| figure.what.size_bytes == largest);
        let best = of_largest.max_by(|one, other| one.bytes_per_s.total_cmp(&other.bytes_per_s))?;
        Some((format!("{:.3} {}", best.bytes_per_s / 1e9, best.what.path), false))
    }

    /// Small copies by their time, large ones by their bandwidth.
    fn lines(&self, out: &mut dyn Write) -> io::Result<()> {
        let mut pair = (String::new(), String::new());
        for (index, figure) in self.record.figures.iter().enumerate() {
            let what = &figure.what;
            let is_same = |other: &&Figure| {
                let other = &other.what;
                (&other.lender, &other.importer, &other.path, &other.engine, other.direction)
                    == (&what.lender, &what.importer, &what.path, &what.engine, what.direction)
            };
            let group: Vec<&Figure> = self.record.figures.iter().filter(is_same).collect();
            let is_end =
                |end: Option<&&Figure>| end.is_some_and(|end| end.what.size_bytes == what.size_bytes);
            let is_wrong = figure.verdict == Verdict::Wrong;
            if !(self.every_size || is_wrong || is_end(group.first()) || is_end(group.last())) {
                continue;
            }
            if pair != (what.lender.clone(), what.importer.clone()) {
                pair = (what.lender.clone(), what.importer.clone());
                writeln!(out, "\n{} lends, {} copies", pair.0, pair.1)?;
                if index == 0 {
                    writeln!(
                        out,
                        " {:<12} {:<14} {:<5} {:>7} {:>9} {:<13} {:>7}",
                        "path", "engine", "way", "size", "median", " p10-p90", "link"
                    )?;
                }
            }
            let is_small = what.size_bytes < 1 << 20;
            let (value, range) = if is_small { time_text(figure) } else { bandwidth_text(figure) };
            let shares = shares(figure);
            let verdict = match figure.verdict {
                Verdict::Wrong => "WRONG",
                Verdict::Right => "right",
                Verdict::Unverified => "?",
            };
            let size = Size(what.size_bytes).to_string();
            // Names can be as long as drivers like.
            let engine: String = what.engine.chars().take(14).collect();
            writeln!(
                out,
                " {:<12} {engine:<14} {:<5} {size:>7} {value:>9} {range:<13} {shares:>7} {}",
                what.path,
                what.direction,
                self.red(verdict, is_wrong)
            )?;
            if let Some(wrong) = &figure.wrong {
                let text = format!(
                    "{} of {} bytes wrong, first at {:#x}: {}",
                    wrong.wrong_bytes, wrong.of_bytes, wrong.first_wrong_bytes, wrong.looks_like
                );
                wrapped(&text, WIDTH - 6).iter().try_for_each(|line| writeln!(out, "      {line}"))?;
            }
        }
        Ok(())
    }

    fn rest(&self, out: &mut dyn Write) -> io::Result<()> {
        let record = self.record;
        let mut notes = Vec::new();
        let any = |is_so: fn(&Figure) -> bool| record.figures.iter().any(is_so);
        notes.push("GB/s are 10^9 bytes a second. Below 1 MiB a copy's time is shown.".to_owned());
        if any(|figure| figure.link_share.is_some()) {
            notes.push(
                "link: share of the raw link; after the stroke, of what writes can reach with the payloads (MPS) \
                 that are set."
                    .to_owned(),
            );
        } else if !record.figures.is_empty() {
            notes.push("link: no limit of any of these ways is known.".to_owned());
        }
        if any(|figure| figure.link_share.is_some_and(|share| share > 1.0)) {
            notes.push(
                "More than its link carries (>): the device is emulated, or the bytes took another way."
                    .to_owned(),
            );
        }
        if any(|figure| !figure.excludes_submission) {
            notes.push(
                "Times with * and bandwidths with * include submitting and waiting: the engine has no clock to ask."
                    .to_owned(),
            );
        }
        if any(|figure| figure.observer.as_deref() == Some("cpu-through-bar")) {
            notes.push(
                "A lender without an engine was looked at by the CPU through its BAR: what the device itself has \
                 is not known."
                    .to_owned(),
            );
        }
        if !record.verified {
            notes.push("Nobody looked whether bytes arrived (?).".to_owned());
        }
        if !record.figures.is_empty() {
            writeln!(out)?;
            for note in notes {
                wrapped(&note, WIDTH).iter().try_for_each(|line| writeln!(out, "{line}"))?;
            }
        }
        self.outliers(out)?;
        let refused: Vec<String> = (record.refused.iter())
            .map(|one| {
                let ends = [&one.lender, &one.importer, &one.path].map(String::as_str);
                let ends: Vec<&str> = ends.into_iter().filter(|end| !end.is_empty()).collect();
                format!("{}: {}", ends.join(" "), one.why)
            })
            .collect();
        self.list(out, "not measured", &refused)?;
        let failed: Vec<String> =
            record.failed.iter().map(|one| format!("{}: {}", one.what, one.why)).collect();
        self.list(out, "FAILED", &failed)?;
        let overheads: Vec<String> = (record.overheads.iter())
            .map(|one| {
                format!(
                    "{}: {:.3} (p10 {:.3}, p90 {:.3}, {} turns)",
                    one.what, one.ratio, one.p10, one.p90, one.turns
                )
            })
            .collect();
        self.list(out, "bandwidth through peer-copy by bandwidth in a bare loop", &overheads)
    }

    fn outliers(&self, out: &mut dyn Write) -> io::Result<()> {
        let with: Vec<String> = (self.record.figures.iter())
            .filter(|figure| figure.best_time().outlier_count > 0)
            .map(|figure| {
                let spread = figure.best_time();
                let named: Vec<String> = (spread.outliers.iter())
                    .map(|one| format!("no. {} {:.1} us", one.number, one.ns / 1e3))
                    .collect();
                format!("{}: {} of {}: {}", figure.what, spread.outlier_count, spread.count, named.join(", "))
            })
            .collect();
        if self.every_size || with.len() <= 4 {
            return self.list(out, "outliers", &with);
        }
        let count: usize = self.record.figures.iter().map(|figure| figure.best_time().outlier_count).sum();
        let text = format!("{count} copies in {} figures; --every-size and --json name them", with.len());
        self.list(out, "outliers", &[text])
    }

    fn list(&self, out: &mut dyn Write, title: &str, items: &[String]) -> io::Result<()> {
        if items.is_empty() {
            return Ok(());
        }
        writeln!(out, "\n{title}")?;
        for item in items {
            wrapped(item, WIDTH - 4).iter().enumerate().try_for_each(|(number, line)| {
                writeln!(out, "{}{line}", if number == 0 { "  " } else { "    " })
            })?;
        }
        Ok(())
    }

    fn red(&self, text: &str, is_wrong: bool) -> String {
        if self.colour && is_wrong { format!("\x1b[1;31m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// What a copy took, as whoever waits has it.
fn time_text(figure: &Figure) -> (String, String) {
    let us = |ns: f64| ns / 1e3;
    let time = &figure.time;
    let digits = |us: f64| if us < 1000.0 { format!("{us:.1}") } else { format!("{us:.0}") };
    (
        format!("{} us*", digits(us(time.median_ns))),
        format!("{}-{}", digits(us(time.p10_ns)), digits(us(time.p90_ns))),
    )
}

fn bandwidth_text(figure: &Figure) -> (String, String) {
    let gigabytes = |ns: f64| figure.bytes_per_s_in(ns) / 1e9;
    let time = figure.best_time();
    let star = if figure.excludes_submission { " " } else { "*" };
    (
        format!("{:.3}{star}", figure.bytes_per_s / 1e9),
        // A long time is a low bandwidth.
        format!("{:.3}-{:.3}", gigabytes(time.p90_ns), gigabytes(time.p10_ns)),
    )
}

/// Nothing where no limit is known.
fn shares(figure: &Figure) -> String {
    let percent = |share: f64| {
        if share > 1.0 { ">".to_owned() } else { format!("{:.0}%", share * 100.0) }
    };
    match (figure.link_share, figure.ceiling_share) {
        (Some(link), Some(ceiling)) => format!("{}/{}", percent(link), percent(ceiling)),
        (Some(link), None) => percent(link),
        _ => String::new(),
    }
}

/// Lines of at most `width` characters, broken at spaces where there are any.
pub fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let mut rest: Vec<char> = word.chars().collect();
        loop {
            let line = lines.last_mut().expect("there is always one");
            let space = usize::from(!line.is_empty());
            let room = width.saturating_sub(line.chars().count() + space);
            if rest.len() <= room {
                line.push_str(&" ".repeat(space));
                line.extend(rest);
                break;
            }
            if line.is_empty() {
                line.extend(rest.drain(..width.min(rest.len())));
            }
            lines.push(String::new());
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::tests::example;

    fn printed(record: &Record, colour: bool) -> String {
        let mut out = Vec::new();
        Matrix { record, colour, every_size: true }.print(&mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn it_fits_80_columns() {
        let text = printed(&example(), false);
        for line in text.lines() {
            assert!(line.chars().count() <= WIDTH, "{line:?} has {}", line.chars().count());
        }
        assert!(!text.contains('\x1b'), "{text}");
    }

    #[test]
    fn wrong_is_said_in_words_and_the_bytes_are_named() {
        let text = printed(&example(), false);
        assert!(text.contains("WRONG peer"), "{text}");
        assert!(text.contains("4096 of 4096 bytes wrong, first at 0x0: zeros"), "{text}");
        assert!(printed(&example(), true).contains("\x1b[1;31mWRONG"));
    }

    #[test]
    fn limits_are_shown_where_they_are_known_and_nowhere_else() {
        let mut record = example();
        assert!(printed(&record, false).contains(" 85%/93% right"), "{}", printed(&record, false));
        record.figures.iter_mut().for_each(|figure| {
            figure.link_share = None;
            figure.ceiling_share = None;
        });
        let text = printed(&record, false);
        assert!(!text.contains('%'), "{text}");
        assert!(text.contains("no limit of any of these ways is known"));
    }

    #[test]
    fn more_than_a_link_carries_is_no_share() {
        let mut record = example();
        record.figures[1].link_share = Some(3.2);
        record.figures[1].ceiling_share = None;
        let text = printed(&record, false);
        assert!(text.contains("More than its link carries"), "{text}");
        assert!(!text.contains("320"), "{text}");
    }

    #[test]
    fn long_words_are_broken() {
        assert_eq!(wrapped("ab cdefgh i", 4), ["ab", "cdef", "gh i"]);
        assert_eq!(wrapped("", 4), [""]);
    }
}
