//! `peervram route`: which way bytes go from one device to another, why not, and what would change it.
//!
//! Reads sysfs, procfs and the kernel's log; opens no device and changes nothing.

mod matrix;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;

use clap::Args;
use peervram::backends::topology::{Reading, Topology, Verdict};
use peervram::backends::{Governor, PciAddress};
use peervram::route::{End, Fix, Hop, KernelMessages, Route};
use peervram::{Error, Kind, Result};
use peervram_programs::labelled;
use serde::Serialize;

use super::ending::print_json;
use super::tree;

/// As wide as the drawing.
const WIDTH: usize = 80;

/// Explain the way from the memory of one device to another: the kernel's verdict, the ports on the way,
/// the one change that would mend it.
///
/// Two predictions. Will the importer take memory of a VFIO device at all? That is known by its driver.
/// Which way do the bytes go? That is the kernel's own decision, recomputed from the PCI tree: by bus
/// addresses below a bridge, through the host bridge, or not at all. Neither proves that bytes arrive.
///
/// Run it as root: others may not read what ports do with peer-to-peer requests (ACS), and the verdict is
/// "unknown, because".
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    sudo peervram route 01:00.0 02:00.0               from VRAM of 01:00.0 to the device at 02:00.0\n  \
    sudo peervram route 01:00.0 /dev/dri/card0        to that DRM node's device\n  \
    sudo peervram route --all                         every pair of devices that matter\n  \
    peervram route --tree machine.json 01:00.0 02:00.0\n\n\
    Exit codes: 0 the question was answered, whatever the answer; 1 a device is not there; 2 wrong usage;\n\
    4 this machine has no PCI bus. With --json, `answer` is works, refused (by the kernel), importer-cannot,\n    unknown, or unasked (a CPU reads the BAR).")]
pub struct Arguments {
    /// Whose memory: a PCI address.
    #[arg(required_unless_present = "all")]
    lender: Option<PciAddress>,

    /// Who is to reach it: a PCI address, a DRM node like /dev/dri/card0, or `cpu`.
    #[arg(required_unless_present = "all")]
    importer: Option<ImporterArgument>,

    /// Draw the matrix of all devices that matter: GPUs, devices bound to VFIO, devices with a DRM node.
    #[arg(long, conflicts_with_all = ["lender", "importer"])]
    all: bool,

    /// Look at the machine that `peervram capture` wrote to this file.
    #[arg(long, value_name = "FILE")]
    tree: Option<PathBuf>,
}

/// A PCI address, a DRM node, `cpu`.
#[derive(Debug, Clone)]
enum ImporterArgument {
    Function(PciAddress),
    DrmNode(PathBuf),
    Cpu,
}

impl FromStr for ImporterArgument {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "cpu" => Ok(Self::Cpu),
            path if path.starts_with('/') => Ok(Self::DrmNode(path.into())),
            address => address.parse().map(Self::Function).map_err(|_| {
                format!(
                    "{text:?} is neither a PCI address like 0000:01:00.0, a path like /dev/dri/card0, nor cpu"
                )
            }),
        }
    }
}

impl ImporterArgument {
    fn end(&self, topology: &Topology, is_captured: bool) -> Result<End> {
        let path = match self {
            Self::Function(address) => return Ok(End::Function(*address)),
            Self::Cpu => return Ok(End::Cpu),
            Self::DrmNode(path) => path,
        };
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let has_node =
            topology.places().iter().find(|place| place.function.drm_nodes.iter().any(|node| node == name));
        if let Some(place) = has_node {
            return Ok(End::Function(place.address()));
        }
        if is_captured || !path.exists() {
            return Err(Error::new(Kind::NotFound, "find a DRM node", "no PCI function has it")
                .on(path.display())
                .next("ls /dev/dri lists the nodes of this machine"));
        }
        // vgem, or a GPU that is part of the chip.
        let driver = fs::read_link(Path::new("/sys/class/drm").join(name).join("device/driver"));
        let driver = driver.ok().and_then(|path| Some(path.file_name()?.to_str()?.to_owned()));
        Ok(End::NotPci(driver.unwrap_or_else(|| name.to_owned())))
    }
}

#[derive(Serialize)]
struct Report<'a> {
    kernel_release: Option<&'a str>,
    lender: PciAddress,
    importer: String,
    answer: &'static str,
    /// Whether the importer takes the memory; none where that is not known.
    importer_can: Option<bool>,
    importer_words: &'a str,
    importer_modes: Vec<ModeReport>,
    verdict_words: &'a str,
    verdict: Option<&'a Verdict>,
    way: Vec<HopReport<'a>>,
    recommended: Option<&'a Fix>,
    fixes: &'a [Fix],
    notes: &'a [String],
    kernel_messages: &'a [String],
    unread: Vec<String>,
}

#[derive(Serialize)]
struct ModeReport {
    driver: &'static str,
    mode: Option<&'static str>,
    can_import: bool,
    because: &'static str,
    source: &'static str,
    asks_for_a_verdict: bool,
}

#[derive(Serialize)]
struct HopReport<'a> {
    address: PciAddress,
    role: &'static str,
    acs: Option<Vec<&'static str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    acs_unread: Option<&'a str>,
    redirects: bool,
    passed: bool,
    uses_link: bool,
    link: Option<String>,
    link_at_most: Option<String>,
    max_payload_bytes: Option<u32>,
    max_payload_supported_bytes: Option<u32>,
}

