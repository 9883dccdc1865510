//! `StepReport`: what came of a step, out of how its process ended and what it printed.

use std::env;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use peervram_programs::{CANNOT_RUN_HERE, bytes};
use serde::Serialize;
use serde_json::Value;

use super::cause::Cause;
use super::plan::{Program, Step, StepKind};
use crate::child::{self, Ended, How};

/// What came of a step.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StepReport {
    pub step: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub importer: Option<String>,
    /// The command, as it could be given again; none of what only a trial does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub command: Option<String>,
    pub outcome: Outcome,
    /// In a sentence.
    pub words: String,
    pub took_ms: f64,
    /// All that its process printed.
    pub detail: Value,
}

/// How a step ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// As it is to be.
    Ok,
    /// peervram or the kernel said no, with a reason. That is an answer, and no fault.
    Refused,
    /// Bytes were wrong, or an import was not good again.
    Wrong,
    /// Its process died, or said what nobody understands.
    Broke,
    /// It took too long and was ended.
    Hung,
    /// It took too long, and the kernel does not let go of it.
    Stuck,
    /// It was not taken.
    LeftOut,
}

impl Outcome {
    /// As a page has it.
    pub fn words(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Refused => "refused",
            Self::Wrong => "WRONG",
            Self::Broke => "BROKE",
            Self::Hung => "HUNG",
            Self::Stuck => "STUCK",
            Self::LeftOut => "left out",
        }
    }

    /// Whether something is at fault.
    pub fn is_trouble(self) -> bool {
        matches!(self, Self::Wrong | Self::Broke | Self::Hung | Self::Stuck)
    }
}

impl StepReport {
    /// Of a step that was not taken.
    pub fn left_out(step: &Step, why: &str) -> Self {
        Self::new(step, Outcome::LeftOut, why.to_owned(), Duration::ZERO, Value::Null)
    }

    fn new(step: &Step, outcome: Outcome, words: String, took: Duration, detail: Value) -> Self {
        let is_hidden = step.arguments.iter().any(|argument| argument == "--part");
        let arguments: Vec<String> = step.arguments.iter().map(|argument| quoted(argument)).collect();
        let command = format!("{} {}", step.program.name(), arguments.join(" "));
        Self {
            step: step.kind.name(),
            importer: step.importer.clone(),
            command: (!is_hidden).then_some(command),
            outcome,
            words,
            took_ms: took.as_secs_f64() * 1e3,
            detail,
        }
    }

    /// "import, vulkan:0000:03:00.0".
    pub fn name(&self) -> String {
        match &self.importer {
            Some(importer) => format!("{}, {importer}", self.step),
            None => self.step.clone(),
        }
    }

    /// As it is told while the trial runs.
    pub fn line(&self, number: usize, of: usize) -> String {
        let (outcome, name) = (self.outcome.words(), self.name());
        let took = if self.took_ms > 0.0 { format!("  {:.1} s", self.took_ms / 1e3) } else { String::new() };
        format!("{number:3}/{of}  {outcome:8}  {name}: {}{took}", self.words)
    }
}

/// As a shell takes it for one word.
fn quoted(argument: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./:+,=".contains(c);
    match argument.chars().all(is_plain) {
        true => argument.to_owned(),
        false => format!("'{}'", argument.replace('\'', r"'\''")),
    }
}

/// Takes a step, in a process of its own.
pub fn take(step: &Step) -> StepReport {
    let mut command = match step.program {
        Program::This => match child::this_program() {
            Some(command) => command,
            None => return StepReport::left_out(step, "this program does not know where it is"),
        },
        Program::PeerCopy => match peer_copy() {
            Some(file) => Command::new(file),
            None => {
                let why = "peer-copy is not installed: cargo install --path benches/peer-copy";
                let took = Duration::ZERO;
                return StepReport::new(step, Outcome::Refused, why.to_owned(), took, Value::Null);
            }
        },
    };
    match child::run(command.args(&step.arguments).stderr(Stdio::piped()), step.limit) {
        Ok(ended) => read(step, &ended),
        Err(error) => StepReport::left_out(step, &format!("its process cannot be started: {error}")),
    }
}

/// Beside this program, or where the shell would find it.
fn peer_copy() -> Option<PathBuf> {
    let beside = env::current_exe().ok().and_then(|this| Some(this.parent()?.join("peer-copy")));
    let path = env::var_os("PATH").unwrap_or_default();
    let found = env::split_paths(&path).map(|folder| folder.join("peer-copy"));
    beside.into_iter().chain(found).find(|file| file.is_file())
}

