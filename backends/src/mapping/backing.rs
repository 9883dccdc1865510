//! `Backing`: what lies behind a mapping's addresses now, its source or shadow memory, and the swaps between them.
//!
//! `source -> shadow -> unshadow -> ...`, and `retire` once for good. Whoever reads or writes meanwhile meets the one memory
//! or the other, page by page, and never a hole: what takes the place of what is there is placed over it in one step.

use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::io::Errno;
use rustix::mm::MapFlags;

use super::Source;
use super::reservation::{MappedPiece, Reservation};
use super::shadow_file::ShadowFile;
use crate::{Error, Kind, Result};

/// The memory that a mapping's addresses lead to.
pub(super) struct Backing {
    /// None once the source was released for good, and for memory that never had a source.
    source: Option<Arc<dyn Source>>,
    /// Offset and length in the file of each piece, in bytes, in the order in which they lie in the reservation.
    pieces: Box<[(u64, usize)]>,
    is_shadowed: bool,
}

impl Backing {
    /// `pieces` of `source`, placed in `reservation`, which they fill.
    pub(super) fn source(
        source: Arc<dyn Source>,
        pieces: Box<[(u64, usize)]>,
        reservation: &Reservation,
    ) -> Result<Self, Errno> {
        place(&*source, &pieces, reservation)?;
        Ok(Self { source: Some(source), pieces, is_shadowed: false })
    }

    /// Memory of nobody but this process.
    pub(super) fn nothing() -> Self {
        Self { source: None, pieces: Box::default(), is_shadowed: false }
    }

    /// The source that is mapped now or will be mapped again; none once it was released for good.
    pub(super) fn what(&self) -> Option<Arc<dyn Source>> {
        self.source.clone()
    }

    /// Whether it is shadow memory.
    pub(super) fn is_shadowed(&self) -> bool {
        self.is_shadowed
    }

    /// See [`Mapping::shadow`](super::Mapping::shadow).
    pub(super) fn shadow(&mut self, reservation: &Reservation) -> Result<()> {
        if !self.is_shadowed {
            place_shadow(reservation)?;
            self.is_shadowed = true;
        }
        Ok(())
    }

    /// See [`Mapping::unshadow`](super::Mapping::unshadow).
    pub(super) fn unshadow(&mut self, reservation: &Reservation) -> Result<()> {
        const TRIED: &str = "map memory back";
        let Some(source) = &self.source else {
            return Err(Error::new(Kind::Gone, TRIED, "its device was let go of")
                .next("open the device again, and map its memory anew"));
        };
        if !self.is_shadowed {
            return Ok(());
        }
        let result = place(&**source, &self.pieces, reservation);
        if let Err(errno) = result {
            let error = Error::os(TRIED, errno);
            return Err(match place_shadow(reservation) {
                Ok(()) => error.next("it is shadow memory as before; try again"),
                Err(worse) => worse,
            });
        }
        self.is_shadowed = false;
        Ok(())
    }

    /// See [`Mapping::retire`](super::Mapping::retire). Gives out what is to be let go of.
    pub(super) fn retire(&mut self, reservation: &Reservation) -> Result<Option<Arc<dyn Source>>> {
        self.shadow(reservation)?;
        Ok(self.source.take())
    }
}

/// Maps the pieces of `source` over all of `reservation`. Where the source refuses one of them, nothing has changed.
fn place(source: &dyn Source, pieces: &[(u64, usize)], reservation: &Reservation) -> Result<(), Errno> {
    let map = |&(offset, length)| MappedPiece::map(source.as_fd(), offset, length, MapFlags::SHARED);
    let mapped: Vec<MappedPiece> = pieces.iter().map(map).collect::<Result<_, _>>()?;
    let mut at = 0;
    for (piece, &(_, length)) in mapped.into_iter().zip(pieces) {
        reservation.place(at, piece)?;
        at += length;
    }
    Ok(())
}

