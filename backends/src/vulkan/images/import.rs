//! Imports of images: a dma-buf or a mapping becomes a `VkImage` whose pixels are where the lender has them.
//!
//! The driver is asked first, in the words of the specification, whether it makes such an image on such memory;
//! what it refuses is said in ours. Then the image is created, without memory, and asked where its pixels would
//! lie. Only where that is the lender's layout is memory imported and bound. Whatever was made before a failure is
//! undone by dropping the [`Resource`].
#![expect(unsafe_code, reason = "creating Vulkan objects")]

use std::sync::Arc;

use ash::prelude::VkResult;
use ash::{ext, vk};

use super::image::{Image, ImageOptions, PixelFormat, Tiling};
use crate::vulkan::device::Device;
use crate::vulkan::failure::failure;
use crate::vulkan::logical::device::LogicalDevice;
use crate::vulkan::memory::import::{DMA_BUF, HOST_POINTER, for_dma_bufs, for_host_pointers};
use crate::vulkan::memory::resource::{Needs, Origin, Resource};
use crate::{DmaBuf, Error, ImageLayout, Kind, Mapping, Result};

/// A dma-buf as an image.
pub(crate) fn dma_buf(
    device: &Device,
    dma_buf: &DmaBuf,
    layout: ImageLayout,
    options: ImageOptions,
) -> Result<Image> {
    const TRIED: &str = "import a dma-buf as an image";
    let logical = device.logical();
    for_dma_bufs(TRIED, logical)?;
    layout.check(dma_buf.size_bytes())?;
    let features = ask(TRIED, logical, layout, options, DMA_BUF)?;
    let mut image = create(TRIED, logical, layout, options, DMA_BUF, Origin::DmaBuf)?;
    let needs = image.needs();
    let place = place(TRIED, layout, options.tiling, &needs, dma_buf.size_bytes())?;
    let is_dedicated = needs.is_dedicated(features);
    // VUID-vkBindImageMemory-memory-02628: what is dedicated is bound at offset zero.
    if is_dedicated && place != 0 {
        let why = format!("the driver wants a picture at the start of its memory, and it is at {place:#x}");
        return Err(Error::new(Kind::InvalidInput, TRIED, why)
            .next("lend from the picture on, or ask for Tiling::EXPLICIT_LINEAR"));
    }
    // VUID-VkMemoryDedicatedAllocateInfo-image-02964: dedicated memory has exactly the size that is required.
    image.import_dma_buf(TRIED, dma_buf, place + needs.size_bytes, &needs, is_dedicated, place)?;
    Ok(Image::new(device, image, layout, options))
}

/// Mapped memory as an image, which keeps the mapping.
pub(crate) fn host_pointer(
    device: &Device,
    mapping: Arc<Mapping>,
    layout: ImageLayout,
    options: ImageOptions,
) -> Result<Image> {
    const TRIED: &str = "import a host pointer as an image";
    let logical = device.logical();
    for_host_pointers(TRIED, logical, &mapping)?;
    let length_bytes = mapping.len() as u64;
    layout.check(length_bytes)?;
    let features = ask(TRIED, logical, layout, options, HOST_POINTER)?;
    let mut image = create(TRIED, logical, layout, options, HOST_POINTER, Origin::HostPointer(mapping))?;
    let needs = image.needs();
    let place = place(TRIED, layout, options.tiling, &needs, length_bytes)?;
    image.import_mapping(TRIED, &needs, features, place)?;
    Ok(Image::new(device, image, layout, options))
}

