//! Which Vulkan devices there are, and what they can import.

use super::facts::{Distribution, Facts, Vulkan, VulkanDevice};
use super::finding::{Finding, Section, Severity, Step, StepOrder};

pub fn examine(facts: &Facts) -> Vec<Finding> {
    let finding = |code, weight, seen: String| Finding::new(code, Section::Vulkan, weight, seen);
    match &facts.vulkan {
        Vulkan::Missing { why } => {
            // What the dynamic linker says is longer, and says no more.
            let seen = if why.starts_with("libvulkan.so.1") {
                "no Vulkan: its loader, libvulkan.so.1, is not there".to_owned()
            } else {
                format!("no Vulkan: {why}")
            };
            let found = finding("vulkan-missing", Severity::InTheWay, seen)
                .why("Vulkan checks and paints lent memory; Mesa's lavapipe does it on any CPU.");
            vec![found.step(install(&facts.distribution))]
        }
        Vulkan::Broken { why } => {
            let step = Step::new(
                StepOrder::Vulkan,
                "Find the Vulkan driver that is broken, and remove or update it:",
            )
            .command("VK_LOADER_DEBUG=all vulkaninfo --summary");
            vec![
                finding("vulkan-broken", Severity::InTheWay, format!("Vulkan does not answer: {why}"))
                    .step(step),
            ]
        }
        Vulkan::Devices(devices) => devices.iter().map(device).collect(),
    }
}

fn device(device: &VulkanDevice) -> Finding {
    let place = match device.pci_address {
        Some(address) => format!("at {address}"),
        None if device.is_cpu => "a CPU".to_owned(),
        None => "of unknown place".to_owned(),
    };
    let mut can = Vec::new();
    if device.imports_dma_bufs {
        // Its import maps the descriptor, which a VFIO device's cannot be.
        can.push(if device.is_cpu { "imports dma-bufs of host memory" } else { "imports dma-bufs" });
    }
    if device.imports_host_pointers {
        can.push("imports host pointers");
    }
    if device.exports_dma_bufs {
        can.push("exports dma-bufs");
    }
    let can_import = device.imports_dma_bufs || device.imports_host_pointers;
    if !can_import {
        can.insert(0, "imports nothing");
    }
    let what = can.join(", ");
    let name = device.name.split(" (").next().unwrap_or_default();
    let weight = if can_import { Severity::Fine } else { Severity::Hint };
    let seen = format!("{name}, {place} ({}): {what}", device.driver);
    Finding::new("vulkan-device", Section::Vulkan, weight, seen)
}

fn install(distribution: &Distribution) -> Step {
    let is = |name: &str| distribution.ids.iter().any(|id| id == name);
    let command = if is("debian") {
        "apt install libvulkan1 mesa-vulkan-drivers"
    } else if is("fedora") || is("rhel") {
        "dnf install vulkan-loader mesa-vulkan-drivers"
    } else if is("arch") {
        "pacman -S vulkan-icd-loader vulkan-swrast"
    } else if is("alpine") {
        "apk add vulkan-loader mesa-vulkan-swrast"
    } else if is("suse") {
        "zypper install libvulkan1 libvulkan_lvp"
    } else {
        let what = "Install the Vulkan loader and Mesa's drivers: libvulkan1 and mesa-vulkan-drivers on Debian, \
                    vulkan-loader and mesa-vulkan-drivers on Fedora.";
        return Step::new(StepOrder::Vulkan, what);
    };
    Step::new(StepOrder::Vulkan, "Install the Vulkan loader and Mesa's drivers:").command(command)
}
