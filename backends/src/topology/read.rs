//! Reads the topology of this machine, out of sysfs and procfs.
//!
//! Nothing is opened but files, and nothing changes. Devices may come and go meanwhile: one that is gone
//! before it was read whole is left out. A device in D3cold is left asleep, and so is a bridge that is suspended, since
//! reading configuration space would wake them.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Read as _;
use std::path::Path;

use super::config_space::{ConfigSpace, MAX_BYTES};
use super::{Above, Cpu, Place, Reading, Topology};
use crate::pci::{Bar, Function, Sleeper, sleeper};
use crate::{Error, Kind, PciAddress, Result};

const SYSFS_DEVICES: &str = "sys/bus/pci/devices";

/// How often the machine is read, if what it says does not fit together.
const ATTEMPTS: usize = 3;

impl Topology {
    /// Reads the topology of this machine.
    ///
    /// Without root it has the first 64 bytes of each configuration space, which says nothing of ACS.
    ///
    /// # Errors
    /// [`Kind::NotFound`] where there is no PCI bus.
    pub fn read() -> Result<Self> {
        Self::read_under(Path::new("/"))
    }

    /// Reads these functions and the bridges above them: enough to tell whether requests between them stay below
    /// a bridge, and much less to read.
    ///
    /// # Errors
    /// [`Kind::NotFound`] where one of them is not there.
    pub fn read_above(functions: &[PciAddress]) -> Result<Self> {
        Self::read_above_under(Path::new("/"), functions)
    }

    /// The same of a machine whose `sys` and `proc` are below `root`.
    pub(super) fn read_above_under(root: &Path, functions: &[PciAddress]) -> Result<Self> {
        let devices = root.join(SYSFS_DEVICES);
        let mut places: Vec<Place> = Vec::new();
        for &function in functions {
            let mut at = Some(function);
            while let Some(address) = at.filter(|at| places.iter().all(|place| place.address() != *at)) {
                let place = read_place(&devices, address).ok_or_else(|| {
                    Error::new(Kind::NotFound, "find a PCI device", "it is not there, or goes").on(address)
                })?;
                at = match place.above {
                    Above::Bridge(bridge) => Some(bridge),
                    Above::HostBridge(_) => None,
                };
                places.push(place);
            }
        }
        let order = Reading::Unread("not all functions were read".into());
        Ok(Self { is_whole: false, ..Self::of(root, places, order) })
    }

    /// Reads the topology of a machine whose `sys` and `proc` are below `root`.
    ///
    /// A device that comes or goes between the two leaves the order unknown, so it is tried again.
    pub(super) fn read_under(root: &Path) -> Result<Self> {
        let mut topology = Self::read_once(root)?;
        for _ in 1..ATTEMPTS {
            if topology.order != Reading::Known(()) {
                topology = Self::read_once(root)?;
            }
        }
        Ok(topology)
    }

    fn read_once(root: &Path) -> Result<Self> {
        let devices = root.join(SYSFS_DEVICES);
        let entries = fs::read_dir(&devices).map_err(|error| {
            Error::os("list PCI devices", error)
                .on(devices.display())
                .next("peervram route --tree FILE looks at a captured machine")
        })?;
        let mut addresses: Vec<PciAddress> =
            entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
        addresses.sort_unstable();
        let mut places: Vec<Place> =
            addresses.into_iter().filter_map(|address| read_place(&devices, address)).collect();
        let order = match fs::read_to_string(root.join("proc/bus/pci/devices")) {
            Ok(text) => put_in_order(&mut places, &text),
            Err(error) => Reading::Unread(format!("/proc/bus/pci/devices: {error}")),
        };
        Ok(Self::of(root, places, order))
    }

    /// Functions that were read, and what the machine below `root` says beside them.
    fn of(root: &Path, places: Vec<Place>, order: Reading<()>) -> Self {
        Self {
            kernel_release: line(root, "proc/sys/kernel/osrelease"),
            command_line: line(root, "proc/cmdline"),
            boot_id: line(root, "proc/sys/kernel/random/boot_id"),
            cpu: match fs::read_to_string(root.join("proc/cpuinfo")) {
                Ok(text) => Reading::Known(parse_cpu(&text)),
                Err(error) => Reading::Unread(format!("/proc/cpuinfo: {error}")),
            },
            places,
            order,
            is_whole: true,
            is_captured: false,
        }
    }
}

fn line(root: &Path, name: &str) -> Reading<String> {
    match fs::read_to_string(root.join(name)) {
        Ok(text) => Reading::Known(text.trim().to_owned()),
        Err(error) => Reading::Unread(format!("/{name}: {error}")),
    }
}

