//! `docs/promises.md`: each sentence of the book that promises something, and the tests of it.

#![cfg(test)]

use anyhow::{Context, Result, bail, ensure};
use std::collections::BTreeMap;
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

/// The tests of the tree: those whose names are of one test alone, by name, and all of them as `module::name`.
type Tests = BTreeMap<String, Found>;

/// What is behind a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    Test,
    /// It has `#[ignore]`: nobody runs it.
    Ignored,
    /// Tests of several files: a table that named it would not notice that one of them is gone.
    Several,
}

/// Whether it is on its page, word by word, and its tests are some of `all`.
fn check(promise: &Promise, page: &str, all: &Tests) -> Result<()> {
    let Promise { page: name, sentence, tests } = promise;
    let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    ensure!(words(page).contains(&words(sentence)), "{name} does not say any more: {sentence}");
    if let Some(why) = tests.strip_prefix(NO_TEST) {
        ensure!(why.len() > 20, "{name}: {sentence}: why can no test look?");
        return Ok(());
    }
    let named = in_backticks(tests);
    ensure!(!named.is_empty(), "{name}: no test is named of: {sentence}");
    for test in named {
        match all.get(test) {
            Some(Found::Test) => {}
            Some(Found::Ignored) => bail!("{name}: the test {test} is ignored, of: {sentence}"),
            Some(Found::Several) => bail!("{name}: several files have a test {test}: say MODULE::{test}"),
            None => bail!("{name}: there is no test {test}, of: {sentence}"),
        }
    }
    Ok(())
}

fn in_backticks(text: &str) -> Vec<&str> {
    text.split('`').skip(1).step_by(2).collect()
}

/// All tests below a folder.
fn tests(folder: &Path, into: &mut Tests) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_dir() {
            if name != "target" && !name.starts_with('.') {
                tests(&path, into)?;
            }
        } else if let Some(file) = name.strip_suffix(".rs") {
            let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
            // As modules are named: a folder's own files have the folder's name.
            let module = match file {
                "mod" | "tests" | "lib" | "main" => folder.file_name().unwrap_or_default().to_string_lossy(),
                file => file.into(),
            };
            for (test, found) in functions(&text) {
                into.insert(format!("{module}::{test}"), found);
                into.entry(test).and_modify(|known| *known = Found::Several).or_insert(found);
            }
            if path.to_string_lossy().contains("lab/guest/src/tests/") {
                into.extend(labs(&text).map(|name| (name.to_owned(), Found::Test)));
            }
        }
    }
    Ok(())
}

/// The functions that are tests: those right after `#[test]` and other attributes.
fn functions(text: &str) -> Vec<(String, Found)> {
    let mut found = Vec::new();
    let (mut is_test, mut is_ignored) = (false, false);
    for line in text.lines().map(str::trim) {
        if line.starts_with("#[") || line.starts_with("//") {
            is_test |= line == "#[test]";
            is_ignored |= line.starts_with("#[ignore");
            continue;
        }
        if let Some((name, _)) = line.strip_prefix("fn ").and_then(|rest| rest.split_once('(')) {
            let kind = if is_ignored { Found::Ignored } else { Found::Test };
            found.extend(is_test.then(|| (name.to_owned(), kind)));
        }
        (is_test, is_ignored) = (false, false);
    }
    found
}

/// The rows of a table of the lab's: `Test::new("part/name", ...)` and its kind.
fn labs(text: &str) -> impl Iterator<Item = &str> {
    text.split("Test::").skip(1).filter_map(|rest| {
        let (_, arguments) = rest.split_once('(')?;
        let (name, _) = arguments.trim_start().strip_prefix('"')?.split_once('"')?;
        name.contains('/').then_some(name)
    })
}

