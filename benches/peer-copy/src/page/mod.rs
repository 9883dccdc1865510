//! `Page`: a record as one HTML file, with plots. Nothing is fetched, nothing is run: plots are SVG in the page, and
//! light or dark is the reader's.
//!
//! What is wrong comes first, then the matrix, then a section for each pair. [`plot`] draws on an [`axis`]; `style.css`
//! has the colours, which differ for eyes that cannot tell red from green, and each way has a mark beside its colour.

mod axis;
mod plot;

use std::fmt::{self, Write};

use crate::comparison::{Change, Comparison, change};
use crate::matrix::{self, SMALL_BYTES};
use crate::record::{Direction, Figure, Record, Verdict};
use crate::same_gpu::LABEL;
use crate::size::Size;
use axis::Axis;
use plot::{Plot, Quantity};

const STYLE: &str = include_str!("style.css");

const DIRECTIONS: [Direction; 3] = [Direction::Read, Direction::Write, Direction::Both];

/// The page; with a record of before, under its name, held against it.
pub fn page(record: &Record, before: Option<(&str, &Record)>) -> String {
    let mut html = String::new();
    // Writing to a string cannot fail.
    write_page(&mut html, record, before).ok();
    html
}

fn write_page(html: &mut String, record: &Record, before: Option<(&str, &Record)>) -> fmt::Result {
    let machine = &record.machine;
    write!(
        html,
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>peer-copy</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>peer-copy</h1>\n"
    )?;
    let mut lines = vec![format!("Linux {}, {}", machine.kernel, matrix::cpus(machine))];
    lines.extend(machine.cpu_clock.text().map(|clock| format!("CPU clock: {clock}")));
    for line in lines {
        writeln!(html, "<p>{}</p>", escaped(&line))?;
    }
    verdict(html, record)?;
    if !record.figures.is_empty() {
        overview(html, record)?;
    }
    places(html, record)?;
    if let Some((name, before)) = before {
        compared(html, name, &Comparison::new(before, record))?;
    }
    let ways = ways(record);
    reading(html, record)?;
    for (lender, importer) in pairs(record) {
        let is_it = |figure: &&Figure| figure.what.lender == lender && figure.what.importer == importer;
        let figures: Vec<&Figure> = record.figures.iter().filter(is_it).collect();
        pair(html, &figures, &ways)?;
    }
    rest(html, record)?;
    html.push_str("</body>\n</html>\n");
    Ok(())
}

/// Pairs in the order in which they were measured.
fn pairs(record: &Record) -> Vec<(&str, &str)> {
    let mut pairs = Vec::new();
    for figure in &record.figures {
        let pair = (figure.what.lender.as_str(), figure.what.importer.as_str());
        if !pairs.contains(&pair) {
            pairs.push(pair);
        }
    }
    pairs
}

/// A path and an engine, as they are drawn everywhere.
struct Series<'a> {
    path: &'a str,
    engine: &'a str,
    /// The number of its mark.
    number: usize,
}

impl Series<'_> {
    fn is_of(&self, figure: &Figure) -> bool {
        (self.path, self.engine) == (figure.what.path.as_str(), figure.what.engine.as_str())
    }
}

/// Paths and engines. Each has the same mark in all plots, and in no plot another one has its colour, as long as there are enough.
fn ways(record: &Record) -> Vec<Series<'_>> {
    let mut ways: Vec<Series> = Vec::new();
    for figure in &record.figures {
        if ways.iter().any(|way| way.is_of(figure)) {
            continue;
        }
        let what = &figure.what;
        let is_twin = |other: &Figure| (&other.what.path, &other.what.engine) == (&what.path, &what.engine);
        let has_pair = |one: &Figure, other: &Figure| {
            (&one.what.lender, &one.what.importer) == (&other.what.lender, &other.what.importer)
        };
        let twins: Vec<&Figure> = record.figures.iter().filter(|other| is_twin(other)).collect();
        let is_beside = |way: &Series| {
            record.figures.iter().any(|one| way.is_of(one) && twins.iter().any(|twin| has_pair(one, twin)))
        };
        let free = |number: &usize| ways.iter().all(|way| way.number != *number);
        let clear = |number: &usize| {
            free(number)
                && ways.iter().all(|way| !plot::is_same_colour(way.number, *number) || !is_beside(way))
        };
        let mut all = 0..plot::SIGNS;
        let number = all.clone().find(clear).or_else(|| all.find(free)).unwrap_or(ways.len());
        ways.push(Series { path: &what.path, engine: &what.engine, number });
    }
    ways
}

