//! Reads what a machine stands on, out of sysfs and procfs below a root.

use std::fs;
use std::path::{Path, PathBuf};

use peervram::backends::PciAddress;

use super::{InUse, Node, Use};

/// `PROC_PID_INIT_INO` (include/uapi/linux/nsfs.h): the PID namespace that sees every process.
const FIRST_PID_NAMESPACE: &str = "pid:[4026531836]";

impl InUse {
    /// Of the machine whose `sys`, `proc` and `dev` are below `root`.
    pub fn read(root: &Path) -> Self {
        let mut this = Self::default();
        this.read_block(root);
        this.read_mounts(root);
        this.read_networks(root);
        this.read_consoles(root);
        this.read_inputs(root);
        this.read_functions(root);
        this.read_open_nodes(root);
        this
    }

    fn read_block(&mut self, root: &Path) {
        for (name, folder) in devices(&root.join("sys/class/block")) {
            let mut node = Node { functions: functions_on(&folder), parts: names(&folder.join("slaves")) };
            // A namespace with several paths hangs from no controller but from their subsystem, which links to
            // them (`nvme_init_subsystem` in drivers/nvme/host/core.c).
            let above = folder.ancestors().find(|above| {
                above.file_name().is_some_and(|name| name.to_string_lossy().starts_with("nvme-subsys"))
            });
            let controllers = above.map(devices).unwrap_or_default();
            let controllers = controllers.iter().filter(|(name, _)| name.starts_with("nvme"));
            node.functions.extend(controllers.flat_map(|(_, folder)| functions_on(folder)));
            self.block.insert(name, node);
        }
    }

    fn read_mounts(&mut self, root: &Path) {
        for mount in mounts(root, &mut self.unread) {
            for device in mount.devices(root) {
                self.mounts.insert((device, mount.at.clone()));
            }
            // Which devices a pool is made of, its own tools know: it may be any.
            if mount.kind == "zfs" {
                let pool = mount.source.split('/').next().unwrap_or_default().to_owned();
                let disks = self.block.iter().filter(|(_, node)| node.parts.is_empty());
                self.plain.extend(disks.map(|(device, node)| {
                    (node.functions.clone(), Use::PoolPerhaps { device: device.clone(), pool: pool.clone() })
                }));
            }
            // No block device: the host's files, by a virtio device whose tag is the source.
            if matches!(mount.kind.as_str(), "9p" | "virtiofs") {
                let used = Use::Mounted { device: mount.source.clone(), at: mount.at.clone() };
                self.plain
                    .extend(tagged(root, &mount.source).map(|folder| (functions_on(&folder), used.clone())));
            }
        }
        let swaps = fs::read_to_string(root.join("proc/swaps")).unwrap_or_default();
        let files = swaps.lines().skip(1).filter_map(|line| line.split_whitespace().next());
        self.swaps.extend(files.filter_map(|file| block_name(root, &unescaped(file))));
    }

