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
        STORE.get_or_init(|| Self::with(user_folder()))
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
fn user_folder() -> Option<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
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
    let id = fs::read_to_string("/etc/machine-id").unwrap_or_default();
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
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;
    use rustix::fs::{CWD, Mode, mkfifoat};
    use tracing::span;

    use super::super::certificate::Tested;
    use super::super::certificate::tests::{certificate, request, tested};
    use super::super::failure::Failure;
    use super::super::observer::Observer;
    use super::*;
    use crate::Direction;

    fn good() -> Certificate {
        certificate(vec![tested(Direction::Read, "copy engine", Observer::OwnerEngine)])
    }

    /// What a fresh reader of the folder says of the only file there.
    fn ignored(folder: &FilePath) -> String {
        let listing = Store::at(folder).list().unwrap();
        assert!(listing.certificates.is_empty(), "{listing:?}");
        match &listing.ignored[..] {
            [ignored] => ignored.why.clone(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_is_kept_is_read_by_the_next_process() {
        let folder = tempfile::tempdir().unwrap();
        let file = Store::at(folder.path()).keep(good()).unwrap();
        let name = file.file_name().unwrap().to_str().unwrap();
        assert!(name.starts_with("0000-01-00.0-region-2-to-0000-02-00.0-"), "{name}");
        let text = fs::read_to_string(&file).unwrap();
        assert!(text.contains("\"the kernel command line\": \"quiet\""), "{text}");
        let next = Store::at(folder.path());
        assert_eq!(next.folder(), Some(folder.path()));
        assert_eq!(next.get(&good().subject), Some(good()));
        assert_eq!(next.list().unwrap().certificates.len(), 1);
        // Nothing else is left in the folder but the lock.
        let files = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name());
        assert_eq!(files.filter(|name| name != LOCK).count(), 1);
    }

    /// Whoever has the file open reads on in the one that was there; who opens it anew has all of the next.
    #[test]
    fn a_reader_meets_no_half_of_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::at(folder.path());
        let file = store.keep(good()).unwrap();
        let (before, mut opened) = (fs::read_to_string(&file).unwrap(), File::open(&file).unwrap());
        store.keep(certificate(vec![tested(Direction::Write, "copy engine", Observer::OwnerEngine)]));
        let mut seen = String::new();
        opened.read_to_string(&mut seen).unwrap();
        assert_eq!(seen, before, "what a reader has open was written over");
        assert_ne!(fs::read_to_string(&file).unwrap(), before, "nothing was kept");
    }

    #[test]
    fn a_certificate_counts_while_nothing_has_changed() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::at(folder.path());
        let current = |now: &Fingerprint| store.current(&good().subject, &request(Direction::Read), now);
        let mut now = good().fingerprint;
        assert_eq!(current(&now).unwrap_err().why(), "there is none");
        store.keep(good());
        current(&now).unwrap();
        now.add("ACS control of 0000:00:02.0", "0x1d");
        let error = current(&now).unwrap_err();
        assert_eq!(error.kind(), Kind::Unverified);
        assert!(error.why().ends_with("ACS control of 0000:00:02.0 was not there and is 0x1d"), "{error}");
    }

    #[test]
    fn the_two_directions_come_together_in_one_file() {
        let folder = tempfile::tempdir().unwrap();
        Store::at(folder.path()).keep(good());
        let write = certificate(vec![tested(Direction::Write, "copy engine", Observer::OwnerEngine)]);
        Store::at(folder.path()).keep(write);
        let sum = Store::at(folder.path()).get(&good().subject).unwrap();
        sum.grants(&request(Direction::Both)).unwrap();
    }

    #[test]
    fn what_is_broken_or_foreign_is_ignored_aloud() {
        let folder = tempfile::tempdir().unwrap();
        let file = Store::at(folder.path()).keep(good()).unwrap();
        let text = fs::read_to_string(&file).unwrap();
        let says = |text: &str| {
            fs::write(&file, text).unwrap();
            ignored(folder.path())
        };
        assert_eq!(says(&text[..text.len() / 2]), "it is cut short");
        assert_eq!(says(""), "it is cut short");
        assert!(says("{]").contains("broken"));
        assert!(says(&text.replacen("\"format\": 2", "\"format\": 3", 1)).contains("format 3"));
        let foreign = text.replacen(&machine(), "0123456789abcdef", 1);
        assert_eq!(says(&foreign), "it was made on another machine");
        assert!(says(&text.replacen("\"read\"", "\"both\"", 1)).contains("both directions"));
        assert!(says(&text.replacen("81250", "-1", 1)).contains("broken"));
        assert!(says(&text.replacen("quiet", "qu\\u0007iet", 1)).contains("control characters"));
        assert!(says(&text.replacen("\"region\": 2", "\"region\": 3", 1)).contains("its name"));
        assert!(says(&text.replacen("16777216", "-5", 1)).contains("broken"));
        assert!(
            says(&text.replacen("\"offset_bytes\": 0", "\"offset_bytes\": 18446744073709551615", 1))
                .contains("ranges")
        );
        assert!(Store::at(folder.path()).get(&good().subject).is_none());
        assert!(says(&"[".repeat(100_000)).contains("broken"));
        fs::write(&file, vec![b' '; MOST_FILE_BYTES as usize + 1]).unwrap();
        assert!(ignored(folder.path()).contains("too many"));
        fs::remove_file(&file).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", &file).unwrap();
        ignored(folder.path());
    }

    /// What lies behind the link is a certificate, and nobody ever writes to the pipe.
    #[test]
    fn a_link_and_a_pipe_are_ignored_and_not_waited_for() {
        let (folder, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let file = Store::at(folder.path()).keep(good()).unwrap();
        let moved = elsewhere.path().join("moved");
        fs::rename(&file, &moved).unwrap();
        std::os::unix::fs::symlink(&moved, &file).unwrap();
        ignored(folder.path());
        assert_eq!(Store::at(folder.path()).get(&good().subject), None);

        fs::remove_file(&file).unwrap();
        mkfifoat(CWD, &file, Mode::RUSR | Mode::WUSR).unwrap();
        let (send, receive) = std::sync::mpsc::channel();
        let path = folder.path().to_owned();
        std::thread::spawn(move || send.send(ignored(&path)));
        let why = receive.recv_timeout(Duration::from_secs(30)).expect("a pipe was waited for");
        assert_eq!(why, "it is no ordinary file");
    }

    /// Its tests would become those of whoever is kept there.
    #[test]
    fn a_certificate_in_the_place_of_another_is_not_added_to_it() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::at(folder.path());
        let file = store.keep(good()).unwrap();
        let mut other = good();
        other.subject.region = 3;
        fs::write(&file, serde_json::to_vec(&other).unwrap()).unwrap();
        let write = certificate(vec![tested(Direction::Write, "copy engine", Observer::OwnerEngine)]);
        store.keep(write.clone());
        assert_eq!(store.get(&good().subject), Some(write));
    }

    /// Keeps what is logged as fields and their values.
    #[derive(Default)]
    struct Log(Arc<Mutex<Vec<String>>>);

    impl tracing::Subscriber for Log {
        fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
            true
        }

        fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
            span::Id::from_u64(1)
        }

        fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

        fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

        fn event(&self, event: &tracing::Event<'_>) {
            let mut line = event.metadata().level().to_string();
            event.record(&mut |field: &tracing::field::Field, value: &dyn std::fmt::Debug| {
                let _ = write!(line, " {field}={value:?}");
            });
            self.0.lock().push(line);
        }

        fn enter(&self, _: &span::Id) {}

        fn exit(&self, _: &span::Id) {}
    }

    /// The lines that `act` writes to the log.
    fn logged(act: impl FnOnce()) -> Vec<String> {
        let log = Log::default();
        let lines = Arc::clone(&log.0);
        tracing::subscriber::with_default(log, act);
        std::mem::take(&mut *lines.lock())
    }

    #[test]
    fn a_file_that_is_ignored_is_named_in_the_log() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::at(folder.path());
        let file = store.keep(good()).unwrap();
        fs::write(&file, "{]").unwrap();
        let read = logged(|| assert_eq!(store.get(&good().subject), None));
        let listed = logged(|| assert_eq!(store.list().unwrap().ignored.len(), 1));
        for lines in [read, listed] {
            let [line] = &lines[..] else { panic!("{lines:?}") };
            let says = |what: &str| line.contains(what);
            assert!(line.starts_with("WARN") && says("ignored") && says("broken"), "{line}");
            assert!(says(file.to_str().unwrap()), "{line}");
        }
    }

    #[test]
    fn a_file_that_is_not_there_is_no_trouble() {
        let folder = tempfile::tempdir().unwrap();
        assert!(matches!(read(&folder.path().join("gone")), Err(Unread::Absent)));
        let listing = Store::at(folder.path().join("gone")).list().unwrap();
        assert!(listing.certificates.is_empty() && listing.ignored.is_empty());
        // A file in the place of the folder is.
        let file = folder.path().join("in the way");
        fs::write(&file, "").unwrap();
        let error = Store::at(&file).list().unwrap_err();
        assert!(error.to_string().contains("in the way"), "{error}");
    }

    /// FNV's own examples: files and machines are called by this number in every version.
    #[test]
    fn the_number_in_a_name_is_fnv_1a() {
        for (bytes, sum) in [
            (&b""[..], 0xcbf2_9ce4_8422_2325),
            (b"a", 0xaf63_dc4c_8601_ec8c),
            (b"foobar", 0x8594_4171_f739_67e8),
        ] {
            assert_eq!(sum_of(bytes), sum, "{bytes:?}");
        }
    }

    #[test]
    fn a_folder_that_cannot_be_written_costs_only_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("in the way");
        fs::write(&file, "").unwrap();
        let store = Store::at(&file);
        let keep = || logged(|| assert_eq!(store.keep(good()), None)).len();
        assert_eq!([keep(), keep()], [1, 0], "it is said once");
        assert_eq!(store.get(&good().subject), Some(good()));
        assert!(store.is_said.load(Ordering::Relaxed));
        let nowhere = Store::with(None);
        nowhere.keep(good());
        assert_eq!(nowhere.list().unwrap().certificates, [(None, good())]);
    }

    fn failed(mut tested: Tested) -> Tested {
        tested.failure = Some(Failure::Fault { message: "DMAR: fault".into() });
        tested
    }

    fn read_by(engine: &str) -> Tested {
        tested(Direction::Read, engine, Observer::OwnerEngine)
    }

    /// Two processes are two stores on one folder.
    #[test]
    fn what_another_process_wrote_or_deleted_is_seen() {
        let folder = tempfile::tempdir().unwrap();
        let (ours, theirs) = (Store::at(folder.path()), Store::at(folder.path()));
        let now = good().fingerprint;
        let current = |store: &Store| store.current(&good().subject, &request(Direction::Read), &now);
        let file = ours.keep(good()).unwrap();
        current(&ours).unwrap();

        // The other process sees a failure.
        theirs.keep(certificate(vec![failed(read_by("copy engine"))]));
        assert!(current(&ours).unwrap_err().why().contains("went wrong"));
        // A pass in the other direction, kept after it, does not hide that failure.
        ours.keep(certificate(vec![tested(Direction::Write, "copy engine", Observer::OwnerEngine)]));
        for store in [&ours, &theirs] {
            assert!(current(store).unwrap_err().why().contains("went wrong"));
            assert_eq!(store.get(&good().subject).unwrap().tests.len(), 2);
            assert_eq!(store.list().unwrap().certificates[0].1.tests.len(), 2);
        }
        // A later pass takes it back, for everyone.
        ours.keep(good());
        current(&theirs).unwrap();

        fs::remove_file(&file).unwrap();
        for store in [&ours, &theirs] {
            assert_eq!(current(store).unwrap_err().why(), "there is none");
            assert!(store.list().unwrap().certificates.is_empty());
        }
    }

    #[test]
    fn a_pass_that_outlives_reboots_takes_over_failures_and_no_pass_of_one_boot() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::at(folder.path());
        let mut everything = failed(read_by("copy engine"));
        everything.full = true;
        store.keep(certificate(vec![everything, read_by("other")]));
        let mut outlives = good();
        outlives.outlives_reboots = true;
        store.keep(outlives);
        let known = store.get(&good().subject).unwrap();
        assert!(known.outlives_reboots);
        let tests: Vec<_> = known.tests.iter().map(|test| (&*test.engine, test.passed())).collect();
        assert_eq!(tests, [("copy engine", true), ("copy engine", false)]);
    }

    #[test]
    fn whoever_keeps_at_the_same_time_loses_nothing() {
        let folder = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            for writer in 0..8 {
                let folder = folder.path();
                scope.spawn(move || {
                    let store = Store::at(folder);
                    for number in 0..4 {
                        let engine = format!("engine {writer} {number}");
                        // On a busy machine its turn may be more than two seconds away.
                        while store.keep(certificate(vec![failed(read_by(&engine))])).is_none() {}
                    }
                });
            }
        });
        let known = Store::at(folder.path()).get(&good().subject).unwrap();
        assert_eq!(known.tests.len(), 32);
    }

    #[test]
    fn a_lock_that_is_not_given_back_costs_two_seconds_and_no_certificate() {
        let folder = tempfile::tempdir().unwrap();
        let hanging = lock(folder.path()).unwrap();
        let store = Store::at(folder.path());
        let begun = Instant::now();
        assert_eq!(store.keep(good()), None);
        assert!((2..20).contains(&begun.elapsed().as_secs()), "{:?}", begun.elapsed());
        assert_eq!(store.get(&good().subject), Some(good()));
        assert!(Store::at(folder.path()).get(&good().subject).is_none());
        drop(hanging);
        // A certificate that could not be written is written together with the next one.
        let write = certificate(vec![tested(Direction::Write, "copy engine", Observer::OwnerEngine)]);
        store.keep(write).unwrap();
        let known = Store::at(folder.path()).get(&good().subject).unwrap();
        known.grants(&request(Direction::Both)).unwrap();
    }

    proptest! {
        #[test]
        fn any_file_is_survived(text in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(parse(&text).is_err());
        }

        #[test]
        fn a_good_file_with_a_change_is_read_or_refused(at: prop::sample::Index, byte: u8) {
            let mut text = serde_json::to_vec_pretty(&good()).unwrap();
            let at = at.index(text.len());
            text[at] = byte;
            if let Ok(read) = parse(&text) {
                prop_assert!(read.check().is_ok());
            }
        }
    }
}
