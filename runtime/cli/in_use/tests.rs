//! A machine below a folder, with something of every kind hanging on some function of it.

use std::fs;

use super::{InUse, Use, words};
use crate::fake_root::Root;

/// What is asked about: a disk's controller, a network card, a GPU of the screen, one of nobody, a USB controller.
const DISK: &str = "0000:03:00.0";
const OTHER_DISK: &str = "0000:04:00.0";
const NETWORK: &str = "0000:05:00.0";
const SCREEN: &str = "0000:01:00.0";
const FREE: &str = "0000:02:00.0";
const USB: &str = "0000:00:14.0";

fn machine() -> Root {
    let (disk, other) =
        (format!("pci0000:00/0000:00:1c.0/{DISK}"), format!("pci0000:00/0000:00:1c.4/{OTHER_DISK}"));
    Root::new()
        .device("block", &format!("{disk}/nvme/nvme0/nvme0n1"))
        .device("block", &format!("{disk}/nvme/nvme0/nvme0n1/nvme0n1p2"))
        .device("block", &format!("{other}/ata1/block/sda"))
        .device("block", "virtual/block/dm-0")
        .link("sys/devices/virtual/block/dm-0/slaves/sda", &format!("sys/devices/{other}/ata1/block/sda"))
        .link("sys/dev/block/259:2", &format!("sys/devices/{disk}/nvme/nvme0/nvme0n1/nvme0n1p2"))
        .file("dev/dm-0", "")
        .link("dev/mapper/swap", "dev/dm-0")
        .file(
            "proc/self/mountinfo",
            "22 1 259:2 / / rw,relatime shared:1 - ext4 /dev/root rw\n\
             23 22 0:5 / /proc rw - proc proc rw\n\
             24 22 259:2 /srv /my\\040files rw shared:2 master:1 - ext4 /dev/root rw\n",
        )
        .file("proc/swaps", "Filename Type Size Used Priority\n/dev/mapper/swap partition 1 0 -2\n")
        .device("net", &format!("pci0000:00/0000:00:1d.0/{NETWORK}/net/eth0"))
        .device("net", "pci0000:00/0000:00:1d.1/0000:06:00.0/net/eth1")
        .device("net", "virtual/net/br0")
        .link("sys/devices/virtual/net/br0/lower_eth0", "sys/class/net/eth0")
        .file(
            "proc/net/route",
            "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n\
             br0\t00000000\t0100A8C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n",
        )
        .file(
            "proc/net/ipv6_route",
            "fe800000000000000000000000000000 40 00000000000000000000000000000000 00 00000000000000000000000000000000 00000100 00000001 00000000 00000001 eth1\n",
        )
        .device("graphics", &format!("pci0000:00/0000:00:01.0/{SCREEN}/graphics/fb0"))
        .device("graphics", &format!("pci0000:00/0000:00:02.0/{FREE}/graphics/fb1"))
        .device("vtconsole", "virtual/vtconsole/vtcon1")
        .file("sys/devices/virtual/vtconsole/vtcon1/name", "(M) frame buffer device\n")
        .file("sys/devices/virtual/vtconsole/vtcon1/bind", "1\n")
        .device("drm", &format!("pci0000:00/0000:00:01.0/{SCREEN}/drm/card0"))
        .link("proc/812/fd/7", "dev/dri/card0")
        .file("proc/812/comm", "Xorg\n")
        .file("sys/class/tty/console/active", "tty0\n")
        .device("input", &format!("pci0000:00/{USB}/usb1/1-2/input/input3"))
        .file(&format!("sys/devices/pci0000:00/{USB}/usb1/1-2/input/input3/name"), "Keyboard\n")
        .device("input", "pci0000:00/0000:00:02.0/0000:02:00.1/sound/card1/input9")
        .file("sys/devices/pci0000:00/0000:00:02.0/0000:02:00.1/sound/card1/input9/name", "HDMI/DP,pcm=3\n")
}

fn of(root: &Root, function: &str) -> Vec<Use> {
    InUse::read(root.path()).of(function.parse().unwrap())
}

