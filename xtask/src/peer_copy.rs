//! `peer-copy` in the lab: all pairs of two model GPUs, a device that only lends, lavapipe and the host.
//!
//! First everybody is honest: the figures have to be there and right, and the record has to be what its schema says. Then
//! one model's engine works on other memory than its BAR shows (a private mirror): it has to say WRONG, and to
//! fail. Both pages have to be legible in a browser. Two Vulkan devices lend to each other, a device is lost, and in a
//! machine of its own what measuring costs has to be within its limit.

use anyhow::{Context, Result, bail, ensure};
use peervram_lab::wire::Stream;
use peervram_lab::{Lab, Vm};
use peervram_model::misbehaviour::Misbehaviour;
use peervram_model::request::Request;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::figures::{Figure, Figures};
use crate::page::{self, Says};
use crate::{build, lab};

/// What it is called on the command line.
pub const NAME: &str = "peer-copy";

/// The machine with one of every kind of place.
const MACHINE: &str = "small-peer-copy";

/// The machine whose memory has room for large copies, and how large those are.
const LARGE_MACHINE: &str = "small-peer-copy-large";
const LARGE: &str = "256M";
/// More than its lender has.
const BEYOND: &str = "320M";

/// What the ratio of both bandwidths is to be at least; the program has the same.
const OVERHEAD_LIMIT: f64 = 0.98;

/// The longest that it is between two words.
const SILENCE_LIMIT: Duration = Duration::from_secs(300);

/// The guest's names of the record and the page, in the folder that it shares.
const RECORD: &str = "peer-copy.json";
const PAGE: &str = "peer-copy.html";
/// The page of the lender that lies.
const PAGE_OF_LIES: &str = "lied-to.html";

/// Where to leave what came out.
#[derive(Default)]
pub struct Files {
    /// The record.
    pub json: Option<PathBuf>,
    /// The page.
    pub html: Option<PathBuf>,
}

/// How much is measured.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// Small and large, as far as an emulated CPU gets through them in a few minutes, and what measuring costs.
    Usual,
    /// Enough to see that it works.
    Quick,
}

impl Extent {
    fn options(self) -> Vec<&'static str> {
        match self {
            Self::Usual => vec!["--sizes", "4K,64K,1M,16M", "--copies", "11", "--budget-ms", "300"],
            Self::Quick => {
                let least = ["--copies", "3", "--least-copies", "3", "--warm-up", "1"];
                ["--sizes", "4K,1M"].into_iter().chain(least).collect()
            }
        }
    }
}

/// Runs it, honest and lied to, and checks what came out. What measuring costs goes to `figures`.
///
/// # Errors
/// What was expected and did not happen.
pub fn run(lab: &Lab, files: &Files, extent: Extent, figures: &mut Figures) -> Result<()> {
    let program = build::peer_copy()?;
    let mut vm = lab.boot(lab::named(MACHINE)?)?;
    if extent == Extent::Usual {
        vm.measures();
    }
    let folder = vm.shared_folder();
    let (record, page) = (folder.join(RECORD), folder.join(PAGE));
    let (record_there, page_there) = (in_guest(RECORD), in_guest(PAGE));
    let mut words = extent.options();
    words.extend(["--json-to", &record_there, "--html", &page_there]);
    let (code, _) = execute(&mut vm, &program, &words)?;
    ensure!(code == 0, "with honest devices its exit code is {code}");

    let (code, text) = execute(&mut vm, &program, &["--check", &record_there])?;
    ensure!(code == 0, "its record is not what its schema says: {text}");
    let found: Value = serde_json::from_slice(&fs::read(&record)?)?;
    check_figures(&found)?;
    for (from, to) in [(&record, &files.json), (&page, &files.html)] {
        if let Some(to) = to {
            fs::copy(from, to).with_context(|| format!("writing {}", to.display()))?;
        }
    }

    let (lender, importer) = models(&found)?;
    let pair = ["--lender", &lender, "--importer", &importer, "--path", "peer", "--direction", "write"];
    peervram_programs::say!("\nthe first model has a private mirror");
    vm.control(0, &Request::Misbehave(Misbehaviour::Mirror))?;
    let page_of_lies = in_guest(PAGE_OF_LIES);
    let quick = [
        "--html",
        &page_of_lies,
        "--lender",
        &lender,
        "--importer",
        &importer,
        "--sizes",
        "64K",
        "--copies",
        "3",
        "--least-copies",
        "3",
    ];
    let (code, text) = execute(&mut vm, &program, &quick)?;
    ensure!(code == 1 && text.contains("WRONG"), "with a private mirror its exit code is {code}");
    vm.control(0, &Request::Behave)?;
    copies_that_stop_arriving(&mut vm, &program, &lender, &importer)?;
    let of_lies = folder.join(PAGE_OF_LIES);
    let pages: [(&str, &Path, Says); 2] =
        [("honest", &page, Says::Right), ("lied-to", &of_lies, Says::Wrong)];
    let views = if extent == Extent::Usual { &page::VIEWS[..] } else { &page::VIEWS[..2] };
    page::look(lab.progress(), &pages, views)?;

    two_vulkan_devices(lab, &mut vm, &program)?;

    peervram_programs::say!("\nnames and sizes that are not there");
    for wrong in [&["--lender", "none"][..], &["--lender", &lender, "--sizes", "512M"]] {
        let (code, _) = execute(&mut vm, &program, wrong)?;
        ensure!(code == 2, "{wrong:?} gets the exit code {code}");
    }

    peervram_programs::say!("\nthe second model is lost in the middle");
    let mut is_there = true;
    let mut lost = pair.to_vec();
    lost.extend(["--sizes", "4K,64K"]);
    let (code, text) = watch(&mut vm, &program, &lost, &BTreeMap::new(), |vm| {
        if is_there {
            is_there = false;
            vm.control(1, &Request::Remove)?;
        }
        Ok(())
    })?;
    let is_told = text.contains("FAILED") || text.contains("WRONG");
    ensure!(code == 1 && is_told, "with a device that is lost its exit code is {code}");
    vm.control(1, &Request::Insert)?;
    drop(vm);
    // Ratios of times are for a machine that has nothing else to do.
    if extent == Extent::Usual { overhead(lab, figures) } else { Ok(()) }
}

