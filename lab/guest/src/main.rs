//! The program of the lab's guests: agent and tests in one.
//!
//! - `agent PORT` in the guest: does what the host orders over the serial port; runs each test as
//!   a child of its own, so that a test that is killed takes nothing with it.
//! - `test NAME`: such a child.
//! - `lend FUNCTION BYTES RANGES`: the child of a test that lends, because it may get stuck.
//! - `revoke FUNCTION NODE`: the child of a test that is killed in the middle of taking memory back.
//! - `serve FUNCTION SOCKET`: the child of a test that is a broker and is killed.
//! - `borrow SOCKET IMPORTER OF`: the child of a test, of another user, that borrows.
//! - `list` on the host: machines' facts in, the names of the tests for each out.
//!
//! Tests live in [`tests`], one file for each part of the project.

mod acs;
mod agent;
mod application;
mod blocks;
mod borrower;
mod broker_process;
mod card;
mod crossing;
mod driver;
mod guest;
mod holder;
mod kernel_log;
mod lender_process;
mod model;
mod network_card;
mod painted;
mod program;
mod revocable;
mod slot;
mod stage;
mod storage;
mod sw_sync;
mod test;
mod tests;
mod tree;
mod validation_log;
mod witness;

use anyhow::{Context, Result, bail};
use peervram_lab::machine::Facts;
use peervram_lab::wire;
use std::collections::BTreeMap;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["agent", port] => agent::run(port),
        ["test", name] => test::run_child(name),
        ["lend", function, size_bytes, ranges] => lender_process::lend(function, size_bytes, ranges),
        ["revoke", function, node] => lender_process::revoke(function, node),
        ["serve", function, socket] => broker_process::serve(function, socket),
        ["borrow", socket, importer, of] => borrower::run(socket, importer, of),
        ["list"] => list(),
        _ => bail!(
            "usage: agent PORT | test NAME | lend FUNCTION BYTES RANGES | revoke FUNCTION NODE | serve FUNCTION SOCKET \
             | borrow SOCKET IMPORTER OF | list"
        ),
    }
}

/// Which tests are for which machine.
fn list() -> Result<()> {
    let machines: Vec<Facts> =
        serde_json::from_reader(std::io::stdin()).context("reading the machines' facts")?;
    let lists: BTreeMap<&str, Vec<wire::Listed>> = machines
        .iter()
        .map(|facts| {
            let tests = tests::all().filter(|test| test.is_for(facts)).map(test::Test::listed);
            (facts.machine.as_str(), tests.collect())
        })
        .collect();
    peervram_programs::say!("{}", serde_json::to_string(&lists)?);
    Ok(())
}
