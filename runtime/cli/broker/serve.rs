//! `peervram serve`: lend memory to other processes.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use peervram::backends::host::{Backing, HostPool};
use peervram::backends::{Aperture, DmaRange, DmaRanges, PciAddress, RawBytes};
use peervram::broker::{Broker, Offer, Policy, client};
use peervram::{Error, Kind, Lender, Result, RevokeCause, RevokeOptions};
use peervram_programs::{bytes, note};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit, setrlimit};
use serde::Serialize;

use super::allowed::Allowed;
use super::ending_signals::EndingSignals;
use super::plan::{Plan, PlannedMemory, Source};
use super::service::{ServiceManager, inherited_socket, watchdog_interval};
use super::{own_socket, users};
use crate::arguments::{MemoryArguments, parse_bytes, ranges_of};
use crate::opened::Opened;

const TRIED: &str = "serve a broker";
/// How long clients may take to finish what they have in flight when this ends.
const END_TIMEOUT: Duration = Duration::from_secs(1);

/// Lend memory to other processes, of other users, too.
///
/// A VFIO device opens once. This opens it, and lends parts of its memory over a Unix socket to whom --allow names:
/// `peervram borrow`, applications with peervram::broker::client, and whoever speaks the Varlink interface
/// io.peervram.Broker. They are told before the memory is taken back. Root and the user of this process may do
/// everything, everybody else nothing that is not allowed.
///
/// Opening a device resets it. Without a device, host memory stands in. Several devices with parts of each, names and
/// alignments are for --config. It ends on SIGINT and SIGTERM: clients have a second to
/// finish what they have in flight, then leases end, and so does the use of the device.
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    peervram serve --host 256M --allow everybody                          host memory, to try it out\n  \
    peervram serve 01:00.0 --region 2 --range 0+256M --allow user:alice   a part of a GPU's memory\n  \
    peervram serve 01:00.0 02:00.0 --allow group:render,bytes=1G,leases=4\n  \
    peervram serve --config /etc/peervram/broker.toml                     as the unit does\n\n\
--allow takes, after user:NAME, group:NAME or everybody: bytes=SIZE and leases=N (of each user, at a time),\n\
memory=NAME (several are several), network-card, operator.")]
pub struct Arguments {
    /// The devices, by PCI address. Each must be bound to vfio-pci, or to nvgrace_gpu_vfio_pci.
    #[arg(value_name = "DEVICE")]
    devices: Vec<PciAddress>,

    #[command(flatten)]
    memory: MemoryArguments,

    /// Lend that much host memory, under the name `host`: where no device is named, 1G of it is lent without this.
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    host: Option<u64>,

    /// Who may borrow, and how much.
    #[arg(long = "allow", value_name = "WHO")]
    allowed: Vec<Allowed>,

    /// Do what this TOML file says.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["devices", "region", "ranges", "host", "allowed"])]
    config: Option<PathBuf>,

    /// Where to listen. Without it $XDG_RUNTIME_DIR/peervram/broker, or /run/peervram/broker for root; a socket that
    /// the service manager passes on comes first.
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
}

/// What is lent, to whom, and where.
#[derive(Serialize)]
struct Report<'a> {
    /// None where the service manager passed on a socket without a name.
    socket: Option<PathBuf>,
    memories: Vec<MemoryReport>,
    allowed: &'a [Allowed],
}

#[derive(Serialize)]
struct MemoryReport {
    name: String,
    device: String,
    region: u32,
    ranges: usize,
    size_bytes: u64,
    /// What its dma-bufs are made of, where it is host memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    backing: Option<&'static str>,
}

