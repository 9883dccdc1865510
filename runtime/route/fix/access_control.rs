//! Ports that redirect, told not to.

use std::collections::HashSet;

use peervram_backends::PciAddress;
use peervram_backends::topology::{Above, Acs, Topology, Verdict};

use super::super::words::and;
use super::{Fix, FixKind, Needs, Regrouping, allows, on_the_command_line, rebind};

pub(super) fn fixes(
    topology: &Topology,
    provider: PciAddress,
    client: PciAddress,
    verdict: &Verdict,
) -> Vec<Fix> {
    let ports = &verdict.redirects;
    if verdict.common.is_none() || ports.is_empty() {
        return Vec::new();
    }
    let changed = topology.without_redirects(ports);
    let Some(then) = allows(&changed, provider, client) else { return Vec::new() };
    let names: Vec<String> = ports.iter().map(ToString::to_string).collect();
    let paths: Vec<String> = ports.iter().map(|&port| path(topology, port)).collect();
    let groups = regrouping(topology, &changed);
    let price = "it weakens isolation: devices below these ports can write into each other's memory past the \
                 IOMMU, whoever they are given to";

    let parameter = format!("pci=disable_acs_redir={}", paths.join(";"));
    let config = |path: &String| format!("{CONFIG_BITS}@{path}");
    let config = format!("pci=config_acs={}", paths.iter().map(config).collect::<Vec<_>>().join(";"));
    let quoted =
        if ports.len() > 1 { ". GRUB takes a semicolon for an end: there, put it in quotes" } else { "" };
    let registers: Vec<String> =
        names.iter().map(|port| format!("setpci -s {port} ECAP_ACS+6.w=0:{:x}", Acs::REDIRECTS)).collect();
    vec![
        Fix {
            kind: FixKind::DisableAcsRedirect,
            what: format!("Have {} not redirect, from the next boot on. Add to the kernel's command line{quoted}", and(&names)),
            commands: on_the_command_line(&parameter),
            price: format!("{price}. What else they isolate goes back to what the firmware set"),
            needs: Needs::Reboot,
            then: Some(then),
            groups: groups.clone(),
        },
        Fix {
            kind: FixKind::WriteAcs,
            what: "The same now, until the next boot. Binding anew makes the kernel forget what it has decided".into(),
            commands: rebind(topology, provider, &registers),
            price: format!(
                "{price}; IOMMU groups stay as they are and no longer tell the truth. A reset of a port may bring \
                 it back"
            ),
            needs: Needs::Rebinding,
            then: Some(then),
            groups: None,
        },
        Fix {
            kind: FixKind::ConfigAcs,
            what: "The same as the first, bit by bit (request and completion redirect and egress control off, the \
                   others as the firmware left them)".into(),
            commands: on_the_command_line(&config),
            price: format!("{price}. The others go back to what the firmware set"),
            needs: Needs::Reboot,
            then: Some(then),
            groups,
        },
        Fix {
            kind: FixKind::FirmwareAcs,
            what: "Some firmware has a switch for it, \"ACS Enable\" or \"ACS Control\", under PCIe or North Bridge \
                   settings. With an IOMMU the kernel turns ACS on again, so this alone is not enough there"
                .into(),
            commands: Vec::new(),
            price: "for all ports, not only these".into(),
            needs: Needs::Reboot,
            then: None,
            groups: None,
        },
    ]
}

/// The bits of the register from the highest: egress control, both redirects.
const CONFIG_BITS: &str = "x0x00xx";

/// A function's place as the kernel's parameters name it, which holds when buses get other numbers
/// (`pci_dev_str_match_path`): its root bus, then a step for each bridge.
fn path(topology: &Topology, function: PciAddress) -> String {
    let Ok((way, _)) = topology.way_up(function) else { return function.to_string() };
    let mut path = String::new();
    for place in way.iter().rev() {
        let PciAddress { domain, bus, device, function } = place.address();
        match (&place.above, domain) {
            (Above::HostBridge(_), 0) => path = format!("{bus:02x}:{device:02x}.{function:x}"),
            (Above::HostBridge(_), domain) => {
                path = format!("{domain:04x}:{bus:02x}:{device:02x}.{function:x}")
            }
            (Above::Bridge(_), _) => path.push_str(&format!("/{device:02x}.{function:x}")),
        }
    }
    path
}

fn regrouping(now: &Topology, then: &Topology) -> Option<Regrouping> {
    let (now, then) = (now.predicted_iommu_groups().ok()?, then.predicted_iommu_groups().ok()?);
    let (before, after): (HashSet<_>, HashSet<_>) = (now.iter().collect(), then.iter().collect());
    let gone = |groups: &[Vec<PciAddress>], others: &HashSet<&Vec<PciAddress>>| {
        groups.iter().filter(|group| !others.contains(group)).cloned().collect::<Vec<_>>()
    };
    Some(Regrouping { now: gone(&now, &after), then: gone(&then, &before) })
}
