//! Frames by three GPUs: one draws them, one filters them in place, one shows them.
//!
//! ```text
//! frame_pipeline 0000:01:00.0 /dev/dri/card0 0000:03:00.0
//! ```
//! Two buffers take turns. They lie in the VRAM of the first device, which lends them to all three: the lab's model
//! GPU (the third argument) draws by DMA of its own, a Vulkan device filters by a compute shader, and the GPU of the
//! DRM node scans out. A model GPU's own VRAM would do as well but for QEMU, whose screens show nothing of it.
//!
//! To Vulkan both are storage images: the first has the driver's own row pitch, the second one that the lender chose
//! and says. To the screen they are gbm buffer objects.
//!
//! Each frame has two values of a timeline semaphore: the first says that it is drawn, the second that it is
//! filtered. The filter is submitted before there is anything to filter, and waits for the first. The screen
//! waits for a sync file, which the filter signals, too. What the VRAM held is lost.
#![expect(clippy::print_stdout, reason = "a sample prints as a program of its reader's would")]
#![expect(unsafe_code, reason = "an application's own calls of Vulkan")]

use std::ffi::CStr;
use std::io::Cursor;
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ash::{khr, vk, vk::Handle};
use peervram::backends::drm::ScanOut;
use peervram::backends::vulkan::{
    self, Image, ImageDevice, ImageOptions, ImageUsage, PixelFormat, Tiling, TimelineSignal,
};
use peervram::backends::{
    Aperture, DmaRange, DmaRanges, ImageLayout, Mapping, RawBytes, Signal, SyncFile, gbm, page_size_bytes,
    vfio,
};
use peervram::{Attachment, Direction, Lender, Outcome, Trust};
use peervram_model_driver::{Descriptor, ImportingGpu, ModelGpu, operation};
use peervram_samples::screendump;

const WIDTH: u32 = 640;
const HEIGHT: u32 = 480;
const FRAMES: u32 = 34;
/// Where the frames lie in each buffer, and who says so to Vulkan: rows without a gap suit every driver, rows with one
/// need to be told.
const BUFFERS: [(ImageLayout, Tiling); 2] = [
    (ImageLayout { offset_bytes: 0, width: WIDTH, height: HEIGHT, stride_bytes: WIDTH * 4 }, Tiling::Linear),
    (
        ImageLayout { offset_bytes: 0, width: WIDTH, height: HEIGHT, stride_bytes: WIDTH * 4 + 256 },
        Tiling::EXPLICIT_LINEAR,
    ),
];
/// Frames that are looked at, one in each buffer, and what their pictures are called.
const LOOKED_AT: [(u32, &str); 2] = [(8, "early"), (33, "late")];
/// How long a step of a frame may take: an emulated CPU compiles the shader first.
const PATIENCE: Duration = Duration::from_secs(60);

/// A buffer, and what each of the three has of it.
struct Turn {
    layout: ImageLayout,
    view: Arc<Mapping>,
    drawn: Attachment<ImportingGpu>,
    filtered: Attachment<ImageDevice>,
    shown: Attachment<gbm::ImageDevice>,
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [lender, node, model] = &arguments[..] else {
        anyhow::bail!("usage: frame_pipeline ADDRESS DRM-NODE MODEL-GPU");
    };

    // Who lends, who draws, who filters, who shows.
    let lender = Lender::new(vfio::Device::open(lender.parse()?)?);
    let device = vfio::Device::open(model.parse()?)?;
    let gpu = Arc::new(ModelGpu::new(&device)?);
    let artist = Arc::new(ImportingGpu::new(&device, gpu, 0..0)?);
    let mut filter = Filter::open()?;
    // SAFETY: `filter` outlives the attachments, which are made after it.
    let importer = unsafe { filter.importer() }?;
    let screen = gbm::Device::open(Path::new(node))?;

