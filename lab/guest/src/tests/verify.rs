//! Verification between two model GPUs: what is certified, what is caught, and what voids a certificate.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use peervram::backends::topology::Topology;
use peervram::backends::vfio::{Device, Interface, IoAddressSpace};
use peervram::backends::{Aperture, DmaRange, DmaRanges, PciAddress};
use peervram::verify::{Certificate, Faults, Limits, Observer, Store};
use peervram::{Attachment, Direction, Export, Kind, Lender, Path, Trust};
use peervram_lab::machine::Iommu;
use peervram_model::misbehaviour::Misbehaviour;
use peervram_model_driver::{ImportingGpu, ModelGpu, VRAM_BAR};

use crate::guest::Guest;
use crate::model::Model;
use crate::test::{Test, Verdict};

pub const TESTS: &[Test] = &[
    Test::of_models("verify/healthy-pair-is-certified", healthy_pair_is_certified),
    Test::of_models("verify/everything-is-tested-when-asked-for", everything_is_tested).on_any_topology(),
    Test::of_models("verify/each-misbehaviour-is-caught", each_misbehaviour_is_caught).on_any_topology(),
    Test::of_models("verify/private-mirror-is-seen-by-the-owners-engine-only", private_mirror),
    Test::of_models("verify/importer-that-is-gone-is-told", importer_that_is_gone),
    Test::of_models("verify/acs-bit-voids", acs_bit_voids),
    Test::of_models("verify/command-line-voids", command_line_voids),
    Test::of_models("verify/verified-attachment-is-tested-once", verified_attachment_is_tested_once)
        .on_any_topology(),
];

const OFFSET_BYTES: u64 = 16 << 20;
const SIZE_BYTES: u64 = 8 << 20;

/// The lender with its driver, and another GPU whose engine reaches what is lent.
struct Pair<'guest> {
    lender_model: Model<'guest>,
    other_model: Model<'guest>,
    // Fields drop in this order: imports, drivers, devices.
    attachment: Attachment<ImportingGpu>,
    importer: Arc<ImportingGpu>,
    export: Export,
    _other_device: Device,
    _lender: Lender<Device>,
}

impl<'guest> Pair<'guest> {
    fn new(guest: &'guest Guest) -> Result<Self> {
        Self::of(guest, SIZE_BYTES)
    }

    fn of(guest: &'guest Guest, size_bytes: u64) -> Result<Self> {
        let (lender_model, other_model) = (guest.model(0)?, guest.model(1)?);
        // An iommufd maps BARs in a way that QEMU's virtio-iommu does not pass on to models.
        let cdev = match guest.facts().iommu {
            Iommu::Virtio => None,
            _ => IoAddressSpace::new(Interface::Cdev).ok(),
        };
        let space = cdev.map_or_else(|| IoAddressSpace::new(Interface::Group), Ok)?;
        let device = Device::open_into(&IoAddressSpace::new(space.interface())?, lender_model.address());
        let device = match device {
            // Below a switch without ACS both are of one group, which has one owner.
            Err(error) if error.kind() == Kind::Busy => Device::open_into(&space, lender_model.address())?,
            other => other?,
        };
        let owner = Arc::new(ModelGpu::new(&device)?);
        let range = DmaRange::new(OFFSET_BYTES, size_bytes);
        let ranges = DmaRanges::new(device.region(VRAM_BAR)?, &[range])?;
        let lender = Lender::new(device);
        let export = lender.export(Aperture::owned(ranges, owner))?;
        let other_device = Device::open_into(&space, other_model.address())?;
        let gpu = Arc::new(ModelGpu::new(&other_device)?);
        let importer = Arc::new(ImportingGpu::new(&other_device, gpu, 0..0)?);
        let attachment = export.attach(Arc::clone(&importer), Trust::Unverified)?;
        Ok(Self {
            lender_model,
            other_model,
            attachment,
            importer,
            export,
            _other_device: other_device,
            _lender: lender,
        })
    }

