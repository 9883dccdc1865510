//! Which kernel drivers can import memory of a VFIO device, as data: by driver, release and mode.
//!
//! VFIO accepts an importer only if it attaches dynamically, allows peer-to-peer, and can be told to let go
//! (`vfio_pci_dma_buf_attach` in `drivers/vfio/pci/vfio_pci_dmabuf.c`). Whether the bytes then find a way is
//! another question, which most importers have the kernel ask
//! ([`expected_map_type`](crate::topology::Topology::expected_map_type)) and two do not.
//!
//! Read in Linux 7.3 and, for NVIDIA's, in its open modules 595.45. Paths are below `drivers/gpu/drm` where
//! nothing else is said.

use std::fmt;

use crate::pci::Function;
use crate::topology::Release;

/// What is known about a driver, in one of its modes, as an importer of VFIO dma-bufs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct ImportSupport {
    /// The driver's name, as DRM and sysfs give it.
    pub driver: &'static str,
    /// In which mode; none if there is one only.
    pub mode: Option<&'static str>,
    /// Whether it can.
    pub can_import: bool,
    /// Why, or under which condition.
    pub because: &'static str,
    /// Where that stands in the kernel's source.
    pub source: &'static str,
    /// What decides whether it reaches the memory.
    pub governed_by: Governor,
    /// Whether it shows an import on a screen.
    pub scan_out: ScanOutSupport,
    /// The release from which on it is known to hold.
    pub since: Release,
}

/// What decides whether an importer reaches the memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Governor {
    /// The kernel's peer-to-peer verdict, asked when it maps.
    MapType,
    /// Nothing but the IOMMU's page tables: the kernel maps what it is given and asks for no verdict.
    Iommu,
}

/// Whether a driver shows an import on a screen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ScanOutSupport {
    /// It does.
    Shows,
    /// On integrated GPUs only, whose screens read system memory; where that stands in the kernel's source. A discrete
    /// one says EINVAL.
    IntegratedOnly(&'static str),
    /// It has no screens, or takes no import at all.
    Never,
}

impl fmt::Display for ScanOutSupport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shows => f.write_str("on a screen"),
            Self::IntegratedOnly(source) => write!(f, "on integrated GPUs only ({source})"),
            Self::Never => f.write_str("never"),
        }
    }
}

/// `VIRTIO_GPU_F_VIRGL` and `VIRTIO_GPU_F_RESOURCE_BLOB` of `include/uapi/linux/virtio_gpu.h`: 3D, and blob resources.
const VIRTIO_GPU_F_VIRGL: u64 = 1 << 0;
const VIRTIO_GPU_F_RESOURCE_BLOB: u64 = 1 << 3;

/// VFIO exports dma-bufs from here on.
const FIRST: Release = (6, 19, 0);

const SHMEM: &str = "drm_gem_shmem_helper.c: drm_gem_shmem_prime_import_no_map";
const PRIME: &str = "drm_prime.c: drm_gem_prime_import";

const TABLE: [ImportSupport; 33] = [
    ImportSupport {
        scan_out: ScanOutSupport::IntegratedOnly("amdgpu_display_user_framebuffer_create"),
        ..can(
            "amdgpu",
            "it attaches dynamically; free its imports before any reset, because submissions with them fail meanwhile",
            "amdgpu/amdgpu_dma_buf.c: amdgpu_dma_buf_attach_ops",
        )
    },
    ImportSupport {
        scan_out: ScanOutSupport::IntegratedOnly("__xe_pin_fb_vma"),
        ..can(
            "xe",
            "it attaches dynamically; free its imports before any reset, because it unmaps late",
            "xe/xe_dma_buf.c: xe_dma_buf_attach_ops",
        )
    },
    virtio("virtio_gpu"),
    virtio("virtio-pci"),
    virtio_3d("virtio_gpu"),
    virtio_3d("virtio-pci"),
    ImportSupport {
        governed_by: Governor::Iommu,
        ..can(
            "iommufd",
            "IOMMU_IOAS_MAP_FILE takes a dma-buf of one range; after a revoke the mapping is dead",
            "drivers/iommu/iommufd/pages.c: vfio_pci_dma_buf_iommufd_map",
        )
    },
    ImportSupport {
        governed_by: Governor::Iommu,
        ..can(
            "vfio_iommu_type1",
            "it maps the BAR itself by its address in a process, no dma-buf; no revoke takes that away",
            "drivers/vfio/vfio_iommu_type1.c: vfio_iommu_type1_map_dma",
        )
    },
    ImportSupport {
        mode: Some("memory regions, but for KSM and data-direct ones"),
        ..can(
            "mlx5_core",
            "it attaches dynamically and maps again at the next page fault",
            "drivers/infiniband/hw/mlx5/mr.c: mlx5_ib_dmabuf_attach_ops",
        )
    },
    ImportSupport {
        mode: Some("DEVX memory, KSM and data-direct"),
        ..cannot(
            "mlx5_core",
            "it pins and cannot be told to let go",
            "drivers/infiniband/core/umem_dmabuf.c: ib_umem_dmabuf_attach_pinned_ops",
        )
    },
    irdma("irdma"),
    irdma("ice"),
    rdma("efa"),
    rdma("mana"),
    rdma("bnxt_en"),
    rdma("ionic"),
    cannot("i915", "it attaches statically; Intel GPUs need the xe driver", "i915/gem/i915_gem_dmabuf.c"),
    cannot("nouveau", "it attaches statically", PRIME),
    cannot("nova", "its memory objects import nothing", "rust/kernel/drm/gem/mod.rs"),
    nvidia("nvidia"),
    nvidia("nvidia-drm"),
    cannot("radeon", "it attaches statically", PRIME),
    cannot("msm", "it attaches statically", PRIME),
    cannot("panthor", "it attaches statically", PRIME),
    cannot("panfrost", "it attaches statically", PRIME),
    cannot("vgem", "it attaches statically", SHMEM),
    cannot("vkms", "it attaches statically", SHMEM),
    cannot("bochs-drm", "it attaches statically", SHMEM),
    cannot("ast", "it attaches statically", SHMEM),
    cannot("amdxdna", "it attaches statically", "drivers/accel/amdxdna"),
    cannot("ivpu", "it attaches statically", "drivers/accel/ivpu"),
    cannot("qaic", "it attaches statically", "drivers/accel/qaic"),
    cannot("nvme", "it has no dma-buf import", "drivers/nvme/host"),
];

