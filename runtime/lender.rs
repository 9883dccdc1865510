//! `Lender`: a device whose memory we lend, and the only one who takes it back.
//!
//! Every call that revokes (reset, memory off, sleep, close) goes through here, because the order
//! matters: gates close, those inside finish, the owners quiesce, mapped memory is swapped for shadow
//! memory, and only then the kernel is asked. A revoking call made on the device directly would block for
//! importers that nobody told.

use std::fmt;
#[cfg(feature = "vfio")]
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use peervram_backends::{Aperture, Error, Exporter, Kind, NotClosed};
#[cfg(feature = "vfio")]
use peervram_backends::{PciAddress, vfio};

use crate::Result;
use crate::export::Export;
use crate::hook::Guarded;
use crate::lent_device::LentDevice;
use crate::revoke::call::Call;
use crate::revoke::entry::Entry;
use crate::revoke::keeper::Keeper;
#[cfg(feature = "vfio")]
use crate::revoke::machine::State;
use crate::revoke::machine::{After, AtDeadline, Change};
use crate::revoke::watch::{self, Watch, Watcher};
use crate::revoke::{Event, Events, RevokeCause, Subscription, Terms};
use crate::sync::pause;

/// A device, or its stand-in, that lends memory.
///
/// Dropping it takes everything back for good and closes the device, whatever is late; it waits for
/// that up to a second. [`Lender::close`] says who is late instead.
pub struct Lender<E: Exporter + 'static> {
    device: Arc<E>,
    /// The same, with its hooks guarded.
    exporter: Arc<dyn Exporter>,
    keeper: Arc<Keeper>,
    entry: Arc<Entry>,
    /// Ends with the lender.
    _watcher: Option<Watcher>,
}

impl<E: Exporter + 'static> Lender<E> {
    /// Lends memory of `device`. If its memory cannot be reached now, nothing can be attached until it
    /// is given back.
    ///
    /// Hears of the device's errors and of the kernel wanting it back from now on, where the device can
    /// tell ([`Exporter::interrupts`]): both take everything back, the second closes the device.
    pub fn new(device: E) -> Self {
        Self::kept_by(Keeper::of_process(), device)
    }

    pub(crate) fn kept_by(keeper: Arc<Keeper>, device: E) -> Self {
        let device = Arc::new(device);
        let exporter: Arc<dyn Exporter> = Arc::new(Guarded::new(Arc::clone(&device)));
        let reachable = exporter.check_reachable();
        if let Err(error) = &reachable {
            tracing::warn!(%error, "lending memory that cannot be reached");
        }
        let entry = keeper.add(&exporter, reachable.is_ok());
        let watcher = watch::interrupts(&keeper, &entry, &exporter);
        Self { device, exporter, keeper, entry, _watcher: watcher }
    }

    /// The device, without what would take its memory back.
    pub fn device(&self) -> LentDevice<'_, E> {
        LentDevice::new(&self.device)
    }

    /// Exports what `aperture` describes. The export does not keep the device open.
    ///
    /// # Errors
    /// As [`Exporter::export`]; [`Kind::Busy`] while the kernel is taking memory of the device back, which
    /// exporting would wait for.
    pub fn export(&self, aperture: Aperture) -> Result<Export> {
        if self.keeper.is_calling(&self.entry) {
            let why = "its memory is being taken back or given back now";
            return Err(Error::new(Kind::Busy, "export memory", why)
                .on(&self.entry.name)
                .next("wait for the event that ends it, and try again"));
        }
        Export::new(&self.keeper, &self.entry, &*self.exporter, aperture)
    }

    /// Whether revokes that others cause can be heard of.
    pub fn watch(&self) -> Watch {
        self.entry.watch()
    }

    /// How often the device's memory was taken back.
    pub fn generation(&self) -> u64 {
        self.entry.generation()
    }

    /// Calls back with everything that happens to the device's memory from now on, until the subscription
    /// is dropped. See [`Event`] for what a callback may do.
    #[track_caller]
    pub fn on_event(&self, callback: impl Fn(&Event) + Send + Sync + 'static) -> Subscription {
        self.entry.subscribers.call(callback)
    }

    /// Keeps everything that happens to the device's memory from now on, to be polled for and taken.
    ///
    /// # Errors
    /// No descriptor is free.
    pub fn events(&self) -> Result<Events> {
        self.entry.subscribers.poll()
    }

    /// Closes the device, so that another process can open it. Its dma-bufs are dead for good then, and
    /// mapped memory of it is shadow memory: all ones, and nobody's.
    ///
    /// # Errors
    /// Who is late, and nothing was taken back; or [`Kind::Stuck`], and it is closed
    /// when the kernel comes back. With the lender given back.
    pub fn close(self, terms: impl Into<Terms>) -> Result<(), NotClosed<Self>> {
        // A lender that is closed already has nothing left to do.
        match self.end(terms.into()) {
            Err(error) if error.kind() != Kind::Gone => Err(NotClosed::new(self, error)),
            _ => Ok(()),
        }
    }

    fn end(&self, terms: Terms) -> Result<()> {
        close(&self.keeper, &self.entry, &self.exporter, RevokeCause::ExporterGone, terms)
    }

    /// Takes everything back around `call`, which may do what it likes with the memory or the device: for
    /// exporters that this crate has no call for, and for an operator who wants everyone out. `tried` says in
    /// messages what it is, as a verb phrase. Afterwards the memory is where
    /// [`Exporter::check_reachable`] says.
    ///
    /// # Errors
    /// Where somebody is late, or another revoke is under way, nothing was taken back. [`Kind::Stuck`]
    /// where `call` does not come back: it goes on. Otherwise what `call` says; everything was taken back all
    /// the same.
    pub fn revoke(
        &self,
        cause: RevokeCause,
        tried: &'static str,
        terms: impl Into<Terms>,
        call: impl FnOnce(&E) -> Result<()> + Send + 'static,
    ) -> Result<()> {
        self.change(Change::Take(cause), tried, terms.into(), call)
    }

    /// Gives back what is away, by `call`, and lets in.
    ///
    /// # Errors
    /// [`Kind::InvalidInput`] where it is not away; else as [`Lender::revoke`].
    pub fn restore(
        &self,
        tried: &'static str,
        call: impl FnOnce(&E) -> Result<()> + Send + 'static,
    ) -> Result<()> {
        self.change(Change::Restore, tried, Terms::from(Duration::ZERO), call)
    }

    fn change(
        &self,
        what: Change,
        tried: &'static str,
        terms: Terms,
        call: impl FnOnce(&E) -> Result<()> + Send + 'static,
    ) -> Result<()> {
        let device = Arc::clone(&self.device);
        let call = Call {
            what,
            tried,
            entries: vec![Arc::clone(&self.entry)],
            make: Box::new(move || call(&device)),
            after: None,
        };
        self.keeper.change(call, terms)
    }
}

