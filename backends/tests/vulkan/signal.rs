//! The end of an application's own work, by its fence or its timeline semaphore.
#![expect(unsafe_code, reason = "the application's side of Vulkan")]

use std::time::Duration;

use ash::vk::{self, Handle};
use peervram_backends::Signal;
use peervram_backends::vulkan::{Device, FenceSignal, TimelineSignal};

use crate::machine::{device, skip};

const NOW: Duration = Duration::ZERO;

/// The functions of a device, for what only an application calls.
struct Calls(ash::Device);

impl Calls {
    fn of(device: &Device) -> Self {
        // SAFETY: the loader's initialisers only read its environment variables.
        let library = unsafe { libloading::Library::new("libvulkan.so.1") }.unwrap();
        // SAFETY: the loader's ABI fixes the type of this symbol.
        let find = *unsafe { library.get::<vk::PFN_vkGetDeviceProcAddr>(b"vkGetDeviceProcAddr\0") }.unwrap();
        // Drivers leave threads behind.
        std::mem::forget(library);
        let handle = vk::Device::from_raw(device.raw_device());
        // SAFETY: the device is valid, and each function is looked up under its own name.
        Self(unsafe {
            ash::Device::load_with(
                |name| find(handle, name.as_ptr()).map_or(std::ptr::null(), |found| found as *const _),
                handle,
            )
        })
    }

    fn fence(&self, flags: vk::FenceCreateFlags) -> vk::Fence {
        // SAFETY: a plain structure.
        unsafe { self.0.create_fence(&vk::FenceCreateInfo::default().flags(flags), None) }.unwrap()
    }

    /// Submits nothing, which signals the fence when everything before has ended.
    fn submit(&self, fence: vk::Fence) {
        // SAFETY: the tests' devices have one queue, of the first family that computes, which is 0 on
        // every driver that the tests know; nobody else submits to it.
        unsafe { self.0.queue_submit(self.0.get_device_queue(0, 0), &[], fence) }.unwrap();
    }
}

#[test]
fn a_fence_fires_with_its_submission() {
    let Some(device) = device("a_fence_fires_with_its_submission") else { return };
    let calls = Calls::of(&device);
    let fence = calls.fence(vk::FenceCreateFlags::empty());
    // SAFETY: the fence is the device's and destroyed at the end.
    let signal = unsafe { FenceSignal::from_raw(&device, fence.as_raw()) };
    assert!(!signal.wait(NOW).unwrap(), "nothing is submitted");
    assert!(!signal.wait(Duration::from_millis(5)).unwrap());
    calls.submit(fence);
    assert!(signal.wait(Duration::MAX).unwrap());
    assert!(signal.wait(NOW).unwrap(), "it stays so");
    drop(signal);
    // SAFETY: the work has ended, and the signal is gone.
    unsafe { calls.0.destroy_fence(fence, None) };
}

#[test]
fn a_timeline_semaphore_fires_at_its_value() {
    const TEST: &str = "a_timeline_semaphore_fires_at_its_value";
    let Some(device) = device(TEST) else { return };
    if device.description().api_version < (1, 2, 0) {
        return skip(TEST, "timeline semaphores are of Vulkan 1.2").unwrap_or_default();
    }
    let calls = Calls::of(&device);
    let mut kind = vk::SemaphoreTypeCreateInfo::default().semaphore_type(vk::SemaphoreType::TIMELINE);
    let info = vk::SemaphoreCreateInfo::default().push_next(&mut kind);
    // SAFETY: the structures outlive the call; the device was opened with the feature, which every
    // device of Vulkan 1.2 has ("Feature Requirements" of the specification).
    let semaphore = unsafe { calls.0.create_semaphore(&info, None) }.unwrap();
    let at = |value| {
        // SAFETY: the semaphore is the device's, of type TIMELINE, and destroyed at the end.
        unsafe { TimelineSignal::from_raw(&device, semaphore.as_raw(), value) }.unwrap()
    };
    let reach = |value| {
        let info = vk::SemaphoreSignalInfo::default().semaphore(semaphore).value(value);
        // SAFETY: the value is larger than every one before.
        unsafe { calls.0.signal_semaphore(&info) }.unwrap();
    };
    let (first, second) = (at(3), at(4));
    assert!(at(0).wait(NOW).unwrap(), "where it begins");
    reach(2);
    assert!(!first.wait(NOW).unwrap());
    reach(3);
    assert!(first.wait(NOW).unwrap());
    assert!(!second.wait(Duration::from_millis(5)).unwrap());
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| second.wait(Duration::MAX).unwrap());
        reach(7);
        assert!(waiting.join().unwrap(), "a value beyond is as good");
    });
    drop((first, second));
    // SAFETY: nobody waits any more, and the signals are gone.
    unsafe { calls.0.destroy_semaphore(semaphore, None) };
}
