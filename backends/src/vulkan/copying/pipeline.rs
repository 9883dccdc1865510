//! `Pipeline`: a compute shader with its storage buffers and push constants.
#![expect(unsafe_code, reason = "creating Vulkan objects, and recording a dispatch")]

use std::io::Cursor;
use std::slice;

use ash::{util::read_spv, vk};

use crate::vulkan::failure::failure;
use crate::vulkan::logical::device::LogicalDevice;
use crate::{Error, Kind, Result};

/// A part of a buffer, as a shader sees it.
#[derive(Clone, Copy)]
pub(crate) struct Bound {
    pub(crate) buffer: vk::Buffer,
    /// A multiple of `minStorageBufferOffsetAlignment` (VUID-VkWriteDescriptorSet-descriptorType-00328).
    pub(crate) offset_bytes: u64,
    /// At most `maxStorageBufferRange` (VUID-VkWriteDescriptorSet-descriptorType-00333).
    pub(crate) length_bytes: u64,
}

/// A compute shader whose bindings 0 to n of set 0 are storage buffers.
pub(crate) struct Pipeline {
    device: LogicalDevice,
    set_layout: vk::DescriptorSetLayout,
    layout: vk::PipelineLayout,
    pipeline: vk::Pipeline,
    pool: vk::DescriptorPool,
    set: vk::DescriptorSet,
}

impl Pipeline {
    /// Of `spirv`, with `buffers` storage buffers and `constants` push constants of 32 bits.
    ///
    /// Blocks while the driver compiles. What was made before a failure is undone.
    pub(crate) fn new(device: &LogicalDevice, spirv: &[u8], buffers: u32, constants: u32) -> Result<Self> {
        const TRIED: &str = "prepare a compute shader";
        let failed = |result| failure(TRIED, result);
        let code = read_spv(&mut Cursor::new(spirv))
            .map_err(|error| Error::new(Kind::InvalidInput, TRIED, error.to_string()))?;
        let ash = device.ash();
        let mut made = Self {
            device: device.clone(),
            set_layout: vk::DescriptorSetLayout::null(),
            layout: vk::PipelineLayout::null(),
            pipeline: vk::Pipeline::null(),
            pool: vk::DescriptorPool::null(),
            set: vk::DescriptorSet::null(),
        };

        let bindings: Vec<_> = (0..buffers)
            .map(|binding| {
                vk::DescriptorSetLayoutBinding::default()
                    .binding(binding)
                    .descriptor_type(vk::DescriptorType::STORAGE_BUFFER)
                    .descriptor_count(1)
                    .stage_flags(vk::ShaderStageFlags::COMPUTE)
            })
            .collect();
        let info = vk::DescriptorSetLayoutCreateInfo::default().bindings(&bindings);
        // SAFETY: here and below every structure, and what it points to, is initialised and
        // outlives its call; every handle was made from this device just before.
        made.set_layout = unsafe { ash.create_descriptor_set_layout(&info, None) }.map_err(failed)?;

        // At most 128 bytes, which every device has (maxPushConstantsSize).
        let constants =
            vk::PushConstantRange::default().stage_flags(vk::ShaderStageFlags::COMPUTE).size(constants * 4);
        let info = vk::PipelineLayoutCreateInfo::default()
            .set_layouts(slice::from_ref(&made.set_layout))
            .push_constant_ranges(slice::from_ref(&constants));
        // SAFETY: as above.
        made.layout = unsafe { ash.create_pipeline_layout(&info, None) }.map_err(failed)?;

        let size = vk::DescriptorPoolSize::default()
            .ty(vk::DescriptorType::STORAGE_BUFFER)
            .descriptor_count(buffers);
        let info = vk::DescriptorPoolCreateInfo::default().max_sets(1).pool_sizes(slice::from_ref(&size));
        // SAFETY: as above.
        made.pool = unsafe { ash.create_descriptor_pool(&info, None) }.map_err(failed)?;
        let info = vk::DescriptorSetAllocateInfo::default()
            .descriptor_pool(made.pool)
            .set_layouts(slice::from_ref(&made.set_layout));
        // SAFETY: as above.
        made.set = unsafe { ash.allocate_descriptor_sets(&info) }.map_err(failed)?[0];

        let info = vk::ShaderModuleCreateInfo::default().code(&code);
        // SAFETY: as above; the code is SPIR-V that was validated when it was committed.
        let module = unsafe { ash.create_shader_module(&info, None) }.map_err(failed)?;
        let stage = vk::PipelineShaderStageCreateInfo::default()
            .stage(vk::ShaderStageFlags::COMPUTE)
            .module(module)
            .name(c"main");
        let info = vk::ComputePipelineCreateInfo::default().stage(stage).layout(made.layout);
        // SAFETY: as above.
        let result = unsafe { ash.create_compute_pipelines(vk::PipelineCache::null(), &[info], None) };
        // SAFETY: made above; a pipeline does not need its module once it is there.
        unsafe { ash.destroy_shader_module(module, None) };
        made.pipeline = result.map_err(|(_, result)| failed(result))?[0];
        Ok(made)
    }

    /// Points the bindings at `buffers`, one for each, and records a dispatch.
    ///
    /// # Safety
    /// No commands that use this pipeline are in flight (VUID-vkUpdateDescriptorSets-None-03047)
    /// or recorded and still to be submitted; `commands` is being recorded, on a queue family
    /// that computes; the buffers are of this device, have the usage for it and live until the
    /// commands have completed; `constants` and `groups` keep the shader inside of them.
    pub(crate) unsafe fn record(
        &self,
        commands: vk::CommandBuffer,
        buffers: &[Bound],
        constants: &[u32],
        groups: [u32; 2],
    ) {
        let infos: Vec<_> = buffers
            .iter()
            .map(|bound| {
                [vk::DescriptorBufferInfo::default()
                    .buffer(bound.buffer)
                    .offset(bound.offset_bytes)
                    .range(bound.length_bytes)]
            })
            .collect();
        let writes: Vec<_> = (0..)
            .zip(&infos)
            .map(|(binding, info)| {
                vk::WriteDescriptorSet::default()
                    .dst_set(self.set)
                    .dst_binding(binding)
                    .descriptor_type(vk::DescriptorType::STORAGE_BUFFER)
                    .buffer_info(info)
            })
            .collect();
        let device = self.device.ash();
        let compute = vk::PipelineBindPoint::COMPUTE;
        // SAFETY: the caller vouches for commands, buffers and sizes; the set, layout and pipeline
        // were made for each other.
        unsafe {
            device.update_descriptor_sets(&writes, &[]);
            device.cmd_bind_pipeline(commands, compute, self.pipeline);
            device.cmd_bind_descriptor_sets(commands, compute, self.layout, 0, &[self.set], &[]);
            device.cmd_push_constants(
                commands,
                self.layout,
                vk::ShaderStageFlags::COMPUTE,
                0,
                bytemuck::cast_slice(constants),
            );
            device.cmd_dispatch(commands, groups[0], groups[1], 1);
        }
    }
}

impl Drop for Pipeline {
    fn drop(&mut self) {
        let device = self.device.ash();
        // SAFETY: the handles are null or were made from this device, here only; commands in
        // flight would hold the pipeline. The set goes with its pool.
        unsafe {
            device.destroy_pipeline(self.pipeline, None);
            device.destroy_descriptor_pool(self.pool, None);
            device.destroy_pipeline_layout(self.layout, None);
            device.destroy_descriptor_set_layout(self.set_layout, None);
        }
    }
}
