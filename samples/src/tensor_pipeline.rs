//! Two stages of a neural network on two GPUs: what the first leaves in its VRAM, the second reads there.
//!
//! ```text
//! tensor_pipeline 0000:03:00.0
//! ```
//! GPU A, the lab's model GPU, looks words up: the product of a one-hot matrix and a table in its VRAM, which is
//! what an embedding is, and needs a copy engine only. GPU B multiplies what A left with weights, in a compute
//! shader of its own. Between the two no byte is copied. The CPU multiplies it all again and compares.
//!
//! GPU B is an application's own Vulkan device, and has one queue. While peervram tests by it whether A's bytes arrive,
//! the application goes on submitting: both do so under the queue's lock.
#![expect(clippy::print_stdout, reason = "a sample prints as a program of its reader's would")]
#![expect(unsafe_code, reason = "an application's own calls of Vulkan")]

use std::ffi::CStr;
use std::io::Cursor;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ash::vk::{self, Handle};
use peervram::backends::vulkan;
use peervram::backends::{Aperture, DmaRange, DmaRanges, Exporter, vfio};
use peervram::{Direction, Lender, Outcome, Trust};
use peervram_model_driver::{Descriptor, ModelGpu, VRAM_BAR};

/// Rows of the table.
const WORDS: usize = 1000;
/// Columns of the table, rows of the weights.
const FEATURES: usize = 256;
/// Rows of the product.
const TOKENS: usize = 128;
/// Columns of the product.
const OUTPUTS: usize = 64;
const FLOAT_BYTES: usize = size_of::<f32>();
const ROW_BYTES: usize = FEATURES * FLOAT_BYTES;
/// What A leaves is lent; the table lies behind it, and is not.
const LENT_BYTES: usize = TOKENS * ROW_BYTES;
/// How long a stage may take: an emulated CPU compiles the shader first.
const PATIENCE: Duration = Duration::from_secs(60);

fn main() -> Result<()> {
    let address = std::env::args().nth(1).context("usage: tensor_pipeline MODEL-GPU")?;
    // Small whole numbers: sums of their products are exact, in whatever order a device adds.
    let small = |at: usize, step: usize| ((at * step) % 13) as f32 - 6.0;
    let table: Vec<f32> = (0..WORDS * FEATURES).map(|at| small(at, 31)).collect();
    let weights: Vec<f32> = (0..FEATURES * OUTPUTS).map(|at| small(at, 17)).collect();
    let tokens: Vec<usize> = (0..TOKENS).map(|at| at * 389 % WORDS).collect();

    // GPU A, with its table in VRAM.
    let device = vfio::Device::open(address.parse()?)?;
    let gpu_a = Arc::new(ModelGpu::new(&device)?);
    let vram = device.region(VRAM_BAR)?;
    let table_bytes = bytes(&table);
    let room_bytes = (table_bytes.len() as u64).next_multiple_of(LENT_BYTES as u64);
    let room = DmaRanges::new(vram, &[DmaRange::new(LENT_BYTES as u64, room_bytes)])?;
    device.map(&room)?.write(0, &table_bytes)?;

    // Lent to GPU B.
    let ranges = DmaRanges::new(vram, &[DmaRange::new(0, LENT_BYTES as u64)])?;
    let lender = Lender::new(device);
    let export = lender.export(Aperture::owned(ranges, Arc::clone(&gpu_a) as _))?;
    let mut gpu_b = Multiplier::open(&weights)?;
    // SAFETY: `gpu_b` outlives the attachment.
    let importer = Arc::new(unsafe { gpu_b.importer() }?);
    // First it is seen whether bytes arrive, by the application's own device; its other work goes on meanwhile.
    let (frames, is_attached) = (gpu_b.frames()?, AtomicBool::new(false));
    let (attachment, drawn) = thread::scope(|scope| {
        let drawing = scope.spawn(|| frames.draw_until(&is_attached));
        let attachment = export.attach(Arc::clone(&importer), Trust::Verified(Direction::Read));
        is_attached.store(true, Ordering::Relaxed);
        (attachment, drawing.join().expect("it does not panic"))
    });
    let (attachment, drawn) = (attachment?, drawn?);
    ensure!(drawn > 0, "the application's own work stood still");
    println!("{} reads A's VRAM by {}, verified", importer.description().name, attachment.path());

    // Stage one: a row of the table for each token. A's engine works in A's VRAM.
    let start = Instant::now();
    let row = |at: usize| (at * ROW_BYTES) as u64;
    let gather = |(token, &word): (usize, &usize)| {
        Descriptor::copy(LENT_BYTES as u64 + row(word), row(token), ROW_BYTES as u64, 0)
    };
    let lookups: Vec<Descriptor> = tokens.iter().enumerate().map(gather).collect();
    gpu_a.copy_all(&lookups, PATIENCE)?;
    let first = start.elapsed();

    // Stage two: what A has left, times the weights. Entering flushes A's engine.
    let start = Instant::now();
    let access = attachment.enter(Direction::Read)?;
    let product = gpu_b.multiply(access.memory())?;
    ensure!(access.finish() == Outcome::Ok, "the memory was taken back meanwhile");
    let second = start.elapsed();

    for (token, &word) in tokens.iter().enumerate() {
        for output in 0..OUTPUTS {
            let factors =
                (0..FEATURES).map(|at| table[word * FEATURES + at] * weights[at * OUTPUTS + output]);
            let (expected, seen) = (factors.sum::<f32>(), product[token * OUTPUTS + output]);
            ensure!(seen == expected, "row {token}, column {output}: {seen}, and the CPU says {expected}");
        }
    }
    println!(
        "A looked {TOKENS} words up in {} ms, B multiplied in {} ms",
        first.as_millis(),
        second.as_millis()
    );
    println!("{TOKENS} x {OUTPUTS} elements are what the CPU computes");
    Ok(())
}

