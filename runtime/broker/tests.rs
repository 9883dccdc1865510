//! A broker and its clients, in one process: what crosses the socket is the same.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use peervram_backends::host::{Backing, HostMemory, HostPool};
use peervram_backends::{Aperture, DmaRange, DmaRanges, Exporter as _, Kind, Owner, Peer, RawBytes, holders};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::books::Books;
use super::inbox::{Inbox, Notice};
use super::message::Borrow;
use super::served_memory::NotBorrowed;
use super::{Broker, LeaseState, Offer, Policy, client};
use crate::export::tests::Anyone;
use crate::{
    Direction, EventKind, Events, Lender, Outcome, Path as BytePath, RevokeCause, RevokeOptions, Trust,
};

pub(super) const MIB: u64 = 1 << 20;
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

/// A broker of 64 MiB of host memory.
pub(super) struct Scene {
    pub lender: Arc<Lender<HostPool>>,
    pub broker: Option<Broker>,
    pub socket: PathBuf,
    _folder: TempDir,
}

impl Scene {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("broker");
        let lender = Arc::new(Lender::new(HostPool::with_backing(64 * MIB, Backing::Memfd).unwrap()));
        let ranges = DmaRanges::whole(lender.device().region(0).unwrap()).unwrap();
        let aperture = Aperture::owned(ranges, Arc::new(RawBytes));
        let reset = |lender: &Lender<HostPool>, options| {
            lender.revoke(RevokeCause::Reset, "reset a stand-in", options, |_| Ok(()))
        };
        let offer = Offer::with_reset("host", &lender, aperture, reset).unwrap();
        let listener = Broker::listen(&socket).unwrap();
        let broker = Some(Broker::serve(listener, vec![offer], Policy::owner_only()).unwrap());
        Self { lender, broker, socket, _folder: folder }
    }

    pub fn client(&self) -> client::Broker {
        client::Broker::connect(&self.socket).unwrap()
    }

    fn raw(&self) -> Raw {
        Raw::connect(&self.socket)
    }
}

/// A client that says what it likes.
pub(super) struct Raw(UnixStream, Vec<u8>);

impl Raw {
    pub fn connect(path: &Path) -> Self {
        let socket = UnixStream::connect(path).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        Self(socket, Vec::new())
    }

    fn say(&mut self, call: &Value) {
        let mut bytes = serde_json::to_vec(call).unwrap();
        bytes.push(0);
        self.0.write_all(&bytes).unwrap();
    }

    /// None where the broker has closed the connection.
    fn hear(&mut self) -> Option<Value> {
        loop {
            if let Some(end) = self.1.iter().position(|byte| *byte == 0) {
                let rest = self.1.split_off(end + 1);
                let message = std::mem::replace(&mut self.1, rest);
                return Some(serde_json::from_slice(&message[..end]).unwrap());
            }
            let mut buffer = [0; 4096];
            match self.0.read(&mut buffer) {
                Ok(0) => return None,
                Ok(bytes) => self.1.extend_from_slice(&buffer[..bytes]),
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return None,
                Err(error) => panic!("{error}"),
            }
        }
    }

    pub fn call(&mut self, method: &str, parameters: Value) -> Value {
        self.say(&json!({ "method": format!("io.peervram.Broker.{method}"), "parameters": parameters }));
        self.hear().expect("a reply")
    }

    pub fn code(&mut self, method: &str, parameters: Value) -> String {
        let reply = self.call(method, parameters);
        match reply["error"].as_str() {
            Some("io.peervram.Broker.Failed") => reply["parameters"]["code"].as_str().unwrap().to_owned(),
            Some(error) => format!("{error} {}", reply["parameters"]),
            None => format!("{reply}"),
        }
    }
}

fn next_kind(events: &Events) -> &'static str {
    events.next_within(PATIENCE).unwrap().expect("an event").kind.code()
}