    // VRAM for a frame, lent to all, and again.
    let bars = lender.device().regions().iter().filter(|region| region.index < 6);
    let bar = bars.max_by_key(|region| region.size_bytes).context("the device has no memory BAR")?;
    let (mut turns, mut free) = (Vec::new(), 0);
    for (layout, tiling) in BUFFERS {
        // All of the last row, and a page, for drivers may want more than the pixels.
        let size_bytes = u64::from(layout.stride_bytes) * u64::from(layout.height) + page_size_bytes();
        let range = DmaRange::new(free, size_bytes.next_multiple_of(page_size_bytes()));
        free += range.length_bytes;
        let ranges = DmaRanges::new(bar, &[range])?;
        let view = lender.device().map(&ranges)?;
        let export = lender.export(Aperture::owned(ranges, Arc::new(RawBytes)))?;
        let words = ImageOptions { usage: ImageUsage::STORAGE, format: PixelFormat::R32Uint, tiling };
        let turn = Turn {
            layout,
            view,
            drawn: export.attach(Arc::clone(&artist), Trust::Unverified)?,
            filtered: export.attach(Arc::new(importer.for_images(layout, words)), Trust::Unverified)?,
            shown: export.attach(Arc::new(screen.for_images(layout)), Trust::Unverified)?,
        };
        let Turn { drawn, filtered, shown, .. } = &turn;
        let staged = drawn.staging().is_some() || filtered.staging().is_some() || shown.staging().is_some();
        ensure!(!staged, "the frames would be copied");
        println!(
            "drawn by {}, filtered by {} ({tiling}, {} bytes a row), shown by {}",
            drawn.path(),
            filtered.path(),
            layout.stride_bytes,
            shown.path()
        );
        filter.record(turn.filtered.current()?.memory())?;
        turns.push(turn);
    }

    let pictures = turns.iter().map(|turn| turn.shown.current()).collect::<peervram::Result<Vec<_>>>()?;
    let mut scan_out = ScanOut::start(pictures[0].memory(), turns[0].layout)?;
    let (mut busy, mut counted, mut sync_files) = (Duration::ZERO, 0, 0);
    for frame in 0..FRAMES {
        let start = Instant::now();
        let which = frame as usize % turns.len();
        let Turn { layout, view, drawn, filtered, shown } = &turns[which];
        let (is_drawn, is_done) = (2 * u64::from(frame) + 1, 2 * u64::from(frame) + 2);

        // Waits for `is_drawn`. The access lasts until `is_done`.
        let access = filtered.enter(Direction::Both)?;
        filter.submit(which, is_drawn, is_done)?;
        // SAFETY: the semaphore is a timeline of this device, and lives as long as `filter`.
        let signal = unsafe { TimelineSignal::from_raw(&importer, filter.timeline.as_raw(), is_done) }?;
        let filtering = access.finish_when(signal);

        let access = drawn.enter(Direction::Write)?;
        let work = Descriptor::draw(operation::DRAW_GRADIENT, 0, WIDTH, HEIGHT, frame, 0);
        let work = work.with_stride(layout.stride_bytes);
        artist.draw(access.memory(), layout.offset_bytes, work, PATIENCE)?;
        ensure!(access.finish() == Outcome::Ok, "frame {frame} was taken away from who draws");
        filter.signal(is_drawn)?;

        let access = shown.enter(Direction::Read)?;
        if let Some(sync_file) = filter.sync_file()? {
            ensure!(sync_file.wait(PATIENCE)?, "frame {frame} is not filtered in time");
            sync_files += 1;
        }
        scan_out.show(pictures[which].memory(), *layout)?;
        ensure!(access.finish() == Outcome::Ok, "frame {frame} was taken away from the screen");
        ensure!(
            filtering.wait(PATIENCE) == Some(Outcome::Ok),
            "frame {frame} was taken away from the filter"
        );

        // The first ones wait for the shader's compiler.
        if frame as usize >= turns.len() {
            (busy, counted) = (busy + start.elapsed(), counted + 1);
        }
        if let Some((_, name)) = LOOKED_AT.iter().find(|(number, _)| *number == frame) {
            // The number of the frame is white where it is drawn: amber says that it was filtered, and once.
            let mut pixel = [0; 4];
            view.read(layout.offset_bytes as usize + 20 * layout.stride_bytes as usize + 20 * 4, &mut pixel)?;
            ensure!(pixel == [0x28, 0xB4, 0xFF, 0], "frame {frame} has {pixel:02x?} where its number is");
            screendump(name)?;
        }
    }
    let rate = f64::from(counted) / busy.as_secs_f64();
    // None of the attachments is staged, or we would not be here.
    println!("{FRAMES} frames, {rate:.1} per second, {sync_files} sync files, 0 bytes copied by the CPU");
    Ok(())
}

