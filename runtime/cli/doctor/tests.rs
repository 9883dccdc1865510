//! Made-up machines: each advice where it helps, not elsewhere, in order and once.

use std::collections::BTreeMap;
use std::path::PathBuf;

use peervram::backends::PciAddress;
use peervram::backends::pci::{Bar, Function, Link};
use peervram::backends::topology::{Above, ConfigSpace, Cpu, Place, Reading, Topology};
use serde_json::json;

use super::candidate::Candidate;
use super::diagnosis::{Diagnosis, Verdict};
use super::facts::{Broker, DeviceFile, Distribution, Facts, User, Vulkan, VulkanDevice};
use super::finding::{Finding, Severity, Step, StepOrder};
use super::kernel_config::OPTIONS;
use super::page;
use super::pair::{Pair, PairPath, PairState};
use crate::in_use::Use;

/// A machine in the making.
#[derive(Clone)]
struct FakeMachine {
    facts: Facts,
    places: Vec<Place>,
    cpu: Cpu,
    /// What this user may not open.
    closed: fn(&str) -> bool,
}

const LENDER: &str = "0000:01:00.0";
const IMPORTER: &str = "0000:02:00.0";

impl FakeMachine {
    /// A new kernel on a trusted host bridge, everything built in, lavapipe, root; and no device.
    fn bare() -> Self {
        let facts = Facts {
            kernel_release: "7.3.4".into(),
            kernel_options: Reading::Known(OPTIONS.map(|name| (name.into(), "y".into())).into()),
            command_line: Reading::Known("quiet".into()),
            user: User { uid: 0, groups: Vec::new() },
            memlock_bytes: Some(8 << 20),
            distribution: Distribution { ids: vec!["debian".into()], codename: Some("trixie".into()) },
            is_container: false,
            iommus: vec!["ivhd0".into()],
            remaps_interrupts: Some(true),
            allows_unsafe_interrupts: false,
            has_vfio_pci: true,
            files: Vec::new(),
            vfio_devices: BTreeMap::new(),
            resizable: BTreeMap::new(),
            in_use: BTreeMap::new(),
            names: BTreeMap::new(),
            topology: Reading::Unread("not made yet".into()),
            vulkan: Vulkan::Devices(vec![lavapipe()]),
            broker: Broker::Absent { socket: "/run/peervram/broker".into() },
        };
        let cpu = Cpu {
            vendor: Some("AuthenticAMD".into()),
            family: Some(0x19),
            model: None,
            name: None,
            microcode: None,
        };
        let host_bridge =
            Place { above: Above::HostBridge("pci0000:00".into()), ..place("0000:00:00.0", None) };
        Self { facts, places: vec![host_bridge], cpu, closed: |_| false }
    }

    /// With a lender and an importer.
    fn working() -> Self {
        Self::bare().gpu(LENDER, "vfio-pci", 256).gpu(IMPORTER, "amdgpu", 16 << 10)
    }

    /// With a GPU in a group of its own, numbered like its bus, and with nodes numbered alike.
    fn gpu(mut self, address: &str, driver: &str, bar_mib: u64) -> Self {
        let mut place = place(address, Some(driver));
        let bus = place.function.address.bus;
        place.function.class = 0x03_0000;
        place.function.iommu_group = Some(bus.into());
        place.function.bars = vec![Bar {
            index: 1,
            address: 0,
            size_bytes: bar_mib << 20,
            is_memory: true,
            is_prefetchable: true,
        }];
        if !place.function.is_bound_to_vfio() {
            place.function.drm_nodes = vec![format!("card{bus}"), format!("renderD{}", 128 + bus)];
        }
        place.iommu_domain = Some("DMA-FQ".into());
        self.places.push(place);
        self
    }

    /// With a second function beside `of`, in its group.
    fn neighbour(mut self, of: &str, driver: &str) -> Self {
        let mut place = place(&of.replace(".0", ".1"), Some(driver));
        place.function.iommu_group = self.at(of).function.iommu_group;
        self.places.push(place);
        self
    }

    fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    /// With something of the machine that hangs on a function.
    fn in_use(self, address: &str, used: Use) -> Self {
        self.with(|machine| machine.facts.in_use.entry(address.parse().unwrap()).or_default().push(used))
    }

    /// A device that answers nothing but ones.
    fn silent(self, address: &str) -> Self {
        let ones = ConfigSpace::new(vec![0xff; 4096], 4096).unwrap();
        self.with(|machine| machine.at(address).config = Reading::Known(ones))
    }

    fn at(&mut self, address: &str) -> &mut Place {
        let address: PciAddress = address.parse().unwrap();
        self.places.iter_mut().find(|place| place.address() == address).unwrap()
    }