const fn can(driver: &'static str, because: &'static str, source: &'static str) -> ImportSupport {
    ImportSupport {
        driver,
        mode: None,
        can_import: true,
        because,
        source,
        governed_by: Governor::MapType,
        scan_out: ScanOutSupport::Never,
        since: FIRST,
    }
}

const fn cannot(driver: &'static str, because: &'static str, source: &'static str) -> ImportSupport {
    ImportSupport { can_import: false, ..can(driver, because, source) }
}

const fn virtio(driver: &'static str) -> ImportSupport {
    ImportSupport {
        mode: Some("blob resources, no 3D"),
        scan_out: ScanOutSupport::Shows,
        ..can(
            driver,
            "with blob resources and without virgl; its imports are for scan-out",
            "virtio/virtgpu_prime.c: virtgpu_gem_prime_import",
        )
    }
}

const fn virtio_3d(driver: &'static str) -> ImportSupport {
    ImportSupport {
        mode: Some("3D (virgl, Venus), or no blob resources"),
        ..cannot(
            driver,
            "with 3D (virgl, Venus), or without blob resources, it attaches statically",
            "virtio/virtgpu_prime.c: virtgpu_gem_prime_import",
        )
    }
}

const fn irdma(driver: &'static str) -> ImportSupport {
    ImportSupport {
        mode: Some("RDMA memory regions"),
        // "vfio: Permit VFIO to work with pinned importers"
        since: (7, 1, 0),
        ..can(
            driver,
            "it pins revocably; after a revoke the region must be registered again",
            "drivers/infiniband/hw/irdma/verbs.c: ib_umem_dmabuf_get_pinned_revocable_and_lock",
        )
    }
}

const fn rdma(driver: &'static str) -> ImportSupport {
    cannot(
        driver,
        "it pins and cannot be told to let go",
        "drivers/infiniband/core/umem_dmabuf.c: ib_umem_dmabuf_get_pinned",
    )
}

const fn nvidia(driver: &'static str) -> ImportSupport {
    cannot(
        driver,
        "it attaches statically and takes imports for system memory",
        "open modules: nv-dmabuf.c, nvidia-drm-gem.c",
    )
}

/// What is known about the driver called `driver`, in its best mode.
pub fn import_support(driver: &str) -> Option<&'static ImportSupport> {
    import_modes(driver).next()
}

/// What is known about the driver of `function`, in the mode that the function is in. Where that cannot be told, in
/// its best mode. Nothing of a virtio device without a DRM node, which is no GPU: the driver on the bus, `virtio-pci`, is
/// the same for all.
pub fn import_support_of(function: &Function) -> Option<&'static ImportSupport> {
    let driver = function.driver.as_deref()?;
    if driver == "virtio-pci" && function.drm_nodes.is_empty() {
        return None;
    }
    let Some(features) = function.virtio_features else { return import_support(driver) };
    // `virtgpu_gem_prime_import`: what it does not attach dynamically it leaves to the static import of DRM.
    let is_dynamic =
        features & (VIRTIO_GPU_F_VIRGL | VIRTIO_GPU_F_RESOURCE_BLOB) == VIRTIO_GPU_F_RESOURCE_BLOB;
    import_modes(driver).find(|row| row.can_import == is_dynamic)
}

