//! How a command ends: its exit code, and its error in words or as JSON.

use std::io::Write;
use std::process::ExitCode;

use peervram::{Error, Kind, NotAttached};
use peervram_programs::{CANNOT_RUN_HERE, USAGE};
use serde::Serialize;

/// An error for programs. `code` is stable.
#[derive(Serialize)]
pub struct ErrorReport {
    code: &'static str,
    message: String,
    tried: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<String>,
    why: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    errno: Option<i32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<String>,
}

impl ErrorReport {
    /// The whole sentence.
    pub fn message(&self) -> &str {
        &self.message
    }
}

impl From<&Error> for ErrorReport {
    fn from(error: &Error) -> Self {
        Self {
            code: error.kind().code(),
            message: error.to_string(),
            tried: error.tried().to_owned(),
            device: error.device().map(str::to_owned),
            why: error.why().to_owned(),
            errno: error.raw_os_error(),
            next: error.next_step().map(str::to_owned),
        }
    }
}

/// Says what went wrong, if anything, and picks the exit code.
pub fn of(result: anyhow::Result<ExitCode>, json: bool) -> ExitCode {
    let error = match result {
        Ok(code) => return code,
        Err(error) => error,
    };
    let ours = library_error(&error);
    let mut standard_error = std::io::stderr().lock();
    let _ = match ours {
        Some(error) if json => print_json(&serde_json::json!({ "error": ErrorReport::from(error) }))
            .map_err(std::io::Error::other),
        Some(error) => match error.next_step() {
            Some(next) => writeln!(standard_error, "peervram: {}\n  next: {next}", error.headline()),
            None => writeln!(standard_error, "peervram: {error}"),
        },
        None => writeln!(standard_error, "peervram: {error:#}"),
    };
    ours.map_or(ExitCode::FAILURE, code_of)
}

/// The library's error that a command ended with, if it is one: also as `attach` gives it.
fn library_error(error: &anyhow::Error) -> Option<&Error> {
    error.downcast_ref::<Error>().or_else(|| error.downcast_ref::<NotAttached>().map(NotAttached::error))
}

/// The exit code of an error, with --json and without.
pub fn code_of(error: &Error) -> ExitCode {
    match error.kind() {
        Kind::InvalidInput => ExitCode::from(USAGE),
        kind if kind.cannot_run_here() => ExitCode::from(CANNOT_RUN_HERE),
        _ => ExitCode::FAILURE,
    }
}

/// Prints one JSON value to standard output.
pub fn print_json(value: &impl Serialize) -> anyhow::Result<()> {
    let text = serde_json::to_string_pretty(value)?;
    writeln!(peervram_programs::output(), "{text}")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_attachment_ends_as_any_error_of_the_library() {
        let error = Error::new(Kind::ImporterCannot, "attach to lent memory", "it attaches statically");
        let code = code_of(&error);
        for error in [anyhow::Error::from(error.clone()), NotAttached::from(error).into()] {
            let ours = library_error(&error).expect("it is the library's");
            assert_eq!((ours.kind(), code_of(ours)), (Kind::ImporterCannot, code));
            assert_ne!(code_of(ours), ExitCode::FAILURE);
        }
        assert!(library_error(&anyhow::anyhow!("another one")).is_none());
    }
}
