//! `ConfigSpace`: a function's configuration space, as far as it could be read.
//!
//! Pure. The kernel shows all of it to root and the first 64 bytes to others (`pci_read_config`), and what
//! was not read is never taken for what is not there: a [`Search`] says which. Nothing in it is trusted:
//! chains end, whatever they link to.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// Its size on conventional PCI.
const CONVENTIONAL_BYTES: usize = 256;
/// Its size on PCI Express.
pub const MAX_BYTES: usize = 4096;

// include/uapi/linux/pci_regs.h
const PCI_STATUS: usize = 0x06;
const PCI_STATUS_CAP_LIST: u16 = 1 << 4;
const PCI_HEADER_TYPE: usize = 0x0e;
const PCI_CAPABILITY_LIST: usize = 0x34;
const PCI_STD_HEADER_SIZEOF: usize = 0x40;
const PCI_CAP_ID_EXP: u8 = 0x10;
const PCI_EXP_FLAGS: usize = 0x02;
const PCI_EXP_DEVCAP: usize = 0x04;
const PCI_EXP_DEVCTL: usize = 0x08;
const PCI_EXP_LNKCAP: usize = 0x0c;
const PCI_EXP_LNKSTA: usize = 0x12;
const PCI_EXT_CAP_ID_ACS: u16 = 0x0d;
const PCI_ACS_CAP: usize = 0x04;
const PCI_ACS_CTRL: usize = 0x06;
const PCI_EXT_CAP_ID_REBAR: u16 = 0x15;
const PCI_CAP_ID_VPD: u8 = 0x03;
const PCI_VPD_DATA: usize = 0x04;
const PCI_EXT_CAP_ID_DSN: u16 = 0x03;
const PCI_DSN_SERIAL: usize = 0x04;

/// The kernel gives up a chain of capabilities after so many (`PCI_FIND_CAP_TTL`), and of extended ones.
const CHAIN_MAX: usize = 48;
const EXTENDED_CHAIN_MAX: usize = (MAX_BYTES - CONVENTIONAL_BYTES) / 8;

/// A function's configuration space.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Written", into = "Written")]
pub struct ConfigSpace {
    /// What could be read, from the start. Shared: a topology is copied for each thing that might change.
    bytes: Arc<Vec<u8>>,
    /// How large it is.
    size_bytes: usize,
}

/// The text form used in a captured tree.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    size_bytes: usize,
    /// Two hexadecimal digits for each byte that could be read.
    bytes: String,
}

/// Where something is in a configuration space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Search<T> {
    /// There.
    Found(T),
    /// Nowhere.
    Absent,
    /// Beyond what could be read.
    Unread,
}

impl<T> Search<T> {
    /// What was found.
    pub fn found(self) -> Option<T> {
        match self {
            Self::Found(value) => Some(value),
            Self::Absent | Self::Unread => None,
        }
    }

    fn and_then<U>(self, next: impl FnOnce(T) -> Search<U>) -> Search<U> {
        match self {
            Self::Found(value) => next(value),
            Self::Absent => Search::Absent,
            Self::Unread => Search::Unread,
        }
    }
}

/// What a PCI Express function is, `PCI_EXP_TYPE_*`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PortType {
    /// An endpoint.
    Endpoint,
    /// A root port.
    RootPort,
    /// A switch's port to the root.
    Upstream,
    /// A switch's port away from the root.
    Downstream,
    /// From PCI Express to conventional PCI.
    ToPci,
    /// From conventional PCI to PCI Express.
    FromPci,
    /// An endpoint on a root bus.
    RootComplexEndpoint,
    /// Any other, by its number.
    Other(u8),
}

/// Access control services: what a port does with peer-to-peer requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Acs {
    /// Where the capability begins.
    pub offset: u16,
    /// What the port can do, `PCI_ACS_CAP`.
    pub capabilities: u16,
    /// What it is told to do, `PCI_ACS_CTRL`.
    pub control: u16,
}

impl Acs {
    /// P2P request redirect.
    pub const REQUEST_REDIRECT: u16 = 0x04;
    /// P2P completion redirect.
    pub const COMPLETION_REDIRECT: u16 = 0x08;
    /// P2P egress control.
    pub const EGRESS_CONTROL: u16 = 0x20;

