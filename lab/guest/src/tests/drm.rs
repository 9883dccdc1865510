//! A picture crosses: from the VFIO device's VRAM to another GPU's screen, through the real kernel.

use std::fs::File;
use std::sync::Arc;

use anyhow::{Context, anyhow, ensure};
use drm::Device as _;
use peervram::backends::drm::{Node, ScanOut};
use peervram::backends::holders::{Attached, Census};
use peervram::backends::host::{Backing, HostMemory};
use peervram::backends::{Aperture, DmaRange, DmaRanges, Exporter, ImageLayout, Importer, RawBytes};
use peervram::{Attachment, Direction, Kind, Outcome, Path, Trust};
use peervram_lab::machine::{Facts, Iommu, PeerToPeer};
use peervram_programs::picture::Picture;

use crate::crossing::{Crossing, PATIENCE, VRAM, check_screen, leaks_nothing, open_node, refused};
use crate::guest::Guest;
use crate::test::{Test, Verdict};

pub const TESTS: &[Test] = &[
    Test::new("drm/picture-crosses-pixel-by-pixel", picture_crosses).on(Facts::allows_peers),
    Test::new("drm/picture-crosses-in-several-ranges", picture_crosses_in_several_ranges)
        .on(Facts::maps_several_ranges),
    Test::new("drm/several-ranges-through-an-iommu-are-refused-in-words", several_ranges_through_an_iommu)
        .on(Facts::maps_one_range),
    Test::new("drm/several-ranges-under-virtio-iommu-show-another-picture", another_picture)
        .on(|facts| facts.maps_one_range() && facts.iommu == Iommu::Virtio)
        .allowing(&["virtio_iommu virtio0: page fault", "virtio_gpu_dequeue_ctrl_func"]),
    Test::new("drm/screen-follows-the-memory", screen_follows_the_memory).on(Facts::allows_peers),
    Test::new("drm/buffers-take-turns-on-a-screen", buffers_take_turns).on(Facts::allows_peers),
    Test::new("drm/same-dma-buf-twice-is-closed-once", same_dma_buf_twice).on(Facts::allows_peers),
    Test::new("drm/one-open-file-is-one-node", one_open_file_is_one_node).on(Facts::allows_peers),
    Test::new("drm/opening-a-card-leaves-the-screen-to-others", opening_leaves_the_screen)
        .on(Facts::allows_peers),
    Test::new("drm/a-screen-that-was-lost-keeps-no-import", lost_screen_keeps_no_import)
        .on(Facts::allows_peers),
    Test::new("drm/route-that-the-kernel-refuses-is-named", refused_route_is_named)
        .on(|facts| facts.peer_to_peer == PeerToPeer::NotSupported),
    Test::new("drm/importer-that-cannot-is-named", importer_that_cannot_is_named).on(Facts::exports_dma_bufs),
    Test::new("drm/old-kernel-is-named", old_kernel_is_named).on(|facts| !facts.exports_dma_bufs()),
    Test::new("drm/picture-must-fit-buffer-and-screen", picture_must_fit).on(Facts::allows_peers),
    Test::new("drm/memory-that-is-off-is-not-imported", memory_that_is_off).on(Facts::allows_peers),
    Test::new("drm/import-again-after-memory-off-and-on", import_again_after_off_and_on)
        .on(Facts::allows_peers),
    Test::new("drm/import-again-after-reset", import_again_after_reset).on(Facts::allows_peers),
    Test::new("drm/closed-lender-lets-nobody-in", closed_lender_lets_nobody_in).on(Facts::allows_peers),
    Test::new("drm/somebody-inside-stops-a-revoke", somebody_inside_stops_a_revoke).on(Facts::allows_peers),
    Test::new("drm/hundred-lives-leave-nothing-behind", hundred_lives).on(Facts::allows_peers),
];

fn picture_crosses(guest: &Guest) -> Verdict {
    cross(guest, 1)
}

fn picture_crosses_in_several_ranges(guest: &Guest) -> Verdict {
    cross(guest, 5)
}