pub(super) fn wait_until(mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "it does not come");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn what_is_borrowed_is_attached_to_like_an_export() {
    let scene = Scene::new();
    let client = scene.client();
    let listed = client.list().unwrap();
    assert_eq!((listed[0].name.as_str(), listed[0].size, listed[0].free), ("host", 64 * MIB, 64 * MIB));
    let lease = client.borrow(client::Wish::of_size(5 * MIB).with_label("test")).unwrap();
    assert_eq!((lease.size_bytes(), lease.memory()), (5 * MIB, "host"));
    let attachment = lease.attach(Arc::new(Anyone), Trust::Unverified).unwrap();
    assert_eq!(attachment.path(), BytePath::Peer);
    let access = attachment.enter(Direction::Both).unwrap();
    assert_eq!(access.finish(), Outcome::Ok);
    let status = client.status().unwrap();
    let record = &status.leases[0];
    assert_eq!((record.lease, record.size, record.state), (lease.number(), 5 * MIB, LeaseState::Live));
    assert_eq!((record.label.as_deref(), record.process), (Some("test"), Some(std::process::id())));
    assert_eq!(record.importers, ["anyone"]);
    drop(attachment);
    lease.give_back(PATIENCE).unwrap();
    let status = client.status().unwrap();
    assert_eq!((status.leases.len(), status.quarantine.len(), status.memories[0].free), (0, 0, 64 * MIB));
}

#[test]
fn leases_are_memory_of_their_own() {
    let scene = Scene::new();
    let client = scene.client();
    let one = client.borrow(client::Wish::of_size(MIB)).unwrap();
    let two = client.borrow(client::Wish::of_ranges("host", &[DmaRange::new(8 * MIB, MIB)])).unwrap();
    rustix::io::pwrite(one.dma_buf().unwrap(), b"mine", 0).unwrap();
    let mut seen = [1; 4];
    rustix::io::pread(two.dma_buf().unwrap(), &mut seen, 0).unwrap();
    assert_eq!(seen, [0; 4]);
    let error = client.borrow(client::Wish::of_ranges("host", &[DmaRange::new(8 * MIB, MIB)])).unwrap_err();
    assert_eq!(error.kind(), Kind::Exhausted);
    // Whoever has it next sees nothing of it.
    let at = one.aperture().ranges().as_slice().to_vec();
    drop(one);
    let again = client.borrow(client::Wish::of_ranges("host", &at)).unwrap();
    rustix::io::pread(again.dma_buf().unwrap(), &mut seen, 0).unwrap();
    assert_eq!(seen, [0; 4]);
}

#[test]
fn a_reset_waits_for_the_accesses_of_a_client() {
    let scene = Scene::new();
    let (client, operator) = (scene.client(), scene.client());
    let lease = client.borrow(client::Wish::of_size(MIB)).unwrap();
    let attachment = lease.attach(Arc::new(Anyone), Trust::Unverified).unwrap();
    let events = lease.events().unwrap();
    let access = attachment.enter(Direction::Both).unwrap();
    let (tell, told) = mpsc::channel();
    std::thread::spawn(move || {
        tell.send(operator.reset("host", RevokeOptions::within(PATIENCE))).unwrap();
    });
    assert_eq!(next_kind(&events), "draining");
    assert_eq!(attachment.enter(Direction::Read).unwrap_err().cause, Some(RevokeCause::Reset));
    assert!(told.try_recv().is_err());
    assert_eq!(access.finish(), Outcome::Ok);
    assert_eq!(told.recv_timeout(PATIENCE).unwrap().unwrap(), 1);
    assert_eq!(next_kind(&events), "restored");
    assert!(!attachment.is_current());
    attachment.current().unwrap();
    assert_eq!(attachment.enter(Direction::Read).unwrap().finish(), Outcome::Ok);
    assert_eq!(scene.lender.generation(), 1);
}

/// The broker's reset is over before this process has heard of its end.
#[test]
fn a_lease_is_given_back_in_the_middle_of_a_reset() {
    let scene = Scene::new();
    let (client, operator) = (scene.client(), scene.client());
    for _ in 0..50 {
        let lease = client.borrow(client::Wish::of_size(MIB)).unwrap();
        operator.reset("host", RevokeOptions::within(PATIENCE)).unwrap();
        lease.give_back(PATIENCE).unwrap();
    }
    let status = client.status().unwrap();
    assert_eq!((status.leases.len(), status.memories[0].free), (0, 64 * MIB));
}

