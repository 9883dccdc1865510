//! The device: the state machine, its memory, its engines and the way to the client, put together.
//!
//! Order of calls: [`Device::new`], then as [`Served`] by a server and by [`crate::control`]; dropping
//! it ends its threads. Locks are taken in this order: gate, state, interrupts; the DMA space's own is
//! never held together with another.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::Instant;

use parking_lot::{Condvar, Mutex, RwLock};
use rustix::io::Errno;

use crate::configuration::{CONFIGURATION_BYTES, Identity};
use crate::dispatch::{Backend, CONFIGURATION_REGION, MSIX_IRQ, Region};
use crate::dma::DmaSpace;
use crate::engine::thread_name;
use crate::interrupts::Interrupts;
use crate::misbehaviour::Misbehaviour;
use crate::operation::EngineKind;
use crate::peer::Peer;
use crate::protocol::{DmaMap, DmaUnmap, IrqAction, SetIrqs};
use crate::registers::{BAR0_BYTES, ErrorCode, VECTORS};
use crate::request::Status;
use crate::server::Served;
use crate::state::{Now, State};
use crate::vram::Vram;

/// Why a device could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A size that a BAR cannot have.
    #[error(
        "{what} of {size_bytes} bytes: must be a power of two from {least_bytes} to {most_bytes} bytes; choose another size"
    )]
    Size {
        /// Which.
        what: &'static str,
        /// Asked for.
        size_bytes: u64,
        /// Smallest.
        least_bytes: u64,
        /// Largest.
        most_bytes: u64,
    },
    /// No memory.
    #[error(
        "{what} of {size_bytes} bytes could not be had: {errno}; choose a smaller size or look at the limits of memory files"
    )]
    Memory {
        /// Which.
        what: &'static str,
        /// Asked for.
        size_bytes: u64,
        /// Why not.
        errno: Errno,
    },
    /// The file for VRAM is of no use.
    #[error(
        "VRAM file {path}: {errno}; it must be readable, writable and at least {size_bytes} bytes long (truncate -s {size_bytes} FILE)"
    )]
    File {
        /// Which.
        path: PathBuf,
        /// Asked for.
        size_bytes: u64,
        /// Why not.
        errno: Errno,
    },
    /// No thread.
    #[error("an engine's thread could not be started: {0}; look at the limits of processes")]
    Thread(#[source] std::io::Error),
}

/// What engines and the server share.
#[derive(Debug)]
pub(crate) struct Shared {
    identity: Identity,
    pub(crate) state: Mutex<State>,
    /// Notified on every change of `state` that an engine may wait for.
    pub(crate) wake: Condvar,
    /// Held for reading by a store to VRAM, for writing by a reset.
    pub(crate) gate: RwLock<()>,
    pub(crate) vram: Vram,
    mirror: OnceLock<Vram>,
    /// What BAR2 shows where VRAM is behind no BAR.
    bar2: Option<Vram>,
    bar4: Option<Vram>,
    pub(crate) dma: DmaSpace,
    interrupts: Mutex<Interrupts>,
    pub(crate) stopping: AtomicBool,
    started: Instant,
}

impl Shared {
    pub(crate) fn now(&self) -> Now {
        self.started.elapsed()
    }

    /// Changes the state, wakes engines, raises interrupts.
    pub(crate) fn with_state<R>(&self, change: impl FnOnce(&mut State) -> R) -> R {
        let mut state = self.state.lock();
        let result = change(&mut state);
        let raised = state.take_interrupts();
        drop(state);
        self.wake.notify_all();
        if raised != 0 {
            let interrupts = self.interrupts.lock();
            (0..VECTORS)
                .filter(|vector| raised >> vector & 1 == 1)
                .for_each(|vector| interrupts.raise(vector));
        }
        result
    }

    /// Other memory of the size of VRAM; made when first wanted.
    pub(crate) fn mirror(&self) -> Result<&Vram, ErrorCode> {
        if let Some(mirror) = self.mirror.get() {
            return Ok(mirror);
        }
        let mirror = Vram::new("peervram-mirror", self.vram.size_bytes()).map_err(|_| ErrorCode::Internal)?;
        Ok(self.mirror.get_or_init(|| mirror))
    }

    /// A reset: afterwards nothing of before is stored to VRAM.
    fn reset(&self) {
        let _gate = self.gate.write();
        let now = self.now();
        let lost = self.with_state(|state| {
            state.reset(now);
            state.faults().vram_lost
        });
        if lost {
            for memory in std::iter::once(&self.vram).chain(self.mirror.get()) {
                if let Err(errno) = memory.clear() {
                    tracing::error!(%errno, "VRAM could not be cleared at reset; it keeps its contents");
                }
            }
        }
    }
}

