//! `peervram status`: who has what of a broker's memory.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use clap::Args;
use peervram::broker::{LeaseState, LeaseStatus, Memory, MemoryState, Quarantined, Range, client};
use peervram::{Error, Kind, Result};
use peervram_programs::{Table, behind, bytes, columns, is_terminal};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::Serialize;

use super::{SocketArgument, prometheus, users};

/// Show who has what of a broker's memory.
///
/// Memories with what is free, in all and in one range; leases with who has them, since when, of which generation;
/// and what nobody is given until the kernel has freed a dma-buf, with why. Leases are shown to operators: root, the
/// user of the broker, and whom it allows. Everybody else sees what may be borrowed.
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    peervram status                            once\n  \
    peervram status --watch                    again and again, until you end it\n  \
    peervram status --watch --json             a line whenever something has changed\n  \
    peervram status --prometheus /var/lib/prometheus/node-exporter/peervram.prom\n\n\
--json has the fields of the interface io.peervram.Broker: docs/broker-protocol.md.")]
pub struct Arguments {
    #[command(flatten)]
    socket: SocketArgument,

    /// Show it again every N seconds.
    #[arg(long, value_name = "N", num_args = 0..=1, default_missing_value = "1",
          value_parser = clap::value_parser!(u64).range(1..=3600))]
    watch: Option<u64>,

    /// In Prometheus' text form, to standard output or into FILE, which is replaced as a whole: for a folder that the
    /// node exporter reads.
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "-")]
    prometheus: Option<PathBuf>,
}

/// What a broker has said.
#[derive(Serialize, PartialEq)]
pub struct Seen {
    socket: PathBuf,
    /// Whether the broker takes this user for an operator.
    operator: bool,
    pub memories: Vec<Memory>,
    /// Nothing for who is no operator.
    pub leases: Option<Vec<LeaseStatus>>,
    pub quarantine: Option<Vec<Quarantined>>,
}

impl Seen {
    /// Asks.
    fn of(socket: PathBuf, broker: &client::Broker) -> Result<Self> {
        match broker.status() {
            Ok(status) => Ok(Self {
                socket,
                operator: true,
                memories: status.memories,
                leases: Some(status.leases),
                quarantine: Some(status.quarantine),
            }),
            Err(error) if error.kind() == Kind::PermissionDenied => {
                Ok(Self { socket, operator: false, memories: broker.list()?, leases: None, quarantine: None })
            }
            Err(error) => Err(error),
        }
    }
}

pub fn run(arguments: &Arguments, json: bool) -> anyhow::Result<ExitCode> {
    if json && arguments.prometheus.is_some() {
        let why = "--json and --prometheus are two forms of the same";
        return Err(Error::new(Kind::InvalidInput, "see who has what", why)
            .next("leave one of them out")
            .into());
    }
    let shown = show(arguments, json);
    if shown.is_err() {
        // Who reads the file is to see that nothing answers, and not the figures of yesterday.
        if let Some(file) = arguments.prometheus.as_deref().filter(|file| *file != "-") {
            prometheus::write(file, prometheus::DOWN)?;
        }
    }
    shown
}

fn show(arguments: &Arguments, json: bool) -> anyhow::Result<ExitCode> {
    let socket = arguments.socket.path();
    let broker = client::Broker::connect(&socket)?;
    let mut before: Option<Seen> = None;
    loop {
        let seen = Seen::of(socket.clone(), &broker)?;
        let mut output = peervram_programs::output();
        match &arguments.prometheus {
            Some(file) if file != "-" => prometheus::write(file, &prometheus::text(&seen))?,
            Some(_) => output.write_all(prometheus::text(&seen).as_bytes())?,
            None if json && arguments.watch.is_some() => {
                if before.as_ref() != Some(&seen) {
                    writeln!(output, "{}", serde_json::to_string(&seen)?)?;
                }
            }
            None if json => crate::ending::print_json(&seen)?,
            None => {
                if arguments.watch.is_some() && is_terminal() {
                    // Home, and everything from there on away.
                    output.write_all(b"\x1b[H\x1b[J")?;
                } else if before.is_some() {
                    writeln!(output)?;
                }
                print(&seen, SystemTime::now(), &mut output, columns())?;
            }
        }
        output.flush()?;
        before = Some(seen);
        let Some(seconds) = arguments.watch else { return Ok(ExitCode::SUCCESS) };
        if reader_leaves_within(Duration::from_secs(seconds))? {
            return Ok(ExitCode::SUCCESS);
        }
    }
}