    fn intel(self) -> Self {
        self.with(|machine| {
            machine.cpu.vendor = Some("GenuineIntel".into());
            machine.cpu.family = Some(6);
        })
    }

    fn without_iommu(self) -> Self {
        self.with(|machine| {
            machine.facts.iommus.clear();
            machine.places.iter_mut().for_each(|place| place.function.iommu_group = None);
        })
    }

    /// Without root: the start of each configuration space, and no file that is not everybody's.
    fn unprivileged(self) -> Self {
        self.with(|machine| {
            machine.facts.user.uid = 1000;
            machine.closed = |path| path != "/dev/vfio/vfio";
            for place in &mut machine.places {
                let Reading::Known(config) = &place.config else { continue };
                place.config = Reading::Known(ConfigSpace::new(config.bytes()[..64].to_vec(), 4096).unwrap());
            }
        })
    }

    /// BAR 1 of a GPU is 256 MiB and could be 16 GiB.
    fn resizable(self, address: &str) -> Self {
        self.with(|machine| {
            let mut bytes = vec![0; 4096];
            bytes[0x100..0x104].copy_from_slice(&0x0001_0015_u32.to_le_bytes());
            bytes[0x104..0x108].copy_from_slice(&((1_u32 << 8 | 1 << 14) << 4).to_le_bytes());
            bytes[0x108..0x10c].copy_from_slice(&(1_u32 | 1 << 5 | 8 << 8).to_le_bytes());
            machine.at(address).config = Reading::Known(ConfigSpace::new(bytes, 4096).unwrap());
            machine.facts.resizable.insert(address.parse().unwrap(), vec![1]);
        })
    }

    fn facts(mut self) -> Facts {
        let tree = json!({
            "format": "peervram-topology",
            "version": 1,
            "kernel_release": { "known": self.facts.kernel_release },
            "command_line": { "unread": "made up" },
            "boot_id": { "unread": "made up" },
            "cpu": { "known": self.cpu },
            "order": { "known": null },
            "places": self.places,
        });
        self.facts.topology = Reading::Known(Topology::from_json(&tree.to_string()).unwrap());
        let mut paths = vec!["/dev/vfio/vfio".to_owned(), "/dev/kmsg".into(), "/dev/udmabuf".into()];
        for function in self.places.iter().map(|place| &place.function) {
            let group = function.iommu_group.filter(|_| function.is_bound_to_vfio());
            paths.extend(group.map(|group| format!("/dev/vfio/{group}")));
            paths.extend(function.drm_nodes.iter().map(|name| format!("/dev/dri/{name}")));
        }
        let closed = self.closed;
        self.facts.files = paths
            .into_iter()
            .map(|path| DeviceFile {
                is_usable: !closed(&path),
                path: PathBuf::from(path),
                mode: 0o600,
                owner_uid: 0,
                owner_gid: 0,
            })
            .collect();
        self.facts
    }

    fn diagnosis(self) -> Diagnosis {
        Diagnosis::of(&self.facts())
    }
}

fn place(address: &str, driver: Option<&str>) -> Place {
    let function = Function {
        address: address.parse().unwrap(),
        vendor_id: 0x1002,
        device_id: 0x744c,
        class: 0x06_0400,
        driver: driver.map(str::to_owned),
        iommu_group: None,
        numa_node: None,
        bars: Vec::new(),
        link: None,
        drm_nodes: Vec::new(),
        virtio_features: None,
        memory_enabled: Some(true),
        answers: None,
    };
    // Each on a root bus of its own: none has a bridge above it.
    let bus = function.address.bus;
    Place {
        function,
        above: Above::HostBridge(format!("pci0000:{bus:02x}")),
        config: Reading::Known(ConfigSpace::new(vec![0; 4096], 4096).unwrap()),
        iommu_domain: None,
        sleeper: None,
        physical_function: None,
    }
}

fn lavapipe() -> VulkanDevice {
    VulkanDevice {
        name: "llvmpipe (LLVM 19)".into(),
        driver: "llvmpipe Mesa 26.1.6".into(),
        pci_address: None,
        is_cpu: true,
        imports_dma_bufs: true,
        exports_dma_bufs: true,
        imports_host_pointers: true,
    }
}

fn empty_container() -> Facts {
    let mut facts = FakeMachine::bare().facts();
    facts.topology = Reading::Unread("No such file or directory".into());
    facts.kernel_options = Reading::Unread("not there".into());
    facts.command_line = Reading::Unread("not there".into());
    facts.distribution = Distribution::default();
    facts.files.clear();
    facts.iommus.clear();
    facts.vulkan = Vulkan::Missing { why: "libvulkan.so.1: not found".into() };
    facts
}

