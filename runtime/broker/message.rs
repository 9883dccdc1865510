//! The messages of `io.peervram.Broker`, as the interface file beside this one describes them.
//!
//! [Varlink](https://varlink.org): a message is one JSON object and a NUL. Whatever a client sends that is not in the
//! interface is refused, fields that are too many included: a client that spells an option wrong is to hear of it.

use peervram_backends::{DmaRange, Error, Kind};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{AtDeadline, Direction};

/// The interface, as `GetInterfaceDescription` gives it.
pub(crate) const INTERFACE: &str = include_str!("io.peervram.Broker.varlink");
/// Its name.
pub(crate) const NAME: &str = "io.peervram.Broker";
/// The interface that every service has.
pub(crate) const SERVICE: &str = "org.varlink.service";
/// The error of this interface.
pub(crate) const FAILED: &str = "io.peervram.Broker.Failed";

/// What a client asks.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Call {
    pub method: String,
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub parameters: Value,
    #[serde(default, skip_serializing_if = "is_false")]
    pub more: bool,
    #[serde(default, skip_serializing_if = "is_false")]
    pub oneway: bool,
    #[serde(default, skip_serializing_if = "is_false")]
    pub upgrade: bool,
}

/// What it is answered. Whoever reads it passes over fields that a newer broker may have.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Reply {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    #[serde(default)]
    pub parameters: Value,
    #[serde(default, skip_serializing_if = "is_false")]
    pub continues: bool,
}

fn is_false(value: &bool) -> bool {
    !*value
}

/// A part of a memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Range {
    /// Where it starts, in bytes.
    pub offset: u64,
    /// How long it is, in bytes.
    pub length: u64,
}

impl From<DmaRange> for Range {
    fn from(range: DmaRange) -> Self {
        Self { offset: range.offset_bytes, length: range.length_bytes }
    }
}

impl From<Range> for DmaRange {
    fn from(range: Range) -> Self {
        Self::new(range.offset, range.length)
    }
}

/// Of `Borrow`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(crate) struct Borrow {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ranges: Option<Vec<Range>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alignment: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub direction: Option<Direction>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network_card: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
}

/// What `Borrow` is answered.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Borrowed {
    pub lease: u64,
    pub memory: String,
    pub device: String,
    #[serde(default)]
    pub pci_address: Option<String>,
    pub region: u32,
    pub region_size: u64,
    pub ranges: Vec<Range>,
    pub size: u64,
    pub direction: Direction,
    pub generation: u64,
    pub word: usize,
    #[serde(default)]
    pub engine: Option<String>,
    pub dma_buf: u32,
}

/// What `Window` is answered.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Windowed {
    pub window: u32,
    pub size: u64,
}

/// Of `Copy`.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Copy {
    pub lease: u64,
    pub generation: u64,
    pub direction: Direction,
    pub offset: u64,
    pub length: u64,
}

/// What `Words` is answered.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Words {
    pub words: u32,
}

/// Of `Return`, `Evict` and `Release`.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct OfLease {
    pub lease: u64,
}

/// Of `Importing`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(crate) struct Importing {
    pub lease: u64,
    pub importer: String,
    pub must_be_freed: bool,
}

/// Of `Drained`.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Drained {
    pub lease: u64,
    pub drain: u64,
    pub generation: u64,
}

/// Of `Revoke` and `Reset`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(crate) struct OfMemory {
    pub memory: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub go_on: Option<bool>,
}

/// What `Revoke` and `Reset` are answered.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Taken {
    pub generation: u64,
}

/// What `Identify` is answered.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Identified {
    pub connection: u64,
}

/// Of `Watch`.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Watch {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connection: Option<u64>,
}

/// Of a method without parameters.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Nothing {}

/// What a method is answered that has nothing to say.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Done {}

/// What is lent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[non_exhaustive]
pub struct Memory {
    /// What it is borrowed by.
    pub name: String,
    /// The device that it is of.
    pub device: String,
    /// The region of the device, for PCI the BAR.
    pub region: u32,
    /// How much of it is lent, in bytes.
    pub size: u64,
    /// How much could be borrowed in all, in bytes.
    pub free: u64,
    /// How much could be borrowed in one range, in bytes.
    pub largest_free: u64,
    /// How much of what is free is not scrubbed yet, in bytes.
    pub unscrubbed: u64,
    /// How much nobody is given before the kernel has freed a dma-buf, in bytes.
    pub quarantined: u64,
    /// What leases begin at multiples of, in bytes.
    pub alignment: u64,
    /// How often it was taken back.
    pub generation: u64,
    /// Whether it can be borrowed now.
    pub state: MemoryState,
    /// How many leases there are.
    pub leases: u64,
}

