//! `Participants`: who lends and who imports here.
//!
//! The lender is the first PCI function bound to VFIO that has memory, as `peervram devices` lists
//! them; the importer the first DRM node whose driver takes memory of another device.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use peervram::backends::PciAddress;
use peervram::backends::drm::Node;
use peervram::backends::host::HostMemory;
use peervram::backends::pci::Function;

/// How much host memory stands in for VRAM: what the largest benchmark wants.
const HOST_BYTES: u64 = 256 << 20;

/// Who lends and who imports.
#[derive(Debug)]
pub enum Participants {
    /// A VFIO device lends its largest memory BAR.
    Vfio {
        /// Where it is.
        address: PciAddress,
        /// The BAR.
        region: u32,
        /// The importing DRM node, or the reason why there is none.
        node: Result<PathBuf, String>,
    },
    /// Host memory stands in for VRAM.
    Host,
}

impl Participants {
    /// Finds what was not given. Without any VFIO device it is the host's memory.
    pub fn find(lender: Option<PciAddress>, node: Option<PathBuf>) -> Result<Participants> {
        let function = match lender {
            Some(address) => Some(Function::read(address)?),
            // A machine without a PCI bus has no VFIO device either.
            None => Function::all().unwrap_or_default().into_iter().find(lends),
        };
        let Some(function) = function else { return Ok(Participants::Host) };
        let Some(region) = function.largest_memory().map(|bar| bar.index) else {
            bail!("{} has no memory BAR of a page or more; name another with --lender", function.address);
        };
        let node = node.map_or_else(find_node, Ok);
        Ok(Participants::Vfio { address: function.address, region, node })
    }
}

impl fmt::Display for Participants {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Participants::Vfio { address, region, .. } => write!(formatter, "{address}, BAR {region}"),
            Participants::Host => formatter.write_str("host memory"),
        }
    }
}

/// Host memory in the place of VRAM.
pub fn host_memory() -> Result<HostMemory> {
    Ok(HostMemory::new(HOST_BYTES)?)
}

fn lends(function: &Function) -> bool {
    function.is_bound_to_vfio() && function.largest_memory().is_some()
}

/// A node whose driver can import, by what is known of drivers.
fn find_node() -> Result<PathBuf, String> {
    const NODES: &str = "/dev/dri";
    let entries = fs::read_dir(Path::new(NODES)).map_err(|error| format!("{NODES}: {error}"))?;
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.retain(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("card")));
    paths.sort();
    let mut refused = Vec::new();
    for path in paths {
        match Node::open(&path) {
            Ok(node) if node.import_support().is_some_and(|row| row.can_import) => return Ok(path),
            Ok(node) => refused.push(format!("{} is {}'s", path.display(), node.driver())),
            Err(error) => refused.push(error.to_string()),
        }
    }
    Err(format!("no DRM node here imports memory of another device: {}", refused.join(", ")))
}
