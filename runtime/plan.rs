//! `Plan`: which path an attachment takes, out of what was tried and tested. Pure: it asks for one step after
//! the other, and whoever carries them out says what came of each.
//!
//! ```text
//!   Import(peer) -> Test(peer, read) -> Test(peer, write) -> Take(peer)
//!       |refused        |wrong               |wrong
//!       v               v                    v
//!   Import(host-pointer) -> ... the same ...              -> Take(host-pointer)
//!       |
//!       v
//!   Stage -> Take(staged), or GiveUp
//! ```
//!
//! Without trust nothing is tested. What is tested are the directions that the application asked for: where
//! reads are dead and it only writes, the path is good. Where it also reads, bytes are staged, and the owner's
//! engine pushes them.
//!
//! Absent: who tests and how, and whether an old certificate is good enough. That is said here as
//! [`Evidence`].

use peervram_backends::CpuAccess;

use crate::path::PathSet;
use crate::{Direction, Mover, Path, Trust};

/// What is known of one direction of a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Evidence {
    /// Nothing.
    Untested,
    /// The right bytes arrived.
    Right {
        /// So says a CPU that looked through the same window as the importer, which proves less.
        window_only: bool,
    },
    /// Other bytes arrived, or none, or nobody can tell.
    Wrong,
}

/// What is to be done next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// Import by this path.
    Import(Path),
    /// Test this path, one direction at a time.
    Test(Path, Direction),
    /// This path was imported and is not to be taken.
    Refuse(Path, Refusal),
    /// Make memory to copy to.
    Stage,
    /// It is over: this is the path.
    Take(Path),
    /// It is over: there is none.
    GiveUp,
}

/// Why a path that was imported is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// It was tested, and is wrong.
    Wrong,
    /// The test proves too little.
    WindowOnly,
}

/// How far a path got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Untried,
    Imported,
    Refused,
}

#[derive(Debug, Clone, Copy)]
struct Direct {
    path: Path,
    state: State,
    reads: Evidence,
    writes: Evidence,
}

/// A plan under way.
#[derive(Debug)]
pub(crate) struct Plan {
    trust: Trust,
    /// The importer is a device. What a CPU sees through the window is then not what it sees.
    is_device: bool,
    direct: [Direct; 2],
    staged: State,
}

impl Plan {
    /// For an importer that is a device, or a CPU. No path but `paths` is tried.
    pub fn new(trust: Trust, is_device: bool, paths: PathSet) -> Self {
        let begin = |path| if paths.contains(path) { State::Untried } else { State::Refused };
        let direct = Path::DIRECT.map(|path| Direct {
            path,
            state: begin(path),
            reads: Evidence::Untested,
            writes: Evidence::Untested,
        });
        Self { trust, is_device, direct, staged: begin(Path::Staged) }
    }

    /// What is to be done now.
    pub fn next(&self) -> Step {
        for direct in &self.direct {
            match direct.state {
                State::Untried => return Step::Import(direct.path),
                State::Refused => {}
                State::Imported => return self.judge(direct),
            }
        }
        match self.staged {
            State::Untried => Step::Stage,
            State::Imported => Step::Take(Path::Staged),
            State::Refused => Step::GiveUp,
        }
    }

    fn judge(&self, direct: &Direct) -> Step {
        let Trust::Verified(asked) = self.trust else { return Step::Take(direct.path) };
        for (direction, known) in [(Direction::Read, direct.reads), (Direction::Write, direct.writes)] {
            if !asked.includes(direction) {
                continue;
            }
            match known {
                Evidence::Untested => return Step::Test(direct.path, direction),
                // The other direction is not tested: a test of a device that hangs takes its time.
                Evidence::Wrong => return Step::Refuse(direct.path, Refusal::Wrong),
                Evidence::Right { window_only } if window_only && self.is_device => {
                    return Step::Refuse(direct.path, Refusal::WindowOnly);
                }
                Evidence::Right { .. } => {}
            }
        }
        Step::Take(direct.path)
    }

    /// `path` was imported, or memory for it made.
    pub fn imported(&mut self, path: Path) {
        *self.state_of(path) = State::Imported;
    }

    /// `path` could not be imported, or is not taken.
    pub fn refused(&mut self, path: Path) {
        *self.state_of(path) = State::Refused;
    }

    /// What a test of `path`, or a certificate, said of `direction`.
    pub fn tested(&mut self, path: Path, direction: Direction, known: Evidence) {
        if let Some(direct) = self.direct.iter_mut().find(|direct| direct.path == path) {
            if direction.includes(Direction::Read) {
                direct.reads = known;
            }
            if direction.includes(Direction::Write) {
                direct.writes = known;
            }
        }
    }

    /// Who copies between the lent memory and the host, in one direction as the importer sees it: the owner's
    /// engine, if it has one to be trusted; the CPU, where it has the memory as `cpu` says: cached; the importer's
    /// engine, where `kept`, a path that was imported and not taken, is known to be right; else the CPU.
    pub fn mover(
        &self,
        direction: Direction,
        owner_has_engine: bool,
        cpu: CpuAccess,
        kept: Option<Path>,
    ) -> Mover {
        if owner_has_engine {
            Mover::OwnerEngine
        } else if cpu == CpuAccess::Cached {
            Mover::Cpu
        } else if kept.is_some_and(|path| self.is_right(path, direction)) {
            Mover::ImporterEngine
        } else {
            Mover::Cpu
        }
    }

