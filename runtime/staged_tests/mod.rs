//! Copying, with devices that are made up: right bytes both ways by every mover, and none of one generation in the
//! next.

mod fakes;
mod generations;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use peervram_backends::{CpuAccess, Error, Flag, Kind, OnRevoke};

use crate::{
    AttachOptions, Attachment, Direction, Mover, Outcome, Path, RevokeCause, Staging, Trust, verify,
};
use fakes::{Asked, FakeImporter, Pair, SMALL, Setup, all, bytes, impatient, timed_out};

const MIB: usize = 1 << 20;
const BOTH: Direction = Direction::Both;
/// Several pieces, and a last one that is shorter.
const SEVERAL: u64 = 2 * (1 << 20) + 3 * 4096;
const PATIENCE: Duration = Duration::from_secs(30);

fn attach(pair: &Pair, trust: Trust) -> Attachment<FakeImporter> {
    let limits = verify::Limits { copy_timeout: Duration::from_secs(1), ..verify::Limits::default() };
    let options = AttachOptions::new(trust).with_limits(limits);
    let attachment = pair.export.attach(Arc::clone(&pair.importer), options).unwrap();
    assert_eq!(attachment.path(), Path::Staged, "{:?}", attachment.refused());
    attachment
}

/// Each way once: what is lent is seen by the importer, what that writes is lent afterwards.
fn crosses(pair: &Pair, attachment: &Attachment<FakeImporter>) {
    let size_bytes = pair.vram.len();
    for seed in [11, 22] {
        let (there, back) = (bytes(seed, size_bytes), bytes(seed + 1, size_bytes));
        pair.vram.write(0, &there).unwrap();
        let access = attachment.enter(BOTH).unwrap();
        assert!(access.memory().all() == there, "other bytes arrive");
        access.memory().put(0, &back);
        assert!(all(&pair.vram) == there, "what is written is back before the access ends");
        assert_eq!(access.finish(), Outcome::Ok);
        assert!(all(&pair.vram) == back, "other bytes are back");
    }
}

fn how(attachment: &Attachment<FakeImporter>) -> Staging {
    attachment.staging().unwrap()
}

#[test]
fn every_byte_crosses_by_two_engines_whatever_the_size() {
    for size_bytes in [4096, MIB as u64 - 4096, MIB as u64, MIB as u64 + 4096, SEVERAL, 4 * MIB as u64] {
        let pair = Pair::new(Setup { size_bytes, ..SMALL });
        let attachment = attach(&pair, Trust::Unverified);
        let expected = Staging {
            pull: Mover::OwnerEngine,
            push: Some(Mover::OwnerEngine),
            in_host_memory: false,
            why_cpu: None,
        };
        assert_eq!(how(&attachment), expected);
        crosses(&pair, &attachment);
        assert!(attachment.certificate().is_none(), "a copy is trusted for nothing");
    }
}

#[test]
fn host_memory_is_filled_in_one_hop() {
    for importer_engines in [0, 1] {
        let setup = Setup { size_bytes: SEVERAL, in_host_memory: true, importer_engines, ..SMALL };
        let pair = Pair::new(setup);
        let attachment = attach(&pair, Trust::Unverified);
        assert!(how(&attachment).in_host_memory);
        crosses(&pair, &attachment);
        assert!(pair.importer.engines.iter().all(|engine| engine.take_calls().is_empty()), "a second hop");
        let pieces = [(0, MIB), (MIB, MIB), (2 * MIB, 3 * 4096)];
        let expected: Vec<_> = [Asked::Read, Asked::Write, Asked::Read, Asked::Write]
            .into_iter()
            .flat_map(|asked| pieces.map(|(at, length)| (asked, at, length)))
            .collect();
        assert_eq!(pair.owner.engine.take_calls(), expected);
    }
}

#[test]
fn without_an_owners_engine_the_cpu_copies_and_says_so() {
    for (cpu_access, why) in [
        (CpuAccess::WriteCombined, "no engine of the importer's was found to reach it"),
        (CpuAccess::Uncached, "no engine of the importer's was found to reach it"),
        (CpuAccess::Cached, "the CPU has the memory cached"),
    ] {
        for in_host_memory in [false, true] {
            let setup = Setup {
                // A bounce that is not full ends the last piece.
                size_bytes: SEVERAL,
                owner_has_engine: false,
                cpu_access,
                in_host_memory,
                ..SMALL
            };
            let pair = Pair::new(setup);
            let attachment = attach(&pair, Trust::Unverified);
            let staging = how(&attachment);
            assert_eq!((staging.pull, staging.push), (Mover::Cpu, Some(Mover::Cpu)));
            let said = staging.why_cpu.unwrap();
            assert!(said.contains("its owner (fake owner) has no engine") && said.contains(why), "{said}");
            crosses(&pair, &attachment);
        }
    }
}

