//! `Route`: how bytes would get from one device to another, or why they do not, and what would change that.
//!
//! ```text
//! Topology::read | from_json -> Route::explain -> verdict, fixes, notes; draw
//! ```
//! Two predictions, kept apart. *Will this importer take memory of a VFIO device at all?* is known by its
//! driver ([`import_modes`]). *Which way do the bytes go?* is the kernel's own decision, recomputed
//! ([`Topology::expected_map_type`]). Pure, so that a captured machine serves as well. A fix that changes the
//! way is one that was tried: the prediction is asked again of the topology as it would be.
//!
//! Absent: whether the bytes arrive. Only a test of the path tells.

mod drawing;
mod fix;
mod hop;
mod kernel_messages;
#[cfg(test)]
mod machine;
mod notes;
mod speed;
#[cfg(test)]
mod tests;
mod words;

use std::fmt;

use peervram_backends::topology::{Client, Expected, MapType, Topology, Verdict};
use peervram_backends::{
    Error, Governor, ImportSupport, Kind, PciAddress, Result, import_modes, import_support_of, pci,
};

pub use fix::{Fix, FixKind, Needs, Regrouping};
pub use hop::{Hop, Link};
pub use kernel_messages::KernelMessages;
pub use speed::LinkSpeed;

/// Who is to reach the memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// A PCI function.
    Function(PciAddress),
    /// A processor of this machine.
    Cpu,
    /// A device that is on no PCI bus, by its name.
    NotPci(String),
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Function(address) => address.fmt(f),
            Self::Cpu => f.write_str("cpu"),
            Self::NotPci(name) => f.write_str(name),
        }
    }
}

/// The way from the memory of one device to another, explained.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Route {
    /// Whose memory.
    pub provider: PciAddress,
    /// Who is to reach it.
    pub client: End,
    /// The first prediction: what is known of the client's driver, mode by mode, the best first. Empty where
    /// it has none or is not known.
    pub imports: Vec<&'static ImportSupport>,
    /// Whether it takes the memory, in the mode that it is in; none where that is not known.
    pub importer_can: Option<bool>,
    /// The same in a sentence.
    pub import_words: String,
    /// The second: what the kernel is expected to say. None for a processor, for which nobody asks.
    pub verdict: Option<Verdict>,
    /// The same in a sentence.
    pub verdict_words: String,
    /// Which of both ends do not answer: their configuration spaces are all ones. What the kernel says of the
    /// pair then says nothing of the bytes.
    pub silent: Vec<PciAddress>,
    /// The provider, the ports above it, those above the client, the client.
    pub way: Vec<Hop>,
    /// Changes that would mend or speed up the route, the recommended one first.
    pub fixes: Vec<Fix>,
    /// What the verdict does not say.
    pub notes: Vec<String>,
    /// The kernel's log messages about the pair.
    pub messages: Vec<String>,
}

impl Route {
    /// Explains the way from `provider`'s memory to `client`.
    ///
    /// # Errors
    /// [`Kind::NotFound`] where one of them is not in the topology.
    pub fn explain(
        topology: &Topology,
        provider: PciAddress,
        client: &End,
        messages: &KernelMessages,
    ) -> Result<Self> {
        let mut route = Self::outline(topology, provider, client)?;
        if let End::Function(address) = client {
            route.messages = messages.about(provider, *address).into_iter().map(str::to_owned).collect();
        }
        route.fixes = fix::fixes(topology, &route, messages);
        route.notes = notes::notes(topology, &route, messages);
        Ok(route)
    }

    /// The same without fixes, notes and messages: what a matrix of many pairs needs.
    ///
    /// # Errors
    /// As [`Self::explain`].
    pub fn outline(topology: &Topology, provider: PciAddress, client: &End) -> Result<Self> {
        check(topology, provider)?;
        let verdict = match client {
            End::Function(address) => {
                check(topology, *address)?;
                Some(topology.expected_map_type(provider, *address))
            }
            End::NotPci(_) => Some(topology.expected_map_type(provider, Client::NotPci)),
            End::Cpu => None,
        };
        let driver = driver_of(topology, client);
        let imports: Vec<_> = driver.map(|driver| import_modes(driver).collect()).unwrap_or_default();
        let silent = silent(topology, provider, client);
        Ok(Self {
            provider,
            client: client.clone(),
            import_words: words::import(topology, client, driver, &imports),
            importer_can: importer_can(topology, client, driver),
            imports,
            verdict_words: match &silent[..] {
                [] => words::verdict(topology, provider, verdict.as_ref()),
                silent => words::silent(silent),
            },
            silent,
            way: hop::way(topology, provider, client, verdict.as_ref()),
            verdict,
            fixes: Vec::new(),
            notes: Vec::new(),
            messages: Vec::new(),
        })
    }

