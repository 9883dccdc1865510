//! The shell with real threads and a real clock: who is waited for, who is named, what is heard.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use peervram_backends::{Aperture, DmaRanges, Flag, OnRevoke, Owner, deadline_after};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::fakes::{Card, Reader};
use super::machine::RevokeOptions;
use crate::{
    AttachOptions, Attachment, Direction, Error, EventKind, Events, Kind, Lender, Outcome, Result,
    RevokeCause, Trust,
};

const PATIENCE: Duration = Duration::from_secs(20);
const SHORT: Duration = Duration::from_millis(20);

fn reset(lender: &Lender<Card>, options: impl Into<RevokeOptions>) -> Result<()> {
    lender.revoke(RevokeCause::Reset, "reset a card", options, |_| Ok(()))
}

fn go_on(timeout: Duration) -> RevokeOptions {
    RevokeOptions::within(timeout).or_go_on()
}

/// What was heard, but for callbacks that a busy machine made slow.
fn without_slow<T>(mut heard: Vec<T>, code: impl Fn(&T) -> &str) -> Vec<T> {
    heard.retain(|one| code(one) != "slow-callback");
    heard
}

/// An attachment that somebody else is inside of, until told.
fn hold_inside(attachment: &Arc<Attachment<Reader>>) -> (mpsc::Sender<()>, thread::JoinHandle<Outcome>) {
    let (leave, told) = mpsc::channel();
    let (entered, is_in) = mpsc::channel();
    let attachment = Arc::clone(attachment);
    let holder = thread::spawn(move || {
        let access = attachment.enter(Direction::Both).unwrap();
        entered.send(()).unwrap();
        told.recv().ok();
        access.finish()
    });
    is_in.recv().unwrap();
    (leave, holder)
}

#[test]
fn an_import_is_stale_after_a_revoke_until_it_is_taken_anew() {
    let (lender, export) = Card::lend();
    let attachment = export.attach(Reader::new(OnRevoke::Reimport), Trust::Unverified).unwrap();
    assert_eq!(attachment.enter(Direction::Both).unwrap().finish(), Outcome::Ok);
    reset(&lender, PATIENCE).unwrap();
    assert_eq!((export.generation(), attachment.generation()), (1, 1));
    let revoked = attachment.enter(Direction::Both).unwrap_err();
    assert_eq!((revoked.generation, revoked.cause), (1, Some(RevokeCause::Reset)));
    assert_eq!(Error::from(revoked).kind(), Kind::Revoked);
    assert!(!attachment.is_current());
    assert_eq!(attachment.current().unwrap().generation(), 1);
    assert_eq!(attachment.enter(Direction::Both).unwrap().generation(), 1);
    assert_eq!(attachment.importer().alive(), 1);
}

#[test]
fn an_importer_that_heals_is_let_in_as_it_is() {
    let (lender, export) = Card::lend();
    let attachment = export.attach(Reader::new(OnRevoke::SelfHeals), Trust::Unverified).unwrap();
    reset(&lender, PATIENCE).unwrap();
    let access = attachment.enter(Direction::Both).unwrap();
    assert_eq!((access.generation(), access.import().generation()), (1, 0));
}

#[test]
fn what_must_be_freed_is_freed_before_the_call_and_imported_after_it() {
    let (lender, export) = Card::lend();
    let attachment = export.attach(Reader::new(OnRevoke::FreeBefore), Trust::Unverified).unwrap();
    let reader = Arc::clone(attachment.importer());
    let at_the_call = Arc::new(AtomicUsize::new(usize::MAX));
    let seen = Arc::clone(&at_the_call);
    lender
        .revoke(RevokeCause::Reset, "reset a card", PATIENCE, move |_| {
            seen.store(reader.alive(), Ordering::SeqCst);
            Ok(())
        })
        .unwrap();
    assert_eq!(at_the_call.load(Ordering::SeqCst), 0);
    assert_eq!(attachment.importer().alive(), 0);
    attachment.current().unwrap();
    assert_eq!(attachment.enter(Direction::Both).unwrap().finish(), Outcome::Ok);
    assert_eq!(attachment.importer().alive(), 1);
}

#[test]
fn an_import_in_somebodys_hands_is_not_freed_under_them() {
    let (lender, export) = Card::lend();
    let attachment = export.attach(Reader::new(OnRevoke::FreeBefore), Trust::Unverified).unwrap();
    let current = attachment.current().unwrap();
    for options in [RevokeOptions::from(SHORT), go_on(SHORT)] {
        let error = reset(&lender, options).unwrap_err();
        assert_eq!(error.kind(), Kind::StillInUse);
        assert!(error.to_string().contains("reader has its import in use"), "{error}");
    }
    assert_eq!(export.generation(), 0);
    drop(current);
    reset(&lender, PATIENCE).unwrap();
}

#[test]
fn an_import_that_outlives_its_attachment_is_waited_for() {
    let (lender, export) = Card::lend();
    let attachment = export.attach(Reader::new(OnRevoke::FreeBefore), Trust::Unverified).unwrap();
    let reader = Arc::clone(attachment.importer());
    let current = attachment.current().unwrap();
    drop(attachment);
    assert_eq!(reader.alive(), 1);
    assert_eq!(reset(&lender, SHORT).unwrap_err().kind(), Kind::StillInUse);
    drop(current);
    assert_eq!(reader.alive(), 0);
    reset(&lender, PATIENCE).unwrap();
    export.close().unwrap();
}