#[test]
fn an_owners_engine_that_lies_is_named_and_does_not_copy() {
    let pair = Pair::new(Setup { size_bytes: SEVERAL, in_host_memory: true, ..SMALL });
    pair.owner.engine.on_call(|call| if call.asked == Asked::Write { timed_out() } else { Ok(()) });
    let attachment = attach(&pair, Trust::Verified(BOTH));
    let staging = how(&attachment);
    assert_eq!((staging.pull, staging.push), (Mover::Cpu, Some(Mover::Cpu)));
    let said = staging.why_cpu.unwrap();
    assert!(said.contains("is not to be trusted") && said.contains("fence 1"), "{said}");
    pair.owner.engine.take_calls();
    crosses(&pair, &attachment);
    assert!(pair.owner.engine.take_calls().is_empty());
}

/// What the importer's engine was seen to read rightly, it pulls; what it loses, somebody else pushes.
#[test]
fn an_importers_engine_copies_in_the_direction_in_which_it_was_right() {
    for importer_engines in [1, 2] {
        let setup = Setup {
            size_bytes: SEVERAL,
            owner_has_engine: false,
            importer_engines,
            is_half_dead: true,
            ..SMALL
        };
        let pair = Pair::new(setup);
        let attachment = attach(&pair, Trust::Verified(BOTH));
        let staging = how(&attachment);
        assert_eq!((staging.pull, staging.push), (Mover::ImporterEngine, Some(Mover::Cpu)));
        assert!(staging.why_cpu.is_some(), "it does not say why the CPU pushes");
        assert_eq!(pair.importer.imports.load(Ordering::SeqCst), 1, "what is pulled from is not imported");
        pair.importer.engines.iter().for_each(|engine| drop(engine.take_calls()));
        crosses(&pair, &attachment);
        if let [bulk, other] = &pair.importer.engines[..] {
            // Each has its hop, so that both can be at work at once.
            let (bulk, other) = (bulk.take_calls(), other.take_calls());
            let pulled = bulk.iter().filter(|(asked, ..)| *asked == Asked::Write).count();
            assert_eq!((pulled, bulk.len(), other.len()), (6, 12, 6));
            assert!(other.iter().all(|(asked, ..)| *asked == Asked::Read));
        }
        attachment.detach().unwrap();
        let left = (&pair.importer.imports, &pair.importer.copies);
        assert_eq!((left.0.load(Ordering::SeqCst), left.1.load(Ordering::SeqCst)), (0, 0));
    }
}

#[test]
fn an_import_that_is_not_needed_for_copying_is_given_back() {
    let pair = Pair::new(Setup { is_half_dead: true, ..SMALL });
    let attachment = attach(&pair, Trust::Verified(BOTH));
    assert_eq!(how(&attachment).pull, Mover::OwnerEngine);
    assert_eq!(pair.importer.imports.load(Ordering::SeqCst), 0);
    assert_eq!(pair.importer.copies.load(Ordering::SeqCst), 1);
    drop(attachment);
    assert_eq!(pair.importer.copies.load(Ordering::SeqCst), 0);
}

/// An import that must be freed first is, where copying holds one; a copy that holds none stays as it is.
#[test]
fn a_revoke_frees_what_copying_imported_and_keeps_the_copy() {
    for on_revoke in [OnRevoke::FreeBefore, OnRevoke::Reimport, OnRevoke::SelfHeals] {
        for is_half_dead in [false, true] {
            let setup = Setup { owner_has_engine: !is_half_dead, is_half_dead, on_revoke, ..SMALL };
            let pair = Pair::new(setup);
            let attachment = attach(&pair, Trust::Verified(BOTH));
            let imports = Arc::clone(&pair.importer);
            let inside = Arc::new(AtomicBool::new(false));
            let seen = Arc::clone(&inside);
            let call = move |_: &_| {
                seen.store(imports.imports.load(Ordering::SeqCst) > 0, Ordering::SeqCst);
                Ok(())
            };
            pair.lender.revoke(RevokeCause::Reset, "reset a fake device", PATIENCE, call).unwrap();
            let may_stay = is_half_dead && on_revoke != OnRevoke::FreeBefore;
            assert_eq!(inside.load(Ordering::SeqCst), may_stay, "{on_revoke:?}");
            let outlives = !is_half_dead || on_revoke == OnRevoke::SelfHeals;
            assert_eq!(attachment.is_current(), outlives, "{on_revoke:?}, {is_half_dead}");
            attachment.current().unwrap();
            crosses(&pair, &attachment);
        }
    }
}

