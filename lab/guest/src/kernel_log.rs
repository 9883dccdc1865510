//! The kernel's log, as it grows. Some importers fail late and say so only here.

use anyhow::{Context, Result};
use peervram::backends::{KERNEL_LOG, KernelLog, Logged};
use std::cell::RefCell;

/// What no test should make the kernel say.
const COMPLAINTS: &[&str] = &[
    // virtio-gpu: the host refused a command long after the ioctl succeeded.
    "*ERROR* response 0x12",
    "WARNING: ",
    "BUG: ",
    "Oops: ",
    "Call Trace:",
    // The same on arm64.
    "Call trace:",
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
pub struct NewMessages(RefCell<KernelLog>);

impl NewMessages {
    /// Begins at what is said from now on.
    pub fn from_now() -> Result<NewMessages> {
        Ok(NewMessages(RefCell::new(KernelLog::from_now().context(KERNEL_LOG)?)))
    }

    /// All messages since the last call.
    pub fn read(&self) -> Result<Vec<String>> {
        let text = |logged| match logged {
            Logged::Message(message) => message,
            Logged::Lost => "(some kernel messages were lost)".into(),
        };
        let mut log = self.0.borrow_mut();
        let messages: std::io::Result<Vec<String>> = log.unread().map(|logged| logged.map(text)).collect();
        messages.with_context(|| format!("reading {KERNEL_LOG}"))
    }
}

/// Whether a message is a complaint.
pub fn is_complaint(message: &str) -> bool {
    COMPLAINTS.iter().any(|part| message.contains(part))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn complaints_are_told_from_other_messages() {
        assert!(is_complaint("[drm:virtio_gpu_dequeue_ctrl_func] *ERROR* response 0x1200 (command 0x10c)"));
        assert!(!is_complaint("vfio-pci 0000:01:00.0: enabling device"));
    }
}
