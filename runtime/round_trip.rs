//! A round trip: whether an engine brings back what it took, between memory and the host.
//!
//! What verification is for a path, this is for the engines of a copy: one whose loads are all ones, or whose
//! stores are lost, is found out before anybody trusts what it copied. A page at the start and one at the end of
//! the memory are tried, and what was there is put back, as the engine saw it.
//!
//! Absent: whether a BAR shows the same memory as the engine. A copy goes by the engine alone.

use std::hash::{BuildHasher, Hasher};
use std::sync::Arc;
use std::time::Duration;

use peervram_backends::{Engine, HostSlice, Mapping, deadline_after, page_size_bytes};

use crate::{Error, Kind, Result};

const TRIED: &str = "trust an engine";

/// Has `engine` write to `memory`, of `size_bytes` (a multiple of the page size), and read it again. `hold` is asked
/// before each copy for what keeps the memory there meanwhile.
///
/// # Errors
/// [`Kind::Unverified`] where other bytes come back; what the engine says, or `hold`.
pub(crate) fn round_trip<M: ?Sized, Held>(
    engine: &dyn Engine<M>,
    memory: &M,
    size_bytes: u64,
    timeout: Duration,
    hold: impl Fn() -> Result<Held>,
) -> Result<()> {
    let page_bytes = page_size_bytes() as usize;
    let mapping = Arc::new(Mapping::of_host_memory(3 * page_bytes)?);
    let slice = |number: usize| HostSlice::new(Arc::clone(&mapping), number * page_bytes, page_bytes);
    let (before, sent, back) = (slice(0)?, slice(1)?, slice(2)?);
    let bytes = pattern(page_bytes);
    let read = |offset_bytes: u64, host: &HostSlice| {
        let _held = hold()?;
        engine.read(memory, offset_bytes, host, deadline_after(timeout))
    };
    let write = |offset_bytes: u64, host: &HostSlice| {
        let _held = hold()?;
        engine.write(memory, offset_bytes, host, deadline_after(timeout))
    };
    for offset_bytes in [0, size_bytes - page_bytes as u64] {
        mapping.write(sent.offset_bytes(), &bytes)?;
        // What does not arrive must not look as if it had.
        mapping.write(back.offset_bytes(), &vec![0; page_bytes])?;
        read(offset_bytes, &before)?;
        write(offset_bytes, &sent)?;
        read(offset_bytes, &back)?;
        write(offset_bytes, &before)?;
        let mut seen = vec![0; page_bytes];
        mapping.read(back.offset_bytes(), &mut seen)?;
        if seen != bytes {
            let why = format!("its {} wrote a page and read other bytes: {:02x?}", engine.name(), &seen[..8]);
            return Err(
                Error::new(Kind::Unverified, TRIED, why).next("see what its driver or its device says")
            );
        }
    }
    Ok(())
}

