//! Whether a broker answers at the usual socket, and what it would refuse to this user.

use std::path::PathBuf;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use peervram::broker::client;
use peervram::{Kind, Result};
use peervram_programs::bytes;

use super::facts::{Broker, LentMemory};
use super::finding::{Finding, Section, Severity};

/// A broker answers at once, or not at all.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);

/// Asks the broker at `socket`. Borrows nothing.
pub fn ask(socket: PathBuf) -> Broker {
    let (sender, receiver) = mpsc::channel();
    let path = socket.clone();
    // Whoever listens there may never say anything: the thread that asks is left behind then.
    let asking = thread::Builder::new().spawn(move || {
        let asked = || -> Result<Broker> {
            let broker = client::Broker::connect(&path)?;
            let lent =
                |memory: peervram::broker::Memory| LentMemory { name: memory.name, free_bytes: memory.free };
            let memories = broker.list()?.into_iter().map(lent).collect();
            let is_operator = match broker.status() {
                Ok(_) => true,
                Err(error) if error.kind() == Kind::PermissionDenied => false,
                Err(error) => return Err(error),
            };
            Ok(Broker::Answers { socket: path.clone(), memories, is_operator })
        };
        let _ = sender.send(asked());
    });
    let answer = asking.map_err(|error| error.to_string()).and_then(|_| {
        let limit = |_| format!("no answer within {} s", ANSWER_LIMIT.as_secs());
        receiver.recv_timeout(ANSWER_LIMIT).map_err(limit)
    });
    match answer {
        Ok(Ok(answers)) => answers,
        Ok(Err(error)) if error.kind() == Kind::NotFound => Broker::Absent { socket },
        Ok(Err(error)) => Broker::Silent { socket, why: error.why().to_owned() },
        Err(why) => Broker::Silent { socket, why },
    }
}

/// One line. A machine is as good without a broker: nothing is to be done.
pub fn examine(broker: &Broker) -> Finding {
    let finding = |code, weight, seen: String| Finding::new(code, Section::Broker, weight, seen);
    match broker {
        Broker::Absent { socket } => finding(
            "broker-absent",
            Severity::Fine,
            format!("no broker at {}: `peervram serve` is one", socket.display()),
        ),
        Broker::Silent { socket, why } => finding(
            "broker-silent",
            Severity::Hint,
            format!("{} is there, and no broker answers: {why}", socket.display()),
        ),
        Broker::Answers { socket, memories, is_operator } => {
            let free = |memory: &LentMemory| {
                format!("{} ({} free)", memory.name.escape_debug(), bytes::in_words(memory.free_bytes))
            };
            let lent: Vec<String> = memories.iter().map(free).collect();
            let (code, weight, lends) = match &lent[..] {
                [] => ("broker-refuses", Severity::Hint, "lends nothing to this user".to_owned()),
                lent => ("broker", Severity::Fine, format!("lends {}", lent.join(", "))),
            };
            let operates = match is_operator {
                true => "and takes orders from this user",
                false => "and refuses this user who has what, resets and evictions",
            };
            let seen = format!("the broker at {} {lends}, {operates}", socket.display());
            let finding = finding(code, weight, seen);
            match lent.is_empty() {
                true => finding.why("Whoever runs it allows users and groups: --allow user:NAME."),
                false => finding,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;
    use std::time::Instant;

    #[test]
    fn who_does_not_answer_is_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("broker");
        let absent = examine(&ask(socket.clone()));
        assert_eq!((absent.code, absent.weight), ("broker-absent", Severity::Fine));
        let listener = UnixListener::bind(&socket).unwrap();
        let begun = Instant::now();
        let silent = examine(&ask(socket.clone()));
        assert!(begun.elapsed() < 5 * ANSWER_LIMIT);
        assert_eq!(silent.code, "broker-silent");
        assert!(silent.seen.contains("no answer within 2 s"), "{}", silent.seen);
        drop(listener);
        let dead = examine(&ask(socket));
        assert_eq!(dead.code, "broker-silent");
        assert!(dead.seen.contains("nobody listens"), "{}", dead.seen);
    }

    #[test]
    fn what_it_would_refuse_is_said() {
        let answers = |memories, is_operator| {
            examine(&Broker::Answers { socket: "/run/x".into(), memories, is_operator })
        };
        let vram = LentMemory { name: "vram".into(), free_bytes: 1 << 20 };
        let all = answers(vec![vram.clone()], true);
        assert_eq!(
            (all.code, all.seen.contains("lends vram (1 MiB free), and takes orders")),
            ("broker", true)
        );
        let some = answers(vec![vram], false);
        assert!(some.seen.contains("refuses this user who has what"), "{}", some.seen);
        let none = answers(Vec::new(), false);
        assert_eq!((none.code, none.weight), ("broker-refuses", Severity::Hint));
        assert!(none.seen.contains("lends nothing to this user") && none.why.is_some());
    }
}
