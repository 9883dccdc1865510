//! `RevokeCause`: why memory was taken back.

use std::fmt;

/// Why memory was taken back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum RevokeCause {
    /// The device was reset (`VFIO_DEVICE_RESET`).
    Reset,
    /// The device was reset together with others of its slot or bus (`VFIO_DEVICE_PCI_HOT_RESET`).
    HotReset,
    /// Its memory decoding was switched off (`PCI_COMMAND_MEMORY`).
    MemoryDisabled,
    /// It was sent to a state of low power.
    PowerState,
    /// The function was reset by its own configuration space (FLR).
    FunctionReset,
    /// The kernel wants the device back: it is being unbound or removed.
    DeviceRequested,
    /// The device reported an error that it does not recover from by itself (PCIe AER).
    DeviceError,
    /// The lender closed the device, or the process that owns it ended.
    ExporterGone,
    /// Somebody asked for it.
    Operator,
}

impl RevokeCause {
    /// The cause of that [`code`](RevokeCause::code), as another process says it.
    #[cfg(feature = "broker")]
    pub(crate) fn from_code(code: &str) -> Option<Self> {
        const ALL: [RevokeCause; 9] = [
            RevokeCause::Reset,
            RevokeCause::HotReset,
            RevokeCause::MemoryDisabled,
            RevokeCause::PowerState,
            RevokeCause::FunctionReset,
            RevokeCause::DeviceRequested,
            RevokeCause::DeviceError,
            RevokeCause::ExporterGone,
            RevokeCause::Operator,
        ];
        ALL.into_iter().find(|cause| cause.code() == code)
    }

    /// A stable name for scripts and `--json`.
    pub fn code(self) -> &'static str {
        match self {
            Self::Reset => "reset",
            Self::HotReset => "hot-reset",
            Self::MemoryDisabled => "memory-disabled",
            Self::PowerState => "power-state",
            Self::FunctionReset => "function-reset",
            Self::DeviceRequested => "device-requested",
            Self::DeviceError => "device-error",
            Self::ExporterGone => "exporter-gone",
            Self::Operator => "operator",
        }
    }
}

impl fmt::Display for RevokeCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Reset => "the device is reset",
            Self::HotReset => "the device is reset with its slot or bus",
            Self::MemoryDisabled => "the device's memory is switched off",
            Self::PowerState => "the device sleeps",
            Self::FunctionReset => "the function is reset",
            Self::DeviceRequested => "the kernel wants the device back",
            Self::DeviceError => "the device reported an error",
            Self::ExporterGone => "the exporter closed the device",
            Self::Operator => "it was asked for",
        })
    }
}