fn cross(guest: &Guest, ranges: u64) -> Verdict {
    leaks_nothing(|| {
        let crossing = Crossing::new(guest, ranges)?;
        let attachment = crossing.export.attach(open_node(guest)?, Trust::Unverified)?;
        ensure!(attachment.path() == Path::Peer, "the path is {}", attachment.path());
        let access = attachment.enter(Direction::Read)?;
        let scan_out = ScanOut::start(access.memory(), crossing.layout())?;
        check_screen(&guest.screendump()?, &crossing.card)?;
        drop(scan_out);
        ensure!(access.finish() == Outcome::Ok, "the access is torn");
        attachment.detach()?;
        crossing.close()
    })
}

/// Refused by us, before the kernel is asked: under VT-d it would say EADDRINUSE, under virtio-iommu
/// nothing, and map one range of two. The next test and the holder's tell when a kernel has mended it.
fn several_ranges_through_an_iommu(guest: &Guest) -> Verdict {
    let crossing = Crossing::new(guest, 2)?;
    let error = refused(crossing.export.attach(open_node(guest)?, Trust::Unverified), Kind::RouteRefused)?;
    ensure!(error.raw_os_error().is_none(), "the kernel was asked: {error}");
    ensure!(error.to_string().contains("several ranges"), "{error}");
    crossing.close()
}

/// Why they are refused: the kernel maps one of the ranges and says nothing. The node imports by itself here, since an export would refuse.
fn another_picture(guest: &Guest) -> Verdict {
    let crossing = Crossing::new(guest, 5)?;
    let node = open_node(guest)?;
    let import = node.import(crossing.export.dma_buf().map_err(Clone::clone)?)?;
    let shown = ScanOut::start(&import, crossing.layout())?;
    let right = check_screen(&guest.screendump()?, &crossing.card);
    drop(shown);
    node.release(import)?;
    ensure!(right.is_err(), "the picture is right: this kernel is mended");
    crossing.close()
}

fn screen_follows_the_memory(guest: &Guest) -> Verdict {
    let crossing = Crossing::new(guest, 1)?;
    let attachment = crossing.export.attach(open_node(guest)?, Trust::Unverified)?;
    let access = attachment.enter(Direction::Read)?;
    let scan_out = ScanOut::start(access.memory(), crossing.layout())?;
    check_screen(&guest.screendump()?, &crossing.card)?;
    // Upside down, written by the owner while it is on the screen.
    let mut rows: Vec<&[u8]> = crossing.card.bytes().chunks(640 * 4).collect();
    rows.reverse();
    crossing.view.write(0, &rows.concat())?;
    scan_out.flush()?;
    check_screen(&guest.screendump()?, &crossing.seen()?)
}

/// Two buffers, one after the other, on one screen; the one before can then be let go of.
fn buffers_take_turns(guest: &Guest) -> Verdict {
    let crossing = Crossing::new(guest, 1)?;
    let node = open_node(guest)?;
    // The second buffer is the lender's, too: behind the lab's switch the GPU goes past the IOMMU, and host memory does not.
    let size_bytes = crossing.export.size_bytes();
    let bar = crossing.lender.device().region(VRAM)?;
    let ranges = DmaRanges::new(bar, &[DmaRange::new(2 * size_bytes, size_bytes)])?;
    let mut rows: Vec<&[u8]> = crossing.card.bytes().chunks(640 * 4).collect();
    rows.reverse();
    let turned = Picture::new(640, 480, rows.concat())?;
    crossing.lender.device().map(&ranges)?.write(0, turned.bytes())?;
    let other = crossing.lender.export(Aperture::owned(ranges, Arc::new(RawBytes)))?;
    let second = other.attach(Arc::clone(&node), Trust::Unverified)?;
    let foreign = other.attach(open_node(guest)?, Trust::Unverified)?;
    let (second, foreign) = (second.enter(Direction::Read)?, foreign.enter(Direction::Read)?);

    let attachment = crossing.export.attach(Arc::clone(&node), Trust::Unverified)?;
    let access = attachment.enter(Direction::Read)?;
    let layout = crossing.layout();
    let mut scan_out = ScanOut::start(access.memory(), layout)?;
    for _ in 0..3 {
        scan_out.show(second.memory(), layout)?;
        check_screen(&guest.screendump()?, &turned)?;
        scan_out.show(access.memory(), layout)?;
        check_screen(&guest.screendump()?, &crossing.card)?;
    }
    let error = refused(scan_out.show(foreign.memory(), layout), Kind::InvalidInput)?;
    ensure!(error.to_string().contains("another open file"), "{error}");
    let small = ImageLayout { height: 400, ..layout };
    let error = refused(scan_out.show(second.memory(), small), Kind::InvalidInput)?;
    ensure!(error.to_string().contains("another size"), "{error}");
    // Refused, it shows what it showed.
    check_screen(&guest.screendump()?, &crossing.card)
}

