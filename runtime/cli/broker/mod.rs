//! Lending to other processes: the commands around `peervram::broker`.
//!
//! `serve` lends, by a [`plan`] that the command line or a TOML file makes; [`service`] is what a service manager
//! wants of it. `borrow`, `status` and `operate` are clients.

mod allowed;
pub mod borrow;
mod ending_signals;
pub mod operate;
mod plan;
mod prometheus;
pub mod serve;
mod service;
pub mod status;
pub mod users;

use std::path::{Path, PathBuf};

use clap::Args;
use peervram::broker::client;
use peervram::{Error, Kind, Result};

/// Where the broker of the machine listens.
const OF_MACHINE: &str = "/run/peervram/broker";

/// Which broker.
#[derive(Args)]
pub struct SocketArgument {
    /// The broker's socket. Without it, $XDG_RUNTIME_DIR/peervram/broker where that is there, else
    /// /run/peervram/broker; root always takes the latter.
    #[arg(long, value_name = "PATH", global = true)]
    socket: Option<PathBuf>,
}

impl SocketArgument {
    /// The socket that a client connects to.
    fn path(&self) -> PathBuf {
        self.socket.clone().unwrap_or_else(usual_socket)
    }

    /// Connects to the broker.
    fn connect(&self) -> Result<client::Broker> {
        client::Broker::connect(&self.path())
    }
}

/// Where clients look for a broker that nobody named: this user's own, else the machine's.
pub fn usual_socket() -> PathBuf {
    of_user().filter(|path| path.exists()).unwrap_or_else(|| OF_MACHINE.into())
}

/// Where a broker of this user listens that was told nothing else.
///
/// # Errors
/// [`Kind::InvalidInput`]: this user has no folder for such a socket.
fn own_socket() -> Result<PathBuf> {
    if is_root() {
        return Ok(OF_MACHINE.into());
    }
    of_user().ok_or_else(|| {
        Error::new(Kind::InvalidInput, "listen for clients", "XDG_RUNTIME_DIR is not set")
            .next("name a socket with --socket PATH")
    })
}

fn of_user() -> Option<PathBuf> {
    if is_root() {
        return None;
    }
    let folder = std::env::var_os("XDG_RUNTIME_DIR").filter(|folder| !folder.is_empty())?;
    Some(Path::new(&folder).join("peervram/broker"))
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}
