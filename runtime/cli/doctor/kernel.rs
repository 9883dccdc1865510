//! What the kernel is, and whether it can make dma-bufs of VFIO memory.

use peervram::backends::topology::{Reading, parse_release};

use super::candidate::Candidate;
use super::facts::{Distribution, Facts};
use super::finding::{Finding, Section, Severity, Step, StepOrder};

pub fn examine(facts: &Facts, candidates: &[Candidate]) -> Vec<Finding> {
    // Whoever has nothing to lend needs no other kernel.
    let is_of_use = !candidates.is_empty();
    let findings = [release(facts, is_of_use), options(facts, is_of_use)];
    findings.into_iter().flatten().collect()
}

fn release(facts: &Facts, is_of_use: bool) -> Option<Finding> {
    let text = &facts.kernel_release;
    let finding = |code, weight, seen: String| Finding::new(code, Section::Kernel, weight, seen);
    let newer = |finding: Finding, turn, what: &str| {
        if !is_of_use {
            return finding;
        }
        let mut step = Step::new(turn, what);
        step.commands.extend(newer_kernel(&facts.distribution));
        finding.step(step)
    };
    let Some(number) = parse_release(text) else {
        return Some(finding("kernel-unknown", Severity::Unknown, format!("Linux {text} is no release")));
    };
    Some(if number < (6, 19, 0) {
        let seen = format!("Linux {text} makes no dma-bufs of VFIO memory: 6.19 and later do");
        let why = "GPUs import dma-bufs. Without, a mapped BAR goes to CPUs by host pointer, and to engines of \
                   other VFIO devices.";
        let found = finding("kernel-too-old", Severity::InTheWay, seen).why(why);
        newer(found, StepOrder::Kernel, "Boot Linux 7.1 or later; 6.19 is the least.")
    } else if number < (7, 1, 0) {
        let seen = format!("Linux {text} does not wait for importers when it takes memory back: 7.1 does");
        let why = "A reset may return while another GPU still reads or writes the memory.";
        let found = finding("kernel-revoke-does-not-wait", Severity::Hint, seen).why(why);
        newer(
            found,
            StepOrder::NewerKernel,
            "Boot Linux 7.1 or later before memory is taken back under work.",
        )
    } else if (number.0, number.1) == (7, 1) && text.contains("-rc") {
        let seen = format!("Linux {text} may hang when a device is closed whose memory is off");
        let why =
            "Early 7.1 release candidates count a reference twice there and wait for ever; 7.1 is right.";
        let found = finding("kernel-close-hangs", Severity::Hint, seen).why(why);
        newer(found, StepOrder::NewerKernel, "Boot a released Linux 7.1 or later.")
    } else {
        finding("kernel", Severity::Fine, format!("Linux {text} makes dma-bufs of VFIO memory"))
    })
}

/// Where the distribution has a newer one.
fn newer_kernel(distribution: &Distribution) -> Option<String> {
    let architecture = if cfg!(target_arch = "x86_64") { "amd64" } else { "arm64" };
    let codename = distribution.codename.as_deref()?;
    (distribution.ids.first()? == "debian")
        .then(|| format!("apt install -t {codename}-backports linux-image-{architecture}"))
}

fn options(facts: &Facts, is_of_use: bool) -> Option<Finding> {
    let finding = |code, weight, seen: String| Finding::new(code, Section::Kernel, weight, seen);
    let options = match &facts.kernel_options {
        Reading::Known(options) => options,
        Reading::Unread(why) => {
            return Some(finding("kernel-options-unread", Severity::Unknown, format!("its options: {why}")));
        }
    };
    let has = |name: &str| options.contains_key(name);
    let is_old = parse_release(&facts.kernel_release).is_some_and(|release| release < (6, 19, 0));
    let mut lacks: Vec<&str> = ["VFIO_PCI", "PCI_P2PDMA"].into_iter().filter(|name| !has(name)).collect();
    // It follows from the others (drivers/vfio/pci/Kconfig), and older kernels do not know it.
    if lacks.is_empty() && !is_old && !has("VFIO_PCI_DMABUF") {
        lacks.push("VFIO_PCI_DMABUF");
    }
    let by_cdev = has("VFIO_DEVICE_CDEV") && has("IOMMUFD");
    let by_group = has("VFIO_GROUP") && (has("VFIO_CONTAINER") || has("IOMMUFD_VFIO_CONTAINER"));
    if !by_cdev && !by_group {
        lacks.push("VFIO_GROUP or VFIO_DEVICE_CDEV");
    }
    if !lacks.is_empty() {
        let found = finding(
            "kernel-options-missing",
            Severity::InTheWay,
            format!("it was built without {}", lacks.join(", ")),
        )
        .why("VFIO gives a device to user space; P2PDMA lets others reach its memory.");
        let step = Step::new(
            StepOrder::KernelOptions,
            format!("Boot a kernel with {}; Debian's 7.3 has all that is needed.", lacks.join(", ")),
        );
        return Some(if is_of_use { found.step(step) } else { found });
    }
    let (present, absent): (Vec<&str>, Vec<&str>) =
        ["VFIO_PCI_DMABUF", "PCI_P2PDMA", "VFIO_GROUP", "VFIO_DEVICE_CDEV", "IOMMUFD", "UDMABUF"]
            .into_iter()
            .filter(|name| !is_old || *name != "VFIO_PCI_DMABUF")
            .partition(|name| has(name));
    let mut seen = format!("with {}", present.join(", "));
    if !absent.is_empty() {
        seen.push_str(&format!("; without {}, which nothing here hangs on", absent.join(", ")));
    }
    Some(finding("kernel-options", Severity::Fine, seen))
}