fn turns(diagnosis: &Diagnosis) -> Vec<StepOrder> {
    diagnosis.what_to_do.iter().map(|step| step.turn).collect()
}

fn step(diagnosis: &Diagnosis, turn: StepOrder) -> &Step {
    let found = diagnosis.what_to_do.iter().find(|step| step.turn == turn);
    found.unwrap_or_else(|| panic!("no {turn:?} in {:#?}", diagnosis.what_to_do))
}

fn finding<'a>(diagnosis: &'a Diagnosis, code: &str) -> &'a Finding {
    let found = diagnosis.findings.iter().find(|finding| finding.code == code);
    found.unwrap_or_else(|| panic!("no {code} in {:#?}", diagnosis.findings))
}

fn has(diagnosis: &Diagnosis, code: &str) -> bool {
    diagnosis.findings.iter().any(|finding| finding.code == code)
}

#[test]
fn a_machine_that_works_has_nothing_in_the_way() {
    let diagnosis = FakeMachine::working().diagnosis();
    assert_eq!(diagnosis.verdict, Verdict::CanLend);
    let not_fine: Vec<_> =
        diagnosis.findings.iter().filter(|finding| finding.weight != Severity::Fine).collect();
    assert!(not_fine.is_empty(), "{not_fine:#?}");
    assert_eq!(turns(&diagnosis), [StepOrder::Try]);
    assert!(diagnosis.headline.contains(LENDER), "{}", diagnosis.headline);
    let paths: Vec<_> = diagnosis.pairs.iter().map(|pair| (pair.path, pair.state)).collect();
    assert_eq!(paths, [(PairPath::Peer, PairState::Now), (PairPath::HostPointer, PairState::Now)]);
    assert!(diagnosis.pairs[0].how.contains("through host bridge"), "{:?}", diagnosis.pairs);
}

#[test]
fn a_virtio_gpu_imports_unless_it_has_3d() {
    // VIRTIO_GPU_F_RESOURCE_BLOB, and VIRTIO_GPU_F_VIRGL with it.
    let with_features = |features| {
        FakeMachine::bare()
            .gpu(LENDER, "vfio-pci", 256)
            .gpu(IMPORTER, "virtio-pci", 1)
            .with(|machine| machine.at(IMPORTER).function.virtio_features = Some(features))
            .diagnosis()
    };
    let peers =
        |diagnosis: &Diagnosis| diagnosis.pairs.iter().filter(|pair| pair.path == PairPath::Peer).count();
    let says = |diagnosis: &Diagnosis, text: &str| {
        diagnosis.findings.iter().any(|finding| finding.seen.contains(text))
    };
    let plain = with_features(1 << 3);
    assert_eq!(peers(&plain), 1);
    assert!(says(&plain, "imports for scan-out"), "{:#?}", plain.findings);
    let with_3d = with_features(1 << 3 | 1);
    assert_eq!(peers(&with_3d), 0);
    assert!(says(&with_3d, "cannot import: with 3D"), "{:#?}", with_3d.findings);
}

#[test]
fn venus_imports_nothing_of_others() {
    let venus = VulkanDevice {
        name: "Virtio-GPU Venus (llvmpipe)".into(),
        driver: "venus Mesa 26.1.6".into(),
        pci_address: Some(IMPORTER.parse().unwrap()),
        is_cpu: false,
        imports_dma_bufs: false,
        exports_dma_bufs: true,
        imports_host_pointers: false,
    };
    let diagnosis = FakeMachine::working()
        .with(|machine| machine.facts.vulkan = Vulkan::Devices(vec![venus]))
        .diagnosis();
    let found = finding(&diagnosis, "vulkan-device");
    assert!(found.seen.ends_with(": imports nothing, exports dma-bufs"), "{}", found.seen);
}

#[test]
fn an_old_kernel_comes_first_and_leaves_host_pointers() {
    let old = |machine: &mut FakeMachine| machine.facts.kernel_release = "6.12.57+deb13-amd64".into();
    let diagnosis = FakeMachine::working().with(old).diagnosis();
    assert_eq!(turns(&diagnosis), [StepOrder::Kernel, StepOrder::Try]);
    assert!(diagnosis.what_to_do[0].commands[0].contains("trixie-backports"));
    // By host pointer it works all the same.
    assert_eq!(diagnosis.verdict, Verdict::CanLend);
    assert_eq!(diagnosis.pairs[0].path, PairPath::HostPointer);
    let without = |machine: &mut FakeMachine| machine.facts.vulkan = Vulkan::Missing { why: "none".into() };
    let diagnosis = FakeMachine::working().with(old).with(without).diagnosis();
    assert_eq!(diagnosis.verdict, Verdict::Nothing);
    assert_eq!(turns(&diagnosis)[..2], [StepOrder::Kernel, StepOrder::Vulkan]);
}