    fn verify(&self, direction: Direction, limits: &Limits) -> Result<Certificate> {
        Ok(self.attachment.verify(direction, limits, &mut |_| ())?)
    }

    fn grants(&self, certificate: &Certificate, direction: Direction) -> peervram::Result<()> {
        certificate.grants(&self.attachment.request(direction))
    }

    fn current(&self, store: &Store, certificate: &Certificate) -> peervram::Result<Certificate> {
        let now = self.attachment.fingerprint();
        store.current(&certificate.subject, &self.attachment.request(Direction::Both), &now)
    }

    fn host_checksum(&self) -> Result<u32> {
        self.lender_model.host_checksum(OFFSET_BYTES, SIZE_BYTES)
    }
}

fn limits() -> Limits {
    let mut limits = Limits::default();
    limits.quick_bytes = 512 << 10;
    limits
}

fn store(name: &str) -> Store {
    Store::at(format!("/tmp/certificates/{name}"))
}

fn healthy_pair_is_certified(guest: &Guest) -> Verdict {
    let pair = Pair::new(guest)?;
    let before = pair.host_checksum()?;
    let certificate = pair.verify(Direction::Both, &Limits::default())?;
    pair.grants(&certificate, Direction::Both)?;
    ensure!(certificate.tests.len() == 2, "{certificate:?}");
    for test in &certificate.tests {
        ensure!(test.observer == Observer::OwnerEngine && test.engine == "copy engine", "{test:?}");
        ensure!(test.faults == Faults::Watched(Vec::new()), "{:?}", test.faults);
        ensure!(test.places.iter().any(|place| place.name.contains("across 2 MiB")), "{:?}", test.places);
        let figure = test.figure.context("no figure")?;
        let text = format!(
            "{} KiB in {:.0} ms, {:.1} MB/s",
            figure.size_bytes >> 10,
            figure.time_ns as f64 / 1e6,
            figure.mb_per_s()
        );
        guest.cell("verify: a healthy pair", test.direction.name(), test.engine.as_str(), &text)?;
    }
    ensure!(pair.host_checksum()? == before, "what was in VRAM was not put back");
    let store = store("healthy");
    let file = store.keep(certificate.clone()).context("the certificate was not kept")?;
    ensure!(pair.current(&Store::at(file.parent().context("no folder")?), &certificate)? == certificate);
    Ok(())
}

/// In pieces of 16 MiB, of which this has more than two; and a page that is wrong in the last of them is found by nothing else.
fn everything_is_tested(guest: &Guest) -> Verdict {
    const SIZE_BYTES: u64 = 40 << 20;
    /// Where no quick test looks: neither an end, nor the middle, nor beside a border.
    const BAD_PAGE: u64 = OFFSET_BYTES + (37 << 20) + (20 << 10);
    let pair = Pair::of(guest, SIZE_BYTES)?;
    let before = pair.lender_model.host_checksum(OFFSET_BYTES, SIZE_BYTES)?;
    let quick = limits();
    let mut full = limits();
    full.full = true;
    let mut last = 0;
    let certificate =
        pair.attachment.verify(Direction::Write, &full, &mut |progress| last = progress.done_bytes)?;
    ensure!(certificate.tests.len() == 1 && certificate.tests[0].full, "{certificate:?}");
    ensure!(certificate.passed(), "{certificate:?}");
    ensure!(last == SIZE_BYTES, "progress ends at {last:#x}");
    ensure!(certificate.tests[0].copied_bytes > 2 * SIZE_BYTES, "{certificate:?}");
    ensure!(
        pair.lender_model.host_checksum(OFFSET_BYTES, SIZE_BYTES)? == before,
        "what was in VRAM was not put back"
    );

    pair.lender_model.misbehave(Misbehaviour::BadPage { offset_bytes: BAD_PAGE })?;
    let certificate = pair.verify(Direction::Write, &quick)?;
    ensure!(certificate.passed(), "a quick test sees it: {certificate:?}");
    let certificate = pair.verify(Direction::Write, &full)?;
    let failure = certificate.tests[0].failure.as_ref().context("a bad page passes a full test")?.to_string();
    let place = format!("{:#x}", BAD_PAGE - OFFSET_BYTES);
    ensure!(failure.contains(&place), "it is not said that {place} is wrong: {failure}");
    pair.lender_model.behave()
}

