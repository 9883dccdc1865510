//! Whether the memory may be touched after a reset, and how long that is waited for. Pure: what the device says
//! and the time come in.
//!
//! After a reset the link between CPU and GPU comes up and the memory is trained. Who touches it before raises
//! errors in the machine's log; the driver therefore has the first touch wait, in the kernel, up to these limits.
//! Waiting here first shows what is waited for.
//!
//! ```text
//!   registers   both 0xff within 30 s
//!   CXL         information valid within 1 s, then active within what the device says, up to 256 s
//! ```

use std::time::Duration;

use peervram_backends::{Error, Kind, NotReady, Result};

use crate::dvsec;

// drivers/vfio/pci/nvgrace-gpu/main.c
const C2C_LINK_BAR0_OFFSET: u64 = 0x1498;
const HBM_TRAINING_BAR0_OFFSET: u64 = 0x200bc;
const STATUS_READY: u32 = 0xff;
const REGISTERS_LIMIT: Duration = Duration::from_secs(30);
const INFO_VALID_LIMIT: Duration = Duration::from_secs(1);

// include/linux/pci_ids.h, include/uapi/linux/pci_regs.h
const PCI_VENDOR_ID_CXL: u16 = 0x1e98;
const PCI_DVSEC_CXL_DEVICE: u16 = 0;
const PCI_DVSEC_CXL_RANGE_SIZE_LOW: u64 = 0x1c;
const PCI_DVSEC_CXL_MEM_INFO_VALID: u32 = 0x1;
const PCI_DVSEC_CXL_MEM_ACTIVE: u32 = 0x2;

/// Where a device says whether it is ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sign {
    /// In two registers of BAR 0.
    Registers,
    /// In its CXL capability, at that offset of its configuration space.
    Cxl {
        /// Where the register that says so lies in configuration space.
        offset_bytes: u64,
    },
}

impl Sign {
    /// By its configuration space: newer parts have the capability.
    pub fn of(config: &[u8]) -> Self {
        match dvsec::find(config, PCI_VENDOR_ID_CXL, PCI_DVSEC_CXL_DEVICE) {
            Some(at) => Self::Cxl { offset_bytes: at as u64 + PCI_DVSEC_CXL_RANGE_SIZE_LOW },
            None => Self::Registers,
        }
    }
}

/// A device's answer when it was asked whether it is ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Seen {
    Registers { link: u32, training: u32 },
    Cxl { status: u32 },
}

impl Seen {
    /// Asks by `register`, of BAR 0, or `config`, both by offset in bytes.
    pub fn ask(
        sign: Sign,
        register: impl Fn(u64) -> Result<u32>,
        config: impl Fn(u64) -> Result<u32>,
    ) -> Result<Self> {
        Ok(match sign {
            Sign::Registers => Self::Registers {
                link: register(C2C_LINK_BAR0_OFFSET)?,
                training: register(HBM_TRAINING_BAR0_OFFSET)?,
            },
            Sign::Cxl { offset_bytes } => Self::Cxl { status: config(offset_bytes)? },
        })
    }
}

/// One wait, from its first look on.
#[derive(Debug, Default)]
pub(crate) struct Wait {
    /// When the device said how long it takes, and that.
    active: Option<(Duration, Duration)>,
}

impl Wait {
    /// Whether the device is ready `waited` after the first look; if not, why.
    ///
    /// # Errors
    /// [`Kind::TimedOut`] with the reason; [`Kind::Gone`] where it does not answer.
    pub fn look(&mut self, seen: Seen, waited: Duration) -> Result<Option<NotReady>> {
        let (reason, limit) = match seen {
            Seen::Registers { link: STATUS_READY, training: STATUS_READY } => return Ok(None),
            Seen::Registers { link, training } => (registers_in_words(link, training), REGISTERS_LIMIT),
            Seen::Cxl { status: u32::MAX } => {
                return Err(error(Kind::Gone, "its configuration reads as all ones".into())
                    .next("reset it again, or look at the kernel's log"));
            }
            Seen::Cxl { status } if status & PCI_DVSEC_CXL_MEM_INFO_VALID == 0 => {
                ("its CXL capability says nothing about its memory yet".into(), INFO_VALID_LIMIT)
            }
            Seen::Cxl { status } if status & PCI_DVSEC_CXL_MEM_ACTIVE != 0 => return Ok(None),
            Seen::Cxl { status } => {
                // The limit begins when the device is first seen to know it.
                let (since, takes) = *self.active.get_or_insert((waited, active_limit(status)));
                ("its memory is not active (CXL)".into(), since + takes)
            }
        };
        if waited >= limit {
            let why = format!("not ready after {:.0} s: {reason}", waited.as_secs_f32());
            return Err(error(Kind::TimedOut, why).next(
                "reset it once more; if that does not help, look at the firmware's log: no driver can use it",
            ));
        }
        Ok(Some(NotReady { reason, waited, limit }))
    }
}

