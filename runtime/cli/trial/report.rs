//! `Report`: all that a trial found, in the form that is sent.

use std::fs;
use std::time::SystemTime;

use peervram::backends::pci::Function;
use peervram::backends::topology::redact_command_line;
use peervram::backends::vfio;
use serde::Serialize;

use super::importer::Importer;
use super::outcome::{Outcome, StepReport};
use super::redact::Redactor;
use crate::pci_names::PciNames;

/// What a report calls itself.
const FORMAT: &str = "peervram-trial";
/// Its version: another one has other fields.
const VERSION: u32 = 1;

/// All that a trial found.
#[derive(Debug, Serialize)]
pub struct Report {
    format: &'static str,
    version: u32,
    /// The version of this program.
    pub peervram: &'static str,
    /// The day: the hour says where somebody lives.
    pub day: String,
    pub kernel_release: String,
    /// What decides about routes and drivers.
    pub command_line: String,
    pub processor: Option<String>,
    pub lender: LenderReport,
    pub importers: Vec<Importer>,
    pub predictions: Vec<Prediction>,
    pub steps: Vec<StepReport>,
}

#[derive(Debug, Serialize)]
pub struct LenderReport {
    pub address: String,
    /// "10de:2342".
    pub id: String,
    pub name: Option<String>,
    pub driver: Option<String>,
}

/// What was predicted of an importer, and what was seen.
#[derive(Debug, PartialEq, Serialize)]
pub struct Prediction {
    pub importer: String,
    /// `peervram route`'s answer: works, refused, importer-cannot, unknown, unasked.
    pub predicted: String,
    /// The path that the import took, or "refused"; none where it was not tried.
    pub seen: Option<String>,
    /// Whether both say the same of a dma-buf; none where one of them says nothing.
    pub agrees: Option<bool>,
}

impl Report {
    pub fn new(lender: &Function, importers: &[Importer], steps: Vec<StepReport>) -> Self {
        let redactor = Redactor::of_this_machine();
        let predictions =
            importers.iter().filter_map(|importer| Prediction::of(&importer.name, &steps)).collect();
        let redacted = |mut step: StepReport| {
            redactor.value(&mut step.detail);
            step.words = redactor.text(&step.words);
            step
        };
        let processors = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let processor = processors.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        Self {
            format: FORMAT,
            version: VERSION,
            peervram: env!("PEERVRAM_VERSION"),
            day: day(SystemTime::now()),
            kernel_release: vfio::kernel_release(),
            command_line: redact_command_line(&fs::read_to_string("/proc/cmdline").unwrap_or_default()),
            processor: processor.map(|(_, name)| name.to_owned()),
            lender: LenderReport {
                address: lender.address.to_string(),
                id: format!("{:04x}:{:04x}", lender.vendor_id, lender.device_id),
                name: PciNames::load().name(lender.vendor_id, lender.device_id),
                driver: lender.driver.clone(),
            },
            importers: importers.to_vec(),
            predictions,
            steps: steps.into_iter().map(redacted).collect(),
        }
    }

    /// "12 ok, 3 refused, 1 WRONG".
    pub fn summary(&self) -> String {
        use Outcome::{Broke, Hung, LeftOut, Ok, Refused, Stuck, Wrong};
        let count = |outcome| self.steps.iter().filter(|step| step.outcome == outcome).count();
        let counted = [Ok, Refused, Wrong, Broke, Hung, Stuck, LeftOut]
            .map(|outcome| (count(outcome), outcome.words()));
        let some = counted.into_iter().filter(|&(count, _)| count > 0);
        some.map(|(count, words)| format!("{count} {words}")).collect::<Vec<_>>().join(", ")
    }
}

/// The day of a moment, in UTC.
fn day(moment: SystemTime) -> String {
    humantime::format_rfc3339_seconds(moment).to_string().chars().take(10).collect()
}

impl Prediction {
    /// None where nothing was predicted.
    fn of(importer: &str, steps: &[StepReport]) -> Option<Self> {
        let step = |name: &str| {
            steps.iter().find(|step| step.step == name && step.importer.as_deref() == Some(importer))
        };
        let predicted = step("predict")?.detail["answer"].as_str()?.to_owned();
        let import = step("import");
        let peer_refused = import.is_some_and(|import| {
            let refused = import.detail["refused"].as_array();
            refused.is_some_and(|refused| refused.iter().any(|refused| refused["path"] == "peer"))
        });
        let seen = import.and_then(|import| match import.outcome {
            Outcome::Ok => import.detail["path"].as_str().map(str::to_owned),
            Outcome::Refused => Some("refused".to_owned()),
            _ => None,
        });
        let took_dma_buf = seen.as_deref().map(|seen| seen == "peer" && !peer_refused);
        let agrees = match (&*predicted, took_dma_buf) {
            ("works", Some(took)) => Some(took),
            ("refused" | "importer-cannot", Some(took)) => Some(!took),
            _ => None,
        };
        Some(Self { importer: importer.to_owned(), predicted, seen, agrees })
    }
}

#[cfg(test)]
pub mod tests {
    use serde_json::Value;

    use super::*;

    pub fn step(step: &str, importer: Option<&str>, outcome: Outcome, detail: Value) -> StepReport {
        StepReport {
            step: step.into(),
            importer: importer.map(str::to_owned),
            command: Some(format!("peervram {step}")),
            outcome,
            words: format!("the words of {step}"),
            took_ms: 1234.0,
            detail,
        }
    }

    #[test]
    fn a_prediction_is_held_against_what_was_seen() {
        let json = |text: &str| serde_json::from_str(text).unwrap();
        let of = |answer: &str, outcome, detail: &str| {
            let predict =
                step("predict", Some("vulkan"), Outcome::Ok, serde_json::json!({ "answer": answer }));
            let import = step("import", Some("vulkan"), outcome, json(detail));
            let prediction = Prediction::of("vulkan", &[predict, import]).unwrap();
            (prediction.seen, prediction.agrees)
        };
        let peer = r#"{"path": "peer", "refused": []}"#;
        let pointer = r#"{"path": "host-pointer", "refused": [{"path": "peer"}]}"#;
        let some = |text: &str| Some(text.to_owned());
        assert_eq!(of("works", Outcome::Ok, peer), (some("peer"), Some(true)));
        assert_eq!(of("works", Outcome::Ok, pointer), (some("host-pointer"), Some(false)));
        assert_eq!(of("refused", Outcome::Ok, pointer), (some("host-pointer"), Some(true)));
        assert_eq!(of("importer-cannot", Outcome::Refused, "{}"), (some("refused"), Some(true)));
        assert_eq!(of("refused", Outcome::Ok, peer), (some("peer"), Some(false)));
        assert_eq!(of("unknown", Outcome::Ok, peer), (some("peer"), None));
        assert_eq!(of("works", Outcome::Broke, "null"), (None, None));
        assert_eq!(Prediction::of("vulkan", &[]), None);
    }

    #[test]
    fn a_day_says_no_hour() {
        assert_eq!(day(SystemTime::UNIX_EPOCH), "1970-01-01");
    }
}
