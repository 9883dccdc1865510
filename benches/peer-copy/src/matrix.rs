//! `Matrix`: a record on a terminal, as wide as that is, from 40 columns on. Colour says nothing that words do not.

use std::io::{self, Write};

use peervram_programs::lines_within;

use crate::machine::MachineRecord;
use crate::record::{CopyKey, Direction, Figure, Record, Verdict};
use crate::same_gpu;
use crate::size::Size;

/// Copies below are shown by their time, others by their bandwidth.
pub const SMALL_BYTES: u64 = 1 << 20;
/// The columns of a terminal that does not tell.
pub const USUAL_WIDTH: usize = 80;
/// Below, lines would break whatever is done.
pub const LEAST_WIDTH: usize = 40;
/// The width of a line of figures. On narrower terminals, names stand above their figures.
const LINE_WIDTH: usize = 80;
/// Longer lines of text are hard to read.
const TEXT_WIDTH: usize = 110;
/// The matrix's columns: who lends and which way, and each importer.
const LENDER_WIDTH: usize = 18;
const IMPORTER_WIDTH: usize = 20;

/// A record, to be printed.
pub struct Matrix<'a> {
    /// The record.
    pub record: &'a Record,
    /// Whether the terminal has colours.
    pub colour: bool,
    /// A line for each size, rather than for the smallest and the largest.
    pub every_size: bool,
    /// The terminal's columns, at least [`LEAST_WIDTH`].
    pub width: usize,
}

/// The fastest of a pair's largest copies, or one that was wrong.
pub struct Cell<'a> {
    /// How fast.
    pub bytes_per_s: f64,
    /// By which path.
    pub path: &'a str,
    /// How large they are.
    pub size_bytes: u64,
    /// Whether any of the pair's bytes were wrong; then it is of those.
    pub is_wrong: bool,
    /// Whether it is within one GPU.
    pub same_gpu: bool,
}

/// Who lent and who copied, in the order of the places.
pub fn ends(record: &Record) -> (Vec<&str>, Vec<&str>) {
    let names = || record.places.iter().map(|place| place.name.as_str());
    let any = |is_so: &dyn Fn(&CopyKey) -> bool| record.figures.iter().any(|figure| is_so(&figure.what));
    (
        names().filter(|name| any(&|what| what.lender == *name)).collect(),
        names().filter(|name| any(&|what| what.importer == *name)).collect(),
    )
}

/// What is said of a pair in one direction.
pub fn cell<'a>(record: &'a Record, lender: &str, importer: &str, direction: Direction) -> Option<Cell<'a>> {
    let is_it = |figure: &&Figure| {
        let what = &figure.what;
        what.lender == lender && what.importer == importer && what.direction == direction
    };
    let of_pair: Vec<&'a Figure> = record.figures.iter().filter(is_it).collect();
    let cell = |shown: &'a Figure, is_wrong| Cell {
        bytes_per_s: shown.bytes_per_s,
        path: &shown.what.path,
        size_bytes: shown.what.size_bytes,
        is_wrong,
        same_gpu: shown.same_gpu,
    };
    if let Some(wrong) = of_pair.iter().find(|figure| figure.verdict == Verdict::Wrong) {
        return Some(cell(wrong, true));
    }
    // A plain copy is no way between two places.
    let ways = || of_pair.iter().filter(|figure| figure.what.path != same_gpu::LOCAL);
    let largest = ways().map(|figure| figure.what.size_bytes).max()?;
    let of_largest = ways().filter(|figure| figure.what.size_bytes == largest);
    let best = of_largest.max_by(|one, other| one.bytes_per_s.total_cmp(&other.bytes_per_s))?;
    Some(cell(best, false))
}

