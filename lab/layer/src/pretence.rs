//! What is pretended.

use std::io::Write as _;
use std::sync::OnceLock;

use ash::vk;

use crate::VARIABLE;

/// What [`VARIABLE`] says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pretence {
    pub transfer_queue: bool,
    pub dedicated_only: bool,
}

impl Pretence {
    /// This process's.
    pub fn get() -> Self {
        static READ: OnceLock<Pretence> = OnceLock::new();
        *READ.get_or_init(|| Self::read(&std::env::var(VARIABLE).unwrap_or_default()))
    }

    /// A word that is not known is said, once, and pretends nothing.
    fn read(text: &str) -> Self {
        let mut pretence = Self::default();
        for word in text.split(',').filter(|word| !word.is_empty()) {
            match word {
                "transfer-queue" => pretence.transfer_queue = true,
                "dedicated-only" => pretence.dedicated_only = true,
                // Ignore a failed write: the watched program goes on even if nobody reads this.
                _ => {
                    let name = crate::NAME;
                    writeln!(std::io::stderr(), "{VARIABLE}: {word:?} is nothing that {name} pretends").ok();
                }
            }
        }
        pretence
    }
}

/// The family that is shown after the driver's own, of which `first` is one.
pub fn transfer_family(first: &vk::QueueFamilyProperties) -> vk::QueueFamilyProperties {
    vk::QueueFamilyProperties {
        queue_flags: vk::QueueFlags::TRANSFER,
        queue_count: 1,
        timestamp_valid_bits: first.timestamp_valid_bits,
        // The granularity of RADV's transfer queues.
        min_image_transfer_granularity: vk::Extent3D { width: 16, height: 16, depth: 8 },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_read() {
        assert_eq!(Pretence::read(""), Pretence::default());
        let both = Pretence { transfer_queue: true, dedicated_only: true };
        assert_eq!(Pretence::read("dedicated-only,transfer-queue"), both);
        assert_eq!(Pretence::read("transfer"), Pretence::default());
    }
}
