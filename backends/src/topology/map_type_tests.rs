//! Verdicts on trees that are made by hand. What real kernels say of such trees is asked in the lab.

use super::config_space::tests::{root_port, upstream_port};
use super::{Above, Client, ConfigSpace, Cpu, Expected, MapType, Place, Reading, Reason, Topology, Verdict};
use crate::PciAddress;
use crate::pci::Function;
use MapType::{BusAddress, NotSupported, ThroughHostBridge};

const INTEL: Cpu = Cpu { vendor: None, family: Some(6), model: None, name: None, microcode: None };

fn zen() -> Cpu {
    Cpu { vendor: Some("AuthenticAMD".into()), family: Some(0x17), ..INTEL }
}

fn address(text: &str) -> PciAddress {
    text.parse().unwrap()
}

/// A machine with a host bridge that is not on the list, and what is added to it.
struct Tree(Topology);

impl Tree {
    fn new(cpu: Cpu) -> Self {
        let unread = || Reading::Unread("not here".into());
        let tree = Self(Topology {
            kernel_release: Reading::Known("7.3.4".into()),
            command_line: unread(),
            boot_id: unread(),
            cpu: Reading::Known(cpu),
            places: Vec::new(),
            order: Reading::Known(()),
            is_whole: true,
            is_captured: false,
        });
        tree.endpoint("00:00.0", "pci0000:00").with_id("00:00.0", 0x8086, 0x29c0)
    }

    fn add(mut self, function: &str, above: &str, config: Reading<ConfigSpace>) -> Self {
        let above = match above.parse() {
            Ok(bridge) => Above::Bridge(bridge),
            Err(_) => Above::HostBridge(above.into()),
        };
        let function = Function {
            address: address(function),
            vendor_id: 0x1b36,
            device_id: 0x000c,
            class: 0,
            driver: None,
            iommu_group: None,
            numa_node: None,
            bars: Vec::new(),
            link: None,
            drm_nodes: Vec::new(),
            virtio_features: None,
            memory_enabled: None,
            answers: None,
        };
        self.0.places.push(Place {
            function,
            above,
            config,
            sleeper: None,
            iommu_domain: None,
            physical_function: None,
        });
        self
    }

    /// Without ACS.
    fn endpoint(self, function: &str, above: &str) -> Self {
        self.add(function, above, Reading::Known(ConfigSpace::new(vec![0; 256], 256).unwrap()))
    }

    /// A root port by its type, whatever is above it, with this ACS control word.
    fn port(self, function: &str, above: &str, acs_control: u16) -> Self {
        self.add(function, above, Reading::Known(root_port(0x148, acs_control)))
    }

    fn with_id(mut self, function: &str, vendor_id: u16, device_id: u16) -> Self {
        let at = address(function);
        let place = self.0.places.iter_mut().find(|place| place.address() == at).unwrap();
        (place.function.vendor_id, place.function.device_id) = (vendor_id, device_id);
        self
    }

    fn verdict(&self, a: &str, b: &str) -> Verdict {
        self.0.expected_map_type(address(a), address(b))
    }

    fn expect(&self, a: &str, b: &str, map_type: MapType, reason: Reason) -> Verdict {
        let verdict = self.verdict(a, b);
        assert_eq!(verdict.expected, Expected::Known(map_type), "{a} {b}: {verdict:?}");
        assert_eq!(verdict.reason, Some(reason), "{a} {b}");
        verdict
    }

    fn unknown(&self, a: &str, b: &str) -> (Vec<MapType>, String) {
        match self.verdict(a, b).expected {
            Expected::Unknown { possible, because } => (possible, because.join("; ")),
            Expected::Known(map_type) => panic!("{a} {b}: {map_type}"),
        }
    }
}