#[test]
fn who_is_late_is_named_and_goes_on() {
    let scene = Scene::new();
    let (client, operator) = (scene.client(), scene.client());
    let lease = client.borrow(client::Wish::of_size(MIB).with_label("slow")).unwrap();
    let attachment = lease.attach(Arc::new(Anyone), Trust::Unverified).unwrap();
    let events = lease.events().unwrap();
    let access = attachment.enter(Direction::Both).unwrap();
    let error = operator.reset("host", RevokeOptions::within(Duration::from_millis(50))).unwrap_err();
    assert_eq!(error.kind(), Kind::TimedOut);
    for word in ["slow", &format!("process {}", std::process::id()), "has not answered"] {
        assert!(error.to_string().contains(word), "{error}");
    }
    assert_eq!(next_kind(&events), "draining");
    wait_until(|| attachment.enter(Direction::Read).is_ok());
    assert_eq!(access.finish(), Outcome::Ok);
    assert_eq!(scene.lender.generation(), 0);
    // And once more, answered.
    assert_eq!(operator.reset("host", RevokeOptions::within(PATIENCE)).unwrap(), 1);
}

#[test]
fn a_client_that_is_late_is_torn_where_the_revoke_goes_on() {
    let scene = Scene::new();
    let (client, operator) = (scene.client(), scene.client());
    let lease = client.borrow(client::Wish::of_size(MIB)).unwrap();
    let attachment = lease.attach(Arc::new(Anyone), Trust::Unverified).unwrap();
    let events = lease.events().unwrap();
    let access = attachment.enter(Direction::Both).unwrap();
    let options = RevokeOptions::within(Duration::from_millis(50)).or_go_on();
    assert_eq!(operator.reset("host", options).unwrap(), 1);
    wait_until(|| {
        events.next_within(PATIENCE).unwrap().is_some_and(|event| matches!(event.kind, EventKind::Restored))
    });
    assert!(matches!(access.finish(), Outcome::Torn { .. }));
    attachment.current().unwrap();
    assert_eq!(attachment.enter(Direction::Both).unwrap().finish(), Outcome::Ok);
}

#[test]
fn the_end_of_a_broker_shuts_the_gates_of_its_clients() {
    let mut scene = Scene::new();
    let client = scene.client();
    let lease = client.borrow(client::Wish::of_size(MIB)).unwrap();
    let attachment = lease.attach(Arc::new(Anyone), Trust::Unverified).unwrap();
    let events = lease.events().unwrap();
    let access = attachment.enter(Direction::Both).unwrap();
    scene.broker.take().unwrap().close();
    wait_until(|| attachment.enter(Direction::Read).is_err());
    drop(access);
    wait_until(|| {
        events.next_within(PATIENCE).unwrap().is_some_and(|event| matches!(event.kind, EventKind::Gone))
    });
    assert_eq!(attachment.current().unwrap_err().kind(), Kind::Gone);
    assert_eq!(client.borrow(client::Wish::of_size(MIB)).unwrap_err().kind(), Kind::Gone);
    assert_eq!(client::Broker::connect(&scene.socket).unwrap_err().kind(), Kind::Gone);
}

#[test]
fn a_client_that_dies_leaves_its_memory_to_others() {
    let scene = Scene::new();
    let mut dying = scene.raw();
    let lease = dying.call("Borrow", json!({ "size": 64 * MIB }))["parameters"]["lease"].as_u64().unwrap();
    let client = scene.client();
    assert_eq!(client.status().unwrap().leases[0].lease, lease);
    drop(dying);
    wait_until(|| client.status().unwrap().leases.is_empty());
    client.borrow(client::Wish::of_size(64 * MIB)).unwrap();
}

