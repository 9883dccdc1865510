//! `Run`: one test of bytes, of one engine in one direction.
//!
//! Order: what is in the tested places is saved -> rounds -> it is put back. A round of a read: the owner
//! writes the pattern everywhere, then the importer's engine reads it everywhere into poisoned host memory. A
//! round of a write: the owner writes poison everywhere, then the engine writes the pattern everywhere, then the
//! owner reads it. All places are written before any is read, so that an offset which stands for another is
//! seen; each round has other bytes, so that a stale copy is.
//!
//! What goes wrong on the importer's side is the test's result. What goes wrong on the owner's is an error: then
//! nobody observed anything.

use std::sync::Arc;
use std::time::{Duration, Instant};

use peervram_backends::{DmaRanges, Engine, Error, HostSlice, Kind, Mapping, Owner, deadline_after};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::certificate::Figure;
use super::difference::{Difference, Known};
use super::failure::Failure;
use super::observer::View;
use super::pattern::{Pattern, Purpose};
use super::places::{PIECE_BYTES, VerifiedPart};
use crate::piece_lock::PieceLock;
use crate::{Direction, Result};

/// How many rounds: in the second, what a cache kept of the first is seen.
pub(crate) const ROUNDS: u32 = 2;

/// Host memory that copies begin and end in: one half for the owner, one for the importer.
pub(crate) struct Halves {
    mapping: Arc<Mapping>,
    half_bytes: usize,
}

impl Halves {
    /// Two halves of `half_bytes`, rounded up to pages.
    pub fn new(half_bytes: u64) -> Result<Self> {
        const TRIED: &str = "allocate memory to verify with";
        let half_bytes = half_bytes.next_multiple_of(peervram_backends::page_size_bytes());
        let file =
            memfd_create("peervram-verify", MemfdFlags::CLOEXEC).map_err(|errno| Error::os(TRIED, errno))?;
        ftruncate(&file, 2 * half_bytes).map_err(|errno| Error::os(TRIED, errno))?;
        let mapping = Arc::new(Mapping::new(Arc::new(file), &[(0, 2 * half_bytes)])?);
        Ok(Self { mapping, half_bytes: half_bytes as usize })
    }

    fn owners(&self, length_bytes: u64) -> Result<HostSlice> {
        HostSlice::new(Arc::clone(&self.mapping), 0, length_bytes as usize)
    }

    fn importers(&self, length_bytes: u64) -> Result<HostSlice> {
        HostSlice::new(Arc::clone(&self.mapping), self.half_bytes, length_bytes as usize)
    }
}

/// What all tests of an attachment share.
pub(crate) struct Run<'a, M> {
    pub view: View<'a>,
    pub owner: &'a dyn Owner,
    pub ranges: &'a DmaRanges,
    pub memory: &'a M,
    /// Held for each copy: what was saved of one generation is not put back into the next.
    pub pieces: &'a PieceLock,
    pub generation: u64,
    pub halves: Halves,
    pub seed: u64,
    /// For one copy.
    pub copy_timeout: Duration,
}

/// What came of a test.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    /// Copied by the importer's engine.
    pub copied_bytes: u64,
    /// The best time of the longest copy.
    pub figure: Option<Figure>,
    pub failure: Option<Failure>,
}

/// Why a round ended early.
enum Broken {
    /// On the importer's side.
    Test(Failure),
    /// On the owner's.
    Run(Error),
}

impl From<Error> for Broken {
    fn from(error: Error) -> Self {
        Self::Run(error)
    }
}

