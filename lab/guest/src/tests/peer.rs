//! Two model GPUs: bytes cross by DMA, and both sides of both devices see the same.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use peervram::backends::vfio::{Device, Interface, IoAddressSpace, IovaMapping};
use peervram::backends::{Aperture, DmaRange, DmaRanges, Exporter, Importer, OnRevoke, vulkan};
use peervram::{Attachment, Direction, Kind, Lender, Outcome, Path, Trust};
use peervram_lab::machine::Iommu;
use peervram_model::misbehaviour::Misbehaviour;
use peervram_model_driver::{Descriptor, ModelGpu, VRAM_BAR};

use crate::crossing::{PATIENCE, refused};
use crate::guest::Guest;
use crate::model::Model;
use crate::test::{Test, Verdict};

pub const TESTS: &[Test] = &[
    Test::of_models("peer/64-mib-both-ways-by-iommufd", both_ways_by_iommufd),
    Test::of_models("peer/64-mib-both-ways-by-type1", both_ways_by_type1),
    Test::of_models("peer/several-ranges-by-type1", several_ranges_by_type1),
    Test::of_models("peer/several-ranges-are-refused-by-iommufd-and-copied", several_ranges_by_iommufd),
    Test::of_models("peer/type1-import-is-freed-before-a-reset", type1_import_is_freed_before_a_reset),
    Test::of_models("peer/iommufd-import-dies-with-a-reset", iommufd_import_dies_with_a_reset),
    Test::of_models("peer/engine-errors-are-told", engine_errors_are_told),
    Test::of_models("peer/what-goes-to-a-private-mirror-is-not-in-vram", private_mirror),
    Test::of_models("peer/dead-directions-and-stuck-fences-are-seen", dead_directions),
];

const SIZE_BYTES: u64 = 64 << 20;

/// The lender with its driver, and another GPU whose engine reaches what is lent.
struct Pair<'guest> {
    lender_model: Model<'guest>,
    other_model: Model<'guest>,
    // In the order in which they go: imports, drivers, devices.
    attachment: Attachment<IoAddressSpace>,
    other: ModelGpu,
    owner: Arc<ModelGpu>,
    _other_device: Device,
    lender: Lender<Device>,
}

impl<'guest> Pair<'guest> {
    fn new(guest: &'guest Guest, interface: Interface, ranges: &[DmaRange]) -> Result<Self> {
        let (lender_model, other_model) = (Model::new(guest, 0)?, Model::new(guest, 1)?);
        if interface == Interface::Cdev && guest.facts().iommu == Iommu::Virtio {
            // Seen in its trace: virtio_iommu_map with flags 7, and no virtio_iommu_notify_map after it.
            crate::skip!(
                "QEMU's virtio-iommu keeps mappings with the MMIO flag from vfio-user devices, and iommufd \
                 maps BARs with it"
            );
        }
        let space = match IoAddressSpace::new(interface) {
            // Debian's kernels have no iommufd.
            Err(error) if error.kind() == Kind::NotFound => crate::skip!("{error}"),
            other => other?,
        };
        let device = Device::open_into(&IoAddressSpace::new(interface)?, lender_model.address())?;
        let owner = Arc::new(ModelGpu::new(&device)?);
        let ranges = DmaRanges::new(device.region(VRAM_BAR)?, ranges)?;
        let lender = Lender::new(device);
        let export = lender.export(Aperture::owned(ranges, Arc::clone(&owner) as _))?;

        let other_device = Device::open_into(&space, other_model.address())?;
        let other = ModelGpu::new(&other_device)?;
        let attachment = export.attach(Arc::new(space), Trust::Unverified)?;
        Ok(Self { lender_model, other_model, attachment, other, owner, _other_device: other_device, lender })
    }

    /// The other GPU writes what it has to the lender, then reads it back to another place.
    fn copy_both_ways(&self, memory: &IovaMapping, size_bytes: u64) -> Result<()> {
        self.other.write_dma(0, memory.iova(), size_bytes, PATIENCE)?;
        self.other.read_dma(memory.iova(), 2 * size_bytes, size_bytes, PATIENCE)?;
        Ok(())
    }
}

fn whole() -> [DmaRange; 1] {
    [DmaRange::new(SIZE_BYTES, SIZE_BYTES)]
}

fn both_ways_by_iommufd(guest: &Guest) -> Verdict {
    both_ways(guest, Interface::Cdev, Path::Peer)
}