#[test]
fn known_faults_of_kernels_are_hints() {
    for (release, code) in [
        ("6.19.3", "kernel-revoke-does-not-wait"),
        ("7.0.10", "kernel-revoke-does-not-wait"),
        ("7.1.0-rc3", "kernel-close-hangs"),
    ] {
        let diagnosis =
            FakeMachine::working().with(|machine| machine.facts.kernel_release = release.into()).diagnosis();
        assert_eq!(finding(&diagnosis, code).weight, Severity::Hint, "{release}");
        assert_eq!(turns(&diagnosis), [StepOrder::NewerKernel, StepOrder::Try], "{release}");
        assert_eq!(diagnosis.verdict, Verdict::CanLend);
    }
    let diagnosis =
        FakeMachine::working().with(|machine| machine.facts.kernel_release = "7.1.2".into()).diagnosis();
    assert_eq!(turns(&diagnosis), [StepOrder::Try]);
}

#[test]
fn missing_options_are_named_and_needless_ones_are_not_asked_for() {
    let without = |names: &'static [&'static str]| {
        FakeMachine::working()
            .with(|machine| {
                let Reading::Known(options) = &mut machine.facts.kernel_options else { return };
                options.retain(|name, _| !names.contains(&name.as_str()));
            })
            .diagnosis()
    };
    let diagnosis = without(&["PCI_P2PDMA", "VFIO_PCI_DMABUF"]);
    assert!(step(&diagnosis, StepOrder::KernelOptions).what.contains("PCI_P2PDMA"));
    assert_eq!(turns(&without(&["IOMMUFD", "VFIO_DEVICE_CDEV", "UDMABUF"])), [StepOrder::Try]);
    assert_eq!(turns(&without(&["VFIO_GROUP"])), [StepOrder::Try]);
    assert_eq!(turns(&without(&["VFIO_GROUP", "IOMMUFD"])), [StepOrder::KernelOptions, StepOrder::Try]);
}

/// Nothing bound, so that the IOMMU is asked for before the binding.
fn two_unbound() -> FakeMachine {
    FakeMachine::bare().gpu(LENDER, "nvidia", 256).gpu(IMPORTER, "amdgpu", 16 << 10)
}

#[test]
fn an_absent_iommu_comes_before_binding_and_is_enabled_as_the_cpu_wants() {
    let diagnosis = two_unbound().without_iommu().diagnosis();
    assert_eq!(turns(&diagnosis), [StepOrder::Iommu, StepOrder::Bind, StepOrder::Try]);
    assert!(step(&diagnosis, StepOrder::Iommu).what.contains("AMD-Vi"));
    assert!(step(&diagnosis, StepOrder::Iommu).commands.is_empty());

    let diagnosis = two_unbound().without_iommu().intel().diagnosis();
    assert!(step(&diagnosis, StepOrder::Iommu).commands[0].contains("intel_iommu=on"));
    let fedora = |machine: &mut FakeMachine| machine.facts.distribution.ids = vec!["fedora".into()];
    let diagnosis = two_unbound().without_iommu().intel().with(fedora).diagnosis();
    assert!(step(&diagnosis, StepOrder::Iommu).commands[0].starts_with("grubby"));

    let off = |machine: &mut FakeMachine| {
        machine.facts.command_line = Reading::Known("quiet intel_iommu=off".into());
    };
    let diagnosis = two_unbound().without_iommu().intel().with(off).diagnosis();
    assert!(step(&diagnosis, StepOrder::Iommu).what.contains("Take intel_iommu=off"));
}

#[test]
fn of_two_gpus_the_one_that_cannot_import_is_bound() {
    let diagnosis = two_unbound().neighbour(LENDER, "snd_hda_intel").diagnosis();
    assert_eq!(diagnosis.verdict, Verdict::HostMemoryOnly);
    assert_eq!(turns(&diagnosis), [StepOrder::Bind, StepOrder::Try]);
    let bind = step(&diagnosis, StepOrder::Bind);
    assert_eq!(bind.commands, [format!("sudo peervram bind {LENDER}")]);
    assert!(bind.what.contains("instead of nvidia"), "{}", bind.what);
    assert!(
        bind.what.contains("0000:01:00.1 (snd_hda_intel)"),
        "its neighbour has to go, too: {}",
        bind.what
    );
    assert!(!has(&diagnosis, "group-not-viable"), "that is said of devices that are bound");
    // The screen's GPU lends only if it must.
    let twice = FakeMachine::bare().gpu(LENDER, "amdgpu", 256).gpu(IMPORTER, "amdgpu", 256);
    assert!(
        step(&twice.in_use(LENDER, Use::BootDisplay).diagnosis(), StepOrder::Bind).what.contains(IMPORTER)
    );
}