impl<M> Run<'_, M> {
    /// Tests `engine` in `direction`, at `places`, and puts back what was there. No copy begins after
    /// `deadline`.
    ///
    /// # Errors
    /// The owner's side failed: nothing was observed, and what was in the places may be lost.
    pub fn test(
        &self,
        engine: &dyn Engine<M>,
        direction: Direction,
        places: &[VerifiedPart],
        deadline: Option<Instant>,
    ) -> Result<Findings> {
        let pieces = pieces(places);
        let saved = pieces.iter().map(|piece| self.save(piece)).collect::<Result<Vec<_>>>()?;
        let mut findings = Findings::default();
        let mut run_rounds = || -> Result<(), Broken> {
            for round in 0..ROUNDS {
                self.round(engine, direction, round, &pieces, &saved, deadline, &mut findings)?;
            }
            Ok(())
        };
        let broken = run_rounds();
        let put_back = pieces.iter().zip(&saved).try_for_each(|(piece, bytes)| self.put_back(piece, bytes));
        let put_back = put_back.and_then(|()| self.owner.flush(self.ranges));
        match broken {
            Err(Broken::Run(error)) => return Err(error),
            Err(Broken::Test(failure)) => findings.failure = Some(failure),
            Ok(()) => {}
        }
        put_back.map(|()| findings)
    }

    #[expect(clippy::too_many_arguments, reason = "a round is all of these, and nothing else is")]
    fn round(
        &self,
        engine: &dyn Engine<M>,
        direction: Direction,
        round: u32,
        pieces: &[VerifiedPart],
        saved: &[Vec<u8>],
        deadline: Option<Instant>,
        findings: &mut Findings,
    ) -> Result<(), Broken> {
        let of = |round, purpose| Pattern::new(self.seed, direction, round, purpose);
        let (sent, poison) = (of(round, Purpose::Sent), of(round, Purpose::Poison));
        let landing = of(round, Purpose::Landing);
        let known = [
            Known { pattern: landing, name: "what was in the destination before: nothing was read" },
            Known { pattern: poison, name: "what was there before: nothing was written" },
            Known {
                pattern: of(round.wrapping_sub(1), Purpose::Sent),
                name: "the bytes of the round before: a stale copy",
            },
            Known {
                pattern: of(round.wrapping_sub(1), Purpose::Poison),
                name: "what was there a round before: a stale copy",
            },
        ];

        // Fill the lent memory before the engine copies.
        let laid = if direction == Direction::Write { poison } else { sent };
        for piece in pieces {
            let host = self.halves.owners(piece.length_bytes)?;
            put(&host, |bytes| laid.fill(piece.offset_bytes, bytes))?;
            self.owner_writes(piece, &host)?;
        }
        self.owner.flush(self.ranges)?;

        let mut wrong: Option<Difference> = None;
        let mut compare = |piece: &VerifiedPart, seen: &[u8], saved: &[u8]| {
            let size_bytes = self.ranges.size_bytes();
            let found = Difference::find(&sent, piece.offset_bytes, seen, size_bytes, &known, Some(saved));
            match (&mut wrong, found) {
                (Some(first), found) => first.wrong_bytes += found.map_or(0, |found| found.wrong_bytes),
                (wrong, found) => *wrong = found,
            }
        };
        for (piece, saved) in pieces.iter().zip(saved) {
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                let message = "the time for the whole test was over before it was done".into();
                return Err(Broken::Test(Failure::Engine { code: Kind::TimedOut.code().into(), message }));
            }
            let host = self.halves.importers(piece.length_bytes)?;
            let filled = if direction == Direction::Write { sent } else { landing };
            put(&host, |bytes| filled.fill(piece.offset_bytes, bytes))?;
            let held = self.pieces.hold(self.generation)?;
            let start = Instant::now();
            let copied = match direction {
                Direction::Write => engine.write(self.memory, piece.offset_bytes, &host, self.limit()),
                _ => engine.read(self.memory, piece.offset_bytes, &host, self.limit()),
            };
            copied.map_err(|error| Broken::Test(Failure::from(&error)))?;
            findings.copied(piece.length_bytes, start.elapsed());
            drop(held);
            if direction != Direction::Write {
                compare(piece, &get(&host)?, saved);
            }
        }
        if direction == Direction::Write {
            self.owner.invalidate(self.ranges)?;
            for (piece, saved) in pieces.iter().zip(saved) {
                let host = self.halves.owners(piece.length_bytes)?;
                put(&host, |bytes| landing.fill(piece.offset_bytes, bytes))?;
                self.owner_reads(piece, &host)?;
                compare(piece, &get(&host)?, saved);
            }
        }
        let of_bytes = pieces.iter().map(|piece| piece.length_bytes).sum();
        wrong.map_or(Ok(()), |wrong| Err(Broken::Test(Failure::WrongBytes(Difference { of_bytes, ..wrong }))))
    }

    fn owner_reads(&self, piece: &VerifiedPart, host: &HostSlice) -> Result<()> {
        let _held = self.pieces.hold(self.generation)?;
        self.view.read(piece.offset_bytes, host, self.limit())
    }

    fn owner_writes(&self, piece: &VerifiedPart, host: &HostSlice) -> Result<()> {
        let _held = self.pieces.hold(self.generation)?;
        self.view.write(piece.offset_bytes, host, self.limit())
    }

    fn save(&self, piece: &VerifiedPart) -> Result<Vec<u8>> {
        let host = self.halves.owners(piece.length_bytes)?;
        self.owner_reads(piece, &host)?;
        get(&host)
    }

    fn put_back(&self, piece: &VerifiedPart, bytes: &[u8]) -> Result<()> {
        let host = self.halves.owners(piece.length_bytes)?;
        host.mapping().write(host.offset_bytes(), bytes)?;
        self.owner_writes(piece, &host)
    }

    fn limit(&self) -> Instant {
        deadline_after(self.copy_timeout)
    }
}

