//! `cargo xtask mutants`: whether a test sees a wrong line, where wrong lines mean wrong bytes or wrong answers.
//!
//! cargo-mutants changes one line after the other ([`list`] says of which files) in a copy of the project, builds the library's
//! tests, and runs those that are about the file. What survives is tried against the next stage of the file's group: more of
//! the package's tests, then those of the packages that depend on it. What survives all stages needs a reason in the [`list`],
//! or a test.

mod list;
mod outcome;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use peervram_lab::Progress;
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::book::PROJECT;
use crate::terminal::{FAILED, Steps};
use crate::{tools, tree};
use list::List;
use outcome::{Mutant, Outcome, mutants, so_far};

/// How many of a hundred viable mutants have to be caught.
const LEAST_PERCENT: f64 = 95.0;

/// A mutant hangs when its tests take so many times what they take without it, and at least so long: other programs want
/// the machine, too.
const TIMES_AS_LONG: &str = "10";
const AT_LEAST_S: &str = "15";

/// How often the time that is left is said.
const ESTIMATE_EVERY: Duration = Duration::from_secs(300);

/// Change lines one by one and see whether a test fails
///
/// What is caught, hangs or does not compile is no trouble. What survives is printed, with its place: it needs a test that fails,
/// or, where nobody could ever see the change, a reason in xtask/src/mutants/list.json, under "excused":
/// the file, the mutant's name without its place, the line that it changes, and why. The files are listed there, too.
///
/// The exit code is 1 if fewer than 95 of a hundred viable mutants were caught, a survivor has no reason, or a reason is of a mutant
/// that is gone or caught now. Everything takes hours on a few cores; name files, or take a sample.
#[derive(Args)]
#[command(after_help = "Examples:
  cargo xtask mutants staged.rs          of one file
  cargo xtask mutants verify/ plan.rs    of some
  cargo xtask mutants --shard 3/20       every twentieth of all, from the fourth on
  cargo xtask mutants --list plan.rs     which there are; nothing is run
  cargo xtask mutants --json > all.json  all of them

A survivor is read so:
  runtime/plan.rs:61:24: replace > with >= in Plan::new
  Line 61 with `>=` in the place of `>` passes every test. Look for a test that has both sides equal.

The builds lie in target/mutants, and the next run begins with them.")]
pub struct Arguments {
    /// Only files of the list whose name contains one of these
    files: Vec<String>,
    /// Only the mutants number K, K + N, K + 2 N ... of each package
    #[arg(long, value_name = "K/N", value_parser = shard)]
    shard: Option<String>,
    /// Only list the mutants
    #[arg(long)]
    list: bool,
    /// Print what was found as JSON
    #[arg(long)]
    json: bool,
}

fn shard(text: &str) -> Result<String, String> {
    let parts =
        text.split_once('/').and_then(|(k, n)| Some((k.parse::<u32>().ok()?, n.parse::<u32>().ok()?)));
    match parts {
        Some((k, n)) if k < n => Ok(text.to_owned()),
        _ => Err("not K/N with K from 0 to N - 1, as 0/10".to_owned()),
    }
}

pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    let steps = Steps::default();
    let list = List::read()?.chosen(Path::new(PROJECT), &arguments.files)?;
    let place = Workspace::new()?;
    place.copy_project()?;
    let listed = |shard: Option<&str>| -> Result<Vec<Vec<Mutant>>> {
        let of_group = |group: &list::Group| place.list(&steps, group, shard);
        list.groups.iter().map(of_group).collect()
    };
    let all = listed(None)?;
    let wanted = if arguments.shard.is_some() { listed(arguments.shard.as_deref())? } else { all.clone() };
    let mut out = peervram_programs::output();
    if arguments.list {
        wanted.iter().flatten().try_for_each(|mutant| writeln!(out, "{}", mutant.name))?;
        return Ok(ExitCode::SUCCESS);
    }
    let count: usize = wanted.iter().map(Vec::len).sum();
    steps.note(&format!("{count} mutants; each is built and tested. `--shard 0/10` tries a tenth of them"));

    let mut outcomes = BTreeMap::new();
    for (group, wanted) in list.groups.iter().zip(&wanted).filter(|(_, wanted)| !wanted.is_empty()) {
        let mut choice = Choice::Shard(arguments.shard.as_deref(), wanted.len());
        for (number, stage) in group.stages.iter().enumerate() {
            let is_last = number + 1 == group.stages.len();
            outcomes.extend(place.run(&steps, group, stage, &choice, is_last)?);
            let survived: Vec<&str> = (wanted.iter())
                .filter(|mutant| outcomes.get(&mutant.name) == Some(&Outcome::Missed))
                .map(|mutant| mutant.name.as_str())
                .collect();
            if survived.is_empty() {
                break;
            }
            choice = Choice::Names(survived);
        }
    }
    let wanted: Vec<Mutant> = wanted.into_iter().flatten().collect();
    let all: Vec<Mutant> = all.into_iter().flatten().collect();
    let found = Found::new(&list, &all, &wanted, &outcomes);
    if arguments.json {
        writeln!(out, "{:#}", found.json())?;
    } else {
        write!(out, "{}", found.text())?;
    }
    Ok(ExitCode::from(if found.is_good() { 0 } else { FAILED }))
}

