//! `peervram borrow`: run a program with memory that a broker lends.

use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, ExitCode, ExitStatus};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::{Args, ValueEnum};
use peervram::backends::{DmaBuf, DmaRange, Importer, OnRevoke, page_size_bytes};
use peervram::broker::client::{Lease, Wish};
use peervram::{
    Access, AttachOptions, Attachment, Direction, Error, Event, EventKind, Kind, Path, Result, Trust,
};
use peervram_programs::{bytes, note, say};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::Serialize;

use super::SocketArgument;
use super::ending_signals::EndingSignals;
use crate::arguments::{RangeArgument, parse_bytes};
use crate::child;
use crate::ending::print_json;

const TRIED: &str = "borrow memory";
/// How long returning the memory may take: nobody in this process is in it any more.
const RETURN_LIMIT: Duration = Duration::from_secs(10);

/// Borrow memory from a broker, and run a program with it.
///
/// PROGRAM inherits the dma-buf: every {fd} in its arguments becomes the descriptor's number, and PEERVRAM_FD names it
/// too. When PROGRAM has ended, the memory is given back. This ends with PROGRAM's exit code, or with 128 and the number
/// of the signal that ended it; SIGTERM is passed on to it.
///
/// What happens to the memory is told on standard error, a line each. At `draining` PROGRAM has the time that the line
/// says to end; the broker is answered when it has. A program that wants to stop, answer and go on speaks to the broker
/// itself. Without a PROGRAM it borrows, says what came of it, and gives the memory back.
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    peervram borrow --size 16M                                        try it\n  \
    peervram borrow --size 16M -- peervram import fd:{fd} --checksum  run a program with it\n  \
    peervram borrow --memory vram --range 0+4M -- PROGRAM {fd}        exactly this part of it")]
pub struct Arguments {
    /// How much, in one range: 4096, 0x1000, 64K or 16M. Rounded up to whole pages.
    #[arg(long, required_unless_present = "ranges", value_parser = parse_bytes)]
    size: Option<u64>,

    /// Of this memory, by its name. Without it, of the first one that has enough.
    #[arg(long, value_name = "NAME")]
    memory: Option<String>,

    /// Exactly this part of --memory, OFFSET+LENGTH. Several make one buffer, in the order given.
    #[arg(long = "range", value_name = "RANGE", requires = "memory", conflicts_with = "size")]
    ranges: Vec<RangeArgument>,

    /// What the first byte is to be a multiple of, a power of two; at least what the memory asks for anyway.
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    alignment: Option<u64>,

    /// The memory is for a network card, which takes a permission of its own.
    #[arg(long)]
    network_card: bool,

    /// What `peervram status` calls the lease, up to 128 bytes. Without it, the name of PROGRAM.
    #[arg(long)]
    label: Option<String>,

    /// When the broker is answered that PROGRAM does not use the memory any more.
    #[arg(long, value_enum, default_value_t = Answer::WhenEnded)]
    answer: Answer,

    #[command(flatten)]
    socket: SocketArgument,

    /// The program that inherits the dma-buf, and its arguments.
    #[arg(last = true, value_name = "PROGRAM")]
    program: Vec<String>,
}

/// When the broker is answered.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Answer {
    /// When PROGRAM has ended. Until then the memory is not taken back, unless its device goes away.
    WhenEnded,
    /// At once, whatever PROGRAM does: for programs that do not mind to lose what they read and write then.
    AtOnce,
}

#[derive(Serialize)]
struct Report {
    lease: u64,
    memory: String,
    device: String,
    region: u32,
    ranges: Vec<RangeReport>,
    size_bytes: u64,
    generation: u64,
    inode: u64,
    borrow_us: f64,
    return_us: f64,
}

#[derive(Serialize)]
struct RangeReport {
    offset_bytes: u64,
    length_bytes: u64,
}

