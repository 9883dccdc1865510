//! A census of a machine that is a folder.

use std::fs;
use std::os::unix::fs::symlink;

use tempfile::TempDir;

use super::*;

const LENDER: &str = "0000:01:00.0";
const OTHER_LENDER: &str = "0000:03:00.0";
const IMPORTER: &str = "0000:02:00.0";

fn address(text: &str) -> PciAddress {
    text.parse().unwrap()
}

/// A copy of /proc and /sys: two VFIO devices, and a GPU with two nodes.
struct Copy(TempDir);

impl Copy {
    fn new() -> Self {
        let copy = Self(tempfile::tempdir().unwrap());
        for (function, driver) in [(LENDER, "vfio-pci"), (IMPORTER, "amdgpu"), (OTHER_LENDER, "vfio-pci")] {
            copy.link(&format!("sys/bus/pci/devices/{function}/driver"), &format!("../../drivers/{driver}"));
        }
        for node in ["card0", "renderD128"] {
            copy.link(
                &format!("sys/class/drm/{node}/device"),
                &format!("../../../bus/pci/devices/{IMPORTER}"),
            );
        }
        copy.link("sys/class/vfio-dev/vfio0/device", &format!("../../../bus/pci/devices/{LENDER}"));
        copy.link("proc/self/ns/pid", proc_fs::FIRST_PID_NAMESPACE);
        copy.process(1, "init", "");
        copy.bufinfo("");
        copy
    }

