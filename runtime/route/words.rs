//! Both predictions of a route in sentences.

use peervram_backends::topology::{
    Expected, MapType, Place, Reading, Reason, Topology, Verdict, listed_at_last,
};
use peervram_backends::{ImportSupport, PciAddress, import_support_of, pci};

use super::End;

/// The first: will it take the memory at all?
pub(super) fn import(
    topology: &Topology,
    client: &End,
    driver: Option<&str>,
    imports: &[&'static ImportSupport],
) -> String {
    if *client == End::Cpu {
        return "yes: a process maps the BAR, through VFIO; no dma-buf is imported".into();
    }
    let Some(driver) = driver else {
        return "no: it is bound to no driver".into();
    };
    if pci::is_vfio_driver(driver) {
        return format!(
            "by iommufd or type1: it is bound to {driver}, so its IO address space can take the memory \
             (iommufd: one range)"
        );
    }
    if let End::Function(address) = client
        && driver == "virtio-pci"
        && topology.place(*address).is_some_and(|place| place.function.drm_nodes.is_empty())
    {
        return "no: it is no graphics device".into();
    }
    // The driver in its present mode where that is known, else in its best mode.
    let mode = match client {
        End::Function(address) => {
            topology.place(*address).and_then(|place| import_support_of(&place.function))
        }
        End::Cpu | End::NotPci(_) => None,
    };
    let Some(best) = mode.or(imports.first().copied()) else {
        return format!(
            "not known: {driver} is in no list of ours; most drivers attach statically and cannot"
        );
    };
    let can = if best.can_import { "yes" } else { "no" };
    let mode = best.mode.map(|mode| format!(" ({mode})")).unwrap_or_default();
    let mut text = format!("{can}, {driver}{mode}: {} [{}]", best.because, best.source);
    let others = imports.iter().filter(|row| row.can_import != best.can_import);
    for row in others {
        let not = if best.can_import { "not" } else { "but it does" };
        text.push_str(&format!("; {not} with {}", row.mode.unwrap_or("another mode")));
    }
    text
}

/// The second, where there is nobody whose answer it would be about.
pub(super) fn silent(silent: &[PciAddress]) -> String {
    let names: Vec<String> = silent.iter().map(PciAddress::to_string).collect();
    let (does, its) = if silent.len() == 1 {
        ("does", "its configuration space is")
    } else {
        ("do", "their configuration spaces are")
    };
    format!(
        "unknown, because {} {does} not answer: {its} all ones, as of a device that fell off the bus",
        and(&names)
    )
}

/// The second: which way do the bytes go?
pub(super) fn verdict(topology: &Topology, provider: PciAddress, verdict: Option<&Verdict>) -> String {
    let Some(verdict) = verdict else {
        return "nobody asks: a processor reads and writes the BAR through the host bridge".into();
    };
    match &verdict.expected {
        Expected::Known(MapType::BusAddress) => below_a_bridge(provider, verdict),
        Expected::Known(map_type) => {
            let way = through_the_host_bridge(verdict);
            let reason = verdict.reason.map(|reason| host_bridge(topology, reason)).unwrap_or_default();
            match map_type {
                MapType::NotSupported => format!("refused, the kernel will say EINVAL: {way}{reason}"),
                _ => format!("works, through the host bridge: {way}{reason}"),
            }
        }
        Expected::Unknown { possible, because } => {
            let possible: Vec<String> = possible.iter().map(ToString::to_string).collect();
            format!("unknown ({}), because {}", possible.join(" or "), because.join("; "))
        }
    }
}

fn below_a_bridge(provider: PciAddress, verdict: &Verdict) -> String {
    match verdict.common {
        Some(common) if common == provider => "works, by bus addresses: it is the device itself".into(),
        Some(common) => {
            format!("works, by bus addresses: {common} is above both, and no port on the way redirects (ACS)")
        }
        None => "works, by bus addresses".into(),
    }
}

fn through_the_host_bridge(verdict: &Verdict) -> String {
    let ports: Vec<String> = verdict.redirects.iter().map(ToString::to_string).collect();
    match (verdict.reason, verdict.common) {
        (Some(Reason::ClientNotPci), _) => String::new(),
        (_, Some(common)) => format!(
            "{common} is above both, but {} {} requests up to the host bridge (ACS), and ",
            and(&ports),
            if ports.len() == 1 { "sends" } else { "send" },
        ),
        (_, None) => "no bridge is above both, so the way leads through the host bridge, and ".into(),
    }
}

/// "a, b and c"
pub(super) fn and(words: &[String]) -> String {
    match words {
        [] => String::new(),
        [one] => one.clone(),
        [first @ .., last] => format!("{} and {last}", first.join(", ")),
    }
}

fn host_bridge(topology: &Topology, reason: Reason) -> String {
    let name = |address: PciAddress| {
        topology.place(address).map_or_else(
            || address.to_string(),
            |place| {
                let Place { function, .. } = place;
                format!("{address} ({:04x}:{:04x})", function.vendor_id, function.device_id)
            },
        )
    };
    match reason {
        Reason::NothingRedirects => "no port redirects".into(),
        Reason::TrustedCpu => "the kernel trusts AMD's from Zen on".into(),
        Reason::HostBridgesListed => "it is on the kernel's list".into(),
        Reason::HostBridgeNotListed(first) => {
            let later = topology
                .place(first)
                .and_then(|place| listed_at_last(place.function.vendor_id, place.function.device_id));
            let later = later.map_or_else(String::new, |row| {
                let (major, minor, patch) = row.since;
                format!(" of Linux {}; that of {major}.{minor}.{patch} has it", release(topology))
            });
            format!("the kernel knows that host bridge by {}, which is not on its list{later}", name(first))
        }
        Reason::NeedsSameHostBridge(first) => {
            format!("that of {} is on its list only for devices below itself", name(first))
        }
        Reason::HostBridgeNameless(first) => format!(
            "the kernel cannot tell which host bridge it is: the first function on its bus, {}, is neither at \
             00.0 nor a root port",
            name(first)
        ),
        Reason::ClientNotPci => "the client is no PCI device".into(),
    }
}

fn release(topology: &Topology) -> &str {
    match &topology.kernel_release {
        Reading::Known(release) => release,
        Reading::Unread(_) => "this release",
    }
}