#[test]
fn who_speaks_nonsense_is_told_and_disturbs_nobody() {
    let scene = Scene::new();
    let client = scene.client();
    let lease = client.borrow(client::Wish::of_size(MIB)).unwrap();
    let mut raw = scene.raw();
    assert_eq!(
        raw.code("Nothing", json!({})),
        "org.varlink.service.MethodNotFound {\"method\":\"io.peervram.Broker.Nothing\"}"
    );
    assert!(raw.code("Borrow", json!({ "sise": 1 })).contains("InvalidParameter {\"parameter\":\"sise\"}"));
    assert_eq!(raw.code("Borrow", json!({ "size": 65 * MIB })), "invalid-input");
    assert_eq!(raw.code("Borrow", json!({ "size": 1, "memory": "none" })), "not-found");
    assert_eq!(raw.code("Borrow", json!({ "size": 1, "direction": "read" })), "unsupported");
    assert_eq!(
        raw.code("Borrow", json!({ "memory": "host", "ranges": [{ "offset": 1, "length": 4096 }] })),
        "invalid-input"
    );
    assert_eq!(raw.code("Return", json!({ "lease": 77 })), "not-found");
    assert_eq!(
        raw.code("Drained", json!({ "lease": lease.number(), "drain": 1, "generation": 0 })),
        "invalid-input"
    );
    assert_eq!(raw.code("Release", json!({ "lease": 77 })), "not-found");
    assert!(raw.code("Watch", json!({})).contains("ExpectedMore"));
    raw.say(&json!({ "method": "org.example.Other.Call" }));
    assert_eq!(raw.hear().unwrap()["error"], "org.varlink.service.InterfaceNotFound");
    raw.say(&json!({ "method": "org.varlink.service.GetInterfaceDescription", "parameters": { "interface": "io.peervram.Broker" } }));
    assert_eq!(raw.hear().unwrap()["parameters"]["description"], super::INTERFACE);
    for nonsense in ["{", "[]", "{\"method\":1}", "{\"method\":\"x\",\"else\":1}", &"[".repeat(2000)] {
        let mut raw = scene.raw();
        raw.0.write_all(nonsense.as_bytes()).unwrap();
        raw.0.write_all(&[0]).unwrap();
        assert_eq!(raw.hear(), None, "{nonsense}");
    }
    let mut raw = scene.raw();
    // The broker may close it before everything is written.
    let _ = raw.0.write_all(&vec![b'x'; 1 << 20]);
    assert_eq!(raw.hear(), None);
    assert_eq!(client.status().unwrap().leases.len(), 1);
}

#[test]
fn calls_that_come_at_once_are_answered_in_order() {
    let scene = Scene::new();
    let mut raw = scene.raw();
    for size in 1..=20 {
        raw.say(&json!({ "method": "io.peervram.Broker.Borrow", "parameters": { "size": size * 4096 } }));
    }
    raw.say(&json!({ "method": "io.peervram.Broker.List", "oneway": true }));
    raw.say(
        &json!({ "method": "io.peervram.Broker.Borrow", "parameters": { "size": 4096 }, "oneway": true }),
    );
    for size in 1..=20 {
        assert_eq!(raw.hear().unwrap()["parameters"]["size"], size * 4096);
    }
    // A lease that nobody was told of is nobody's.
    assert_eq!(raw.call("Status", json!({}))["parameters"]["leases"].as_array().unwrap().len(), 20);
}

#[test]
fn a_client_that_does_not_read_is_given_up() {
    let scene = Scene::new();
    let mut deaf = scene.raw();
    deaf.0.set_write_timeout(Some(Duration::from_secs(1))).unwrap();
    let call = json!({ "method": "org.varlink.service.GetInterfaceDescription", "parameters": { "interface": "io.peervram.Broker" } });
    let mut bytes = serde_json::to_vec(&call).unwrap();
    bytes.push(0);
    wait_until(|| deaf.0.write_all(&bytes).is_err());
    scene.client().borrow(client::Wish::of_size(MIB)).unwrap();
}

