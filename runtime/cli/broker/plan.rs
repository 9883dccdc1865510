//! `Plan`: what `serve` is to lend, to whom, and where: by the command line, or by a TOML file.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use peervram::backends::{DmaRange, PciAddress};
use peervram::{Error, Kind, Result};
use serde::Deserialize;
use serde::de::{self, Deserializer, Visitor};

use super::allowed::Allowed;
use crate::arguments::{RangeArgument, parse_bytes};

/// How much host memory is lent where nothing else is named. No page of it is taken before somebody writes to it.
pub const HOST_BYTES: u64 = 1 << 30;

const TRIED: &str = "read what to lend";

/// What is to be lent.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Plan {
    pub socket: Option<PathBuf>,
    pub memories: Vec<PlannedMemory>,
    pub allowed: Vec<Allowed>,
}

/// A memory that is to be lent.
#[derive(Debug, PartialEq, Eq)]
pub struct PlannedMemory {
    pub name: Option<String>,
    pub source: Source,
    pub alignment_bytes: Option<u64>,
}

/// What it is of.
#[derive(Debug, PartialEq, Eq)]
pub enum Source {
    /// That many bytes of host memory.
    Host(u64),
    /// Ranges of a region of a device: all of it without any, and of its VRAM where no region is named.
    Device { address: PciAddress, region: Option<u32>, ranges: Vec<DmaRange> },
}

impl Plan {
    /// With host memory, where nothing is to be lent; and nobody allowed what is not there.
    ///
    /// # Errors
    /// [`Kind::InvalidInput`]: a rule is about a memory that is none of these.
    pub fn checked(mut self) -> Result<Self> {
        if self.memories.is_empty() {
            let source = Source::Host(HOST_BYTES);
            self.memories.push(PlannedMemory { name: None, source, alignment_bytes: None });
        }
        let names: Vec<String> = self.memories.iter().map(PlannedMemory::name).collect();
        for allowed in &self.allowed {
            if let Some(strange) = allowed.memories.iter().find(|name| !names.contains(name)) {
                let why = format!("{} is allowed to borrow of {strange}, which is not lent", allowed.who);
                let next = format!("these are: {}", names.join(", "));
                return Err(Error::new(Kind::InvalidInput, TRIED, why).next(next));
            }
        }
        Ok(self)
    }

    /// What a TOML file says.
    ///
    /// # Errors
    /// [`Kind::InvalidInput`] with the line, for what makes no sense, keys that do not exist among it; else what the
    /// kernel says of the file.
    pub fn of_file(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).map_err(|error| Error::os(TRIED, error).on(path.display()))?;
        Self::of_text(&text).map_err(|why| {
            Error::new(Kind::InvalidInput, TRIED, why)
                .on(path.display())
                .next("packaging/broker.toml is an example with every key")
        })
    }

    fn of_text(text: &str) -> Result<Self, String> {
        let file: File = toml::from_str(text).map_err(|error| {
            let before = error.span().map(|span| &text[..span.start.min(text.len())]);
            let line = before.map(|before| format!("line {}: ", before.matches('\n').count() + 1));
            format!("{}{}", line.unwrap_or_default(), error.message().trim())
        })?;
        let memories = file.memory.into_iter().map(PlannedMemory::try_from).collect::<Result<_, String>>()?;
        let allowed = file.allow.into_iter().map(Allowed::try_from).collect::<Result<_, String>>()?;
        Ok(Self { socket: file.socket, memories, allowed })
    }
}

impl PlannedMemory {
    /// What it is borrowed by: the device's address, or `host`, where no other name was given.
    pub fn name(&self) -> String {
        match (&self.name, &self.source) {
            (Some(name), _) => name.clone(),
            (None, Source::Device { address, .. }) => address.to_string(),
            (None, Source::Host(_)) => "host".into(),
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    socket: Option<PathBuf>,
    #[serde(default)]
    memory: Vec<MemoryTable>,
    #[serde(default)]
    allow: Vec<AllowTable>,
}

/// `[[memory]]`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct MemoryTable {
    name: Option<String>,
    device: Option<String>,
    host: Option<Size>,
    region: Option<u32>,
    #[serde(default)]
    ranges: Vec<String>,
    alignment: Option<Size>,
}

impl TryFrom<MemoryTable> for PlannedMemory {
    type Error = String;

    fn try_from(table: MemoryTable) -> Result<Self, String> {
        let source = match (table.device, table.host) {
            (Some(device), None) => {
                let address = device.parse::<PciAddress>().map_err(|error| error.to_string())?;
                let ranges = table.ranges.iter().map(|range| Ok(range.parse::<RangeArgument>()?.0));
                let ranges = ranges.collect::<Result<_, String>>()?;
                Source::Device { address, region: table.region, ranges }
            }
            (None, Some(Size(bytes))) if table.region.is_none() && table.ranges.is_empty() => {
                Source::Host(bytes)
            }
            (None, Some(_)) => return Err("host memory has no `region` and no `ranges`".into()),
            _ => return Err("each [[memory]] has a `device` or `host`, and not both".into()),
        };
        Ok(Self { name: table.name, source, alignment_bytes: table.alignment.map(|Size(bytes)| bytes) })
    }
}

/// `[[allow]]`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct AllowTable {
    user: Option<Name>,
    group: Option<Name>,
    #[serde(default)]
    everybody: bool,
    #[serde(default)]
    memories: Vec<String>,
    bytes: Option<Size>,
    leases: Option<usize>,
    #[serde(default)]
    network_card: bool,
    #[serde(default)]
    operator: bool,
}

