//! `Stuck`: a revoking call that does not come back, and what it waits for.
//!
//! The kernel waits for importers without a limit, and not even a kill ends that (seen on Linux 7.3).

use std::fmt;
use std::time::Duration;

use crate::{Error, Kind};

/// A call that has not come back.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Stuck {
    /// The device, or devices.
    pub device: String,
    /// What was tried.
    pub tried: &'static str,
    /// For how long.
    pub waited: Duration,
    /// Who had its memory imported before the call: importers of this process, and devices attached to
    /// dma-bufs that were handed out.
    pub importers: Vec<String>,
    /// Which other processes hold those dma-bufs, and which have the nodes of those devices open: one of
    /// them has the import, where it is not a driver's own.
    pub processes: Vec<String>,
    /// Where in the kernel the call is, innermost first.
    pub stack: Vec<String>,
    /// What could not be found out, and why.
    pub unread: Vec<String>,
}

impl Stuck {
    /// The same as an error.
    pub fn error(&self) -> Error {
        let mut why = format!("the kernel has not come back for {} ms", self.waited.as_millis());
        for (what, list) in [("it is imported by", &self.importers), ("of the processes,", &self.processes)] {
            if !list.is_empty() {
                why.push_str(&format!("; {what} {}", list.join(", ")));
            }
        }
        Error::new(Kind::Stuck, self.tried, why).on(&self.device).next(
            "end what holds the import, or have it unmap: the call then ends by itself. It cannot be killed, \
             and nothing of this device can be used until then",
        )
    }
}

impl fmt::Display for Stuck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.error())?;
        for (what, lines) in [("in the kernel", &self.stack), ("not known", &self.unread)] {
            if !lines.is_empty() {
                write!(f, "\n  {what}: {}", lines.join("\n    "))?;
            }
        }
        Ok(())
    }
}