#[test]
fn who_is_late_is_named_and_nobody_else_is_harmed() {
    let (lender, export) = Card::lend();
    let attach = |label| {
        let options = AttachOptions::new(Trust::Unverified).with_label(label);
        Arc::new(export.attach(Reader::new(OnRevoke::Reimport), options).unwrap())
    };
    let (late, other) = (attach("frame 3"), attach("frame 4"));
    let (leave, holder) = hold_inside(&late);
    let begun = Instant::now();
    let error = reset(&lender, SHORT).unwrap_err();
    assert!(begun.elapsed() >= SHORT);
    assert_eq!(error.kind(), Kind::TimedOut);
    assert_eq!(error.device(), Some("card"));
    assert!(
        error.to_string().ends_with("end as torn") && error.why().contains("reader (frame 3) is inside"),
        "{error}"
    );
    assert_eq!(export.generation(), 0);
    assert_eq!(other.enter(Direction::Both).unwrap().finish(), Outcome::Ok);
    assert_eq!(late.enter(Direction::Both).unwrap().finish(), Outcome::Ok);
    leave.send(()).unwrap();
    assert_eq!(holder.join().unwrap(), Outcome::Ok);
    reset(&lender, PATIENCE).unwrap();
}

#[test]
fn no_time_at_all_is_enough_where_nobody_is_inside() {
    let (lender, export) = Card::lend();
    let attach = || export.attach(Reader::new(OnRevoke::Reimport), Trust::Unverified).unwrap();
    let _attachments = [attach(), attach(), attach()];
    reset(&lender, Duration::ZERO).unwrap();
    assert_eq!(export.generation(), 1);
}

#[test]
fn who_is_late_is_torn_where_the_revoke_goes_on() {
    let (lender, export) = Card::lend();
    let attachment = Arc::new(export.attach(Reader::new(OnRevoke::Reimport), Trust::Unverified).unwrap());
    let (leave, holder) = hold_inside(&attachment);
    // It finishes while the call runs: the kernel may have taken the memory before or after.
    let finish = move |_: &Card| {
        leave.send(()).unwrap();
        assert_eq!(holder.join().unwrap(), Outcome::Torn { generation: 1 });
        Ok(())
    };
    lender.revoke(RevokeCause::Reset, "reset a card", go_on(SHORT), finish).unwrap();
    assert_eq!(export.generation(), 1);
}

#[test]
fn a_thread_that_is_inside_is_not_left_to_wait_for_itself() {
    let (lender, export) = Card::lend();
    let attachment = export.attach(Reader::new(OnRevoke::Reimport), Trust::Unverified).unwrap();
    let access = attachment.enter(Direction::Both).unwrap();
    let begun = Instant::now();
    assert_eq!(reset(&lender, PATIENCE).unwrap_err().kind(), Kind::WouldDeadlock);
    assert!(begun.elapsed() < PATIENCE / 2);
    // Another device's memory is another matter.
    let (elsewhere, _export) = Card::lend();
    reset(&elsewhere, PATIENCE).unwrap();
    assert_eq!(access.finish(), Outcome::Ok);
    reset(&lender, PATIENCE).unwrap();
}

#[test]
fn an_access_lasts_until_its_signal() {
    let (lender, export) = Card::lend();
    let attachment = export.attach(Reader::new(OnRevoke::Reimport), Trust::Unverified).unwrap();
    let flag = Flag::new();
    let in_flight = attachment.enter(Direction::Both).unwrap().finish_when(flag.clone());
    // This thread is no longer inside: a device is.
    assert_eq!(reset(&lender, SHORT).unwrap_err().kind(), Kind::TimedOut);
    assert_eq!(in_flight.wait(Duration::ZERO), None);
    thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(SHORT);
            flag.set();
        });
        reset(&lender, PATIENCE).unwrap();
    });
    assert_eq!(in_flight.wait(Duration::ZERO), Some(Outcome::Ok));
    assert_eq!(export.generation(), 1);
}

/// Compiles only while `Access` is not `Send`: of a type that is, there would be two implementations to choose from.
#[test]
fn an_access_cannot_change_threads() {
    trait Stays<Why> {
        fn stays() {}
    }
    struct Anything;
    impl<T> Stays<Anything> for T {}
    struct IsSend;
    impl<T: Send> Stays<IsSend> for T {}
    <crate::Access<'static, Reader> as Stays<_>>::stays();
}

#[test]
fn a_lost_signal_is_named_and_can_be_given_up() {
    struct Lost;
    impl peervram_backends::Signal for Lost {
        fn wait(&self, _: Duration) -> Result<bool> {
            Err(Error::new(Kind::Vulkan, "wait for a fence", "the device is lost"))
        }
    }
    let (lender, export) = Card::lend();
    let attachment = export.attach(Reader::new(OnRevoke::Reimport), Trust::Unverified).unwrap();
    struct Broken;
    impl peervram_backends::Signal for Broken {
        fn wait(&self, _: Duration) -> Result<bool> {
            panic!("a signal's own fault")
        }
    }
    let lost = attachment.enter(Direction::Both).unwrap().finish_when(Lost);
    let broken = attachment.enter(Direction::Both).unwrap().finish_when(Broken);
    let error = reset(&lender, SHORT).unwrap_err();
    assert!(error.kind() == Kind::TimedOut && error.why().contains("inside 2 times"), "{error}");
    assert_eq!((lost.abandon(), broken.abandon()), (Outcome::Ok, Outcome::Ok));
    reset(&lender, PATIENCE).unwrap();
}

