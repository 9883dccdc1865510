//! `MemoryPlace`: where memory can be: a device bound to VFIO, a Vulkan device, the host. All of them lend.
//!
//! Order of calls: [`found`] lists names and touches nothing; [`open`] opens those that are wanted. A VFIO device is reset when it
//! is opened.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use peervram::backends::host::HostMemory;
use peervram::backends::pci::Function;
use peervram::backends::vulkan::{self, Instance, Selector};
use peervram::backends::{
    Aperture, DmaRange, DmaRanges, Exporter, Importer, Mapping, Owner, PciAddress, RawBytes, page_size_bytes,
    vfio,
};
use peervram::{Export, Kind, Lender};

use crate::attached::Imports;
use crate::driver;
use crate::record;
use crate::route::Side;
use crate::same_gpu::SameGpu;

/// What the host is called.
pub const HOST: &str = "host";

/// How long a device may take to be let go of.
const PATIENCE: Duration = Duration::from_secs(5);

/// A place that could be opened.
#[derive(Debug, Clone)]
pub struct Found {
    /// "0000:01:00.0", "vulkan0", "host".
    pub name: String,
    /// What it is.
    pub about: String,
    kind: FoundKind,
}

#[derive(Debug, Clone)]
enum FoundKind {
    Vfio(Box<Function>),
    Vulkan(Selector),
    Host,
}

impl Found {
    /// Whether `text` means it: its name, the end of its PCI address, or a part of what it is.
    pub fn is_meant(&self, text: &str) -> bool {
        let (text, name) = (text.to_ascii_lowercase(), self.name.to_ascii_lowercase());
        let is_address = matches!(self.kind, FoundKind::Vfio(_)) && name.ends_with(&format!(":{text}"));
        let is_part =
            matches!(self.kind, FoundKind::Vulkan(_)) && self.about.to_ascii_lowercase().contains(&text);
        name == text || is_address || !text.is_empty() && is_part
    }
}

/// All places of this machine, and why some were not found.
pub fn found() -> (Vec<Found>, Vec<String>) {
    let (mut places, mut troubles) = (Vec::new(), Vec::new());
    // A machine without a PCI bus has no VFIO device.
    for function in Function::all().unwrap_or_default() {
        if function.is_bound_to_vfio() && function.largest_memory().is_some() {
            let about = about(&function);
            let name = function.address.to_string();
            places.push(Found { name, about, kind: FoundKind::Vfio(Box::new(function)) });
        }
    }
    match Instance::open().and_then(|instance| instance.physical_devices()) {
        Ok(devices) => {
            for (index, device) in devices.into_iter().enumerate() {
                // One GPU may have two drivers, and two GPUs one name.
                let kind = FoundKind::Vulkan(Selector::Number(index));
                places.push(Found { name: format!("vulkan{index}"), about: device.name, kind });
            }
        }
        Err(error) => troubles.push(error.to_string()),
    }
    places.push(Found { name: HOST.into(), about: "host memory and the CPU".into(), kind: FoundKind::Host });
    (places, troubles)
}

/// What a VFIO device is, before it was opened.
fn about(function: &Function) -> String {
    let silent = if function.answers == Some(false) { ", does not answer" } else { "" };
    format!("VFIO device {:04x}:{:04x}{silent}", function.vendor_id, function.device_id)
}

/// A place that is open.
pub struct MemoryPlace {
    /// What is said of it.
    pub record: record::PlaceRecord,
    /// Where it is.
    pub address: Option<PciAddress>,
    /// What it imports by. Dropped before `lends`: an importer must be gone before its device is closed.
    pub imports: Option<Box<dyn Imports>>,
    /// What it lends by.
    pub lends: Option<Box<dyn Lends>>,
    /// A second device of the same GPU, and its first.
    pub same_gpu: Option<SameGpu>,
}

impl MemoryPlace {
    /// Whether it is the host.
    pub fn is_host(&self) -> bool {
        self.record.name == HOST
    }

    /// Whether both are one GPU, by one driver or by two.
    pub fn is_same_gpu(&self, other: &MemoryPlace) -> bool {
        self.record.name == other.record.name || self.address.is_some() && self.address == other.address
    }
}

/// A place that lends.
pub trait Lends {
    /// How much at most.
    fn most_bytes(&self) -> u64;

    /// Lends so much, from the start.
    ///
    /// # Errors
    /// What the lender says.
    fn lend(&self, size_bytes: u64) -> peervram::Result<Lent>;
}