/// The first thing that is seen.
fn verdict(html: &mut String, record: &Record) -> fmt::Result {
    let wrong: Vec<&Figure> =
        record.figures.iter().filter(|figure| figure.verdict == Verdict::Wrong).collect();
    let count = record.figures.len();
    if let Some(first) = wrong.first() {
        writeln!(
            html,
            "<p class=\"verdict wrong\">WRONG: the bytes of {} of {count} figures, first {}</p>",
            wrong.len(),
            escaped(&first.what.to_string())
        )?;
    }
    if let Some(first) = record.failed.first() {
        writeln!(
            html,
            "<p class=\"verdict wrong\">FAILED: {} broke, first {}: {}</p>",
            if record.failed.len() == 1 {
                "one way".to_owned()
            } else {
                format!("{} ways", record.failed.len())
            },
            escaped(&first.what.to_string()),
            escaped(&first.why)
        )?;
    }
    match () {
        () if record.has_failed() => Ok(()),
        () if count == 0 => writeln!(html, "<p class=\"verdict\">Nothing was measured.</p>"),
        () if !record.verified => {
            writeln!(html, "<p class=\"verdict\">{count} figures. Nobody looked whether bytes arrived.</p>")
        }
        () => writeln!(html, "<p class=\"verdict\">{count} figures, and all bytes arrived.</p>"),
    }
}

/// The matrix, as the terminal has it.
fn overview(html: &mut String, record: &Record) -> fmt::Result {
    let (lenders, importers) = matrix::ends(record);
    html.push_str("<p class=\"faint\">Largest copies, by the fastest way that was right. Rows lend, columns copy.</p>\n");
    html.push_str("<div class=\"scroll\"><table class=\"matrix\">\n<tr><th></th><th></th>");
    importers
        .iter()
        .try_for_each(|importer| write!(html, "<th class=\"word\">{}</th>", escaped(importer)))?;
    html.push_str("</tr>\n");
    for lender in lenders {
        let mut name = escaped(lender);
        for direction in DIRECTIONS {
            let cells: Vec<_> =
                importers.iter().map(|importer| matrix::cell(record, lender, importer, direction)).collect();
            if cells.iter().all(Option::is_none) {
                continue;
            }
            write!(html, "<tr><th class=\"word\">{name}</th><td class=\"word\">{direction}</td>")?;
            for cell in cells {
                match cell {
                    None => html.push_str("<td></td>"),
                    Some(cell) if cell.is_wrong => {
                        write!(
                            html,
                            "<td class=\"word wrong\">WRONG<small>{}</small></td>",
                            escaped(cell.path)
                        )?;
                    }
                    Some(cell) => write!(
                        html,
                        "<td class=\"word\">{}<small>{}, {}</small>{}</td>",
                        rate(cell.bytes_per_s),
                        escaped(cell.path),
                        Size(cell.size_bytes),
                        if cell.same_gpu { format!("<small>{LABEL}</small>") } else { String::new() }
                    )?,
                }
            }
            html.push_str("</tr>\n");
            name.clear();
        }
    }
    html.push_str("</table></div>\n");
    Ok(())
}