/// Two endpoints, each below a root port of its own.
fn root_ports(cpu: Cpu) -> Tree {
    Tree::new(cpu)
        .port("00:02.0", "pci0000:00", 0x1d)
        .port("00:03.0", "pci0000:00", 0x1d)
        .endpoint("01:00.0", "00:02.0")
        .endpoint("02:00.0", "00:03.0")
}

/// A switch with two ports below a root port.
fn switch(cpu: Cpu, first: u16, second: u16) -> Tree {
    Tree::new(cpu)
        .port("00:02.0", "pci0000:00", 0x1d)
        .add("01:00.0", "00:02.0", Reading::Known(upstream_port()))
        .port("02:00.0", "01:00.0", first)
        .port("02:01.0", "01:00.0", second)
        .endpoint("03:00.0", "02:00.0")
        .endpoint("04:00.0", "02:01.0")
}

const NOT_LISTED: &str = "00:00.0";

#[test]
fn root_ports_meet_at_the_host_bridge() {
    let verdict = root_ports(zen()).expect("01:00.0", "02:00.0", ThroughHostBridge, Reason::TrustedCpu);
    assert_eq!((verdict.distance, verdict.common), (Some(4), None));
    let not_listed = Reason::HostBridgeNotListed(address(NOT_LISTED));
    root_ports(INTEL).expect("01:00.0", "02:00.0", NotSupported, not_listed);
    // The family before Zen, and a licensee's Zen.
    for cpu in [
        Cpu { family: Some(0x16), ..zen() },
        Cpu { vendor: Some("HygonGenuine".into()), family: Some(0x18), ..zen() },
    ] {
        root_ports(cpu).expect("01:00.0", "02:00.0", NotSupported, not_listed);
    }
}

#[test]
fn below_a_switch_its_ports_decide() {
    let verdict = switch(INTEL, 0, 0).expect("03:00.0", "04:00.0", BusAddress, Reason::NothingRedirects);
    // What is above the common bridge does not matter, though it redirects.
    assert_eq!((verdict.distance, verdict.common), (Some(4), Some(address("01:00.0"))));
    let not_listed = Reason::HostBridgeNotListed(address(NOT_LISTED));
    let verdict = switch(INTEL, 0x04, 0x01).expect("03:00.0", "04:00.0", NotSupported, not_listed);
    assert_eq!(verdict.redirects, [address("02:00.0")]);
    let both = switch(zen(), 0x08, 0x20);
    let verdict = both.expect("04:00.0", "03:00.0", ThroughHostBridge, Reason::TrustedCpu);
    assert_eq!(verdict.redirects, [address("02:01.0"), address("02:00.0")]);
}

#[test]
fn functions_of_one_slot_meet_at_its_port() {
    let tree = root_ports(INTEL).endpoint("01:00.1", "00:02.0");
    let not_listed = Reason::HostBridgeNotListed(address(NOT_LISTED));
    let verdict = tree.expect("01:00.0", "01:00.1", NotSupported, not_listed);
    // The common port's own bits count.
    assert_eq!((verdict.distance, &verdict.redirects[..]), (Some(2), &[address("00:02.0")][..]));
    let same = tree.expect("01:00.0", "01:00.0", BusAddress, Reason::NothingRedirects);
    assert_eq!(same.distance, Some(0));
}

#[test]
fn the_list_is_by_the_first_function_of_a_root_bus() {
    let on_the_list = root_ports(INTEL).with_id("00:00.0", 0x8086, 0x3c00);
    on_the_list.expect("01:00.0", "02:00.0", ThroughHostBridge, Reason::HostBridgesListed);

    let two = |id: u16| {
        root_ports(INTEL)
            .with_id("00:00.0", 0x8086, 0x2030)
            .endpoint("80:00.0", "pci0000:80")
            .with_id("80:00.0", 0x8086, id)
            .port("80:01.0", "pci0000:80", 0)
            .endpoint("81:00.0", "80:01.0")
    };
    two(0x2020).expect("01:00.0", "81:00.0", ThroughHostBridge, Reason::HostBridgesListed);
    let alone = Reason::NeedsSameHostBridge(address("80:00.0"));
    two(0x3c00).expect("01:00.0", "81:00.0", NotSupported, alone);
    two(0x3c00).expect("81:00.0", "01:00.0", NotSupported, alone);
    let not_listed = Reason::HostBridgeNotListed(address("80:00.0"));
    two(0x1234).expect("01:00.0", "81:00.0", NotSupported, not_listed);
}