fn bytes(floats: &[f32]) -> Vec<u8> {
    floats.iter().flat_map(|float| float.to_le_bytes()).collect()
}

/// GPU B: a Vulkan application that multiplies. All in it is gone with the program.
struct Multiplier {
    entry: ash::Entry,
    instance: ash::Instance,
    physical: vk::PhysicalDevice,
    device: ash::Device,
    queue: vk::Queue,
    /// Held by whoever submits to the queue.
    queue_lock: Arc<Mutex<()>>,
    family: u32,
    extensions: Vec<&'static CStr>,
    layout: vk::PipelineLayout,
    pipeline: vk::Pipeline,
    set: vk::DescriptorSet,
    commands: vk::CommandBuffer,
    fence: vk::Fence,
    /// Where the product is, mapped.
    product: *const f32,
}

impl Multiplier {
    fn open(weights: &[f32]) -> Result<Self> {
        // SAFETY: each handle is used with the one that it was made from, each structure outlives its call, and
        // what is asked of the device is what it said that it has. `memory` gives mappings of the length that is
        // asked for. Nothing is destroyed: the program ends soon, and the driver with it.
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

            // Left, right and product.
            let binding = |binding| {
                vk::DescriptorSetLayoutBinding::default()
                    .binding(binding)
                    .descriptor_type(vk::DescriptorType::STORAGE_BUFFER)
                    .descriptor_count(1)
                    .stage_flags(vk::ShaderStageFlags::COMPUTE)
            };
            let bindings = [binding(0), binding(1), binding(2)];
            let info = vk::DescriptorSetLayoutCreateInfo::default().bindings(&bindings);
            let set_layouts = [device.create_descriptor_set_layout(&info, None)?];
            let constants =
                [vk::PushConstantRange::default().stage_flags(vk::ShaderStageFlags::COMPUTE).size(12)];
            let info = vk::PipelineLayoutCreateInfo::default()
                .set_layouts(&set_layouts)
                .push_constant_ranges(&constants);
            let layout = device.create_pipeline_layout(&info, None)?;
            let code = ash::util::read_spv(&mut Cursor::new(include_bytes!("../shaders/multiply.spv")))?;
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
                .descriptor_count(3)];
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
            let fence = device.create_fence(&vk::FenceCreateInfo::default(), None)?;

