//! `Fix`: one change that would mend a route or make it faster, ready to paste, with its price.
//!
//! The first is the one to make. Fixes that change the way were tried: what is predicted with the change is in
//! [`Fix::then`]. Nothing here changes the machine.

mod access_control;
mod iommu;
mod link;
mod reading;
mod resizable_bar;
mod slot;
#[cfg(test)]
mod tests;

use peervram_backends::topology::{MapType, Topology};
use peervram_backends::{PciAddress, pci, topology};
use serde::Serialize;

use super::{Answer, KernelMessages, Route};

/// One change, ready to paste.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Fix {
    /// Which kind; its code is stable.
    pub kind: FixKind,
    /// What it does, in a sentence.
    pub what: String,
    /// What to type, as root, or where to write it.
    pub commands: Vec<String>,
    /// What it costs, beside the work.
    pub price: String,
    /// What the change requires.
    pub needs: Needs,
    /// What is predicted with it, for one that changes the way.
    pub then: Option<MapType>,
    /// How IOMMU groups would merge, for one that weakens isolation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub groups: Option<Regrouping>,
}

/// Which kind of change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum FixKind {
    /// Have ports not redirect, by the kernel's command line.
    DisableAcsRedirect,
    /// Have ports not redirect, by `pci=config_acs=`, which sets single bits.
    ConfigAcs,
    /// Have ports not redirect until the next boot, by their registers.
    WriteAcs,
    /// Have ports not redirect, by a setting of the firmware.
    FirmwareAcs,
    /// Put a card into another slot.
    MoveCard,
    /// Another release of Linux.
    NewerKernel,
    /// A switch, or another machine.
    OtherHardware,
    /// Have the kernel forget a verdict.
    Rebind,
    /// Read what was not read.
    ReadMore,
    /// Wake a device, or bring it back.
    WakeDevice,
    /// Let the IOMMU pass kernel drivers' addresses on.
    Passthrough,
    /// Show more of the memory.
    ResizeBar,
    /// A link that could carry more.
    WidenLink,
    /// Longer packets.
    MaxPayload,
}

impl FixKind {
    /// Whether it mends a verdict; the others make a way faster or wider.
    pub fn mends_a_verdict(self) -> bool {
        !matches!(self, Self::Passthrough | Self::ResizeBar | Self::WidenLink | Self::MaxPayload)
    }
}

/// What a change takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Needs {
    /// Nothing but root.
    Root,
    /// The lender's driver unbound and bound again: whoever uses it is thrown out.
    Rebinding,
    /// The machine started again.
    Reboot,
    /// The machine switched off and opened.
    Hands,
}

impl Needs {
    /// In words.
    pub fn words(self) -> &'static str {
        match self {
            Self::Root => "root",
            Self::Rebinding => "the device unbound and bound again",
            Self::Reboot => "a reboot",
            Self::Hands => "the machine switched off and opened",
        }
    }
}

/// Which IOMMU groups would be others. A prediction of both: the kernel knows devices that isolate without
/// saying so, and may make more groups of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Regrouping {
    /// The groups that would no longer exist.
    pub now: Vec<Vec<PciAddress>>,
    /// The groups that would replace them.
    pub then: Vec<Vec<PciAddress>>,
}

/// All that would help, the recommended one first.
pub(super) fn fixes(topology: &Topology, route: &Route, messages: &KernelMessages) -> Vec<Fix> {
    let mut fixes = Vec::new();
    if !route.silent.is_empty() {
        return reading::fixes(topology, route);
    }
    let pair = route.verdict.as_ref().and_then(|verdict| match route.client {
        super::End::Function(client) => Some((verdict, client)),
        _ => None,
    });
    if let Some((verdict, client)) = pair {
        match route.answer() {
            Answer::Refused => {
                fixes.extend(access_control::fixes(topology, route.provider, client, verdict));
                fixes.extend(slot::moves(topology, route.provider, client));
                fixes.extend(slot::newer_kernel(topology, route.provider, client));
                if fixes.is_empty() {
                    fixes.push(slot::other_hardware());
                }
            }
            Answer::Unknown => fixes.extend(reading::fixes(topology, route)),
            Answer::Works | Answer::ImporterCannot | Answer::Unasked => {
                if messages.refused(route.provider, client) {
                    fixes.push(stale(topology, route.provider));
                }
            }
        }
        fixes.extend(iommu::passthrough(topology, route, client));
        if route.answer() == Answer::Works && !verdict.redirects.is_empty() {
            // The way would be shorter, and is not refused as it is.
            fixes.extend(access_control::fixes(topology, route.provider, client, verdict));
        }
    }
    fixes.extend(resizable_bar::resize(topology, route.provider));
    fixes.extend(link::fixes(route));
    fixes
}

/// Whoever is refused although nothing refuses it any more meets a verdict that was kept.
fn stale(topology: &Topology, provider: PciAddress) -> Fix {
    Fix {
        kind: FixKind::Rebind,
        what: format!(
            "The kernel has refused this pair since it was started, and would allow it now. Where it still refuses, \
             that is a verdict it has kept: bind {provider} anew"
        ),
        commands: rebind(topology, provider, &[]),
        price: "whoever uses the device is thrown out, and its memory is reset".into(),
        needs: Needs::Rebinding,
        then: None,
        groups: None,
    }
}

/// Commands that unbind a device, do something, and bind it again.
///
/// Nothing of the machine hangs on a VFIO driver. What another driver has may be the root disk: `peervram bind` looks,
/// and refuses.
fn rebind(topology: &Topology, address: PciAddress, between: &[String]) -> Vec<String> {
    let driver = topology.place(address).and_then(|place| place.function.driver.as_deref());
    let write = |file: String| format!("echo {address} > {file}");
    let (first, unbind, bind) = match driver {
        None => (None, None, None),
        Some(driver) if pci::is_vfio_driver(driver) => {
            let file = |name: &str| Some(write(format!("/sys/bus/pci/drivers/{driver}/{name}")));
            (None, file("unbind"), file("bind"))
        }
        Some(_) => {
            let unbind = write(format!("/sys/bus/pci/devices/{address}/driver/unbind"));
            (
                Some(format!("peervram bind {address}")),
                Some(unbind),
                Some(write("/sys/bus/pci/drivers_probe".into())),
            )
        }
    };
    let before = first.into_iter().chain(unbind);
    before.chain(between.iter().cloned()).chain(bind).collect()
}

/// What the kernel would say of a pair in another topology, if it would map it.
fn allows(topology: &Topology, provider: PciAddress, client: PciAddress) -> Option<MapType> {
    let answer = topology.expected_map_type(provider, client).expected.known()?;
    (answer != topology::MapType::NotSupported).then_some(answer)
}

/// Where a parameter is written.
fn on_the_command_line(parameter: &str) -> Vec<String> {
    vec![parameter.to_owned()]
}