/// Maps shadow memory over all of `reservation`.
fn place_shadow(reservation: &Reservation) -> Result<()> {
    let ones = ShadowFile::for_length(reservation.length_bytes())?;
    let mut at = 0;
    while at < reservation.length_bytes() {
        let length = ones.size_bytes().min(reservation.length_bytes() - at);
        let piece = MappedPiece::map(ones.as_fd(), 0, length, MapFlags::PRIVATE);
        if let Err(errno) = piece.and_then(|piece| reservation.place(at, piece)) {
            tracing::warn!(%errno, length_bytes = reservation.length_bytes(), "shadow memory is zeros, not ones");
            return reservation.place_zeros().map_err(|errno| {
                Error::os("put shadow memory under a mapping", errno)
                    .next("raise vm.max_map_count, or free memory; let nobody touch the mapping meanwhile")
            });
        }
        at += length;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use crate::Kind;
    use crate::mapping::Mapping;
    use crate::mapping::tests::{PAGE, file, is_all};

    #[test]
    fn under_a_shadow_reads_are_ones_and_writes_are_private() {
        let file = file(1027);
        // More than one piece of the file, more than one of the shadow, and neither at its borders.
        let mapping =
            Mapping::new(file.clone(), &[(3 * PAGE, PAGE), (0, PAGE), (4 * PAGE, 1023 * PAGE)]).unwrap();
        mapping.write(0, b"before").unwrap();
        assert!(!mapping.is_shadowed());
        for _ in 0..2 {
            mapping.shadow().unwrap();
            assert!(mapping.is_shadowed());
        }
        assert!(is_all(&mapping, 0xFF));
        mapping.write(0, b"lost").unwrap();
        mapping.write(mapping.len() - 4, b"lost").unwrap();
        let mut seen = [0; 6];
        mapping.read(0, &mut seen).unwrap();
        assert_eq!(&seen[..4], b"lost");
        // The write reached neither the file nor the next shadow.
        file.read_exact_at(&mut seen, 3 * PAGE).unwrap();
        assert_eq!(&seen, b"before");
        for _ in 0..2 {
            mapping.unshadow().unwrap();
            assert!(!mapping.is_shadowed());
        }
        mapping.read(0, &mut seen).unwrap();
        assert_eq!(&seen, b"before");
        mapping.write(PAGE as usize, b"after").unwrap();
        file.read_exact_at(&mut seen[..5], 0).unwrap();
        assert_eq!(&seen[..5], b"after");
        mapping.shadow().unwrap();
        assert!(is_all(&mapping, 0xFF));
    }

    #[test]
    fn what_cannot_be_mapped_back_stays_shadowed() {
        // A memfd that is sealed against writing while nothing writable maps it.
        let flags = rustix::fs::MemfdFlags::ALLOW_SEALING;
        let file = Arc::new(rustix::fs::memfd_create("test", flags).unwrap());
        rustix::fs::ftruncate(&file, 2 * PAGE).unwrap();
        let mapping = Mapping::new(file.clone(), &[(PAGE, PAGE), (0, PAGE)]).unwrap();
        mapping.shadow().unwrap();
        rustix::fs::fcntl_add_seals(&file, rustix::fs::SealFlags::WRITE).unwrap();
        let error = mapping.unshadow().unwrap_err();
        assert!(error.raw_os_error().is_some() && error.next_step().is_some(), "{error}");
        assert!(mapping.is_shadowed() && is_all(&mapping, 0xFF));
        mapping.write(0, &[1]).unwrap();
    }

    #[test]
    fn bury_lets_go_of_the_source_for_good() {
        let file = file(2);
        let mapping = Mapping::new(file.clone(), &[(0, 2 * PAGE)]).unwrap();
        assert_eq!(Arc::strong_count(&file), 2);
        for _ in 0..2 {
            mapping.retire().unwrap();
            assert_eq!(Arc::strong_count(&file), 1);
        }
        assert!(mapping.is_shadowed() && is_all(&mapping, 0xFF));
        assert_eq!(mapping.unshadow().unwrap_err().kind(), Kind::Gone);
        mapping.shadow().unwrap();
        assert!(is_all(&mapping, 0xFF));
    }

    #[test]
    fn readers_and_writers_meet_no_hole_while_memory_is_swapped() {
        let mapping = Mapping::new(file(1024), &[(512 * PAGE, 512 * PAGE), (0, 512 * PAGE)]).unwrap();
        let bytes = places(1024);
        mapping.write(0, &bytes).unwrap();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for thread in 0..2 {
                let (mapping, stop, bytes) = (&mapping, &stop, &bytes);
                scope.spawn(move || {
                    let mut word = [0; 8];
                    // Every page, with a stride that does not follow the swap.
                    for page in (0..1024_usize).cycle().step_by(37 + thread) {
                        if stop.load(Ordering::Relaxed) {
                            break;
                        }
                        let at = page * PAGE as usize + 64 * thread;
                        mapping.read(at, &mut word).unwrap();
                        let own = &bytes[at..at + 8];
                        assert!(word == own || word == [0xFF; 8], "{word:?} on page {page}");
                        mapping.write(at, &word).unwrap();
                        if word == [0xFF; 8] {
                            // The write may have landed in the file.
                            mapping.write(at, own).unwrap();
                        }
                    }
                });
            }
            for _ in 0..200 {
                mapping.shadow().unwrap();
                mapping.unshadow().unwrap();
            }
            stop.store(true, Ordering::Relaxed);
        });
        assert!(!mapping.is_shadowed());
        let mut seen = vec![0; bytes.len()];
        mapping.read(0, &mut seen).unwrap();
        for (at, (word, own)) in seen.chunks(8).zip(bytes.chunks(8)).enumerate() {
            assert!(word == own || word == [0xFF; 8], "{word:?} at {:#x}", 8 * at);
        }
    }

    /// A file of that many pages in which each word holds its own offset.
    fn places(pages: u64) -> Vec<u8> {
        (0..pages * PAGE / 8).flat_map(|word| (word << 8 | 7).to_le_bytes()).collect()
    }

    #[test]
    fn swaps_that_race_with_each_other_end_in_one_state() {
        let mapping = Mapping::new(file(512), &[(256 * PAGE, 256 * PAGE), (0, 256 * PAGE)]).unwrap();
        let bytes = places(512);
        mapping.write(0, &bytes).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| (0..50).for_each(|_| mapping.shadow().unwrap()));
                scope.spawn(|| (0..50).for_each(|_| mapping.unshadow().unwrap()));
            }
        });
        let mut seen = vec![0; bytes.len()];
        mapping.read(0, &mut seen).unwrap();
        assert!(if mapping.is_shadowed() { is_all(&mapping, 0xFF) } else { seen == bytes });
    }
}
