//! The shell's threads in every order that a scheduler comes up with: with `--features shuttle` some
//! thousands of orders of each scene, by chance and by priorities that change at three points (PCT, which
//! finds what takes a long run of one thread); else the one that the machine takes.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use peervram_backends::{Flag, OnRevoke};

use super::fakes::{Card, Reader};
use crate::sync::thread;
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
