//! The lab tests itself: the machine is what its row says.

use anyhow::{Context, bail, ensure};
use peervram_lab::machine::Topology;
use std::fs;
use std::path::Path;

use crate::guest::Guest;
use crate::test::{Test, Verdict};

pub const TESTS: &[Test] = &[
    Test::of_all("lab/kernel-is-the-one-asked-for", kernel_is_the_one_asked_for),
    Test::new("lab/lender-is-bound-to-vfio", lender_is_bound_to_vfio),
    Test::new("lab/lender-can-be-bound-again", lender_can_be_bound_again),
    Test::of_all("lab/complaints-can-be-allowed", complaints_can_be_allowed)
        .allowing(&["Call Trace:", "Call trace:"]),
    Test::of_all("lab/topology-is-the-one-asked-for", topology_is_the_one_asked_for),
    Test::new("lab/screen-can-be-dumped", screen_can_be_dumped),
    Test::new("lab/vulkan-driver-is-there", vulkan_driver_is_there).on(|facts| facts.vulkan),
];

fn kernel_is_the_one_asked_for(guest: &Guest) -> Verdict {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let wanted = &guest.facts().kernel;
    ensure!(release.starts_with(&format!("{wanted}.")), "Linux {wanted} is {release}");
    Ok(())
}

fn lender_is_bound_to_vfio(guest: &Guest) -> Verdict {
    let function = format!("/sys/bus/pci/devices/{}", guest.lender()?);
    let size_bytes = fs::metadata(format!("{function}/resource2"))?.len();
    ensure!(size_bytes == 256 << 20, "BAR 2 has {size_bytes} bytes");
    let group = fs::read_link(format!("{function}/iommu_group")).context("no IOMMU group")?;
    let group = group.file_name().context("a group without a name")?.to_string_lossy();
    ensure!(fs::exists(format!("/dev/vfio/{group}"))?, "no /dev/vfio/{group}");
    Ok(())
}

fn lender_can_be_bound_again(guest: &Guest) -> Verdict {
    let lender = guest.lender()?;
    let driver = format!("/sys/bus/pci/devices/{lender}/driver");
    fs::write(format!("{driver}/unbind"), &lender)?;
    ensure!(!fs::exists(&driver)?, "{lender} still has a driver");
    guest.bind(&lender, "vfio-pci")
}

fn complaints_can_be_allowed(_guest: &Guest) -> Verdict {
    // "Show a backtrace of all active CPUs": the kernel's own words, without harm.
    fs::write("/proc/sysrq-trigger", "l").context("/proc/sysrq-trigger")
}

fn topology_is_the_one_asked_for(guest: &Guest) -> Verdict {
    // The bridges above a function are the folders above it.
    let depth = |address: &str| -> anyhow::Result<usize> {
        let path = fs::canonicalize(format!("/sys/bus/pci/devices/{address}"))?;
        let root = path.iter().position(|part| part.to_string_lossy().starts_with("pci"));
        Ok(path.iter().count() - root.context("not below a PCI root")? - 2)
    };
    let bridges = match guest.facts().topology {
        Topology::RootPorts => 1,
        Topology::Switch => 3,
        Topology::Tree => bail!("a tree is looked for, place by place, when its machine begins"),
    };
    for address in guest.addresses()? {
        let seen = depth(&address)?;
        ensure!(seen == bridges, "{address} is behind {seen} bridges, not {bridges}");
    }
    Ok(())
}

fn screen_can_be_dumped(guest: &Guest) -> Verdict {
    let node = guest.virtio_gpu_node()?;
    ensure!(node.exists(), "{} is missing", node.display());
    let picture = guest.screendump()?;
    ensure!(picture.width() >= 640 && picture.height() >= 480, "the screen is {picture:?}");
    Ok(())
}

fn vulkan_driver_is_there(_guest: &Guest) -> Verdict {
    let list =
        std::env::var_os("VK_DRIVER_FILES").context("VK_DRIVER_FILES is not set, as the lab's init does")?;
    let text = fs::read_to_string(&list).with_context(|| format!("{}", list.display()))?;
    let driver: serde_json::Value = serde_json::from_str(&text)?;
    let library = driver["ICD"]["library_path"].as_str().context("no library_path")?;
    // A bare name is looked for where the linker looks; the join leaves a full path alone.
    let place = Path::new("/usr/lib/x86_64-linux-gnu").join(library);
    ensure!(place.exists(), "{} is missing", place.display());
    Ok(())
}