    /// All that send peer-to-peer requests up.
    pub const REDIRECTS: u16 = Self::REQUEST_REDIRECT | Self::COMPLETION_REDIRECT | Self::EGRESS_CONTROL;

    /// What the kernel wants before it takes functions for isolated: source validation, both redirects,
    /// upstream forwarding (`REQ_ACS_FLAGS`).
    const ISOLATION: u16 = 0x01 | Self::REQUEST_REDIRECT | Self::COMPLETION_REDIRECT | 0x10;

    /// The bits, with the names that `lspci` gives them.
    const NAMES: [(u16, &'static str); 7] = [
        (0x01, "SrcValid"),
        (0x02, "TransBlk"),
        (Self::REQUEST_REDIRECT, "ReqRedir"),
        (Self::COMPLETION_REDIRECT, "CmpltRedir"),
        (0x10, "UpstreamFwd"),
        (Self::EGRESS_CONTROL, "EgressCtrl"),
        (0x40, "DirectTrans"),
    ];

    /// Whether it sends peer-to-peer requests up to the host bridge, as the kernel asks
    /// (`pci_bridge_has_acs_redir`).
    pub fn redirects(self) -> bool {
        self.control & Self::REDIRECTS != 0
    }

    /// Whether it keeps what is below it apart, as the kernel asks (`pci_acs_flags_enabled`): what it cannot
    /// do counts as done for good.
    pub fn isolates(self) -> bool {
        let wanted = Self::ISOLATION & self.capabilities;
        self.control & wanted == wanted
    }

    /// What it is told to do, in `lspci`'s words.
    pub fn control_names(self) -> Vec<&'static str> {
        Self::NAMES.iter().filter(|(bit, _)| self.control & bit != 0).map(|&(_, name)| name).collect()
    }
}

/// A PCI Express link, as one of its ends has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinkRegisters {
    /// Speed now, 1 for 2.5 GT/s up to 6 for 64.
    pub speed: u8,
    /// Width now, in lanes.
    pub width_lanes: u8,
    /// The highest speed of this end.
    pub max_speed: u8,
    /// The greatest width of this end, in lanes.
    pub max_width_lanes: u8,
}

/// How long a packet's payload may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MaxPayload {
    /// As it is set, in bytes.
    pub now_bytes: u32,
    /// At most, in bytes.
    pub supported_bytes: u32,
}

/// A BAR that can have other sizes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResizableBar {
    /// The BAR's number.
    pub index: u8,
    /// The sizes that it may have, in bytes, the smallest first.
    pub sizes_bytes: Vec<u64>,
    /// Its size now, in bytes.
    pub now_bytes: u64,
}

impl ConfigSpace {
    /// `bytes` from the start of a configuration space of `size_bytes`.
    ///
    /// # Errors
    /// More bytes than it has, or a size that no configuration space has.
    pub fn new(bytes: Vec<u8>, size_bytes: usize) -> Result<Self, String> {
        if !matches!(size_bytes, CONVENTIONAL_BYTES | MAX_BYTES) {
            return Err(format!("a configuration space has 256 or 4096 bytes, not {size_bytes}"));
        }
        if bytes.len() > size_bytes {
            return Err(format!("{} bytes of a configuration space of {size_bytes}", bytes.len()));
        }
        Ok(Self { bytes: Arc::new(bytes), size_bytes })
    }

    /// What could be read.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Whether all of it was read.
    pub fn is_whole(&self) -> bool {
        self.bytes.len() == self.size_bytes
    }

    /// Whether the function does not answer: it fell off the bus, or sleeps too deeply.
    pub fn is_all_ones(&self) -> bool {
        !self.bytes.is_empty() && self.bytes.iter().all(|&byte| byte == 0xff)
    }

    /// Whether it is a bridge, by its header's type.
    pub fn is_bridge(&self) -> Option<bool> {
        Some(self.bytes.get(PCI_HEADER_TYPE)? & 0x7f == 1)
    }

    /// Whether its device has several functions, by its header's type.
    pub fn is_multifunction(&self) -> Option<bool> {
        Some(self.bytes.get(PCI_HEADER_TYPE)? & 0x80 != 0)
    }

