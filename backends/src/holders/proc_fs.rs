//! `ProcFs`: the files of /proc and /sys that a census reads.
//!
//! Reads and passes on; what it comes to is decided in the census. Processes that end between two
//! reads hold nothing any more and are passed over. Below another root than `/` it reads a copy, which
//! is what tests do.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::descriptor::{
    DmaBufInfo, File, function_at, function_named, names_vfio_device, parse_maps, vfio_function,
};
use super::{Attached, Process, Unread};
use crate::PciAddress;
use crate::pci::is_vfio_driver;

/// `PF_KTHREAD` (include/linux/sched.h): a thread of the kernel, which opens no files.
const KERNEL_THREAD: u32 = 0x0020_0000;

/// `PROC_PID_INIT_INO` (include/uapi/linux/nsfs.h): the PID namespace that sees every process.
pub(super) const FIRST_PID_NAMESPACE: &str = "pid:[4026531836]";

/// The advice where the kernel does not let this user look.
fn look_as_root() -> &'static str {
    look_with_more(rustix::process::geteuid().is_root())
}

fn look_with_more(is_root: bool) -> &'static str {
    if is_root {
        "this is root already: of a container, or without CAP_SYS_PTRACE; run it on the host, with all capabilities"
    } else {
        "run as root"
    }
}

pub(super) struct ProcFs {
    root: PathBuf,
}

/// One process's open files and mappings, those that matter here.
pub(super) struct Files {
    pub process: Process,
    pub descriptors: Vec<(u32, Held)>,
    pub mappings: Vec<Held>,
}

/// What an open file, or a mapping, is of.
pub(super) enum Held {
    Buffer(DmaBufInfo),
    /// A mapping of a dma-buf says no more than its number.
    BufferInode(u64),
    Device(PciAddress),
    /// A descriptor or mapping of a device that was opened through its group.
    SomeDevice,
    /// An IOMMU group with these functions.
    Group(Vec<PciAddress>),
    DrmNode(String),
    Iommufd,
}

/// The kernel does not say what a descriptor is of.
struct Unidentified {
    /// What the descriptor may refer to, as far as the kernel says.
    may_be: Option<Held>,
}

