//! [`Device`] on a model of its driver. What the driver itself does is asked in the lab.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use peervram_backends::pci::{Bar, Function};
use peervram_backends::{
    Capability, CpuAccess, DmaBuf, DmaRange, DmaRanges, Error, Exporter, Interrupts, Kind, Mapping, NotReady,
    PciAddress, Region, RegionFlags, Result, SparseArea,
};

use crate::base::Base;
use crate::device::{DRIVER, Device};
use crate::memory::{PROVIDER_BAR, RESERVED_REGION, USABLE_REGION};

const MIB: u64 = 1 << 20;
const ENODEV: i32 = 19;
const READY: (u32, u32) = (0xff, 0xff);
const NO_LINK: (u32, u32) = (0, 0xff);
const TRAINING: (u32, u32) = (0xff, 1);

/// What the driver shows of a GB200, and what it answers.
struct Model {
    function: Function,
    regions: Vec<Region>,
    config: Vec<u8>,
    /// What the registers of the link and of the memory say, look by look; the last of them from then on.
    registers: Mutex<VecDeque<(u32, u32)>>,
    /// How often the link was looked at.
    looks: Mutex<usize>,
}

fn region(index: u32, size_bytes: u64, shown_bytes: Option<u64>) -> Region {
    let area = |length_bytes| Capability::SparseMmap(vec![SparseArea { offset_bytes: 0, length_bytes }]);
    Region {
        index,
        size_bytes,
        file_offset_bytes: u64::from(index) << 40,
        flags: RegionFlags { read: true, write: true, mmap: true },
        capabilities: shown_bytes.map(area).into_iter().collect(),
    }
}

fn model() -> Model {
    let bar =
        |index| Bar { index, address: 16 * MIB, size_bytes: MIB, is_memory: true, is_prefetchable: true };
    Model {
        function: Function {
            address: address(),
            vendor_id: 0x10de,
            device_id: 0x2941,
            class: 0x03_02_00,
            driver: Some(DRIVER.into()),
            iommu_group: None,
            numa_node: None,
            bars: vec![bar(0), bar(USABLE_REGION)],
            link: None,
            drm_nodes: Vec::new(),
            memory_enabled: Some(true),
            answers: Some(true),
            virtio_features: None,
        },
        regions: vec![
            region(0, 4 * MIB, None),
            region(RESERVED_REGION, 8 * MIB, Some(5 * MIB)),
            region(USABLE_REGION, 4 * MIB, Some(3 * MIB)),
            region(7, 4096, None),
        ],
        config: vec![0; 4096],
        registers: Mutex::new([READY].into()),
        looks: Mutex::default(),
    }
}

impl Model {
    fn saying(registers: &[(u32, u32)]) -> Self {
        Self { registers: Mutex::new(registers.iter().copied().collect()), ..model() }
    }

    /// With the CXL capability, whose word of status says so.
    fn with_cxl(mut self, status: u32) -> Self {
        self.config[0x100..0x104].copy_from_slice(&0x0001_0023_u32.to_le_bytes());
        self.config[0x104..0x106].copy_from_slice(&0x1e98_u16.to_le_bytes());
        self.config[0x11c..0x120].copy_from_slice(&status.to_le_bytes());
        self
    }

    fn device(self) -> Device<Model> {
        Device::on(self, false).map_err(Error::from).unwrap()
    }
}

fn address() -> PciAddress {
    "0009:01:00.0".parse().unwrap()
}

/// What the model says of each call that has no other answer, by which it is known which call it was.
fn asked<T>(what: &'static str) -> Result<T> {
    Err(Error::new(Kind::Os, "ask a model", what))
}

impl Exporter for Model {
    fn name(&self) -> String {
        "a model".into()
    }

    fn pci_address(&self) -> Option<PciAddress> {
        Some(address())
    }

    fn regions(&self) -> &[Region] {
        &self.regions
    }

    fn export(&self, ranges: &DmaRanges) -> Result<DmaBuf> {
        let errno = if ranges.region_index() == 0 { 16 } else { ENODEV };
        Err(Error::new(Kind::Os, "ask a model", "export").raw_errno(errno))
    }

    fn map(&self, ranges: &DmaRanges) -> Result<Arc<Mapping>> {
        Ok(Arc::new(Mapping::of_host_memory(ranges.size_bytes() as usize)?))
    }

    fn check_reachable(&self) -> Result<()> {
        asked("check_reachable")
    }

    fn cpu_access(&self, _region_index: u32) -> CpuAccess {
        CpuAccess::Uncached
    }

    fn shadow(&self) -> Result<()> {
        asked("shadow")
    }

    fn unshadow(&self) -> Result<()> {
        asked("unshadow")
    }

    fn retire_mappings(&self) -> Result<()> {
        asked("retire_mappings")
    }