#[test]
fn a_root_bus_without_a_function_at_00_0_may_begin_with_a_root_port() {
    let endpoint_first = Tree::new(INTEL)
        .endpoint("80:01.0", "pci0000:80")
        .with_id("80:01.0", 0x8086, 0x2030)
        .port("80:02.0", "pci0000:80", 0)
        .endpoint("81:00.0", "80:02.0");
    let first = Reason::HostBridgeNameless(address("80:01.0"));
    endpoint_first.expect("81:00.0", "80:01.0", NotSupported, first);
    let port_first = Tree::new(INTEL)
        .port("80:02.0", "pci0000:80", 0)
        .with_id("80:02.0", 0x8086, 0x2030)
        .endpoint("80:01.0", "pci0000:80")
        .endpoint("81:00.0", "80:02.0");
    port_first.expect("81:00.0", "80:01.0", ThroughHostBridge, Reason::HostBridgesListed);
}

#[test]
fn what_is_no_pci_device_is_refused() {
    let verdict = root_ports(zen()).0.expected_map_type(address("01:00.0"), Client::NotPci);
    assert_eq!(verdict.expected, Expected::Known(NotSupported));
    assert_eq!(verdict.reason, Some(Reason::ClientNotPci));
}

#[test]
fn acs_that_was_not_read_makes_it_unknown_where_it_decides() {
    let first_64 = ConfigSpace::new(root_port(0x148, 0).bytes()[..64].to_vec(), 4096).unwrap();
    let tree = |cpu, second| {
        Tree::new(cpu)
            .port("00:02.0", "pci0000:00", 0)
            .add("01:00.0", "00:02.0", Reading::Known(first_64.clone()))
            .port("01:01.0", "00:02.0", second)
    };
    let (possible, because) = tree(zen(), 0).unknown("01:00.0", "01:01.0");
    assert_eq!(possible, [BusAddress, ThroughHostBridge]);
    assert!(because.contains("01:00.0 redirects (ACS) is not known"), "{because}");
    // One port that redirects settles it, whatever the others do.
    tree(zen(), 0x1d).expect("01:00.0", "01:01.0", ThroughHostBridge, Reason::TrustedCpu);
}

#[test]
fn a_machine_that_was_not_read_whole_makes_it_unknown_where_it_decides() {
    let mut no_cpu = root_ports(zen());
    no_cpu.0.cpu = Reading::Unread("no /proc".into());
    assert_eq!(no_cpu.unknown("01:00.0", "02:00.0").0, [ThroughHostBridge, NotSupported]);
    let listed = no_cpu.with_id("00:00.0", 0x8086, 0x2030);
    listed.expect("01:00.0", "02:00.0", ThroughHostBridge, Reason::HostBridgesListed);

    // Whichever of three is the first on the root bus, none is on the list.
    let mut no_order = root_ports(INTEL);
    no_order.0.order = Reading::Unread("no /proc".into());
    no_order.expect("01:00.0", "02:00.0", NotSupported, Reason::HostBridgeNotListed(address(NOT_LISTED)));
    // One function of the root bus is on the list, two are not.
    let no_order = no_order.with_id("00:00.0", 0x8086, 0x2030);
    assert!(no_order.unknown("01:00.0", "02:00.0").1.contains("first on pci0000:00"));
    // All three are on the list; but the bus may have more functions than were read.
    let mut all = no_order.with_id("00:02.0", 0x8086, 0x2031).with_id("00:03.0", 0x8086, 0x2032);
    all.expect("01:00.0", "02:00.0", ThroughHostBridge, Reason::HostBridgesListed);
    all.0.is_whole = false;
    assert!(all.unknown("01:00.0", "02:00.0").1.contains("first on pci0000:00"));

    let no_bridge = Tree::new(zen()).endpoint("01:00.0", "00:02.0");
    let (possible, because) = no_bridge.unknown("01:00.0", "00:00.0");
    assert_eq!(possible.len(), 3);
    assert_eq!(because, "the bridge 0000:00:02.0 above 0000:01:00.0 is missing");
    assert!(no_bridge.unknown("0a:00.0", "00:00.0").1.contains("no 0000:0a:00.0"));
}

