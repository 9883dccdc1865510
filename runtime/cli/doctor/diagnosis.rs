//! `Diagnosis`: what the facts of a machine mean for lending, and what to do.
//!
//! Pure: facts in, findings and steps out.

use serde::Serialize;

use super::candidate::{Candidate, exports_dma_bufs};
use super::facts::Facts;
use super::finding::{Finding, Section, Severity, Step, StepOrder};
use super::pair::{Pair, PairPath, PairState};
use super::{bars, broker, devices, iommu, kernel, permissions, vulkan};

/// More steps than this are not taken in at once.
const STEPS_MAX: usize = 5;
/// More pairs than this do not fit on a page.
const PAIRS_MAX: usize = 8;

/// What is concluded of a machine.
#[derive(Debug, Serialize)]
pub struct Diagnosis {
    pub verdict: Verdict,
    /// The verdict, in words about this machine.
    pub headline: String,
    pub findings: Vec<Finding>,
    pub pairs: Vec<Pair>,
    pub what_to_do: Vec<Step>,
    /// How many steps were left out, to come after these.
    pub steps_left_out: usize,
}

/// What runs on a machine now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// A device can lend its memory.
    CanLend,
    /// Host memory can stand in for a device's, and Vulkan imports it.
    HostMemoryOnly,
    /// Neither.
    Nothing,
}

impl Diagnosis {
    pub fn of(facts: &Facts) -> Self {
        let candidates = Candidate::all(facts);
        let pairs = Pair::all(facts, &candidates);
        let mut findings = kernel::examine(facts, &candidates);
        findings.extend(iommu::examine(facts, &candidates));
        findings.extend(devices::examine(facts, &candidates, &pairs));
        findings.extend(bars::examine(facts, &candidates));
        findings.extend(permissions::examine(facts, &candidates));
        findings.extend(vulkan::examine(facts));
        findings.extend(of_pairs(&candidates, &pairs));
        findings.push(broker::examine(&facts.broker));

        let can_lend = candidates.iter().any(|candidate| {
            candidate.is_ready() && (exports_dma_bufs(facts) || facts.host_pointer_importer().is_some())
        });
        let can_import_host_memory = (facts.vulkan_devices().iter())
            .any(|device| device.imports_dma_bufs || device.imports_host_pointers);
        let verdict = match (can_lend, can_import_host_memory) {
            (true, _) => Verdict::CanLend,
            (false, true) => Verdict::HostMemoryOnly,
            (false, false) => Verdict::Nothing,
        };
        let mut steps: Vec<Step> = findings.iter().filter_map(|finding| finding.step.clone()).collect();
        steps.extend(attempt(verdict, &pairs));
        let (what_to_do, steps_left_out) = in_order(steps);
        let headline = headline(facts, verdict, &candidates, &pairs);
        Self { verdict, headline, findings, pairs, what_to_do, steps_left_out }
    }
}

/// By turn, nothing twice, not too many.
fn in_order(mut steps: Vec<Step>) -> (Vec<Step>, usize) {
    // Stable: of one turn, in the order of the page.
    steps.sort_by_key(|step| step.turn);
    let mut ordered: Vec<Step> = Vec::new();
    for step in steps {
        if !ordered.contains(&step) {
            ordered.push(step);
        }
    }
    let left_out = ordered.len().saturating_sub(STEPS_MAX);
    ordered.truncate(STEPS_MAX);
    (ordered, left_out)
}

