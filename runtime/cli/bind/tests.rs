//! Binding on a machine below a folder, with a kernel that does what Linux does with what is written.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;

use peervram::{Error, Kind, Result};

use super::binding::{Binding, Consent, Kernel, Write};
use crate::fake_root::Root;
use crate::in_use::InUse;

/// A GPU with a sound card in one slot, in a group of its own.
const GPU: &str = "0000:01:00.0";
const SOUND: &str = "0000:01:00.1";
/// A GPU that shares its group with the root disk's controller, one with a disk of nobody's, and both disks.
const CROWDED: &str = "0000:02:00.0";
const ROOT_DISK: &str = "0000:03:00.0";
const BESIDE: &str = "0000:04:00.0";
const FREE_DISK: &str = "0000:05:00.0";
const PORT: &str = "0000:00:01.0";

fn function(root: Root, address: &str, class: &str, driver: &str, group: u32, megabytes: u64) -> Root {
    let at = format!("sys/devices/pci0000:00/{address}");
    let end = (4_u64 << 32) + (megabytes << 20) - 1;
    root.link(&format!("sys/bus/pci/devices/{address}"), &at)
        .file(&format!("{at}/vendor"), "0x1002\n")
        .file(&format!("{at}/device"), "0x744c\n")
        .file(&format!("{at}/class"), class)
        .file(&format!("{at}/resource"), &format!("0x{:016x} 0x{end:016x} 0x000000000014220c\n", 4_u64 << 32))
        .file(&format!("{at}/driver_override"), "(null)\n")
        .link(&format!("{at}/driver"), &format!("sys/bus/pci/drivers/{driver}"))
        .link(&format!("{at}/iommu_group"), &format!("sys/kernel/iommu_groups/{group}"))
        .link(&format!("sys/kernel/iommu_groups/{group}/devices/{address}"), &at)
}

fn machine() -> Root {
    let mut root = Root::new()
        .file("proc/self/mountinfo", "30 1 259:2 / / rw - ext4 /dev/root rw\n")
        .file("sys/bus/pci/drivers_probe", "");
    for (address, class, driver, group, megabytes) in [
        (PORT, "0x060400\n", "pcieport", 1, 2),
        (GPU, "0x030000\n", "amdgpu", 12, 256),
        (SOUND, "0x040300\n", "snd_hda_intel", 12, 1),
        (CROWDED, "0x030200\n", "nvidia", 13, 256),
        (ROOT_DISK, "0x010802\n", "nvme", 13, 2),
        (BESIDE, "0x120000\n", "accel", 14, 256),
        (FREE_DISK, "0x010802\n", "nvme", 14, 2),
    ] {
        root = function(root, address, class, driver, group, megabytes);
    }
    let disk = format!("sys/devices/pci0000:00/{ROOT_DISK}/nvme/nvme0/nvme0n1/nvme0n1p2");
    root.link("sys/class/block/nvme0n1p2", &disk).link("sys/dev/block/259:2", &disk)
}

/// A kernel without surprises, but for a driver that takes nothing.
#[derive(Default)]
struct Linux<'a> {
    root: Option<&'a Path>,
    refuses: Option<&'a str>,
    loaded: Vec<String>,
}

impl<'a> Linux<'a> {
    fn of(root: &'a Root) -> Self {
        Self { root: Some(root.path()), ..Self::default() }
    }

    fn root(&self) -> &'a Path {
        self.root.unwrap()
    }

    fn give(&self, function: &str, driver: &str) -> io::Result<()> {
        let drivers = self.root().join("sys/bus/pci/drivers").join(driver);
        let link = self.root().join("sys/bus/pci/devices").join(function).join("driver");
        let is_refused = self.refuses == Some(function);
        if link.exists() || !drivers.exists() || is_refused { Ok(()) } else { symlink(drivers, link) }
    }
}

