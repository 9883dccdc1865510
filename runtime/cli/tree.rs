//! The topology that a command looks at: this machine's, or a captured one.

use std::fs;
use std::io::Read;
use std::path::Path;

use peervram::backends::topology::Topology;
use peervram::{Error, Kind, Result};

/// A captured machine has no more than this; what is fed without end is refused.
const LARGEST_BYTES: u64 = 1 << 30;

/// Of this machine, or of the one captured in `file`.
pub fn read(file: Option<&Path>) -> Result<Topology> {
    let Some(path) = file else { return of_this_machine() };
    const TRIED: &str = "read a captured topology";
    let failed = |error| Error::os(TRIED, error).on(path.display()).next("make one with peervram capture");
    let mut bytes = Vec::new();
    fs::File::open(path).map_err(failed)?.take(LARGEST_BYTES).read_to_end(&mut bytes).map_err(failed)?;
    Topology::from_json(&String::from_utf8_lossy(&bytes)).map_err(|error| error.on(path.display()))
}

fn of_this_machine() -> Result<Topology> {
    let no_bus = |error: &Error| error.kind() == Kind::NotFound;
    match Topology::read() {
        Err(error) if no_bus(&error) => {
            Err(Error::new(Kind::Unsupported, "read the topology", "this machine has no PCI bus")
                .next("peervram route --tree FILE looks at a captured machine"))
        }
        Ok(topology) if topology.places().is_empty() => {
            Err(Error::new(Kind::Unsupported, "read the topology", "no function is on its PCI bus")
                .next("peervram route --tree FILE looks at a captured machine"))
        }
        read => read,
    }
}