    fn close_device(&self) -> Result<()> {
        asked("close_device")
    }

    fn interrupts(&self) -> Result<Interrupts> {
        asked("interrupts")
    }
}

impl Base for Model {
    fn address(&self) -> PciAddress {
        address()
    }

    fn function(&self) -> Result<Function> {
        Ok(self.function.clone())
    }

    fn region(&self, index: u32) -> Result<&Region> {
        let missing = || Error::new(Kind::NotFound, "ask a model", "no such region");
        self.regions.iter().find(|region| region.index == index).ok_or_else(missing)
    }

    fn read(&self, region_index: u32, offset_bytes: u64, into: &mut [u8]) -> Result<()> {
        let mut registers = self.registers.lock().unwrap();
        let now = registers[0];
        match (region_index, offset_bytes) {
            (0, 0x1498) => {
                *self.looks.lock().unwrap() += 1;
                into.copy_from_slice(&now.0.to_le_bytes());
            }
            (0, 0x200bc) => {
                into.copy_from_slice(&now.1.to_le_bytes());
                if registers.len() > 1 {
                    registers.pop_front();
                }
            }
            (7, offset) => into.copy_from_slice(&self.config[offset as usize..][..into.len()]),
            other => panic!("nobody looks there: {other:x?}"),
        }
        Ok(())
    }
}

/// What was told until the device was ready.
fn told(device: &Device<Model>) -> Result<Vec<NotReady>> {
    let mut told = Vec::new();
    device.wait_until_ready(&mut |why| told.push(why.clone()))?;
    Ok(told)
}

fn ranges(index: u32, offset_bytes: u64, length_bytes: u64) -> DmaRanges {
    // Against what is reported, as somebody would who knows nothing of this family.
    let shown = model().regions.into_iter().find(|region| region.index == index).unwrap();
    DmaRanges::new(&shown, &[DmaRange::new(offset_bytes, length_bytes)]).unwrap()
}

#[test]
fn a_device_is_what_its_driver_shows() {
    let device = model().device();
    assert_eq!(device.part().unwrap().name, "GB200");
    let memories: Vec<_> = device.memories().iter().map(|one| (one.region_index, one.length_bytes)).collect();
    assert_eq!(memories, [(RESERVED_REGION, 5 * MIB), (USABLE_REGION, 3 * MIB)]);
    assert_eq!(device.usable().unwrap().region_index, USABLE_REGION);
    assert_eq!(device.memory(0), None);
    assert_eq!(device.fall_back(), None);
    let lengths: Vec<_> = device.regions().iter().map(|region| (region.index, region.size_bytes)).collect();
    assert_eq!(
        lengths,
        [(0, 4 * MIB), (RESERVED_REGION, 5 * MIB), (USABLE_REGION, 3 * MIB), (7, 4096)],
        "the lengths that they have"
    );
    assert_eq!(device.region(USABLE_REGION).unwrap().size_bytes, 3 * MIB);
    assert_eq!(device.region(5).unwrap_err().kind(), Kind::NotFound);
    assert_eq!(device.name(), "a model");
    assert_eq!(device.pci_address(), Some(address()));
}

#[test]
fn memories_are_told_from_bars() {
    let device = model().device();
    let of = |index| (device.cpu_access(index), device.provider_bar(index));
    assert_eq!(of(USABLE_REGION), (CpuAccess::Cached, PROVIDER_BAR));
    assert_eq!(of(RESERVED_REGION), (CpuAccess::WriteCombined, PROVIDER_BAR));
    assert_eq!(of(1), (CpuAccess::Uncached, 1));
    assert_eq!(of(7), (CpuAccess::Uncached, 7));
}

#[test]
fn another_drivers_device_is_given_back() {
    for driver in [None, Some("vfio-pci".to_owned())] {
        let mut other = model();
        other.function.driver = driver.clone();
        let (given_back, error) = Device::on(other, false).map(|_| ()).unwrap_err().into_parts();
        assert_eq!(given_back.function.driver, driver);
        assert_eq!(error.kind(), Kind::Unsupported);
        assert!(error.why().contains(driver.as_deref().unwrap_or("no driver")), "{error}");
        assert_eq!(error.device(), Some("0009:01:00.0"));
    }
    assert!(!Device::is_bound("ffff:ff:1f.7".parse().unwrap()), "nothing is there");
}

#[test]
fn a_gpu_without_a_memory_says_why() {
    let mut plain = model();
    plain.regions.retain(|region| region.capabilities.is_empty());
    let device = plain.device();
    assert_eq!(device.memories(), []);
    let why = device.fall_back().unwrap();
    assert!(why.contains("the firmware names no memory"), "{why}");
    assert_eq!(device.usable().unwrap_err().why(), why);
    let mut without_usable = model();
    without_usable.regions.retain(|region| region.index != USABLE_REGION);
    let error = without_usable.device().usable().unwrap_err();
    assert_eq!((error.kind(), error.why()), (Kind::NotFound, "it shows only a reserved memory"));
}