/// Bytes that nobody has by chance. The keys of the standard library's maps are random.
fn pattern(length_bytes: usize) -> Vec<u8> {
    let mut word = std::hash::RandomState::new().build_hasher().finish() | 1;
    let mut next = || {
        // Xorshift: never zero.
        word ^= word << 13;
        word ^= word >> 7;
        word ^= word << 17;
        word.to_le_bytes()
    };
    (0..length_bytes / 8).flat_map(|_| next()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;
    use std::time::Instant;

    const PAGE: usize = 4096;

    /// What an engine does with the bytes that it reads from an offset. None of them arrive where it says so.
    type Lie = fn(usize, &mut [u8]) -> bool;

    /// An engine on plain bytes, that may lie, and notes what it was asked for.
    struct Liar {
        lie: Lie,
        asked: Mutex<Vec<(&'static str, u64, Duration)>>,
    }

    impl Liar {
        fn new(lie: Lie) -> Self {
            Self { lie, asked: Mutex::default() }
        }

        fn note(&self, what: &'static str, at: u64, deadline: Instant) {
            let left = deadline.saturating_duration_since(Instant::now());
            self.asked.lock().unwrap().push((what, at, left));
        }
    }

    impl Engine<Mutex<Vec<u8>>> for Liar {
        fn name(&self) -> &str {
            "liar"
        }

        fn read(&self, memory: &Mutex<Vec<u8>>, at: u64, host: &HostSlice, deadline: Instant) -> Result<()> {
            self.note("read", at, deadline);
            let mut bytes = memory.lock().unwrap()[at as usize..][..host.length_bytes()].to_vec();
            let arrives = (self.lie)(at as usize, &mut bytes);
            if arrives { host.mapping().write(host.offset_bytes(), &bytes) } else { Ok(()) }
        }

        fn write(&self, memory: &Mutex<Vec<u8>>, at: u64, host: &HostSlice, deadline: Instant) -> Result<()> {
            self.note("write", at, deadline);
            host.mapping()
                .read(host.offset_bytes(), &mut memory.lock().unwrap()[at as usize..][..host.length_bytes()])
        }
    }

    fn before() -> Vec<u8> {
        (0..3 * PAGE).map(|at| (at * 7 + at / 256) as u8).collect()
    }

    fn tried(liar: &Liar, memory: &Mutex<Vec<u8>>) -> Result<()> {
        let size_bytes = memory.lock().unwrap().len() as u64;
        round_trip(liar, memory, size_bytes, Duration::from_secs(60), || Ok(()))
    }

    #[test]
    fn an_honest_engine_passes_and_leaves_what_was_there() {
        assert_eq!(page_size_bytes() as usize, PAGE, "this test is for pages of 4 KiB");
        let (memory, liar) = (Mutex::new(before()), Liar::new(|_, _| true));
        tried(&liar, &memory).unwrap();
        assert!(*memory.lock().unwrap() == before());
        let asked = liar.asked.into_inner().unwrap();
        let last = 2 * PAGE as u64;
        let places: Vec<_> = asked.iter().map(|&(what, at, _)| (what, at)).collect();
        let at = |at| [("read", at), ("write", at), ("read", at), ("write", at)];
        assert_eq!(places, [at(0), at(last)].concat());
        let is_in_time = |left: &Duration| (50..=60).contains(&left.as_secs());
        assert!(asked.iter().all(|(_, _, left)| is_in_time(left)), "{asked:?}");
    }

    #[test]
    fn a_lie_is_found_out_at_either_end_and_what_was_there_is_put_back() {
        let lies: [Lie; 6] = [
            |_, bytes| {
                bytes.fill(0xFF);
                true
            },
            |_, bytes| {
                bytes.fill(0);
                true
            },
            |_, bytes| {
                bytes[9] ^= 1;
                true
            },
            |at, bytes| {
                *bytes.last_mut().unwrap() ^= u8::from(at == 2 * PAGE);
                true
            },
            // What was read of the first page must not be taken for the last one's.
            |at, _| at == 0,
            |at, _| at > 0,
        ];
        for (number, lie) in lies.into_iter().enumerate() {
            let error = tried(&Liar::new(lie), &Mutex::new(before())).unwrap_err();
            assert_eq!(error.kind(), Kind::Unverified, "lie {number}");
            assert!(error.why().starts_with("its liar wrote a page and read other bytes: ["), "{error}");
        }
    }

    /// An engine whose memory goes away meanwhile writes nothing afterwards.
    #[test]
    fn nothing_is_copied_that_is_not_held() {
        for left in 0..8 {
            let (memory, liar) = (Mutex::new(before()), Liar::new(|_, _| true));
            let count = std::cell::Cell::new(0);
            let hold = || {
                count.set(count.get() + 1);
                match count.get() > left {
                    true => Err(Error::new(Kind::Revoked, "hold memory", "it went")),
                    false => Ok(()),
                }
            };
            let result = round_trip(&liar, &memory, 3 * PAGE as u64, Duration::ZERO, hold);
            assert_eq!(result.unwrap_err().kind(), Kind::Revoked);
            assert_eq!(liar.asked.lock().unwrap().len(), left);
        }
    }

    #[test]
    fn a_pattern_is_nobodys_by_chance() {
        let words = |bytes: &[u8]| -> Vec<u64> {
            bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect()
        };
        let (one, other) = (words(&pattern(PAGE)), words(&pattern(PAGE)));
        assert_eq!(one.len(), PAGE / 8);
        let all: std::collections::BTreeSet<u64> = one.iter().chain(&other).copied().collect();
        assert_eq!(all.len(), one.len() + other.len(), "a word is there twice");
        assert!(!all.contains(&0));
        let ones: u32 = all.iter().map(|word| word.count_ones()).sum();
        let share = f64::from(ones) / (64.0 * all.len() as f64);
        assert!((0.45..0.55).contains(&share), "{share} of its bits are ones");
    }
}