/// Takes everything back for good and lets go of the device.
pub(crate) fn close(
    keeper: &Arc<Keeper>,
    entry: &Arc<Entry>,
    exporter: &Arc<dyn Exporter>,
    cause: RevokeCause,
    terms: Terms,
) -> Result<()> {
    let device = Arc::clone(exporter);
    let call = Call {
        what: Change::Take(cause),
        tried: "close a device",
        entries: vec![Arc::clone(entry)],
        make: Box::new(move || device.let_go()),
        after: Some(After::Closed),
    };
    keeper.change(call, terms)
}

/// Of a VFIO device, or of one of a family that is more than that ([`AsRef`]).
#[cfg(feature = "vfio")]
impl<D: Exporter + AsRef<vfio::Device> + 'static> Lender<D> {
    /// Lends memory of a device that another process owns and gave to us ([`vfio::Device::adopt`]).
    ///
    /// The device is never touched: what its owner does with it cannot be seen here, so this lender is
    /// [`Watch::Unwatched`]; importers whose kernel drivers are told unmap all the same. When `owner`, a
    /// pidfd, says that the owner ended, everything is taken back and the device let go: our descriptor
    /// would keep it open.
    ///
    /// # Errors
    /// [`Kind::InvalidInput`] where the device is our own; [`Kind::Os`] where there is no thread or descriptor to
    /// hear of the owner's end with. The device and `owner` are closed then.
    pub fn adopted(device: D, owner: OwnedFd) -> Result<Self> {
        if !device.as_ref().is_adopted() {
            let why = "it was opened by this process";
            let error = Error::new(Kind::InvalidInput, "lend an adopted device", why);
            return Err(error.on(device.as_ref().address()));
        }
        let mut lender = Self::new(device);
        lender._watcher = Some(watch::owner(&lender.keeper, &lender.entry, &lender.exporter, owner)?);
        Ok(lender)
    }

    /// Resets the device. Its memory's content is unknown afterwards. Blocks until it is over, but no
    /// longer than `terms` say.
    ///
    /// # Errors
    /// Where somebody is late, or another revoke is under way, nothing was taken back. [`Kind::Stuck`]
    /// where the kernel does not come back: it goes on. [`Kind::Unsupported`] where the device has no reset
    /// of its own: nothing was taken back. [`Kind::Revoked`] where the device was reset and reported an error
    /// meanwhile: its memory is away until another reset. Otherwise what the device says; everything was taken
    /// back all the same.
    pub fn reset(&self, terms: impl Into<Terms>) -> Result<()> {
        const TRIED: &str = "reset a device";
        self.vfio().check_can_reset()?;
        self.revoke(RevokeCause::Reset, TRIED, terms, |device| device.as_ref().reset())
    }

    /// Resets the function by its own configuration space. As [`Lender::reset`]; but the kernel does not
    /// say whether it worked.
    ///
    /// # Errors
    /// As [`Lender::reset`].
    pub fn function_level_reset(&self, terms: impl Into<Terms>) -> Result<()> {
        const TRIED: &str = "reset a function";
        self.vfio().check_can_reset_function()?;
        let call = |device: &D| device.as_ref().function_level_reset();
        self.revoke(RevokeCause::FunctionReset, TRIED, terms, call)
    }

    /// Who is reset with the device by a hot reset, itself included.
    ///
    /// # Errors
    /// As [`vfio::Device::reset_set`].
    pub fn reset_set(&self) -> Result<Vec<PciAddress>> {
        self.vfio().reset_set()
    }

    /// Resets the device's slot or bus, with everything of the [`reset_set`](Lender::reset_set). `others`
    /// are the lenders of its other devices, of whatever type: `&[&vfio_lender, &nvgrace_lender]`.
    ///
    /// # Errors
    /// [`Kind::InvalidInput`] where a device of the set lends and is not among `others`. Else as
    /// [`Lender::reset`]; a hot reset that fails halfway has taken everything back too.
    pub fn hot_reset(&self, others: &[&dyn ResetTogether], terms: impl Into<Terms>) -> Result<()> {
        const TRIED: &str = "hot reset a device";
        let mut all: Vec<Together> = vec![sealed::Sealed::together(self)];
        for other in others.iter().map(|other| other.together()) {
            // Each once, however often it is named.
            if all.iter().all(|one| one.entry.id != other.entry.id) {
                all.push(other);
            }
        }
        all.iter().try_for_each(|one| owned(one.vfio(), TRIED))?;
        for address in self.reset_set()? {
            let is_given = all.iter().any(|one| one.vfio().address() == address);
            if !is_given && self.keeper.find(&address.to_string()).is_some() {
                let why = format!("{address} is reset with it, and lends too");
                return Err(Error::new(Kind::InvalidInput, TRIED, why)
                    .on(self.vfio().address())
                    .next("name its lender among the others, so that its importers are told"));
            }
        }
        let entries = all.iter().map(|one| Arc::clone(&one.entry)).collect();
        let call = move || {
            let others: Vec<&vfio::Device> = all[1..].iter().map(Together::vfio).collect();
            all[0].vfio().hot_reset(&others)
        };
        let call = Call {
            what: Change::Take(RevokeCause::HotReset),
            tried: TRIED,
            entries,
            make: Box::new(call),
            after: None,
        };
        self.keeper.change(call, terms.into())
    }

    /// Switches the device's memory decoding. Off takes everything back, as [`Lender::reset`]; on gives it
    /// back, and lets in.
    ///
    /// # Errors
    /// As [`Lender::reset`].
    pub fn set_memory_enabled(&self, enabled: bool, terms: impl Into<Terms>) -> Result<()> {
        let tried = if enabled { "switch a device's memory on" } else { "switch a device's memory off" };
        let call = move |device: &D| device.as_ref().set_memory_enabled(enabled);
        self.owned(tried)?;
        // Away for whatever reason: with its memory on, the device may be reachable again.
        if enabled && matches!(self.keeper.state_of(&self.entry), Some(State::Away(_))) {
            return self.restore(tried, call);
        }
        if enabled == self.vfio().memory_enabled()? {
            return Ok(());
        }
        self.revoke(RevokeCause::MemoryDisabled, tried, terms, call)
    }

    /// Sends the device to a power state. D3hot takes everything back, as [`Lender::reset`]; D0 gives it
    /// back, and lets in.
    ///
    /// # Errors
    /// As [`Lender::reset`].
    pub fn set_power_state(&self, state: vfio::PowerState, terms: impl Into<Terms>) -> Result<()> {
        let call = move |device: &D| device.as_ref().set_power_state(state);
        if state == vfio::PowerState::D0 {
            return self.owned("wake a device")?.restore("wake a device", call);
        }
        const TRIED: &str = "send a device to sleep";
        self.owned(TRIED)?.revoke(RevokeCause::PowerState, TRIED, terms, call)
    }

    /// Lets the kernel put the device to sleep, which takes everything back. Touching the device wakes it
    /// and gives nothing back: that is [`Lender::leave_low_power`] alone.
    ///
    /// # Errors
    /// As [`Lender::reset`].
    pub fn enter_low_power(&self, terms: impl Into<Terms>) -> Result<()> {
        let call = |device: &D| device.as_ref().enter_low_power();
        const TRIED: &str = "let a device sleep";
        self.owned(TRIED)?.revoke(RevokeCause::PowerState, TRIED, terms, call)
    }

    /// Ends the sleep, and lets in.
    ///
    /// # Errors
    /// [`Kind::InvalidInput`] where the memory is not away; else as [`Lender::reset`].
    pub fn leave_low_power(&self) -> Result<()> {
        const TRIED: &str = "end a device's sleep";
        self.owned(TRIED)?.restore(TRIED, |device| device.as_ref().leave_low_power())
    }

    /// What the calls that take memory back are made on.
    fn vfio(&self) -> &vfio::Device {
        (*self.device).as_ref()
    }

    /// Itself, unless another process owns the device: then nothing is taken back.
    fn owned(&self, tried: &'static str) -> Result<&Self> {
        owned(self.vfio(), tried).map(|()| self)
    }
}

