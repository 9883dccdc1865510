//! `Policy`: who may borrow what. Pure: asked with what the kernel knows of a client.
//!
//! Root and the user of the broker may do everything. Everybody else may do nothing that no [`Rule`] allows.

use peervram_backends::{Error, Kind, Peer};

use crate::{Direction, Result};

/// Whom a rule is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Who {
    /// The user of that number.
    User(u32),
    /// Whoever is in the group of that number.
    Group(u32),
    /// Every user of the machine.
    Everybody,
}

/// What somebody may do. A rule by itself allows to borrow every memory, in both directions, as much as is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    pub(crate) who: Who,
    pub(crate) memories: Option<Vec<String>>,
    pub(crate) max_bytes: Option<u64>,
    pub(crate) max_leases: Option<usize>,
    pub(crate) direction: Direction,
    pub(crate) network_card: bool,
    pub(crate) operator: bool,
}

impl Rule {
    /// Allows `who` to borrow.
    pub fn allow(who: Who) -> Self {
        Self {
            who,
            memories: None,
            max_bytes: None,
            max_leases: None,
            direction: Direction::Both,
            network_card: false,
            operator: false,
        }
    }

    /// Of these memories only, by name.
    #[must_use]
    pub fn of(mut self, memories: &[&str]) -> Self {
        self.memories = Some(memories.iter().map(|name| (*name).to_owned()).collect());
        self
    }

    /// At most that many bytes at a time, over all leases of one user.
    #[must_use]
    pub fn up_to_bytes(mut self, max_bytes: u64) -> Self {
        self.max_bytes = Some(max_bytes);
        self
    }

    /// At most that many leases at a time, of one user.
    #[must_use]
    pub fn up_to_leases(mut self, max_leases: usize) -> Self {
        self.max_leases = Some(max_leases);
        self
    }

    /// In that direction only. The kernel cannot keep anybody who has a VFIO dma-buf from writing, so that who may only
    /// read is lent no device's memory: that is refused, not promised.
    #[must_use]
    pub fn only_to(mut self, direction: Direction) -> Self {
        self.direction = direction;
        self
    }

    /// Also for network cards, from which other machines may reach the memory. The kernel does not know what a client
    /// does with a dma-buf: this keeps the honest from it.
    #[must_use]
    pub fn or_network_card(mut self) -> Self {
        self.network_card = true;
        self
    }

    /// Also to see who has what, to revoke, reset and evict.
    #[must_use]
    pub fn and_operate(mut self) -> Self {
        self.operator = true;
        self
    }

    fn is_for(&self, peer: &Peer) -> bool {
        match self.who {
            Who::User(user) => peer.user == user,
            Who::Group(group) => peer.groups.contains(&group),
            Who::Everybody => true,
        }
    }
}

/// What somebody asks for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wish<'a> {
    pub memory: &'a str,
    pub size_bytes: u64,
    pub direction: Direction,
    pub network_card: bool,
    /// What the user has already.
    pub has_bytes: u64,
    pub has_leases: usize,
}

/// Who may borrow what.
#[derive(Debug, Clone)]
pub struct Policy {
    owner: u32,
    rules: Vec<Rule>,
}

impl Policy {
    /// Nobody may borrow but root and the user of this process.
    pub fn owner_only() -> Self {
        Self { owner: rustix::process::geteuid().as_raw(), rules: Vec::new() }
    }

    /// And whom `rule` is for.
    #[must_use]
    pub fn and(mut self, rule: Rule) -> Self {
        self.rules.push(rule);
        self
    }

    fn is_owner(&self, peer: &Peer) -> bool {
        peer.user == 0 || peer.user == self.owner
    }

    /// Whether `peer` may see and do what operators do.
    pub(crate) fn is_operator(&self, peer: &Peer) -> bool {
        self.is_owner(peer) || self.rules.iter().any(|rule| rule.operator && rule.is_for(peer))
    }

    /// Whether `peer` may know of a memory.
    pub(crate) fn may_see(&self, peer: &Peer, memory: &str) -> bool {
        self.is_owner(peer) || self.rules.iter().any(|rule| rule.is_for(peer) && is_of(rule, memory))
    }

    /// Allows a wish, or says what stands in its way.
    ///
    /// # Errors
    /// [`Kind::PermissionDenied`]; [`Kind::Exhausted`] where the wish is within the rules and over a limit.
    pub(crate) fn check(&self, peer: &Peer, wish: Wish<'_>) -> Result<()> {
        if self.is_owner(peer) {
            return Ok(());
        }
        let mut reason = None;
        for rule in self.rules.iter().filter(|rule| rule.is_for(peer) && is_of(rule, wish.memory)) {
            match forbidden(rule, wish) {
                None => return Ok(()),
                // Of several rules the one that allows most says why.
                Some(error) if error.kind() == Kind::Exhausted => reason = Some(error),
                Some(error) => reason = reason.or(Some(error)),
            }
        }
        Err(reason.unwrap_or_else(|| {
            denied(format!("user {} may not borrow of {}", peer.user, wish.memory))
                .next("ask whoever runs the broker for `--allow user:NAME`")
        }))
    }
}

fn is_of(rule: &Rule, memory: &str) -> bool {
    rule.memories.as_ref().is_none_or(|memories| memories.iter().any(|name| name == memory))
}