/// Waits, and says whether the reader of standard output has gone meanwhile.
fn reader_leaves_within(time: Duration) -> Result<bool> {
    let stdout = io::stdout();
    let timeout = Timespec { tv_sec: time.as_secs() as i64, tv_nsec: 0 };
    match poll(&mut [PollFd::new(&stdout, PollFlags::empty())], Some(&timeout)) {
        Ok(ready) => Ok(ready > 0),
        Err(rustix::io::Errno::INTR) => Ok(false),
        Err(errno) => Err(Error::os("wait to look again", errno)),
    }
}

fn print(seen: &Seen, now: SystemTime, output: &mut impl Write, width: usize) -> io::Result<()> {
    let headings =
        ["memory", "device", "state", "generation", "size", "free", "in one range", "quarantine", "leases"];
    let mut table = Table::new(&headings).with_figures_in([3, 8]);
    for memory in &seen.memories {
        table.row([
            memory.name.clone(),
            memory.device.clone(),
            memory_state(memory.state).to_owned(),
            memory.generation.to_string(),
            bytes::in_words(memory.size),
            free(memory),
            in_one_range(memory),
            bytes::in_words(memory.quarantined),
            memory.leases.to_string(),
        ]);
    }
    if seen.memories.is_empty() {
        writeln!(output, "{} lends nothing to this user.", seen.socket.display())?;
    } else {
        table.print(output, width)?;
    }
    match &seen.leases {
        None => return writeln!(output, "\nWho has it is shown to operators of the broker."),
        Some(leases) if leases.is_empty() => writeln!(output, "\nNobody has a lease.")?,
        Some(leases) => {
            writeln!(output)?;
            print_leases(leases, now, output, width)?;
        }
    }
    for quarantined in seen.quarantine.iter().flatten() {
        let inode = quarantined.inode.map_or(String::new(), |inode| format!(", dma-buf inode {inode}"));
        let text = format!(
            "lease {}: {} of {}, {}, which {} had, for {}{inode}: {}",
            quarantined.lease,
            bytes::in_words(quarantined.size),
            printable(&quarantined.memory),
            ranges(&quarantined.ranges),
            users::user_in_words(quarantined.user),
            age(quarantined.since, now),
            printable(&quarantined.why),
        );
        writeln!(output)?;
        behind(output, width, "quarantine  ", &text)?;
    }
    Ok(())
}

fn print_leases(
    leases: &[LeaseStatus],
    now: SystemTime,
    output: &mut impl Write,
    width: usize,
) -> io::Result<()> {
    let headings = ["lease", "memory", "ranges", "who", "label", "for", "generation", "state", "imported by"];
    let mut table = Table::new(&headings).with_figures_in([0, 6]);
    for lease in leases {
        let mut who = users::user_in_words(lease.user);
        if let Some(process) = lease.process {
            let _ = write!(who, " {process}");
        }
        if let Some(program) = &lease.program {
            let _ = write!(who, " {}", printable(program));
        }
        let or_dash = |text: String| if text.is_empty() { "-".to_owned() } else { text };
        table.row([
            lease.lease.to_string(),
            lease.memory.clone(),
            ranges(&lease.ranges),
            who,
            or_dash(lease.label.as_deref().map(printable).unwrap_or_default()),
            age(lease.since, now),
            lease.generation.to_string(),
            lease_state(lease.state).to_owned(),
            or_dash(lease.importers.iter().map(|name| printable(name)).collect::<Vec<_>>().join(", ")),
        ]);
    }
    table.print(output, width)
}

/// "192 MiB", and how much of it is scrubbed only when somebody wants it.
fn free(memory: &Memory) -> String {
    match memory.unscrubbed {
        0 => bytes::in_words(memory.free),
        unscrubbed => {
            format!("{}, not scrubbed: {}", bytes::in_words(memory.free), bytes::in_words(unscrubbed))
        }
    }
}

/// "64 MiB (33 %)" of what is free.
fn in_one_range(memory: &Memory) -> String {
    let largest = bytes::in_words(memory.largest_free);
    match memory.free {
        free if free == memory.largest_free => largest,
        free => format!("{largest} ({:.0} %)", memory.largest_free as f64 / free as f64 * 100.0),
    }
}

fn ranges(ranges: &[Range]) -> String {
    let words = |range: &Range| format!("{:#x}+{}", range.offset, bytes::in_words(range.length));
    match ranges {
        [first, .., last] if ranges.len() > 3 => {
            format!("{}, ... {} ranges, {}", words(first), ranges.len(), words(last))
        }
        ranges => ranges.iter().map(words).collect::<Vec<_>>().join(", "),
    }
}

