//! `Link`: what the way between two places can carry at most, out of the PCI tree.
//!
//! The raw link is what is left of the symbols after their coding. Of that, packets take their heads: a posted
//! write has 24 bytes around its payload (four words of header, two of framing and check), so its ceiling hangs
//! on the largest payload that is set (MPS). Completions of reads are cut as the other side likes, so a read has no
//! such ceiling here. Acknowledgements and flow control are left out of both.
//!
//! Absent on purpose: guesses. A link that cannot be read, or of a generation whose packets are packed otherwise,
//! limits nothing here.

use peervram::backends::PciAddress;
use peervram::backends::topology::{LinkRegisters, Place, Topology};
use serde::{Deserialize, Serialize};

/// What surrounds the payload of a posted write, in bytes.
const OVERHEAD_BYTES: f64 = 24.0;

/// The narrowest part of a way.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Link {
    /// "16 GT/s x16 at 0000:01:00.0".
    pub narrowest: String,
    /// After coding, in bytes a second.
    pub raw_bytes_per_s: f64,
    /// The smallest of the largest payloads that are set on the way.
    pub max_payload_bytes: Option<u32>,
    /// What posted writes can reach, in bytes a second.
    pub write_ceiling_bytes_per_s: Option<f64>,
}

impl Link {
    /// The way between two functions, or between one and the host; none where nothing is known of it.
    pub fn between(topology: &Topology, one: Option<PciAddress>, other: Option<PciAddress>) -> Option<Link> {
        let way = |address: Option<PciAddress>| -> Option<Vec<&Place>> {
            address.map_or(Some(Vec::new()), |address| topology.way_up(address).ok().map(|(way, _)| way))
        };
        let (one, other) = (way(one)?, way(other)?);
        let is_in = |way: &[&Place], place: &Place| way.iter().any(|one| one.address() == place.address());
        // The bridge that both ends are below is not between them.
        let between = one
            .iter()
            .filter(|place| !is_in(&other, place))
            .chain(other.iter().filter(|place| !is_in(&one, place)));
        let mut narrowest: Option<(f64, String)> = None;
        let mut max_payload_bytes: Option<u32> = None;
        for place in between {
            let Some(config) = place.config.known() else { continue };
            if let Some(link) = config.link().found()
                && let Some(raw) = raw_bytes_per_s(link)
                && narrowest.as_ref().is_none_or(|(least, _)| raw < *least)
            {
                narrowest = Some((raw, format!("{} at {}", spelt(link), place.address())));
            }
            if let Some(payload) = config.max_payload().found() {
                let now = payload.now_bytes;
                max_payload_bytes = Some(max_payload_bytes.map_or(now, |least| least.min(now)));
            }
        }
        let (raw_bytes_per_s, narrowest) = narrowest?;
        let write_ceiling_bytes_per_s =
            max_payload_bytes.map(|payload| raw_bytes_per_s * write_share(payload));
        Some(Link { narrowest, raw_bytes_per_s, max_payload_bytes, write_ceiling_bytes_per_s })
    }
}

/// What a link carries after coding; none for a link that is down or whose coding is another.
pub fn raw_bytes_per_s(link: LinkRegisters) -> Option<f64> {
    let lane = match link.speed {
        // 8b/10b, then 128b/130b.
        1 => 2.5e9 / 10.0,
        2 => 5.0e9 / 10.0,
        3 => 8.0e9 * 128.0 / 130.0 / 8.0,
        4 => 16.0e9 * 128.0 / 130.0 / 8.0,
        5 => 32.0e9 * 128.0 / 130.0 / 8.0,
        _ => return None,
    };
    (link.width_lanes > 0).then(|| lane * f64::from(link.width_lanes))
}

/// How much of a link posted writes can have, with payloads of that size.
pub fn write_share(max_payload_bytes: u32) -> f64 {
    let payload = f64::from(max_payload_bytes);
    payload / (payload + OVERHEAD_BYTES)
}

fn spelt(link: LinkRegisters) -> String {
    let speed = ["?", "2.5", "5", "8", "16", "32"].get(usize::from(link.speed)).copied().unwrap_or("?");
    format!("{speed} GT/s x{}", link.width_lanes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(speed: u8, width_lanes: u8) -> LinkRegisters {
        LinkRegisters { speed, width_lanes, max_speed: speed, max_width_lanes: width_lanes }
    }

    #[test]
    fn raw_links_are_what_is_left_after_coding() {
        let gigabytes =
            |speed, width| raw_bytes_per_s(link(speed, width)).map(|bytes| (bytes / 1e7).round() / 100.0);
        assert_eq!(gigabytes(1, 1), Some(0.25));
        assert_eq!(gigabytes(2, 16), Some(8.0));
        assert_eq!(gigabytes(3, 16), Some(15.75));
        assert_eq!(gigabytes(4, 16), Some(31.51));
        assert_eq!(gigabytes(5, 16), Some(63.02));
    }

    #[test]
    fn unknown_links_limit_nothing() {
        assert_eq!(raw_bytes_per_s(link(6, 16)), None);
        assert_eq!(raw_bytes_per_s(link(0, 16)), None);
        assert_eq!(raw_bytes_per_s(link(4, 0)), None);
    }

    #[test]
    fn writes_pay_for_their_heads() {
        let percent = |payload| (write_share(payload) * 1000.0).round() / 10.0;
        assert_eq!((percent(128), percent(256), percent(512)), (84.2, 91.4, 95.5));
    }
}
