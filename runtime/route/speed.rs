//! `LinkSpeed`: what a PCI Express link can carry.
//!
//! Raw is what is left after the line code (8b/10b, 128b/130b, flits); of that, packets with a payload of so
//! many bytes leave `payload / (payload + 24)`: a header of four words, framing and a checksum for each.

use std::fmt;

/// Bytes of a packet that are no payload.
const PACKET_OVERHEAD_BYTES: f64 = 24.0;

/// GT/s and raw GB/s for each lane, by the number in `PCI_EXP_LNKSTA`.
const SPEEDS: [(f64, f64); 6] =
    [(2.5, 0.25), (5.0, 0.5), (8.0, 0.984_6), (16.0, 1.969_2), (32.0, 3.938_5), (64.0, 7.562_5)];

/// A speed and a width.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinkSpeed {
    /// 1 for 2.5 GT/s up to 6 for 64.
    pub speed: u8,
    /// In lanes.
    pub width_lanes: u8,
}

impl LinkSpeed {
    /// What it carries in one direction, in GB/s, at most and with packets of this payload; none for a
    /// speed that is not known.
    pub fn gb_per_s(self, payload_bytes: Option<u32>) -> Option<f64> {
        let (_, lane) = SPEEDS.get(usize::from(self.speed).checked_sub(1)?)?;
        let raw = lane * f64::from(self.width_lanes);
        Some(
            payload_bytes.map_or(raw, |payload| {
                raw * f64::from(payload) / (f64::from(payload) + PACKET_OVERHEAD_BYTES)
            }),
        )
    }
}

impl fmt::Display for LinkSpeed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match usize::from(self.speed).checked_sub(1).and_then(|number| SPEEDS.get(number)) {
            Some((transfers, _)) => write!(f, "x{} {transfers} GT/s", self.width_lanes),
            None => write!(f, "x{} at an unknown speed", self.width_lanes),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_carry_what_is_published() {
        let link = |speed, width_lanes| LinkSpeed { speed, width_lanes };
        let gen4 = link(4, 16);
        assert_eq!(gen4.to_string(), "x16 16 GT/s");
        assert!((gen4.gb_per_s(None).unwrap() - 31.51).abs() < 0.01);
        assert!((gen4.gb_per_s(Some(128)).unwrap() - 26.5).abs() < 0.1);
        assert!((link(5, 16).gb_per_s(Some(256)).unwrap() - 57.6).abs() < 0.1);
        assert!((link(1, 1).gb_per_s(None).unwrap() - 0.25).abs() < 1e-9);
        assert_eq!((link(0, 16).gb_per_s(None), link(9, 16).gb_per_s(None)), (None, None));
        assert_eq!(link(9, 4).to_string(), "x4 at an unknown speed");
    }
}
