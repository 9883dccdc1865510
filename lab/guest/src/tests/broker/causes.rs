//! Every cause of a revoke, with a client in another process and of another user: it is told, and where memory comes back
//! it imports again and sees right bytes.

use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result, anyhow, ensure};
use peervram::Lender;
use peervram::backends::vfio;
use peervram_lab::machine::Facts;
use peervram_model_driver::{ModelGpu, VRAM_BAR};

use super::scene::Scene;
use crate::borrower::{Borrower, With};
use crate::card::{CardDriver, MEMORY};
use crate::guest::Guest;
use crate::painted::{LAYOUT, Painter};
use crate::test::{Test, Verdict};
use crate::tests::revoke::table::{ASKED, Cause, Take, causes, unbind_and_bind};

pub const TESTS: &[Test] = &[
    Test::of_revoke("broker/every-cause-with-a-client-with-an-engine", with_an_engine)
        .on(Facts::has_peers_by_iommufd)
        .allowing(ASKED),
    Test::of_revoke("broker/causes-of-each-kind-with-a-client-with-a-screen", with_a_screen)
        .allowing(ASKED_OR_TORN),
    Test::of_revoke("broker/every-cause-with-a-client-with-the-holder", with_the_holder).allowing(ASKED),
    Test::of_revoke("broker/every-cause-with-a-client-that-is-copied-for", with_copies).allowing(ASKED),
];

/// What the kernel may say besides of a virtio GPU that was about to show memory when that was taken back under it, whose
/// access ended torn.
const ASKED_OR_TORN: &[&str] = &[ASKED[0], "response 0x1200", "response 0x1205"];

/// The lease, and the broker's own.
pub const EXPORTS: u64 = 2;

/// A lender whose memory is painted.
struct Lent {
    scene: Scene,
    painter: Arc<Painter>,
}

impl Lent {
    fn model(guest: &Guest) -> Result<Self> {
        let device = guest.model(0)?.open()?;
        let driver = Arc::new(ModelGpu::new(&device)?);
        let painter = Painter::new(&device, VRAM_BAR, driver, EXPORTS)?;
        Self::of(device, painter)
    }

    fn card(guest: &Guest) -> Result<Self> {
        let device = guest.card()?.open()?;
        let driver = Arc::new(CardDriver::start(&device)?);
        let painter = Painter::new(&device, MEMORY, driver, EXPORTS)?;
        Self::of(device, painter)
    }

    fn of(device: vfio::Device, painter: Arc<Painter>) -> Result<Self> {
        Ok(Self { scene: Scene::of(Lender::new(device), painter.aperture())?, painter })
    }
}

fn with_an_engine(guest: &Guest) -> Verdict {
    let with = With::Engine(guest.model(1)?.address());
    with_each(guest, &with, "engine, iommufd", causes(), || Lent::model(guest))
}

/// Of each kind of cause one: looking at a screen takes its time.
fn with_a_screen(guest: &Guest) -> Verdict {
    let some =
        causes().into_iter().filter(|cause| ["reset", "memory off, on", "unbind"].contains(&cause.name));
    with_each(guest, &With::Screen, "virtio-gpu", some, || Lent::card(guest))
}

fn with_the_holder(guest: &Guest) -> Verdict {
    with_each(guest, &With::Holder, "holder", causes(), || Lent::card(guest))
}

fn with_copies(guest: &Guest) -> Verdict {
    with_each(guest, &With::Copies, "copied", causes(), || Lent::card(guest))
}

fn with_each(
    guest: &Guest,
    with: &With,
    column: &str,
    causes: impl IntoIterator<Item = Cause<vfio::Device>>,
    lend: impl Fn() -> Result<Lent>,
) -> Verdict {
    for cause in causes {
        let survived = survive(guest, with, lend()?, &cause);
        let cell = survived.with_context(|| format!("{} with {column}", cause.name))?;
        guest.cell("a client of a broker", cause.name, column, &cell)?;
    }
    Ok(())
}

