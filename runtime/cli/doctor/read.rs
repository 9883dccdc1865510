//! Reads a machine's facts out of sysfs, procfs and /dev.
//!
//! Nothing is opened but ordinary files: opening a VFIO device resets it, and opening a card's node may make
//! its opener the screen's master. Whether a device file can be opened is asked of `access`, which also knows
//! what a container may not (`devcgroup_inode_permission` in `fs/namei.c`).

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use peervram::backends::PciAddress;
use peervram::backends::topology::{Reading, Topology};
use rustix::fs::Access;
use rustix::process::Resource;

use super::facts::{Broker, DeviceFile, Distribution, Facts, User, Vulkan};
use super::kernel_config;
use crate::in_use::InUse;
use crate::pci_names::PciNames;

/// What is not found below a root: what the kernel says of this process, and what is read elsewhere.
pub struct ProcessFacts {
    pub kernel_release: String,
    pub topology: Reading<Topology>,
    pub vulkan: Vulkan,
    pub broker: Broker,
}

/// The facts of a machine whose `sys`, `proc`, `dev` and `etc` are below `root`.
pub fn read(root: &Path, of_process: ProcessFacts) -> Facts {
    let ProcessFacts { kernel_release, topology, vulkan, broker } = of_process;
    let mut facts = Facts {
        kernel_options: kernel_config::read(root, &kernel_release),
        command_line: command_line(root),
        user: user(root),
        memlock_bytes: rustix::process::getrlimit(Resource::Memlock).current,
        distribution: distribution(root),
        is_container: is_container(root),
        iommus: names(root, "sys/class/iommu"),
        remaps_interrupts: remaps_interrupts(root),
        allows_unsafe_interrupts: ["vfio_iommu_type1", "iommufd"].iter().any(|module| {
            let path = format!("sys/module/{module}/parameters/allow_unsafe_interrupts");
            fs::read_to_string(root.join(path)).is_ok_and(|text| text.trim() == "Y")
        }),
        has_vfio_pci: root.join("sys/bus/pci/drivers/vfio-pci").exists(),
        files: files(root),
        vfio_devices: BTreeMap::new(),
        resizable: BTreeMap::new(),
        in_use: InUse::read(root).all(),
        names: BTreeMap::new(),
        kernel_release,
        topology,
        vulkan,
        broker,
    };
    read_functions(root, &mut facts);
    facts
}

/// What is not part of a topology.
fn read_functions(root: &Path, facts: &mut Facts) {
    let pci_names = PciNames::load();
    let folder = |address: PciAddress| format!("sys/bus/pci/devices/{address}");
    let functions: Vec<_> = facts.functions().cloned().collect();
    for function in functions {
        let address = function.address;
        if function.is_bound_to_vfio()
            && let Some(name) = names(root, &format!("{}/vfio-dev", folder(address))).into_iter().next()
        {
            facts.vfio_devices.insert(address, name);
        }
        let offered =
            |index: &u32| root.join(folder(address)).join(format!("resource{index}_resize")).exists();
        let resizable: Vec<u32> = (0..6).filter(offered).collect();
        if !resizable.is_empty() {
            facts.resizable.insert(address, resizable);
        }
        if let Some(name) = pci_names.name(function.vendor_id, function.device_id) {
            facts.names.insert(address, name);
        }
    }
}

fn command_line(root: &Path) -> Reading<String> {
    match fs::read_to_string(root.join("proc/cmdline")) {
        Ok(text) => Reading::Known(text.trim().to_owned()),
        Err(error) => Reading::Unread(format!("/proc/cmdline: {error}")),
    }
}

fn user(root: &Path) -> User {
    let groups = rustix::process::getgroups().unwrap_or_default();
    let text = fs::read_to_string(root.join("etc/group")).unwrap_or_default();
    let member_of = |line: &str| {
        let mut fields = line.split(':');
        let (name, id) = (fields.next()?, fields.nth(1)?.parse::<u32>().ok()?);
        let is_in = groups.iter().any(|group| group.as_raw() == id);
        (matches!(name, "video" | "render") && is_in).then(|| name.to_owned())
    };
    User { uid: rustix::process::geteuid().as_raw(), groups: text.lines().filter_map(member_of).collect() }
}

fn distribution(root: &Path) -> Distribution {
    let text = fs::read_to_string(root.join("etc/os-release")).unwrap_or_default();
    let value = |key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='))?;
        Some(line.trim_matches(['"', '\'']).to_owned())
    };
    let words = [value("ID"), value("ID_LIKE")].into_iter().flatten();
    Distribution {
        ids: words.flat_map(|words| words.split(' ').map(str::to_owned).collect::<Vec<_>>()).collect(),
        codename: value("VERSION_CODENAME").filter(|name| !name.is_empty()),
    }
}

/// By the marks that Docker, Podman, systemd and Kubernetes leave.
fn is_container(root: &Path) -> bool {
    [".dockerenv", "run/.containerenv", "run/systemd/container", "var/run/secrets/kubernetes.io"]
        .iter()
        .any(|mark| root.join(mark).exists())
}

