//! `Page`: a record as one HTML file, with plots. Nothing is fetched, nothing is run: plots are SVG in the page, and
//! light or dark is the reader's.

use std::fmt::{self, Write};

use crate::record::{Figure, Record, Verdict};
use crate::size::Size;

const STYLE: &str = "
:root { color-scheme: light dark; --back: #ffffff; --text: #1c1c1e; --faint: #6b6b70; --line: #d8d8dc;
  --wrong: #c01c28; --s0: #1a6fd0; --s1: #b8560c; --s2: #1d7f45; --s3: #8a3ab9; --s4: #0f7c86; --s5: #a3195b; }
@media (prefers-color-scheme: dark) { :root { --back: #17181a; --text: #e8e8ea; --faint: #a0a0a6; --line: #3a3b40;
  --wrong: #ff7b72; --s0: #6cb2ff; --s1: #ffae66; --s2: #6fd492; --s3: #d3a0f5; --s4: #67d3dc; --s5: #ff8fc0; } }
body { background: var(--back); color: var(--text); font: 15px/1.5 system-ui, sans-serif; max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
p, figcaption { color: var(--faint); }
figure { margin: 0; } svg { width: 100%; height: auto; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th.word, td.word { text-align: left; } td.wrong, .wrong { color: var(--wrong); font-weight: bold; }
td.why { white-space: normal; text-align: left; }
svg text { fill: var(--faint); font-size: 12px; } svg .grid { stroke: var(--line); stroke-width: 1; }
svg .limit { stroke: var(--faint); stroke-dasharray: 5 4; }
";

const COLOURS: usize = 6;
/// The plot's inside, in the SVG's own units.
const LEFT: f64 = 64.0;
const TOP: f64 = 12.0;
const WIDTH: f64 = 620.0;
const HEIGHT: f64 = 240.0;

/// The page.
pub fn page(record: &Record) -> String {
    let mut html = String::new();
    // Writing to a string cannot fail.
    write_page(&mut html, record).ok();
    html
}

fn write_page(html: &mut String, record: &Record) -> fmt::Result {
    let machine = &record.machine;
    write!(
        html,
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>peer-copy</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>peer-copy</h1>\n\
         <p>Linux {}, {} CPUs{}. Medians; bars from the tenth to the ninetieth percentile. {}</p>\n",
        escaped(&machine.kernel),
        machine.cpus,
        machine.pinned_cpu.map(|cpu| format!(", pinned to CPU {cpu}")).unwrap_or_default(),
        if record.verified { "Bytes were looked at." } else { "Nobody looked whether bytes arrived." },
    )?;
    if record.has_failed() {
        html.push_str("<p class=\"wrong\">Bytes were WRONG, or copies broke: see below.</p>\n");
    }
    places(html, record)?;
    let mut pairs: Vec<(&str, &str)> = Vec::new();
    for figure in &record.figures {
        let pair = (figure.what.lender.as_str(), figure.what.importer.as_str());
        if !pairs.contains(&pair) {
            pairs.push(pair);
        }
    }
    for (lender, importer) in pairs {
        let figures: Vec<&Figure> = (record.figures.iter())
            .filter(|figure| figure.what.lender == lender && figure.what.importer == importer)
            .collect();
        let (lender, importer) = (escaped(lender), escaped(importer));
        writeln!(html, "<h2>{lender} lends, {importer} copies</h2>")?;
        plot(html, &figures)?;
        table(html, &figures)?;
    }
    let refused: Vec<(String, &str)> = (record.refused.iter())
        .map(|one| (format!("{} {} {}", one.lender, one.importer, one.path), one.why.as_str()))
        .collect();
    reasons(html, "Not measured", &refused)?;
    let failed: Vec<(String, &str)> =
        record.failed.iter().map(|one| (one.what.to_string(), one.why.as_str())).collect();
    reasons(html, "Failed", &failed)?;
    html.push_str("</body>\n</html>\n");
    Ok(())
}

fn places(html: &mut String, record: &Record) -> fmt::Result {
    html.push_str(
        "<div class=\"scroll\"><table>\n<tr><th class=\"word\">place</th><th class=\"word\">is</th>",
    );
    html.push_str("<th>NUMA node</th><th>lends</th><th class=\"word\">engines</th></tr>\n");
    for place in &record.places {
        let lends = if place.lends_bytes > 0 { Size(place.lends_bytes).to_string() } else { String::new() };
        writeln!(
            html,
            "<tr><td class=\"word\">{}</td><td class=\"word\">{}</td><td>{}</td><td>{lends}</td>\
             <td class=\"word\">{}</td></tr>",
            escaped(&place.name),
            escaped(&place.about),
            place.numa_node.map(|node| node.to_string()).unwrap_or_default(),
            escaped(&place.engines.join(", ")),
        )?;
    }
    html.push_str("</table></div>\n");
    Ok(())
}

/// Bandwidth over size, both by powers.
fn plot(html: &mut String, figures: &[&Figure]) -> fmt::Result {
    let sizes: Vec<f64> = figures.iter().map(|figure| (figure.what.size_bytes as f64).log2()).collect();
    let ends = |figure: &&Figure| {
        let time = figure.best_time();
        [figure.bytes_per_s_in(time.p90_ns), figure.bytes_per_s_in(time.p10_ns)]
            .map(|one| one.max(1.0).log10())
    };
    let speeds: Vec<f64> = figures.iter().flat_map(ends).collect();
    let least = |values: &[f64]| values.iter().copied().fold(f64::INFINITY, f64::min);
    let most = |values: &[f64]| values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let (x0, x1) = (least(&sizes) - 0.5, most(&sizes) + 0.5);
    let (y0, y1) = (least(&speeds).floor(), most(&speeds).ceil().max(least(&speeds).floor() + 1.0));
    let x = |size_bytes: u64| LEFT + ((size_bytes as f64).log2() - x0) / (x1 - x0) * WIDTH;
    let y = |bytes_per_s: f64| TOP + (y1 - bytes_per_s.max(1.0).log10()) / (y1 - y0) * HEIGHT;

    let mut ways: Vec<String> = Vec::new();
    for figure in figures {
        let way = way(figure);
        if !ways.contains(&way) {
            ways.push(way);
        }
    }
    let (bottom, right) = (TOP + HEIGHT, LEFT + WIDTH);
    let height = bottom + 40.0 + 18.0 * ways.len() as f64;
    writeln!(
        html,
        "<figure><svg viewBox=\"0 0 {} {height}\" role=\"img\" aria-label=\"bandwidth over size\">",
        right + 90.0
    )?;
    for power in y0 as i32..=y1 as i32 {
        let at = y(10f64.powi(power));
        let label = rate(10f64.powi(power));
        writeln!(
            html,
            "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{right}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>\
             <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>",
            LEFT - 6.0,
            at + 4.0
        )?;
    }
    let mut labelled: Vec<u64> = Vec::new();
    for figure in figures {
        let size_bytes = figure.what.size_bytes;
        if !labelled.contains(&size_bytes) {
            labelled.push(size_bytes);
            let at = x(size_bytes);
            writeln!(
                html,
                "<text x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
                bottom + 18.0,
                Size(size_bytes)
            )?;
        }
    }
    if let Some(link) = figures.iter().find_map(|figure| figure.link.as_ref()) {
        let at = y(link.raw_bytes_per_s);
        // A limit that lies outside of the plot would squeeze it.
        if (TOP..=bottom).contains(&at) {
            writeln!(
                html,
                "<line class=\"limit\" x1=\"{LEFT}\" x2=\"{right}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>\
                 <text x=\"{}\" y=\"{:.1}\">raw link</text>",
                right + 6.0,
                at + 4.0
            )?;
        }
    }
    for (index, name) in ways.iter().enumerate() {
        let colour = format!("var(--s{})", index % COLOURS);
        // More ways than colours differ by their lines.
        let dashes = ["", " stroke-dasharray=\"6 3\"", " stroke-dasharray=\"2 3\""][index / COLOURS % 3];
        let of_way: Vec<&&Figure> = figures.iter().filter(|figure| way(figure) == *name).collect();
        let points: Vec<String> = (of_way.iter())
            .map(|figure| format!("{:.1},{:.1}", x(figure.what.size_bytes), y(figure.bytes_per_s)))
            .collect();
        writeln!(
            html,
            "<polyline fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"{dashes} points=\"{}\"/>",
            points.join(" ")
        )?;
        for figure in of_way {
            let time = figure.best_time();
            let (at, value) = (x(figure.what.size_bytes), y(figure.bytes_per_s));
            let (low, high) = (y(figure.bytes_per_s_in(time.p90_ns)), y(figure.bytes_per_s_in(time.p10_ns)));
            writeln!(
                html,
                "<line stroke=\"{colour}\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{low:.1}\" y2=\"{high:.1}\"/>\
                 <circle cx=\"{at:.1}\" cy=\"{value:.1}\" r=\"3\" fill=\"{colour}\"><title>{}: {}</title></circle>",
                escaped(&figure.what.to_string()),
                rate(figure.bytes_per_s),
            )?;
            if figure.verdict == Verdict::Wrong {
                writeln!(
                    html,
                    "<text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\" style=\"fill:var(--wrong)\">WRONG</text>",
                    value - 8.0
                )?;
            }
        }
        let line = bottom + 40.0 + 18.0 * index as f64;
        writeln!(
            html,
            "<line stroke=\"{colour}\" stroke-width=\"2\"{dashes} x1=\"{LEFT}\" x2=\"{}\" y1=\"{line}\" y2=\"{line}\"/>\
             <text x=\"{}\" y=\"{}\">{}</text>",
            LEFT + 24.0,
            LEFT + 32.0,
            line + 4.0,
            escaped(name)
        )?;
    }
    html.push_str("</svg></figure>\n");
    Ok(())
}

fn way(figure: &Figure) -> String {
    let what = &figure.what;
    format!("{}, {}, {}", what.direction, what.path, what.engine)
}

fn table(html: &mut String, figures: &[&Figure]) -> fmt::Result {
    html.push_str("<div class=\"scroll\"><table>\n<tr><th class=\"word\">way</th><th>size</th><th>time</th>");
    html.push_str("<th>bandwidth</th><th>p10 to p90</th><th>raw link</th><th>ceiling</th>");
    html.push_str("<th class=\"word\">bytes</th><th class=\"word\">who looked</th></tr>\n");
    for figure in figures {
        let time = figure.best_time();
        let percent =
            |share: Option<f64>| share.map(|share| format!("{:.1} %", share * 100.0)).unwrap_or_default();
        let (class, verdict) = match (figure.verdict, &figure.wrong) {
            (Verdict::Right, _) => ("word", "right".to_owned()),
            (Verdict::Unverified, _) => ("word", "not looked at".to_owned()),
            (Verdict::Wrong, Some(wrong)) => ("word wrong", format!("WRONG: {}", wrong.looks_like)),
            (Verdict::Wrong, None) => ("word wrong", "WRONG".to_owned()),
        };
        writeln!(
            html,
            "<tr><td class=\"word\">{}</td><td>{}</td><td>{:.1} us</td><td>{}{}</td><td>{} to {}</td><td>{}</td>\
             <td>{}</td><td class=\"{class}\">{}</td><td class=\"word\">{}</td></tr>",
            escaped(&way(figure)),
            Size(figure.what.size_bytes),
            figure.time.median_ns / 1e3,
            rate(figure.bytes_per_s),
            if figure.excludes_submission { "" } else { "*" },
            rate(figure.bytes_per_s_in(time.p90_ns)),
            rate(figure.bytes_per_s_in(time.p10_ns)),
            percent(figure.link_share),
            percent(figure.ceiling_share),
            escaped(&verdict),
            escaped(figure.observer.as_deref().unwrap_or("")),
        )?;
    }
    html.push_str("</table></div>\n");
    if figures.iter().any(|figure| !figure.excludes_submission) {
        html.push_str("<p>* submitting and waiting are in it: the engine has no clock to ask.</p>\n");
    }
    Ok(())
}

fn reasons(html: &mut String, title: &str, reasons: &[(String, &str)]) -> fmt::Result {
    if reasons.is_empty() {
        return Ok(());
    }
    writeln!(html, "<h2>{title}</h2>\n<div class=\"scroll\"><table>")?;
    for (what, why) in reasons {
        writeln!(
            html,
            "<tr><td class=\"word\">{}</td><td class=\"why\">{}</td></tr>",
            escaped(what),
            escaped(why)
        )?;
    }
    html.push_str("</table></div>\n");
    Ok(())
}

fn rate(bytes_per_s: f64) -> String {
    match bytes_per_s {
        rate if rate >= 1e9 => format!("{:.2} GB/s", rate / 1e9),
        rate if rate >= 1e6 => format!("{:.1} MB/s", rate / 1e6),
        rate => format!("{:.1} kB/s", rate / 1e3),
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::tests::example;
    use std::fs;
    use std::io::{self, Write as _};
    use std::process::Command;

    /// Whether every tag that is opened is closed, in order.
    fn is_balanced(html: &str) -> Result<(), String> {
        const EMPTY: [&str; 2] = ["meta", "!DOCTYPE"];
        let mut open: Vec<&str> = Vec::new();
        for tag in html.split('<').skip(1) {
            let (tag, _) = tag.split_once('>').ok_or_else(|| format!("<{tag} does not end"))?;
            let name = tag.trim_end_matches('/').split_whitespace().next().unwrap_or("");
            if let Some(name) = name.strip_prefix('/') {
                let last = open.pop();
                if last != Some(name) {
                    return Err(format!("</{name}> closes {last:?}"));
                }
            } else if !tag.ends_with('/') && !EMPTY.contains(&name) {
                open.push(name);
            }
        }
        if open.is_empty() { Ok(()) } else { Err(format!("{open:?} are not closed")) }
    }

    #[test]
    fn every_tag_is_closed() {
        is_balanced(&page(&example())).unwrap();
        let mut empty = example();
        empty.figures.clear();
        is_balanced(&page(&empty)).unwrap();
    }

    #[test]
    fn what_is_drawn_lies_inside_of_the_plot() {
        let html = page(&example());
        let numbers = |name: &str| -> Vec<f64> {
            let begin = format!(" {name}=\"");
            let values = html.split(&begin).skip(1);
            values.filter_map(|rest| rest.split('"').next()?.parse().ok()).collect()
        };
        let (across, down) = (numbers("cx"), numbers("cy"));
        assert_eq!((across.len(), down.len()), (2, 2));
        assert!(across.iter().all(|x| (LEFT..=LEFT + WIDTH).contains(x)), "{across:?}");
        assert!(down.iter().all(|y| (TOP..=TOP + HEIGHT).contains(y)), "{down:?}");
    }

    #[test]
    fn it_fetches_and_runs_nothing() {
        let html = page(&example());
        for word in ["<script", "<link", "src=", "href=", "url(", "@import", "http"] {
            assert!(!html.contains(word), "{word}");
        }
    }

    #[test]
    fn it_has_a_plot_and_a_table_for_each_pair_and_says_what_is_wrong() {
        let html = page(&example());
        assert_eq!(html.matches("<svg").count(), 1);
        assert_eq!(html.matches("<polyline").count(), 2);
        assert_eq!(html.matches("<circle").count(), 2);
        assert!(html.contains("WRONG: zeros"));
        assert!(html.contains("prefers-color-scheme: dark"));
        assert!(!html.contains("NaN") && !html.contains("inf"), "{html}");
    }

    #[test]
    fn names_of_devices_are_text() {
        let html = page(&example());
        assert!(html.contains("a &lt;GPU&gt; &amp; more"));
        assert!(!html.contains("<GPU>"));
    }

    #[test]
    fn a_browser_draws_it() {
        const BROWSERS: [&str; 3] = ["chromium", "chromium-browser", "google-chrome"];
        let folder = tempfile::tempdir().unwrap();
        let (html, picture) = (folder.path().join("page.html"), folder.path().join("page.png"));
        fs::write(&html, page(&example())).unwrap();
        let draw = |browser: &str| {
            Command::new(browser)
                .args(["--headless", "--no-sandbox", "--disable-gpu"])
                .arg(format!("--user-data-dir={}", folder.path().display()))
                .arg(format!("--screenshot={}", picture.display()))
                .arg(&html)
                .output()
        };
        match BROWSERS.iter().find_map(|browser| draw(browser).ok()) {
            Some(output) => {
                let drawn = fs::read(&picture).unwrap_or_default();
                assert!(output.status.success() && drawn.starts_with(b"\x89PNG"), "{output:?}");
            }
            // Not by `eprintln`, which the test harness swallows.
            None => writeln!(io::stderr(), "skipped: a_browser_draws_it: no browser is installed").unwrap(),
        }
    }
}
