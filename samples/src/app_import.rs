//! An ordinary Vulkan application that works on memory of another device, and goes on after that was taken back.
//!
//! ```text
//! app_import 0000:01:00.0       memory of a VFIO device, which this process lends itself
//! app_import --broker SOCKET    memory that `peervram serve` lends, by the socket that it listens at
//! ```
//! `Application` is what every program with ash has: a device, a pipeline, a descriptor set, a command buffer, host memory
//! to put bytes in. It knows nothing of VFIO, nor of a broker; it is given a `VkBuffer` and inverts every word of it.
//! `work_on` gives it the buffer, has the memory taken back under its work, and gives it the next one. What the buffer's
//! memory held is lost. Where the memory comes from is one line of `main`, and all that follows is the same.
#![expect(clippy::print_stdout, reason = "a sample prints as a program of its reader's would")]
#![expect(unsafe_code, reason = "an application's own calls of Vulkan")]

use std::ffi::CStr;
use std::io::Cursor;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use ash::vk::{self, Handle};
use peervram::backends::vulkan::{self, FenceSignal};
use peervram::backends::{Aperture, DmaRange, DmaRanges, Exporter as _, RawBytes, vfio};
use peervram::broker::client::{self, Wish};
use peervram::{Direction, EventKind, Events, Export, Lender, Outcome, Trust};

const SIZE_BYTES: u64 = 1 << 20;
const REVOKES: u64 = 3;
/// How long work may take, and a revoke waits for it: an emulated CPU compiles the shader first.
const PATIENCE: Duration = Duration::from_secs(60);

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let mut application = Application::open()?;
    // SAFETY: `application` outlives all that is made below, and no engine of peervram's submits to its queue.
    let importer = Arc::new(unsafe { application.importer() }?);

    match words[..] {
        ["--broker", socket] => {
            let export = client::Broker::connect(Path::new(socket))?.borrow(Wish::of_size(SIZE_BYTES))?;
            // Whoever lends takes it back when they want: `peervram operate reset NAME`.
            work_on(&export, &mut application, &importer, || Ok(()))
        }
        [address] => {
            let (lender, aperture) = vram_of(address)?;
            let export = lender.export(aperture)?;
            work_on(&export, &mut application, &importer, || lender.reset(PATIENCE))
        }
        _ => bail!("usage: app_import ADDRESS, or app_import --broker SOCKET"),
    }
}

/// The beginning of a VFIO device's memory, to be lent by this process.
fn vram_of(address: &str) -> Result<(Lender<vfio::Device>, Aperture)> {
    let device = vfio::Device::open(address.parse()?)?;
    let bars = device.regions().iter().filter(|region| region.index < 6);
    let bar = bars.max_by_key(|region| region.size_bytes).context("the device has no memory BAR")?;
    let ranges = DmaRanges::new(bar, &[DmaRange::new(0, SIZE_BYTES)])?;
    Ok((Lender::new(device), Aperture::owned(ranges, Arc::new(RawBytes))))
}

/// Has the application work on lent memory, in one generation after the other. `take_back` has the memory taken back, or
/// leaves that to others.
fn work_on(
    export: &Export,
    application: &mut Application,
    importer: &Arc<vulkan::Device>,
    take_back: impl Fn() -> peervram::Result<()>,
) -> Result<()> {
    let events = export.events()?;
    let attachment = export.attach(Arc::clone(importer), Trust::Unverified)?;
    println!("{} has the memory by {}", importer.description().name, attachment.path());

    for revoke in 0..=REVOKES {
        // After a revoke nobody knows what the memory holds: the application writes it again.
        let bytes: Vec<u8> = (0..SIZE_BYTES).map(|at| (at * 7 + revoke) as u8).collect();
        application.write(&bytes);
        // The memory of this generation; all that the application made of the last one is made anew. The buffer is
        // another one then, unless it came by host pointer. The import is not kept: drivers that must let go before
        // a revoke would be waited for.
        application.rebuild(attachment.current()?.memory())?;

        let access = attachment.enter(Direction::Both)?;
        let generation = access.generation();
        let (signal, fence) = application.submit(importer)?;
        let in_flight = access.finish_when(signal);
        ensure!(in_flight.wait(PATIENCE) == Some(Outcome::Ok), "generation {generation} is torn or late");
        // An outcome says that nobody looks at the fence any more.
        application.destroy(fence);
        let inverted: Vec<u8> = bytes.iter().map(|byte| !byte).collect();
        ensure!(application.read() == inverted, "generation {generation} is wrong");
        if revoke == REVOKES {
            println!("generation {generation}: every word is inverted");
            break;
        }

        // Taken back while the application works: a revoke waits for its fence.
        let access = attachment.enter(Direction::Both)?;
        let (signal, fence) = application.submit(importer)?;
        let in_flight = access.finish_when(signal);
        println!("generation {generation}: every word is inverted");
        let taken_back = take_back().map_err(Into::into).and_then(|()| wait_until_restored(&events));
        // Also where that failed: the fence, and all that it is of, may be destroyed when nobody looks at it any more.
        let outcome = in_flight.wait(PATIENCE);
        application.destroy(fence);
        taken_back?;
        ensure!(outcome == Some(Outcome::Ok), "the revoke did not wait for the fence");
        ensure!(application.read() == bytes, "what was in flight is wrong");
    }
    println!("taken back {REVOKES} times while it worked, and nothing was torn");
    Ok(())
}