/// Whether the driver makes such an image on memory of `handle`, and what it says of that memory.
fn ask(
    tried: &'static str,
    device: &LogicalDevice,
    layout: ImageLayout,
    options: ImageOptions,
    handle: vk::ExternalMemoryHandleTypeFlags,
) -> Result<vk::ExternalMemoryFeatureFlags> {
    let mut asked_modifier = vk::PhysicalDeviceImageDrmFormatModifierInfoEXT::default();
    let mut asked_memory = vk::PhysicalDeviceExternalImageFormatInfo::default().handle_type(handle);
    let mut asked = vk::PhysicalDeviceImageFormatInfo2::default()
        .format(options.format.vk())
        .ty(vk::ImageType::TYPE_2D)
        .tiling(options.tiling.vk())
        .usage(options.usage.flags())
        .push_next(&mut asked_memory);
    if let Tiling::Explicit { modifier } = options.tiling {
        if !device.has_modifiers() {
            return Err(no_modifiers(tried, device));
        }
        check_modifier(tried, device, options.format, modifier)?;
        asked_modifier =
            asked_modifier.drm_format_modifier(modifier).sharing_mode(vk::SharingMode::EXCLUSIVE);
        asked = asked.push_next(&mut asked_modifier);
    }
    let mut memory = vk::ExternalImageFormatProperties::default();
    let mut answer = vk::ImageFormatProperties2::default().push_next(&mut memory);
    let (instance, physical) = device.ash_instance();
    // SAFETY: the device is of Vulkan 1.1, which has the call and both structures about memory, and the one about
    // modifiers is there only where its extension is; the chains are initialised and outlive the call.
    let result =
        unsafe { instance.get_physical_device_image_format_properties2(physical, &asked, &mut answer) };
    let limits = answer.image_format_properties;
    let features = memory.external_memory_properties.external_memory_features;
    let ImageOptions { usage, format, tiling } = options;
    let what = format!("images of {format:?} for {usage} ({tiling})");
    let whose = if handle == DMA_BUF { "dma-bufs" } else { "host pointers" };
    match result {
        Err(vk::Result::ERROR_FORMAT_NOT_SUPPORTED) => {
            let why = format!("the driver makes no {what} on {whose}");
            let next = match tiling {
                Tiling::Linear if device.has_modifiers() => {
                    "ask for Tiling::EXPLICIT_LINEAR, fewer usages or another format, or import it as a buffer"
                }
                _ => "ask for fewer usages or another format, or import it as a buffer",
            };
            return Err(Error::new(Kind::Unsupported, tried, why).next(next));
        }
        result => result.map_err(|result| failure(tried, result))?,
    }
    if !features.contains(vk::ExternalMemoryFeatureFlags::IMPORTABLE) {
        let why = format!("the driver makes {what}, and imports no {whose} for them");
        return Err(Error::new(Kind::ImporterCannot, tried, why).next("import it as a buffer"));
    }
    let (width, height) = (limits.max_extent.width, limits.max_extent.height);
    if layout.width > width || layout.height > height {
        let why = format!(
            "a picture of {}x{} is larger than the driver's images, {width}x{height}",
            layout.width, layout.height
        );
        return Err(Error::new(Kind::InvalidInput, tried, why).next("import a part of it, or a buffer"));
    }
    Ok(features)
}

/// Why there are no explicit layouts.
fn no_modifiers(tried: &'static str, device: &LogicalDevice) -> Error {
    let name = ext::image_drm_format_modifier::NAME;
    let lacks = device.description().missing_extensions.iter().any(|extension| extension.name == name);
    let (why, next) = if lacks {
        let next = match device.description().import_policy().linear_images {
            // GFX8 and older under RADV.
            Some(false) => "import it as a buffer",
            _ => "lend with the driver's own stride (Tiling::Linear), or import it as a buffer",
        };
        ("the driver has no VK_EXT_image_drm_format_modifier for this GPU", next)
    } else {
        (
            "VK_EXT_image_drm_format_modifier is not enabled",
            "enable it, or lend with the driver's own stride: Tiling::Linear",
        )
    };
    Error::new(Kind::VulkanMissing, tried, why).next(next)
}

