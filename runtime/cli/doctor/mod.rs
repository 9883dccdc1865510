//! `peervram doctor`: a whole machine on one page, and what to do.
//!
//! [`read`] makes [`Facts`], once; [`Diagnosis::of`] decides, without a look at the machine; [`page`] writes.
//! No device is opened: opening a VFIO device resets it.

mod bars;
mod broker;
mod candidate;
mod devices;
mod diagnosis;
mod facts;
mod finding;
mod iommu;
mod kernel;
mod kernel_config;
mod page;
mod pair;
mod permissions;
mod read;
#[cfg(test)]
mod tests;
mod vulkan;
mod vulkan_process;

use std::path::Path;
use std::process::ExitCode;

use clap::Args;
use peervram::backends::topology::{Reading, Topology};
use peervram::backends::vfio;
use serde::Serialize;

use self::diagnosis::{Diagnosis, Verdict};
use self::facts::Facts;
pub use self::facts::{Vulkan, VulkanDevice};
pub use self::vulkan_process::ask as ask_vulkan;
use super::ending::print_json;
use peervram_programs::CANNOT_RUN_HERE;

/// Look at the whole machine: what works, what stands in the way, what to do.
///
/// The kernel and its options, the IOMMU, devices with their drivers and groups, BARs and links, permissions,
/// Vulkan drivers, and which pairs of devices could work. Ends with what to do, most useful first.
///
/// Opens no device, changes nothing, and is useful without root: what only root can read is named.
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    peervram doctor                             the page\n  \
    sudo peervram doctor                        with what only root can read\n  \
    peervram doctor --json | jq .what_to_do     for scripts: .verdict, .findings, .pairs, .facts\n\n\
Exit codes: 0 a device can lend its memory now, as far as can be known without trying;\n\
1 the doctor itself failed; 4 no device can, not even if host memory can stand in (.verdict\n\
tells: can-lend, host-memory-only, nothing).")]
pub struct Arguments {
    /// Say what Vulkan says, and nothing else: the part that a broken driver may end.
    #[arg(long, hide = true)]
    ask_vulkan: bool,
}

#[derive(Serialize)]
struct Report<'a> {
    #[serde(flatten)]
    diagnosis: &'a Diagnosis,
    facts: &'a Facts,
}

pub fn run(arguments: &Arguments, json: bool) -> anyhow::Result<ExitCode> {
    if arguments.ask_vulkan {
        return vulkan_process::answer();
    }
    let topology = match Topology::read() {
        Ok(topology) => Reading::Known(topology),
        Err(error) => Reading::Unread(error.why().to_owned()),
    };
    let elsewhere = read::ProcessFacts {
        kernel_release: vfio::kernel_release(),
        topology,
        vulkan: vulkan_process::ask(),
        broker: broker::ask(crate::broker::usual_socket()),
    };
    let facts = read::read(Path::new("/"), elsewhere);
    let diagnosis = Diagnosis::of(&facts);
    if json {
        print_json(&Report { diagnosis: &diagnosis, facts: &facts })?;
    } else {
        page::print(&facts, &diagnosis, &mut peervram_programs::output())?;
    }
    Ok(match diagnosis.verdict {
        Verdict::CanLend => ExitCode::SUCCESS,
        Verdict::HostMemoryOnly | Verdict::Nothing => ExitCode::from(CANNOT_RUN_HERE),
    })
}