/// Fails where another process owns `device`.
#[cfg(feature = "vfio")]
fn owned(device: &vfio::Device, tried: &'static str) -> Result<()> {
    if !device.is_adopted() {
        return Ok(());
    }
    let error = Error::new(Kind::Unsupported, tried, "its owner is another process");
    Err(error.on(device.address()).next("ask the owner to do it"))
}

/// A lender of a VFIO device, whatever its type is, as [`Lender::hot_reset`] takes it. Lenders have it; nothing
/// else can.
#[cfg(feature = "vfio")]
pub trait ResetTogether: sealed::Sealed {}

#[cfg(feature = "vfio")]
impl<D: Exporter + AsRef<vfio::Device> + 'static> ResetTogether for Lender<D> {}

#[cfg(feature = "vfio")]
impl<D: Exporter + AsRef<vfio::Device> + 'static> sealed::Sealed for Lender<D> {
    fn together(&self) -> Together {
        Together { device: Arc::clone(&self.device) as _, entry: Arc::clone(&self.entry) }
    }
}

/// What a hot reset needs of a lender.
#[cfg(feature = "vfio")]
pub struct Together {
    device: Arc<dyn HasVfio>,
    entry: Arc<Entry>,
}

#[cfg(feature = "vfio")]
impl Together {
    fn vfio(&self) -> &vfio::Device {
        self.device.vfio()
    }
}

