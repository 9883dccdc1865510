//! `Peer`: the process at the other end of a Unix socket, as the kernel knows it.
//!
//! The kernel notes user, groups and process when the other end connects (`unix_stream_connect`, `copy_peercred`): what
//! a process says of itself is not asked.

use std::fmt;
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::uapi::socket;
use crate::{Error, Result};

/// The process that connected to a Unix socket, with its user and groups of that moment.
#[derive(Debug)]
pub struct Peer {
    /// Its user.
    pub user: u32,
    /// Its group, and its supplementary groups.
    pub groups: Vec<u32>,
    /// Its number, in the PID namespace of this process; none where it is in another one that is not below this one.
    pub process: Option<u32>,
    /// What tells its end. None before Linux 6.5, and where it had ended already.
    pidfd: Option<OwnedFd>,
}

impl Peer {
    /// Who connected to `socket`, a connected Unix stream socket. Does not block.
    ///
    /// # Errors
    /// What `getsockopt` says: the descriptor is no such socket, or none is free.
    pub fn of(socket: impl AsFd) -> Result<Self> {
        let failed = |errno: Errno| Error::os("ask who connected to a socket", errno);
        let credentials = socket::peer_credentials(&socket).map_err(failed)?;
        let mut groups = vec![credentials.gid];
        groups.extend(socket::peer_groups(&socket).map_err(failed)?);
        let pidfd = match socket::peer_pidfd(&socket) {
            Ok(pidfd) => Some(pidfd),
            Err(errno @ (Errno::MFILE | Errno::NFILE)) => return Err(failed(errno)),
            Err(_) => None,
        };
        let process = u32::try_from(credentials.pid).ok().filter(|process| *process != 0);
        Ok(Self { user: credentials.uid, groups, process, pidfd })
    }

    /// Whether `other` is the same process. Never of processes whose number is not known.
    pub fn is_same_process(&self, other: &Self) -> bool {
        self.process.is_some() && (self.user, self.process) == (other.user, other.process)
    }

    /// The name of its program, as `/proc/PID/comm` has it: at most 15 bytes, and whatever the process says that it is.
    /// None where the process has ended, so that no name is that of another process with the same number.
    pub fn program(&self) -> Option<String> {
        let name = std::fs::read_to_string(format!("/proc/{}/comm", self.process?)).ok()?;
        let has_ended = self.pidfd.as_ref().is_some_and(has_ended);
        (!has_ended).then(|| name.trim_end().chars().filter(|letter| !letter.is_control()).collect())
    }
}

/// Whether the process behind a pidfd has ended.
fn has_ended(pidfd: &OwnedFd) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::new(pidfd, PollFlags::IN)], Some(&now)).is_ok_and(|ready| ready > 0)
}

/// As messages name it: "python3 (process 4711 of user 1000)".
impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.program(), self.process) {
            (Some(program), Some(process)) => {
                write!(f, "{program} (process {process} of user {})", self.user)
            }
            (None, Some(process)) => write!(f, "process {process} of user {}", self.user),
            (_, None) => write!(f, "a process of user {}", self.user),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::{UnixListener, UnixStream};

    #[test]
    fn this_process_is_known_to_itself() {
        let (near, far) = UnixStream::pair().unwrap();
        let (near, far) = (Peer::of(&near).unwrap(), Peer::of(&far).unwrap());
        assert_eq!(near.process, Some(std::process::id()));
        assert!(near.is_same_process(&far));
        assert!(near.to_string().contains(&format!("(process {} of user {}", std::process::id(), near.user)));
    }

    /// Where the kernel has pidfds of peers. A process that ended lends its name to nobody.
    #[test]
    fn a_process_that_ended_has_no_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let script = format!(
            "import socket,time\ns=socket.socket(socket.AF_UNIX)\ns.connect({path:?})\ntime.sleep(60)"
        );
        let Ok(mut child) = std::process::Command::new("python3").args(["-c", &script]).spawn() else {
            use std::io::Write as _;
            let _ = writeln!(std::io::stderr(), "skipped: a_process_that_ended_has_no_name: no python3");
            return;
        };
        let (socket, _) = listener.accept().unwrap();
        let peer = Peer::of(&socket).unwrap();
        assert_eq!(peer.process, Some(child.id()));
        assert!(peer.program().is_some_and(|name| name.starts_with("python")), "{peer}");
        assert!(!peer.is_same_process(&Peer::of(&UnixStream::pair().unwrap().0).unwrap()));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(peer.program(), None);
    }
}