    /// What the kernel is expected to answer, where that is known and where it is asked.
    pub fn map_type(&self) -> Option<MapType> {
        self.verdict.as_ref()?.expected.known()
    }

    /// Both predictions in a word. A pair that the kernel refuses is refused, even if the importer's driver could import.
    pub fn answer(&self) -> Answer {
        if !self.silent.is_empty() {
            return Answer::Unknown;
        }
        match (self.verdict.as_ref().map(|verdict| &verdict.expected), self.importer_can) {
            (None, _) => Answer::Unasked,
            (Some(Expected::Known(MapType::NotSupported)), _) => Answer::Refused,
            (Some(Expected::Unknown { .. }), _) => Answer::Unknown,
            (Some(Expected::Known(_)), Some(false)) => Answer::ImporterCannot,
            (Some(Expected::Known(_)), Some(true) | None) => Answer::Works,
        }
    }

    /// The one change to make: none where nothing needs to change.
    pub fn recommended(&self) -> Option<&Fix> {
        self.fixes.first().filter(|fix| fix.kind.mends_a_verdict())
    }

    /// The way drawn as text of at most 80 columns, host bridges at the top.
    pub fn draw(&self, topology: &Topology) -> String {
        drawing::draw(topology, self)
    }
}

/// A route in a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// The kernel will map it, and nothing is known of the importer that forbids it.
    Works,
    /// The kernel will refuse to map it.
    Refused,
    /// The kernel would map it, and the importer does not import memory of another device: its driver cannot, or
    /// it has none.
    ImporterCannot,
    /// Unknown: something that decides was not read, or one of the two devices does not answer.
    Unknown,
    /// Nobody asks the kernel: a processor reads and writes the BAR.
    Unasked,
}

impl Answer {
    /// A stable name for scripts and `--json`.
    pub fn code(self) -> &'static str {
        match self {
            Self::Works => "works",
            Self::Refused => "refused",
            Self::ImporterCannot => "importer-cannot",
            Self::Unknown => "unknown",
            Self::Unasked => "unasked",
        }
    }
}

fn check(topology: &Topology, address: PciAddress) -> Result<()> {
    match topology.place(address) {
        Some(_) => Ok(()),
        None => Err(Error::new(Kind::NotFound, "explain a route", "there is no such PCI function")
            .on(address)
            .next("peervram devices --all lists the functions of this machine")),
    }
}

fn driver_of<'a>(topology: &'a Topology, client: &'a End) -> Option<&'a str> {
    match client {
        End::Function(address) => topology.place(*address)?.function.driver.as_deref(),
        End::NotPci(name) => Some(name),
        End::Cpu => None,
    }
}

/// Whether the client takes the memory, in the mode that it is in.
fn importer_can(topology: &Topology, client: &End, driver: Option<&str>) -> Option<bool> {
    let function = match client {
        // A process maps the BAR.
        End::Cpu => return Some(true),
        End::NotPci(name) => return Some(import_modes(name).next()?.can_import),
        End::Function(address) => &topology.place(*address)?.function,
    };
    match driver {
        None => Some(false),
        Some(driver) if pci::is_vfio_driver(driver) => Some(true),
        // Another virtio device than a GPU.
        Some("virtio-pci") if function.drm_nodes.is_empty() => Some(false),
        Some(_) => Some(import_support_of(function)?.can_import),
    }
}

/// Which of both ends do not answer.
fn silent(topology: &Topology, provider: PciAddress, client: &End) -> Vec<PciAddress> {
    let client = match client {
        End::Function(address) => Some(*address),
        End::Cpu | End::NotPci(_) => None,
    };
    let is_silent = |address: &PciAddress| {
        let config = topology.place(*address).and_then(|place| place.config.known());
        config.is_some_and(|config| config.is_all_ones())
    };
    [Some(provider), client].into_iter().flatten().filter(is_silent).collect()
}

/// Whether whatever drives the client has the kernel ask for a verdict.
fn asks_for_a_verdict(route: &Route, topology: &Topology) -> bool {
    let is_vfio = driver_of(topology, &route.client).is_some_and(pci::is_vfio_driver);
    route.client != End::Cpu
        && !is_vfio
        && route.imports.first().is_none_or(|row| row.governed_by == Governor::MapType)
}
