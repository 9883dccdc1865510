//! `OtherUser`: whom the demo's client runs as.

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use crate::broker::users;

/// "nobody", by its number on every Linux.
const NOBODY: u32 = 65534;

/// A user who is not this process's; or this process's own, where it can be no other.
#[derive(Debug, PartialEq, Eq)]
pub struct OtherUser {
    pub number: u32,
    /// Why it is this process's own.
    pub is_own_because: Option<String>,
}

impl OtherUser {
    /// Nobody, where this process may be somebody else.
    pub fn find() -> Self {
        let map = |file: &str| fs::read_to_string(file).unwrap_or_default();
        let own = rustix::process::geteuid().as_raw();
        Self::of(own, &map("/proc/self/uid_map"), &map("/proc/self/gid_map"))
    }

    fn of(own: u32, user_map: &str, group_map: &str) -> Self {
        let is_own = |why: &str| Self { number: own, is_own_because: Some(why.to_owned()) };
        if own != 0 {
            return is_own("only root may start a process of another user: run the demo as root");
        }
        if !has(user_map, NOBODY) || !has(group_map, NOBODY) {
            return is_own("this user namespace has no other user: run the demo outside of the container");
        }
        Self { number: NOBODY, is_own_because: None }
    }

    pub fn in_words(&self) -> String {
        users::user_in_words(self.number)
    }

    /// Has `command` run as that user, in that user's group and no other.
    pub fn run(&self, command: &mut Command) {
        if self.is_own_because.is_none() {
            command.uid(self.number).gid(self.number);
        }
    }
}

/// Whether a user namespace has that number: `/proc/self/uid_map` is lines of the first number inside, the first outside,
/// and how many.
fn has(map: &str, number: u32) -> bool {
    map.lines().any(|line| {
        let numbers: Vec<u32> = line.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        matches!(numbers[..], [inside, _, count] if number.checked_sub(inside).is_some_and(|at| at < count))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: &str = "         0          0 4294967295\n";

    #[test]
    fn root_runs_its_client_as_nobody_and_others_say_why_they_cannot() {
        assert_eq!(OtherUser::of(0, ALL, ALL), OtherUser { number: NOBODY, is_own_because: None });
        let other = OtherUser::of(1000, ALL, ALL);
        assert_eq!(other.number, 1000);
        assert!(other.is_own_because.unwrap().contains("as root"));
    }

    #[test]
    fn a_namespace_of_one_user_has_no_other() {
        let one = "         0       1000          1\n";
        let container = "0 1000 1\n1 100000 65536\n";
        assert!(OtherUser::of(0, one, ALL).is_own_because.unwrap().contains("namespace"));
        assert!(OtherUser::of(0, ALL, one).is_own_because.is_some());
        assert_eq!(OtherUser::of(0, container, container).is_own_because, None);
        assert!(!has("1 100000 65533", NOBODY) && has("1 100000 65534", NOBODY));
        assert!(!has("", NOBODY) && !has("a line", NOBODY));
    }
}