/// A model GPU.
#[derive(Debug)]
pub struct Device {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Device {
    /// A device with its engines running. VRAM is a memory file of its own, or the file at
    /// `vram_file`.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn new(identity: Identity, vram_file: Option<&Path>) -> Result<Self, Error> {
        let mut device = Self::without_engines(identity, vram_file)?;
        for kind in [EngineKind::Copy, EngineKind::Draw] {
            let shared = Arc::clone(&device.shared);
            let thread = std::thread::Builder::new()
                .name(thread_name(kind).into_owned())
                .spawn(move || shared.run_engine(kind))
                .map_err(Error::Thread)?;
            device.threads.push(thread);
        }
        Ok(device)
    }

    /// A device that takes work and never does it: for tests and the fuzzer.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn without_engines(identity: Identity, vram_file: Option<&Path>) -> Result<Self, Error> {
        let Identity { vram_bytes, bar2_bytes, bar4_bytes, is_coherent, .. } = identity;
        // What no BAR shows may have any size.
        let shown_bytes = if is_coherent { vram_bytes.next_power_of_two() } else { vram_bytes };
        check_size("VRAM", shown_bytes, 16 << 20, 8 << 30)?;
        check_size("BAR2", bar2_bytes, 1 << 20, shown_bytes)?;
        let memory = |what, name, size_bytes| {
            Vram::new(name, size_bytes).map_err(|errno| Error::Memory { what, size_bytes, errno })
        };
        let vram = match vram_file {
            None => memory("VRAM", "peervram-vram", vram_bytes)?,
            Some(path) => Vram::open(path, vram_bytes).map_err(|errno| Error::File {
                path: path.to_owned(),
                size_bytes: vram_bytes,
                errno,
            })?,
        };
        let bar4 = if bar4_bytes == 0 {
            None
        } else {
            check_size("BAR4", bar4_bytes, 1 << 20, 8 << 30)?;
            Some(memory("BAR4", "peervram-bar4", bar4_bytes)?)
        };
        let bar2 = if is_coherent { Some(memory("BAR2", "peervram-bar2", bar2_bytes)?) } else { None };
        let shared = Shared {
            identity,
            state: Mutex::new(State::new(identity)),
            wake: Condvar::new(),
            gate: RwLock::new(()),
            vram,
            mirror: OnceLock::new(),
            bar2,
            bar4,
            dma: DmaSpace::default(),
            interrupts: Mutex::default(),
            stopping: AtomicBool::new(false),
            started: Instant::now(),
        };
        Ok(Device { shared: Arc::new(shared), threads: Vec::new() })
    }

    /// Something more goes wrong.
    pub fn misbehave(&self, misbehaviour: Misbehaviour) {
        self.shared.with_state(|state| state.misbehave(misbehaviour));
    }

    /// Nothing goes wrong any more.
    pub fn behave(&self) {
        self.shared.with_state(State::behave);
    }

    /// Surprise removal.
    pub fn remove(&self) {
        let _gate = self.shared.gate.write();
        self.shared.with_state(State::remove);
    }

    /// Ends a removal.
    pub fn insert(&self) {
        self.shared.with_state(State::insert);
    }

    /// Latches an error and raises its interrupt.
    pub fn raise_error(&self) {
        self.shared.with_state(State::inject_error);
    }

    /// How it is.
    pub fn status(&self) -> Status {
        let (windows, files) = self.shared.dma.counts();
        let state = self.shared.state.lock();
        Status {
            generation: state.generation(),
            present: state.is_present(self.shared.now()),
            faults: state.faults(),
            windows,
            files,
        }
    }

    /// VRAM, as the engines (but for a mirror) and the BAR see it.
    pub fn vram(&self) -> &Vram {
        &self.shared.vram
    }

    fn memory(&self, region: u32) -> Result<&Vram, Errno> {
        match region {
            2 => Ok(self.shared.bar2.as_ref().unwrap_or(&self.shared.vram)),
            4 => self.shared.bar4.as_ref().ok_or(Errno::INVAL),
            _ => Err(Errno::INVAL),
        }
    }
}