fn places(html: &mut String, record: &Record) -> fmt::Result {
    html.push_str(
        "<div class=\"scroll\"><table>\n<tr><th class=\"word\">place</th><th class=\"word\">is</th>",
    );
    html.push_str("<th>NUMA node</th><th>lends</th><th class=\"word\">engines</th><th class=\"word\">clocks</th></tr>\n");
    for place in &record.places {
        let lends = if place.lends_bytes > 0 { Size(place.lends_bytes).to_string() } else { String::new() };
        let clocks: Vec<String> = place.clocks.iter().map(|clock| clock.text()).collect();
        writeln!(
            html,
            "<tr><td class=\"word\">{}</td><td class=\"long\">{}</td><td>{}</td><td>{lends}</td>\
             <td class=\"word\">{}</td><td class=\"word\">{}</td></tr>",
            escaped(&place.name),
            escaped(&place.about),
            place.numa_node.map(|node| node.to_string()).unwrap_or_default(),
            escaped(&place.engines.join(", ")),
            escaped(&clocks.join("; ")),
        )?;
    }
    html.push_str("</table></div>\n");
    Ok(())
}

/// What got faster or slower; the rest only by its number.
fn compared(html: &mut String, name: &str, comparison: &Comparison) -> fmt::Result {
    writeln!(html, "<h2>Compared with {}</h2>", escaped(name))?;
    let moved: Vec<_> = (comparison.pairs().iter())
        .filter_map(|(before, now)| {
            let change = change(before, now);
            (change != Change::Same).then_some((before, now, change))
        })
        .collect();
    if let Some(text) = comparison.conditions() {
        writeln!(html, "<p>{}</p>", escaped(&text))?;
    }
    let same = comparison.pairs().len() - moved.len();
    let left_out = comparison.left_out(name).map(|text| format!("; {}", escaped(&text))).unwrap_or_default();
    writeln!(html, "<p class=\"faint\">{same} figures whose spreads touch are the same{left_out}.</p>")?;
    if moved.is_empty() {
        return Ok(());
    }
    html.push_str(
        "<div class=\"scroll\"><table>\n<tr><th class=\"word\">copies</th><th>before</th><th>now</th>",
    );
    html.push_str("<th class=\"word\">is</th></tr>\n");
    for (before, now, change) in moved {
        let class = if change == Change::Verdict { "word wrong" } else { "word" };
        writeln!(
            html,
            "<tr><td class=\"long\">{}</td><td>{}</td><td>{}</td><td class=\"{class}\">{}</td></tr>",
            escaped(&now.what.to_string()),
            rate(before.bytes_per_s),
            rate(now.bytes_per_s),
            change.word(),
        )?;
    }
    html.push_str("</table></div>\n");
    Ok(())
}

/// How all plots are to be read.
fn reading(html: &mut String, record: &Record) -> fmt::Result {
    if record.figures.is_empty() {
        return Ok(());
    }
    html.push_str(
        "<p class=\"faint\">In the plots: medians; bars from the tenth to the ninetieth percentile; both ",
    );
    html.push_str("scales are logarithmic. ");
    if record.figures.iter().any(|figure| figure.excludes_submission) {
        html.push_str(
            "A filled mark is by the device's own clock; a hollow one includes submitting and waiting. ",
        );
    } else {
        html.push_str("Marks are hollow: submitting and waiting are in the times. ");
    }
    html.push_str("A cross is WRONG.</p>\n");
    Ok(())
}

/// The signs of the ways that a pair has, beside its plots.
fn legend(html: &mut String, figures: &[&Figure], ways: &[Series]) -> fmt::Result {
    html.push_str("<ul class=\"ways\">\n");
    for way in ways.iter().filter(|way| figures.iter().any(|figure| way.is_of(figure))) {
        writeln!(html, "<li>{}{}, {}</li>", plot::sign(way.number), escaped(way.path), escaped(way.engine))?;
    }
    html.push_str("</ul>\n");
    Ok(())
}

