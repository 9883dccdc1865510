//! A reader that goes away (`| head`) changes no exit code of the tasks, and ends none with a panic.

use std::process::{Command, Stdio};

fn run(words: &[&str], is_read: bool) -> (Option<i32>, usize) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
    command.args(words).stdin(Stdio::null());
    if is_read {
        let output = command.output().unwrap();
        return (output.status.code(), output.stdout.len() + output.stderr.len());
    }
    // Neither of what it prints nor of what it notes.
    let gone = || {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        writer
    };
    (command.stdout(gone()).stderr(gone()).status().unwrap().code(), 0)
}

#[test]
fn a_reader_that_has_gone_changes_no_exit_code() {
    let help =
        String::from_utf8(Command::new(env!("CARGO_BIN_EXE_xtask")).arg("--help").output().unwrap().stdout)
            .unwrap();
    let tasks: Vec<&str> = (help.lines().skip_while(|line| *line != "Commands:").skip(1))
        .take_while(|line| !line.is_empty())
        .filter(|line| line.starts_with("  ") && !line.starts_with("   "))
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    assert!(tasks.contains(&"lab") && tasks.contains(&"bench"), "{help}");
    // What the tasks themselves say, and not what reads their command lines.
    let mut rows = vec![vec!["bench", "nosuch"], vec!["sample", "nosuch"], vec!["mutants", "nosuch.rs"]];
    for task in tasks.into_iter().filter(|task| *task != "help") {
        rows.push(vec![task, "--help"]);
        rows.push(vec![task, "--no-such-option"]);
    }
    for words in rows {
        let (code, printed) = run(&words, true);
        assert!(printed > 0, "{words:?} prints nothing");
        assert_eq!(run(&words, false).0, code, "{words:?}");
        assert!(code.is_some_and(|code| code != 101), "{words:?}");
    }
}