    /// Whether a bridge's port is a slot that a card can be put into, `PCI_EXP_FLAGS_SLOT`.
    pub fn is_slot(&self) -> Search<bool> {
        self.express(PCI_EXP_FLAGS).and_then(|flags| Search::Found(flags & 0x100 != 0))
    }

    /// Clears bits of its ACS control register, where it has one: as it would read then.
    pub(super) fn clear_acs_control(&mut self, bits: u16) {
        if let Search::Found(acs) = self.acs() {
            let at = usize::from(acs.offset) + PCI_ACS_CTRL;
            Arc::make_mut(&mut self.bytes)[at..at + 2].copy_from_slice(&(acs.control & !bits).to_le_bytes());
        }
    }

    /// Writes zeros over the numbers that tell one card from the next of its kind: the device's serial number (PCI Express
    /// 7.9.3), and what was read last of its vital product data (PCI 3.0, appendix I).
    pub(super) fn forget_serial_number(&mut self) {
        let serial = self.extended_capability(PCI_EXT_CAP_ID_DSN).found().map(|at| (at + PCI_DSN_SERIAL, 8));
        let product_data = self.capability(PCI_CAP_ID_VPD).found().map(|at| (at + PCI_VPD_DATA, 4));
        for (at, length) in [serial, product_data].into_iter().flatten() {
            let bytes = Arc::make_mut(&mut self.bytes);
            let end = bytes.len().min(at + length);
            if let Some(bytes) = bytes.get_mut(at..end) {
                bytes.fill(0);
            }
        }
    }

    /// Where its capability of this kind begins.
    pub fn capability(&self, id: u8) -> Search<usize> {
        let Some(status) = self.word(PCI_STATUS) else { return Search::Unread };
        if status & PCI_STATUS_CAP_LIST == 0 {
            return Search::Absent;
        }
        let Some(&first) = self.bytes.get(PCI_CAPABILITY_LIST) else { return Search::Unread };
        let mut at = usize::from(first);
        for _ in 0..CHAIN_MAX {
            if at < PCI_STD_HEADER_SIZEOF {
                break;
            }
            at &= !3;
            let Some(entry) = self.word(at) else { return Search::Unread };
            let [found, next] = entry.to_le_bytes();
            match found {
                0xff => break,
                found if found == id => return Search::Found(at),
                _ => at = usize::from(next),
            }
        }
        Search::Absent
    }

    /// Where its extended capability of this kind begins.
    pub fn extended_capability(&self, id: u16) -> Search<usize> {
        if self.size_bytes == CONVENTIONAL_BYTES {
            return Search::Absent;
        }
        let mut at = CONVENTIONAL_BYTES;
        for _ in 0..EXTENDED_CHAIN_MAX {
            if at < CONVENTIONAL_BYTES {
                break;
            }
            let Some(header) = self.double_word(at) else { return Search::Unread };
            if header == 0 {
                break;
            }
            if header & 0xffff == u32::from(id) {
                return Search::Found(at);
            }
            at = (header >> 20) as usize & 0xffc;
        }
        Search::Absent
    }

    /// What it is on PCI Express.
    pub fn port_type(&self) -> Search<PortType> {
        self.express(PCI_EXP_FLAGS).and_then(|flags| {
            Search::Found(match flags >> 4 & 0xf {
                0x0 | 0x1 => PortType::Endpoint,
                0x4 => PortType::RootPort,
                0x5 => PortType::Upstream,
                0x6 => PortType::Downstream,
                0x7 => PortType::ToPci,
                0x8 => PortType::FromPci,
                0x9 => PortType::RootComplexEndpoint,
                other => PortType::Other(other as u8),
            })
        })
    }

    /// Its access control services.
    pub fn acs(&self) -> Search<Acs> {
        self.extended_capability(PCI_EXT_CAP_ID_ACS).and_then(|at| {
            match (self.word(at + PCI_ACS_CAP), self.word(at + PCI_ACS_CTRL)) {
                (Some(capabilities), Some(control)) => {
                    Search::Found(Acs { offset: at as u16, capabilities, control })
                }
                _ => Search::Unread,
            }
        })
    }

