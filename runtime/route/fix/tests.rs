//! Each fix where it helps, and not where it does not.

use peervram_backends::PciAddress;
use peervram_backends::topology::MapType;
use serde_json::json;

use super::super::machine::{
    Config, DOWNSTREAM, ENDPOINT, FakeMachine, REDIRECTS, ROOT_PORT, UPSTREAM, fix, has, root_ports, switch,
};
use super::super::{Answer, Route};
use super::{FixKind, Needs};

fn count(route: &Route, kind: FixKind) -> usize {
    route.fixes.iter().filter(|fix| fix.kind == kind).count()
}

/// What is said of cards and slots.
fn moves(route: &Route) -> Vec<(String, Option<MapType>)> {
    let moves = route.fixes.iter().filter(|fix| fix.kind == FixKind::MoveCard);
    moves
        .map(|fix| (fix.what.replace("Put the card at ", "").replace(" into the slot of ", " > "), fix.then))
        .collect()
}

#[test]
fn a_way_that_works_and_could_be_shorter_is_shown_the_shorter_one() {
    let long = switch(Some(REDIRECTS)).zen().route("03:00.0", "04:00.0");
    assert_eq!((long.answer(), long.map_type()), (Answer::Works, Some(MapType::ThroughHostBridge)));
    assert_eq!(fix(&long, FixKind::DisableAcsRedirect).then, Some(MapType::BusAddress));
    assert_eq!(count(&long, FixKind::DisableAcsRedirect), 1);
    assert!(!has(&long, FixKind::MoveCard) && !has(&long, FixKind::OtherHardware));
    let short = switch(None).zen().route("03:00.0", "04:00.0");
    assert_eq!((short.answer(), short.map_type()), (Answer::Works, Some(MapType::BusAddress)));
    assert!(short.fixes.is_empty(), "{:?}", short.fixes);
    // Where it is refused the fix is there once, and not for a second reason again.
    assert_eq!(count(&switch(Some(REDIRECTS)).route("03:00.0", "04:00.0"), FixKind::DisableAcsRedirect), 1);
    // Ports without a common bridge redirect, and that decides nothing.
    let apart = root_ports().zen().route("01:00.0", "02:00.0");
    assert_eq!(apart.fixes.iter().map(|fix| fix.kind).collect::<Vec<_>>(), [FixKind::Passthrough]);
}

#[test]
fn groups_that_merge_are_those_that_differ() {
    let route = switch(Some(REDIRECTS)).route("03:00.0", "04:00.0");
    let groups = fix(&route, FixKind::DisableAcsRedirect).groups.clone().unwrap();
    let named = |groups: &[&[&str]]| -> Vec<Vec<PciAddress>> {
        groups.iter().map(|group| group.iter().map(|text| text.parse().unwrap()).collect()).collect()
    };
    // The card beside the switch stays in the group that it is in, and so does what is above the two ports.
    assert_eq!(groups.now, named(&[&["02:00.0"], &["02:01.0"], &["03:00.0"], &["04:00.0"]]));
    assert_eq!(groups.then, named(&[&["02:00.0", "03:00.0"], &["02:01.0", "04:00.0"]]));
    assert_eq!(fix(&route, FixKind::WriteAcs).groups, None);
}

#[test]
fn a_bar_that_is_as_large_as_it_can_be_is_left_alone() {
    let with = |now: u8| {
        let card = Config { resizable: Some((1 << 8 | 1 << 14, now)), ..ENDPOINT };
        FakeMachine::new()
            .zen()
            .add("00:02.0", "pci0000:00", ROOT_PORT)
            .add("01:00.0", "00:02.0", card)
            .add("00:03.0", "pci0000:00", ROOT_PORT)
            .add("02:00.0", "00:03.0", card)
            .route("01:00.0", "02:00.0")
    };
    assert_eq!(count(&with(8), FixKind::ResizeBar), 1, "the lender's, and not the importer's");
    assert!(!has(&with(14), FixKind::ResizeBar));
    // Without a driver there is nothing to unbind.
    let resize = with(8);
    let file = "/sys/bus/pci/devices/0000:01:00.0/resource2_resize";
    assert_eq!(fix(&resize, FixKind::ResizeBar).commands, [format!("echo 14 > {file}")]);
    assert!(fix(&resize, FixKind::ResizeBar).what.contains("(it can have 256, 16384 MiB)"));
}

