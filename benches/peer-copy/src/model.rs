//! The driver of the lab's model GPU: half of its VRAM is lent, half is what it imports to.

use std::sync::Arc;

use peervram::Result;
use peervram::backends::pci::Function;
use peervram::backends::{DmaRange, page_size_bytes, vfio};
use peervram_model::registers::BAR0_BYTES;
use peervram_model_driver::{ImportingGpu, ModelGpu, REGISTER_BAR, VRAM_BAR};

use crate::driver::{Driven, Driver};

/// The model GPU's.
pub struct ModelDriver;

impl Driver for ModelDriver {
    fn may_drive(&self, function: &Function) -> bool {
        let has = |index: u32, size_bytes: Option<u64>| {
            function.bar(index).is_some_and(|bar| size_bytes.is_none_or(|size| bar.size_bytes == size))
        };
        has(REGISTER_BAR, Some(BAR0_BYTES)) && has(VRAM_BAR, None)
    }

    fn open(&self, device: &vfio::Device) -> Result<Driven> {
        let gpu = Arc::new(ModelGpu::new(device)?);
        let end_bytes = gpu.lendable_bytes() / page_size_bytes() * page_size_bytes();
        let half_bytes = device.region(VRAM_BAR)?.size_bytes / 2;
        let importer = ImportingGpu::new(device, Arc::clone(&gpu), half_bytes..end_bytes)?;
        Ok(Driven {
            owner: gpu,
            region: VRAM_BAR,
            lent: DmaRange::new(0, half_bytes),
            imports: Some(Box::new(Arc::new(importer))),
        })
    }
}