    /// The link that it is an end of: of a bridge the one below it, but of an upstream port the one above.
    pub fn link(&self) -> Search<LinkRegisters> {
        self.express(PCI_EXP_LNKCAP).and_then(|capabilities| {
            self.express(PCI_EXP_LNKSTA).and_then(|status| {
                // The lowest ten bits of both registers are alike: speed, then width.
                let speed = |register: u16| (register & 0xf) as u8;
                let width = |register: u16| (register >> 4 & 0x3f) as u8;
                Search::Found(LinkRegisters {
                    speed: speed(status),
                    width_lanes: width(status),
                    max_speed: speed(capabilities),
                    max_width_lanes: width(capabilities),
                })
            })
        })
    }

    /// How long its packets' payloads may be.
    pub fn max_payload(&self) -> Search<MaxPayload> {
        self.express(PCI_EXP_DEVCAP).and_then(|capabilities| {
            self.express(PCI_EXP_DEVCTL).and_then(|control| {
                let bytes = |exponent: u16| 128 << u32::from(exponent & 0x7);
                Search::Found(MaxPayload {
                    now_bytes: bytes(control >> 5),
                    supported_bytes: bytes(capabilities),
                })
            })
        })
    }

    /// The BARs that can have other sizes.
    pub fn resizable_bars(&self) -> Search<Vec<ResizableBar>> {
        self.extended_capability(PCI_EXT_CAP_ID_REBAR).and_then(|at| {
            let Some(first) = self.double_word(at + 8) else { return Search::Unread };
            let count = ((first >> 5 & 0x7) as usize).min(6);
            let bars: Option<Vec<ResizableBar>> = (0..count)
                .map(|entry| {
                    let capability = self.double_word(at + 4 + 8 * entry)?;
                    let control = self.double_word(at + 8 + 8 * entry)?;
                    // Bit 4 is 1 MiB, bit 31 is 128 TiB; the control register counts from 1 MiB, and has
                    // more bits of the sizes above.
                    let sizes = u64::from(capability >> 4) | u64::from(control >> 16) << 28;
                    Some(ResizableBar {
                        index: (control & 0x7) as u8,
                        sizes_bytes: (0..44)
                            .filter(|bit| sizes >> bit & 1 != 0)
                            .map(|bit| 1 << (20 + bit))
                            .collect(),
                        now_bytes: 1 << (20 + (control >> 8 & 0x1f)),
                    })
                })
                .collect();
            bars.map_or(Search::Unread, Search::Found)
        })
    }

    /// A register of the PCI Express capability.
    fn express(&self, register: usize) -> Search<u16> {
        self.capability(PCI_CAP_ID_EXP)
            .and_then(|at| self.word(at + register).map_or(Search::Unread, Search::Found))
    }

    fn word(&self, at: usize) -> Option<u16> {
        Some(u16::from_le_bytes(self.bytes.get(at..at + 2)?.try_into().ok()?))
    }

    fn double_word(&self, at: usize) -> Option<u32> {
        Some(u32::from_le_bytes(self.bytes.get(at..at + 4)?.try_into().ok()?))
    }
}

impl TryFrom<Written> for ConfigSpace {
    type Error = String;

    fn try_from(written: Written) -> Result<Self, String> {
        let digits = written.bytes.as_bytes();
        if digits.len() > 2 * MAX_BYTES || !digits.len().is_multiple_of(2) {
            return Err(format!("{} hexadecimal digits of configuration space", digits.len()));
        }
        let byte = |pair: &[u8]| {
            let digit = |digit: u8| char::from(digit).to_digit(16);
            Some((digit(pair[0])? << 4 | digit(pair[1])?) as u8)
        };
        let bytes: Option<Vec<u8>> = digits.chunks(2).map(byte).collect();
        Self::new(bytes.ok_or("configuration space is not hexadecimal")?, written.size_bytes)
    }
}