#[test]
fn without_a_release_the_answer_is_known_where_every_list_gives_it() {
    let without = |vendor_id: u16, device_id: u16| {
        let mut tree = root_ports(INTEL).with_id("00:00.0", vendor_id, device_id);
        tree.0.kernel_release = Reading::Unread("no /proc".into());
        tree
    };
    without(0x8086, 0x2030).expect("01:00.0", "02:00.0", ThroughHostBridge, Reason::HostBridgesListed);
    let not_listed = Reason::HostBridgeNotListed(address(NOT_LISTED));
    without(0x8086, 0x29c0).expect("01:00.0", "02:00.0", NotSupported, not_listed);
    // NVIDIA's are on the list from 7.3 on.
    assert!(without(0x10de, 0x2f95).unknown("01:00.0", "02:00.0").1.contains("release is not known"));
}

#[test]
fn a_first_function_that_does_not_answer_says_nothing_of_its_host_bridge() {
    let ones = || Reading::Known(ConfigSpace::new(vec![0xff; 4096], 4096).unwrap());
    let mut tree = root_ports(INTEL);
    // In the place of what is at 00.0, which the kernel takes whatever it answers.
    tree.0.places.retain(|place| place.address() != address(NOT_LISTED));
    let port = tree.0.places.iter_mut().find(|place| place.address() == address("00:02.0")).unwrap();
    port.config = ones();
    let (possible, because) = tree.unknown("01:00.0", "02:00.0");
    assert_eq!(possible, [ThroughHostBridge, NotSupported]);
    assert!(because.contains("whether 0000:00:02.0 is a root port is not known"), "{because}");
}

#[test]
fn a_fallen_device_is_named() {
    let ones = Reading::Known(ConfigSpace::new(vec![0xff; 4096], 4096).unwrap());
    let tree = Tree::new(INTEL)
        .add("00:02.0", "pci0000:00", ones)
        .endpoint("01:00.0", "00:02.0")
        .endpoint("01:00.1", "00:02.0");
    let (possible, because) = tree.unknown("01:00.0", "01:00.1");
    assert_eq!(possible, [BusAddress, NotSupported]);
    assert!(because.contains("0000:00:02.0") && because.contains("does not answer"), "{because}");
    assert!(tree.0.unread().iter().any(|line| line.contains("0000:00:02.0: all ones")));
}

#[test]
fn captured_trees_say_the_same_or_are_refused() {
    let tree = switch(INTEL, 0x04, 0).0;
    let text = tree.to_json();
    assert_eq!(Topology::from_json(&text).unwrap(), Topology { is_captured: true, ..tree });
    let refused = |text: &str| Topology::from_json(text).unwrap_err().to_string();
    assert!(refused(&text[..text.len() / 2]).contains("EOF"), "{}", refused(&text[..text.len() / 2]));
    assert!(refused(&text.replace("\"version\": 1", "\"version\": 2")).contains("version 2"));
    assert!(refused(&text.replace("peervram-topology", "lspci")).contains("lspci"));
    assert!(refused("[]").contains("captured topology"));
    let circle = text.replace("\"host-bridge\": \"pci0000:00\"", "\"bridge\": \"0000:02:00.0\"");
    assert!(refused(&circle).contains("circle"), "{}", refused(&circle));
    let twice = text.replace("\"address\": \"0000:04:00.0\"", "\"address\": \"0000:03:00.0\"");
    assert!(refused(&twice).contains("0000:03:00.0 is in it twice"), "{}", refused(&twice));
}

