//! Links that carry less than they could.

use super::super::{Hop, Route};
use super::{Fix, FixKind, Needs, on_the_command_line};

pub(super) fn fixes(route: &Route) -> Vec<Fix> {
    let passed: Vec<&Hop> = route.way.iter().filter(|hop| hop.uses_link).collect();
    let payload = passed.iter().filter_map(|hop| hop.max_payload).map(|payload| payload.now_bytes).min();
    let gb_per_s = |number: Option<f64>| number.map_or_else(|| "?".into(), |number| format!("{number:.1}"));
    let mut fixes = Vec::new();

    let narrowed = passed.iter().filter_map(|hop| Some((hop, hop.link.filter(|link| link.is_narrowed())?)));
    // Both ends of a link say the same; the slowest is what counts.
    let slowest = narrowed.min_by(|(_, a), (_, b)| {
        let carried = |link: &super::super::Link| link.now.gb_per_s(payload).unwrap_or(f64::MAX);
        carried(a).total_cmp(&carried(b))
    });
    if let Some((hop, link)) = slowest {
        fixes.push(Fix {
            kind: FixKind::WidenLink,
            what: format!(
                "The link at {} runs at {} and could at {}: {} of {} GB/s. Seat the card anew, look for a slot with \
                 as many lanes, and at \"PCIe Link Speed\" and bifurcation in the firmware",
                hop.address,
                link.now,
                link.at_most,
                gb_per_s(link.now.gb_per_s(payload)),
                gb_per_s(link.at_most.gb_per_s(payload)),
            ),
            commands: Vec::new(),
            price: "a look at it under load first: links of devices that idle may be slow on purpose".into(),
            needs: Needs::Hands,
            then: None,
            groups: None,
        });
    }

    let supported =
        passed.iter().filter_map(|hop| hop.max_payload).map(|payload| payload.supported_bytes).min();
    if let (Some(now), Some(could)) = (payload, supported)
        && could > now
    {
        let share = |payload: u32| f64::from(payload) / (f64::from(payload) + 24.0) * 100.0;
        fixes.push(Fix {
            kind: FixKind::MaxPayload,
            what: format!(
                "Packets carry {now} bytes and could carry {could}: {:.0} % of the link, not {:.0} %. Add to the \
                 kernel's command line",
                share(could),
                share(now),
            ),
            commands: on_the_command_line("pci=pcie_bus_perf"),
            price: "the kernel then sets each device to what the bridges above it can, which breaks transfers of \
                    devices that can take less"
                .into(),
            needs: Needs::Reboot,
            then: None,
            groups: None,
        });
    }
    fixes
}
