//! How much of a device's memory its BAR shows, and how wide the way to it is.

use peervram::backends::pci::Function;
use peervram::backends::topology::{Reading, ResizableBar, Search};

use peervram_programs::bytes;

use super::candidate::Candidate;
use super::facts::Facts;
use super::finding::{Finding, Section, Severity, Step, StepOrder};

pub fn examine(facts: &Facts, candidates: &[Candidate]) -> Vec<Finding> {
    let mut findings: Vec<Finding> =
        candidates.iter().filter_map(|candidate| bar(facts, candidate)).collect();
    findings.extend(facts.functions().filter_map(link));
    findings
}

fn bar(facts: &Facts, candidate: &Candidate) -> Option<Finding> {
    let address = candidate.address();
    let place = facts.topology.known()?.place(address)?;
    let finding = |code, weight, seen: String| Finding::new(code, Section::Bars, weight, seen);
    let size = bytes::in_words(candidate.memory.size_bytes);
    let index = candidate.memory.index;
    let bars = match &place.config {
        Reading::Known(config) if !config.is_all_ones() => config.resizable_bars(),
        _ => Search::Unread,
    };
    match bars {
        Search::Found(bars) => {
            let bar = bars.iter().find(|bar| u32::from(bar.index) == index)?;
            let largest = *bar.sizes_bytes.last()?;
            if largest <= bar.now_bytes {
                return Some(finding(
                    "bar-largest",
                    Severity::Fine,
                    format!("{address} BAR {index}: {size}, its largest"),
                ));
            }
            let seen = format!("{address} BAR {index}: {size}, and could be {}", bytes::in_words(largest));
            let why = "What the BAR does not show cannot be lent.";
            let found = finding("bar-small", Severity::Hint, seen).why(why);
            Some(match resize(facts, candidate, bar, largest) {
                Some(step) => found.step(step),
                None => found,
            })
        }
        Search::Unread => {
            let offered = facts.resizable.get(&address).is_some_and(|bars| bars.contains(&index));
            let seen = format!("{address} BAR {index}: {size}, can be resized; to what, only root sees");
            offered.then(|| finding("bar-sizes-unread", Severity::Unknown, seen))
        }
        Search::Absent => None,
    }
}

/// While a driver is bound the kernel says EBUSY (`__resource_resize_store`), and VFIO lets nobody write the
/// capability. None where a driver has it that the machine may need.
fn resize(facts: &Facts, candidate: &Candidate, bar: &ResizableBar, size_bytes: u64) -> Option<Step> {
    if !candidate.needed(facts).is_empty() {
        return None;
    }
    let address = candidate.address();
    let folder = format!("/sys/bus/pci/devices/{address}");
    let what = format!(
        "Resize BAR {} of {address} to {}, while it has no driver; if the kernel says no, enable Above 4G \
         Decoding and Resizable BAR in the firmware:",
        bar.index,
        bytes::in_words(size_bytes)
    );
    let mut step = Step::new(StepOrder::ResizeBar, what);
    if !candidate.is_bound && candidate.function.driver.is_some() {
        // By the way of a VFIO driver, since that command looks whether anything hangs on it.
        step = step.command(candidate.bind_command());
    }
    let has_driver = candidate.function.driver.is_some();
    if has_driver {
        step = step.command(format!("echo {address} > {folder}/driver/unbind"));
    }
    // The file wants the power of two, in MiB.
    let exponent = size_bytes.trailing_zeros().saturating_sub(20);
    step = step.command(format!("echo {exponent} > {folder}/resource{}_resize", bar.index));
    if has_driver {
        step = step.command(format!("echo {address} > /sys/bus/pci/drivers_probe"));
    }
    Some(step)
}

fn link(function: &Function) -> Option<Finding> {
    let link = function.link.as_ref()?;
    if link.width_lanes >= link.max_width_lanes && link.speed == link.max_speed {
        return None;
    }
    // A GPU without work slows its link down; lanes do not come back by themselves.
    let is_narrow = link.width_lanes < link.max_width_lanes;
    let speed = |text: &str| text.trim_end_matches(" PCIe").to_owned();
    let seen = format!(
        "{} link: {} x{}, of {} x{}",
        function.address,
        speed(&link.speed),
        link.width_lanes,
        speed(&link.max_speed),
        link.max_width_lanes
    );
    let why = if is_narrow {
        "Bytes go no faster than the narrowest link: another slot may have more lanes."
    } else {
        "It may be slow because it is idle."
    };
    Some(Finding::new("link-narrowed", Section::Bars, Severity::Hint, seen).why(why))
}
