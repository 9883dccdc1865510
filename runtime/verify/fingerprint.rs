//! `Fingerprint`: what a certificate was made under, as lines of `what: value`, and how two differ.
//!
//! Whatever is in it and changes voids the certificate. What cannot be read is in it as "unknown", so that
//! its turning up is a change, too.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;

use peervram_backends::PciAddress;
use peervram_backends::pci::Function;
use peervram_backends::topology::{Place, Reading, Search, Topology};
use serde::{Deserialize, Serialize};

use super::text::clean;

/// The line that a certificate may be made to ignore.
pub(crate) const BOOT: &str = "the boot";
/// The line that only the importer itself can tell.
pub(crate) const DRIVER: &str = "the importer's driver";

/// What the path between two devices depends on, as far as this machine tells.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Fingerprint(BTreeMap<String, String>);

/// One way in which things are not as they were.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Void {
    what: String,
    then: Option<String>,
    now: Option<String>,
}

impl Void {
    /// What changed: "the kernel command line".
    pub fn what(&self) -> &str {
        &self.what
    }
}

impl fmt::Display for Void {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.then, &self.now) {
            (Some(then), Some(now)) => write!(f, "{} was {then} and is {now}", self.what),
            (Some(then), None) => write!(f, "{} was {then} and is not there any more", self.what),
            (None, Some(now)) => write!(f, "{} was not there and is {now}", self.what),
            (None, None) => write!(f, "{} is unknown", self.what),
        }
    }
}

impl Fingerprint {
    /// The fingerprint of the machine now: the two devices and the bridges between them. Devices that are not on the PCI
    /// bus have nothing to tell. `driver` is what is known of the importer's user-space driver.
    pub fn now(lender: Option<PciAddress>, importer: Option<PciAddress>, driver: Option<String>) -> Self {
        let devices: Vec<PciAddress> = lender.into_iter().chain(importer).collect();
        // The ways up are enough; the whole tree says which device is gone.
        match Topology::read_above(&devices).or_else(|_| Topology::read()) {
            Ok(topology) => Self::of(&topology, lender, importer, driver),
            // A machine without a PCI bus has a kernel all the same.
            Err(_) => {
                let read = |path: &str| match fs::read_to_string(path) {
                    Ok(text) => Reading::Known(text.trim().to_owned()),
                    Err(error) => Reading::Unread(error.to_string()),
                };
                let mut lines = Self::default();
                lines.add_reading("the kernel", &read("/proc/sys/kernel/osrelease"));
                lines.add_reading("the kernel command line", &read("/proc/cmdline"));
                lines.add_reading(BOOT, &read("/proc/sys/kernel/random/boot_id"));
                lines.add(DRIVER, driver.unwrap_or_else(|| "unknown".into()));
                lines
            }
        }
    }

    /// Like [`Fingerprint::now`], with the PCI tree taken from `topology`.
    pub fn of(
        topology: &Topology,
        lender: Option<PciAddress>,
        importer: Option<PciAddress>,
        driver: Option<String>,
    ) -> Self {
        let mut lines = Self::default();
        lines.add_reading("the kernel", &topology.kernel_release);
        lines.add_reading("the kernel command line", &topology.command_line);
        lines.add_reading(BOOT, &topology.boot_id);
        let microcode = match &topology.cpu {
            Reading::Known(cpu) => {
                let name = cpu.name.as_deref().unwrap_or("a processor");
                format!("{} of {name}", cpu.microcode.as_deref().unwrap_or("unknown"))
            }
            Reading::Unread(why) => unknown(why),
        };
        lines.add("the microcode", microcode);
        lines.add(DRIVER, driver.unwrap_or_else(|| "unknown".into()));
        for address in lender.into_iter().chain(importer) {
            lines.add_device(topology, address);
        }
        lines
    }

    /// Adds a line; of two about the same the later one stays.
    pub fn add(&mut self, what: impl AsRef<str>, value: impl AsRef<str>) {
        self.0.insert(clean(what.as_ref()), clean(value.as_ref()));
    }

