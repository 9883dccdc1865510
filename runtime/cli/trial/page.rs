//! The page of a report, for people: Markdown that reads well as plain text, too.

use std::fmt::Write as _;
use std::path::Path;

use super::outcome::Outcome;
use super::report::{Prediction, Report};

/// The page. `data` is the file that has everything.
pub fn of(report: &Report, data: &Path) -> String {
    let mut page = String::new();
    let lender = &report.lender;
    let name = lender.name.as_deref().unwrap_or("a device without a name here");
    let _ = writeln!(page, "# {name} lends\n");
    let _ = writeln!(page, "{}.\n", report.summary());
    let importers: Vec<String> = (report.importers.iter())
        .map(|importer| match &importer.about {
            Some(about) => format!("`{}`, {about}", importer.name),
            None => format!("`{}`", importer.name),
        })
        .collect();
    let importers = if importers.is_empty() { "none was found".to_owned() } else { importers.join("; ") };
    let driver = lender.driver.as_deref().unwrap_or("no driver");
    table(
        &mut page,
        &["", ""],
        [
            ["lender".into(), format!("{} ({}), bound to {driver}", lender.address, lender.id)],
            ["importers".into(), importers],
            ["kernel".into(), report.kernel_release.clone()],
            ["its command line".into(), format!("`{}`", report.command_line)],
            ["processor".into(), report.processor.clone().unwrap_or_else(|| "not named".into())],
            ["peervram".into(), report.peervram.into()],
            ["day".into(), report.day.clone()],
        ],
    );
    if !report.predictions.is_empty() {
        let _ = writeln!(page, "\n## Predicted and seen\n");
        let agrees = |prediction: &Prediction| match prediction.agrees {
            Some(true) => "yes",
            Some(false) => "NO",
            None => "-",
        };
        table(
            &mut page,
            &["importer", "predicted", "seen", "the same"],
            report.predictions.iter().map(|prediction| {
                let seen = prediction.seen.clone().unwrap_or_else(|| "not tried".into());
                [prediction.importer.clone(), prediction.predicted.clone(), seen, agrees(prediction).into()]
            }),
        );
    }
    let _ = writeln!(page, "\n## Steps\n");
    table(
        &mut page,
        &["step", "importer", "outcome", "what", "s"],
        report.steps.iter().map(|step| {
            let took = match step.outcome {
                Outcome::LeftOut => "-".into(),
                _ => format!("{:.1}", step.took_ms / 1e3),
            };
            let importer = step.importer.clone().unwrap_or_default();
            [step.step.clone(), importer, step.outcome.words().into(), step.words.clone(), took]
        }),
    );
    let trouble: Vec<_> = report.steps.iter().filter(|step| step.outcome.is_trouble()).collect();
    if !trouble.is_empty() {
        let _ = writeln!(page, "\n## Look at these first\n");
        for step in trouble {
            let command = step.command.as_deref().map(|command| format!(" `{command}`")).unwrap_or_default();
            let _ = writeln!(page, "- {}: {}.{command}", step.name(), step.words.trim_end_matches('.'));
        }
    }
    let data = data.file_name().unwrap_or_default().display();
    let _ = writeln!(
        page,
        "\nEverything that was read and printed is in {data}. Serial numbers of cards, the names and numbers of machine and boot, \
         home folders, and what the kernel's command line says of other matters were left out of both files."
    );
    page
}

/// A table of Markdown. A row is one line, whatever is in its cells.
fn table<const N: usize>(page: &mut String, head: &[&str; N], rows: impl IntoIterator<Item = [String; N]>) {
    let _ = writeln!(page, "| {} |", head.join(" | "));
    let _ = writeln!(page, "|{}", "---|".repeat(N));
    for row in rows {
        let cell = |text: String| text.split_whitespace().collect::<Vec<_>>().join(" ").replace('|', "\\|");
        let _ = writeln!(page, "| {} |", row.map(cell).join(" | "));
    }
}

#[cfg(test)]
mod tests {
    use super::super::importer::tests::function;
    use super::super::report::tests::step;
    use super::*;

    #[test]
    fn a_page_names_trouble_first_and_keeps_its_tables_whole() {
        let lender = function("0000:01:00.0", Some("vfio-pci"), &[]);
        let null = serde_json::Value::Null;
        let mut broken = step("verify", Some("vulkan"), Outcome::Broke, null.clone());
        broken.words = "its process died\nby signal 11: a | b".into();
        let steps = vec![
            step("doctor", None, Outcome::Ok, null.clone()),
            broken,
            step("copies", None, Outcome::LeftOut, null),
        ];
        let page = of(&Report::new(&lender, &[], steps), Path::new("folder/box.json"));
        for part in [
            "1 ok, 1 BROKE, 1 left out.",
            "| lender | 0000:01:00.0 (1af4:1110), bound to vfio-pci |",
            "| importers | none was found |",
            "| verify | vulkan | BROKE | its process died by signal 11: a \\| b | 1.2 |",
            "| copies |  | left out | the words of copies | - |",
            "## Look at these first",
            "`peervram verify`",
            "is in box.json.",
        ] {
            assert!(page.contains(part), "{part:?} is not in\n{page}");
        }
        assert!(!page.contains("Predicted"), "nothing was predicted:\n{page}");
    }
}
