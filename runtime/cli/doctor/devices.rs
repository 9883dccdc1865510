//! GPUs and VFIO devices: which driver each has, and who shares its IOMMU group.

use peervram::backends::pci::Function;
use peervram::backends::{ScanOutSupport, import_support_of};

use peervram_programs::bytes;

use super::candidate::Candidate;
use super::facts::Facts;
use super::finding::{Finding, Section, Severity, Step, StepOrder};
use super::pair::{Pair, PairPath, PairState, importers};
use crate::in_use::words;

/// More of a name would take more than a line.
const NAME_LENGTH: usize = 44;

pub fn examine(facts: &Facts, candidates: &[Candidate], pairs: &[Pair]) -> Vec<Finding> {
    if let Some(finding) = nothing(facts, candidates) {
        return vec![finding];
    }
    let mut findings: Vec<Finding> = facts.functions().map(|function| device(facts, function)).collect();
    findings.extend(facts.functions().filter_map(|function| silent(facts, function)));
    findings.extend(candidates.iter().filter_map(|candidate| group(facts, candidate)));
    findings.extend(unbound(facts, candidates, pairs));
    findings.extend(wrong_driver(facts));
    findings
}

/// Where there is no device to look at.
fn nothing(facts: &Facts, candidates: &[Candidate]) -> Option<Finding> {
    let finding = |code, seen: &str| Finding::new(code, Section::Devices, Severity::InTheWay, seen);
    if facts.topology.known().is_none() {
        let (place, what) = if facts.is_container {
            ("this is a container without /sys/bus/pci", "Run the doctor on the host of this container")
        } else {
            (
                "no PCI bus is to be seen (/sys/bus/pci): a container, or a machine without one",
                "Run the doctor where the GPUs are: on the host of this container",
            )
        };
        let step = Step::new(
            StepOrder::LookAtTheHost,
            format!(
                "{what}, then give the container /sys, and /dev/dri and /dev/vfio (--device in docker and podman)."
            ),
        );
        return Some(finding("no-pci", place).why("No GPU can lend or import here.").step(step));
    }
    if candidates.is_empty() && importers(facts).next().is_none() {
        let step = Step::new(
            StepOrder::LookAtTheHost,
            "Run the doctor where the GPUs are: this machine has none with memory to lend.",
        );
        return Some(
            finding("no-device", "no GPU with memory to lend, and no device bound to VFIO").step(step),
        );
    }
    None
}

fn device(facts: &Facts, function: &Function) -> Finding {
    let name = name(facts, function);
    let group = function.iommu_group.map(|group| format!(", group {group}")).unwrap_or_default();
    let driver = function.driver.as_deref();
    let (weight, role) = match driver {
        _ if facts.is_silent(function.address) => (Severity::InTheWay, "does not answer".to_owned()),
        _ if function.is_bound_to_vfio() && function.largest_memory().is_none() => {
            (Severity::Hint, "has no memory to lend".to_owned())
        }
        _ if function.is_bound_to_vfio() => (Severity::Fine, "lends".to_owned()),
        None => (Severity::Hint, "neither lends nor imports".to_owned()),
        Some(_) => match import_support_of(function) {
            Some(row)
                if row.can_import
                    && row.scan_out == ScanOutSupport::Shows
                    && !function.drm_nodes.is_empty() =>
            {
                (Severity::Fine, "imports for scan-out".to_owned())
            }
            Some(row) if row.can_import && function.drm_nodes.is_empty() => {
                (Severity::Hint, "has no DRM node to import by".to_owned())
            }
            Some(row) if row.can_import => (Severity::Fine, "imports".to_owned()),
            Some(row) => (Severity::Hint, format!("cannot import: {}", row.because)),
            None => (Severity::Hint, "is not known to import".to_owned()),
        },
    };
    let driver = driver.unwrap_or("no driver");
    let memory = match function.largest_memory() {
        Some(bar) if function.is_bound_to_vfio() || function.is_gpu() => {
            format!(", BAR {} of {}", bar.index, bytes::in_words(bar.size_bytes))
        }
        _ => String::new(),
    };
    let seen = format!("{} {name}: {driver}{group}{memory}; {role}", function.address);
    Finding::new("device", Section::Devices, weight, seen)
}

fn name(facts: &Facts, function: &Function) -> String {
    let id = || format!("{:04x}:{:04x}", function.vendor_id, function.device_id);
    let name = facts.names.get(&function.address).cloned().unwrap_or_else(id);
    if name.chars().count() <= NAME_LENGTH {
        return name;
    }
    name.chars().take(NAME_LENGTH - 2).chain("..".chars()).collect()
}

/// A device that fell off the bus. Its driver, and what sysfs says of its BARs, stay as they were.
fn silent(facts: &Facts, function: &Function) -> Option<Finding> {
    let address = function.address;
    if !facts.is_silent(address) {
        return None;
    }
    let seen = format!("{address} does not answer: its configuration space is all ones");
    let why = "It fell off the bus, or a reset has left it dead. Nothing can be lent by it or to it.";
    let uses = facts.uses(address);
    let finding = Finding::new("does-not-answer", Section::Devices, Severity::InTheWay, seen).why(why);
    let cold = "where that brings nothing, switch the machine off and on";
    Some(finding.step(if uses.is_empty() {
        Step::new(
            StepOrder::Revive,
            format!("Take {address} out of the tree and look again, as root; {cold}:"),
        )
        .command(format!("echo 1 > /sys/bus/pci/devices/{address}/remove"))
        .command("echo 1 > /sys/bus/pci/rescan")
    } else {
        let words = words(uses);
        Step::new(
            StepOrder::Revive,
            format!(
                "Take {address} out of the tree and look again, once nothing hangs on it ({words}); {cold}."
            ),
        )
    }))
}