/// How long ago that was: "2h 3m". Never less than a second.
fn age(since: u64, now: SystemTime) -> String {
    let now = now.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |now| now.as_secs());
    let seconds = now.saturating_sub(since).max(1);
    // Seconds of something that is days old say nothing.
    let rounded = match seconds {
        0..3600 => seconds,
        3600..86400 => seconds / 60 * 60,
        _ => seconds / 3600 * 3600,
    };
    humantime::format_duration(Duration::from_secs(rounded)).to_string()
}

pub fn memory_state(state: MemoryState) -> &'static str {
    match state {
        MemoryState::Live => "live",
        MemoryState::Draining => "draining",
        MemoryState::Away => "away",
        MemoryState::Gone => "gone",
        _ => "unknown",
    }
}

pub fn lease_state(state: LeaseState) -> &'static str {
    match state {
        LeaseState::Live => "live",
        LeaseState::Draining => "draining",
        LeaseState::Drained => "drained",
        LeaseState::Away => "away",
        _ => "unknown",
    }
}

/// How many leases, and of how many bytes, each user has of each memory in each state.
pub fn by_user(leases: &[LeaseStatus]) -> BTreeMap<(&str, u32, &'static str), (u64, u64)> {
    let mut sums = BTreeMap::new();
    for lease in leases {
        let sum: &mut (u64, u64) =
            sums.entry((lease.memory.as_str(), lease.user, lease_state(lease.state))).or_default();
        *sum = (sum.0 + 1, sum.1 + lease.size);
    }
    sums
}

/// What clients choose may hold line breaks and escape sequences.
fn printable(name: &str) -> String {
    name.escape_debug().to_string()
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use serde_json::json;

    /// A broker whose memory is fragmented, with a client and something in quarantine.
    pub fn busy() -> Seen {
        let memory = json!({
            "name": "vram", "device": "0000:01:00.0", "region": 2, "size": 268435456, "free": 201326592,
            "largestFree": 67108864, "unscrubbed": 4096, "quarantined": 4194304, "alignment": 65536,
            "generation": 3, "state": "live", "leases": 1
        });
        let lease = json!({
            "lease": 7, "memory": "vram", "ranges": [{ "offset": 0, "length": 16777216 }], "size": 16777216,
            "direction": "both", "user": 0, "process": 4711, "program": "renderer", "label": "fr\name",
            "importers": ["RADV"], "since": 1000, "generation": 3, "state": "draining"
        });
        let quarantined = json!({
            "lease": 5, "memory": "vram", "ranges": [{ "offset": 33554432, "length": 4194304 }], "size": 4194304,
            "user": 0, "inode": 99, "since": 900, "why": "the kernel has not freed its dma-buf yet"
        });
        Seen {
            socket: "/run/peervram/broker".into(),
            operator: true,
            memories: vec![serde_json::from_value(memory).unwrap()],
            leases: Some(vec![serde_json::from_value(lease).unwrap()]),
            quarantine: Some(vec![serde_json::from_value(quarantined).unwrap()]),
        }
    }

    fn text(seen: &Seen) -> String {
        let mut output = Vec::new();
        print(seen, SystemTime::UNIX_EPOCH + Duration::from_secs(1090), &mut output, 200).unwrap();
        String::from_utf8(output).unwrap()
    }

    #[test]
    fn who_has_what_is_drawn_with_fragmentation_and_quarantine() {
        let text = text(&busy());
        for expected in [
            "0000:01:00.0  live",
            "192 MiB, not scrubbed: 4 KiB  64 MiB (33 %)",
            "0x0+16 MiB  root 4711 renderer  fr\\name  1m 30s           3  draining  RADV",
            "quarantine  lease 5: 4 MiB of vram, 0x2000000+4 MiB, which root had, for 3m 10s, dma-buf inode 99: the kernel",
        ] {
            assert!(text.contains(expected), "no {expected:?} in\n{text}");
        }
    }

    #[test]
    fn who_is_no_operator_sees_what_may_be_borrowed() {
        let seen = Seen { operator: false, leases: None, quarantine: None, ..busy() };
        assert!(text(&seen).contains("shown to operators"), "{}", text(&seen));
        let nothing = Seen { memories: Vec::new(), ..seen };
        assert!(text(&nothing).contains("lends nothing to this user"), "{}", text(&nothing));
        let idle = Seen { leases: Some(Vec::new()), quarantine: Some(Vec::new()), ..busy() };
        assert!(text(&idle).contains("Nobody has a lease"), "{}", text(&idle));
    }

    #[test]
    fn what_is_old_is_told_roughly() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(200_000);
        for (since, words) in
            [(200_000, "1s"), (300_000, "1s"), (199_941, "59s"), (190_000, "2h 46m"), (10_000, "2days 4h")]
        {
            assert_eq!(age(since, now), words);
        }
    }
}
