//! A referee that is not ours: QEMU's network card reads and writes a VFIO device's memory, and says that all went well when
//! its IOMMU stopped it.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use peervram::backends::vfio::{Device, Interface, IoAddressSpace, IovaMapping};
use peervram::backends::{
    Aperture, DmaRange, DmaRanges, Engine, HostSlice, Importer, KernelLog, Logged, Mapping, RawBytes,
};
use peervram::verify::{Failure, Faults, Limits};
use peervram::{Attachment, Direction, Kind, Lender, Outcome, Path, RevokeOptions, Trust};

use crate::blocks;
use crate::crossing::PATIENCE;
use crate::guest::Guest;
use crate::network_card::NetworkCard;
use crate::test::{Test, Verdict};

/// What VT-d and virtio-iommu say of a stopped transfer, which is what these tests are about.
const FAULTS: &[&str] = &["DMAR", "fault"];

pub const TESTS: &[Test] = &[
    Test::of_network_card("referees/network-card-bytes-both-ways-by-iommufd", |guest| {
        both_ways(guest, Interface::Cdev)
    }),
    Test::of_network_card("referees/network-card-bytes-both-ways-by-type1", |guest| {
        both_ways(guest, Interface::Group)
    }),
    Test::of_network_card("referees/network-card-path-is-verified", path_is_verified),
    Test::of_network_card(
        "referees/network-card-silent-bad-read-is-caught-with-its-address",
        silent_bad_read,
    )
    .allowing(FAULTS),
    Test::of_network_card(
        "referees/network-card-reads-after-a-reset-report-success-and-are-torn",
        after_a_reset,
    )
    .allowing(FAULTS),
];

const SIZE_BYTES: u64 = 4 << 20;

/// The lender, and the card that imports from it.
struct Pair {
    // Fields drop in this order: imports, drivers, devices.
    attachment: Attachment<NetworkCard>,
    card: Arc<NetworkCard>,
    _card_device: Device,
    lender: Lender<Device>,
}

impl Pair {
    fn new(guest: &Guest, interface: Interface) -> Result<Self> {
        let lender =
            Lender::new(Device::open_into(&IoAddressSpace::new(interface)?, guest.lender()?.parse()?)?);
        let ranges = DmaRanges::new(lender.device().region(2)?, &[DmaRange::new(SIZE_BYTES, SIZE_BYTES)])?;
        let export = lender.export(Aperture::owned(ranges, Arc::new(RawBytes)))?;
        let space = IoAddressSpace::new(interface)?;
        let card_device = Device::open_into(&space, guest.network_card()?)?;
        let card = Arc::new(NetworkCard::new(&space, &card_device)?);
        let attachment = export.attach(Arc::clone(&card), Trust::Unverified)?;
        Ok(Self { attachment, card, _card_device: card_device, lender })
    }

    /// The lender's own view of what is lent.
    fn view(&self) -> Result<Arc<Mapping>> {
        let ranges =
            DmaRanges::new(self.lender.device().region(2)?, &[DmaRange::new(SIZE_BYTES, SIZE_BYTES)])?;
        Ok(self.lender.device().map(&ranges)?)
    }

    fn engine(&self) -> Result<&dyn Engine<IovaMapping>> {
        self.card.engines().into_iter().next().context("the card has no engine")
    }
}

/// Host memory of the same length, with the blocks of `seed` in it.
fn host(seed: u32) -> Result<HostSlice> {
    let mapping = Arc::new(Mapping::of_host_memory(SIZE_BYTES as usize)?);
    mapping.write(0, &blocks::bytes(seed, 0, SIZE_BYTES))?;
    Ok(HostSlice::new(mapping, 0, SIZE_BYTES as usize)?)
}

fn bytes_of(mapping: &Mapping) -> Result<Vec<u8>> {
    let mut bytes = vec![0; SIZE_BYTES as usize];
    mapping.read(0, &mut bytes)?;
    Ok(bytes)
}

fn deadline() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

/// The card writes, and the lender sees it through its BAR; the lender writes there, and the card reads it.
fn both_ways(guest: &Guest, interface: Interface) -> Verdict {
    let pair = Pair::new(guest, interface)?;
    let expected = if interface == Interface::Cdev { Path::Peer } else { Path::HostPointer };
    ensure!(pair.attachment.path() == expected, "the path is {}", pair.attachment.path());
    let (view, engine) = (pair.view()?, pair.engine()?);
    let access = pair.attachment.enter(Direction::Both)?;

    view.write(0, &blocks::bytes(9, 0, SIZE_BYTES))?;
    let sent = host(1)?;
    engine.write(access.memory(), 0, &sent, deadline())?;
    ensure!(
        bytes_of(&view)? == blocks::bytes(1, 0, SIZE_BYTES),
        "the lender has other bytes than the card wrote"
    );

    view.write(0, &blocks::bytes(2, 0, SIZE_BYTES))?;
    let landed = host(9)?;
    engine.read(access.memory(), 0, &landed, deadline())?;
    ensure!(bytes_of(landed.mapping())? == blocks::bytes(2, 0, SIZE_BYTES), "the card read other bytes");

    // Lengths and places that are no multiple of anything.
    let part = HostSlice::new(Arc::clone(sent.mapping()), 4099, 70_001)?;
    engine.write(access.memory(), 12_345, &part, deadline())?;
    let mut wanted = blocks::bytes(2, 0, SIZE_BYTES);
    wanted[12_345..82_346].copy_from_slice(&blocks::bytes(1, 0, SIZE_BYTES)[4099..74_100]);
    ensure!(bytes_of(&view)? == wanted, "an odd slice is in another place, or more than it was written");
    ensure!(access.finish() == Outcome::Ok, "the access is torn");
    Ok(())
}

