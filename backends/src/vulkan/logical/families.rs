//! `Families`: which queue families of a device that we open get a queue.
//!
//! One that computes, and beside it one that only transfers, where there is such: on many GPUs that is a copy engine of
//! its own, which moves bytes while shaders run. The device's buffers are then shared by both families, so that either may
//! work on them without a hand-over between.

use ash::vk;

/// Families, by their numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Families {
    pub(crate) computes: u32,
    pub(crate) only_transfers: Option<u32>,
}

impl Families {
    /// The families that a device of our own takes queues of; none where none computes. Two only where buffers that two
    /// families share `can_be_handed_over` to the outside.
    pub(crate) fn choose(families: &[vk::QueueFamilyProperties], can_be_handed_over: bool) -> Option<Self> {
        let first = |is_it: &dyn Fn(vk::QueueFlags) -> bool| {
            let has =
                |family: &vk::QueueFamilyProperties| family.queue_count > 0 && is_it(family.queue_flags);
            families.iter().position(has).map(|index| index as u32)
        };
        let computes = first(&|flags| flags.contains(vk::QueueFlags::COMPUTE))?;
        // Families of video engines and the like transfer, too, and are no faster at it than they have to be.
        let beside = vk::QueueFlags::TRANSFER | vk::QueueFlags::SPARSE_BINDING | vk::QueueFlags::PROTECTED;
        let only_transfers =
            first(&|flags| flags.contains(vk::QueueFlags::TRANSFER) && (flags & !beside).is_empty());
        Some(Self { computes, only_transfers: only_transfers.filter(|_| can_be_handed_over) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const G: vk::QueueFlags = vk::QueueFlags::GRAPHICS;
    const C: vk::QueueFlags = vk::QueueFlags::COMPUTE;
    const T: vk::QueueFlags = vk::QueueFlags::TRANSFER;
    const S: vk::QueueFlags = vk::QueueFlags::SPARSE_BINDING;
    const DECODES: vk::QueueFlags = vk::QueueFlags::VIDEO_DECODE_KHR;
    const ENCODES: vk::QueueFlags = vk::QueueFlags::VIDEO_ENCODE_KHR;

    fn chosen(families: &[(vk::QueueFlags, u32)]) -> Option<(u32, Option<u32>)> {
        let families: Vec<_> = families
            .iter()
            .map(|&(queue_flags, queue_count)| vk::QueueFamilyProperties {
                queue_flags,
                queue_count,
                ..Default::default()
            })
            .collect();
        let (both, one) = (Families::choose(&families, true), Families::choose(&families, false));
        // Without synchronization2 the same, less the family that would share.
        assert_eq!(one, both.map(|families| Families { only_transfers: None, ..families }));
        both.map(|families| (families.computes, families.only_transfers))
    }

    #[test]
    fn one_family_for_everything_gets_one_queue() {
        assert_eq!(chosen(&[(G | C | T, 1)]), Some((0, None)));
    }

    #[test]
    fn a_family_that_only_transfers_gets_one_too() {
        assert_eq!(chosen(&[(G | C | T | S, 16), (T | S, 2), (C | T | S, 8)]), Some((0, Some(1))));
        assert_eq!(chosen(&[(T, 1), (G, 1), (C, 1)]), Some((2, Some(0))));
    }

    #[test]
    fn engines_of_another_kind_are_left_alone() {
        let of_video = [(G | C | T, 1), (C | T, 4), (DECODES, 1), (T | DECODES, 1), (T | ENCODES, 1)];
        assert_eq!(chosen(&of_video), Some((0, None)));
        // A family beside compute is no copy engine.
        assert_eq!(chosen(&[(G, 1), (C | T, 1)]), Some((1, None)));
        // A bit that this release does not know stands for something else than copies.
        assert_eq!(chosen(&[(C, 1), (T | vk::QueueFlags::from_raw(1 << 20), 1)]), Some((0, None)));
    }

    #[test]
    fn families_without_queues_are_none() {
        assert_eq!(chosen(&[(C, 1), (T, 0), (T | S, 1)]), Some((0, Some(2))));
        assert_eq!(chosen(&[(C, 0), (T, 1)]), None);
        assert_eq!(chosen(&[]), None);
    }
}