#[test]
fn a_disk_is_in_use_by_its_mounts_and_so_is_the_port_above_it() {
    let root = machine();
    let mounted = |at: &str| Use::Mounted { device: "nvme0n1p2".into(), at: at.into() };
    let expected = vec![mounted("/"), mounted("/my files")];
    assert_eq!(of(&root, DISK), expected);
    assert_eq!(of(&root, "0000:00:1c.0"), expected);
}

#[test]
fn a_volume_is_in_use_through_what_it_is_made_of() {
    let uses = of(&machine(), OTHER_DISK);
    let expected =
        [Use::Swap { device: "dm-0".into() }, Use::PartOf { device: "sda".into(), of: "dm-0".into() }];
    assert_eq!(uses, expected, "{}", words(&uses));
}

#[test]
fn a_network_card_is_in_use_through_a_bridge_and_not_by_its_link_local_route() {
    let root = machine();
    assert_eq!(of(&root, NETWORK), [Use::Network { interface: "br0".into(), is_default: true }]);
    assert_eq!(of(&root, "0000:06:00.0"), []);
    let root = root.file(
        "proc/net/ipv6_route",
        "20010db8000000000000000000000000 40 00000000000000000000000000000000 00 00000000000000000000000000000000 00000100 00000001 00000000 00000001 eth1\n\
         00000000000000000000000000000000 00 00000000000000000000000000000000 00 00000000000000000000000000000000 ffffffff 00000001 00000000 00200200 lo\n",
    );
    assert_eq!(of(&root, "0000:06:00.0"), [Use::Network { interface: "eth1".into(), is_default: false }]);
}

#[test]
fn the_console_is_on_the_first_framebuffer_only_and_a_keyboard_is_no_jack() {
    let root = machine();
    assert!(of(&root, SCREEN).contains(&Use::TextConsole { framebuffer: "fb0".into() }));
    assert_eq!(of(&root, FREE), []);
    assert_eq!(of(&root, USB), [Use::Input { name: "Keyboard".into() }]);
    assert_eq!(of(&root, "0000:02:00.1"), []);
    let unbound = root.file("sys/devices/virtual/vtconsole/vtcon1/bind", "0\n");
    assert!(!of(&unbound, SCREEN).iter().any(Use::is_screen));
}

#[test]
fn serial_consoles_boot_displays_and_virtual_functions_are_uses() {
    let (serial, gpu) = ("sys/devices/pci0000:00/0000:00:16.3", "sys/devices/pci0000:00/0000:07:00.0");
    let root = Root::new()
        .link("sys/class/tty/ttyS4", &format!("{serial}/tty/ttyS4"))
        .file("sys/class/tty/console/active", "ttyS4 tty0\n")
        .link("sys/bus/pci/devices/0000:07:00.0", gpu)
        .file(&format!("{gpu}/boot_vga"), "1\n")
        .file(&format!("{gpu}/sriov_numvfs"), "2\n");
    assert_eq!(of(&root, "0000:00:16.3"), [Use::SerialConsole { tty: "ttyS4".into() }]);
    assert_eq!(of(&root, "0000:07:00.0"), [Use::BootDisplay, Use::VirtualFunctions { count: 2 }]);
}

#[test]
fn whoever_has_a_node_open_is_named() {
    let root = machine();
    // Links to files below /dev are as the kernel shows them, from the machine's own root.
    fs::remove_file(root.path().join("proc/812/fd/7")).unwrap();
    std::os::unix::fs::symlink("/dev/dri/card0", root.path().join("proc/812/fd/7")).unwrap();
    std::os::unix::fs::symlink("/dev/nvidia3", root.path().join("proc/812/fd/8")).unwrap();
    let root =
        root.file("proc/driver/nvidia/gpus/0000:08:00.0/information", "Model: X\nDevice Minor: \t 3\n");
    let open = |node: &str| Use::Open { node: node.into(), by: "812 Xorg".into() };
    assert!(of(&root, SCREEN).contains(&open("/dev/dri/card0")));
    assert_eq!(of(&root, "0000:08:00.0"), [open("/dev/nvidia3")]);
}