impl Kernel for Linux<'_> {
    fn load(&mut self, module: &str) -> Result<()> {
        self.loaded.push(module.to_owned());
        fs::create_dir_all(self.root().join("sys/bus/pci/drivers").join(module))
            .map_err(|error| Error::os("load", error))
    }

    fn write(&mut self, write: &Write) -> io::Result<()> {
        let words: Vec<String> =
            write.file.components().map(|part| part.as_os_str().to_string_lossy().into_owned()).collect();
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        match words[..] {
            ["sys", "bus", "pci", "devices", _, "driver_override"] => {
                let text = if write.text == "\n" { "(null)" } else { &write.text };
                fs::write(self.root().join(&write.file), format!("{text}\n"))
            }
            ["sys", "bus", "pci", "drivers", driver, "unbind"] => {
                let link = self.root().join("sys/bus/pci/devices").join(&write.text).join("driver");
                assert!(fs::read_link(&link)?.ends_with(driver), "{link:?} is not bound to {driver}");
                fs::remove_file(link)
            }
            ["sys", "bus", "pci", "drivers", driver, "bind"] => self.give(&write.text, driver),
            ["sys", "bus", "pci", "drivers_probe"] => {
                let folder = self.root().join("sys/bus/pci/devices").join(&write.text);
                let driver = fs::read_to_string(folder.join("driver_override"))?;
                self.give(&write.text, driver.trim())
            }
            _ => panic!("{write:?}"),
        }
    }
}

fn plan(root: &Root, device: &str, consent: Consent) -> Result<Binding> {
    Binding::plan(root.path(), device.parse().unwrap(), &InUse::read(root.path()), consent)
}

fn refusal(root: &Root, device: &str, consent: Consent) -> Error {
    plan(root, device, consent).unwrap_err()
}

/// The driver and the override of every function.
fn state(root: &Root) -> BTreeMap<String, (Option<String>, String)> {
    let entries = fs::read_dir(root.path().join("sys/bus/pci/devices")).unwrap();
    let of = |folder: &Path| {
        let driver = fs::read_link(folder.join("driver")).ok();
        let driver = driver.map(|path| path.file_name().unwrap().to_string_lossy().into_owned());
        (driver, fs::read_to_string(folder.join("driver_override")).unwrap())
    };
    entries
        .map(|entry| entry.unwrap())
        .map(|entry| (entry.file_name().into_string().unwrap(), of(&entry.path())))
        .collect()
}

#[test]
fn a_gpu_goes_with_the_functions_of_its_card_and_comes_back_exactly() {
    let root = machine().file(&format!("sys/devices/pci0000:00/{SOUND}/driver_override"), "snd_hda_intel\n");
    let before = state(&root);
    let binding = plan(&root, GPU, Consent::default()).unwrap();
    let written: Vec<_> =
        binding.writes().iter().map(|write| format!("{} {}", write.file.display(), write.text)).collect();
    let expected = [
        format!("sys/bus/pci/devices/{GPU}/driver_override vfio-pci"),
        format!("sys/bus/pci/drivers/amdgpu/unbind {GPU}"),
        format!("sys/bus/pci/drivers_probe {GPU}"),
        format!("sys/bus/pci/devices/{SOUND}/driver_override vfio-pci"),
        format!("sys/bus/pci/drivers/snd_hda_intel/unbind {SOUND}"),
        format!("sys/bus/pci/drivers_probe {SOUND}"),
    ];
    assert_eq!(written, expected);
    assert_eq!(state(&root), before, "a plan changes nothing");

    let mut kernel = Linux::of(&root);
    binding.make(root.path(), &mut kernel).unwrap();
    assert_eq!(kernel.loaded, ["vfio-pci"]);
    let bound = (Some("vfio-pci".to_owned()), "vfio-pci\n".to_owned());
    let after = state(&root);
    assert_eq!((&after[GPU], &after[SOUND], &after[FREE_DISK]), (&bound, &bound, &before[FREE_DISK]));
    // Written down for root alone.
    let file = root.path().join(format!("run/peervram/bound/{GPU}.json"));
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&file), mode(file.parent().unwrap())), (0o600, 0o700));

    let again = plan(&root, GPU, Consent::default()).unwrap();
    assert!(again.before.is_empty(), "{again:?}");
    let recorded = Binding::recorded(root.path(), GPU.parse().unwrap()).unwrap();
    assert_eq!(recorded, binding);
    recorded.undo(root.path(), &mut kernel).unwrap();
    assert_eq!(state(&root), before);
    assert!(!file.exists());
}

