//! `cargo xtask sample`: a sample in a virtual machine, and pictures of what it shows.
//!
//! A sample gets a lender's address and, where the machine has one, an importing GPU's DRM node; or what
//! samples/Cargo.toml says that it wants. When it says `screendump NAME` it waits for a line: the picture is of
//! that moment.

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use peervram_lab::machines::MACHINES;
use peervram_lab::progress::step;
use peervram_lab::report::Counts;
use peervram_lab::wire::Stream;
use peervram_lab::{Lab, Machine};
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use crate::build::{self, SAMPLES, cargo};
use crate::in_guest::Devices;
use crate::lab::{self, Setup};
use crate::terminal::{FAILED, Steps};
use peervram_programs::usage;

/// Longest silence of a sample: a shader is compiled by an emulated CPU.
const SILENCE_LIMIT: Duration = Duration::from_secs(120);

/// Where pictures go.
const FOLDER: &str = "target/sample";

/// How a sample asks for a picture.
const SCREENDUMP: &str = "screendump ";

/// Run a sample in a virtual machine; pictures of what it shows are in target/sample
#[derive(Args)]
#[command(after_help = "Examples:
  cargo xtask sample share_buffer
  cargo xtask sample share_buffer --machine epyc-switch")]
pub struct Arguments {
    /// Its name, a program of samples/; all of them if left out
    name: Option<String>,
    /// Which machine of the lab; without it the sample's own, which samples/Cargo.toml may name
    #[arg(long, value_name = "NAME")]
    machine: Option<String>,
    #[command(flatten)]
    setup: Setup,
}

impl Arguments {
    /// The samples that are meant, each with its machine.
    fn chosen(&self) -> Result<Vec<Sample>> {
        let mut samples = Sample::all()?;
        if let Some(name) = &self.name {
            let names: Vec<String> = samples.iter().map(|sample| sample.name.clone()).collect();
            samples.retain(|sample| sample.name == *name);
            if samples.is_empty() {
                let reason = format!("no sample {name:?}; there are {}", names.join(", "));
                bail!(usage(reason));
            }
        }
        if let Some(machine) = &self.machine {
            let machine = lab::named(machine)?;
            samples.iter_mut().for_each(|sample| sample.machine = machine);
        }
        Ok(samples)
    }

    /// Whether there is what they name.
    pub fn check(&self) -> Result<()> {
        self.chosen().map(|_| ())
    }
}

pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    let samples = arguments.chosen()?;
    let steps = Steps::default();
    let lab = lab::open(&arguments.setup, &steps)?;
    let counts = run_each(&lab, &samples)?;
    Ok(ExitCode::from(if counts.failed > 0 { FAILED } else { 0 }))
}

/// Runs every sample, each on its machine.
pub fn run_all(lab: &Lab) -> Result<Counts> {
    run_each(lab, &Sample::all()?)
}

fn run_each(lab: &Lab, samples: &[Sample]) -> Result<Counts> {
    fs::create_dir_all(FOLDER).with_context(|| format!("making the folder {FOLDER}"))?;
    let mut counts = Counts::default();
    for sample in samples {
        match sample.run(lab) {
            Ok(()) => counts.passed += 1,
            Err(error) => {
                peervram_programs::say!("FAILED: {}: {error:#}", sample.name);
                counts.failed += 1;
            }
        }
    }
    Ok(counts)
}

/// A program of the package of samples.
#[derive(Debug)]
struct Sample {
    name: String,
    machine: &'static Machine,
    /// Whether it is linked against libgbm.
    gbm: bool,
    /// What it wants to be told of the machine; nothing for the usual.
    arguments: Option<Vec<Argument>>,
}

/// What a sample can be told of its machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Argument {
    /// The address of a device that lends.
    Lender,
    /// The DRM node of a GPU that imports.
    Screen,
    /// The address of a model GPU.
    Model,
}

/// What samples/Cargo.toml says of a sample.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Wanted {
    machine: Option<String>,
    arguments: Option<Vec<Argument>>,
}

impl Sample {
    /// All of them, in the order of their names.
    fn all() -> Result<Vec<Sample>> {
        let output = cargo()
            .args(["metadata", "--no-deps", "--format-version", "1"])
            .output()
            .context("starting cargo")?;
        ensure!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
        Sample::all_in(&serde_json::from_slice(&output.stdout).context("reading cargo's metadata")?)
    }

    fn all_in(metadata: &Value) -> Result<Vec<Sample>> {
        let packages = metadata["packages"].as_array().context("cargo lists no packages")?;
        let package = packages.iter().find(|package| package["name"] == SAMPLES);
        let package = package.with_context(|| format!("this workspace has no package {SAMPLES}"))?;
        let targets = package["targets"].as_array().context("cargo lists no targets")?;
        let is_program = |target: &&Value| target["kind"][0] == "bin";
        let mut samples = Vec::new();
        for target in targets.iter().filter(is_program) {
            let name = target["name"].as_str().context("cargo lists a program without a name")?;
            let wanted = Option::<Wanted>::deserialize(&package["metadata"]["lab"][name])
                .with_context(|| format!("reading what the package's metadata says of {name}"))?
                .unwrap_or_default();
            let machine = lab::named(wanted.machine.as_deref().unwrap_or(MACHINES[0].name))?;
            let features = target["required-features"].as_array().map_or(&[][..], Vec::as_slice);
            let gbm = features.iter().any(|feature| feature == "gbm");
            samples.push(Sample { name: name.to_owned(), machine, gbm, arguments: wanted.arguments });
        }
        samples.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(samples)
    }