    /// Whether `direction` is known to be right by `path`, although the path may not be taken.
    pub fn is_right(&self, path: Path, direction: Direction) -> bool {
        let is_right = |known| matches!(known, Evidence::Right { .. });
        self.direct.iter().any(|direct| {
            direct.path == path
                && is_right(if direction == Direction::Read { direct.reads } else { direct.writes })
        })
    }

    fn state_of(&mut self, path: Path) -> &mut State {
        match self.direct.iter_mut().find(|direct| direct.path == path) {
            Some(direct) => &mut direct.state,
            None => &mut self.staged,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const RIGHT: Evidence = Evidence::Right { window_only: false };
    const WINDOW: Evidence = Evidence::Right { window_only: true };

    /// What a path is in truth: refused, or what tests will say of reads and of writes.
    type Truth = Option<(Evidence, Evidence)>;

    /// Carries a plan out against the truth of the paths; says which was taken.
    fn run(trust: Trust, is_device: bool, truths: [Truth; 2], can_stage: bool) -> (Option<Path>, Plan) {
        let mut plan = Plan::new(trust, is_device, PathSet::ALL);
        let truth = |path| truths[usize::from(path == Path::HostPointer)];
        for _ in 0..20 {
            match plan.next() {
                Step::Import(path) if truth(path).is_some() => plan.imported(path),
                Step::Import(path) | Step::Refuse(path, _) => plan.refused(path),
                Step::Test(path, direction) => {
                    let (reads, writes) = truth(path).expect("what is tested was imported");
                    plan.tested(path, direction, if direction == Direction::Read { reads } else { writes });
                }
                Step::Stage if can_stage => plan.imported(Path::Staged),
                Step::Stage => plan.refused(Path::Staged),
                Step::Take(path) => return (Some(path), plan),
                Step::GiveUp => return (None, plan),
            }
        }
        panic!("it never ends: {plan:?}");
    }

    /// Every step that a plan asks for, up to its end.
    fn steps(trust: Trust, is_device: bool, truths: [Truth; 2]) -> Vec<Step> {
        let mut plan = Plan::new(trust, is_device, PathSet::ALL);
        let mut all = Vec::new();
        loop {
            let step = plan.next();
            all.push(step);
            match step {
                Step::Import(path) => match truths[usize::from(path == Path::HostPointer)] {
                    Some(_) => plan.imported(path),
                    None => plan.refused(path),
                },
                Step::Test(path, direction) => {
                    let (reads, writes) = truths[usize::from(path == Path::HostPointer)].unwrap();
                    plan.tested(path, direction, if direction == Direction::Read { reads } else { writes });
                }
                Step::Refuse(path, _) => plan.refused(path),
                Step::Stage => plan.refused(Path::Staged),
                Step::Take(_) | Step::GiveUp => return all,
            }
        }
    }

    #[test]
    fn each_path_is_imported_tested_and_refused_for_its_reason() {
        let (peer, host, both) = (Path::Peer, Path::HostPointer, Trust::Verified(Direction::Both));
        let wrong = (Evidence::Wrong, Evidence::Wrong);
        let expected = [
            Step::Import(peer),
            Step::Test(peer, Direction::Read),
            Step::Test(peer, Direction::Write),
            Step::Refuse(peer, Refusal::Wrong),
            Step::Import(host),
            Step::Test(host, Direction::Read),
            Step::Refuse(host, Refusal::WindowOnly),
            Step::Stage,
            Step::GiveUp,
        ];
        assert_eq!(steps(both, true, [Some((RIGHT, Evidence::Wrong)), Some((WINDOW, RIGHT))]), expected);
        let first_wrong =
            [Step::Import(peer), Step::Test(peer, Direction::Read), Step::Refuse(peer, Refusal::Wrong)];
        assert_eq!(steps(both, true, [Some(wrong), None])[..3], first_wrong);
        let one = |direction| steps(Trust::Verified(direction), true, [None, Some((RIGHT, RIGHT))]);
        for direction in [Direction::Read, Direction::Write] {
            let expected =
                [Step::Import(peer), Step::Import(host), Step::Test(host, direction), Step::Take(host)];
            assert_eq!(one(direction), expected);
        }
        assert_eq!(
            steps(Trust::Unverified, true, [Some(wrong), None]),
            [Step::Import(peer), Step::Take(peer)]
        );
    }

    #[test]
    fn no_path_is_asked_for_that_was_not_named() {
        for number in 0..8 {
            let is_named = |at: usize| number >> at & 1 == 1;
            let named: Vec<Path> = (0..3).filter(|&at| is_named(at)).map(|at| Path::ALL[at]).collect();
            let mut plan = Plan::new(Trust::Unverified, true, named.iter().copied().collect());
            let mut asked = Vec::new();
            loop {
                let path = match plan.next() {
                    Step::Import(path) => path,
                    Step::Stage => Path::Staged,
                    Step::GiveUp => break,
                    other => panic!("{other:?}"),
                };
                asked.push(path);
                plan.refused(path);
            }
            assert_eq!(asked, named, "all that were named, in the usual order");
        }
    }

    #[test]
    fn what_was_said_of_one_direction_is_not_said_of_the_other() {
        for (tested, other) in [(Direction::Read, Direction::Write), (Direction::Write, Direction::Read)] {
            let mut plan = Plan::new(Trust::Verified(Direction::Both), true, PathSet::ALL);
            assert!(!plan.is_right(Path::Peer, tested), "nothing was tested yet");
            plan.tested(Path::Peer, tested, WINDOW);
            assert!(plan.is_right(Path::Peer, tested) && !plan.is_right(Path::Peer, other));
            assert!(!plan.is_right(Path::HostPointer, tested) && !plan.is_right(Path::Staged, tested));
            plan.tested(Path::Peer, tested, Evidence::Wrong);
            assert!(!plan.is_right(Path::Peer, tested));
            plan.tested(Path::HostPointer, Direction::Both, RIGHT);
            assert!(plan.is_right(Path::HostPointer, tested) && plan.is_right(Path::HostPointer, other));
        }
    }

    #[test]
    fn dead_reads_are_staged_and_writes_alone_are_not() {
        let dead_reads = [Some((Evidence::Wrong, RIGHT)), None];
        let taken = |direction| run(Trust::Verified(direction), true, dead_reads, true).0;
        assert_eq!(taken(Direction::Read), Some(Path::Staged));
        assert_eq!(taken(Direction::Both), Some(Path::Staged));
        assert_eq!(taken(Direction::Write), Some(Path::Peer));
    }

    #[test]
    fn a_look_through_the_same_window_is_enough_for_a_cpu_only() {
        let window = [Some((WINDOW, WINDOW)), None];
        let taken = |is_device| run(Trust::Verified(Direction::Both), is_device, window, true).0;
        assert_eq!((taken(true), taken(false)), (Some(Path::Staged), Some(Path::Peer)));
    }

    #[test]
    fn without_trust_nothing_is_tested_and_copies_come_last() {
        let wrong = Some((Evidence::Wrong, Evidence::Wrong));
        let taken = |truths, can_stage| run(Trust::Unverified, true, truths, can_stage).0;
        assert_eq!(taken([wrong, None], true), Some(Path::Peer));
        assert_eq!(taken([None, wrong], true), Some(Path::HostPointer));
        assert_eq!(taken([None, None], true), Some(Path::Staged));
        assert_eq!(taken([None, None], false), None);
    }

    #[test]
    fn the_owners_engine_comes_first_and_an_importers_only_where_it_is_right() {
        let (_, plan) =
            run(Trust::Verified(Direction::Both), true, [Some((RIGHT, Evidence::Wrong)), None], true);
        let mover =
            |direction, of_owner, kept| plan.mover(direction, of_owner, CpuAccess::WriteCombined, kept);
        let kept = Some(Path::Peer);
        assert_eq!(mover(Direction::Read, true, kept), Mover::OwnerEngine);
        assert_eq!(mover(Direction::Read, false, kept), Mover::ImporterEngine);
        assert_eq!(mover(Direction::Write, false, kept), Mover::Cpu);
        assert_eq!(mover(Direction::Read, false, Some(Path::HostPointer)), Mover::Cpu);
        assert_eq!(mover(Direction::Read, false, None), Mover::Cpu);
        // Where the CPU has it cached, nothing is gained by an engine that has to reach it.
        let cached = |of_owner| plan.mover(Direction::Read, of_owner, CpuAccess::Cached, kept);
        assert_eq!((cached(true), cached(false)), (Mover::OwnerEngine, Mover::Cpu));
    }

    proptest! {
        /// Whatever the truth: what is taken by trust in a test was right in every direction asked for.
        #[test]
        fn nothing_wrong_is_trusted(
            direction in prop_oneof![Just(Direction::Read), Just(Direction::Write), Just(Direction::Both)],
            is_device: bool,
            truths in prop::array::uniform2(prop::option::of(known())),
            can_stage: bool,
        ) {
            let (taken, _) = run(Trust::Verified(direction), is_device, truths, can_stage);
            let is_good = |known: Evidence| match known {
                Evidence::Right { window_only } => !(window_only && is_device),
                _ => false,
            };
            let is_fit = |truth: Truth| truth.is_some_and(|(reads, writes)| {
                (!direction.includes(Direction::Read) || is_good(reads))
                    && (!direction.includes(Direction::Write) || is_good(writes))
            });
            let expected = match truths {
                [peer, _] if is_fit(peer) => Some(Path::Peer),
                [_, host] if is_fit(host) => Some(Path::HostPointer),
                _ => can_stage.then_some(Path::Staged),
            };
            prop_assert_eq!(taken, expected);
        }
    }

    fn known() -> impl Strategy<Value = (Evidence, Evidence)> {
        let one = || prop_oneof![Just(Evidence::Wrong), Just(RIGHT), Just(WINDOW)];
        (one(), one())
    }
}
