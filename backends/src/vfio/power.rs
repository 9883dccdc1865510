//! Power: D3hot by the device's own register, and low power by the kernel's runtime power management.
//!
//! | | what the memory is | what brings it back |
//! |---|---|---|
//! | D3hot ([`Device::set_power_state`]) | not decoded | D0 |
//! | low power ([`Device::enter_low_power`]) | not decoded while the device sleeps, as deep as the platform can (D3cold) | [`Device::leave_low_power`], nothing else |
//!
//! Entering either revokes every dma-buf of the device and **blocks without a limit** until its importers
//! have unmapped; a mapped BAR that is touched meanwhile raises SIGBUS. Leaving brings dma-bufs back with
//! the same descriptors.
//!
//! In low power every call on the device's descriptor wakes it for the time of the call, and the kernel
//! then forgets that it sleeps: memory on, a reset or an export make live dma-bufs of a device that goes
//! back to sleep (`__vfio_pci_memory_enabled` does not look at `pm_runtime_engaged`). So what would do that
//! is refused until low power was left.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::Errno;
use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY, VFIO_DEVICE_FEATURE_LOW_POWER_EXIT,
};

use super::Device;
use crate::uapi::vfio as uapi;
use crate::{Error, Kind, Result};

// include/uapi/linux/pci_regs.h
const PCI_CAP_ID_PM: u8 = 0x01;
const PCI_PM_CTRL: u64 = 4;
const PCI_PM_CTRL_STATE_MASK: u16 = 3;
const D0: u16 = 0;
const D3HOT: u16 = 3;

/// Whether a device is on. D1 and D2, which hardly a device has, are left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PowerState {
    /// On.
    D0,
    /// Asleep: its configuration answers, its memory does not.
    D3hot,
}

impl PowerState {
    /// `D0` or `D3hot`, as sysfs writes them.
    pub fn name(self) -> &'static str {
        match self {
            Self::D0 => "D0",
            Self::D3hot => "D3hot",
        }
    }
}

/// What is known of a device's power.
#[derive(Debug, Default)]
pub(super) struct Power {
    /// Between entering low power and leaving it.
    is_low: AtomicBool,
    /// Where its power management capability lies, if it has one; asked once, for it does not move.
    capability: OnceLock<Option<u8>>,
}

impl Device {
    /// Lets the device sleep by runtime power management, as deep as the platform can.
    ///
    /// # Errors
    /// [`Kind::Unsupported`] of an adopted device, or where the kernel or the driver does not have it;
    /// [`Kind::MemoryDisabled`] where it sleeps already. Else what the kernel says, and the memory may be
    /// revoked all the same.
    pub fn enter_low_power(&self) -> Result<()> {
        const TRIED: &str = "enter low power";
        self.check_owned(TRIED)?;
        self.check_awake(TRIED)?;
        self.low_power(TRIED, VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY)?;
        self.power.is_low.store(true, Ordering::Release);
        Ok(())
    }

    /// Wakes the device for good, and brings its dma-bufs back if memory decoding is on. Nothing happens
    /// where it is awake.
    ///
    /// # Errors
    /// As [`Device::enter_low_power`].
    pub fn leave_low_power(&self) -> Result<()> {
        const TRIED: &str = "leave low power";
        self.check_owned(TRIED)?;
        if !self.is_in_low_power() {
            return Ok(());
        }
        self.low_power(TRIED, VFIO_DEVICE_FEATURE_LOW_POWER_EXIT)?;
        self.power.is_low.store(false, Ordering::Release);
        Ok(())
    }

    /// Whether it was sent into low power and not brought back.
    pub fn is_in_low_power(&self) -> bool {
        self.power.is_low.load(Ordering::Acquire)
    }