#[test]
fn who_reads_copies_nothing_back_and_who_writes_does() {
    for (direction, is_back) in [(Direction::Read, false), (Direction::Write, true), (BOTH, true)] {
        for trust in [Trust::Unverified, Trust::Verified(direction), Trust::Verified(BOTH)] {
            let pair = Pair::new(SMALL);
            let attachment = attach(&pair, trust);
            let pushes = !matches!(trust, Trust::Verified(Direction::Read));
            assert_eq!(how(&attachment).push, pushes.then_some(Mover::OwnerEngine));
            let (lent, written) = (bytes(1, pair.vram.len()), bytes(2, pair.vram.len()));
            pair.vram.write(0, &lent).unwrap();
            let access = attachment.enter(direction).unwrap();
            // Who only writes may leave bytes as they are.
            assert!(access.memory().all() == lent);
            access.memory().put(4096, &written[4096..8192]);
            assert_eq!(access.finish(), Outcome::Ok);
            let expected = [&lent[..4096], &written[4096..8192], &lent[8192..]].concat();
            let seen = all(&pair.vram);
            assert!(seen == if is_back { expected } else { lent.clone() }, "{direction}, {trust:?}");
            // The next one has what is lent, and nothing of what was not copied back.
            let access = attachment.enter(direction).unwrap();
            assert!(access.memory().all() == seen);
        }
    }
}

#[test]
fn what_somebody_writes_is_not_pulled_over() {
    let pair = Pair::new(SMALL);
    let attachment = attach(&pair, Trust::Unverified);
    let page = |seed| bytes(seed, 4096);
    let seen = |access: &crate::Access<'_, FakeImporter>| access.memory().all()[..4096].to_vec();

    // Who reads is no reason not to pull.
    pair.vram.write(0, &page(1)).unwrap();
    let reader = attachment.enter(Direction::Read).unwrap();
    pair.vram.write(0, &page(2)).unwrap();
    let other = attachment.enter(Direction::Read).unwrap();
    assert!(seen(&other) == page(2));
    pair.vram.write(0, &page(3)).unwrap();
    let writer = attachment.enter(Direction::Write).unwrap();
    assert!(seen(&writer) == page(3));

    // Who writes is: what is not pushed yet stays.
    writer.memory().put(0, &page(4));
    let late = attachment.enter(Direction::Read).unwrap();
    let second = attachment.enter(BOTH).unwrap();
    assert!(seen(&late) == page(4) && seen(&second) == page(4));
    drop((reader, other, late));
    assert!(all(&pair.vram)[..4096] == page(3), "who reads pushed");
    assert_eq!(writer.finish(), Outcome::Ok);
    assert!(all(&pair.vram)[..4096] == page(4));
    second.memory().put(0, &page(5));
    let late = attachment.enter(Direction::Read).unwrap();
    assert!(seen(&late) == page(5), "one writer is left, and was pulled over");
    assert_eq!(second.finish(), Outcome::Ok);
    assert!(all(&pair.vram)[..4096] == page(5));

    // Nobody writes any more, though somebody reads.
    pair.vram.write(0, &page(6)).unwrap();
    assert!(seen(&attachment.enter(Direction::Write).unwrap()) == page(6));
}

