//! The shell's threads in every order that a scheduler comes up with: with `--features shuttle` some
//! thousands of orders of each scene, by chance and by priorities that change at three points (PCT, which
//! finds what takes a long run of one thread); else the one that the machine takes.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use peervram_backends::{Flag, OnRevoke, Signal};

use super::fakes::{Card, Reader};
use crate::sync::{atomic, thread};
use crate::{Attachment, Direction, Kind, Lender, Outcome, Result, RevokeCause, Trust};

/// Long past the end of any scene.
const PATIENCE: Duration = Duration::from_secs(600);

fn in_every_order(scene: impl Fn() + Send + Sync + 'static) {
    #[cfg(feature = "shuttle")]
    {
        let scene = Arc::new(scene);
        let again = Arc::clone(&scene);
        shuttle::check_random(move || again(), 1000);
        shuttle::check_pct(move || scene(), 3000, 3);
    }
    #[cfg(not(feature = "shuttle"))]
    for _ in 0..20 {
        scene();
    }
}

/// A reset that must find nobody inside.
fn reset(lender: &Lender<Card>, inside: &Arc<AtomicUsize>) -> Result<()> {
    let inside = Arc::clone(inside);
    lender.revoke(RevokeCause::Reset, "reset a card", PATIENCE, move |_| {
        assert_eq!(inside.load(Ordering::SeqCst), 0, "somebody is inside");
        Ok(())
    })
}

/// Uses the memory, or learns that it cannot now.
fn use_once(attachment: &Attachment<Reader>, inside: &AtomicUsize) {
    let Ok(access) = attachment.enter(Direction::Both) else {
        let _ = attachment.current();
        return;
    };
    inside.fetch_add(1, Ordering::SeqCst);
    thread::yield_now();
    inside.fetch_sub(1, Ordering::SeqCst);
    assert_eq!(access.finish(), Outcome::Ok);
}

/// What a device fires when it is done, and its owner destroys then: a `VkFence`, as the scheduler sees one.
#[derive(Clone, Default)]
struct Fence(Arc<Counts>);

#[derive(Default)]
struct Counts {
    has_fired: atomic::AtomicBool,
    is_destroyed: atomic::AtomicBool,
    /// How often somebody touched it after it was destroyed. A signal that panics is only lost.
    too_late: AtomicUsize,
}

impl Fence {
    fn fire(&self) {
        self.0.has_fired.store(true, Ordering::SeqCst);
    }

    fn destroy(&self) {
        self.0.is_destroyed.store(true, Ordering::SeqCst);
    }

    fn touch(&self) {
        let is_destroyed = self.0.is_destroyed.load(Ordering::SeqCst);
        self.0.too_late.fetch_add(is_destroyed.into(), Ordering::SeqCst);
    }
}

/// The signal made of a fence.
struct OfFence(Fence);

impl Signal for OfFence {
    fn wait(&self, _: Duration) -> Result<bool> {
        self.0.touch();
        thread::yield_now();
        let has_fired = self.0.0.has_fired.load(Ordering::SeqCst);
        self.0.touch();
        Ok(has_fired)
    }
}

impl Drop for OfFence {
    fn drop(&mut self) {
        self.0.touch();
    }
}

#[test]
fn nobody_is_inside_when_the_call_is_made() {
    in_every_order(|| {
        let (lender, export) = Card::lend();
        let inside = Arc::new(AtomicUsize::new(0));
        let users: Vec<_> = [OnRevoke::Reimport, OnRevoke::FreeBefore]
            .into_iter()
            .map(|on_revoke| {
                let attachment = export.attach(Reader::new(on_revoke), Trust::Unverified).unwrap();
                let inside = Arc::clone(&inside);
                thread::spawn(move || (0..3).for_each(|_| use_once(&attachment, &inside)))
            })
            .collect();
        reset(&lender, &inside).unwrap();
        users.into_iter().for_each(|user| user.join().unwrap());
        assert_eq!(export.generation(), 1);
    });
}

#[test]
fn two_who_take_back_do_so_one_after_the_other() {
    in_every_order(|| {
        let (lender, export) = Card::lend();
        let (lender, inside) = (Arc::new(lender), Arc::new(AtomicUsize::new(0)));
        let attachment = export.attach(Reader::new(OnRevoke::Reimport), Trust::Unverified).unwrap();
        let other = {
            let (lender, inside) = (Arc::clone(&lender), Arc::clone(&inside));
            thread::spawn(move || reset(&lender, &inside))
        };
        let mine = reset(&lender, &inside);
        use_once(&attachment, &inside);
        let theirs = other.join().unwrap();
        let taken = [&mine, &theirs].into_iter().filter(|result| result.is_ok()).count() as u64;
        for result in [mine, theirs] {
            assert!(result.is_ok_and(|()| true) || taken > 0, "neither was let");
        }
        assert_eq!(export.generation(), taken);
    });
}

