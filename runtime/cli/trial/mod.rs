//! `peervram trial`: everything between a lender and its importers is tried, and a report is written that can be sent.
//!
//! [`importer`] finds who can import, [`plan`] says which [`Step`]s there are, [`outcome`] runs one in a process of its own and reads what came of it,
//! [`report`] holds all of it, [`page`] writes it for people. [`cause`] and [`images`] are the steps that no other command
//! takes. What tells a machine or a person is left out by [`redact`].

mod cause;
mod images;
mod importer;
mod outcome;
mod page;
mod plan;
mod redact;
mod report;

use std::io::{self, IsTerminal, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use peervram::backends::PciAddress;
use peervram::backends::pci::{Function, is_vfio_driver};
use peervram::{Error, Kind, Result};
use peervram_programs::{CANNOT_RUN_HERE, note, replace, say};

use self::importer::Importer;
use self::outcome::{Outcome, StepReport};
use self::plan::{Part, Step};
use self::report::Report;
use super::doctor::ask_vulkan;
use super::ending::print_json;
use super::import::Target;
use super::in_use::{InUse, words};

const TRIED: &str = "try a lender";

/// Try everything between a lender and its importers, and write a report that you can send.
///
/// What the doctor sees, the PCI tree, what is predicted for each importer; then, after you were asked: imports, tests
/// of the bytes, images, copies measured by peer-copy if it is installed, and every way to take the memory back while an
/// importer has it. Each step is a process of its own, so that a driver that breaks ends its step and no other.
///
/// Writes two files: a page for people, and everything as JSON. Serial numbers, the boot's id, the machine's name, your
/// home folder and most of the kernel's command line are left out. Look at them before you send them.
///
/// The lender has to be bound to VFIO (peervram bind). Opening it resets it: what its memory holds is lost.
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    sudo peervram trial --lender 01:00.0                            every importer that is found\n  \
    sudo peervram trial --lender 01:00.0 --importer vulkan:03:00.0  one\n  \
    sudo peervram trial --lender 01:00.0 --yes --report box.md      without a question; box.md and box.json\n\n\
Exit codes: 0 every step was taken, and what was refused is in the report with its reason; 1 bytes were wrong, or a step broke\n\
or hung; 2 wrong usage; 4 steps were left out: the lender is not bound to VFIO, or you said no.")]
pub struct Arguments {
    /// Whose memory: a PCI address.
    #[arg(long, value_name = "ADDRESS")]
    lender: PciAddress,

    /// Who imports: `vulkan:WHICH` or a DRM node like /dev/dri/card0. May be given several times; all that are found where
    /// it is left out.
    #[arg(long = "importer", value_name = "IMPORTER", value_parser = importer_name)]
    importers: Vec<String>,

    /// Do not ask before the lender is opened and its memory is taken away.
    #[arg(long)]
    yes: bool,

    /// Go on though the firmware's or the text console's screen is on the lender: nothing is shown there any more.
    #[arg(long)]
    give_up_screen: bool,

    /// Where to write the page; the JSON goes beside it.
    #[arg(long, value_name = "FILE", default_value = "peervram-trial.md")]
    report: PathBuf,

    /// Take one step and print what came of it: the process of that step.
    #[arg(long, hide = true)]
    part: Option<Part>,
}

/// An importer as it was written, if it is one.
fn importer_name(text: &str) -> std::result::Result<String, String> {
    text.parse::<Target>().map(|_| text.to_owned())
}

pub fn run(arguments: &Arguments, json: bool) -> anyhow::Result<ExitCode> {
    if let Some(part) = &arguments.part {
        let [importer] = &arguments.importers[..] else {
            let why = "a part is of one importer";
            return Err(Error::new(Kind::InvalidInput, TRIED, why).next("name it with --importer").into());
        };
        let importer: Target = importer.parse().map_err(anyhow::Error::msg)?;
        return match part {
            Part::Images => images::run(arguments.lender, &importer),
            Part::Cause(cause) => cause::run(arguments.lender, &importer, *cause),
        };
    }
    let files = Files::new(&arguments.report)?;
    let lender = Function::read(arguments.lender)?;
    check_screen(&lender, arguments.give_up_screen)?;
    let found = Importer::all(arguments.lender, &ask_vulkan(), &Function::all()?);
    let named = arguments.importers.iter().map(|name| Importer::named(name, &found));
    let importers = if arguments.importers.is_empty() { found.clone() } else { named.collect() };
    let steps = plan::steps(arguments.lender, &importers);
    let say_step = |line: &str| if json { note!("{line}") } else { say!("{line}") };
    let names: Vec<&str> = importers.iter().map(|importer| &*importer.name).collect();
    let names = if names.is_empty() { "none is found".to_owned() } else { names.join(", ") };
    say_step(&format!("{} steps; importers: {names}", steps.len()));

    // Why steps that open the lender are left out, once there is a reason.
    let mut left_out = why_closed(&lender);
    let mut is_asked = arguments.yes;
    let mut taken: Vec<StepReport> = Vec::new();
    for (number, step) in steps.iter().enumerate() {
        if step.opens_lender && left_out.is_none() && !is_asked {
            is_asked = true;
            left_out = (!agreed(arguments.lender, &steps[number..])?)
                .then(|| "you were asked, and did not say yes".to_owned());
        }
        let report = match &left_out {
            Some(why) if step.opens_lender => StepReport::left_out(step, why),
            _ => outcome::take(step),
        };
        say_step(&report.line(number + 1, steps.len()));
        if let Outcome::Stuck = report.outcome {
            left_out = Some(format!("the step before, {}, has the lender and does not end", report.name()));
        }
        taken.push(report);
    }
    let report = Report::new(&lender, &importers, taken);
    files.write(&report)?;
    if json {
        print_json(&report)?;
    } else {
        say!("\n{}\n{} and {}", report.summary(), files.page.display(), files.data.display());
    }
    Ok(code(&report))
}

fn code(report: &Report) -> ExitCode {
    if report.steps.iter().any(|step| step.outcome.is_trouble()) {
        ExitCode::FAILURE
    } else if report.steps.iter().any(|step| step.outcome == Outcome::LeftOut) {
        ExitCode::from(CANNOT_RUN_HERE)
    } else {
        ExitCode::SUCCESS
    }
}

/// Refuses a lender that shows something, unless the user gave that up.
fn check_screen(lender: &Function, give_up_screen: bool) -> Result<()> {
    let screens: Vec<_> =
        InUse::read(Path::new("/")).of(lender.address).into_iter().filter(|used| used.is_screen()).collect();
    if screens.is_empty() || give_up_screen {
        return Ok(());
    }
    let why = format!("{}, and the trial takes its memory away", words(&screens));
    Err(Error::new(Kind::Busy, TRIED, why)
        .on(lender.address)
        .next("look at it from another screen or by ssh, and say so with --give-up-screen"))
}

/// Why the lender cannot be opened, where that can be seen.
fn why_closed(lender: &Function) -> Option<String> {
    let address = lender.address;
    match lender.driver.as_deref() {
        Some(driver) if is_vfio_driver(driver) => None,
        Some(driver) => Some(format!("the lender is bound to {driver}: sudo peervram bind {address}")),
        None => Some(format!("the lender has no driver: sudo peervram bind {address}")),
    }
}

/// Asks before the lender is opened. Where nobody is there to answer, the answer is no.
fn agreed(lender: PciAddress, steps: &[Step]) -> Result<bool> {
    let opening = steps.iter().filter(|step| step.opens_lender).count();
    let taking = steps.iter().filter(|step| step.takes_memory_away).count();
    if !io::stdin().is_terminal() {
        note!("nobody is at a terminal to be asked; --yes goes on without");
        return Ok(false);
    }
    let mut error = io::stderr().lock();
    let asked = write!(
        error,
        "\nThe next {opening} steps open {lender}, which resets it: what its memory holds is lost. {taking} of them take its \
         memory away while an importer has it. A driver with a fault may lose its device or, at worst, hang the machine: save \
         your work. Go on? [y/N] "
    );
    asked.and_then(|()| error.flush()).map_err(|error| Error::os("ask a question", error))?;
    let mut answer = String::new();
    io::stdin().read_line(&mut answer).map_err(|error| Error::os("read an answer", error))?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

/// The two files of a report.
struct Files {
    page: PathBuf,
    data: PathBuf,
}

impl Files {
    /// Checks now that they can be written later.
    fn new(page: &Path) -> Result<Self> {
        let data = page.with_extension("json");
        let folder = page.parent().filter(|folder| !folder.as_os_str().is_empty());
        let refuse = |why: &'static str, next: &'static str| {
            Err(Error::new(Kind::InvalidInput, "write a report", why).on(page.display()).next(next))
        };
        if data == page {
            return refuse("the JSON goes beside it, by that name", "name the page something.md");
        }
        if page.file_name().is_none() || page.is_dir() || folder.is_some_and(|folder| !folder.is_dir()) {
            return refuse(
                "it is a folder, or its folder is not there",
                "name a file in a folder that is there",
            );
        }
        Ok(Self { page: page.to_owned(), data })
    }

    fn write(&self, report: &Report) -> anyhow::Result<()> {
        let data = serde_json::to_string_pretty(report)? + "\n";
        for (file, text) in [(&self.page, page::of(report, &self.data)), (&self.data, data)] {
            replace(file, 0o644, text.as_bytes())
                .map_err(|error| Error::os("write a report", error).on(file.display()))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_a_report_cannot_go_is_said_before_anything_is_tried() {
        let folder = tempfile::tempdir().unwrap();
        let files = Files::new(&folder.path().join("box.md")).unwrap();
        assert_eq!(files.data, folder.path().join("box.json"));
        for wrong in
            [folder.path().join("box.json"), folder.path().to_owned(), folder.path().join("none/box.md")]
        {
            let Err(error) = Files::new(&wrong) else { panic!("{}", wrong.display()) };
            assert!(error.kind() == Kind::InvalidInput && error.next_step().is_some(), "{error}");
        }
    }

    #[test]
    fn a_lender_that_cannot_be_opened_is_known_by_its_driver() {
        let function = |driver: Option<&str>| importer::tests::function("0000:01:00.0", driver, &[]);
        assert_eq!(why_closed(&function(Some("vfio-pci"))), None);
        assert!(
            why_closed(&function(Some("amdgpu"))).unwrap().contains("bound to amdgpu: sudo peervram bind")
        );
        assert!(why_closed(&function(None)).unwrap().contains("no driver"));
    }
}
