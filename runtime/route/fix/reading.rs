//! What has to be read, or woken, before there is a verdict.

use peervram_backends::PciAddress;
use peervram_backends::topology::{Place, Reading, Topology};

use super::super::Route;
use super::{Fix, FixKind, Needs};

pub(super) fn fixes(topology: &Topology, route: &Route, client: PciAddress) -> Vec<Fix> {
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
            Reading::Known(config) if config.is_all_ones() => wake(
                format!(
                    "{address} does not answer: it fell off the bus. Take it out of the tree and look again; where \
                     that brings nothing, switch the machine off and on"
                ),
                vec![format!("echo 1 > {folder}/remove"), "echo 1 > /sys/bus/pci/rescan".into()],
                "whoever uses it, or anything below it, loses it",
            ),
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
            commands: vec![format!("sudo peervram route {} {client}", route.provider)],
            price: "nothing: nothing is changed".into(),
            needs: Needs::Root,
            then: None,
            groups: None,
        });
    }
    fixes
}