#[test]
fn several_devices_of_one_file_system_are_all_in_use() {
    let disk = |number: u32| format!("pci0000:00/0000:0{number}:00.0/nvme/nvme{number}/nvme{number}n1");
    let root = Root::new()
        .device("block", &disk(1))
        .device("block", &disk(2))
        .file("dev/nvme1n1", "")
        .link("sys/fs/btrfs/1234/devices/nvme1n1", &format!("sys/devices/{}", disk(1)))
        .link("sys/fs/btrfs/1234/devices/nvme2n1", &format!("sys/devices/{}", disk(2)))
        .file("proc/1/mountinfo", "30 1 0:40 /root / rw - btrfs /dev/nvme1n1 rw\n");
    for number in [1, 2] {
        let expected = Use::Mounted { device: format!("nvme{number}n1"), at: "/".into() };
        assert_eq!(of(&root, &format!("0000:0{number}:00.0")), [expected]);
    }
}

#[test]
fn a_disk_with_several_paths_is_in_use_by_each_controller() {
    let head = "virtual/nvme-subsystem/nvme-subsys0";
    let root = Root::new()
        .device("block", &format!("{head}/nvme0n1"))
        .link(&format!("sys/devices/{head}/nvme0"), "sys/devices/pci0000:00/0000:01:00.0/nvme/nvme0")
        .link(&format!("sys/devices/{head}/nvme1"), "sys/devices/pci0000:00/0000:02:00.0/nvme/nvme1")
        .link("sys/dev/block/259:0", &format!("sys/devices/{head}/nvme0n1"))
        .file("proc/self/mountinfo", "30 1 259:0 / / rw - xfs /dev/nvme0n1 rw\n");
    for controller in ["0000:01:00.0", "0000:02:00.0"] {
        assert_eq!(of(&root, controller), [Use::Mounted { device: "nvme0n1".into(), at: "/".into() }]);
    }
}

#[test]
fn files_of_the_host_are_a_use_of_the_device_that_brings_them() {
    let root = Root::new()
        .link("sys/bus/virtio/devices/virtio2", "sys/devices/pci0000:00/0000:00:03.0/virtio2")
        .file("sys/devices/pci0000:00/0000:00:03.0/virtio2/mount_tag", "root\0")
        .file("proc/self/mountinfo", "30 1 0:2 / / rw - 9p root rw,trans=virtio\n");
    assert_eq!(of(&root, "0000:00:03.0"), [Use::Mounted { device: "root".into(), at: "/".into() }]);
}

#[test]
fn a_pool_may_be_on_any_disk() {
    let root = Root::new()
        .device("block", "pci0000:00/0000:01:00.0/ata1/block/sda")
        .file("proc/77/mountinfo", "30 1 0:40 / / rw - zfs rpool/ROOT/one rw\n");
    let expected = Use::PoolPerhaps { device: "sda".into(), pool: "rpool".into() };
    assert_eq!(of(&root, "0000:01:00.0"), [expected]);
}

#[test]
fn what_a_container_hides_is_said() {
    let root = Root::new().file("proc/self/mountinfo", "30 1 8:1 / / rw - ext4 /dev/sda1 rw\n");
    assert!(InUse::read(root.path()).unread().is_empty());
    fs::create_dir_all(root.path().join("proc/self/ns")).unwrap();
    std::os::unix::fs::symlink("pid:[4026532198]", root.path().join("proc/self/ns/pid")).unwrap();
    assert!(InUse::read(root.path()).unread()[0].contains("container"));
    assert!(InUse::read(Root::new().path()).unread()[0].contains("mounts"));
}

#[test]
fn a_folder_that_looks_like_a_function_and_is_named_otherwise_is_none() {
    // Seen on Linux 7.3: `serial_base_ctrl_add` names a port after its PNP device.
    let of = |folder: &str| super::read::functions_on(std::path::Path::new(folder));
    assert_eq!(of("/sys/devices/pnp0/00:03/00:03:0/00:03:0.0/tty/ttyS0"), []);
    let functions =
        of("/sys/devices/pci0000:00/0000:00:04.0/0000:03:00.1/0000:03:00.1:0/0000:03:00.1:0.0/tty/ttyS4");
    assert_eq!(functions, ["0000:00:04.0".parse().unwrap(), "0000:03:00.1".parse().unwrap()]);
}