/// Which mutants of a group.
enum Choice<'a> {
    /// A part, and how many that is.
    Shard(Option<&'a str>, usize),
    Names(Vec<&'a str>),
}

impl Choice<'_> {
    /// Whether a mutant that was tried is meant.
    fn has(&self, name: &str) -> bool {
        match self {
            Self::Shard(..) => true,
            Self::Names(names) => names.contains(&name),
        }
    }

    fn count(&self) -> usize {
        match self {
            Self::Shard(_, count) => *count,
            Self::Names(names) => names.len(),
        }
    }
}

/// Where mutants are built: a copy of the project that stays, so that little is built anew.
struct Workspace {
    folder: PathBuf,
}

impl Workspace {
    fn new() -> Result<Workspace> {
        let project = fs::canonicalize(PROJECT).context("finding the project")?;
        let place = Workspace { folder: project.join("target/mutants") };
        fs::create_dir_all(place.tree()).context("making target/mutants")?;
        Ok(place)
    }

    fn tree(&self) -> PathBuf {
        self.folder.join("tree")
    }

    /// The copy gets what git knows of the project and what it does not ignore. What is the same already is left alone, so that cargo
    /// does not take it for new; what an interrupted run changed is put right.
    fn copy_project(&self) -> Result<()> {
        let names = tree::files()?.into_iter().map(PathBuf::from);
        let names: BTreeSet<PathBuf> = names.filter(|name| Path::new(PROJECT).join(name).is_file()).collect();
        for name in &names {
            let (from, to) = (Path::new(PROJECT).join(name), self.tree().join(name));
            let bytes = fs::read(&from).with_context(|| format!("reading {}", from.display()))?;
            if fs::read(&to).ok().as_ref() != Some(&bytes) {
                fs::create_dir_all(to.parent().context("a file without a folder")?)?;
                fs::copy(&from, &to).with_context(|| format!("copying {}", from.display()))?;
            }
        }
        remove_others(&self.tree(), Path::new(""), &names)
    }

    /// The command, for the mutants of a group's files.
    fn command(&self, steps: &Steps, group: &list::Group) -> Result<Command> {
        let mut command = tools::MUTANTS.command(steps)?;
        command.args(["mutants", "--no-config", "--in-place", "--colors", "never", "--dir"]).arg(self.tree());
        command.args(["--package", &group.package]);
        command.args(group.files.iter().flat_map(|file| ["--file", file.as_str()]));
        Ok(command)
    }

    /// Has it take a part only, of which each file has its share.
    fn add_shard(command: &mut Command, shard: Option<&str>) {
        if let Some(shard) = shard {
            command.args(["--sharding", "round-robin", "--shard", shard]);
        }
    }

    fn list(&self, steps: &Steps, group: &list::Group, shard: Option<&str>) -> Result<Vec<Mutant>> {
        let mut command = self.command(steps, group)?;
        command.args(["--list", "--json"]);
        Self::add_shard(&mut command, shard);
        let output = command.output().context("starting cargo-mutants")?;
        ensure!(output.status.success(), "cargo mutants --list: {}", String::from_utf8_lossy(&output.stderr));
        mutants(&output.stdout, &self.tree())
    }

