//! Many tests on many machines: each machine is booted once, its tests run in order; several machines run at once.

use anyhow::{Context, Result, anyhow, bail};
use serde::Serialize;
use std::collections::BTreeMap;
use std::io::Write;
use std::panic::{self, AssertUnwindSafe};
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use crate::lab::{Absent, Lab, Programs};
use crate::machine::{Facts, Machine};
use crate::root::host;
use crate::run::schedule::{Job, Schedule};
use crate::vm::wire::{Cell, Listed, Verdict};

/// A machine and the tests that are to run there.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Where.
    pub machine: &'static Machine,
    /// What, by full name, in order.
    pub tests: Vec<String>,
}

/// What came of a plan.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// The machine's name.
    pub machine: String,
    /// The running kernel's release, once it ran.
    pub release: Option<String>,
    /// From QEMU's start until the agent was ready.
    pub boot_s: f64,
    /// From QEMU's start until the last verdict.
    pub total_s: f64,
    /// Each test, in order.
    pub tests: Vec<Tested>,
    /// What the tests said for tables, in order.
    pub cells: Vec<Cell>,
}

impl Outcome {
    /// That of a plan of which nothing has been run.
    fn of(plan: &Plan) -> Outcome {
        let machine = plan.machine.name.into();
        Outcome { machine, release: None, boot_s: 0.0, total_s: 0.0, tests: Vec::new(), cells: Vec::new() }
    }
}

/// What came of a test.
#[derive(Clone, Debug, Serialize)]
pub struct Tested {
    /// The test's full name.
    pub name: String,
    /// How it ended.
    #[serde(flatten)]
    pub verdict: Verdict,
    /// How long it ran.
    pub seconds: f64,
}

/// How often the watcher hears which machines still run, where several do.
const WORD_INTERVAL: Duration = Duration::from_secs(30);

/// What the host keeps for itself beside the machines.
const HOST_RESERVE_MIB: u64 = 2048;

/// Told of everything as it happens. Where several machines run at once, each is told of as a whole when it has
/// ended.
pub trait Watcher {
    /// Several machines run at once, and this one is started now.
    fn machine_starts(&mut self, _plan: &Plan) {}
    /// Several machines run at once, and these still do.
    fn machines_run(&mut self, _plans: &[&Plan]) {}
    /// A machine is about to be booted.
    fn machine_begins(&mut self, plan: &Plan);
    /// The machine is up.
    fn machine_is_up(&mut self, release: &str, boot_s: f64);
    /// A test is over.
    fn tested(&mut self, tested: &Tested);
    /// All tests of the machine are over.
    fn machine_ends(&mut self, outcome: &Outcome);
}

/// How often tests run that come out the same on any topology.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// On every machine that they are for.
    Everywhere,
    /// On machines with the usual topology only, with each kernel.
    Usual,
}

