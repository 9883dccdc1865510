//! A topology as JSON, to be looked at on another machine.
//!
//! What is read is not trusted: a file may be cut short, of another version, or run in circles.

use std::collections::{HashMap, HashSet};

use serde::{Deserialize, Serialize};

use super::{Above, Cpu, Place, Reading, Topology};
use crate::{Error, Kind, PciAddress, Result};

/// What a captured tree calls itself.
const FORMAT: &str = "peervram-topology";
/// Its version. Another one is refused.
const VERSION: u32 = 1;
/// More functions than any machine has.
const PLACES_MAX: usize = 1 << 16;
/// The deepest chain of bridges: no more than there are buses.
const BRIDGES_MAX: usize = 256;

const TRIED: &str = "read a captured topology";

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Captured {
    format: String,
    version: u32,
    kernel_release: Reading<String>,
    command_line: Reading<String>,
    boot_id: Reading<String>,
    cpu: Reading<Cpu>,
    order: Reading<()>,
    places: Vec<Place>,
}

/// What is looked at first: a later version may have other fields.
#[derive(Deserialize)]
struct Heading {
    format: String,
    version: u32,
}

impl Topology {
    /// The topology as JSON.
    pub fn to_json(&self) -> String {
        let captured = Captured {
            format: FORMAT.into(),
            version: VERSION,
            kernel_release: self.kernel_release.clone(),
            command_line: self.command_line.clone(),
            boot_id: self.boot_id.clone(),
            cpu: self.cpu.clone(),
            order: self.order.clone(),
            places: self.places.clone(),
        };
        serde_json::to_string_pretty(&captured).expect("its maps have strings for keys")
    }

    /// The topology of a captured machine.
    ///
    /// # Errors
    /// [`Kind::InvalidInput`] for what is no captured topology, is one of another version or cut short, names
    /// a function twice, or has bridges in a circle. A bridge that is missing is no error: verdicts that
    /// hang on it are unknown.
    pub fn from_json(text: &str) -> Result<Self> {
        let invalid =
            |why: String| Error::new(Kind::InvalidInput, TRIED, why).next("make one with peervram capture");
        let heading: Heading = serde_json::from_str(text).map_err(|error| invalid(error.to_string()))?;
        if heading.format != FORMAT {
            return Err(invalid(format!("it calls itself {:?}", heading.format)));
        }
        if heading.version != VERSION {
            let why = format!("it is of version {}, this peervram reads version {VERSION}", heading.version);
            return Err(invalid(why));
        }
        let captured: Captured = serde_json::from_str(text).map_err(|error| invalid(error.to_string()))?;
        let Captured { kernel_release, command_line, boot_id, cpu, order, places, .. } = captured;
        let (is_whole, is_captured) = (true, true);
        let topology =
            Self { kernel_release, command_line, boot_id, cpu, places, order, is_whole, is_captured };
        topology.check().map_err(invalid)?;
        Ok(topology)
    }

    /// Whether it could be a machine: no function twice, no bridges in a circle.
    pub(super) fn check(&self) -> Result<(), String> {
        if self.places.len() > PLACES_MAX {
            return Err(format!("it has {} functions", self.places.len()));
        }
        let mut seen = HashSet::new();
        if let Some(twice) = self.places.iter().find(|place| !seen.insert(place.address())) {
            return Err(format!("{} is in it twice", twice.address()));
        }
        let above: HashMap<PciAddress, &Above> =
            self.places.iter().map(|place| (place.address(), &place.above)).collect();
        // How many bridges are above each function that was seen to be good.
        let mut depths: HashMap<PciAddress, usize> = HashMap::new();
        for place in &self.places {
            let mut way = Vec::new();
            let mut at = place.address();
            let end = loop {
                if let Some(&depth) = depths.get(&at) {
                    break depth + 1;
                }
                way.push(at);
                match above.get(&at) {
                    Some(Above::Bridge(bridge)) if way.len() <= BRIDGES_MAX => at = *bridge,
                    _ => break 0,
                }
            };
            if end + way.len() > BRIDGES_MAX {
                return Err(format!("more bridges than buses are above {}, or a circle", place.address()));
            }
            depths.extend(way.into_iter().rev().enumerate().map(|(step, address)| (address, end + step)));
        }
        Ok(())
    }
}