fn both_ways_by_type1(guest: &Guest) -> Verdict {
    both_ways(guest, Interface::Group, Path::HostPointer)
}

fn both_ways(guest: &Guest, interface: Interface, path: Path) -> Verdict {
    let pair = Pair::new(guest, interface, &whole())?;
    ensure!(pair.attachment.path() == path, "the path is {}", pair.attachment.path());
    // What the other GPU has: two patterns of its own making, so that halves cannot be mistaken.
    pair.other.copy_all(
        &[
            Descriptor::fill(0x1234_5678, 0, SIZE_BYTES / 2, 0),
            Descriptor::fill(0x9ABC_DEF1, SIZE_BYTES / 2, SIZE_BYTES / 2, 0),
        ],
        PATIENCE,
    )?;
    let access = pair.attachment.enter(Direction::Both)?;
    pair.copy_both_ways(access.memory(), SIZE_BYTES)?;
    ensure!(access.finish() == Outcome::Ok, "the access is torn");

    // Computed here, seen by the owner through its BAR, and as the host has it on all three places.
    let half = |pattern: u32| pattern.to_le_bytes().repeat(SIZE_BYTES as usize / 8);
    let expected = vulkan::checksum(&[half(0x1234_5678), half(0x9ABC_DEF1)].concat());
    let mapping =
        pair.lender.device().map(&DmaRanges::new(pair.lender.device().region(VRAM_BAR)?, &whole())?)?;
    let mut seen = vec![0; SIZE_BYTES as usize];
    mapping.read(0, &mut seen)?;
    let sums = [
        ("the lender's BAR", vulkan::checksum(&seen)),
        ("the host, of the lender", pair.lender_model.host_checksum(SIZE_BYTES, SIZE_BYTES)?),
        ("the host, of the other", pair.other_model.host_checksum(0, SIZE_BYTES)?),
        ("the host, of what came back", pair.other_model.host_checksum(2 * SIZE_BYTES, SIZE_BYTES)?),
    ];
    for (who, sum) in sums {
        ensure!(sum == expected, "{who} has {sum:08x}, not {expected:08x}");
    }
    Ok(())
}

const PIECE: u64 = 1 << 20;

/// Three pieces, in an order that is not theirs.
fn several() -> [DmaRange; 3] {
    [8, 2, 5].map(|piece| DmaRange::new(piece * PIECE, PIECE))
}

fn several_ranges_by_type1(guest: &Guest) -> Verdict {
    let pair = Pair::new(guest, Interface::Group, &several())?;
    for i in 0..3_u8 {
        let pattern = u32::from_ne_bytes([i + 1; 4]);
        pair.other.copy(Descriptor::fill(pattern, u64::from(i) * PIECE, PIECE, 0), PATIENCE)?;
    }
    let access = pair.attachment.enter(Direction::Write)?;
    pair.other.write_dma(0, access.memory().iova(), 3 * PIECE, PATIENCE)?;
    access.finish();
    for (i, range) in (0..3_u8).zip(several()) {
        let bytes = pair.lender_model.host_bytes(range.offset_bytes, 16)?;
        ensure!(bytes == [i + 1; 16], "range {i} begins with {bytes:?}");
    }
    Ok(())
}

fn several_ranges_by_iommufd(guest: &Guest) -> Verdict {
    let pair = Pair::new(guest, Interface::Cdev, &several())?;
    let refused = pair.attachment.refused();
    let (_, error) =
        refused.iter().find(|(path, _)| *path == Path::Peer).context("an iommufd mapped several ranges")?;
    ensure!(error.kind() == Kind::Unsupported && error.to_string().contains("one range only"), "{error}");
    ensure!(pair.attachment.path() == Path::Staged, "the path is {}", pair.attachment.path());
    Ok(())
}

/// The kernel would leave it mapped (seen on Linux 7.3), and the other GPU in a device under reset.
fn type1_import_is_freed_before_a_reset(guest: &Guest) -> Verdict {
    let pair = Pair::new(guest, Interface::Group, &whole())?;
    ensure!(
        pair.attachment.importer().on_revoke() == OnRevoke::FreeBefore,
        "type1 says {:?}",
        pair.attachment.importer().on_revoke()
    );
    pair.lender.reset(PATIENCE)?;
    refused(pair.attachment.enter(Direction::Read), Kind::Revoked)?;
    pair.attachment.current()?;
    let access = pair.attachment.enter(Direction::Write)?;
    pair.other.write_dma(0, access.memory().iova(), 4096, PATIENCE)?;
    ensure!(access.finish() == Outcome::Ok, "the access is torn");
    Ok(())
}

