//! `OtherUser`: whom the demo's client runs as.
//!
//! Root is whom it wants. Anybody else may have numbers of users in /etc/subuid, and a user namespace whose root is the
//! first of these: for everybody outside of it, the broker too, that is another user, who may do nothing here.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};

use rustix::io::{FdFlags, fcntl_setfd};

use crate::broker::users;

/// "nobody", by its number on every Linux.
const NOBODY: u32 = 65534;
/// This program, for whoever may not reach the folder that it is in.
pub const THIS_PROGRAM: &str = "/proc/self/exe";
/// How a program is started as root of a user namespace.
const UNSHARE: [&str; 8] = ["unshare", "--user", "--map-auto", "--setuid", "0", "--setgid", "0", "--"];

/// A user who is not this process's; or this process's own, where it can be no other.
#[derive(Debug, PartialEq, Eq)]
pub struct OtherUser {
    pub number: u32,
    how: How,
}

#[derive(Debug, PartialEq, Eq)]
enum How {
    /// By setuid(2), as root.
    Root,
    /// By a user namespace.
    Namespace,
    /// It is this process's own, because.
    Own(String),
}

impl OtherUser {
    /// Nobody, where this process may be somebody else.
    pub fn find() -> Self {
        let map = |file: &str| fs::read_to_string(file).unwrap_or_default();
        match rustix::process::geteuid().as_raw() {
            0 => Self::for_root(&map("/proc/self/uid_map"), &map("/proc/self/gid_map")),
            own => Self::in_a_namespace(own, user_in_namespace()),
        }
    }

    fn for_root(user_map: &str, group_map: &str) -> Self {
        if has(user_map, NOBODY) && has(group_map, NOBODY) {
            return Self { number: NOBODY, how: How::Root };
        }
        let why = "this user namespace has no other user: run the demo outside of the container";
        Self { number: 0, how: How::Own(why.into()) }
    }

    fn in_a_namespace(own: u32, user: Result<u32, String>) -> Self {
        match user {
            Ok(number) => Self { number, how: How::Namespace },
            Err(why) => {
                let why = format!(
                    "only root may start a process of another user, and a user namespace with another is not to be had \
                     ({why}): run the demo as root, or have newuidmap (package uidmap) and numbers in /etc/subuid"
                );
                Self { number: own, how: How::Own(why) }
            }
        }
    }

    /// Why it is this process's own user, if it is.
    pub fn is_own_because(&self) -> Option<&str> {
        match &self.how {
            How::Own(why) => Some(why),
            How::Root | How::Namespace => None,
        }
    }

    pub fn in_words(&self) -> String {
        users::user_in_words(self.number)
    }

    /// This program, to be started as that user, in that user's group and no other. With a descriptor that is to be kept
    /// until it is started.
    ///
    /// # Errors
    /// This program's file cannot be opened.
    pub fn this_program(&self) -> io::Result<(Command, Option<OwnedFd>)> {
        let mut command = Command::new(THIS_PROGRAM);
        match self.how {
            How::Root => {
                command.uid(self.number).gid(self.number);
            }
            How::Own(_) => {}
            How::Namespace => {
                // `unshare` starts it, whose own program /proc/self/exe is.
                let file = OwnedFd::from(File::open(THIS_PROGRAM)?);
                fcntl_setfd(&file, FdFlags::empty())?;
                let path = format!("/proc/self/fd/{}", file.as_raw_fd());
                command = unshare();
                command.arg(path);
                return Ok((command, Some(file)));
            }
        }
        Ok((command, None))
    }
}

fn unshare() -> Command {
    let mut command = Command::new(UNSHARE[0]);
    command.args(&UNSHARE[1..]);
    command
}

/// Tries a user namespace: who its root is outside of it.
fn user_in_namespace() -> Result<u32, String> {
    let mut command = unshare();
    command.args(["cat", "/proc/self/uid_map"]).stdin(Stdio::null());
    let output = command.output().map_err(|error| format!("{}: {error}", UNSHARE[0]))?;
    let said = String::from_utf8_lossy(&output.stderr).trim().replace('\n', ", ");
    match output.status.success() {
        true => {
            root_outside(&String::from_utf8_lossy(&output.stdout)).ok_or("its root is nobody outside".into())
        }
        false if said.is_empty() => Err(format!("{}: {}", UNSHARE[0], output.status)),
        false => Err(said),
    }
}

/// Lines of a namespace's map, `/proc/self/uid_map`: the first number inside, the first outside, and how many.
fn lines_of(map: &str) -> impl Iterator<Item = [u32; 3]> {
    map.lines().filter_map(|line| {
        let numbers: Vec<u32> = line.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        numbers.try_into().ok()
    })
}

fn root_outside(map: &str) -> Option<u32> {
    lines_of(map).find_map(|[inside, outside, _]| (inside == 0 && outside != 0).then_some(outside))
}

/// Whether a user namespace has that number.
fn has(map: &str, number: u32) -> bool {
    lines_of(map).any(|[inside, _, count]| number.checked_sub(inside).is_some_and(|at| at < count))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: &str = "         0          0 4294967295\n";

    #[test]
    fn root_runs_its_client_as_nobody_and_others_say_why_they_cannot() {
        assert_eq!(OtherUser::for_root(ALL, ALL), OtherUser { number: NOBODY, how: How::Root });
        let other = OtherUser::in_a_namespace(1000, Err("no newuidmap".into()));
        assert_eq!(other.number, 1000);
        let why = other.is_own_because().unwrap();
        assert!(why.contains("(no newuidmap): run the demo as root"), "{why}");
    }

    #[test]
    fn a_namespace_of_one_user_has_no_other() {
        let one = "         0       1000          1\n";
        let container = "0 1000 1\n1 100000 65536\n";
        assert!(OtherUser::for_root(one, ALL).is_own_because().unwrap().contains("namespace"));
        assert!(OtherUser::for_root(ALL, one).is_own_because().is_some());
        assert_eq!(OtherUser::for_root(container, container).is_own_because(), None);
        assert!(!has("1 100000 65533", NOBODY) && has("1 100000 65534", NOBODY));
        assert!(!has("", NOBODY) && !has("a line", NOBODY));
    }

    #[test]
    fn the_root_of_a_namespace_is_somebody_outside() {
        assert_eq!(root_outside("         0     200000      65536\n"), Some(200_000));
        assert_eq!((root_outside(ALL), root_outside(""), root_outside("1 100000 65536")), (None, None, None));
        let other = OtherUser::in_a_namespace(1000, Ok(200_000));
        assert_eq!((other.number, other.is_own_because()), (200_000, None));
        let (command, kept) = other.this_program().unwrap();
        let path = format!("/proc/self/fd/{}", kept.unwrap().as_raw_fd());
        assert_eq!(command.get_program(), "unshare");
        assert_eq!(command.get_args().last().unwrap(), path.as_str());
    }
}
