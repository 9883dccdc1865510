//! `Comparison`: two records, figure by figure.
//!
//! Both are of one machine, which is checked before; what of it was another then ([`Comparison::conditions`]) is said first. A figure differs where the spreads (p10 to p90) do not touch; what differs by less may be the hour.

use std::io::{self, Write};

use peervram_programs::lines_within;

use crate::matrix::pair_title;
use crate::record::{Figure, Record, Verdict};
use crate::size::Size;

/// The width of a line. On narrower terminals, names stand above their figures.
const LINE_WIDTH: usize = 80;
/// Names can be as long as drivers like.
const ENGINE_WIDTH: usize = 24;

/// Figures of the same copies, before and now.
#[derive(Debug)]
pub struct Comparison<'a> {
    pairs: Vec<(&'a Figure, &'a Figure)>,
    only_before: usize,
    only_now: usize,
    conditions: Vec<String>,
}

/// How a figure moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// The spreads touch.
    Same,
    /// It is faster.
    Faster,
    /// It is slower.
    Slower,
    /// The bytes are wrong now and were not, or the other way: speeds say nothing.
    Verdict,
}

impl Change {
    /// In a word; none where nothing changed.
    pub fn word(self) -> &'static str {
        match self {
            Self::Same => "",
            Self::Faster => "faster",
            Self::Slower => "slower",
            Self::Verdict => "the bytes",
        }
    }
}

impl<'a> Comparison<'a> {
    /// The figures that both records have.
    pub fn new(before: &'a Record, now: &'a Record) -> Comparison<'a> {
        let twin = |figure: &Figure| before.figures.iter().find(|other| other.what == figure.what);
        let pairs: Vec<_> =
            now.figures.iter().filter_map(|figure| twin(figure).map(|before| (before, figure))).collect();
        let mut conditions = now.machine.conditions(&before.machine);
        for place in &now.places {
            let twin = before.places.iter().find(|twin| twin.name == place.name && twin.about != place.about);
            conditions.extend(twin.map(|twin| format!("{} was {}", place.name, twin.about)));
        }
        Comparison {
            conditions,
            only_before: before.figures.len() - pairs.len(),
            only_now: now.figures.len() - pairs.len(),
            pairs,
        }
    }

    /// What both records have: a figure of before, and of now.
    pub fn pairs(&self) -> &[(&'a Figure, &'a Figure)] {
        &self.pairs
    }

    /// What differed on the machine before, in words; nothing if nothing did.
    pub fn conditions(&self) -> Option<String> {
        (!self.conditions.is_empty()).then(|| format!("since then: {}", self.conditions.join("; ")))
    }

    /// What only one of the records has, in words; nothing if there is nothing.
    pub fn left_out(&self, name: &str) -> Option<String> {
        let (before, now) = (self.only_before, self.only_now);
        (before + now > 0)
            .then(|| format!("not compared: {before} that only {name} has, {now} that it has not"))
    }

    /// Prints a line for each, for a terminal of `width` columns.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn print(&self, name: &str, width: usize, out: &mut dyn Write) -> io::Result<()> {
        writeln!(out)?;
        let say = |out: &mut dyn Write, text: &str| {
            lines_within(text, width).iter().try_for_each(|line| writeln!(out, "{line}"))
        };
        say(out, &format!("compared with {name}: bandwidth before and now, GB/s"))?;
        self.conditions().map_or(Ok(()), |text| say(out, &text))?;
        let mut pair = String::new();
        for (before, now) in &self.pairs {
            let what = &now.what;
            let title = pair_title(now);
            if pair != title {
                say(out, &title)?;
                pair = title;
            }
            let (then, today) = (before.bytes_per_s / 1e9, now.bytes_per_s / 1e9);
            let size = Size(what.size_bytes).to_string();
            let change = change(before, now).word();
            let values = format!("{size:>7} {then:>7.3} {today:>7.3} {change}");
            if width < LINE_WIDTH {
                say(out, &format!("{}, {}, {}", what.path, what.engine, what.direction))?;
                writeln!(out, "  {}", values.trim_end())?;
            } else {
                let engine: String = what.engine.chars().take(ENGINE_WIDTH).collect();
                let line =
                    format!(" {:<12} {engine:<ENGINE_WIDTH$} {:<5} {values}", what.path, what.direction);
                writeln!(out, "{}", line.trim_end())?;
            }
        }
        if let Some(text) = self.left_out(name) {
            say(out, &text)?;
        }
        Ok(())
    }
}

/// How a figure moved.
pub fn change(before: &Figure, now: &Figure) -> Change {
    let is_wrong = |figure: &Figure| figure.verdict == Verdict::Wrong;
    // Times of different clocks are not compared.
    let (then, today) = if before.excludes_submission == now.excludes_submission {
        (before.best_time(), now.best_time())
    } else {
        (&before.time, &now.time)
    };
    match () {
        () if is_wrong(before) != is_wrong(now) => Change::Verdict,
        () if today.p90_ns < then.p10_ns => Change::Faster,
        () if today.p10_ns > then.p90_ns => Change::Slower,
        () => Change::Same,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::tests::example;
    use crate::spread::Spread;

    fn figure(times: &[f64]) -> Figure {
        let figure = example().figures.remove(1);
        Figure { time: Spread::of(times).unwrap(), ..figure }
    }

    #[test]
    fn spreads_that_touch_are_the_same() {
        let before = figure(&[10.0, 11.0, 12.0]);
        assert_eq!(change(&before, &figure(&[11.0, 12.0, 13.0])), Change::Same);
        assert_eq!(change(&before, &figure(&[5.0, 6.0, 7.0])), Change::Faster);
        assert_eq!(change(&before, &figure(&[15.0, 16.0, 17.0])), Change::Slower);
    }

    #[test]
    fn wrong_bytes_are_no_speed() {
        let before = figure(&[10.0]);
        let now = Figure { verdict: Verdict::Wrong, ..figure(&[1.0]) };
        assert_eq!(change(&before, &now), Change::Verdict);
    }

    #[test]
    fn what_was_another_is_said_before_any_figure() {
        let (mut before, now) = (example(), example());
        assert_eq!(Comparison::new(&before, &now).conditions(), None);
        before.machine.kernel = "6.12".into();
        before.places[0].about = "an older driver".into();
        let mut out = Vec::new();
        Comparison::new(&before, &now).print("before", 200, &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        let said = "since then: the kernel was 6.12 and is 7.3.4; 0000:01:00.0 was an older driver";
        assert!(text.find(said).unwrap() < text.find("64 MiB").unwrap(), "{text}");
    }

    #[test]
    fn figures_of_one_record_only_are_counted() {
        let (before, mut now) = (example(), example());
        now.figures[0].what.size_bytes = 8192;
        let comparison = Comparison::new(&before, &now);
        for width in [40, 80, 200] {
            let mut out = Vec::new();
            comparison.print("before", width, &mut out).unwrap();
            let text = String::from_utf8(out).unwrap();
            let words: Vec<&str> = text.split_whitespace().collect();
            assert!(words.join(" ").contains("1 that only before has, 1 that it has not"), "{text}");
            assert!(text.lines().all(|line| line.chars().count() <= width), "{text}");
        }
    }
}