fn each_misbehaviour_is_caught(guest: &Guest) -> Verdict {
    const TABLE: &str = "verify: what is said of a model GPU that goes wrong";
    for (name, how) in [
        ("all-ones", Misbehaviour::AllOnes),
        ("zeros", Misbehaviour::Zeros),
        ("dead-reads", Misbehaviour::DeadReads),
        ("dead-writes", Misbehaviour::DeadWrites),
        ("stuck-fence", Misbehaviour::StuckFence),
    ] {
        for direction in [Direction::Read, Direction::Write] {
            let pair = Pair::new(guest)?;
            let mut limits = limits();
            limits.copy_timeout = Duration::from_secs(2);
            pair.other_model.misbehave(how)?;
            let certificate = pair.verify(direction, &limits)?;
            pair.other_model.behave()?;
            let error = pair.grants(&certificate, direction).err();
            let error = error.with_context(|| format!("{name} passes a test of {direction}s"))?;
            ensure!(error.kind() == Kind::Unverified, "{error}");
            let why = certificate.tests[0].failure.as_ref().context("no failure")?.to_string();
            let words = match how {
                Misbehaviour::AllOnes => "all ones",
                Misbehaviour::Zeros => "zeros",
                Misbehaviour::StuckFence => "did not end in time",
                _ => "nothing was",
            };
            ensure!(why.contains(words), "{name}, {direction}: {why}");
            let short = why.rsplit_once("look like ").map_or("did not end in time", |(_, text)| text);
            guest.cell(TABLE, name, direction.name(), short)?;
        }
    }
    Ok(())
}

/// The lender's engine works on other memory than its BAR shows.
fn private_mirror(guest: &Guest) -> Verdict {
    let pair = Pair::new(guest)?;
    pair.lender_model.misbehave(Misbehaviour::Mirror)?;
    for direction in [Direction::Read, Direction::Write] {
        let certificate = pair.verify(direction, &limits())?;
        ensure!(
            !certificate.passed(),
            "the owner's engine does not see its mirror in a test of {direction}s"
        );
        let why = certificate.tests[0].failure.as_ref().context("no failure")?.to_string();
        guest.cell("verify: a private mirror", direction.name(), "the owner's engine", &why)?;

        let mut limits = limits();
        limits.by_cpu = true;
        let certificate = pair.verify(direction, &limits)?;
        ensure!(certificate.passed(), "the window sees it: {certificate:?}");
        ensure!(certificate.tests[0].observer == Observer::OwnerCpuThroughBar, "{certificate:?}");
        let error = pair.grants(&certificate, direction).err().context("the window alone grants a path")?;
        guest.cell(
            "verify: a private mirror",
            direction.name(),
            "the window only",
            "right bytes, not granted",
        )?;
        ensure!(error.to_string().contains("same window only"), "{error}");
    }
    Ok(())
}

fn importer_that_is_gone(guest: &Guest) -> Verdict {
    let pair = Pair::new(guest)?;
    pair.other_model.remove()?;
    let certificate = pair.verify(Direction::Read, &limits());
    pair.other_model.insert()?;
    let certificate = certificate?;
    let failure = certificate.tests[0].failure.as_ref().context("a device that is not there copies")?;
    ensure!(failure.to_string().contains("the engine failed"), "{failure}");
    Ok(())
}

/// The control register of a port's ACS capability, in its configuration space as sysfs shows it.
struct AcsControl {
    port: PciAddress,
    config: File,
    offset: u64,
}