#[test]
fn a_chain_that_no_machine_has_is_refused_and_soon() {
    let mut tree = Tree::new(INTEL);
    let at = |number: u32| PciAddress { domain: number, bus: 0, device: 0, function: 1 };
    for number in (0..5000).rev() {
        tree = tree.endpoint(&at(number).to_string(), &at(number + 1).to_string());
    }
    let error = Topology::from_json(&tree.0.to_json()).unwrap_err().to_string();
    assert!(error.contains("circle"), "{error}");
}

#[test]
fn without_its_redirects_a_switch_keeps_requests_below() {
    let tree = switch(INTEL, 0x1d, 0x1d);
    let ports = tree.verdict("03:00.0", "04:00.0").redirects;
    assert_eq!(ports, [address("02:00.0"), address("02:01.0")]);
    let fixed = Tree(tree.0.without_redirects(&ports));
    fixed.expect("03:00.0", "04:00.0", BusAddress, Reason::NothingRedirects);
    // The port's other ACS bits stay.
    let acs = fixed.0.place(ports[0]).unwrap().config.known().unwrap().acs().found().unwrap();
    assert_eq!(acs.control, 0x11);
    let half = Tree(tree.0.without_redirects(&ports[..1]));
    half.expect("03:00.0", "04:00.0", NotSupported, Reason::HostBridgeNotListed(address(NOT_LISTED)));
    // One beside the switch, moved below it.
    let beside = switch(INTEL, 0, 0).port("00:05.0", "pci0000:00", 0).endpoint("05:00.0", "00:05.0");
    let moved = Tree(beside.0.moved(address("05:00.0"), address("02:01.0")));
    moved.expect("05:00.0", "03:00.0", BusAddress, Reason::NothingRedirects);
}

#[test]
fn the_way_through_host_bridges_is_as_long_as_both_ways_up() {
    let verdict = switch(zen(), 0, 0).port("00:03.0", "pci0000:00", 0).endpoint("05:00.0", "00:03.0").expect(
        "03:00.0",
        "05:00.0",
        ThroughHostBridge,
        Reason::TrustedCpu,
    );
    assert_eq!((verdict.distance, verdict.common), (Some(6), None));
}

#[test]
fn answers_have_the_kernels_names() {
    let names = [BusAddress, ThroughHostBridge, NotSupported].map(|map_type| format!("{map_type:>20}|"));
    assert_eq!(names, ["         bus address|", " through host bridge|", "       not supported|"]);
}

#[test]
fn another_kernel_is_another_verdict_and_nothing_else() {
    let tree = root_ports(INTEL).with_id("00:00.0", 0x10de, 0x2f95).0;
    let older = tree.with_kernel_release("7.2.12");
    assert_eq!(older, Topology { kernel_release: Reading::Known("7.2.12".into()), ..tree.clone() });
    let answer = |tree: &Topology| tree.expected_map_type(address("01:00.0"), address("02:00.0")).expected;
    assert_eq!(answer(&tree), Expected::Known(ThroughHostBridge));
    assert_eq!(answer(&older), Expected::Known(NotSupported));
}

#[test]
fn what_is_below_a_bridge_is_on_its_bus() {
    let tree = switch(INTEL, 0, 0).0;
    let below = |bridge: &str| {
        tree.below(address(bridge)).map(|place| place.address().to_string()).collect::<Vec<_>>()
    };
    assert_eq!(below("01:00.0"), ["0000:02:00.0", "0000:02:01.0"]);
    assert_eq!(below("03:00.0"), [""; 0]);
}