#[test]
fn the_only_gpu_is_not_given_away() {
    let only = FakeMachine::bare().gpu(LENDER, "amdgpu", 256);
    let diagnosis = only.in_use(LENDER, Use::BootDisplay).diagnosis();
    assert_eq!(turns(&diagnosis), [StepOrder::Try]);
    assert!(finding(&diagnosis, "nothing-bound").why.as_ref().unwrap().contains("no pair"));
}

#[test]
fn a_small_bar_is_resized_before_it_is_bound() {
    let diagnosis = two_unbound().without_iommu().resizable(LENDER).diagnosis();
    assert_eq!(turns(&diagnosis), [StepOrder::Iommu, StepOrder::Bind, StepOrder::ResizeBar, StepOrder::Try]);
    let folder = format!("/sys/bus/pci/devices/{LENDER}");
    // 16 GiB is 2^14 MiB. What has a driver of the kernel's is bound by the command that looks first.
    let expected = [
        format!("sudo peervram bind {LENDER}"),
        format!("echo {LENDER} > {folder}/driver/unbind"),
        format!("echo 14 > {folder}/resource1_resize"),
        format!("echo {LENDER} > /sys/bus/pci/drivers_probe"),
    ];
    assert_eq!(step(&diagnosis, StepOrder::ResizeBar).commands, expected);
    let needed = two_unbound().resizable(LENDER).in_use(LENDER, Use::BootDisplay).diagnosis();
    assert!(has(&needed, "bar-small") && !turns(&needed).contains(&StepOrder::ResizeBar));

    let diagnosis = FakeMachine::working().resizable(LENDER).diagnosis();
    let commands = &step(&diagnosis, StepOrder::ResizeBar).commands;
    assert!(commands[0].contains("unbind") && commands[2].contains("drivers_probe"), "{commands:?}");
    assert_eq!(finding(&diagnosis, "bar-small").weight, Severity::Hint);

    let diagnosis = FakeMachine::working().resizable(LENDER).unprivileged().diagnosis();
    assert_eq!(finding(&diagnosis, "bar-sizes-unread").weight, Severity::Unknown);
    assert!(!turns(&diagnosis).contains(&StepOrder::ResizeBar));
}

fn mounted() -> Use {
    Use::Mounted { device: "nvme0n1p2".into(), at: "/".into() }
}

/// No command of the page takes the driver of that function, or of one beside it.
fn takes_nothing(diagnosis: &Diagnosis, function: &str) {
    let card = function.trim_end_matches(".0");
    for command in
        diagnosis.findings.iter().filter_map(|finding| finding.step.as_ref()).flat_map(|step| &step.commands)
    {
        let takes = command.contains("unbind") || command.contains("bind ") || command.contains("/remove");
        assert!(!(takes && command.contains(card)) || command.ends_with("--dry-run"), "{command}");
    }
}

#[test]
fn what_the_machine_needs_is_named_and_no_command_takes_it() {
    let neighbour = "0000:01:00.1";
    let uses = [
        mounted(),
        Use::Swap { device: "sda3".into() },
        Use::PartOf { device: "sda4".into(), of: "dm-0".into() },
        Use::Network { interface: "eth0".into(), is_default: true },
        Use::SerialConsole { tty: "ttyS4".into() },
        Use::Input { name: "Keyboard".into() },
        Use::Open { node: "/dev/dri/card1".into(), by: "812 Xorg".into() },
    ];
    for used in uses {
        let words = used.to_string();
        for (machine, turn) in
            [(FakeMachine::working(), StepOrder::Neighbours), (two_unbound(), StepOrder::Bind)]
        {
            let bare = machine.clone().neighbour(LENDER, "ahci").diagnosis();
            assert!(step(&bare, turn).commands[0].contains("peervram bind"), "{:?}", step(&bare, turn));
            let diagnosis = machine.neighbour(LENDER, "ahci").in_use(neighbour, used.clone()).diagnosis();
            takes_nothing(&diagnosis, LENDER);
            if turn == StepOrder::Neighbours {
                let step = step(&diagnosis, turn);
                assert!(step.what.contains(&words) && step.what.contains(neighbour), "{}", step.what);
                assert!(finding(&diagnosis, "group-not-viable").seen.contains("0000:01:00.1 (ahci)"));
            } else {
                // The other GPU is bound in its place.
                assert_eq!(step(&diagnosis, turn).commands, [format!("sudo peervram bind {IMPORTER}")]);
            }
        }
    }
    // Where there is no other, what hangs on it is named.
    let only = two_unbound().in_use(LENDER, Use::BootDisplay).in_use(IMPORTER, mounted()).diagnosis();
    let bind = step(&only, StepOrder::Bind);
    assert_eq!(bind.commands, [format!("peervram bind {LENDER} --dry-run")]);
    assert!(bind.what.contains("display of the firmware"), "{}", bind.what);
}

