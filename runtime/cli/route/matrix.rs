//! The matrix of all devices that matter: whose memory, and who reaches it.

use std::io::Write;

use peervram::backends::PciAddress;
use peervram::backends::topology::{Place, Topology};
use peervram::route::{Answer, End, Route};
use serde::Serialize;

use super::super::devices::matters;
use super::super::ending::print_json;
use super::super::pci_names::PciNames;

#[derive(Serialize)]
struct Report {
    devices: Vec<DeviceReport>,
    routes: Vec<RouteReport>,
    unread: Vec<String>,
}

#[derive(Serialize)]
struct DeviceReport {
    address: PciAddress,
    driver: Option<String>,
    name: String,
}

#[derive(Serialize)]
struct RouteReport {
    lender: PciAddress,
    importer: PciAddress,
    answer: &'static str,
    map_type: Option<String>,
    importer_can: Option<bool>,
    verdict_words: String,
}

pub fn print(topology: &Topology, json: bool) -> anyhow::Result<()> {
    let devices: Vec<&Place> = topology.places().iter().filter(|place| matters(&place.function)).collect();
    let mut routes = Vec::new();
    for lender in &devices {
        for importer in devices.iter().filter(|importer| importer.address() != lender.address()) {
            let end = End::Function(importer.address());
            routes.push(Route::outline(topology, lender.address(), &end)?);
        }
    }
    if json {
        return print_json(&report(topology, &devices, &routes));
    }
    draw(topology, &devices, &routes)
}

fn name(names: &PciNames, place: &Place) -> String {
    let (vendor_id, device_id) = (place.function.vendor_id, place.function.device_id);
    names.name(vendor_id, device_id).unwrap_or_else(|| format!("{vendor_id:04x}:{device_id:04x}"))
}

fn report(topology: &Topology, devices: &[&Place], routes: &[Route]) -> Report {
    let names = PciNames::load();
    let importer = |route: &Route| match route.client {
        End::Function(address) => Some(address),
        End::Cpu | End::NotPci(_) => None,
    };
    Report {
        devices: (devices.iter())
            .map(|place| DeviceReport {
                address: place.address(),
                driver: place.function.driver.clone(),
                name: name(&names, place),
            })
            .collect(),
        routes: (routes.iter())
            .filter_map(|route| {
                Some(RouteReport {
                    lender: route.provider,
                    importer: importer(route)?,
                    answer: route.answer().code(),
                    map_type: route.map_type().map(|map_type| map_type.to_string()),
                    importer_can: route.importer_can,
                    verdict_words: route.verdict_words.clone(),
                })
            })
            .collect(),
        unread: topology.unread(),
    }
}

/// One letter for a route.
fn letter(route: &Route) -> char {
    use peervram::backends::topology::MapType;
    match (route.answer(), route.map_type()) {
        (Answer::Works, Some(MapType::BusAddress)) => 'B',
        (Answer::Works, _) => 'H',
        (Answer::Refused, _) => '-',
        (Answer::ImporterCannot, _) => 'x',
        (Answer::Unknown | Answer::Unasked, _) => '?',
    }
}

fn draw(topology: &Topology, devices: &[&Place], routes: &[Route]) -> anyhow::Result<()> {
    let mut output = peervram_programs::output();
    if devices.is_empty() {
        writeln!(
            output,
            "No GPU, no device bound to VFIO, and no DRM node among {} PCI functions.",
            topology.places().len()
        )?;
        return Ok(());
    }
    let names = PciNames::load();
    let column = |number: usize| format!("{:>3}", number + 1);
    writeln!(output, "memory of \\ reached by")?;
    let heading: String = (0..devices.len()).map(column).collect();
    writeln!(output, "{}", format!("{:18}{heading}", "").trim_end())?;
    for (row, lender) in devices.iter().enumerate() {
        let mut line = format!("{:>3} {:<14}", row + 1, lender.address().to_string());
        for importer in devices {
            let route = routes.iter().find(|route| {
                route.provider == lender.address() && route.client == End::Function(importer.address())
            });
            line.push_str(&format!("{:>3}", route.map_or('.', letter)));
        }
        writeln!(output, "{line}")?;
    }
    writeln!(output)?;
    for (number, place) in devices.iter().enumerate() {
        let driver = place.function.driver.as_deref().unwrap_or("no driver");
        writeln!(output, "{:>3} {}  {driver}, {}", number + 1, place.address(), name(&names, place))?;
    }
    writeln!(output, "\nB bus address   H through the host bridge   - refused by the kernel")?;
    writeln!(output, "x the importer takes no memory of others   ? not known   . itself")?;
    writeln!(output, "Why, and what would change it: peervram route A B")?;
    Ok(())
}
