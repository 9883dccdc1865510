//! Copies by the device between an imported buffer and this process.
//!
//! Through staging memory, so that it is the device that reads and writes the imported memory: a
//! read-back shows what the *device* sees there.
#![expect(unsafe_code, reason = "recording copies")]

use std::sync::Arc;
use std::time::Instant;

use ash::vk;

use super::engine::Engine;
use crate::vulkan::buffers::buffer::Buffer;
use crate::vulkan::copying::staging::Staging;
use crate::vulkan::memory::handover::{self, Use};
use crate::vulkan::usage::BufferUsage;
use crate::{Error, Kind, Result};

pub(crate) const STAGING_BYTES: u64 = 4 << 20;

impl Engine {
    /// Copies from `buffer`, beginning `offset_bytes` into it, until `into` is full.
    ///
    /// Blocks until it is done or `deadline` has passed; `into` may be filled in part then.
    ///
    /// # Errors
    /// [`Kind::InvalidInput`] where the copy would leave the buffer, or for a buffer of another
    /// device or without [`BufferUsage::TRANSFER_SRC`]; [`Kind::TimedOut`]; [`Kind::Vulkan`] where
    /// the driver refuses.
    pub fn read_back(
        &mut self,
        buffer: &Buffer,
        offset_bytes: u64,
        into: &mut [u8],
        deadline: Instant,
    ) -> Result<()> {
        const TRIED: &str = "copy out of an imported buffer";
        buffer.raw().check(TRIED, self.device.logical(), BufferUsage::TRANSFER_SRC)?;
        check_bounds(TRIED, buffer, offset_bytes, into.len())?;
        let mut at = offset_bytes;
        for part in into.chunks_mut(STAGING_BYTES as usize) {
            let staging = self.run_copy(TRIED, buffer, deadline, Copy::Out, at, part.len() as u64)?;
            // SAFETY: a part is at most as large as the staging memory, and nothing is in flight.
            unsafe { staging.read(part) };
            at += part.len() as u64;
        }
        Ok(())
    }

    /// Copies `bytes` into `buffer`, beginning `offset_bytes` into it. As [`Engine::read_back`],
    /// with [`BufferUsage::TRANSFER_DST`].
    ///
    /// # Errors
    /// As [`Engine::read_back`]; the buffer may be written in part then.
    pub fn upload(
        &mut self,
        buffer: &Buffer,
        offset_bytes: u64,
        bytes: &[u8],
        deadline: Instant,
    ) -> Result<()> {
        const TRIED: &str = "copy into an imported buffer";
        buffer.raw().check(TRIED, self.device.logical(), BufferUsage::TRANSFER_DST)?;
        check_bounds(TRIED, buffer, offset_bytes, bytes.len())?;
        let mut at = offset_bytes;
        for part in bytes.chunks(STAGING_BYTES as usize) {
            self.run_copy(TRIED, buffer, deadline, Copy::In(part), at, part.len() as u64)?;
            at += part.len() as u64;
        }
        Ok(())
    }

    fn run_copy(
        &mut self,
        tried: &'static str,
        buffer: &Buffer,
        deadline: Instant,
        copy: Copy<'_>,
        offset_bytes: u64,
        length_bytes: u64,
    ) -> Result<Arc<Staging>> {
        let device = self.device.logical().clone();
        let staging = self.staging.get(|| Staging::new(&device, STAGING_BYTES))?;
        let used = vec![Arc::clone(buffer.raw()) as _, Arc::clone(&staging) as _];
        self.commands.run(tried, deadline, used, |ash, commands| {
            let region = vk::BufferCopy::default().size(length_bytes);
            // SAFETY: nothing is in flight when this is called, both buffers are in the list above
            // and have the usage, and the bounds were checked (VUID-vkCmdCopyBuffer-size-00115).
            unsafe {
                if let Copy::In(bytes) = copy {
                    staging.write(bytes);
                }
                handover::acquire(commands, &buffer.raw().resource, Use::COPY);
                match copy {
                    Copy::In(_) => {
                        let region = [region.dst_offset(offset_bytes)];
                        ash.cmd_copy_buffer(commands, staging.buffer(), buffer.raw().handle(), &region);
                    }
                    Copy::Out => {
                        let region = [region.src_offset(offset_bytes)];
                        ash.cmd_copy_buffer(commands, buffer.raw().handle(), staging.buffer(), &region);
                    }
                }
                handover::release(commands, &buffer.raw().resource, Use::COPY);
                handover::show_host(ash, commands, Use::COPY);
            }
        })?;
        Ok(staging)
    }
}

#[derive(Clone, Copy)]
enum Copy<'a> {
    Out,
    In(&'a [u8]),
}

fn check_bounds(tried: &'static str, buffer: &Buffer, offset_bytes: u64, length_bytes: usize) -> Result<()> {
    match offset_bytes.checked_add(length_bytes as u64) {
        Some(end) if end <= buffer.size_bytes() => Ok(()),
        _ => {
            let why = format!(
                "{offset_bytes:#x} + {length_bytes:#x} is beyond its {:#x} bytes",
                buffer.size_bytes()
            );
            Err(Error::new(Kind::InvalidInput, tried, why))
        }
    }
}
