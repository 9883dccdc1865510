//! `KernelMessages`: what the kernel said about a pair when it decided, out of its log.
//!
//! The log is read once, from the oldest message on, without waiting. Who may not read
//! it is told so; a log that has run over has lost its oldest messages.

use std::io::{self, Read};

use peervram_backends::{KERNEL_LOG, KernelLog, Logged, PciAddress};

/// What the kernel says of peer-to-peer transfers: `calc_map_type_and_dist` and `__host_bridge_whitelist` in
/// `drivers/pci/p2pdma.c`.
const PEER_TO_PEER: [&str; 4] =
    ["peer-to-peer DMA", "ACS redirect is set", "to disable ACS redirect", "P2PDMA whitelist"];

/// The kernel's words when it refuses a pair.
const REFUSAL: &str = "cannot be used for peer-to-peer DMA";

/// What the kernel said of peer-to-peer transfers, or why that is not known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelMessages {
    lines: Vec<String>,
    unread: Option<String>,
}

impl KernelMessages {
    /// The messages of this machine since its boot.
    pub fn read() -> Self {
        match KernelLog::from_oldest().and_then(|mut log| lines_of(&mut log)) {
            Ok(lines) => Self { lines, unread: None },
            Err(error) => Self::not_read(format!("{KERNEL_LOG}: {error}")),
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

/// Those of the log that are about peers.
fn lines_of(log: &mut KernelLog<impl Read>) -> io::Result<Vec<String>> {
    let mut lines = Vec::new();
    for logged in log.unread() {
        match logged? {
            Logged::Message(line) if is_about_peers(&line) => lines.push(line),
            Logged::Message(_) | Logged::Lost => {}
        }
    }
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn only_what_is_about_peers_is_kept_of_the_log() {
        let record = b"4,7,1,-;pci 0000:02:00.0: ACS redirect is set\n SUBSYSTEM=pci\n";
        assert_eq!(
            lines_of(&mut KernelLog::of(&record[..])).unwrap(),
            ["pci 0000:02:00.0: ACS redirect is set"]
        );
        let record = b"4,7,1,-;pci 0000:02:00.0: BAR 0\n";
        assert!(lines_of(&mut KernelLog::of(&record[..])).unwrap().is_empty());
    }

    #[test]
    fn a_log_that_may_not_be_read_says_so() {
        let messages = KernelMessages::not_read("/dev/kmsg: Permission denied");
        assert!(messages.unread().unwrap().contains("denied"));
        assert!(messages.about(address("01:00.0"), address("02:00.0")).is_empty());
    }
}