    /// The power state that the device's own register tells.
    ///
    /// # Errors
    /// [`Kind::Unsupported`] where it has no power management, and of an adopted device;
    /// [`Kind::MemoryDisabled`] in low power, where asking would wake it; [`Kind::Gone`] where it no longer
    /// answers.
    pub fn power_state(&self) -> Result<PowerState> {
        const TRIED: &str = "read a device's power state";
        let control = self.power_control(TRIED)?;
        let value = self.read_config_word(control)?;
        match value & PCI_PM_CTRL_STATE_MASK {
            _ if value == u16::MAX => {
                Err(Error::new(Kind::Gone, TRIED, "its configuration reads as all ones").on(self.address()))
            }
            D0 => Ok(PowerState::D0),
            D3HOT => Ok(PowerState::D3hot),
            other => Err(Error::new(Kind::Unsupported, TRIED, format!("it is in D{other}"))
                .on(self.address())
                .next("set it to D0")),
        }
    }

    /// Sets the power state by the device's own register.
    ///
    /// # Errors
    /// As [`Device::power_state`]; and [`Kind::Unsupported`] where the device stays in the state that it was
    /// in (the kernel swallows what stands in the way: virtual functions, a quirk). Its dma-bufs were revoked
    /// all the same, and are back.
    pub fn set_power_state(&self, state: PowerState) -> Result<()> {
        const TRIED: &str = "set a device's power state";
        let control = self.power_control(TRIED)?;
        let bits = match state {
            PowerState::D0 => D0,
            PowerState::D3hot => D3HOT,
        };
        // Write both bytes in one call: vfio_pm_config_write acts on a write that begins here.
        self.change_config_word(control, |value| value & !PCI_PM_CTRL_STATE_MASK | bits)?;
        let seen = self.power_state()?;
        if seen == state {
            return Ok(());
        }
        let why = format!("told to go to {}, it is in {}", state.name(), seen.name());
        Err(Error::new(Kind::Unsupported, TRIED, why)
            .on(self.address())
            .next("the kernel's log may say why; switching its memory off takes memory back, too"))
    }

    /// Fails in low power.
    pub(super) fn check_awake(&self, tried: &'static str) -> Result<()> {
        if !self.is_in_low_power() {
            return Ok(());
        }
        Err(self.memory_disabled(tried, "the device is in low power", "leave low power first"))
    }

    /// Fails in D3hot. A device without power management is never in it.
    pub(super) fn check_not_d3hot(&self, tried: &'static str) -> Result<()> {
        if self.power_capability()?.is_none() || self.power_state()? != PowerState::D3hot {
            return Ok(());
        }
        Err(self.memory_disabled(tried, "the device is in D3hot", "set its power state to D0 first"))
    }

    fn power_control(&self, tried: &'static str) -> Result<u64> {
        self.check_owned(tried)?;
        let capability = self.power_capability()?.ok_or_else(|| {
            Error::new(Kind::Unsupported, tried, "it has no power management capability")
                .on(self.address())
                .next("switching its memory off takes memory back, too")
        })?;
        Ok(u64::from(capability) + PCI_PM_CTRL)
    }

    fn power_capability(&self) -> Result<Option<u8>> {
        if let Some(&capability) = self.power.capability.get() {
            return Ok(capability);
        }
        let capability = self.capability(PCI_CAP_ID_PM)?;
        Ok(*self.power.capability.get_or_init(|| capability))
    }

    fn low_power(&self, tried: &'static str, feature: u32) -> Result<()> {
        uapi::device_feature_set(self, feature).map_err(|errno| match errno {
            Errno::NOTTY => Error::new(Kind::Unsupported, tried, "the kernel or its driver does not have it")
                .on(self.address())
                .errno(errno)
                .next("set the power state to D3hot instead"),
            errno => Error::os(tried, errno).on(self.address()),
        })
    }
}

/// What the above says of the kernel's header.
#[cfg(all(test, feature = "host"))]
pub(super) fn claims() -> [(&'static str, usize); 3] {
    [
        ("PCI_CAP_ID_PM", PCI_CAP_ID_PM.into()),
        ("PCI_PM_CTRL", PCI_PM_CTRL as usize),
        ("PCI_PM_CTRL_STATE_MASK", PCI_PM_CTRL_STATE_MASK.into()),
    ]
}