/// Memory that is lent.
pub struct Lent {
    /// The export to attach to.
    pub export: Export,
    /// Who looks at it for its owner.
    pub side: Side,
    /// Its owner, where that has an engine.
    pub owner: Option<Arc<dyn Owner>>,
    /// Which memory.
    pub ranges: DmaRanges,
    /// The CPU's mapping of the memory, if it has one.
    pub window: Option<Arc<Mapping>>,
    /// The lender of this memory alone. Dropped last, after what it lent.
    pub _lender: Option<Once>,
}

/// A lender of one piece of a Vulkan device's memory.
pub struct Once(Option<Lender<vulkan::DeviceMemory>>);

impl Drop for Once {
    fn drop(&mut self) {
        close(self.0.take());
    }
}

fn close<E: Exporter + 'static>(lender: Option<Lender<E>>) {
    if let Some(lender) = lender
        && let Err(error) = lender.close(PATIENCE)
    {
        peervram_programs::note!("peer-copy: could not close a device: {error}");
    }
}

/// A lender with its memory.
struct Lending<E: Exporter + 'static> {
    owner: Arc<dyn Owner>,
    region: peervram::backends::Region,
    lent: DmaRange,
    /// Dropped last.
    lender: Option<Lender<E>>,
}

impl<E: Exporter + 'static> Lends for Lending<E> {
    fn most_bytes(&self) -> u64 {
        self.lent.length_bytes
    }

    fn lend(&self, size_bytes: u64) -> peervram::Result<Lent> {
        let lender = self.lender.as_ref().expect("it is there until it is dropped");
        let ranges = DmaRanges::new(&self.region, &[DmaRange::new(self.lent.offset_bytes, size_bytes)])?;
        let export = lender.export(Aperture::owned(ranges.clone(), Arc::clone(&self.owner)))?;
        let window = lender.device().map(&ranges)?;
        let owner = self.owner.engine().is_some().then(|| Arc::clone(&self.owner));
        let side = match &owner {
            Some(owner) => Side::Engine { owner: Arc::clone(owner), ranges: ranges.clone() },
            None if lender.device().pci_address().is_some() => Side::Window(Arc::clone(&window)),
            None => Side::Host(Arc::clone(&window)),
        };
        Ok(Lent { export, side, owner, ranges, window: Some(window), _lender: None })
    }
}

impl<E: Exporter + 'static> Drop for Lending<E> {
    fn drop(&mut self) {
        // The owner's mappings keep the device open.
        self.owner = Arc::new(RawBytes);
        close(self.lender.take());
    }
}

/// A Vulkan device lends allocations as a whole, so each loan is one.
struct VulkanLending {
    device: Arc<vulkan::Device>,
    most_bytes: u64,
}

impl Lends for VulkanLending {
    fn most_bytes(&self) -> u64 {
        self.most_bytes
    }

    fn lend(&self, size_bytes: u64) -> peervram::Result<Lent> {
        let memory = self.device.allocate_exportable(size_bytes)?;
        let (ranges, owner) = (DmaRanges::whole(memory.region())?, memory.owner());
        let window = memory.map(&ranges).ok();
        let lender = Lender::new(memory);
        let export = lender.export(Aperture::owned(ranges.clone(), Arc::clone(&owner)))?;
        let side = Side::Engine { owner: Arc::clone(&owner), ranges: ranges.clone() };
        Ok(Lent { export, side, owner: Some(owner), ranges, window, _lender: Some(Once(Some(lender))) })
    }
}

/// Opens a place. The host lends at most `host_bytes`.
///
/// # Errors
/// Why it cannot be opened.
pub fn open(found: &Found, host_bytes: u64) -> Result<MemoryPlace> {
    match &found.kind {
        FoundKind::Vfio(function) => open_vfio(found, function),
        FoundKind::Vulkan(selector) => open_vulkan(found, selector),
        FoundKind::Host => open_host(found, host_bytes),
    }
}