#[test]
fn a_neighbour_in_another_slot_goes_along_only_if_it_is_asked_for() {
    let mut machine = FakeMachine::working().neighbour(LENDER, "nvme");
    machine.at("0000:01:00.1").function.address = "0000:03:00.0".parse().unwrap();
    let diagnosis = machine.diagnosis();
    assert_eq!(
        step(&diagnosis, StepOrder::Neighbours).commands,
        [format!("sudo peervram bind {LENDER} --group")]
    );
}

#[test]
fn a_device_that_answers_ones_neither_lends_nor_imports() {
    for dead in [LENDER, IMPORTER] {
        let diagnosis = FakeMachine::working().silent(dead).diagnosis();
        let pair = diagnosis.pairs.iter().find(|pair| pair.path == PairPath::Peer).unwrap();
        assert!(pair.state != PairState::Now && pair.how.contains(dead), "{pair:?}");
        assert!(finding(&diagnosis, "does-not-answer").seen.contains(dead));
        let revive = step(&diagnosis, StepOrder::Revive);
        assert_eq!(
            revive.commands,
            [format!("echo 1 > /sys/bus/pci/devices/{dead}/remove"), "echo 1 > /sys/bus/pci/rescan".into()]
        );
        assert!(revive.what.contains("off and on"), "{}", revive.what);
        assert_eq!(diagnosis.verdict == Verdict::CanLend, dead == IMPORTER);
        let open = Use::Open { node: "/dev/dri/card1".into(), by: "812 Xorg".into() };
        let diagnosis = FakeMachine::working().silent(dead).in_use(dead, open).diagnosis();
        assert!(step(&diagnosis, StepOrder::Revive).commands.is_empty());
        assert!(step(&diagnosis, StepOrder::Revive).what.contains("812 Xorg"));
    }
}

#[test]
fn no_path_leads_to_or_from_a_device_that_answers_ones() {
    let diagnosis = FakeMachine::working().gpu("0000:03:00.0", "vfio-pci", 256).silent(LENDER).diagnosis();
    let dead: PciAddress = LENDER.parse().unwrap();
    let (with_it, others): (Vec<&Pair>, Vec<&Pair>) =
        diagnosis.pairs.iter().partition(|pair| pair.lender == dead || pair.importer == Some(dead));
    let paths: Vec<PairPath> = with_it.iter().map(|pair| pair.path).collect();
    assert_eq!(paths.len(), 4, "{with_it:?}");
    for path in [PairPath::Peer, PairPath::HostPointer, PairPath::AddressSpace] {
        assert!(paths.contains(&path), "{paths:?}");
    }
    for pair in with_it {
        assert!(pair.state == PairState::Possible && pair.how.contains("does not answer"), "{pair:?}");
    }
    assert!(others.iter().any(|pair| pair.state == PairState::Now), "{others:?}");
}

#[test]
fn who_crowds_a_group_is_named() {
    let diagnosis = FakeMachine::working().neighbour(LENDER, "e1000e").diagnosis();
    let seen = &finding(&diagnosis, "group-not-viable").seen;
    assert!(seen.contains("0000:01:00.1 (e1000e)"), "{seen}");
    assert_eq!(step(&diagnosis, StepOrder::Neighbours).commands, [format!("sudo peervram bind {LENDER}")]);
    assert_eq!(diagnosis.verdict, Verdict::HostMemoryOnly);
    for harmless in ["vfio-pci", "pcieport", "pci-stub"] {
        let diagnosis = FakeMachine::working().neighbour(LENDER, harmless).diagnosis();
        assert!(!has(&diagnosis, "group-not-viable"), "{harmless}");
        assert_eq!(diagnosis.verdict, Verdict::CanLend);
    }
}

