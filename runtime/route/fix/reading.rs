//! What has to be read, or woken, before there is a verdict.

use peervram_backends::topology::{ConfigSpace, Expected, Place, Topology};
use peervram_backends::{PciAddress, pci};

use super::super::words::and;
use super::super::{End, Route};
use super::{Fix, FixKind, Needs};

pub(super) fn fixes(topology: &Topology, route: &Route) -> Vec<Fix> {
    let on_the_way: Vec<&Place> = route.way.iter().filter_map(|hop| topology.place(hop.address)).collect();
    let mut fixes = Vec::new();
    // A bridge that sleeps keeps all below it from being read.
    let mut sleepers: Vec<PciAddress> = Vec::new();
    for place in &on_the_way {
        match place.sleeper {
            Some(sleeper) if sleepers.contains(&sleeper) => {}
            Some(sleeper) => {
                sleepers.push(sleeper);
                fixes.push(wake(topology, sleeper));
            }
            None if place.config.known().is_some_and(ConfigSpace::is_all_ones) => {
                fixes.push(revive(topology, route, place.address()));
            }
            None => {}
        }
    }
    fixes.extend(read_more(topology, route, &on_the_way, fixes.is_empty()));
    fixes
}

fn wake(topology: &Topology, sleeper: PciAddress) -> Fix {
    let again = if topology.is_captured { "capture the machine again" } else { "ask again" };
    Fix {
        kind: FixKind::WakeDevice,
        what: format!("{sleeper} sleeps. Wake it, and {again}"),
        commands: vec![format!("echo on > /sys/bus/pci/devices/{sleeper}/power/control")],
        price: "it draws power until that is auto again".into(),
        needs: Needs::Root,
        then: None,
        groups: None,
    }
}

fn revive(topology: &Topology, route: &Route, address: PciAddress) -> Fix {
    let others = driven_below(topology, route, address);
    let (what, commands) = if others.is_empty() {
        let remove = format!("echo 1 > /sys/bus/pci/devices/{address}/remove");
        let commands = vec![remove, "echo 1 > /sys/bus/pci/rescan".into()];
        ("Take it out of the tree and look again".to_owned(), commands)
    } else {
        let others = and(&others);
        let what =
            format!("Taking it out of the tree would take {others} with it, so see first who needs them");
        (what, Vec::new())
    };
    Fix {
        kind: FixKind::WakeDevice,
        what: format!(
            "{address} does not answer: it fell off the bus. {what}; where that brings nothing, switch the machine \
             off and on"
        ),
        commands,
        price: "whoever uses it, or anything below it, loses it".into(),
        needs: Needs::Root,
        then: None,
        groups: None,
    }
}

/// What else could be read: by root, or of a machine that was captured. None where reading again would tell no more.
fn read_more(topology: &Topology, route: &Route, on_the_way: &[&Place], nothing_else: bool) -> Option<Fix> {
    let client = match route.client {
        End::Function(client) => Some(client),
        End::Cpu | End::NotPci(_) => None,
    };
    let ends = [Some(route.provider), client].into_iter().flatten();
    let missing: Vec<String> = ends.filter_map(|end| topology.way_up(end).err()).collect();
    let is_short = on_the_way.iter().any(|place| place.is_short_of_root());
    let short = "others than root see the first 64 bytes of a configuration space, which say nothing of ACS";
    let because = match route.verdict.as_ref().map(|verdict| &verdict.expected) {
        Some(Expected::Unknown { because, .. }) => because.join("; "),
        Some(Expected::Known(_)) | None => String::new(),
    };
    let (what, command) = if topology.is_captured {
        let lacks = match (&missing[..], is_short) {
            ([], true) => short.to_owned(),
            ([], false) if nothing_else => because,
            ([], false) => return None,
            (missing, _) => missing.join("; "),
        };
        (format!("Capture that machine again, as root: {lacks}"), "sudo peervram capture machine.json".into())
    } else {
        let command = format!("sudo peervram route {} {}", route.provider, route.client);
        match (&missing[..], is_short) {
            ([], true) => (format!("Ask as root: {short}"), command),
            ([], false) => return None,
            (missing, _) => {
                (format!("Ask again, devices came or went meanwhile: {}", missing.join("; ")), command)
            }
        }
    };
    Some(Fix {
        kind: FixKind::ReadMore,
        what,
        commands: vec![command],
        price: "nothing: nothing is changed".into(),
        needs: Needs::Root,
        then: None,
        groups: None,
    })
}

/// What is below a function and has a driver of the kernel's, but for the pair itself: "0000:03:00.0 (nvme)".
fn driven_below(topology: &Topology, route: &Route, address: PciAddress) -> Vec<String> {
    let mut found = Vec::new();
    // Visit each bridge once: an edited captured tree may contain a cycle.
    let mut above = vec![address];
    let mut next = 0;
    while let Some(&bridge) = above.get(next) {
        next += 1;
        for place in topology.below(bridge) {
            let below = place.address();
            if above.contains(&below) {
                continue;
            }
            above.push(below);
            let is_of_the_pair = below == route.provider || route.client == End::Function(below);
            if let Some(driver) = place.function.driver.as_deref().filter(|_| !is_of_the_pair)
                && pci::blocks_its_group(driver)
            {
                found.push(format!("{below} ({driver})"));
            }
        }
    }
    found
}