impl Findings {
    fn copied(&mut self, size_bytes: u64, time: Duration) {
        self.copied_bytes += size_bytes;
        self.figure = Figure::better(self.figure, Some(Figure::new(size_bytes, time)));
    }

    /// Another part of the same test.
    pub fn add(&mut self, part: Self) {
        self.copied_bytes += part.copied_bytes;
        self.figure = Figure::better(self.figure, part.figure);
        self.failure = self.failure.take().or(part.failure);
    }
}

/// Places cut to what one copy takes.
fn pieces(places: &[VerifiedPart]) -> Vec<VerifiedPart> {
    let cut = |place: &VerifiedPart| {
        let (start, end) = (place.offset_bytes, place.offset_bytes + place.length_bytes);
        let name = place.name.clone();
        (start..end).step_by(PIECE_BYTES as usize).map(move |offset_bytes| VerifiedPart {
            offset_bytes,
            length_bytes: PIECE_BYTES.min(end - offset_bytes),
            name: name.clone(),
        })
    };
    places.iter().flat_map(cut).collect()
}

fn put(host: &HostSlice, fill: impl FnOnce(&mut [u8])) -> Result<()> {
    let mut bytes = vec![0; host.length_bytes()];
    fill(&mut bytes);
    host.mapping().write(host.offset_bytes(), &bytes)
}

fn get(host: &HostSlice) -> Result<Vec<u8>> {
    let mut bytes = vec![0; host.length_bytes()];
    host.mapping().read(host.offset_bytes(), &mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(offset_bytes: u64, length_bytes: u64, name: &str) -> VerifiedPart {
        VerifiedPart { offset_bytes, length_bytes, name: name.into() }
    }

    #[test]
    fn places_are_cut_to_what_one_copy_takes() {
        let far = 5 << 40;
        let cut = pieces(&[place(4096, 2 * PIECE_BYTES + 4096, "long"), place(far, 4096, "short")]);
        let expected = [
            place(4096, PIECE_BYTES, "long"),
            place(4096 + PIECE_BYTES, PIECE_BYTES, "long"),
            place(4096 + 2 * PIECE_BYTES, 4096, "long"),
            place(far, 4096, "short"),
        ];
        assert_eq!(cut, expected);
    }

    #[test]
    fn findings_of_all_parts_are_counted_together() {
        let time = Duration::from_micros(3);
        let failed = |message: &str| Some(Failure::Fault { message: message.into() });
        let mut all = Findings::default();
        all.copied(7, time);
        all.copied(10, time);
        let mut part = Findings { failure: failed("first"), ..Findings::default() };
        part.copied(40, time);
        part.copied(30, time);
        all.add(part);
        all.add(Findings { failure: failed("second"), ..Findings::default() });
        assert_eq!((all.copied_bytes, all.figure), (87, Some(Figure::new(40, time))));
        assert_eq!(all.failure, failed("first"), "the first counts");
    }

    #[test]
    fn each_half_of_the_host_memory_keeps_its_own_bytes() {
        let halves = Halves::new(5000).unwrap();
        let (owners, importers) = (halves.owners(5000).unwrap(), halves.importers(5000).unwrap());
        put(&owners, |bytes| bytes.fill(1)).unwrap();
        put(&importers, |bytes| bytes.fill(2)).unwrap();
        assert_eq!(get(&owners).unwrap(), [1; 5000]);
        assert_eq!(get(&importers).unwrap(), [2; 5000]);
    }
}