/// Looks at lent memory from another process while it is taken back for `cause`; what came of it.
fn survive(guest: &Guest, with: &With, lent: Lent, cause: &Cause<vfio::Device>) -> Result<String> {
    let Lent { scene, painter } = lent;
    let mut client = Borrower::start(guest, &scene.socket, with)?;
    client.ask(&format!("borrow {}", LAYOUT.end_bytes()))?;
    client.ask("attach")?;
    painter.paint()?;
    client.ask("look 0")?;
    let device = scene.lender.device().address();
    let seen = match cause.take {
        Take::Keeps(take) => {
            let lender = Arc::clone(&scene.lender);
            let taken = thread::spawn(move || take(&lender).map(|()| lender.generation()));
            // An error in a reset takes another one, so that which generation comes of it is not known before.
            let early = cause.happens.is_none().then(|| client.tell("look 1")).transpose()?;
            if let Some(happens) = cause.happens {
                happens(guest, device)?;
            }
            let seen = early.map(|()| client.hear()).transpose()?;
            let generation = taken.join().map_err(|_| anyhow!("taking it back panicked"))??;
            let seen = match seen {
                Some(seen) => seen,
                // The kernel tells of an error after it took the memory, and maybe twice, of which the client hears once.
                None => client.ask(&format!("look-for {generation}"))?,
            };
            let heard = client.ask("hear")?;
            check_heard(cause.name, &heard)?;
            client.ask("return")?;
            scene.wait_until("it is free", |status| {
                status.leases.is_empty() && status.quarantine.is_empty()
            })?;
            drop(painter);
            scene.close()?;
            seen
        }
        Take::Ends(_) if cause.name == "close" => {
            // A broker that ends waits for no client: what is inside is torn.
            client.tell("until-gone")?;
            drop(painter);
            scene.close()?;
            let seen = client.hear()?;
            check_heard(cause.name, &client.ask("hear-until gone")?)?;
            seen
        }
        Take::Ends(_) => {
            client.tell("until-gone")?;
            let mut seen = Ok(String::new());
            unbind_and_bind(device, || {
                seen = client.hear();
                drop((painter, scene));
            })?;
            check_heard(cause.name, &client.ask("hear-until gone")?)?;
            seen?
        }
    };
    let numbers: Vec<&str> = seen.split(' ').collect();
    ensure!(numbers.len() == 3, "it says {seen:?}");
    Ok(match numbers[2] {
        "0" => format!("{} right, {} torn", numbers[0], numbers[1]),
        wrong => format!("{} right, {} torn, {wrong} wrong unannounced", numbers[0], numbers[1]),
    })
}

/// What the client heard, in its order. Which revokes an error takes is the kernel's affair: it tells of some twice.
fn check_heard(cause: &str, heard: &str) -> Result<()> {
    let expected: &[&str] = match cause {
        "reset" => &["draining(reset) restored"],
        "hot reset" => &["draining(hot-reset) restored"],
        "FLR" => &["draining(function-reset) restored"],
        // Waiting for nobody, it may come before the client has heard of it, or after.
        "reset at once" => &[
            "draining(reset) restored",
            "draining(reset) revoked(reset) restored",
            "draining(reset) late revoked(reset) restored",
        ],
        "memory off, on" => &["draining(memory-disabled) revoked(memory-disabled) restored"],
        "D3hot, D0" | "low power" => &["draining(power-state) revoked(power-state) restored"],
        "error" | "fatal error" => {
            let is_so = heard.starts_with("draining(device-error)")
                && heard.contains("revoked(device-error)")
                && heard.ends_with("restored");
            ensure!(is_so, "it heard {heard:?}");
            return Ok(());
        }
        "close" => &["draining(exporter-gone) gone"],
        // The kernel does not wait as long as somebody may look at a screen.
        "unbind" => &[
            "draining(device-requested) revoked(device-requested) draining(exporter-gone) gone",
            "draining(device-requested) late revoked(device-requested) draining(exporter-gone) gone",
        ],
        other => anyhow::bail!("what is heard of {other:?}?"),
    };
    ensure!(expected.contains(&heard), "it heard {heard:?}, not one of {expected:?}");
    Ok(())
}