/// A way between peers that drops what is copied once the first copies have arrived, without an error: what a destination holds
/// by then is right, and no timed copy brought it.
fn copies_that_stop_arriving(vm: &mut Vm, program: &Path, lender: &str, importer: &str) -> Result<()> {
    // Long enough for a busy machine to have warmed up before, and to have copies left after.
    const HONEST: Duration = Duration::from_secs(2);
    const BUDGET_MS: &str = "10000";
    for (direction, dead) in [("write", Misbehaviour::DeadWrites), ("read", Misbehaviour::DeadReads)] {
        peervram_programs::say!("\nthe second model's copies ({direction}) stop arriving in the middle");
        let ends = ["--lender", lender, "--importer", importer, "--path", "peer", "--direction", direction];
        let long =
            ["--sizes", "4K", "--copies", "1000000000", "--least-copies", "3", "--budget-ms", BUDGET_MS];
        let words = [&ends[..], &long].concat();
        let mut is_honest = true;
        let (code, text) = watch(vm, program, &words, &BTreeMap::new(), |vm| {
            if std::mem::take(&mut is_honest) {
                std::thread::sleep(HONEST);
                // Its copies to and from host memory, by which it is looked at, go on.
                for how in [Misbehaviour::PeersOnly, dead] {
                    vm.control(1, &Request::Misbehave(how))?;
                }
            }
            Ok(())
        })?;
        vm.control(1, &Request::Behave)?;
        let is_told = code == 1 && text.contains("WRONG");
        ensure!(is_told, "with copies ({direction}) that do not arrive its exit code is {code}");
    }
    Ok(())
}

/// Two Vulkan devices, each of which lends to the other. Mesa's CPU driver is one device; a loader that is told of it twice has two.
fn two_vulkan_devices(lab: &Lab, vm: &mut Vm, program: &Path) -> Result<()> {
    peervram_programs::say!("\ntwo Vulkan devices");
    let driver = lab.root().join("usr/share/vulkan/icd.d/lvp_icd.json");
    let names = ["one.json", "two.json"];
    for name in names {
        let to = vm.shared_folder().join(name);
        fs::copy(&driver, &to).with_context(|| format!("copying {} for the guest", driver.display()))?;
    }
    let drivers = ("VK_DRIVER_FILES".to_owned(), names.map(in_guest).join(":"));
    let record_there = in_guest(RECORD);
    let ends =
        ["--lender", "vulkan0", "--lender", "vulkan1", "--importer", "vulkan0", "--importer", "vulkan1"];
    let few = ["--path", "peer", "--sizes", "64K", "--copies", "3", "--least-copies", "3"];
    let words: Vec<&str> = ends.into_iter().chain(few).chain(["--json-to", &record_there]).collect();
    let (code, _) = watch(vm, program, &words, &BTreeMap::from([drivers]), |_| Ok(()))?;
    ensure!(code == 0, "with two Vulkan devices its exit code is {code}");
    let found: Value = serde_json::from_slice(&fs::read(vm.shared_folder().join(RECORD))?)?;
    let figures = found["figures"].as_array().context("the record has no figures")?;
    for (lender, importer, direction) in
        [("vulkan0", "vulkan1", "read"), ("vulkan1", "vulkan0", "write"), ("vulkan0", "vulkan1", "both")]
    {
        let is_it = |figure: &Value| {
            let what = &figure["what"];
            what["lender"] == lender && what["importer"] == importer && what["direction"] == direction
        };
        let is_right = |figure: &Value| figure["verdict"] == "right" && figure["same_gpu"] == false;
        ensure!(
            figures.iter().any(|one| is_it(one) && is_right(one)),
            "{lender} lends nothing to {importer}"
        );
    }
    Ok(())
}

