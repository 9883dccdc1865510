//! `Failure`: why a test was not passed.

use std::fmt;

use peervram_backends::{Error, Kind};
use serde::{Deserialize, Serialize};

use super::difference::Difference;
use super::text::clean;

/// Why a test was not passed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
#[non_exhaustive]
pub enum Failure {
    /// Bytes arrived, or did not, and were not those that were sent.
    WrongBytes(Difference),
    /// The importer's engine failed, or did not end in time.
    Engine {
        /// The code of the error's kind: "timed-out".
        code: String,
        /// The error in words.
        message: String,
    },
    /// The kernel's log told of a fault of one of the devices meanwhile.
    Fault {
        /// What it said.
        message: String,
    },
}

impl From<&Error> for Failure {
    fn from(error: &Error) -> Self {
        Self::Engine { code: error.kind().code().into(), message: clean(&error.to_string()) }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::WrongBytes(difference) => difference.fmt(f),
            Self::Engine { code, message } if code == Kind::TimedOut.code() => {
                write!(f, "it did not end in time: {message}")
            }
            Self::Engine { message, .. } => write!(f, "the engine failed: {message}"),
            Self::Fault { message } => write!(f, "the kernel reported a fault: {message}"),
        }
    }
}
