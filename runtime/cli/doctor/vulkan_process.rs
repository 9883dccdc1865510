//! Asks Vulkan in a process of its own: a driver that is broken ends that one, not the page.

use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use peervram::backends::vulkan::{Instance, PhysicalDevice};
use peervram::{Kind, Result};

use super::facts::{Vulkan, VulkanDevice};
use crate::child::{self, How};

/// How long drivers may take to load. Emulated machines take some seconds.
const LIMIT: Duration = Duration::from_secs(60);

/// What Vulkan says, asked by a child of this process.
pub fn ask() -> Vulkan {
    let hear = |mut program: Command| hear(program.args(["doctor", "--ask-vulkan"]).stderr(Stdio::null()));
    child::this_program().and_then(hear).unwrap_or_else(ask_here)
}

/// The child's part: one line, since a driver or a layer may print lines of its own.
pub fn answer() -> anyhow::Result<ExitCode> {
    peervram_programs::say!("{}", serde_json::to_string(&ask_here())?);
    Ok(ExitCode::SUCCESS)
}

/// What a child says; none where it cannot be started.
fn hear(command: &mut Command) -> Option<Vulkan> {
    let ended = child::run(command, LIMIT).ok()?;
    if let Some(vulkan) = ended.output.lines().rev().find_map(|line| serde_json::from_str(line).ok()) {
        return Some(vulkan);
    }
    let why = match ended.how {
        How::Exited(code) => format!("the loader or a driver ended the program, with code {code}"),
        How::Signal(signal) => format!("the loader or a driver died by signal {signal}"),
        How::TimedOut | How::Stuck(_) => format!("no answer within {} s", LIMIT.as_secs()),
    };
    Some(Vulkan::Broken { why })
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
        hear(Command::new("sh").args(["-c", script])).unwrap()
    }

    #[test]
    fn a_driver_that_dies_is_named_as_broken() {
        assert!(matches!(said_by("kill -SEGV $$"), Vulkan::Broken { why } if why.contains("signal 11")));
        assert!(matches!(said_by("exit 3"), Vulkan::Broken { why } if why.contains("with code 3")));
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
