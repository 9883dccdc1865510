//! Who holds a device and its dma-bufs, as the real kernel lets it be found out.

use anyhow::{Context, Result, ensure};
use peervram::backends::holders::{Attached, Buffer, Census, Device, Exporter, Holder};
use peervram::backends::vfio::{self, Interface, IoAddressSpace};
use peervram::backends::{DmaBuf, Exporter as _, Importer, PciAddress};
use peervram_lab::machine::Facts;
use std::process;
use std::time::Instant;

use crate::crossing::{PATIENCE, open_device, open_node, scattered};
use crate::guest::Guest;
use crate::holder::{Hold, Mode};
use crate::lender_process::LenderProcess;
use crate::test::{Test, Verdict};

pub const TESTS: &[Test] = &[
    Test::new("holders/idle-device-is-held-by-nobody", idle_device).on_any_topology(),
    Test::new("holders/descriptors-and-mappings-of-a-device-are-seen", descriptors_and_mappings)
        .on(Facts::exports_dma_bufs)
        .on_any_topology(),
    Test::new("holders/old-kernel-hides-which-device-is-open", old_kernel_hides)
        .on(|facts| !facts.exports_dma_bufs())
        .on_any_topology(),
    Test::new("holders/lender-importer-and-buffer-are-named", lender_importer_and_buffer)
        .on(Facts::allows_peers),
    Test::new("holders/iommufd-attaches-under-its-own-name", iommufd_attaches)
        .on(|facts| facts.holder && facts.exports_dma_bufs()),
    Test::new("holders/whom-a-hanging-reset-waits-for-is-named", hanging_reset)
        .on(|facts| facts.holder && facts.allows_peers()),
];

const SIZE_BYTES: u64 = 1 << 20;

fn idle_device(guest: &Guest) -> Verdict {
    let census = Census::take();
    ensure!(census.unread.is_empty(), "root cannot read {:?}", census.unread);
    ensure!(device(&census, guest)?.holders.is_empty(), "{:?}", device(&census, guest)?);
    let of_it: Vec<_> = census.buffers_of(lender(guest)?).collect();
    ensure!(of_it.is_empty(), "{of_it:?}");
    Ok(())
}

fn descriptors_and_mappings(guest: &Guest) -> Verdict {
    let opened = open_device(guest)?;
    let mapping = opened.map(&scattered(&opened, SIZE_BYTES, 1)?)?;
    let census = Census::take();
    let [holder] = &device(&census, guest)?.holders[..] else {
        anyhow::bail!("held by {:?}", device(&census, guest)?.holders);
    };
    ensure!(holder.process.pid == process::id(), "it is held by {}", holder.process);
    ensure!(holder.descriptors.len() == 1, "{holder:?}");
    ensure!((holder.mappings, holder.possible_mappings) == (1, 0), "{holder:?}");
    let quick = Census::take_during_revoke();
    ensure!(device(&quick, guest)?.holders[0].descriptors == holder.descriptors, "{quick:?}");
    ensure!(quick.unread.len() == 2, "what is left out is said: {:?}", quick.unread);
    drop(mapping);
    drop(opened);
    ensure!(device(&Census::take(), guest)?.holders.is_empty(), "nobody holds it any more");
    Ok(())
}

/// Before Linux 6.18 no fdinfo names a VFIO device. What is not known is said.
fn old_kernel_hides(guest: &Guest) -> Verdict {
    let _opened = open_device(guest)?;
    let census = Census::take();
    let here = format!("process {}", process::id());
    let is_said = census.unread.iter().any(|gap| gap.what.contains("descriptor") && gap.what.contains(&here));
    ensure!(is_said, "{:?}", census.unread);
    Ok(())
}