/// Whether the driver has that modifier for the format, in one plane: an explicit layout is one for each.
fn check_modifier(
    tried: &'static str,
    device: &LogicalDevice,
    format: PixelFormat,
    modifier: u64,
) -> Result<()> {
    let (instance, physical) = device.ash_instance();
    let mut count = vk::DrmFormatModifierPropertiesListEXT::default();
    let mut answer = vk::FormatProperties2::default().push_next(&mut count);
    // SAFETY: the extension is there; without an array the driver says how many there are.
    unsafe { instance.get_physical_device_format_properties2(physical, format.vk(), &mut answer) };
    let mut modifiers =
        vec![vk::DrmFormatModifierPropertiesEXT::default(); count.drm_format_modifier_count as usize];
    let mut list =
        vk::DrmFormatModifierPropertiesListEXT::default().drm_format_modifier_properties(&mut modifiers);
    let mut answer = vk::FormatProperties2::default().push_next(&mut list);
    // SAFETY: as above, and the array is as long as is said in the structure.
    unsafe { instance.get_physical_device_format_properties2(physical, format.vk(), &mut answer) };
    match modifiers.iter().find(|known| known.drm_format_modifier == modifier) {
        Some(known) if known.drm_format_modifier_plane_count == 1 => Ok(()),
        Some(known) => {
            let planes = known.drm_format_modifier_plane_count;
            let why =
                format!("modifier {modifier:#x} has {planes} planes for {format:?}, and lent memory is one");
            Err(Error::new(Kind::Unsupported, tried, why).next("ask for Tiling::EXPLICIT_LINEAR"))
        }
        None => {
            let known: Vec<String> =
                modifiers.iter().map(|known| format!("{:#x}", known.drm_format_modifier)).collect();
            let known = if known.is_empty() { "none".into() } else { known.join(", ") };
            let why = format!("the driver has no modifier {modifier:#x} for {format:?}; it has {known}");
            Err(Error::new(Kind::Unsupported, tried, why).next("lend in a layout that both sides have"))
        }
    }
}

/// An image for memory of `handle`, still without it, with its pixels where `layout` has them.
fn create(
    tried: &'static str,
    device: &LogicalDevice,
    layout: ImageLayout,
    options: ImageOptions,
    handle: vk::ExternalMemoryHandleTypeFlags,
    origin: Origin,
) -> Result<Resource<vk::Image>> {
    let image = create_raw(device, layout, options, handle);
    let image = match (image, options.tiling) {
        // RADV says so of rows that are not multiples of 256 bytes apart.
        (Err(vk::Result::ERROR_INVALID_DRM_FORMAT_MODIFIER_PLANE_LAYOUT_EXT), Tiling::EXPLICIT_LINEAR) => {
            return Err(wrong_rows(tried, device, layout, options, handle));
        }
        (image, _) => image.map_err(|result| failure(tried, result))?,
    };
    // SAFETY: made above.
    let image = unsafe { Resource::new(device, image, origin) };
    check_pixels(tried, layout, options.tiling, &pixels_of(device, image.handle(), options.tiling))?;
    Ok(image)
}

/// A `VkImage`, the caller's to destroy.
fn create_raw(
    device: &LogicalDevice,
    layout: ImageLayout,
    options: ImageOptions,
    handle: vk::ExternalMemoryHandleTypeFlags,
) -> VkResult<vk::Image> {
    // VUID-VkImageDrmFormatModifierExplicitCreateInfoEXT-size-02267, -arrayPitch-02268 and -depthPitch-02269: what
    // follows from the rest is zero.
    let planes = [vk::SubresourceLayout::default()
        .offset(layout.offset_bytes)
        .row_pitch(u64::from(layout.stride_bytes))];
    let mut explicit = vk::ImageDrmFormatModifierExplicitCreateInfoEXT::default().plane_layouts(&planes);
    // VUID-vkBindImageMemory-memory-02989: an image says for which memory it is.
    let mut external = vk::ExternalMemoryImageCreateInfo::default().handle_types(handle);
    // VUID-VkImageCreateInfo-pNext-01443: and then begins in no layout.
    let mut info = vk::ImageCreateInfo::default()
        .image_type(vk::ImageType::TYPE_2D)
        .format(options.format.vk())
        .extent(vk::Extent3D { width: layout.width, height: layout.height, depth: 1 })
        .mip_levels(1)
        .array_layers(1)
        .samples(vk::SampleCountFlags::TYPE_1)
        .tiling(options.tiling.vk())
        .usage(options.usage.flags())
        .sharing_mode(vk::SharingMode::EXCLUSIVE)
        .initial_layout(vk::ImageLayout::UNDEFINED)
        .push_next(&mut external);
    if let Tiling::Explicit { modifier } = options.tiling {
        explicit = explicit.drm_format_modifier(modifier);
        info = info.push_next(&mut explicit);
    }
    // SAFETY: the chain is initialised and outlives the call, and the driver said that it makes such images
    // (VUID-VkImageCreateInfo-imageCreateMaxMipLevels-02251).
    unsafe { device.ash().create_image(&info, None) }
}

