//! `Device`: a GPU of the family, bound to its driver.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use peervram_backends::{
    CpuAccess, DmaBuf, DmaRanges, Error, Exporter, Interrupts, Kind, Mapping, NotClosed, NotReady,
    PciAddress, Region, Result, vfio,
};

use crate::base::Base;
use crate::memory::{Memory, PROVIDER_BAR, RESERVED_REGION, USABLE_REGION, Use, as_it_is};
use crate::part::Part;
use crate::readiness::{Seen, Sign, Wait};

/// The kernel's driver of the family.
pub const DRIVER: &str = "nvgrace_gpu_vfio_pci";

const CONFIGURATION_REGION: u32 = 7;
const REGISTERS_REGION: u32 = 0;

/// Between two looks; the driver looks every second.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);
/// Between two words about the same reason.
const TELL_INTERVAL: Duration = Duration::from_secs(1);

/// A GPU whose memory is coherent with the CPU.
///
/// As an [`Exporter`] its regions have the lengths that they have, not those that are reported, so that ranges
/// are checked against what is there. The driver's other calls are [`vfio::Device`]'s ([`AsRef`]).
///
/// Where the firmware names no memory, the driver shows the GPU's BARs as vfio-pci does, and so does this:
/// [`Device::fall_back`] says it.
#[derive(Debug)]
pub struct Device<B: Base = vfio::Device> {
    base: B,
    part: Option<Part>,
    regions: Box<[Region]>,
    memories: Box<[Memory]>,
    /// None for an adopted device: its owner waits until it is ready.
    sign: Option<Sign>,
}

impl Device {
    /// Whether `address` is bound to the driver of the family. Opens nothing.
    pub fn is_bound(address: PciAddress) -> bool {
        address.driver().as_deref() == Some(DRIVER)
    }

    /// Opens `address`, which resets it, and waits until it is ready. `tell` hears of the wait, as in
    /// [`Exporter::wait_until_ready`].
    ///
    /// # Errors
    /// As [`vfio::Device::open`], [`Device::new`] and [`Exporter::wait_until_ready`].
    pub fn open(address: PciAddress, tell: &mut dyn FnMut(&NotReady)) -> Result<Self> {
        let this = Self::new(vfio::Device::open(address)?)?;
        this.wait_until_ready(tell)?;
        Ok(this)
    }

    /// Opens `address` into `space`. As [`Device::open`].
    ///
    /// # Errors
    /// As [`Device::open`].
    pub fn open_into(
        space: &vfio::IoAddressSpace,
        address: PciAddress,
        tell: &mut dyn FnMut(&NotReady),
    ) -> Result<Self> {
        let this = Self::new(vfio::Device::open_into(space, address)?)?;
        this.wait_until_ready(tell)?;
        Ok(this)
    }

    /// Finds out what a device's regions are. Does not wait: just opened or adopted, its memory may not be ready.
    ///
    /// # Errors
    /// [`Kind::Unsupported`] where another driver has it, or its regions are none that this one shows. With the
    /// device given back.
    pub fn new(vfio: vfio::Device) -> Result<Self, NotClosed<vfio::Device>> {
        let is_adopted = vfio.is_adopted();
        Self::on(vfio, is_adopted)
    }
}

impl<B: Base> Device<B> {
    pub(crate) fn on(base: B, is_adopted: bool) -> Result<Self, NotClosed<B>> {
        match Self::describe(&base, is_adopted) {
            Ok((part, memories, sign)) => {
                let memory = |index| memories.iter().find(|memory| memory.region_index == index);
                let regions = base.regions().iter().map(|region| as_it_is(region, memory(region.index)));
                Ok(Self { part, regions: regions.collect(), sign, memories: memories.into(), base })
            }
            Err(error) => {
                let error = error.on(base.address());
                Err(NotClosed::new(base, error))
            }
        }
    }

    fn describe(base: &B, is_adopted: bool) -> Result<(Option<Part>, Vec<Memory>, Option<Sign>)> {
        let function = base.function()?;
        if function.driver.as_deref() != Some(DRIVER) {
            let driver = function.driver.as_deref().unwrap_or("no driver");
            let why = format!("it is bound to {driver}, which shows its BARs and not its memory");
            return Err(Error::new(Kind::Unsupported, "use coherent memory", why)
                .next(format!("sudo peervram bind {} binds it to {DRIVER}", base.address())));
        }
        let mut memories = Vec::new();
        for region in base.regions() {
            memories.extend(Memory::of(region)?);
        }
        let sign = if is_adopted { None } else { Some(Sign::of(&configuration(base)?)) };
        Ok((Part::of(function.vendor_id, function.device_id), memories, sign))
    }

    #[cfg(test)]
    pub(crate) fn base(&self) -> &B {
        &self.base
    }

    /// Which GPU it is; none where its id is in no table that this was written after.
    pub fn part(&self) -> Option<Part> {
        self.part
    }

    /// Its memories: the usable one, and the reserved one behind it where there is one. None where the firmware
    /// names none.
    pub fn memories(&self) -> &[Memory] {
        &self.memories
    }

    /// The memory that is for everything.
    ///
    /// # Errors
    /// [`Kind::NotFound`] with the reason why the GPU shows none.
    pub fn usable(&self) -> Result<&Memory> {
        self.memory(USABLE_REGION).ok_or_else(|| {
            let why = self.fall_back().unwrap_or("it shows only a reserved memory");
            Error::new(Kind::NotFound, "find a GPU's memory", why).on(self.base.address()).next(
                "look at the firmware's settings and log for the C2C link; until then it lends its BARs",
            )
        })
    }