#[test]
fn who_attaches_meanwhile_is_refused_or_waited_for() {
    in_every_order(|| {
        let (lender, export) = Card::lend();
        let inside = Arc::new(AtomicUsize::new(0));
        let export = Arc::new(export);
        let comer = {
            let (export, inside) = (Arc::clone(&export), Arc::clone(&inside));
            thread::spawn(move || match export.attach(Reader::new(OnRevoke::FreeBefore), Trust::Unverified) {
                Ok(attachment) => use_once(&attachment, &inside),
                Err(error) => assert_eq!(error.kind(), Kind::Busy),
            })
        };
        reset(&lender, &inside).unwrap();
        comer.join().unwrap();
    });
}

#[test]
fn work_of_a_device_is_waited_for() {
    in_every_order(|| {
        let (lender, export) = Card::lend();
        let inside = Arc::new(AtomicUsize::new(0));
        let attachment = export.attach(Reader::new(OnRevoke::Reimport), Trust::Unverified).unwrap();
        let flag = Flag::new();
        inside.fetch_add(1, Ordering::SeqCst);
        let in_flight = attachment.enter(Direction::Both).unwrap().finish_when(flag.clone());
        let device = {
            let (flag, inside) = (flag.clone(), Arc::clone(&inside));
            thread::spawn(move || {
                inside.fetch_sub(1, Ordering::SeqCst);
                flag.set();
            })
        };
        // Shuttle's clock stands still, so what is waited for by time is waited for before.
        if cfg!(feature = "shuttle") {
            device.join().unwrap();
        }
        reset(&lender, &inside).unwrap();
        assert_eq!(in_flight.wait(Duration::ZERO), Some(Outcome::Ok));
    });
}

/// The drain waits for a thread, which leaves its access to a device meanwhile.
#[test]
fn an_access_left_to_a_device_in_mid_drain_is_waited_for() {
    in_every_order(|| {
        let (lender, export) = Card::lend();
        let inside = Arc::new(AtomicUsize::new(0));
        let attachment = export.attach(Reader::new(OnRevoke::Reimport), Trust::Unverified).unwrap();
        let user = {
            let inside = Arc::clone(&inside);
            thread::spawn(move || {
                let Ok(access) = attachment.enter(Direction::Both) else { return };
                inside.fetch_add(1, Ordering::SeqCst);
                let fence = Fence::default();
                let in_flight = access.finish_when(OfFence(fence.clone()));
                thread::yield_now();
                inside.fetch_sub(1, Ordering::SeqCst);
                fence.fire();
                drop(in_flight);
            })
        };
        reset(&lender, &inside).unwrap();
        user.join().unwrap();
    });
}

/// Whoever is told how work ended destroys what its signal looks at, while a revoke and the end of the attachment
/// look, too.
#[test]
fn nobody_looks_at_a_signal_whose_outcome_was_told() {
    in_every_order(|| {
        let (lender, export) = Card::lend();
        let inside = Arc::new(AtomicUsize::new(0));
        let attachment = export.attach(Reader::new(OnRevoke::Reimport), Trust::Unverified).unwrap();
        let fence = Fence::default();
        let in_flight = attachment.enter(Direction::Both).unwrap().finish_when(OfFence(fence.clone()));
        let waiter = {
            let fence = fence.clone();
            thread::spawn(move || {
                while in_flight.wait(Duration::ZERO).is_none() {
                    thread::yield_now();
                }
                fence.destroy();
            })
        };
        let device = {
            let fence = fence.clone();
            thread::spawn(move || fence.fire())
        };
        let dropper = thread::spawn(move || drop(attachment));
        reset(&lender, &inside).unwrap();
        [waiter, device, dropper].into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(fence.0.too_late.load(Ordering::SeqCst), 0);
    });
}

#[test]
fn a_dropped_lender_leaves_nobody_waiting() {
    in_every_order(|| {
        let (lender, export) = Card::lend();
        let inside = Arc::new(AtomicUsize::new(0));
        let attachment = export.attach(Reader::new(OnRevoke::FreeBefore), Trust::Unverified).unwrap();
        let user = {
            let inside = Arc::clone(&inside);
            thread::spawn(move || {
                use_once(&attachment, &inside);
                attachment.detach().unwrap();
            })
        };
        drop(lender);
        user.join().unwrap();
        assert!(export.attach(Reader::new(OnRevoke::Reimport), Trust::Unverified).is_err());
    });
}
