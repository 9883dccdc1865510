//! A relay: bytes by two hops, over slices of host memory in between, with both hops at work at once.
//!
//! While the second hop empties one slice, the first fills the next: two engines are busy, and the time is
//! that of the slower one. What fits one slice, and all where there is no thread to be had, goes one hop after the
//! other, on the caller's thread.
//!
//! Absent on purpose: trying again. The first error of either hop ends it; what is in flight then has ended,
//! or is the engine's to end.

use std::io;
use std::sync::mpsc;
use std::thread;

use peervram_backends::HostSlice;

use crate::Result;
use crate::sync::{Thread, start_in};

/// Moves `size_bytes` in pieces as large as a slice: `first` fills one from an offset, `second` empties it to
/// the same offset, in order.
///
/// # Errors
/// That of the hop which failed; of the first one, where both did.
pub(crate) fn relay(
    size_bytes: u64,
    slices: &[HostSlice],
    mut first: impl FnMut(u64, &HostSlice) -> Result<()>,
    mut second: impl FnMut(u64, &HostSlice) -> Result<()> + Send,
) -> Result<()> {
    let Some(slice) = slices.first() else { return Ok(()) };
    let pieces = || pieces(size_bytes, slice.length_bytes() as u64);
    if slices.len() > 1 && pieces().len() > 1 {
        let relayed = at_once(pieces(), slices, &mut first, &mut second);
        match relayed {
            Ok(result) => return result,
            Err(error) => {
                tracing::warn!(%error, "no thread for a second hop: a copy goes one after the other")
            }
        }
    }
    pieces().try_for_each(|(offset_bytes, length_bytes)| {
        let slice = part(slice, length_bytes)?;
        first(offset_bytes, &slice)?;
        second(offset_bytes, &slice)
    })
}

/// With both hops at work at once.
///
/// # Errors
/// There is no thread for the second hop; nothing was moved.
fn at_once(
    mut pieces: impl Iterator<Item = (u64, usize)>,
    slices: &[HostSlice],
    first: &mut dyn FnMut(u64, &HostSlice) -> Result<()>,
    second: &mut (dyn FnMut(u64, &HostSlice) -> Result<()> + Send),
) -> io::Result<Result<()>> {
    let (give_back, empty) = mpsc::channel();
    let (fill, full) = mpsc::channel::<(u64, usize, HostSlice)>();
    (0..slices.len()).for_each(|slice| give_back.send(slice).expect("both ends are here"));
    thread::scope(|scope| {
        let emptier = start_in(scope, Thread::Relay, move || {
            for (offset_bytes, number, slice) in full {
                second(offset_bytes, &slice)?;
                // Nobody waits for it after the last piece.
                let _ = give_back.send(number);
            }
            Ok(())
        })?;
        let filled = pieces.try_for_each(|(offset_bytes, length_bytes)| {
            // Where the other hop failed, it says why.
            let Ok(number) = empty.recv() else { return Ok(()) };
            let slice = part(&slices[number], length_bytes)?;
            first(offset_bytes, &slice)?;
            let _ = fill.send((offset_bytes, number, slice));
            Ok(())
        });
        drop(fill);
        let emptied = emptier.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        Ok(filled.and(emptied))
    })
}

/// Offsets and lengths of the pieces of `size_bytes`.
pub(crate) fn pieces(size_bytes: u64, piece_bytes: u64) -> impl ExactSizeIterator<Item = (u64, usize)> {
    let count = usize::try_from(size_bytes.div_ceil(piece_bytes)).unwrap_or(usize::MAX);
    (0..count).map(move |number| {
        let offset_bytes = number as u64 * piece_bytes;
        (offset_bytes, (size_bytes - offset_bytes).min(piece_bytes) as usize)
    })
}