    /// Tries mutants of a group against one of its stages.
    fn run(
        &self,
        steps: &Steps,
        group: &list::Group,
        stage: &list::Stage,
        choice: &Choice,
        is_last: bool,
    ) -> Result<Vec<(String, Outcome)>> {
        let (count, what) =
            (choice.count(), format!("{} mutants, tests of {}", choice.count(), stage.name()));
        let out = self.folder.join("out");
        let mut command = self.command(steps, group)?;
        command.args(["--profile", "mutants", stage.target(), "--timeout-multiplier", TIMES_AS_LONG]);
        command.args(["--minimum-test-timeout", AT_LEAST_S, "--output"]).arg(&out);
        command.args(stage.packages.iter().flat_map(|package| ["--test-package", package.as_str()]));
        match choice {
            Choice::Shard(shard, _) => Self::add_shard(&mut command, *shard),
            Choice::Names(names) => {
                command.args(names.iter().map(|name| format!("--re=^{}$", escaped(name))));
            }
        }
        // The first is cargo-mutants', the second cargo's.
        command.args(["--", "--"]).args(&stage.tests);
        command.args(stage.skip.iter().flat_map(|name| ["--skip", name.as_str()]));
        fs::create_dir_all(&out).context("making target/mutants")?;
        fs::remove_dir_all(out.join("mutants.out")).or_else(|error| match error.kind() {
            io::ErrorKind::NotFound => Ok(()),
            _ => Err(error),
        })?;
        let log = fs::File::create(out.join("log")).context("making a log in target/mutants")?;
        command.env("CARGO_TARGET_DIR", self.folder.join("build"));
        // proptest keeps what failed in a file, to try it again first. What failed with one mutant is not the next one's.
        command.env("PROPTEST_DISABLE_FAILURE_PERSISTENCE", "1");
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        steps.begin(&what);
        let start = Instant::now();
        let mut child = command.spawn().context("starting cargo-mutants")?;
        let mut said = start;
        let mut told = 0;
        let status = loop {
            if let Some(status) = child.try_wait().context("waiting for cargo-mutants")? {
                break status;
            }
            thread::sleep(Duration::from_secs(1));
            let so_far = so_far(&out);
            let done = so_far.len();
            steps.advance(done, count);
            // So that a run that is ended early was not for nothing.
            for (name, outcome) in so_far.iter().skip(told) {
                if is_last && *outcome == Outcome::Missed {
                    steps.note(&format!("survived: {name}"));
                }
            }
            told = done;
            if done > 0 && said.elapsed() > ESTIMATE_EVERY {
                said = Instant::now();
                let left = start.elapsed().as_secs_f64() / done as f64 * count.saturating_sub(done) as f64;
                steps.note(&format!("about {:.0} minutes more for these", left / 60.0));
            }
        };
        // 2: some were missed; 3: some hung.
        let has_run = matches!(status.code(), Some(0 | 2 | 3));
        steps.end(has_run, start.elapsed());
        let mut outcomes = so_far(&out);
        if !has_run {
            let log = fs::read_to_string(out.join("log")).unwrap_or_default();
            let end: Vec<&str> = log.lines().rev().take(30).collect();
            let end: Vec<&str> = end.into_iter().rev().collect();
            let reason = match status.code() {
                Some(4) => "its tests fail without any mutant",
                _ => "it did not run",
            };
            bail!("{what}: {reason} ({status}); {} has all of it:\n{}", out.display(), end.join("\n"));
        }
        // Seen: seven were tried where five were named.
        outcomes.retain(|(name, _)| choice.has(name));
        ensure!(outcomes.len() == count, "{what}: {} of {count} were tried", outcomes.len());
        Ok(outcomes)
    }
}

/// Removes files of `folder` below `root` that are none of `names`.
fn remove_others(root: &Path, folder: &Path, names: &BTreeSet<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(root.join(folder)).with_context(|| format!("reading {}", root.display()))? {
        let entry = entry?;
        let name = folder.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            if name != Path::new("target") {
                remove_others(root, &name, names)?;
            }
        } else if !names.contains(&name) {
            fs::remove_file(entry.path()).with_context(|| format!("removing {}", name.display()))?;
        }
    }
    Ok(())
}

/// A name as an expression that matches nothing else.
fn escaped(name: &str) -> String {
    let escape = |letter: char| {
        let is_special = r"\.+*?()|[]{}^$#&-~".contains(letter);
        [is_special.then_some('\\'), Some(letter)].into_iter().flatten()
    };
    name.chars().flat_map(escape).collect()
}

