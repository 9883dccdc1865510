//! Routes on machines made by hand, as captured ones. What kernels say of the fixes is asked in the lab.

use peervram_backends::topology::{MapType, Topology};
use peervram_backends::{Kind, PciAddress};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::{Answer, End, Fix, FixKind, KernelMessages, Needs, Route};

/// A machine as JSON, and what is added to it.
struct Machine {
    places: Vec<Value>,
    cpu: Value,
    release: &'static str,
}

/// What a PCI Express function's configuration space says.
#[derive(Clone, Copy)]
struct Config {
    port_type: u8,
    is_bridge: bool,
    acs: Option<u16>,
    /// Speed and width, now and at most.
    link: [(u8, u8); 2],
    /// Exponents of 128 bytes, now and at most.
    payload: [u8; 2],
    /// A BAR that can have these bits' sizes.
    resizable: Option<(u32, u8)>,
}

const REDIRECTS: u16 = 0x1d;
const FULL: [(u8, u8); 2] = [(4, 16), (4, 16)];
const ENDPOINT: Config =
    Config { port_type: 0, is_bridge: false, acs: None, link: FULL, payload: [1, 1], resizable: None };
const ROOT_PORT: Config = Config { port_type: 4, is_bridge: true, acs: Some(REDIRECTS), ..ENDPOINT };
const UPSTREAM: Config = Config { port_type: 5, is_bridge: true, ..ENDPOINT };
const DOWNSTREAM: Config = Config { port_type: 6, ..ROOT_PORT };

