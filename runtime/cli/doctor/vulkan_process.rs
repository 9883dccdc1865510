//! Asks Vulkan in a process of its own: a driver that is broken ends that one, not the page.

use std::io::Read as _;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use peervram::backends::vulkan::{Instance, PhysicalDevice};
use peervram::{Kind, Result};

use super::facts::{Vulkan, VulkanDevice};

/// How long drivers may take to load. Emulated machines take some seconds.
const LIMIT: Duration = Duration::from_secs(60);

/// What Vulkan says, asked by a child of this process.
pub fn ask() -> Vulkan {
    // Without /proc there is no path of this program but the one that it was started by.
    let program = std::env::current_exe().ok().or_else(|| std::env::args_os().next().map(Into::into));
    let child = program.and_then(|program| {
        Command::new(program)
            .args(["doctor", "--ask-vulkan"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .ok()
    });
    match child {
        Some(child) => hear(child),
        None => ask_here(),
    }
}

/// The child's part: one line, since a driver or a layer may print lines of its own.
pub fn answer() -> anyhow::Result<ExitCode> {
    peervram_programs::say!("{}", serde_json::to_string(&ask_here())?);
    Ok(ExitCode::SUCCESS)
}

fn hear(mut child: Child) -> Vulkan {
    let output = child.stdout.take();
    let reader = thread::spawn(move || {
        let mut text = String::new();
        let _ = output.map(|mut output| output.read_to_string(&mut text));
        text
    });
    let Some(status) = end_of(&mut child) else {
        return Vulkan::Broken { why: format!("no answer within {} s", LIMIT.as_secs()) };
    };
    let text = reader.join().unwrap_or_default();
    match text.lines().rev().find_map(|line| serde_json::from_str(line).ok()) {
        Some(vulkan) => vulkan,
        None => {
            let why = match status.signal() {
                Some(signal) => format!("the loader or a driver died by signal {signal}"),
                None => format!("the loader or a driver ended the program, {status}"),
            };
            Vulkan::Broken { why }
        }
    }
}

/// None where it had to be killed.
fn end_of(child: &mut Child) -> Option<ExitStatus> {
    let deadline = Instant::now() + LIMIT;
    while Instant::now() < deadline {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status),
            Ok(None) => thread::sleep(Duration::from_millis(5)),
            Err(_) => break,
        }
    }
    // It may be gone by now, which is as good.
    let _ = child.kill();
    let _ = child.wait();
    None
}

fn ask_here() -> Vulkan {
    let devices = || -> Result<Vec<VulkanDevice>> {
        Ok(Instance::open()?.physical_devices()?.into_iter().map(VulkanDevice::from).collect())
    };
    match devices() {
        Ok(devices) if devices.is_empty() => Vulkan::Missing { why: "no driver lists a device".into() },
        Ok(devices) => Vulkan::Devices(devices),
        Err(error) if error.kind() == Kind::VulkanMissing => Vulkan::Missing { why: error.why().to_owned() },
        Err(error) => Vulkan::Broken { why: error.why().to_owned() },
    }
}

impl From<PhysicalDevice> for VulkanDevice {
    fn from(device: PhysicalDevice) -> Self {
        Self {
            driver: format!("{} {}", device.driver_name, device.driver_version).trim().to_owned(),
            pci_address: device.pci_address,
            is_cpu: device.is_cpu,
            imports_dma_bufs: device.imports_foreign_dma_bufs(),
            exports_dma_bufs: device.can_export_dma_buf,
            imports_host_pointers: device.host_pointer_alignment_bytes.is_some(),
            name: device.name,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said_by(script: &str) -> Vulkan {
        hear(Command::new("sh").args(["-c", script]).stdout(Stdio::piped()).spawn().unwrap())
    }

    #[test]
    fn a_driver_that_dies_is_named_as_broken() {
        assert!(matches!(said_by("kill -SEGV $$"), Vulkan::Broken { why } if why.contains("signal 11")));
        assert!(matches!(said_by("exit 3"), Vulkan::Broken { why } if why.contains("exit status: 3")));
    }

    #[test]
    fn lines_of_a_driver_are_passed_over() {
        let said = said_by(r#"echo "MESA: a warning"; echo '{"missing":{"why":"no loader"}}'; echo bye"#);
        assert!(matches!(said, Vulkan::Missing { why } if why == "no loader"));
    }

    #[test]
    fn an_answer_is_believed() {
        let said = said_by(r#"echo '{"missing":{"why":"no loader"}}'"#);
        assert!(matches!(said, Vulkan::Missing { why } if why == "no loader"));
    }
}
