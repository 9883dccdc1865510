//! `FaultWatch`: what the kernel's log says of two devices while they are tested.
//!
//! An IOMMU that stops a transfer tells the kernel and nobody else; the copy may look fine. The kernel writes
//! down few of many faults (ratelimited).

use std::io::{self, Read};
use std::time::Duration;

use peervram_backends::{KERNEL_LOG, KernelLog, Logged, PciAddress};
use serde::{Deserialize, Serialize};

use super::failure::Failure;
use super::text::clean;

/// How long a fault may take from the device to the log.
const SETTLE: Duration = Duration::from_millis(20);
/// How many messages are kept, and how much of each.
const KEPT: usize = 8;
const KEPT_CHARS: usize = 400;

/// Which IOMMU faults the kernel logged during a test.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Faults {
    /// The kernel's log was watched, and said this of the two devices: mostly nothing.
    Watched(Vec<String>),
    /// The log could not be read, for this reason: faults may have gone unseen.
    NotWatched(String),
}

impl Faults {
    /// The failure that logged faults make of a test, even if its bytes are right.
    pub(crate) fn failure(&self) -> Option<Failure> {
        match self {
            Self::Watched(said) => said.first().map(|message| Failure::Fault { message: message.clone() }),
            Self::NotWatched(_) => None,
        }
    }
}

/// The kernel's log, from now on.
pub(crate) struct FaultWatch {
    log: io::Result<KernelLog>,
    devices: Vec<PciAddress>,
}

impl FaultWatch {
    /// Begins to watch for `devices`.
    pub fn begin(devices: impl IntoIterator<Item = PciAddress>) -> Self {
        Self { log: KernelLog::from_now(), devices: devices.into_iter().collect() }
    }

    /// The faults logged since the watch began.
    pub fn end(self) -> Faults {
        let mut log = match self.log {
            Ok(log) => log,
            Err(error) => return not_watched(&error),
        };
        crate::sync::pause(SETTLE);
        said_of(&self.devices, &mut log)
    }
}

/// The faults of `devices` in what is unread of a log.
fn said_of(devices: &[PciAddress], log: &mut KernelLog<impl Read>) -> Faults {
    let mut said = Vec::new();
    for logged in log.unread() {
        match logged {
            Ok(Logged::Message(message)) => {
                let message = clean(&message.chars().take(KEPT_CHARS).collect::<String>());
                if devices.iter().any(|&device| is_fault_of(&message, device)) {
                    said.push(message);
                }
            }
            Ok(Logged::Lost) => {}
            Err(error) => return not_watched(&error),
        }
    }
    said.truncate(KEPT);
    Faults::Watched(said)
}

fn not_watched(error: &io::Error) -> Faults {
    Faults::NotWatched(format!("{KERNEL_LOG} cannot be read: {error}"))
}

/// Whether a message tells of a transfer of `device` that was stopped, or arrived broken.
fn is_fault_of(message: &str, device: PciAddress) -> bool {
    let lower = message.to_ascii_lowercase();
    let is_fault = ["fault", "invalid_device_request", "illegal_dev_table", "uncorrect"]
        .iter()
        .any(|word| lower.contains(word));
    // AMD-Vi and SMMU write the whole address, VT-d "[02:00.0]" (drivers/iommu/intel/dmar.c), virtio-iommu
    // the number of the endpoint (viommu_fault_handler), which is bus, device and function.
    let full = device.to_string();
    let short = format!("[{:02x}:{:02x}.{:x}]", device.bus, device.device, device.function);
    let endpoint = u32::from(device.bus) << 8 | u32::from(device.device) << 3 | u32::from(device.function);
    let is_named = lower.contains(&full)
        || (device.domain == 0 && (lower.contains(&short) || lower.contains(&format!(" ep {endpoint} "))));
    is_fault && is_named
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::ErrorKind;

    #[test]
    fn faults_of_a_device_are_told_from_other_messages() {
        let device: PciAddress = "0000:02:00.0".parse().unwrap();
        for message in [
            "DMAR: [DMA Write NO_PASID] Request device [02:00.0] fault addr 0xfe000000 [fault reason 0x05] PTE",
            "vfio-pci 0000:02:00.0: AMD-Vi: Event logged [IO_PAGE_FAULT domain=0x000e address=0x0 flags=0x0]",
            "virtio_iommu virtio0: page fault from EP 512 at 0x380000000000 [W]",
            "pcieport 0000:00:01.0: AER: Uncorrectable (Non-Fatal) error received from 0000:02:00.0",
        ] {
            assert!(is_fault_of(message, device), "{message}");
            assert!(!is_fault_of(message, "0000:03:00.0".parse().unwrap()), "{message}");
            assert!(!is_fault_of(message, "0001:02:00.0".parse().unwrap()), "{message}");
        }
        for message in [
            "vfio-pci 0000:02:00.0: enabling device (0000 -> 0002)",
            "pci 0000:02:00.0: Adding to iommu group 3",
        ] {
            assert!(!is_fault_of(message, device), "{message}");
        }
    }

    #[test]
    fn an_endpoints_number_is_its_bus_device_and_function() {
        let device: PciAddress = "0000:02:03.1".parse().unwrap();
        let message =
            |endpoint: u32| format!("virtio_iommu virtio0: page fault from EP {endpoint} at 0x0 [W]");
        for (endpoint, is_it) in [(512 + 24 + 1, true), (512, false), (512 + 24, false), (25, false)] {
            assert_eq!(is_fault_of(&message(endpoint), device), is_it, "{endpoint}");
        }
    }

    /// One record for each read.
    struct Records<'a>(std::slice::Iter<'a, Result<&'a str, ErrorKind>>);

    impl Read for Records<'_> {
        fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
            let record = (*self.0.next().unwrap_or(&Err(ErrorKind::WouldBlock)))?;
            into[..record.len()].copy_from_slice(record.as_bytes());
            Ok(record.len())
        }
    }

    fn said(records: &[Result<&str, ErrorKind>]) -> Faults {
        said_of(&["0000:02:00.0".parse().unwrap()], &mut KernelLog::of(Records(records.iter())))
    }

    /// A hole in the log is no end of it.
    #[test]
    fn an_iommu_fault_fails_a_test_whose_bytes_are_right() {
        const FAULT: &str = "DMAR: [DMA Read NO_PASID] Request device [02:00.0] fault addr 0x0";
        let records = [Ok("6,1,2,-;pci 0000:02:00.0: enabling"), Err(ErrorKind::BrokenPipe)];
        assert_eq!(said(&records).failure(), None);
        let record = format!("3,2,3,-;{FAULT}\n");
        let faults = said(&[records[0], records[1], Ok(&record)]);
        assert_eq!(faults, Faults::Watched(vec![FAULT.into()]));
        assert_eq!(faults.failure(), Some(Failure::Fault { message: FAULT.into() }));
    }

    #[test]
    fn a_log_that_cannot_be_read_is_said() {
        let faults = said(&[Err(ErrorKind::PermissionDenied)]);
        assert!(matches!(&faults, Faults::NotWatched(why) if why.contains("/dev/kmsg")), "{faults:?}");
        assert_eq!(faults.failure(), None);
        // This machine's, one way or the other.
        match FaultWatch::begin(["0000:02:00.0".parse().unwrap()]).end() {
            Faults::Watched(said) => assert!(said.is_empty(), "{said:?}"),
            Faults::NotWatched(why) => assert!(why.contains("/dev/kmsg"), "{why}"),
        }
    }
}