fn iommufd_import_dies_with_a_reset(guest: &Guest) -> Verdict {
    let pair = Pair::new(guest, Interface::Cdev, &whole())?;
    pair.lender.reset(PATIENCE)?;
    refused(pair.attachment.enter(Direction::Read), Kind::Revoked)?;
    pair.attachment.current()?;
    pair.other.copy(Descriptor::fill(0xA5A5_A5A5, 0, 1 << 20, 0), PATIENCE)?;
    let access = pair.attachment.enter(Direction::Write)?;
    pair.other.write_dma(0, access.memory().iova(), 1 << 20, PATIENCE)?;
    access.finish();
    let bytes = pair.lender_model.host_bytes(SIZE_BYTES, 8)?;
    ensure!(bytes == [0xA5; 8], "the lender has {bytes:?}");
    Ok(())
}

fn engine_errors_are_told(guest: &Guest) -> Verdict {
    let pair = Pair::new(guest, Interface::Group, &whole())?;
    // Nothing is mapped at this address.
    let error = refused(pair.other.write_dma(0, 1 << 38, 4096, PATIENCE), Kind::Os)?;
    ensure!(error.to_string().contains("halted"), "{error}");
    let device = Device::open_into(&IoAddressSpace::new(Interface::Group)?, pair.other_model.address());
    refused(device, Kind::Busy)?;
    Ok(())
}

/// Engine and BAR on different memory: the copy succeeds, and only the owner's engine sees the bytes.
fn private_mirror(guest: &Guest) -> Verdict {
    let pair = Pair::new(guest, Interface::Group, &whole())?;
    pair.other.copy(Descriptor::fill(0x1111_1111, 0, 4096, 0), PATIENCE)?;
    let access = pair.attachment.enter(Direction::Write)?;
    pair.other.write_dma(0, access.memory().iova(), 4096, PATIENCE)?;
    pair.other_model.misbehave(Misbehaviour::Mirror)?;
    pair.other.copy(Descriptor::fill(0x2222_2222, 0, 4096, 0), PATIENCE)?;
    access.finish();
    let bytes = pair.other_model.host_bytes(0, 4)?;
    ensure!(bytes == [0x11; 4], "what an engine wrote to its mirror is in VRAM: {bytes:?}");
    Ok(())
}

fn dead_directions(guest: &Guest) -> Verdict {
    let pair = Pair::new(guest, Interface::Group, &whole())?;
    let access = pair.attachment.enter(Direction::Both)?;
    let iova = access.memory().iova();
    pair.other.copy(Descriptor::fill(0x3333_3333, 0, 4096, 0), PATIENCE)?;
    pair.owner.copy(Descriptor::fill(0x4444_4444, SIZE_BYTES, 4096, 0), PATIENCE)?;
    pair.other_model.misbehave(Misbehaviour::DeadReads)?;
    pair.other.read_dma(iova, 1 << 20, 4096, PATIENCE)?;
    let read = pair.other_model.host_bytes(1 << 20, 4)?;
    ensure!(read != [0x44; 4], "a dead read brought the right bytes");
    pair.other_model.behave()?;
    pair.other.read_dma(iova, 1 << 20, 4096, PATIENCE)?;
    ensure!(pair.other_model.host_bytes(1 << 20, 4)? == [0x44; 4], "reads do not work again");
    pair.other_model.misbehave(Misbehaviour::DeadWrites)?;
    pair.other.write_dma(0, iova, 4096, PATIENCE)?;
    ensure!(pair.lender_model.host_bytes(SIZE_BYTES, 4)? == [0x44; 4], "a dead write arrived");
    pair.other_model.behave()?;
    pair.other.write_dma(0, iova, 4096, PATIENCE)?;
    ensure!(pair.lender_model.host_bytes(SIZE_BYTES, 4)? == [0x33; 4], "writes do not work again");
    pair.other_model.misbehave(Misbehaviour::StuckFence)?;
    let short = std::time::Duration::from_millis(200);
    refused(pair.other.write_dma(0, iova, 4096, short), Kind::TimedOut)?;
    pair.other_model.behave()?;
    access.finish();
    Ok(())
}
