//! Whether an IOMMU is in use, and in which way.

use peervram::backends::topology::{Reading, Topology};

use super::candidate::Candidate;
use super::facts::Facts;
use super::finding::{Finding, Section, Severity, Step, StepOrder};

/// Words of the kernel's command line that decide about IOMMUs, routes and BARs.
const PARAMETERS: [&str; 9] = [
    "intel_iommu=",
    "amd_iommu=",
    "iommu=",
    "iommu.passthrough=",
    "intremap=",
    "pci=",
    "vfio",
    "pcie_acs_override=",
    "arm-smmu",
];

pub fn examine(facts: &Facts, candidates: &[Candidate]) -> Vec<Finding> {
    let Reading::Known(topology) = &facts.topology else { return Vec::new() };
    let mut findings = vec![presence(facts, topology, candidates)];
    findings.extend(parameters(facts));
    findings.extend(interrupts(facts, candidates));
    findings
}

fn presence(facts: &Facts, topology: &Topology, candidates: &[Candidate]) -> Finding {
    let mut groups: Vec<u32> = facts.all_functions().filter_map(|function| function.iommu_group).collect();
    groups.sort_unstable();
    groups.dedup();
    if groups.is_empty() {
        let found = Finding::new("iommu-absent", Section::Iommu, Severity::InTheWay, "no IOMMU is in use")
            .why("VFIO gives a device to user space only behind one.");
        return if candidates.is_empty() { found } else { found.step(enable(facts)) };
    }
    let is_translated = |address| {
        let domain = topology.place(address).and_then(|place| place.iommu_domain.as_deref());
        domain.map(|domain| domain.starts_with("DMA"))
    };
    let translated: Vec<bool> =
        facts.functions().filter_map(|function| is_translated(function.address)).collect();
    let kinds = match (translated.contains(&true), translated.contains(&false)) {
        (true, false) => "; it translates for kernel drivers",
        (false, true) => "; kernel drivers go past it (identity)",
        (true, true) => "; it translates for some kernel drivers",
        (false, false) => "",
    };
    let names = if facts.iommus.is_empty() { "an IOMMU".to_owned() } else { names(&facts.iommus) };
    let count = groups.len();
    let seen = format!("{names}, {count} group{}{kinds}", if count == 1 { "" } else { "s" });
    Finding::new("iommu", Section::Iommu, Severity::Fine, seen)
}

/// "dmar0" or "dmar0 to dmar7".
fn names(iommus: &[String]) -> String {
    match iommus {
        [only] => only.clone(),
        [first, .., last] => format!("{first} to {last}"),
        [] => String::new(),
    }
}

fn enable(facts: &Facts) -> Step {
    let line = facts.command_line.known().map(String::as_str).unwrap_or_default();
    let switched_off = line.split(' ').find(|word| {
        word.strip_suffix("=off").is_some_and(|name| matches!(name, "intel_iommu" | "amd_iommu" | "iommu"))
    });
    if let Some(word) = switched_off {
        let what = format!("Take {word} off the kernel's command line, and boot again.");
        return Step::new(StepOrder::Iommu, what);
    }
    if facts.is_cpu_of("AuthenticAMD") {
        return Step::new(
            StepOrder::Iommu,
            "Enable the IOMMU (AMD-Vi) in the firmware, and boot again; Linux then uses it by itself.",
        );
    }
    if !facts.is_cpu_of("GenuineIntel") {
        return Step::new(StepOrder::Iommu, "Enable the IOMMU (SMMU) in the firmware, and boot again.");
    }
    let step = Step::new(
        StepOrder::Iommu,
        "Enable the IOMMU (VT-d) in the firmware, add intel_iommu=on to the kernel's command line, and \
         boot again.",
    );
    let is = |name: &str| facts.distribution.ids.iter().any(|id| id == name);
    if is("debian") {
        step.command(r#"echo 'GRUB_CMDLINE_LINUX="$GRUB_CMDLINE_LINUX intel_iommu=on"' \"#)
            .command("  > /etc/default/grub.d/iommu.cfg && update-grub")
    } else if is("fedora") {
        step.command("grubby --update-kernel=ALL --args=intel_iommu=on")
    } else {
        step
    }
}

fn parameters(facts: &Facts) -> Option<Finding> {
    let line = facts.command_line.known()?;
    let words: Vec<&str> =
        line.split_whitespace().filter(|word| PARAMETERS.iter().any(|name| word.starts_with(name))).collect();
    let seen = format!("booted with {}", words.join(" "));
    (!words.is_empty()).then(|| Finding::new("kernel-parameters", Section::Iommu, Severity::Fine, seen))
}

fn interrupts(facts: &Facts, candidates: &[Candidate]) -> Option<Finding> {
    if candidates.is_empty() || facts.remaps_interrupts != Some(false) {
        return None;
    }
    Some(if facts.allows_unsafe_interrupts {
        let seen = "it remaps no interrupts, and VFIO was told to accept that";
        Finding::new("interrupts-unsafe", Section::Iommu, Severity::Fine, seen)
    } else {
        let seen = "no interrupt is seen to go through it";
        let why = "Without interrupt remapping VFIO says EPERM, unless allow_unsafe_interrupts of \
                   vfio_iommu_type1 or iommufd is set.";
        Finding::new("interrupts-not-remapped", Section::Iommu, Severity::Hint, seen).why(why)
    })
}
