//! Real Vulkan drivers import memory of the lender, and the kernel says what becomes of it: each driver on a stand-in for
//! its GPU (`lab/drm`), where no byte moves.
//!
//! What is seen makes one table, driver by case. Each cell is compared with what the library's own tables foretell
//! (`ImportPolicy` and `import_support`), so a driver that is another one tomorrow fails a test.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use peervram::backends::vulkan::{
    BufferUsage, Device, Engine, ImageOptions, ImportOptions, ImportPolicy, Submissions, Tiling,
};
use peervram::backends::{
    Aperture, DmaBuf, DmaRange, DmaRanges, ImageLayout, Importer, OnRefusal, RawBytes, import_support, vfio,
};
use peervram::{AttachOptions, Direction, Error, Export, Kind, Lender, Path, Trust};
use peervram_lab::machine::Facts;

use crate::application::Application;
use crate::crossing::{PATIENCE, VRAM, open_device};
use crate::driver::Driver;
use crate::guest::Guest;
use crate::lender_process::LenderProcess;
use crate::test::{Test, Verdict};

/// A process for each: a driver that crashes while it imports takes no other with it.
pub const TESTS: &[Test] = &[
    Test::of_driver("drivers/radv-polaris10-imports", "radv-polaris10", imports).on(Facts::allows_peers),
    Test::of_driver("drivers/radv-polaris10-revoked", "radv-polaris10", revoked).on(Facts::allows_peers),
    Test::of_driver("drivers/radv-polaris10-refused", "radv-polaris10", refused).on(refuses_peers),
    Test::of_driver("drivers/radv-vega10-imports", "radv-vega10", imports).on(Facts::allows_peers),
    Test::of_driver("drivers/radv-vega10-revoked", "radv-vega10", revoked).on(Facts::allows_peers),
    Test::of_driver("drivers/radv-vega10-refused", "radv-vega10", refused).on(refuses_peers),
    Test::of_driver("drivers/radv-navi10-imports", "radv-navi10", imports).on(Facts::allows_peers),
    Test::of_driver("drivers/radv-navi10-revoked", "radv-navi10", revoked).on(Facts::allows_peers),
    Test::of_driver("drivers/radv-navi10-refused", "radv-navi10", refused).on(refuses_peers),
    Test::of_driver("drivers/radv-navi21-imports", "radv-navi21", imports).on(Facts::allows_peers),
    Test::of_driver("drivers/radv-navi21-revoked", "radv-navi21", revoked).on(Facts::allows_peers),
    Test::of_driver("drivers/radv-navi21-refused", "radv-navi21", refused).on(refuses_peers),
    Test::of_driver("drivers/radv-navi31-imports", "radv-navi31", imports).on(Facts::allows_peers),
    Test::of_driver("drivers/radv-navi31-revoked", "radv-navi31", revoked).on(Facts::allows_peers),
    Test::of_driver("drivers/radv-navi31-refused", "radv-navi31", refused).on(refuses_peers),
    Test::of_driver("drivers/anv-b580-imports", "anv-b580", imports).on(Facts::allows_peers),
    Test::of_driver("drivers/anv-b580-revoked", "anv-b580", revoked).on(Facts::allows_peers),
    Test::of_driver("drivers/anv-b580-refused", "anv-b580", refused).on(refuses_peers),
    Test::of_driver("drivers/radv-navi31-unknown", "radv-navi31", unknown).on(Facts::allows_peers),
    Test::of_driver("drivers/nvk-imports", "nvk", imports).on(Facts::allows_peers),
    Test::of_driver("drivers/nvk-revoked", "nvk", revoked).on(Facts::allows_peers),
    Test::of_driver("drivers/nvk-refused", "nvk", refused).on(refuses_peers),
];

fn refuses_peers(facts: &Facts) -> bool {
    !facts.allows_peers()
}

/// The table.
const TABLE: &str = "real Vulkan drivers";

const LENT_BYTES: u64 = 4 << 20;
const ENODEV: i32 = 19;
const ENOMEM: i32 = 12;

/// Drivers compile shaders on a CPU that is itself emulated.
const SLOW: Duration = Duration::from_secs(50);