/// A chain of so many functions, each below the one that is listed after it.
fn chain(length: u32) -> Vec<Place> {
    let at = |number: u32| PciAddress { domain: number, bus: 0, device: 0, function: 1 }.to_string();
    let mut tree = Tree::new(INTEL);
    tree.0.places.clear();
    for number in 1..length {
        tree = tree.endpoint(&at(number), &at(number + 1));
    }
    tree.endpoint(&at(length), "pci0000:00").0.places
}

#[test]
fn there_are_no_more_bridges_one_above_another_than_buses() {
    let is_good = |places: Vec<Place>| {
        let tree = Topology { places, ..Tree::new(INTEL).0 };
        let (read, way) = (Topology::from_json(&tree.to_json()), tree.way_up(tree.places[0].address()));
        // What is read is no circle, so that there is always a way up.
        assert!(way.is_ok());
        read.map(|_| ()).map_err(|error| error.to_string())
    };
    for up in [true, false] {
        let ordered = |length: u32| {
            let mut places = chain(length);
            if up {
                places.reverse();
            }
            places
        };
        assert_eq!(is_good(ordered(256)), Ok(()), "{up}");
        assert!(is_good(ordered(257)).unwrap_err().contains("more bridges than buses"), "{up}");
    }
    // One that hangs from the lower end of what was looked at before.
    let mut places = chain(257);
    let last = places.remove(0);
    places.push(last);
    assert!(is_good(places).unwrap_err().contains("more bridges than buses"));
}

#[test]
fn no_machine_has_more_functions_than_addresses() {
    let mut tree = Tree::new(INTEL).0;
    let one = tree.places.remove(0);
    let at = |domain: u32| {
        let mut place = one.clone();
        place.function.address = PciAddress { domain, ..one.address() };
        place
    };
    tree.places = (0..1 << 16).map(at).collect();
    assert_eq!(tree.check(), Ok(()));
    tree.places.push(at(1 << 16));
    assert_eq!(tree.check(), Err("it has 65537 functions".into()));
}

fn group_of(tree: &Topology, function: &str) -> Vec<String> {
    let groups = tree.predicted_iommu_groups().unwrap();
    let of = groups.iter().find(|group| group.contains(&address(function))).unwrap();
    of.iter().map(PciAddress::to_string).collect()
}

#[test]
fn groups_merge_where_ports_do_not_isolate() {
    let isolated = switch(INTEL, 0x1d, 0x1d).0;
    assert_eq!(group_of(&isolated, "03:00.0"), ["0000:03:00.0"]);
    let merged = isolated.without_redirects(&[address("02:00.0")]);
    assert_eq!(group_of(&merged, "03:00.0"), ["0000:02:00.0", "0000:03:00.0"]);
    let unread = switch(INTEL, 0x1d, 0x1d).add("09:00.0", "02:01.0", Reading::Unread("asleep".into()));
    assert!(unread.0.predicted_iommu_groups().unwrap_err().contains("asleep"));
}

#[test]
fn functions_of_a_slot_share_a_group_unless_one_isolates() {
    // Of root ports, whose number of functions their header's type tells, and that isolate by ACS.
    let of = |first: u16, second: u16| {
        let tree =
            Tree::new(INTEL).port("00:02.0", "pci0000:00", first).port("00:02.1", "pci0000:00", second);
        group_of(&tree.0, "00:02.1")
    };
    assert_eq!(of(0x1d, 0x1d), ["0000:00:02.1"]);
    assert_eq!(of(0, 0x1d), ["0000:00:02.1"]);
    assert_eq!(of(0x1d, 0), ["0000:00:02.1"]);
    assert_eq!(of(0, 0), ["0000:00:02.0", "0000:00:02.1"]);
    // What says that it is alone in its slot joins nobody there, though it does not isolate.
    let alone = Tree::new(INTEL).port("00:02.1", "pci0000:00", 0).port("00:02.0", "pci0000:00", 0);
    let says_several = alone.0.place(address("00:02.0")).unwrap().config.known().unwrap().is_multifunction();
    assert_eq!(says_several, Some(false));
    assert_eq!(group_of(&alone.0, "00:02.0"), ["0000:00:02.0"]);
    let unread = switch(INTEL, 0x1d, 0x1d).add("09:00.0", "02:01.0", Reading::Unread("asleep".into()));
    assert!(unread.0.predicted_iommu_groups().unwrap_err().contains("asleep"));
}