#[test]
fn only_what_was_not_read_is_asked_for() {
    let known = |bytes: String| json!({"known": {"size_bytes": 4096, "bytes": bytes}});
    let cut = known("00".repeat(6) + "10" + &"00".repeat(57));
    let ones = known("ff".repeat(4096));
    let cut_ones = known("ff".repeat(64));
    let denied = json!({"unread": "Permission denied"});
    // An error whose text speaks of waking does not bring the fix either.
    let speaks = json!({"unread": "it would wake the neighbours"});
    let kinds_of = |machine: FakeMachine| {
        let route = machine.add("01:00.1", "00:02.0", ENDPOINT).route("01:00.0", "01:00.1");
        assert_eq!(route.answer(), Answer::Unknown);
        route.fixes.iter().map(|fix| fix.kind).collect::<Vec<_>>()
    };
    let port =
        |config: &serde_json::Value| FakeMachine::new().add_read("00:02.0", "pci0000:00", config.clone());
    let whole = known(ENDPOINT.hex());
    let asleep = || port(&whole).asleep("00:02.0");
    let kinds = |port: FakeMachine, lender: &serde_json::Value| {
        kinds_of(port.add_read("01:00.0", "00:02.0", lender.clone()))
    };
    use FixKind::{ReadMore, WakeDevice};
    assert_eq!(kinds(asleep(), &whole), [WakeDevice]);
    assert_eq!(kinds(port(&ones), &whole), [WakeDevice]);
    assert_eq!(kinds(port(&cut_ones), &whole), [WakeDevice]);
    assert_eq!(kinds(port(&cut), &whole), [ReadMore]);
    assert_eq!(kinds(port(&denied), &whole), [ReadMore]);
    assert_eq!(kinds(port(&speaks), &whole), [ReadMore]);
    assert_eq!(kinds(asleep(), &cut), [WakeDevice, ReadMore]);
    assert_eq!(kinds(asleep(), &ones), [WakeDevice, WakeDevice]);
    // A bridge that sleeps is woken once, however much below it was not read.
    let below = asleep().add("01:00.0", "00:02.0", ENDPOINT).asleep("00:02.0");
    assert_eq!(kinds_of(below), [WakeDevice]);
}

#[test]
fn where_reading_as_root_would_tell_no_more_something_else_is_said() {
    let with_bridge = |config: Option<String>| {
        let machine = match config {
            Some(bytes) => FakeMachine::new().add_read(
                "00:02.0",
                "pci0000:00",
                json!({"known": {"size_bytes": 4096, "bytes": bytes}}),
            ),
            None => FakeMachine::new(),
        };
        machine.add("01:00.0", "00:02.0", ENDPOINT).add("01:00.1", "00:02.0", ENDPOINT)
    };
    let recommended = |machine: &FakeMachine| {
        let route = machine.route("01:00.0", "01:00.1");
        assert_eq!(route.answer(), Answer::Unknown);
        route.recommended().cloned()
    };
    let captured = |machine: FakeMachine| FakeMachine { is_captured: true, ..machine };
    let cut = Some("00".repeat(6) + "10" + &"00".repeat(57));

    // A bridge that is not in a captured tree is not on the machine of whoever asks either.
    let fix = recommended(&captured(with_bridge(None))).unwrap();
    assert!(
        fix.what.starts_with("Capture that machine again, as root")
            && fix.what.contains("the bridge 0000:00:02.0 above 0000:01:00.0 is missing"),
        "{}",
        fix.what
    );
    assert_eq!(
        (fix.kind, &fix.commands[..]),
        (FixKind::ReadMore, &["sudo peervram capture machine.json".to_owned()][..])
    );
    // Nor is the rest of a configuration space.
    let fix = recommended(&captured(with_bridge(cut.clone()))).unwrap();
    assert!(
        fix.what.starts_with("Capture that machine again") && fix.what.contains("64 bytes"),
        "{}",
        fix.what
    );
    assert_eq!(fix.commands, ["sudo peervram capture machine.json"]);
    let fix = recommended(&with_bridge(cut)).unwrap();
    assert!(fix.what.starts_with("Ask as root"), "{}", fix.what);
    // Here a bridge is missing while the machine changes.
    let fix = recommended(&with_bridge(None)).unwrap();
    assert!(fix.what.starts_with("Ask again") && !fix.what.contains("root"), "{}", fix.what);

    // A processor that was not captured, and one that the kernel here does not name.
    let nameless = || FakeMachine { cpu: json!({"unread": "the report does not say"}), ..root_ports() };
    let route = captured(nameless()).route("01:00.0", "02:00.0");
    let fix = route.recommended().unwrap();
    assert!(
        fix.what.contains("again, as root: the processor is not known: the report does not say"),
        "{}",
        fix.what
    );
    let route = nameless().route("01:00.0", "02:00.0");
    assert_eq!((route.answer(), route.recommended()), (Answer::Unknown, None));

    // What sleeps in a captured machine is captured once more.
    let asleep = captured(with_bridge(Some(ENDPOINT.hex())).asleep("00:02.0"));
    assert!(recommended(&asleep).unwrap().what.contains("Wake it, and capture the machine again"));
    // To capture it again as it is would tell no more.
    let kinds: Vec<_> = asleep.route("01:00.0", "01:00.1").fixes.iter().map(|fix| fix.kind).collect();
    assert_eq!(kinds, [FixKind::WakeDevice]);
}

