//! Examples in Rust on the pages. One that is marked `rust` is compiled: its page is among the documentation tests of the library
//! (`runtime/lib.rs`). What no documentation test can reach, a program's own code or a feature that is off, is marked `rs`, and is a
//! quotation: line by line what stands in a file of the project, which is compiled.
//!
//! A quotation begins with the file, `// lab/src/machines/mod.rs`. `// ...` leaves something out, which it may name; another file's name goes on there.

#![cfg(test)]

use anyhow::{Context, Result, ensure};
use std::fs;
use std::path::Path;

use super::shown::{Block, blocks};
use super::{PROJECT, pages};

/// Whether each line of a quotation stands in its file, one after the other but for what is left out.
fn check_quotation(project: &Path, block: &Block) -> Result<()> {
    let mut file: Option<(String, Vec<String>)> = None;
    // Where the next line has to be; nowhere in particular after something that was left out.
    let mut place: Option<usize> = None;
    let mut quoted = 0;
    for line in &block.lines {
        let line = line.trim();
        let named = line.strip_prefix("// ").filter(|name| name.ends_with(".rs"));
        if let Some(name) = named {
            let text = fs::read_to_string(project.join(name)).with_context(|| format!("reading {name}"))?;
            file = Some((name.to_owned(), text.lines().map(|line| line.trim().to_owned()).collect()));
            place = None;
        } else if line.starts_with("// ...") {
            place = None;
        } else {
            let (name, lines) = file.as_ref().context("a quotation begins with the name of its file")?;
            let found = match place {
                Some(at) => lines.get(at).is_some_and(|there| there == line).then_some(at),
                None => lines.iter().position(|there| there == line),
            };
            place = Some(found.with_context(|| format!("{name} has no such line there: {line}"))? + 1);
            quoted += 1;
        }
    }
    ensure!(quoted > 0, "nothing is quoted");
    Ok(())
}

#[test]
fn every_example_in_rust_is_compiled() {
    let project = Path::new(PROJECT);
    let tested = fs::read_to_string(project.join("runtime/lib.rs")).unwrap();
    let (mut compiled, mut quoted) = (0, 0);
    for (page, text) in pages().unwrap() {
        let is_tested = tested.contains(&format!("#[doc = include_str!(\"../{page}\")]"));
        for block in blocks(&text) {
            let place = format!("{page}:{}", block.line);
            match block.mark.split(',').next().unwrap_or_default() {
                "rust" => {
                    assert!(is_tested, "{place}: its page is none of those in runtime/lib.rs");
                    assert!(
                        ["rust", "rust,no_run"].contains(&block.mark.as_str()),
                        "{place}: {}",
                        block.mark
                    );
                    compiled += 1;
                }
                "rs" => {
                    check_quotation(project, &block).with_context(|| place).unwrap();
                    quoted += 1;
                }
                // What has no mark is a test to rustdoc, and commands to this program.
                mark => assert!(!mark.is_empty() || !is_tested, "{place}: mark it `sh` or `text`"),
            }
        }
    }
    assert!(compiled > 10 && quoted > 3, "{compiled} are compiled and {quoted} are quoted");
}

#[test]
fn a_quotation_is_what_the_file_has() {
    let project = tempfile::tempdir().unwrap();
    fs::write(project.path().join("a.rs"), "fn a() {\n    b();\n    c();\n}\n").unwrap();
    let check = |lines: &[&str]| {
        let lines = lines.iter().map(|&line| line.to_owned()).collect();
        check_quotation(project.path(), &Block { mark: "rs".into(), line: 1, lines })
    };
    check(&["// a.rs", "fn a() {", "b();", "// ...", "}"]).unwrap();
    for wrong in [
        &["// a.rs", "fn a() {", "c();"][..],
        &["// a.rs", "b();", "d();"],
        &["fn a() {"],
        &["// b.rs", "fn a() {"],
        &["// a.rs"],
        &[],
    ] {
        assert!(check(wrong).is_err(), "{wrong:?}");
    }
}
