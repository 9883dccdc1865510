//! `Witness`: an importer that looks at painted memory by its own device, again and again.
//!
//! Each stands for a way in which the kernel or this process takes memory away and gives it back: a GPU's
//! screen, shaders by host pointer, an engine by iommufd or by type1, and a driver of our own.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use peervram::backends::drm::{self, BufferObject, ScanOut};
use peervram::backends::vfio::{Device, Interface, IoAddressSpace, IovaMapping};
use peervram::backends::vulkan::{self, Buffer, Engine, Image, ImageOptions, Instance, Selector};
use peervram::backends::{DmaBuf, DmaRange, DmaRanges, Exporter, Importer, Mapping, OnRevoke, PciAddress};
use peervram::{Attachment, Direction, Error, Kind, Outcome};
use peervram_model_driver::{ModelGpu, VRAM_BAR};

use crate::blocks;
use crate::crossing::{PATIENCE, check_screen, open_node};
use crate::guest::Guest;
use crate::holder::Hold;
use crate::painted::{LAYOUT, bytes_of, picture_of};

/// Shaders are compiled at their first use, by a CPU that is itself emulated.
const SLOW: Duration = Duration::from_secs(50);

/// An importer that looks.
pub trait Witness {
    /// What it imports with.
    type Importer: Importer;

    /// Its name in tables.
    fn name(&self) -> &'static str;

    /// What it imports with.
    fn importer(&self) -> Arc<Self::Importer>;

    /// Looks by its device whether `memory` is what it must be in that generation.
    fn is_right(&mut self, memory: &<Self::Importer as Importer>::Memory, generation: u64) -> Result<bool>;

    /// Makes its device work again after memory went away under it.
    fn recover(&mut self) -> Result<()> {
        Ok(())
    }
}

/// What a witness has seen.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Looks that found the right bytes, in any generation.
    pub right: u64,
    /// The generation of the last of them.
    pub generation: u64,
    /// Looks that ended torn, and said so.
    pub torn: u64,
    /// The memory is gone for good.
    pub gone: bool,
    /// Something happened that nobody announced, or was not waited for: in generations below this one, bytes may be wrong until
    /// this process has heard of it.
    pub unannounced_below: u64,
    /// The generation of the lender whose bytes are looked for, where this process has counted fewer: it hears once of what
    /// was taken twice.
    pub of_lender: Option<u64>,
    /// Looks that found wrong bytes then.
    pub wrong: u64,
    /// Why it was last not let in.
    pub refused: String,
}

impl Seen {
    /// One look, or an attempt at one. Wrong bytes in an access that was not reported torn are an error.
    pub fn look<W: Witness>(&mut self, witness: &mut W, attachment: &Attachment<W::Importer>) -> Result<()> {
        let access = match attachment.enter(Direction::Read) {
            Ok(access) => access,
            Err(revoked) => {
                let error = Error::from(revoked);
                self.gone = error.kind() == Kind::Gone;
                // What an application does: take the next import, if it is there.
                let current = attachment.current();
                if self.gone || current.is_err() {
                    thread::sleep(Duration::from_millis(1));
                }
                self.refused = current.err().unwrap_or(error).to_string();
                return Ok(());
            }
        };
        let generation = access.generation();
        let looked = witness.is_right(access.memory(), self.of_lender.unwrap_or(generation));
        match access.finish() {
            Outcome::Torn { .. } => {
                self.torn += 1;
                witness.recover()
            }
            Outcome::Ok => {
                let may_be_wrong = generation < self.unannounced_below;
                match looked {
                    Ok(true) => (self.right, self.generation) = (self.right + 1, generation),
                    Ok(false) | Err(_) if may_be_wrong => {
                        self.wrong += 1;
                        witness.recover()?;
                    }
                    Ok(false) => bail!("{} sees wrong bytes in generation {generation}", witness.name()),
                    Err(error) => return Err(error),
                }
                Ok(())
            }
            other => bail!("{}'s access ended as {other:?}", witness.name()),
        }
    }