#[test]
fn what_the_way_only_turns_at_counts_for_nothing() {
    // The switch's own link to the root, and its packets, are of no matter to what stays below it.
    let upstream = Config { link: [(1, 1), (4, 16)], payload: [0, 2], ..UPSTREAM };
    let port = |acs| Config { acs, payload: [1, 1], ..DOWNSTREAM };
    let with = |acs| {
        FakeMachine::new()
            .zen()
            .add("00:02.0", "pci0000:00", Config { link: upstream.link, ..ROOT_PORT })
            .add("01:00.0", "00:02.0", upstream)
            .add("02:00.0", "01:00.0", port(acs))
            .add("02:01.0", "01:00.0", port(acs))
            .add("03:00.0", "02:00.0", ENDPOINT)
            .driver("vfio-pci")
            .add("04:00.0", "02:01.0", ENDPOINT)
            .driver("amdgpu")
    };
    let below = with(None).route("03:00.0", "04:00.0");
    assert_eq!(below.map_type(), Some(MapType::BusAddress));
    assert_eq!(below.fixes, []);
    assert!(!below.notes.iter().any(|note| note.contains("idle")), "{:?}", below.notes);
    let used: Vec<bool> = below.way.iter().map(|hop| hop.uses_link).collect();
    // The device, its port; not the port that both are below, nor the root port; then down.
    assert_eq!(used, [true, true, false, false, true, true]);
    // A redirected request goes up and down again over the narrow link.
    let through = with(Some(REDIRECTS)).route("03:00.0", "04:00.0");
    let link = &fix(&through, FixKind::WidenLink).what;
    assert!(link.contains("x1 2.5 GT/s and could at x16 16 GT/s"), "{link}");
    assert!(through.way.iter().all(|hop| hop.uses_link) && through.way.len() == 6);
    assert!(has(&through, FixKind::MaxPayload) && through.notes.iter().any(|note| note.contains("idle")));
    // Two functions of one card meet at the port above them, whose link is theirs.
    let narrow = Config { link: [(4, 1), (4, 16)], ..ENDPOINT };
    let card = FakeMachine::new()
        .add("00:02.0", "pci0000:00", Config { acs: None, link: narrow.link, ..ROOT_PORT })
        .add("01:00.0", "00:02.0", narrow)
        .add("01:00.1", "00:02.0", narrow)
        .route("01:00.0", "01:00.1");
    assert_eq!(card.map_type(), Some(MapType::BusAddress));
    assert!(card.way.iter().all(|hop| hop.uses_link) && card.way.len() == 3);
    // A device needs no link to reach its own memory.
    let itself = with(None).route("03:00.0", "03:00.0");
    assert!(!itself.way[0].uses_link && itself.way[0].is_passed, "{:?}", itself.way);
}