#[test]
fn nothing_is_lent_that_has_no_memory_behind_it() {
    let device = model().device();
    let why = |result: Result<()>| result.unwrap_err().why().to_owned();
    for index in [RESERVED_REGION, USABLE_REGION] {
        let real = device.memory(index).unwrap().length_bytes;
        assert_eq!(device.map(&ranges(index, 0, real)).unwrap().len() as u64, real);
        let beyond = ranges(index, real, MIB);
        assert!(why(device.map(&beyond).map(drop)).contains("ends beyond the memory"));
        assert!(why(device.export(&beyond).map(drop)).contains("ends beyond the memory"));
    }
    // Behind the usable memory lies the reserved one, and nothing behind that.
    let across = why(device.map(&ranges(USABLE_REGION, 2 * MIB, 2 * MIB)).map(drop));
    assert!(across.contains("what follows is reserved, in region 2"), "{across}");
    let end = why(device.map(&ranges(RESERVED_REGION, 4 * MIB, 2 * MIB)).map(drop));
    assert!(end.contains("ends beyond the memory"), "{end}");
    // A BAR has what it reports.
    assert_eq!(device.map(&ranges(0, 3 * MIB, MIB)).unwrap().len() as u64, MIB);
}

#[test]
fn a_memory_whose_bar_is_missing_cannot_be_exported_and_the_error_says_so() {
    let device = model().device();
    let error = |index| device.export(&ranges(index, 0, MIB)).unwrap_err();
    let without_bar = error(RESERVED_REGION);
    assert_eq!((without_bar.kind(), without_bar.raw_os_error()), (Kind::Unsupported, Some(ENODEV)));
    assert!(without_bar.why().contains("no real BAR 2"), "{without_bar}");
    // There is a BAR 4, so that ENODEV says something else; and EBUSY always does.
    assert_eq!((error(USABLE_REGION).kind(), error(USABLE_REGION).why()), (Kind::Os, "export"));
    let mut without_bars = model();
    without_bars.function.bars.clear();
    let busy = without_bars.device().export(&ranges(0, 0, MIB)).unwrap_err();
    assert_eq!((busy.kind(), busy.raw_os_error()), (Kind::Os, Some(16)));
}

#[test]
fn what_is_the_drivers_is_asked_of_it() {
    let device = model().device();
    let calls = [
        ("check_reachable", device.check_reachable()),
        ("shadow", device.shadow()),
        ("unshadow", device.unshadow()),
        ("retire_mappings", device.retire_mappings()),
        ("close_device", device.close_device()),
        ("interrupts", device.interrupts().map(drop)),
    ];
    for (call, answer) in calls {
        assert_eq!(answer.unwrap_err().why(), call);
    }
}

#[test]
fn a_wait_tells_each_reason_once_and_ends_when_the_device_is_ready() {
    assert_eq!(told(&model().device()).unwrap(), []);
    let device = Model::saying(&[NO_LINK, NO_LINK, NO_LINK, TRAINING, TRAINING, READY]).device();
    let reasons: Vec<_> = told(&device).unwrap().into_iter().map(|why| why.reason).collect();
    assert_eq!(
        reasons,
        ["the C2C link is not up (register 0x0)", "the memory is being trained (register 0x1)"]
    );
    // And looked no more.
    assert_eq!(*device.base().looks.lock().unwrap(), 6);
}

#[test]
fn a_reason_that_lasts_is_told_again_after_a_second() {
    let begun = Instant::now();
    // 50 ms from look to look.
    let looks: Vec<_> = [NO_LINK; 21].into_iter().chain([READY]).collect();
    let told = told(&Model::saying(&looks).device()).unwrap();
    let seconds = begun.elapsed().as_secs() as usize;
    assert!(told.len() >= 2 && told.len() <= 1 + seconds, "{told:?}");
    let between = told[1].waited - told[0].waited;
    assert!(between >= Duration::from_secs(1), "{told:?}");
}

#[test]
fn where_to_look_is_found_in_the_configuration_space() {
    // Ready by its capability, whatever the registers say.
    assert_eq!(told(&Model::saying(&[NO_LINK]).with_cxl(3).device()).unwrap(), []);
    let error = told(&model().with_cxl(u32::MAX).device()).unwrap_err();
    assert_eq!((error.kind(), error.device()), (Kind::Gone, Some("0009:01:00.0")));
}

#[test]
fn an_adopted_device_is_its_owners_to_wait_for() {
    let device = Device::on(Model::saying(&[NO_LINK]), true).map_err(Error::from).unwrap();
    assert_eq!(told(&device).unwrap(), []);
    assert_eq!(*device.base().looks.lock().unwrap(), 0);
}
