//! Pages: lines that fit an editor, links that lead somewhere.

use std::collections::BTreeSet;
use std::path::{Component, Path, PathBuf};

use super::{Files, Violation};

/// The longest line of prose. Rows of tables, quotations of programs and links have the length that they have.
const LONGEST: usize = 150;

/// Violations in the pages among these files.
pub fn check(files: &Files) -> Vec<Violation> {
    let pages = files.iter().filter(|(name, _)| name.ends_with(".md"));
    pages.flat_map(|(name, text)| of_page(name, text, files)).collect()
}

fn of_page(name: &str, text: &str, files: &Files) -> Vec<Violation> {
    let mut violations = Vec::new();
    for (number, line) in prose(text) {
        let place = || format!("{name}:{number}");
        let length = line.chars().count();
        if length > LONGEST && !line.trim_start().starts_with('|') && !line.contains("](") {
            violations
                .push(Violation::new(place(), format!("is {length} characters long; {LONGEST} are enough")));
        }
        for link in links(line) {
            violations.extend(
                broken(name, link, files).map(|why| Violation::new(place(), format!("{link}: {why}"))),
            );
        }
    }
    violations
}

/// The lines that are no quotation of a program, with their numbers.
fn prose(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut is_code = false;
    text.lines().enumerate().filter_map(move |(index, line)| {
        let is_fence = line.trim_start().starts_with("```");
        is_code ^= is_fence;
        (!is_fence && !is_code && !line.starts_with("    ")).then_some((index + 1, line))
    })
}

/// What the links of a line lead to.
fn links(line: &str) -> impl Iterator<Item = &str> {
    line.match_indices("](").filter_map(|(at, mark)| {
        let rest = &line[at + mark.len()..];
        rest.split_once(')').map(|(link, _)| link)
    })
}

/// Why a link of `page` leads nowhere in the tree. What leads out of it is not looked at: a page must not fail because
/// a site is down.
fn broken(page: &str, link: &str, files: &Files) -> Option<String> {
    if link.contains("://") || link.starts_with("mailto:") {
        return None;
    }
    let (path, anchor) = link.split_once('#').unwrap_or((link, ""));
    let target = if path.is_empty() { page.to_owned() } else { joined(page, path) };
    let is_folder = files.keys().any(|name| name.starts_with(&format!("{}/", target.trim_end_matches('/'))));
    let Some(text) = files.get(&target) else {
        let is_picture = Path::new(super::PROJECT).join(&target).is_file();
        return (!is_folder && !is_picture).then(|| format!("there is no {target}"));
    };
    let has_anchor = || anchors(text).contains(anchor);
    (!anchor.is_empty() && !has_anchor()).then(|| format!("{target} has no section #{anchor}"))
}

/// A path of a link, from the project's folder on.
fn joined(page: &str, link: &str) -> String {
    let mut path = Path::new(page).parent().map(PathBuf::from).unwrap_or_default();
    for part in Path::new(link).components() {
        match part {
            Component::ParentDir => {
                path.pop();
            }
            Component::Normal(name) => path.push(name),
            _ => {}
        }
    }
    path.to_string_lossy().into_owned()
}

/// The names that GitHub gives a page's headings.
fn anchors(text: &str) -> BTreeSet<String> {
    let headings = prose(text)
        .filter(|&(_, line)| line.starts_with('#'))
        .map(|(_, line)| line.trim_start_matches('#').trim());
    let name = |heading: &str| {
        let kept = heading.chars().filter(|c| c.is_alphanumeric() || "-_ ".contains(*c));
        kept.collect::<String>().to_lowercase().replace(' ', "-")
    };
    headings.map(name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy::made_up;

    #[test]
    fn links_and_anchors_that_lead_nowhere_are_found() {
        let files = made_up(&[
            (
                "docs/a.md",
                "[b](b.md) [b](b.md#what-is-b) [no](c.md) [no](b.md#what) [up](../R.md) [own](#own)\n\n# Own\n",
            ),
            ("docs/b.md", "# What is `B`?\n```\n[code](nowhere.md)\n```\n"),
            ("R.md", "[docs](docs/) [out](https://example.org/x) ![p](docs/no.png)\n"),
        ]);
        let found: Vec<String> = check(&files).iter().map(ToString::to_string).collect();
        assert_eq!(
            found,
            [
                "R.md:1: docs/no.png: there is no docs/no.png",
                "docs/a.md:1: c.md: there is no docs/c.md",
                "docs/a.md:1: b.md#what: docs/b.md has no section #what",
            ]
        );
    }

    #[test]
    fn long_lines_of_prose_are_found_and_rows_of_tables_are_not() {
        let long = "word ".repeat(40);
        let files = made_up(&[("a.md", &format!("{long}\n| {long} |\n```\n{long}\n```\n    {long}\n"))]);
        let found = check(&files);
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(found[0].place, "a.md:1");
    }

    /// README's sentence on features names those of the library's package: what is on, and what is off.
    #[test]
    fn the_features_that_readme_names_are_the_packages() {
        let read = |file: &str| std::fs::read_to_string(Path::new(crate::book::PROJECT).join(file)).unwrap();
        let quoted = |text: &str, quote: char| -> BTreeSet<String> {
            text.split(quote).skip(1).step_by(2).map(str::to_owned).collect()
        };
        let manifest = read("Cargo.toml");
        let (_, features) = manifest.split_once("[features]\n").unwrap();
        let rows: Vec<(&str, &str)> = features
            .lines()
            .take_while(|line| !line.is_empty())
            .filter_map(|line| line.split_once(" = "))
            .collect();
        let (_, default) = rows.iter().find(|(name, _)| *name == "default").unwrap();
        let on = quoted(default, '"');
        // Shuttle is for the library's own tests.
        let names = rows.iter().map(|(name, _)| *name).filter(|name| !["default", "shuttle"].contains(name));
        let off: BTreeSet<String> = names.filter(|name| !on.contains(*name)).map(str::to_owned).collect();
        let readme = read("README.md");
        let sentence = readme.lines().find_map(|line| line.strip_prefix("Its features ")).unwrap();
        let (named_on, named_off) = sentence.split_once(" are on, ").unwrap();
        assert_eq!((quoted(named_on, '`'), quoted(named_off, '`')), (on, off));
    }
}