    /// Its lines, in the order of what they are about.
    pub fn lines(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(what, value)| (&**what, &**value))
    }

    /// The value recorded for `what`.
    pub fn line(&self, what: &str) -> Option<&str> {
        self.0.get(what).map(String::as_str)
    }

    /// Everything that is not in `now` as it is here.
    pub fn changes(&self, now: &Self) -> Vec<Void> {
        let keys: std::collections::BTreeSet<&String> = self.0.keys().chain(now.0.keys()).collect();
        (keys.into_iter())
            .filter(|what| self.0.get(*what) != now.0.get(*what))
            .map(|what| Void {
                what: what.clone(),
                then: self.0.get(what).cloned(),
                now: now.0.get(what).cloned(),
            })
            .collect()
    }

    fn add_reading(&mut self, what: &str, reading: &Reading<String>) {
        match reading {
            Reading::Known(text) if text.trim().is_empty() => self.add(what, "empty"),
            Reading::Known(text) => self.add(what, text.trim()),
            Reading::Unread(why) => self.add(what, unknown(why)),
        }
    }

    /// What a device is, and what is above it up to the host bridge.
    fn add_device(&mut self, topology: &Topology, address: PciAddress) {
        let (way, host_bridge) = match topology.way_up(address) {
            Ok(way) => way,
            Err(why) => return self.add(format!("the device {address}"), unknown(&why)),
        };
        if let Some((place, bridges)) = way.split_first() {
            self.add_function(place);
            let bridges = bridges.iter().map(|bridge| {
                let Function { vendor_id, device_id, .. } = bridge.function;
                format!("{} ({vendor_id:04x}:{device_id:04x})", bridge.address())
            });
            let above: Vec<String> = bridges.chain([host_bridge.to_owned()]).collect();
            self.add(format!("what is above {address}"), above.join(" below "));
        }
        for place in way {
            let acs = match &place.config {
                Reading::Unread(why) => unknown(why),
                Reading::Known(config) => match config.acs() {
                    Search::Found(acs) => format!("{:#06x}", acs.control),
                    Search::Absent => "absent".into(),
                    Search::Unread => unknown("its extended configuration space takes root to read"),
                },
            };
            self.add(format!("ACS control of {}", place.address()), acs);
        }
    }

    fn add_function(&mut self, place: &Place) {
        let (function, address) = (&place.function, place.address());
        self.add(
            format!("the device {address}"),
            format!("{:04x}:{:04x}", function.vendor_id, function.device_id),
        );
        let driver = function.driver.as_deref().map_or("none".into(), |driver| {
            // Drivers that come with the kernel have no version but the kernel's.
            let version = fs::read_to_string(format!("/sys/bus/pci/drivers/{driver}/module/version"));
            version.map_or(driver.to_owned(), |version| format!("{driver} {}", version.trim()))
        });
        self.add(format!("the driver of {address}"), driver);
        for bar in &function.bars {
            self.add(
                format!("BAR {} of {address}", bar.index),
                format!("{:#x} bytes at {:#x}", bar.size_bytes, bar.address),
            );
        }
        // The present speed is left out: GPUs lower it when they have nothing to do.
        let link = function.link.as_ref().map_or("none".into(), |link| {
            format!("{} of {} lanes, at most {}", link.width_lanes, link.max_width_lanes, link.max_speed)
        });
        self.add(format!("the link of {address}"), link);
        let mode = place.iommu_domain.as_deref().unwrap_or("none");
        self.add(format!("the IOMMU mode of {address}"), mode);
    }
}