/// Where the driver has the pixels of an image of one level and one layer.
fn pixels_of(device: &LogicalDevice, image: vk::Image, tiling: Tiling) -> vk::SubresourceLayout {
    let subresource = vk::ImageSubresource::default().aspect_mask(tiling.aspect());
    // SAFETY: the image is of this device; the aspect is the one that its tiling has.
    unsafe { device.ash().get_image_subresource_layout(image, subresource) }
}

/// Rows that the driver does not take at that distance, and the next one at which it does: it is asked, by images that are
/// destroyed at once.
fn wrong_rows(
    tried: &'static str,
    device: &LogicalDevice,
    layout: ImageLayout,
    options: ImageOptions,
    handle: vk::ExternalMemoryHandleTypeFlags,
) -> Error {
    let description = device.description();
    let policy = description.import_policy();
    let rule = policy.rows.map_or_else(String::new, |rows| {
        format!("; {} is known to take {}", policy.driver, rows.rule(&description.name))
    });
    let why = format!("the driver takes no rows that are {} bytes apart{rule}", layout.stride_bytes);
    let error = Error::new(Kind::InvalidInput, tried, why);
    let takes = |stride_bytes: &u32| {
        let layout = ImageLayout { stride_bytes: *stride_bytes, ..layout };
        let Ok(image) = create_raw(device, layout, options, handle) else { return false };
        let pixels = pixels_of(device, image, options.tiling);
        // SAFETY: made above, bound to nothing, and known to nobody.
        unsafe { device.ash().destroy_image(image, None) };
        pixels.row_pitch == u64::from(*stride_bytes)
    };
    let least_bytes = ImageLayout::packed(layout.width, layout.height).stride_bytes;
    let mut tried = rounded(layout.stride_bytes.saturating_add(1)).chain(rounded(least_bytes));
    match tried.find(takes) {
        Some(stride_bytes) => error.next(format!("lend with a stride of {stride_bytes} bytes")),
        None => error.next("import it as a buffer"),
    }
}

/// Distances of rows that are no less than that, and rounder and rounder.
fn rounded(least_bytes: u32) -> impl Iterator<Item = u32> {
    (3..=12).filter_map(move |power| least_bytes.checked_next_multiple_of(1 << power))
}

/// Compares where the driver would have the pixels with where the lender has them.
fn check_pixels(
    tried: &'static str,
    layout: ImageLayout,
    tiling: Tiling,
    driver: &vk::SubresourceLayout,
) -> Result<()> {
    // Without an explicit layout the image begins where it is bound.
    let offset_bytes = if tiling == Tiling::Linear { 0 } else { layout.offset_bytes };
    let why = if driver.row_pitch != u64::from(layout.stride_bytes) {
        format!(
            "the driver has the rows of {} pixels {} bytes apart, the lender {}",
            layout.width, driver.row_pitch, layout.stride_bytes
        )
    } else if driver.offset != offset_bytes {
        format!("the driver has the first pixel at {:#x}, the lender at {offset_bytes:#x}", driver.offset)
    } else {
        return Ok(());
    };
    let next = match tiling {
        Tiling::Linear => "lend with the driver's stride, or ask for Tiling::EXPLICIT_LINEAR",
        Tiling::Explicit { .. } => "lend with the driver's stride, or import it as a buffer",
    };
    Err(Error::new(Kind::InvalidInput, tried, why).next(next))
}