#[test]
fn work_in_flight_is_copied_back_after_its_signal() {
    let pair = Pair::new(SMALL);
    let attachment = attach(&pair, Trust::Unverified);
    let (lent, written) = (bytes(1, pair.vram.len()), bytes(2, pair.vram.len()));
    pair.vram.write(0, &lent).unwrap();
    let (access, flag) = (attachment.enter(BOTH).unwrap(), Flag::new());
    access.memory().put(0, &written);
    let in_flight = access.finish_when(flag.clone());
    assert_eq!(in_flight.wait(Duration::ZERO), None);
    assert!(all(&pair.vram) == lent);
    flag.set();
    assert_eq!(in_flight.wait(PATIENCE), Some(Outcome::Ok));
    assert!(all(&pair.vram) == written);

    // Work that nobody saw the end of is not copied.
    let access = attachment.enter(BOTH).unwrap();
    access.memory().put(0, &lent);
    assert_eq!(access.finish_when(Flag::new()).abandon(), Outcome::NotCopiedBack);
    assert!(all(&pair.vram) == written);
    // Nobody counts on who only read.
    let access = attachment.enter(Direction::Read).unwrap();
    assert_eq!(access.finish_when(Flag::new()).abandon(), Outcome::Ok);
}

#[test]
fn a_copy_that_fails_is_told_either_way_and_the_next_one_is_right() {
    for in_host_memory in [false, true] {
        let pair = Pair::new(Setup { size_bytes: SEVERAL, in_host_memory, ..SMALL });
        let attachment = attach(&pair, Trust::Unverified);
        let lent = bytes(1, pair.vram.len());
        pair.vram.write(0, &lent).unwrap();

        // The second piece of a pull.
        pair.owner.engine.on_call(|call| if call.offset_bytes == MIB { timed_out() } else { Ok(()) });
        let refused = attachment.enter(BOTH).unwrap_err();
        assert_eq!((refused.generation, refused.cause), (0, None));
        assert_eq!(Error::from(refused).kind(), Kind::TimedOut);
        pair.owner.engine.behave();
        let access = attachment.enter(BOTH).unwrap();
        assert!(access.memory().all() == lent);

        // The last piece of a push.
        let written = bytes(2, pair.vram.len());
        access.memory().put(0, &written);
        pair.owner.engine.on_call(|call| if call.offset_bytes == 2 * MIB { timed_out() } else { Ok(()) });
        assert_eq!(access.finish(), Outcome::NotCopiedBack);
        pair.owner.engine.behave();
        let there = all(&pair.vram);
        assert!(there[..2 * MIB] == written[..2 * MIB] && there[2 * MIB..] == lent[2 * MIB..]);
        crosses(&pair, &attachment);
    }
}

/// What an engine that did not end in time still writes is not in the way of the next copy.
#[test]
fn host_memory_that_a_late_engine_may_write_to_is_not_used_again() {
    let pair = Pair::new(Setup { size_bytes: SEVERAL, ..SMALL });
    let attachment = attach(&pair, Trust::Unverified);
    let (late, slices) = mpsc::channel();
    pair.owner.engine.on_call(move |call| {
        late.send(call.host.clone()).unwrap();
        timed_out()
    });
    attachment.enter(Direction::Read).unwrap_err();
    let slice = slices.try_recv().unwrap();
    let (stop, is_over) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    pair.owner.engine.behave();
    thread::scope(|scope| {
        let (stopped, over) = (Arc::clone(&stop), Arc::clone(&is_over));
        scope.spawn(move || {
            while !stopped.load(Ordering::SeqCst) {
                slice.mapping().write(slice.offset_bytes(), &[0xFF; 4096]).unwrap();
            }
            over.store(true, Ordering::SeqCst);
        });
        for _ in 0..20 {
            crosses(&pair, &attachment);
        }
        assert!(!is_over.load(Ordering::SeqCst));
        stop.store(true, Ordering::SeqCst);
    });
}

#[test]
fn an_engine_has_five_seconds_for_a_piece() {
    let pair = Pair::new(Setup { size_bytes: SEVERAL, ..SMALL });
    let attachment = attach(&pair, Trust::Unverified);
    let (told, deadlines) = mpsc::channel();
    for engine in [&pair.owner.engine, &pair.importer.engines[0]] {
        let told = told.clone();
        engine.on_call(move |call| {
            told.send(call.deadline.saturating_duration_since(Instant::now())).unwrap();
            Ok(())
        });
    }
    assert_eq!(attachment.enter(BOTH).unwrap().finish(), Outcome::Ok);
    let left: Vec<Duration> = deadlines.try_iter().collect();
    assert_eq!(left.len(), 12);
    let (least, most) = (Duration::from_secs(2), Duration::from_secs(5));
    assert!(left.iter().all(|left| (least..=most).contains(left)), "{left:?}");
}

