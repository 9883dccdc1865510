//! Faults of released kernels that peervram goes round, as data: what it refuses depends on whether the kernel has them.

use super::Topology;
use super::host_bridges::{Release, parse_release};

/// A fault of the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct KernelFault {
    /// What goes wrong.
    pub what: &'static str,
    /// The first release that exports such memory, or the first that is known to have the fault.
    pub since: Release,
    /// The first release without it; none where no release is known to have mended it.
    pub mended_in: Option<Release>,
    /// Where it is in the kernel, and how it is known.
    pub source: &'static str,
}

/// Of a dma-buf of several ranges only one is mapped through an IOMMU and a host bridge. The change that mends it is in
/// `docs/upstream/`; a kernel that was built with it says so by a local version that ends with `-mended`.
pub const SEVERAL_RANGES: KernelFault = KernelFault {
    what: "the kernel maps only the first of several ranges through an IOMMU and a host bridge",
    since: (6, 19, 0),
    mended_in: None,
    source: "dma_buf_phys_vec_to_sgt in drivers/dma-buf/dma-buf-mapping.c: dma_iova_link gets offset 0 for every range. Seen on \
             Linux 7.3.4 under VT-d and virtio-iommu",
};

/// What a kernel's release ends with that was built with the changes of docs/upstream.
const MENDED: &str = "-mended";

impl KernelFault {
    /// Whether a kernel of that release, as `uname -r` has it, has the fault. One whose release nobody understands is taken to
    /// have it.
    pub fn is_in(&self, release: &str) -> bool {
        if release.ends_with(MENDED) {
            return false;
        }
        let is_before = |mended_in| parse_release(release).is_none_or(|release| release < mended_in);
        self.mended_in.is_none_or(is_before)
    }
}

impl Topology {
    /// Whether this machine's kernel has the fault. One whose release was not read is taken to have it.
    pub fn has_fault(&self, fault: &KernelFault) -> bool {
        self.kernel_release.known().is_none_or(|release| fault.is_in(release))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_has_a_fault_until_one_has_mended_it() {
        let mended = KernelFault { mended_in: Some((7, 5, 0)), ..SEVERAL_RANGES };
        for (release, has_it) in [
            ("7.4.12-arch1-1", true),
            ("7.5.0", false),
            ("7.10-rc1", false),
            ("7.3.4-mended", false),
            ("a kernel", true),
        ] {
            assert_eq!(mended.is_in(release), has_it, "{release}");
        }
        assert!(SEVERAL_RANGES.is_in("99.0.0"), "no release is known to have mended it");
        assert!(!SEVERAL_RANGES.is_in("7.3.4-mended"));
    }
}
