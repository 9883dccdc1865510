//! Scrubbing: memory holds zeros before it is lent, so that nobody reads what somebody else left.
//!
//! By the owner's engine where it has one, else by this process's CPU through the memory's window. Both while the memory
//! is entered: a revoke waits for a piece, and what was taken back in the middle is not scrubbed.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use peervram_backends::host::HostMemory;
use peervram_backends::{
    DmaBuf, DmaRanges, Engine, Error, Exporter as _, HostSlice, Importer, Kind, Mapping, OnRevoke,
};

use super::inbox::{Inbox, Notice};
use super::offer::Offer;
use super::space::Piece;
use crate::sync::{self, Thread};
use crate::{AttachOptions, Direction, Export, Outcome, Path, Result, Trust};

/// What is written in one access.
const PIECE_BYTES: usize = 1 << 20;
/// How long the owner's engine may take for one piece.
const PIECE_TIMEOUT: Duration = Duration::from_secs(5);
/// How much is read back at either end of a piece: memory that swallows what is written is not lent.
const LOOK_BYTES: usize = 8;

/// A thread that scrubs what it is told to, one range after the other. Dropping this ends it, and waits until it has let go of
/// its lender: for the access that it is in.
#[derive(Debug)]
pub(super) struct Scrubber {
    /// None once it is to end.
    orders: Option<Sender<Order>>,
    is_over: Arc<AtomicBool>,
    ended: Receiver<()>,
}

/// A piece of an offer, and the number of its memory.
type Order = (usize, Arc<Offer>, Piece);

impl Scrubber {
    /// A thread that tells `inbox` what it did.
    ///
    /// # Errors
    /// No thread could be started.
    pub fn start(inbox: &Arc<Inbox>) -> Result<Self> {
        let (orders, receiver) = channel();
        let (tell, ended) = channel();
        let (inbox, is_over) = (Arc::clone(inbox), Arc::new(AtomicBool::new(false)));
        let over = Arc::clone(&is_over);
        let scrub = move || {
            run(&receiver, &inbox, &over);
            drop(receiver);
            let _ = tell.send(());
        };
        sync::start(Thread::Scrub, scrub).map_err(|error| Error::os("start a thread that scrubs", error))?;
        Ok(Self { orders: Some(orders), is_over, ended })
    }

    /// Has `piece` of an offer scrubbed. What comes of it is told as of `memory`.
    pub fn scrub(&self, memory: usize, offer: &Arc<Offer>, piece: Piece) {
        // The thread listens for as long as this lives.
        if let Some(orders) = &self.orders {
            let _ = orders.send((memory, Arc::clone(offer), piece));
        }
    }
}

impl Drop for Scrubber {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Release);
        drop(self.orders.take());
        let _ = self.ended.recv();
    }
}

fn run(receiver: &Receiver<Order>, inbox: &Inbox, is_over: &AtomicBool) {
    while let Ok((memory, offer, piece)) = receiver.recv() {
        if is_over.load(Ordering::Acquire) {
            return;
        }
        let scrubbed = offer.export(&[piece.range]).and_then(|export| scrub(&export, is_over));
        if let Err(error) = &scrubbed
            && error.kind() != Kind::Gone
        {
            tracing::warn!(memory = offer.name, range = ?piece.range, %error, "memory is not scrubbed, and not lent");
        }
        inbox.tell(Notice::Scrubbed(memory, piece, scrubbed));
    }
}

/// Fills what is exported with zeros.
///
/// # Errors
/// It was taken back meanwhile, the broker ends, or what mapping it or the owner's engine says.
fn scrub(export: &Export, is_over: &AtomicBool) -> Result<()> {
    let options =
        AttachOptions::new(Trust::Unverified).with_paths(&[Path::HostPointer]).with_label("scrubbing");
    let attachment = export.attach(Arc::new(Cpu), options)?;
    let size_bytes = export.size_bytes();
    for at in (0..size_bytes).step_by(PIECE_BYTES) {
        if is_over.load(Ordering::Acquire) {
            return Err(Error::new(Kind::Gone, "scrub memory", "the broker ends"));
        }
        let length = PIECE_BYTES.min((size_bytes - at) as usize);
        let access = attachment.enter(Direction::Write)?;
        let owner = export.aperture().owner();
        match owner.and_then(|owner| owner.engine()) {
            Some(engine) => by_engine(engine, export.aperture().ranges(), at, length)?,
            None => by_cpu(access.memory(), at, length)?,
        }
        if let Outcome::Torn { .. } = access.finish() {
            let why = "it was taken back in the middle";
            return Err(Error::new(Kind::Revoked, "scrub memory", why));
        }
    }
    attachment.detach()
}

fn by_engine(engine: &dyn Engine<DmaRanges>, ranges: &DmaRanges, at: u64, length: usize) -> Result<()> {
    static ZEROS: LazyLock<Result<Arc<Mapping>>> = LazyLock::new(|| {
        let memory = HostMemory::new(PIECE_BYTES as u64)?;
        memory.map(&DmaRanges::whole(memory.region())?)
    });
    let zeros = HostSlice::new(ZEROS.clone()?, 0, length)?;
    engine.write(ranges, at, &zeros, Instant::now() + PIECE_TIMEOUT)
}

fn by_cpu(memory: &Mapping, at: u64, length: usize) -> Result<()> {
    let at = at as usize;
    memory.write(at, &vec![0; length])?;
    let mut seen = [1; LOOK_BYTES];
    for place in [at, at + length - LOOK_BYTES] {
        memory.read(place, &mut seen)?;
        if seen != [0; LOOK_BYTES] {
            let why = format!("it shows {seen:02x?} where zeros were written");
            return Err(Error::new(Kind::Unverified, "scrub memory", why)
                .next("look at the device: peervram doctor; what it does not keep cannot be lent"));
        }
    }
    Ok(())
}

/// This process's CPU.
struct Cpu;

impl Importer for Cpu {
    type Memory = Arc<Mapping>;

    fn name(&self) -> String {
        "the broker's CPU".into()
    }

    fn on_revoke(&self) -> OnRevoke {
        OnRevoke::Reimport
    }

    fn governed_by_p2pdma(&self) -> bool {
        false
    }

    fn import(&self, _: &DmaBuf) -> Result<Arc<Mapping>> {
        Err(Error::new(Kind::Unsupported, "import a dma-buf", "a CPU maps memory").on(self.name()))
    }

    fn import_host_pointer(&self, mapping: Arc<Mapping>) -> Result<Arc<Mapping>> {
        Ok(mapping)
    }

    fn release(&self, _: Arc<Mapping>) -> Result<()> {
        Ok(())
    }
}