/// What came of a case.
#[derive(Debug)]
enum Came {
    /// It worked, in these words.
    Ok(&'static str),
    /// It was refused, and the device lives.
    Refused(Error),
    /// The `VkDevice` is lost.
    Lost,
}

/// A driver, a device of it, and where its column is written.
struct Column<'a> {
    guest: &'a Guest,
    driver: Driver,
    device: Arc<Device>,
}

impl<'a> Column<'a> {
    fn new(guest: &'a Guest) -> Result<Self> {
        let driver = Driver::of_test()?;
        let device = driver.open(guest)?;
        Ok(Self { guest, driver, device })
    }

    /// After a device was lost.
    fn open_anew(&mut self) -> Result<()> {
        self.device = self.driver.open(self.guest)?;
        Ok(())
    }

    fn policy(&self) -> &'static ImportPolicy {
        self.device.description().import_policy()
    }

    /// Whether the kernel driver takes memory of VFIO devices.
    fn imports(&self) -> Result<bool> {
        let kernel = self.driver.vulkan.kernel;
        Ok(import_support(kernel).with_context(|| format!("{kernel} is in no table"))?.can_import)
    }

    /// Writes the cell of a case, which must have come as it was foretold.
    fn cell(&self, case: &str, came: &Came, foretold: Foretold) -> Result<()> {
        let text = match came {
            Came::Ok(how) => (*how).to_owned(),
            Came::Refused(error) => format!("refused: {}", error.kind().code()),
            Came::Lost => "device lost".into(),
        };
        let is_so = match (came, foretold) {
            (Came::Ok(_), Foretold::Works) | (Came::Lost, Foretold::LosesDevice) => true,
            (Came::Refused(error), Foretold::RefusedAs(kind)) => error.kind() == kind,
            _ => false,
        };
        let foreseen = if is_so && matches!(came, Came::Lost) { ", foretold" } else { "" };
        self.guest.cell(TABLE, case, self.driver.vulkan.name, &format!("{text}{foreseen}"))?;
        ensure!(is_so, "{} under {}: {came:?}, and {foretold:?} was foretold", case, self.driver.vulkan.name);
        Ok(())
    }

    /// What an import that goes well comes to under this driver.
    fn import_foretold(&self) -> Result<Foretold> {
        Ok(if self.imports()? { Foretold::Works } else { Foretold::RefusedAs(Kind::ImporterCannot) })
    }

    /// Has the device do work that has nothing to do with lent memory.
    fn works(&self) -> Result<()> {
        works(&self.device)
    }

    /// The same, for a cell.
    fn comes_to(&self, how: &'static str) -> Result<Came> {
        match self.works() {
            Ok(()) => Ok(Came::Ok(how)),
            Err(error) if is_lost(&error) => Ok(Came::Lost),
            Err(error) => Err(error),
        }
    }

    /// Imports, and works while the import is alive.
    fn import(&self, dma_buf: &DmaBuf, options: &ImportOptions) -> Result<Came> {
        match self.device.import_dma_buf(dma_buf, options) {
            Ok(_alive) => self.comes_to("ok"),
            Err(error) => self.survives(error),
        }
    }

    /// What a refusal comes to: whether the device works afterwards.
    fn survives(&self, error: Error) -> Result<Came> {
        match self.works() {
            Ok(()) => Ok(Came::Refused(error)),
            Err(lost) if is_lost(&lost) => Ok(Came::Lost),
            Err(other) => Err(other).with_context(|| format!("after: {error}")),
        }
    }
}

fn works(device: &Device) -> Result<()> {
    let memory = device.stage(4096)?;
    Ok(Engine::new(device)?.upload(&memory, 0, &[1; 64], Instant::now() + SLOW)?)
}

/// What the library's tables say of a case.
#[derive(Debug, Clone, Copy)]
enum Foretold {
    Works,
    RefusedAs(Kind),
    LosesDevice,
}

fn is_lost(error: &anyhow::Error) -> bool {
    let error = error.downcast_ref::<Error>();
    error.is_some_and(|error| error.kind() == Kind::Vulkan && error.why().contains("VK_ERROR_DEVICE_LOST"))
}

