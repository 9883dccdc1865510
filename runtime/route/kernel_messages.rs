//! `KernelMessages`: what the kernel said about a pair when it decided, out of its log.
//!
//! Reads `/dev/kmsg` once, from the oldest message on, without waiting, and changes nothing. Who may not read
//! it is told so; a log that has run over has lost its oldest messages.

use std::fs::OpenOptions;
use std::io::{ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;

use peervram_backends::PciAddress;
use rustix::fs::OFlags;

/// What the kernel says of peer-to-peer transfers: `calc_map_type_and_dist` and `__host_bridge_whitelist` in
/// `drivers/pci/p2pdma.c`.
const PEER_TO_PEER: [&str; 4] =
    ["peer-to-peer DMA", "ACS redirect is set", "to disable ACS redirect", "P2PDMA whitelist"];

/// The kernel's words when it refuses a pair.
const REFUSAL: &str = "cannot be used for peer-to-peer DMA";

/// Longer than any record, `PRINTK_MESSAGE_MAX`.
const RECORD_BYTES: usize = 8192;
/// No log has more; a reader that is fed forever ends all the same.
const RECORDS_MAX: usize = 1 << 20;

/// What the kernel said of peer-to-peer transfers, or why that is not known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelMessages {
    lines: Vec<String>,
    unread: Option<String>,
}

impl KernelMessages {
    /// The messages of this machine since its boot.
    pub fn read() -> Self {
        let flags = OFlags::NONBLOCK.bits() as i32;
        let opened = OpenOptions::new().read(true).custom_flags(flags).open("/dev/kmsg");
        match opened.and_then(read_lines) {
            Ok(lines) => Self { lines, unread: None },
            Err(error) => Self::not_read(format!("/dev/kmsg: {error}")),
        }
    }

    /// None, and why.
    pub fn not_read(why: impl Into<String>) -> Self {
        Self { lines: Vec::new(), unread: Some(why.into()) }
    }

    /// The messages in a text of the log, one per line.
    pub fn in_text(text: &str) -> Self {
        let lines = text.lines().filter(|line| is_about_peers(line)).map(str::to_owned).collect();
        Self { lines, unread: None }
    }

    /// Why they were not read.
    pub fn unread(&self) -> Option<&str> {
        self.unread.as_deref()
    }

    /// What was said of this pair, the oldest first, repetitions left out.
    pub fn about(&self, provider: PciAddress, client: PciAddress) -> Vec<&str> {
        let (provider, client) = (provider.to_string(), client.to_string());
        let mut said: Vec<&str> = Vec::new();
        // The parameter to add is said of the pair that the line before names, and names the client alone.
        let mut names_pair = false;
        for line in self.lines.iter().map(String::as_str) {
            if !line.contains(&format!("{client}:")) {
                continue;
            }
            let is_hint = line.contains("to disable ACS redirect");
            if !is_hint {
                names_pair = line.contains(&provider);
            }
            if names_pair {
                // A repeated message keeps its last place only.
                said.retain(|before| *before != line);
                said.push(line);
            }
        }
        said
    }

    /// Whether it has refused this pair.
    pub fn refused(&self, provider: PciAddress, client: PciAddress) -> bool {
        self.about(provider, client).iter().any(|line| line.contains(REFUSAL))
    }
}

fn is_about_peers(line: &str) -> bool {
    PEER_TO_PEER.iter().any(|words| line.contains(words))
}

fn read_lines(mut device: impl Read) -> std::io::Result<Vec<String>> {
    let mut lines = Vec::new();
    let mut record = [0; RECORD_BYTES];
    for _ in 0..RECORDS_MAX {
        match device.read(&mut record) {
            Ok(0) => break,
            Ok(length) => lines.extend(message_in(&record[..length]).filter(|line| is_about_peers(line))),
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            // Overwritten before it was read; the next read goes on behind it.
            Err(error) if matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::Interrupted) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(lines)
}

/// The text of a record: "priority,sequence,time,flags;text\n KEY=value...". What programs wrote there, of
/// another facility than 0, is no word of the kernel's.
fn message_in(record: &[u8]) -> Option<String> {
    let record = String::from_utf8_lossy(record);
    let (head, rest) = record.split_once(';')?;
    let priority: u32 = head.split(',').next()?.parse().ok()?;
    (priority >> 3 == 0).then(|| rest.lines().next().unwrap_or_default().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn address(text: &str) -> PciAddress {
        text.parse().unwrap()
    }

    #[test]
    fn what_was_said_of_a_pair_is_found() {
        const REFUSED: &str = "virtio-pci 0000:02:00.0: cannot be used for peer-to-peer DMA as the client and provider \
                               (0000:01:00.0) do not share an upstream bridge or whitelisted host bridge";
        const SET: &str =
            "virtio-pci 0000:02:00.0: ACS redirect is set between the client and provider (0000:01:00.0)";
        const HINT: &str = "virtio-pci 0000:02:00.0: to disable ACS redirect for this path, add the kernel \
                            parameter: pci=disable_acs_redir=0000:00:02.0";
        // Of the same client and another provider.
        let others =
            format!("{SET}\n{HINT}").replace("0000:01:00.0", "0000:03:00.0").replace("00:02.0", "00:03.0");
        let said = [SET, HINT, REFUSED].join("\n");
        let messages =
            KernelMessages::in_text(&format!("pci 0000:02:00.0: BAR 0\n{said}\n{others}\n{said}\n{others}"));
        let (a, b, c) = (address("01:00.0"), address("02:00.0"), address("03:00.0"));
        assert_eq!(messages.about(a, b), [SET, HINT, REFUSED]);
        assert_eq!(messages.about(c, b), others.lines().collect::<Vec<_>>());
        assert!(messages.refused(a, b) && !messages.refused(b, a) && !messages.refused(a, c));
        assert!(messages.about(c, a).is_empty());
    }

    #[test]
    fn records_are_taken_apart() {
        let kernel = b"4,7,1,-;pci 0000:02:00.0: ACS redirect is set\n SUBSYSTEM=pci\n";
        assert_eq!(message_in(kernel).as_deref(), Some("pci 0000:02:00.0: ACS redirect is set"));
        assert_eq!(message_in(b"12,8,1,-;peer-to-peer DMA, says a program"), None);
    }

    #[test]
    fn a_log_that_may_not_be_read_says_so() {
        let messages = KernelMessages::not_read("/dev/kmsg: Permission denied");
        assert!(messages.unread().unwrap().contains("denied"));
        assert!(messages.about(address("01:00.0"), address("02:00.0")).is_empty());
    }

    proptest! {
        #[test]
        fn any_record_is_survived(record in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = message_in(&record);
        }
    }
}
