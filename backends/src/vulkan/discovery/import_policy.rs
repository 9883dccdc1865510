//! `ImportPolicy`: what imports of memory that can be taken back mean to a Vulkan driver, as data: by `VkDriverId`, each
//! statement with where it is from.
//!
//! [`PhysicalDevice::import_policy`](super::physical_device::PhysicalDevice::import_policy) gives a device's row. What is
//! not known is taken for the worst, which is right for every driver.

use ash::vk;

use crate::{OnRefusal, OnRevoke};

/// How imports are to be treated under a Vulkan driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct ImportPolicy {
    /// The driver as people call it.
    pub driver: &'static str,
    /// The kernel drivers that it imports with, as [`import_support`](crate::import_support()) names them; none where it is
    /// not known, or no kernel driver maps for it.
    pub kernel_drivers: &'static [&'static str],
    /// What live imports do to submissions.
    pub submissions: Submissions,
    /// What becomes of the `VkDevice` where the kernel refuses to map an import.
    pub on_refusal: OnRefusal,
    /// What an import needs around a revoke.
    pub on_revoke: OnRevoke,
    /// Whether it makes images with rows of its own distance on dma-bufs ([`Tiling::Linear`](crate::vulkan::Tiling)).
    pub linear_images: Option<bool>,
    /// How far apart the rows of an explicit layout may be, where the driver has explicit layouts; none where that is not
    /// known.
    pub rows: Option<Rows>,
    /// Where each of it is from.
    pub sources: &'static [Source],
}

/// How far apart a driver takes the rows of a linear image whose layout the lender decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Rows {
    /// At multiples of this.
    pub multiple_bytes: u32,
    /// On GPUs with this in their name at the least multiple alone that a row has room in.
    pub tight_on: &'static [&'static str],
}

impl Rows {
    /// Whether rows of `row_bytes` may be `stride_bytes` apart on a device of that name.
    pub fn take(&self, device: &str, row_bytes: u32, stride_bytes: u32) -> bool {
        match self.is_tight(device) {
            true => stride_bytes == row_bytes.next_multiple_of(self.multiple_bytes),
            false => stride_bytes.is_multiple_of(self.multiple_bytes),
        }
    }

    fn is_tight(&self, device: &str) -> bool {
        self.tight_on.iter().any(|gpu| device.contains(gpu))
    }

    /// The rule for a device of that name, in words.
    pub(crate) fn rule(&self, device: &str) -> String {
        let multiple = self.multiple_bytes;
        match self.is_tight(device) {
            true => format!("the least multiple of {multiple} that has room for a row"),
            false => format!("multiples of {multiple}"),
        }
    }
}

/// What the imports of a `VkDevice` do to what is submitted to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Submissions {
    /// Each has the kernel map every import that is alive, whatever it works on. While one of them cannot be mapped,
    /// each fails (ENODEV), and the first loses the device.
    MapEveryImport,
    /// Nothing: the imports are mapped into this process, or there are none of VFIO memory.
    Independent,
    /// It was not looked at. Taken for [`Submissions::MapEveryImport`].
    Unknown,
}

/// Where a statement about a driver is from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Source {
    /// What it says.
    pub says: &'static str,
    /// How it is known.
    pub evidence: Evidence,
    /// The version that was looked at.
    pub version: &'static str,
    /// Where: the lab's test, or a function and its file.
    pub place: &'static str,
}

/// How a statement about a driver is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Evidence {
    /// Seen in the lab: the driver itself, on a stand-in for its kernel driver.
    Lab,
    /// Seen on a GPU.
    Hardware,
    /// Read in the source.
    Read,
}

impl Evidence {
    /// A stable name for scripts and `--json`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lab => "lab",
            Self::Hardware => "hardware",
            Self::Read => "source",
        }
    }
}

const fn lab(says: &'static str, place: &'static str) -> Source {
    Source { says, evidence: Evidence::Lab, version: "Mesa 26.1.6", place }
}

