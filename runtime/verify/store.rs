//! `Store`: the certificates of this user, as files.
//!
//! One readable file for each lender's region and importer, in `$XDG_STATE_HOME/peervram`, else
//! `~/.local/state/peervram`. A file is written beside its place, flushed and moved there, so that a reader
//! meets the old one or the new one. What is read is trusted in nothing: size, owner, format, machine and
//! every field are checked, and a file that is not in order is ignored aloud.
//!
//! What is said of a certificate is what its file says now: another process may have seen a failure, and a file that
//! was deleted says nothing. Whoever keeps one adds it to what is there, under a lock, so that no failure is lost
//! between two processes.
//!
//! Where the folder cannot be written, or its lock is not to be had within two seconds, certificates are kept for the
//! life of the process, and that is said once.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path as FilePath, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use peervram_backends::{Error, Kind};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::certificate::{Certificate, FORMAT};
use super::fingerprint::Fingerprint;
use super::subject::{Party, Request, Subject};
use crate::Result;

/// No certificate is longer: 64 tests of a few kilobytes, and a fingerprint.
const MOST_FILE_BYTES: u64 = 4 << 20;
/// How many files are looked at.
const MOST_FILES: usize = 4096;
/// Held by whoever writes, and empty.
const LOCK: &str = ".lock";
/// For how long others' writing is waited for. It takes milliseconds.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);

const OF_OTHERS: &str = "it is of other devices than its name says";

/// A file that was not taken for a certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Ignored {
    /// Which.
    pub file: PathBuf,
    /// Why.
    pub why: String,
}

/// Everything that is stored.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct Listing {
    /// The certificates; with their files, where they have one.
    pub certificates: Vec<(Option<PathBuf>, Certificate)>,
    /// What else is in the folder.
    pub ignored: Vec<Ignored>,
}

/// The certificates of a user, or of a folder.
#[derive(Debug)]
pub struct Store {
    folder: Option<PathBuf>,
    /// Certificates of this process that could not be written, by the name of the file they were meant for. Not one of
    /// `crate::sync`'s locks: it is held for a look-up, and there is one for all threads from their first to their
    /// last.
    unwritten: Mutex<BTreeMap<String, Certificate>>,
    is_said: AtomicBool,
}