fn open_vfio(found: &Found, function: &Function) -> Result<MemoryPlace> {
    function.check_answers("open a device")?;
    let device = vfio::Device::open(function.address)?;
    let mut driven = None;
    for driver in driver::all().iter().filter(|driver| driver.may_drive(function)) {
        match driver.open(&device) {
            Ok(opened) => driven = Some(opened),
            Err(error) if error.kind() == Kind::Unsupported => {}
            Err(error) => return Err(error.into()),
        }
    }
    let (owner, region, lent, imports) = match driven {
        Some(driven) => (driven.owner, device.region(driven.region)?.clone(), driven.lent, driven.imports),
        None => {
            let bar = function.largest_memory().context("it has no memory BAR")?;
            let region = device.region(bar.index)?.clone();
            let length_bytes = region.size_bytes / page_size_bytes() * page_size_bytes();
            (Arc::new(RawBytes) as Arc<dyn Owner>, region, DmaRange::new(0, length_bytes), None)
        }
    };
    let engines = owner.engine().map(|engine| engine.name().to_owned()).into_iter().collect();
    let about = format!("{}, {}", found.about, owner.name());
    let record = record::PlaceRecord {
        name: found.name.clone(),
        about,
        pci_address: Some(function.address.to_string()),
        numa_node: function.numa_node,
        lends_bytes: lent.length_bytes,
        engines,
        clocks: Vec::new(),
    };
    let lends = Lending { owner, region, lent, lender: Some(Lender::new(device)) };
    let address = Some(function.address);
    Ok(MemoryPlace { record, address, imports, lends: Some(Box::new(lends)), same_gpu: None })
}

fn open_vulkan(found: &Found, selector: &Selector) -> Result<MemoryPlace> {
    let instance = Instance::open()?;
    let open = || Ok::<_, peervram::Error>(Arc::new(instance.open_device(selector)?));
    let (device, second) = (open()?, open()?);
    let address = device.pci_address();
    let function = address.and_then(|address| Function::read(address).ok());
    let driver = device.driver().map(|driver| format!(", {driver}")).unwrap_or_default();
    // The other half of the memory is the destination of its copies.
    let half_mib = device.description().local_memory_bytes >> 21;
    let most_bytes = half_mib << 20;
    let lends = VulkanLending { device: Arc::clone(&device), most_bytes };
    let same_gpu = SameGpu { first: Arc::clone(&device), second };
    let imports: Box<dyn Imports> = Box::new(device);
    let record = record::PlaceRecord {
        name: found.name.clone(),
        about: format!("{}{driver}", found.about),
        pci_address: address.map(|address| address.to_string()),
        numa_node: function.and_then(|function| function.numa_node),
        lends_bytes: most_bytes,
        engines: imports.engine_names(),
        clocks: Vec::new(),
    };
    let (imports, lends) = (Some(imports), Some(Box::new(lends) as Box<dyn Lends>));
    Ok(MemoryPlace { record, address, imports, lends, same_gpu: Some(same_gpu) })
}

fn open_host(found: &Found, host_bytes: u64) -> Result<MemoryPlace> {
    let memory = HostMemory::new(host_bytes)?;
    let (region, lent) = (memory.region().clone(), DmaRange::new(0, host_bytes));
    let record = record::PlaceRecord {
        name: found.name.clone(),
        about: found.about.clone(),
        pci_address: None,
        numa_node: None,
        lends_bytes: host_bytes,
        engines: vec!["CPU".into()],
        clocks: Vec::new(),
    };
    let lends = Lending { owner: Arc::new(RawBytes), region, lent, lender: Some(Lender::new(memory)) };
    Ok(MemoryPlace { record, address: None, imports: None, lends: Some(Box::new(lends)), same_gpu: None })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_answer_is_named_and_not_opened() {
        let function = |answers: Option<bool>| -> Function {
            serde_json::from_value(serde_json::json!({
                "address": "0000:0c:00.0", "vendor_id": 0x1002, "device_id": 0x74a1, "class": 0x12_0000,
                "driver": "vfio-pci", "iommu_group": 1, "numa_node": null, "link": null, "drm_nodes": [],
                "memory_enabled": null, "bars": [], "answers": answers,
            }))
            .unwrap()
        };
        assert_eq!(about(&function(Some(true))), "VFIO device 1002:74a1");
        let dead = function(Some(false));
        assert_eq!(about(&dead), "VFIO device 1002:74a1, does not answer");
        let kind = FoundKind::Vfio(Box::new(dead.clone()));
        let found = Found { name: dead.address.to_string(), about: about(&dead), kind };
        let error = open(&found, 0).err().unwrap();
        let error = error.downcast_ref::<peervram::Error>().unwrap();
        assert!(error.kind() == Kind::Gone && error.why().contains("does not answer"), "{error}");
    }
}