/// A Vulkan application that filters pictures in place. All in it is gone with the program.
struct Filter {
    entry: ash::Entry,
    instance: ash::Instance,
    physical: vk::PhysicalDevice,
    device: ash::Device,
    queue: vk::Queue,
    family: u32,
    extensions: Vec<&'static CStr>,
    layout: vk::PipelineLayout,
    pipeline: vk::Pipeline,
    set_layout: vk::DescriptorSetLayout,
    descriptors: vk::DescriptorPool,
    commands_pool: vk::CommandPool,
    /// One for each picture, recorded once.
    commands: Vec<vk::CommandBuffer>,
    timeline: vk::Semaphore,
    /// What becomes a sync file.
    filtered: vk::Semaphore,
    sync_files: khr::external_semaphore_fd::Device,
}

impl Filter {
    fn open() -> Result<Self> {
        // SAFETY: each handle is used with the one that it was made from, each structure outlives its call, and
        // what is asked of the device is what it said that it has; who has no timelines or sync files refuses to
        // be made. Nothing is destroyed: the program ends soon, and the driver with it.
        unsafe {
            let entry = ash::Entry::load()?;
            let about = vk::ApplicationInfo::default().api_version(vk::API_VERSION_1_2);
            let info = vk::InstanceCreateInfo::default().application_info(&about);
            let instance = entry.create_instance(&info, None)?;
            let physical = *instance.enumerate_physical_devices()?.first().context("no Vulkan device")?;
            let families = instance.get_physical_device_queue_family_properties(physical);
            let computes =
                |family: &vk::QueueFamilyProperties| family.queue_flags.contains(vk::QueueFlags::COMPUTE);
            let family = families.iter().position(computes).context("no queue computes")? as u32;
            let available = instance.enumerate_device_extension_properties(physical)?;
            let has = |name: &CStr| {
                available.iter().any(|extension| extension.extension_name_as_c_str() == Ok(name))
            };
            let wanted = vulkan::EXTENSIONS.iter().map(|extension| extension.name);
            let mut extensions: Vec<&'static CStr> = wanted.filter(|name| has(name)).collect();
            extensions.push(khr::external_semaphore_fd::NAME);
            let names: Vec<_> = extensions.iter().map(|name| name.as_ptr()).collect();
            let queues =
                [vk::DeviceQueueCreateInfo::default().queue_family_index(family).queue_priorities(&[1.0])];
            let mut timelines =
                vk::PhysicalDeviceTimelineSemaphoreFeatures::default().timeline_semaphore(true);
            let info = vk::DeviceCreateInfo::default()
                .queue_create_infos(&queues)
                .enabled_extension_names(&names)
                .push_next(&mut timelines);
            let device = instance.create_device(physical, &info, None)?;
            let queue = device.get_device_queue(family, 0);

            let bindings = [vk::DescriptorSetLayoutBinding::default()
                .descriptor_type(vk::DescriptorType::STORAGE_IMAGE)
                .descriptor_count(1)
                .stage_flags(vk::ShaderStageFlags::COMPUTE)];
            let info = vk::DescriptorSetLayoutCreateInfo::default().bindings(&bindings);
            let set_layout = device.create_descriptor_set_layout(&info, None)?;
            let set_layouts = [set_layout];
            let info = vk::PipelineLayoutCreateInfo::default().set_layouts(&set_layouts);
            let layout = device.create_pipeline_layout(&info, None)?;
            let code = ash::util::read_spv(&mut Cursor::new(include_bytes!("../shaders/filter.spv")))?;
            let shader =
                device.create_shader_module(&vk::ShaderModuleCreateInfo::default().code(&code), None)?;
            let stage = vk::PipelineShaderStageCreateInfo::default()
                .stage(vk::ShaderStageFlags::COMPUTE)
                .module(shader)
                .name(c"main");
            let info = [vk::ComputePipelineCreateInfo::default().stage(stage).layout(layout)];
            let pipelines = device.create_compute_pipelines(vk::PipelineCache::null(), &info, None);
            let pipeline = pipelines.map_err(|(_, error)| error)?[0];

            let count = BUFFERS.len() as u32;
            let sizes = [vk::DescriptorPoolSize::default()
                .ty(vk::DescriptorType::STORAGE_IMAGE)
                .descriptor_count(count)];
            let info = vk::DescriptorPoolCreateInfo::default().max_sets(count).pool_sizes(&sizes);
            let descriptors = device.create_descriptor_pool(&info, None)?;
            let info = vk::CommandPoolCreateInfo::default().queue_family_index(family);
            let commands_pool = device.create_command_pool(&info, None)?;

            let mut kind = vk::SemaphoreTypeCreateInfo::default().semaphore_type(vk::SemaphoreType::TIMELINE);
            let info = vk::SemaphoreCreateInfo::default().push_next(&mut kind);
            let timeline = device.create_semaphore(&info, None)?;
            let mut given = vk::ExportSemaphoreCreateInfo::default()
                .handle_types(vk::ExternalSemaphoreHandleTypeFlags::SYNC_FD);
            let info = vk::SemaphoreCreateInfo::default().push_next(&mut given);
            let filtered = device.create_semaphore(&info, None)?;
            let sync_files = khr::external_semaphore_fd::Device::new(&instance, &device);
            Ok(Self {
                entry,
                instance,
                physical,
                device,
                queue,
                family,
                extensions,
                layout,
                pipeline,
                set_layout,
                descriptors,
                commands_pool,
                commands: Vec::new(),
                timeline,
                filtered,
                sync_files,
            })
        }
    }

