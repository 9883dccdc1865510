//! Frames by three GPUs: one draws them, one filters them in place, one shows them.
//!
//! ```text
//! frame_pipeline 0000:01:00.0 /dev/dri/card0 0000:03:00.0
//! ```
//! The frames lie in the VRAM of the first device, which lends it to all three: the lab's model GPU (the third
//! argument) draws by DMA of its own, a Vulkan device filters by a compute shader, and the GPU of the DRM node
//! scans out. A model GPU's own VRAM would do as well but for QEMU, whose screens show nothing of it.
//!
//! Each frame has two values of a timeline semaphore: the first says that it is drawn, the second that it is
//! filtered. The filter is submitted before there is anything to filter, and waits for the first. The screen
//! waits for a sync file, which the filter signals, too. What the VRAM held is lost.
#![expect(unsafe_code, reason = "an application's own calls of Vulkan")]

use std::ffi::CStr;
use std::io::Cursor;
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ash::{khr, vk, vk::Handle};
use peervram::backends::drm::{Node, ScanOut};
use peervram::backends::vulkan::{self, TimelineSignal};
use peervram::backends::{
    Aperture, DmaRange, DmaRanges, Exporter, ImageLayout, RawBytes, Signal, SyncFile, page_size_bytes, vfio,
};
use peervram::{Lender, Outcome, Trust};
use peervram_model_driver::{Descriptor, ImportingGpu, ModelGpu, operation};
use peervram_samples::screendump;

const WIDTH: u32 = 640;
const HEIGHT: u32 = 480;
const FRAMES: u32 = 33;
/// Frames that are looked at, and what their pictures are called.
const LOOKED_AT: [(u32, &str); 2] = [(8, "early"), (32, "late")];
/// How long a step of a frame may take: an emulated CPU compiles the shader first.
const PATIENCE: Duration = Duration::from_secs(60);

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [lender, node, model] = &arguments[..] else {
        anyhow::bail!("usage: frame_pipeline ADDRESS DRM-NODE MODEL-GPU");
    };

    // VRAM for one frame, lent.
    let layout = ImageLayout::packed(WIDTH, HEIGHT);
    let device = vfio::Device::open(lender.parse()?)?;
    let bars = device.regions().iter().filter(|region| region.index < 6);
    let bar = bars.max_by_key(|region| region.size_bytes).context("the device has no memory BAR")?;
    let size_bytes = layout.end_bytes().next_multiple_of(page_size_bytes());
    let ranges = DmaRanges::new(bar, &[DmaRange::new(0, size_bytes)])?;
    let view = device.map(&ranges)?;
    let lender = Lender::new(device);
    let export = lender.export(Aperture::owned(ranges, Arc::new(RawBytes)))?;

    // Who draws, who filters, who shows.
    let device = vfio::Device::open(model.parse()?)?;
    let gpu = Arc::new(ModelGpu::new(&device)?);
    let artist = export.attach(Arc::new(ImportingGpu::new(&device, gpu, 0..0)?), Trust::Unverified)?;
    let mut filter = Filter::open()?;
    // SAFETY: `filter` outlives the attachment, which is made after it.
    let importer = Arc::new(unsafe { filter.importer() }?);
    let filtered = export.attach(Arc::clone(&importer), Trust::Unverified)?;
    let screen = export.attach(Arc::new(Node::open(Path::new(node))?), Trust::Unverified)?;
    println!("drawn by {}, filtered by {}, shown by {}", artist.path(), filtered.path(), screen.path());
    ensure!(
        artist.staging().is_none() && filtered.staging().is_none() && screen.staging().is_none(),
        "the frames would be copied"
    );

    filter.record(filtered.current()?.memory())?;
    let shown = screen.current()?;
    let scan_out = ScanOut::start(shown.memory(), layout)?;
    let (mut busy, mut counted, mut sync_files) = (Duration::ZERO, 0, 0);
    for frame in 0..FRAMES {
        let start = Instant::now();
        let (drawn, done) = (2 * u64::from(frame) + 1, 2 * u64::from(frame) + 2);

        // Waits for `drawn`. The access lasts until `done`.
        let access = filtered.enter()?;
        filter.submit(drawn, done)?;
        // SAFETY: the semaphore is a timeline of this device, and lives as long as `filter`.
        let signal = unsafe { TimelineSignal::from_raw(&importer, filter.timeline.as_raw(), done) }?;
        let filtering = access.finish_when(signal);

        let access = artist.enter()?;
        let work = Descriptor::draw(operation::DRAW_GRADIENT, 0, WIDTH, HEIGHT, frame, 0);
        artist.importer().draw(access.memory(), 0, work, PATIENCE)?;
        ensure!(access.finish() == Outcome::Ok, "frame {frame} was taken away from who draws");
        filter.signal(drawn)?;

        let access = screen.enter()?;
        if let Some(sync_file) = filter.sync_file()? {
            ensure!(sync_file.wait(PATIENCE)?, "frame {frame} is not filtered in time");
            sync_files += 1;
        }
        scan_out.flush()?;
        ensure!(access.finish() == Outcome::Ok, "frame {frame} was taken away from the screen");
        ensure!(
            filtering.wait(PATIENCE) == Some(Outcome::Ok),
            "frame {frame} was taken away from the filter"
        );

        // The first one waits for the shader's compiler.
        if frame > 0 {
            (busy, counted) = (busy + start.elapsed(), counted + 1);
        }
        if let Some((_, name)) = LOOKED_AT.iter().find(|(number, _)| *number == frame) {
            // The number of the frame is white where it is drawn: amber says that it was filtered, and once.
            let mut pixel = [0; 4];
            view.read(layout.offset_bytes as usize + (20 * WIDTH as usize + 20) * 4, &mut pixel)?;
            ensure!(pixel == [0x28, 0xB4, 0xFF, 0], "frame {frame} has {pixel:02x?} where its number is");
            screendump(name)?;
        }
    }
    let rate = f64::from(counted) / busy.as_secs_f64();
    // None of the three attachments is staged, or we would not be here.
    println!("{FRAMES} frames, {rate:.1} per second, {sync_files} sync files, 0 bytes copied by the CPU");
    Ok(())
}