#[test]
fn what_is_no_lender_is_refused() {
    let root = machine();
    for device in [PORT, SOUND] {
        let root = function(
            Root::new(),
            device,
            if device == PORT { "0x060400\n" } else { "0x040300\n" },
            "x",
            1,
            0,
        );
        let error = refusal(&root, device, Consent { group: true, screen: true });
        assert_eq!(error.kind(), Kind::Unsupported, "{error}");
    }
    // A bridge with a large BAR is a bridge.
    let error = refusal(&root, PORT, Consent { group: true, screen: true });
    assert!(error.kind() == Kind::Unsupported && error.to_string().contains("bridge"), "{error}");
    let error = refusal(&root, "0000:7f:00.0", Consent::default());
    assert_eq!(error.kind(), Kind::NotFound);
}

#[test]
fn what_does_not_answer_is_not_bound() {
    let root = machine().file(&format!("sys/devices/pci0000:00/{GPU}/config"), "a configuration space");
    assert_eq!(plan(&root, GPU, Consent::default()).unwrap().before.len(), 2);
    fs::write(root.path().join(format!("sys/devices/pci0000:00/{GPU}/config")), [0xff; 4096]).unwrap();
    let error = refusal(&root, GPU, Consent { group: true, screen: true });
    assert!(error.kind() == Kind::Gone && error.to_string().contains("does not answer"), "{error}");
    assert!(error.next_step().unwrap().contains("peervram doctor"), "{error}");
}

#[test]
fn the_root_disk_is_never_taken_neither_itself_nor_as_a_neighbour() {
    let root = machine();
    for device in [ROOT_DISK, CROWDED] {
        let error = refusal(&root, device, Consent { group: true, screen: true });
        assert_eq!(error.kind(), Kind::Busy, "{error}");
        let words = error.to_string();
        assert!(
            words.contains("0000:03:00.0 (nvme)") && words.contains("nvme0n1p2 is mounted at /"),
            "{words}"
        );
    }
    assert!(refusal(&root, CROWDED, Consent::default()).next_step().unwrap().contains("another slot"));
}

#[test]
fn devices_of_other_slots_go_along_only_if_somebody_agrees() {
    let root = machine();
    let error = refusal(&root, BESIDE, Consent::default());
    assert_eq!(error.kind(), Kind::GroupNotViable, "{error}");
    assert!(
        error.to_string().contains("0000:05:00.0 (nvme)") && error.to_string().contains("--group"),
        "{error}"
    );
    let binding = plan(&root, BESIDE, Consent { group: true, screen: false }).unwrap();
    let taken: Vec<String> = binding.before.iter().map(|before| before.function.to_string()).collect();
    assert_eq!(taken, [BESIDE, FREE_DISK]);
}

#[test]
fn a_screen_is_given_up_only_if_somebody_agrees_and_a_display_server_keeps_it() {
    let root = machine().file(&format!("sys/devices/pci0000:00/{GPU}/boot_vga"), "1\n");
    let error = refusal(&root, GPU, Consent { group: true, screen: false });
    assert!(error.kind() == Kind::Busy && error.to_string().contains("display of the firmware"), "{error}");
    assert!(error.next_step().unwrap().contains("--give-up-screen"), "{error}");
    let consent = Consent { group: false, screen: true };
    assert_eq!(plan(&root, GPU, consent).unwrap().before.len(), 2);

    let root = root.device("drm", &format!("pci0000:00/{GPU}/drm/card0")).file("proc/812/comm", "Xorg\n");
    fs::create_dir_all(root.path().join("proc/812/fd")).unwrap();
    symlink("/dev/dri/card0", root.path().join("proc/812/fd/7")).unwrap();
    let error = refusal(&root, GPU, consent);
    assert!(error.to_string().contains("812 Xorg has /dev/dri/card0 open"), "{error}");
}

