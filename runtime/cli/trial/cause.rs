//! `Cause`: a way to take memory back, and what an importer makes of it.
//!
//! The process of such a step attaches, enters and leaves, has the memory taken back, looks whether the importer is kept out
//! while it is away, and whether the import is good again afterwards.

use std::process::ExitCode;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use peervram::backends::{Aperture, DmaRange, DmaRanges, PciAddress, RawBytes, vfio};
use peervram::{Error, Kind, Lender, Result, RevokeOptions};
use serde::Serialize;

use crate::ending::print_json;
use crate::import::Target;
use crate::opened::Opened;
use crate::reset::{Attached, EventReport, ImporterReport, attach};

/// How much is lent.
const LENT_BYTES: u64 = 1 << 20;
/// How long the importer has to finish; nobody is inside, so it needs none of it.
const TIMEOUT: Duration = Duration::from_secs(5);
/// After how long the kernel's call counts as stuck.
const CALL_LIMIT: Duration = Duration::from_secs(20);

/// A way to take memory back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    Reset,
    FunctionReset,
    HotReset,
    MemoryOff,
    Sleep,
    Close,
}

impl Cause {
    /// All of them; that which ends the lending comes last.
    pub const ALL: [Self; 6] =
        [Self::Reset, Self::FunctionReset, Self::HotReset, Self::MemoryOff, Self::Sleep, Self::Close];

    /// A stable name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Reset => "reset",
            Self::FunctionReset => "function-reset",
            Self::HotReset => "hot-reset",
            Self::MemoryOff => "memory-off",
            Self::Sleep => "sleep",
            Self::Close => "close",
        }
    }

    /// What is done: "memory off and on".
    pub fn words(self) -> &'static str {
        match self {
            Self::Reset => "reset",
            Self::FunctionReset => "function reset",
            Self::HotReset => "hot reset",
            Self::MemoryOff => "memory off and on",
            Self::Sleep => "sleep and wake",
            Self::Close => "device closed",
        }
    }
}

impl FromStr for Cause {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let found = Self::ALL.into_iter().find(|cause| cause.name() == text);
        found.ok_or_else(|| format!("{text:?} is no cause"))
    }
}

/// What came of it.
#[derive(Serialize)]
struct Report {
    /// Taking back, and giving back where that is a call of its own.
    took_ms: f64,
    events: Vec<EventReport>,
    /// Whether the importer was refused while the memory was away; none where it came back by the same call.
    kept_out: Option<bool>,
    /// The importer afterwards.
    importer: ImporterReport,
}

/// The process of a step.
pub fn run(lender: PciAddress, importer: &Target, cause: Cause) -> anyhow::Result<ExitCode> {
    let device = Opened::open(lender)?;
    if let Cause::HotReset = cause {
        check_alone(&device, lender)?;
    }
    let memory = device.memory()?;
    let lent = DmaRange::new(0, memory.size_bytes.min(LENT_BYTES));
    let ranges = DmaRanges::new(memory, &[lent])?;
    let lender = Lender::new(device);
    let export = lender.export(Aperture::owned(ranges, Arc::new(RawBytes)))?;
    let attached = attach(&export, importer)?;
    attached.enter_once()?;

    let begun = Instant::now();
    let events = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&events);
    let subscription = lender.on_event(move |event| {
        log.lock().unwrap_or_else(PoisonError::into_inner).push(EventReport::new(event, begun.elapsed()));
    });
    let (lender, kept_out) = take(lender, cause, &*attached)?;
    let took_ms = begun.elapsed().as_secs_f64() * 1e3;
    drop(subscription);

    let importer = attached.try_again();
    let is_right = kept_out != Some(false) && importer.good == (cause != Cause::Close);
    let events = std::mem::take(&mut *events.lock().unwrap_or_else(PoisonError::into_inner));
    print_json(&Report { took_ms, events, kept_out, importer })?;
    drop(attached);
    drop(lender);
    Ok(ExitCode::from(u8::from(!is_right)))
}

/// A hot reset takes others along where the device is not alone on its bus: that is not asked of them.
fn check_alone(device: &Opened, lender: PciAddress) -> Result<()> {
    let set = device.as_ref().reset_set()?;
    let others: Vec<String> =
        set.iter().filter(|&&address| address != lender).map(PciAddress::to_string).collect();
    if others.is_empty() {
        return Ok(());
    }
    let why = format!("it would reset {} as well", others.join(", "));
    Err(Error::new(Kind::Unsupported, "hot reset a device", why)
        .on(lender)
        .next(format!("peervram reset {lender} --hot does it all the same")))
}

fn options() -> RevokeOptions {
    RevokeOptions::within(TIMEOUT).with_call_limit(CALL_LIMIT)
}

/// Takes the memory back, and gives it back where that is a call of its own. Gives the lender back, unless closing it was
/// the cause, and says whether the importer was kept out where the memory was away between two calls.
fn take(
    lender: Lender<Opened>,
    cause: Cause,
    attached: &dyn Attached,
) -> Result<(Option<Lender<Opened>>, Option<bool>)> {
    let mut kept_out = None;
    match cause {
        Cause::Reset => lender.reset(options())?,
        Cause::FunctionReset => lender.function_level_reset(options())?,
        Cause::HotReset => lender.hot_reset(&[], options())?,
        Cause::MemoryOff => {
            lender.set_memory_enabled(false, options())?;
            kept_out = Some(attached.enter_once().is_err());
            lender.set_memory_enabled(true, options())?;
        }
        Cause::Sleep => {
            lender.set_power_state(vfio::PowerState::D3hot, options())?;
            kept_out = Some(attached.enter_once().is_err());
            lender.set_power_state(vfio::PowerState::D0, options())?;
        }
        Cause::Close => {
            lender.close(options())?;
            return Ok((None, None));
        }
    }
    Ok((Some(lender), kept_out))
}