/// The first bytes of `slice`.
fn part(slice: &HostSlice, length_bytes: usize) -> Result<HostSlice> {
    HostSlice::new(slice.mapping().clone(), slice.offset_bytes(), length_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use peervram_backends::{Error, Kind, Mapping};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    const SLICE: usize = 4096;

    fn slices(count: usize) -> Vec<HostSlice> {
        let mapping = Arc::new(Mapping::of_host_memory(count * SLICE).unwrap());
        (0..count).map(|i| HostSlice::new(Arc::clone(&mapping), i * SLICE, SLICE).unwrap()).collect()
    }

    /// Copies `bytes` over; the hops fail at these offsets.
    fn copy(bytes: &[u8], count: usize, fails: [Option<u64>; 2]) -> (Result<()>, Vec<u8>) {
        let mut there = vec![0; bytes.len()];
        let error = |hop: &'static str| Err(Error::new(Kind::Os, "copy", hop));
        let first = |offset: u64, slice: &HostSlice| {
            if fails[0] == Some(offset) {
                return error("first");
            }
            let at = offset as usize;
            slice.mapping().write(slice.offset_bytes(), &bytes[at..at + slice.length_bytes()])
        };
        let second = |offset: u64, slice: &HostSlice| {
            if fails[1] == Some(offset) {
                return error("second");
            }
            let at = offset as usize;
            slice.mapping().read(slice.offset_bytes(), &mut there[at..at + slice.length_bytes()])
        };
        let result = relay(bytes.len() as u64, &slices(count), first, second);
        (result, there)
    }

    #[test]
    fn every_byte_arrives_whatever_the_number_of_slices() {
        for count in 1..4 {
            for length in [1, SLICE, SLICE + 1, 7 * SLICE - 5] {
                let bytes: Vec<u8> = (0..length).map(|i| (i ^ i >> 8) as u8).collect();
                let (result, there) = copy(&bytes, count, [None, None]);
                result.unwrap();
                assert!(there == bytes, "{count} slices, {length} bytes");
            }
        }
    }

    #[test]
    fn an_error_of_either_hop_ends_it() {
        let bytes: Vec<u8> = (0..9 * SLICE).map(|i| 1 + (i ^ i >> 7) as u8 % 251).collect();
        let at = |piece: usize| Some((piece * SLICE) as u64);
        for count in 1..4 {
            for piece in [0, 4, 8] {
                let (result, there) = copy(&bytes, count, [at(piece), None]);
                assert!(result.unwrap_err().why().contains("first"));
                assert!(there[piece * SLICE..].iter().all(|&byte| byte == 0));
                let (result, there) = copy(&bytes, count, [None, at(piece)]);
                assert!(result.unwrap_err().why().contains("second"));
                assert!(there[..piece * SLICE] == bytes[..piece * SLICE], "what came before is there");
                assert!(there[piece * SLICE..].iter().all(|&byte| byte == 0));
            }
        }
    }

    /// The pieces that each hop was given, and whether the second hop was on the caller's thread.
    fn hops(size_bytes: usize, count: usize) -> ([Vec<(u64, usize)>; 2], bool) {
        let (mut first, mut second, mut is_here) = (Vec::new(), Vec::new(), true);
        let caller = thread::current().id();
        let fill = |offset: u64, slice: &HostSlice| {
            first.push((offset, slice.length_bytes()));
            Ok(())
        };
        let empty = |offset: u64, slice: &HostSlice| {
            is_here &= thread::current().id() == caller;
            second.push((offset, slice.length_bytes()));
            Ok(())
        };
        relay(size_bytes as u64, &slices(count), fill, empty).unwrap();
        ([first, second], is_here)
    }

    #[test]
    fn pieces_go_in_order_and_on_the_callers_thread_where_nothing_is_gained() {
        let all = [(0, SLICE), (SLICE as u64, SLICE), (2 * SLICE as u64, 5)];
        for count in 1..4 {
            let ([first, second], is_here) = hops(2 * SLICE + 5, count);
            assert_eq!(first, all);
            assert_eq!(second, all);
            assert_eq!(is_here, count == 1, "{count} slices");
            for size_bytes in [1, SLICE] {
                let ([first, second], is_here) = hops(size_bytes, count);
                assert_eq!((first, second), (vec![(0, size_bytes)], vec![(0, size_bytes)]));
                assert!(is_here, "a thread for one piece");
            }
        }
    }

    #[test]
    fn both_hops_are_at_work_at_once() {
        let (busy, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let work = |_: u64, _: &HostSlice| {
            most.fetch_max(1 + busy.fetch_add(1, Ordering::SeqCst), Ordering::SeqCst);
            thread::sleep(Duration::from_millis(2));
            busy.fetch_sub(1, Ordering::SeqCst);
            Ok(())
        };
        relay(20 * SLICE as u64, &slices(2), work, work).unwrap();
        assert_eq!(most.load(Ordering::SeqCst), 2);
    }
}