/// A lender, and some of its memory.
fn lend(guest: &Guest) -> Result<(Lender<vfio::Device>, Export)> {
    let device = open_device(guest)?;
    let ranges = DmaRanges::new(device.region(VRAM)?, &[DmaRange::new(0, LENT_BYTES)])?;
    let lender = Lender::new(device);
    let export = lender.export(Aperture::owned(ranges, Arc::new(RawBytes)))?;
    Ok((lender, export))
}

/// Another part of it.
fn lend_more(lender: &Lender<vfio::Device>) -> Result<Export> {
    let device = lender.device();
    let region = device.regions().iter().find(|region| region.index == VRAM).context("it has no VRAM")?;
    let ranges = DmaRanges::new(region, &[DmaRange::new(2 * LENT_BYTES, LENT_BYTES)])?;
    Ok(lender.export(Aperture::owned(ranges, Arc::new(RawBytes)))?)
}

fn dma_buf(export: &Export) -> Result<&DmaBuf> {
    export.dma_buf().map_err(|error| error.clone().into())
}

/// As a buffer and as an image, alone and two at once.
fn imports(guest: &Guest) -> Verdict {
    let column = Column::new(guest)?;
    let (lender, export) = lend(guest)?;
    let lent = dma_buf(&export)?;
    let foretold = column.import_foretold()?;
    column.cell("buffer", &column.import(lent, &ImportOptions::default())?, foretold)?;
    let dedicated = ImportOptions { dedicated: true, ..Default::default() };
    column.cell("dedicated buffer", &column.import(lent, &dedicated)?, foretold)?;
    with_address(&column, lent)?;
    two_at_once(&column, lent, dma_buf(&lend_more(&lender)?)?)?;
    images(&column, lent)?;

    column.driver.fail(Some(("map-address", ENOMEM)))?;
    let came = column.import(lent, &ImportOptions::default())?;
    let foretold = if column.imports()? { Foretold::RefusedAs(Kind::Vulkan) } else { foretold };
    column.cell("no room for an address", &came, foretold)
}

/// As a buffer that shaders find at an address, on a device of an application's own.
fn with_address(column: &Column<'_>, lent: &DmaBuf) -> Result<()> {
    let application = Application::open()?;
    let usage = BufferUsage::default() | BufferUsage::SHADER_DEVICE_ADDRESS;
    let came =
        match application.importer().import_dma_buf(lent, &ImportOptions { usage, ..Default::default() }) {
            Ok(_alive) => works(application.importer()).map(|()| Came::Ok("ok"))?,
            Err(error) => Came::Refused(error),
        };
    column.cell("buffer with an address", &came, column.import_foretold()?)
}

/// What a submission lists while two imports are alive and it works on neither.
fn two_at_once(column: &Column<'_>, first: &DmaBuf, second: &DmaBuf) -> Result<()> {
    if !column.imports()? {
        return Ok(());
    }
    let _first = column.device.import_dma_buf(first, &ImportOptions::default())?;
    let _second = column.device.import_dma_buf(second, &ImportOptions::default())?;
    let before = column.driver.submissions()?.len();
    column.works()?;
    let listed = column.driver.submissions()?.split_off(before);
    ensure!(!listed.is_empty(), "nothing was submitted");
    let every = listed.iter().all(|&imports| imports == 2);
    let foretold = column.policy().submissions == Submissions::MapEveryImport;
    ensure!(
        every == foretold,
        "submissions list {listed:?}, and the table has {:?}",
        column.policy().submissions
    );
    column.cell("two imports, other work", &Came::Ok("ok: each submission lists both"), Foretold::Works)
}

/// Rows of 640 pixels, at distances of which the first two are multiples of 256.
const STRIDES: [u32; 4] = [2560, 2816, 2564, 2624];