impl From<ConfigSpace> for Written {
    fn from(config: ConfigSpace) -> Self {
        let bytes = config.bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        Self { size_bytes: config.size_bytes, bytes }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A root port's, with ACS at `acs_at` and this control word.
    pub(crate) fn root_port(acs_at: u16, control: u16) -> ConfigSpace {
        let mut bytes = vec![0; MAX_BYTES];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &[0x36, 0x1b, 0x0c, 0x00]);
        put(PCI_STATUS, &0x10_u16.to_le_bytes());
        put(PCI_HEADER_TYPE, &[1]);
        put(PCI_CAPABILITY_LIST, &[0x50]);
        put(0x50, &[PCI_CAP_ID_EXP, 0, 0x42, 0x00]);
        // Up to 512 bytes, 256 as it is set; up to x16 at 16 GT/s, x8 at 8 now.
        put(0x54, &2_u32.to_le_bytes());
        put(0x58, &(1_u16 << 5).to_le_bytes());
        put(0x5c, &0x104_u32.to_le_bytes());
        put(0x62, &0x83_u16.to_le_bytes());
        // Advanced error reporting, then ACS.
        put(0x100, &(0x0001_0001_u32 | u32::from(acs_at) << 20).to_le_bytes());
        put(acs_at.into(), &0x0001_000d_u32.to_le_bytes());
        put(usize::from(acs_at) + PCI_ACS_CAP, &0x5f_u16.to_le_bytes());
        put(usize::from(acs_at) + PCI_ACS_CTRL, &control.to_le_bytes());
        ConfigSpace::new(bytes, MAX_BYTES).unwrap()
    }

    /// A switch's port to the root.
    pub(crate) fn upstream_port() -> ConfigSpace {
        let mut config = root_port(0x148, 0);
        Arc::make_mut(&mut config.bytes)[0x52] = 0x52;
        config
    }

    #[test]
    fn a_root_port_is_taken_apart() {
        let port = root_port(0x148, 0x1d);
        assert_eq!(port.is_bridge(), Some(true));
        assert_eq!(port.port_type(), Search::Found(PortType::RootPort));
        // Without the bit for a slot, and with it.
        assert_eq!(port.is_slot(), Search::Found(false));
        let mut slot = port.clone();
        Arc::make_mut(&mut slot.bytes)[0x53] = 0x01;
        assert_eq!(slot.is_slot(), Search::Found(true));
        assert_eq!(slot.port_type(), Search::Found(PortType::RootPort));
        assert_eq!(port.is_multifunction(), Some(false));
        Arc::make_mut(&mut slot.bytes)[PCI_HEADER_TYPE] = 0x81;
        assert_eq!((slot.is_multifunction(), slot.is_bridge()), (Some(true), Some(true)));
        let acs = port.acs().found().unwrap();
        assert_eq!((acs.offset, acs.control), (0x148, 0x1d));
        assert!(acs.redirects());
        assert_eq!(acs.control_names(), ["SrcValid", "ReqRedir", "CmpltRedir", "UpstreamFwd"]);
        let link = LinkRegisters { speed: 3, width_lanes: 8, max_speed: 4, max_width_lanes: 16 };
        assert_eq!(port.link(), Search::Found(link));
        assert_eq!(port.max_payload(), Search::Found(MaxPayload { now_bytes: 256, supported_bytes: 512 }));
        assert_eq!(port.resizable_bars(), Search::Absent);
    }

    #[test]
    fn each_redirecting_bit_redirects_and_no_other() {
        for bit in 0..16 {
            let redirects = root_port(0xff8, 1 << bit).acs().found().unwrap().redirects();
            assert_eq!(redirects, [2, 3, 5].contains(&bit), "bit {bit}");
        }
    }

    #[test]
    fn what_was_not_read_is_not_absent() {
        let whole = root_port(0x148, 0);
        let part = |length: usize| ConfigSpace::new(whole.bytes[..length].to_vec(), MAX_BYTES).unwrap();
        // What others than root see.
        assert_eq!(part(64).acs(), Search::Unread);
        assert_eq!(part(64).port_type(), Search::Unread);
        assert_eq!(part(64).is_bridge(), Some(true));
        assert_eq!(part(0x14e).acs(), Search::Unread);
        assert!(matches!(part(0x150).acs(), Search::Found(_)));
        // Conventional PCI has no such thing, and that needs no privilege to know.
        let conventional = ConfigSpace::new(whole.bytes[..64].to_vec(), 256).unwrap();
        assert_eq!(conventional.acs(), Search::Absent);
    }