#[test]
fn work_that_outlives_its_attachment_keeps_the_import_and_no_longer() {
    let (lender, export) = Card::lend();
    let attachment = export.attach(Reader::new(OnRevoke::FreeBefore), Trust::Unverified).unwrap();
    let (reader, flag) = (Arc::clone(attachment.importer()), Flag::new());
    drop(attachment.enter(Direction::Both).unwrap().finish_when(flag.clone()));
    attachment.detach().unwrap();
    assert_eq!(reader.alive(), 1);
    assert_eq!(reset(&lender, SHORT).unwrap_err().kind(), Kind::StillInUse);
    flag.set();
    let deadline = deadline_after(PATIENCE);
    while reader.alive() > 0 {
        assert!(Instant::now() < deadline, "it is never freed");
        thread::sleep(Duration::from_millis(1));
    }
    reset(&lender, PATIENCE).unwrap();
    lender.close(PATIENCE).unwrap();
}

#[test]
fn giving_work_up_ends_the_wait_for_it() {
    let (lender, export) = Card::lend();
    let attachment = export.attach(Reader::new(OnRevoke::Reimport), Trust::Unverified).unwrap();
    let in_flight = attachment.enter(Direction::Both).unwrap().finish_when(Flag::new());
    let begun = Instant::now();
    thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(SHORT);
            let _ = in_flight.abandon();
        });
        reset(&lender, PATIENCE).unwrap();
    });
    assert!(begun.elapsed() < PATIENCE / 2);
}

#[test]
fn an_importer_that_panics_while_freeing_does_not_end_the_revoke() {
    struct Clumsy;
    impl peervram_backends::Importer for Clumsy {
        type Memory = ();
        fn name(&self) -> String {
            "clumsy".into()
        }
        fn on_revoke(&self) -> OnRevoke {
            OnRevoke::FreeBefore
        }
        fn governed_by_p2pdma(&self) -> bool {
            false
        }
        fn import(&self, _: &peervram_backends::DmaBuf) -> Result<()> {
            Ok(())
        }
        fn release(&self, (): ()) -> Result<()> {
            panic!("an importer's own fault")
        }
    }
    let (lender, export) = Card::lend();
    let attachment = export.attach(Arc::new(Clumsy), Trust::Unverified).unwrap();
    reset(&lender, PATIENCE).unwrap();
    reset(&lender, PATIENCE).unwrap();
    assert_eq!(attachment.generation(), 2);
}

#[test]
fn memory_is_not_gone_before_it_is() {
    let (lender, export) = Card::lend();
    let attachment = Arc::new(export.attach(Reader::new(OnRevoke::Reimport), Trust::Unverified).unwrap());
    let (leave, holder) = hold_inside(&attachment);
    let events = export.events().unwrap();
    let closing = thread::spawn(move || lender.close(PATIENCE).map_err(Error::from));
    assert!(matches!(events.next_within(PATIENCE).unwrap().unwrap().kind, EventKind::Draining { .. }));
    let revoked = attachment.enter(Direction::Both).unwrap_err();
    assert_eq!(revoked.cause, Some(RevokeCause::ExporterGone));
    assert_eq!(Error::from(revoked).kind(), Kind::Revoked);
    leave.send(()).unwrap();
    assert_eq!(holder.join().unwrap(), Outcome::Ok);
    closing.join().unwrap().unwrap();
    assert_eq!(Error::from(attachment.enter(Direction::Both).unwrap_err()).kind(), Kind::Gone);
}

#[test]
fn a_callback_may_hold_the_last_of_its_attachment() {
    for _ in 0..300 {
        let (lender, export) = Card::lend();
        let attachment = Arc::new(export.attach(Reader::new(OnRevoke::Reimport), Trust::Unverified).unwrap());
        let held = Arc::clone(&attachment);
        let subscription = attachment.on_event(move |_| assert!(held.generation() < 9));
        drop(attachment);
        thread::scope(|scope| {
            scope.spawn(move || drop(subscription));
            reset(&lender, PATIENCE).unwrap();
        });
    }
}

#[test]
fn a_call_that_fails_has_revoked() {
    let (lender, export) = Card::lend();
    let attachment = export.attach(Reader::new(OnRevoke::Reimport), Trust::Unverified).unwrap();
    let refuse = |_: &Card| Err(Error::new(Kind::Busy, "reset a card", "not now"));
    let result = lender.revoke(RevokeCause::Reset, "reset a card", PATIENCE, refuse);
    assert_eq!(result.unwrap_err().kind(), Kind::Busy);
    assert_eq!(export.generation(), 1);
    assert_eq!(attachment.enter(Direction::Both).unwrap_err().generation, 1);
}

#[test]
fn a_call_that_hangs_is_described_and_everything_else_goes_on() {
    let (lender, export) = Card::lend();
    let events = lender.events().unwrap();
    let attachment = export.attach(Reader::new(OnRevoke::Reimport), Trust::Unverified).unwrap();
    let (unmap, told) = mpsc::channel();
    let hang = move |_: &Card| {
        told.recv().ok();
        Ok(())
    };
    let options = RevokeOptions::within(PATIENCE).with_call_limit(SHORT);
    // The call still waits to be told.
    let error = lender.revoke(RevokeCause::Reset, "reset a card", options, hang).unwrap_err();
    assert_eq!(error.kind(), Kind::Stuck);

    assert!(lender.device().raw().is_shadowed.load(Ordering::SeqCst));
    assert_eq!(Error::from(attachment.enter(Direction::Both).unwrap_err()).kind(), Kind::Revoked);
    assert_eq!(reset(&lender, SHORT).unwrap_err().kind(), Kind::Busy);
    let attached = export.attach(Reader::new(OnRevoke::Reimport), Trust::Unverified);
    assert_eq!(attached.unwrap_err().kind(), Kind::Busy);
    let (elsewhere, _export) = Card::lend();
    reset(&elsewhere, PATIENCE).unwrap();

    unmap.send(()).unwrap();
    let mut heard = Vec::new();
    while heard.last() != Some(&"restored") {
        heard.push(events.next_within(PATIENCE).unwrap().expect("it came back").kind.code());
    }
    assert_eq!(heard, ["draining", "stuck", "restored"]);
    attachment.current().unwrap();
    reset(&lender, PATIENCE).unwrap();
}