    fn read_networks(&mut self, root: &Path) {
        for (name, folder) in devices(&root.join("sys/class/net")) {
            // `netdev_adjacent_sysfs_add` in net/core/dev.c: lower_eth0 below a bridge, a bond, a VLAN.
            let lower = names(&folder);
            let lower = lower.iter().filter_map(|name| name.strip_prefix("lower_").map(str::to_owned));
            let node = Node { functions: functions_on(&folder), parts: lower.collect() };
            self.interfaces.insert(name, node);
        }
        let mut add = |interface: &str, is_default: bool| {
            *self.routes.entry(interface.to_owned()).or_default() |= is_default;
        };
        let text = fs::read_to_string(root.join("proc/net/route")).unwrap_or_default();
        for line in text.lines().skip(1) {
            let words: Vec<&str> = line.split_whitespace().collect();
            if let [interface, destination, _, _, _, _, _, mask, ..] = words[..] {
                add(interface, destination == "00000000" && mask == "00000000");
            }
        }
        let text = fs::read_to_string(root.join("proc/net/ipv6_route")).unwrap_or_default();
        for line in text.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            let (Some(destination), Some(prefix), Some(&interface)) =
                (words.first(), words.get(1), words.last())
            else {
                continue;
            };
            // Every interface that is up has link-local and multicast routes; they lead nowhere.
            let is_everybodys = destination.starts_with("fe80") || destination.starts_with("ff");
            if interface != "lo" && !is_everybodys {
                add(interface, *prefix == "00" && destination.bytes().all(|digit| digit == b'0'));
            }
        }
    }

    fn read_consoles(&mut self, root: &Path) {
        let active = text(&root.join("sys/class/tty/console/active"));
        for tty in active.split_whitespace().filter(|tty| tty.starts_with("tty") && *tty != "tty0") {
            if let Ok(folder) = fs::canonicalize(root.join("sys/class/tty").join(tty)) {
                self.plain.push((functions_on(&folder), Use::SerialConsole { tty: tty.to_owned() }));
            }
        }
        let is_drawn = devices(&root.join("sys/class/vtconsole")).iter().any(|(_, folder)| {
            text(&folder.join("name")).contains("frame buffer") && text(&folder.join("bind")) == "1"
        });
        // Every GPU's driver brings a framebuffer; the console is on the first one (`fbcon_fb_registered`).
        let number = |name: &str| name.strip_prefix("fb").and_then(|number| number.parse::<u32>().ok());
        let framebuffers = devices(&root.join("sys/class/graphics"));
        let first = framebuffers.iter().filter(|(name, _)| number(name).is_some());
        if let Some((name, folder)) = first.min_by_key(|(name, _)| number(name)).filter(|_| is_drawn) {
            self.plain.push((functions_on(folder), Use::TextConsole { framebuffer: name.clone() }));
        }
    }

    fn read_inputs(&mut self, root: &Path) {
        for (_, folder) in devices(&root.join("sys/class/input")) {
            // A sound card's jacks are inputs, too, and not what one types on.
            let is_usb =
                folder.components().any(|part| part.as_os_str().to_string_lossy().starts_with("usb"));
            let name = text(&folder.join("name"));
            if is_usb && !name.is_empty() {
                self.plain.push((functions_on(&folder), Use::Input { name }));
            }
        }
    }

    fn read_functions(&mut self, root: &Path) {
        for (_, folder) in devices(&root.join("sys/bus/pci/devices")) {
            let functions = functions_on(&folder);
            if text(&folder.join("boot_vga")) == "1" {
                self.plain.push((functions.clone(), Use::BootDisplay));
            }
            if let Ok(count @ 1..) = text(&folder.join("sriov_numvfs")).parse() {
                self.plain.push((functions, Use::VirtualFunctions { count }));
            }
        }
    }

    /// Who has a node of a graphics driver open: a display server, a program that computes.
    fn read_open_nodes(&mut self, root: &Path) {
        let nvidia = nvidia_nodes(root);
        let mut hidden = 0_usize;
        for pid in names(&root.join("proc")).iter().filter(|name| name.bytes().all(|b| b.is_ascii_digit())) {
            let folder = root.join("proc").join(pid);
            let Ok(descriptors) = fs::read_dir(folder.join("fd")) else {
                hidden += usize::from(folder.exists());
                continue;
            };
            let files = descriptors.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
            for file in files {
                let Some(name) = file.file_name().map(|name| name.to_string_lossy().into_owned()) else {
                    continue;
                };
                let functions = if file.starts_with("/dev/dri") {
                    fs::canonicalize(root.join("sys/class/drm").join(&name))
                        .map(|path| functions_on(&path))
                        .ok()
                } else {
                    nvidia.iter().find(|(node, _)| file == Path::new(node)).map(|(_, address)| vec![*address])
                };
                if let Some(functions) = functions {
                    let by = format!("{pid} {}", text(&folder.join("comm")).escape_debug());
                    self.plain.push((functions, Use::Open { node: file.display().to_string(), by }));
                }
            }
        }
        let namespace = fs::read_link(root.join("proc/self/ns/pid"));
        if namespace.is_ok_and(|namespace| namespace.as_os_str() != FIRST_PID_NAMESPACE) {
            self.unread.push("processes outside this container".to_owned());
        }
        if hidden > 0 {
            self.unread.push(format!("what {hidden} processes of other users have open"));
        }
    }
}

/// The mounts of every namespace that may be seen: containers have some of their own.
fn mounts(root: &Path, unread: &mut Vec<String>) -> Vec<Mount> {
    let processes = names(&root.join("proc")).into_iter();
    let processes = processes.filter(|name| name == "self" || name.bytes().all(|byte| byte.is_ascii_digit()));
    let mut namespaces: Vec<PathBuf> = Vec::new();
    let mut mounts = Vec::new();
    for folder in processes.map(|name| root.join("proc").join(name)) {
        match fs::read_link(folder.join("ns/mnt")) {
            Ok(namespace) if namespaces.contains(&namespace) => continue,
            Ok(namespace) => namespaces.push(namespace),
            Err(_) => {}
        }
        let text = fs::read_to_string(folder.join("mountinfo")).unwrap_or_default();
        mounts.extend(text.lines().filter_map(Mount::parse));
    }
    if mounts.is_empty() {
        unread.push("mounts, which /proc does not show".to_owned());
    }
    mounts
}