/// What came of a step, out of the end of its process.
fn read(step: &Step, ended: &Ended) -> StepReport {
    let detail = json_in(&ended.output);
    let error = detail.as_ref().and_then(|detail| detail["error"]["message"].as_str());
    let last = ended.errors.lines().rev().find(|line| !line.trim().is_empty());
    let said = last.map(|last| format!(": {last}")).unwrap_or_default();
    let limit = step.limit.as_secs();
    let (outcome, words) = match (ended.how, &detail) {
        (How::Signal(signal), _) => (Outcome::Broke, format!("its process died by signal {signal}{said}")),
        (How::TimedOut, _) => (Outcome::Hung, format!("not over after {limit} s, and ended{said}")),
        (How::Stuck(process), _) => {
            let words = format!("not over after {limit} s; process {process} sleeps in the kernel{said}");
            (Outcome::Stuck, words)
        }
        (How::Exited(0), Some(detail)) => (Outcome::Ok, words_of(step.kind, detail)),
        // `peervram doctor` says by this that no device can lend.
        (How::Exited(code), Some(detail)) if code == i32::from(CANNOT_RUN_HERE) && error.is_none() => {
            (Outcome::Refused, words_of(step.kind, detail))
        }
        (How::Exited(1 | 4), Some(_)) if error.is_some() => {
            (Outcome::Refused, error.unwrap_or_default().to_owned())
        }
        (How::Exited(1), Some(detail)) => (Outcome::Wrong, words_of(step.kind, detail)),
        (How::Exited(code), _) => (Outcome::Broke, format!("its process ended with code {code}{said}")),
    };
    // The doctor's facts have the PCI tree once more, with the serial numbers that the captured one lacks.
    let mut detail = detail.unwrap_or(Value::Null);
    if let (StepKind::Doctor, Some(doctor)) = (step.kind, detail.as_object_mut()) {
        doctor.remove("facts");
    }
    StepReport::new(step, outcome, words, ended.took, detail)
}

/// The JSON that a command printed. A driver or a layer may print lines of its own before and after it.
fn json_in(output: &str) -> Option<Value> {
    let starts =
        output.match_indices('{').map(|(at, _)| at).filter(|&at| at == 0 || output[..at].ends_with('\n'));
    starts
        .into_iter()
        .find_map(|at| serde_json::Deserializer::from_str(&output[at..]).into_iter().next()?.ok())
}

/// What a step found, in a sentence, out of the JSON of its command.
fn words_of(kind: StepKind, detail: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or("?").to_owned();
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    match kind {
        StepKind::Doctor => text(&detail["headline"]),
        StepKind::Capture => format!("{} functions", list(&detail["places"]).len()),
        StepKind::Predict => {
            let (answer, words) = (text(&detail["answer"]), text(&detail["verdict_words"]));
            if words.starts_with(&answer) { words } else { format!("{answer}: {words}") }
        }
        StepKind::Import => {
            let refused: Vec<String> = (list(&detail["refused"]).iter())
                .map(|refused| format!("{}: {}", text(&refused["path"]), text(&refused["error"]["why"])))
                .collect();
            let refused =
                if refused.is_empty() { String::new() } else { format!("; refused {}", refused.join(", ")) };
            let took = match number(&detail["attach_us"]) {
                us if us < 1000.0 => format!("{us:.0} us"),
                us => format!("{:.1} ms", us / 1000.0),
            };
            format!("by {} in {took}{refused}", text(&detail["path"]))
        }
        StepKind::Verify => {
            let tests = list(&detail["certificate"]["tests"]);
            let test = |test: &Value| {
                let bytes = if test["failure"].is_null() { "right" } else { "WRONG" };
                format!("{} by {} {bytes}", text(&test["direction"]), text(&test["engine"]))
            };
            format!("by {}: {}", text(&detail["path"]), tests.iter().map(test).collect::<Vec<_>>().join(", "))
        }
        StepKind::Images => {
            let images = list(&detail["images"]);
            let (taken, refused): (Vec<_>, Vec<_>) =
                images.iter().partition(|image| !image["path"].is_null());
            let names = |images: &[&Value]| {
                let name = |image: &&Value| format!("{} {}", text(&image["tiling"]), image["stride_bytes"]);
                images.iter().map(name).collect::<Vec<_>>().join(", ")
            };
            match (taken.len(), images.len()) {
                (0, all) => format!("none of {all} taken"),
                (some, all) if some == all => format!("all {all} taken: {}", names(&taken)),
                (some, all) => {
                    format!("{some} of {all} taken: {}; refused: {}", names(&taken), names(&refused))
                }
            }
        }
        StepKind::Copies => copies(&list(&detail["figures"])),
        StepKind::Cause(_) => {
            let importer = &detail["importer"];
            let state = match (importer["good"].as_bool(), kind) {
                (Some(true), _) => "good again".to_owned(),
                (_, StepKind::Cause(Cause::Close)) => "kept out for good, as it has to be".to_owned(),
                _ => text(&importer["error"]["message"]),
            };
            let let_in = if detail["kept_out"] == false {
                ", and it was let in while the memory was away"
            } else {
                ""
            };
            format!(
                "{:.1} ms; the import by {}: {state}{let_in}",
                number(&detail["took_ms"]),
                text(&importer["path"])
            )
        }
    }
}