/// A section: plots, and the figures as a table.
fn pair(html: &mut String, figures: &[&Figure], ways: &[Series]) -> fmt::Result {
    let Some(first) = figures.first() else { return Ok(()) };
    writeln!(html, "<h2>{}</h2>", escaped(&matrix::pair_title(first)))?;
    if let Some(link) = &first.link {
        let ceiling = match (link.max_payload_bytes, link.write_ceiling_bytes_per_s) {
            (Some(payload), Some(ceiling)) => {
                format!("; posted writes reach {} with payloads of {payload} bytes (MPS)", rate(ceiling))
            }
            _ => String::new(),
        };
        let raw = rate(link.raw_bytes_per_s);
        writeln!(html, "<p class=\"faint\">Raw link: {raw}, {}{ceiling}.</p>", escaped(&link.narrowest))?;
    }
    legend(html, figures, ways)?;
    let mut sizes_bytes: Vec<u64> = figures.iter().map(|figure| figure.what.size_bytes).collect();
    sizes_bytes.sort_unstable();
    sizes_bytes.dedup();
    html.push_str("<div class=\"plots\">\n");
    for quantity in [Quantity::Bandwidth, Quantity::Time] {
        let shown: Vec<&Figure> = (figures.iter().copied())
            .filter(|figure| quantity == Quantity::Bandwidth || figure.what.size_bytes < SMALL_BYTES)
            .collect();
        let all: Vec<f64> = shown.iter().flat_map(|figure| quantity.of(figure)).collect();
        for direction in DIRECTIONS {
            let of_direction = shown.iter().filter(|figure| figure.what.direction == direction);
            let number = |figure: &Figure| ways.iter().find(|way| way.is_of(figure)).map(|way| way.number);
            let of_direction: Vec<(usize, &Figure)> =
                of_direction.filter_map(|figure| Some((number(figure)?, *figure))).collect();
            if of_direction.is_empty() {
                continue;
            }
            let what = match quantity {
                Quantity::Bandwidth => "bandwidth over size",
                Quantity::Time => "time of small copies",
            };
            let sizes = sizes_bytes.iter().copied();
            let sizes = sizes.filter(|&size| quantity == Quantity::Bandwidth || size < SMALL_BYTES);
            let plot = Plot {
                title: format!("<b>{direction}</b>: {what}"),
                quantity,
                figures: of_direction,
                sizes_bytes: sizes.collect(),
                values: Axis::around(&all),
            };
            plot.draw(html)?;
        }
    }
    html.push_str("</div>\n");
    table(html, figures)
}

fn table(html: &mut String, figures: &[&Figure]) -> fmt::Result {
    let open = if figures.iter().any(|figure| figure.verdict == Verdict::Wrong) { " open" } else { "" };
    write!(html, "<details{open}><summary>{} figures</summary>", figures.len())?;
    html.push_str("<div class=\"scroll\"><table>\n<tr><th class=\"word\">way</th><th>size</th>");
    html.push_str(
        "<th class=\"word\">bytes</th><th>time</th><th>bandwidth</th><th>p10 to p90</th><th>raw link</th>",
    );
    html.push_str("<th>ceiling</th><th class=\"word\">who looked</th></tr>\n");
    for figure in figures {
        let spread = figure.best_time();
        let percent =
            |share: Option<f64>| share.map(|share| format!("{:.1} %", share * 100.0)).unwrap_or_default();
        let (class, verdict) = match (figure.verdict, &figure.wrong) {
            (Verdict::Right, _) => ("word", "right".to_owned()),
            (Verdict::Unverified, _) => ("word", "not looked at".to_owned()),
            (Verdict::Wrong, Some(wrong)) => (
                "long wrong",
                format!(
                    "WRONG: {} of {} bytes, first at {:#x}: {}",
                    wrong.wrong_bytes, wrong.of_bytes, wrong.first_wrong_bytes, wrong.looks_like
                ),
            ),
            (Verdict::Wrong, None) => ("word wrong", "WRONG".to_owned()),
        };
        let what = &figure.what;
        writeln!(
            html,
            "<tr><td class=\"word\">{}, {}, {}</td><td>{}</td><td class=\"{class}\">{}</td><td>{}</td><td>{}{}</td>\
             <td>{} to {}</td><td>{}</td><td>{}</td><td class=\"word\">{}</td></tr>",
            what.direction,
            escaped(&what.path),
            escaped(&what.engine),
            Size(what.size_bytes),
            escaped(&verdict),
            time(figure.time.median_ns),
            rate(figure.bytes_per_s),
            if figure.excludes_submission { "" } else { "*" },
            rate(figure.bytes_per_s_in(spread.p90_ns)),
            rate(figure.bytes_per_s_in(spread.p10_ns)),
            percent(figure.link_share),
            percent(figure.ceiling_share),
            escaped(figure.observer.as_deref().unwrap_or("")),
        )?;
    }
    html.push_str("</table></div>\n");
    if figures.iter().any(|figure| !figure.excludes_submission) {
        html.push_str(
            "<p class=\"faint\">* submitting and waiting are in it: the engine has no clock to ask.</p>\n",
        );
    }
    html.push_str("</details>\n");
    Ok(())
}

