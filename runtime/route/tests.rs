//! Routes on machines made by hand, as captured ones. What kernels say of the fixes is asked in the lab.

use peervram_backends::Kind;
use peervram_backends::topology::MapType;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::machine::{
    Config, DOWNSTREAM, ENDPOINT, FakeMachine, REDIRECTS, ROOT_PORT, UPSTREAM, drawn, fix, has, root_ports,
    switch,
};
use super::{Answer, End, FixKind, KernelMessages, Needs, Route};

#[test]
fn ports_that_redirect_are_told_not_to() {
    let machine = switch(Some(REDIRECTS));
    let route = machine.route("03:00.0", "04:00.0");
    assert_eq!(route.answer(), Answer::Refused);
    let recommended = route.recommended().unwrap();
    assert_eq!((recommended.kind, recommended.needs), (FixKind::DisableAcsRedirect, Needs::Reboot));
    assert_eq!(recommended.commands, ["pci=disable_acs_redir=00:02.0/00.0/00.0;00:02.0/00.0/01.0"]);
    assert_eq!(recommended.then, Some(MapType::BusAddress));
    assert!(
        recommended.price.contains("isolation") && recommended.what.contains("quotes"),
        "{recommended:?}"
    );
    let groups = recommended.groups.as_ref().unwrap();
    assert!(groups.now.len() > groups.then.len(), "{groups:?}");
    assert_eq!(
        fix(&route, FixKind::WriteAcs).commands,
        [
            "echo 0000:03:00.0 > /sys/bus/pci/drivers/vfio-pci/unbind",
            "setpci -s 0000:02:00.0 ECAP_ACS+6.w=0:2c",
            "setpci -s 0000:02:01.0 ECAP_ACS+6.w=0:2c",
            "echo 0000:03:00.0 > /sys/bus/pci/drivers/vfio-pci/bind",
        ]
    );
    assert_eq!(
        fix(&route, FixKind::ConfigAcs).commands,
        ["pci=config_acs=x0x00xx@00:02.0/00.0/00.0;x0x00xx@00:02.0/00.0/01.0"]
    );
    assert!(fix(&route, FixKind::FirmwareAcs).what.contains("ACS Enable"));
    assert!(
        route.verdict_words.contains("0000:02:00.0 and 0000:02:01.0 send requests up"),
        "{}",
        route.verdict_words
    );
    assert!(route.notes.iter().any(|note| note.contains("unbound from vfio-pci")), "{:?}", route.notes);
    assert!(route.notes.iter().any(|note| note.contains("first submit")), "{:?}", route.notes);
    let drawing = drawn(&machine, &route);
    assert_eq!(drawing.matches("REDIRECTS").count(), 2, "{drawing}");
}

#[test]
fn a_port_in_another_domain_is_named_with_it() {
    let machine = FakeMachine::new()
        .add("0001:00:02.0", "pci0001:00", ROOT_PORT)
        .add("0001:01:00.0", "0001:00:02.0", ENDPOINT)
        .driver("vfio-pci")
        .add("0001:01:00.1", "0001:00:02.0", ENDPOINT);
    let route = machine.route("0001:01:00.0", "0001:01:00.1");
    assert_eq!(route.recommended().unwrap().commands, ["pci=disable_acs_redir=0001:00:02.0"]);
    assert!(!route.recommended().unwrap().what.contains("quotes"));
}