    /// The same device, as peervram sees it.
    ///
    /// # Safety
    /// As [`vulkan::Device::from_ash`]: the device outlives all that is made of it.
    unsafe fn importer(&self) -> Result<vulkan::Device> {
        let Self { entry, instance, physical, device, extensions, .. } = self;
        let queue = (self.queue, self.family);
        // SAFETY: the handles belong together; the rest is the caller's.
        let device =
            unsafe { vulkan::Device::from_ash(entry, instance, *physical, device, queue, extensions) };
        Ok(device?)
    }

    /// Records the filter of the picture in `memory`, once for all its frames.
    fn record(&mut self, memory: &Image) -> Result<()> {
        let Self { device, .. } = self;
        let (stage, access) = (
            vk::PipelineStageFlags::COMPUTE_SHADER.as_raw(),
            (vk::AccessFlags::SHADER_READ | vk::AccessFlags::SHADER_WRITE).as_raw(),
        );
        // What storage images are used in (VUID-VkWriteDescriptorSet-descriptorType-04152).
        let general = vk::ImageLayout::GENERAL;
        // SAFETY: this is called before anything is submitted; all handles are of this device, and each access
        // to the memory holds the import that the image is of, for nobody takes the memory back here.
        unsafe {
            let whole = vk::ImageSubresourceRange::default()
                .aspect_mask(vk::ImageAspectFlags::COLOR)
                .level_count(1)
                .layer_count(1);
            let info = vk::ImageViewCreateInfo::default()
                .image(vk::Image::from_raw(memory.raw_image()))
                .view_type(vk::ImageViewType::TYPE_2D)
                .format(vk::Format::from_raw(memory.options().format.raw()))
                .subresource_range(whole);
            let view = device.create_image_view(&info, None)?;
            let set_layouts = [self.set_layout];
            let info = vk::DescriptorSetAllocateInfo::default()
                .descriptor_pool(self.descriptors)
                .set_layouts(&set_layouts);
            let set = device.allocate_descriptor_sets(&info)?[0];
            let images = [vk::DescriptorImageInfo::default().image_view(view).image_layout(general)];
            let write = vk::WriteDescriptorSet::default()
                .dst_set(set)
                .descriptor_type(vk::DescriptorType::STORAGE_IMAGE)
                .image_info(&images);
            device.update_descriptor_sets(&[write], &[]);

            let info = vk::CommandBufferAllocateInfo::default()
                .command_pool(self.commands_pool)
                .command_buffer_count(1);
            let commands = device.allocate_command_buffers(&info)?[0];
            device.begin_command_buffer(commands, &vk::CommandBufferBeginInfo::default())?;
            let ours = memory.device();
            ours.record_acquire_image(commands.as_raw(), memory, general.as_raw(), stage, access);
            let bind_point = vk::PipelineBindPoint::COMPUTE;
            device.cmd_bind_pipeline(commands, bind_point, self.pipeline);
            device.cmd_bind_descriptor_sets(commands, bind_point, self.layout, 0, &[set], &[]);
            device.cmd_dispatch(commands, WIDTH.div_ceil(8), HEIGHT.div_ceil(8), 1);
            ours.record_release_image(commands.as_raw(), memory, general.as_raw(), stage, access);
            device.end_command_buffer(commands)?;
            self.commands.push(commands);
        }
        Ok(())
    }