/// What is known about each mode of that driver, the best first.
pub fn import_modes(driver: &str) -> impl Iterator<Item = &'static ImportSupport> {
    TABLE.iter().filter(move |row| row.driver == driver)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_mode_of_a_driver_has_one_row_the_best_first() {
        for (i, row) in TABLE.iter().enumerate() {
            let others = TABLE[i + 1..].iter().filter(|other| other.driver == row.driver);
            for other in others {
                assert!(row.mode.is_some() && row.mode != other.mode, "{}", row.driver);
                assert!(row.can_import || !other.can_import, "{}", row.driver);
            }
            assert!(!row.because.is_empty() && row.source.len() > 5, "{}", row.driver);
        }
        assert!(import_support("xe").unwrap().can_import);
        assert!(!import_support("nouveau").unwrap().can_import);
        assert_eq!(import_modes("virtio_gpu").map(|row| row.can_import).collect::<Vec<_>>(), [true, false]);
        assert_eq!(import_support("unheard_of"), None);
    }

    #[test]
    fn a_virtio_gpus_features_say_in_which_mode_it_is() {
        let of_device = |nodes: &[&str], features: Option<u64>| {
            let function = serde_json::json!({
                "address": "0000:02:00.0", "vendor_id": 0x1af4, "device_id": 0x1050, "class": 0x03_80_00,
                "driver": "virtio-pci", "iommu_group": null, "numa_node": null, "bars": [], "link": null,
                "drm_nodes": nodes, "memory_enabled": true, "virtio_features": features,
            });
            import_support_of(&serde_json::from_value(function).unwrap())
        };
        let support = |features| of_device(&["card0"], features).unwrap();
        // A network card's features mean something else.
        assert_eq!(of_device(&[], Some(0x0103_3000_001b)), None);
        // Seen: QEMU's virtio-gpu-pci with blob=true, and its virtio-gpu-gl-pci with venus=on.
        assert!(support(Some(0x0103_3000_000a)).can_import);
        assert!(!support(Some(0x0103_3000_001b)).can_import && support(Some(0x1b)).because.contains("3D"));
        // Without blob resources.
        assert!(!support(Some(0x0103_3000_0002)).can_import);
        assert!(support(None).can_import);
    }

    #[test]
    fn who_shows_an_import_is_known() {
        let scan_out = |driver: &str| import_support(driver).unwrap().scan_out;
        assert_eq!(scan_out("virtio_gpu"), ScanOutSupport::Shows);
        for driver in ["amdgpu", "xe"] {
            assert!(matches!(scan_out(driver), ScanOutSupport::IntegratedOnly(_)), "{driver}");
        }
        assert!(TABLE.iter().all(|row| row.can_import || row.scan_out == ScanOutSupport::Never));
    }

    /// The rows of a page's table that begin with a driver's name: the name, and the other cells.
    fn rows(page: &str, after: &str) -> Vec<(String, Vec<String>)> {
        let text = std::fs::read_to_string(format!("{}/../{page}", env!("CARGO_MANIFEST_DIR"))).unwrap();
        let (_, table) = text.split_once(after).unwrap();
        let lines = table.lines().skip(2).take_while(|line| line.starts_with('|'));
        let cells =
            lines.map(|line| line.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect());
        cells.map(|cells: Vec<String>| (cells[0].clone(), cells[1..].to_vec())).collect()
    }

    #[test]
    fn the_tables_of_the_pages_say_the_same() {
        let readme = rows("README.md", "| lends | imports memory of a VFIO device |");
        let mut named = 0;
        for (drivers, cells) in &readme {
            let imports = match cells[1].as_str() {
                "-" => continue,
                text if text.starts_with("no") => false,
                _ => true,
            };
            for driver in drivers.split('`').skip(1).step_by(2) {
                let row = import_support(driver)
                    .unwrap_or_else(|| panic!("the README has {driver}, the table not"));
                assert_eq!(row.can_import, imports, "{driver}");
                named += 1;
            }
        }
        assert!(named >= 7, "the README names {named} drivers in {readme:?}");
        for driver in ["amdgpu", "xe", "virtio_gpu"] {
            assert!(
                readme.iter().any(|(drivers, _)| drivers.contains(driver)),
                "the README leaves {driver} out"
            );
        }

        let shown = rows("docs/routes.md", "| driver | takes memory of a VFIO device | shows it |");
        let can: Vec<&str> =
            shown.iter().filter(|(_, cells)| cells[0] == "yes").map(|(who, _)| &**who).collect();
        assert_eq!(can, ["virtio-gpu with blob resources, without 3D", "amdgpu", "xe"]);
        for (who, driver) in can.iter().zip(["virtio_gpu", "amdgpu", "xe"]) {
            let (_, cells) = shown.iter().find(|(name, _)| name == who).unwrap();
            let shows = match import_support(driver).unwrap().scan_out {
                ScanOutSupport::Shows => cells[1] == "yes",
                ScanOutSupport::IntegratedOnly(place) => {
                    cells[1].starts_with("on integrated GPUs only") && cells[1].contains(place)
                }
                ScanOutSupport::Never => false,
            };
            assert!(shows, "{who}: {}", cells[1]);
        }
    }

    #[test]
    fn who_asks_for_no_verdict_is_known() {
        let unasked: Vec<&str> =
            TABLE.iter().filter(|row| row.governed_by == Governor::Iommu).map(|row| row.driver).collect();
        assert_eq!(unasked, ["iommufd", "vfio_iommu_type1"]);
    }
}
