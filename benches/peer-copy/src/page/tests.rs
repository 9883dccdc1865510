use super::*;
use crate::record::tests::example;

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
    is_balanced(&page(&example(), None)).unwrap();
    let mut empty = example();
    empty.figures.clear();
    is_balanced(&page(&empty, None)).unwrap();
}

#[test]
fn what_is_drawn_lies_inside_of_the_plot() {
    let html = page(&example(), None);
    let mut shares = 0;
    for name in ["x", "y", "x1", "x2", "y1", "y2"] {
        let begin = format!(" {name}=\"");
        for value in
            html.split(&begin).skip(1).filter_map(|rest| rest.split_once("%\"")).map(|(value, _)| value)
        {
            let Ok(value) = value.parse::<f64>() else { continue };
            assert!((0.0..=100.0).contains(&value), "{name} is {value} %");
            shares += 1;
        }
    }
    assert!(shares > 20, "{shares}");
}

#[test]
fn it_fetches_and_runs_nothing() {
    let html = page(&example(), None);
    for word in ["<script", "<link", "src=", "href=", "url(", "@import", "http"] {
        assert!(!html.contains(word), "{word}");
    }
}

#[test]
fn it_has_plots_and_a_table_for_each_pair() {
    let html = page(&example(), None);
    // Read and write by bandwidth, and the small read by time.
    assert_eq!(html.matches("<figure").count(), 3);
    assert_eq!(html.matches("<details open>").count(), 1);
    // One way, one sign of it.
    assert_eq!(html.matches("<li>").count(), 1);
    assert!(html.contains("prefers-color-scheme: dark"));
    assert!(!html.contains("NaN") && !html.contains("inf%"), "{html}");
}

#[test]
fn wrong_bytes_are_said_before_any_speed() {
    let record = example();
    let html = page(&record, None);
    let wrong = html.find("WRONG:").unwrap();
    assert!(wrong < html.find("GB/s").unwrap());
    assert!(html.contains("class=\"bad\"") && html.contains("4096 of 4096 bytes, first at 0x0: zeros"));
    let mut right = record;
    right.figures.remove(0);
    right.failed.clear();
    let html = page(&right, None);
    assert!(
        html.contains("all bytes arrived") && !html.contains("WRONG:") && !html.contains("class=\"bad\"")
    );
}

#[test]
fn ways_of_one_pair_have_different_colours() {
    let mut record = example();
    let one = record.figures[1].clone();
    // More engines than colours, two of them for each pair.
    for index in 0..12 {
        let mut figure = one.clone();
        figure.what.engine = format!("engine {index}");
        figure.what.importer = format!("importer {}", index / 2);
        record.figures.push(figure);
    }
    let ways = ways(&record);
    assert_eq!(ways.len(), 13);
    let numbers: Vec<usize> = ways[1..].iter().map(|way| way.number).collect();
    assert!(numbers.chunks(2).all(|pair| !plot::is_same_colour(pair[0], pair[1])), "{numbers:?}");
}

#[test]
fn its_own_words_need_no_letters_that_a_font_may_lack() {
    assert!(page(&example(), None).is_ascii());
}

#[test]
fn what_moved_since_a_record_of_before_is_listed() {
    let (now, mut before) = (example(), example());
    let time = &mut before.figures[1].time;
    (time.p10_ns, time.p90_ns) = (10.0 * time.p10_ns, 10.0 * time.p90_ns);
    before.figures.remove(0);
    before.machine.kernel = "6.12 <old>".into();
    let html = page(&now, Some(("before", &before)));
    assert!(html.contains("the kernel was 6.12 &lt;old&gt; and is 7.3.4"), "{html}");
    is_balanced(&html).unwrap();
    assert!(html.contains("Compared with before") && html.contains(">faster<"), "{html}");
    assert!(html.contains("0 that only before has, 1 that it has not"), "{html}");
}

#[test]
fn names_of_devices_are_text() {
    let html = page(&example(), None);
    assert!(html.contains("a &lt;GPU&gt; &amp; more"));
    assert!(!html.contains("<GPU>"));
}

#[test]
fn times_and_rates_have_units_that_fit() {
    assert_eq!([950.0, 1e3, 2.5e6, 3e9].map(time), ["950 ns", "1.0 us", "2.5 ms", "3.00 s"]);
    assert_eq!([5e2, 1e6, 999.9e6, 31.51e9].map(rate), ["0.5 kB/s", "1.0 MB/s", "1.00 GB/s", "31.51 GB/s"]);
}