/// As Python's varlink does it: calls on one connection, events on another.
#[test]
fn a_foreign_client_borrows_is_told_answers_and_returns() {
    let scene = Scene::new();
    let (mut calls, mut events, mut other) = (scene.raw(), scene.raw(), scene.raw());
    let connection = calls.call("Identify", json!({}))["parameters"]["connection"].clone();
    let lease = calls.call("Borrow", json!({ "size": MIB }))["parameters"]["lease"].clone();
    for (watcher, parameters) in [(&mut events, json!({})), (&mut other, json!({ "connection": connection }))]
    {
        watcher.say(&json!({ "method": "io.peervram.Broker.Watch", "more": true, "parameters": parameters }));
    }
    let operator = scene.client();
    let reset = std::thread::spawn(move || operator.reset("host", RevokeOptions::within(PATIENCE)));
    let told = events.hear().unwrap();
    let event = &told["parameters"]["event"];
    assert_eq!(
        (&told["continues"], &event["lease"], &event["event"]),
        (&json!(true), &lease, &json!("draining"))
    );
    assert_eq!((&event["cause"], &event["atDeadline"]), (&json!("reset"), &json!("call_off")));
    let stale = json!({ "lease": lease, "drain": event["drain"], "generation": 7 });
    assert_eq!(calls.code("Drained", stale), "invalid-input");
    let answer = json!({ "lease": lease, "drain": event["drain"], "generation": event["generation"] });
    assert_eq!(calls.call("Drained", answer.clone()), json!({ "parameters": {} }));
    assert_eq!(reset.join().unwrap().unwrap(), 1);
    let told = events.hear().unwrap();
    let event = &told["parameters"]["event"];
    assert_eq!((&event["event"], &event["generation"]), (&json!("restored"), &json!(1)));
    // Twice is once too often.
    assert_eq!(calls.code("Drained", answer), "invalid-input");
    assert_eq!(calls.call("Return", json!({ "lease": lease })), json!({ "parameters": {} }));
    // Who returns a lease is not told that it is gone; whose lease is evicted is.
    let next = calls.call("Borrow", json!({ "size": MIB }))["parameters"]["lease"].clone();
    scene.client().evict(next.as_u64().unwrap()).unwrap();
    for kind in ["draining", "restored"] {
        assert_eq!(other.hear().unwrap()["parameters"]["event"]["event"], kind);
    }
    for mut watcher in [events, other] {
        let told = watcher.hear().unwrap();
        let event = &told["parameters"]["event"];
        assert_eq!((&event["event"], &event["lease"]), (&json!("gone"), &next));
    }
}

#[test]
fn two_brokers_do_not_share_a_socket() {
    let mut scene = Scene::new();
    assert_eq!(Broker::listen(&scene.socket).unwrap_err().kind(), Kind::Busy);
    scene.broker.take().unwrap().close();
    Broker::listen(&scene.socket).unwrap();
    let folder = scene.socket.parent().unwrap();
    assert_eq!(Broker::listen(folder).unwrap_err().kind(), Kind::InvalidInput);
    assert_eq!(Broker::listen(&folder.join("none/broker")).unwrap_err().kind(), Kind::NotFound);
    assert_eq!(Broker::listen(&folder.join("x".repeat(120))).unwrap_err().kind(), Kind::InvalidInput);
}

/// Memory of a device stays what it was: it is nobody's before the kernel has freed the dma-buf, or an operator says that
/// it has, and holds nothing of what was there.
#[test]
fn memory_of_a_device_is_quarantined_and_scrubbed() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("broker");
    let memory = HostMemory::with_backing(MIB, Backing::Memfd).unwrap();
    let whole = DmaRanges::whole(memory.region()).unwrap();
    let bytes = memory.map(&whole).unwrap();
    bytes.write(4096, b"of somebody").unwrap();
    let lender = Arc::new(Lender::new(memory));
    let offer = Offer::new("vram", &lender, Aperture::owned(whole, Arc::new(RawBytes))).unwrap();
    let broker = Broker::serve(Broker::listen(&socket).unwrap(), vec![offer], Policy::owner_only()).unwrap();
    let client = client::Broker::connect(&socket).unwrap();
    let all = || client::Wish::of_size(MIB).of("vram");
    let seen = |lease: &client::Lease| {
        let mut seen = [1; 11];
        rustix::io::pread(lease.dma_buf().unwrap(), &mut seen, 4096).unwrap();
        seen
    };
    // Scrubbed first, which borrowing waits for.
    let lease = client.borrow(all()).unwrap();
    assert_eq!(seen(&lease), [0; 11]);
    rustix::io::pwrite(lease.dma_buf().unwrap(), b"of the last", 4096).unwrap();
    let number = lease.number();
    lease.give_back(PATIENCE).unwrap();
    // A memfd is in no list of dma-bufs: where that is read, it counts as freed.
    if holders::Attachments::read().is_err() {
        let status = client.status().unwrap();
        assert_eq!((status.quarantine[0].lease, status.memories[0].free), (number, 0));
        assert_eq!(client.borrow(all()).unwrap_err().kind(), Kind::Exhausted);
        wait_until(|| client.status().unwrap().quarantine[0].why.contains("bufinfo"));
        client.release(number).unwrap();
        assert_eq!(client.release(number).unwrap_err().kind(), Kind::NotFound);
    }
    let lease = client.borrow(all()).unwrap();
    assert_eq!(seen(&lease), [0; 11]);
    drop(lease);
    broker.close();
    Arc::into_inner(lender).expect("the broker has let go of the lender").close(PATIENCE).unwrap();
}

