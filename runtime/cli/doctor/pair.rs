//! `Pair`: who could lend to whom, by which path.

use peervram::backends::PciAddress;
use peervram::backends::import_support_of;
use peervram::backends::pci::Function;
use peervram::backends::topology::{Expected, MapType, Reason, Verdict};
use serde::Serialize;

use super::candidate::{Candidate, exports_dma_bufs};
use super::facts::Facts;

/// A lender and an importer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Pair {
    pub lender: PciAddress,
    /// The importer's PCI address, where it has one.
    pub importer: Option<PciAddress>,
    pub importer_name: String,
    pub state: PairState,
    pub path: PairPath,
    /// By which path, or why not, in words.
    pub how: String,
}

/// How bytes would get from one to the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum PairPath {
    /// A GPU imports the dma-buf; the kernel decides about the route.
    Peer,
    /// A CPU imports the mapped BAR.
    HostPointer,
    /// The engines of another VFIO device reach it; nobody decides about the route.
    AddressSpace,
}

/// Whether a pair works.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum PairState {
    /// As far as can be known without trying.
    Now,
    /// Once what stands in the way is gone.
    Possible,
    /// The kernel refuses the route.
    Never,
}

/// A graphics device whose driver can import.
pub fn importers(facts: &Facts) -> impl Iterator<Item = &Function> {
    facts.functions().filter(|function| {
        import_support_of(function).is_some_and(|row| row.can_import) && !function.drm_nodes.is_empty()
    })
}

/// Whether this user can open a DRM node of it.
pub fn is_node_usable(facts: &Facts, importer: &Function) -> bool {
    let mut nodes = importer.drm_nodes.iter().filter_map(|name| facts.file(&format!("/dev/dri/{name}")));
    nodes.any(|file| file.is_usable)
}

impl Pair {
    /// All pairs, those that work first.
    pub fn all(facts: &Facts, candidates: &[Candidate]) -> Vec<Self> {
        let mut pairs = Vec::new();
        for candidate in candidates {
            let others = importers(facts).filter(|importer| importer.address != candidate.address());
            pairs.extend(others.map(|importer| Self::by_peer(facts, candidate, importer)));
            pairs.extend(Self::by_host_pointer(facts, candidate));
            let vfio =
                candidates.iter().filter(|other| other.is_bound && other.address() != candidate.address());
            pairs.extend(vfio.map(|other| Self::by_address_space(facts, candidate, other)));
        }
        pairs.sort_by_key(|pair| pair.state);
        pairs
    }

    fn by_peer(facts: &Facts, candidate: &Candidate, importer: &Function) -> Self {
        let (lender, driver) = (candidate.address(), importer.driver.clone().unwrap_or_default());
        let topology = facts.topology.known();
        let verdict = topology.map(|topology| topology.expected_map_type(lender, importer.address));
        let ready = candidate.is_ready() && exports_dma_bufs(facts) && is_node_usable(facts, importer);
        let possible = if ready { PairState::Now } else { PairState::Possible };
        let silent = silent(facts, &[lender, importer.address]);
        let (state, how) = match (silent, verdict.as_ref().map(|verdict| (verdict, &verdict.expected))) {
            (Some(unknown), _) => (PairState::Possible, unknown),
            (None, Some((verdict, Expected::Known(MapType::NotSupported)))) => {
                (PairState::Never, refusal(verdict))
            }
            (None, Some((_, Expected::Known(map_type)))) => (possible, format!("by peer, {map_type}")),
            (None, Some((_, Expected::Unknown { .. })) | None) => {
                (possible, "by peer, if the kernel allows the route: not all could be read".into())
            }
        };
        Self {
            lender,
            importer: Some(importer.address),
            importer_name: driver,
            state,
            path: PairPath::Peer,
            how,
        }
    }

    fn by_host_pointer(facts: &Facts, candidate: &Candidate) -> Option<Self> {
        let device = facts.host_pointer_importer()?;
        let state = if candidate.is_ready() { PairState::Now } else { PairState::Possible };
        let name = device.name.split(" (").next().unwrap_or_default();
        Some(Self {
            lender: candidate.address(),
            importer: None,
            importer_name: format!("{name} (CPU)"),
            state,
            path: PairPath::HostPointer,
            how: silent(facts, &[candidate.address()]).unwrap_or("by host pointer".into()),
        })
    }

    fn by_address_space(facts: &Facts, candidate: &Candidate, other: &Candidate) -> Self {
        let is_ready = candidate.is_ready() && other.is_ready() && other.function.is_bound_to_vfio();
        // An iommufd maps the dma-buf; a container maps the mapped BAR, on any kernel.
        let how = if exports_dma_bufs(facts) && other.by_cdev.is_some() {
            "into its address space, one range"
        } else {
            "into its address space, the mapped BAR"
        };
        Self {
            lender: candidate.address(),
            importer: Some(other.address()),
            importer_name: "its engines".into(),
            state: if is_ready { PairState::Now } else { PairState::Possible },
            path: PairPath::AddressSpace,
            how: silent(facts, &[candidate.address(), other.address()]).unwrap_or(how.into()),
        }
    }
}

/// Where one of these does not answer: what is known of a path between them.
fn silent(facts: &Facts, ends: &[PciAddress]) -> Option<String> {
    let silent = ends.iter().find(|address| facts.is_silent(**address))?;
    Some(format!("unknown, because {silent} does not answer"))
}

/// Why the kernel refuses a route, in few words.
fn refusal(verdict: &Verdict) -> String {
    let why = match verdict.reason {
        Some(Reason::NeedsSameHostBridge(_)) => "they are below different host bridges",
        Some(Reason::HostBridgeNameless(_)) => "the kernel does not know the host bridge",
        Some(Reason::HostBridgeNotListed(_)) => "the kernel does not trust the host bridge",
        Some(Reason::ClientNotPci) => "the importer is no PCI device",
        // With these the kernel allows the route, or nothing was decided.
        Some(Reason::NothingRedirects | Reason::TrustedCpu | Reason::HostBridgesListed) | None => {
            "the kernel refuses the route"
        }
    };
    // Below a common bridge it would not come to the host bridge, but for access control (ACS).
    match verdict.common {
        Some(_) if !verdict.redirects.is_empty() => {
            format!("a port on the way sends requests up (ACS), and {why}")
        }
        _ => why.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_for_a_refusal_has_words_of_its_own() {
        let port: PciAddress = "0000:00:01.0".parse().unwrap();
        let verdict = |reason, common: Option<PciAddress>| Verdict {
            expected: Expected::Known(MapType::NotSupported),
            reason,
            distance: None,
            common,
            redirects: vec![port],
        };
        let words = [
            Some(Reason::NeedsSameHostBridge(port)),
            Some(Reason::HostBridgeNameless(port)),
            Some(Reason::HostBridgeNotListed(port)),
            Some(Reason::ClientNotPci),
            None,
        ]
        .map(|reason| refusal(&verdict(reason, None)));
        let expected =
            ["different host bridges", "not know", "not trust", "no PCI device", "refuses the route"];
        for (words, expected) in words.iter().zip(expected) {
            assert!(words.contains(expected) && !words.contains("ACS"), "{words}");
        }
        let redirected = refusal(&verdict(Some(Reason::HostBridgeNotListed(port)), Some(port)));
        assert!(redirected.contains("(ACS)") && redirected.contains("does not trust"), "{redirected}");
    }
}