/// Whether an interrupt's chip is one behind an IOMMU: "IR-PCI-MSI". Elsewhere than on x86 nothing is so
/// called.
fn remaps_interrupts(root: &Path) -> Option<bool> {
    let text = fs::read_to_string(root.join("proc/interrupts")).ok()?;
    text.contains("IO-APIC").then(|| text.contains(" IR-"))
}

fn files(root: &Path) -> Vec<DeviceFile> {
    let mut paths: Vec<PathBuf> =
        ["dev/vfio/vfio", "dev/iommu", "dev/udmabuf", "dev/kmsg"].iter().map(PathBuf::from).collect();
    let within = |folder: &'static str, is_meant: fn(&str) -> bool| {
        let names = names(root, folder).into_iter().filter(move |name| is_meant(name));
        names.map(move |name| Path::new(folder).join(name))
    };
    paths.extend(within("dev/vfio", |name| {
        name.trim_start_matches("noiommu-").bytes().all(|byte| byte.is_ascii_digit())
    }));
    paths.extend(within("dev/vfio/devices", |name| name.contains("vfio")));
    paths.extend(within("dev/dri", |name| name.starts_with("card") || name.starts_with("renderD")));
    paths.iter().filter_map(|path| file(root, path)).collect()
}

fn file(root: &Path, path: &Path) -> Option<DeviceFile> {
    let status = fs::metadata(root.join(path)).ok()?;
    let is_log = path.ends_with("kmsg");
    let wanted = if is_log { Access::READ_OK } else { Access::READ_OK | Access::WRITE_OK };
    // What its mode allows, opening it does not (`check_syslog_permissions` in `kernel/printk/printk.c`).
    let is_restricted = is_log
        && !rustix::process::geteuid().is_root()
        && fs::read_to_string(root.join("proc/sys/kernel/dmesg_restrict"))
            .is_ok_and(|text| text.trim() != "0");
    Some(DeviceFile {
        is_usable: !is_restricted && rustix::fs::access(root.join(path), wanted).is_ok(),
        path: Path::new("/").join(path),
        mode: status.mode() & 0o7777,
        owner_uid: status.uid(),
        owner_gid: status.gid(),
    })
}

/// The names in a folder, sorted; none where it is not there.
fn names(root: &Path, folder: &str) -> Vec<String> {
    let entries = fs::read_dir(root.join(folder)).into_iter().flatten();
    let mut names: Vec<String> =
        entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    names.sort_unstable();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(files: &[(&str, &str)]) -> Facts {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let of_process = ProcessFacts {
            kernel_release: "7.3.4".into(),
            topology: Reading::Unread("none".into()),
            vulkan: Vulkan::Missing { why: "none".into() },
            broker: Broker::Absent { socket: "none".into() },
        };
        read(root.path(), of_process)
    }

    #[test]
    fn an_empty_root_is_read() {
        let facts = machine(&[]);
        assert!(facts.files.is_empty() && facts.iommus.is_empty() && !facts.is_container);
        assert_eq!(facts.remaps_interrupts, None);
        assert!(matches!(facts.command_line, Reading::Unread(_)));
    }

    #[test]
    fn a_machine_is_read_from_its_files() {
        let facts = machine(&[
            ("proc/cmdline", "intel_iommu=on quiet\n"),
            ("proc/interrupts", "  0:  2  IR-IO-APIC  2-edge  timer\n 24: 0  IR-PCI-MSI-0000:01:00.0\n"),
            ("sys/class/iommu/dmar0/x", ""),
            ("sys/bus/pci/drivers/vfio-pci/bind", ""),
            ("sys/module/iommufd/parameters/allow_unsafe_interrupts", "Y\n"),
            ("etc/os-release", "ID=ubuntu\nID_LIKE=\"debian\"\nVERSION_CODENAME=noble\n"),
            ("run/.containerenv", ""),
            ("dev/vfio/vfio", ""),
            ("dev/vfio/17", ""),
            ("dev/vfio/devices/vfio0", ""),
            ("dev/dri/card0", ""),
            ("dev/dri/by-path/x", ""),
            ("dev/kmsg", ""),
        ]);
        assert_eq!(facts.command_line, Reading::Known("intel_iommu=on quiet".into()));
        assert_eq!(facts.remaps_interrupts, Some(true));
        assert!(facts.allows_unsafe_interrupts && facts.has_vfio_pci && facts.is_container);
        assert_eq!(facts.iommus, ["dmar0"]);
        assert_eq!(facts.distribution.ids, ["ubuntu", "debian"]);
        assert_eq!(facts.distribution.codename.as_deref(), Some("noble"));
        let paths: Vec<_> = facts.files.iter().map(|file| file.path.to_str().unwrap()).collect();
        let expected =
            ["/dev/vfio/vfio", "/dev/kmsg", "/dev/vfio/17", "/dev/vfio/devices/vfio0", "/dev/dri/card0"];
        assert_eq!(paths, expected);
        assert!(facts.files.iter().all(|file| file.is_usable));
    }
}