impl TryFrom<AllowTable> for Allowed {
    type Error = String;

    fn try_from(table: AllowTable) -> Result<Self, String> {
        let who = match (table.user, table.group, table.everybody) {
            (Some(Name(name)), None, false) => format!("user:{name}"),
            (None, Some(Name(name)), false) => format!("group:{name}"),
            (None, None, true) => "everybody".into(),
            _ => return Err("each [[allow]] has one of `user`, `group` and `everybody = true`".into()),
        };
        Ok(Self {
            bytes: table.bytes.map(|Size(bytes)| bytes),
            leases: table.leases,
            memories: table.memories,
            network_card: table.network_card,
            operator: table.operator,
            ..Self::everything(&who)?
        })
    }
}

/// A number of bytes: 65536, or "64K".
struct Size(u64);

/// A name, or a number: "alice", 1000.
struct Name(String);

/// Takes a text or a number.
struct TextOrNumber(&'static str);

impl Visitor<'_> for TextOrNumber {
    type Value = String;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<String, E> {
        Ok(text.to_owned())
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<String, E> {
        Ok(number.to_string())
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = deserializer.deserialize_any(TextOrNumber("a number of bytes, like \"16M\""))?;
        parse_bytes(&text).map(Self).map_err(de::Error::custom)
    }
}

impl<'de> Deserialize<'de> for Name {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(TextOrNumber("a name, or a number")).map(Self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_says_what_the_command_line_can_and_more() {
        let plan = Plan::of_text(
            r#"
            socket = "/run/x"
            [[memory]]
            name = "vram"
            device = "01:00.0"
            region = 2
            ranges = ["0+256M", "0x20000000+4K"]
            alignment = 65536
            [[memory]]
            host = "64M"
            [[allow]]
            user = 0
            bytes = "1G"
            leases = 4
            memories = ["vram"]
            network-card = true
            operator = true
            [[allow]]
            everybody = true
            "#,
        );
        let plan = plan.unwrap().checked().unwrap();
        let ranges = vec![DmaRange::new(0, 256 << 20), DmaRange::new(0x2000_0000, 4096)];
        let address = "0000:01:00.0".parse().unwrap();
        let vram = PlannedMemory {
            name: Some("vram".into()),
            source: Source::Device { address, region: Some(2), ranges },
            alignment_bytes: Some(65536),
        };
        let host = PlannedMemory { name: None, source: Source::Host(64 << 20), alignment_bytes: None };
        assert_eq!(plan.memories, [vram, host]);
        let root = "user:0,bytes=1G,leases=4,memory=vram,network-card,operator".parse().unwrap();
        assert_eq!(plan.allowed, [root, "everybody".parse().unwrap()]);
        assert_eq!(plan.socket, Some("/run/x".into()));
    }

    #[test]
    fn what_is_wrong_in_a_file_is_named() {
        for (text, named) in [
            ("socket = 5", "line 1"),
            ("\n[[memory]]\ndevise = \"01:00.0\"", "line 3: unknown field `devise`"),
            ("[[allow]]\nuser = 1\noperators = true", "operators"),
            ("memories = []", "memories"),
            ("[[memory]]\nname = \"a\"", "`device` or `host`"),
            ("[[memory]]\ndevice = \"01:00.0\"\nhost = 5", "not both"),
            ("[[memory]]\nhost = \"64M\"\nregion = 0", "`region`"),
            ("[[memory]]\nhost = \"1.5G\"", "1.5G"),
            ("[[memory]]\nhost = -1", "-1"),
            ("[[memory]]\ndevice = \"gpu0\"", "gpu0"),
            ("[[memory]]\ndevice = \"01:00.0\"\nranges = [\"5\"]", "0+16M"),
            ("[[allow]]\nbytes = 5", "everybody = true"),
            ("[[allow]]\nuser = 1\ngroup = 1", "one of"),
            ("[[allow]]\nuser = \"no-such-user\"", "no-such-user"),
            ("[[memory]", "line 1"),
        ] {
            let why = Plan::of_text(text).unwrap_err();
            assert!(why.contains(named) && !why.contains('\n'), "{text:?}: {why}");
        }
    }

    #[test]
    fn without_a_memory_it_is_host_memory_and_rules_are_about_what_is_lent() {
        assert_eq!(Plan::default().checked().unwrap().memories[0].name(), "host");
        let allowed = vec!["everybody,memory=vram".parse().unwrap()];
        let error = Plan { allowed, ..Plan::default() }.checked().unwrap_err();
        assert_eq!(error.kind(), Kind::InvalidInput);
        assert!(error.to_string().contains("vram") && error.to_string().contains("host"), "{error}");
    }
}