const fn read(says: &'static str, version: &'static str, place: &'static str) -> Source {
    Source { says, evidence: Evidence::Read, version, place }
}

const UNKNOWN: ImportPolicy = ImportPolicy {
    driver: "another driver",
    kernel_drivers: &[],
    submissions: Submissions::Unknown,
    on_refusal: OnRefusal::LosesDevice,
    on_revoke: OnRevoke::FreeBefore,
    linear_images: None,
    rows: None,
    sources: &[],
};

/// A driver whose imports of VFIO memory the kernel refuses to attach, so that nothing is mapped.
const fn never(
    driver: &'static str,
    kernel_drivers: &'static [&'static str],
    source: &'static [Source],
) -> ImportPolicy {
    ImportPolicy {
        driver,
        kernel_drivers,
        submissions: Submissions::Independent,
        on_refusal: OnRefusal::ImportFails,
        sources: source,
        ..UNKNOWN
    }
}

const TABLE: &[(vk::DriverId, ImportPolicy)] = &[
    (
        vk::DriverId::MESA_RADV,
        ImportPolicy {
            driver: "RADV",
            kernel_drivers: &["amdgpu"],
            submissions: Submissions::MapEveryImport,
            linear_images: Some(false),
            rows: Some(Rows { multiple_bytes: 256, tight_on: &["NAVI10"] }),
            sources: &[
                lab(
                    "every submission lists every import that is alive; one that the kernel refuses loses the device",
                    "drivers/radv-*-revoked",
                ),
                lab("rows of its own distance on dma-bufs are refused", "drivers/radv-*-imports"),
                lab(
                    "GFX9, 10.3 and 11 take explicit rows at multiples of 256 bytes, navi10 at the least such multiple; GFX8 none",
                    "drivers/radv-*-imports",
                ),
                read(
                    "all memory but a swapchain's is resident, and a submission lists all that is",
                    "Mesa 0518784b",
                    "radv_amdgpu_get_bo_list, radv_amdgpu_cs_submit in radv_amdgpu_cs.c",
                ),
                read(
                    "an import is attached when it is made, and mapped when a submission lists it",
                    "Linux 7.3.4",
                    "amdgpu_gem_prime_import in amdgpu_dma_buf.c, amdgpu_cs_bo_validate in amdgpu_cs.c",
                ),
            ],
            ..UNKNOWN
        },
    ),
    (
        vk::DriverId::INTEL_OPEN_SOURCE_MESA,
        ImportPolicy {
            driver: "ANV",
            kernel_drivers: &["xe"],
            submissions: Submissions::MapEveryImport,
            linear_images: Some(true),
            sources: &[
                lab(
                    "an import that the kernel does not map loses the device at once",
                    "drivers/anv-b580-refused",
                ),
                lab("while an import is away, a submission loses the device", "drivers/anv-b580-revoked"),
                lab("rows of its own distance and of any other are taken", "drivers/anv-b580-imports"),
                read(
                    "an import is bound when it is made, and a bind that is refused loses the device",
                    "Mesa 1bd83ba8",
                    "anv_device_import_bo in anv_allocator.c, xe_vm_bind_op in xe/anv_kmd_backend.c",
                ),
                read(
                    "a submission maps all that is bound and was taken back",
                    "Linux 7.3.4",
                    "xe_vm_validate_rebind in xe_vm.c, which xe_exec.c calls",
                ),
                read(
                    "what is taken back stays mapped until it is used or freed",
                    "Linux 7.3.4",
                    "xe_bo_move_dmabuf in xe_bo.c",
                ),
            ],
            ..UNKNOWN
        },
    ),
    (
        vk::DriverId::MESA_NVK,
        never(
            "NVK",
            &["nouveau"],
            &[
                lab("an import is refused (EOPNOTSUPP), and the device lives", "drivers/nvk-imports"),
                read("nouveau attaches statically", "Linux 7.3.4", "drm_gem_prime_import in drm_prime.c"),
            ],
        ),
    ),
    (
        vk::DriverId::MESA_TURNIP,
        never(
            "Turnip",
            &["msm"],
            &[read("msm attaches statically", "Linux 7.3.4", "drm_gem_prime_import in drm_prime.c")],
        ),
    ),
    (
        vk::DriverId::MESA_VENUS,
        never(
            "Venus",
            &[],
            &[lab("it takes its own renderer's memory alone", "two-drivers/venus-refuses-what-others-made")],
        ),
    ),
    (
        vk::DriverId::MESA_LLVMPIPE,
        ImportPolicy {
            // It maps the dma-buf itself. What is revocable it cannot map, and a mapping does not come back by itself.
            on_revoke: OnRevoke::Reimport,
            linear_images: Some(true),
            sources: &[
                lab("dma-bufs of VFIO are refused, host pointers taken", "vulkan/vram-is-read-and-painted"),
                read(
                    "the dma-buf is mapped when it is imported",
                    "Mesa 0aa6d727",
                    "llvmpipe_dmabuf_import in lp_texture.c",
                ),
            ],
            ..never("lavapipe", &[], &[])
        },
    ),
    (
        // Its submissions list what its queues reference; what the layer above references was not read.
        vk::DriverId::AMD_OPEN_SOURCE,
        ImportPolicy {
            driver: "AMDVLK",
            kernel_drivers: &["amdgpu"],
            sources: &[read(
                "a submission lists what its queue or device references; an ENODEV is that submission's error",
                "PAL c5e80007",
                "Queue::UpdateResourceList in amdgpuQueue.cpp, CheckResult in amdgpuDevice.cpp",
            )],
            ..UNKNOWN
        },
    ),
];

