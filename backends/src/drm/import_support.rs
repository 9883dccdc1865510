//! Which kernel graphics drivers can import memory of a VFIO device, as data.
//!
//! VFIO accepts an importer only if it attaches dynamically, allows peer-to-peer, and can be told to
//! let go (`vfio_pci_dma_buf_attach` in `drivers/vfio/pci/vfio_pci_dmabuf.c`, and
//! `invalidate_mappings` of the importer). Read in Linux 7.3.

/// What is known about a driver as an importer of VFIO dma-bufs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImportSupport {
    /// The driver's name, as DRM and sysfs give it.
    pub driver: &'static str,
    /// Whether it can, in its right mode.
    pub can_import: bool,
    /// Why, or under which condition.
    pub because: &'static str,
    /// Where that stands in the kernel's source.
    pub source: &'static str,
}

const TABLE: [ImportSupport; 13] = [
    can(
        "amdgpu",
        "it attaches dynamically and maps again by itself after a revoke",
        "amdgpu/amdgpu_dma_buf.c",
    ),
    can(
        "xe",
        "it attaches dynamically; free its imports before any reset, because it unmaps late",
        "xe/xe_dma_buf.c",
    ),
    can(
        "virtio-pci",
        "as virtio_gpu: with blob resources and without virgl; its imports are for scan-out",
        "virtio/virtgpu_prime.c",
    ),
    can(
        "virtio_gpu",
        "with blob resources and without virgl; its imports are for scan-out",
        "virtio/virtgpu_prime.c",
    ),
    cannot("i915", "it attaches statically; Intel GPUs need the xe driver", "i915/gem/i915_gem_dmabuf.c"),
    cannot("nouveau", "it attaches statically", "nouveau/nouveau_drm.c"),
    cannot(
        "nvidia",
        "it attaches statically and takes imports for system memory",
        "nvidia-drm/nvidia-drm-gem.c",
    ),
    cannot(
        "nvidia-drm",
        "it attaches statically and takes imports for system memory",
        "nvidia-drm/nvidia-drm-gem.c",
    ),
    cannot("radeon", "it attaches statically", "radeon/radeon_prime.c"),
    cannot("vgem", "it attaches statically", "drm_gem_shmem_helper.c"),
    cannot("vkms", "it attaches statically", "drm_gem_shmem_helper.c"),
    cannot("bochs-drm", "it attaches statically", "drm_gem_shmem_helper.c"),
    cannot("ast", "it attaches statically", "drm_gem_shmem_helper.c"),
];

const fn can(driver: &'static str, because: &'static str, source: &'static str) -> ImportSupport {
    ImportSupport { driver, can_import: true, because, source }
}

const fn cannot(driver: &'static str, because: &'static str, source: &'static str) -> ImportSupport {
    ImportSupport { driver, can_import: false, because, source }
}

/// What is known about the driver called `driver`.
pub fn import_support(driver: &str) -> Option<&'static ImportSupport> {
    TABLE.iter().find(|row| row.driver == driver)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_driver_has_one_row() {
        for (i, row) in TABLE.iter().enumerate() {
            assert!(TABLE[i + 1..].iter().all(|other| other.driver != row.driver), "{}", row.driver);
        }
        assert!(import_support("xe").unwrap().can_import);
        assert!(!import_support("nouveau").unwrap().can_import);
        assert_eq!(import_support("unheard_of"), None);
    }
}