    /// Looks until `is_enough`.
    pub fn look_until<W: Witness>(
        &mut self,
        witness: &mut W,
        attachment: &Attachment<W::Importer>,
        is_enough: impl Fn(&Seen) -> bool,
    ) -> Result<()> {
        let deadline = Instant::now() + 2 * PATIENCE;
        while !is_enough(self) {
            if Instant::now() > deadline {
                bail!("{} has seen only {self:?}", witness.name());
            }
            self.look(witness, attachment)?;
        }
        Ok(())
    }
}

/// A virtio GPU: shows the picture, and compares what the host's screen shows.
pub struct Screen<'guest> {
    guest: &'guest Guest,
    node: Arc<drm::Node>,
}

impl<'guest> Screen<'guest> {
    pub fn new(guest: &'guest Guest) -> Result<Self> {
        Ok(Self { guest, node: open_node(guest)? })
    }

    /// Another one on the same node: a screen has one master.
    pub fn beside(&self) -> Self {
        Self { guest: self.guest, node: Arc::clone(&self.node) }
    }
}

impl Witness for Screen<'_> {
    type Importer = drm::Node;

    fn name(&self) -> &'static str {
        "virtio-gpu"
    }

    fn importer(&self) -> Arc<drm::Node> {
        Arc::clone(&self.node)
    }

    fn is_right(&mut self, memory: &BufferObject, generation: u64) -> Result<bool> {
        let _scan_out = ScanOut::start(memory, LAYOUT)?;
        Ok(check_screen(&self.guest.screendump()?, &picture_of(generation)?).is_ok())
    }
}

/// Lavapipe by host pointer: a compute shader sums what it reads.
pub struct Shader {
    device: Arc<vulkan::Device>,
    engine: Engine,
}

impl Shader {
    pub fn new() -> Result<Self> {
        let device = Arc::new(Instance::open()?.open_device(&Selector::Any)?);
        Ok(Self { engine: Engine::new(&device)?, device })
    }
}

impl Witness for Shader {
    type Importer = vulkan::Device;

    fn name(&self) -> &'static str {
        "Vulkan"
    }

    fn importer(&self) -> Arc<vulkan::Device> {
        Arc::clone(&self.device)
    }

    fn is_right(&mut self, memory: &Buffer, generation: u64) -> Result<bool> {
        let sum = self.engine.checksum(memory, 0..LAYOUT.end_bytes(), Instant::now() + SLOW)?;
        Ok(sum == vulkan::checksum(&bytes_of(generation)))
    }
}

/// Lavapipe by host pointer, to which the memory is an image: what it copies out are pixels.
pub struct ImageReader {
    device: Arc<vulkan::ImageDevice>,
    engine: Engine,
}

impl ImageReader {
    pub fn new() -> Result<Self> {
        let device = Instance::open()?.open_device(&Selector::Any)?;
        let engine = Engine::new(&device)?;
        Ok(Self { device: Arc::new(device.for_images(LAYOUT, ImageOptions::default())), engine })
    }
}

impl Witness for ImageReader {
    type Importer = vulkan::ImageDevice;

    fn name(&self) -> &'static str {
        "Vulkan image"
    }

    fn importer(&self) -> Arc<vulkan::ImageDevice> {
        Arc::clone(&self.device)
    }

    fn is_right(&mut self, memory: &Image, generation: u64) -> Result<bool> {
        let expected = bytes_of(generation);
        let mut seen = vec![0; expected.len()];
        self.engine.read_image(memory, &mut seen, Instant::now() + SLOW)?;
        Ok(seen == expected)
    }
}

/// How much an engine copies at a time: messages of the model take their time.
pub const COPIED_BYTES: u64 = 64 << 10;

/// Another model GPU: its engine copies into its own VRAM, which is compared there.
pub struct CopyEngine {
    name: &'static str,
    space: Arc<IoAddressSpace>,
    gpu: ModelGpu,
    view: Arc<Mapping>,
    device: Device,
}

impl CopyEngine {
    pub fn new(address: PciAddress, interface: Interface) -> Result<Self> {
        let name = match interface {
            Interface::Cdev => "engine, iommufd",
            Interface::Group => "engine, type1",
        };
        let space = IoAddressSpace::new(interface)?;
        let device = Device::open_into(&space, address)?;
        let gpu = ModelGpu::new(&device)?;
        let landing = DmaRange::new(0, COPIED_BYTES);
        let view = device.map(&DmaRanges::new(device.region(VRAM_BAR)?, &[landing])?)?;
        Ok(Self { name, space: Arc::new(space), gpu, view, device })
    }

