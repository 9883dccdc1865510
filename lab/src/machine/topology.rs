//! How a machine's devices hang together: bridges in QEMU's words.

use serde::{Deserialize, Serialize};

use super::options::options;

/// How the devices hang together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Topology {
    /// A root port for each device: the way from one to the other is the host bridge.
    RootPorts,
    /// A switch with a downstream port for each device: bus addresses, below the host bridge.
    Switch,
    /// A tree of its own, with its functions in it ([`super::shape`]).
    Tree,
}

impl Topology {
    /// The slot of the root bus where the row's device of that number has its port, each behind a root port.
    pub(super) const fn slot_of(device: usize) -> usize {
        device + 2
    }

    /// Bridges that give `ports` ports, named `port0`, `port1` and so on.
    pub(crate) fn qemu_arguments(self, ports: usize) -> Vec<String> {
        let mut arguments = Vec::new();
        if self == Topology::Switch {
            arguments.extend(options(&[
                ("-device", "pcie-root-port,id=root,chassis=100,addr=2.0"),
                ("-device", "x3130-upstream,id=upstream,bus=root"),
            ]));
        }
        for index in 0..ports {
            let chassis = index + 1;
            let port = match self {
                Topology::RootPorts | Topology::Tree => {
                    format!(
                        "pcie-root-port,id=port{index},chassis={chassis},addr={:x}.0",
                        Self::slot_of(index)
                    )
                }
                Topology::Switch => {
                    format!("xio3130-downstream,id=port{index},bus=upstream,chassis={chassis},slot={chassis}")
                }
            };
            arguments.extend(options(&[("-device", &port)]));
        }
        arguments
    }
}