pub fn run(arguments: &Arguments, json: bool) -> anyhow::Result<ExitCode> {
    if json && !arguments.program.is_empty() {
        let why = "--json is about memory that is borrowed and returned; with a PROGRAM the output is the program's";
        return Err(Error::new(Kind::InvalidInput, TRIED, why).next("leave one of them out").into());
    }
    let broker = arguments.socket.connect()?;
    let begun = Instant::now();
    let lease = broker.borrow(wish(arguments))?;
    let borrow_us = begun.elapsed().as_secs_f64() * 1e6;
    match arguments.program.split_first() {
        Some((program, rest)) => run_with(lease, program, rest, arguments.answer),
        None => {
            tell_and_return(lease, borrow_us, json)?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn wish(arguments: &Arguments) -> Wish {
    let memory = arguments.memory.as_deref();
    let mut wish = match (arguments.size, memory) {
        (None, Some(memory)) => {
            let ranges: Vec<DmaRange> = arguments.ranges.iter().map(|range| range.0).collect();
            Wish::of_ranges(memory, &ranges)
        }
        (size, memory) => {
            let wish = Wish::of_size(size.unwrap_or(page_size_bytes()));
            memory.map_or(wish.clone(), |memory| wish.of(memory))
        }
    };
    if let Some(alignment) = arguments.alignment {
        wish = wish.aligned_to(alignment);
    }
    if arguments.network_card {
        wish = wish.for_network_card();
    }
    let of_program =
        || Some(std::path::Path::new(arguments.program.first()?).file_name()?.to_string_lossy().into_owned());
    match arguments.label.clone().or_else(of_program) {
        Some(label) => wish.with_label(&label),
        None => wish,
    }
}

fn tell_and_return(lease: Lease, borrow_us: f64, json: bool) -> anyhow::Result<()> {
    let ranges = lease.aperture().ranges();
    let of_range =
        |range: &DmaRange| RangeReport { offset_bytes: range.offset_bytes, length_bytes: range.length_bytes };
    let mut report = Report {
        lease: lease.number(),
        memory: lease.memory().to_owned(),
        device: lease.device().to_owned(),
        region: ranges.region_index(),
        ranges: ranges.as_slice().iter().map(of_range).collect(),
        size_bytes: lease.size_bytes(),
        generation: lease.generation(),
        inode: lease.dma_buf().map_err(Error::clone)?.inode()?,
        borrow_us,
        return_us: 0.0,
    };
    let begun = Instant::now();
    lease.give_back(RETURN_LIMIT)?;
    report.return_us = begun.elapsed().as_secs_f64() * 1e6;
    if json {
        return print_json(&report);
    }
    let ranges: Vec<String> = report.ranges.iter().map(range_in_words).collect();
    say!(
        "lease {}: {} of {} ({}, region {}: {}), dma-buf inode {}, borrowed in {:.0} us, returned in {:.0} us",
        report.lease,
        bytes::in_words(report.size_bytes),
        report.memory,
        report.device,
        report.region,
        ranges.join(", "),
        report.inode,
        report.borrow_us,
        report.return_us,
    );
    Ok(())
}

fn range_in_words(range: &RangeReport) -> String {
    format!("{:#x}+{}", range.offset_bytes, bytes::in_words(range.length_bytes))
}

/// Runs a program with the dma-buf of `lease`, tells what happens meanwhile, and gives the memory back.
fn run_with(lease: Lease, program: &str, arguments: &[String], answer: Answer) -> anyhow::Result<ExitCode> {
    let events = lease.events()?;
    let attachment = match answer {
        Answer::WhenEnded => {
            let importer = Arc::new(InheritingProgram(program.to_owned()));
            let options = AttachOptions::new(Trust::Unverified).with_paths(&[Path::Peer]);
            Some(lease.attach(importer, options)?)
        }
        Answer::AtOnce => None,
    };
    let mut use_of = UseOf::begin(attachment.as_ref())?;
    let mut signals = EndingSignals::register()?;
    let mut child = start(&lease, program, arguments)?;
    let pid = Pid::from_child(&child);
    let pidfd =
        pidfd_open(pid, PidfdFlags::empty()).map_err(|errno| Error::os("wait for a program", errno))?;
    let status = loop {
        let mut fds =
            vec![PollFd::new(&pidfd, PollFlags::IN), PollFd::from_borrowed_fd(events.as_fd(), PollFlags::IN)];
        fds.extend(signals.descriptors().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(Error::os("wait for a program", errno).into()),
        }
        drop(fds);
        if signals.take_terminated() {
            // It may have ended just now.
            let _ = pidfd_send_signal(&pidfd, Signal::TERM);
        }
        while let Some(event) = events.try_next() {
            use_of.follow(&event);
            // What was called off because the program is late, of a lease that is over, is tried again.
            if !matches!(event.kind, EventKind::CalledOff) || use_of.goes_on() {
                note!("peervram: lease {}: {}", lease.number(), in_words(&event, answer));
            }
        }
        if let Some(status) = child.try_wait().context("cannot wait for the program")? {
            break status;
        }
    };
    use_of.end();
    drop(use_of);
    drop(attachment);
    match lease.give_back(RETURN_LIMIT) {
        Ok(()) => {}
        // It was over before: an event has said why.
        Err(error) if matches!(error.kind(), Kind::Gone | Kind::NotFound) => {}
        Err(error) => note!("peervram: {error}"),
    }
    Ok(exit_code(status))
}

/// Starts the program with a descriptor of the dma-buf of its own.
fn start(lease: &Lease, program: &str, arguments: &[String]) -> anyhow::Result<Child> {
    let dma_buf = lease.dma_buf().map_err(Error::clone)?;
    let (mut command, _inherited) = child::inheriting(dma_buf, program, arguments)?;
    command.spawn().with_context(|| format!("cannot start {program}"))
}

/// As a shell has it.
fn exit_code(status: ExitStatus) -> ExitCode {
    match (status.code(), status.signal()) {
        (Some(code), _) => ExitCode::from(code as u8),
        (None, Some(signal)) => ExitCode::from(128_u8.saturating_add(signal as u8)),
        (None, None) => ExitCode::FAILURE,
    }
}

fn in_words(event: &Event, answer: Answer) -> String {
    match &event.kind {
        EventKind::Draining { cause, deadline } => {
            let left_ms = deadline.saturating_duration_since(Instant::now()).as_millis();
            match answer {
                Answer::WhenEnded => format!("draining: {cause}; the program has {left_ms} ms to end"),
                Answer::AtOnce => format!("draining: {cause}; the broker is answered at once"),
            }
        }
        EventKind::Late { .. } => "late: the program has not ended in time".into(),
        EventKind::CalledOff => "called-off: nothing was taken back".into(),
        EventKind::Revoked { cause } => format!("revoked: taken back, and away: {cause}"),
        EventKind::Restored => {
            format!("restored: there again, of generation {}, its content unknown", event.generation)
        }
        EventKind::Gone => "gone: the lease is over, and the descriptor is worth nothing".into(),
        other => other.code().into(),
    }
}

/// Whoever inherits the descriptor. What it does with it nobody here knows, so that the kernel might wait for it.
struct InheritingProgram(String);

impl Importer for InheritingProgram {
    type Memory = ();

    fn name(&self) -> String {
        self.0.clone()
    }

    fn on_revoke(&self) -> OnRevoke {
        OnRevoke::FreeBefore
    }

    fn governed_by_p2pdma(&self) -> bool {
        false
    }

    fn import(&self, _: &DmaBuf) -> Result<()> {
        Ok(())
    }

    fn release(&self, (): ()) -> Result<()> {
        Ok(())
    }
}

/// The program's use of the memory: an access that lasts as long as the program, so that a revoke waits for it.
struct UseOf<'a> {
    attachment: Option<&'a Attachment<InheritingProgram>>,
    access: Option<Access<'a, InheritingProgram>>,
}

impl<'a> UseOf<'a> {
    fn begin(attachment: Option<&'a Attachment<InheritingProgram>>) -> Result<Self> {
        let access = attachment.map(|attachment| attachment.enter(Direction::Both)).transpose()?;
        Ok(Self { attachment, access })
    }

    /// Whether the program may go on as before.
    fn goes_on(&self) -> bool {
        self.attachment.is_none() || self.access.is_some()
    }

    /// After a revoke that did not wait, the program has the memory of another generation. A lease that is over is not
    /// held on to.
    fn follow(&mut self, event: &Event) {
        let Some(attachment) = self.attachment else { return };
        match event.kind {
            EventKind::Revoked { .. } | EventKind::Gone => self.end(),
            EventKind::CalledOff => {
                // Before the other one ends, so that the program is inside all the time. Refused where the lease is over.
                let access = attachment.enter(Direction::Both).ok();
                self.end();
                self.access = access;
            }
            EventKind::Restored => {
                self.end();
                let entered = attachment.current().and_then(|_| Ok(attachment.enter(Direction::Both)?));
                match entered {
                    Ok(access) => self.access = Some(access),
                    // It is being taken back once more, and told.
                    Err(error) => tracing::debug!(%error, "the program is not waited for"),
                }
            }
            _ => {}
        }
    }

    /// Whether bytes were torn only the program could say.
    fn end(&mut self) {
        if let Some(access) = self.access.take() {
            let _ = access.finish();
        }
    }
}