#[test]
fn without_root_it_names_what_is_closed_and_asks_for_one_rule() {
    let machine = FakeMachine::working().gpu("0000:03:00.0", "vfio-pci", 256).unprivileged();
    let diagnosis = machine.diagnosis();
    assert_eq!(diagnosis.verdict, Verdict::HostMemoryOnly);
    assert!(finding(&diagnosis, "vfio-files-closed").seen.contains("/dev/vfio/1 (uid 0, gid 0, 600)"));
    assert!(finding(&diagnosis, "drm-nodes-closed").seen.contains("/dev/dri/card2"));
    assert!(finding(&diagnosis, "unread").seen.contains("configuration space"));
    let expected = [StepOrder::Permissions, StepOrder::Permissions, StepOrder::LookAsRoot, StepOrder::Try];
    assert_eq!(turns(&diagnosis), expected, "one rule for both devices: {:#?}", diagnosis.what_to_do);
    assert!(!has(&FakeMachine::working().diagnosis(), "unread"), "root reads all");
    // Nor would root read more of what does not answer.
    let silent = FakeMachine::working().silent(IMPORTER).with(|machine| machine.facts.user.uid = 1000);
    assert!(!has(&silent.diagnosis(), "unread"));
}

#[test]
fn a_container_that_was_given_no_devices_is_told_how() {
    let mut facts = FakeMachine::working().facts();
    facts.files.clear();
    let diagnosis = Diagnosis::of(&facts);
    let commands: Vec<_> = diagnosis.what_to_do.iter().flat_map(|step| &step.commands).collect();
    assert!(commands.iter().any(|command| command.contains("--device /dev/vfio/1")), "{commands:?}");
    assert!(commands.iter().any(|command| command.contains("--device /dev/dri")), "{commands:?}");
}

#[test]
fn a_refused_route_asks_for_other_slots_unless_another_pair_works() {
    let diagnosis = FakeMachine::working().intel().gpu("0000:03:00.0", "xe", 256).diagnosis();
    assert!(diagnosis.pairs.iter().filter(|pair| pair.state == PairState::Never).count() == 2);
    assert_eq!(turns(&diagnosis).iter().filter(|turn| **turn == StepOrder::Slots).count(), 1);
    assert!(step(&diagnosis, StepOrder::Slots).commands[0].starts_with("peervram route"));
    assert_eq!(diagnosis.verdict, Verdict::CanLend, "a CPU still imports it");
    assert!(!turns(&FakeMachine::working().diagnosis()).contains(&StepOrder::Slots));
}

#[test]
fn a_missing_vulkan_is_installed_as_the_distribution_does_it() {
    let without = |ids: &[&str]| {
        let ids = ids.iter().map(|&id| id.to_owned()).collect();
        let machine = FakeMachine::working().with(|machine| {
            machine.facts.vulkan = Vulkan::Missing { why: "no loader".into() };
            machine.facts.distribution.ids = ids;
        });
        step(&machine.diagnosis(), StepOrder::Vulkan).clone()
    };
    assert!(without(&["ubuntu", "debian"]).commands[0].starts_with("apt install libvulkan1"));
    assert!(without(&["fedora"]).commands[0].starts_with("dnf"));
    assert!(without(&["plan9"]).commands.is_empty());
    assert!(without(&["plan9"]).what.contains("libvulkan1"));
}

#[test]
fn a_broken_vulkan_is_not_a_missing_one() {
    let broken =
        |machine: &mut FakeMachine| machine.facts.vulkan = Vulkan::Broken { why: "signal 11".into() };
    let diagnosis = FakeMachine::working().with(broken).diagnosis();
    assert!(finding(&diagnosis, "vulkan-broken").seen.contains("signal 11"));
    assert!(step(&diagnosis, StepOrder::Vulkan).commands[0].contains("VK_LOADER_DEBUG"));
    assert_eq!(diagnosis.verdict, Verdict::CanLend, "a GPU imports without Vulkan");
}

#[test]
fn an_intel_gpu_that_cannot_import_is_told_of_xe() {
    let diagnosis = FakeMachine::bare().gpu(LENDER, "vfio-pci", 256).gpu(IMPORTER, "i915", 256).diagnosis();
    assert!(step(&diagnosis, StepOrder::ImportingDriver).commands[0].contains("xe.force_probe=744c"));
    let other = FakeMachine::working().gpu("0000:03:00.0", "i915", 256).diagnosis();
    assert!(!turns(&other).contains(&StepOrder::ImportingDriver), "amdgpu imports already");
}

