//! The way drawn as text.
//!
//! ```text
//! pci0000:00, first function 8086:29c0
//! |-- 0000:00:02.0  root port, x16 16 GT/s, MPS 256
//! |   |   ACS: SrcValid UpstreamFwd
//! |   `-- 0000:01:00.0  lends: endpoint, vfio-pci
//! `-- 0000:00:03.0  root port, x1 2.5 GT/s of x16 16 GT/s, MPS 128 of 256
//!     |   ACS: SrcValid ReqRedir CmpltRedir UpstreamFwd  REDIRECTS
//!     `-- 0000:02:00.0  imports: endpoint, virtio-pci
//! ```

use peervram_backends::topology::{Above, Topology};

use super::hop::is_port;
use super::{End, Hop, Route};

/// The width of a terminal, in columns.
const COLUMNS: usize = 80;

pub(super) fn draw(topology: &Topology, route: &Route) -> String {
    let mut lines = Vec::new();
    let mut host_bridges: Vec<&str> = Vec::new();
    for hop in &route.way {
        if let Some(Above::HostBridge(name)) = topology.place(hop.address).map(|place| &place.above)
            && !host_bridges.contains(&name.as_str())
        {
            host_bridges.push(name);
        }
    }
    for host_bridge in host_bridges {
        let first = topology.root_bus(host_bridge).next();
        let first = first.map_or_else(String::new, |place| {
            format!(
                ", known by {} {:04x}:{:04x}",
                place.address(),
                place.function.vendor_id,
                place.function.device_id
            )
        });
        let cpu = if route.client == End::Cpu { ", of the processor that reads and writes" } else { "" };
        lines.push(format!("host bridge {host_bridge}{first}{cpu}"));
        let below = |hop: &&Hop| {
            topology
                .place(hop.address)
                .is_some_and(|place| matches!(&place.above, Above::HostBridge(name) if name == host_bridge))
        };
        let tops: Vec<&Hop> = route.way.iter().filter(below).collect();
        draw_all(topology, route, &tops, "", &mut lines);
    }
    // What hangs from a bridge that is not there.
    let lost = |hop: &&Hop| match topology.place(hop.address).map(|place| &place.above) {
        Some(Above::Bridge(bridge)) => !route.way.iter().any(|other| other.address == *bridge),
        _ => false,
    };
    let lost: Vec<&Hop> = route.way.iter().filter(lost).collect();
    if !lost.is_empty() {
        lines.push("(a bridge that was not read)".into());
        draw_all(topology, route, &lost, "", &mut lines);
    }
    if let End::NotPci(name) = &route.client {
        lines.push(format!("imports: {name}, on no PCI bus"));
    }
    lines.iter().map(|line| cut(line) + "\n").collect()
}

fn draw_all(topology: &Topology, route: &Route, hops: &[&Hop], indent: &str, lines: &mut Vec<String>) {
    // Not a recursion without end: addresses are unique and each is below one other, which was read before.
    if indent.len() > COLUMNS {
        lines.push(format!("{indent}..."));
        return;
    }
    for (number, hop) in hops.iter().enumerate() {
        let is_last = number + 1 == hops.len();
        let branch = if is_last { "`-- " } else { "|-- " };
        lines.push(format!("{indent}{branch}{}", title(topology, route, hop)));
        let below: Vec<&Hop> = route.way.iter().filter(|other| is_below(topology, other, hop)).collect();
        let indent = format!("{indent}{}", if is_last { "    " } else { "|   " });
        let stem = if below.is_empty() { "    " } else { "|   " };
        if let Some(acs) = acs(topology, hop) {
            lines.push(format!("{indent}{stem}{acs}"));
        }
        draw_all(topology, route, &below, &indent, lines);
    }
}

fn is_below(topology: &Topology, hop: &Hop, bridge: &Hop) -> bool {
    hop.address != bridge.address
        && topology.place(hop.address).is_some_and(|place| place.above == Above::Bridge(bridge.address))
}

fn title(topology: &Topology, route: &Route, hop: &Hop) -> String {
    let lends = hop.address == route.provider;
    let imports = route.client == End::Function(hop.address);
    let is_end = lends || imports;
    let does = match (lends, imports) {
        (true, true) => "lends and imports: ",
        (true, false) => "lends: ",
        (false, true) => "imports: ",
        (false, false) => "",
    };
    let mut title = format!("{}  {does}{}", hop.address, hop.role);
    let driver = topology.place(hop.address).and_then(|place| place.function.driver.as_deref());
    if let (true, Some(driver)) = (is_end, driver) {
        title.push_str(&format!(", {driver}"));
    }
    if let Some(link) = hop.link {
        title.push_str(&format!(", {}", link.now));
        if link.is_narrowed() {
            title.push_str(&format!(" of {}", link.at_most));
        }
    }
    if let Some(payload) = hop.max_payload {
        title.push_str(&format!(", MPS {}", payload.now_bytes));
    }
    title
}

fn acs(topology: &Topology, hop: &Hop) -> Option<String> {
    match &hop.acs {
        Ok(Some(acs)) => {
            let names = acs.control_names();
            let names = if names.is_empty() { "nothing on".to_owned() } else { names.join(" ") };
            Some(format!("ACS: {names}{}", if hop.redirects { "  REDIRECTS" } else { "" }))
        }
        Ok(None) if topology.place(hop.address).is_some_and(is_port) => Some("no ACS".into()),
        Ok(None) => None,
        Err(why) => Some(format!("ACS unknown: {why}")),
    }
}

fn cut(line: &str) -> String {
    if line.chars().count() <= COLUMNS {
        return line.to_owned();
    }
    line.chars().take(COLUMNS - 3).collect::<String>() + "..."
}
