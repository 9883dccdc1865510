//! Lending to other processes: a lease against a bare descriptor over the same kind of socket, and what a client does
//! against the same done by the process that owns the device.
//!
//! Broker and clients are threads of one process, so that both sides of a ratio have the same scheduler; what crosses
//! the socket is the same as between processes. The importer does nothing: what is measured is the way to it.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use peervram::backends::host::HostPool;
use peervram::backends::{Aperture, DmaRange, DmaRanges, Exporter, RawBytes, vfio};
use peervram::broker::{Broker, Offer, Policy, client};
use peervram::{Attachment, Direction, Export, Lender, RevokeCause, RevokeOptions, Trust};
use peervram_programs::Samples;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};

use crate::access::Nothing;
use crate::machine::Participants;
use crate::report::{Report, Round, Unit};

/// What a lease may cost more than a bare descriptor.
const LEASE_LIMIT: f64 = 1.5;
/// What an access of a client may cost more than one of the owner's process: no message crosses for it.
const ACCESS_LIMIT: f64 = 1.05;
/// What a revoke may cost more with clients than with as many attachments of the owner's process.
const REVOKE_LIMIT: f64 = 1.3;
/// What a lease may cost the last of many clients more than the first.
const MANY_LIMIT: f64 = 1.5;

/// How many clients there are in a revoke.
const COUNTS: [usize; 3] = [1, 8, 64];
/// How many clients have a lease each, and how many of them are the first and the last.
const MANY: usize = 1000;
const SOME: usize = 100;
/// Accesses between two looks at the clock.
const ACCESSES: usize = 1000;
/// Revokes of each way in a round.
const TURNS: usize = 6;
const LEASE_BYTES: u64 = 64 << 10;
const PATIENCE: Duration = Duration::from_secs(10);

/// Adds the broker to `report`.
pub fn measure(machine: &Participants, report: &mut Report) -> Result<()> {
    match machine {
        Participants::Host => {
            let lender = Arc::new(Lender::new(HostPool::new(MANY as u64 * 2 * LEASE_BYTES)?));
            measure_lender(&lender, 0, report, |lender, options| {
                lender.revoke(RevokeCause::Reset, "reset a stand-in", options, |_| Ok(()))
            })
        }
        Participants::Vfio { address, region, .. } => {
            let lender = Arc::new(Lender::new(vfio::Device::open(*address)?));
            measure_lender(&lender, *region, report, |lender, options| lender.reset(options))
        }
    }
}

fn measure_lender<E: Exporter + 'static>(
    lender: &Arc<Lender<E>>,
    region: u32,
    report: &mut Report,
    reset: impl Fn(&Lender<E>, RevokeOptions) -> peervram::Result<()> + Send + Sync + Clone + 'static,
) -> Result<()> {
    let folder = Folder::new()?;
    let socket = folder.0.join("broker");
    let ranges = DmaRanges::whole(lender.device().region(region)?)?;
    let aperture = Aperture::owned(ranges, Arc::new(RawBytes));
    let offer = Offer::with_reset("memory", lender, aperture, reset.clone())?;
    let broker = Broker::serve(Broker::listen(&socket)?, vec![offer], Policy::owner_only())?;
    leases(&socket, report)?;
    accesses(lender, region, &socket, report)?;
    for count in COUNTS {
        revokes(lender, region, &socket, count, &reset, report)?;
    }
    many(&socket, report)?;
    broker.close();
    Ok(())
}

/// A folder for the socket, removed at the end.
struct Folder(std::path::PathBuf);

