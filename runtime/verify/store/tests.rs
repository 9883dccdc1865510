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
    let mut longest = text.clone().into_bytes();
    longest.resize(MOST_FILE_BYTES as usize, b' ');
    fs::write(&file, &longest).unwrap();
    assert!(Store::at(folder.path()).get(&good().subject).is_some());
    longest.push(b' ');
    fs::write(&file, &longest).unwrap();
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

#[test]
fn the_users_folder_is_where_the_specification_says() {
    let folder = |variables: &'static [(&str, &str)]| {
        user_folder(move |name| Some(variables.iter().find(|(known, _)| *known == name)?.1.into()))
    };
    assert_eq!(
        folder(&[("XDG_STATE_HOME", "/state"), ("HOME", "/people/a")]),
        Some("/state/peervram".into())
    );
    assert_eq!(
        folder(&[("XDG_STATE_HOME", "state"), ("HOME", "/people/a")]),
        Some("/people/a/.local/state/peervram".into())
    );
    assert_eq!(folder(&[("HOME", "/people/a")]), Some("/people/a/.local/state/peervram".into()));
    assert_eq!(folder(&[("HOME", "a")]), None);
    assert_eq!(folder(&[]), None);
}

/// The number is kept in certificates: it must not change from one version of the program to the next.
#[test]
fn a_machines_number_tells_machines_apart_and_hides_the_id() {
    let id = "0123456789abcdef0123456789abcdef";
    assert_eq!(machine_of(&format!("{id}\n")), machine_of(id));
    assert_eq!(machine_of(id), format!("{:016x}", sum_of(b"peervram 0123456789abcdef0123456789abcdef")));
    assert_ne!(machine_of(id), machine_of("0123456789abcdef0123456789abcdee"));
    assert_eq!(machine_of("\n"), "unknown");
    let here = fs::read_to_string("/etc/machine-id").unwrap_or_default();
    assert_eq!(machine(), machine_of(&here));
}

/// FNV's own examples: files and machines are called by this number in every version.
#[test]
fn the_number_in_a_name_is_fnv_1a() {
    for (bytes, sum) in
        [(&b""[..], 0xcbf2_9ce4_8422_2325), (b"a", 0xaf63_dc4c_8601_ec8c), (b"foobar", 0x8594_4171_f739_67e8)]
    {
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
