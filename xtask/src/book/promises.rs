//! `docs/promises.md`: each sentence of the book that promises something, and the tests of it.

#![cfg(test)]

use anyhow::{Context, Result, ensure};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use super::PROJECT;

const TABLE: &str = "docs/promises.md";
/// What stands in the place of tests where none can look.
const NO_TEST: &str = "no test: ";

/// A row: a sentence, and what stands beside it.
struct Promise {
    page: String,
    sentence: String,
    tests: String,
}

/// The rows of the table. A heading names the page of those below it.
fn promises(text: &str) -> Result<Vec<Promise>> {
    let mut page = None;
    let mut promises = Vec::new();
    for line in text.lines() {
        if let Some(name) = line.strip_prefix("## ") {
            page = Some(format!("docs/{name}"));
        } else if let (Some(page), Some(row)) = (&page, line.strip_prefix("| ")) {
            let row = row.strip_suffix(" |").with_context(|| format!("a row without an end: {line}"))?;
            let (sentence, tests) =
                row.rsplit_once(" | ").with_context(|| format!("a row without tests: {line}"))?;
            if sentence != "promise" {
                let (page, sentence, tests) = (page.clone(), sentence.to_owned(), tests.to_owned());
                promises.push(Promise { page, sentence, tests });
            }
        }
    }
    Ok(promises)
}

/// Whether it is on its page, word by word, and its tests are some of `all`.
fn check(promise: &Promise, page: &str, all: &BTreeSet<String>) -> Result<()> {
    let Promise { page: name, sentence, tests } = promise;
    let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    ensure!(words(page).contains(&words(sentence)), "{name} does not say any more: {sentence}");
    if let Some(why) = tests.strip_prefix(NO_TEST) {
        ensure!(why.len() > 20, "{name}: {sentence}: why can no test look?");
        return Ok(());
    }
    let named: Vec<&str> = tests.split('`').skip(1).step_by(2).collect();
    ensure!(!named.is_empty(), "{name}: no test is named of: {sentence}");
    for test in named {
        ensure!(all.contains(test), "{name}: there is no test {test}, of: {sentence}");
    }
    Ok(())
}

/// The names of all tests: functions after `#[test]`, and strings with a `/` in the lab's tables.
fn tests(folder: &Path, into: &mut BTreeSet<String>) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_dir() {
            if name != "target" && !name.starts_with('.') {
                tests(&path, into)?;
            }
        } else if name.ends_with(".rs") {
            let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
            into.extend(tests_of(&text, path.to_string_lossy().contains("lab/guest/src/tests/")));
        }
    }
    Ok(())
}

fn tests_of(text: &str, is_labs: bool) -> Vec<String> {
    let mut found = Vec::new();
    let mut is_test = false;
    for line in text.lines().map(str::trim) {
        is_test |= line == "#[test]";
        if let Some(rest) = line.strip_prefix("fn ")
            && is_test
        {
            found.extend(rest.split_once('(').map(|(name, _)| name.to_owned()));
            is_test = false;
        }
        if is_labs {
            let is_name = |word: &&str| {
                word.contains('/')
                    && word.chars().all(|letter| letter.is_ascii_alphanumeric() || "-/".contains(letter))
            };
            found.extend(line.split('"').skip(1).step_by(2).filter(is_name).map(str::to_owned));
        }
    }
    found
}

#[test]
fn every_promise_is_on_its_page_and_has_a_test() {
    let project = Path::new(PROJECT);
    let mut all = BTreeSet::new();
    tests(project, &mut all).unwrap();
    let promises = promises(&fs::read_to_string(project.join(TABLE)).unwrap()).unwrap();
    let mut pages: BTreeMap<&str, usize> = BTreeMap::new();
    let mut wrong = Vec::new();
    for promise in &promises {
        *pages.entry(&promise.page).or_default() += 1;
        let page = fs::read_to_string(project.join(&promise.page)).unwrap();
        wrong.extend(check(promise, &page, &all).err().map(|error| error.to_string()));
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    for page in ["revoke", "verify", "routes", "nvgrace", "lend-a-buffer", "doctor", "peer-copy"] {
        assert!(
            pages.contains_key(format!("docs/{page}.md").as_str()),
            "no promise of {page}.md is in {TABLE}"
        );
    }
}

#[test]
fn what_is_gone_from_page_or_tests_is_named() {
    let all = ["a_test", "lab/a-test"].map(str::to_owned).into();
    let table = "# T\n\n## a.md\n\n| promise | tests |\n|---|---|\n| It `x` holds. | `a_test`, `lab/a-test` |\n\
                 | It | `gone` |\n| It is | `a_test` |\n| It | no test: |\n| It | nothing |\n";
    let found = promises(table).unwrap();
    let page = "It\n`x` holds.\n";
    let says: Vec<String> = found
        .iter()
        .map(|one| check(one, page, &all).err().map_or(String::new(), |error| error.to_string()))
        .collect();
    assert_eq!(found.len(), 5);
    assert_eq!(found[0].page, "docs/a.md");
    assert_eq!(says[0], "");
    assert!(says[1].contains("no test gone") && says[2].contains("does not say any more"), "{says:?}");
    assert!(says[3..].iter().all(|said| !said.is_empty()), "{says:?}");
}

#[test]
fn tests_are_found_in_both_kinds_of_file() {
    let text = "    #[test]\n    #[ignore]\n    fn one() {}\n    fn none() {}\n Test::new(\"a/b-c\", f),\n \"/proc/x y\"\n";
    assert_eq!(tests_of(text, false), ["one"]);
    assert_eq!(tests_of(text, true), ["one", "a/b-c"]);
}
