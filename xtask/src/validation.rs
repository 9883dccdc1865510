//! Khronos' validation layers under what runs on this machine.

use anyhow::{Context, Result, ensure};
use peervram_lab::host::Missing;
use peervram_lab::report::Counts;
use peervram_lab::{Lab, validation};
use std::ffi::OsString;
use std::fs;
use std::path::Path;

use crate::build;
use crate::test::count;

/// Where the layer's settings are.
const FOLDER: &str = "target/validation";

/// What this machine lacks for it.
pub fn missing() -> Vec<Missing> {
    if is_there() {
        return Vec::new();
    }
    vec![Missing {
        packages: &[validation::PACKAGE],
        why: "looks at every call of Vulkan that the tests make",
    }]
}

/// Whether the layer is installed.
pub fn is_there() -> bool {
    ["/etc/vulkan", "/usr/local/share/vulkan", "/usr/share/vulkan"]
        .iter()
        .any(|place| Path::new(place).join(validation::MANIFEST).exists())
}

/// What programs of this machine are started with to be watched.
pub fn environment() -> Result<Vec<(&'static str, OsString)>> {
    fs::create_dir_all(FOLDER).with_context(|| format!("making the folder {FOLDER}"))?;
    let settings = std::path::absolute(Path::new(FOLDER).join(validation::SETTINGS))?;
    fs::write(&settings, validation::settings("stdout"))
        .with_context(|| format!("writing {}", settings.display()))?;
    Ok(validation::environment(&settings).into())
}

/// The tests of Vulkan's backend by the private root's driver and layers, which are newer than this machine's may be, and
/// take dma-bufs.
pub fn tests_in_root(lab: &Lab) -> Result<Counts> {
    let folder = tempfile::tempdir().context("making a folder")?;
    let place = |name: &str| folder.path().join(name);
    // They look for it beside themselves.
    fs::copy(&lab.programs().layer, place("libpeervram_lab_layer.so")).context("copying the layer")?;
    fs::write(place(validation::SETTINGS), validation::settings("stdout"))?;
    let mut sum = Counts::default();
    for program in build::vulkan_tests()? {
        fs::copy(&program, place("tests")).context("copying a program of tests")?;
        // QEMU finds an empty file there for udmabuf, which here would be a broken one.
        let script = "rm -f /dev/udmabuf; exec /lab/tests --show-output";
        let output = lab
            .command_in_root(folder.path(), "/bin/sh")
            .args(["-c", script])
            .envs(validation::environment(&Path::new("/lab").join(validation::SETTINGS)))
            .env("VK_DRIVER_FILES", "/usr/share/vulkan/icd.d/lvp_icd.json")
            .env_remove("VK_LAYER_PATH")
            .env_remove("TMPDIR")
            .env("PEERVRAM_REQUIRE_VULKAN", "1")
            .env("PEERVRAM_REQUIRE_VALIDATION", "1")
            .output()
            .context("starting unshare")?;
        let (text, complaints) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        ensure!(!text.is_empty(), "a program of tests said nothing: {complaints}");
        let said = format!("{text}{complaints}");
        let mut counts = count(&said, 0);
        if output.status.success() {
            said.lines()
                .filter(|line| line.starts_with("skipped: "))
                .for_each(|line| peervram_programs::say!("{line}"));
        } else {
            peervram_programs::say!("{said}");
            counts.failed = counts.failed.max(1);
        }
        sum.passed += counts.passed;
        sum.failed += counts.failed;
        sum.skipped += counts.skipped;
    }
    Ok(sum)
}
