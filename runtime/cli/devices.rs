//! `peervram devices`: who can lend, who can import, what stands in the way.
//!
//! Reads sysfs and nothing else: no device is opened unless asked for, because opening a VFIO device resets it.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use clap::Args;
use peervram::backends::import_support_of;
use peervram::backends::pci::{Function, Link};
use peervram::backends::vfio;
use peervram_programs::{bytes, columns, lines};
use serde::Serialize;

use super::coherent::CoherentReport;
use super::ending::print_json;
use super::pci_names::PciNames;

/// List the PCI functions that matter: GPUs, devices bound to VFIO, devices with a DRM node.
///
/// For each: can it lend memory, can it import memory of another, and what stands in the way. Opens
/// no device and needs no privilege, unless told to.
#[derive(Args)]
pub struct Arguments {
    /// List every PCI function.
    #[arg(long)]
    all: bool,

    /// Open GPUs whose memory is coherent with the CPU, to show what their regions are. Opening one resets it:
    /// what its memory holds is lost.
    #[arg(long)]
    open: bool,
}

#[derive(Serialize)]
struct Report {
    kernel_release: String,
    devices: Vec<DeviceReport>,
}

#[derive(Serialize)]
struct DeviceReport {
    address: String,
    vendor_id: String,
    device_id: String,
    class: String,
    name: Option<String>,
    driver: Option<String>,
    iommu_group: Option<u32>,
    numa_node: Option<u32>,
    memory_enabled: Option<bool>,
    /// Whether it answers; none where that is not known.
    answers: Option<bool>,
    bars: Vec<BarReport>,
    link: Option<LinkReport>,
    drm_nodes: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    coherent: Option<CoherentReport>,
    lend: Verdict,
    import: Verdict,
}

#[derive(Serialize)]
struct BarReport {
    index: u32,
    size_bytes: u64,
    is_memory: bool,
    is_prefetchable: bool,
}

#[derive(Serialize)]
struct LinkReport {
    speed: String,
    width_lanes: u32,
    max_speed: String,
    max_width_lanes: u32,
    narrowed: bool,
}

/// Whether it can, why, and what would change that.
#[derive(Serialize)]
struct Verdict {
    can: bool,
    because: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<String>,
}