pub fn run(arguments: &Arguments, json: bool) -> anyhow::Result<ExitCode> {
    let plan = plan(arguments)?;
    raise_descriptor_limit();
    // Before a device is opened, which resets it.
    let (listener, socket, made) = listen(arguments.socket.clone().or_else(|| plan.socket.clone()))?;
    let mut signals = EndingSignals::register()?;
    let manager = ServiceManager::of_environment()?;

    let (offers, memories) = offers(&plan.memories)?;
    let policy = plan.allowed.iter().fold(Policy::owner_only(), |policy, allowed| policy.and(allowed.rule()));
    let broker = Broker::serve(listener, offers, policy)?;
    let report = Report { socket: socket.clone(), memories, allowed: &plan.allowed };
    if json {
        writeln!(peervram_programs::output(), "{}", serde_json::to_string(&report)?)?;
    } else {
        print(&report, &mut peervram_programs::output())?;
    }
    peervram_programs::output().flush()?;
    manager.tell("READY=1");
    let manager = Arc::new(manager);
    if let (Some(interval), Some(path)) = (watchdog_interval(), socket) {
        watch(&manager, interval, path)?;
    }

    wait_for(&mut signals)?;
    manager.tell("STOPPING=1");
    tracing::info!("the broker ends");
    // First, so that nobody waits for a broker that does not answer any more.
    drop(made);
    if let Err(late) = broker.close_within(RevokeOptions::within(END_TIMEOUT).or_go_on()) {
        let (broker, error) = late.into_parts();
        note!("peervram: {error}");
        broker.close();
    }
    Ok(ExitCode::SUCCESS)
}

/// What the command line or its file says.
fn plan(arguments: &Arguments) -> Result<Plan> {
    if let Some(path) = &arguments.config {
        return Plan::of_file(path)?.checked();
    }
    if let (Some(option), count) = (arguments.memory.given(), arguments.devices.len())
        && count != 1
    {
        let why = format!("{option} is about one device, and {count} are named");
        let next = "name one, or say it of each in a file: --config";
        return Err(Error::new(Kind::InvalidInput, TRIED, why).next(next));
    }
    let (region, ranges) = arguments.memory.asked();
    let device = |address: &PciAddress| PlannedMemory {
        name: None,
        source: Source::Device { address: *address, region, ranges: ranges.clone() },
        alignment_bytes: None,
    };
    let host = |bytes| PlannedMemory { name: None, source: Source::Host(bytes), alignment_bytes: None };
    let memories = arguments.devices.iter().map(device).chain(arguments.host.map(host)).collect();
    Plan { socket: None, memories, allowed: arguments.allowed.clone() }.checked()
}

/// Each client has two connections, and each lease a dma-buf.
fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum
        && let Err(errno) =
            setrlimit(Resource::Nofile, rustix::process::Rlimit { current: limit.maximum, ..limit })
    {
        tracing::warn!(%errno, "the limit of open descriptors stays at {:?}", limit.current);
    }
}

/// A socket that this process has made, removed when this is dropped, unless another one is there by then.
struct MadeSocket {
    path: PathBuf,
    inode: u64,
}

impl Drop for MadeSocket {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|file| file.ino() == self.inode) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Listens: at the service manager's socket, at `path`, or at the usual place.
fn listen(path: Option<PathBuf>) -> Result<(OwnedFd, Option<PathBuf>, Option<MadeSocket>)> {
    if let Some(listener) = inherited_socket()? {
        let address = rustix::net::getsockname(&listener).ok();
        let address = address.and_then(|address| rustix::net::SocketAddrUnix::try_from(address).ok());
        let path = address.and_then(|address| Some(PathBuf::from(address.path()?.to_str().ok()?)));
        return Ok((listener, path, None));
    }
    let path = match path {
        Some(path) => path,
        None => {
            let path = own_socket()?;
            let folder = path.parent().unwrap_or(Path::new("/"));
            let made = DirBuilder::new().recursive(true).mode(0o755).create(folder);
            made.map_err(|error| Error::os("make a folder for the socket", error).on(folder.display()))?;
            path
        }
    };
    let listener = Broker::listen(&path).map_err(|error| match error.next_step() {
        Some(_) => error,
        None => error.next("its folder must be there, and yours to write to; or name another: --socket PATH"),
    })?;
    let inode = fs::symlink_metadata(&path).map_or(0, |file| file.ino());
    Ok((listener, Some(path.clone()), Some(MadeSocket { path, inode })))
}