impl ProcFs {
    pub(super) fn at(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    /// The text of bufinfo.
    pub(super) fn bufinfo(&self) -> Result<String, Unread> {
        const PATH: &str = "sys/kernel/debug/dma_buf/bufinfo";
        read(&self.root.join(PATH)).map_err(|error| Unread {
            what: "the devices attached to dma-bufs, and dma-bufs that no process has a descriptor of".into(),
            why: format!("/{PATH}: {error}"),
            next: match error.kind() {
                io::ErrorKind::NotFound => {
                    "mount debugfs as root: mount -t debugfs none /sys/kernel/debug (CONFIG_DEBUG_FS)"
                }
                _ => look_as_root(),
            }
            .into(),
        })
    }

    /// PCI functions bound to a VFIO driver, in order of address.
    pub(super) fn vfio_functions(&self) -> Vec<PciAddress> {
        let folder = self.root.join("sys/bus/pci/devices");
        let is_vfio = |address: &PciAddress| {
            let function = folder.join(address.to_string());
            let driver = fs::read_link(function.join("driver")).ok();
            let driver = driver.as_deref().and_then(Path::file_name);
            driver.is_some_and(|name| is_vfio_driver(&name.to_string_lossy()))
                || function.join("vfio-dev").exists()
        };
        let names = names(&folder).unwrap_or_default();
        let mut functions: Vec<_> =
            names.iter().filter_map(|name| function_named(name)).filter(is_vfio).collect();
        functions.sort_unstable();
        functions
    }

    /// The device that a DRM node is of, by the node's name: its folder in sysfs is called as it is
    /// attached (`dev_name`).
    pub(super) fn drm_device(&self, node: &str) -> Option<Attached> {
        let device = fs::canonicalize(self.root.join("sys/class/drm").join(node).join("device")).ok()?;
        Some(Attached::named(&device.file_name()?.to_string_lossy()))
    }

    /// The files of every process that may be looked at. What may not is added to `unread`.
    ///
    /// Without `with_mappings` nothing is read that takes a lock of a process's memory.
    pub(super) fn processes(&self, with_mappings: bool, unread: &mut Vec<Unread>) -> Vec<Files> {
        let folder = self.root.join("proc");
        let names = match names(&folder) {
            Ok(names) => names,
            Err(error) => {
                unread.push(Unread {
                    what: "processes".into(),
                    why: format!("/proc: {error}"),
                    next: "mount -t proc proc /proc".into(),
                });
                return Vec::new();
            }
        };
        let mut pids: Vec<u32> = names.iter().filter_map(|name| name.parse().ok()).collect();
        pids.sort_unstable();
        self.look_for_hidden(&pids, unread);

        let (mut all, mut denied) = (Vec::new(), 0);
        for pid in pids {
            let folder = folder.join(pid.to_string());
            let comm = read(&folder.join("comm")).unwrap_or_default();
            let process = Process { pid, comm: comm.trim_end().to_owned() };
            let mut files = Files { process, descriptors: Vec::new(), mappings: Vec::new() };
            match self.look_at(&folder, with_mappings, &mut files, unread) {
                Ok(()) => all.push(files),
                Err(error) if is_gone(&error) => {}
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                    denied += usize::from(!is_kernel_thread(&folder));
                    // Entries read before the refusal are still valid.
                    all.push(files);
                }
                Err(error) => {
                    unread.push(Unread {
                        what: format!("open files of {}", files.process),
                        why: error.to_string(),
                        next: look_as_root().into(),
                    });
                    all.push(files);
                }
            }
        }
        if denied > 0 {
            unread.push(Unread {
                what: format!("open files of {denied} process(es)"),
                why: "they are another user's, or do not let themselves be looked at".into(),
                next: look_as_root().into(),
            });
        }
        if !with_mappings {
            unread.push(Unread {
                what: "mappings".into(),
                why: "left out, because reading them can wait for a process that waits for the revoke".into(),
                next: "look again when it is over".into(),
            });
        }
        all
    }

    fn look_at(
        &self,
        folder: &Path,
        with_mappings: bool,
        files: &mut Files,
        unread: &mut Vec<Unread>,
    ) -> io::Result<()> {
        let mut numbers: Vec<u32> =
            names(&folder.join("fd"))?.iter().filter_map(|name| name.parse().ok()).collect();
        numbers.sort_unstable();
        for number in numbers {
            let link = match fs::read_link(folder.join("fd").join(number.to_string())) {
                Ok(link) => link,
                Err(error) if is_gone(&error) => continue,
                Err(error) => return Err(error),
            };
            let Some(file) = File::named(&link.to_string_lossy()) else { continue };
            let fdinfo = match read(&folder.join("fdinfo").join(number.to_string())) {
                Ok(text) => text,
                Err(error) if is_gone(&error) => continue,
                Err(error) => return Err(error),
            };
            match self.identify(file, &fdinfo) {
                Ok(held) => files.descriptors.extend(held.map(|held| (number, held))),
                Err(Unidentified { may_be }) => {
                    files.descriptors.extend(may_be.map(|held| (number, held)));
                    unread.push(Unread {
                        what: format!("what descriptor {number} of {} is of", files.process),
                        why: format!("the kernel says no more than {}", link.display()),
                        next: "boot Linux 6.19 or later".into(),
                    });
                }
            }
        }
        if with_mappings {
            for (file, inode) in parse_maps(&read(&folder.join("maps"))?) {
                files.mappings.extend(match file {
                    File::DmaBuf => Some(Held::BufferInode(inode)),
                    File::VfioOfGroup => Some(Held::SomeDevice),
                    File::VfioCdev(name) => {
                        Some(self.cdev_function(&name).map_or(Held::SomeDevice, Held::Device))
                    }
                    File::DrmNode(_) | File::Iommufd | File::VfioGroup(_) => None,
                });
            }
        }
        Ok(())
    }