/// What measuring costs: the same copies through `peer-copy` and in a bare loop. The program has the limit.
///
/// # Errors
/// As [`run`].
pub fn overhead(lab: &Lab, figures: &mut Figures) -> Result<()> {
    peervram_programs::say!("\nwhat measuring costs, against a bare loop");
    let program = build::peer_copy()?;
    let machine = lab::named(LARGE_MACHINE)?;
    let mut vm = lab.boot(machine)?;
    // What only lends is behind the first port, and the model behind the second.
    let ends = ["--lender", "01:00.0", "--importer", "02:00.0", "--path", "peer", "--direction", "write"];
    let record_there = in_guest(RECORD);
    let few = ["--sizes", LARGE, "--least-copies", "3", "--budget-ms", "0", "--overhead"];
    let words: Vec<&str> = ends.into_iter().chain(few).chain(["--json-to", &record_there]).collect();
    // 1 is what it says where the ratio is beyond its limit, too: the table says that as well.
    let (code, text) = execute(&mut vm, &program, &words)?;
    ensure!([0, 1].contains(&code) && text.contains("bare loop"), "its exit code is {code}");
    let record: Value = serde_json::from_slice(&fs::read(vm.shared_folder().join(RECORD))?)?;
    let found = record["overheads"].as_array().context("the record has no overheads")?;
    ensure!(!found.is_empty(), "nothing was copied in a bare loop");
    for overhead in found {
        let spread = [&overhead["p10"], &overhead["p90"]].map(Value::as_f64);
        let ratio = overhead["ratio"].as_f64().context("an overhead without a ratio")?;
        let what = format!("bandwidth of {LARGE} copies by peer-copy");
        figures.push(Figure::of_more("a bare loop", &what, ratio, spread, OVERHEAD_LIMIT), machine.name);
    }
    // The host can hold more than the device has.
    let (code, _) = execute(&mut vm, &program, &["--lender", "01:00.0", "--sizes", BEYOND])?;
    ensure!(code == 2, "{BEYOND} of a device with {LARGE} gets the exit code {code}");
    Ok(())
}

/// A file as the guest sees it.
fn in_guest(name: &str) -> String {
    format!("{}/{name}", peervram_lab::wire::SHARE)
}

/// Runs it in the guest; gives its exit code and what it printed.
fn execute(vm: &mut Vm, program: &Path, words: &[&str]) -> Result<(i32, String)> {
    watch(vm, program, words, &BTreeMap::new(), |_| Ok(()))
}

/// The same; `begins` is told when it says what it measures.
fn watch(
    vm: &mut Vm,
    program: &Path,
    words: &[&str],
    environment: &BTreeMap<String, String>,
    mut begins: impl FnMut(&mut Vm) -> Result<()>,
) -> Result<(i32, String)> {
    let mut text = String::new();
    let exit = vm.run_watched(program, words, environment, SILENCE_LIMIT, |vm, stream, line| {
        match stream {
            Stream::Stdout => {
                peervram_programs::say!("{line}");
                text.push_str(line);
                text.push('\n');
            }
            Stream::Stderr => {
                peervram_programs::note!("{line}");
                begins(vm)?;
            }
        }
        Ok(())
    })?;
    Ok((exit.code, text))
}

/// The names of both models: they lend and have a copy engine.
fn models(record: &Value) -> Result<(String, String)> {
    let places = record["places"].as_array().context("the record has no places")?;
    let of_models = places.iter().filter(|place| place["engines"][0] == "copy engine");
    let mut names = of_models.map(|place| place["name"].as_str().unwrap_or_default().to_owned());
    names.next().zip(names.next()).context("fewer than two models took part")
}

/// Whether every kind of way is there, and right.
fn check_figures(record: &Value) -> Result<()> {
    let figures = record["figures"].as_array().context("the record has no figures")?;
    if let Some(figure) = figures.iter().find(|figure| figure["verdict"] != "right") {
        bail!("with honest devices there is {figure}");
    }
    for path in ["peer", "host-pointer", "staged", "owner", "window", "opaque-fd", "dma-buf", "local"] {
        let mut of_path = figures.iter().filter(|figure| figure["what"]["path"] == path);
        let first = of_path.next().with_context(|| format!("nothing went by {path}"))?;
        let is_within = matches!(path, "opaque-fd" | "dma-buf" | "local");
        ensure!(first["same_gpu"] == is_within, "it is not said whether {path} is within one GPU: {first}");
    }
    for direction in ["read", "write", "both"] {
        let is_it = |figure: &Value| figure["what"]["direction"] == direction;
        ensure!(figures.iter().any(is_it), "nothing went by direction {direction}");
    }
    Ok(())
}