impl Folder {
    fn new() -> Result<Self> {
        let path = std::env::temp_dir().join(format!("peervram-bench-{}", std::process::id()));
        std::fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // What stays is an empty folder of the temporary ones.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn wish() -> client::Wish {
    client::Wish::of_size(LEASE_BYTES)
}

/// Borrowing and giving back, against two messages of the same sizes each way, with a descriptor beside one of them.
fn leases(socket: &Path, report: &mut Report) -> Result<()> {
    let client = client::Broker::connect(socket)?;
    let bare = Bare::start()?;
    let mut rounds = Vec::new();
    // The first round warms up.
    for round in 0..=report.rounds {
        peervram_programs::note!("leases: round {round} of {}", report.rounds);
        let (mut ours, mut theirs) = (Samples::default(), Samples::default());
        for _ in 0..report.cycles {
            ours.time(|| client.borrow(wish())?.give_back(PATIENCE))?;
            theirs.time(|| bare.turn())?;
        }
        if round > 0 {
            rounds.push(Round { ours: ours.median(), theirs: theirs.median() });
        }
    }
    report.row("borrow and give back", "a bare descriptor", Unit::Ns, rounds, Some(LEASE_LIMIT));
    Ok(())
}

/// As long as the messages of a lease.
const CALLS: [&[u8]; 2] = [
    b"{\"method\":\"io.peervram.Broker.Borrow\",\"parameters\":{\"size\":65536}}\0",
    b"{\"method\":\"io.peervram.Broker.Return\",\"parameters\":{\"lease\":12345}}\0",
];
const REPLIES: [&[u8]; 2] = [
    b"{\"parameters\":{\"lease\":12345,\"memory\":\"memory\",\"device\":\"host memory\",\"pci_address\":null,\"region\":0,\
\"region_size\":131072000,\"ranges\":[{\"offset\":0,\"length\":65536}],\"size\":65536,\"direction\":\"both\",\
\"generation\":0,\"dma_buf\":0}}\0",
    b"{\"parameters\":{}}\0",
];

/// Somebody who answers with a descriptor, and with nothing else.
struct Bare(OwnedFd);

impl Bare {
    fn start() -> Result<Self> {
        let (near, far) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        let file = rustix::fs::memfd_create("bare", rustix::fs::MemfdFlags::CLOEXEC)?;
        std::thread::spawn(move || {
            let mut turn = 0;
            while receive(&far, CALLS[turn].len()).is_ok() {
                let descriptor = (turn == 0).then_some(&file);
                if send(&far, REPLIES[turn], descriptor).is_err() {
                    return;
                }
                turn = 1 - turn;
            }
        });
        Ok(Self(near))
    }

    fn turn(&self) -> Result<()> {
        for turn in 0..2 {
            send(&self.0, CALLS[turn], None)?;
            let descriptor = receive(&self.0, REPLIES[turn].len())?;
            ensure!(descriptor.is_some() == (turn == 0), "the descriptor is lost");
        }
        Ok(())
    }
}

fn send(socket: &OwnedFd, bytes: &[u8], descriptor: Option<&OwnedFd>) -> Result<()> {
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let descriptors: Vec<_> = descriptor.iter().map(|descriptor| descriptor.as_fd()).collect();
    if !descriptors.is_empty() {
        ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
    }
    let sent = sendmsg(socket, &[std::io::IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL)?;
    ensure!(sent == bytes.len(), "the socket has no room");
    Ok(())
}

/// Receives that many bytes, and the descriptor among them.
fn receive(socket: &OwnedFd, mut bytes: usize) -> Result<Option<OwnedFd>> {
    let (mut buffer, mut descriptor) = ([0; 4096], None);
    while bytes > 0 {
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let into = &mut [std::io::IoSliceMut::new(&mut buffer[..bytes])];
        let received = recvmsg(socket, into, &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
        ensure!(received.bytes > 0, "the other end is closed");
        bytes -= received.bytes;
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(mut descriptors) = message {
                descriptor = descriptors.next();
            }
        }
    }
    Ok(descriptor)
}

/// Entering and finishing, of a client against the owner's process.
fn accesses<E: Exporter + 'static>(
    lender: &Lender<E>,
    region: u32,
    socket: &Path,
    report: &mut Report,
) -> Result<()> {
    let lease = client::Broker::connect(socket)?.borrow(wish())?;
    let export = export(lender, region, 0)?;
    let theirs_by = export.attach(Arc::new(Nothing), Trust::Unverified)?;
    let ours_by = lease.attach(Arc::new(Nothing), Trust::Unverified)?;
    let mut rounds = Vec::new();
    for round in 0..=report.rounds {
        let (mut ours, mut theirs) = (Samples::default(), Samples::default());
        for _ in 0..report.cycles.div_ceil(20) {
            ours.time(|| enter_often(&ours_by))?;
            theirs.time(|| enter_often(&theirs_by))?;
        }
        if round > 0 {
            let each = ACCESSES as f64;
            rounds.push(Round { ours: ours.median() / each, theirs: theirs.median() / each });
        }
    }
    report.row(
        "enter and finish in a client",
        "in the owner's process",
        Unit::Ns,
        rounds,
        Some(ACCESS_LIMIT),
    );
    drop((ours_by, theirs_by));
    lease.give_back(PATIENCE)?;
    export.close()?;
    Ok(())
}

fn enter_often(attachment: &Attachment<Nothing>) -> Result<()> {
    for _ in 0..ACCESSES {
        attachment.enter(Direction::Both)?.finish().check()?;
    }
    Ok(())
}

/// Memory of the owner's that the broker does not lend at the same time: it is only imported.
fn export<E: Exporter + 'static>(lender: &Lender<E>, region: u32, at: u64) -> Result<Export> {
    let ranges = [DmaRange::new(at * LEASE_BYTES, LEASE_BYTES)];
    let ranges = DmaRanges::new(lender.device().region(region)?, &ranges)?;
    Ok(lender.export(Aperture::owned(ranges, Arc::new(RawBytes)))?)
}