/// A device that is a VFIO device, or more than that.
#[cfg(feature = "vfio")]
trait HasVfio: Send + Sync {
    fn vfio(&self) -> &vfio::Device;
}

#[cfg(feature = "vfio")]
impl<D: AsRef<vfio::Device> + Send + Sync> HasVfio for D {
    fn vfio(&self) -> &vfio::Device {
        self.as_ref()
    }
}

#[cfg(feature = "vfio")]
mod sealed {
    /// What only lenders are.
    pub trait Sealed {
        fn together(&self) -> super::Together;
    }
}

impl<E: Exporter + 'static> fmt::Debug for Lender<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lender")
            .field("device", &self.entry)
            .field("watch", &self.watch())
            .finish_non_exhaustive()
    }
}

impl<E: Exporter + 'static> Drop for Lender<E> {
    fn drop(&mut self) {
        if !is_over(&self.end(PATIENCE)) {
            // Whoever is in the way must not hold this thread, and the device must not be left open.
            self.keeper.close_later(&self.entry, &self.exporter);
        }
    }
}

/// How long a lender that is dropped waits.
const PATIENCE: Terms = Terms {
    timeout: Duration::from_millis(500),
    at_deadline: AtDeadline::GoOn,
    call_limit: Duration::from_millis(500),
};

/// Whether a device that is closed needs nobody any more.
fn is_over(result: &Result<()>) -> bool {
    match result {
        Ok(()) => true,
        // The kernel goes on by itself.
        Err(error) => matches!(error.kind(), Kind::Gone | Kind::Stuck),
    }
}

/// Closes a device, as often as it takes.
pub(crate) fn insist_on_close(keeper: &Arc<Keeper>, entry: &Arc<Entry>, exporter: &Arc<dyn Exporter>) {
    while !is_over(&close(keeper, entry, exporter, RevokeCause::ExporterGone, PATIENCE)) {
        pause(PATIENCE.timeout);
    }
}