/// The access that is inside when a revoke begins is copied back before the memory goes.
#[test]
fn a_revoke_waits_for_what_is_copied_back() {
    let pair = Pair::new(SMALL);
    let attachment = attach(&pair, Trust::Unverified);
    let written = bytes(2, pair.vram.len());
    let access = attachment.enter(BOTH).unwrap();
    access.memory().put(0, &written);
    thread::scope(|scope| {
        let (vram, expected) = (Arc::clone(&pair.vram), written.clone());
        let call = move |_: &_| {
            assert!(all(&vram) == expected, "the memory went before it was copied back");
            Ok(())
        };
        let revoke =
            scope.spawn(|| pair.lender.revoke(RevokeCause::Reset, "reset a fake device", PATIENCE, call));
        while attachment.enter(Direction::Read).is_ok() {
            thread::yield_now();
        }
        // A push goes on although somebody wants the memory.
        assert_eq!(access.finish(), Outcome::Ok);
        revoke.join().unwrap().unwrap();
    });
    assert!(attachment.is_current(), "a copy is not stale");
}

/// A pull ends at the piece at which somebody wants the memory, and says that it was revoked.
#[test]
fn a_pull_gives_way_to_a_revoke() {
    let pair = Arc::new(Pair::new(Setup { size_bytes: SEVERAL, ..SMALL }));
    let attachment = attach(&pair, Trust::Unverified);
    let (begun, is_begun) = mpsc::channel();
    let (go_on, may_go_on) = mpsc::channel::<()>();
    pair.owner.engine.on_call(move |call| {
        if call.offset_bytes == MIB {
            begun.send(()).unwrap();
            may_go_on.recv().unwrap();
        }
        Ok(())
    });
    thread::scope(|scope| {
        let puller = scope.spawn(|| attachment.enter(BOTH).map(drop));
        is_begun.recv().unwrap();
        let revoke = scope
            .spawn(|| pair.lender.revoke(RevokeCause::Reset, "reset a fake device", PATIENCE, |_| Ok(())));
        while attachment.current().is_ok() {
            thread::yield_now();
        }
        go_on.send(()).unwrap();
        let refused = puller.join().unwrap().unwrap_err();
        assert_eq!(refused.cause, Some(RevokeCause::Reset));
        assert_eq!(Error::from(refused).kind(), Kind::Revoked);
        revoke.join().unwrap().unwrap();
    });
    let asked: Vec<usize> = pair.owner.engine.take_calls().iter().map(|(_, at, _)| *at).collect();
    assert_eq!(asked, [0, MIB], "pieces were pulled after the revoke began");
}

/// A revoke that goes on waits for the piece that is being moved, and no other is moved afterwards.
#[test]
fn a_piece_at_hand_is_waited_for_and_none_follows() {
    let pair = Pair::new(Setup { size_bytes: SEVERAL, ..SMALL });
    let attachment = attach(&pair, Trust::Unverified);
    let (begun, is_begun) = mpsc::channel();
    let (go_on, may_go_on) = mpsc::channel::<()>();
    let is_moving = Arc::new(AtomicBool::new(false));
    thread::scope(|scope| {
        let (told_inside, is_inside) = mpsc::channel();
        let moving = Arc::clone(&is_moving);
        let (attachment, pair) = (&attachment, &pair);
        let writer = scope.spawn(move || {
            let access = attachment.enter(BOTH).unwrap();
            access.memory().put(0, &bytes(2, SEVERAL as usize));
            pair.owner.engine.take_calls();
            pair.owner.engine.on_call(move |call| {
                if call.offset_bytes == MIB {
                    moving.store(true, Ordering::SeqCst);
                    begun.send(()).unwrap();
                    may_go_on.recv().unwrap();
                    moving.store(false, Ordering::SeqCst);
                }
                Ok(())
            });
            told_inside.send(()).unwrap();
            access.finish()
        });
        is_inside.recv().unwrap();
        is_begun.recv().unwrap();
        let (moving, vram) = (Arc::clone(&is_moving), Arc::clone(&pair.vram));
        let called = Arc::new(AtomicBool::new(false));
        let is_called = Arc::clone(&called);
        let call = move |_: &_| {
            is_called.store(true, Ordering::SeqCst);
            assert!(!moving.load(Ordering::SeqCst), "a piece is moved into memory that is taken");
            vram.write(0, &bytes(3, SEVERAL as usize))
        };
        let revoke =
            scope.spawn(|| pair.lender.revoke(RevokeCause::Reset, "reset a fake device", impatient(), call));
        while attachment.generation() == 0 {
            thread::yield_now();
        }
        // Torn, and the call still waits for the piece.
        thread::sleep(Duration::from_millis(50));
        assert!(!called.load(Ordering::SeqCst));
        go_on.send(()).unwrap();
        assert_eq!(writer.join().unwrap(), Outcome::Torn { generation: 1 });
        revoke.join().unwrap().unwrap();
    });
    let asked: Vec<usize> = pair.owner.engine.take_calls().iter().map(|(_, at, _)| *at).collect();
    assert_eq!(asked, [0, MIB], "pieces were pushed after the access was torn");
    assert!(all(&pair.vram) == bytes(3, SEVERAL as usize));
}