/// Waits until the memory was taken back and is there again.
fn wait_until_restored(events: &Events) -> Result<()> {
    loop {
        let event = events.next_within(PATIENCE)?.context("nobody has taken the memory back")?;
        match event.kind {
            EventKind::Restored => return Ok(()),
            EventKind::Gone => bail!("whoever lends has ended"),
            _ => {}
        }
    }
}

/// An application's Vulkan. Everything in it lives as long as it does.
struct Application {
    entry: ash::Entry,
    instance: ash::Instance,
    physical: vk::PhysicalDevice,
    device: ash::Device,
    queue: vk::Queue,
    family: u32,
    extensions: Vec<&'static CStr>,
    set_layout: vk::DescriptorSetLayout,
    layout: vk::PipelineLayout,
    pipeline: vk::Pipeline,
    descriptors: vk::DescriptorPool,
    pool: vk::CommandPool,
    commands: vk::CommandBuffer,
    /// What the application writes and reads: host memory of its device's, and where it is mapped.
    stage: vk::Buffer,
    stage_memory: vk::DeviceMemory,
    mapped: NonNull<u8>,
}

impl Application {
    fn open() -> Result<Self> {
        // SAFETY: each handle is used with the one that it was made from, each structure outlives its call, and
        // what is asked of the device is what it said that it has. A failure leaks what was made before it, and
        // ends the program.
        unsafe {
            let entry = ash::Entry::load()?;
            let about = vk::ApplicationInfo::default().api_version(vk::API_VERSION_1_1);
            let info = vk::InstanceCreateInfo::default().application_info(&about);
            let instance = entry.create_instance(&info, None)?;
            let physical = *instance.enumerate_physical_devices()?.first().context("no Vulkan device")?;
            let families = instance.get_physical_device_queue_family_properties(physical);
            let computes =
                |family: &vk::QueueFamilyProperties| family.queue_flags.contains(vk::QueueFlags::COMPUTE);
            let family = families.iter().position(computes).context("no queue computes")? as u32;

            // All that an application has to do for peervram: enable what its device has of these.
            let available = instance.enumerate_device_extension_properties(physical)?;
            let has = |name: &CStr| {
                available.iter().any(|extension| extension.extension_name_as_c_str() == Ok(name))
            };
            let wanted = vulkan::EXTENSIONS.iter().map(|extension| extension.name);
            let extensions: Vec<&'static CStr> = wanted.filter(|name| has(name)).collect();

            let names: Vec<_> = extensions.iter().map(|name| name.as_ptr()).collect();
            let queues =
                [vk::DeviceQueueCreateInfo::default().queue_family_index(family).queue_priorities(&[1.0])];
            let info =
                vk::DeviceCreateInfo::default().queue_create_infos(&queues).enabled_extension_names(&names);
            let device = instance.create_device(physical, &info, None)?;
            let queue = device.get_device_queue(family, 0);

            let bindings = [vk::DescriptorSetLayoutBinding::default()
                .descriptor_type(vk::DescriptorType::STORAGE_BUFFER)
                .descriptor_count(1)
                .stage_flags(vk::ShaderStageFlags::COMPUTE)];
            let info = vk::DescriptorSetLayoutCreateInfo::default().bindings(&bindings);
            let set_layout = device.create_descriptor_set_layout(&info, None)?;
            let set_layouts = [set_layout];
            let info = vk::PipelineLayoutCreateInfo::default().set_layouts(&set_layouts);
            let layout = device.create_pipeline_layout(&info, None)?;
            let code = ash::util::read_spv(&mut Cursor::new(include_bytes!("../shaders/invert.spv")))?;
            let shader =
                device.create_shader_module(&vk::ShaderModuleCreateInfo::default().code(&code), None)?;
            let stage = vk::PipelineShaderStageCreateInfo::default()
                .stage(vk::ShaderStageFlags::COMPUTE)
                .module(shader)
                .name(c"main");
            let info = [vk::ComputePipelineCreateInfo::default().stage(stage).layout(layout)];
            let pipelines = device.create_compute_pipelines(vk::PipelineCache::null(), &info, None);
            let pipeline = pipelines.map_err(|(_, error)| error)?[0];
            device.destroy_shader_module(shader, None);

            let sizes = [vk::DescriptorPoolSize::default()
                .ty(vk::DescriptorType::STORAGE_BUFFER)
                .descriptor_count(1)];
            let info = vk::DescriptorPoolCreateInfo::default().max_sets(1).pool_sizes(&sizes);
            let descriptors = device.create_descriptor_pool(&info, None)?;
            let info = vk::CommandPoolCreateInfo::default().queue_family_index(family);
            let pool = device.create_command_pool(&info, None)?;
            let info = vk::CommandBufferAllocateInfo::default().command_pool(pool).command_buffer_count(1);
            let commands = device.allocate_command_buffers(&info)?[0];

            let usage = vk::BufferUsageFlags::TRANSFER_SRC | vk::BufferUsageFlags::TRANSFER_DST;
            let stage =
                device.create_buffer(&vk::BufferCreateInfo::default().size(SIZE_BYTES).usage(usage), None)?;
            let needs = device.get_buffer_memory_requirements(stage);
            let wanted = vk::MemoryPropertyFlags::HOST_VISIBLE | vk::MemoryPropertyFlags::HOST_COHERENT;
            let types = instance.get_physical_device_memory_properties(physical);
            let mut types = types.memory_types_as_slice().iter().zip(0..);
            let fits = |(memory, index): &(&vk::MemoryType, u32)| {
                needs.memory_type_bits & 1 << index != 0 && memory.property_flags.contains(wanted)
            };
            let (_, index) = types.find(fits).context("no memory of the device can be mapped")?;
            let info = vk::MemoryAllocateInfo::default().allocation_size(needs.size).memory_type_index(index);
            let stage_memory = device.allocate_memory(&info, None)?;
            device.bind_buffer_memory(stage, stage_memory, 0)?;
            let mapped = device.map_memory(stage_memory, 0, vk::WHOLE_SIZE, vk::MemoryMapFlags::empty())?;
            let mapped = NonNull::new(mapped.cast()).context("the driver maps memory nowhere")?;
            Ok(Self {
                entry,
                instance,
                physical,
                device,
                queue,
                family,
                extensions,
                set_layout,
                layout,
                pipeline,
                descriptors,
                pool,
                commands,
                stage,
                stage_memory,
                mapped,
            })
        }
    }