impl Store {
    /// The store of the user that this process runs as.
    pub fn of_user() -> &'static Self {
        static STORE: OnceLock<Store> = OnceLock::new();
        STORE.get_or_init(|| Self::with(user_folder(|name| std::env::var_os(name))))
    }

    /// A store in `folder`, which is created when the first certificate is kept.
    pub fn at(folder: impl Into<PathBuf>) -> Self {
        Self::with(Some(folder.into()))
    }

    fn with(folder: Option<PathBuf>) -> Self {
        Self { folder, unwritten: Mutex::default(), is_said: AtomicBool::new(false) }
    }

    /// Where its files lie. None where the user has no home: then nothing outlives the process.
    pub fn folder(&self) -> Option<&FilePath> {
        self.folder.as_deref()
    }

    /// The certificate of `subject`, current or not, as its file has it now.
    pub fn get(&self, subject: &Subject) -> Option<Certificate> {
        let name = file_name(subject);
        let written = self.read(&name).filter(|certificate| certificate.subject == *subject);
        match (self.unwritten.lock().get(&name).cloned(), written) {
            (Some(own), Some(written)) => Some(merge(own, &written)),
            (own, written) => own.or(written),
        }
    }

    /// The certificate in the file of that name. Logs why a file is not a valid one.
    fn read(&self, name: &str) -> Option<Certificate> {
        let file = self.folder.as_ref()?.join(name);
        let ignored = |why: String| warn_of(&Ignored { file: file.clone(), why });
        match read(&file) {
            Ok(certificate) if file_name(&certificate.subject) == name => Some(certificate),
            Ok(_) => {
                ignored(OF_OTHERS.into());
                None
            }
            Err(Unread::Absent) => None,
            Err(Unread::Ignored(why)) => {
                ignored(why);
                None
            }
        }
    }

    /// A certificate of `subject` that is current and [grants](Certificate::grants) what is asked for.
    ///
    /// # Errors
    /// [`Kind::Unverified`]: there is none, or what voids it, or what it does not grant.
    pub fn current(&self, subject: &Subject, request: &Request, now: &Fingerprint) -> Result<Certificate> {
        let on = format!("{} from {}", subject.importer, subject.lender);
        let refuse = |why: String| Error::new(Kind::Unverified, "find a certificate", why).on(&on);
        let certificate = self.get(subject).ok_or_else(|| refuse("there is none".into()))?;
        certificate.is_current(now).map_err(|changes| {
            let changes: Vec<String> = changes.iter().map(ToString::to_string).collect();
            refuse(format!("it is void: {}", changes.join("; "))).next("run peervram verify again")
        })?;
        certificate.grants(request)?;
        Ok(certificate)
    }

    /// Keeps `certificate`, with what is known already and still good. Says where; nowhere, where the folder cannot
    /// be written, which is told once.
    pub fn keep(&self, certificate: Certificate) -> Option<PathBuf> {
        let name = file_name(&certificate.subject);
        match self.write(&name, &certificate) {
            Ok(file) => Some(file),
            Err(error) => {
                if !self.is_said.swap(true, Ordering::Relaxed) {
                    let folder = self.folder.as_ref().map(|folder| folder.display().to_string());
                    tracing::warn!(%error, folder, "certificates are not kept beyond this process");
                }
                let mut unwritten = self.unwritten.lock();
                let merged = match unwritten.get(&name) {
                    Some(before) => merge(certificate, before),
                    None => certificate,
                };
                unwritten.insert(name, merged);
                None
            }
        }
    }

    /// Adds `certificate` to what its file has, and to what could not be written before.
    fn write(&self, name: &str, certificate: &Certificate) -> io::Result<PathBuf> {
        let none = || io::Error::new(io::ErrorKind::NotFound, "neither XDG_STATE_HOME nor HOME is set");
        let folder = self.folder.as_ref().ok_or_else(none)?;
        fs::create_dir_all(folder)?;
        // The lock keeps other processes from writing between the read below and the write.
        let _locked = lock(folder)?;
        let mut unwritten = self.unwritten.lock();
        let before = unwritten.get(name).into_iter().cloned().chain(self.read(name));
        let merged = before.fold(certificate.clone(), |merged, before| merge(merged, &before));
        write(folder, name, &merged)?;
        unwritten.remove(name);
        Ok(folder.join(name))
    }

    /// Everything that is stored, and what was ignored.
    ///
    /// # Errors
    /// The folder is there and cannot be read.
    pub fn list(&self) -> Result<Listing> {
        let mut listing = Listing::default();
        let mut unwritten = self.unwritten.lock().clone();
        let entries = match self.folder.as_ref().map(fs::read_dir) {
            Some(Ok(entries)) => Some(entries),
            Some(Err(error)) if error.kind() != io::ErrorKind::NotFound => {
                let folder =
                    self.folder.as_ref().map_or(String::new(), |folder| folder.display().to_string());
                return Err(Error::os("list certificates", error).on(folder));
            }
            _ => None,
        };
        let mut files: Vec<PathBuf> = entries
            .into_iter()
            .flatten()
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|file| file.file_name().is_none_or(|name| name != LOCK))
            .take(MOST_FILES)
            .collect();
        files.sort_unstable();
        for file in files {
            let name = file.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            match read(&file) {
                Ok(certificate) if file_name(&certificate.subject) == name => {
                    let certificate = match unwritten.remove(&name) {
                        Some(own) => merge(own, &certificate),
                        None => certificate,
                    };
                    listing.certificates.push((Some(file), certificate));
                }
                Ok(_) => listing.ignored.push(Ignored { file, why: OF_OTHERS.into() }),
                Err(Unread::Absent) => {}
                Err(Unread::Ignored(why)) => listing.ignored.push(Ignored { file, why }),
            }
        }
        listing.certificates.extend(unwritten.into_values().map(|certificate| (None, certificate)));
        listing.ignored.iter().for_each(warn_of);
        Ok(listing)
    }
}

/// `newer`, with what `older` knows and is still good. A pass that is good for one boot does not outlive it by being
/// added to those that do; a failure is kept all the same.
fn merge(mut newer: Certificate, older: &Certificate) -> Certificate {
    if older.is_current(&newer.fingerprint).is_ok() {
        match older.outlives_reboots == newer.outlives_reboots {
            true => newer.inherit(older),
            false => newer.inherit_failures(older),
        }
    }
    newer
}

/// Holds the folder's lock, which others wait for who keep a certificate there, until it is dropped.
fn lock(folder: &FilePath) -> io::Result<File> {
    let file = File::options().create(true).truncate(false).write(true).open(folder.join(LOCK))?;
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(Errno::WOULDBLOCK) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(2));
            }
            Err(error) => return Err(error.into()),
        }
    }
}