fn same_dma_buf_twice(guest: &Guest) -> Verdict {
    let crossing = Crossing::new(guest, 1)?;
    let node = open_node(guest)?;
    let first = crossing.export.attach(Arc::clone(&node), Trust::Unverified)?;
    let second = crossing.export.attach(node, Trust::Unverified)?;
    let handles = (
        first.enter(Direction::Read)?.memory().raw_handle(),
        second.enter(Direction::Read)?.memory().raw_handle(),
    );
    ensure!(handles.0 == handles.1, "the kernel gave two handles {handles:?}");
    first.detach()?;
    // The second still works: the handle was not closed under it.
    let access = second.enter(Direction::Read)?;
    let _scan_out = ScanOut::start(access.memory(), crossing.layout())?;
    check_screen(&guest.screendump()?, &crossing.card)
}

/// Two nodes that were made of one open file have one handle, and the first that goes leaves it to the other.
fn one_open_file_is_one_node(guest: &Guest) -> Verdict {
    let crossing = Crossing::new(guest, 1)?;
    let file = File::options().read(true).write(true).open(guest.virtio_gpu_node()?)?;
    let first = Arc::new(Node::from_fd(file.try_clone()?.into())?);
    let second = Arc::new(Node::from_fd(file.try_clone()?.into())?);
    let first = crossing.export.attach(first, Trust::Unverified)?;
    let second = crossing.export.attach(second, Trust::Unverified)?;
    let handle = |attachment: &Attachment<Node>| -> anyhow::Result<u32> {
        Ok(attachment.enter(Direction::Read)?.memory().raw_handle())
    };
    ensure!(handle(&first)? == handle(&second)?, "the kernel gave two handles");
    first.detach()?;
    let access = second.enter(Direction::Read)?;
    let _scan_out = ScanOut::start(access.memory(), crossing.layout())?;
    check_screen(&guest.screendump()?, &crossing.card)?;
    // Another open file of the same device is another node, with handles of its own.
    let other = Node::open(&guest.virtio_gpu_node()?)?;
    drop(other.import(crossing.export.dma_buf().map_err(|error| anyhow!("{error}"))?)?);
    check_screen(&guest.screendump()?, &crossing.card)
}

/// A node that is open keeps the screen from nobody, and one that shows from everybody, until it shows no more.
fn opening_leaves_the_screen(guest: &Guest) -> Verdict {
    let crossing = Crossing::new(guest, 1)?;
    let layout = crossing.layout();
    // The first to open the card, and the second, which is as another program's: its open file is not given up.
    let first = crossing.export.attach(open_node(guest)?, Trust::Unverified)?;
    let file = File::options().read(true).write(true).open(guest.virtio_gpu_node()?)?;
    let second = crossing.export.attach(Arc::new(Node::from_fd(file.into())?), Trust::Unverified)?;
    {
        let (first, second) = (first.enter(Direction::Read)?, second.enter(Direction::Read)?);
        let shown = ScanOut::start(second.memory(), layout)?;
        check_screen(&guest.screendump()?, &crossing.card)?;
        let error = refused(ScanOut::start(first.memory(), layout), Kind::PermissionDenied)?;
        ensure!(error.to_string().contains("another program has the screen"), "{error}");
        // What was refused changes nothing of what is shown.
        check_screen(&guest.screendump()?, &crossing.card)?;
        drop(shown);
    }
    // The open file is closed with its last node, and that switches the screen off.
    second.detach()?;
    let access = first.enter(Direction::Read)?;
    for _ in 0..2 {
        let shown = ScanOut::start(access.memory(), layout)?;
        check_screen(&guest.screendump()?, &crossing.card)?;
        drop(shown);
        // Given back each time: whoever asks next has it.
        let file = File::options().read(true).write(true).open(guest.virtio_gpu_node()?)?;
        let next = Node::from_fd(file.into())?;
        next.acquire_master_lock().context("the screen was not given back")?;
    }
    Ok(())
}