/// "AMD EPYC, 64 CPUs, pinned to CPU 3".
pub fn cpus(machine: &MachineRecord) -> String {
    let name = machine.processor.as_ref().map(|name| format!("{name}, ")).unwrap_or_default();
    let pinned = match machine.pinned_cpus[..] {
        [] => String::new(),
        [one] => format!(", pinned to CPU {one}"),
        [one, other, ..] => format!(", pinned to CPUs {one} and {other}"),
    };
    let plural = if machine.cpus == 1 { "" } else { "s" };
    format!("{name}{} CPU{plural}{pinned}", machine.cpus)
}

/// Whose memory, and who copies.
pub fn pair_title(figure: &Figure) -> String {
    let CopyKey { lender, importer, .. } = &figure.what;
    let label = if figure.same_gpu { format!(" ({})", same_gpu::LABEL) } else { String::new() };
    format!("{lender} lends, {importer} copies{label}")
}

/// How many of its copies lie outside, and the first of them.
pub fn outliers(figure: &Figure) -> String {
    let spread = figure.best_time();
    let named: Vec<String> =
        (spread.outliers.iter()).map(|one| format!("no. {} {:.1} us", one.number, one.ns / 1e3)).collect();
    format!("{} of {}: {}", spread.outlier_count, spread.count, named.join(", "))
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

    /// Text that may be broken.
    fn text_width(&self) -> usize {
        self.width.min(TEXT_WIDTH)
    }

    fn places(&self, out: &mut dyn Write) -> io::Result<()> {
        let machine = &self.record.machine;
        let mut lines = vec![format!("Linux {}, {}", machine.kernel, cpus(machine))];
        lines.extend(machine.cpu_clock.text().map(|clock| format!("CPU clock: {clock}")));
        let lines = lines.iter().flat_map(|line| lines_within(line, self.text_width()));
        lines.into_iter().try_for_each(|line| writeln!(out, "{line}"))?;
        for place in &self.record.places {
            let node = place.numa_node.map_or("no NUMA node".to_owned(), |node| format!("NUMA node {node}"));
            let engines =
                if place.engines.is_empty() { "no engine".to_owned() } else { place.engines.join(", ") };
            let mut text = format!("{}; {node}; {engines}", place.about);
            for clock in &place.clocks {
                text.push_str(&format!("; {}", clock.text()));
            }
            for (number, line) in lines_within(&text, self.text_width() - 15).into_iter().enumerate() {
                let name = if number == 0 { place.name.as_str() } else { "" };
                writeln!(out, "  {name:<12} {line}")?;
            }
        }
        Ok(())
    }

    /// The largest copies of each pair, by the fastest way whose bytes were right.
    fn matrix(&self, out: &mut dyn Write) -> io::Result<()> {
        let (lenders, importers) = ends(self.record);
        if lenders.is_empty() {
            return Ok(());
        }
        writeln!(out)?;
        let title = "largest copies in GB/s, by the fastest way that was right; rows lend";
        lines_within(title, self.text_width()).iter().try_for_each(|line| writeln!(out, "{line}"))?;
        let across = ((self.width.saturating_sub(LENDER_WIDTH)) / IMPORTER_WIDTH).max(1);
        for importers in importers.chunks(across) {
            write!(out, "{:<12} {:<5}", "", "")?;
            let names: String = importers.iter().map(|name| format!("  {name:<18}")).collect();
            writeln!(out, "{}", names.trim_end())?;
            for lender in &lenders {
                let mut name = *lender;
                for direction in [Direction::Read, Direction::Write, Direction::Both] {
                    let cells: Vec<Option<Cell>> = (importers.iter())
                        .map(|importer| cell(self.record, lender, importer, direction))
                        .collect();
                    if cells.iter().all(Option::is_none) {
                        continue;
                    }
                    write!(out, "{name:<12} {direction:<5}")?;
                    let text = |cell: &Cell| match (cell.is_wrong, cell.same_gpu) {
                        (true, _) => format!("WRONG {}", cell.path),
                        (_, true) => format!("({:.3} {})", cell.bytes_per_s / 1e9, cell.path),
                        _ => format!("{:.3} {}", cell.bytes_per_s / 1e9, cell.path),
                    };
                    let cells: String = (cells.iter())
                        .map(|cell| {
                            let is_wrong = cell.as_ref().is_some_and(|cell| cell.is_wrong);
                            let text = cell.as_ref().map(text).unwrap_or_default();
                            format!("  {}", self.red(&format!("{text:<18}"), is_wrong))
                        })
                        .collect();
                    writeln!(out, "{}", cells.trim_end())?;
                    name = "";
                }
            }
        }
        Ok(())
    }

    /// Small copies by their time, large ones by their bandwidth.
    fn lines(&self, out: &mut dyn Write) -> io::Result<()> {
        let is_narrow = self.width < LINE_WIDTH;
        // Names can be as long as drivers like.
        let longest = self.record.figures.iter().map(|figure| figure.what.engine.chars().count()).max();
        let engine_width = longest.unwrap_or(0).clamp(14, 14 + self.width.saturating_sub(LINE_WIDTH));
        let mut pair = (String::new(), String::new());
        let mut way = String::new();
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
                way.clear();
                writeln!(out)?;
                let title = pair_title(figure);
                lines_within(&title, self.text_width())
                    .iter()
                    .try_for_each(|line| writeln!(out, "{line}"))?;
                if index == 0 && !is_narrow {
                    writeln!(
                        out,
                        " {:<12} {:<engine_width$} {:<5} {:>7} {:>9} {:<13} {:>7}",
                        "path", "engine", "way", "size", "median", " p10-p90", "link"
                    )?;
                }
            }
            let (value, range) =
                if what.size_bytes < SMALL_BYTES { time_text(figure) } else { bandwidth_text(figure) };
            let verdict = match figure.verdict {
                Verdict::Wrong => "WRONG",
                Verdict::Right => "right",
                Verdict::Unverified => "?",
            };
            let verdict = self.red(verdict, is_wrong);
            let size = Size(what.size_bytes).to_string();
            if is_narrow {
                let this = format!("{}, {}, {}", what.path, what.engine, what.direction);
                if way != this {
                    lines_within(&this, self.width - 1)
                        .iter()
                        .try_for_each(|line| writeln!(out, " {line}"))?;
                    way = this;
                }
                writeln!(out, "  {size:>7} {value:>9} {range:<13} {verdict}")?;
            } else {
                let engine: String = what.engine.chars().take(engine_width).collect();
                writeln!(
                    out,
                    " {:<12} {engine:<engine_width$} {:<5} {size:>7} {value:>9} {range:<13} {:>7} {verdict}",
                    what.path,
                    what.direction,
                    shares(figure),
                )?;
            }
            if let Some(wrong) = &figure.wrong {
                let text = format!(
                    "{} of {} bytes wrong, first at {:#x}: {}",
                    wrong.wrong_bytes, wrong.of_bytes, wrong.first_wrong_bytes, wrong.looks_like
                );
                let lines = lines_within(&text, self.text_width() - 6);
                lines.iter().try_for_each(|line| writeln!(out, "      {line}"))?;
            }
        }
        Ok(())
    }

    fn rest(&self, out: &mut dyn Write) -> io::Result<()> {
        let record = self.record;
        let mut notes = Vec::new();
        let any = |is_so: fn(&Figure) -> bool| record.figures.iter().any(is_so);
        notes.push("GB/s are 10^9 bytes a second. Below 1 MiB a copy's time is shown.".to_owned());
        if self.width < LINE_WIDTH {
            notes.push("Shares of the link are left out of so narrow a terminal.".to_owned());
        } else if any(|figure| figure.link_share.is_some()) {
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
        if any(|figure| figure.same_gpu) {
            let [opaque_fd, dma_buf, local] = same_gpu::PATHS;
            notes.push(format!(
                "{}, in brackets above: a second device of the GPU copies what the first one shares, as {opaque_fd} or {dma_buf}; {local} \
                 is a plain copy beside it.",
                same_gpu::LABEL
            ));
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
                lines_within(&note, self.text_width()).iter().try_for_each(|line| writeln!(out, "{line}"))?;
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
            .map(|figure| format!("{}: {}", figure.what, outliers(figure)))
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
        writeln!(out)?;
        lines_within(title, self.text_width()).iter().try_for_each(|line| writeln!(out, "{line}"))?;
        for item in items {
            lines_within(item, self.text_width() - 4).iter().enumerate().try_for_each(|(number, line)| {
                writeln!(out, "{}{line}", if number == 0 { "  " } else { "    " })
            })?;
        }
        Ok(())
    }

    fn red(&self, text: &str, is_wrong: bool) -> String {
        if self.colour && is_wrong { format!("\x1b[1;31m{text}\x1b[0m") } else { text.to_owned() }
    }
}

/// The time of a copy as the caller sees it.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::tests::example;

    fn printed_in(width: usize, record: &Record, colour: bool) -> String {
        let mut out = Vec::new();
        Matrix { record, colour, every_size: true, width }.print(&mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    fn printed(record: &Record, colour: bool) -> String {
        printed_in(USUAL_WIDTH, record, colour)
    }

    #[test]
    fn it_fits_its_terminal() {
        let mut record = example();
        record.places[0].about = "a device whose driver has a long name ".repeat(4);
        record.figures[1].what.engine = "an engine whose name is longer than any column".to_owned();
        for width in [LEAST_WIDTH, 60, 79, USUAL_WIDTH, 200] {
            let text = printed_in(width, &record, false);
            for line in text.lines() {
                assert!(line.chars().count() <= width, "{line:?} has {} of {width}", line.chars().count());
            }
            assert!(text.contains("WRONG") && text.contains("26.844*"), "{text}");
            assert!(!text.contains('\x1b'), "{text}");
        }
    }

    #[test]
    fn clocks_are_shown_where_they_are_known() {
        let words = |text: String| text.split_whitespace().collect::<Vec<_>>().join(" ");
        let text = words(printed(&example(), false));
        assert!(text.contains("CPU clock: governor performance, 3.40 GHz"), "{text}");
        assert!(text.contains("sclk 800 MHz of 500 to"), "{text}");
        let mut unknown = example();
        unknown.machine.cpu_clock = Default::default();
        unknown.places[0].clocks.clear();
        let text = printed(&unknown, false);
        assert!(!text.contains("CPU clock") && !text.contains("MHz"), "{text}");
    }

    #[test]
    fn wrong_is_said_in_words_and_the_bytes_are_named() {
        let text = printed(&example(), false);
        assert!(text.contains("WRONG peer"), "{text}");
        assert!(text.contains("4096 of 4096 bytes wrong, first at 0x0: zeros"), "{text}");
        assert!(printed(&example(), true).contains("\x1b[1;31mWRONG"));
    }

    #[test]
    fn what_cannot_be_had_is_listed_with_the_reason() {
        let (mut record, why) = (example(), "no engine of it reaches a BAR");
        record.refused[0].why = why.into();
        let text = printed(&record, false);
        let words: Vec<&str> = text.split_whitespace().collect();
        assert!(words.join(" ").contains(why), "{text}");
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
    fn what_stays_within_one_gpu_is_no_peer() {
        let mut record = example();
        record.figures.remove(0);
        record.figures[0].same_gpu = true;
        record.figures[0].what.path = "dma-buf".to_owned();
        let local = Figure {
            what: CopyKey { path: same_gpu::LOCAL.to_owned(), ..record.figures[0].what.clone() },
            bytes_per_s: 1e12,
            ..record.figures[0].clone()
        };
        record.figures.push(local);
        let text = printed(&record, false);
        assert!(text.contains("(26.844 dma-buf)"), "a plain copy is no way between two: {text}");
        assert!(text.contains("copies (same GPU, not peer)"), "{text}");
    }

    #[test]
    fn long_words_are_broken() {
        assert_eq!(lines_within("ab cdefgh i", 4), ["ab", "cdef", "gh i"]);
        assert_eq!(lines_within("", 4), [""]);
    }
}
