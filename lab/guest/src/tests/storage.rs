//! Storage that reads its commands out of lent memory, and blocks into another device's.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use peervram::backends::vfio::{Device, Interface, IoAddressSpace};
use peervram::backends::{Aperture, DmaRange, DmaRanges, HostSlice, Importer, Mapping, RawBytes};
use peervram::{Direction, Lender, Outcome, Path, Trust};
use peervram_lab::machine::Facts;

use crate::blocks;
use crate::guest::Guest;
use crate::network_card::NetworkCard;
use crate::storage::{BUFFER, ENTRY_BYTES, READ, Storage, TRANSFER_BYTES, WRITE, transfer};
use crate::test::{Test, Verdict};

pub const TESTS: &[Test] = &[Test::of_network_card(
    "referees/a-block-crosses-into-vram-by-a-command-in-lent-memory",
    block_into_vram,
)
.on(Facts::has_storage)];

/// The block that is used.
const BLOCK: u32 = 24;

/// The storage lends its buffer, where its queue of commands is; a network card imports it, and writes the commands there by DMA.
/// The shared memory is lent to the storage, which reads a block into it by DMA. No CPU touches the commands or the bytes
/// between the two devices.
fn block_into_vram(guest: &Guest) -> Verdict {
    let space = || IoAddressSpace::new(Interface::Cdev);
    let storage_space = space()?;
    let storage_device = Device::open_into(&storage_space, guest.storage()?)?;
    let mut storage = Storage::start(&storage_space, &storage_device)?;
    let queue = DmaRanges::new(storage_device.region(BUFFER)?, &[DmaRange::new(0, TRANSFER_BYTES as u64)])?;
    let storage_lender = Lender::new(storage_device);
    let queue = storage_lender.export(Aperture::owned(queue, Arc::new(RawBytes)))?;

    let card_space = space()?;
    let card_device = Device::open_into(&card_space, guest.network_card()?)?;
    let card = Arc::new(NetworkCard::new(&card_space, &card_device)?);
    let commands = queue.attach(Arc::clone(&card), Trust::Unverified)?;
    ensure!(commands.path() == Path::Peer, "the card reaches the queue by {}", commands.path());

    let lender = Lender::new(Device::open_into(&space()?, guest.lender()?.parse()?)?);
    let vram = DmaRanges::new(lender.device().region(2)?, &[DmaRange::new(1 << 20, 1 << 20)])?;
    let view = lender.device().map(&vram)?;
    let export = lender.export(Aperture::owned(vram, Arc::new(RawBytes)))?;
    let attachment = export.attach(Arc::new(storage_space.clone()), Trust::Unverified)?;
    ensure!(attachment.path() == Path::Peer, "the storage reaches VRAM by {}", attachment.path());

    let host = Arc::new(Mapping::of_host_memory(TRANSFER_BYTES)?);
    let of_host = storage_space.import_host_pointer(Arc::clone(&host))?;
    let scratch = Arc::new(Mapping::of_host_memory(TRANSFER_BYTES)?);
    let engine = card.engines().into_iter().next().context("the card has no engine")?;
    let mut give = |command: [u8; ENTRY_BYTES]| -> Verdict {
        let access = commands.enter(Direction::Write)?;
        scratch.write(0, &command)?;
        let slice = HostSlice::new(Arc::clone(&scratch), 0, ENTRY_BYTES)?;
        engine.write(
            access.memory(),
            storage.next_entry_bytes(),
            &slice,
            Instant::now() + Duration::from_secs(20),
        )?;
        ensure!(access.finish() == Outcome::Ok, "writing a command was torn");
        storage.ring()
    };

    // Bytes of this test's own go to the block first; then something else is there in VRAM.
    let bytes = blocks::bytes(7, 0, TRANSFER_BYTES as u64);
    host.write(0, &bytes)?;
    give(transfer(WRITE, of_host.iova(), BLOCK)).context("writing the block")?;
    view.write(0, &blocks::bytes(8, 0, 2 * TRANSFER_BYTES as u64))?;

    let access = attachment.enter(Direction::Write)?;
    give(transfer(READ, access.memory().iova(), BLOCK)).context("reading the block into VRAM")?;
    ensure!(access.finish() == Outcome::Ok, "reading the block was torn");
    let mut seen = vec![0; 2 * TRANSFER_BYTES];
    view.read(0, &mut seen)?;
    ensure!(seen[..TRANSFER_BYTES] == bytes, "other bytes are in VRAM");
    let behind = &blocks::bytes(8, 0, 2 * TRANSFER_BYTES as u64)[TRANSFER_BYTES..];
    ensure!(&seen[TRANSFER_BYTES..] == behind, "more was written than a block");
    Ok(())
}
