//! `Output`: standard output, which outlives its reader.

use std::io::{self, ErrorKind, IsTerminal as _, Stdout, Write};
use std::process::ExitCode;
use std::sync::Mutex;

/// The first failure to print that was not the reader's going away.
static FAILURE: Mutex<Option<io::Error>> = Mutex::new(None);

/// Standard output. What nobody reads any more is dropped, as if it had been written.
#[derive(Debug)]
pub struct Output<W: Write = Stdout>(W);

/// Standard output. Lines of several threads are not mixed.
pub fn output() -> Output {
    Output(io::stdout())
}

impl<W: Write> Output<W> {
    /// Around another writer, whose reader may go away as well.
    pub fn around(writer: W) -> Self {
        Self(writer)
    }
}

/// Whether somebody looks at standard output.
pub fn is_terminal() -> bool {
    io::stdout().is_terminal()
}

impl<W: Write> Write for Output<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.0.write(bytes) {
            Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(bytes.len()),
            result => result,
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self.0.flush() {
            Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
            result => result,
        }
    }

    /// In one piece, so that lines of several threads are not mixed.
    fn write_fmt(&mut self, arguments: std::fmt::Arguments<'_>) -> io::Result<()> {
        self.write_all(arguments.to_string().as_bytes())
    }
}

/// Remembers that something could not be printed, for [`end`]. For `say!`, which has nobody to tell.
pub fn output_failed(error: io::Error) {
    let mut failure = FAILURE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    failure.get_or_insert(error);
}

/// The exit code of a program that ends with `code`: that one, but a failure in place of success where something could not be
/// printed although somebody reads.
pub fn end(code: ExitCode) -> ExitCode {
    output().flush().unwrap_or_else(output_failed);
    let failure = FAILURE.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
    code_after(code, failure)
}

fn code_after(code: ExitCode, failure: Option<io::Error>) -> ExitCode {
    match failure {
        None => code,
        Some(error) => {
            crate::note!("standard output: {error}");
            if code == ExitCode::SUCCESS { ExitCode::FAILURE } else { code }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes nothing, for one reason.
    struct Refuses(ErrorKind);

    impl Write for Refuses {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(self.0.into())
        }

        fn flush(&mut self) -> io::Result<()> {
            Err(self.0.into())
        }
    }

    #[test]
    fn a_reader_that_went_away_is_no_failure_and_a_full_disk_is_one() {
        let mut gone = Output(Refuses(ErrorKind::BrokenPipe));
        writeln!(gone, "{}", "text ".repeat(10_000)).unwrap();
        gone.flush().unwrap();
        let mut full = Output(Refuses(ErrorKind::StorageFull));
        assert_eq!(writeln!(full, "text").unwrap_err().kind(), ErrorKind::StorageFull);
        assert_eq!(full.flush().unwrap_err().kind(), ErrorKind::StorageFull);
    }

    #[test]
    fn only_a_success_becomes_a_failure() {
        let full = || Some(io::Error::from(ErrorKind::StorageFull));
        let codes = [0, 1, 4].map(ExitCode::from);
        assert_eq!(codes.map(|code| code_after(code, None)), codes);
        assert_eq!(codes.map(|code| code_after(code, full())), [1, 1, 4].map(ExitCode::from));
    }

    #[test]
    fn what_is_written_arrives() {
        let mut text = Output(Vec::new());
        writeln!(text, "one {}", 2).unwrap();
        assert_eq!(text.0, b"one 2\n");
    }
}
