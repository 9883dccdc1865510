//! What a client knows of its memory before any message has come: what the broker writes, the client reads.

use std::sync::Arc;
use std::time::Duration;

use super::client;
use super::tests::{MIB, PATIENCE, Scene, wait_until};
use crate::export::tests::Anyone;
use crate::{Attachment, Direction, Kind, Outcome, RevokeCause, RevokeOptions, Trust};

const AT_ONCE: RevokeOptions = RevokeOptions::within(Duration::ZERO).or_go_on();

/// A lease that is attached to.
struct Borrowed {
    client: client::Broker,
    lease: Option<client::Lease>,
    attachment: Attachment<Anyone>,
}

impl Borrowed {
    fn of(scene: &Scene) -> Self {
        let client = scene.client();
        let lease = client.borrow(client::Wish::of_size(MIB)).unwrap();
        let attachment = lease.attach(Arc::new(Anyone), Trust::Unverified).unwrap();
        Self { client, lease: Some(lease), attachment }
    }

    fn lease(&self) -> &client::Lease {
        self.lease.as_ref().unwrap()
    }
}

fn reset(scene: &Scene, options: RevokeOptions) -> crate::Result<()> {
    scene.lender.revoke(RevokeCause::Reset, "reset a stand-in", options, |_| Ok(()))
}

#[test]
fn an_access_is_torn_though_nobody_has_said_that_the_memory_was_taken() {
    let scene = Scene::new();
    let borrowed = Borrowed::of(&scene);
    let unheard = borrowed.client.hear_nothing();
    let access = borrowed.attachment.enter(Direction::Both).unwrap();
    let dropped = borrowed.attachment.enter(Direction::Both).unwrap();
    reset(&scene, AT_ONCE).unwrap();
    assert_eq!(access.finish(), Outcome::Torn { generation: 1 });
    // Nothing is imported of a generation that is over.
    let other = borrowed.lease().attach(Arc::new(Anyone), Trust::Unverified).unwrap_err();
    assert_eq!(crate::Error::from(other).kind(), Kind::Revoked);
    drop(unheard);
    drop(dropped);
    wait_until(|| borrowed.attachment.generation() == 1 && borrowed.attachment.current().is_ok());
    assert_eq!(borrowed.attachment.enter(Direction::Both).unwrap().finish(), Outcome::Ok);
}

#[test]
fn work_in_flight_is_torn_though_nobody_has_said_so() {
    let scene = Scene::new();
    let borrowed = Borrowed::of(&scene);
    let _unheard = borrowed.client.hear_nothing();
    let done = peervram_backends::Flag::default();
    let in_flight = borrowed.attachment.enter(Direction::Both).unwrap().finish_when(done.clone());
    reset(&scene, AT_ONCE).unwrap();
    done.set();
    assert_eq!(in_flight.wait(PATIENCE), Some(Outcome::Torn { generation: 1 }));
}

#[test]
fn what_was_called_off_tears_nobody() {
    let scene = Scene::new();
    let borrowed = Borrowed::of(&scene);
    let unheard = borrowed.client.hear_nothing();
    let access = borrowed.attachment.enter(Direction::Both).unwrap();
    let error = reset(&scene, RevokeOptions::within(Duration::from_millis(20))).unwrap_err();
    assert_eq!(error.kind(), Kind::TimedOut);
    assert_eq!(borrowed.attachment.enter(Direction::Read).unwrap().finish(), Outcome::Ok);
    assert_eq!(access.finish(), Outcome::Ok);
    // Both messages come now, and the answer to the first one is too late.
    let events = borrowed.lease().events().unwrap();
    drop(unheard);
    for kind in ["draining", "called-off"] {
        assert_eq!(events.next_within(PATIENCE).unwrap().unwrap().kind.code(), kind);
    }
    assert_eq!(borrowed.attachment.generation(), 0);
    assert_eq!(borrowed.attachment.enter(Direction::Read).unwrap().finish(), Outcome::Ok);
}

#[test]
fn an_access_is_torn_where_the_lease_was_evicted_or_its_broker_has_ended() {
    let ends: [fn(&mut Scene, u64); 2] = [
        |scene, lease| scene.client().evict(lease).unwrap(),
        |scene, _| scene.broker.take().unwrap().close(),
    ];
    for end in ends {
        let mut scene = Scene::new();
        let mut borrowed = Borrowed::of(&scene);
        let unheard = borrowed.client.hear_nothing();
        let access = borrowed.attachment.enter(Direction::Both).unwrap();
        end(&mut scene, borrowed.lease().number());
        assert_eq!(access.finish(), Outcome::Torn { generation: 1 });
        drop(unheard);
        wait_until(|| borrowed.attachment.current().is_err_and(|error| error.kind() == Kind::Gone));
        drop(borrowed.lease.take());
    }
}

#[test]
fn the_next_lease_with_the_same_word_does_not_open_the_one_before() {
    let scene = Scene::new();
    let borrowed = Borrowed::of(&scene);
    let _unheard = borrowed.client.hear_nothing();
    let operator = scene.client();
    operator.evict(borrowed.lease().number()).unwrap();
    let next = operator.borrow(client::Wish::of_size(MIB)).unwrap();
    let attachment = next.attach(Arc::new(Anyone), Trust::Unverified).unwrap();
    assert_eq!(attachment.enter(Direction::Both).unwrap().finish(), Outcome::Ok);
    let late = borrowed.attachment.enter(Direction::Both).unwrap();
    assert_eq!(late.finish(), Outcome::Torn { generation: 1 });
}

#[test]
fn who_has_no_lease_is_not_shown_where_the_leases_of_others_are() {
    let scene = Scene::new();
    let mut raw = super::tests::Raw::connect(&scene.socket);
    assert_eq!(raw.code("Words", serde_json::json!({})), "permission-denied");
    let _borrowed = Borrowed::of(&scene);
    // The same process, on another connection.
    assert_eq!(raw.code("Words", serde_json::json!({})), r#"{"parameters":{"words":0}}"#);
}
