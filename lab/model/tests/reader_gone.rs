//! A reader that goes away changes no exit code of the model, and ends it with no panic.
#![cfg(feature = "device")]

use std::process::{Command, Stdio};

#[test]
fn a_reader_that_has_gone_changes_no_exit_code() {
    for words in [&["--help"][..], &["ctl", "/nonexistent/socket", "status"], &["ctl"]] {
        let command = || {
            let mut command = Command::new(env!("CARGO_BIN_EXE_peervram-model"));
            command.args(words).stdin(Stdio::null());
            command
        };
        let read = command().output().unwrap();
        assert!(read.stdout.len() + read.stderr.len() > 0, "{words:?} prints nothing");
        let gone = || {
            let (reader, writer) = std::io::pipe().unwrap();
            drop(reader);
            writer
        };
        let code = command().stdout(gone()).stderr(gone()).status().unwrap().code();
        assert_eq!(code, read.status.code(), "{words:?}");
        assert_ne!(code, Some(101), "{words:?}");
    }
}