/// What was found in one file.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Tally {
    caught: usize,
    hung: usize,
    missed: usize,
    unviable: usize,
}

impl Tally {
    fn add(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::Caught => self.caught += 1,
            Outcome::Hung => self.hung += 1,
            Outcome::Missed => self.missed += 1,
            Outcome::Unviable => self.unviable += 1,
        }
    }

    fn plus(self, other: Tally) -> Tally {
        Tally {
            caught: self.caught + other.caught,
            hung: self.hung + other.hung,
            missed: self.missed + other.missed,
            unviable: self.unviable + other.unviable,
        }
    }

    /// How many of a hundred viable ones a test saw; where there are none, none was missed.
    fn percent(self) -> f64 {
        let seen = self.caught + self.hung;
        match seen + self.missed {
            0 => 100.0,
            viable => seen as f64 * 100.0 / viable as f64,
        }
    }
}

/// What was found in all.
struct Found<'a> {
    files: BTreeMap<&'a str, Tally>,
    /// Survivors, with the reason where there is one.
    survivors: Vec<(&'a Mutant, Option<&'a str>)>,
    stale: Vec<String>,
}

impl<'a> Found<'a> {
    fn new(
        list: &'a List,
        all: &[Mutant],
        wanted: &'a [Mutant],
        outcomes: &BTreeMap<String, Outcome>,
    ) -> Found<'a> {
        let mut files: BTreeMap<&str, Tally> = BTreeMap::new();
        let (mut survivors, mut caught) = (Vec::new(), Vec::new());
        for mutant in wanted {
            let Some(&outcome) = outcomes.get(&mutant.name) else { continue };
            files.entry(&mutant.file).or_default().add(outcome);
            match outcome {
                Outcome::Missed => {
                    survivors.push((mutant, list.excuse(mutant).map(|excuse| excuse.why.as_str())));
                }
                Outcome::Caught => caught.push(mutant),
                Outcome::Hung | Outcome::Unviable => {}
            }
        }
        Found { files, survivors, stale: list.stale(all, &caught) }
    }

    fn total(&self) -> Tally {
        self.files.values().copied().fold(Tally::default(), Tally::plus)
    }

    fn is_good(&self) -> bool {
        let is_excused = |(_, why): &(&Mutant, Option<&str>)| why.is_some();
        self.total().percent() >= LEAST_PERCENT
            && self.survivors.iter().all(is_excused)
            && self.stale.is_empty()
    }

    fn text(&self) -> String {
        let mut text = String::from("caught hung missed unviable      %  file\n");
        let mut line = |name: &str, tally: Tally| {
            let Tally { caught, hung, missed, unviable } = tally;
            text += &format!(
                "{caught:>6} {hung:>4} {missed:>6} {unviable:>8}  {:>5.1}  {name}\n",
                tally.percent()
            );
        };
        self.files.iter().for_each(|(name, tally)| line(name, *tally));
        line("all", self.total());
        let mut said = |title: &str, lines: Vec<String>| {
            if !lines.is_empty() {
                text += &format!("\n{title}:\n");
                lines.iter().for_each(|line| text += &format!("  {line}\n"));
            }
        };
        let shown = |(mutant, why): &(&Mutant, Option<&str>)| match why {
            Some(why) => format!("{}\n    `{}`\n    {why}", mutant.name, mutant.line),
            None => format!("{}\n    `{}`", mutant.name, mutant.line),
        };
        let (excused, bare): (Vec<_>, Vec<_>) = self.survivors.iter().partition(|(_, why)| why.is_some());
        said("survived with a reason", excused.into_iter().map(shown).collect());
        said(
            "SURVIVED: no test sees these, and no reason is in xtask/src/mutants/list.json",
            bare.into_iter().map(shown).collect(),
        );
        said("STALE reasons in xtask/src/mutants/list.json", self.stale.clone());
        let percent = self.total().percent();
        if percent < LEAST_PERCENT {
            text += &format!("\nFAILED: {percent:.1} % were caught, and {LEAST_PERCENT:.0} % have to be\n");
        }
        text
    }

    fn json(&self) -> serde_json::Value {
        let tally = |tally: &Tally| {
            let Tally { caught, hung, missed, unviable } = tally;
            json!({"caught": caught, "hung": hung, "missed": missed, "unviable": unviable, "percent": tally.percent()})
        };
        let files: BTreeMap<&str, _> = self.files.iter().map(|(name, one)| (*name, tally(one))).collect();
        let survivor = |(mutant, why): &(&Mutant, Option<&str>)| json!({"mutant": mutant.name, "line": mutant.line, "why": why});
        let survivors: Vec<_> = self.survivors.iter().map(survivor).collect();
        json!({
            "files": files, "all": tally(&self.total()), "survivors": survivors, "stale": self.stale, "good": self.is_good(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mutant(number: usize) -> Mutant {
        let change = format!("replace f{number} with ()");
        Mutant {
            name: format!("runtime/gate/mod.rs:{number}:1: {change}"),
            file: "runtime/gate/mod.rs".into(),
            change,
            line: "f();".into(),
        }
    }

    /// What is found where so many are caught and missed, `excused` of the latter with a reason.
    fn found(caught: usize, missed: usize, excused: usize) -> (bool, String) {
        let all: Vec<Mutant> = (0..caught + missed).map(mutant).collect();
        let outcome = |number: usize| if number < caught { Outcome::Caught } else { Outcome::Missed };
        let outcomes =
            all.iter().enumerate().map(|(number, one)| (one.name.clone(), outcome(number))).collect();
        let excuse = |mutant: &Mutant| list::Excuse {
            file: mutant.file.clone(),
            mutant: mutant.change.clone(),
            line: mutant.line.clone(),
            why: "nobody can see it".into(),
        };
        let mut list = List::read().unwrap().chosen(Path::new(PROJECT), &[]).unwrap();
        list.excused = all.iter().skip(caught).take(excused).map(excuse).collect();
        let found = Found::new(&list, &all, &all, &outcomes);
        assert_eq!(found.json()["good"], found.is_good());
        (found.is_good(), found.text())
    }

    #[test]
    fn a_survivor_without_a_reason_fails_and_so_do_too_many_with_one() {
        assert!(found(20, 0, 0).0);
        assert!(found(95, 5, 5).0);
        assert!(!found(95, 5, 4).0);
        assert!(!found(94, 6, 6).0);
    }

    #[test]
    fn survivors_are_named_with_their_line() {
        let text = found(3, 1, 0).1;
        assert!(
            text.contains("SURVIVED")
                && text.contains("runtime/gate/mod.rs:3:1: replace f3 with ()\n    `f();`"),
            "{text}"
        );
        assert!(text.contains("FAILED: 75.0 %"), "{text}");
        let text = found(3, 1, 1).1;
        assert!(!text.contains("SURVIVED") && text.contains("nobody can see it"), "{text}");
    }

    #[test]
    fn what_hung_counts_as_seen_and_what_does_not_compile_does_not_count() {
        let mut tally = Tally::default();
        for outcome in [Outcome::Hung, Outcome::Unviable, Outcome::Caught, Outcome::Missed] {
            tally.add(outcome);
        }
        assert!((tally.percent() - 200.0 / 3.0).abs() < 1e-9);
        assert_eq!(Tally::default().percent(), 100.0);
    }

    #[test]
    fn shards_are_a_part_of_a_whole() {
        assert!(shard("0/1").is_ok() && shard("9/10").is_ok());
        for text in ["", "1", "1/1", "2/1", "a/b", "0/0", "-1/2"] {
            assert!(shard(text).is_err(), "{text}");
        }
    }

    #[test]
    fn names_match_themselves_only() {
        assert_eq!(
            escaped("a_b.rs:1:2: replace + with * in <A>::b"),
            r"a_b\.rs:1:2: replace \+ with \* in <A>::b"
        );
    }

    #[test]
    fn the_copy_has_no_files_of_before() {
        let root = tempfile::tempdir().unwrap();
        for file in ["kept.rs", "a/kept.rs", "a/old.rs", "target/built"] {
            let file = root.path().join(file);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, file!()).unwrap();
        }
        let names = ["kept.rs", "a/kept.rs"].map(PathBuf::from).into_iter().collect();
        remove_others(root.path(), Path::new(""), &names).unwrap();
        let is_there = |file: &str| root.path().join(file).exists();
        assert!(is_there("kept.rs") && is_there("a/kept.rs") && is_there("target/built"));
        assert!(!is_there("a/old.rs"));
    }
}
