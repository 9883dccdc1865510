//! Every cause against every importer, with work in flight: right bytes of the new generation afterwards,
//! or an honest end.

use std::fs;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use peervram::backends::PciAddress;
use peervram::backends::vfio::{Interface, PowerState};
use peervram::{Kind, Lender, RevokeOptions, Trust};
use peervram_lab::change::Severity;

use crate::crossing::{Lends, PATIENCE};
use crate::guest::{self, Guest};
use crate::painted::Painted;
use crate::test::{Test, Verdict};
use crate::witness::{CopyEngine, Holder, ImageReader, Screen, Seen, Shader, Witness};

pub const TESTS: &[Test] = &[
    Test::of_revoke("revoke/every-cause-under-a-screen", under_a_screen).allowing(ASKED),
    Test::of_revoke("revoke/every-cause-under-shaders", under_shaders).allowing(ASKED),
    Test::of_revoke("revoke/every-cause-under-images", under_images).allowing(ASKED),
    Test::of_revoke("revoke/every-cause-under-an-engine-by-iommufd", under_iommufd).allowing(ASKED),
    Test::of_revoke("revoke/every-cause-under-an-engine-by-type1", under_type1).allowing(ASKED),
    Test::of_revoke("revoke/every-cause-under-the-holder", under_the_holder).allowing(ASKED),
];

/// What the kernel says when it wants a device back.
pub const ASKED: &[&str] = &["Relaying device request"];

/// Why memory is taken back, and how.
pub struct Cause<D: Lends> {
    pub name: &'static str,
    /// What is done to the device from outside, while `take` waits for it. Nobody is told before.
    pub happens: Option<fn(&Guest, PciAddress) -> Result<()>>,
    /// Takes it, and gives it back where that is another call.
    pub take: Take<D>,
    /// Whether the device is reset by it.
    pub resets: bool,
}

/// How memory is taken back.
pub enum Take<D: Lends> {
    /// It comes back.
    Keeps(fn(&Lender<D>) -> peervram::Result<()>),
    /// The lender ends.
    Ends(fn(Painted<D>) -> Result<()>),
}

/// All of them.
pub fn causes<D: Lends>() -> [Cause<D>; 11] {
    use Take::{Ends, Keeps};
    [
        Cause::ours("reset", Keeps(|lender| lender.reset(PATIENCE))).resetting(),
        Cause::ours("reset at once", Keeps(reset_at_once)).resetting(),
        Cause::ours("hot reset", Keeps(|lender| lender.hot_reset(&[], PATIENCE))).resetting(),
        Cause::ours("memory off, on", Keeps(memory_off_and_on)),
        Cause::ours("D3hot, D0", Keeps(sleep_and_wake)),
        Cause::ours("low power", Keeps(low_power)),
        Cause::ours("FLR", Keeps(|lender| lender.function_level_reset(PATIENCE))).resetting(),
        Cause {
            name: "error",
            happens: Some(|guest, device| guest.slot_of(&device.to_string())?.port_error(Severity::NonFatal)),
            take: Keeps(recover),
            resets: true,
        },
        Cause {
            name: "fatal error",
            happens: Some(|guest, device| guest.slot_of(&device.to_string())?.port_error(Severity::Fatal)),
            take: Keeps(recover),
            resets: true,
        },
        Cause::ours("close", Ends(close)),
        Cause::ours("unbind", Ends(unbind)),
    ]
}

impl<D: Lends> Cause<D> {
    /// A cause that needs nothing from outside the guest.
    const fn ours(name: &'static str, take: Take<D>) -> Self {
        Self { name, happens: None, take, resets: false }
    }

    /// The same, if it resets the device.
    const fn resetting(self) -> Self {
        Self { resets: true, ..self }
    }

    /// Takes the memory back. Gives the lender back unless it has ended.
    fn take(&self, painted: Painted<D>) -> Result<Option<Painted<D>>> {
        match self.take {
            Take::Keeps(take) => {
                take(&painted.lender)?;
                Ok(Some(painted))
            }
            Take::Ends(end) => end(painted).map(|()| None),
        }
    }
}

/// Waits for nobody: what is in flight is torn. What must be freed first cannot be torn, and is waited for.
fn reset_at_once<D: Lends>(lender: &Lender<D>) -> peervram::Result<()> {
    let options = RevokeOptions::within(Duration::ZERO).or_go_on();
    match lender.reset(options) {
        Err(error) if error.kind() == Kind::StillInUse => lender.reset(PATIENCE),
        other => other,
    }
}

fn memory_off_and_on<D: Lends>(lender: &Lender<D>) -> peervram::Result<()> {
    lender.set_memory_enabled(false, PATIENCE)?;
    thread::sleep(AWAY);
    lender.set_memory_enabled(true, PATIENCE)
}

fn sleep_and_wake<D: Lends>(lender: &Lender<D>) -> peervram::Result<()> {
    lender.set_power_state(PowerState::D3hot, PATIENCE)?;
    thread::sleep(AWAY);
    lender.set_power_state(PowerState::D0, PATIENCE)
}

fn low_power<D: Lends>(lender: &Lender<D>) -> peervram::Result<()> {
    lender.enter_low_power(PATIENCE)?;
    thread::sleep(AWAY);
    lender.leave_low_power()
}