pub fn run(arguments: &Arguments, json: bool) -> anyhow::Result<ExitCode> {
    let topology = tree::read(arguments.tree.as_deref())?;
    let (Some(lender), Some(importer)) = (arguments.lender, &arguments.importer) else {
        matrix::print(&topology, json)?;
        return Ok(ExitCode::SUCCESS);
    };
    let is_captured = arguments.tree.is_some();
    let messages = if is_captured {
        KernelMessages::not_read("it is not in a captured tree")
    } else {
        KernelMessages::read()
    };
    let client = importer.end(&topology, is_captured)?;
    let route = Route::explain(&topology, lender, &client, &messages)?;
    if json {
        print_json(&report(&topology, &route))?;
    } else {
        print(&topology, &route)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn report<'a>(topology: &'a Topology, route: &'a Route) -> Report<'a> {
    let mode = |row: &&'static peervram::backends::ImportSupport| ModeReport {
        driver: row.driver,
        mode: row.mode,
        can_import: row.can_import,
        because: row.because,
        source: row.source,
        asks_for_a_verdict: row.governed_by == Governor::MapType,
    };
    Report {
        kernel_release: topology.kernel_release.known().map(String::as_str),
        lender: route.provider,
        importer: route.client.to_string(),
        answer: route.answer().code(),
        importer_can: route.importer_can,
        importer_words: &route.import_words,
        importer_modes: route.imports.iter().map(mode).collect(),
        verdict_words: &route.verdict_words,
        verdict: route.verdict.as_ref(),
        way: route.way.iter().map(hop).collect(),
        recommended: route.recommended(),
        fixes: &route.fixes,
        notes: &route.notes,
        kernel_messages: &route.messages,
        unread: topology.unread(),
    }
}

fn hop(hop: &Hop) -> HopReport<'_> {
    HopReport {
        address: hop.address,
        role: hop.role,
        acs: hop.acs.as_ref().ok().copied().flatten().map(|acs| acs.control_names()),
        acs_unread: hop.acs.as_ref().err().map(String::as_str),
        redirects: hop.redirects,
        passed: hop.is_passed,
        uses_link: hop.uses_link,
        link: hop.link.map(|link| link.now.to_string()),
        link_at_most: hop.link.map(|link| link.at_most.to_string()),
        max_payload_bytes: hop.max_payload.map(|payload| payload.now_bytes),
        max_payload_supported_bytes: hop.max_payload.map(|payload| payload.supported_bytes),
    }
}

fn print(topology: &Topology, route: &Route) -> anyhow::Result<()> {
    let mut output = peervram_programs::output();
    let release = match &topology.kernel_release {
        Reading::Known(release) => format!("Linux {release}"),
        Reading::Unread(_) => "an unknown kernel".into(),
    };
    writeln!(output, "{} -> {}, {release}\n", route.provider, route.client)?;
    writeln!(output, "{}", route.draw(topology))?;
    labelled(&mut output, WIDTH, "importer", &route.import_words)?;
    labelled(&mut output, WIDTH, "verdict", &route.verdict_words)?;
    let recommended = route.recommended().is_some();
    for (number, fix) in route.fixes.iter().enumerate() {
        writeln!(output)?;
        let label = match (number, recommended) {
            (0, true) => "fix",
            (_, _) if fix.kind.mends_a_verdict() => "or",
            _ => "also",
        };
        print_fix(&mut output, label, fix)?;
    }
    if !route.notes.is_empty() || !route.messages.is_empty() {
        writeln!(output)?;
    }
    for note in &route.notes {
        labelled(&mut output, WIDTH, "note", note)?;
    }
    for message in &route.messages {
        labelled(&mut output, WIDTH, "kernel", message)?;
    }
    Ok(())
}

fn print_fix(output: &mut impl Write, label: &str, fix: &Fix) -> std::io::Result<()> {
    let colon = if fix.commands.is_empty() { "." } else { ":" };
    labelled(output, WIDTH, label, &format!("{}{colon}", fix.what.trim_end_matches('.')))?;
    for command in &fix.commands {
        // To be pasted: in one line, however long.
        writeln!(output, "{:13}{command}", "")?;
    }
    let then = fix.then.map(|then| format!("; then {then}")).unwrap_or_default();
    labelled(output, WIDTH, "  price", &fix.price)?;
    labelled(output, WIDTH, "  needs", &format!("{}{then}", fix.needs.words()))?;
    if let Some(groups) = &fix.groups {
        let show = |groups: &[Vec<PciAddress>]| {
            let group = |group: &Vec<PciAddress>| {
                let members: Vec<String> = group.iter().map(ToString::to_string).collect();
                format!("{{{}}}", members.join(" "))
            };
            groups.iter().map(group).collect::<Vec<_>>().join(" ")
        };
        let words = if groups.now.is_empty() && groups.then.is_empty() {
            "predicted to stay as they are".to_owned()
        } else {
            format!("predicted, now {} then {}", show(&groups.now), show(&groups.then))
        };
        labelled(output, WIDTH, "  groups", &words)?;
    }
    Ok(())
}