#[test]
fn free_slots_are_listed_by_what_they_bring_and_only_the_best() {
    let machine = FakeMachine::new()
        .add("80:00.0", "pci0000:80", ENDPOINT)
        // On the kernel's list from 7.3 on.
        .id("10de:2f95")
        .add("80:01.0", "pci0000:80", ROOT_PORT)
        .add("81:00.0", "80:01.0", ENDPOINT)
        .driver("amdgpu")
        .add("80:02.0", "pci0000:80", ROOT_PORT)
        .add("00:02.0", "pci0000:00", ROOT_PORT)
        .add("01:00.0", "00:02.0", UPSTREAM)
        .add("02:00.0", "01:00.0", Config { acs: None, ..DOWNSTREAM })
        .add("02:01.0", "01:00.0", Config { acs: None, ..DOWNSTREAM })
        .add("02:02.0", "01:00.0", Config { acs: None, ..DOWNSTREAM })
        .add("03:00.0", "02:00.0", ENDPOINT)
        .driver("vfio-pci")
        .add("07:00.0", "02:01.0", UPSTREAM)
        .add("08:00.0", "07:00.0", Config { acs: None, ..DOWNSTREAM });
    let route = machine.route("03:00.0", "81:00.0");
    assert_eq!(route.answer(), Answer::Refused);
    let (bus, host) = (Some(MapType::BusAddress), Some(MapType::ThroughHostBridge));
    let expected = [
        ("0000:81:00.0 > 0000:02:02.0".to_owned(), bus),
        ("0000:81:00.0 > 0000:08:00.0".to_owned(), bus),
        ("0000:03:00.0 > 0000:80:02.0".to_owned(), host),
    ];
    assert_eq!(moves(&route), expected);
    let prices: Vec<_> =
        route.fixes.iter().filter(|fix| fix.kind == FixKind::MoveCard).map(|fix| &fix.price).collect();
    assert!(prices[0].contains("switch's way") && prices[2].contains("host bridge"), "{prices:?}");
    // A fourth is one too many.
    let four =
        machine.add("02:03.0", "01:00.0", Config { acs: None, ..DOWNSTREAM }).route("03:00.0", "81:00.0");
    let ports: Vec<String> = moves(&four).into_iter().map(|(what, _)| what).collect();
    assert_eq!(
        ports,
        ["0000:81:00.0 > 0000:02:02.0", "0000:81:00.0 > 0000:02:03.0", "0000:81:00.0 > 0000:08:00.0"]
    );
}

#[test]
fn what_is_no_free_slot_is_not_offered() {
    let port = Config { acs: None, ..DOWNSTREAM };
    let with = |free: Config| {
        FakeMachine::new()
            .add("00:02.0", "pci0000:00", ROOT_PORT)
            .add("01:00.0", "00:02.0", UPSTREAM)
            .add("02:00.0", "01:00.0", port)
            .add("02:02.0", "01:00.0", free)
            .add("03:00.0", "02:00.0", ENDPOINT)
            .driver("vfio-pci")
            .add("00:04.0", "pci0000:00", ROOT_PORT)
            .add("06:00.0", "00:04.0", ENDPOINT)
            .driver("amdgpu")
    };
    assert_eq!(moves(&with(port).route("03:00.0", "06:00.0")).len(), 1);
    // A port without a slot, and what has the bit of a slot and is no port.
    for free in [Config { has_slot: false, ..port }, Config { has_slot: true, ..UPSTREAM }] {
        let route = with(free).route("03:00.0", "06:00.0");
        assert_eq!(moves(&route), [], "{:?}", route.fixes);
        assert_eq!(route.recommended().unwrap().kind, FixKind::OtherHardware);
    }
    // A port that does not answer.
    let mut dead = with(port);
    let place = dead.places.iter_mut().find(|place| place["function"]["address"] == "0000:02:02.0").unwrap();
    place["config"] = json!({"known": {"size_bytes": 4096, "bytes": "ff".repeat(4096)}});
    assert_eq!(moves(&dead.route("03:00.0", "06:00.0")), []);
    // Slots with two functions, or with a bridge and what is below it, hold no card that could be moved; nor do
    // the slots of the pair itself.
    let two = with(port).add("05:00.0", "02:02.0", ENDPOINT).add("05:00.1", "02:02.0", ENDPOINT);
    let bridge = with(port).add("05:00.0", "02:02.0", UPSTREAM).add("07:00.0", "05:00.0", ENDPOINT);
    for machine in [two, bridge] {
        assert_eq!(moves(&machine.route("03:00.0", "06:00.0")), []);
    }
    let taken = with(port).add("05:00.0", "02:02.0", ENDPOINT).route("03:00.0", "06:00.0");
    assert_eq!(moves(&taken)[0].0, "0000:06:00.0 > 0000:02:02.0, where 0000:05:00.0 is now");
    assert_eq!(moves(&taken).len(), 1);
}