impl AcsControl {
    /// That of the first bridge above `address` that has one.
    fn above(address: PciAddress) -> Result<Option<Self>> {
        let topology = Topology::read()?;
        let (way, _) = topology.way_up(address).map_err(anyhow::Error::msg)?;
        for place in way.iter().skip(1) {
            if let Some(acs) = place.config.known().and_then(|config| config.acs().found()) {
                let path = place.address().sysfs_path().join("config");
                let config = File::options().read(true).write(true).open(path)?;
                // PCI_ACS_CTRL
                let offset = u64::from(acs.offset) + 6;
                return Ok(Some(Self { port: place.address(), config, offset }));
            }
        }
        Ok(None)
    }

    fn get(&self) -> Result<u16> {
        let mut bytes = [0; 2];
        self.config.read_exact_at(&mut bytes, self.offset)?;
        Ok(u16::from_le_bytes(bytes))
    }

    fn set(&self, control: u16) -> Result<()> {
        Ok(self.config.write_all_at(&control.to_le_bytes(), self.offset)?)
    }
}

fn acs_bit_voids(guest: &Guest) -> Verdict {
    const REQUEST_REDIRECT: u16 = 0x04;
    let pair = Pair::new(guest)?;
    let Some(acs) = AcsControl::above(pair.lender_model.address())? else {
        crate::skip!("no port above the lender has ACS");
    };
    let store = store("acs");
    let certificate = pair.verify(Direction::Both, &limits())?;
    store.keep(certificate.clone());
    pair.current(&store, &certificate)?;

    let before = acs.get()?;
    acs.set(before ^ REQUEST_REDIRECT)?;
    let result = pair.current(&store, &certificate);
    let changed = acs.get()?;
    acs.set(before)?;
    ensure!(changed == before ^ REQUEST_REDIRECT, "the bit did not change: {changed:#x}");
    let error = result.err().context("a changed ACS bit voids nothing")?;
    let expected = format!("ACS control of {} was {before:#06x} and is {changed:#06x}", acs.port);
    ensure!(error.to_string().contains(&expected), "{error}");
    guest.cell("verify: what voids a certificate", "an ACS bit", "says", &expected)?;
    pair.current(&store, &certificate)?;
    Ok(())
}

/// As after a reboot with another one: the file has the command line of then.
fn command_line_voids(guest: &Guest) -> Verdict {
    let pair = Pair::new(guest)?;
    let certificate = pair.verify(Direction::Both, &limits())?;
    let file = store("command-line").keep(certificate.clone()).context("the certificate was not kept")?;
    let text = std::fs::read_to_string(&file)?;
    let now = certificate.fingerprint.line("the kernel command line").context("no command line")?;
    let then = format!("{now} iommu=pt");
    let changed = text.replacen(now, &then, 1);
    ensure!(changed != text, "the file has no command line: {text}");
    std::fs::write(&file, changed)?;
    // As the next process reads it.
    let error = pair.current(&store("command-line"), &certificate).err();
    let error = error.context("another command line voids nothing")?;
    let expected = format!("the kernel command line was {then} and is {now}");
    ensure!(error.to_string().contains(&expected), "{error}");
    Ok(())
}

fn verified_attachment_is_tested_once(guest: &Guest) -> Verdict {
    let pair = Pair::new(guest)?;
    let attach = || pair.export.attach(Arc::clone(&pair.importer), Trust::Verified(Direction::Both));
    let start = Instant::now();
    let first = attach()?;
    let tested_ms = start.elapsed().as_secs_f64() * 1e3;
    ensure!(first.path() == pair.attachment.path() && first.path() != Path::Staged, "by {}", first.path());
    let listing = Store::of_user().list()?;
    ensure!(listing.certificates.len() == 1 && listing.ignored.is_empty(), "{listing:?}");
    let start = Instant::now();
    let second = attach()?;
    let believed_ms = start.elapsed().as_secs_f64() * 1e3;
    ensure!(second.path() == first.path(), "by {}", second.path());
    ensure!(Store::of_user().list()?.certificates == listing.certificates, "it was tested again");
    let text = format!("{tested_ms:.0} ms with the test, {believed_ms:.0} ms with its certificate");
    guest.cell("verify: attaching", "verified", "took", &text)
}