/// A borrow that comes before the broker's thread has heard of a reset: what is free was scrubbed before it, and not since.
#[test]
fn nothing_is_lent_before_a_reset_is_heard_of() {
    let memory = HostMemory::with_backing(MIB, Backing::Memfd).unwrap();
    let whole = DmaRanges::whole(memory.region()).unwrap();
    let lender = Arc::new(Lender::new(memory));
    let offer = Offer::new("vram", &lender, Aperture::owned(whole, Arc::new(RawBytes))).unwrap();
    let inbox = Arc::new(Inbox::new().unwrap());
    let mut books = Books::new(vec![offer], Policy::owner_only(), &inbox).unwrap();
    let peer = Arc::new(Peer::of(UnixStream::pair().unwrap().0).unwrap());
    let wish = Borrow { size: Some(MIB), ..Borrow::default() };
    let hear = |books: &mut Books| {
        for notice in inbox.take() {
            match notice {
                Notice::Memory(memory, notice, generation) => books.note_memory(memory, notice, generation),
                Notice::Scrubbed(memory, piece, result) => books.scrubbed(memory, piece, &result),
                other => panic!("{other:?}"),
            }
        }
        books.pass_time();
        books.status().memories[0].unscrubbed == 0
    };
    wait_until(|| hear(&mut books));
    lender.revoke(RevokeCause::Reset, "reset a stand-in", PATIENCE, |_| Ok(())).unwrap();
    assert!(matches!(books.borrow(&peer, 2, &wish), Err(NotBorrowed::Later)));
    wait_until(|| hear(&mut books));
    books.borrow(&peer, 2, &wish).unwrap();
}