/// Where a memory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum MemoryState {
    /// It can be borrowed.
    Live,
    /// It is being taken back, or given back.
    Draining,
    /// It was taken back.
    Away,
    /// Its device is closed.
    Gone,
}

/// One lease, as operators see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[non_exhaustive]
pub struct LeaseStatus {
    /// Its number.
    pub lease: u64,
    /// The memory that it is of.
    pub memory: String,
    /// The parts of it.
    pub ranges: Vec<Range>,
    /// The sum of their lengths, in bytes.
    pub size: u64,
    /// What importers may do.
    pub direction: Direction,
    /// The user who borrowed it.
    pub user: u32,
    /// The process that borrowed it, where its number is known.
    pub process: Option<u32>,
    /// The name of its program.
    pub program: Option<String>,
    /// What the client calls it.
    pub label: Option<String>,
    /// Who imports it, as far as the client said so.
    pub importers: Vec<String>,
    /// When it began, in seconds since the Unix epoch.
    pub since: u64,
    /// The generation of its memory.
    pub generation: u64,
    /// Whether its client uses it.
    pub state: LeaseState,
}

/// Where a lease is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum LeaseState {
    /// Its client may use it.
    Live,
    /// Its client was told to stop, and has not answered.
    Draining,
    /// Its client has answered.
    Drained,
    /// Its memory is away.
    Away,
}

/// A part of a memory that nobody is given.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[non_exhaustive]
pub struct Quarantined {
    /// The lease that it was of.
    pub lease: u64,
    /// The memory.
    pub memory: String,
    /// The parts of it.
    pub ranges: Vec<Range>,
    /// The sum of their lengths, in bytes.
    pub size: u64,
    /// The user who had it.
    pub user: u32,
    /// The inode of the dma-buf that is not freed.
    pub inode: Option<u64>,
    /// Since when, in seconds since the Unix epoch.
    pub since: u64,
    /// What is waited for, in words.
    pub why: String,
}

/// Who has what.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Status {
    /// What is lent.
    pub memories: Vec<Memory>,
    /// The leases, in the order of their numbers.
    pub leases: Vec<LeaseStatus>,
    /// What nobody is given.
    pub quarantine: Vec<Quarantined>,
}

/// What is lent to the caller.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Listed {
    pub memories: Vec<Memory>,
}

/// What `Watch` is answered, again and again.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Watched {
    pub event: LeaseEvent,
}

/// What happens to a lease.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct LeaseEvent {
    pub lease: u64,
    pub event: LeaseEventKind,
    pub generation: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drain: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cause: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline_ms: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at_deadline: Option<WireAtDeadline>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

impl LeaseEvent {
    /// Of that lease and generation, with nothing else to say.
    pub fn new(lease: u64, event: LeaseEventKind, generation: u64) -> Self {
        Self {
            lease,
            event,
            generation,
            drain: None,
            cause: None,
            deadline_ms: None,
            at_deadline: None,
            why: None,
        }
    }
}

/// Varlink's names have no hyphens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum LeaseEventKind {
    Draining,
    CalledOff,
    Revoked,
    Restored,
    Gone,
}

/// As [`AtDeadline`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum WireAtDeadline {
    CallOff,
    GoOn,
}

impl From<AtDeadline> for WireAtDeadline {
    fn from(at_deadline: AtDeadline) -> Self {
        match at_deadline {
            AtDeadline::CallOff => Self::CallOff,
            AtDeadline::GoOn => Self::GoOn,
        }
    }
}

/// The parameters of the error of this interface.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Failed {
    pub code: String,
    pub message: String,
    #[serde(default)]
    pub device: Option<String>,
    #[serde(default)]
    pub errno: Option<i32>,
    #[serde(default)]
    pub next: Option<String>,
}

impl From<&Error> for Failed {
    fn from(error: &Error) -> Self {
        Self {
            code: error.kind().code().into(),
            message: error.why().into(),
            device: error.device().map(str::to_owned),
            errno: error.raw_os_error(),
            next: error.next_step().map(str::to_owned),
        }
    }
}

impl Failed {
    /// The error that the broker had, for whoever tried `tried`.
    pub fn into_error(self, tried: &'static str) -> Error {
        let kind = Kind::from_code(&self.code).unwrap_or(Kind::Os);
        let mut error = Error::new(kind, tried, self.message);
        if let Some(device) = self.device {
            error = error.on(device);
        }
        if let Some(errno) = self.errno {
            error = error.raw_errno(errno);
        }
        match self.next {
            Some(next) => error.next(next),
            None => error,
        }
    }
}