#[test]
fn below_a_bridge_that_takes_requests_over_all_are_one_group() {
    let to_pci = {
        let mut bytes = upstream_port().bytes().to_vec();
        bytes[0x52] = 0x72;
        ConfigSpace::new(bytes, 4096).unwrap()
    };
    assert_eq!(to_pci.port_type().found(), Some(super::PortType::ToPci));
    let tree = Tree::new(INTEL)
        .port("00:02.0", "pci0000:00", 0x1d)
        .add("01:00.0", "00:02.0", Reading::Known(to_pci))
        .port("02:00.0", "01:00.0", 0x1d)
        .port("02:01.0", "01:00.0", 0x1d);
    // However well they isolate.
    assert_eq!(group_of(&tree.0, "02:01.0"), ["0000:01:00.0", "0000:02:00.0", "0000:02:01.0"]);
}

#[test]
fn groups_are_found_however_deep_the_tree_is_but_not_in_circles() {
    let mut tree = Tree::new(INTEL).port("00:02.0", "pci0000:00", 0);
    for bus in 1..40 {
        tree = tree.port(&format!("{bus:02x}:02.0"), &format!("{:02x}:02.0", bus - 1), 0x1d);
    }
    // The bridges are listed after what is below them, so that none has a group yet.
    tree.0.places.reverse();
    assert_eq!(group_of(&tree.0, "27:02.0").len(), 1);
    let circle = tree.0.moved(address("00:02.0"), address("27:02.0"));
    let why = circle.predicted_iommu_groups().unwrap_err();
    assert!(why.contains("a circle"), "{why}");
}

#[test]
fn groups_of_what_does_not_answer_are_not_predicted() {
    let ones = Reading::Known(ConfigSpace::new(vec![0xff; 4096], 4096).unwrap());
    let tree = Tree::new(INTEL).add("00:02.0", "pci0000:00", ones);
    assert_eq!(tree.0.predicted_iommu_groups(), Err("0000:00:02.0 does not answer".into()));
}

/// On arm64 no processor is trusted, and each root port is a PCI domain of its own: the list decides.
#[test]
fn between_domains_of_arm64_both_host_bridges_are_to_be_on_the_list() {
    let arm64 = Cpu { family: None, ..INTEL };
    let domains = |id: u16| {
        let mut tree = Tree::new(arm64.clone());
        for domain in ["0008", "0009"] {
            let root = format!("{domain}:00:00.0");
            tree = tree
                .port(&root, &format!("pci{domain}:00"), 0x1d)
                .with_id(&root, 0x10de, id)
                .endpoint(&format!("{domain}:01:00.0"), &root);
        }
        tree
    };
    // Grace's, and one of later CPUs.
    let not_listed = Reason::HostBridgeNotListed(address("0008:00:00.0"));
    domains(0x22b1).expect("0008:01:00.0", "0009:01:00.0", NotSupported, not_listed);
    let verdict =
        domains(0x2f95).expect("0008:01:00.0", "0009:01:00.0", ThroughHostBridge, Reason::HostBridgesListed);
    assert_eq!((verdict.distance, verdict.common), (Some(4), None));
    let one = domains(0x2f95).with_id("0009:00:00.0", 0x10de, 0x22b1);
    let not_listed = Reason::HostBridgeNotListed(address("0009:00:00.0"));
    one.expect("0008:01:00.0", "0009:01:00.0", NotSupported, not_listed);
}
