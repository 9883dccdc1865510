//! `Ending`: an error that decides the exit code. Every program here ends by the same codes.

use std::fmt;
use std::path::Path;

/// Something was tried and went wrong, a test failed, or bytes were wrong.
pub const FAILED: u8 = 1;
/// The words on the command line make no sense; clap has the same.
pub const USAGE: u8 = 2;
/// The machine, not the request, stands in the way.
pub const CANNOT_RUN_HERE: u8 = 4;

/// Why a program ends, and with which code.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ending {
    /// The exit code.
    pub code: u8,
    /// What to say.
    pub reason: String,
}

impl Ending {
    /// Says which file it is of.
    pub fn of_file(self, file: &Path) -> Self {
        Self { reason: format!("{}: {self}", file.display()), ..self }
    }
}

impl fmt::Display for Ending {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str(&self.reason)
    }
}

impl std::error::Error for Ending {}

/// The words make no sense.
pub fn usage(reason: String) -> Ending {
    Ending { code: USAGE, reason }
}

/// This machine cannot.
pub fn cannot(reason: String) -> Ending {
    Ending { code: CANNOT_RUN_HERE, reason }
}