            let types = instance.get_physical_device_memory_properties(physical);
            let (right, mapped) = memory(&device, &types, weights.len() * FLOAT_BYTES)?;
            mapped.copy_from_nonoverlapping(weights.as_ptr(), weights.len());
            let (result, product) = memory(&device, &types, TOKENS * OUTPUTS * FLOAT_BYTES)?;
            bind(&device, set, 1, right);
            bind(&device, set, 2, result);
            Ok(Self {
                entry,
                instance,
                physical,
                device,
                queue,
                queue_lock: Arc::default(),
                family,
                extensions,
                layout,
                pipeline,
                set,
                commands,
                fence,
                product,
            })
        }
    }

    /// The same device, as peervram sees it.
    ///
    /// # Safety
    /// As [`vulkan::Device::from_ash`]: the device outlives all that is made of it.
    unsafe fn importer(&self) -> Result<vulkan::Device> {
        let Self { entry, instance, physical, device, extensions, .. } = self;
        let (queue, queue_lock) = ((self.queue, self.family), Arc::clone(&self.queue_lock));
        // SAFETY: the handles belong together, and everything here that submits holds the lock; the rest is the caller's.
        let device = unsafe {
            vulkan::Device::from_ash(entry, instance, *physical, device, queue, extensions)?.with_queue_lock(
                move |submit| {
                    let _held = queue_lock.lock().unwrap_or_else(PoisonError::into_inner);
                    submit();
                },
            )
        };
        Ok(device?)
    }

    /// What the application does beside, for another thread.
    fn frames(&self) -> Result<Frames> {
        // SAFETY: a plain structure.
        let fence = unsafe { self.device.create_fence(&vk::FenceCreateInfo::default(), None) }?;
        let (device, queue_lock) = (self.device.clone(), Arc::clone(&self.queue_lock));
        Ok(Frames { device, queue: self.queue, queue_lock, fence })
    }

    /// `left` times the weights.
    fn multiply(&mut self, left: &vulkan::Buffer) -> Result<Vec<f32>> {
        let Self { device, commands, .. } = self;
        let (stage, access) =
            (vk::PipelineStageFlags::COMPUTE_SHADER.as_raw(), vk::AccessFlags::SHADER_READ.as_raw());
        let constants = [TOKENS as u32, FEATURES as u32, OUTPUTS as u32].map(u32::to_ne_bytes).concat();
        let to_host = [vk::MemoryBarrier::default()
            .src_access_mask(vk::AccessFlags::SHADER_WRITE)
            .dst_access_mask(vk::AccessFlags::HOST_READ)];
        // SAFETY: this is called once, so that nothing is in flight before, and it waits for what it submits.
        // `left` is of this device and held by the caller; the product is mapped at its whole length.
        unsafe {
            bind(device, self.set, 0, vk::Buffer::from_raw(left.raw_buffer()));
            let once =
                vk::CommandBufferBeginInfo::default().flags(vk::CommandBufferUsageFlags::ONE_TIME_SUBMIT);
            device.begin_command_buffer(*commands, &once)?;
            left.device().record_acquire(commands.as_raw(), left, stage, access);
            device.cmd_bind_pipeline(*commands, vk::PipelineBindPoint::COMPUTE, self.pipeline);
            let bind_point = vk::PipelineBindPoint::COMPUTE;
            device.cmd_bind_descriptor_sets(*commands, bind_point, self.layout, 0, &[self.set], &[]);
            let stages = vk::ShaderStageFlags::COMPUTE;
            device.cmd_push_constants(*commands, self.layout, stages, 0, &constants);
            device.cmd_dispatch(*commands, OUTPUTS.div_ceil(8) as u32, TOKENS.div_ceil(8) as u32, 1);
            left.device().record_release(commands.as_raw(), left, stage, access);
            let (before, after) = (vk::PipelineStageFlags::COMPUTE_SHADER, vk::PipelineStageFlags::HOST);
            let none = vk::DependencyFlags::empty();
            device.cmd_pipeline_barrier(*commands, before, after, none, &to_host, &[], &[]);
            device.end_command_buffer(*commands)?;
            let list = [*commands];
            let info = [vk::SubmitInfo::default().command_buffers(&list)];
            {
                let _held = self.queue_lock.lock().unwrap_or_else(PoisonError::into_inner);
                device.queue_submit(self.queue, &info, self.fence)?;
            }
            device.wait_for_fences(&[self.fence], true, PATIENCE.as_nanos() as u64)?;
            Ok(std::slice::from_raw_parts(self.product, TOKENS * OUTPUTS).to_vec())
        }
    }
}