#[test]
fn root_ports_of_a_host_bridge_that_is_not_listed_have_no_setting() {
    let machine = root_ports();
    let route = machine.route("01:00.0", "02:00.0");
    assert_eq!(route.answer(), Answer::Refused);
    assert_eq!(route.recommended().unwrap().kind, FixKind::OtherHardware);
    assert!(!has(&route, FixKind::DisableAcsRedirect) && !has(&route, FixKind::NewerKernel));
    assert!(route.verdict_words.contains("0000:00:00.0 (8086:29c0)"), "{}", route.verdict_words);
    assert!(route.import_words.starts_with("yes, amdgpu"), "{}", route.import_words);
    let says = |words: &str| route.notes.iter().any(|note| note.contains(words));
    assert!(says("writes only") && says("first submit"), "{:?}", route.notes);
    let expected = "\
host bridge pci0000:00, known by 0000:00:00.0 8086:29c0
|-- 0000:00:02.0  root port, x16 16 GT/s, MPS 256
|   |   ACS: SrcValid ReqRedir CmpltRedir UpstreamFwd
|   `-- 0000:01:00.0  lends: endpoint, vfio-pci, x16 16 GT/s, MPS 256
`-- 0000:00:03.0  root port, x16 16 GT/s, MPS 256
    |   ACS: SrcValid ReqRedir CmpltRedir UpstreamFwd
    `-- 0000:02:00.0  imports: endpoint, amdgpu, x16 16 GT/s, MPS 256
";
    assert_eq!(drawn(&machine, &route), expected);
}

#[test]
fn a_free_slot_of_a_switch_is_found() {
    let route = switch(None).route("03:00.0", "06:00.0");
    assert_eq!(route.answer(), Answer::Refused);
    let recommended = route.recommended().unwrap();
    assert_eq!((recommended.kind, recommended.then), (FixKind::MoveCard, Some(MapType::BusAddress)));
    assert!(recommended.what.contains("0000:06:00.0 into the slot of 0000:02:02.0"), "{}", recommended.what);
    // Where all are taken, one that is taken.
    let full = switch(None).add("05:00.0", "02:02.0", ENDPOINT).route("03:00.0", "06:00.0");
    let what = &full.recommended().unwrap().what;
    assert!(
        what.contains("where 0000:04:00.0 is now") || what.contains("where 0000:05:00.0 is now"),
        "{what}"
    );
}

#[test]
fn a_newer_kernel_is_found() {
    let mut machine = root_ports();
    machine.places[0]["function"]["vendor_id"] = json!(0x10de);
    machine.places[0]["function"]["device_id"] = json!(0x2f95);
    assert_eq!(machine.route("01:00.0", "02:00.0").answer(), Answer::Works);
    machine.release = "7.2.12-arch1-1";
    let route = machine.route("01:00.0", "02:00.0");
    assert!(route.recommended().unwrap().what.contains("Linux 7.3.0"), "{:?}", route.recommended());
    assert!(route.verdict_words.contains("that of 7.3.0 has it"), "{}", route.verdict_words);
    machine.release = "6.12.9";
    let route = machine.route("01:00.0", "02:00.0");
    assert!(route.notes.iter().any(|note| note.contains("exports no VFIO dma-bufs")), "{:?}", route.notes);
}

#[test]
fn several_ranges_want_no_translation() {
    let route = root_ports().zen().route("01:00.0", "02:00.0");
    assert_eq!((route.answer(), route.recommended()), (Answer::Works, None));
    assert_eq!(fix(&route, FixKind::Passthrough).commands, ["iommu=pt"]);
    let mut identity = root_ports().zen();
    for place in &mut identity.places {
        place["iommu_domain"] = json!("identity");
    }
    assert!(!has(&identity.route("01:00.0", "02:00.0"), FixKind::Passthrough));
    assert!(!has(&switch(None).route("03:00.0", "04:00.0"), FixKind::Passthrough));
    let mut mended = root_ports().zen();
    mended.release = "7.3.4-mended";
    assert!(!has(&mended.route("01:00.0", "02:00.0"), FixKind::Passthrough));
}

#[test]
fn a_verdict_that_was_kept_is_suspected() {
    let said = "virtio-pci 0000:04:00.0: cannot be used for peer-to-peer DMA as the client and provider \
                (0000:03:00.0) do not share an upstream bridge or whitelisted host bridge";
    let messages = KernelMessages::in_text(said);
    let route = switch(None).route_after("03:00.0", "04:00.0", &messages);
    assert_eq!(route.messages, [said]);
    let recommended = route.recommended().unwrap();
    assert_eq!((recommended.kind, recommended.needs), (FixKind::Rebind, Needs::Rebinding));
    assert_eq!(recommended.commands.len(), 2);
    let other = switch(None).route_after("04:00.0", "03:00.0", &messages);
    assert!(other.messages.is_empty() && other.recommended().is_none());
}

#[test]
fn a_small_bar_a_narrow_link_and_short_packets_are_seen() {
    // 256 MiB and 16 GiB; 256 MiB now.
    let card = Config {
        resizable: Some((1 << 8 | 1 << 14, 8)),
        link: [(4, 4), (5, 16)],
        payload: [0, 2],
        ..ENDPOINT
    };
    let port = Config { link: [(4, 4), (4, 16)], payload: [0, 1], ..ROOT_PORT };
    let machine = FakeMachine::new()
        .zen()
        .add("00:02.0", "pci0000:00", port)
        .add("01:00.0", "00:02.0", card)
        .driver("vfio-pci")
        .add("00:03.0", "pci0000:00", Config { payload: [0, 2], ..ROOT_PORT })
        .add("02:00.0", "00:03.0", Config { payload: [0, 2], ..ENDPOINT });
    let route = machine.route("01:00.0", "02:00.0");
    let resize = fix(&route, FixKind::ResizeBar);
    assert_eq!(resize.commands[1], "echo 14 > /sys/bus/pci/devices/0000:01:00.0/resource2_resize");
    assert_eq!((resize.commands.len(), resize.needs), (3, Needs::Rebinding));
    assert!(resize.what.contains("256 MiB and could show 16384"), "{}", resize.what);
    let link = &fix(&route, FixKind::WidenLink).what;
    assert!(link.contains("x4 16 GT/s and could at x16 16 GT/s: 6.6 of 26.5 GB/s"), "{link}");
    let payload = fix(&route, FixKind::MaxPayload);
    assert!(payload.what.contains("carry 128 bytes and could carry 256: 91 %"), "{}", payload.what);
    assert_eq!(payload.commands, ["pci=pcie_bus_perf"]);
    assert!(route.recommended().is_none());
    assert!(
        drawn(&machine, &route).contains("x4 16 GT/s of x16 16 GT/s, MPS 128"),
        "{}",
        drawn(&machine, &route)
    );
}

#[test]
fn what_was_not_read_is_asked_for() {
    let cut = json!({"known": {"size_bytes": 4096, "bytes": "00".repeat(6) + "10" + &"00".repeat(57)}});
    let ones = json!({"known": {"size_bytes": 4096, "bytes": "ff".repeat(4096)}});
    let port = |config: Value| FakeMachine::new().add_read("00:02.0", "pci0000:00", config);
    for (machine, kind, command) in [
        (port(cut), FixKind::ReadMore, "sudo peervram route 0000:01:00.0 0000:01:00.1"),
        (port(ones), FixKind::WakeDevice, "echo 1 > /sys/bus/pci/devices/0000:00:02.0/remove"),
        (
            port(json!(null)).asleep("00:02.0"),
            FixKind::WakeDevice,
            "echo on > /sys/bus/pci/devices/0000:00:02.0/power/control",
        ),
    ] {
        let machine = machine.add("01:00.0", "00:02.0", ENDPOINT).add("01:00.1", "00:02.0", ENDPOINT);
        let route = machine.route("01:00.0", "01:00.1");
        assert_eq!(route.answer(), Answer::Unknown);
        let recommended = route.recommended().unwrap();
        assert_eq!((recommended.kind, recommended.commands[0].as_str()), (kind, command));
        assert!(route.verdict_words.contains("because"), "{}", route.verdict_words);
        assert!(drawn(&machine, &route).contains("ACS unknown"), "{}", drawn(&machine, &route));
    }
}

#[test]
fn a_dead_end_leaves_the_answer_unknown_and_says_how_to_bring_it_back() {
    let ones = json!({"known": {"size_bytes": 4096, "bytes": "ff".repeat(4096)}});
    for (lender, importer) in [(Some(&ones), None), (None, Some(&ones)), (Some(&ones), Some(&ones))] {
        let config = |dead: Option<&Value>| {
            dead.cloned().unwrap_or_else(|| json!({"known": {"size_bytes": 4096, "bytes": ENDPOINT.hex()}}))
        };
        let machine = FakeMachine::new()
            .zen()
            .add("00:02.0", "pci0000:00", ROOT_PORT)
            .add_read("01:00.0", "00:02.0", config(lender))
            .driver("vfio-pci")
            .add("00:03.0", "pci0000:00", ROOT_PORT)
            .add_read("02:00.0", "00:03.0", config(importer))
            .driver("amdgpu");
        let route = machine.route("01:00.0", "02:00.0");
        assert_eq!(route.answer(), Answer::Unknown);
        let recommended = route.recommended().unwrap();
        let dead = if lender.is_some() { "0000:01:00.0" } else { "0000:02:00.0" };
        assert_eq!(
            recommended.commands,
            [format!("echo 1 > /sys/bus/pci/devices/{dead}/remove"), "echo 1 > /sys/bus/pci/rescan".into()]
        );
        assert!(recommended.what.contains("does not answer") && recommended.what.contains("off and on"));
        assert!(
            route.verdict_words.starts_with("unknown, because") && route.verdict_words.contains(dead),
            "{}",
            route.verdict_words
        );
        assert_eq!(
            machine.route("01:00.0", "cpu").answer(),
            if lender.is_some() { Answer::Unknown } else { Answer::Unasked }
        );
    }
}

#[test]
fn no_command_takes_what_is_below_a_port_that_does_not_answer() {
    let ones = json!({"known": {"size_bytes": 4096, "bytes": "ff".repeat(4096)}});
    let machine = |other: &str| {
        FakeMachine::new()
            .add_read("00:02.0", "pci0000:00", ones.clone())
            .add("01:00.0", "00:02.0", ENDPOINT)
            .driver("vfio-pci")
            .add("01:00.1", "00:02.0", ENDPOINT)
            .driver("amdgpu")
            .add("01:00.2", "00:02.0", UPSTREAM)
            .driver("pcieport")
            .add("02:00.0", "01:00.2", ENDPOINT)
            .driver(other)
    };
    let route = machine("nvme").route("01:00.0", "01:00.1");
    let fix = fix(&route, FixKind::WakeDevice);
    assert!(fix.commands.is_empty() && fix.what.contains("0000:02:00.0 (nvme)"), "{fix:?}");
    assert!(!fix.what.contains("pcieport") && !fix.what.contains("amdgpu"), "{fix:?}");
    assert_eq!(machine("vfio-pci").route("01:00.0", "01:00.1").recommended().unwrap().commands.len(), 2);
}

#[test]
fn what_the_importer_cannot_is_no_route_that_works() {
    let zen = |driver: Option<&str>| {
        let mut machine = root_ports().zen();
        machine.places.last_mut().unwrap()["function"]["driver"] = json!(driver);
        machine.route("01:00.0", "02:00.0")
    };
    for (driver, can, answer) in [
        (Some("amdgpu"), Some(true), Answer::Works),
        (Some("vfio-pci"), Some(true), Answer::Works),
        (Some("i915"), Some(false), Answer::ImporterCannot),
        // A virtio device that is no GPU.
        (Some("virtio-pci"), Some(false), Answer::ImporterCannot),
        (None, Some(false), Answer::ImporterCannot),
        (Some("of-no-list"), None, Answer::Works),
    ] {
        let route = zen(driver);
        assert_eq!((route.importer_can, route.answer()), (can, answer), "{driver:?}: {}", route.import_words);
        let expected = match can {
            Some(false) => "no",
            Some(true) => {
                if driver == Some("vfio-pci") {
                    "by"
                } else {
                    "yes"
                }
            }
            None => "not known",
        };
        assert!(route.import_words.starts_with(expected), "{driver:?}: {}", route.import_words);
    }
    assert_eq!(zen(Some("i915")).answer().code(), "importer-cannot");
    // What the kernel refuses is refused, whoever imports.
    assert_eq!(root_ports().driver("i915").route("01:00.0", "02:00.0").answer(), Answer::Refused);
}

#[test]
fn a_virtio_gpu_imports_in_one_of_its_modes_only() {
    let with = |features: u64| {
        let mut machine = root_ports().zen();
        let function = &mut machine.places.last_mut().unwrap()["function"];
        function["driver"] = json!("virtio-pci");
        function["drm_nodes"] = json!(["card0"]);
        function["virtio_features"] = json!(features);
        machine.route("01:00.0", "02:00.0")
    };
    // VIRTIO_GPU_F_RESOURCE_BLOB, and VIRTIO_GPU_F_VIRGL with it.
    let (plain, with_3d) = (with(1 << 3), with(1 << 3 | 1));
    assert_eq!((plain.answer(), with_3d.answer()), (Answer::Works, Answer::ImporterCannot));
    assert!(
        plain.import_words.starts_with("yes") && plain.import_words.contains("; not with 3D"),
        "{}",
        plain.import_words
    );
    assert!(
        with_3d.import_words.starts_with("no") && with_3d.import_words.contains("; but it does with blob"),
        "{}",
        with_3d.import_words
    );
}

#[test]
fn what_has_a_driver_of_the_kernels_is_unbound_by_the_command_that_looks_first() {
    let commands = |driver: Option<&str>| {
        let mut machine = switch(Some(REDIRECTS));
        let lender = machine.places.iter_mut().find(|place| place["function"]["address"] == "0000:03:00.0");
        lender.unwrap()["function"]["driver"] = json!(driver);
        fix(&machine.route("03:00.0", "04:00.0"), FixKind::WriteAcs).commands.clone()
    };
    let registers = ["setpci -s 0000:02:00.0 ECAP_ACS+6.w=0:2c", "setpci -s 0000:02:01.0 ECAP_ACS+6.w=0:2c"];
    assert_eq!(commands(None), registers);
    let with_nvme = commands(Some("nvme"));
    assert_eq!(with_nvme[0], "peervram bind 0000:03:00.0");
    assert_eq!(with_nvme[1], "echo 0000:03:00.0 > /sys/bus/pci/devices/0000:03:00.0/driver/unbind");
    assert_eq!(with_nvme[2..4], registers);
    assert_eq!(with_nvme[4..], ["echo 0000:03:00.0 > /sys/bus/pci/drivers_probe"]);
}

#[test]
fn ends_that_are_no_functions_are_told_apart() {
    let machine = root_ports();
    let cpu = machine.route("01:00.0", "cpu");
    assert_eq!((cpu.answer(), cpu.recommended()), (Answer::Unasked, None));
    assert!(drawn(&machine, &cpu).contains("of the processor"), "{}", drawn(&machine, &cpu));
    let vgem = machine.route("01:00.0", "vgem");
    assert_eq!(vgem.answer(), Answer::Refused);
    assert!(vgem.import_words.starts_with("no, vgem") && vgem.verdict_words.contains("no PCI device"));
    let vfio = machine.route("02:00.0", "01:00.0");
    assert!(vfio.import_words.contains("iommufd"), "{}", vfio.import_words);
    assert!(vfio.notes[0].contains("ask for no verdict"), "{:?}", vfio.notes);
    let nobody = Route::explain(
        &machine.topology(),
        "01:00.0".parse().unwrap(),
        &End::Function("0a:00.0".parse().unwrap()),
        &KernelMessages::in_text(""),
    );
    assert_eq!(nobody.unwrap_err().kind(), Kind::NotFound);
}

#[test]
fn two_host_bridges_and_switches_in_switches_are_drawn() {
    let machine = switch(None)
        .add("80:01.0", "pci0000:80", ROOT_PORT)
        .add("81:00.0", "80:01.0", ENDPOINT)
        .driver("nouveau")
        .add("07:00.0", "02:02.0", UPSTREAM)
        .add("08:00.0", "07:00.0", DOWNSTREAM)
        .add("09:00.0", "08:00.0", ENDPOINT);
    let hosts = drawn(&machine, &machine.route("03:00.0", "81:00.0"));
    assert_eq!(hosts.matches("host bridge pci").count(), 2, "{hosts}");
    let nested = machine.route("03:00.0", "09:00.0");
    assert_eq!(nested.recommended().unwrap().commands, ["pci=disable_acs_redir=00:02.0/00.0/02.0/00.0/00.0"]);
    let passed: Vec<bool> = machine.route("03:00.0", "04:00.0").way.iter().map(|hop| hop.is_passed).collect();
    // The device, its port, the common upstream port; not the root port above it; then down.
    assert_eq!(passed, [true, true, true, false, true, true]);
    println!("{hosts}\n{}", drawn(&machine, &nested));
}

proptest! {
    #[test]
    fn any_tree_is_explained_and_drawn(
        above in proptest::collection::vec((0_usize..12, 0_u8..8, 0_u16..64, any::<bool>()), 1..12),
        ends in (0_usize..12, 0_usize..12),
    ) {
        let mut machine = FakeMachine::new();
        let mut names = vec!["00:00.0".to_owned()];
        for (number, (parent, port_type, acs, on_root)) in above.iter().enumerate() {
            let name = format!("{:02x}:00.0", number + 1);
            let parent = if *on_root { "pci0000:00".to_owned() } else { names[parent % names.len()].clone() };
            let has_slot = matches!(port_type, 4 | 6);
            let config = Config { port_type: *port_type, is_bridge: true, has_slot, acs: Some(*acs), ..ENDPOINT };
            machine = machine.add(&name, &parent, config);
            names.push(name);
        }
        let (a, b) = (&names[ends.0 % names.len()], &names[ends.1 % names.len()]);
        let route = machine.route(a, b);
        drawn(&machine, &route);
        for fix in &route.fixes {
            prop_assert_ne!(fix.then, Some(MapType::NotSupported));
        }
        if route.answer() == Answer::Refused {
            prop_assert!(route.recommended().is_some());
        }
    }
}