#[test]
fn a_device_that_warms_up_is_waited_for_and_is_not_stuck() {
    let (lender, export) = Card::lend();
    let attachment = Arc::new(export.attach(Reader::new(OnRevoke::SelfHeals), Trust::Unverified).unwrap());
    let events = export.events().unwrap();
    lender.device().raw().gets_ready_ms.store(900, Ordering::SeqCst);
    let inside = Arc::clone(&attachment);
    let tried = Arc::new(AtomicUsize::new(0));
    let refused = Arc::clone(&tried);
    let _subscription = export.on_event(move |event| {
        if let EventKind::NotReady(why) = &event.kind {
            assert_eq!(why.reason, "it warms up");
            refused.fetch_add(usize::from(inside.enter(Direction::Both).is_err()), Ordering::SeqCst);
        }
    });
    // Longer than a kernel's call may take.
    reset(&lender, RevokeOptions::within(PATIENCE).with_call_limit(Duration::from_millis(500))).unwrap();
    assert_eq!(tried.load(Ordering::SeqCst), 1);
    assert!(!lender.device().raw().is_shadowed.load(Ordering::SeqCst));
    assert_eq!(attachment.enter(Direction::Both).unwrap().finish(), Outcome::Ok);
    let codes: Vec<_> = std::iter::from_fn(|| events.try_next()).map(|event| event.kind.code()).collect();
    assert_eq!(without_slow(codes, |code| code), ["draining", "not-ready", "restored"]);
}

#[test]
fn a_device_that_never_warms_up_keeps_its_memory_away() {
    let (lender, export) = Card::lend();
    let attachment = export.attach(Reader::new(OnRevoke::SelfHeals), Trust::Unverified).unwrap();
    lender.device().raw().gets_ready_ms.store(u64::MAX, Ordering::SeqCst);
    assert_eq!(reset(&lender, PATIENCE).unwrap_err().kind(), Kind::TimedOut);
    assert_eq!(export.generation(), 1);
    // What is mapped stays shadow memory: nobody's access waits in the kernel.
    assert!(lender.device().raw().is_shadowed.load(Ordering::SeqCst));
    assert_eq!(Error::from(attachment.enter(Direction::Both).unwrap_err()).kind(), Kind::Revoked);
    lender.device().raw().gets_ready_ms.store(0, Ordering::SeqCst);
    reset(&lender, PATIENCE).unwrap();
    assert_eq!(attachment.enter(Direction::Both).unwrap().finish(), Outcome::Ok);
}

#[test]
fn memory_that_is_away_is_refused_until_it_is_given_back() {
    let (lender, export) = Card::lend();
    let attachment = export.attach(Reader::new(OnRevoke::Reimport), Trust::Unverified).unwrap();
    let off = |card: &Card| {
        card.set_away(true);
        Ok(())
    };
    lender.revoke(RevokeCause::MemoryDisabled, "switch off", PATIENCE, off).unwrap();
    let revoked = attachment.enter(Direction::Both).unwrap_err();
    assert_eq!((revoked.generation, revoked.cause), (1, Some(RevokeCause::MemoryDisabled)));
    assert_eq!(attachment.current().unwrap_err().kind(), Kind::Revoked);
    let attached = export.attach(Reader::new(OnRevoke::Reimport), Trust::Unverified);
    assert_eq!(attached.unwrap_err().kind(), Kind::Revoked);
    assert!(lender.device().raw().is_shadowed.load(Ordering::SeqCst));

    let on = |card: &Card| {
        card.set_away(false);
        Ok(())
    };
    lender.restore("switch on", on).unwrap();
    assert!(!lender.device().raw().is_shadowed.load(Ordering::SeqCst));
    assert_eq!(attachment.current().unwrap().generation(), 1);
    assert_eq!(lender.restore("switch on", on).unwrap_err().kind(), Kind::InvalidInput);
}

#[test]
fn events_come_in_order_by_callback_and_by_descriptor() {
    let (lender, export) = Card::lend();
    let attachment = Arc::new(export.attach(Reader::new(OnRevoke::Reimport), Trust::Unverified).unwrap());
    let polled = export.events().unwrap();
    let heard = Arc::new(Mutex::new(Vec::new()));
    let (log, rebuilt) = (Arc::clone(&heard), Arc::clone(&attachment));
    let subscription = attachment.on_event(move |event| {
        log.lock().push((event.kind.code(), event.generation));
        // What an application does: rebuild when the memory is there again.
        if let EventKind::Restored = event.kind {
            rebuilt.current().unwrap();
        }
    });
    let (leave, holder) = hold_inside(&attachment);
    reset(&lender, SHORT).unwrap_err();
    leave.send(()).unwrap();
    assert_eq!(holder.join().unwrap(), Outcome::Ok);
    reset(&lender, PATIENCE).unwrap();
    let expected = [("draining", 0), ("late", 0), ("called-off", 0), ("draining", 0), ("restored", 1)];
    let all = heard.lock().clone();
    assert_eq!(without_slow(all.clone(), |(code, _)| code), expected);
    assert!(attachment.is_current());
    drop(subscription);
    reset(&lender, PATIENCE).unwrap();
    assert_eq!(*heard.lock(), all);

    let mut taken = Vec::new();
    while let Some(event) = polled.next_within(Duration::ZERO).unwrap() {
        taken.push((event.kind.code(), event.generation));
    }
    let taken = without_slow(taken, |(code, _)| code);
    assert_eq!(taken[..5], expected);
    assert_eq!(taken[5..], [("draining", 1), ("restored", 2)]);
}