/// A Vulkan application that filters a picture in place. All in it is gone with the program.
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
    set: vk::DescriptorSet,
    commands: vk::CommandBuffer,
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
                .descriptor_type(vk::DescriptorType::STORAGE_BUFFER)
                .descriptor_count(1)
                .stage_flags(vk::ShaderStageFlags::COMPUTE)];
            let info = vk::DescriptorSetLayoutCreateInfo::default().bindings(&bindings);
            let set_layouts = [device.create_descriptor_set_layout(&info, None)?];
            let constants =
                [vk::PushConstantRange::default().stage_flags(vk::ShaderStageFlags::COMPUTE).size(8)];
            let info = vk::PipelineLayoutCreateInfo::default()
                .set_layouts(&set_layouts)
                .push_constant_ranges(&constants);
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

            let sizes = [vk::DescriptorPoolSize::default()
                .ty(vk::DescriptorType::STORAGE_BUFFER)
                .descriptor_count(1)];
            let info = vk::DescriptorPoolCreateInfo::default().max_sets(1).pool_sizes(&sizes);
            let descriptors = device.create_descriptor_pool(&info, None)?;
            let info = vk::DescriptorSetAllocateInfo::default()
                .descriptor_pool(descriptors)
                .set_layouts(&set_layouts);
            let set = device.allocate_descriptor_sets(&info)?[0];
            let info = vk::CommandPoolCreateInfo::default().queue_family_index(family);
            let pool = device.create_command_pool(&info, None)?;
            let info = vk::CommandBufferAllocateInfo::default().command_pool(pool).command_buffer_count(1);
            let commands = device.allocate_command_buffers(&info)?[0];

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
                set,
                commands,
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

    /// Records the filter of the picture in `memory`, once for all frames.
    fn record(&mut self, memory: &vulkan::Buffer) -> Result<()> {
        let Self { device, commands, .. } = self;
        let (stage, access) = (
            vk::PipelineStageFlags::COMPUTE_SHADER.as_raw(),
            (vk::AccessFlags::SHADER_READ | vk::AccessFlags::SHADER_WRITE).as_raw(),
        );
        let constants = [WIDTH, WIDTH * HEIGHT].map(u32::to_ne_bytes).concat();
        let buffer = vk::Buffer::from_raw(memory.raw_buffer());
        let whole = [vk::DescriptorBufferInfo::default().buffer(buffer).range(vk::WHOLE_SIZE)];
        let write = vk::WriteDescriptorSet::default()
            .dst_set(self.set)
            .descriptor_type(vk::DescriptorType::STORAGE_BUFFER)
            .buffer_info(&whole);
        // SAFETY: this is called before anything is submitted; all handles are of this device, and each access
        // to the memory holds the import that the buffer is of, for nobody takes the memory back here.
        unsafe {
            device.update_descriptor_sets(&[write], &[]);
            device.begin_command_buffer(*commands, &vk::CommandBufferBeginInfo::default())?;
            memory.device().record_acquire(commands.as_raw(), memory, stage, access);
            device.cmd_bind_pipeline(*commands, vk::PipelineBindPoint::COMPUTE, self.pipeline);
            let bind_point = vk::PipelineBindPoint::COMPUTE;
            device.cmd_bind_descriptor_sets(*commands, bind_point, self.layout, 0, &[self.set], &[]);
            let stages = vk::ShaderStageFlags::COMPUTE;
            device.cmd_push_constants(*commands, self.layout, stages, 0, &constants);
            device.cmd_dispatch(*commands, (WIDTH * HEIGHT).div_ceil(64), 1, 1);
            memory.device().record_release(commands.as_raw(), memory, stage, access);
            device.end_command_buffer(*commands)?;
        }
        Ok(())
    }

    /// Submits the filter, to begin when the timeline is at `drawn`; it is at `done` when the filter is.
    fn submit(&mut self, drawn: u64, done: u64) -> Result<()> {
        let (commands, waits, signals) = ([self.commands], [self.timeline], [self.timeline, self.filtered]);
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
