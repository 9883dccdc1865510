//! Two model GPUs: bytes cross by DMA, and both sides of both devices see the same.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use peervram::backends::vfio::{Device, Interface, IoAddressSpace, IovaMapping};
use peervram::backends::{Aperture, DmaRange, DmaRanges, Importer, OnRevoke, vulkan};
use peervram::{Attachment, Direction, Kind, Lender, Outcome, Path, Trust};
use peervram_lab::machine::Iommu;
use peervram_model::misbehaviour::Misbehaviour;
use peervram_model_driver::{ModelGpu, VRAM_BAR};

use crate::blocks;
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
/// Where it is not about much.
const FEW_BYTES: u64 = 1 << 20;

/// Whether the host finds the blocks of `seed` in a model's VRAM.
fn has_blocks(model: &Model, offset_bytes: u64, seed: u32, who: &str) -> Verdict {
    let sum = model.host_checksum(offset_bytes, FEW_BYTES)?;
    ensure!(sum == vulkan::checksum(&blocks::bytes(seed, 0, FEW_BYTES)), "{who} has other bytes");
    Ok(())
}

/// The lender with its driver, and another GPU whose engine reaches what is lent.
struct Pair<'guest> {
    lender_model: Model<'guest>,
    other_model: Model<'guest>,
    // Fields drop in this order: imports, drivers, devices.
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
    blocks::fill(&pair.other, 1, 0, SIZE_BYTES, 0)?;
    let access = pair.attachment.enter(Direction::Both)?;
    pair.copy_both_ways(access.memory(), SIZE_BYTES)?;
    ensure!(access.finish() == Outcome::Ok, "the access is torn");

    // Computed here, seen by the owner through its BAR, and as the host has it on all three places.
    let expected = vulkan::checksum(&blocks::bytes(1, 0, SIZE_BYTES));
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
    blocks::fill(&pair.other, 2, 0, 3 * PIECE, 0)?;
    let access = pair.attachment.enter(Direction::Write)?;
    pair.other.write_dma(0, access.memory().iova(), 3 * PIECE, PATIENCE)?;
    ensure!(access.finish() == Outcome::Ok, "the access is torn");
    for (i, range) in (0..3).zip(several()) {
        let sum = pair.lender_model.host_checksum(range.offset_bytes, PIECE)?;
        ensure!(sum == vulkan::checksum(&blocks::bytes(2, i * PIECE, PIECE)), "range {i} has other bytes");
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
    blocks::fill(&pair.other, 3, 0, FEW_BYTES, 0)?;
    let access = pair.attachment.enter(Direction::Write)?;
    pair.other.write_dma(0, access.memory().iova(), FEW_BYTES, PATIENCE)?;
    ensure!(access.finish() == Outcome::Ok, "the access is torn");
    has_blocks(&pair.lender_model, SIZE_BYTES, 3, "after the reset the lender")
}

fn iommufd_import_dies_with_a_reset(guest: &Guest) -> Verdict {
    let pair = Pair::new(guest, Interface::Cdev, &whole())?;
    pair.lender.reset(PATIENCE)?;
    refused(pair.attachment.enter(Direction::Read), Kind::Revoked)?;
    pair.attachment.current()?;
    blocks::fill(&pair.other, 4, 0, FEW_BYTES, 0)?;
    let access = pair.attachment.enter(Direction::Write)?;
    pair.other.write_dma(0, access.memory().iova(), FEW_BYTES, PATIENCE)?;
    ensure!(access.finish() == Outcome::Ok, "the access is torn");
    has_blocks(&pair.lender_model, SIZE_BYTES, 4, "after the reset the lender")
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
    blocks::fill(&pair.other, 5, 0, FEW_BYTES, 0)?;
    let access = pair.attachment.enter(Direction::Write)?;
    pair.other.write_dma(0, access.memory().iova(), FEW_BYTES, PATIENCE)?;
    pair.other_model.misbehave(Misbehaviour::Mirror)?;
    blocks::fill(&pair.other, 6, 0, FEW_BYTES, 0)?;
    access.finish().check()?;
    has_blocks(&pair.other_model, 0, 5, "where an engine wrote to its mirror, VRAM")?;
    has_blocks(&pair.lender_model, SIZE_BYTES, 5, "the lender")
}

fn dead_directions(guest: &Guest) -> Verdict {
    let pair = Pair::new(guest, Interface::Group, &whole())?;
    let access = pair.attachment.enter(Direction::Both)?;
    let iova = access.memory().iova();
    let landing = 1 << 20;
    blocks::fill(&pair.other, 7, 0, FEW_BYTES, 0)?;
    blocks::fill(&pair.other, 9, 0, FEW_BYTES, landing)?;
    blocks::fill(&pair.owner, 8, 0, FEW_BYTES, SIZE_BYTES)?;
    pair.other_model.misbehave(Misbehaviour::DeadReads)?;
    pair.other.read_dma(iova, landing, FEW_BYTES, PATIENCE)?;
    has_blocks(&pair.other_model, landing, 9, "where a dead read should bring nothing, the other GPU")?;
    pair.other_model.behave()?;
    pair.other.read_dma(iova, landing, FEW_BYTES, PATIENCE)?;
    has_blocks(&pair.other_model, landing, 8, "when reads work again, the other GPU")?;
    pair.other_model.misbehave(Misbehaviour::DeadWrites)?;
    pair.other.write_dma(0, iova, FEW_BYTES, PATIENCE)?;
    has_blocks(&pair.lender_model, SIZE_BYTES, 8, "where a dead write should leave nothing, the lender")?;
    pair.other_model.behave()?;
    pair.other.write_dma(0, iova, FEW_BYTES, PATIENCE)?;
    has_blocks(&pair.lender_model, SIZE_BYTES, 7, "when writes work again, the lender")?;
    pair.other_model.misbehave(Misbehaviour::StuckFence)?;
    let short = std::time::Duration::from_millis(200);
    refused(pair.other.write_dma(0, iova, FEW_BYTES, short), Kind::TimedOut)?;
    pair.other_model.behave()?;
    access.finish().check()?;
    Ok(())
}