/// The application's other work. It has nothing to draw, and submits that, over and over.
struct Frames {
    device: ash::Device,
    queue: vk::Queue,
    queue_lock: Arc<Mutex<()>>,
    fence: vk::Fence,
}

impl Frames {
    /// How many there were until it was over.
    fn draw_until(&self, is_over: &AtomicBool) -> Result<usize> {
        let mut drawn = 0;
        while !is_over.load(Ordering::Relaxed) {
            // SAFETY: the fence is this device's, used here only, and waited for before it is used again; the lock is
            // held by everybody who submits.
            unsafe {
                {
                    let _held = self.queue_lock.lock().unwrap_or_else(PoisonError::into_inner);
                    self.device.queue_submit(self.queue, &[], self.fence)?;
                }
                self.device.wait_for_fences(&[self.fence], true, PATIENCE.as_nanos() as u64)?;
                self.device.reset_fences(&[self.fence])?;
            }
            drawn += 1;
        }
        Ok(drawn)
    }
}

/// A buffer of the device's own that the CPU sees, and where it sees it.
///
/// # Safety
/// `device` is valid, and `types` are its.
unsafe fn memory(
    device: &ash::Device,
    types: &vk::PhysicalDeviceMemoryProperties,
    size_bytes: usize,
) -> Result<(vk::Buffer, *mut f32)> {
    let info =
        vk::BufferCreateInfo::default().size(size_bytes as u64).usage(vk::BufferUsageFlags::STORAGE_BUFFER);
    let seen = vk::MemoryPropertyFlags::HOST_VISIBLE | vk::MemoryPropertyFlags::HOST_COHERENT;
    // SAFETY: plain structures of a valid device; type and size are what the buffer requires, and every device
    // has such a type for buffers.
    unsafe {
        let buffer = device.create_buffer(&info, None)?;
        let needs = device.get_buffer_memory_requirements(buffer);
        let suits = |&(at, kind): &(usize, &vk::MemoryType)| {
            needs.memory_type_bits & 1 << at != 0 && kind.property_flags.contains(seen)
        };
        let all = types.memory_types_as_slice().iter().enumerate();
        let (at, _) = all.into_iter().find(suits).context("no memory that the CPU sees")?;
        let info = vk::MemoryAllocateInfo::default().allocation_size(needs.size).memory_type_index(at as u32);
        let memory = device.allocate_memory(&info, None)?;
        device.bind_buffer_memory(buffer, memory, 0)?;
        let mapped = device.map_memory(memory, 0, vk::WHOLE_SIZE, vk::MemoryMapFlags::empty())?;
        Ok((buffer, mapped.cast()))
    }
}

/// Makes `buffer` the one at `binding` of `set`.
///
/// # Safety
/// They are of `device`, and no work that uses the set is in flight.
unsafe fn bind(device: &ash::Device, set: vk::DescriptorSet, binding: u32, buffer: vk::Buffer) {
    let whole = [vk::DescriptorBufferInfo::default().buffer(buffer).range(vk::WHOLE_SIZE)];
    let write = vk::WriteDescriptorSet::default()
        .dst_set(set)
        .dst_binding(binding)
        .descriptor_type(vk::DescriptorType::STORAGE_BUFFER)
        .buffer_info(&whole);
    // SAFETY: the caller vouches for it.
    unsafe { device.update_descriptor_sets(&[write], &[]) };
}
