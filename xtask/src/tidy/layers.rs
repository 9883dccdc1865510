//! Packages depend downwards only.

use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::collections::BTreeSet;

use super::Violation;

/// From the bottom up: a package depends on packages of layers below its own, or beside it.
const LAYERS: &[(&str, &[&str])] = &[
    ("mechanism", &["peervram-backends"]),
    ("families of devices", &["peervram-nvgrace"]),
    ("the library", &["peervram"]),
    ("what programs share", &["peervram-programs"]),
    (
        "models and their driver",
        &[
            "peervram-model",
            "peervram-model-driver",
            "peervram-lab-shim",
            "peervram-lab-layer",
            "peervram-lab-drm",
        ],
    ),
    ("the lab", &["peervram-lab"]),
    (
        "programs of ours",
        &[
            "peervram-cli",
            "peervram-lab-guest",
            "peervram-lab-gbm",
            "peervram-benches",
            "peervram-peer-copy",
            "peervram-samples",
        ],
    ),
    ("tasks", &["xtask"]),
];

/// Violations in what `cargo metadata` says.
pub fn check(metadata: &Value) -> Result<Vec<Violation>> {
    let packages = metadata["packages"].as_array().context("cargo metadata names no packages")?;
    let members: BTreeSet<&str> = packages.iter().filter_map(|package| package["name"].as_str()).collect();
    let layer = |name: &str| LAYERS.iter().position(|(_, packages)| packages.contains(&name));
    let mut violations = Vec::new();
    for package in packages {
        let name = package["name"].as_str().context("a package without a name")?;
        let Some(own) = layer(name) else {
            violations.push(Violation::new(name, "is in no layer: xtask/src/tidy/layers.rs lists them"));
            continue;
        };
        let dependencies = package["dependencies"].as_array().context("a package without dependencies")?;
        for dependency in dependencies {
            let on = dependency["name"].as_str().context("a dependency without a name")?;
            // Tests may look at anything.
            if !members.contains(on) || dependency["kind"] == "dev" {
                continue;
            }
            let Some(below) = layer(on) else { continue };
            if below > own {
                let (above, of) = (LAYERS[below].0, LAYERS[own].0);
                violations.push(Violation::new(name, format!("depends on {on}: {of} on {above}")));
            }
        }
    }
    for (_, names) in LAYERS {
        if let Some(gone) = names.iter().find(|name| !members.contains(**name)) {
            bail!("xtask/src/tidy/layers.rs lists {gone}, which is no package any more");
        }
    }
    Ok(violations)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn with(changed: &str, dependencies: Value) -> Value {
        let names = LAYERS.iter().flat_map(|(_, names)| names.iter());
        let package = |name: &&str| {
            let own = if *name == changed { dependencies.clone() } else { json!([]) };
            json!({ "name": name, "dependencies": own })
        };
        json!({ "packages": names.map(package).collect::<Vec<_>>() })
    }

    #[test]
    fn what_depends_upwards_is_found() {
        let upwards =
            check(&with("peervram-backends", json!([{ "name": "peervram", "kind": null }]))).unwrap();
        assert_eq!(upwards.len(), 1);
        assert!(upwards[0].to_string().contains("peervram-backends: depends on peervram"), "{upwards:?}");
        let tool = check(&with("peervram", json!([{ "name": "peervram-lab", "kind": null }]))).unwrap();
        assert_eq!(tool.len(), 1);
        let prints =
            check(&with("peervram-nvgrace", json!([{ "name": "peervram-programs", "kind": null }]))).unwrap();
        assert_eq!(prints.len(), 1);
    }

    #[test]
    fn downwards_tests_and_strangers_are_fine() {
        let fine = json!([
            { "name": "peervram-backends", "kind": null },
            { "name": "peervram-lab", "kind": "dev" },
            { "name": "serde", "kind": null },
        ]);
        assert_eq!(check(&with("peervram", fine)).unwrap(), []);
    }

    #[test]
    fn a_package_in_no_layer_is_found_and_so_is_a_layer_without_it() {
        let mut metadata = with("", json!([]));
        metadata["packages"].as_array_mut().unwrap().push(json!({ "name": "new", "dependencies": [] }));
        assert_eq!(check(&metadata).unwrap().len(), 1);
        metadata["packages"].as_array_mut().unwrap().remove(0);
        assert!(check(&metadata).is_err());
    }
}
