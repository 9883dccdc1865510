//! `Fingerprint`: what a certificate was made under, as lines of `what: value`, and how two differ.
//!
//! Whatever is in it and changes voids the certificate. What cannot be read is in it as "unknown", so that
//! its turning up is a change, too.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;

use peervram_backends::PciAddress;
use peervram_backends::pci::Function;
use serde::{Deserialize, Serialize};

use super::certificate::clean;

/// The line that a certificate may be made to ignore.
pub(crate) const BOOT: &str = "the boot";

/// What the path between two devices depends on, as far as this machine tells.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Fingerprint(BTreeMap<String, String>);

/// One way in which things are not as they were.
#[derive(Debug, Clone, PartialEq, Eq)]
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
    /// Of the machine now, of the two devices, and of what lies between them. Devices that are not on the PCI
    /// bus have nothing to tell. `driver` is what is known of the importer's user-space driver.
    pub fn now(lender: Option<PciAddress>, importer: Option<PciAddress>, driver: Option<String>) -> Self {
        let mut lines = Self::default();
        let read = |path: &str| {
            let text = fs::read_to_string(path).unwrap_or_default();
            if text.trim().is_empty() { "unknown".into() } else { text.trim().to_owned() }
        };
        lines.add("the kernel", rustix::system::uname().release().to_string_lossy());
        lines.add("the kernel command line", read("/proc/cmdline"));
        lines.add(BOOT, read("/proc/sys/kernel/random/boot_id"));
        lines.add("the microcode", microcode(&read("/proc/cpuinfo")));
        lines.add("the importer's driver", driver.unwrap_or_else(|| "unknown".into()));
        for address in lender.into_iter().chain(importer) {
            lines.add_function(address);
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

    fn add_function(&mut self, address: PciAddress) {
        let Ok(function) = Function::read(address) else {
            self.add(format!("the device {address}"), "unknown");
            return;
        };
        self.add(
            format!("the device {address}"),
            format!("{:04x}:{:04x}", function.vendor_id, function.device_id),
        );
        self.add(format!("the driver of {address}"), function.driver.unwrap_or_else(|| "none".into()));
        for bar in &function.bars {
            self.add(
                format!("BAR {} of {address}", bar.index),
                format!("{:#x} bytes at {:#x}", bar.size_bytes, bar.address),
            );
        }
        // The present speed is left out: GPUs lower it when they have nothing to do.
        let link = function.link.map_or("none".into(), |link| {
            format!("{} of {} lanes, at most {}", link.width_lanes, link.max_width_lanes, link.max_speed)
        });
        self.add(format!("the link of {address}"), link);
        let mode = fs::read_to_string(address.sysfs_path().join("iommu_group/type"));
        let mode = mode.map_or("none".into(), |mode| mode.trim().to_owned());
        self.add(format!("the IOMMU mode of {address}"), mode);
    }
}

/// The revision that `/proc/cpuinfo` gives first: all processors have the same, or the kernel complains.
fn microcode(cpuinfo: &str) -> String {
    (cpuinfo.lines())
        .find_map(|line| {
            Some(line.strip_prefix("microcode")?.trim_start_matches([' ', '\t', ':']).to_owned())
        })
        .unwrap_or_else(|| "unknown".into())
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
    fn two_of_this_moment_are_equal() {
        let now = || Fingerprint::now(None, None, Some("radv Mesa 26.1.6".into()));
        assert!(now().changes(&now()).is_empty());
        assert!(now().lines().any(|(what, _)| what == "the kernel"));
    }

    #[test]
    fn microcode_is_the_first_processors() {
        assert_eq!(microcode("processor\t: 0\nmicrocode\t: 0xffffffff\nmicrocode\t: 0x2\n"), "0xffffffff");
        assert_eq!(microcode("processor : 0\n"), "unknown");
    }
}
