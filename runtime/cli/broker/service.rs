//! What a service manager gives a service and is told by it, as systemd has it: a socket that listens already
//! (sd_listen_fds(3)), and messages that it is ready, ends, and is alive (sd_notify(3)).

use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use peervram::{Error, Kind, Result};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};

/// The first descriptor that a service manager passes on.
const FIRST_DESCRIPTOR: i32 = 3;

/// The socket that the service manager has made for this process, if it has: a copy of its descriptor.
///
/// # Errors
/// [`Kind::InvalidInput`]: there are several, or none where one is promised.
pub fn inherited_socket() -> Result<Option<OwnedFd>> {
    const TRIED: &str = "take a service manager's socket";
    let variable = |name| std::env::var(name).ok();
    if variable("LISTEN_PID") != Some(getpid().to_string()) {
        return Ok(None);
    }
    let count = variable("LISTEN_FDS").unwrap_or_default();
    if count != "1" {
        let error = Error::new(Kind::InvalidInput, TRIED, format!("LISTEN_FDS is {count:?}"));
        return Err(error.next("give the socket unit one ListenStream"));
    }
    let own = pidfd_open(getpid(), PidfdFlags::empty());
    let copy = own.and_then(|own| pidfd_getfd(own, FIRST_DESCRIPTOR, PidfdGetfdFlags::empty()));
    copy.map(Some).map_err(|errno| Error::os(TRIED, errno).next("allow the system call pidfd_getfd"))
}

/// The service manager, to be told how it goes. Without one, nobody is told.
pub struct ServiceManager(Option<UnixDatagram>);

impl ServiceManager {
    /// The one that NOTIFY_SOCKET names.
    ///
    /// # Errors
    /// It cannot be connected to.
    pub fn of_environment() -> Result<Self> {
        let Some(name) = std::env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty()) else {
            return Ok(Self(None));
        };
        let connect = || {
            let address = match name.as_bytes() {
                [b'@', abstract_name @ ..] => SocketAddr::from_abstract_name(abstract_name)?,
                _ => SocketAddr::from_pathname(&name)?,
            };
            let socket = UnixDatagram::unbound()?;
            socket.connect_addr(&address)?;
            Ok(socket)
        };
        connect().map(|socket| Self(Some(socket))).map_err(|error: std::io::Error| {
            Error::os("tell the service manager how it goes", error).on(name.to_string_lossy())
        })
    }

    /// Tells it `state`: `READY=1`.
    pub fn tell(&self, state: &str) {
        if let Some(socket) = &self.0
            && let Err(error) = socket.send(state.as_bytes())
        {
            tracing::warn!(%error, state, "the service manager was not told");
        }
    }
}

/// How often the service manager wants to hear that this process is alive: twice in the time after which it ends it.
pub fn watchdog_interval() -> Option<Duration> {
    let variable = |name| std::env::var(name).ok();
    let is_ours = variable("WATCHDOG_PID").is_none_or(|pid| pid == getpid().to_string());
    let limit_us: u64 =
        variable("WATCHDOG_USEC").filter(|_| is_ours)?.parse().ok().filter(|limit| *limit > 0)?;
    Some(Duration::from_micros(limit_us) / 2)
}
