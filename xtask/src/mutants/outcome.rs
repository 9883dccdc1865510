//! `Outcome`: what became of a mutant, out of cargo-mutants' files.

use anyhow::{Context, Result};
use serde::Deserialize;
use serde_json::Value;
use std::fs;
use std::path::Path;

/// A wrong line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mutant {
    /// cargo-mutants' name of it: "runtime/plan.rs:12:9: replace > with >= in Plan::new".
    pub name: String,
    /// "runtime/plan.rs".
    pub file: String,
    /// The name without the place.
    pub change: String,
    /// The line that is changed, without the space around it.
    pub line: String,
}

/// What became of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum Outcome {
    /// A test failed.
    #[serde(rename = "CaughtMutant")]
    Caught,
    /// The tests did not end, which is seen, too.
    #[serde(rename = "Timeout")]
    Hung,
    /// All tests passed.
    #[serde(rename = "MissedMutant")]
    Missed,
    /// It does not compile, and proves nothing.
    #[serde(rename = "Unviable")]
    Unviable,
}

impl Mutant {
    /// Out of an entry of a list of cargo-mutants', whose files are below `tree`.
    fn of(entry: &Value, tree: &Path) -> Result<Mutant> {
        let text = |name: &str| entry[name].as_str().map(str::to_owned).with_context(|| format!("no {name}"));
        let (name, file) = (text("name")?, text("file")?);
        let number = entry["span"]["start"]["line"].as_u64().context("no line")?;
        let source = fs::read_to_string(tree.join(&file)).with_context(|| format!("reading {file}"))?;
        let line = source.lines().nth(usize::try_from(number)?.saturating_sub(1)).unwrap_or_default();
        // "file:line:column: change".
        let change = name.splitn(4, ':').nth(3).context("a mutant without a place")?.trim().to_owned();
        Ok(Mutant { name, file, change, line: line.trim().to_owned() })
    }
}

/// All mutants of a list, as `cargo mutants --list --json` prints it.
///
/// # Errors
/// It is not what this version of cargo-mutants prints.
pub fn mutants(json: &[u8], tree: &Path) -> Result<Vec<Mutant>> {
    let entries: Vec<Value> = serde_json::from_slice(json).context("the list of mutants")?;
    entries.iter().map(|entry| Mutant::of(entry, tree).context("an entry of the list of mutants")).collect()
}

/// The names of those that were tried so far, and what became of each, out of cargo-mutants' folder. A file that is being
/// written counts as none.
pub fn so_far(folder: &Path) -> Vec<(String, Outcome)> {
    let text = fs::read(folder.join("mutants.out/outcomes.json")).unwrap_or_default();
    let all: Value = serde_json::from_slice(&text).unwrap_or_default();
    let one = |outcome: &Value| {
        let name = outcome["scenario"]["Mutant"]["name"].as_str()?.to_owned();
        Some((name, Outcome::deserialize(&outcome["summary"]).ok()?))
    };
    all["outcomes"].as_array().into_iter().flatten().filter_map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_became_of_mutants_is_read() {
        let folder = tempfile::tempdir().unwrap();
        assert!(so_far(folder.path()).is_empty());
        fs::create_dir(folder.path().join("mutants.out")).unwrap();
        let outcome =
            |name: &str, summary: &str| json!({"scenario": {"Mutant": {"name": name}}, "summary": summary});
        let all = json!({"outcomes": [
            {"scenario": "Baseline", "summary": "Success"},
            outcome("a.rs:1:1: replace f with ()", "CaughtMutant"),
            outcome("a.rs:2:1: replace g with ()", "MissedMutant"),
            outcome("a.rs:3:1: replace h with ()", "Timeout"),
            outcome("a.rs:4:1: replace i with ()", "Unviable"),
        ]});
        fs::write(folder.path().join("mutants.out/outcomes.json"), all.to_string()).unwrap();
        let outcomes: Vec<Outcome> = so_far(folder.path()).into_iter().map(|(_, outcome)| outcome).collect();
        assert_eq!(outcomes, [Outcome::Caught, Outcome::Missed, Outcome::Hung, Outcome::Unviable]);
    }

    #[test]
    fn a_mutant_knows_its_line() {
        let tree = tempfile::tempdir().unwrap();
        fs::write(tree.path().join("a.rs"), "fn f() {\n    a::b();\n}\n").unwrap();
        let list = json!([{
            "name": "a.rs:2:5: replace f -> Vec<a::B> with vec![]", "file": "a.rs", "span": {"start": {"line": 2}},
        }]);
        let found = mutants(list.to_string().as_bytes(), tree.path()).unwrap();
        assert_eq!(found[0].change, "replace f -> Vec<a::B> with vec![]");
        assert_eq!(found[0].line, "a::b();");
    }
}
