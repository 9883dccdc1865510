//! The kernel's log, as it grows. Some importers fail late and say so only here.

use anyhow::{Context, Result};
use rustix::fs::{Mode, OFlags, SeekFrom};
use rustix::io::Errno;
use std::os::fd::OwnedFd;

/// What no test should make the kernel say.
const COMPLAINTS: &[&str] = &[
    // virtio-gpu: the host refused a command long after the ioctl succeeded.
    "*ERROR* response 0x12",
    "WARNING: ",
    "BUG: ",
    "Oops: ",
    "Call Trace:",
    "general protection fault",
    "UBSAN: ",
    "KASAN: ",
    "INFO: task ",
    "rcu: INFO: ",
    "[Fault reason",
    "unable to handle",
];

/// A reader of new messages.
#[derive(Debug)]
pub struct KernelLog {
    device: OwnedFd,
}

impl KernelLog {
    /// Begins at what is said from now on.
    pub fn open() -> Result<KernelLog> {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let device = rustix::fs::open("/dev/kmsg", flags, Mode::empty()).context("/dev/kmsg")?;
        rustix::fs::seek(&device, SeekFrom::End(0)).context("seeking in /dev/kmsg")?;
        Ok(KernelLog { device })
    }

    /// All messages since the last call.
    pub fn new_messages(&self) -> Result<Vec<String>> {
        let mut messages = Vec::new();
        let mut record = [0; 8192];
        loop {
            match rustix::io::read(&self.device, &mut record) {
                Ok(length) => messages.extend(message_in(&record[..length])),
                Err(Errno::AGAIN) => return Ok(messages),
                // Overwritten before it was read; the next read goes on behind it.
                Err(Errno::PIPE) => messages.push("(some kernel messages were lost)".into()),
                Err(error) => return Err(error).context("reading /dev/kmsg"),
            }
        }
    }
}

/// Whether a message is a complaint.
pub fn is_complaint(message: &str) -> bool {
    COMPLAINTS.iter().any(|part| message.contains(part))
}

/// The text of a record: "priority,sequence,time,flags;text\n KEY=value...". What programs wrote
/// there is no word of the kernel's; its facility, the upper bits of the priority, is not 0.
fn message_in(record: &[u8]) -> Option<String> {
    let record = String::from_utf8_lossy(record);
    let (head, rest) = record.split_once(';')?;
    let priority: u32 = head.split(',').next()?.parse().ok()?;
    (priority >> 3 == 0).then(|| rest.lines().next().unwrap_or_default().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_taken_apart() {
        let record = b"3,512,7000000,-;[drm:virtio_gpu_dequeue_ctrl_func] *ERROR* response 0x1200 \
                       (command 0x10c)\n SUBSYSTEM=pci\n DEVICE=+pci:0000:02:00.0\n";
        let message = message_in(record).unwrap();
        assert!(message.ends_with("(command 0x10c)"));
        assert!(is_complaint(&message));
        assert_eq!(message_in(b"12,513,7000001,-;said by a program"), None);
        assert!(!is_complaint("vfio-pci 0000:01:00.0: enabling device"));
    }
}