#[test]
fn a_callback_may_take_back_again() {
    let (lender, export) = Card::lend();
    let (lender, heard) = (Arc::new(lender), Arc::new(AtomicUsize::new(0)));
    let (again, count) = (Arc::downgrade(&lender), Arc::clone(&heard));
    let _subscription = export.on_event(move |event| {
        count.fetch_add(1, Ordering::SeqCst);
        if let (EventKind::Restored, 1, Some(lender)) = (&event.kind, event.generation, again.upgrade()) {
            reset(&lender, PATIENCE).unwrap();
        }
        // What panics here is nobody's problem but its own.
        assert!(!matches!(event.kind, EventKind::Restored) || event.generation < 2, "a callback's own fault");
    });
    reset(&lender, Duration::MAX).unwrap();
    assert_eq!((export.generation(), heard.load(Ordering::SeqCst)), (2, 4));
    reset(&lender, PATIENCE).unwrap();
    assert_eq!(heard.load(Ordering::SeqCst), 6);
}

#[test]
fn a_closed_device_lets_nobody_in() {
    let (lender, export) = Card::lend();
    let attachment = export.attach(Reader::new(OnRevoke::Reimport), Trust::Unverified).unwrap();
    let events = attachment.events().unwrap();
    lender.close(PATIENCE).unwrap();
    assert_eq!(Error::from(attachment.enter(Direction::Both).unwrap_err()).kind(), Kind::Gone);
    let attached = export.attach(Reader::new(OnRevoke::Reimport), Trust::Unverified);
    assert_eq!(attached.unwrap_err().kind(), Kind::Gone);
    assert!(matches!(events.try_next().unwrap().kind, EventKind::Draining { .. }));
    assert!(matches!(events.try_next().unwrap().kind, EventKind::Gone));
    assert!(events.try_next().is_none());
    attachment.detach().unwrap();
    export.close().unwrap();
}

#[test]
fn a_close_that_somebody_is_late_for_gives_the_lender_back() {
    let (lender, export) = Card::lend();
    let attachment = Arc::new(export.attach(Reader::new(OnRevoke::Reimport), Trust::Unverified).unwrap());
    let (leave, holder) = hold_inside(&attachment);
    let (lender, error) = lender.close(SHORT).unwrap_err().into_parts();
    assert_eq!(error.kind(), Kind::TimedOut);
    leave.send(()).unwrap();
    assert_eq!(holder.join().unwrap(), Outcome::Ok);
    assert_eq!(attachment.enter(Direction::Both).unwrap().finish(), Outcome::Ok);
    lender.close(PATIENCE).unwrap();
}

#[test]
fn dropping_a_lender_tears_who_stays_inside() {
    let (lender, export) = Card::lend();
    let attachment = Arc::new(export.attach(Reader::new(OnRevoke::Reimport), Trust::Unverified).unwrap());
    let (leave, holder) = hold_inside(&attachment);
    let begun = Instant::now();
    drop(lender);
    assert!(begun.elapsed() < PATIENCE);
    leave.send(()).unwrap();
    assert_eq!(holder.join().unwrap(), Outcome::Torn { generation: 1 });
    assert_eq!(Error::from(attachment.enter(Direction::Both).unwrap_err()).kind(), Kind::Gone);
}

#[test]
fn a_lender_dropped_while_it_cannot_be_closed_is_closed_later() {
    let (lender, export) = Card::lend();
    let attachment = export.attach(Reader::new(OnRevoke::FreeBefore), Trust::Unverified).unwrap();
    let in_use = attachment.current().unwrap();
    let events = export.events().unwrap();
    drop(lender);
    assert_eq!(attachment.importer().alive(), 1);
    drop(in_use);
    let mut last = None;
    while !matches!(last, Some(EventKind::Gone)) {
        last = Some(events.next_within(PATIENCE).unwrap().expect("it is closed in the end").kind);
    }
    assert_eq!(attachment.importer().alive(), 0);
}

/// An owner that writes down what it is told.
#[derive(Default)]
struct Diary {
    lines: Mutex<Vec<&'static str>>,
    panics: AtomicBool,
    cannot_quiesce: AtomicBool,
    cannot_resume: AtomicBool,
    /// What `quiesce` waits for.
    hangs: Mutex<Option<mpsc::Receiver<()>>>,
}

impl Owner for Diary {
    fn name(&self) -> &str {
        "diary"
    }

    fn flush(&self, _: &DmaRanges) -> Result<()> {
        Ok(())
    }

    fn invalidate(&self, _: &DmaRanges) -> Result<()> {
        Ok(())
    }

    fn quiesce(&self, _: &DmaRanges) -> Result<()> {
        assert!(!self.panics.load(Ordering::SeqCst), "an owner's own fault");
        if let Some(told) = self.hangs.lock().take() {
            told.recv().ok();
        }
        self.lines.lock().push("quiesce");
        self.said(&self.cannot_quiesce, "stop a device")
    }