#[test]
fn without_an_iommu_nothing_is_taken() {
    let root = machine();
    fs::remove_file(root.path().join(format!("sys/devices/pci0000:00/{GPU}/iommu_group"))).unwrap();
    let error = refusal(&root, GPU, Consent::default());
    assert!(error.kind() == Kind::Unsupported && error.to_string().contains("IOMMU"), "{error}");
}

#[test]
fn where_the_kernel_does_not_follow_everything_is_as_before() {
    let root = machine();
    let before = state(&root);
    let mut kernel = Linux { refuses: Some(SOUND), ..Linux::of(&root) };
    let binding = plan(&root, GPU, Consent::default()).unwrap();
    // It takes nothing back either, at first.
    let error = binding.make(root.path(), &mut kernel).unwrap_err();
    assert!(error.to_string().contains(SOUND) && error.to_string().contains("brought back"), "{error}");
    // What is left to do stays written down.
    kernel.refuses = None;
    Binding::recorded(root.path(), GPU.parse().unwrap()).unwrap().undo(root.path(), &mut kernel).unwrap();
    assert_eq!(state(&root), before);

    let mut kernel = Linux { refuses: Some(GPU), ..Linux::of(&root) };
    let no_driver = root.path().join(format!("sys/devices/pci0000:00/{GPU}/driver"));
    fs::remove_file(no_driver).unwrap();
    let before = state(&root);
    let error = plan(&root, GPU, Consent::default()).unwrap().make(root.path(), &mut kernel).unwrap_err();
    assert!(error.to_string().contains("bound to no driver, not to vfio-pci"), "{error}");
    assert_eq!(state(&root), before);
    assert!(!root.path().join(format!("run/peervram/bound/{GPU}.json")).exists());
}

#[test]
fn what_was_not_bound_here_is_not_unbound_here() {
    let error = Binding::recorded(machine().path(), GPU.parse().unwrap()).unwrap_err();
    assert!(error.kind() == Kind::NotFound && error.to_string().contains("driverctl"), "{error}");
}

#[test]
fn a_driver_that_is_gone_is_asked_for_and_nothing_is_forgotten() {
    let root = machine();
    let mut kernel = Linux::of(&root);
    plan(&root, GPU, Consent::default()).unwrap().make(root.path(), &mut kernel).unwrap();
    let driver = root.path().join("sys/bus/pci/drivers/amdgpu");
    fs::remove_dir(&driver).unwrap();
    let recorded = || Binding::recorded(root.path(), GPU.parse().unwrap()).unwrap();
    let error = recorded().undo(root.path(), &mut kernel).unwrap_err();
    assert!(error.kind() == Kind::NotFound && error.to_string().contains("amdgpu is not loaded"), "{error}");
    fs::create_dir(&driver).unwrap();
    recorded().undo(root.path(), &mut kernel).unwrap();
    assert_eq!(state(&root)[GPU], (Some("amdgpu".to_owned()), "(null)\n".to_owned()));
}

#[test]
fn neighbours_that_are_taken_later_are_given_back_with_the_rest() {
    let root = machine();
    let mut kernel = Linux::of(&root);
    let before = state(&root);
    let link = root.path().join(format!("sys/devices/pci0000:00/{SOUND}/driver"));
    let driver = fs::read_link(&link).unwrap();
    fs::remove_file(&link).unwrap();
    plan(&root, GPU, Consent::default()).unwrap().make(root.path(), &mut kernel).unwrap();
    symlink(driver, &link).unwrap();
    let later = plan(&root, GPU, Consent::default()).unwrap();
    assert_eq!(later.before.len(), 1);
    later.make(root.path(), &mut kernel).unwrap();
    Binding::recorded(root.path(), GPU.parse().unwrap()).unwrap().undo(root.path(), &mut kernel).unwrap();
    assert_eq!(state(&root), before);
}
