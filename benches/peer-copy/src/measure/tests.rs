use super::*;
use crate::pace::Step;
use crate::record::tests::example;
use peervram::backends::{HostSlice, Mapping};

const SIZE_BYTES: u64 = 12 << 10;

/// Which copies of a stream are lost, by their number from 1 on.
type Lost = fn(usize) -> bool;

/// Two copies warm up, and three are timed.
const PLAN: Plan = Plan { warm_up: 2, least: 3, most: 3, budget: Duration::ZERO };

/// A way between two pieces of host memory, of whose copies some are lost without a word.
struct Fake {
    bytes: Arc<Bytes>,
    source: Arc<Mapping>,
    destination: Arc<Mapping>,
    lost: Lost,
}

impl Fake {
    fn new(bytes: &Arc<Bytes>, lost: Lost) -> Fake {
        let memory = || Arc::new(Mapping::of_host_memory(SIZE_BYTES as usize).unwrap());
        Fake { bytes: Arc::clone(bytes), source: memory(), destination: memory(), lost }
    }
}

fn move_bytes(from: (&Mapping, usize), to: &Mapping) -> peervram::Result<()> {
    let mut bytes = vec![0; SIZE_BYTES as usize];
    from.0.read(from.1, &mut bytes)?;
    to.write(0, &bytes)
}

impl Route for Fake {
    fn engine(&self) -> String {
        "fake".to_owned()
    }

    fn observer(&self) -> &'static str {
        "host"
    }

    fn is_posted(&self) -> bool {
        false
    }

    fn prepare(&mut self, round: u64) -> Result<()> {
        let (sent, poison) = (self.bytes.sent(round, SIZE_BYTES)?, self.bytes.poison(round, SIZE_BYTES)?);
        move_bytes((sent.mapping(), sent.offset_bytes()), &self.source)?;
        Ok(move_bytes((poison.mapping(), poison.offset_bytes()), &self.destination)?)
    }

    fn copy(&mut self, pace: &mut Pace) -> Result<()> {
        let mut number = 0;
        while let Some(step) = pace.next_step() {
            match step {
                Step::Copy => {
                    number += 1;
                    let is_lost = (self.lost)(number);
                    pace.time(|| {
                        if !is_lost {
                            move_bytes((&self.source, 0), &self.destination)?;
                        }
                        Ok(None)
                    })?;
                }
                Step::Renew(round) => self.prepare(round)?,
            }
        }
        Ok(())
    }

    fn check(&mut self, round: u64) -> Result<Option<Wrong>> {
        let seen = HostSlice::new(Arc::clone(&self.destination), 0, SIZE_BYTES as usize)?;
        Ok(self.bytes.check(round, &seen)?)
    }
}

fn wish(verify: bool) -> Wish {
    Wish {
        sizes_bytes: vec![SIZE_BYTES],
        paths: Vec::new(),
        directions: Vec::new(),
        engine: None,
        plan: PLAN,
        verify,
        pin: None,
        overhead: false,
    }
}

fn bytes() -> Arc<Bytes> {
    Arc::new(Bytes::new(SIZE_BYTES).unwrap())
}

/// Calls with what measures, and with what is copied.
fn measured(
    verify: bool,
    measure: impl FnOnce(&mut Measure, &Arc<Bytes>, CopyKey) -> Result<Figure>,
) -> Result<Figure> {
    let (wish, bytes, mut record) = (wish(verify), bytes(), example());
    let what = record.figures[0].what.clone();
    let mut say = |_: &str| ();
    measure(&mut Measure::new(&wish, Arc::clone(&bytes), None, &mut record, &mut say), &bytes, what)
}

/// The figure of one stream of such copies.
fn one_way(verify: bool, lost: Lost) -> Figure {
    measured(verify, |measure, bytes, what| measure.figure(&mut Fake::new(bytes, lost), what, None)).unwrap()
}

/// The figure of two streams at once.
fn both_ways(lost: [Lost; 2]) -> Figure {
    measured(true, |measure, bytes, what| {
        let [mut first, mut second] = lost.map(|lost| Fake::new(bytes, lost));
        let what = CopyKey { direction: Direction::Both, ..what };
        measure.both_figure(&mut first, &mut second, what, None)
    })
    .unwrap()
}

const NONE: Lost = |_| false;
/// Warm-up copies arrive and timed ones do not, so the destination already has the bytes.
const TIMED: Lost = |number| number > PLAN.warm_up;

#[test]
fn a_way_that_drops_every_timed_copy_is_wrong() {
    let figure = one_way(true, TIMED);
    assert_eq!(figure.verdict, Verdict::Wrong);
    let wrong = figure.wrong.unwrap();
    assert_eq!((wrong.of_bytes, wrong.first_wrong_bytes), (SIZE_BYTES, 0));
    assert!(wrong.looks_like.contains("nothing arrived"), "{wrong:?}");
    assert_eq!(figure.time.count, PLAN.least);
}

#[test]
fn the_last_timed_copy_is_the_one_that_is_looked_at() {
    let last: Lost = |number| number == PLAN.warm_up + PLAN.least;
    assert_eq!(one_way(true, last).verdict, Verdict::Wrong);
    // And nothing comes after it that could make it good.
    assert_eq!(one_way(true, |number| number > PLAN.warm_up + PLAN.least).verdict, Verdict::Right);
    assert_eq!(one_way(true, NONE).verdict, Verdict::Right);
}

#[test]
fn nobody_looks_where_nobody_was_asked_to() {
    let figure = one_way(false, |_| true);
    assert_eq!((figure.verdict, figure.observer, figure.time.count), (Verdict::Unverified, None, PLAN.least));
}

#[test]
fn either_stream_of_both_ways_that_drops_its_timed_copies_is_wrong() {
    assert_eq!(both_ways([TIMED, NONE]).verdict, Verdict::Wrong);
    assert_eq!(both_ways([NONE, TIMED]).verdict, Verdict::Wrong);
    let right = both_ways([NONE, NONE]);
    assert_eq!((right.verdict, right.time.count), (Verdict::Right, PLAN.least));
}

#[test]
fn a_second_side_that_cannot_have_its_cpu_ends_both() {
    let wish = Wish { pin: Some(Pin { first: 0, other: Some(1_000_000) }), ..wish(true) };
    let (bytes, mut record) = (bytes(), example());
    let what = record.figures[0].what.clone();
    let mut say = |_: &str| ();
    let mut measure = Measure::new(&wish, Arc::clone(&bytes), None, &mut record, &mut say);
    let [mut first, mut second] = [NONE, NONE].map(|lost| Fake::new(&bytes, lost));
    let error = measure.both_figure(&mut first, &mut second, what, None).unwrap_err();
    assert!(error.to_string().contains("cannot stay on CPU 1000000"), "{error:#}");
}
