//! What host and guest say to each other: JSON, one message a line.
//!
//! The host speaks [`Order`]s and the guest's agent answers with [`Event`]s, over the guest's
//! second serial port. A program that the agent runs may talk to the agent in the same words over
//! a Unix socket named by [`SOCKET_VARIABLE`]; see [`crate::vm::link`].
//!
//! ```text
//! guest: Ready                                  the agent is up
//! host:  Begin { facts }                        once
//! host:  Test { name }      guest: Tested { .. }          any number of these
//! host:  Run { program, ..} guest: Output .., Exited { .. }
//!        guest: Screendump  host: Screendump { .. }       in the middle of either
//!        guest: Control { } host: Control { .. }          so, too
//!        guest: Change(..)  host: Changed { .. }          so, too
//!        guest: Cell(..)                                  so, too, and nobody answers
//! ```

use peervram_model::request::{Answer, Request};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::{self, BufRead, Write};
use std::time::Duration;

use crate::machine::Facts;
use crate::vm::change::Change;

/// Environment variable with the path of the agent's socket, set for whatever the agent runs.
pub const SOCKET_VARIABLE: &str = "PEERVRAM_LAB_SOCKET";

/// Where the folder shared by host and guest is mounted in the guest.
pub const SHARE: &str = "/lab";

/// How long one test may run before the agent ends it.
pub const TEST_LIMIT: Duration = Duration::from_secs(120);

/// Host to guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// The machine that this is. The agent prepares it: binds the lender to vfio-pci.
    Begin {
        /// From the machine's row.
        facts: Facts,
    },
    /// Run the test of that name.
    Test {
        /// The test's full name.
        name: String,
    },
    /// Run a program.
    Run {
        /// Its path in the guest.
        program: String,
        /// Its arguments.
        arguments: Vec<String>,
        /// Environment variables on top of the agent's.
        environment: BTreeMap<String, String>,
    },
    /// A line for the standard input of the program that runs.
    Input {
        /// Without its line end.
        line: String,
    },
    /// The end of its standard input.
    EndOfInput,
    /// The answer to [`Event::Screendump`].
    Screendump {
        /// Where the picture lies in the guest, or why there is none.
        picture: Result<String, String>,
    },
    /// The answer to [`Event::Control`].
    Control {
        /// The model's, or why there is none.
        answer: Result<Answer, String>,
    },
    /// The answer to [`Event::Change`].
    Changed {
        /// Why not, if not.
        result: Result<(), String>,
    },
}

/// Guest to host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Event {
    /// The agent is up.
    Ready {
        /// The running kernel's release.
        release: String,
        /// Seconds since the kernel started.
        uptime_s: f64,
    },
    /// The machine is prepared, or cannot be.
    Begun {
        /// Why the machine could not be prepared.
        error: Option<String>,
    },
    /// A test is over.
    Tested {
        /// The test's full name.
        name: String,
        /// How it ended.
        verdict: Verdict,
        /// How long it ran.
        seconds: f64,
    },
    /// Please dump the screen.
    Screendump,
    /// A request to a model GPU, on its other side.
    Control {
        /// Its place in the machine's row.
        device: usize,
        /// What is asked.
        request: Request,
    },
    /// Please do something to a device.
    Change(Change),
    /// A cell of a table that the report prints.
    Cell(Cell),
    /// A line that the program wrote.
    Output {
        /// The destination.
        stream: Stream,
        /// Without its line end.
        line: String,
    },
    /// The program is over.
    Exited {
        /// Its exit code; 128 and the signal's number if it was killed.
        code: i32,
    },
}

/// A test, as the guest program lists it on the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listed {
    /// Its full name.
    pub name: String,
    /// Whether topology or IOMMU may decide how it comes out.
    pub is_of_a_topology: bool,
    /// Whether it runs only where its whole name is given.
    pub is_only_when_named: bool,
}

/// What a test found, for a table of the machine's report: which table, and where in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cell {
    /// The table's name.
    pub table: String,
    /// The row's name.
    pub row: String,
    /// The column's name.
    pub column: String,
    /// One line.
    pub text: String,
}

/// A program's output streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// How a test ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verdict", rename_all = "kebab-case")]
pub enum Verdict {
    /// The test passed.
    Passed,
    /// The test failed.
    Failed {
        /// What was seen.
        reason: String,
    },
    /// Not tried. A skip is not a pass.
    Skipped {
        /// What is missing.
        reason: String,
    },
}

/// Writes one message.
pub fn send(mut stream: impl Write, message: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    stream.flush()
}

/// Reads the next message; `None` at the end. Lines that are no message are passed over: a serial
/// port may carry what firmware or kernel said before the agent took it.
pub fn receive<M: for<'a> Deserialize<'a>>(mut stream: impl BufRead) -> io::Result<Option<M>> {
    let mut line = Vec::new();
    loop {
        line.clear();
        if stream.read_until(b'\n', &mut line)? == 0 {
            return Ok(None);
        }
        if let Ok(message) = serde_json::from_slice(&line) {
            return Ok(Some(message));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_survive() {
        let events = [
            Event::Ready { release: "7.3.4".into(), uptime_s: 6.5 },
            Event::Tested {
                name: "a/b".into(),
                verdict: Verdict::Failed { reason: "line one\nline \"two\"".into() },
                seconds: 0.25,
            },
            Event::Screendump,
            Event::Cell(Cell {
                table: "revoke".into(),
                row: "reset".into(),
                column: "virtio-gpu".into(),
                text: "right bytes".into(),
            }),
            Event::Control {
                device: 1,
                request: Request::Checksum { offset_bytes: u64::MAX, length_bytes: 1 },
            },
        ];
        let mut bytes = Vec::new();
        for event in &events {
            send(&mut bytes, event).unwrap();
        }
        let mut reader = bytes.as_slice();
        for event in events {
            assert_eq!(receive::<Event>(&mut reader).unwrap(), Some(event));
        }
        assert_eq!(receive::<Event>(&mut reader).unwrap(), None);
    }

    #[test]
    fn noise_is_passed_over() {
        let mut reader = &b"SeaBIOS\r\n\xff\xfe\n\"screendump\"\n"[..];
        assert_eq!(receive(&mut reader).unwrap(), Some(Event::Screendump));
    }
}
