//! Drivers that this machine does not have: the lab's layer makes the one that it has seem to be them.
//!
//! A layer is chosen by environment variables that the loader reads, so a test that wants a pretence runs itself again, in a
//! process that has it.
#![expect(unsafe_code, reason = "what a driver says, asked by an application")]

use std::env;
use std::process::Command;

use ash::vk;
use peervram_lab_layer::{NAME, VARIABLE, layer_path, manifest};

use crate::application::Application;
use crate::machine::{device, host_pointer_device};

/// Whether this process has that pretence.
pub fn pretends(what: &str) -> bool {
    env::var(VARIABLE).is_ok_and(|words| words.split(',').any(|word| word == what))
}

/// Whether this process has that pretence and no other. If it has not, runs the test of that path again in one that has, and it has
/// passed there.
pub fn in_pretence(what: &str, test: &str) -> bool {
    if env::var(VARIABLE).is_ok_and(|words| words == what) {
        return true;
    }
    if device(test).is_some() {
        run_in_pretence(what, &["--exact", test]);
    }
    false
}

/// Runs this program again, with those words for the test harness.
fn run_in_pretence(what: &str, words: &[&str]) {
    let program = env::current_exe().unwrap();
    let library = program.with_file_name("libpeervram_lab_layer.so");
    assert!(library.exists(), "cargo builds it beside the tests: {}", library.display());
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("pretend.json"), manifest(&library)).unwrap();
    let mut layers = env::var_os("VK_INSTANCE_LAYERS").unwrap_or_default();
    if !layers.is_empty() {
        layers.push(":");
    }
    layers.push(NAME);
    let output = Command::new(program)
        .args(words)
        .args(["--nocapture", "--test-threads=2"])
        .env("VK_INSTANCE_LAYERS", layers)
        .env("VK_LAYER_PATH", layer_path(folder.path()))
        .env(VARIABLE, what)
        .output()
        .unwrap();
    let (said, complained) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{what}: {}\n{said}{complained}", output.status);
    assert!(!said.contains(" 0 passed"), "{what}: no test is named {words:?}\n{said}");
}

#[test]
fn all_of_it_holds_on_a_driver_with_a_transfer_queue() {
    all_of_it_holds("transfer-queue", "all_of_it_holds_on_a_driver_with_a_transfer_queue");
}

#[test]
fn all_of_it_holds_on_a_driver_that_wants_memory_dedicated() {
    all_of_it_holds("dedicated-only", "all_of_it_holds_on_a_driver_that_wants_memory_dedicated");
}

/// Every other test of this program. Those that pretend by themselves have a process of their own already.
fn all_of_it_holds(what: &str, test: &str) {
    if env::var_os(VARIABLE).is_some() || device(test).is_none() {
        return;
    }
    let others = ["all_of_it_holds", "what_is_pretended", "a_queue_that_only_transfers"];
    run_in_pretence(what, &others.map(|name| ["--skip", name]).concat());
}

#[test]
fn what_is_pretended_is_what_an_application_sees() {
    const TEST: &str = "pretended::what_is_pretended_is_what_an_application_sees";
    if !in_pretence("transfer-queue,dedicated-only", TEST) {
        return;
    }
    let Some(found) = host_pointer_device(TEST) else { return };
    let application = Application::with_queue_of(&found.description().name, 0);
    let Application { instance, physical, .. } = &application;
    // SAFETY: the instance lives, and the device is one of its.
    let families = unsafe { instance.get_physical_device_queue_family_properties(*physical) };
    let last = families.last().unwrap();
    assert!(families.len() > 1 && last.queue_flags == vk::QueueFlags::TRANSFER);
    let asked = vk::PhysicalDeviceExternalBufferInfo::default()
        .usage(vk::BufferUsageFlags::STORAGE_BUFFER)
        .handle_type(vk::ExternalMemoryHandleTypeFlags::OPAQUE_FD);
    let mut answer = vk::ExternalBufferProperties::default();
    // SAFETY: as above, and the structures outlive the call.
    unsafe { instance.get_physical_device_external_buffer_properties(*physical, &asked, &mut answer) };
    let features = answer.external_memory_properties.external_memory_features;
    assert!(features.contains(vk::ExternalMemoryFeatureFlags::DEDICATED_ONLY));
}
