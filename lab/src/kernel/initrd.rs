//! The guest's first file system: busybox, the modules in their order, and `init.sh`.
//!
//! Everything else the guest reads from the private root over 9p, so this is small and depends
//! on nothing but the kernel and the list of modules.

use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::kernel::Kernel;
use crate::kernel::cpio::Archive;
use crate::kernel::modules;
use crate::progress::{Progress, step};
use crate::root::Root;
use crate::root::cache;

const INIT: &str = include_str!("init.sh");

/// The modules needed to mount the private root. Where the firmware says that an IOMMU is a virtio device,
/// every other PCI device waits for that driver, those of the root too.
const ROOT_MODULES: &[&str] = &[VIRTIO_IOMMU, "9pnet_virtio", "9p"];

const VIRTIO_IOMMU: &str = "virtio_iommu";

/// Module parameters; insmod does not read them from the kernel's command line.
const PARAMETERS: &[(&str, &str)] = &[
    // A virtual IOMMU cannot isolate interrupts; without this vfio refuses it.
    ("vfio_iommu_type1", "allow_unsafe_interrupts=1"),
    // No text console on the imported screen: it costs a second and draws over tests.
    ("drm_client_lib", "active="),
];

/// The archive for a kernel and the modules wanted, made if it does not exist.
pub fn open(root: &Root, kernel: &Kernel, wanted: &[&str], progress: &dyn Progress) -> Result<PathBuf> {
    let parameters = format!("{PARAMETERS:?}");
    let place = kernel.folder.to_string_lossy();
    let mut inputs = vec![INIT, &parameters, &place, &kernel.release];
    inputs.extend(wanted);
    let name = format!("initrd-{}", cache::key(&inputs));
    let entry = cache::entry(&name, &["initrd"], |draft| {
        step(progress, &format!("making the initramfs for Linux {}", kernel.release), || {
            fs::write(draft.join("initrd"), make(root, kernel, wanted)?)?;
            Ok(())
        })
    })?;
    Ok(entry.join("initrd"))
}

fn make(root: &Root, kernel: &Kernel, wanted: &[&str]) -> Result<Vec<u8>> {
    let busybox = root.folder().join("usr/bin/busybox");
    let mut archive = Archive::default();
    for folder in ["bin", "dev", "modules"] {
        archive.folder(folder);
    }
    archive.file("init", 0o755, INIT.as_bytes());
    archive.file("bin/busybox", 0o755, &read(&busybox)?);

    // Loaded one after the other: what mounting the root needs, and the rest meanwhile.
    let (mut first, mut rest) = (String::new(), String::new());
    if let Some(modules) = &kernel.modules {
        let dependencies = fs::read_to_string(modules.join("modules.dep"))
            .with_context(|| format!("reading modules.dep in {}", modules.display()))?;
        let builtin = fs::read_to_string(modules.join("modules.builtin"))
            .with_context(|| format!("reading modules.builtin in {}", modules.display()))?;
        let mut all = ROOT_MODULES.to_vec();
        all.retain(|module| *module != VIRTIO_IOMMU || wanted.contains(module));
        let of_the_root = modules::load_order(&dependencies, &builtin, &all)?;
        all.extend(wanted);
        for file in modules::load_order(&dependencies, &builtin, &all)? {
            let name = modules::name_of(&file);
            let parameters = PARAMETERS.iter().find(|(module, _)| *module == name);
            let order = if of_the_root.contains(&file) { &mut first } else { &mut rest };
            *order += &format!("{name}.ko {}\n", parameters.map_or("", |(_, value)| value));
            let content = decompressed(&busybox, &modules.join(&file))?;
            archive.file(&format!("modules/{name}.ko"), 0o644, &content);
        }
    }
    archive.file("modules/first", 0o644, first.as_bytes());
    archive.file("modules/rest", 0o644, rest.as_bytes());
    Ok(archive.finish())
}

/// A module's plain content. busybox is linked statically, so it runs on the host as well.
fn decompressed(busybox: &Path, file: &Path) -> Result<Vec<u8>> {
    if file.extension().is_some_and(|suffix| suffix == "ko") {
        return read(file);
    }
    let output = Command::new(busybox)
        .args(["xz", "-dc"])
        .arg(file)
        .output()
        .with_context(|| format!("starting {}", busybox.display()))?;
    if !output.status.success() {
        bail!("decompressing {}: {}", file.display(), String::from_utf8_lossy(&output.stderr));
    }
    Ok(output.stdout)
}

fn read(file: &Path) -> Result<Vec<u8>> {
    fs::read(file).with_context(|| format!("reading {}", file.display()))
}
