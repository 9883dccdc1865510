//! Names of users and groups, as this machine has them.

use std::ffi::OsStr;

/// The number of a user: of that name, or the number itself.
pub fn user_number(name: &str) -> Option<u32> {
    name.parse().ok().or_else(|| Some(uzers::get_user_by_name(OsStr::new(name))?.uid()))
}

/// The number of a group: of that name, or the number itself.
pub fn group_number(name: &str) -> Option<u32> {
    name.parse().ok().or_else(|| Some(uzers::get_group_by_name(OsStr::new(name))?.gid()))
}

/// A user as messages name one: "alice", or "user 1000" where the machine has no name.
pub fn user_in_words(number: u32) -> String {
    match uzers::get_user_by_uid(number) {
        Some(user) => user.name().to_string_lossy().into_owned(),
        None => format!("user {number}"),
    }
}