/// What else a record has.
fn rest(html: &mut String, record: &Record) -> fmt::Result {
    let overheads: Vec<(String, String)> = (record.overheads.iter())
        .map(|one| {
            let ratio =
                format!("{:.3} (p10 {:.3}, p90 {:.3}, {} turns)", one.ratio, one.p10, one.p90, one.turns);
            (one.what.to_string(), ratio)
        })
        .collect();
    reasons(html, "Bandwidth through peer-copy by bandwidth in a bare loop", &overheads)?;
    let failed: Vec<(String, String)> =
        record.failed.iter().map(|one| (one.what.to_string(), one.why.clone())).collect();
    reasons(html, "Failed", &failed)?;
    let refused: Vec<(String, String)> = (record.refused.iter())
        .map(|one| (format!("{} {} {}", one.lender, one.importer, one.path), one.why.clone()))
        .collect();
    reasons(html, "Not measured", &refused)?;
    let with = record.figures.iter().filter(|figure| figure.best_time().outlier_count > 0);
    let outliers: Vec<(String, String)> =
        with.map(|figure| (figure.what.to_string(), matrix::outliers(figure))).collect();
    if outliers.is_empty() {
        return Ok(());
    }
    writeln!(html, "<details><summary>Outliers in {} figures</summary>", outliers.len())?;
    rows(html, &outliers)?;
    html.push_str("</details>\n");
    Ok(())
}

fn reasons(html: &mut String, title: &str, reasons: &[(String, String)]) -> fmt::Result {
    if reasons.is_empty() {
        return Ok(());
    }
    writeln!(html, "<h2>{title}</h2>")?;
    rows(html, reasons)
}

fn rows(html: &mut String, rows: &[(String, String)]) -> fmt::Result {
    html.push_str("<div class=\"scroll\"><table>\n");
    for (what, why) in rows {
        let (what, why) = (escaped(what), escaped(why));
        writeln!(html, "<tr><td class=\"long\">{what}</td><td class=\"long\">{why}</td></tr>")?;
    }
    html.push_str("</table></div>\n");
    Ok(())
}

fn rate(bytes_per_s: f64) -> String {
    match bytes_per_s {
        rate if rate >= 999.5e6 => format!("{:.2} GB/s", rate / 1e9),
        rate if rate >= 999.5e3 => format!("{:.1} MB/s", rate / 1e6),
        rate => format!("{:.1} kB/s", rate / 1e3),
    }
}

fn time(ns: f64) -> String {
    match ns {
        ns if ns >= 999.5e6 => format!("{:.2} s", ns / 1e9),
        ns if ns >= 999.5e3 => format!("{:.1} ms", ns / 1e6),
        ns if ns >= 999.5 => format!("{:.1} us", ns / 1e3),
        ns => format!("{ns:.0} ns"),
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests;