/// A device that is bound, and that nobody may open because of another one.
fn group(facts: &Facts, candidate: &Candidate) -> Option<Finding> {
    if !candidate.is_bound || candidate.blockers.is_empty() {
        return None;
    }
    let address = candidate.address();
    let group = candidate.function.iommu_group.unwrap_or_default();
    let others = neighbours(candidate);
    let seen = format!("{address} cannot be opened: its group {group} has {others}");
    let step = match needed(facts, candidate) {
        Some(needed) => Step::new(
            StepOrder::Neighbours,
            format!("Put {address} into another slot: the machine needs what shares its group {group}. {needed}."),
        ),
        None => Step::new(
            StepOrder::Neighbours,
            format!("Have {others} leave the kernel's drivers, if you do not need them, or put {address} into another slot:"),
        )
        .command(candidate.bind_command()),
    };
    let why = "A group has one owner: user space, or the drivers of the kernel.";
    Some(Finding::new("group-not-viable", Section::Devices, Severity::InTheWay, seen).why(why).step(step))
}

/// "0000:01:00.1 (snd_hda_intel)", of all that share the group.
fn neighbours(candidate: &Candidate) -> String {
    let names = candidate.blockers.iter().map(|(other, driver)| format!("{other} ({driver})"));
    names.collect::<Vec<_>>().join(", ")
}

/// What of the machine hangs on what would lose its driver, in words.
fn needed(facts: &Facts, candidate: &Candidate) -> Option<String> {
    let needed = candidate.needed(facts);
    let lines = needed.iter().map(|(function, uses)| format!("Of {function}: {}", words(uses)));
    (!needed.is_empty()).then(|| lines.collect::<Vec<_>>().join(". "))
}

/// Where nothing is bound to VFIO: the device that is best given away.
fn unbound(facts: &Facts, candidates: &[Candidate], pairs: &[Pair]) -> Option<Finding> {
    if candidates.is_empty() || candidates[0].is_bound {
        return None;
    }
    let seen = if facts.has_vfio_pci {
        "no device is bound to vfio-pci"
    } else {
        "no device is bound to vfio-pci, which is not loaded"
    };
    let finding = Finding::new("nothing-bound", Section::Devices, Severity::InTheWay, seen);
    let imports = |candidate: &&Candidate| importers(facts).any(|other| other.address == candidate.address());
    let has_peer = |candidate: &&Candidate| {
        let is_peer = |pair: &&Pair| pair.path == PairPath::Peer && pair.state != PairState::Never;
        pairs.iter().filter(is_peer).any(|pair| pair.lender == candidate.address())
    };
    let has_pair = |candidate: &&Candidate| {
        pairs.iter().any(|pair| pair.lender == candidate.address() && pair.state != PairState::Never)
    };
    let is_needed = |candidate: &&Candidate| !candidate.needed(facts).is_empty();
    // What the machine needs is named where it could lend to a GPU, and is not asked for otherwise.
    let mut fit: Vec<&Candidate> = candidates
        .iter()
        .filter(|candidate| !candidate.is_silent)
        .filter(|candidate| has_peer(candidate) || has_pair(candidate) && !is_needed(candidate))
        .collect();
    fit.sort_by_key(|candidate| {
        let size = std::cmp::Reverse(candidate.memory.size_bytes);
        (is_needed(candidate), !has_peer(candidate), imports(candidate), size)
    });
    let Some(best) = fit.first() else {
        return Some(finding.why(
            "One lends, another one imports: with what there is, no pair would be left if one were bound.",
        ));
    };
    Some(finding.step(bind(facts, best)))
}

/// How to bind a device, with the other functions of its group that have drivers.
fn bind(facts: &Facts, candidate: &Candidate) -> Step {
    let address = candidate.address();
    if let Some(needed) = needed(facts, candidate) {
        let what = format!(
            "{address} could lend once nothing of the machine hangs on it or on its group. {needed}. Free that, or \
             use another GPU; what stands in the way of binding it:"
        );
        return Step::new(StepOrder::Bind, what).command(format!("peervram bind {address} --dry-run"));
    }
    let driver = candidate.function.driver.as_deref();
    let from = driver.map(|driver| format!(", instead of {driver}")).unwrap_or_default();
    let along = match neighbours(candidate) {
        others if others.is_empty() => String::new(),
        others => format!(", and with it {others}"),
    };
    let what = format!("Bind {address} to VFIO{from}{along}; peervram unbind undoes it:");
    Step::new(StepOrder::Bind, what).command(candidate.bind_command())
}

/// An Intel GPU that could import with another driver, where nothing else can.
fn wrong_driver(facts: &Facts) -> Option<Finding> {
    if importers(facts).next().is_some() {
        return None;
    }
    let gpu = facts.functions().find(|function| function.driver.as_deref() == Some("i915"))?;
    let id = format!("{:04x}", gpu.device_id);
    let seen = format!("nothing can import; {} could with the xe driver", gpu.address);
    let step = Step::new(
        StepOrder::ImportingDriver,
        format!(
            "Give {} the driver xe, which serves Xe GPUs and later; on the kernel's command line:",
            gpu.address
        ),
    )
    .command(format!("i915.force_probe=!{id} xe.force_probe={id}"));
    Some(Finding::new("importer-has-other-driver", Section::Devices, Severity::Hint, seen).step(step))
}
