//! Pages of `peer-copy`, looked at in a browser: light and dark, on a phone and on a desk.
//!
//! `page.js` says what is wrong with what is shown. Pictures of all of it lie in `target/peer-copy`, for people.

use anyhow::{Context, Result, ensure};
use peervram_lab::Progress;
use peervram_lab::browser::{Browser, View};
use std::fs;
use std::path::Path;

/// Says what is wrong.
const LOOK: &str = include_str!("page.js");

/// Where the pictures go.
const FOLDER: &str = "target/peer-copy";

/// A phone and a desk, by day and by night; and as one in twenty men sees it. The first two differ in everything.
pub const VIEWS: [(&str, View); 5] = [
    ("narrow-dark", view(400, true)),
    ("wide-light", view(1280, false)),
    ("narrow-light", view(400, false)),
    ("wide-dark", view(1280, true)),
    ("wide-deuteranopia", View { deficiency: "deuteranopia", ..view(1280, false) }),
];

/// How far down the first word of what is wrong may be: without scrolling on a phone.
const AT_ONCE: f64 = 500.0;

const fn view(width: u32, is_dark: bool) -> View {
    View { width, is_dark, deficiency: "none" }
}

/// What a page has to show.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Says {
    /// All bytes were right.
    Right,
    /// Some were wrong.
    Wrong,
}

/// Looks at pages: each has a name for its pictures.
///
/// # Errors
/// Everything that is wrong with any of them, in any view.
pub fn look(progress: &dyn Progress, pages: &[(&str, &Path, Says)], views: &[(&str, View)]) -> Result<()> {
    fs::create_dir_all(FOLDER).with_context(|| format!("making {FOLDER}"))?;
    let mut browser = Browser::start(progress)?;
    let mut problems = Vec::new();
    for (name, file, says) in pages {
        let html = fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?;
        for &(how, view) in views {
            let mut opened = browser.open(&html, view)?;
            let seen = opened.evaluate(LOOK)?;
            let found = seen["problems"].as_array().context("the look at a page gave nothing")?;
            let mut found: Vec<String> = found.iter().map(ToString::to_string).collect();
            found.extend(opened.complaints().iter().cloned());
            if seen["plots"].as_u64().unwrap_or(0) == 0 {
                found.push("it has no plot".into());
            }
            let is_at_once = seen["wrong_at"].as_f64().is_some_and(|top| top < AT_ONCE);
            let crosses = seen["crosses"].as_u64().unwrap_or(0);
            match says {
                Says::Wrong if !is_at_once || crosses == 0 => found.push("WRONG is not seen at once".into()),
                Says::Right if is_at_once || crosses > 0 => found.push("it says WRONG".into()),
                _ => {}
            }
            let picture = format!("{FOLDER}/{name}-{how}.png");
            fs::write(&picture, opened.picture()?).with_context(|| format!("writing {picture}"))?;
            problems.extend(found.into_iter().map(|problem| format!("{name}, {how}: {problem}")));
        }
    }
    ensure!(problems.is_empty(), "pages are not well:\n{}", problems.join("\n"));
    peervram_programs::say!(
        "\nlooked at {} pages in {} views; pictures are in {FOLDER}",
        pages.len(),
        views.len()
    );
    Ok(())
}