    fn resume(&self, _: &DmaRanges) -> Result<()> {
        self.lines.lock().push("resume");
        self.said(&self.cannot_resume, "start a device")
    }
}

impl Diary {
    fn said(&self, cannot: &AtomicBool, tried: &'static str) -> Result<()> {
        match cannot.load(Ordering::SeqCst) {
            true => Err(Error::new(Kind::Os, tried, "its engine does not answer")),
            false => Ok(()),
        }
    }

    /// What it was told since it was last asked.
    fn read(&self) -> Vec<&'static str> {
        std::mem::take(&mut *self.lines.lock())
    }
}

/// A lender, and an export of all its memory that `Diary` answers for.
fn lend_owned() -> (Lender<Card>, crate::Export, Arc<Diary>) {
    let (lender, _) = Card::lend();
    let diary = Arc::new(Diary::default());
    let export =
        lender.export(Aperture::owned(lender.device().raw().ranges(), Arc::clone(&diary) as _)).unwrap();
    (lender, export, diary)
}

fn attach(export: &crate::Export) -> Result<Attachment<Reader>> {
    Ok(export.attach(Reader::new(OnRevoke::Reimport), Trust::Unverified)?)
}

#[test]
fn owners_rest_around_the_call() {
    let (lender, export, diary) = lend_owned();
    let at_the_call = Arc::clone(&diary);
    let call = move |_: &Card| {
        at_the_call.lines.lock().push("call");
        Ok(())
    };
    lender.revoke(RevokeCause::Reset, "reset a card", PATIENCE, call).unwrap();
    assert_eq!(diary.read(), ["quiesce", "call", "resume"]);

    // What panics stops nothing, and is told.
    diary.panics.store(true, Ordering::SeqCst);
    let error = reset(&lender, PATIENCE).unwrap_err();
    assert_eq!(error.kind(), Kind::Panicked);
    assert!(
        error.to_string().contains("Owner::quiesce (diary): it panicked: an owner's own fault"),
        "{error}"
    );
    assert_eq!(diary.read(), ["resume"]);
    attach(&export).unwrap();
}

#[test]
fn a_quiesce_that_fails_stops_nothing() {
    let (lender, export, diary) = lend_owned();
    diary.cannot_quiesce.store(true, Ordering::SeqCst);
    reset(&lender, PATIENCE).unwrap();
    assert_eq!((export.generation(), diary.read()), (1, vec!["quiesce", "resume"]));
    attach(&export).unwrap();
}

#[test]
fn a_resume_that_fails_keeps_everyone_out_until_a_reset_that_works() {
    let (lender, export, diary) = lend_owned();
    let attachment = attach(&export).unwrap();
    diary.cannot_resume.store(true, Ordering::SeqCst);
    let error = reset(&lender, PATIENCE).unwrap_err();
    assert!(error.why().contains("does not answer"), "{error}");
    assert_eq!(Error::from(attachment.enter(Direction::Both).unwrap_err()).kind(), Kind::Revoked);
    assert_eq!(attach(&export).unwrap_err().kind(), Kind::Revoked);
    diary.cannot_resume.store(false, Ordering::SeqCst);
    reset(&lender, PATIENCE).unwrap();
    attachment.current().unwrap();
    assert_eq!(attachment.enter(Direction::Both).unwrap().finish(), Outcome::Ok);
}

#[test]
fn an_owner_is_told_for_each_export_and_again_of_memory_that_is_away_already() {
    let (lender, _export, diary) = lend_owned();
    let _second =
        lender.export(Aperture::owned(lender.device().raw().ranges(), Arc::clone(&diary) as _)).unwrap();
    reset(&lender, PATIENCE).unwrap();
    assert_eq!(diary.read(), ["quiesce", "quiesce", "resume", "resume"]);
    let off = |card: &Card| {
        card.set_away(true);
        Ok(())
    };
    for _ in 0..2 {
        lender.revoke(RevokeCause::MemoryDisabled, "switch off", PATIENCE, off).unwrap();
        assert_eq!(diary.read(), ["quiesce", "quiesce"]);
    }
    let on = |card: &Card| {
        card.set_away(false);
        Ok(())
    };
    lender.restore("switch on", on).unwrap();
    assert_eq!(diary.read(), ["resume", "resume"]);
}

#[test]
fn a_hook_that_hangs_is_told_as_a_call_that_hangs() {
    let (lender, export, diary) = lend_owned();
    let events = export.events().unwrap();
    let (go_on, told) = mpsc::channel();
    *diary.hangs.lock() = Some(told);
    let options = RevokeOptions::within(PATIENCE).with_call_limit(SHORT);
    assert_eq!(reset(&lender, options).unwrap_err().kind(), Kind::Stuck);
    go_on.send(()).unwrap();
    let mut heard = Vec::new();
    while heard.last() != Some(&"restored") {
        heard.push(events.next_within(PATIENCE).unwrap().expect("it went on").kind.code());
    }
    assert_eq!(heard, ["draining", "stuck", "restored"]);
}

