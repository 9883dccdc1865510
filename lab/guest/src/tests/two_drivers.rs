//! Two Vulkan drivers that are not of one kind, in one process: Venus, which has the host's driver do the work, and
//! lavapipe, a CPU. One exports its memory and the other imports it; the other way round, and for memory of a VFIO
//! device, the GPU with 3D refuses, and everything that says who can import says so.

use std::process::{Command, Output};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use peervram::backends::drm::Node;
use peervram::backends::host::HostMemory;
use peervram::backends::vulkan::{self, Device, DeviceMemory, Engine, Instance, PhysicalDevice, Selector};
use peervram::backends::{Aperture, DmaRanges, Exporter, ImageLayout, Importer, import_support_of, pci};
use peervram::verify::Observer;
use peervram::{Attachment, Direction, Export, Kind, Lender, Outcome, Path, Trust};
use peervram_lab::wire;
use peervram_programs::picture::Picture;
use serde_json::Value;

use crate::crossing::{Crossing, PATIENCE, leaks_nothing, refused};
use crate::guest::Guest;
use crate::test::{Test, Verdict};

pub const TESTS: &[Test] = &[
    Test::of_two_drivers("two-drivers/both-are-there-and-say-where", both_are_there),
    Test::of_two_drivers("two-drivers/one-memory-both-ways", one_memory),
    Test::of_two_drivers("two-drivers/what-is-lent-is-verified-by-its-owner", verified),
    Test::of_two_drivers("two-drivers/venus-takes-its-own-memory-back", its_own_memory),
    Test::of_two_drivers("two-drivers/venus-refuses-what-others-made", venus_refuses),
    Test::of_two_drivers("two-drivers/vram-is-copied-to-venus", vram_is_staged),
    Test::of_two_drivers("two-drivers/gpu-with-3d-refuses-vram-in-words", node_refuses),
    Test::of_two_drivers("two-drivers/3d-is-in-the-import-table-and-on-every-page", pages_say_so),
];

/// Shaders are compiled at their first use, by a CPU that is itself emulated.
const SLOW: Duration = Duration::from_secs(50);

const VENUS: &str = "venus";
const LAVAPIPE: &str = "llvmpipe";
const SIZE_BYTES: u64 = 4 << 20;
const EOPNOTSUPP: i32 = 95;
const CANNOT_RUN_HERE: i32 = 4;

fn open(driver: &str) -> Result<Device> {
    let device = Instance::open()?.open_device(&Selector::Name(driver.into()))?;
    let found = &device.description().driver_name;
    ensure!(found == driver, "the device is {found}'s, not {driver}'s");
    Ok(device)
}

fn soon() -> Instant {
    Instant::now() + SLOW
}

/// Memory of a Vulkan device's own, lent.
fn lend(device: &Device) -> Result<(Lender<DeviceMemory>, Export)> {
    let memory = device.allocate_exportable(SIZE_BYTES)?;
    let (whole, owner) = (DmaRanges::whole(memory.region())?, memory.owner());
    let lender = Lender::new(memory);
    let export = lender.export(Aperture::owned(whole, owner))?;
    Ok((lender, export))
}

fn both_are_there(guest: &Guest) -> Verdict {
    let devices = Instance::open()?.physical_devices()?;
    let of = |driver: &str| -> Result<&PhysicalDevice> {
        let found = devices.iter().find(|device| device.driver_name == driver);
        found.with_context(|| format!("no {driver} among {devices:?}"))
    };
    let (venus, lavapipe) = (of(VENUS)?, of(LAVAPIPE)?);
    ensure!(venus.pci_address == Some(guest.venus_gpu()?.parse()?), "Venus is at {:?}", venus.pci_address);
    ensure!(!venus.is_cpu && venus.can_export_dma_buf && !venus.imports_foreign_dma_bufs(), "{venus:?}");
    ensure!(lavapipe.is_cpu && lavapipe.imports_foreign_dma_bufs(), "{lavapipe:?}");
    // Memory of others is what this library is for.
    let any = &devices[Selector::Any.choose(&devices)?];
    ensure!(any.driver_name == LAVAPIPE, "whoever asks for any device gets {}", any.name);
    Ok(())
}