/// None if the device is gone by now.
fn read_place(devices: &Path, address: PciAddress) -> Option<Place> {
    let function = Function::read_from(devices, address).ok()?;
    let folder = devices.join(address.to_string());
    let link = |name: &str| fs::canonicalize(folder.join(name)).ok();
    let sleeper = sleeper(&folder);
    Some(Place {
        function,
        above: above(&fs::canonicalize(&folder).ok()?)?,
        config: match sleeper {
            Some(sleeper) => Reading::Unread(sleeper.to_string()),
            None => read_config(&folder),
        },
        sleeper: sleeper.map(Sleeper::address),
        iommu_domain: fs::read_to_string(folder.join("iommu_group/type"))
            .ok()
            .map(|text| text.trim().to_owned()),
        physical_function: link("physfn").and_then(|path| path.file_name()?.to_str()?.parse().ok()),
    })
}

/// What the function in `folder` hangs from: sysfs nests as the buses do.
fn above(folder: &Path) -> Option<Above> {
    let parent = folder.parent()?.file_name()?.to_str()?;
    Some(match parent.parse() {
        Ok(bridge) => Above::Bridge(bridge),
        Err(_) => Above::HostBridge(parent.to_owned()),
    })
}

fn read_config(folder: &Path) -> Reading<ConfigSpace> {
    let read = || -> std::io::Result<Reading<ConfigSpace>> {
        let file = File::open(folder.join("config"))?;
        let size_bytes = file.metadata()?.len() as usize;
        let mut bytes = Vec::new();
        file.take(MAX_BYTES as u64).read_to_end(&mut bytes)?;
        Ok(match ConfigSpace::new(bytes, size_bytes) {
            Ok(config) => Reading::Known(config),
            Err(why) => Reading::Unread(why),
        })
    };
    read().unwrap_or_else(|error| Reading::Unread(error.to_string()))
}

/// Puts functions in the order in which the kernel found them, which is that of its buses' lists. Addresses
/// are not it: a device that was removed and found again is the last on its bus.
///
/// `/proc/bus/pci/devices` names no domains, so that functions are told apart by their BARs, too.
fn put_in_order(places: &mut Vec<Place>, text: &str) -> Reading<()> {
    let mut rows: HashMap<Row, Vec<usize>> = HashMap::new();
    for (number, line) in text.lines().enumerate() {
        match Row::parse(line) {
            Some(row) => rows.entry(row).or_default().push(number),
            None => return Reading::Unread(format!("/proc/bus/pci/devices says {line:?}")),
        }
    }
    let mut numbers = Vec::new();
    for place in places.iter() {
        match rows.get(&Row::of(&place.function)).map(Vec::as_slice) {
            Some(&[number]) => numbers.push(number),
            Some(_) => {
                let why = "two functions in different domains look the same in /proc/bus/pci/devices";
                return Reading::Unread(format!("{why}: {}", place.address()));
            }
            None => return Reading::Unread(format!("{} is not in /proc/bus/pci/devices", place.address())),
        }
    }
    let mut ordered: Vec<(usize, Place)> = numbers.into_iter().zip(places.drain(..)).collect();
    ordered.sort_by_key(|(number, _)| *number);
    places.extend(ordered.into_iter().map(|(_, place)| place));
    Reading::Known(())
}

/// What tells functions apart there.
#[derive(PartialEq, Eq, Hash)]
struct Row {
    bus: u8,
    device_and_function: u8,
    vendor_id: u16,
    device_id: u16,
    bars: [u64; 6],
}

impl Row {
    /// `show_device` in `drivers/pci/proc.c`.
    fn parse(line: &str) -> Option<Self> {
        let mut words = line.split_whitespace();
        let place = u16::from_str_radix(words.next()?, 16).ok()?;
        let id = u32::from_str_radix(words.next()?, 16).ok()?;
        let _interrupt = words.next()?;
        let mut bars = [0; 6];
        for bar in &mut bars {
            *bar = u64::from_str_radix(words.next()?, 16).ok()? & !0xf;
        }
        let [bus, device_and_function] = place.to_be_bytes();
        Some(Self { bus, device_and_function, vendor_id: (id >> 16) as u16, device_id: id as u16, bars })
    }

    fn of(function: &Function) -> Self {
        let address = function.address;
        let start = |index: u32| function.bar(index).map_or(0, |bar: &Bar| bar.address & !0xf);
        Self {
            bus: address.bus,
            device_and_function: address.device << 3 | address.function,
            vendor_id: function.vendor_id,
            device_id: function.device_id,
            bars: [0, 1, 2, 3, 4, 5].map(start),
        }
    }
}

/// The first processor.
fn parse_cpu(text: &str) -> Cpu {
    let block = text.split("\n\n").next().unwrap_or_default();
    let value = |key: &str| {
        block.lines().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            (name.trim() == key).then(|| value.trim().to_owned())
        })
    };
    let number = |key: &str| value(key)?.parse().ok();
    Cpu {
        vendor: value("vendor_id"),
        family: number("cpu family"),
        model: number("model"),
        name: value("model name"),
        microcode: value("microcode"),
    }
}
