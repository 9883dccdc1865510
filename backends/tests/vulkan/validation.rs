//! Khronos' validation layers watch where they are asked for: a mistake ends the program.
#![expect(unsafe_code, reason = "a mistake, on purpose")]

use std::env;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;

use ash::vk;

use crate::application::Application;
use crate::machine::{device, host_pointer_device, skip};

/// Set in the process that makes the mistake.
const MISTAKE: &str = "PEERVRAM_TEST_MISTAKE";

const SIGTRAP: i32 = 5;

#[test]
fn a_mistake_ends_the_program_where_validation_is_required() {
    const TEST: &str = "validation::a_mistake_ends_the_program_where_validation_is_required";
    if env::var_os(MISTAKE).is_some() {
        return make_a_mistake(TEST);
    }
    if env::var_os("PEERVRAM_REQUIRE_VALIDATION").is_none_or(|value| value != "1") {
        return skip(TEST, "PEERVRAM_REQUIRE_VALIDATION is not set; `cargo xtask test` sets it")
            .unwrap_or(());
    }
    let _device = device(TEST).expect("validation watches a driver");
    let program = Command::new(env::current_exe().unwrap())
        .args(["--exact", TEST, "--nocapture"])
        .env(MISTAKE, "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&program.stdout);
    assert_eq!(program.status.signal(), Some(SIGTRAP), "it went on: {}\n{said}", program.status);
    assert!(said.contains("VUID-VkBufferCreateInfo-size-00912"), "it does not say why: {said}");
}

fn make_a_mistake(test: &str) {
    let Some(found) = host_pointer_device(test) else { return };
    let application = Application::with_queue_of(&found.description().name, 0);
    let info = vk::BufferCreateInfo::default().size(0).usage(vk::BufferUsageFlags::TRANSFER_SRC);
    // SAFETY: it is against VUID-VkBufferCreateInfo-size-00912, which is the point: validation ends the program here, and
    // the driver of a machine without it refuses, or makes a buffer that nobody uses.
    let _ = unsafe { application.device.create_buffer(&info, None) };
}