/// What of `wish` a rule does not allow.
fn forbidden(rule: &Rule, wish: Wish<'_>) -> Option<Error> {
    if !rule.direction.includes(wish.direction) {
        let (only, asked) = (rule.direction, wish.direction);
        let next = format!("borrow with the direction {only}");
        return Some(denied(format!("allowed to {only} only, not to {asked}")).next(next));
    }
    if wish.network_card && !rule.network_card {
        let next = "ask whoever runs the broker for `network-card` in the rule";
        return Some(denied("not allowed for network cards".into()).next(next));
    }
    if let Some(max) = rule.max_bytes.filter(|max| wish.has_bytes.saturating_add(wish.size_bytes) > *max) {
        let (has, wants) = (wish.has_bytes, wish.size_bytes);
        return Some(over(format!(
            "{has} bytes are lent to this user, and {wants} more are over the limit of {max}"
        )));
    }
    if let Some(max) = rule.max_leases.filter(|max| wish.has_leases >= *max) {
        return Some(over(format!("this user has {} leases, of at most {max}", wish.has_leases)));
    }
    None
}

fn denied(why: String) -> Error {
    Error::new(Kind::PermissionDenied, "borrow memory", why)
}

fn over(why: String) -> Error {
    Error::new(Kind::Exhausted, "borrow memory", why).next("return a lease first")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    fn peer(user: u32, groups: &[u32]) -> Peer {
        let mut peer = Peer::of(UnixStream::pair().unwrap().0).unwrap();
        (peer.user, peer.groups) = (user, groups.to_vec());
        peer
    }

    fn policy() -> Policy {
        Policy { owner: 500, rules: Vec::new() }
    }

    fn wish(memory: &str, size_bytes: u64) -> Wish<'_> {
        Wish {
            memory,
            size_bytes,
            direction: Direction::Both,
            network_card: false,
            has_bytes: 0,
            has_leases: 0,
        }
    }

    fn kind(policy: &Policy, peer: &Peer, wish: Wish<'_>) -> Option<Kind> {
        policy.check(peer, wish).err().map(|error| error.kind())
    }

    #[test]
    fn nobody_may_but_root_and_the_owner() {
        let network = Wish { network_card: true, has_bytes: u64::MAX, ..wish("vram", u64::MAX) };
        for user in [0, 500] {
            assert_eq!(kind(&policy(), &peer(user, &[]), network), None);
            assert!(policy().is_operator(&peer(user, &[])));
        }
        let stranger = peer(1000, &[1000, 44]);
        assert_eq!(kind(&policy(), &stranger, wish("vram", 1)), Some(Kind::PermissionDenied));
        assert!(!policy().is_operator(&stranger) && !policy().may_see(&stranger, "vram"));
    }

    #[test]
    fn a_rule_is_for_its_user_or_group_and_memory() {
        let policy = policy()
            .and(Rule::allow(Who::User(1000)).of(&["vram"]))
            .and(Rule::allow(Who::Group(44)).of(&["host"]).and_operate());
        let (user, member) = (peer(1000, &[1000]), peer(1001, &[1001, 44]));
        assert_eq!(kind(&policy, &user, wish("vram", 1)), None);
        assert_eq!(kind(&policy, &user, wish("host", 1)), Some(Kind::PermissionDenied));
        assert_eq!(kind(&policy, &member, wish("host", 1)), None);
        assert_eq!(kind(&policy, &member, wish("vram", 1)), Some(Kind::PermissionDenied));
        assert!(policy.is_operator(&member) && !policy.is_operator(&user));
        assert!(policy.may_see(&user, "vram") && !policy.may_see(&user, "host"));
        let everybody = super::Policy { owner: 500, rules: vec![Rule::allow(Who::Everybody)] };
        assert_eq!(kind(&everybody, &peer(65534, &[]), wish("vram", 1)), None);
    }

    #[test]
    fn limits_count_what_a_user_has() {
        let policy = policy().and(Rule::allow(Who::User(1000)).up_to_bytes(100).up_to_leases(2));
        let user = peer(1000, &[]);
        let has = |has_bytes, has_leases| Wish { has_bytes, has_leases, ..wish("vram", 40) };
        assert_eq!(kind(&policy, &user, has(60, 1)), None);
        assert_eq!(kind(&policy, &user, has(61, 1)), Some(Kind::Exhausted));
        assert_eq!(kind(&policy, &user, has(u64::MAX, 1)), Some(Kind::Exhausted));
        assert_eq!(kind(&policy, &user, has(0, 2)), Some(Kind::Exhausted));
        // Another rule may allow more.
        let policy = policy.and(Rule::allow(Who::Everybody).up_to_bytes(1000));
        assert_eq!(kind(&policy, &user, has(61, 2)), None);
    }

    #[test]
    fn directions_and_network_cards_have_permissions_of_their_own() {
        let reader = policy().and(Rule::allow(Who::User(1000)).only_to(Direction::Read));
        let user = peer(1000, &[]);
        let to = |direction| Wish { direction, ..wish("host", 1) };
        assert_eq!(kind(&reader, &user, to(Direction::Read)), None);
        assert_eq!(kind(&reader, &user, to(Direction::Both)), Some(Kind::PermissionDenied));
        let card = Wish { network_card: true, ..wish("vram", 1) };
        let without = policy().and(Rule::allow(Who::User(1000)));
        assert_eq!(kind(&without, &user, card), Some(Kind::PermissionDenied));
        let with = policy().and(Rule::allow(Who::User(1000)).or_network_card());
        assert_eq!(kind(&with, &user, card), None);
    }
}
