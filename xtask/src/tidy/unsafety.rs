//! A package without `unsafe` forbids it.

use std::path::Path;

use super::{Files, Violation};

/// The first line of code of such a package.
const FORBIDS: &str = "#![forbid(unsafe_code)]";

/// Violations in the packages of these files.
pub fn check(files: &Files) -> Vec<Violation> {
    let mut violations = Vec::new();
    for root in files.keys().filter(|name| is_root(name)) {
        let folder = Path::new(root).parent().unwrap_or(Path::new(""));
        // A package may lie in a folder of another one; its sources are not the other one's.
        let is_source = |name: &&String| name.ends_with(".rs") && owner(files, name) == Some(folder);
        let has_unsafe =
            files.iter().filter(|(name, _)| is_source(name)).any(|(_, text)| text.lines().any(is_unsafe));
        let forbids = files[root].lines().any(|line| line == FORBIDS);
        if !has_unsafe && !forbids {
            violations.push(Violation::new(root, format!("has no unsafe, and does not say {FORBIDS}")));
        }
    }
    violations
}

/// Where a library or a program begins.
fn is_root(name: &str) -> bool {
    let is_crate = ["lib.rs", "main.rs"].iter().any(|end| name.ends_with(&format!("src/{end}")));
    is_crate || ["runtime/lib.rs", "runtime/cli/main.rs"].contains(&name)
}

/// The folder of the root nearest above a file.
fn owner<'a>(files: &Files, name: &'a str) -> Option<&'a Path> {
    Path::new(name).ancestors().skip(1).find(|folder| {
        let folder = folder.to_string_lossy();
        ["lib.rs", "main.rs"].iter().any(|end| {
            let root = format!("{folder}/{end}");
            is_root(&root) && files.contains_key(&root)
        })
    })
}

/// Whether a line of code, not of a comment, has the keyword before what it is said of.
fn is_unsafe(line: &str) -> bool {
    let code = line.split("//").next().unwrap_or_default();
    let said_of = ["{", "(", "fn ", "impl", "extern", "trait"];
    code.match_indices("unsafe").any(|(at, word)| {
        let is_word = !code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_');
        let rest = code[at + word.len()..].trim_start();
        is_word && said_of.iter().any(|next| rest.starts_with(next))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy::made_up;

    #[test]
    fn a_package_that_does_not_forbid_what_it_has_not_is_found() {
        let found = check(&made_up(&[
            ("a/src/lib.rs", "mod b;\n"),
            ("a/src/b.rs", "// unsafe { would be }\nconst A: &str = \"unsafe words\";\n"),
        ]));
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].place, "a/src/lib.rs");
    }

    #[test]
    fn one_that_forbids_and_one_that_needs_it_are_fine() {
        let files = made_up(&[
            ("a/src/lib.rs", "#![forbid(unsafe_code)]\n"),
            ("b/src/main.rs", "mod c;\n"),
            ("b/src/c.rs", "fn f() { unsafe { g() } }\n"),
            // Not b's.
            ("b/d/src/main.rs", "#![forbid(unsafe_code)]\n"),
        ]);
        assert_eq!(check(&files), []);
    }
}