    #[test]
    fn resizable_bars_are_read() {
        let mut config = root_port(0x148, 0);
        let bytes = Arc::make_mut(&mut config.bytes);
        bytes[0x100..0x104].copy_from_slice(&0x0001_0015_u32.to_le_bytes());
        // 256 MiB, 512 MiB and 16 GiB; BAR 1 of one, 256 MiB now.
        bytes[0x104..0x108].copy_from_slice(&((1_u32 << 8 | 1 << 9 | 1 << 14) << 4).to_le_bytes());
        bytes[0x108..0x10c].copy_from_slice(&(1_u32 | 1 << 5 | 8 << 8).to_le_bytes());
        let bars = config.resizable_bars().found().unwrap();
        let sizes_bytes = vec![256 << 20, 512 << 20, 16 << 30];
        assert_eq!(bars, [ResizableBar { index: 1, sizes_bytes, now_bytes: 256 << 20 }]);
    }

    /// A conventional function's configuration space, whose list of capabilities begins at `first`.
    fn conventional(first: u8, put: &[(usize, [u8; 4])]) -> ConfigSpace {
        let mut bytes = vec![0; CONVENTIONAL_BYTES];
        bytes[PCI_STATUS] = PCI_STATUS_CAP_LIST as u8;
        bytes[PCI_CAPABILITY_LIST] = first;
        for &(at, value) in put {
            bytes[at..at + 4].copy_from_slice(&value);
        }
        ConfigSpace::new(bytes, CONVENTIONAL_BYTES).unwrap()
    }

    #[test]
    fn a_list_of_capabilities_ends_where_the_kernel_says() {
        // A root port's, version 2.
        let express = [PCI_CAP_ID_EXP, 0, 0x42, 0];
        let root_port = Search::Found(PortType::RootPort);
        assert_eq!(conventional(0x40, &[(0x40, express)]).port_type(), root_port, "right behind the header");
        assert_eq!(
            conventional(0x53, &[(0x50, express)]).port_type(),
            root_port,
            "the low bits are reserved"
        );
        assert_eq!(conventional(0x50, &[(0x50, [1, 0x60, 0, 0]), (0x60, express)]).port_type(), root_port);
        assert_eq!(conventional(0x20, &[(0x20, express)]).port_type(), Search::Absent, "inside the header");
        // What reads as ones is no link to what follows.
        assert_eq!(
            conventional(0x50, &[(0x50, [0xff, 0x60, 0, 0]), (0x60, express)]).port_type(),
            Search::Absent
        );
        // A pointer without the bit that says that there is a list.
        let mut without = conventional(0x50, &[(0x50, express)]);
        Arc::make_mut(&mut without.bytes)[PCI_STATUS] = 0;
        assert_eq!(without.port_type(), Search::Absent);
        assert_eq!(without.is_bridge(), Some(false));
    }

    #[test]
    fn extended_capabilities_are_found_at_the_end_of_the_longest_list() {
        let mut bytes = vec![0; MAX_BYTES];
        for at in (CONVENTIONAL_BYTES..MAX_BYTES).step_by(8) {
            let (id, next) = if at + 8 < MAX_BYTES { (0x0b, at + 8) } else { (PCI_EXT_CAP_ID_ACS, 0) };
            bytes[at..at + 4].copy_from_slice(&(u32::from(id) | (next as u32) << 20).to_le_bytes());
        }
        let config = ConfigSpace::new(bytes, MAX_BYTES).unwrap();
        assert_eq!(config.extended_capability(PCI_EXT_CAP_ID_ACS), Search::Found(MAX_BYTES - 8));
        assert_eq!(config.extended_capability(PCI_EXT_CAP_ID_REBAR), Search::Absent);
    }

    #[test]
    fn a_port_isolates_by_all_bits_that_it_has() {
        let all = Acs { offset: 0x148, capabilities: 0x5f, control: 0x1d };
        assert!(all.isolates());
        for bit in [0x01, 0x04, 0x08, 0x10] {
            assert!(!Acs { control: all.control & !bit, ..all }.isolates(), "{bit:#x}");
            // What it cannot do is not asked of it.
            let (capabilities, control) = (all.capabilities & !bit, all.control & !bit);
            assert!(Acs { capabilities, control, ..all }.isolates(), "{bit:#x}");
        }
    }

