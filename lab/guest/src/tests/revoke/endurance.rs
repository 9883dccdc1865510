//! A thousand resets in a row, and nothing is left behind.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use peervram::backends::drm::Node;
use peervram::backends::{Aperture, DmaRange, DmaRanges, Importer, RawBytes, page_size_bytes, vulkan};
use peervram::{Attachment, Direction, Export, Lender, Trust};

use crate::crossing::{PATIENCE, VRAM, open_device, open_node};
use crate::guest::Guest;
use crate::test::{Test, Verdict};
use crate::witness::{AsFunction, Holder, Witness};

pub const TESTS: &[Test] = &[Test::of_revoke("revoke/a-thousand-resets-leave-nothing-behind", a_thousand)];

const ROUNDS: u64 = 1000;
/// The first rounds may leave what a process and a kernel keep once.
const WARM_UP: u64 = 100;

/// What a process and the kernel have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Kept {
    descriptors: usize,
    threads: usize,
    dma_bufs: usize,
    own_memory_kib: u64,
    free_memory_kib: u64,
}

impl Kept {
    fn now() -> Result<Kept> {
        // The thread of the last revoke has ended by then.
        std::thread::sleep(Duration::from_millis(100));
        let count = |folder: &str| -> Result<usize> { Ok(fs::read_dir(folder)?.count()) };
        let bufinfo = fs::read_to_string("/sys/kernel/debug/dma_buf/bufinfo").context("bufinfo")?;
        let total = bufinfo.lines().rev().find_map(|line| line.strip_prefix("Total ")?.split(' ').next());
        Ok(Kept {
            descriptors: count("/proc/self/fd")?,
            threads: count("/proc/self/task")?,
            dma_bufs: total.context("bufinfo has no total")?.parse()?,
            own_memory_kib: kib("/proc/self/status", "VmRSS:")?,
            free_memory_kib: kib("/proc/meminfo", "MemAvailable:")?,
        })
    }
}

fn kib(file: &str, key: &str) -> Result<u64> {
    let text = fs::read_to_string(file).context(file.to_owned())?;
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    let number = line.and_then(|line| line.split_whitespace().next());
    number.with_context(|| format!("{file} has no {key}"))?.parse().context(file.to_owned())
}

/// Eight attachments: four of a GPU, two of shaders, two of the holder.
struct Eight {
    screens: Vec<Attachment<Node>>,
    shaders: Vec<Attachment<vulkan::Device>>,
    holders: Vec<Attachment<AsFunction>>,
}

impl Eight {
    fn new(guest: &Guest, exports: &[Export]) -> Result<Eight> {
        let (node, holder) = (open_node(guest)?, Holder::new(guest.virtio_gpu()?).importer());
        let device = Arc::new(vulkan::Instance::open()?.open_device(&vulkan::Selector::Any)?);
        Ok(Eight {
            screens: attach(&exports[..4], &node)?,
            shaders: attach(&exports[4..6], &device)?,
            holders: attach(&exports[6..8], &holder)?,
        })
    }

    fn len(&self) -> u64 {
        (self.screens.len() + self.shaders.len() + self.holders.len()) as u64
    }

    /// Everyone uses the memory once, as it is now.
    fn use_all(&self, generation: u64) -> Result<()> {
        use_each(&self.screens, generation)?;
        use_each(&self.shaders, generation)?;
        use_each(&self.holders, generation)
    }
}

fn attach<I: Importer>(exports: &[Export], importer: &Arc<I>) -> Result<Vec<Attachment<I>>> {
    exports.iter().map(|export| Ok(export.attach(Arc::clone(importer), Trust::Unverified)?)).collect()
}

fn use_each<I: Importer>(attachments: &[Attachment<I>], generation: u64) -> Result<()> {
    for attachment in attachments {
        if !attachment.is_current() {
            attachment.current()?;
        }
        ensure!(attachment.enter(Direction::Read)?.generation() == generation, "of another generation");
    }
    Ok(())
}

fn a_thousand(guest: &Guest) -> Verdict {
    let lender = Lender::new(open_device(guest)?);
    let page = page_size_bytes();
    let exports = (0..8)
        .map(|number| {
            let range = DmaRange::new(number * 4 * page, 4 * page);
            let ranges = DmaRanges::new(lender.device().region(VRAM)?, &[range])?;
            lender.export(Aperture::owned(ranges, Arc::new(RawBytes)))
        })
        .collect::<peervram::Result<Vec<_>>>()?;
    let eight = Eight::new(guest, &exports)?;
    let mut before = None;
    for round in 1..=ROUNDS {
        lender.reset(PATIENCE)?;
        eight.use_all(round)?;
        if round == WARM_UP {
            before = Some(Kept::now()?);
        }
    }
    let (before, after) = (before.context("it was warmed up")?, Kept::now()?);
    let told = |what: &str, before: u64, after: u64| -> Result<()> {
        guest.cell("a thousand resets", what, "after 100", &before.to_string())?;
        guest.cell("a thousand resets", what, "after 1000", &after.to_string())
    };
    told("descriptors", before.descriptors as u64, after.descriptors as u64)?;
    told("threads", before.threads as u64, after.threads as u64)?;
    told("dma-bufs of the machine", before.dma_bufs as u64, after.dma_bufs as u64)?;
    told("own memory, KiB", before.own_memory_kib, after.own_memory_kib)?;
    told("free memory of the machine, KiB", before.free_memory_kib, after.free_memory_kib)?;
    ensure!(
        (before.descriptors, before.threads, before.dma_bufs)
            == (after.descriptors, after.threads, after.dma_bufs),
        "{before:?} became {after:?}"
    );
    // What leaks with each reset is a page at least; of the machine's memory, one for each attachment. Less than half of that is
    // what else comes and goes.
    let rounds_kib = (ROUNDS - WARM_UP) * page / 1024;
    ensure!(after.own_memory_kib <= before.own_memory_kib + rounds_kib / 2, "{before:?} became {after:?}");
    let machine_kib = rounds_kib * eight.len() / 2;
    ensure!(after.free_memory_kib + machine_kib >= before.free_memory_kib, "{before:?} became {after:?}");
    drop((eight, exports));
    lender.close(PATIENCE)?;
    Ok(())
}