fn unknown(why: &str) -> String {
    format!("unknown ({why})")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fingerprint(lines: &[(&str, &str)]) -> Fingerprint {
        let mut fingerprint = Fingerprint::default();
        lines.iter().for_each(|&(what, value)| fingerprint.add(what, value));
        fingerprint
    }

    fn sentences(then: &[(&str, &str)], now: &[(&str, &str)]) -> Vec<String> {
        fingerprint(then).changes(&fingerprint(now)).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn equal_ones_have_no_changes() {
        let lines = [("the kernel", "7.3.4"), ("ACS control of 0000:00:02.0", "0x1d")];
        assert!(sentences(&lines, &lines).is_empty());
    }

    #[test]
    fn each_change_is_a_sentence() {
        let then =
            [("ACS control of 0000:00:02.0", "0x1d"), ("the kernel command line", "quiet"), ("old", "1")];
        let now = [
            ("ACS control of 0000:00:02.0", "0x0"),
            ("the kernel command line", "quiet iommu=pt"),
            ("new", "2"),
        ];
        assert_eq!(
            sentences(&then, &now),
            [
                "ACS control of 0000:00:02.0 was 0x1d and is 0x0",
                "new was not there and is 2",
                "old was 1 and is not there any more",
                "the kernel command line was quiet and is quiet iommu=pt",
            ]
        );
    }

    #[test]
    fn what_cannot_be_read_is_unknown_for_a_reason() {
        let mut lines = Fingerprint::default();
        lines.add_reading("the kernel", &Reading::Unread("Permission denied".into()));
        lines.add_reading("the kernel command line", &Reading::Known(" \n".into()));
        let value = lines.line("the kernel").unwrap();
        assert!(value.starts_with("unknown") && value.contains("Permission denied"), "{value}");
        assert_eq!(lines.line("the kernel command line"), Some("empty"));
        // Whoever can read it later has another machine before him, as far as anybody knows.
        let mut now = lines.clone();
        now.add_reading("the kernel", &Reading::Known(" 7.3.4\n".into()));
        assert_eq!(now.line("the kernel"), Some("7.3.4"));
        assert_eq!(lines.changes(&now).len(), 1);
    }

    #[test]
    fn both_devices_and_what_is_above_them_are_in_it() {
        let place = |address: &str, above: serde_json::Value, config: serde_json::Value| {
            let function = serde_json::json!({
                "address": address, "vendor_id": 0x10de, "device_id": 0x2941, "class": 0x03_02_00, "driver": null,
                "iommu_group": null, "numa_node": null, "drm_nodes": [], "memory_enabled": null, "link": {
                    "speed": "2.5 GT/s PCIe", "width_lanes": 8, "max_speed": "32.0 GT/s PCIe", "max_width_lanes": 16,
                },
                "bars": [{
                    "index": 2, "address": 0x1000_0000, "size_bytes": 0x100_0000, "is_memory": true,
                    "is_prefetchable": true,
                }],
            });
            serde_json::json!({
                "function": function, "above": above, "config": config, "iommu_domain": "DMA-FQ",
                "physical_function": null,
            })
        };
        // No capability at all; and the first 64 bytes of a port that may have any.
        let whole = serde_json::json!({"known": {"size_bytes": 256, "bytes": "00".repeat(256)}});
        let cut = serde_json::json!({"known": {"size_bytes": 4096, "bytes": "00".repeat(64)}});
        let port = place("0000:00:02.0", serde_json::json!({"host-bridge": "pci0000:00"}), cut);
        let bridge = serde_json::json!({"bridge": "0000:00:02.0"});
        let card = place("0000:01:00.0", bridge.clone(), whole);
        let mut other = place("0000:01:00.1", bridge, serde_json::json!({"unread": "it sleeps"}));
        other["function"]["driver"] = "a-driver-of-no-kernel".into();
        other["function"]["link"] = serde_json::Value::Null;
        other["iommu_domain"] = serde_json::Value::Null;
        let machine = serde_json::json!({
            "format": "peervram-topology", "version": 1, "kernel_release": {"known": "7.3.4"},
            "command_line": {"known": "quiet"}, "boot_id": {"unread": "no /proc"}, "order": {"known": null},
            "cpu": {"known": {"vendor": null, "family": null, "model": null, "name": null, "microcode": "0x2b"}},
            "places": [port, card, other],
        });
        let topology = Topology::from_json(&machine.to_string()).unwrap();
        let [lender, importer] = ["0000:01:00.0", "0000:01:00.1"].map(|text| text.parse().ok());
        let lines = Fingerprint::of(&topology, lender, importer, None);
        let lines: Vec<String> = lines.lines().map(|(what, value)| format!("{what}: {value}")).collect();
        assert_eq!(
            lines,
            [
                "ACS control of 0000:00:02.0: unknown (its extended configuration space takes root to read)",
                "ACS control of 0000:01:00.0: absent",
                "ACS control of 0000:01:00.1: unknown (it sleeps)",
                "BAR 2 of 0000:01:00.0: 0x1000000 bytes at 0x10000000",
                "BAR 2 of 0000:01:00.1: 0x1000000 bytes at 0x10000000",
                "the IOMMU mode of 0000:01:00.0: DMA-FQ",
                "the IOMMU mode of 0000:01:00.1: none",
                "the boot: unknown (no /proc)",
                "the device 0000:01:00.0: 10de:2941",
                "the device 0000:01:00.1: 10de:2941",
                "the driver of 0000:01:00.0: none",
                "the driver of 0000:01:00.1: a-driver-of-no-kernel",
                "the importer's driver: unknown",
                "the kernel: 7.3.4",
                "the kernel command line: quiet",
                "the link of 0000:01:00.0: 8 of 16 lanes, at most 32.0 GT/s PCIe",
                "the link of 0000:01:00.1: none",
                "the microcode: 0x2b of a processor",
                "what is above 0000:01:00.0: 0000:00:02.0 (10de:2941) below pci0000:00",
                "what is above 0000:01:00.1: 0000:00:02.0 (10de:2941) below pci0000:00",
            ]
        );
        let gone = Fingerprint::of(&topology, "0000:05:00.0".parse().ok(), None, None);
        let says = gone.line("the device 0000:05:00.0");
        assert!(says.is_some_and(|says| says.starts_with("unknown (")), "{says:?}");
    }

    #[test]
    fn two_of_this_moment_are_equal() {
        let now = || Fingerprint::now(None, None, Some("radv Mesa 26.1.6".into()));
        assert!(now().changes(&now()).is_empty());
        assert!(now().lines().any(|(what, _)| what == "the kernel"));
    }
}
