//! One plot: a few ways of one pair, in one direction, over the size of a copy.
//!
//! The SVG has no units of its own: places are shares of its width and height, so that the plot is as wide as its
//! column and letters stay as large as they are. Ways differ by colour and by mark, and wrong bytes have a mark
//! that no way has.

use std::fmt::{self, Write};

use super::axis::Axis;
use super::{escaped, rate, time};
use crate::record::{Figure, Verdict};
use crate::size::Size;

/// Colours in the style sheet, and marks below. Ways beyond repeat the colours with other marks.
const COLOURS: usize = 8;
const MARKS: [&str; 7] = [
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0Z",
    "M-3.6 -3.6H3.6V3.6H-3.6Z",
    "M0 -5L4.8 3.6H-4.8Z",
    "M0 -5.2L5.2 0L0 5.2L-5.2 0Z",
    "M0 5L4.8 -3.6H-4.8Z",
    "M-5 -1.8H-1.8V-5H1.8V-1.8H5V1.8H1.8V5H-1.8V1.8H-5Z",
    "M0 -5.2L4.9 -1.6L3 4.2H-3L-4.9 -1.6Z",
];
/// How many ways have a sign of their own.
pub const SIGNS: usize = COLOURS * MARKS.len();
/// The cross over what was wrong.
const WRONG: &str = "M-7 -7L7 7M-7 7L7 -7";
/// Between names of sizes, as a share of the width: five of them fit a phone.
const LABEL_GAP: f64 = 0.19;

/// What is plotted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quantity {
    /// Bytes a second.
    Bandwidth,
    /// From the call until it returned.
    Time,
}

/// A plot.
pub struct Plot<'a> {
    /// The title above the plot.
    pub title: String,
    /// What is plotted.
    pub quantity: Quantity,
    /// The figures, each with the number of its way.
    pub figures: Vec<(usize, &'a Figure)>,
    /// All sizes of the pair, so that plots beside each other have them at the same places.
    pub sizes_bytes: Vec<u64>,
    /// The values, shared by the plots of a pair.
    pub values: Axis,
}

/// The mark of a way; `class` is added to it.
fn mark(way: usize, class: &str) -> String {
    // Colours and marks are of coprime numbers: the pairs repeat late.
    format!("<path class=\"mark w{}{class}\" d=\"{}\"/>", way % COLOURS, MARKS[way % MARKS.len()])
}

/// Whether two ways are told apart by their marks alone.
pub fn is_same_colour(one: usize, other: usize) -> bool {
    one % COLOURS == other % COLOURS
}

/// The sign of a way beside its name.
pub fn sign(way: usize) -> String {
    let line = format!("<line class=\"lines w{}\" x1=\"1\" x2=\"33\" y1=\"8\" y2=\"8\"/>", way % COLOURS);
    format!("<svg aria-hidden=\"true\">{line}<svg x=\"17\" y=\"8\">{}</svg></svg>", mark(way, ""))
}

impl Quantity {
    /// The value of a figure, and its tenth and ninetieth percentile.
    pub fn of(self, figure: &Figure) -> [f64; 3] {
        match self {
            Self::Bandwidth => {
                let time = figure.best_time();
                let [slow, fast] = [time.p90_ns, time.p10_ns].map(|ns| figure.bytes_per_s_in(ns));
                [figure.bytes_per_s, slow, fast]
            }
            Self::Time => [figure.time.median_ns, figure.time.p10_ns, figure.time.p90_ns],
        }
    }

    /// A value as people read it.
    pub fn text(self, value: f64) -> String {
        match self {
            Self::Bandwidth => rate(value),
            Self::Time => time(value),
        }
    }

    /// Whether submitting and waiting are in it.
    fn includes_submission(self, figure: &Figure) -> bool {
        self == Self::Time || !figure.excludes_submission
    }
}

