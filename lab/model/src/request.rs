//! What is said over the control socket: requests and their answers. Pure; the socket is
//! [`crate::control`]'s.
//!
//! One line of JSON each:
//!
//! | line | does |
//! |---|---|
//! | `{"do":"misbehave","what":"all-ones"}` | adds a fault; see [`Misbehaviour`] for the names |
//! | `{"do":"misbehave","what":"slow-reset","ms":800}` | the same with a parameter |
//! | `{"do":"behave"}` | takes all faults back |
//! | `{"do":"remove"}`, `{"do":"insert"}` | surprise removal, and its end |
//! | `{"do":"raise-error"}` | latches an error and raises its interrupt |
//! | `{"do":"status"}` | nothing |
//! | `{"do":"read","offset_bytes":0,"length_bytes":16}` | looks at VRAM, past BAR and engine |
//! | `{"do":"checksum","offset_bytes":0,"length_bytes":4096}` | the same, of any length |
//!
//! The answer is `{"ok":true,"status":{..}}`, with `"hex"` after a read and `"checksum"` after a
//! checksum, or `{"ok":false,"error":".."}`.
//!
//! This module needs nothing of the device, so that a program in a guest can share it
//! (`default-features = false, features = ["requests"]`).

use serde::{Deserialize, Serialize};

use crate::misbehaviour::{Faults, Misbehaviour};

/// The most bytes of one [`Request::Read`].
pub const READ_BYTES_MAX: u64 = 4096;

/// What can be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "kebab-case")]
pub enum Request {
    /// Add a fault.
    Misbehave(Misbehaviour),
    /// Take all faults back.
    Behave,
    /// Remove the device.
    Remove,
    /// Put it back.
    Insert,
    /// Raise an error.
    RaiseError,
    /// Tell how it is.
    Status,
    /// Show bytes of VRAM as this process has them, whatever the device says of itself.
    Read {
        /// Offset in VRAM.
        offset_bytes: u64,
        /// At most [`READ_BYTES_MAX`].
        length_bytes: u64,
    },
    /// The checksum of such bytes: over little-endian 32-bit words, the sum of `word[i] * (2 i + 1)`
    /// modulo 2^32, the last word filled up with zeros.
    Checksum {
        /// Offset in VRAM.
        offset_bytes: u64,
        /// Any length.
        length_bytes: u64,
    },
}

/// What is answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Answer {
    /// It was not done.
    Refused {
        /// False.
        ok: bool,
        /// Why, and what would have been right.
        error: String,
    },
    /// It was done, and has taken effect.
    Done {
        /// True.
        ok: bool,
        /// What was found.
        #[serde(flatten)]
        findings: Findings,
    },
}

/// What a request that was done has found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Findings {
    /// How the device is.
    pub status: Status,
    /// After [`Request::Read`]: the bytes, two digits each.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hex: Option<String>,
    /// After [`Request::Checksum`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checksum: Option<u32>,
}

/// How the device is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Resets so far.
    pub generation: u32,
    /// Whether it answers.
    pub present: bool,
    /// What is wrong.
    pub faults: Faults,
    /// DMA windows.
    pub windows: usize,
    /// Different files behind them.
    pub files: usize,
}

impl Answer {
    /// It was done.
    pub fn done(findings: Findings) -> Answer {
        Answer::Done { ok: true, findings }
    }

    /// It was not, for this reason.
    pub fn refused(error: impl Into<String>) -> Answer {
        Answer::Refused { ok: false, error: error.into() }
    }

    /// What was found, or why nothing was done.
    ///
    /// # Errors
    /// The model's reason.
    pub fn into_result(self) -> Result<Findings, String> {
        match self {
            Answer::Done { findings, .. } => Ok(findings),
            Answer::Refused { error, .. } => Err(error),
        }
    }
}

impl Findings {
    /// The bytes of a read; `None` where there are none, or no whole ones.
    pub fn bytes(&self) -> Option<Vec<u8>> {
        let (pairs, rest) = self.hex.as_deref()?.as_bytes().as_chunks::<2>();
        let digit = |byte: u8| char::from(byte).to_digit(16);
        let byte = |[high, low]: &[u8; 2]| u8::try_from(digit(*high)? << 4 | digit(*low)?).ok();
        if rest.is_empty() { pairs.iter().map(byte).collect() } else { None }
    }
}

/// Bytes as a read answers them.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn findings(hex: Option<String>) -> Findings {
        let status = Status { generation: 3, present: true, faults: Faults::default(), windows: 0, files: 0 };
        Findings { status, hex, checksum: None }
    }

    #[test]
    fn answers_survive_the_line() {
        for answer in [Answer::done(findings(Some(hex(&[0, 0xab, 255])))), Answer::refused("no")] {
            let line = serde_json::to_string(&answer).unwrap();
            assert_eq!(serde_json::from_str::<Answer>(&line).unwrap(), answer, "{line}");
        }
        assert_eq!(Answer::refused("no").into_result(), Err("no".into()));
    }

    #[test]
    fn bytes_are_read_back() {
        assert_eq!(findings(Some(hex(&[0, 0xab, 255]))).bytes(), Some(vec![0, 0xab, 255]));
        assert_eq!(findings(Some(String::new())).bytes(), Some(vec![]));
        for text in ["0", "0g", "+1"] {
            assert_eq!(findings(Some(text.into())).bytes(), None, "{text}");
        }
        assert_eq!(findings(None).bytes(), None);
    }
}