/// Taking back what `count` clients have, against as many attachments of the owner's process.
fn revokes<E: Exporter + 'static>(
    lender: &Lender<E>,
    region: u32,
    socket: &Path,
    count: usize,
    reset: &impl Fn(&Lender<E>, RevokeOptions) -> peervram::Result<()>,
    report: &mut Report,
) -> Result<()> {
    let mut rounds = Vec::new();
    for round in 0..=report.rounds {
        peervram_programs::note!("revoke of {count} clients: round {round} of {}", report.rounds);
        let (mut ours, mut theirs) = (Samples::default(), Samples::default());
        for turn in 0..TURNS {
            for by_clients in [turn % 2 == 0, turn % 2 != 0] {
                if by_clients {
                    let leases = (0..count)
                        .map(|_| client::Broker::connect(socket)?.borrow(wish()))
                        .collect::<peervram::Result<Vec<_>>>()?;
                    let attachments = leases
                        .iter()
                        .map(|lease| lease.attach(Arc::new(Nothing), Trust::Unverified))
                        .collect::<Result<Vec<_>, _>>()?;
                    ours.time(|| reset(lender, RevokeOptions::within(PATIENCE)))?;
                    drop(attachments);
                    leases.into_iter().try_for_each(|lease| lease.give_back(PATIENCE))?;
                } else {
                    let exports =
                        (0..count as u64).map(|at| export(lender, region, at)).collect::<Result<Vec<_>>>()?;
                    let attachments = exports
                        .iter()
                        .map(|export| export.attach(Arc::new(Nothing), Trust::Unverified))
                        .collect::<Result<Vec<_>, _>>()?;
                    theirs.time(|| reset(lender, RevokeOptions::within(PATIENCE)))?;
                    drop(attachments);
                    for export in exports {
                        export.close()?;
                    }
                }
            }
        }
        if round > 0 {
            rounds.push(Round { ours: ours.median(), theirs: theirs.median() });
        }
    }
    let what = format!("revoke with {count} client(s)");
    report.row(what, "as many attachments of the owner's process", Unit::Ns, rounds, Some(REVOKE_LIMIT));
    Ok(())
}

/// A lease for each of many clients: the last against the first.
fn many(socket: &Path, report: &mut Report) -> Result<()> {
    let client = client::Broker::connect(socket)?;
    let lent = client.list()?;
    if lent.first().is_none_or(|memory| memory.largest_free < MANY as u64 * LEASE_BYTES) {
        report.skip(
            "many clients",
            format!("a lease for each of {MANY} takes more memory than the lender has"),
        );
        return Ok(());
    }
    let mut limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    // Both ends of two sockets, and two descriptors of the memory.
    if limit.maximum.is_some_and(|maximum| maximum < 8 * MANY as u64) {
        report.skip("many clients", "this process may not open enough descriptors (ulimit -Hn)");
        return Ok(());
    }
    limit.current = limit.maximum;
    rustix::process::setrlimit(rustix::process::Resource::Nofile, limit)?;
    let mut rounds = Vec::new();
    for round in 0..=report.rounds.min(5) {
        peervram_programs::note!("{MANY} clients: round {round} of {}", report.rounds.min(5));
        let clients =
            (0..MANY).map(|_| client::Broker::connect(socket)).collect::<peervram::Result<Vec<_>>>()?;
        let (mut first, mut last, mut leases) = (Samples::default(), Samples::default(), Vec::new());
        for (number, client) in clients.iter().enumerate() {
            let begun = std::time::Instant::now();
            leases.push(client.borrow(wish())?);
            let took = begun.elapsed().as_nanos() as f64;
            match number {
                _ if number < SOME => first.push(took),
                _ if number >= MANY - SOME => last.push(took),
                _ => {}
            }
        }
        leases.into_iter().try_for_each(|lease| lease.give_back(PATIENCE))?;
        if round > 0 {
            rounds.push(Round { ours: last.median(), theirs: first.median() });
        }
    }
    let what = format!("a lease for the last {SOME} of {MANY} clients");
    report.row(what, "for the first", Unit::Ns, rounds, Some(MANY_LIMIT));
    Ok(())
}