#[test]
fn an_owner_is_asked_before_and_after_every_access() {
    struct Asked(Arc<Mutex<Vec<&'static str>>>);
    impl Owner for Asked {
        fn name(&self) -> &str {
            "asked"
        }
        fn flush(&self, _: &DmaRanges) -> Result<()> {
            self.0.lock().push("flush");
            Ok(())
        }
        fn invalidate(&self, _: &DmaRanges) -> Result<()> {
            self.0.lock().push("invalidate");
            Ok(())
        }
        fn quiesce(&self, _: &DmaRanges) -> Result<()> {
            Ok(())
        }
    }
    let (lender, _) = Card::lend();
    let asked = Arc::default();
    let owner = Asked(Arc::clone(&asked));
    let export = lender.export(Aperture::owned(lender.device().raw().ranges(), Arc::new(owner))).unwrap();
    let attachment = attach(&export).unwrap();
    let heard = || std::mem::take(&mut *asked.lock());
    heard();
    let access = attachment.enter(Direction::Both).unwrap();
    assert_eq!(heard(), ["flush"]);
    assert_eq!(access.finish(), Outcome::Ok);
    assert_eq!(heard(), ["invalidate"]);
    // Of work that is left to a device, when that is done.
    let flag = Flag::new();
    let in_flight = attachment.enter(Direction::Both).unwrap().finish_when(flag.clone());
    assert_eq!(in_flight.wait(Duration::ZERO), None);
    assert_eq!(heard(), ["flush"]);
    flag.set();
    assert_eq!(in_flight.wait(PATIENCE), Some(Outcome::Ok));
    assert_eq!(heard(), ["invalidate"]);
}

/// An owner that cannot forget what it cached may not see what the importer wrote.
#[test]
fn a_write_that_the_owner_cannot_be_shown_is_told() {
    struct Blind;
    impl Owner for Blind {
        fn name(&self) -> &str {
            "blind"
        }
        fn flush(&self, _: &DmaRanges) -> Result<()> {
            Ok(())
        }
        fn invalidate(&self, _: &DmaRanges) -> Result<()> {
            Err(Error::new(Kind::Os, "forget a cache", "it does not answer"))
        }
        fn quiesce(&self, _: &DmaRanges) -> Result<()> {
            Ok(())
        }
    }
    let (lender, _) = Card::lend();
    let export = lender.export(Aperture::owned(lender.device().raw().ranges(), Arc::new(Blind))).unwrap();
    let attachment = attach(&export).unwrap();
    let ends = |direction| attachment.enter(direction).unwrap().finish();
    assert_eq!((ends(Direction::Read), ends(Direction::Write)), (Outcome::Ok, Outcome::NotCopiedBack));
    let in_flight = attachment.enter(Direction::Both).unwrap().finish_when(Flag::new());
    assert_eq!(in_flight.abandon(), Outcome::NotCopiedBack);
}

fn fail(errors: &OwnedFd) {
    rustix::io::write(errors, &1_u64.to_ne_bytes()).unwrap();
}

/// Whether there is something to read.
fn is_readable(fd: &OwnedFd) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&now)).unwrap() == 1
}

/// Waits until an attachment is refused because its device failed.
fn wait_until_refused(attachment: &Attachment<Reader>) {
    let deadline = deadline_after(PATIENCE);
    loop {
        match attachment.enter(Direction::Read) {
            Ok(_) => assert!(Instant::now() < deadline, "a device that failed lets in"),
            Err(refused) if refused.cause == Some(RevokeCause::DeviceError) => return,
            Err(_) => {}
        }
        thread::sleep(Duration::from_millis(1));
    }
}

/// Takes events until one says that the memory was taken back because its device failed.
fn wait_until_taken(events: &Events) {
    loop {
        let event = events.next_within(PATIENCE).unwrap().expect("it is taken back in the end");
        if let EventKind::Revoked { cause: RevokeCause::DeviceError } = event.kind {
            return;
        }
    }
}

#[test]
fn an_error_that_comes_in_the_middle_of_a_reset_is_not_lost() {
    let (lender, export, errors) = Card::lend_watched();
    let attachment = export.attach(Reader::new(OnRevoke::SelfHeals), Trust::Unverified).unwrap();
    let events = export.events().unwrap();
    let reset_in_vain = lender.revoke(RevokeCause::Reset, "reset a card", PATIENCE, move |_| {
        fail(&errors);
        // Until the watcher has taken the error from the descriptor, and for as long as it takes to say so.
        while is_readable(&errors) {
            thread::sleep(Duration::from_millis(1));
        }
        thread::sleep(Duration::from_millis(100));
        Ok(())
    });
    assert_eq!(reset_in_vain.unwrap_err().kind(), Kind::Revoked);
    assert_eq!(attachment.enter(Direction::Read).unwrap_err().cause, Some(RevokeCause::DeviceError));
    assert_eq!(attach(&export).unwrap_err().kind(), Kind::Revoked);
    wait_until_taken(&events);
    while export.generation() < 2 {
        wait_until_taken(&events);
    }
    // A reset that is asked for now is one after the error.
    reset(&lender, PATIENCE).unwrap();
    assert_eq!(attachment.enter(Direction::Read).unwrap().finish(), Outcome::Ok);
    thread::sleep(Duration::from_secs(1));
    assert_eq!((export.generation(), attachment.enter(Direction::Read).is_ok()), (3, true));
}

#[test]
fn who_is_inside_when_a_device_fails_is_torn_though_it_leaves_in_time() {
    let (lender, export, errors) = Card::lend_watched();
    let attachment = export.attach(Reader::new(OnRevoke::SelfHeals), Trust::Unverified).unwrap();
    let events = export.events().unwrap();
    let (access, done) = (attachment.enter(Direction::Read).unwrap(), Flag::new());
    let in_flight = attachment.enter(Direction::Read).unwrap().finish_when(done.clone());
    fail(&errors);
    wait_until_refused(&attachment);
    done.set();
    assert_eq!(in_flight.wait(PATIENCE), Some(Outcome::Torn { generation: 1 }));
    assert_eq!(access.finish(), Outcome::Torn { generation: 1 });
    wait_until_taken(&events);
    reset(&lender, PATIENCE).unwrap();
    attachment.current().unwrap();
    assert_eq!(attachment.enter(Direction::Read).unwrap().finish(), Outcome::Ok);
}

