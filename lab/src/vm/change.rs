//! What happens to a device from outside while its machine runs: it is taken out, put in, or its port
//! reports an error. QEMU is told; what the kernel makes of it comes later.

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::thread;
use std::time::{Duration, Instant};

use crate::machine::{Device, Machine};
use crate::vm::qmp::Qmp;

/// From the moment that the guest sees nothing in a slot. Linux waits a second for the power to settle.
const OUT_LIMIT: Duration = Duration::from_secs(10);

/// A change to a device, named by its place in the machine's row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Change {
    /// Somebody presses the button of its slot, to take it out. The kernel gives them five seconds to think
    /// better of it, has its driver let go, for as long as that takes, and switches the slot off; then the
    /// device is out.
    Unplug(usize),
    /// A device of the same kind is put into its slot, with memory of zeros.
    Plug(usize),
    /// The port above it reports an error that is no device's fault in particular.
    PortError(usize, Severity),
}

/// How bad an uncorrectable PCI Express error is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// A transaction was lost (a completion never came); the link works on.
    NonFatal,
    /// The link cannot be relied on (data link protocol error): the kernel resets it.
    Fatal,
}

impl Severity {
    /// QEMU's word for an error that is so by default.
    fn qemu_error(self) -> &'static str {
        match self {
            Severity::NonFatal => "COMP_TIME",
            Severity::Fatal => "DLP",
        }
    }
}

impl Change {
    /// Tells QEMU. What is put in has its `life`-th life; the machine began with the first, 0. An error is
    /// QEMU's refusal.
    pub(crate) fn make(self, machine: &Machine, life: u32, qmp: &mut Qmp) -> Result<()> {
        match self {
            Change::Unplug(index) => {
                slot(machine, index)?;
                qmp.execute("device_del", json!({ "id": Device::qemu_name(index, 0) })).map(drop)
            }
            Change::Plug(index) => {
                let device = slot(machine, index)?;
                wait_until_out(qmp, index)?;
                // With memory of its own: a name that ivshmem has had is QEMU's end if it comes again.
                for memory in device.qemu_memories(index, life) {
                    order(qmp, &format!("object_add {memory}"))?;
                }
                // The first function last: with it the slot is told that something is there.
                let functions = device.qemu_functions(index, machine.topology, life);
                functions.iter().rev().try_for_each(|function| order(qmp, &format!("device_add {function}")))
            }
            Change::PortError(index, severity) => {
                let error = severity.qemu_error();
                device(machine, index)?;
                let said = qmp.human(&format!("pcie_aer_inject_error port{index} {error}"))?;
                if !said.starts_with("OK") {
                    bail!("QEMU refuses the error {error} at port {index}: {}", said.trim());
                }
                Ok(())
            }
        }
    }
}

/// Waits until QEMU has let a device go: the guest sees it vanish a second before it switches the slot off.
fn wait_until_out(qmp: &mut Qmp, index: usize) -> Result<()> {
    let start = Instant::now();
    loop {
        let known = qmp.execute("qom-list", json!({ "path": "/machine/peripheral" }))?;
        let known = known.as_array().context("QEMU lists no devices")?;
        let prefix = Device::qemu_name(index, 0);
        let prefix = prefix.trim_end_matches('0');
        let is_it = |object: &Value| object["name"].as_str().is_some_and(|name| name.starts_with(prefix));
        if !known.iter().any(is_it) {
            return Ok(());
        }
        if start.elapsed() > OUT_LIMIT {
            bail!("device {index} is still in its slot; unplug it, and have its user close it, first");
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// A command of the monitor for people that says nothing if all is well.
fn order(qmp: &mut Qmp, line: &str) -> Result<()> {
    let said = qmp.human(line)?;
    if !said.trim().is_empty() {
        bail!("QEMU refuses `{line}`: {}", said.trim());
    }
    Ok(())
}

fn device(machine: &Machine, index: usize) -> Result<Device> {
    machine.devices.get(index).copied().with_context(|| format!("{} has no device {index}", machine.name))
}

/// A device that can be taken out.
fn slot(machine: &Machine, index: usize) -> Result<Device> {
    if !machine.hotplug {
        bail!("{} has no slots for hot-plugging: its row says so", machine.name);
    }
    let device = device(machine, index)?;
    if device.is_model() {
        bail!(
            "QEMU 11.1 aborts a second after a vfio-user device was unplugged \
             (memory_region_del_subregion); ask the model itself to be removed, by surprise"
        );
    }
    Ok(device)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machines::named;
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::net::UnixStream;

    /// What QEMU is asked for a change, if it answers so.
    fn asked(change: Change, answers: &[&str]) -> (Result<()>, Vec<Value>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let lines = ["{\"QMP\":{}}", "{\"return\":{}}"].iter().chain(answers);
        lines.for_each(|line| writeln!(&theirs, "{line}").unwrap());
        let mut qmp = Qmp::new(ours).unwrap();
        let result = change.make(named("small-revoke").unwrap(), 1, &mut qmp);
        drop(qmp);
        let lines = BufReader::new(theirs).lines().map(|line| serde_json::from_str(&line.unwrap()).unwrap());
        (result, lines.skip(1).collect())
    }

    #[test]
    fn twins_are_put_in_with_the_first_last() {
        let nothing = "{\"return\":\"\"}";
        let others = "{\"return\":[{\"name\":\"device4.0\"},{\"name\":\"port5\"}]}";
        let (result, asked) = self::asked(Change::Plug(5), &[&[others][..], &[nothing; 4]].concat());
        result.unwrap();
        let lines = asked.iter().filter_map(|asked| asked["arguments"]["command-line"].as_str());
        let lines: Vec<&str> = lines.filter(|line| !line.starts_with("object_")).collect();
        assert!(
            lines[0].starts_with("device_add ivshmem-plain,memdev=vram5.1.1,")
                && lines[0].ends_with("addr=0.1")
        );
        assert!(lines[1].ends_with("addr=0.0,multifunction=on"));
    }

    #[test]
    fn refusals_are_errors_with_qemus_words() {
        let (result, _) =
            asked(Change::PortError(0, Severity::Fatal), &["{\"return\":\"no such port\\r\\n\"}"]);
        assert!(format!("{:#}", result.unwrap_err()).ends_with("port 0: no such port"));
        let (result, asked) = self::asked(Change::Unplug(9), &[]);
        assert!(asked.is_empty() && format!("{:#}", result.unwrap_err()).contains("no device 9"));
        let (result, asked) = self::asked(Change::Unplug(2), &[]);
        assert!(asked.is_empty() && format!("{:#}", result.unwrap_err()).contains("vfio-user"));
    }
}
