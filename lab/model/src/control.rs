//! The control socket: lines of JSON by which a test tells the device to go wrong.
//!
//! | line | does |
//! |---|---|
//! | `{"do":"misbehave","what":"all-ones"}` | adds a fault; see [`Misbehaviour`] for the names |
//! | `{"do":"misbehave","what":"slow-reset","ms":800}` | the same with a parameter |
//! | `{"do":"behave"}` | takes all faults back |
//! | `{"do":"remove"}`, `{"do":"insert"}` | surprise removal, and its end |
//! | `{"do":"raise-error"}` | latches an error and raises its interrupt |
//! | `{"do":"status"}` | nothing |
//!
//! Each line is answered by one: `{"ok":true,"status":{..}}` or `{"ok":false,"error":".."}`. The change has
//! taken effect when the answer is there. Lines are at most [`LINE_BYTES_MAX`] long.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde::{Deserialize, Serialize};

use crate::device::{Device, Status};
use crate::misbehaviour::Misbehaviour;

/// The longest line.
pub const LINE_BYTES_MAX: u64 = 4096;
const CLIENTS_MAX: usize = 16;

/// What can be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "kebab-case")]
pub enum Command {
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
}

/// What is answered.
#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Answer {
    Done { ok: bool, status: Status },
    Refused { ok: bool, error: String },
}

/// Serves clients of the control socket for ever.
///
/// # Errors
/// What `accept` says.
pub fn run(listener: &UnixListener, device: &Arc<Device>) -> io::Result<()> {
    let clients = Arc::new(AtomicUsize::new(0));
    loop {
        let (stream, _) = listener.accept()?;
        if clients.fetch_add(1, Ordering::AcqRel) >= CLIENTS_MAX {
            clients.fetch_sub(1, Ordering::AcqRel);
            tracing::warn!("too many clients at the control socket: one was turned away");
            continue;
        }
        let (device, count) = (Arc::clone(device), Arc::clone(&clients));
        std::thread::Builder::new().name("control".into()).spawn(move || {
            if let Err(error) = serve(&stream, &device) {
                tracing::debug!(%error, "a client of the control socket has gone");
            }
            count.fetch_sub(1, Ordering::AcqRel);
        })?;
    }
}

/// Answers the lines of one client until it goes.
///
/// # Errors
/// Those of the stream.
pub fn serve(stream: &UnixStream, device: &Device) -> io::Result<()> {
    let mut lines = BufReader::new(stream);
    let mut line = Vec::new();
    loop {
        line.clear();
        let bytes = lines.by_ref().take(LINE_BYTES_MAX).read_until(b'\n', &mut line)?;
        if bytes == 0 {
            return Ok(());
        }
        let is_whole = line.ends_with(b"\n");
        let answer = if is_whole {
            answer(&line, device)
        } else {
            lines.skip_until(b'\n')?;
            Answer::Refused { ok: false, error: format!("a line must end within {LINE_BYTES_MAX} bytes") }
        };
        let mut text = serde_json::to_vec(&answer)?;
        text.push(b'\n');
        (&*stream).write_all(&text)?;
    }
}

fn answer(line: &[u8], device: &Device) -> Answer {
    let command = match serde_json::from_slice(line) {
        Ok(command) => command,
        Err(error) => {
            let error =
                format!("not a command: {error}; an example: {{\"do\":\"misbehave\",\"what\":\"all-ones\"}}");
            return Answer::Refused { ok: false, error };
        }
    };
    match command {
        Command::Misbehave(misbehaviour) => device.misbehave(misbehaviour),
        Command::Behave => device.behave(),
        Command::Remove => device.remove(),
        Command::Insert => device.insert(),
        Command::RaiseError => device.raise_error(),
        Command::Status => {}
    }
    Answer::Done { ok: true, status: device.status() }
}