fn check_size(what: &'static str, size_bytes: u64, least_bytes: u64, most_bytes: u64) -> Result<(), Error> {
    if size_bytes.is_power_of_two() && (least_bytes..=most_bytes).contains(&size_bytes) {
        Ok(())
    } else {
        Err(Error::Size { what, size_bytes, least_bytes, most_bytes })
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        {
            // Under the lock, so that no engine is between its look at the flag and its sleep.
            let _state = self.shared.state.lock();
            self.shared.stopping.store(true, Ordering::Release);
        }
        self.shared.wake.notify_all();
        // An engine that waits for the client's answer gives up at once.
        self.shared.dma.disconnect();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("an engine has panicked");
            }
        }
    }
}

impl Backend for Device {
    fn region(&self, index: u32) -> Region<'_> {
        let Identity { bar2_bytes, bar4_bytes, .. } = self.shared.identity;
        match index {
            0 => Region { size_bytes: BAR0_BYTES, file: None },
            2 => {
                let file = self.shared.bar2.as_ref().unwrap_or(&self.shared.vram);
                Region { size_bytes: bar2_bytes, file: Some(file.as_fd()) }
            }
            4 => Region { size_bytes: bar4_bytes, file: self.shared.bar4.as_ref().map(AsFd::as_fd) },
            CONFIGURATION_REGION => Region { size_bytes: CONFIGURATION_BYTES as u64, file: None },
            _ => Region { size_bytes: 0, file: None },
        }
    }

    fn irqs(&self, index: u32) -> u32 {
        if index == MSIX_IRQ { VECTORS.into() } else { 0 }
    }

    fn read(&self, region: u32, offset: u64, buffer: &mut [u8]) -> Result<(), Errno> {
        let now = self.shared.now();
        match region {
            0 => {
                let offset = u32::try_from(offset).map_err(|_| Errno::INVAL)?;
                self.shared.state.lock().read_registers(now, offset, buffer);
            }
            CONFIGURATION_REGION => {
                let offset = usize::try_from(offset).map_err(|_| Errno::INVAL)?;
                self.shared.state.lock().read_configuration(now, offset, buffer);
            }
            // A client that has mapped the memory does not come here.
            _ if !self.shared.state.lock().is_awake(now) => buffer.fill(0xff),
            _ => self.memory(region)?.read(offset, buffer)?,
        }
        Ok(())
    }

    fn write(&self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        let now = self.shared.now();
        match region {
            0 => {
                let offset = u32::try_from(offset).map_err(|_| Errno::INVAL)?;
                self.shared.with_state(|state| state.write_registers(now, offset, data));
            }
            CONFIGURATION_REGION => {
                let offset = usize::try_from(offset).map_err(|_| Errno::INVAL)?;
                if self.shared.with_state(|state| state.write_configuration(now, offset, data)).reset {
                    self.shared.reset();
                }
            }
            _ if !self.shared.state.lock().is_awake(now) => {}
            _ => self.memory(region)?.write(offset, data)?,
        }
        Ok(())
    }

    fn dma_map(&self, map: &DmaMap, file: Option<OwnedFd>) -> Result<(), Errno> {
        self.shared.dma.map(map, file)
    }

    fn dma_unmap(&self, unmap: DmaUnmap) -> Result<(), Errno> {
        self.shared.dma.unmap(unmap).map(|_| ())
    }

    fn set_irqs(&self, set: &SetIrqs<'_>, events: Vec<OwnedFd>) -> Result<(), Errno> {
        if set.index != MSIX_IRQ {
            // Only an empty range of an index without interrupts gets here.
            return Ok(());
        }
        let mut interrupts = self.shared.interrupts.lock();
        match set.action {
            IrqAction::Connect => interrupts.connect(set.start, set.count, events),
            IrqAction::Raise if set.count == 0 => {
                interrupts.disconnect();
                Ok(())
            }
            IrqAction::Raise => interrupts.raise_some(set.start, set.count, |_| true),
            IrqAction::RaiseSome(wanted) => interrupts
                .raise_some(set.start, set.count, |number| wanted.get(number).is_some_and(|byte| *byte != 0)),
        }
    }

    fn reset(&self) {
        self.shared.reset();
    }

    fn after_reply(&self) {
        // Most replies have no doorbell before them: do not wake anybody for those.
        let has_rung = self.shared.state.lock().has_rung();
        if has_rung {
            self.shared.with_state(State::publish);
        }
    }
}

impl Served for Device {
    fn connected(&self, peer: &Arc<Peer>) {
        self.shared.dma.connect(Arc::clone(peer));
    }

    fn disconnected(&self) {
        let _gate = self.shared.gate.write();
        self.shared.with_state(State::power_cycle);
        self.shared.dma.disconnect();
        self.shared.interrupts.lock().disconnect();
    }
}
