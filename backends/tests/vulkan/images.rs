//! Pictures in host memory as images.
#![expect(unsafe_code, reason = "giving an application's device to the importer")]

use std::sync::Arc;

use peervram_backends::vulkan::{Device, Engine, Image, ImageOptions};
use peervram_backends::{ImageLayout, Importer, Kind, Mapping};

use crate::application::{Application, HOST_POINTER};
use crate::machine::{host_pointer_device, noise, skip, soon};
use crate::pretended::in_pretence;

/// More rows than fit the staging memory of an engine at once, and as many as fit are no multiple of 16.
const WIDTH: u32 = 976;
const HEIGHT: u32 = 1100;

/// A picture in host memory, as an image whose rows are as far apart as the driver has them.
fn picture(device: &Device) -> Option<(ImageLayout, Arc<Mapping>, Image)> {
    [WIDTH * 4, 4096].into_iter().find_map(|stride_bytes| {
        let layout = ImageLayout { offset_bytes: 0, width: WIDTH, height: HEIGHT, stride_bytes };
        let mapping = Arc::new(Mapping::of_host_memory(8 << 20).unwrap());
        match device.for_images(layout, ImageOptions::default()).import_host_pointer(Arc::clone(&mapping)) {
            Ok(image) => Some((layout, mapping, image)),
            Err(error) if error.kind() == Kind::InvalidInput => None,
            Err(error) => panic!("{error}"),
        }
    })
}

/// What the CPU writes is what the device reads of the image, and the other way round.
fn crosses_both_ways(test: &str, device: &Device) {
    let Some((layout, mapping, image)) = picture(device) else {
        skip::<()>(test, &format!("{} has its rows elsewhere", device.name()));
        return;
    };
    let pixels = noise(WIDTH as usize * HEIGHT as usize * 4, 21);
    let stride = layout.stride_bytes as usize;
    let rows = |bytes: &[u8]| -> Vec<u8> {
        bytes
            .chunks(stride)
            .take(HEIGHT as usize)
            .flat_map(|row| &row[..WIDTH as usize * 4])
            .copied()
            .collect()
    };
    let mut memory = vec![0; mapping.len()];
    for (row, of_picture) in memory.chunks_mut(stride).zip(pixels.chunks(WIDTH as usize * 4)) {
        row[..of_picture.len()].copy_from_slice(of_picture);
    }
    mapping.write(0, &memory).unwrap();
    let mut engine = Engine::new(device).unwrap();
    let mut seen = vec![0; pixels.len()];
    engine.read_image(&image, &mut seen, soon()).unwrap();
    assert!(seen == pixels, "the device reads the CPU's pixels");

    let other = noise(pixels.len(), 22);
    engine.write_image(&image, &other, soon()).unwrap();
    mapping.read(0, &mut memory).unwrap();
    assert!(rows(&memory) == other, "the CPU reads the device's pixels");
}

/// The validation layers say so where the hand-over and the barrier for the CPU are one:
/// VUID-vkCmdPipelineBarrier-srcStageMask-09633.
#[test]
fn an_image_by_host_pointer_crosses_both_ways() {
    const TEST: &str = "an_image_by_host_pointer_crosses_both_ways";
    let Some(device) = host_pointer_device(TEST) else { return };
    crosses_both_ways(TEST, &device);
}

/// The validation layers say so where a band of rows is no multiple of what the queue copies at once:
/// VUID-vkCmdCopyImageToBuffer-imageOffset-07747.
#[test]
fn a_queue_that_only_transfers_copies_images_in_its_own_steps() {
    const TEST: &str = "images::a_queue_that_only_transfers_copies_images_in_its_own_steps";
    if !in_pretence("transfer-queue", TEST) {
        return;
    }
    let Some(found) = host_pointer_device(TEST) else { return };
    let application = Application::with_queue_of(&found.description().name, 1);
    // SAFETY: `application` outlives everything below, and submits nothing.
    let device = unsafe {
        let device = Device::from_raw(&application.raw(&[HOST_POINTER])).unwrap();
        device.with_queue_lock(|submit| submit()).unwrap()
    };
    crosses_both_ways(TEST, &device);
}