fn images(column: &Column<'_>, lent: &DmaBuf) -> Result<()> {
    let has_layouts = column
        .device
        .description()
        .missing_extensions
        .iter()
        .all(|missing| missing.name != c"VK_EXT_image_drm_format_modifier");
    let import = |tiling: Tiling, stride_bytes: u32| -> Result<Came> {
        let layout = ImageLayout { offset_bytes: 0, width: 640, height: 480, stride_bytes };
        let importer = column.device.for_images(layout, ImageOptions { tiling, ..Default::default() });
        match importer.import(lent) {
            Ok(_alive) => column.comes_to("ok"),
            Err(error) => column.survives(error),
        }
    };
    let (policy, name) = (column.policy(), column.device.description().name.as_str());
    let works = column.import_foretold()?;
    let foretold = match policy.linear_images {
        Some(false) => Foretold::RefusedAs(Kind::Unsupported),
        _ => works,
    };
    column.cell("image, the driver's rows", &import(Tiling::Linear, STRIDES[0])?, foretold)?;
    for stride in STRIDES {
        let came = import(Tiling::EXPLICIT_LINEAR, stride)?;
        let takes = policy.rows.is_none_or(|rows| rows.take(name, STRIDES[0], stride));
        let foretold = match (has_layouts, takes) {
            (false, _) => Foretold::RefusedAs(Kind::VulkanMissing),
            (true, true) => works,
            (true, false) => Foretold::RefusedAs(Kind::InvalidInput),
        };
        column.cell(&format!("image, rows {stride} apart"), &came, foretold)?;
        let Came::Refused(error) = came else { continue };
        if has_layouts && !takes {
            let next = error.next_step().context("it does not say what to do")?;
            let works = if policy.rows.is_some_and(|rows| rows.take(name, STRIDES[0], 2816)) {
                "2816"
            } else {
                "2560"
            };
            ensure!(next.contains(works), "the next distance that works is {works}: {error}");
        }
    }
    Ok(())
}

/// Memory is taken back, from an application that leaves it to the library, and from one that does not.
fn revoked(guest: &Guest) -> Verdict {
    let mut column = Column::new(guest)?;
    if !column.imports()? {
        let (_lender, export) = lend(guest)?;
        let options = AttachOptions::new(Trust::Unverified).with_paths(&[Path::Peer]);
        let Err(error) = export.attach(Arc::clone(&column.device), options) else { bail!("it was attached") };
        let came = column.survives(error.into())?;
        return column.cell("attached", &came, Foretold::RefusedAs(Kind::ImporterCannot));
    }
    by_the_book(&column)?;
    behind_the_librarys_back(&mut column)?;
    owner_ends(&mut column)
}

/// What docs/revoke.md says an application does: nothing, but `current`.
fn by_the_book(column: &Column<'_>) -> Result<()> {
    let (lender, export) = lend(column.guest)?;
    let attachment = export.attach(Arc::clone(&column.device), Trust::Unverified)?;
    ensure!(attachment.path() == Path::Peer, "by {}: {:?}", attachment.path(), attachment.refused());
    let listed = || -> Result<Option<usize>> { Ok(column.driver.submissions()?.last().copied()) };
    column.works()?;
    ensure!(listed()? == Some(1), "while it is attached, submissions list {:?}", listed()?);

    lender.reset(PATIENCE)?;
    column.cell("reset, idle", &column.comes_to("ok")?, Foretold::Works)?;
    attachment.current()?;
    column.works()?;
    ensure!(listed()? == Some(1), "it is not imported again: submissions list {:?}", listed()?);
    column.cell("imported again", &Came::Ok("ok"), Foretold::Works)?;

    let access = attachment.enter(Direction::Both)?;
    Engine::new(&column.device)?.upload(access.memory(), 0, &[2; 64], Instant::now() + SLOW)?;
    access.finish().check()?;
    lender.reset(PATIENCE)?;
    attachment.current()?;
    column.cell("reset after work on it", &column.comes_to("ok")?, Foretold::Works)?;

    // While it is away, whatever lists it fails: with what the kernel says, and once more with what a test says.
    column.driver.fail(Some(("submit", ENODEV)))?;
    lender.set_memory_enabled(false, PATIENCE)?;
    let came = column.comes_to("ok: freed before")?;
    column.driver.fail(None)?;
    column.cell("away, other work", &came, Foretold::Works)?;
    ensure!(listed()? == Some(0), "while it is away, submissions list {:?}", listed()?);
    let Err(error) = attachment.current() else { bail!("it was imported while it is away") };
    ensure!(error.kind() == Kind::Revoked, "{error}");
    lender.set_memory_enabled(true, PATIENCE)?;
    attachment.current()?;
    column.works()?;
    lender.close(PATIENCE)?;
    column.cell("closed", &column.comes_to("ok: freed before")?, Foretold::Works)
}