    /// What a descriptor is of; nothing for a VFIO device that is no PCI function, and so lends nothing.
    fn identify(&self, file: File, fdinfo: &str) -> Result<Option<Held>, Unidentified> {
        match file {
            File::DmaBuf => {
                let info = DmaBufInfo::parse(fdinfo).ok_or(Unidentified { may_be: None })?;
                Ok(Some(Held::Buffer(info)))
            }
            File::VfioOfGroup | File::VfioCdev(_) if names_vfio_device(fdinfo) => {
                Ok(vfio_function(fdinfo).map(Held::Device))
            }
            File::VfioOfGroup => Err(Unidentified { may_be: Some(Held::SomeDevice) }),
            File::VfioCdev(name) => match self.cdev_function(&name) {
                Some(address) => Ok(Some(Held::Device(address))),
                None => Err(Unidentified { may_be: Some(Held::SomeDevice) }),
            },
            File::VfioGroup(number) => Ok(Some(Held::Group(self.functions_of_group(number)))),
            File::DrmNode(name) => Ok(Some(Held::DrmNode(name))),
            File::Iommufd => Ok(Some(Held::Iommufd)),
        }
    }

    /// The PCI functions of an IOMMU group, in order of address.
    fn functions_of_group(&self, number: u32) -> Vec<PciAddress> {
        let folder = self.root.join(format!("sys/kernel/iommu_groups/{number}/devices"));
        let mut functions: Vec<PciAddress> =
            names(&folder).unwrap_or_default().iter().filter_map(|name| function_named(name)).collect();
        functions.sort_unstable();
        functions
    }

    /// The PCI function whose character device has that name.
    fn cdev_function(&self, name: &str) -> Option<PciAddress> {
        function_at(&fs::canonicalize(self.root.join("sys/class/vfio-dev").join(name).join("device")).ok()?)
    }

    /// Processes that are not even listed.
    fn look_for_hidden(&self, pids: &[u32], unread: &mut Vec<Unread>) {
        if let Ok(namespace) = fs::read_link(self.root.join("proc/self/ns/pid"))
            && namespace.as_os_str() != FIRST_PID_NAMESPACE
        {
            unread.push(Unread {
                what: "processes outside this container".into(),
                why: "a PID namespace hides them".into(),
                next: "run on the host, or share its PID namespace".into(),
            });
        }
        if pids.first() != Some(&1) {
            unread.push(Unread {
                what: "processes of other users".into(),
                why: "/proc is mounted so that it hides them (hidepid)".into(),
                next: look_as_root().into(),
            });
        }
    }
}

/// Names in a folder.
fn names(folder: &Path) -> io::Result<Vec<String>> {
    let names = fs::read_dir(folder)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    names.collect()
}

/// A file as text; names of processes and buffers are bytes that their owners chose.
fn read(path: &Path) -> io::Result<String> {
    Ok(String::from_utf8_lossy(&fs::read(path)?).into_owned())
}

/// Whether the process or descriptor has gone meanwhile: ENOENT of its folder, ESRCH of an open file.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(3)
}

fn is_kernel_thread(folder: &Path) -> bool {
    // "123 (name) S 2 0 0 0 -1 69238880 ...", and a name may have brackets.
    let flags = || -> Option<u32> {
        let stat = read(&folder.join("stat")).ok()?;
        stat.rsplit_once(") ")?.1.split(' ').nth(6)?.parse().ok()
    };
    flags().is_some_and(|flags| flags & KERNEL_THREAD != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_is_not_told_to_become_root() {
        assert_eq!(look_with_more(false), "run as root");
        assert!(look_with_more(true).contains("root already"));
        assert_eq!(look_as_root() == "run as root", !rustix::process::geteuid().is_root());
    }
}