/// Why a call is not served at all: the errors of `org.varlink.service`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// There is no such interface.
    InterfaceNotFound(String),
    /// The interface has no such method.
    MethodNotFound(String),
    /// A parameter is missing, unknown, or of another type.
    InvalidParameter(String),
    /// A method that answers more than once was called without `more`.
    ExpectedMore,
    /// What is asked for is not offered: an upgrade of the protocol.
    MethodNotImplemented(String),
}

impl Refusal {
    /// Its name and parameters, as they are sent.
    pub fn reply(&self) -> Reply {
        let (name, parameters) = match self {
            Self::InterfaceNotFound(interface) => {
                ("InterfaceNotFound", serde_json::json!({ "interface": interface }))
            }
            Self::MethodNotFound(method) => ("MethodNotFound", serde_json::json!({ "method": method })),
            Self::InvalidParameter(parameter) => {
                ("InvalidParameter", serde_json::json!({ "parameter": parameter }))
            }
            Self::ExpectedMore => ("ExpectedMore", serde_json::json!({})),
            Self::MethodNotImplemented(method) => {
                ("MethodNotImplemented", serde_json::json!({ "method": method }))
            }
        };
        Reply { error: Some(format!("{SERVICE}.{name}")), parameters, continues: false }
    }
}

/// Reads the parameters of a method.
///
/// # Errors
/// The first parameter that is missing, unknown or wrong.
pub(crate) fn parameters<T: DeserializeOwned>(value: Value) -> Result<T, Refusal> {
    // Varlink leaves parameters out where there are none.
    let value = if value.is_null() { Value::Object(serde_json::Map::new()) } else { value };
    serde_json::from_value(value).map_err(|error| {
        // serde names the field between backticks where it is missing or unknown; else it says what is wrong.
        let words = error.to_string();
        let named = words.split('`').nth(1).filter(|_| words.contains("field"));
        Refusal::InvalidParameter(named.unwrap_or(&words).to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn invalid<T: DeserializeOwned + std::fmt::Debug>(value: Value) -> String {
        match parameters::<T>(value).unwrap_err() {
            Refusal::InvalidParameter(parameter) => parameter,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_parameter_that_is_wrong_is_named() {
        assert_eq!(invalid::<OfLease>(json!({})), "lease");
        assert_eq!(invalid::<OfLease>(json!({ "lease": 1, "leese": 2 })), "leese");
        assert_eq!(invalid::<Nothing>(json!({ "of": 1 })), "of");
        assert_eq!(invalid::<Borrow>(json!({ "ranges": [{ "offset": 0 }] })), "length");
        assert!(invalid::<OfLease>(json!({ "lease": -1 })).contains("-1"));
        assert!(invalid::<OfLease>(json!([1, 2, 3])).contains("expected"));
        parameters::<Nothing>(Value::Null).unwrap();
    }

    /// The library's error is the client's, but for what was tried.
    #[test]
    fn an_error_crosses_whole() {
        let error = Error::new(Kind::Busy, "export memory", "it is being taken back")
            .on("0000:01:00.0")
            .raw_errno(16);
        let error = error.next("wait");
        let sent = serde_json::to_string(&Failed::from(&error)).unwrap();
        let received: Failed = serde_json::from_str(&sent).unwrap();
        let received = received.into_error("borrow memory");
        assert_eq!(received.to_string(), "cannot borrow memory (0000:01:00.0): it is being taken back; wait");
        assert_eq!((received.kind(), received.raw_os_error()), (Kind::Busy, Some(16)));
    }

    /// Every field that is sent is in the interface file, and every method has its line.
    #[test]
    fn the_interface_file_has_every_field() {
        let fields = [
            "lease",
            "drain",
            "generation",
            "deadlineMs",
            "atDeadline",
            "mustBeFreed",
            "networkCard",
            "pciAddress",
        ];
        for field in fields {
            assert!(INTERFACE.contains(&format!("{field}: ")), "{field}");
        }
        let event = LeaseEvent {
            lease: 1,
            event: LeaseEventKind::CalledOff,
            generation: 2,
            drain: Some(3),
            cause: Some("reset".into()),
            deadline_ms: Some(4),
            at_deadline: Some(WireAtDeadline::GoOn),
            why: Some("?".into()),
        };
        let Value::Object(sent) = serde_json::to_value(&event).unwrap() else { panic!() };
        let (_, declared) = INTERFACE.split_once("type Event (").unwrap();
        let (declared, _) = declared.split_once("\n)").unwrap();
        for field in sent.keys() {
            assert!(declared.contains(&format!("  {field}: ")), "{field}");
        }
        for word in ["called_off", "go_on"] {
            assert!(declared.contains(word), "{word}");
        }
    }
}
