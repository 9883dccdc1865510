//! Real Vulkan drivers for GPUs that are not there: which there are, and how a program in a guest comes by one.
//!
//! A driver is Mesa's own, as users have it. Under it are a drm-shim of Debian's `mesa-drm-shim` and, in front of that, the
//! lab's own library (`lab/drm`), which has the kernel say what becomes of an import.

use std::ffi::OsString;
use std::path::Path;

/// A Vulkan driver on a stand-in for one of its GPUs.
#[derive(Debug, PartialEq, Eq)]
pub struct VulkanDriver {
    /// What tests and tables call it.
    pub name: &'static str,
    /// The driver as it names itself: `VkPhysicalDeviceDriverProperties`.
    pub driver: &'static str,
    /// The kernel driver that it works on.
    pub kernel: &'static str,
    /// The loader's file for it.
    manifest: &'static str,
    /// The drm-shim.
    shim: &'static str,
    /// The variable by which the shim is told which GPU it is, and that.
    gpu: Option<(&'static str, &'static str)>,
}

const fn radv(name: &'static str, gpu: &'static str) -> VulkanDriver {
    VulkanDriver {
        name,
        driver: "radv",
        kernel: "amdgpu",
        manifest: "radeon_icd.json",
        shim: "libamdgpu_noop_drm_shim.so",
        gpu: Some(("AMDGPU_GPU_ID", gpu)),
    }
}

/// Which there are: of RADV one GPU for each generation that its code treats apart, from GFX8 on.
pub const DRIVERS: &[VulkanDriver] = &[
    radv("radv-polaris10", "polaris10"),
    radv("radv-vega10", "vega10"),
    radv("radv-navi10", "navi10"),
    radv("radv-navi21", "navi21"),
    radv("radv-navi31", "navi31"),
    VulkanDriver {
        name: "anv-b580",
        driver: "Intel open-source Mesa driver",
        kernel: "xe",
        manifest: "intel_icd.json",
        // For what all drivers have in common; the lab's library answers for xe.
        shim: "libamdgpu_noop_drm_shim.so",
        gpu: None,
    },
    VulkanDriver {
        name: "nvk",
        driver: "NVK",
        kernel: "nouveau",
        manifest: "nouveau_icd.json",
        shim: "libnouveau_noop_drm_shim.so",
        gpu: None,
    },
];

/// The lab's library in the guest's `wire::SHARE`.
pub const LIBRARY: &str = "drm.so";

/// Where the root has drm-shims.
const SHIMS: &str = "/usr/lib/x86_64-linux-gnu";

/// The variable that says which driver a test runs under.
pub const VARIABLE: &str = "PEERVRAM_LAB_DRIVER";

/// The variables of `lab/drm`.
const AS: &str = "PEERVRAM_DRM_AS";
const NODE: &str = "PEERVRAM_DRM_NODE";
const ADDRESS: &str = "PEERVRAM_DRM_ADDRESS";
const TALK: &str = "PEERVRAM_DRM_TALK";

/// What a stand-in stands on in a guest.
#[derive(Debug)]
pub struct Ground<'a> {
    /// The real DRM node that is asked.
    pub node: &'a Path,
    /// The PCI address that the GPU has.
    pub address: &'a str,
    /// The folder by which a test talks to the stand-in.
    pub talk: &'a Path,
}

impl VulkanDriver {
    /// The one of that name.
    pub fn named(name: &str) -> Option<&'static VulkanDriver> {
        DRIVERS.iter().find(|driver| driver.name == name)
    }

    /// The drm-shim's place in the root; absent in a root without `mesa-drm-shim`.
    pub fn shim(&self) -> String {
        format!("{SHIMS}/{}", self.shim)
    }

    /// What a program is started with to find this driver, and no other.
    pub fn environment(&self, library: &Path, ground: &Ground<'_>) -> Vec<(&'static str, OsString)> {
        let mut preload = library.as_os_str().to_owned();
        preload.push(":");
        preload.push(self.shim());
        let mut all: Vec<(&str, OsString)> = vec![
            (VARIABLE, self.name.into()),
            ("VK_DRIVER_FILES", format!("/usr/share/vulkan/icd.d/{}", self.manifest).into()),
            ("LD_PRELOAD", preload),
            (AS, self.kernel.into()),
            (NODE, ground.node.into()),
            (ADDRESS, ground.address.into()),
            (TALK, ground.talk.into()),
        ];
        all.extend(self.gpu.map(|(variable, gpu)| (variable, gpu.into())));
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_found() {
        for driver in DRIVERS {
            assert_eq!(VulkanDriver::named(driver.name), Some(driver));
        }
        assert_eq!(VulkanDriver::named("radv"), None);
    }

    #[test]
    fn the_labs_library_comes_before_the_shim() {
        let ground = Ground {
            node: Path::new("/dev/dri/renderD128"),
            address: "0000:02:00.0",
            talk: Path::new("/run/t"),
        };
        let environment = DRIVERS[0].environment(Path::new("/lab/drm.so"), &ground);
        let preload = environment.iter().find(|(name, _)| *name == "LD_PRELOAD").unwrap();
        let expected = "/lab/drm.so:/usr/lib/x86_64-linux-gnu/libamdgpu_noop_drm_shim.so";
        assert_eq!(preload.1, OsString::from(expected));
    }
}