fn warn_of(ignored: &Ignored) {
    tracing::warn!(file = %ignored.file.display(), why = ignored.why, "a certificate was ignored");
}

/// `$XDG_STATE_HOME`, which counts only where it is absolute (XDG Base Directory Specification).
fn user_folder(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let variable = |name: &str| variable(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let state = variable("XDG_STATE_HOME").or_else(|| Some(variable("HOME")?.join(".local/state")))?;
    Some(state.join("peervram"))
}

/// A readable name, with a number that tells apart what reads the same.
fn file_name(subject: &Subject) -> String {
    let readable = |text: &str| -> String {
        let kept = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '.' | '_') { c } else { '-' };
        text.chars().take(48).map(kept).collect()
    };
    let who = |party: &Party| party.address.clone().unwrap_or_else(|| party.name.clone());
    let all = format!("{subject:?}");
    let sum = sum_of(all.as_bytes());
    format!(
        "{}-region-{}-to-{}-{sum:016x}.json",
        readable(&who(&subject.lender)),
        subject.region,
        readable(&who(&subject.importer))
    )
}

/// FNV-1a: the same in every version of the program.
fn sum_of(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |sum, &byte| (sum ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

/// This machine, as a number that does not give its id away (machine-id(5) asks for that).
pub(crate) fn machine() -> String {
    machine_of(&fs::read_to_string("/etc/machine-id").unwrap_or_default())
}

fn machine_of(id: &str) -> String {
    match id.trim() {
        "" => "unknown".into(),
        id => format!("{:016x}", sum_of(format!("peervram {id}").as_bytes())),
    }
}

enum Unread {
    Absent,
    Ignored(String),
}

fn read(file: &FilePath) -> Result<Certificate, Unread> {
    let ignored = |why: String| Unread::Ignored(why);
    // A link, a pipe or a device is none of ours, and opening one must not wait.
    let flags = (rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK).bits() as i32;
    let opened = match File::options().read(true).custom_flags(flags).open(file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(Unread::Absent),
        other => other.map_err(|error| ignored(error.to_string()))?,
    };
    let about = opened.metadata().map_err(|error| ignored(error.to_string()))?;
    if !about.is_file() {
        return Err(ignored("it is no ordinary file".into()));
    }
    let user = rustix::process::geteuid().as_raw();
    if about.uid() != user {
        return Err(ignored(format!("it belongs to user {}, not to {user}", about.uid())));
    }
    if about.len() > MOST_FILE_BYTES {
        return Err(ignored(format!("{} bytes are too many", about.len())));
    }
    let mut text = Vec::new();
    opened.take(MOST_FILE_BYTES).read_to_end(&mut text).map_err(|error| ignored(error.to_string()))?;
    parse(&text).map_err(ignored)
}

/// A certificate of this machine, or why it is none.
fn parse(text: &[u8]) -> Result<Certificate, String> {
    #[derive(serde::Deserialize)]
    struct Head {
        format: u32,
    }
    let broken = |error: serde_json::Error| {
        if error.is_eof() { "it is cut short".into() } else { format!("it is broken: {error}") }
    };
    // The format first: another one's fields are not ours to complain of.
    let head: Head = serde_json::from_slice(text).map_err(broken)?;
    if head.format != FORMAT {
        return Err(format!("it is of format {}, and this program writes and reads {FORMAT}", head.format));
    }
    let certificate: Certificate = serde_json::from_slice(text).map_err(broken)?;
    if certificate.machine != machine() {
        return Err("it was made on another machine".into());
    }
    certificate.check().map_err(|what| format!("it has {what}"))?;
    Ok(certificate)
}

fn write(folder: &FilePath, name: &str, certificate: &Certificate) -> io::Result<()> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let mut temporary = String::new();
    let _ = write!(temporary, ".{name}.{}.{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    let temporary = folder.join(temporary);
    let mut text = serde_json::to_vec_pretty(certificate)?;
    text.push(b'\n');
    let put = || -> io::Result<()> {
        let mut file = File::options().write(true).create_new(true).open(&temporary)?;
        file.write_all(&text)?;
        file.sync_all()?;
        fs::rename(&temporary, folder.join(name))?;
        // Make the rename durable: the directory entry is data of the folder.
        File::open(folder)?.sync_all()
    };
    put().inspect_err(|_| {
        // Remove the temporary file if the attempt left one.
        let _ = fs::remove_file(&temporary);
    })
}

#[cfg(test)]
mod tests;
