//! Machines made by hand, as captured ones, for the tests of routes and fixes.

use peervram_backends::PciAddress;
use peervram_backends::topology::Topology;
use serde_json::{Value, json};

use super::{End, Fix, FixKind, KernelMessages, Route};

/// A machine as JSON, and what is added to it.
pub(super) struct FakeMachine {
    pub places: Vec<Value>,
    pub cpu: Value,
    pub release: &'static str,
    /// Whether it is looked at elsewhere.
    pub is_captured: bool,
}

/// What a PCI Express function's configuration space says.
#[derive(Clone, Copy)]
pub(super) struct Config {
    pub port_type: u8,
    pub is_bridge: bool,
    /// Whether a port says that there is a slot below it.
    pub has_slot: bool,
    pub acs: Option<u16>,
    /// Speed and width, now and at most.
    pub link: [(u8, u8); 2],
    /// Exponents of 128 bytes, now and at most.
    pub payload: [u8; 2],
    /// A BAR that can have these bits' sizes.
    pub resizable: Option<(u32, u8)>,
}

pub(super) const REDIRECTS: u16 = 0x1d;
pub(super) const FULL: [(u8, u8); 2] = [(4, 16), (4, 16)];
pub(super) const ENDPOINT: Config = Config {
    port_type: 0,
    is_bridge: false,
    has_slot: false,
    acs: None,
    link: FULL,
    payload: [1, 1],
    resizable: None,
};
pub(super) const ROOT_PORT: Config =
    Config { port_type: 4, is_bridge: true, has_slot: true, acs: Some(REDIRECTS), ..ENDPOINT };
pub(super) const UPSTREAM: Config = Config { port_type: 5, is_bridge: true, ..ENDPOINT };
pub(super) const DOWNSTREAM: Config = Config { port_type: 6, ..ROOT_PORT };

impl Config {
    pub fn hex(self) -> String {
        let mut bytes = vec![0_u8; 4096];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        let link = |(speed, width): (u8, u8)| u16::from(speed) | u16::from(width) << 4;
        put(6, &[0x10]);
        put(0xe, &[self.is_bridge.into()]);
        put(0x34, &[0x40]);
        put(0x40, &[0x10, 0, self.port_type << 4 | 2, self.has_slot.into()]);
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

impl FakeMachine {
    /// With an Intel host bridge that is not on the list, and Intel's CPU.
    pub fn new() -> Self {
        let cpu = json!({"known": {"vendor": "GenuineIntel", "family": 6, "model": 94, "name": null, "microcode": null}});
        Self { places: Vec::new(), cpu, release: "7.3.4", is_captured: false }
            .add("00:00.0", "pci0000:00", ENDPOINT)
            .id("8086:29c0")
    }

    pub fn zen(mut self) -> Self {
        self.cpu["known"]["vendor"] = json!("AuthenticAMD");
        self.cpu["known"]["family"] = json!(0x17);
        self
    }

    pub fn add(self, address: &str, above: &str, config: Config) -> Self {
        let config = json!({"known": {"size_bytes": 4096, "bytes": config.hex()}});
        self.add_read(address, above, config)
    }

    pub fn add_read(mut self, address: &str, above: &str, config: Value) -> Self {
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
    pub fn id(mut self, id: &str) -> Self {
        let (vendor, device) = id.split_once(':').unwrap();
        let function = &mut self.places.last_mut().unwrap()["function"];
        function["vendor_id"] = json!(u16::from_str_radix(vendor, 16).unwrap());
        function["device_id"] = json!(u16::from_str_radix(device, 16).unwrap());
        self
    }

    /// Left unread, so that this one, itself or a bridge above it, sleeps on. The words of the reason decide nothing.
    pub fn asleep(mut self, sleeper: &str) -> Self {
        let sleeper: PciAddress = sleeper.parse().unwrap();
        let place = self.places.last_mut().unwrap();
        place["config"] = json!({"unread": "for a reason"});
        place["sleeper"] = json!(sleeper);
        self
    }

    pub fn driver(mut self, driver: &str) -> Self {
        self.places.last_mut().unwrap()["function"]["driver"] = json!(driver);
        self
    }

    pub fn topology(&self) -> Topology {
        let unread = json!({"unread": "made by hand"});
        let captured = json!({
            "format": "peervram-topology", "version": 1, "kernel_release": {"known": self.release},
            "command_line": unread, "boot_id": unread, "cpu": self.cpu, "order": {"known": null},
            "places": self.places,
        });
        let mut topology = Topology::from_json(&captured.to_string()).unwrap();
        topology.is_captured = self.is_captured;
        topology
    }

    pub fn route(&self, provider: &str, client: &str) -> Route {
        self.route_after(provider, client, &KernelMessages::in_text(""))
    }

    pub fn route_after(&self, provider: &str, client: &str, messages: &KernelMessages) -> Route {
        let client = match client.parse() {
            Ok(address) => End::Function(address),
            Err(_) if client == "cpu" => End::Cpu,
            Err(_) => End::NotPci(client.into()),
        };
        Route::explain(&self.topology(), provider.parse().unwrap(), &client, messages).unwrap()
    }
}

pub(super) fn root_ports() -> FakeMachine {
    FakeMachine::new()
        .add("00:02.0", "pci0000:00", ROOT_PORT)
        .add("01:00.0", "00:02.0", ENDPOINT)
        .driver("vfio-pci")
        .add("00:03.0", "pci0000:00", ROOT_PORT)
        .add("02:00.0", "00:03.0", ENDPOINT)
        .driver("amdgpu")
}

/// A switch with three ports, the third of them free, and a card beside it.
pub(super) fn switch(acs: Option<u16>) -> FakeMachine {
    let port = Config { acs, ..DOWNSTREAM };
    FakeMachine::new()
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

pub(super) fn fix(route: &Route, kind: FixKind) -> &Fix {
    let found = route.fixes.iter().find(|fix| fix.kind == kind);
    found.unwrap_or_else(|| panic!("no {kind:?} in {:?}", route.fixes))
}

pub(super) fn has(route: &Route, kind: FixKind) -> bool {
    route.fixes.iter().any(|fix| fix.kind == kind)
}

pub(super) fn drawn(machine: &FakeMachine, route: &Route) -> String {
    let drawing = route.draw(&machine.topology());
    assert!(drawing.lines().all(|line| line.chars().count() <= 80), "{drawing}");
    drawing
}
