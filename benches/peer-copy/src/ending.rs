//! `Ending`: an error that decides the exit code.

use std::fmt;
use std::path::Path;

/// Something was tried and went wrong, or bytes were wrong.
pub const FAILED: u8 = 1;
/// The words on the command line make no sense here.
pub const USAGE: u8 = 2;
/// This machine has nothing to measure.
pub const CANNOT_RUN_HERE: u8 = 4;

/// Why it ends, and with which code.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ending {
    /// The exit code.
    pub code: u8,
    /// What to say.
    pub reason: String,
}

impl Ending {
    /// Says which file it is of.
    pub fn of_file(self, file: &Path) -> Ending {
        Ending { reason: format!("{}: {self}", file.display()), ..self }
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