    /// What is in `memory` from `offset_bytes` on, [`COPIED_BYTES`] of it.
    pub fn load(&self, memory: &IovaMapping, offset_bytes: u64) -> Result<Vec<u8>> {
        self.gpu.read_dma(memory.iova() + offset_bytes, 0, COPIED_BYTES, PATIENCE)?;
        let mut copied = vec![0; COPIED_BYTES as usize];
        self.view.read(0, &mut copied)?;
        Ok(copied)
    }

    /// Puts the blocks of `seed` at their place in `memory`, [`COPIED_BYTES`] of them from `offset_bytes` on.
    pub fn store(&self, seed: u32, memory: &IovaMapping, offset_bytes: u64) -> Result<()> {
        blocks::fill(&self.gpu, seed, offset_bytes, COPIED_BYTES, COPIED_BYTES)?;
        Ok(self.gpu.write_dma(COPIED_BYTES, memory.iova() + offset_bytes, COPIED_BYTES, PATIENCE)?)
    }
}

impl Witness for CopyEngine {
    type Importer = IoAddressSpace;

    fn name(&self) -> &'static str {
        self.name
    }

    fn importer(&self) -> Arc<IoAddressSpace> {
        Arc::clone(&self.space)
    }

    fn is_right(&mut self, memory: &IovaMapping, generation: u64) -> Result<bool> {
        let copied = self.load(memory, 0)?;
        Ok(copied == bytes_of(generation)[..copied.len()])
    }

    fn recover(&mut self) -> Result<()> {
        Ok(self.gpu.restart(&self.device)?)
    }
}

/// The holder on behalf of a function: maps, and moves no bytes. What it can see is whether it is mapped.
pub struct Holder(Arc<AsFunction>);

/// A dma-buf that the holder has mapped.
pub struct Held {
    hold: Hold,
    size_bytes: u64,
}

/// The holder as an importer.
pub struct AsFunction {
    function: String,
    on_revoke: OnRevoke,
}

impl Holder {
    pub fn new(function: String) -> Self {
        Self(Arc::new(AsFunction { function, on_revoke: OnRevoke::Reimport }))
    }

    /// One whose imports must be freed before memory is taken back.
    pub fn freed_before(function: String) -> Self {
        Self(Arc::new(AsFunction { function, on_revoke: OnRevoke::FreeBefore }))
    }
}

impl Importer for AsFunction {
    type Memory = Held;

    fn name(&self) -> String {
        format!("holder, as {}", self.function)
    }

    fn pci_address(&self) -> Option<PciAddress> {
        self.function.parse().ok()
    }

    fn on_revoke(&self) -> OnRevoke {
        self.on_revoke
    }

    fn governed_by_p2pdma(&self) -> bool {
        true
    }

    fn import(&self, dma_buf: &DmaBuf) -> peervram::Result<Held> {
        const TRIED: &str = "hold a dma-buf";
        let failed = |errno| Error::os(TRIED, errno).on(&self.function);
        let hold = Hold::open().map_err(|error| Error::new(Kind::Os, TRIED, format!("{error:#}")))?;
        hold.attach(&self.function, dma_buf).map_err(failed)?;
        hold.map().map_err(failed)?;
        Ok(Held { hold, size_bytes: dma_buf.size_bytes() })
    }

    fn release(&self, memory: Held) -> peervram::Result<()> {
        memory.hold.release().map_err(|errno| Error::os("let go of a dma-buf", errno).on(&self.function))
    }
}

impl Witness for Holder {
    type Importer = AsFunction;

    fn name(&self) -> &'static str {
        "holder"
    }

    fn importer(&self) -> Arc<AsFunction> {
        Arc::clone(&self.0)
    }

    /// The holder has no engine that could read bytes; the test checks that all of the memory is mapped for it.
    fn is_right(&mut self, memory: &Held, _: u64) -> Result<bool> {
        let state = memory.hold.state().context("the holder's state")?;
        let mapped_bytes: u64 = state.ranges.iter().map(|range| range.length_bytes).sum();
        Ok(state.mapped && mapped_bytes == memory.size_bytes)
    }
}