/// Opens what is to be lent, each device once.
fn offers(memories: &[PlannedMemory]) -> Result<(Vec<Offer>, Vec<MemoryReport>)> {
    let mut devices: BTreeMap<PciAddress, (Opened, Vec<DmaRanges>)> = BTreeMap::new();
    for memory in memories {
        let Source::Device { address, region, ranges } = &memory.source else { continue };
        if !devices.contains_key(address) {
            devices.insert(*address, (crate::reset::open(*address)?, Vec::new()));
        }
        if let Some((device, lent)) = devices.get_mut(address) {
            let ranges = ranges_of(device, *region, ranges)?;
            check_lent_once(lent, &ranges).map_err(|error| error.on(address))?;
            lent.push(ranges);
        }
    }
    let of_device = |(address, (device, lent)): (_, (_, Vec<DmaRanges>))| {
        (address, (Arc::new(Lender::new(device)), lent.into_iter()))
    };
    let mut devices: BTreeMap<_, _> = devices.into_iter().map(of_device).collect();
    let mut lent = Vec::new();
    for memory in memories {
        let name = memory.name();
        let (offer, report) = match &memory.source {
            Source::Host(size_bytes) => host(&name, *size_bytes)?,
            // Each memory of a device has had its ranges found above, in this order.
            Source::Device { address, .. } => {
                let Some((lender, ranges)) = devices.get_mut(address) else { continue };
                let Some(ranges) = ranges.next() else { continue };
                let report = MemoryReport::new(&name, address.to_string(), &ranges, None);
                let reset = |lender: &Lender<Opened>, options: RevokeOptions| lender.reset(options);
                (
                    Offer::with_reset(&name, lender, Aperture::owned(ranges, Arc::new(RawBytes)), reset)?,
                    report,
                )
            }
        };
        let offer = match memory.alignment_bytes {
            Some(alignment_bytes) => offer.with_alignment(alignment_bytes)?,
            None => offer,
        };
        lent.push((offer, report));
    }
    Ok(lent.into_iter().unzip())
}

/// Host memory, each lease its own.
fn host(name: &str, size_bytes: u64) -> Result<(Offer, MemoryReport)> {
    let pool = HostPool::new(size_bytes)?;
    let backing = match pool.backing() {
        Backing::Udmabuf => "udmabuf",
        _ => "memfd",
    };
    let ranges = DmaRanges::whole(pool.region())?;
    let report = MemoryReport::new(name, "host memory".into(), &ranges, Some(backing));
    let reset = |lender: &Lender<HostPool>, options: RevokeOptions| {
        lender.revoke(RevokeCause::Reset, "reset host memory", options, |_| Ok(()))
    };
    let lender = Arc::new(Lender::new(pool));
    Ok((Offer::with_reset(name, &lender, Aperture::owned(ranges, Arc::new(RawBytes)), reset)?, report))
}

/// Two memories that share a byte would have it lent to two clients.
fn check_lent_once(lent: &[DmaRanges], ranges: &DmaRanges) -> Result<()> {
    let of_region = lent.iter().filter(|other| other.region_index() == ranges.region_index());
    let others: Vec<&DmaRange> = of_region.flat_map(|other| other.as_slice()).collect();
    let end = |range: &DmaRange| range.offset_bytes + range.length_bytes;
    let is_shared = |range: &&DmaRange| {
        others.iter().any(|other| range.offset_bytes < end(other) && other.offset_bytes < end(range))
    };
    match ranges.as_slice().iter().find(is_shared) {
        None => Ok(()),
        Some(range) => {
            let (offset, length) = (range.offset_bytes, bytes::in_words(range.length_bytes));
            let why = format!("{offset:#x}+{length} of region {} is in two memories", ranges.region_index());
            Err(Error::new(Kind::InvalidInput, TRIED, why).next("give each memory ranges of its own"))
        }
    }
}