/// The device has told of an error, and its memory is taken back unasked. A reset gives it back; where the
/// kernel has reset the link, memory decoding is off besides.
fn recover<D: Lends>(lender: &Lender<D>) -> peervram::Result<()> {
    while lender.generation() == 0 {
        thread::sleep(Duration::from_millis(1));
    }
    // The kernel has the device locked while it recovers by itself, and tells of the error once more where it gives
    // up: `pcie_do_recovery` in drivers/pci/pcie/err.c. An error in the middle of a reset takes another reset.
    while let Err(error) = lender.reset(PATIENCE) {
        if !matches!(error.kind(), Kind::Busy | Kind::Revoked) {
            return Err(error);
        }
        thread::sleep(Duration::from_millis(10));
    }
    lender.set_memory_enabled(true, PATIENCE)
}

/// How long memory stays away, while everyone goes on trying.
const AWAY: Duration = Duration::from_millis(50);

fn close<D: Lends>(painted: Painted<D>) -> Result<()> {
    let Painted { export, lender } = painted;
    lender.close(PATIENCE)?;
    drop(export);
    Ok(())
}

fn unbind<D: Lends>(painted: Painted<D>) -> Result<()> {
    let address = painted.lender.device().address();
    unbind_and_bind(address, || drop(painted))
}

/// The kernel waits for us; we are asked, and give the device up by ourselves. `end` is what is done before the device is
/// bound again.
pub fn unbind_and_bind(address: PciAddress, end: impl FnOnce()) -> Result<()> {
    let driver = address.driver().context("the device is bound to no driver")?;
    fs::write(address.sysfs_path().join("driver/unbind"), address.to_string()).context("unbinding")?;
    ensure!(address.driver().is_none(), "{address} is still bound");
    end();
    guest::bind(&address.to_string(), &driver)
}

/// Works on memory while it is taken back for `cause`; what came of it.
pub fn survive<W: Witness, D: Lends>(
    guest: &Guest,
    witness: &mut W,
    painted: Painted<D>,
    cause: &Cause<D>,
) -> Result<String> {
    let device = painted.lender.device().address();
    let attachment = painted.export.attach(witness.importer(), Trust::Unverified)?;
    let mut seen = Seen::default();
    seen.look_until(witness, &attachment, |seen| seen.right >= 2)?;
    thread::scope(|scope| {
        let revoker = scope.spawn(|| cause.take(painted));
        if let Some(happens) = cause.happens {
            seen.unannounced_below = 1;
            happens(guest, device)?;
        }
        seen.look_until(witness, &attachment, |_| revoker.is_finished())?;
        let left = revoker.join().map_err(|_| anyhow!("taking it back panicked"))??;
        let Some(painted) = left else {
            seen.look_until(witness, &attachment, |seen| seen.gone)?;
            return Ok(format!("gone; {}", in_words(&seen)));
        };
        let generation = painted.export.generation();
        ensure!(generation > 0, "nothing was taken back");
        let enough = seen.right + 2;
        seen.look_until(witness, &attachment, |seen| seen.right >= enough && seen.generation == generation)?;
        attachment.detach()?;
        drop(painted.export);
        painted.lender.close(PATIENCE)?;
        Ok(in_words(&seen))
    })
}

fn in_words(seen: &Seen) -> String {
    match seen.wrong {
        0 => format!("{} right, {} torn", seen.right, seen.torn),
        wrong => format!("{} right, {} torn, {wrong} wrong unannounced", seen.right, seen.torn),
    }
}

/// The same for every cause, each with memory that is lent anew.
fn survive_all<W: Witness, D: Lends>(
    guest: &Guest,
    witness: &mut W,
    lend: impl Fn() -> Result<Painted<D>>,
) -> Verdict {
    for cause in &causes::<D>() {
        let column = witness.name();
        let cell = survive(guest, witness, lend()?, cause)
            .with_context(|| format!("{} under {column}", cause.name))?;
        guest.cell("revoke", cause.name, column, &cell)?;
    }
    Ok(())
}

fn under_a_screen(guest: &Guest) -> Verdict {
    survive_all(guest, &mut Screen::new(guest)?, || Painted::card(guest))
}

fn under_shaders(guest: &Guest) -> Verdict {
    survive_all(guest, &mut Shader::new()?, || Painted::card(guest))
}

fn under_images(guest: &Guest) -> Verdict {
    survive_all(guest, &mut ImageReader::new()?, || Painted::card(guest))
}

fn under_iommufd(guest: &Guest) -> Verdict {
    let mut engine = CopyEngine::new(guest.model(1)?.address(), Interface::Cdev)?;
    survive_all(guest, &mut engine, || Painted::model(guest))
}

fn under_type1(guest: &Guest) -> Verdict {
    let mut engine = CopyEngine::new(guest.model(1)?.address(), Interface::Group)?;
    survive_all(guest, &mut engine, || Painted::model(guest))
}

fn under_the_holder(guest: &Guest) -> Verdict {
    survive_all(guest, &mut Holder::new(guest.virtio_gpu()?), || Painted::card(guest))
}