/// Each writes, by copies and by a shader, and the other sees it: what the CPU says that must be there.
fn one_memory(_: &Guest) -> Verdict {
    let (lender, export) = lend(&open(VENUS)?)?;
    let attachment = export.attach(Arc::new(open(LAVAPIPE)?), Trust::Unverified)?;
    ensure!(attachment.path() == Path::Peer, "by {}: {:?}", attachment.path(), attachment.refused());
    let own = lender.device().buffer();
    let mut venus = Engine::new(own.device())?;
    let mut lavapipe = Engine::new(attachment.importer())?;
    let access = attachment.enter(Direction::Both)?;
    let lent = access.memory();
    let card = Picture::test_card(640, 480);
    let layout = ImageLayout::packed(card.width(), card.height());
    let all = 0..layout.end_bytes();
    let mut expected = card.bytes().to_vec();

    venus.upload(own, 0, &expected, soon())?;
    let seen = lavapipe.checksum(lent, all.clone(), soon())?;
    ensure!(seen == vulkan::checksum(&expected), "lavapipe sees {seen:08x} of what Venus copied");
    lavapipe.paint(lent, &layout, 3, soon())?;
    vulkan::paint(&mut expected, &layout, 3)?;
    let seen = venus.checksum(own, all.clone(), soon())?;
    ensure!(seen == vulkan::checksum(&expected), "Venus sees {seen:08x} of what lavapipe painted");
    venus.paint(own, &layout, 9, soon())?;
    vulkan::paint(&mut expected, &layout, 9)?;
    let mut bytes = vec![0; expected.len()];
    lavapipe.read_back(lent, 0, &mut bytes, soon())?;
    ensure!(bytes == expected, "lavapipe copies other bytes than Venus painted");
    ensure!(access.finish() == Outcome::Ok, "the access is torn");
    Ok(attachment.detach()?)
}

fn verified(_: &Guest) -> Verdict {
    let (lender, export) = lend(&open(VENUS)?)?;
    let lavapipe = Arc::new(open(LAVAPIPE)?);
    let attachment = export.attach(lavapipe, Trust::Verified(Direction::Both))?;
    by_owners_engine(&attachment)?;
    attachment.detach()?;
    lender.close(PATIENCE)?;
    Ok(())
}

/// The path is a dma-buf's, and the lender's own engine looked.
fn by_owners_engine(attachment: &Attachment<Device>) -> Result<()> {
    ensure!(attachment.path() == Path::Peer, "by {}: {:?}", attachment.path(), attachment.refused());
    let certificate = attachment.certificate().context("it is trusted for nothing")?;
    // Both ways, by each engine of the importer's.
    let tests = 2 * attachment.importer().engines().len();
    let by_owner = certificate.tests.iter().filter(|test| test.observer == Observer::OwnerEngine).count();
    ensure!(
        certificate.passed() && tests > 0 && (certificate.tests.len(), by_owner) == (tests, tests),
        "its certificate is {certificate:?}"
    );
    Ok(())
}

/// A resource of the same renderer comes back, in another device.
fn its_own_memory(_: &Guest) -> Verdict {
    let (_lender, export) = lend(&open(VENUS)?)?;
    let attachment = export.attach(Arc::new(open(VENUS)?), Trust::Verified(Direction::Both))?;
    by_owners_engine(&attachment)
}

fn venus_refuses(guest: &Guest) -> Verdict {
    let venus = open(VENUS)?;
    let crossing = Crossing::new(guest, 1)?;
    let host = HostMemory::new(SIZE_BYTES)?;
    let of_host = host.export(&DmaRanges::whole(host.region())?)?;
    let (_lavapipes, of_lavapipe) = lend(&open(LAVAPIPE)?)?;
    let of_vfio = crossing.export.dma_buf().map_err(Clone::clone)?;
    let of_lavapipe = of_lavapipe.dma_buf().map_err(Clone::clone)?;
    for (what, dma_buf) in [("VRAM", of_vfio), ("host memory", &of_host), ("lavapipe's", of_lavapipe)] {
        let error = refused(venus.import(dma_buf), Kind::ImporterCannot).context(what)?;
        let next = error.next_step().context("it does not say what to do next")?;
        ensure!(next.contains("its own renderer's memory"), "{what}: {error}");
    }
    Ok(())
}

