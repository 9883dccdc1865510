//! `List`: the files whose mutants have to be caught, by whose tests, and the reasons of those that cannot be. `list.json`
//! is the list.

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use super::outcome::Mutant;

const TEXT: &str = include_str!("list.json");

/// What is mutated.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct List {
    /// Files by package.
    pub groups: Vec<Group>,
    /// Mutants that change nothing that anybody could see.
    pub excused: Vec<Excuse>,
}

/// Files of a package that the same tests are about.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Group {
    pub package: String,
    /// Which files, from the project's folder on; `*` in the place of a name.
    pub files: Vec<String>,
    /// What they are tried against: the first with all mutants, each that follows with what survived so far. What ends
    /// soonest and catches most comes first.
    pub stages: Vec<Stage>,
}

/// Packages without a library: their tests are their program's.
const PROGRAMS: &[&str] = &["peervram-cli"];

/// Tests of libraries, or of programs that have no library.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stage {
    pub packages: Vec<String>,
    /// Those whose names contain one of these; all where there are none.
    #[serde(default)]
    pub tests: Vec<String>,
    /// But not those whose names contain one of these.
    #[serde(default)]
    pub skip: Vec<String>,
}

/// Why a mutant survives.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Excuse {
    /// Where: "runtime/plan.rs".
    pub file: String,
    /// As cargo-mutants calls it, without its place: "replace > with >= in Plan::new".
    pub mutant: String,
    /// The line that is changed, without the space around it: a file may have several such mutants.
    pub line: String,
    /// The reason.
    pub why: String,
}

impl List {
    /// The project's.
    ///
    /// # Errors
    /// It is not in order.
    pub fn read() -> Result<List> {
        serde_json::from_str(TEXT).context("xtask/src/mutants/list.json")
    }

    /// Only files whose name contains one of `parts`; all where there are none.
    ///
    /// # Errors
    /// A part that is in no name.
    pub fn chosen(self, project: &Path, parts: &[String]) -> Result<List> {
        let List { groups, excused } = self;
        let mut chosen = Vec::new();
        let mut is_used = vec![false; parts.len()];
        for Group { package, files, stages } in groups {
            let mut names = Vec::new();
            for file in files.iter().map(|file| expanded(project, file)) {
                names.extend(file?);
            }
            names.retain(|name| {
                let mut is_meant = parts.is_empty();
                for (part, used) in parts.iter().zip(&mut is_used) {
                    let has = name.contains(part.as_str());
                    *used |= has;
                    is_meant |= has;
                }
                is_meant
            });
            if !names.is_empty() {
                chosen.push(Group { package, files: names, stages });
            }
        }
        if let Some((part, _)) = parts.iter().zip(is_used).find(|(_, is_used)| !is_used) {
            bail!("no file of the list has {part:?} in its name; xtask/src/mutants/list.json is the list");
        }
        Ok(List { groups: chosen, excused })
    }

    /// The reason of that mutant, if it has one.
    pub fn excuse(&self, mutant: &Mutant) -> Option<&Excuse> {
        self.excused.iter().find(|excuse| excuse.is_of(mutant))
    }

    /// Reasons for files of this list that are of no mutant any more, or of one that was caught: why each is stale.
    pub fn stale(&self, all: &[Mutant], caught: &[&Mutant]) -> Vec<String> {
        let is_listed = |excuse: &&Excuse| self.groups.iter().any(|group| group.files.contains(&excuse.file));
        let why = |excuse: &Excuse| {
            let Excuse { file, mutant, line, .. } = excuse;
            let what = format!("{file}: {mutant}, at `{line}`");
            if !all.iter().any(|one| excuse.is_of(one)) {
                Some(format!("{what}: there is no such mutant any more"))
            } else if caught.iter().any(|one| excuse.is_of(one)) {
                Some(format!("{what}: it is caught now"))
            } else {
                None
            }
        };
        self.excused.iter().filter(is_listed).filter_map(why).collect()
    }
}

impl Stage {
    /// What of its packages is built, for cargo.
    pub fn target(&self) -> &'static str {
        let is_program = |package: &String| PROGRAMS.contains(&package.as_str());
        if self.packages.iter().all(is_program) { "--cargo-arg=--bins" } else { "--cargo-arg=--lib" }
    }

    /// "peervram: gate::, attachment::", for people.
    pub fn name(&self) -> String {
        let packages = self.packages.join(" and ");
        let tests = if self.tests.is_empty() { "all".to_owned() } else { self.tests.join(", ") };
        match self.skip.as_slice() {
            [] => format!("{packages}: {tests}"),
            skip => format!("{packages}: {tests} but {}", skip.join(", ")),
        }
    }
}

impl Excuse {
    fn is_of(&self, mutant: &Mutant) -> bool {
        (&self.file, &self.mutant, &self.line) == (&mutant.file, &mutant.change, &mutant.line)
    }
}

