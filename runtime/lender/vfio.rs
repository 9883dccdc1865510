//! Resets, power and memory decoding of a [`Lender`] of a VFIO device.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use peervram_backends::{Error, Exporter, Kind, PciAddress, vfio};

use super::Lender;
use crate::Result;
use crate::revoke::call::{Call, Took};
use crate::revoke::lending_device::LendingDevice;
use crate::revoke::machine::{Change, State};
use crate::revoke::watch;
use crate::revoke::{RevokeCause, RevokeOptions};

/// Of a VFIO device, or of one of a family that is more than that ([`AsRef`]).
impl<D: Exporter + AsRef<vfio::Device> + 'static> Lender<D> {
    /// Lends memory of a device that another process owns and gave to us ([`vfio::Device::adopt`]).
    ///
    /// The device is never touched: what its owner does with it cannot be seen here, so this lender is
    /// [`Watch::Unwatched`](watch::Watch::Unwatched); importers whose kernel drivers are told unmap all the same. When `owner`, a
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
        lender._watcher = Some(watch::owner(&lender.revoker, &lender.lending, &lender.exporter, owner)?);
        Ok(lender)
    }

    /// Resets the device. Its memory's content is unknown afterwards. Blocks until it is over, but no
    /// longer than `options` say.
    ///
    /// # Errors
    /// Where somebody is late, or another revoke is under way, nothing was taken back. [`Kind::Stuck`]
    /// where the kernel does not come back: it goes on. [`Kind::Unsupported`] where the device has no reset
    /// of its own: nothing was taken back. [`Kind::Revoked`] where the device was reset and reported an error
    /// meanwhile: its memory is away until another reset. Otherwise what the device says; everything was taken
    /// back all the same.
    pub fn reset(&self, options: impl Into<RevokeOptions>) -> Result<()> {
        const TRIED: &str = "reset a device";
        self.vfio().check_can_reset()?;
        self.revoke(RevokeCause::Reset, TRIED, options, |device| device.as_ref().reset())
    }

    /// Resets the function by its own configuration space. As [`Lender::reset`]; but the kernel does not
    /// say whether it worked.
    ///
    /// # Errors
    /// As [`Lender::reset`].
    pub fn function_level_reset(&self, options: impl Into<RevokeOptions>) -> Result<()> {
        const TRIED: &str = "reset a function";
        self.vfio().check_can_reset_function()?;
        let call = |device: &D| device.as_ref().function_level_reset();
        self.revoke(RevokeCause::FunctionReset, TRIED, options, call)
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
    pub fn hot_reset(&self, others: &[&dyn ResetTogether], options: impl Into<RevokeOptions>) -> Result<()> {
        const TRIED: &str = "hot reset a device";
        let mut all: Vec<Together> = vec![sealed::Sealed::together(self)];
        for other in others.iter().map(|other| other.together()) {
            // Each once, however often it is named.
            if all.iter().all(|one| one.lending.id != other.lending.id) {
                all.push(other);
            }
        }
        all.iter().try_for_each(|one| owned(one.vfio(), TRIED))?;
        for address in self.reset_set()? {
            let is_given = all.iter().any(|one| one.vfio().address() == address);
            if !is_given && self.revoker.find(&address.to_string()).is_some() {
                let why = format!("{address} is reset with it, and lends too");
                return Err(Error::new(Kind::InvalidInput, TRIED, why)
                    .on(self.vfio().address())
                    .next("name its lender among the others, so that its importers are told"));
            }
        }
        let devices = all.iter().map(|one| Arc::clone(&one.lending)).collect();
        let call = move || {
            let others: Vec<&vfio::Device> = all[1..].iter().map(Together::vfio).collect();
            all[0].vfio().hot_reset(&others).map(|()| Took::Memory)
        };
        let call = Call {
            what: Change::Take(RevokeCause::HotReset),
            tried: TRIED,
            devices,
            is_made_here: false,
            make: Box::new(call),
            after: None,
        };
        self.revoker.change(call, options.into())
    }

    /// Switches the device's memory decoding. Off takes everything back, as [`Lender::reset`]; on gives it
    /// back, and lets in.
    ///
    /// # Errors
    /// As [`Lender::reset`].
    pub fn set_memory_enabled(&self, enabled: bool, options: impl Into<RevokeOptions>) -> Result<()> {
        let tried = if enabled { "switch a device's memory on" } else { "switch a device's memory off" };
        let call = move |device: &D| device.as_ref().set_memory_enabled(enabled);
        self.owned(tried)?;
        // Away for whatever reason: with its memory on, the device may be reachable again.
        if enabled && matches!(self.revoker.state_of(&self.lending), Some(State::Away(_))) {
            return self.restore(tried, call);
        }
        if enabled == self.vfio().memory_enabled()? {
            return Ok(());
        }
        self.revoke(RevokeCause::MemoryDisabled, tried, options, call)
    }

    /// Sends the device to a power state. D3hot takes everything back, as [`Lender::reset`]; D0 gives it
    /// back, and lets in.
    ///
    /// # Errors
    /// As [`Lender::reset`].
    pub fn set_power_state(&self, state: vfio::PowerState, options: impl Into<RevokeOptions>) -> Result<()> {
        let call = move |device: &D| device.as_ref().set_power_state(state);
        if state == vfio::PowerState::D0 {
            return self.owned("wake a device")?.restore("wake a device", call);
        }
        const TRIED: &str = "send a device to sleep";
        self.owned(TRIED)?.revoke(RevokeCause::PowerState, TRIED, options, call)
    }

    /// Lets the kernel put the device to sleep, which takes everything back. Touching the device wakes it
    /// and gives nothing back: that is [`Lender::leave_low_power`] alone.
    ///
    /// # Errors
    /// As [`Lender::reset`].
    pub fn enter_low_power(&self, options: impl Into<RevokeOptions>) -> Result<()> {
        let call = |device: &D| device.as_ref().enter_low_power();
        const TRIED: &str = "let a device sleep";
        self.owned(TRIED)?.revoke(RevokeCause::PowerState, TRIED, options, call)
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
fn owned(device: &vfio::Device, tried: &'static str) -> Result<()> {
    if !device.is_adopted() {
        return Ok(());
    }
    let error = Error::new(Kind::Unsupported, tried, "its owner is another process");
    Err(error.on(device.address()).next("ask the owner to do it"))
}

/// A lender of a VFIO device, whatever its type is, as [`Lender::hot_reset`] takes it. Lenders have it; nothing
/// else can.
pub trait ResetTogether: sealed::Sealed {}

impl<D: Exporter + AsRef<vfio::Device> + 'static> ResetTogether for Lender<D> {}

impl<D: Exporter + AsRef<vfio::Device> + 'static> sealed::Sealed for Lender<D> {
    fn together(&self) -> Together {
        Together { device: Arc::clone(&self.device) as _, lending: Arc::clone(&self.lending) }
    }
}

/// What a hot reset needs of a lender.
pub struct Together {
    device: Arc<dyn HasVfio>,
    lending: Arc<LendingDevice>,
}

impl Together {
    fn vfio(&self) -> &vfio::Device {
        self.device.vfio()
    }
}

/// A device that is a VFIO device, or more than that.
trait HasVfio: Send + Sync {
    fn vfio(&self) -> &vfio::Device;
}

impl<D: AsRef<vfio::Device> + Send + Sync> HasVfio for D {
    fn vfio(&self) -> &vfio::Device {
        self.as_ref()
    }
}

mod sealed {
    /// What only lenders are.
    pub trait Sealed {
        fn together(&self) -> super::Together;
    }
}
