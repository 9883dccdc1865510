//! The control socket: by which a test tells the device to go wrong, and looks behind its BARs.
//!
//! What can be said is in [`crate::request`]. Each line is answered by one; the change has taken
//! effect when the answer is there. Lines that are sent here are at most [`LINE_BYTES_MAX`] long.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::io::Errno;

use crate::device::Device;
use crate::request::{Answer, Findings, READ_BYTES_MAX, Request, hex};

/// The longest line.
pub const LINE_BYTES_MAX: u64 = 4096;
const CLIENTS_MAX: usize = 16;

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
            Answer::refused(format!("a line must end within {LINE_BYTES_MAX} bytes"))
        };
        let mut text = serde_json::to_vec(&answer)?;
        text.push(b'\n');
        (&*stream).write_all(&text)?;
    }
}

fn answer(line: &[u8], device: &Device) -> Answer {
    let request = match serde_json::from_slice(line) {
        Ok(request) => request,
        Err(error) => {
            return Answer::refused(format!(
                "not a request: {error}; an example: {{\"do\":\"misbehave\",\"what\":\"all-ones\"}}"
            ));
        }
    };
    let (mut bytes, mut checksum) = (None, None);
    match request {
        Request::Misbehave(misbehaviour) => device.misbehave(misbehaviour),
        Request::Behave => device.behave(),
        Request::Remove => device.remove(),
        Request::Insert => device.insert(),
        Request::RaiseError => device.raise_error(),
        Request::Status => {}
        Request::Read { length_bytes, .. } if length_bytes > READ_BYTES_MAX => {
            return Answer::refused(format!(
                "a read of {length_bytes} bytes is too long; read at most {READ_BYTES_MAX}, or ask for a checksum"
            ));
        }
        Request::Read { offset_bytes, length_bytes } => {
            let mut buffer = vec![0; length_bytes as usize];
            match device.vram().read(offset_bytes, &mut buffer) {
                Ok(()) => bytes = Some(hex(&buffer)),
                Err(errno) => return unreadable(device, offset_bytes, length_bytes, errno),
            }
        }
        Request::Checksum { offset_bytes, length_bytes } => {
            match device.vram().checksum(offset_bytes, length_bytes) {
                Ok(sum) => checksum = Some(sum),
                Err(errno) => return unreadable(device, offset_bytes, length_bytes, errno),
            }
        }
    }
    Answer::done(Findings { status: device.status(), hex: bytes, checksum })
}

fn unreadable(device: &Device, offset_bytes: u64, length_bytes: u64, errno: Errno) -> Answer {
    let size_bytes = device.vram().size_bytes();
    Answer::refused(format!(
        "{length_bytes:#x} bytes at {offset_bytes:#x} of VRAM cannot be read: {errno}; it has {size_bytes:#x} bytes"
    ))
}