/// Where in the memory the image is bound, and whether there is as much as the driver wants from there on.
fn place(
    tried: &'static str,
    layout: ImageLayout,
    tiling: Tiling,
    needs: &Needs,
    available_bytes: u64,
) -> Result<u64> {
    // An explicit layout has the offset in it.
    let place = if tiling == Tiling::Linear { layout.offset_bytes } else { 0 };
    // VUID-vkBindImageMemory-memoryOffset-01048.
    if !place.is_multiple_of(needs.alignment_bytes) {
        let alignment_bytes = needs.alignment_bytes;
        let why =
            format!("the picture is at {place:#x}, and the driver wants multiples of {alignment_bytes:#x}");
        return Err(Error::new(Kind::InvalidInput, tried, why)
            .next("move the picture, or ask for Tiling::EXPLICIT_LINEAR"));
    }
    // VUID-vkBindImageMemory-size-01049.
    let wanted_bytes = place.saturating_add(needs.size_bytes);
    if wanted_bytes > available_bytes {
        let why = format!(
            "the driver needs {wanted_bytes:#x} bytes for a picture that ends at {:#x}, there are {available_bytes:#x}",
            layout.end_bytes()
        );
        return Err(Error::new(Kind::InvalidInput, tried, why).next("lend a few pages more"));
    }
    Ok(place)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYOUT: ImageLayout =
        ImageLayout { offset_bytes: 0x1000, width: 100, height: 10, stride_bytes: 448 };

    #[test]
    fn pixels_elsewhere_than_the_lenders_are_refused() {
        let driver = |offset, row_pitch| vk::SubresourceLayout { offset, row_pitch, ..Default::default() };
        assert!(check_pixels("test", LAYOUT, Tiling::Linear, &driver(0, 448)).is_ok());
        assert!(check_pixels("test", LAYOUT, Tiling::EXPLICIT_LINEAR, &driver(0x1000, 448)).is_ok());
        let refused = |tiling, driver| check_pixels("test", LAYOUT, tiling, &driver).unwrap_err();
        let error = refused(Tiling::Linear, driver(0, 400));
        assert_eq!(error.why(), "the driver has the rows of 100 pixels 400 bytes apart, the lender 448");
        assert!(error.next_step().unwrap().contains("EXPLICIT_LINEAR"));
        let error = refused(Tiling::EXPLICIT_LINEAR, driver(0, 448));
        assert_eq!(error.why(), "the driver has the first pixel at 0x0, the lender at 0x1000");
    }

    #[test]
    fn rounder_distances_are_tried_the_next_first() {
        let tried: Vec<u32> = rounded(2565).collect();
        assert_eq!(tried[0], 2568);
        assert!(tried.contains(&2816) && tried.is_sorted(), "{tried:?}");
        assert_eq!(rounded(4096).next(), Some(4096));
        assert_eq!(rounded(u32::MAX).next(), None);
    }

    #[test]
    fn an_image_is_bound_where_the_picture_is() {
        let needs = |size_bytes, alignment_bytes| Needs {
            size_bytes,
            alignment_bytes,
            memory_type_bits: 1,
            dedicated: false,
            has_address: false,
        };
        let at = |tiling, needs, available| place("test", LAYOUT, tiling, &needs, available);
        assert_eq!(at(Tiling::Linear, needs(0x2000, 64), 0x3000).unwrap(), 0x1000);
        assert_eq!(at(Tiling::EXPLICIT_LINEAR, needs(0x3000, 64), 0x3000).unwrap(), 0);
        let error = at(Tiling::Linear, needs(0x2001, 64), 0x3000).unwrap_err();
        assert!(error.why().contains("needs 0x3001 bytes"), "{error}");
        let error = at(Tiling::Linear, needs(0x1000, 0x10000), 0x3000).unwrap_err();
        assert!(error.why().contains("multiples of 0x10000"), "{error}");
    }
}