/// Tells the service manager, as long as the broker answers, that it is alive. Whoever asks is a client as any other:
/// a broker that hangs leaves it waiting, and the service manager ends it.
fn watch(manager: &Arc<ServiceManager>, interval: Duration, path: PathBuf) -> Result<()> {
    let client = client::Broker::connect(&path)?;
    let manager = Arc::clone(manager);
    let watch = move || {
        while client.list().is_ok() {
            manager.tell("WATCHDOG=1");
            std::thread::sleep(interval);
        }
    };
    let thread = std::thread::Builder::new().name("peervram-watchdog".into()).spawn(watch);
    thread.map(drop).map_err(|error| Error::os("watch the broker", error))
}

fn wait_for(signals: &mut EndingSignals) -> Result<()> {
    loop {
        let mut fds = signals.descriptors().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
        match poll(&mut fds, None) {
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(Error::os("wait for signals", errno)),
        }
    }
}

impl MemoryReport {
    fn new(name: &str, device: String, ranges: &DmaRanges, backing: Option<&'static str>) -> Self {
        Self {
            name: name.to_owned(),
            device,
            region: ranges.region_index(),
            ranges: ranges.as_slice().len(),
            size_bytes: ranges.size_bytes(),
            backing,
        }
    }
}

fn print(report: &Report<'_>, output: &mut impl Write) -> io::Result<()> {
    match &report.socket {
        Some(path) => writeln!(output, "listens at  {}", path.display())?,
        None => writeln!(output, "listens at  a socket of the service manager")?,
    }
    for memory in &report.memories {
        let size = bytes::in_words(memory.size_bytes);
        match memory.backing {
            Some(backing) => {
                writeln!(output, "lends       {}: {size} of host memory, as {backing}s", memory.name)?
            }
            None => {
                let ranges = if memory.ranges == 1 { "" } else { " in several ranges" };
                let MemoryReport { name, region, device, .. } = memory;
                writeln!(output, "lends       {name}: {size} of region {region} of {device}{ranges}")?;
            }
        }
    }
    for allowed in report.allowed {
        writeln!(output, "to          {allowed}")?;
    }
    let own = rustix::process::geteuid();
    match own.is_root() {
        true => writeln!(output, "and to      root, who may do everything"),
        false => writeln!(
            output,
            "and to      root and {}, who may do everything",
            users::user_in_words(own.as_raw())
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_byte_is_in_two_memories() {
        let pool = HostPool::new(1 << 20).unwrap();
        let ranges = |ranges: &[(u64, u64)]| {
            let ranges: Vec<DmaRange> =
                ranges.iter().map(|(at, length)| DmaRange::new(*at, *length)).collect();
            DmaRanges::new(pool.region(), &ranges).unwrap()
        };
        let lent = [ranges(&[(0, 65536), (131072, 65536)])];
        check_lent_once(&lent, &ranges(&[(65536, 65536), (196608, 4096)])).unwrap();
        for shared in [&[(0, 4096)][..], &[(65536, 69632)], &[(262144, 4096), (192512, 8192)]] {
            let error = check_lent_once(&lent, &ranges(shared)).unwrap_err();
            assert_eq!(error.kind(), Kind::InvalidInput);
            assert!(error.to_string().contains("region 0 is in two memories"), "{error}");
        }
    }

    #[test]
    fn a_socket_that_another_has_made_since_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let (_listener, _, made) = listen(Some(path.clone())).unwrap();
        fs::rename(&path, folder.path().join("old")).unwrap();
        let _other = Broker::listen(&path).unwrap();
        drop(made);
        assert!(path.exists());
        fs::remove_file(&path).unwrap();
        let (_listener, _, made) = listen(Some(path.clone())).unwrap();
        drop(made);
        assert!(!path.exists());
    }
}
