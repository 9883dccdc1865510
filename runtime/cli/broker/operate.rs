//! `peervram operate`: what operators of a broker do to what it lends.

use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand};
use peervram::RevokeOptions;
use peervram_programs::say;
use serde_json::json;

use super::SocketArgument;
use crate::ending::print_json;

/// Take lent memory back: from one client, or from all.
///
/// For operators: root, the user of the broker, and whom it allows (`operator`). `peervram status` shows the leases
/// and memories, by number and name.
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    peervram operate evict 7              end lease 7 without its client\n  \
    peervram operate release 7            its memory is out of quarantine: you know that nobody has it any more\n  \
    peervram operate reset vram           reset the device, after all clients have stopped\n  \
    peervram operate revoke vram --go-on  take it from all clients, the late ones too\n\n\
Exit codes: 0 done; 1 not: the error says who was late; 2 wrong usage.")]
pub struct Arguments {
    #[command(flatten)]
    socket: SocketArgument,

    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// End a lease without its client. Its memory is in quarantine until the kernel has freed the dma-buf.
    Evict {
        /// The number of the lease.
        lease: u64,
    },
    /// Lend the memory of a lease that ended again, although nothing proves that nobody has it.
    ///
    /// Where the kernel's list of dma-bufs can be read, the broker does this by itself as soon as it is right.
    Release {
        /// The number of the lease that ended.
        lease: u64,
    },
    /// Take a memory from all clients, and give it back at once. The device is not reset.
    Revoke(OfMemory),
    /// Reset a memory's device. All of its memory is taken back, of every name.
    Reset(OfMemory),
}

#[derive(Args)]
struct OfMemory {
    /// The name of the memory.
    memory: String,

    /// How long clients have to stop.
    #[arg(long, value_name = "N", default_value_t = 1000)]
    timeout_ms: u64,

    /// Go on at the timeout, whoever is late, instead of calling it off. Who said that the kernel would wait for it is
    /// waited for all the same: evict it.
    #[arg(long)]
    go_on: bool,
}

impl OfMemory {
    fn options(&self) -> RevokeOptions {
        let options = RevokeOptions::within(Duration::from_millis(self.timeout_ms));
        if self.go_on { options.or_go_on() } else { options }
    }
}

pub fn run(arguments: &Arguments, json: bool) -> anyhow::Result<ExitCode> {
    let broker = arguments.socket.connect()?;
    let (done, words) = match &arguments.what {
        What::Evict { lease } => {
            broker.evict(*lease)?;
            (json!({ "done": "evict", "lease": lease }), format!("lease {lease} has ended"))
        }
        What::Release { lease } => {
            broker.release(*lease)?;
            let words = format!("the memory of lease {lease} is out of quarantine");
            (json!({ "done": "release", "lease": lease }), words)
        }
        What::Revoke(of) => {
            let generation = broker.revoke(&of.memory, of.options())?;
            let words = format!("{} was taken back, and is of generation {generation} now", of.memory);
            (json!({ "done": "revoke", "memory": of.memory, "generation": generation }), words)
        }
        What::Reset(of) => {
            let generation = broker.reset(&of.memory, of.options())?;
            let words = format!("{} was reset, and is of generation {generation} now", of.memory);
            (json!({ "done": "reset", "memory": of.memory, "generation": generation }), words)
        }
    };
    if json {
        print_json(&done)?;
    } else {
        say!("{words}");
    }
    Ok(ExitCode::SUCCESS)
}