    /// The same device, as peervram sees it.
    ///
    /// # Safety
    /// As [`vulkan::Device::from_ash`]: the application outlives all that is made of it.
    unsafe fn importer(&self) -> Result<vulkan::Device> {
        let queue = (self.queue, self.family);
        // SAFETY: the handles belong together; the rest is the caller's.
        let device = unsafe {
            let Self { entry, instance, physical, device, extensions, .. } = self;
            vulkan::Device::from_ash(entry, instance, *physical, device, queue, extensions)
        };
        Ok(device?)
    }

    /// What the next commands put into the memory. Nothing is in flight.
    fn write(&mut self, bytes: &[u8]) {
        assert_eq!(bytes.len() as u64, SIZE_BYTES);
        // SAFETY: it is mapped, so long, for as long as this value lives; no device works on it.
        unsafe { self.mapped.as_ptr().copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }

    /// What the last commands found in the memory. Nothing is in flight.
    fn read(&self) -> Vec<u8> {
        let mut bytes = vec![0; SIZE_BYTES as usize];
        // SAFETY: as in `write`.
        unsafe { self.mapped.as_ptr().copy_to_nonoverlapping(bytes.as_mut_ptr(), bytes.len()) };
        bytes
    }

    /// Makes the descriptor set and the commands for `memory`. Those for the last one are gone then.
    fn rebuild(&mut self, memory: &vulkan::Buffer) -> Result<()> {
        let buffer = vk::Buffer::from_raw(memory.raw_buffer());
        let copies = vk::PipelineStageFlags::TRANSFER;
        let computes = vk::PipelineStageFlags::COMPUTE_SHADER;
        let (copied_in, copied_out) = (vk::AccessFlags::TRANSFER_WRITE, vk::AccessFlags::TRANSFER_READ);
        let computed = vk::AccessFlags::SHADER_READ | vk::AccessFlags::SHADER_WRITE;
        // SAFETY: every submission was waited for before this is called, so that neither the descriptor set nor
        // the command buffer is in use (VUID-vkResetDescriptorPool-descriptorPool-00313,
        // VUID-vkResetCommandPool-commandPool-00040); all handles are of this device.
        unsafe {
            let device = &self.device;
            device.reset_descriptor_pool(self.descriptors, vk::DescriptorPoolResetFlags::empty())?;
            let set_layouts = [self.set_layout];
            let info = vk::DescriptorSetAllocateInfo::default()
                .descriptor_pool(self.descriptors)
                .set_layouts(&set_layouts);
            let sets = device.allocate_descriptor_sets(&info)?;
            let whole = [vk::DescriptorBufferInfo::default().buffer(buffer).range(vk::WHOLE_SIZE)];
            let write = vk::WriteDescriptorSet::default()
                .dst_set(sets[0])
                .descriptor_type(vk::DescriptorType::STORAGE_BUFFER)
                .buffer_info(&whole);
            device.update_descriptor_sets(&[write], &[]);

            device.reset_command_pool(self.pool, vk::CommandPoolResetFlags::empty())?;
            device.begin_command_buffer(self.commands, &vk::CommandBufferBeginInfo::default())?;
            let then = |(after, wrote): (_, _), (before, uses): (_, _)| {
                let barrier = [vk::MemoryBarrier::default().src_access_mask(wrote).dst_access_mask(uses)];
                let none = vk::DependencyFlags::empty();
                device.cmd_pipeline_barrier(self.commands, after, before, none, &barrier, &[], &[]);
            };
            let all = [vk::BufferCopy::default().size(SIZE_BYTES)];

            // Between uses the memory belongs to whoever is outside of this device.
            let (raw, first) = (self.commands.as_raw(), (copies.as_raw(), copied_in.as_raw()));
            memory.device().record_acquire(raw, memory, first.0, first.1);
            device.cmd_copy_buffer(self.commands, self.stage, buffer, &all);
            then((copies, copied_in), (computes, computed));
            device.cmd_bind_pipeline(self.commands, vk::PipelineBindPoint::COMPUTE, self.pipeline);
            let (bind_point, layout) = (vk::PipelineBindPoint::COMPUTE, self.layout);
            device.cmd_bind_descriptor_sets(self.commands, bind_point, layout, 0, &sets, &[]);
            device.cmd_dispatch(self.commands, (memory.size_bytes() as u32 / 4).div_ceil(64), 1, 1);
            then((computes, computed), (copies, copied_out | copied_in));
            device.cmd_copy_buffer(self.commands, buffer, self.stage, &all);
            then((copies, copied_in), (vk::PipelineStageFlags::HOST, vk::AccessFlags::HOST_READ));
            let (last, made) = (copies | computes, computed | copied_in | copied_out);
            memory.device().record_release(raw, memory, last.as_raw(), made.as_raw());
            device.end_command_buffer(self.commands)?;
        }
        Ok(())
    }

    /// Submits the commands, with a fence that fires when they are done.
    fn submit(&mut self, importer: &vulkan::Device) -> Result<(FenceSignal, vk::Fence)> {
        let commands = [self.commands];
        let info = [vk::SubmitInfo::default().command_buffers(&commands)];
        // SAFETY: the last submission was waited for, so that the commands are not in use
        // (VUID-vkQueueSubmit-pCommandBuffers-00071), and the import that they are of is held by an access until the
        // fence fires. Where the signal goes, an outcome is waited for before the fence is destroyed.
        unsafe {
            let fence = self.device.create_fence(&vk::FenceCreateInfo::default(), None)?;
            self.device.queue_submit(self.queue, &info, fence)?;
            Ok((FenceSignal::from_raw(importer, fence.as_raw()), fence))
        }
    }

    /// Destroys the fence of a submission that is over and that nobody looks at.
    fn destroy(&mut self, fence: vk::Fence) {
        // SAFETY: as `main` sees to; it was made from this device (VUID-vkDestroyFence-fence-01120).
        unsafe { self.device.destroy_fence(fence, None) };
    }
}

impl Drop for Application {
    fn drop(&mut self) {
        // SAFETY: nothing is in flight after the wait, and all was made from this device, here only.
        unsafe {
            let device = &self.device;
            // An error is a lost device, on which nothing is in flight either.
            let _ = device.device_wait_idle();
            device.destroy_buffer(self.stage, None);
            // Unmaps it.
            device.free_memory(self.stage_memory, None);
            device.destroy_command_pool(self.pool, None);
            device.destroy_descriptor_pool(self.descriptors, None);
            device.destroy_pipeline(self.pipeline, None);
            device.destroy_pipeline_layout(self.layout, None);
            device.destroy_descriptor_set_layout(self.set_layout, None);
            device.destroy_device(None);
            self.instance.destroy_instance(None);
        }
    }
}