/// The fastest copies by each path, and whether bytes were right.
fn copies(figures: &[Value]) -> String {
    let mut best: Vec<(&str, &Value)> = Vec::new();
    for figure in figures {
        let path = figure["what"]["path"].as_str().unwrap_or("?");
        match best.iter_mut().find(|(known, _)| *known == path) {
            Some((_, fastest)) if number(&fastest["bytes_per_s"]) < number(&figure["bytes_per_s"]) => {
                *fastest = figure
            }
            Some(_) => {}
            None => best.push((path, figure)),
        }
    }
    let word = |(path, figure): &(&str, &Value)| {
        format!("{path} up to {}/s", bytes::in_words(number(&figure["bytes_per_s"]) as u64))
    };
    let wrong = figures.iter().filter(|figure| figure["verdict"] == "wrong").count();
    let wrong = if wrong > 0 { format!("; {wrong} of {} WRONG", figures.len()) } else { String::new() };
    match best.len() {
        0 => "nothing could be measured".to_owned(),
        _ => best.iter().map(word).collect::<Vec<_>>().join(", ") + &wrong,
    }
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::super::importer::Importer;
    use super::super::plan;
    use super::*;

    fn step(kind: StepKind) -> Step {
        let importer = Importer { name: "vulkan:navi31".into(), about: None, end: Some("cpu".into()) };
        let steps = plan::steps("0000:01:00.0".parse().unwrap(), &[importer]);
        steps.into_iter().find(|step| step.kind == kind).unwrap()
    }

    fn report(kind: StepKind, how: How, output: &str) -> StepReport {
        let (output, errors) = (output.to_owned(), "a driver says this\n\n".to_owned());
        read(&step(kind), &Ended { how, output, errors, took: Duration::from_millis(1500) })
    }

    #[test]
    fn an_answer_is_told_from_a_fault() {
        let import = r#"{"path": "host-pointer", "attach_us": 41.6, "refused": [
            {"path": "peer", "error": {"why": "no dma-buf of this machine's kernel"}}]}"#;
        let report = report(StepKind::Import, How::Exited(0), import);
        assert_eq!(report.outcome, Outcome::Ok);
        assert_eq!(
            report.words,
            "by host-pointer in 42 us; refused peer: no dma-buf of this machine's kernel"
        );
        assert_eq!(
            report.command.as_deref(),
            Some("peervram import 0000:01:00.0 --range 0+1M --to vulkan:navi31 --json --checksum")
        );
        assert!(report.line(3, 20).starts_with("  3/20  ok        import, vulkan:navi31: by host-pointer"));

        let error = r#"{"error": {"message": "cannot attach: the kernel refuses the route"}}"#;
        for code in [1, 4] {
            let report = super::tests::report(StepKind::Import, How::Exited(code), error);
            assert_eq!(
                (report.outcome, &*report.words),
                (Outcome::Refused, "cannot attach: the kernel refuses the route")
            );
        }
    }

    #[test]
    fn what_breaks_or_hangs_is_trouble_and_says_how() {
        let report = |how, output: &str| report(StepKind::Verify, how, output);
        for (how, outcome, words) in [
            (How::Signal(11), Outcome::Broke, "died by signal 11: a driver says this"),
            (How::TimedOut, Outcome::Hung, "not over after 180 s"),
            (How::Stuck(7), Outcome::Stuck, "process 7 sleeps in the kernel"),
            (How::Exited(101), Outcome::Broke, "with code 101: a driver says this"),
            (How::Exited(0), Outcome::Broke, "with code 0"),
        ] {
            let report = report(how, "no JSON");
            assert!(report.outcome == outcome && report.words.contains(words), "{report:?}");
            assert!(report.outcome.is_trouble());
        }
        let wrong = r#"{"path": "peer", "passed": false, "certificate": {"tests": [
            {"direction": "read", "engine": "compute queue", "failure": {"engine": "x"}},
            {"direction": "write", "engine": "compute queue"}]}}"#;
        let report =
            report(How::Exited(1), &format!("MESA: a {{warning}}\n{{no JSON}}\n{wrong}\nLayer: bye\n"));
        assert_eq!(report.outcome, Outcome::Wrong);
        assert_eq!(report.words, "by peer: read by compute queue WRONG, write by compute queue right");
    }

    #[test]
    fn what_was_found_is_said_once_and_whole() {
        let words = |kind, detail: &str| report(kind, How::Exited(0), detail).words;
        let predicted = r#"{"answer": "works", "verdict_words": "works, by bus addresses"}"#;
        assert_eq!(words(StepKind::Predict, predicted), "works, by bus addresses");
        let unasked = r#"{"answer": "unasked", "verdict_words": "a processor reads the BAR"}"#;
        assert_eq!(words(StepKind::Predict, unasked), "unasked: a processor reads the BAR");
        let slow = r#"{"path": "peer", "attach_us": 82991.6, "refused": []}"#;
        assert_eq!(words(StepKind::Import, slow), "by peer in 83.0 ms");
        let image = |stride: u32, path: &str| {
            format!(r#"{{"tiling": "linear", "stride_bytes": {stride}, "path": {path}}}"#)
        };
        let images =
            |list: &[String]| words(StepKind::Images, &format!(r#"{{"images": [{}]}}"#, list.join(", ")));
        let (taken, refused) = (image(2560, r#""peer""#), image(2564, "null"));
        assert_eq!(
            images(&[taken.clone(), refused.clone()]),
            "1 of 2 taken: linear 2560; refused: linear 2564"
        );
        assert_eq!(images(std::slice::from_ref(&taken)), "all 1 taken: linear 2560");
        assert_eq!(images(&[refused]), "none of 1 taken");
    }

    #[test]
    fn an_import_that_is_let_in_too_early_is_told() {
        let detail = r#"{"took_ms": 3.2, "events": [], "kept_out": false, "importer": {"path": "peer", "good": true}}"#;
        let report = report(StepKind::Cause(Cause::Sleep), How::Exited(1), detail);
        assert_eq!(report.outcome, Outcome::Wrong);
        assert_eq!(
            report.words,
            "3.2 ms; the import by peer: good again, and it was let in while the memory was away"
        );
        assert_eq!(report.command, None);
    }

    #[test]
    fn a_doctor_that_finds_nothing_is_an_answer_and_its_facts_stay_at_home() {
        let detail = r#"{"headline": "No device can lend.", "facts": {"user": 1}, "findings": []}"#;
        let report = report(StepKind::Doctor, How::Exited(4), detail);
        assert_eq!((report.outcome, &*report.words), (Outcome::Refused, "No device can lend."));
        assert!(report.detail.get("facts").is_none() && report.detail.get("findings").is_some());
    }

    #[test]
    fn a_command_is_quoted_where_a_shell_would_take_it_apart() {
        assert_eq!(quoted("vulkan:0000:03:00.0"), "vulkan:0000:03:00.0");
        assert_eq!(quoted("vulkan:Arc (B580)"), "'vulkan:Arc (B580)'");
        assert_eq!(quoted("a'b"), r"'a'\''b'");
    }

    #[test]
    fn the_fastest_copy_of_each_path_is_named() {
        let figure = |path: &str, bytes_per_s: f64, verdict: &str| serde_json::json!({ "what": { "path": path }, "bytes_per_s": bytes_per_s, "verdict": verdict });
        let mib = f64::from(1 << 20);
        let figures = [
            figure("peer", 2.0 * mib, "right"),
            figure("peer", 3.0 * mib, "wrong"),
            figure("staged", mib, "right"),
        ];
        assert_eq!(copies(&figures), "peer up to 3 MiB/s, staged up to 1 MiB/s; 1 of 3 WRONG");
        assert_eq!(copies(&[]), "nothing could be measured");
    }
}