/// Who loses the screen, as by a switch of consoles, leaves no framebuffer behind, which would keep the import.
fn lost_screen_keeps_no_import(guest: &Guest) -> Verdict {
    let crossing = Crossing::new(guest, 1)?;
    let node = open_node(guest)?;
    let gpu = Attached::Pci(guest.virtio_gpu()?.parse()?);
    let dma_buf = crossing.export.dma_buf().map_err(|error| anyhow!("{error}"))?;
    let inode = dma_buf.inode()?;
    let attached = || -> anyhow::Result<Vec<Attached>> {
        let census = Census::take();
        let seen = census.buffers.iter().find(|buffer| buffer.inode == inode).context("it is gone")?;
        seen.attached.clone().context("who is attached could not be read")
    };
    let import = node.import(dma_buf)?;
    let shown = ScanOut::start(&import, crossing.layout())?;
    ensure!(attached()? == [gpu], "{:?} attached", attached()?);
    node.release_master_lock()?;
    let file = File::options().read(true).write(true).open(guest.virtio_gpu_node()?)?;
    let other = Node::from_fd(file.into())?;
    other.acquire_master_lock()?;
    drop(shown);
    node.release(import)?;
    ensure!(attached()?.is_empty(), "{:?} still attached", attached()?);
    Ok(())
}

fn refused_route_is_named(guest: &Guest) -> Verdict {
    leaks_nothing(|| {
        let crossing = Crossing::new(guest, 1)?;
        let error =
            refused(crossing.export.attach(open_node(guest)?, Trust::Unverified), Kind::RouteRefused)?;
        ensure!(error.raw_os_error() == Some(22), "the errno is {:?}", error.raw_os_error());
        let next = format!("peervram route {} {}", guest.lender()?, guest.virtio_gpu()?);
        ensure!(error.to_string().contains(&next), "{error}");
        crossing.close()
    })
}

/// A driver that takes no memory of other devices, where this kernel has it.
pub fn vgem() -> Option<Node> {
    (0..8)
        .filter_map(|number| Node::open(format!("/dev/dri/card{number}").as_ref()).ok())
        .find(|node| node.driver() == "vgem")
}

fn importer_that_cannot_is_named(guest: &Guest) -> Verdict {
    let Some(vgem) = vgem().map(Arc::new) else { crate::skip!("this kernel has no vgem") };
    leaks_nothing(|| {
        let crossing = Crossing::new(guest, 1)?;
        let error =
            refused(crossing.export.attach(Arc::clone(&vgem), Trust::Unverified), Kind::ImporterCannot)?;
        ensure!(error.to_string().contains("vgem"), "{error}");
        crossing.close()
    })
}

fn old_kernel_is_named(guest: &Guest) -> Verdict {
    let crossing = Crossing::new(guest, 1)?;
    let error = refused(crossing.export.attach(open_node(guest)?, Trust::Unverified), Kind::KernelTooOld)?;
    ensure!(error.to_string().contains("6.12"), "{error}");
    crossing.close()
}

fn picture_must_fit(guest: &Guest) -> Verdict {
    let crossing = Crossing::new(guest, 1)?;
    let attachment = crossing.export.attach(open_node(guest)?, Trust::Unverified)?;
    let access = attachment.enter(Direction::Read)?;
    let large = ScanOut::start(access.memory(), ImageLayout::packed(800, 600))
        .err()
        .context("too large, accepted")?;
    ensure!(
        large.kind() == Kind::InvalidInput && large.to_string().contains("larger than the buffer"),
        "{large}"
    );
    let odd =
        ScanOut::start(access.memory(), ImageLayout::packed(333, 222)).err().context("no mode, accepted")?;
    ensure!(odd.kind() == Kind::InvalidInput && odd.to_string().contains("640x480"), "{odd}");
    Ok(())
}

fn memory_that_is_off(guest: &Guest) -> Verdict {
    let crossing = Crossing::new(guest, 1)?;
    crossing.lender.set_memory_enabled(false, PATIENCE)?;
    let dma_buf = crossing.export.dma_buf().map_err(Clone::clone)?;
    let error = refused(open_node(guest)?.import(dma_buf), Kind::MemoryDisabled)?;
    ensure!(error.raw_os_error() == Some(19), "the errno is {:?}", error.raw_os_error());
    crossing.lender.set_memory_enabled(true, PATIENCE)?;
    crossing.close()
}

