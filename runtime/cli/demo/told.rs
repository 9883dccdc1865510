//! `Told`: what the demo's client tells, line by line, to the process that has started it.

use std::io::{BufRead, ErrorKind, Read, Write};
use std::time::Instant;

use peervram::{Error, Result};
use serde::{Deserialize, Serialize};

use super::Check;

const TELL: &str = "tell the demo how its client goes on";
const HEAR: &str = "hear the demo's client";

/// A row of the table.
#[derive(Debug, Serialize, Deserialize)]
pub struct Row {
    /// The user whose process did it.
    pub who: String,
    pub what: String,
    pub path: Option<String>,
    /// Of the memory, where it was about the memory.
    pub generation: Option<u64>,
    pub time_us: f64,
    pub check: Check,
}

impl Row {
    /// Of something that `who` has done since `begun`.
    pub fn new(who: &str, what: &str, begun: Instant, check: Check) -> Self {
        let time_us = begun.elapsed().as_secs_f64() * 1e6;
        Self { who: who.to_owned(), what: what.to_owned(), path: None, generation: None, time_us, check }
    }

    /// With the memory's path and generation.
    pub fn of_memory(self, path: peervram::Path, generation: u64) -> Self {
        Self { path: Some(path.name().to_owned()), generation: Some(generation), ..self }
    }
}

/// A line of the client's.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Told {
    /// It has done something.
    Did(Row),
    /// A path was refused.
    Refused(String),
    /// It has imported the memory, and waits for a line before it uses it.
    Attached,
    /// The picture of this generation is in the memory, and in use. That many bytes of it follow this line, as the
    /// client's device has read them. Of generation 0 it waits to be told of a revoke, else for a line.
    Drawn { generation: u64, size_bytes: usize },
    /// It has given the memory back, and ends.
    Finished,
    /// It could not go on, and ends.
    Failed { code: String, why: String, next: Option<String> },
}

/// Writes a line, and what follows it.
///
/// # Errors
/// Nobody listens.
pub fn tell(output: &mut impl Write, told: &Told, bytes: &[u8]) -> Result<()> {
    let mut line = serde_json::to_vec(told).map_err(|error| Error::os(TELL, error))?;
    line.push(b'\n');
    let written =
        output.write_all(&line).and_then(|()| output.write_all(bytes)).and_then(|()| output.flush());
    written.map_err(|error| Error::os(TELL, error))
}

/// Reads a line, and what follows it; nothing at the end.
///
/// # Errors
/// It is none of a client's.
pub fn hear(input: &mut impl BufRead) -> Result<Option<(Told, Vec<u8>)>> {
    let mut line = String::new();
    if input.read_line(&mut line).map_err(|error| Error::os(HEAR, error))? == 0 {
        return Ok(None);
    }
    let told = serde_json::from_str(&line).map_err(|error| Error::os(HEAR, error))?;
    let mut bytes = Vec::new();
    if let Told::Drawn { size_bytes, .. } = told {
        let read = input.take(size_bytes as u64).read_to_end(&mut bytes);
        let read = read.map_err(|error| Error::os(HEAR, error))?;
        if read != size_bytes {
            return Err(Error::os(HEAR, std::io::Error::from(ErrorKind::UnexpectedEof)));
        }
    }
    Ok(Some((told, bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_is_heard_with_its_bytes() {
        let mut stream = Vec::new();
        let row = Row::new("nobody", "draws", Instant::now(), Check { passed: true, what: "equal".into() });
        tell(&mut stream, &Told::Did(row.of_memory(peervram::Path::Peer, 3)), &[]).unwrap();
        // Bytes of a picture may be line breaks.
        tell(&mut stream, &Told::Drawn { generation: 1, size_bytes: 4 }, b"\n{}\n").unwrap();
        tell(&mut stream, &Told::Finished, &[]).unwrap();
        let mut input = &stream[..];
        let Some((Told::Did(row), none)) = hear(&mut input).unwrap() else { panic!() };
        assert_eq!((row.path.as_deref(), row.generation, none.len()), (Some("peer"), Some(3), 0));
        let Some((Told::Drawn { generation: 1, .. }, bytes)) = hear(&mut input).unwrap() else { panic!() };
        assert_eq!(bytes, b"\n{}\n");
        assert!(matches!(hear(&mut input).unwrap(), Some((Told::Finished, _))));
        assert!(hear(&mut input).unwrap().is_none());
    }

    #[test]
    fn what_is_cut_off_or_of_another_program_is_an_error() {
        let mut stream = Vec::new();
        tell(&mut stream, &Told::Drawn { generation: 0, size_bytes: 4 }, b"123").unwrap();
        assert!(hear(&mut &stream[..]).is_err());
        assert!(hear(&mut &b"hello\n"[..]).is_err());
    }
}