    /// Submits the filter of picture `which`, to begin when the timeline is at `drawn`; it is at `done` when the
    /// filter is.
    fn submit(&mut self, which: usize, drawn: u64, done: u64) -> Result<()> {
        let (commands, waits, signals) =
            ([self.commands[which]], [self.timeline], [self.timeline, self.filtered]);
        // The value of a semaphore that is no timeline is ignored.
        let (wait_values, signal_values) = ([drawn], [done, 0]);
        let mut values = vk::TimelineSemaphoreSubmitInfo::default()
            .wait_semaphore_values(&wait_values)
            .signal_semaphore_values(&signal_values);
        let info = vk::SubmitInfo::default()
            .command_buffers(&commands)
            .wait_semaphores(&waits)
            .wait_dst_stage_mask(&[vk::PipelineStageFlags::COMPUTE_SHADER])
            .signal_semaphores(&signals)
            .push_next(&mut values);
        // SAFETY: the submission before was waited for, and its sync file taken, which leaves the semaphore
        // unsignalled (VUID-vkQueueSubmit-pCommandBuffers-00071, VUID-vkQueueSubmit-pSignalSemaphores-00067).
        // Values grow with each frame (VUID-VkSubmitInfo-pSignalSemaphores-03242).
        Ok(unsafe { self.device.queue_submit(self.queue, &[info], vk::Fence::null()) }?)
    }

    /// Says that the timeline is at `value`: for a device that is no Vulkan device.
    fn signal(&self, value: u64) -> Result<()> {
        let info = vk::SemaphoreSignalInfo::default().semaphore(self.timeline).value(value);
        // SAFETY: the value is above the present one and below that of the submission that waits for it
        // (VUID-VkSemaphoreSignalInfo-value-03258, -03259).
        Ok(unsafe { self.device.signal_semaphore(&info) }?)
    }

    /// What fires when the filter that was submitted last is done; nothing where it is done.
    fn sync_file(&self) -> Result<Option<SyncFile>> {
        let info = vk::SemaphoreGetFdInfoKHR::default()
            .semaphore(self.filtered)
            .handle_type(vk::ExternalSemaphoreHandleTypeFlags::SYNC_FD);
        // SAFETY: the submission signals the semaphore, and what that waits for was signalled
        // (VUID-VkSemaphoreGetFdInfoKHR-handleType-03254).
        let fd = unsafe { self.sync_files.get_semaphore_fd(&info) }?;
        // Vulkan's word for a semaphore that was signalled before.
        if fd == -1 {
            return Ok(None);
        }
        // SAFETY: the descriptor is new, and nobody else's.
        Ok(Some(SyncFile::from_fd(unsafe { OwnedFd::from_raw_fd(fd) })?))
    }
}