/// Where nobody has a lease, too: the owner's engine scrubs, and a reset under it would leave it without work for ever.
#[test]
fn an_owner_rests_around_a_revoke_that_nobody_else_hears_of() {
    #[derive(Default)]
    struct Resting(AtomicU64, AtomicU64);
    impl Owner for Resting {
        fn name(&self) -> &str {
            "an owner who counts"
        }
        fn flush(&self, _: &DmaRanges) -> crate::Result<()> {
            Ok(())
        }
        fn invalidate(&self, _: &DmaRanges) -> crate::Result<()> {
            Ok(())
        }
        fn quiesce(&self, _: &DmaRanges) -> crate::Result<()> {
            self.0.fetch_add(1, Ordering::SeqCst);
            Ok(())
        }
        fn resume(&self, _: &DmaRanges) -> crate::Result<()> {
            self.1.fetch_add(1, Ordering::SeqCst);
            Ok(())
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("broker");
    let lender = Arc::new(Lender::new(HostMemory::with_backing(MIB, Backing::Memfd).unwrap()));
    let whole = DmaRanges::whole(lender.device().region(0).unwrap()).unwrap();
    let owner = Arc::new(Resting::default());
    let offer = Offer::new("vram", &lender, Aperture::owned(whole, Arc::clone(&owner) as _)).unwrap();
    let _broker = Broker::serve(Broker::listen(&socket).unwrap(), vec![offer], Policy::owner_only()).unwrap();
    let client = client::Broker::connect(&socket).unwrap();
    wait_until(|| client.status().unwrap().memories[0].unscrubbed == 0);
    lender.revoke(RevokeCause::Reset, "reset a stand-in", PATIENCE, |_| Ok(())).unwrap();
    let count = |of: &AtomicU64| of.load(Ordering::SeqCst);
    assert!(count(&owner.0) >= 1, "it was not told");
    assert_eq!(count(&owner.0), count(&owner.1));
}

/// In the middle of scrubbing, too.
#[test]
fn a_broker_that_is_closed_has_let_go_of_its_lenders() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("broker");
    for _ in 0..8 {
        let lender = Arc::new(Lender::new(HostMemory::with_backing(64 * MIB, Backing::Memfd).unwrap()));
        let whole = DmaRanges::whole(lender.device().region(0).unwrap()).unwrap();
        let offer = Offer::new("vram", &lender, Aperture::owned(whole, Arc::new(RawBytes))).unwrap();
        let listener = Broker::listen(&socket).unwrap();
        Broker::serve(listener, vec![offer], Policy::owner_only()).unwrap().close();
        Arc::into_inner(lender).expect("the broker has let go of the lender").close(PATIENCE).unwrap();
    }
}

/// The kernel has freed memory some time after its last descriptor was closed.
#[test]
fn what_was_just_returned_is_waited_for_and_what_may_never_be_free_is_not() {
    let memory = HostMemory::with_backing(MIB, Backing::Memfd).unwrap();
    let lender = Arc::new(Lender::new(memory));
    let ranges = DmaRanges::whole(lender.device().region(0).unwrap()).unwrap();
    let offer = Offer::new("all", &lender, Aperture::owned(ranges, Arc::new(RawBytes))).unwrap();
    let inbox = Arc::new(Inbox::new().unwrap());
    let mut books = Books::new(vec![offer], Policy::owner_only(), &inbox).unwrap();
    let peer = Arc::new(Peer::of(UnixStream::pair().unwrap().0).unwrap());
    let wish = Borrow { size: Some(MIB), ..Borrow::default() };
    let mut lease = 0;
    wait_until(|| {
        for notice in inbox.take() {
            if let Notice::Scrubbed(memory, piece, result) = notice {
                books.scrubbed(memory, piece, &result);
            }
        }
        books.borrow(&peer, 2, &wish).map(|lent| lease = lent).is_ok()
    });
    assert!(matches!(books.borrow(&peer, 2, &wish), Err(NotBorrowed::Failed(_))), "it is lent");
    books.end(lease, "as a test of quarantine");
    assert!(matches!(books.borrow(&peer, 2, &wish), Err(NotBorrowed::Later)));
    assert!(books.pass_time().is_some(), "whoever waits is not looked at again");
    books.unproven(lease, "as a test of quarantine".into());
    let Err(NotBorrowed::Failed(error)) = books.borrow(&peer, 2, &wish) else {
        panic!("it is in quarantine")
    };
    assert_eq!(error.kind(), Kind::Exhausted);
}

#[test]
fn a_broker_that_ends_in_peace_waits_for_what_is_in_flight() {
    let mut scene = Scene::new();
    let client = scene.client();
    let lease = client.borrow(client::Wish::of_size(MIB)).unwrap();
    let attachment = lease.attach(Arc::new(Anyone), Trust::Unverified).unwrap();
    let events = lease.events().unwrap();
    let access = attachment.enter(Direction::Both).unwrap();
    let broker = scene.broker.take().unwrap();
    let (broker, error) = broker.close_within(Duration::from_millis(20)).unwrap_err().into_parts();
    assert_eq!(error.kind(), Kind::TimedOut);
    assert_eq!(access.finish(), Outcome::Ok);
    wait_until(|| next_kind(&events) == "called-off");
    let access = attachment.enter(Direction::Both).unwrap();
    std::thread::scope(|scope| {
        let closing = scope.spawn(|| broker.close_within(PATIENCE).map_err(crate::Error::from));
        assert_eq!(next_kind(&events), "draining");
        assert_eq!(access.finish(), Outcome::Ok);
        closing.join().unwrap().unwrap();
    });
    wait_until(|| next_kind(&events) == "gone");
    assert_eq!(attachment.current().unwrap_err().kind(), Kind::Gone);
    assert_eq!(client::Broker::connect(&scene.socket).unwrap_err().kind(), Kind::Gone);
    // The lender is its owner's alone.
    assert_eq!(scene.lender.generation(), 1);
}