/// What live imports come to while their memory is away.
fn with_dead_imports(column: &Column<'_>) -> Foretold {
    match column.policy().submissions {
        Submissions::Independent => Foretold::Works,
        _ => Foretold::LosesDevice,
    }
}

/// An import that the library does not know of is alive while the memory is away.
fn behind_the_librarys_back(column: &mut Column<'_>) -> Result<()> {
    let (lender, export) = lend(column.guest)?;
    let kept = column.device.import_dma_buf(dma_buf(&export)?, &ImportOptions::default())?;
    lender.set_memory_enabled(false, PATIENCE)?;
    let came = column.comes_to("ok")?;
    column.cell("away, an import kept", &came, with_dead_imports(column))?;
    drop(kept);
    column.open_anew()?;
    // What cannot be attached is refused by an error.
    let came = column.import(dma_buf(&export)?, &ImportOptions::default())?;
    column.cell("imported while away", &came, Foretold::RefusedAs(Kind::ImporterCannot))?;
    lender.close(PATIENCE)?;
    Ok(())
}

/// The process that owns the device is killed while its memory is imported here.
fn owner_ends(column: &mut Column<'_>) -> Result<()> {
    let (mut lender, lent) = LenderProcess::start(&column.guest.lender()?, LENT_BYTES, 1)?;
    let kept = column.device.import_dma_buf(&lent, &ImportOptions::default())?;
    column.works()?;
    lender.kill()?;
    let deadline = Instant::now() + PATIENCE;
    while lender.ended()?.is_none() {
        ensure!(Instant::now() < deadline, "the lender does not end");
        std::thread::sleep(Duration::from_millis(10));
    }
    column.cell("owner killed", &column.comes_to("ok")?, with_dead_imports(column))?;
    drop(kept);
    column.open_anew()?;
    let came = column.import(&lent, &ImportOptions::default())?;
    column.cell("imported after its end", &came, Foretold::RefusedAs(Kind::ImporterCannot))
}

/// A topology that the kernel refuses: the library does not try, and what comes of trying.
fn refused(guest: &Guest) -> Verdict {
    let column = Column::new(guest)?;
    let (_lender, export) = lend(guest)?;
    let before = column.driver.submissions()?.len();
    let options = AttachOptions::new(Trust::Unverified).with_paths(&[Path::Peer]);
    let Err(error) = export.attach(Arc::clone(&column.device), options) else { bail!("it was attached") };
    let came = column.survives(error.into())?;
    let kind = if column.imports()? { Kind::RouteRefused } else { Kind::ImporterCannot };
    column.cell("attached over a refused route", &came, Foretold::RefusedAs(kind))?;
    ensure!(column.driver.submissions()?[before..].iter().all(|&imports| imports == 0), "it was imported");

    // What would have come of it.
    let came = column.import(dma_buf(&export)?, &ImportOptions::default())?;
    let foretold = match column.policy().on_refusal {
        OnRefusal::LosesDevice => Foretold::LosesDevice,
        _ => Foretold::RefusedAs(Kind::ImporterCannot),
    };
    column.cell("tried all the same", &came, foretold)
}

/// A GPU of which the kernel does not say where it is: nobody can foretell what becomes of an import.
fn unknown(guest: &Guest) -> Verdict {
    let driver = Driver::of_test()?;
    driver.place_at("0000:7f:00.0")?;
    let column = Column { guest, device: driver.open(guest)?, driver };
    let (_lender, export) = lend(guest)?;
    let verified = AttachOptions::new(Trust::Verified(Direction::Both)).with_paths(&[Path::Peer]);
    let Err(error) = export.attach(Arc::clone(&column.device), verified) else { bail!("it was attached") };
    ensure!(error.kind() == Kind::Unverified && error.to_string().contains("not tried"), "{error}");
    column.works()?;
    ensure!(column.driver.submissions()?.iter().all(|&imports| imports == 0), "it was imported");
    // Who wants no proof dares.
    let attachment = export.attach(Arc::clone(&column.device), Trust::Unverified)?;
    ensure!(attachment.path() == Path::Peer, "by {}: {:?}", attachment.path(), attachment.refused());
    column.works()
}