impl Config {
    fn hex(self) -> String {
        let mut bytes = vec![0_u8; 4096];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        let link = |(speed, width): (u8, u8)| u16::from(speed) | u16::from(width) << 4;
        put(6, &[0x10]);
        put(0xe, &[self.is_bridge.into()]);
        put(0x34, &[0x40]);
        let slot = if matches!(self.port_type, 4 | 6) { 1 } else { 0 };
        put(0x40, &[0x10, 0, self.port_type << 4 | 2, slot]);
        put(0x44, &[self.payload[1]]);
        put(0x48, &[self.payload[0] << 5]);
        put(0x4c, &u32::from(link(self.link[1])).to_le_bytes());
        put(0x52, &link(self.link[0]).to_le_bytes());
        if let Some(control) = self.acs {
            put(0x100, &0x0001_000d_u32.to_le_bytes());
            put(0x104, &[0x5f, 0]);
            put(0x106, &control.to_le_bytes());
        } else if let Some((sizes, now)) = self.resizable {
            put(0x100, &0x0001_0015_u32.to_le_bytes());
            put(0x104, &(sizes << 4).to_le_bytes());
            put(0x108, &(2 | 1 << 5 | u32::from(now) << 8).to_le_bytes());
        }
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

impl Machine {
    /// With an Intel host bridge that is not on the list, and Intel's CPU.
    fn new() -> Self {
        let cpu = json!({"known": {"vendor": "GenuineIntel", "family": 6, "model": 94, "name": null, "microcode": null}});
        Self { places: Vec::new(), cpu, release: "7.3.4" }
            .add("00:00.0", "pci0000:00", ENDPOINT)
            .id("8086:29c0")
    }

    fn zen(mut self) -> Self {
        self.cpu["known"]["vendor"] = json!("AuthenticAMD");
        self.cpu["known"]["family"] = json!(0x17);
        self
    }

    fn add(self, address: &str, above: &str, config: Config) -> Self {
        let config = json!({"known": {"size_bytes": 4096, "bytes": config.hex()}});
        self.add_read(address, above, config)
    }

    fn add_read(mut self, address: &str, above: &str, config: Value) -> Self {
        let above = match above.parse::<PciAddress>() {
            Ok(bridge) => json!({"bridge": bridge}),
            Err(_) => json!({"host-bridge": above}),
        };
        let address: PciAddress = address.parse().unwrap();
        let function = json!({
            "address": address, "vendor_id": 0x1b36, "device_id": 0xc, "class": 0x03_00_00, "driver": null,
            "iommu_group": null, "numa_node": null, "bars": [], "link": null, "drm_nodes": [],
            "memory_enabled": null,
        });
        self.places.push(json!({
            "function": function, "above": above, "config": config, "iommu_domain": "DMA-FQ",
            "physical_function": null,
        }));
        self
    }

    /// Changes the function that was added last.
    fn id(mut self, id: &str) -> Self {
        let (vendor, device) = id.split_once(':').unwrap();
        let function = &mut self.places.last_mut().unwrap()["function"];
        function["vendor_id"] = json!(u16::from_str_radix(vendor, 16).unwrap());
        function["device_id"] = json!(u16::from_str_radix(device, 16).unwrap());
        self
    }

    fn driver(mut self, driver: &str) -> Self {
        self.places.last_mut().unwrap()["function"]["driver"] = json!(driver);
        self
    }

    fn topology(&self) -> Topology {
        let unread = json!({"unread": "made by hand"});
        let captured = json!({
            "format": "peervram-topology", "version": 1, "kernel_release": {"known": self.release},
            "command_line": unread, "boot_id": unread, "cpu": self.cpu, "order": {"known": null},
            "places": self.places,
        });
        Topology::from_json(&captured.to_string()).unwrap()
    }

    fn route(&self, provider: &str, client: &str) -> Route {
        self.route_after(provider, client, &KernelMessages::in_text(""))
    }

    fn route_after(&self, provider: &str, client: &str, messages: &KernelMessages) -> Route {
        let client = match client.parse() {
            Ok(address) => End::Function(address),
            Err(_) if client == "cpu" => End::Cpu,
            Err(_) => End::NotPci(client.into()),
        };
        Route::explain(&self.topology(), provider.parse().unwrap(), &client, messages).unwrap()
    }
}

fn root_ports() -> Machine {
    Machine::new()
        .add("00:02.0", "pci0000:00", ROOT_PORT)
        .add("01:00.0", "00:02.0", ENDPOINT)
        .driver("vfio-pci")
        .add("00:03.0", "pci0000:00", ROOT_PORT)
        .add("02:00.0", "00:03.0", ENDPOINT)
        .driver("amdgpu")
}

/// A switch with three ports, the third of them free, and a card beside it.
fn switch(acs: Option<u16>) -> Machine {
    let port = Config { acs, ..DOWNSTREAM };
    Machine::new()
        .add("00:02.0", "pci0000:00", ROOT_PORT)
        .add("01:00.0", "00:02.0", UPSTREAM)
        .add("02:00.0", "01:00.0", port)
        .add("02:01.0", "01:00.0", port)
        .add("02:02.0", "01:00.0", port)
        .add("03:00.0", "02:00.0", ENDPOINT)
        .driver("vfio-pci")
        .add("04:00.0", "02:01.0", ENDPOINT)
        .driver("xe")
        .add("00:04.0", "pci0000:00", ROOT_PORT)
        .add("06:00.0", "00:04.0", ENDPOINT)
        .driver("amdgpu")
}

fn fix(route: &Route, kind: FixKind) -> &Fix {
    let found = route.fixes.iter().find(|fix| fix.kind == kind);
    found.unwrap_or_else(|| panic!("no {kind:?} in {:?}", route.fixes))
}

fn has(route: &Route, kind: FixKind) -> bool {
    route.fixes.iter().any(|fix| fix.kind == kind)
}

fn drawn(machine: &Machine, route: &Route) -> String {
    let drawing = route.draw(&machine.topology());
    assert!(drawing.lines().all(|line| line.chars().count() <= 80), "{drawing}");
    drawing
}

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
    let machine = Machine::new()
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
    let machine = Machine::new()
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
    let asleep = json!({"unread": "it sleeps in D3cold, and reading would wake it"});
    for (config, kind, command) in [
        (cut, FixKind::ReadMore, "sudo peervram route 0000:01:00.0 0000:01:00.1"),
        (ones, FixKind::WakeDevice, "echo 1 > /sys/bus/pci/devices/0000:00:02.0/remove"),
        (asleep, FixKind::WakeDevice, "echo on > /sys/bus/pci/devices/0000:00:02.0/power/control"),
    ] {
        let machine = Machine::new()
            .add_read("00:02.0", "pci0000:00", config)
            .add("01:00.0", "00:02.0", ENDPOINT)
            .add("01:00.1", "00:02.0", ENDPOINT);
        let route = machine.route("01:00.0", "01:00.1");
        assert_eq!(route.answer(), Answer::Unknown);
        let recommended = route.recommended().unwrap();
        assert_eq!((recommended.kind, recommended.commands[0].as_str()), (kind, command));
        assert!(route.verdict_words.contains("because"), "{}", route.verdict_words);
        assert!(drawn(&machine, &route).contains("ACS unknown"), "{}", drawn(&machine, &route));
    }
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
        let mut machine = Machine::new();
        let mut names = vec!["00:00.0".to_owned()];
        for (number, (parent, port_type, acs, on_root)) in above.iter().enumerate() {
            let name = format!("{:02x}:00.0", number + 1);
            let parent = if *on_root { "pci0000:00".to_owned() } else { names[parent % names.len()].clone() };
            let config = Config { port_type: *port_type, is_bridge: true, acs: Some(*acs), ..ENDPOINT };
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
