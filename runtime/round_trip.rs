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

    /// An engine on plain bytes, that may lie.
    struct Liar(fn(&mut [u8]));

    impl Engine<Mutex<Vec<u8>>> for Liar {
        fn name(&self) -> &str {
            "liar"
        }

        fn read(&self, memory: &Mutex<Vec<u8>>, at: u64, host: &HostSlice, _: Instant) -> Result<()> {
            let mut bytes = memory.lock().unwrap()[at as usize..][..host.length_bytes()].to_vec();
            (self.0)(&mut bytes);
            host.mapping().write(host.offset_bytes(), &bytes)
        }

        fn write(&self, memory: &Mutex<Vec<u8>>, at: u64, host: &HostSlice, _: Instant) -> Result<()> {
            host.mapping()
                .read(host.offset_bytes(), &mut memory.lock().unwrap()[at as usize..][..host.length_bytes()])
        }
    }

    #[test]
    fn an_honest_engine_passes_and_leaves_what_was_there() {
        let there: Vec<u8> = (0..3 * page_size_bytes()).map(|i| (i * 7) as u8).collect();
        let memory = Mutex::new(there.clone());
        round_trip(&Liar(|_| ()), &memory, there.len() as u64, Duration::ZERO, || Ok(())).unwrap();
        assert!(*memory.lock().unwrap() == there);
    }

    #[test]
    fn a_lie_is_found_out() {
        let lies: [fn(&mut [u8]); 3] =
            [|bytes| bytes.fill(0xFF), |bytes| bytes.fill(0), |bytes| bytes[9] ^= 1];
        for lie in lies {
            let memory = Mutex::new(vec![0; page_size_bytes() as usize]);
            let result = round_trip(&Liar(lie), &memory, page_size_bytes(), Duration::ZERO, || Ok(()));
            let error = result.unwrap_err();
            assert_eq!(error.kind(), Kind::Unverified);
        }
    }
}