/// Which tests would run where: those whose name contains `filter`, on the machines that they are
/// for. Machines without any are left out. The guest program is asked, here on the host.
pub fn plan(
    programs: &Programs,
    machines: &[&'static Machine],
    filter: &str,
    extent: Extent,
) -> Result<Vec<Plan>> {
    let facts: Vec<Facts> = machines.iter().map(|machine| machine.facts()).collect();
    let mut child = Command::new(&programs.agent)
        .arg("list")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting {}", programs.agent.display()))?;
    let mut input = child.stdin.take().context("the guest program has no input")?;
    input.write_all(&serde_json::to_vec(&facts)?)?;
    drop(input);
    let output = child.wait_with_output()?;
    if !output.status.success() {
        bail!("{} list: {}", programs.agent.display(), output.status);
    }
    let mut tests: BTreeMap<String, Vec<Listed>> = serde_json::from_slice(&output.stdout)
        .with_context(|| format!("reading the tests of {}", programs.agent.display()))?;
    Ok(machines
        .iter()
        .map(|machine| {
            let all = extent == Extent::Everywhere || machine.facts().has_usual_topology();
            let tests = tests.remove(machine.name).unwrap_or_default().into_iter();
            let is_wanted = |test: &Listed| match test.is_only_when_named {
                true => test.name == filter,
                false => test.name.contains(filter),
            };
            let chosen = tests.filter(|test| is_wanted(test) && (all || test.is_of_a_topology));
            Plan { machine, tests: chosen.map(|test| test.name).collect() }
        })
        .filter(|plan| !plan.tests.is_empty())
        .collect())
}

/// Runs all plans, `at_once` machines at a time where the host's memory allows it, those with the most tests first. The
/// outcomes are in the order of the plans. A machine that cannot be booted, or is lost on the way, fails its tests; an
/// error is only what keeps the lab from working at all.
pub fn run_all(lab: &Lab, plans: &[Plan], at_once: usize, watcher: &mut dyn Watcher) -> Result<Vec<Outcome>> {
    // Prepare machines one after the other: building a kernel takes all cores, and progress is shown step by step.
    let mut skipped: BTreeMap<&str, String> = BTreeMap::new();
    for plan in plans {
        match lab.prepare(plan.machine) {
            Ok(()) => {}
            Err(error) if error.is::<Absent>() => {
                drop(skipped.insert(plan.machine.name, format!("{error:#}")))
            }
            Err(error) => return Err(error),
        }
    }
    let run = |plan: &Plan, watcher: &mut dyn Watcher| match skipped.get(plan.machine.name) {
        Some(reason) => skip(plan, reason, watcher),
        None => run(lab, plan, watcher),
    };
    if at_once <= 1 || plans.len() <= 1 {
        return Ok(plans.iter().map(|plan| run(plan, watcher)).collect());
    }
    let jobs = plans
        .iter()
        .map(|plan| Job { memory_mib: plan.machine.host_memory_mib(), tests: plan.tests.len() })
        .collect();
    let memory_mib = host::available_memory_mib().saturating_sub(HOST_RESERVE_MIB);
    let mut schedule = Schedule::new(jobs, at_once, memory_mib);
    let mut outcomes: Vec<Option<Outcome>> = plans.iter().map(|_| None).collect();
    let mut broken: Option<anyhow::Error> = None;
    let (sender, ended) = mpsc::channel();
    thread::scope(|scope| {
        loop {
            while let Some(number) = schedule.start() {
                watcher.machine_starts(&plans[number]);
                let (plan, sender, run) = (&plans[number], sender.clone(), &run);
                scope.spawn(move || {
                    let outcome = panic::catch_unwind(AssertUnwindSafe(|| run(plan, &mut Unwatched)));
                    // The receiver lives until every machine has ended.
                    sender.send((number, outcome)).ok();
                });
            }
            if schedule.running().is_empty() {
                return;
            }
            let (number, outcome) = match ended.recv_timeout(WORD_INTERVAL) {
                Ok(message) => message,
                Err(RecvTimeoutError::Timeout) => {
                    let running: Vec<&Plan> =
                        schedule.running().iter().map(|&number| &plans[number]).collect();
                    watcher.machines_run(&running);
                    continue;
                }
                Err(RecvTimeoutError::Disconnected) => unreachable!("the loop holds a sender itself"),
            };
            schedule.end(number);
            match outcome {
                Ok(outcome) => {
                    tell(&plans[number], &outcome, watcher);
                    outcomes[number] = Some(outcome);
                }
                Err(_) => {
                    schedule.call_off();
                    let name = plans[number].machine.name;
                    broken.get_or_insert_with(|| anyhow!("the lab itself panicked while machine {name} ran"));
                }
            }
        }
    });
    match broken {
        Some(error) => Err(error),
        None => Ok(outcomes.into_iter().flatten().collect()),
    }
}

/// Tells of a machine that has ended as if it had been watched.
fn tell(plan: &Plan, outcome: &Outcome, watcher: &mut dyn Watcher) {
    watcher.machine_begins(plan);
    if let Some(release) = &outcome.release {
        watcher.machine_is_up(release, outcome.boot_s);
    }
    outcome.tests.iter().for_each(|tested| watcher.tested(tested));
    watcher.machine_ends(outcome);
}

/// The output of a machine that is shown as a whole when it has ended.
struct Unwatched;

impl Watcher for Unwatched {
    fn machine_begins(&mut self, _: &Plan) {}
    fn machine_is_up(&mut self, _: &str, _: f64) {}
    fn tested(&mut self, _: &Tested) {}
    fn machine_ends(&mut self, _: &Outcome) {}
}

/// Skips the plan of a machine that this host cannot have.
fn skip(plan: &Plan, reason: &str, watcher: &mut dyn Watcher) -> Outcome {
    watcher.machine_begins(plan);
    let skipped = |name: &String| {
        let verdict = Verdict::Skipped { reason: reason.into() };
        Tested { name: name.clone(), verdict, seconds: 0.0 }
    };
    let outcome = Outcome { tests: plan.tests.iter().map(skipped).collect(), ..Outcome::of(plan) };
    outcome.tests.iter().for_each(|tested| watcher.tested(tested));
    watcher.machine_ends(&outcome);
    outcome
}

/// Runs the plan of one machine that was made ready.
fn run(lab: &Lab, plan: &Plan, watcher: &mut dyn Watcher) -> Outcome {
    watcher.machine_begins(plan);
    let start = Instant::now();
    let mut outcome = Outcome::of(plan);
    let mut lost: Option<String> = None;
    let mut vm = match lab.boot(plan.machine) {
        Ok(vm) => {
            outcome.release = Some(vm.release().into());
            outcome.boot_s = vm.boot_time().as_secs_f64();
            watcher.machine_is_up(vm.release(), outcome.boot_s);
            Some(vm)
        }
        Err(error) => {
            lost = Some(format!("{error:#}"));
            None
        }
    };
    for name in &plan.tests {
        let begun = Instant::now();
        let (verdict, seconds) = match (&mut vm, &lost) {
            (Some(vm), None) => match vm.test(name) {
                Ok(done) => done,
                Err(error) => {
                    let reason = format!("{error:#}\nlast lines of the console:\n{}", vm.last_words(25));
                    lost = Some(format!("not run: the guest was lost in {name}"));
                    (Verdict::Failed { reason }, begun.elapsed().as_secs_f64())
                }
            },
            (_, Some(reason)) => (Verdict::Failed { reason: reason.clone() }, 0.0),
            (None, None) => unreachable!("a machine is up or it is lost"),
        };
        if vm.is_none() {
            // The full reason is printed once, with the first test.
            lost = Some("not run: the machine did not boot".into());
        }
        let tested = Tested { name: name.clone(), verdict, seconds };
        watcher.tested(&tested);
        outcome.tests.push(tested);
    }
    outcome.cells = vm.map(|vm| vm.cells().to_vec()).unwrap_or_default();
    outcome.total_s = start.elapsed().as_secs_f64();
    watcher.machine_ends(&outcome);
    outcome
}