#[test]
fn an_empty_container_is_told_what_it_can_still_do() {
    let diagnosis = Diagnosis::of(&empty_container());
    assert_eq!(diagnosis.verdict, Verdict::Nothing);
    assert_eq!(turns(&diagnosis), [StepOrder::LookAtTheHost, StepOrder::Vulkan, StepOrder::Try]);
    assert!(diagnosis.pairs.is_empty());
}

#[test]
fn a_machine_without_a_gpu_is_not_asked_for_a_kernel() {
    let old = |machine: &mut FakeMachine| machine.facts.kernel_release = "6.1.0".into();
    let diagnosis = FakeMachine::bare().without_iommu().with(old).diagnosis();
    assert_eq!(diagnosis.verdict, Verdict::HostMemoryOnly);
    assert_eq!(turns(&diagnosis), [StepOrder::LookAtTheHost, StepOrder::Try]);
}

#[test]
fn little_lockable_memory_and_narrow_links_are_hints() {
    let diagnosis = FakeMachine::working()
        .with(|machine| {
            machine.facts.user.uid = 1000;
            machine.facts.memlock_bytes = Some(64 << 10);
            machine.at(LENDER).function.link = Some(Link {
                speed: "16.0 GT/s PCIe".into(),
                width_lanes: 4,
                max_speed: "16.0 GT/s PCIe".into(),
                max_width_lanes: 16,
            });
        })
        .diagnosis();
    assert_eq!(finding(&diagnosis, "memlock-low").weight, Severity::Hint);
    assert!(finding(&diagnosis, "link-narrowed").seen.contains("x4, of"));
    assert_eq!(turns(&diagnosis), [StepOrder::Memlock, StepOrder::Try]);
}

#[test]
fn two_vfio_devices_reach_each_other_by_address_space() {
    let diagnosis =
        FakeMachine::bare().gpu(LENDER, "vfio-pci", 256).gpu(IMPORTER, "vfio-pci", 256).diagnosis();
    let between = diagnosis.pairs.iter().filter(|pair| pair.path == PairPath::AddressSpace);
    assert!(between.clone().count() == 2 && between.clone().all(|pair| pair.state == PairState::Now));
}

#[test]
fn whatever_is_wrong_steps_are_few_ordered_and_said_once_on_a_page_of_80_columns() {
    type Change = fn(FakeMachine) -> FakeMachine;
    const CHANGES: [Change; 11] = [
        |machine| machine.with(|machine| machine.facts.kernel_release = "6.12.1".into()),
        FakeMachine::without_iommu,
        FakeMachine::intel,
        FakeMachine::unprivileged,
        |machine| machine.resizable(LENDER),
        |machine| machine.neighbour(LENDER, "nvme"),
        |machine| machine.with(|machine| machine.facts.vulkan = Vulkan::Missing { why: "no loader".into() }),
        |machine| machine.with(|machine| machine.at(LENDER).function.driver = Some("nouveau".into())),
        |machine| machine.with(|machine| machine.facts.memlock_bytes = Some(0)),
        |machine| machine.in_use("0000:01:00.1", mounted()),
        |machine| machine.in_use(LENDER, Use::BootDisplay),
    ];
    for wrong in 0_u32..1 << CHANGES.len() {
        let chosen = CHANGES.iter().enumerate().filter(|(bit, _)| wrong >> bit & 1 != 0);
        let facts = chosen.fold(FakeMachine::working(), |machine, (_, change)| change(machine)).facts();
        let diagnosis = Diagnosis::of(&facts);
        assert!(turns(&diagnosis).is_sorted(), "{wrong:b}: {:?}", turns(&diagnosis));
        assert!(turns(&diagnosis).len() <= 5, "{wrong:b}: {:?}", turns(&diagnosis));
        let is_needed = |candidate: &Candidate| !candidate.needed(&facts).is_empty();
        if Candidate::all(&facts).iter().any(is_needed) {
            takes_nothing(&diagnosis, LENDER);
        }
        for (number, step) in diagnosis.what_to_do.iter().enumerate() {
            let again = diagnosis.what_to_do[number + 1..].iter().any(|other| other.what == step.what);
            assert!(!again, "{wrong:b}: twice: {}", step.what);
        }
        let mut page = Vec::new();
        page::print(&facts, &diagnosis, &mut page).unwrap();
        let page = String::from_utf8(page).unwrap();
        let wide = page.lines().find(|line| line.chars().count() > 80);
        assert_eq!(wide, None, "{wrong:b}");
        // Whatever is wrong is on the page.
        for finding in &diagnosis.findings {
            let first = finding.seen.split(' ').next().unwrap();
            assert!(page.contains(first), "{wrong:b}: {}", finding.seen);
        }
        serde_json::to_string(&facts).unwrap();
    }
}
