//! What a verdict does not say.

use peervram_backends::topology::{MapType, Reading, Reason, Topology, parse_release};

use super::{Answer, End, Hop, KernelMessages, Route, asks_for_a_verdict, driver_of};

pub(super) fn notes(topology: &Topology, route: &Route, messages: &KernelMessages) -> Vec<String> {
    let mut notes = Vec::new();
    let mut say = |note: String| notes.push(note);
    if let Some(verdict) = &route.verdict {
        if route.client != End::Cpu && !asks_for_a_verdict(route, topology) {
            let driver = driver_of(topology, &route.client).unwrap_or_default();
            say(format!(
                "Bound to {driver}, the client's IO address space maps the memory by iommufd or type1, which ask \
                 for no verdict: the IOMMU's page tables govern, and ACS on the way decides whether requests \
                 reach the IOMMU at all."
            ));
        }
        if route.answer() == Answer::Refused {
            say("The verdict falls when an importer maps, not when it attaches: an import may succeed, and the \
                 first submit or bind fail with EINVAL."
                .into());
        }
        let provider = topology.place(route.provider).and_then(|place| place.function.driver.as_deref());
        say(format!(
            "The kernel keeps its verdict for each pair until {} is unbound from {}: what changes later is not \
             looked at.",
            route.provider,
            provider.unwrap_or("its driver"),
        ));
        if route.map_type() == Some(MapType::NotSupported) && is_intel_client(topology, verdict.reason) {
            say("Intel's client CPUs are known to pass peer-to-peer writes only (NVIDIA, open-gpu-kernel-modules \
                 issue 1253): where a driver ignores the verdict, reads may fail or bring ones."
                .into());
        }
    }
    if let Reading::Known(text) = &topology.kernel_release
        && parse_release(text).is_some_and(|release| release < (6, 19, 0))
    {
        say(format!("Linux {text} exports no VFIO dma-bufs: that begins with 6.19."));
    }
    if route.answer() == Answer::Works {
        say("That the kernel maps it does not prove that the bytes arrive: test the path before you trust it."
            .into());
    }
    let is_slowed = |hop: &Hop| hop.link.is_some_and(|link| link.now.speed < link.at_most.speed);
    if route.way.iter().any(|hop| hop.uses_link && is_slowed(hop)) {
        say("GPUs that idle lower their link's speed, and raise it under load.".into());
    }
    if let Some(why) = messages.unread() {
        say(format!("What the kernel said of the pair was not read: {why}."));
    }
    notes
}

/// A host bridge of Intel's that is on no list: those of servers are.
fn is_intel_client(topology: &Topology, reason: Option<Reason>) -> bool {
    let is_intel =
        matches!(&topology.cpu, Reading::Known(cpu) if cpu.vendor.as_deref() == Some("GenuineIntel"));
    is_intel && matches!(reason, Some(Reason::HostBridgeNotListed(_)))
}