/// What Venus refuses is copied to memory of its own, and back.
fn vram_is_staged(guest: &Guest) -> Verdict {
    let crossing = Crossing::new(guest, 1)?;
    let attachment = crossing.export.attach(Arc::new(open(VENUS)?), Trust::Unverified)?;
    ensure!(attachment.path() == Path::Staged, "the path is {}", attachment.path());
    let refused_paths = attachment.refused();
    let kinds: Vec<Kind> = refused_paths.iter().map(|(_, why)| why.kind()).collect();
    ensure!(kinds == [Kind::ImporterCannot, Kind::Unsupported], "refused before: {refused_paths:?}");
    let mut engine = Engine::new(attachment.importer())?;
    let (layout, mut painted) = (crossing.layout(), crossing.card.bytes().to_vec());
    let access = attachment.enter(Direction::Write)?;
    engine.paint(access.memory(), &layout, 5, soon())?;
    ensure!(access.finish() == Outcome::Ok, "the access is torn");
    vulkan::paint(&mut painted, &layout, 5)?;
    ensure!(
        crossing.seen()? == Picture::new(640, 480, painted)?,
        "the owner does not see what Venus painted"
    );
    Ok(())
}

fn node_refuses(guest: &Guest) -> Verdict {
    let node = Arc::new(Node::open(&guest.venus_node()?)?);
    leaks_nothing(|| {
        let crossing = Crossing::new(guest, 1)?;
        let error =
            refused(crossing.export.attach(Arc::clone(&node), Trust::Unverified), Kind::ImporterCannot)?;
        ensure!(error.raw_os_error() == Some(EOPNOTSUPP), "the errno is {:?}", error.raw_os_error());
        ensure!(error.to_string().contains("with 3D (virgl, Venus)"), "{error}");
        crossing.close()
    })
}

fn pages_say_so(guest: &Guest) -> Verdict {
    let (gpu, lender) = (guest.venus_gpu()?, guest.lender()?);
    let row = import_support_of(&pci::Function::read(gpu.parse()?)?).context("it is in no table")?;
    ensure!(!row.can_import && row.because.contains("3D"), "{row:?}");

    let said = json(&["devices", "--json"])?;
    let devices = said["devices"].as_array().context("no devices")?;
    let found = devices.iter().find(|device| device["address"] == gpu.as_str());
    let import = &found.with_context(|| format!("no {gpu} in {said}"))?["import"];
    ensure!(import["can"] == false && import["because"] == row.because, "devices: {import}");

    let said = json(&["doctor", "--json"])?;
    let pairs = said["pairs"].as_array().context("no pairs")?;
    ensure!(!pairs.iter().any(|pair| pair["importer"] == gpu.as_str()), "the doctor: {pairs:?}");
    let findings = said["findings"].to_string();
    for text in [format!("cannot import: {}", row.because), "imports nothing, exports dma-bufs".to_owned()] {
        ensure!(findings.contains(&text), "the doctor does not say {text:?} in {findings}");
    }

    let node = guest.venus_node()?.display().to_string();
    let output = peervram(&["import", &lender, "--range", "0+1M", "--to", &node])?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(CANNOT_RUN_HERE) && error.contains(row.because), "{output:?}");
    Ok(())
}

fn json(arguments: &[&str]) -> Result<Value> {
    let output = peervram(arguments)?;
    serde_json::from_slice(&output.stdout).with_context(|| format!("{arguments:?} says {output:?}"))
}

fn peervram(arguments: &[&str]) -> Result<Output> {
    Command::new(format!("{}/peervram", wire::SHARE)).args(arguments).output().context("starting peervram")
}