pub fn run(arguments: &Arguments, json: bool) -> anyhow::Result<ExitCode> {
    let names = PciNames::load();
    let kernel_release = vfio::kernel_release();
    let devices = Function::all()?
        .into_iter()
        .filter(|function| arguments.all || matters(function))
        .map(|function| report(&function, &names, arguments.open))
        .collect();
    let report = Report { kernel_release, devices };
    if json {
        print_json(&report)?;
    } else {
        print(&report)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Whether people ask about it: a GPU, a device bound to VFIO, one with a DRM node.
pub fn matters(function: &Function) -> bool {
    function.is_gpu() || function.is_bound_to_vfio() || !function.drm_nodes.is_empty()
}

fn report(function: &Function, names: &PciNames, open: bool) -> DeviceReport {
    let coherent = CoherentReport::of(function, open);
    DeviceReport {
        address: function.address.to_string(),
        vendor_id: format!("{:04x}", function.vendor_id),
        device_id: format!("{:04x}", function.device_id),
        class: format!("{:06x}", function.class),
        name: names.name(function.vendor_id, function.device_id),
        driver: function.driver.clone(),
        iommu_group: function.iommu_group,
        numa_node: function.numa_node,
        memory_enabled: function.memory_enabled,
        answers: function.answers,
        bars: (function.bars.iter())
            .map(|bar| BarReport {
                index: bar.index,
                size_bytes: bar.size_bytes,
                is_memory: bar.is_memory,
                is_prefetchable: bar.is_prefetchable,
            })
            .collect(),
        link: function.link.as_ref().map(|link| LinkReport {
            speed: link.speed.clone(),
            width_lanes: link.width_lanes,
            max_speed: link.max_speed.clone(),
            max_width_lanes: link.max_width_lanes,
            narrowed: is_narrowed(link),
        }),
        drm_nodes: function.drm_nodes.clone(),
        lend: can_lend_coherent(function, coherent.as_ref()),
        coherent,
        import: can_import(function),
    }
}

fn is_narrowed(link: &Link) -> bool {
    link.width_lanes < link.max_width_lanes || link.speed != link.max_speed
}

/// Who would unbind a working driver for registers? Below this nothing is VRAM.
pub const LEAST_VRAM_BYTES: u64 = 1 << 20;

/// Why nobody would take a function from its driver for its memory; none of a GPU, and of what has memory.
pub fn nothing_to_lend(function: &Function) -> Option<String> {
    // Bridges and parts of the system (an IOMMU is one) carry others, whatever BARs they have.
    if matches!(function.class >> 16, 0x06 | 0x08) {
        return Some(format!("it is a bridge or a part of the system (class {:06x})", function.class));
    }
    let largest_bytes = function.largest_memory().map_or(0, |memory| memory.size_bytes);
    (!function.is_gpu() && largest_bytes < LEAST_VRAM_BYTES)
        .then(|| format!("it is no GPU, and its largest memory BAR has {}", bytes::in_words(largest_bytes)))
}

fn can_lend(function: &Function) -> Verdict {
    let no = |because: String, next: Option<String>| Verdict { can: false, because, next };
    if let Err(error) = function.check_answers("lend memory of a device") {
        return no(error.why().to_owned(), error.next_step().map(str::to_owned));
    }
    let Some(memory) = function.largest_memory() else {
        return no("it has no memory BAR of a page or more".into(), None);
    };
    if let Some(why) = nothing_to_lend(function).filter(|_| !function.is_bound_to_vfio()) {
        return no(why, None);
    }
    if let Err(error) = vfio::check_kernel_exports_dma_bufs() {
        return no(error.why().to_owned(), error.next_step().map(str::to_owned));
    }
    if !function.is_bound_to_vfio() && memory.size_bytes < LEAST_VRAM_BYTES {
        return no(format!("its largest memory BAR has {}", bytes::in_words(memory.size_bytes)), None);
    }
    if !function.is_bound_to_vfio() {
        let because = match &function.driver {
            Some(driver) => format!("it is bound to {driver}"),
            None => "it is bound to no driver".into(),
        };
        let bind = format!("sudo peervram bind {}", function.address);
        let next = if function.iommu_group.is_some() {
            bind
        } else {
            format!("enable the IOMMU (intel_iommu=on, or in the firmware), then {bind}")
        };
        return no(because, Some(next));
    }
    let because = format!("BAR {}, {}", memory.index, bytes::in_words(memory.size_bytes));
    Verdict { can: true, because, next: None }
}

/// The same of a GPU whose memory is not behind its BARs.
fn can_lend_coherent(function: &Function, coherent: Option<&CoherentReport>) -> Verdict {
    let verdict = can_lend(function);
    let Some(coherent) = coherent.filter(|_| function.answers != Some(false)) else { return verdict };
    match (verdict.can, coherent.lends(&verdict.because)) {
        (true, Some(because)) => Verdict { because, ..verdict },
        _ => Verdict { next: coherent.bind(function.address).or(verdict.next), ..verdict },
    }
}

fn can_import(function: &Function) -> Verdict {
    let no = |because: String, next: Option<String>| Verdict { can: false, because, next };
    if let Err(error) = function.check_answers("import into a device") {
        return no(error.why().to_owned(), error.next_step().map(str::to_owned));
    }
    match function.driver.as_deref() {
        None if function.is_gpu() => {
            no("it is bound to no driver".into(), Some("bind it to its graphics driver".into()))
        }
        None => no("it is no graphics device, and is bound to no driver".into(), None),
        Some(_) if function.is_bound_to_vfio() => no("it is bound to VFIO, which lends".into(), None),
        Some("virtio-pci") if function.drm_nodes.is_empty() => no("it is no graphics device".into(), None),
        Some(driver) => match import_support_of(function) {
            Some(row) => Verdict { can: row.can_import, because: row.because.into(), next: None },
            None => no(format!("{driver} is not known to attach peer-to-peer"), None),
        },
    }
}

fn print(report: &Report) -> anyhow::Result<()> {
    let mut output = peervram_programs::output();
    if report.devices.is_empty() {
        writeln!(
            output,
            "No GPU, no device bound to VFIO, and no DRM node (Linux {}).",
            report.kernel_release
        )?;
        let everything =
            if Path::new("/sys/bus/pci").exists() { "; --all lists every PCI function" } else { "" };
        writeln!(output, "peervram demo runs without one{everything}.")?;
        return Ok(());
    }
    for device in &report.devices {
        let id = format!("{}:{}", device.vendor_id, device.device_id);
        writeln!(output, "{}  {}", device.address, device.name.as_deref().unwrap_or(&id))?;
        let group = device.iommu_group.map_or_else(|| "none".into(), |group| group.to_string());
        let driver = device.driver.as_deref().unwrap_or("none");
        write!(output, "  driver {driver}, IOMMU group {group}")?;
        if let Some(node) = device.numa_node {
            write!(output, ", NUMA node {node}")?;
        }
        if device.memory_enabled == Some(false) {
            write!(output, ", memory off")?;
        }
        writeln!(output)?;
        for bar in &device.bars {
            let kind = match (bar.is_memory, bar.is_prefetchable) {
                (false, _) => "I/O ports",
                (true, false) => "memory",
                (true, true) => "memory, prefetchable",
            };
            writeln!(output, "  BAR {}   {:>8}  {kind}", bar.index, bytes::in_words(bar.size_bytes))?;
        }
        if let Some(link) = &device.link {
            write!(output, "  link    {} x{}", link.speed, link.width_lanes)?;
            if link.narrowed {
                write!(output, ", of {} x{}", link.max_speed, link.max_width_lanes)?;
            }
            writeln!(output)?;
        }
        if !device.drm_nodes.is_empty() {
            writeln!(output, "  DRM     {}", device.drm_nodes.join(", "))?;
        }
        if let Some(coherent) = &device.coherent {
            coherent.print(&mut output)?;
        }
        print_verdict(&mut output, "lend", &device.lend)?;
        print_verdict(&mut output, "import", &device.import)?;
        writeln!(output)?;
    }
    Ok(())
}

fn print_verdict(output: &mut impl Write, what: &str, verdict: &Verdict) -> std::io::Result<()> {
    let word = if verdict.can { "yes" } else { "no" };
    let next = verdict.next.as_ref().map(|next| format!("; {next}")).unwrap_or_default();
    let mut label = format!("  {what:<7} ");
    for line in lines(&format!("{word}: {}{next}", verdict.because), columns() - label.len()) {
        writeln!(output, "{label}{line}")?;
        label = " ".repeat(label.len());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn function(class: u32, driver: Option<&str>, size_bytes: u64) -> Function {
        let value = serde_json::json!({
            "address": "0000:00:00.0", "vendor_id": 0x8086, "device_id": 0x29c0, "class": class, "driver": driver,
            "iommu_group": 1, "numa_node": null, "link": null, "drm_nodes": [], "memory_enabled": true,
            "bars": [{"index": 0, "address": 0, "size_bytes": size_bytes, "is_memory": true, "is_prefetchable": true}],
        });
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn a_device_that_answers_ones_neither_lends_nor_imports() {
        for (driver, class) in [("vfio-pci", 0x12_0000), ("amdgpu", 0x03_0000), ("pcieport", 0x06_0400)] {
            let dead = Function { answers: Some(false), ..function(class, Some(driver), 1 << 30) };
            for verdict in [can_lend_coherent(&dead, None), can_import(&dead)] {
                assert!(!verdict.can && verdict.because.contains("does not answer"), "{}", verdict.because);
                assert!(verdict.next.unwrap().contains("peervram doctor"), "{driver}");
            }
        }
        // A GPU with coherent memory (GH200) is not told to be bound either.
        let grace = Function {
            vendor_id: 0x10de,
            device_id: 0x2342,
            answers: Some(false),
            ..function(0x03_0200, Some("nvidia"), 1 << 30)
        };
        let coherent = CoherentReport::of(&grace, false).unwrap();
        let next = can_lend_coherent(&grace, Some(&coherent)).next.unwrap();
        assert!(next.contains("peervram doctor"), "{next}");
    }

    #[test]
    fn only_a_gpu_is_told_to_get_a_graphics_driver() {
        let host_bridge = can_import(&function(0x06_0000, None, 0));
        assert!(!host_bridge.can && host_bridge.next.is_none(), "{}", host_bridge.because);
        assert!(can_import(&function(0x03_0000, None, 0)).next.unwrap().contains("graphics driver"));
    }

    #[test]
    fn no_bridge_is_told_to_be_bound_to_vfio() {
        let next = |class, size_bytes| can_lend(&function(class, Some("x"), size_bytes)).next;
        // Where the kernel exports nothing, that is said instead.
        let is_bind = |next: Option<String>| next.is_some_and(|next| next.contains("peervram bind"));
        for (class, size_bytes) in [(0x06_0400, 16 << 20), (0x08_0600, 16 << 20), (0x02_0000, 64 << 10)] {
            assert!(!is_bind(next(class, size_bytes)), "{class:06x}");
            assert!(nothing_to_lend(&function(class, Some("x"), size_bytes)).is_some(), "{class:06x}");
        }
        for (class, size_bytes) in [(0x03_0000, 4096), (0x12_0000, 4096), (0x01_0802, 1 << 20)] {
            assert_eq!(nothing_to_lend(&function(class, Some("x"), size_bytes)), None, "{class:06x}");
        }
    }
}