    /// Why the GPU shows BARs and no memory, if that is so.
    pub fn fall_back(&self) -> Option<&'static str> {
        // nvgrace_gpu_fetch_memory_property: an error of any kind makes it a plain device.
        self.memories.is_empty().then_some(
            "the firmware names no memory of it (nvidia,gpu-mem-base-pa, nvidia,gpu-mem-size), or one of no \
             bytes, as where the C2C link is down",
        )
    }

    /// The region at `index` with the length that it has. As [`vfio::Device::region`].
    ///
    /// # Errors
    /// As [`vfio::Device::region`].
    pub fn region(&self, index: u32) -> Result<&Region> {
        self.base.region(index)?;
        let found = self.regions.iter().find(|region| region.index == index);
        Ok(found.expect("the same regions as the VFIO device's"))
    }

    /// The memory that the region at `index` shows.
    pub fn memory(&self, index: u32) -> Option<&Memory> {
        self.memories.iter().find(|memory| memory.region_index == index)
    }

    /// Fails where there is no memory behind ranges of a region that shows memory.
    fn check(&self, ranges: &DmaRanges) -> Result<()> {
        let Some(memory) = self.memory(ranges.region_index()) else { return Ok(()) };
        // The reserved memory begins where the usable one ends (nvgrace_gpu_init_nvdev_struct).
        let next = match memory.used_for {
            Use::Usable => self.memory(RESERVED_REGION),
            Use::Reserved => None,
        };
        memory.check(ranges, next).map_err(|error| error.on(self.base.address()))
    }

    /// ENODEV from the kernel's look for a mapping of the real BAR, which it makes before it asks the driver
    /// (`vfio_pci_core_feature_dma_buf`).
    fn explain(&self, error: Error, region_index: u32) -> Error {
        const ENODEV: i32 = 19;
        let has_bar = self.base.function().is_ok_and(|function| function.bar(region_index).is_some());
        if error.raw_os_error() != Some(ENODEV) || has_bar {
            return error;
        }
        let why = format!("the GPU has no real BAR {region_index}, which the kernel asks for first");
        Error::new(Kind::Unsupported, "export a dma-buf", why)
            .on(self.base.address())
            .raw_errno(ENODEV)
            .next("map the memory instead, or lend it by host pointer")
    }

    fn look(&self, sign: Sign) -> Result<Seen> {
        let word = |region| {
            move |offset| {
                let mut bytes = [0; 4];
                self.base.read(region, offset, &mut bytes)?;
                Ok(u32::from_le_bytes(bytes))
            }
        };
        Seen::ask(sign, word(REGISTERS_REGION), word(CONFIGURATION_REGION))
    }
}

/// The device's configuration space, as VFIO shows it.
fn configuration(base: &impl Base) -> Result<Vec<u8>> {
    let mut bytes = vec![0; base.region(CONFIGURATION_REGION)?.size_bytes as usize];
    base.read(CONFIGURATION_REGION, 0, &mut bytes)?;
    Ok(bytes)
}

impl AsRef<vfio::Device> for Device {
    fn as_ref(&self) -> &vfio::Device {
        &self.base
    }
}

impl<B: Base> Exporter for Device<B> {
    fn name(&self) -> String {
        self.base.name()
    }

    fn pci_address(&self) -> Option<PciAddress> {
        self.base.pci_address()
    }

    /// With the lengths that they have.
    fn regions(&self) -> &[Region] {
        &self.regions
    }

    fn export(&self, ranges: &DmaRanges) -> Result<DmaBuf> {
        self.check(ranges)?;
        self.base.export(ranges).map_err(|error| self.explain(error, ranges.region_index()))
    }

    fn map(&self, ranges: &DmaRanges) -> Result<Arc<Mapping>> {
        self.check(ranges)?;
        self.base.map(ranges)
    }

    fn check_reachable(&self) -> Result<()> {
        self.base.check_reachable()
    }

    fn wait_until_ready(&self, tell: &mut dyn FnMut(&NotReady)) -> Result<()> {
        let Some(sign) = self.sign else { return Ok(()) };
        let (begin, mut wait) = (Instant::now(), Wait::default());
        let mut told: Option<NotReady> = None;
        loop {
            let seen = self.look(sign)?;
            let looked = wait.look(seen, begin.elapsed()).map_err(|error| error.on(self.base.address()))?;
            let Some(why) = looked else { return Ok(()) };
            let is_news = told.as_ref().is_none_or(|told| {
                told.reason != why.reason || why.waited.saturating_sub(told.waited) >= TELL_INTERVAL
            });
            if is_news {
                tell(&why);
                told = Some(why);
            }
            thread::sleep(LOOK_INTERVAL);
        }
    }

    fn cpu_access(&self, region_index: u32) -> CpuAccess {
        match self.memory(region_index) {
            Some(memory) => memory.cpu_access(),
            None => self.base.cpu_access(region_index),
        }
    }

    /// BAR 0 for both memories: the kernel treats them as that BAR's.
    fn provider_bar(&self, region_index: u32) -> u32 {
        if self.memory(region_index).is_some() { PROVIDER_BAR } else { region_index }
    }

    fn shadow(&self) -> Result<()> {
        self.base.shadow()
    }

    fn unshadow(&self) -> Result<()> {
        self.base.unshadow()
    }

    fn retire_mappings(&self) -> Result<()> {
        self.base.retire_mappings()
    }

    fn close_device(&self) -> Result<()> {
        self.base.close_device()
    }

    fn interrupts(&self) -> Result<Interrupts> {
        self.base.interrupts()
    }
}