    /// Builds it and runs it; an error if it ends with another code than 0.
    fn run(&self, lab: &Lab) -> Result<()> {
        let program = if self.gbm {
            build::with_gbm(lab.root(), SAMPLES, &self.name)?
        } else {
            build::sample(&self.name)?
        };
        let peervram = build::command_line()?;
        lab.prepare(self.machine)?;
        let booting = format!("sample {}: booting {}", self.name, self.machine.name);
        let mut vm = step(&Steps::default(), &booting, || lab.boot(self.machine))?;
        let devices = Devices::find(&mut vm, &peervram)?;
        let arguments = self.arguments(&devices)?;
        peervram_programs::say!("{} {} on {}", self.name, arguments.join(" "), self.machine.name);
        let exit =
            vm.run_watched(&program, &arguments, &BTreeMap::new(), SILENCE_LIMIT, |vm, stream, line| {
                match (stream, line.strip_prefix(SCREENDUMP)) {
                    (Stream::Stdout, Some(name)) => {
                        let file = self.picture(name)?;
                        vm.screendump()?.save(Path::new(&file)).with_context(|| format!("writing {file}"))?;
                        peervram_programs::say!("  picture: {file}");
                        return vm.input("");
                    }
                    (Stream::Stdout, None) => peervram_programs::say!("  {line}"),
                    (Stream::Stderr, _) => peervram_programs::note!("  {line}"),
                }
                Ok(())
            })?;
        ensure!(exit.code == 0, "it ended with code {} on {}", exit.code, self.machine.name);
        Ok(())
    }

    /// What it is told of `devices`.
    fn arguments<'a>(&self, devices: &'a Devices) -> Result<Vec<&'a str>> {
        let (lender, node, model) =
            (Some(devices.lender.as_str()), devices.node.as_deref(), devices.model.as_deref());
        let Some(arguments) = &self.arguments else { return Ok(lender.into_iter().chain(node).collect()) };
        let find = |argument: &Argument| {
            let found = match argument {
                Argument::Lender => lender,
                Argument::Screen => node,
                Argument::Model => model,
            };
            found.with_context(|| format!("{} has no {argument:?} for {}", self.machine.name, self.name))
        };
        arguments.iter().map(find).collect()
    }

    /// Where a picture goes. Its name is the sample's word, and no way out of the folder.
    fn picture(&self, name: &str) -> Result<String> {
        let is_plain = |letter: char| letter.is_ascii_alphanumeric() || "-_".contains(letter);
        ensure!(!name.is_empty() && name.chars().all(is_plain), "{name:?} is no name for a picture");
        Ok(format!("{FOLDER}/{}-{name}.png", self.name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn samples_are_programs_and_may_name_their_machine() {
        let program = |name: &str| json!({ "name": name, "kind": ["bin"] });
        let library = json!({ "name": "peervram_samples", "kind": ["lib"] });
        let package = |metadata: Value| {
            let mut first = program("first");
            first["required-features"] = json!(["gbm"]);
            let targets = json!([library.clone(), program("second"), first]);
            json!({ "packages": [{ "name": SAMPLES, "targets": targets, "metadata": metadata }] })
        };
        let samples =
            Sample::all_in(&package(json!({ "lab": { "second": { "machine": "small-revoke" } } }))).unwrap();
        let seen: Vec<_> = samples.iter().map(|sample| (sample.name.as_str(), sample.machine.name)).collect();
        assert_eq!(seen, [("first", MACHINES[0].name), ("second", "small-revoke")]);
        assert!(samples[0].gbm && !samples[1].gbm);
        assert!(Sample::all_in(&package(json!({ "lab": { "second": { "machine": "pdp-11" } } }))).is_err());
        assert_eq!(Sample::all_in(&package(Value::Null)).unwrap().len(), 2);
    }

    #[test]
    fn a_sample_is_told_what_it_asks_for() {
        let devices = Devices { lender: "a".into(), node: Some("b".into()), model: None };
        let sample = |arguments| Sample { name: "s".into(), machine: &MACHINES[0], gbm: false, arguments };
        assert_eq!(sample(None).arguments(&devices).unwrap(), ["a", "b"]);
        let wanted = Some(vec![Argument::Screen, Argument::Lender]);
        assert_eq!(sample(wanted).arguments(&devices).unwrap(), ["b", "a"]);
        assert!(sample(Some(vec![Argument::Model])).arguments(&devices).is_err());
    }

    #[test]
    fn pictures_stay_in_their_folder() {
        let sample = Sample { name: "a".into(), machine: &MACHINES[0], gbm: false, arguments: None };
        assert_eq!(sample.picture("card-1").unwrap(), "target/sample/a-card-1.png");
        for name in ["", "../b", "a b", "a/b"] {
            assert!(sample.picture(name).is_err(), "{name:?}");
        }
    }
}