#[test]
fn what_is_no_card_is_not_moved() {
    let base = || switch(None);
    let moved = |machine: FakeMachine, client: &str| {
        let route = machine.route("03:00.0", client);
        assert_eq!(route.answer(), Answer::Refused);
        moves(&route).iter().filter(|(what, _)| what.starts_with(&format!("0000:{client}"))).count()
    };
    assert_eq!(moved(base(), "06:00.0"), 1);
    assert_eq!(moved(base().add("06:00.1", "00:04.0", ENDPOINT), "06:00.1"), 0);
    assert_eq!(moved(base().add("00:05.0", "pci0000:00", ENDPOINT), "00:05.0"), 0);
    let mut virtual_function = base().add("07:00.0", "00:04.0", ENDPOINT);
    virtual_function.places.last_mut().unwrap()["physical_function"] = json!("0000:06:00.0");
    assert_eq!(moved(virtual_function, "07:00.0"), 0);
}

#[test]
fn of_narrowed_links_the_slowest_is_named_and_of_full_ones_none() {
    let narrow = |lanes: u8| Config { link: [(4, lanes), (4, 16)], ..ENDPOINT };
    let with = |lender: Config, importer: Config| {
        FakeMachine::new()
            .zen()
            .add("00:02.0", "pci0000:00", Config { link: lender.link, ..ROOT_PORT })
            .add("01:00.0", "00:02.0", lender)
            .add("00:03.0", "pci0000:00", Config { link: importer.link, ..ROOT_PORT })
            .add("02:00.0", "00:03.0", importer)
            .route("01:00.0", "02:00.0")
    };
    let full = with(ENDPOINT, ENDPOINT);
    assert!(!has(&full, FixKind::WidenLink) && !has(&full, FixKind::MaxPayload), "{:?}", full.fixes);
    for (lender, importer) in [(8, 1), (1, 8)] {
        let route = with(narrow(lender), narrow(importer));
        let what = &fix(&route, FixKind::WidenLink).what;
        assert!(what.contains("runs at x1 16 GT/s and could at x16"), "{what}");
        assert_eq!(count(&route, FixKind::WidenLink), 1);
    }
    // The shortest packet on the way counts, and what all on it can.
    let payload = |now: u8, most: u8| Config { payload: [now, most], ..ENDPOINT };
    let port = |card: Config| Config { payload: card.payload, ..ROOT_PORT };
    let with = |lender: Config, importer: Config| {
        FakeMachine::new()
            .zen()
            .add("00:02.0", "pci0000:00", port(lender))
            .add("01:00.0", "00:02.0", lender)
            .add("00:03.0", "pci0000:00", port(importer))
            .add("02:00.0", "00:03.0", importer)
            .route("01:00.0", "02:00.0")
    };
    let route = with(payload(1, 2), payload(0, 2));
    let what = &fix(&route, FixKind::MaxPayload).what;
    assert!(what.contains("carry 128 bytes and could carry 512: 96 % of the link, not 84 %"), "{what}");
    assert!(!has(&with(payload(0, 2), payload(0, 0)), FixKind::MaxPayload));
}

#[test]
fn kinds_and_needs_are_what_they_are_called() {
    use FixKind::*;
    for kind in [Passthrough, ResizeBar, WidenLink, MaxPayload] {
        assert!(!kind.mends_a_verdict(), "{kind:?}");
    }
    for kind in [
        DisableAcsRedirect,
        ConfigAcs,
        WriteAcs,
        FirmwareAcs,
        MoveCard,
        NewerKernel,
        OtherHardware,
        Rebind,
        ReadMore,
        WakeDevice,
    ] {
        assert!(kind.mends_a_verdict(), "{kind:?}");
    }
    let words = [Needs::Root, Needs::Rebinding, Needs::Reboot, Needs::Hands].map(Needs::words);
    assert_eq!(
        words,
        ["root", "the device unbound and bound again", "a reboot", "the machine switched off and opened"]
    );
}
