//! Clients, their broker and both are killed at random points, with copies in flight: nobody else's bytes change, no byte
//! is lost from the books, and the device goes on.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use peervram::backends::vulkan;
use peervram::broker::client;
use peervram_lab::machine::Facts;

use super::scene::{memory, new_socket, wait_until};
use crate::blocks;
use crate::borrower::{Borrower, With};
use crate::broker_process::BrokerProcess;
use crate::guest::Guest;
use crate::test::{Test, Verdict};

pub const TESTS: &[Test] = &[
    Test::of_models("broker/kill-9-at-random-points", ten_times)
        .on(Facts::has_peers_by_iommufd)
        .on_any_topology(),
    many("broker/kill-9-of-a-client-200-times", |guest| rounds(guest, 200, 1, &[Victim::Client])),
    many("broker/kill-9-of-the-broker-200-times", |guest| rounds(guest, 200, 2, &[Victim::Broker])),
    many("broker/kill-9-of-both-200-times", |guest| rounds(guest, 200, 3, &[Victim::Both])),
];

const fn many(name: &'static str, function: fn(&Guest) -> Verdict) -> Test {
    Test::of_models(name, function).on(Facts::has_peers_by_iommufd).on_any_topology().only_when_named()
}

/// What the client has that is not killed.
const KEPT_BYTES: u64 = 1 << 20;
/// By then, whoever is killed has begun with whatever it does.
const LATEST: Duration = Duration::from_millis(80);

#[derive(Clone, Copy, Debug)]
enum Victim {
    Client,
    Broker,
    Both,
}

fn ten_times(guest: &Guest) -> Verdict {
    rounds(guest, 9, 4, &[Victim::Client, Victim::Broker, Victim::Both])
}

/// Random numbers that are the same each time: xorshift.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

fn rounds(guest: &Guest, count: u32, seed: u64, victims: &[Victim]) -> Verdict {
    let mut dice = Dice(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15));
    let socket = new_socket()?;
    let row = format!("{victims:?}");
    let begun = Instant::now();
    let mut kept = None;
    for (round, victim) in (0..count).zip(victims.iter().cycle()) {
        let scene = kept.take().map_or_else(|| Kept::start(guest, &socket), Ok)?;
        let wait = Duration::from_micros(dice.below(LATEST.as_micros() as u64));
        kept = scene
            .survive(round + 1, *victim, wait, dice.below(2) == 0)
            .with_context(|| format!("round {round}, {victim:?} killed after {} us", wait.as_micros()))?;
        guest.cell("kill -9", &row, "rounds", &(round + 1).to_string())?;
    }
    let each_ms = begun.elapsed().as_millis() / u128::from(count);
    guest.cell("kill -9", &row, "ms each", &each_ms.to_string())
}

/// A broker, and a client with memory that nobody else is to write to.
struct Kept<'guest> {
    guest: &'guest Guest,
    socket: &'guest Path,
    client: Borrower<'guest>,
    /// Where its memory is in VRAM.
    at: u64,
    operator: client::Broker,
    broker: BrokerProcess,
}

impl<'guest> Kept<'guest> {
    fn start(guest: &'guest Guest, socket: &'guest Path) -> Result<Self> {
        let broker = BrokerProcess::start(guest.model(0)?.address(), socket)?;
        let operator = client::Broker::connect(socket)?;
        let mut client = Borrower::start(guest, socket, &With::Nothing)?;
        client.ask(&format!("borrow {KEPT_BYTES}"))?;
        let at = operator.status()?.leases[0].ranges[0].offset;
        Ok(Self { guest, socket, client, at, operator, broker })
    }

    /// One round. Gives itself back where the broker lives on.
    fn survive(
        mut self,
        round: u32,
        victim: Victim,
        wait: Duration,
        broker_first: bool,
    ) -> Result<Option<Self>> {
        self.broker.fill(round, self.at, KEPT_BYTES)?;
        let engine = With::Engine(self.guest.model(1)?.address());
        let mut worker = Borrower::start(self.guest, self.socket, &engine)?;
        worker.ask(&format!("churn {round}"))?;
        thread::sleep(wait);
        match victim {
            Victim::Client => {
                end(worker)?;
                self.check_kept(round)?;
                wait_until(&self.operator, "only what is kept is lent", |status| {
                    status.quarantine.is_empty()
                        && status.leases.len() == 1
                        && memory(status).is_ok_and(|memory| memory.unscrubbed == 0)
                })?;
                self.check_kept(round)?;
                return Ok(Some(self));
            }
            Victim::Broker => {
                self.broker.kill()?;
                let said = worker.hear()?;
                ensure!(said == "the broker is gone", "a client that goes on says {said:?}");
            }
            Victim::Both if broker_first => {
                self.broker.kill()?;
                end(worker)?;
            }
            Victim::Both => {
                end(worker)?;
                self.broker.kill()?;
            }
        }
        let heard = self.client.ask("hear-until gone")?;
        ensure!(heard == "draining(exporter-gone) gone", "the client that nobody killed heard {heard:?}");
        Ok(None)
    }

    /// As the host has it.
    fn check_kept(&self, round: u32) -> Result<()> {
        let seen = self.guest.model(0)?.host_checksum(self.at, KEPT_BYTES)?;
        ensure!(
            seen == vulkan::checksum(&blocks::bytes(round, 0, KEPT_BYTES)),
            "bytes of somebody else changed"
        );
        Ok(())
    }
}

/// Kills a client that has nothing to complain of.
fn end(worker: Borrower) -> Result<()> {
    let (_, said) = worker.kill()?;
    match said.iter().find(|line| !line.ends_with("the broker is gone")) {
        Some(complaint) => bail!("before it was killed it said {complaint:?}"),
        None => Ok(()),
    }
}
