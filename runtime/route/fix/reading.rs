//! What has to be read, or woken, before there is a verdict.

use peervram_backends::topology::{Place, Reading, Topology};
use peervram_backends::{PciAddress, pci};

use super::super::words::and;
use super::super::{End, Route};
use super::{Fix, FixKind, Needs};

pub(super) fn fixes(topology: &Topology, route: &Route) -> Vec<Fix> {
    let on_the_way = || route.way.iter().filter_map(|hop| topology.place(hop.address));
    let mut fixes = Vec::new();
    let mut wake = |what: String, commands: Vec<String>, price: &str| {
        fixes.push(Fix {
            kind: FixKind::WakeDevice,
            what,
            commands,
            price: price.into(),
            needs: Needs::Root,
            then: None,
            groups: None,
        });
    };
    for place in on_the_way() {
        let address = place.address();
        let folder = format!("/sys/bus/pci/devices/{address}");
        match &place.config {
            Reading::Unread(why) if why.contains("would wake") => wake(
                format!("{address} sleeps. Wake it, and ask again"),
                vec![format!("echo on > {folder}/power/control")],
                "it draws power until that is auto again",
            ),
            Reading::Known(config) if config.is_all_ones() => {
                let others = driven_below(topology, route, address);
                let (what, commands) = if others.is_empty() {
                    let commands =
                        [format!("echo 1 > {folder}/remove"), "echo 1 > /sys/bus/pci/rescan".into()];
                    ("Take it out of the tree and look again".to_owned(), commands.to_vec())
                } else {
                    (
                        format!(
                            "Taking it out of the tree would take {} with it, so see first who needs them",
                            and(&others)
                        ),
                        Vec::new(),
                    )
                };
                wake(
                    format!(
                        "{address} does not answer: it fell off the bus. {what}; where that brings nothing, switch \
                         the machine off and on"
                    ),
                    commands,
                    "whoever uses it, or anything below it, loses it",
                );
            }
            _ => {}
        }
    }
    let is_cut = |place: &Place| {
        place.config.known().is_some_and(|config| !config.is_whole() && !config.is_all_ones())
    };
    if on_the_way().any(is_cut) || fixes.is_empty() {
        fixes.push(Fix {
            kind: FixKind::ReadMore,
            what: "Ask as root: others see the first 64 bytes of a configuration space, which say nothing of ACS"
                .into(),
            commands: vec![format!("sudo peervram route {} {}", route.provider, route.client)],
            price: "nothing: nothing is changed".into(),
            needs: Needs::Root,
            then: None,
            groups: None,
        });
    }
    fixes
}

/// What is below a function and has a driver of the kernel's, but for the pair itself: "0000:03:00.0 (nvme)".
fn driven_below(topology: &Topology, route: &Route, address: PciAddress) -> Vec<String> {
    let mut found = Vec::new();
    // Each once: in a captured tree that somebody has edited, bridges may run in a circle.
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