fn error(kind: Kind, why: String) -> Error {
    Error::new(kind, "wait for a GPU's memory", why)
}

fn registers_in_words(link: u32, training: u32) -> String {
    if (link, training) == (u32::MAX, u32::MAX) {
        return "its registers read as all ones: it is gone, asleep or in reset".into();
    }
    let part =
        |what: &str, value: u32| (value != STATUS_READY).then(|| format!("{what} (register {value:#x})"));
    let parts = [part("the C2C link is not up", link), part("the memory is being trained", training)];
    parts.into_iter().flatten().collect::<Vec<_>>().join(", ")
}

/// `Memory_Active_Timeout`, bits 15 to 13 (CXL 4.0, 8.1.3.8.2): 1, 4, 16, 64 or 256 s; the rest is reserved.
fn active_limit(status: u32) -> Duration {
    Duration::from_secs(1 << (2 * (status >> 13 & 7).min(4)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn registers(link: u32, training: u32) -> Seen {
        Seen::Registers { link, training }
    }

    #[test]
    fn both_registers_must_say_so() {
        assert_eq!(Wait::default().look(registers(0xff, 0xff), at(0)).unwrap(), None);
        let why = |link, training| Wait::default().look(registers(link, training), at(3)).unwrap().unwrap();
        let not_ready = why(0, 0xff);
        assert_eq!(not_ready.reason, "the C2C link is not up (register 0x0)");
        assert_eq!(
            not_ready.to_string(),
            "not ready after 3.0 s of at most 30 s: the C2C link is not up (register 0x0)"
        );
        assert_eq!(why(0xff, 0x1ff).reason, "the memory is being trained (register 0x1ff)");
        assert!(why(1, 1).reason.contains("link") && why(1, 1).reason.contains("trained"));
        assert!(why(u32::MAX, u32::MAX).reason.contains("all ones"));
    }

    #[test]
    fn a_link_that_never_comes_up_is_given_up_with_the_reason() {
        let mut wait = Wait::default();
        assert!(wait.look(registers(0, 0), Duration::from_millis(29_999)).unwrap().is_some());
        let error = wait.look(registers(0, 0), at(30)).unwrap_err();
        assert_eq!(error.kind(), Kind::TimedOut);
        assert!(error.why().contains("C2C link") && error.next_step().is_some(), "{error}");
    }

    #[test]
    fn newer_parts_say_how_long_they_take() {
        let cxl = |status| Seen::Cxl { status };
        let mut wait = Wait::default();
        assert_eq!(wait.look(cxl(0), at(0)).unwrap().unwrap().limit, at(1));
        // Valid half a second later, and sixteen seconds are asked for.
        let late = Duration::from_millis(500);
        assert_eq!(wait.look(cxl(1 | 2 << 13), late).unwrap().unwrap().limit, at(16) + late);
        // The first reason counts.
        assert_eq!(wait.look(cxl(1 | 4 << 13), at(10)).unwrap().unwrap().limit, at(16) + late);
        assert_eq!(wait.look(cxl(3 | 2 << 13), at(11)).unwrap(), None);
        assert_eq!(wait.look(cxl(1 | 2 << 13), at(17)).unwrap_err().kind(), Kind::TimedOut);
        assert_eq!(Wait::default().look(cxl(0), at(1)).unwrap_err().kind(), Kind::TimedOut);
        assert_eq!(Wait::default().look(cxl(u32::MAX), at(0)).unwrap_err().kind(), Kind::Gone);
    }

    #[test]
    fn reserved_times_are_the_longest() {
        let limits = [0, 1, 2, 3, 4, 5, 7].map(|code| active_limit(code << 13).as_secs());
        assert_eq!(limits, [1, 4, 16, 64, 256, 256, 256]);
    }

    #[test]
    fn the_capability_decides_where_to_look() {
        assert_eq!(Sign::of(&[0; 4096]), Sign::Registers);
        let mut config = vec![0; 4096];
        config[0x100..0x104].copy_from_slice(&0x0001_0023_u32.to_le_bytes());
        config[0x104..0x106].copy_from_slice(&PCI_VENDOR_ID_CXL.to_le_bytes());
        assert_eq!(Sign::of(&config), Sign::Cxl { offset_bytes: 0x11c });
    }
}
