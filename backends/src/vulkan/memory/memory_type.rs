//! Which memory type an import or an allocation uses: bit masks in, an index out.

use ash::vk;

/// The types that imported memory must not have: a protected one wants protected queues, a lazily
/// allocated one is no memory at all.
const NEVER: vk::MemoryPropertyFlags = vk::MemoryPropertyFlags::from_raw(
    vk::MemoryPropertyFlags::PROTECTED.as_raw() | vk::MemoryPropertyFlags::LAZILY_ALLOCATED.as_raw(),
);

/// The first type in `allowed_bits` that imported memory can have.
///
/// Whoever lends has decided where the memory is; the type only tells how this driver sees it.
/// Drivers list the better one first.
pub(crate) fn for_import(types: &[vk::MemoryType], allowed_bits: u32) -> Option<u32> {
    find(types, allowed_bits, |flags| !flags.intersects(NEVER))
}

/// The best type in `allowed_bits` for memory that the CPU reads and writes without flushing.
///
/// VkPhysicalDeviceMemoryProperties promises one that is visible and coherent for every buffer.
pub(crate) fn for_host_access(types: &[vk::MemoryType], allowed_bits: u32) -> Option<u32> {
    let coherent = vk::MemoryPropertyFlags::HOST_VISIBLE | vk::MemoryPropertyFlags::HOST_COHERENT;
    let cached = coherent | vk::MemoryPropertyFlags::HOST_CACHED;
    // Reading uncached memory is slower by a factor of ten and more.
    find(types, allowed_bits, |flags| flags.contains(cached) && !flags.intersects(NEVER))
        .or_else(|| find(types, allowed_bits, |flags| flags.contains(coherent) && !flags.intersects(NEVER)))
}

/// The best type in `allowed_bits` for memory that the device alone uses.
pub(crate) fn for_device_access(types: &[vk::MemoryType], allowed_bits: u32) -> Option<u32> {
    let local = vk::MemoryPropertyFlags::DEVICE_LOCAL;
    find(types, allowed_bits, |flags| flags.contains(local) && !flags.intersects(NEVER))
        .or_else(|| for_import(types, allowed_bits))
}

fn find(
    types: &[vk::MemoryType],
    allowed_bits: u32,
    suits: impl Fn(vk::MemoryPropertyFlags) -> bool,
) -> Option<u32> {
    (0_u32..32)
        .zip(types)
        .find(|(index, memory_type)| allowed_bits & 1 << index != 0 && suits(memory_type.property_flags))
        .map(|(index, _)| index)
}

#[cfg(test)]
mod tests {
    use super::*;
    use vk::MemoryPropertyFlags as Flags;

    fn types(flags: &[Flags]) -> Vec<vk::MemoryType> {
        flags.iter().map(|&property_flags| vk::MemoryType { property_flags, heap_index: 0 }).collect()
    }

    #[test]
    fn an_import_takes_the_first_type_that_both_sides_allow() {
        let types = types(&[
            Flags::DEVICE_LOCAL | Flags::PROTECTED,
            Flags::DEVICE_LOCAL,
            Flags::HOST_VISIBLE | Flags::HOST_COHERENT,
        ]);
        assert_eq!(for_import(&types, 0b111), Some(1));
        assert_eq!(for_import(&types, 0b100), Some(2));
        assert_eq!(for_import(&types, 0b001), None);
        assert_eq!(for_import(&types, 0b1000), None);
        assert_eq!(for_import(&types, 0), None);
    }

    #[test]
    fn host_access_prefers_cached_memory() {
        let coherent = Flags::HOST_VISIBLE | Flags::HOST_COHERENT;
        let types =
            types(&[Flags::DEVICE_LOCAL, coherent, Flags::HOST_VISIBLE, coherent | Flags::HOST_CACHED]);
        assert_eq!(for_host_access(&types, !0), Some(3));
        assert_eq!(for_host_access(&types, 0b0111), Some(1));
        assert_eq!(for_host_access(&types, 0b0101), None);
    }
}