/// A line of mountinfo (`show_mountinfo` in fs/proc_namespace.c).
struct Mount {
    number: String,
    at: String,
    kind: String,
    source: String,
}

impl Mount {
    fn parse(line: &str) -> Option<Self> {
        let (mount, file_system) = line.split_once(" - ")?;
        let mut mount = mount.split(' ').skip(2);
        let mut file_system = file_system.split(' ');
        Some(Self {
            number: mount.next()?.to_owned(),
            at: unescaped(mount.nth(1)?),
            kind: file_system.next()?.to_owned(),
            source: unescaped(file_system.next()?),
        })
    }

    /// The block devices that it lies on.
    fn devices(&self, root: &Path) -> Vec<String> {
        let by_number = fs::canonicalize(root.join("sys/dev/block").join(&self.number));
        if let Some(name) = by_number.ok().as_deref().and_then(Path::file_name) {
            return vec![name.to_string_lossy().into_owned()];
        }
        // Several devices: bcachefs names them all, btrfs one of them.
        let mut devices: Vec<String> =
            self.source.split(':').filter_map(|source| block_name(root, source)).collect();
        if self.kind == "btrfs" {
            let of_one = |folder: &PathBuf| devices.iter().any(|device| folder.join(device).exists());
            let folders = names(&root.join("sys/fs/btrfs")).into_iter();
            let mut folders = folders.map(|name| root.join("sys/fs/btrfs").join(name).join("devices"));
            let others = folders.find(of_one).map(|folder| names(&folder)).unwrap_or_default();
            devices.extend(others);
        }
        devices
    }
}

/// The block device behind a file below /dev, through links as those of /dev/mapper are.
fn block_name(root: &Path, path: &str) -> Option<String> {
    let path = root.join(path.strip_prefix("/dev/").map(|rest| format!("dev/{rest}"))?);
    let path = fs::canonicalize(&path).unwrap_or(path);
    let name = path.file_name()?.to_string_lossy().into_owned();
    root.join("sys/class/block").join(&name).exists().then_some(name)
}

/// The virtio device with that tag: 9p's shows it itself, virtiofs's in a folder of the file system's.
fn tagged(root: &Path, tag: &str) -> Option<PathBuf> {
    let has = |file: PathBuf| text(&file).trim_end_matches('\0') == tag;
    let virtio = devices(&root.join("sys/bus/virtio/devices"));
    let of_9p =
        virtio.into_iter().find(|(_, folder)| has(folder.join("mount_tag"))).map(|(_, folder)| folder);
    let virtiofs = devices(&root.join("sys/fs/virtiofs"));
    let of_virtiofs = || virtiofs.into_iter().find(|(_, folder)| has(folder.join("tag")));
    of_9p.or_else(|| fs::canonicalize(of_virtiofs()?.1.join("device")).ok())
}

/// NVIDIA's own nodes and the GPUs that they are of.
fn nvidia_nodes(root: &Path) -> Vec<(String, PciAddress)> {
    let folder = root.join("proc/driver/nvidia/gpus");
    let node = |name: &String| {
        let information = text(&folder.join(name).join("information"));
        let minor = information.lines().find_map(|line| line.strip_prefix("Device Minor:"))?.trim();
        Some((format!("/dev/nvidia{minor}"), name.parse().ok()?))
    };
    names(&folder).iter().filter_map(node).collect()
}

/// The functions in a path of sysfs.
pub(super) fn functions_on(folder: &Path) -> Vec<PciAddress> {
    let function = |part: &str| {
        let address: PciAddress = part.parse().ok()?;
        // As the kernel names functions: a serial port of a PNP device has folders like 00:03:0.0 on its way.
        (address.to_string() == part).then_some(address)
    };
    folder.components().filter_map(|part| function(part.as_os_str().to_str()?)).collect()
}

/// Entries of a folder with the places that they lead to.
fn devices(folder: &Path) -> Vec<(String, PathBuf)> {
    let names = names(folder).into_iter();
    names
        .filter_map(|name| Some((fs::canonicalize(folder.join(&name)).ok()?, name)))
        .map(|(at, name)| (name, at))
        .collect()
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten();
    let mut names: Vec<String> =
        entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    names.sort_unstable();
    names
}

/// Nothing where it cannot be read.
fn text(file: &Path) -> String {
    fs::read_to_string(file).map(|text| text.trim().to_owned()).unwrap_or_default()
}

/// Spaces and their like are written as octal numbers (`mangle` in fs/seq_file.c).
fn unescaped(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let [first, others @ ..] = rest {
        let octal = others.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()).filter(|_| *first == b'\\') {
            Some(byte) => {
                bytes.push(byte);
                rest = &others[3..];
            }
            None => {
                bytes.push(*first);
                rest = others;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
