//! What this user may open, read and lock.

use peervram::backends::topology::Place;

use peervram_programs::bytes;

use super::candidate::Candidate;
use super::facts::{DeviceFile, Facts};
use super::finding::{Finding, Section, Severity, Step, StepOrder};
use super::pair::{importers, is_node_usable};

/// Below this not even a driver's queues fit. The kernel's default is 8 MiB; it was 64 KiB.
const LITTLE_BYTES: u64 = 1 << 20;

pub fn examine(facts: &Facts, candidates: &[Candidate]) -> Vec<Finding> {
    let mut findings = Vec::new();
    let bound = candidates.iter().filter(|candidate| candidate.is_bound);
    findings.extend(bound.filter_map(lender));
    findings.extend(nodes(facts));
    findings.extend(usable(facts));
    findings.extend(host_memory(facts));
    findings.extend(memlock(facts, candidates));
    findings.extend(unread(facts, candidates));
    findings
}

fn finding(code: &'static str, weight: Severity, seen: impl Into<String>) -> Finding {
    Finding::new(code, Section::Permissions, weight, seen)
}

/// A VFIO device that this user cannot open.
fn lender(candidate: &Candidate) -> Option<Finding> {
    if candidate.is_openable() {
        return None;
    }
    let files: Vec<&DeviceFile> =
        [candidate.by_cdev, candidate.by_group].into_iter().flatten().flatten().flatten().collect();
    let address = candidate.address();
    if !files.iter().any(|file| file.path.ends_with("vfio/vfio") || file.path.ends_with("iommu"))
        || files.iter().all(|file| file.is_usable)
    {
        let seen = format!("{address}: its files below /dev/vfio are not here");
        let group = candidate.function.iommu_group.unwrap_or_default();
        let step = Step::new(
            StepOrder::Permissions,
            "Load vfio-pci and vfio_iommu_type1; a container is given the files when it is started:",
        )
        .command(format!("docker run --device /dev/vfio/vfio --device /dev/vfio/{group} ..."));
        return Some(finding("vfio-files-missing", Severity::InTheWay, seen).step(step));
    }
    let closed: Vec<String> = (files.iter().filter(|file| !file.is_usable))
        .map(|file| {
            let mode = file.mode & 0o777;
            format!("{} (uid {}, gid {}, {mode:o})", file.path.display(), file.owner_uid, file.owner_gid)
        })
        .collect();
    let seen = format!("{address}: you may not open {}", closed.join(", "));
    let why = "Whoever opens it has all of the device: its DMA, its reset, its memory.";
    let step = Step::new(
        StepOrder::Permissions,
        "Run as root, or let the group render own VFIO devices, and join it (log in again):",
    )
    .command(r#"printf '%s\n' 'SUBSYSTEM=="vfio|vfio-dev", GROUP="render", MODE="0660"' \"#)
    .command(r#"  'KERNEL=="iommu", GROUP="render", MODE="0660"' \"#)
    .command("  > /etc/udev/rules.d/70-peervram.rules")
    .command("udevadm control --reload && udevadm trigger && usermod -aG render USER");
    Some(finding("vfio-files-closed", Severity::InTheWay, seen).why(why).step(step))
}

/// GPUs that could import, but not for this user.
fn nodes(facts: &Facts) -> Option<Finding> {
    let closed: Vec<_> = importers(facts).filter(|importer| !is_node_usable(facts, importer)).collect();
    let first = closed.first()?;
    let addresses: Vec<String> = closed.iter().map(|importer| importer.address.to_string()).collect();
    let node = first.drm_nodes.iter().find_map(|name| facts.file(&format!("/dev/dri/{name}")));
    let seen = match node {
        Some(node) => format!("{}: you may not open {}", addresses.join(", "), node.path.display()),
        None => format!("{}: no node of it is in /dev/dri", addresses.join(", ")),
    };
    let step = match node {
        Some(_) => Step::new(StepOrder::Permissions, "Join the groups video and render (log in again):")
            .command("usermod -aG video,render USER"),
        None => Step::new(StepOrder::Permissions, "Give the container /dev/dri when it is started:")
            .command("docker run --device /dev/dri ..."),
    };
    Some(finding("drm-nodes-closed", Severity::InTheWay, seen).step(step))
}

fn usable(facts: &Facts) -> Option<Finding> {
    let paths: Vec<String> = (facts.files.iter().filter(|file| file.is_usable))
        .filter(|file| !file.path.ends_with("kmsg") && !file.path.ends_with("udmabuf"))
        .map(|file| file.path.display().to_string())
        .collect();
    (!paths.is_empty()).then(|| finding("files", Severity::Fine, format!("may open {}", paths.join(", "))))
}

fn host_memory(facts: &Facts) -> Option<Finding> {
    let importer = facts.vulkan_devices().iter().any(|device| device.imports_dma_bufs);
    if facts.file("/dev/udmabuf").is_some_and(|file| file.is_usable) {
        return Some(finding(
            "udmabuf",
            Severity::Fine,
            "may open /dev/udmabuf: host memory is lent as a dma-buf",
        ));
    }
    let seen = match facts.file("/dev/udmabuf") {
        Some(_) => "may not open /dev/udmabuf: host memory is lent as a memfd",
        None => "no /dev/udmabuf: host memory is lent as a memfd",
    };
    // Only lavapipe takes a memfd for a dma-buf. It matters to whoever imports into something else.
    importer.then(|| finding("udmabuf-absent", Severity::Hint, format!("{seen}, which lavapipe alone takes")))
}

/// What counts: pages that a device is given by type1, unless they are reserved ones, as BARs are
/// (`vfio_pin_pages_remote` in `drivers/vfio/vfio_iommu_type1.c`); by iommufd, unless they are a dma-buf's
/// (`iopt_alloc_dmabuf_pages` in `drivers/iommu/iommufd/pages.c`). An export counts nothing.
fn memlock(facts: &Facts, candidates: &[Candidate]) -> Option<Finding> {
    if candidates.is_empty() {
        return None;
    }
    let rule = "BARs and dma-bufs do not count, only host memory that VFIO devices reach";
    Some(match facts.memlock_bytes {
        Some(limit) if limit < LITTLE_BYTES && !facts.is_root() => {
            let step = Step::new(StepOrder::Memlock, "Raise the limit of locked memory (log in again):")
                .command("echo '* - memlock 1048576' > /etc/security/limits.d/70-peervram.conf");
            finding("memlock-low", Severity::Hint, format!("memlock {}: {rule}", bytes::in_words(limit)))
                .step(step)
        }
        Some(limit) => {
            finding("memlock", Severity::Fine, format!("memlock {}: {rule}", bytes::in_words(limit)))
        }
        None => finding("memlock", Severity::Fine, format!("memlock without a limit: {rule}")),
    })
}

/// What root would have read.
fn unread(facts: &Facts, candidates: &[Candidate]) -> Option<Finding> {
    let partly = (facts.topology.known())
        .is_some_and(|topology| topology.places().iter().any(Place::is_short_of_root));
    let no_log = facts.file("/dev/kmsg").is_some_and(|file| !file.is_usable);
    if facts.is_root() || candidates.is_empty() || !(partly || no_log) {
        return None;
    }
    let mut what = Vec::new();
    if partly {
        what.push("configuration space beyond its first 64 bytes (routes, BAR sizes)");
    }
    if no_log {
        what.push("the kernel's log (why it refused a route)");
    }
    let step = Step::new(StepOrder::LookAsRoot, "Run the doctor as root once, to see what was not read:")
        .command("sudo peervram doctor");
    Some(
        finding("unread", Severity::Unknown, format!("not read without root: {}", what.join("; ")))
            .step(step),
    )
}
