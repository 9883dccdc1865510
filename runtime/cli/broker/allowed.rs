//! `Allowed`: who may borrow, as `--allow` and the file of `serve` say it.

use std::fmt;
use std::str::FromStr;

use peervram::broker::{Rule, Who};
use peervram_programs::bytes;
use serde::Serialize;

use super::users;
use crate::arguments::parse_bytes;

/// A rule, with the words in which it was given.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Allowed {
    /// `user:alice`, `group:render`, `everybody`.
    pub who: String,
    /// The number of the user or group.
    pub number: Option<u32>,
    pub bytes: Option<u64>,
    pub leases: Option<usize>,
    /// Without any, every memory.
    pub memories: Vec<String>,
    pub network_card: bool,
    pub operator: bool,
}

impl Allowed {
    /// Everything of every memory, to `user:NAME`, `group:NAME` or `everybody`.
    ///
    /// # Errors
    /// Why there is nobody of that name.
    pub fn everything(who: &str) -> Result<Self, String> {
        let number = match who.split_once(':') {
            Some(("user", name)) => {
                Some(users::user_number(name).ok_or_else(|| format!("there is no user {name:?}"))?)
            }
            Some(("group", name)) => {
                Some(users::group_number(name).ok_or_else(|| format!("there is no group {name:?}"))?)
            }
            None if who == "everybody" => None,
            _ => return Err(format!("{who:?} is nobody: write user:NAME, group:NAME or everybody")),
        };
        Ok(Self {
            who: who.to_owned(),
            number,
            bytes: None,
            leases: None,
            memories: Vec::new(),
            network_card: false,
            operator: false,
        })
    }

    /// The rule for the broker.
    pub fn rule(&self) -> Rule {
        let who = match self.number {
            None => Who::Everybody,
            Some(number) if self.who.starts_with("group:") => Who::Group(number),
            Some(number) => Who::User(number),
        };
        let mut rule = Rule::allow(who);
        if !self.memories.is_empty() {
            let names: Vec<&str> = self.memories.iter().map(String::as_str).collect();
            rule = rule.of(&names);
        }
        if let Some(bytes) = self.bytes {
            rule = rule.up_to_bytes(bytes);
        }
        if let Some(leases) = self.leases {
            rule = rule.up_to_leases(leases);
        }
        if self.network_card {
            rule = rule.or_network_card();
        }
        if self.operator { rule.and_operate() } else { rule }
    }
}

/// `user:alice,bytes=1G,leases=4,memory=vram,network-card,operator`.
impl FromStr for Allowed {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split(',');
        let mut allowed = Self::everything(parts.next().unwrap_or_default())?;
        for part in parts {
            match part.split_once('=') {
                Some(("bytes", value)) => allowed.bytes = Some(parse_bytes(value)?),
                Some(("leases", value)) => {
                    let wrong = |_| format!("{value:?} is no number of leases");
                    allowed.leases = Some(value.parse().map_err(wrong)?);
                }
                Some(("memory", value)) => allowed.memories.push(value.to_owned()),
                None if part == "network-card" => allowed.network_card = true,
                None if part == "operator" => allowed.operator = true,
                _ => {
                    let known = "bytes=SIZE, leases=N, memory=NAME, network-card, operator";
                    return Err(format!("{part:?} is nothing that can be allowed: there are {known}"));
                }
            }
        }
        Ok(allowed)
    }
}

/// "user:alice (1000): at most 1 GiB, at most 4 leases, of vram; also for network cards; may operate".
impl fmt::Display for Allowed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.who)?;
        if let Some(number) = self.number.filter(|number| !self.who.ends_with(&format!(":{number}"))) {
            write!(f, " ({number})")?;
        }
        let mut limits = Vec::new();
        limits.extend(self.bytes.map(|bytes| format!("at most {}", bytes::in_words(bytes))));
        limits.extend(self.leases.map(|leases| format!("at most {leases} leases")));
        if !self.memories.is_empty() {
            limits.push(format!("of {}", self.memories.join(" and ")));
        }
        if limits.is_empty() {
            limits.push("all of it".into());
        }
        if self.network_card {
            limits.push("also for network cards".into());
        }
        if self.operator {
            limits.push("and may operate".into());
        }
        write!(f, ": {}", limits.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_allowed_is_read_and_said() {
        let all: Allowed =
            "user:4711,bytes=1G,leases=4,memory=vram,memory=host,network-card,operator".parse().unwrap();
        assert_eq!((all.number, all.bytes, all.leases), (Some(4711), Some(1 << 30), Some(4)));
        assert_eq!(
            all.to_string(),
            "user:4711: at most 1 GiB, at most 4 leases, of vram and host, also for network cards, and may operate"
        );
        let rule = Rule::allow(Who::User(4711)).of(&["vram", "host"]).up_to_bytes(1 << 30).up_to_leases(4);
        assert_eq!(all.rule(), rule.or_network_card().and_operate());
        let root: Allowed = "user:root".parse().unwrap();
        assert_eq!(
            (root.rule(), root.to_string()),
            (Rule::allow(Who::User(0)), "user:root (0): all of it".into())
        );
        assert_eq!("group:27".parse::<Allowed>().unwrap().rule(), Rule::allow(Who::Group(27)));
        assert_eq!("everybody".parse::<Allowed>().unwrap().rule(), Rule::allow(Who::Everybody));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, named) in [
            ("", "nobody"),
            ("alice", "user:NAME"),
            ("user:no-such-user", "no-such-user"),
            ("group:no-such-group", "no-such-group"),
            ("everybody,bytes=1.5G", "1.5G"),
            ("everybody,leases=few", "few"),
            ("everybody,operators", "operators"),
            ("everybody,direction=read", "direction=read"),
        ] {
            let error = text.parse::<Allowed>().unwrap_err();
            assert!(error.contains(named), "{text}: {error}");
        }
    }
}