fn lender_importer_and_buffer(guest: &Guest) -> Verdict {
    let (process, buffer) = LenderProcess::start(&guest.lender()?, SIZE_BYTES, 1)?;
    let node = open_node(guest)?;
    let memory = node.import(&buffer)?;
    let (gpu, here, there) = (Attached::Pci(guest.virtio_gpu()?.parse()?), process::id(), process.id());

    let census = Census::take();
    ensure!(census.unread.is_empty(), "root cannot read {:?}", census.unread);
    let seen = find(&census, &buffer)?;
    ensure!(seen.size_bytes == SIZE_BYTES && seen.exporter_name == "vfio_pci_core", "{seen:?}");
    let owner = lender(guest)?;
    let exporter_is_right = match &seen.exporter {
        Exporter::Known(address) => *address == owner,
        Exporter::OneOf(candidates) => candidates == &[owner],
        Exporter::NotVfio => false,
    };
    ensure!(exporter_is_right, "it is of {:?}, not of {owner}", seen.exporter);
    ensure!(seen.attached.as_deref() == Some(std::slice::from_ref(&gpu)), "{:?} attached", seen.attached);
    ensure!(pids(&seen.holders) == sorted([here, there]), "held by {:?}", seen.holders);
    let owners = &device(&census, guest)?.holders;
    ensure!(pids(owners) == [there], "the device is held by {owners:?}");
    let importers: Vec<u32> = census.nodes_of(&gpu).flat_map(|node| pids(&node.holders)).collect();
    ensure!(importers.contains(&here), "{gpu} is open in {importers:?}, not in {here}");

    // A handle holds the buffer without a descriptor: only the node betrays this process.
    let inode = buffer.inode()?;
    buffer.close();
    let census = Census::take();
    let seen = census.buffers.iter().find(|buffer| buffer.inode == inode).context("the buffer is gone")?;
    ensure!(pids(&seen.holders) == [there], "held by {:?}", seen.holders);
    ensure!(seen.references > 1, "{seen:?}");
    ensure!(seen.attached.as_deref() == Some(std::slice::from_ref(&gpu)), "{:?} attached", seen.attached);
    node.release(memory)?;
    let census = Census::take();
    let seen = census.buffers.iter().find(|buffer| buffer.inode == inode).context("the buffer is gone")?;
    ensure!(seen.attached.as_deref() == Some(&[]), "{:?} still attached", seen.attached);
    drop(process);
    let census = Census::take();
    ensure!(!census.buffers.iter().any(|buffer| buffer.inode == inode), "it outlives its holders");
    Ok(())
}

fn iommufd_attaches(guest: &Guest) -> Verdict {
    let space = IoAddressSpace::new(Interface::Cdev)?;
    let device = vfio::Device::open_into(&space, lender(guest)?)?;
    let buffer = device.export(&scattered(&device, SIZE_BYTES, 1)?)?;
    let memory = space.import(&buffer)?;
    let census = Census::take();
    let seen = find(&census, &buffer)?;
    let iommufd = Attached::Other("iommu".into());
    ensure!(seen.attached.as_deref() == Some(std::slice::from_ref(&iommufd)), "{seen:?}");
    let openers: Vec<u32> = census.nodes_of(&iommufd).flat_map(|node| pids(&node.holders)).collect();
    ensure!(openers == [process::id()], "an iommufd is open in {openers:?}");
    space.release(memory)?;
    Ok(())
}

fn hanging_reset(guest: &Guest) -> Verdict {
    if let Err(error) = open_device(guest)?.reset() {
        crate::skip!("{error}");
    }
    let (mut process, buffer) = LenderProcess::start(&guest.lender()?, SIZE_BYTES, 1)?;
    let hold = Hold::open()?;
    hold.set_mode(Mode::UntilTold)?;
    let gpu = guest.virtio_gpu()?;
    hold.attach(&gpu, &buffer)?;
    hold.map()?;
    process.begin_reset()?;
    let deadline = Instant::now() + PATIENCE;
    while !process.hangs_in("vfio_pci_dma_buf_move")? {
        ensure!(Instant::now() < deadline, "the reset does not hang");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }

    let quick = Census::take_during_revoke();
    let owners = pids(&device(&quick, guest)?.holders);
    let seen = find(&quick, &buffer)?;
    ensure!(owners == [process.id()] && seen.attached.is_none(), "held by {owners:?}; {seen:?}");
    ensure!(seen.exporter.may_be(lender(guest)?), "{seen:?}");
    // Bufinfo answers, too: what is waited for now is the unmapping, without the reservation lock.
    let census = Census::take();
    let seen = find(&census, &buffer)?;
    ensure!(seen.attached.as_deref() == Some(&[Attached::Pci(gpu.parse()?)]), "{seen:?}");

    hold.unmap()?;
    process.end_reset()?;
    Ok(())
}

fn lender(guest: &Guest) -> Result<PciAddress> {
    Ok(guest.lender()?.parse()?)
}

fn device<'census>(census: &'census Census, guest: &Guest) -> Result<&'census Device> {
    census.device(lender(guest)?).context("the lender is no VFIO device")
}

fn find<'census>(census: &'census Census, buffer: &DmaBuf) -> Result<&'census Buffer> {
    let inode = buffer.inode()?;
    census.buffers.iter().find(|seen| seen.inode == inode).context("the dma-buf is not seen")
}

fn pids(holders: &[Holder]) -> Vec<u32> {
    holders.iter().map(|holder| holder.process.pid).collect()
}

fn sorted(mut pids: [u32; 2]) -> [u32; 2] {
    pids.sort_unstable();
    pids
}