/// What is known of the driver of that `VkDriverId`.
pub(super) fn of(driver_id: i32) -> &'static ImportPolicy {
    let row = TABLE.iter().find(|(id, _)| id.as_raw() == driver_id);
    row.map_or(&UNKNOWN, |(_, policy)| policy)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::import_support;

    #[test]
    fn each_driver_has_one_row_and_each_row_its_sources() {
        for (i, (id, row)) in TABLE.iter().enumerate() {
            assert!(TABLE[i + 1..].iter().all(|(other, _)| other != id), "{}", row.driver);
            assert!(!row.sources.is_empty(), "{}", row.driver);
            for source in row.sources {
                assert!(!source.version.is_empty() && source.place.len() > 5, "{}: {source:?}", row.driver);
            }
        }
        assert_eq!(of(0).driver, "another driver");
    }

    #[test]
    fn rows_are_as_far_apart_as_the_gpu_takes_them() {
        let rows = of(vk::DriverId::MESA_RADV.as_raw()).rows.unwrap();
        let takes = |device, stride| rows.take(device, 2560, stride);
        let (newer, tight) = ("AMD Radeon RX 6800 (RADV NAVI21)", "AMD Radeon RX 5700 XT (RADV NAVI10)");
        assert!(takes(newer, 2560) && takes(newer, 2816) && !takes(newer, 2624));
        assert!(takes(tight, 2560) && !takes(tight, 2816) && !takes(tight, 2624));
        assert_eq!(rows.rule(newer), "multiples of 256");
        assert_eq!(rows.rule(tight), "the least multiple of 256 that has room for a row");
    }

    /// Whatever loses a device is freed before a revoke, and what the kernel never maps loses none.
    #[test]
    fn rows_do_not_contradict_themselves_or_the_kernels() {
        for row in TABLE.iter().map(|(_, row)| row).chain([&UNKNOWN]) {
            if row.submissions != Submissions::Independent {
                assert_eq!(row.on_revoke, OnRevoke::FreeBefore, "{}", row.driver);
                assert_eq!(row.on_refusal, OnRefusal::LosesDevice, "{}", row.driver);
            }
            for &kernel in row.kernel_drivers {
                let can =
                    import_support(kernel).unwrap_or_else(|| panic!("{kernel} is in no table")).can_import;
                assert_eq!(can, row.submissions != Submissions::Independent, "{} on {kernel}", row.driver);
            }
        }
    }
}