    fn file(&self, path: &str, text: &str) {
        let path = self.0.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn link(&self, path: &str, target: &str) {
        let path = self.0.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        symlink(target, path).unwrap();
    }

    fn process(&self, pid: u32, comm: &str, maps: &str) {
        self.file(&format!("proc/{pid}/comm"), &format!("{comm}\n"));
        self.file(&format!("proc/{pid}/maps"), maps);
        fs::create_dir_all(self.0.path().join(format!("proc/{pid}/fd"))).unwrap();
    }

    fn descriptor(&self, pid: u32, number: u32, link: &str, fdinfo: &str) {
        self.link(&format!("proc/{pid}/fd/{number}"), link);
        self.file(&format!("proc/{pid}/fdinfo/{number}"), &format!("pos:\t0\nflags:\t02\n{fdinfo}"));
    }

    fn device(&self, pid: u32, number: u32, function: &str) {
        let fdinfo = format!("ino:\t9\nvfio-device-syspath: /sys/devices/pci0000:00/{function}\n");
        self.descriptor(pid, number, "anon_inode:[vfio-device]", &fdinfo);
    }

    fn dma_buf(&self, pid: u32, number: u32, inode: u64, exporter: &str, name: Option<&str>) {
        let mut fdinfo = format!("ino:\t{inode}\nsize:\t4096\ncount:\t2\nexp_name:\t{exporter}\n");
        if let Some(name) = name {
            fdinfo += &format!("name:\t{name}\n");
        }
        self.descriptor(pid, number, &format!("/dmabuf:{}", name.unwrap_or_default()), &fdinfo);
    }

    fn bufinfo(&self, text: &str) {
        self.file("sys/kernel/debug/dma_buf/bufinfo", text);
    }

    fn census(&self) -> Census {
        Census::of(&ProcFs::at(self.0.path()), true)
    }
}

fn row(inode: u64, exporter: &str, name: &str, attached: &[&str]) -> String {
    let attached: String = attached.iter().map(|device| format!("\t{device}\n")).collect();
    format!(
        "00004096\t00000002\t00080007\t00000003\t{exporter}\t{inode:08}\t{name}\n\tAttached Devices:\n{attached}Total\n\n"
    )
}

fn pids(holders: &[Holder]) -> Vec<u32> {
    holders.iter().map(|holder| holder.process.pid).collect()
}

#[test]
fn lender_importer_and_a_process_in_between_are_named() {
    let copy = Copy::new();
    copy.process(10, "lender", "7f00-7f10 rw-s 0 00:0f 9    anon_inode:[vfio-device]\n");
    copy.device(10, 5, LENDER);
    copy.dma_buf(10, 6, 7, "vfio_pci_core", Some("peervram 0000:01:00.0"));
    copy.process(11, "importer", "");
    copy.descriptor(11, 3, "/dev/dri/renderD128", "");
    copy.descriptor(11, 4, "/dev/iommu", "");
    copy.process(12, "broker", "");
    copy.dma_buf(12, 8, 7, "vfio_pci_core", Some("peervram 0000:01:00.0"));
    copy.dma_buf(12, 9, 7, "vfio_pci_core", Some("peervram 0000:01:00.0"));
    copy.bufinfo(&row(7, "vfio_pci_core", "peervram 0000:01:00.0", &[IMPORTER, "iommu"]));

    let census = copy.census();
    assert_eq!((census.has_bufinfo, &census.unread[..]), (true, &[][..]));
    let [buffer] = &census.buffers[..] else { panic!("{census:?}") };
    assert_eq!(buffer.exporter, Exporter::Known(address(LENDER)));
    assert_eq!((buffer.inode, buffer.size_bytes, buffer.references), (7, 4096, 3));
    assert_eq!(pids(&buffer.holders), [10, 12]);
    assert_eq!(buffer.holders[1].descriptors, [8, 9]);
    let attached = buffer.attached.as_deref().unwrap();
    assert_eq!(attached, [Attached::Pci(address(IMPORTER)), Attached::Other("iommu".into())]);
    for (attached, path) in attached.iter().zip(["/dev/dri/renderD128", "/dev/iommu"]) {
        let nodes: Vec<_> = census.nodes_of(attached).collect();
        assert_eq!(nodes.len(), 1);
        assert_eq!((nodes[0].path.as_str(), pids(&nodes[0].holders)), (path, vec![11]));
    }
    let device = census.device(address(LENDER)).unwrap();
    assert_eq!(pids(&device.holders), [10]);
    assert_eq!((&device.holders[0].descriptors[..], device.holders[0].mappings), (&[5][..], 1));
    assert_eq!(census.device(address(OTHER_LENDER)).unwrap().holders, []);
    assert_eq!(census.device(address(IMPORTER)), None);
    assert_eq!(census.buffers_of(address(LENDER)).count(), 1);
    assert_eq!(census.buffers_of(address(OTHER_LENDER)).count(), 0);
}

#[test]
fn a_buffer_without_a_name_may_be_of_several_devices() {
    let copy = Copy::new();
    copy.process(10, "lender", "");
    copy.device(10, 5, LENDER);
    copy.dma_buf(10, 6, 7, "vfio_pci_core", None);
    copy.process(11, "other", "");
    copy.device(11, 5, OTHER_LENDER);
    copy.process(12, "in between", "");
    copy.dma_buf(12, 3, 8, "vfio_pci_core", Some("peervram 01:00.0"));
    copy.dma_buf(12, 4, 9, "udmabuf", Some("peervram 0000:01:00.0"));
    copy.bufinfo(&row(5, "vfio_pci_core", "<none>", &[]));

    let census = copy.census();
    let exporters: Vec<_> =
        census.buffers.iter().map(|buffer| (buffer.inode, buffer.exporter.clone())).collect();
    let both = Exporter::OneOf(vec![address(LENDER), address(OTHER_LENDER)]);
    assert_eq!(
        exporters,
        [
            (5, both.clone()),
            (7, Exporter::OneOf(vec![address(LENDER)])),
            (8, both),
            // Not VFIO's memory, whatever its owner calls it.
            (9, Exporter::NotVfio),
        ]
    );
    assert_eq!(census.buffers_of(address(OTHER_LENDER)).count(), 2);
}

#[test]
fn a_mapping_keeps_a_device_open_without_a_descriptor() {
    let copy = Copy::new();
    let by_cdev = "7f00-7f10 rw-s 0 00:06 410    /dev/vfio/devices/vfio0\n";
    copy.process(10, "by cdev", by_cdev);
    copy.process(11, "by group", "7f00-7f10 rw-s 0 00:0f 9    anon_inode:[vfio-device]\n");
    let census = copy.census();
    let (lender, other) =
        (census.device(address(LENDER)).unwrap(), census.device(address(OTHER_LENDER)).unwrap());
    assert_eq!(pids(&lender.holders), [10, 11]);
    assert_eq!((lender.holders[0].mappings, lender.holders[0].possible_mappings), (1, 0));
    assert_eq!((lender.holders[1].mappings, lender.holders[1].possible_mappings), (0, 1));
    assert_eq!(pids(&other.holders), [11]);
}

#[test]
fn whoever_has_a_group_open_keeps_its_devices_from_drivers() {
    let copy = Copy::new();
    for function in [LENDER, "0000:01:00.1"] {
        copy.link(&format!("sys/kernel/iommu_groups/26/devices/{function}"), "../elsewhere");
    }
    copy.process(10, "between open and device", "");
    copy.descriptor(10, 4, "/dev/vfio/26", "");
    copy.descriptor(10, 5, "/dev/vfio/vfio", "");
    let census = copy.census();
    let (lender, other) =
        (census.device(address(LENDER)).unwrap(), census.device(address(OTHER_LENDER)).unwrap());
    assert_eq!((pids(&lender.holders), pids(&lender.group_holders)), (vec![], vec![10]));
    assert_eq!(lender.group_holders[0].descriptors, [4]);
    assert_eq!((pids(&other.holders), pids(&other.group_holders)), (vec![], vec![]));
}

#[test]
fn a_device_that_the_kernel_does_not_name_is_one_of_the_processs_groups_or_any() {
    let copy = Copy::new();
    copy.link(&format!("sys/kernel/iommu_groups/26/devices/{LENDER}"), "../elsewhere");
    copy.process(10, "old kernel", "7f00-7f10 rw-s 0 00:0f 9    anon_inode:[vfio-device]\n");
    copy.descriptor(10, 4, "/dev/vfio/26", "");
    copy.descriptor(10, 5, "anon_inode:[vfio-device]", "");
    copy.process(11, "has closed its group", "");
    copy.descriptor(11, 6, "anon_inode:[vfio-device]", "");
    let census = copy.census();
    let (lender, other) =
        (census.device(address(LENDER)).unwrap(), census.device(address(OTHER_LENDER)).unwrap());
    let [of_group, of_any] = &lender.holders[..] else { panic!("{lender:?}") };
    assert_eq!((&of_group.descriptors[..], of_group.mappings, of_group.is_certain()), (&[5][..], 1, true));
    assert_eq!((&of_any.possible_descriptors[..], of_any.is_certain()), (&[6][..], false));
    assert_eq!(pids(&other.holders), [11]);
    assert_eq!(census.unread.len(), 2, "{:#?}", census.unread);
}

#[test]
fn what_cannot_be_read_is_said() {
    let copy = Copy::new();
    fs::remove_file(copy.0.path().join("sys/kernel/debug/dma_buf/bufinfo")).unwrap();
    copy.process(10, "old kernel", "");
    copy.descriptor(10, 5, "anon_inode:[vfio-device]", "");
    copy.dma_buf(10, 6, 7, "vfio_pci_core", None);
    copy.process(11, "odd", "");
    fs::remove_dir(copy.0.path().join("proc/11/fd")).unwrap();
    copy.file("proc/11/fd", "");
    let census = copy.census();
    let said: Vec<_> = census.unread.iter().map(ToString::to_string).collect();
    assert_eq!(said.len(), 3, "{said:#?}");
    assert!(said[0].contains("debugfs"), "{said:#?}");
    assert!(said[1].contains("descriptor 5 of process 10 (old kernel)"), "{said:#?}");
    assert!(said[2].contains("process 11 (odd)"), "{said:#?}");
    assert!(!census.has_bufinfo);
    assert_eq!(census.buffers[0].attached, None, "unknown is not none");
    let anybody = Exporter::OneOf(vec![address(LENDER), address(OTHER_LENDER)]);
    assert_eq!(census.buffers[0].exporter, anybody, "whoever has it open may be out of sight");

    let nothing = tempfile::tempdir().unwrap();
    let census = Census::of(&ProcFs::at(nothing.path()), true);
    assert_eq!(census.unread.len(), 2, "{:#?}", census.unread);
}

#[test]
fn hidden_processes_are_said() {
    let copy = Copy::new();
    fs::remove_file(copy.0.path().join("proc/self/ns/pid")).unwrap();
    copy.link("proc/self/ns/pid", "pid:[4026532000]");
    fs::remove_dir_all(copy.0.path().join("proc/1")).unwrap();
    let said: Vec<_> = copy.census().unread.iter().map(ToString::to_string).collect();
    assert_eq!(said.len(), 2, "{said:#?}");
    assert!(said[0].contains("container") && said[1].contains("hidepid"), "{said:#?}");
}

#[test]
fn processes_that_end_meanwhile_are_passed_over() {
    let copy = Copy::new();
    copy.process(10, "ends", "");
    fs::remove_dir_all(copy.0.path().join("proc/10/fd")).unwrap();
    copy.process(11, "closes", "");
    copy.link("proc/11/fd/3", "/dmabuf:");
    fs::remove_file(copy.0.path().join("proc/11/maps")).unwrap();
    assert_eq!(copy.census().unread, []);
}

#[test]
fn during_a_revoke_nothing_is_read_that_can_wait_for_it() {
    let copy = Copy::new();
    copy.process(10, "lender", "7f00-7f10 rw-s 0 00:0f 9    anon_inode:[vfio-device]\n");
    copy.device(10, 5, LENDER);
    copy.dma_buf(10, 6, 7, "vfio_pci_core", None);
    copy.bufinfo(&row(5, "vfio_pci_core", "<none>", &[]));
    let census = Census::of(&ProcFs::at(copy.0.path()), false);
    assert_eq!(census.buffers.len(), 1);
    assert_eq!(census.device(address(LENDER)).unwrap().holders[0].mappings, 0);
    assert_eq!(census.unread.len(), 2, "{:#?}", census.unread);
}

#[test]
fn this_machine_is_survived() {
    let census = Census::take();
    assert!(census.buffers.iter().all(|buffer| buffer.inode != 0));
    assert!(Census::take_during_revoke().unread.len() >= 2);
}

#[test]
fn a_name_for_people_breaks_no_line() {
    let process = Process { pid: 3, comm: "a\nb".into() };
    assert_eq!(process.to_string(), "process 3 (a\\nb)");
}