impl Plot<'_> {
    /// Draws it.
    ///
    /// # Errors
    /// None, where `html` is a string.
    pub fn draw(&self, html: &mut String) -> fmt::Result {
        let title = &self.title;
        write!(html, "<figure class=\"plot\"><figcaption>{title}</figcaption><div class=\"area\">")?;
        writeln!(html, "<svg role=\"img\" aria-label=\"{}\">", without_tags(title))?;
        self.scales(html)?;
        self.limits(html)?;
        let mut ways: Vec<usize> = self.figures.iter().map(|(way, _)| *way).collect();
        ways.dedup();
        ways.into_iter().try_for_each(|way| self.series(html, way))?;
        self.crosses(html)?;
        html.push_str("</svg></div></figure>\n");
        Ok(())
    }

    /// From the left edge, in percent.
    fn x(&self, size_bytes: u64) -> f64 {
        let log = |bytes: u64| (bytes as f64).log2();
        let (first, last) = (self.sizes_bytes.first(), self.sizes_bytes.last());
        let (low, high) = (first.map_or(0.0, |&one| log(one)) - 0.5, last.map_or(1.0, |&one| log(one)) + 0.5);
        (log(size_bytes) - low) / (high - low) * 100.0
    }

    /// From the top, in percent.
    fn y(&self, value: f64) -> f64 {
        (1.0 - self.values.share(value)) * 100.0
    }

    fn scales(&self, html: &mut String) -> fmt::Result {
        for tick in self.values.ticks() {
            let (at, label) = (self.y(tick), tidy(&self.quantity.text(tick)));
            write!(html, "<line class=\"grid\" x1=\"0%\" x2=\"100%\" y1=\"{at:.2}%\" y2=\"{at:.2}%\"/>")?;
            writeln!(
                html,
                "<text x=\"0%\" y=\"{at:.2}%\" dx=\"-8\" dy=\"4\" text-anchor=\"end\">{label}</text>"
            )?;
        }
        html.push_str("<line class=\"axis\" x1=\"0%\" x2=\"100%\" y1=\"100%\" y2=\"100%\"/>\n");
        let mut named = f64::NEG_INFINITY;
        for &size_bytes in &self.sizes_bytes {
            let at = self.x(size_bytes);
            writeln!(
                html,
                "<svg x=\"{at:.2}%\" y=\"100%\"><line class=\"axis\" x1=\"0\" x2=\"0\" y1=\"0\" y2=\"5\"/></svg>"
            )?;
            if at - named >= LABEL_GAP * 100.0 {
                named = at;
                let label = Size(size_bytes);
                writeln!(
                    html,
                    "<text x=\"{at:.2}%\" y=\"100%\" dy=\"19\" text-anchor=\"middle\">{label}</text>"
                )?;
            }
        }
        Ok(())
    }

    /// The raw link and what posted writes reach of it, where they lie on the scale.
    fn limits(&self, html: &mut String) -> fmt::Result {
        if self.quantity != Quantity::Bandwidth {
            return Ok(());
        }
        let Some(link) = self.figures.iter().find_map(|(_, figure)| figure.link.as_ref()) else {
            return Ok(());
        };
        let is_posted = self.figures.iter().any(|(_, figure)| figure.ceiling_share.is_some());
        let ceiling = link.write_ceiling_bytes_per_s.filter(|_| is_posted);
        for (limit, name, below) in [(Some(link.raw_bytes_per_s), "raw link", -5), (ceiling, "after MPS", 13)]
        {
            let Some(limit) = limit.filter(|&limit| self.values.has(limit)) else { continue };
            let at = self.y(limit);
            write!(html, "<line class=\"limit\" x1=\"0%\" x2=\"100%\" y1=\"{at:.2}%\" y2=\"{at:.2}%\"/>")?;
            writeln!(
                html,
                "<text x=\"100%\" y=\"{at:.2}%\" dy=\"{below}\" text-anchor=\"end\">{name}</text>"
            )?;
        }
        Ok(())
    }

    fn series(&self, html: &mut String, way: usize) -> fmt::Result {
        let colour = way % COLOURS;
        let of_way: Vec<&Figure> =
            self.figures.iter().filter(|(other, _)| *other == way).map(|(_, figure)| *figure).collect();
        let place = |figure: &Figure| {
            let [value, low, high] = self.quantity.of(figure);
            (self.x(figure.what.size_bytes), self.y(value), self.y(low), self.y(high))
        };
        for pair in of_way.windows(2) {
            let ((x1, y1, ..), (x2, y2, ..)) = (place(pair[0]), place(pair[1]));
            writeln!(
                html,
                "<line class=\"lines w{colour}\" x1=\"{x1:.2}%\" y1=\"{y1:.2}%\" x2=\"{x2:.2}%\" y2=\"{y2:.2}%\"/>"
            )?;
        }
        for figure in of_way {
            let (x, y, low, high) = place(figure);
            let class = if self.quantity.includes_submission(figure) { " included" } else { "" };
            let told = format!("{}: {}", figure.what, self.quantity.text(self.quantity.of(figure)[0]));
            write!(
                html,
                "<line class=\"spread w{colour}\" x1=\"{x:.2}%\" x2=\"{x:.2}%\" y1=\"{low:.2}%\" y2=\"{high:.2}%\"/>"
            )?;
            writeln!(
                html,
                "<svg x=\"{x:.2}%\" y=\"{y:.2}%\"><title>{}</title>{}</svg>",
                escaped(&told),
                mark(way, class)
            )?;
        }
        Ok(())
    }

    /// Over what was wrong. Last, so that nothing is drawn over them.
    fn crosses(&self, html: &mut String) -> fmt::Result {
        for (_, figure) in self.figures.iter().filter(|(_, figure)| figure.verdict == Verdict::Wrong) {
            let (x, y) = (self.x(figure.what.size_bytes), self.y(self.quantity.of(figure)[0]));
            let told = escaped(&format!("WRONG: {}", figure.what));
            write!(html, "<svg x=\"{x:.2}%\" y=\"{y:.2}%\"><title>{told}</title>")?;
            writeln!(html, "<path class=\"halo\" d=\"{WRONG}\"/><path class=\"bad\" d=\"{WRONG}\"/></svg>")?;
        }
        Ok(())
    }
}

/// "1 MB/s" for "1.0 MB/s".
fn tidy(label: &str) -> String {
    let Some((number, unit)) = label.split_once(' ') else { return label.to_owned() };
    let number =
        if number.contains('.') { number.trim_end_matches('0').trim_end_matches('.') } else { number };
    format!("{number} {unit}")
}

fn without_tags(html: &str) -> String {
    let mut text = String::new();
    for part in html.split('<') {
        text.push_str(part.split_once('>').map_or(part, |(_, rest)| rest));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ways_have_signs_of_their_own() {
        let signs: Vec<String> = (0..SIGNS).map(sign).collect();
        assert!(signs.iter().enumerate().all(|(index, one)| !signs[..index].contains(one)));
    }

    #[test]
    fn labels_have_no_zeros_to_spare() {
        assert_eq!(["1.00 GB/s", "20.0 MB/s", "500 us"].map(tidy), ["1 GB/s", "20 MB/s", "500 us"]);
        assert_eq!(without_tags("<b>read</b>: time"), "read: time");
    }
}