/// The files that a name with `*` stands for, without those that hold nothing but tests.
fn expanded(project: &Path, name: &str) -> Result<Vec<String>> {
    let Some((folder, end)) = name.split_once('*') else {
        return match project.join(name).is_file() {
            true => Ok(vec![name.to_owned()]),
            false => bail!("there is no {name}; xtask/src/mutants/list.json names it"),
        };
    };
    let mut names = BTreeMap::new();
    for entry in fs::read_dir(project.join(folder)).with_context(|| format!("reading {folder}"))? {
        let file = entry?.file_name().to_string_lossy().into_owned();
        let is_test = file == "tests.rs" || file.ends_with("_tests.rs");
        if file.ends_with(end) && !is_test {
            names.insert(format!("{folder}{file}"), ());
        }
    }
    Ok(names.into_keys().collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::book::PROJECT;

    fn mutant(file: &str, change: &str, line: &str) -> Mutant {
        Mutant { name: String::new(), file: file.into(), change: change.into(), line: line.into() }
    }

    fn list() -> List {
        let excuse = |mutant: &str, line: &str| Excuse {
            file: "runtime/gate/mod.rs".into(),
            mutant: mutant.into(),
            line: line.into(),
            why: "nobody can see it".into(),
        };
        let excused =
            vec![excuse("replace > with >= in a", "if b > c {"), excuse("replace d with ()", "e();")];
        List { excused, ..List::read().unwrap() }.chosen(Path::new(PROJECT), &[]).unwrap()
    }

    #[test]
    fn every_file_of_the_list_is_there_and_every_reason_is_one() {
        let list = List::read().unwrap().chosen(Path::new(PROJECT), &[]).unwrap();
        assert!(list.groups.iter().map(|group| group.files.len()).sum::<usize>() > 20);
        for Group { files, stages, .. } in &list.groups {
            assert!(!stages.is_empty() && stages.iter().all(|stage| !stage.packages.is_empty()), "{files:?}");
        }
        for Excuse { file, mutant, line, why } in &list.excused {
            assert!(list.groups.iter().any(|group| group.files.contains(file)), "{file}");
            assert!(why.len() > 20, "{mutant}: {why}");
            let text = fs::read_to_string(Path::new(PROJECT).join(file)).unwrap();
            assert!(text.lines().any(|one| one.trim() == line), "{file} has no line `{line}`");
        }
    }

    #[test]
    fn a_stage_is_named_by_its_tests() {
        let stage = |text: &str| serde_json::from_str::<Stage>(text).unwrap().name();
        assert_eq!(stage(r#"{"packages": ["a"], "tests": ["b::", "c"]}"#), "a: b::, c");
        assert_eq!(stage(r#"{"packages": ["a", "b"], "skip": ["c", "d"]}"#), "a and b: all but c, d");
    }

    #[test]
    fn a_reason_is_of_one_line() {
        let list = list();
        let is_excused =
            |change: &str, line: &str| list.excuse(&mutant("runtime/gate/mod.rs", change, line)).is_some();
        assert!(is_excused("replace > with >= in a", "if b > c {"));
        assert!(!is_excused("replace > with >= in a", "if b > d {"));
        assert!(!is_excused("replace > with == in a", "if b > c {"));
        assert!(list.excuse(&mutant("runtime/plan.rs", "replace > with >= in a", "if b > c {")).is_none());
    }

    #[test]
    fn reasons_of_what_is_gone_or_caught_are_stale() {
        let list = list();
        let one = mutant("runtime/gate/mod.rs", "replace > with >= in a", "if b > c {");
        let stale = list.stale(std::slice::from_ref(&one), &[]);
        assert!(stale.len() == 1 && stale[0].ends_with("there is no such mutant any more"), "{stale:?}");
        let stale = list.stale(std::slice::from_ref(&one), &[&one]);
        assert!(stale.len() == 2 && stale[0].ends_with("it is caught now"), "{stale:?}");
        // Files that were not asked for have no say.
        let other = list.chosen(Path::new(PROJECT), &["plan.rs".into()]).unwrap();
        assert!(other.stale(&[], &[]).is_empty());
    }

    #[test]
    fn files_are_chosen_by_a_part_of_their_names() {
        let list =
            List::read().unwrap().chosen(Path::new(PROJECT), &["verify/".into(), "ranges".into()]).unwrap();
        let files: Vec<&str> =
            list.groups.iter().flat_map(|group| &group.files).map(String::as_str).collect();
        assert!(files.contains(&"runtime/verify/places.rs") && files.contains(&"backends/src/ranges.rs"));
        assert!(files.iter().all(|file| file.contains("verify/") || file.contains("ranges")), "{files:?}");
        assert!(!files.contains(&"runtime/verify/tests.rs"), "{files:?}");
        let error = List::read().unwrap().chosen(Path::new(PROJECT), &["nothing".into()]).unwrap_err();
        assert!(error.to_string().contains("\"nothing\""), "{error}");
    }
}
