//! `peervram trial` from end to end: what a person with GPUs runs, on the lab's devices.

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, ensure};
use peervram_lab::machine::Facts;
use peervram_lab::wire;
use serde_json::Value;

use crate::guest::Guest;
use crate::test::{Test, Verdict};

pub const TESTS: &[Test] = &[
    Test::new("trial/everything-is-tried-and-a-page-is-written", everything)
        .on(|facts| facts.vulkan && facts.exports_dma_bufs() && Facts::allows_peers(facts))
        .on_any_topology(),
    Test::new("trial/not-bound-is-a-report-without-opening", not_bound).on_any_topology(),
];

/// Runs a trial whose page goes to `page`.
fn trial(lender: &str, page: &Path, more: &[&str]) -> Result<Output> {
    Command::new(format!("{}/peervram", wire::SHARE))
        .args(["trial", "--lender", lender, "--report"])
        .arg(page)
        .args(more)
        .stdin(Stdio::null())
        .output()
        .context("starting peervram")
}

/// The page, and what is in the file beside it.
fn written(page: &Path) -> Result<(String, Value)> {
    let text = fs::read_to_string(page).context("reading the page")?;
    let data = fs::read(page.with_extension("json")).context("reading what is beside the page")?;
    Ok((text, serde_json::from_slice(&data)?))
}

/// Every step is taken, by lavapipe and by the screen's GPU, and none is in trouble.
fn everything(guest: &Guest) -> Verdict {
    let (lender, node) = (guest.lender()?, guest.virtio_gpu_node()?.display().to_string());
    let page = std::env::temp_dir().join("trial.md");

    // Nobody is there to be asked, so the device stays closed.
    let output = trial(&lender, &page, &["--importer", &node])?;
    ensure!(output.status.code() == Some(4), "{output:?}");
    let (text, data) = written(&page)?;
    let outcomes = |data: &Value| -> Result<Vec<(String, String)>> {
        let steps = data["steps"].as_array().context("no steps")?;
        let word = |value: &Value| value.as_str().unwrap_or("?").to_owned();
        Ok(steps.iter().map(|step| (word(&step["step"]), word(&step["outcome"]))).collect())
    };
    for (step, outcome) in outcomes(&data)? {
        let looks = ["doctor", "capture", "predict"].contains(&&*step);
        ensure!(looks != (outcome == "left-out"), "{step} is {outcome}:\n{text}");
    }

    let output = trial(&lender, &page, &["--yes"])?;
    let (text, data) = written(&page)?;
    ensure!(output.status.code() == Some(0), "{output:?}\n{text}");
    let outcomes = outcomes(&data)?;
    let count = |name: &str, wanted: &str| {
        outcomes.iter().filter(|(step, outcome)| step == name && outcome == wanted).count()
    };
    ensure!(count("verify", "ok") == 1, "{outcomes:?}");
    // By Vulkan and by the GPU of the screen.
    ensure!(count("import", "ok") >= 2, "{outcomes:?}");
    for cause in ["reset", "memory off and on", "device closed"] {
        ensure!(count(&format!("take back: {cause}"), "ok") >= 2, "{cause}: {outcomes:?}");
    }
    // What was predicted of the screen's GPU is what it did.
    let predictions = data["predictions"].as_array().context("no predictions")?;
    let of_node = predictions.iter().find(|prediction| prediction["importer"] == *node);
    let of_node = of_node.with_context(|| format!("nothing is predicted of {node}: {predictions:?}"))?;
    ensure!(
        of_node["predicted"] == "works" && of_node["seen"] == "peer" && of_node["agrees"] == true,
        "{of_node}"
    );
    // Nothing that tells the machine is in it.
    let all = data.to_string();
    for secret in ["/proc/sys/kernel/random/boot_id", "/etc/machine-id"] {
        let secret = fs::read_to_string(secret).unwrap_or_default();
        ensure!(secret.trim().is_empty() || !all.contains(secret.trim()), "{} is in it", secret.trim());
    }
    let line = fs::read_to_string("/proc/cmdline")?;
    ensure!(!all.contains(line.trim()) && all.contains("intel_iommu=on") == line.contains("intel_iommu=on"));
    Ok(())
}

/// A device with a driver of its own, or none, is looked at, and stays closed.
fn not_bound(guest: &Guest) -> Verdict {
    let gpu = guest.virtio_gpu()?;
    let page = std::env::temp_dir().join("trial.md");
    let output = trial(&gpu, &page, &["--yes", "--give-up-screen", "--importer", "vulkan"])?;
    ensure!(output.status.code() == Some(4), "{output:?}");
    let (text, data) = written(&page)?;
    ensure!(text.contains(&format!("sudo peervram bind {gpu}")), "{text}");
    let steps = data["steps"].as_array().context("no steps")?;
    ensure!(steps.iter().all(|step| step["outcome"] == "left-out" || step["step"] != "import"), "{text}");
    ensure!(steps.iter().any(|step| step["step"] == "doctor" && step["outcome"] != "left-out"), "{text}");
    Ok(())
}