#[test]
fn an_importer_that_nobody_can_fill_memory_of_is_refused_in_words() {
    let pair = Pair::new(Setup { importer_engines: 0, ..SMALL });
    let error = pair.export.attach(Arc::clone(&pair.importer), Trust::Unverified).unwrap_err();
    assert!(error.error().why().contains("by staged: "), "{error}");
    let [(Path::Peer, _), (Path::HostPointer, _), (Path::Staged, why)] = error.refused() else {
        panic!("refused: {:?}", error.refused());
    };
    assert!(why.why().contains("it has no engine"), "{why}");
    assert_eq!(pair.importer.copies.load(Ordering::SeqCst), 0);
}

#[test]
fn no_path_is_tried_but_those_of_the_options() {
    let pair = Pair::new(SMALL);
    let attach = |paths: &[Path]| {
        let options = AttachOptions::new(Trust::Unverified).with_paths(paths);
        pair.export.attach(Arc::clone(&pair.importer), options)
    };
    // The importer takes neither the dma-buf nor the address: it has the memory by a copy, or not at all.
    let refused = attach(&[Path::HostPointer]).unwrap_err();
    let [(Path::HostPointer, why)] = refused.refused() else { panic!("refused: {:?}", refused.refused()) };
    assert_eq!((refused.kind(), refused.error().device()), (why.kind(), Some("card")));
    let staged = attach(&[Path::Staged]).unwrap();
    assert_eq!((staged.path(), staged.refused().len()), (Path::Staged, 0));
    staged.detach().unwrap();
    let none = attach(&[]).unwrap_err();
    assert_eq!((none.kind(), none.refused().len()), (Kind::InvalidInput, 0));
    // Whatever the order here, copies come last.
    let last = attach(&[Path::Staged, Path::HostPointer, Path::Peer]).unwrap();
    let before: Vec<Path> = last.refused().iter().map(|(path, _)| *path).collect();
    assert_eq!((last.path(), before), (Path::Staged, vec![Path::Peer, Path::HostPointer]));
}

#[test]
fn an_importers_engine_that_lies_fills_no_memory_of_its_own() {
    let pair = Pair::new(SMALL);
    let engine = &pair.importer.engines[0];
    engine.on_call(|call| if call.asked == Asked::Read { timed_out() } else { Ok(()) });
    let error = pair.export.attach(Arc::clone(&pair.importer), Trust::Verified(BOTH)).unwrap_err();
    assert!(
        error.error().why().contains("by staged: ") && error.error().why().contains("fence 1"),
        "{error}"
    );
    assert_eq!(pair.importer.copies.load(Ordering::SeqCst), 0, "what was staged is not given back");
    // Who wants no tests has none.
    engine.behave();
    pair.owner.engine.take_calls();
    let attachment = attach(&pair, Trust::Unverified);
    assert!(pair.owner.engine.take_calls().is_empty(), "an engine was tried without being asked");
    crosses(&pair, &attachment);
}

#[test]
fn names_are_stable() {
    let names = [Mover::OwnerEngine, Mover::ImporterEngine, Mover::Cpu].map(Mover::name);
    assert_eq!(names, ["owner-engine", "importer-engine", "cpu"]);
    assert_eq!(format!("{:>5}|{}", Mover::Cpu, Mover::OwnerEngine), "  cpu|owner-engine");
    let names = [Path::Peer, Path::HostPointer, Path::Staged].map(|path| path.to_string());
    assert_eq!(names, ["peer", "host-pointer", "staged"]);
    let names = [Direction::Read, Direction::Write, BOTH].map(|direction| direction.to_string());
    assert_eq!(names, ["read", "write", "both"]);
}