fn of_pairs(candidates: &[Candidate], pairs: &[Pair]) -> Vec<Finding> {
    let finding = |code, weight, seen: String| Finding::new(code, Section::Pairs, weight, seen);
    let line = |pair: &Pair| {
        let importer = match pair.importer {
            Some(address) => format!("{address} ({})", pair.importer_name),
            None => pair.importer_name.clone(),
        };
        let Pair { lender, how, .. } = pair;
        match pair.state {
            PairState::Now => finding("pair", Severity::Fine, format!("{lender} to {importer}: {how}")),
            PairState::Possible => {
                finding("pair-possible", Severity::Hint, format!("{lender} to {importer}: {how}, not yet"))
            }
            PairState::Never => {
                finding("pair-refused", Severity::InTheWay, format!("{lender} to {importer}: {how}"))
            }
        }
    };
    let mut findings: Vec<Finding> = pairs.iter().take(PAIRS_MAX).map(line).collect();
    if let Some(more @ 1..) = pairs.len().checked_sub(PAIRS_MAX) {
        let seen = format!("and {more} pairs more, which --json lists");
        findings.push(finding("pairs-left-out", Severity::Unknown, seen));
    }
    if pairs.is_empty() && !candidates.is_empty() {
        let seen = "nothing here can import: amdgpu, xe, virtio_gpu without 3D and another VFIO device can, and CPUs by \
                    host pointer";
        findings.push(finding("no-importer", Severity::Hint, seen.into()));
    }
    if let Some(refused) = by_gpu(pairs).find(|pair| pair.state == PairState::Never)
        && by_gpu(pairs).all(|pair| pair.state == PairState::Never)
        && let Some(importer) = refused.importer
    {
        let what = "Put lender and importer behind one PCIe switch, or use a machine whose host bridge the \
                    kernel trusts (AMD Zen, Intel servers). The whole story:";
        let step = Step::new(StepOrder::Slots, what)
            .command(format!("peervram route {} {importer}", refused.lender));
        if let Some(finding) = findings.iter_mut().find(|finding| finding.code == "pair-refused") {
            finding.step = Some(step);
        }
    }
    findings
}

/// Pairs with a GPU, whose route the kernel decides about.
fn by_gpu(pairs: &[Pair]) -> impl Iterator<Item = &Pair> {
    pairs.iter().filter(|pair| pair.path == PairPath::Peer)
}

/// What to try next, on a machine where something works.
fn attempt(verdict: Verdict, pairs: &[Pair]) -> Option<Step> {
    match verdict {
        Verdict::CanLend => {
            let now = |path| pairs.iter().find(move |pair| pair.state == PairState::Now && pair.path == path);
            let route = now(PairPath::Peer).and_then(|pair| Some((pair.lender, pair.importer?)));
            let read = now(PairPath::HostPointer).map(|pair| pair.lender);
            let commands = [
                route.map(|(lender, importer)| format!("peervram route {lender} {importer}")),
                read.map(|lender| format!("peervram verify {lender} vulkan")),
            ];
            let mut step = Step::new(StepOrder::Try, "Try it; bytes are right only once they were compared:");
            step.commands.extend(commands.into_iter().flatten());
            (!step.commands.is_empty()).then_some(step)
        }
        Verdict::HostMemoryOnly => Some(
            Step::new(StepOrder::Try, "See it work with host memory in VRAM's place:")
                .command("peervram demo"),
        ),
        Verdict::Nothing => Some(
            Step::new(StepOrder::Try, "Then see it work with host memory in VRAM's place; no GPU is needed:")
                .command("peervram demo"),
        ),
    }
}

fn headline(facts: &Facts, verdict: Verdict, candidates: &[Candidate], pairs: &[Pair]) -> String {
    let now: Vec<&Pair> = pairs.iter().filter(|pair| pair.state == PairState::Now).collect();
    match verdict {
        Verdict::CanLend => {
            let mut lenders: Vec<String> = (candidates.iter().filter(|candidate| candidate.is_ready()))
                .map(|candidate| candidate.address().to_string())
                .collect();
            let rest = lenders.len().saturating_sub(2);
            lenders.truncate(2);
            let more = if rest > 0 { format!(" and {rest} more") } else { String::new() };
            let how = if !exports_dma_bufs(facts) {
                "by host pointer only"
            } else if now.is_empty() {
                "but nothing here can import it"
            } else if by_gpu(pairs).any(|pair| pair.state == PairState::Now) {
                "to a GPU, by peer"
            } else {
                "but to no GPU of this machine"
            };
            format!("This machine can lend memory now: of {}{more}, {how}.", lenders.join(", "))
        }
        Verdict::HostMemoryOnly if candidates.is_empty() => {
            "No GPU's memory can be lent here. Host memory can stand in for it.".into()
        }
        Verdict::HostMemoryOnly => {
            "No device can lend its memory yet. Host memory can stand in for it.".into()
        }
        Verdict::Nothing if candidates.is_empty() => {
            "Nothing of peervram runs here yet, and nothing is broken: there is little here to run it on."
                .into()
        }
        Verdict::Nothing => "No device can lend its memory yet.".into(),
    }
}