#[test]
fn every_promise_is_on_its_page_and_has_a_test() {
    let project = Path::new(PROJECT);
    let mut all = Tests::new();
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
    // Every page of the book, but its list of pages and the table itself.
    let mut book = vec!["docs/../README.md".to_owned()];
    for entry in fs::read_dir(project.join("docs")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if name.ends_with(".md") && name != "README.md" && name != "promises.md" {
            book.push(format!("docs/{name}"));
        }
    }
    assert!(book.len() > 10, "{book:?}");
    for page in book {
        assert!(pages.contains_key(page.as_str()), "no promise of {page} is in {TABLE}");
    }
}

/// The kernel's page is a table of its own, with tests in its last column.
#[test]
fn every_test_on_the_kernels_page_is_there() {
    let project = Path::new(PROJECT);
    let mut all = Tests::new();
    tests(project, &mut all).unwrap();
    let page = fs::read_to_string(project.join("docs/kernel.md")).unwrap();
    let mut rows = 0;
    for row in page.lines().filter_map(|line| line.strip_prefix("| ")?.strip_suffix(" |")).skip(1) {
        let (_, last) = row.rsplit_once(" | ").unwrap();
        let named = in_backticks(last);
        assert!(!named.is_empty() || last == "the same", "no test in: {row}");
        for test in named {
            let is_there = match test.strip_suffix('*') {
                Some(beginning) => all.keys().any(|name| name.starts_with(beginning)),
                None => all.contains_key(test),
            };
            assert!(is_there, "there is no test {test}, of: {row}");
        }
        rows += 1;
    }
    assert!(rows > 20, "{rows} rows were read");
}

#[test]
fn what_is_gone_from_page_or_tests_is_named() {
    let all = [
        ("a_test", Found::Test),
        ("lab/a-test", Found::Test),
        ("an_ignored_one", Found::Ignored),
        ("of_two_files", Found::Several),
        ("one::of_two_files", Found::Test),
    ];
    let all = all.map(|(name, found)| (name.to_owned(), found)).into();
    let table = "# T\n\n## a.md\n\n| promise | tests |\n|---|---|\n| It `x` holds. | `a_test`, `lab/a-test` |\n\
                 | It | `one::of_two_files` |\n| It | `gone` |\n| It is | `a_test` |\n\
                 | It | `an_ignored_one` |\n| It | `a_test`, `of_two_files` |\n\
                 | It | no test: so |\n| It | nothing |\n";
    let found = promises(table).unwrap();
    let page = "It\n`x` holds.\n";
    let says: Vec<String> = found
        .iter()
        .map(|one| check(one, page, &all).err().map_or(String::new(), |error| error.to_string()))
        .collect();
    assert_eq!(found[0].page, "docs/a.md");
    let [first, second, gone, reworded, ignored, several, without_reason, nothing] = &says[..] else {
        panic!("{} rows", says.len())
    };
    assert_eq!((first.as_str(), second.as_str()), ("", ""));
    assert!(gone.contains("no test gone") && reworded.contains("does not say any more"), "{says:?}");
    assert!(ignored.contains("is ignored") && several.contains("say MODULE::of_two_files"), "{says:?}");
    assert!(
        without_reason.contains("why can no test look") && nothing.contains("no test is named"),
        "{says:?}"
    );
}

#[test]
fn tests_are_told_from_what_only_looks_like_them() {
    let text = "    #[test]\n    /// Why.\n    fn one() {\n fn helper() {}\n }\n    fn none() {}\n\
                #[test]\n#[ignore = \"slow\"]\nfn two() {}\n#[ignore]\n#[test]\nfn three() {}\n\
                #[test]\nconst A: u8 = 1;\nfn four() {}\n";
    let expected = [("one", Found::Test), ("two", Found::Ignored), ("three", Found::Ignored)];
    assert_eq!(functions(text), expected.map(|(name, found)| (name.to_owned(), found)));
    let table = "&[Test::new(\"a/b-c\", f).on(g),\n Test::of_all(\n  \"d/e\",\n f),]\n\
                 \"driver/unbind\" Test::helper(1, \"x/y\")";
    assert_eq!(labs(table).collect::<Vec<_>>(), ["a/b-c", "d/e"]);
}