/// The watcher gives those inside five seconds.
#[test]
fn an_error_under_an_import_in_use_lets_nobody_in_and_is_dealt_with_later() {
    let (lender, export, errors) = Card::lend_watched();
    let attachment = export.attach(Reader::new(OnRevoke::FreeBefore), Trust::Unverified).unwrap();
    let events = export.events().unwrap();
    let in_use = attachment.current().unwrap();
    fail(&errors);
    wait_until_refused(&attachment);
    while !matches!(
        events.next_within(PATIENCE).unwrap().expect("it is called off").kind,
        EventKind::CalledOff
    ) {}
    assert_eq!(attachment.enter(Direction::Read).unwrap_err().cause, Some(RevokeCause::DeviceError));
    drop(in_use);
    wait_until_taken(&events);
    reset(&lender, PATIENCE).unwrap();
    attachment.current().unwrap();
    assert_eq!(attachment.enter(Direction::Read).unwrap().finish(), Outcome::Ok);
}

#[test]
fn what_a_callback_takes_is_of_the_time_to_finish_and_it_is_named() {
    let (lender, export) = Card::lend();
    let attachment = Arc::new(attach(&export).unwrap());
    let events = export.events().unwrap();
    let (timeout, slow) = (Duration::from_millis(2000), Duration::from_millis(2100));
    let (told, back) = mpsc::channel();
    let line = line!() + 1;
    let _subscription = export.on_event(move |event| {
        if let EventKind::Draining { .. } = event.kind {
            thread::sleep(slow);
            told.send(Instant::now()).unwrap();
        }
    });
    let (leave, holder) = hold_inside(&attachment);
    let error = reset(&lender, timeout).unwrap_err();
    // It would have been waited for once more, if the time began after the callback.
    let waited_after = back.recv().unwrap().elapsed();
    leave.send(()).unwrap();
    assert_eq!(error.kind(), Kind::TimedOut);
    assert!(waited_after < timeout, "{waited_after:?}");
    let given_at = format!("the callback given at {}:{line}", file!());
    assert!(error.why().contains(&given_at), "{error}");
    assert_eq!(holder.join().unwrap(), Outcome::Ok);
    let heard: Vec<_> = std::iter::from_fn(|| events.try_next()).collect();
    let named = heard.iter().find_map(|event| match &event.kind {
        EventKind::SlowCallback(named) => Some(named),
        _ => None,
    });
    let named = named.expect("it is told");
    assert_eq!((named.given_at.line(), named.event), (line, "draining"));
    assert!(named.took >= slow);
}

#[test]
fn a_callback_that_does_not_come_back_holds_nobody_up_beyond_the_calls_limit() {
    let (lender, export) = Card::lend();
    let (go_on, told) = mpsc::channel::<()>();
    let told = Mutex::new(told);
    let _subscription = export.on_event(move |event| {
        if let EventKind::Restored = event.kind {
            told.lock().recv().ok();
        }
    });
    let events = export.events().unwrap();
    let begun = Instant::now();
    let options = RevokeOptions::within(PATIENCE).with_call_limit(Duration::from_secs(1));
    reset(&lender, options).unwrap();
    assert!(begun.elapsed() < PATIENCE / 2);
    go_on.send(()).unwrap();
    let is_slow =
        |kind: &EventKind| matches!(kind, EventKind::SlowCallback(slow) if slow.event == "restored");
    while !is_slow(&events.next_within(PATIENCE).unwrap().expect("it is named").kind) {}
    drop(go_on);
    reset(&lender, PATIENCE).unwrap();
}

#[test]
fn any_time_is_short_enough() {
    let (lender, export) = Card::lend();
    let attachment = attach(&export).unwrap();
    let events = export.events().unwrap();
    let forever = go_on(Duration::MAX).with_call_limit(Duration::MAX);
    let (flag, began) = (Flag::new(), Instant::now());
    let in_flight = attachment.enter(Direction::Both).unwrap().finish_when(flag.clone());
    thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(SHORT);
            flag.set();
        });
        assert_eq!(in_flight.wait(Duration::MAX), Some(Outcome::Ok));
    });
    reset(&lender, forever).unwrap();
    assert!(events.next_within(Duration::MAX).unwrap().is_some());
    lender.close(forever).unwrap();
    assert!(began.elapsed() < PATIENCE);
}

#[cfg(feature = "vfio")]
#[test]
fn nobody_who_waits_for_an_owner_is_an_error() {
    use crate::sync::{Thread, refused};
    use rustix::process::PidfdFlags;
    let revoker = Arc::new(super::revoker::Revoker::default());
    let memory = peervram_backends::host::HostMemory::new(4096).unwrap();
    let exporter: Arc<dyn peervram_backends::Exporter> = Arc::new(memory);
    let device = revoker.add(&exporter, true);
    let own = || rustix::process::pidfd_open(rustix::process::getpid(), PidfdFlags::empty()).unwrap();
    refused::set(Some(Thread::Watch));
    let refused = super::watch::owner(&revoker, &device, &exporter, own());
    refused::set(None);
    assert_eq!(refused.unwrap_err().kind(), Kind::Os);
    super::watch::owner(&revoker, &device, &exporter, own()).unwrap();
}