fn import_again_after_off_and_on(guest: &Guest) -> Verdict {
    import_again_after(guest, |crossing| {
        crossing.lender.set_memory_enabled(false, PATIENCE)?;
        crossing.lender.set_memory_enabled(true, PATIENCE)
    })
}

fn import_again_after_reset(guest: &Guest) -> Verdict {
    import_again_after(guest, |crossing| crossing.lender.reset(PATIENCE))
}

fn import_again_after(guest: &Guest, revoke: impl Fn(&Crossing) -> peervram::Result<()>) -> Verdict {
    let crossing = Crossing::new(guest, 1)?;
    let attachment = crossing.export.attach(open_node(guest)?, Trust::Unverified)?;
    attachment.enter(Direction::Read)?.finish().check()?;
    match revoke(&crossing) {
        Err(error) if error.kind() == Kind::Unsupported => crate::skip!("{error}"),
        other => other?,
    }
    refused(attachment.enter(Direction::Read), Kind::Revoked)?;
    // The content is unknown after a revoke; the owner writes it again.
    crossing.view.write(0, crossing.card.bytes())?;
    attachment.current()?;
    let access = attachment.enter(Direction::Read)?;
    let _scan_out = ScanOut::start(access.memory(), crossing.layout())?;
    check_screen(&guest.screendump()?, &crossing.card)
}

fn closed_lender_lets_nobody_in(guest: &Guest) -> Verdict {
    let Crossing { view, export, lender, .. } = Crossing::new(guest, 1)?;
    let node = open_node(guest)?;
    let attachment = export.attach(Arc::clone(&node), Trust::Unverified)?;
    drop(view);
    lender.close(PATIENCE)?;
    refused(attachment.enter(Direction::Read), Kind::Gone)?;
    attachment.detach()?;
    refused(export.attach(Arc::clone(&node), Trust::Unverified), Kind::Gone)?;
    // The descriptor still is there, and dead for good.
    let error = refused(node.import(export.dma_buf().map_err(Clone::clone)?), Kind::MemoryDisabled)?;
    ensure!(error.raw_os_error() == Some(19), "the errno is {:?}", error.raw_os_error());
    Ok(())
}

fn somebody_inside_stops_a_revoke(guest: &Guest) -> Verdict {
    let crossing = Crossing::new(guest, 1)?;
    let attachment = crossing.export.attach(open_node(guest)?, Trust::Unverified)?;
    let access = attachment.enter(Direction::Read)?;
    refused(crossing.lender.set_memory_enabled(false, PATIENCE), Kind::WouldDeadlock)?;
    let short = std::time::Duration::from_millis(20);
    let from_elsewhere =
        std::thread::scope(|scope| scope.spawn(|| crossing.lender.set_memory_enabled(false, short)).join());
    refused(from_elsewhere.map_err(|_| anyhow::anyhow!("it panicked"))?, Kind::TimedOut)?;
    ensure!(crossing.lender.device().memory_enabled()?, "the memory is off all the same");
    ensure!(access.finish() == Outcome::Ok, "a revoke that did not happen tore an access");
    crossing.lender.set_memory_enabled(false, PATIENCE)?;
    crossing.lender.set_memory_enabled(true, PATIENCE)?;
    Ok(())
}

fn hundred_lives(guest: &Guest) -> Verdict {
    let node = open_node(guest)?;
    let crossing = Crossing::new(guest, 1)?;
    let ranges: &DmaRanges = crossing.export.aperture().ranges();
    leaks_nothing(|| {
        for _ in 0..100 {
            let dma_buf = crossing.lender.device().export(ranges)?;
            node.release(node.import(&dma_buf)?)?;
            dma_buf.close();
        }
        Ok(())
    })?;
    // A memfd is no dma-buf, and being told so leaks nothing either.
    leaks_nothing(|| {
        let memory = HostMemory::with_backing(4096, Backing::Memfd)?;
        let memfd = memory.export(&DmaRanges::whole(memory.region())?)?;
        ensure!(node.import(&memfd).is_err(), "a memfd was imported by PRIME");
        Ok(())
    })
}
