//! `Step`: one thing that a trial does, as a command; and which of them there are, in order.

use std::str::FromStr;
use std::time::Duration;

use peervram::backends::PciAddress;

use super::cause::Cause;
use super::importer::Importer;

/// Nothing that only looks takes longer.
const LOOK_LIMIT: Duration = Duration::from_secs(120);
/// An import, a test of some places, an image: a slow machine needs seconds. A driver that hangs needs forever.
const TRY_LIMIT: Duration = Duration::from_secs(180);
/// Taking memory away: the library's own limits come first, and say more.
const TAKE_LIMIT: Duration = Duration::from_secs(120);
/// Copies of four sizes on every path, both ways.
const MEASURE_LIMIT: Duration = Duration::from_secs(600);
/// What is lent for an import: enough for a checksum that means something, little enough for every BAR.
const RANGE: &str = "0+1M";
/// Sizes of measured copies.
const SIZES: &str = "4K,64K,1M";

/// One thing that a trial does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    pub kind: StepKind,
    pub importer: Option<String>,
    pub program: Program,
    pub arguments: Vec<String>,
    pub limit: Duration,
    /// Opening the lender resets it.
    pub opens_lender: bool,
    pub takes_memory_away: bool,
}

/// Of which kind a step is: how what it prints is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StepKind {
    Doctor,
    Capture,
    Predict,
    Import,
    Verify,
    Images,
    Copies,
    Cause(Cause),
}

impl StepKind {
    /// A stable name.
    pub fn name(self) -> String {
        match self {
            Self::Doctor => "doctor".into(),
            Self::Capture => "capture".into(),
            Self::Predict => "predict".into(),
            Self::Import => "import".into(),
            Self::Verify => "verify".into(),
            Self::Images => "images".into(),
            Self::Copies => "copies".into(),
            Self::Cause(cause) => format!("take back: {}", cause.words()),
        }
    }
}

/// Whose command a step is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    This,
    /// peer-copy, which is a program of its own.
    PeerCopy,
}

impl Program {
    pub fn name(self) -> &'static str {
        match self {
            Self::This => "peervram",
            Self::PeerCopy => "peer-copy",
        }
    }
}

/// What the process of a step does, where no command of its own does it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    Images,
    Cause(Cause),
}

impl FromStr for Part {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "images" => Ok(Self::Images),
            text => text.parse().map(Self::Cause),
        }
    }
}

/// All steps, those that only look first, and those that take memory away last.
pub fn steps(lender: PciAddress, importers: &[Importer]) -> Vec<Step> {
    let lender = lender.to_string();
    let look = |kind, importer: Option<&Importer>, arguments: &[&str]| Step {
        kind,
        importer: importer.map(|importer| importer.name.clone()),
        program: Program::This,
        arguments: arguments.iter().map(|&argument| argument.to_owned()).collect(),
        limit: LOOK_LIMIT,
        opens_lender: false,
        takes_memory_away: false,
    };
    let open = |kind, importer: Option<&Importer>, arguments: &[&str]| Step {
        limit: TRY_LIMIT,
        opens_lender: true,
        ..look(kind, importer, arguments)
    };
    let part = |kind, importer: &Importer, part: &str| {
        let arguments =
            ["trial", "--lender", &lender, "--importer", &importer.name, "--part", part, "--json"];
        open(kind, Some(importer), &arguments)
    };
    let mut steps = vec![
        look(StepKind::Doctor, None, &["doctor", "--json"]),
        look(StepKind::Capture, None, &["capture", "--redact"]),
    ];
    steps.extend(importers.iter().filter_map(|importer| {
        let end = importer.end.as_deref()?;
        Some(look(StepKind::Predict, Some(importer), &["route", &lender, end, "--json"]))
    }));
    for importer in importers {
        let mut import = vec!["import", &lender, "--range", RANGE, "--to", &importer.name, "--json"];
        import.extend(importer.is_vulkan().then_some("--checksum"));
        steps.push(open(StepKind::Import, Some(importer), &import));
        if importer.is_vulkan() {
            let verify = ["verify", &lender, &importer.name, "--json"];
            steps.push(open(StepKind::Verify, Some(importer), &verify));
            steps.push(part(StepKind::Images, importer, "images"));
        }
    }
    let copies = open(StepKind::Copies, None, &["--lender", &lender, "--sizes", SIZES, "--json"]);
    steps.push(Step { program: Program::PeerCopy, limit: MEASURE_LIMIT, ..copies });
    for importer in importers {
        steps.extend(Cause::ALL.map(|cause| Step {
            limit: TAKE_LIMIT,
            takes_memory_away: true,
            ..part(StepKind::Cause(cause), importer, cause.name())
        }));
    }
    steps
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_takes_memory_away_comes_last_and_after_a_question() {
        let importer = |name: &str, end: Option<&str>| Importer {
            name: name.into(),
            about: None,
            end: end.map(str::to_owned),
        };
        let importers = [importer("vulkan:navi31", None), importer("/dev/dri/card0", Some("0000:03:00.0"))];
        let steps = steps("0000:01:00.0".parse().unwrap(), &importers);
        let position = |is_so: &dyn Fn(&Step) -> bool| steps.iter().position(is_so).unwrap();
        let first_opening = position(&|step| step.opens_lender);
        assert!(steps[first_opening..].iter().all(|step| step.opens_lender));
        let first_taking = position(&|step| step.takes_memory_away);
        assert!(steps[first_taking..].iter().all(|step| step.takes_memory_away));

        let count = |kind| steps.iter().filter(|step| step.kind == kind).count();
        // Of what has no place on the bus nothing is predicted; a display has no engine to verify with.
        assert_eq!((count(StepKind::Predict), count(StepKind::Verify), count(StepKind::Images)), (1, 1, 1));
        assert_eq!((count(StepKind::Import), count(StepKind::Cause(Cause::Close))), (2, 2));
        for step in &steps {
            assert!(step.opens_lender || step.arguments[0] != "import", "{step:?}");
        }
    }

    #[test]
    fn every_part_has_a_name_that_its_process_understands() {
        assert_eq!("images".parse(), Ok(Part::Images));
        for cause in Cause::ALL {
            assert_eq!(cause.name().parse(), Ok(Part::Cause(cause)));
        }
        assert!("nothing".parse::<Part>().is_err());
    }
}