    #[test]
    fn how_much_was_read_is_said() {
        let of = |bytes: Vec<u8>| ConfigSpace::new(bytes, CONVENTIONAL_BYTES).unwrap();
        assert!(of(vec![0; CONVENTIONAL_BYTES]).is_whole() && !of(vec![0; 64]).is_whole());
        assert!(of(vec![0xff; 64]).is_all_ones() && !of(vec![0; 64]).is_all_ones());
        let mut one_zero = vec![0xff; 64];
        one_zero[63] = 0xfe;
        assert!(!of(one_zero).is_all_ones());
        let nothing = of(Vec::new());
        assert!(!nothing.is_all_ones(), "of nothing, nothing is known");
        assert_eq!((nothing.is_bridge(), nothing.is_multifunction()), (None, None));
        assert_eq!(nothing.port_type(), Search::Unread);
    }

    #[test]
    fn what_is_no_configuration_space_is_refused() {
        let read = |bytes: &str| {
            let written = format!(r#"{{"size_bytes": 256, "bytes": "{bytes}"}}"#);
            serde_json::from_str::<ConfigSpace>(&written).map_err(|error| error.to_string())
        };
        assert_eq!(read("0f10").unwrap().bytes(), [0x0f, 0x10]);
        for (bytes, why) in [
            ("0".into(), "1 hexadecimal digits"),
            ("0".repeat(2 * MAX_BYTES + 2), "8194 hexadecimal digits"),
            ("00".repeat(257), "257 bytes of a configuration space of 256"),
            ("0g".into(), "is not hexadecimal"),
        ] {
            let error = read(&bytes).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
        assert!(ConfigSpace::new(Vec::new(), 64).unwrap_err().contains("not 64"));
    }

    #[test]
    fn every_resizable_bar_is_read() {
        let mut config = root_port(0x148, 0);
        let bytes = Arc::make_mut(&mut config.bytes);
        let mut put = |at: usize, value: u32| bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        put(0x100, 0x0001_0015);
        // Two: 1 MiB and 128 TiB of BAR 0, 1 MiB now; of BAR 2 the same and 256 TiB and 8 EiB, 128 TiB now.
        put(0x104, 1 << 4 | 1 << 31);
        put(0x108, 2 << 5);
        put(0x10c, 1 << 31);
        put(0x110, 2 | 27 << 8 | 1 << 16 | 1 << 31);
        let bar = |index, sizes_bytes: &[u64], now_bytes| ResizableBar {
            index,
            sizes_bytes: sizes_bytes.to_vec(),
            now_bytes,
        };
        assert_eq!(
            config.resizable_bars(),
            Search::Found(vec![
                bar(0, &[1 << 20, 1 << 47], 1 << 20),
                bar(2, &[1 << 47, 1 << 48, 1 << 63], 1 << 47),
            ])
        );
        // The second's registers were not read.
        let part = ConfigSpace::new(config.bytes[..0x110].to_vec(), MAX_BYTES).unwrap();
        assert_eq!(part.resizable_bars(), Search::Unread);
    }

    proptest! {
        #[test]
        fn any_bytes_are_taken_apart(
            bytes in proptest::collection::vec(prop_oneof![Just(0xff_u8), Just(0), any::<u8>()], 0..=MAX_BYTES),
            conventional: bool,
        ) {
            let size = if conventional { CONVENTIONAL_BYTES } else { MAX_BYTES };
            if let Ok(config) = ConfigSpace::new(bytes, size) {
                let _ = (config.acs(), config.link(), config.max_payload(), config.resizable_bars());
                let _ = (config.port_type(), config.is_bridge(), config.is_all_ones());
                let written = serde_json::to_string(&config).unwrap();
                prop_assert_eq!(serde_json::from_str::<ConfigSpace>(&written).unwrap(), config);
            }
        }

        #[test]
        fn acs_is_found_wherever_it_is(word in (0x104_u16 / 4)..(0xff8 / 4), control: u16) {
            // The first capability's own eight bytes are taken.
            let at = (word * 4).max(0x108);
            let acs = root_port(at, control).acs().found().unwrap();
            prop_assert_eq!((acs.offset, acs.control), (at, control));
        }
    }
}