fn path_is_verified(guest: &Guest) -> Verdict {
    let pair = Pair::new(guest, Interface::Cdev)?;
    let certificate = pair.attachment.verify(Direction::Both, &Limits::default(), &mut |_| {})?;
    ensure!(certificate.passed(), "{certificate:?}");
    for test in &certificate.tests {
        ensure!(test.faults == Faults::Watched(Vec::new()), "{:?}", test.faults);
    }
    Ok(())
}

/// How long the kernel may keep silent about faults.
const FAULT_LIMIT: Duration = Duration::from_secs(20);
/// Far from everything that is mapped.
const ASTRAY: u64 = 1 << 36;

/// The card's driver has a fault: it aims beside the import. The IOMMU stops every read, the card says that all went well,
/// and the test says that bytes are wrong and where the IOMMU saw the read.
fn silent_bad_read(guest: &Guest) -> Verdict {
    let pair = Pair::new(guest, Interface::Cdev)?;
    pair.card.misaim(ASTRAY);
    // First of all: the kernel writes down few of many faults.
    let certificate = pair.attachment.verify(Direction::Read, &Limits::default(), &mut |_| {})?;
    ensure!(!certificate.passed(), "{certificate:?}");
    let test = certificate.tests.first().context("nothing was tested")?;
    ensure!(matches!(test.failure, Some(Failure::WrongBytes { .. })), "{:?}", test.failure);

    let access = pair.attachment.enter(Direction::Read)?;
    let landed = host(9)?;
    pair.engine()?.read(access.memory(), 0, &landed, deadline()).context("the card told of its fault")?;
    ensure!(bytes_of(landed.mapping())? != bytes_of(&*pair.view()?)?, "bytes arrived from nowhere");
    let stray = access.memory().iova() + ASTRAY;
    let Faults::Watched(said) = &test.faults else { anyhow::bail!("{:?}", test.faults) };
    ensure!(is_near(said, stray), "no fault near {stray:#x} in {said:?}");
    Ok(())
}

/// Whether one of the messages names an address within the lent memory's length from `iova` on.
fn is_near(messages: &[String], iova: u64) -> bool {
    let addresses = messages.iter().flat_map(|message| message.split("0x").skip(1)).filter_map(|text| {
        let digits: String = text.chars().take_while(char::is_ascii_hexdigit).collect();
        u64::from_str_radix(&digits, 16).ok()
    });
    addresses.into_iter().any(|address| (iova..iova + SIZE_BYTES).contains(&address))
}

/// Someone is late in a reset that goes on: what the card reads then it reads from nowhere, and says nothing. The access
/// says that it is torn; no other begins; the import of the next generation works.
fn after_a_reset(guest: &Guest) -> Verdict {
    let pair = Pair::new(guest, Interface::Cdev)?;
    let (view, engine) = (pair.view()?, pair.engine()?);
    view.write(0, &blocks::bytes(3, 0, SIZE_BYTES))?;
    let access = pair.attachment.enter(Direction::Read)?;
    let landed = host(9)?;
    engine.read(access.memory(), 0, &landed, deadline())?;
    ensure!(
        bytes_of(landed.mapping())? == blocks::bytes(3, 0, SIZE_BYTES),
        "the card read other bytes before"
    );

    let mut log = KernelLog::from_now()?;
    // A thread that is inside may not ask for a reset.
    let reset = || pair.lender.reset(RevokeOptions::within(Duration::ZERO).or_go_on());
    thread::scope(|scope| {
        scope.spawn(reset).join().map_err(|_| anyhow!("the thread that resets panicked"))
    })??;
    view.write(0, &blocks::bytes(4, 0, SIZE_BYTES))?;
    let iova = access.memory().iova();
    engine.read(access.memory(), 0, &landed, deadline()).context("the card told of its fault")?;
    let seen = bytes_of(landed.mapping())?;
    ensure!(
        seen != blocks::bytes(4, 0, SIZE_BYTES),
        "the card still reads the lender's memory after a reset"
    );
    // The kernel writes down few of many faults (`dmar_fault` is limited to ten in five seconds), so the card reads on.
    let deadline = Instant::now() + FAULT_LIMIT;
    let mut said = Vec::new();
    while !is_near(&said, iova) {
        ensure!(Instant::now() < deadline, "no fault near {iova:#x} in {said:?}");
        thread::sleep(Duration::from_millis(200));
        let few = HostSlice::new(Arc::clone(landed.mapping()), 0, 4096)?;
        engine.read(access.memory(), 0, &few, Instant::now() + PATIENCE)?;
        said.extend(log.unread().filter_map(|logged| match logged {
            Ok(Logged::Message(message)) => Some(message),
            _ => None,
        }));
    }
    ensure!(matches!(access.finish(), Outcome::Torn { .. }), "what was read from nowhere counts");

    let Err(refused) = pair.attachment.enter(Direction::Read) else {
        anyhow::bail!("a stale import was entered")
    };
    let refused = peervram::Error::from(refused);
    ensure!(refused.kind() == Kind::Revoked, "{refused}");
    pair.attachment.current()?;
    let access = pair.attachment.enter(Direction::Read)?;
    engine.read(access.memory(), 0, &landed, Instant::now() + PATIENCE)?;
    ensure!(
        bytes_of(landed.mapping())? == blocks::bytes(4, 0, SIZE_BYTES),
        "the next import reads other bytes"
    );
    ensure!(access.finish() == Outcome::Ok, "the access is torn");
    Ok(())
}
