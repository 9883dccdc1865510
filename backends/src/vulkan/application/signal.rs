//! `FenceSignal` and `TimelineSignal`: the end of an application's own work on an imported buffer.
//!
//! The application submits work that uses the buffer and names what that work signals: a `VkFence`,
//! or a timeline semaphore and the value it reaches. Both stay the application's.
//!
//! Absent on purpose: binary semaphores, on which the host cannot wait.
#![expect(unsafe_code, reason = "waiting for handles that the application vouches for")]

use std::fmt;
use std::mem;
use std::time::Duration;

use ash::vk::{self, Handle};

use crate::vulkan::device::Device;
use crate::vulkan::failure::failure;
use crate::{Error, Kind, Result, Signal};

/// Fires with an application's `VkFence`.
pub struct FenceSignal {
    device: Device,
    fence: vk::Fence,
}

impl FenceSignal {
    /// Of `fence`, a `VkFence` that the work's submission signals (vkQueueSubmit).
    ///
    /// # Safety
    /// The fence is of `device`, and until the signal is dropped it is neither destroyed nor reset
    /// (vkDestroyFence, "Host Synchronization"): a fence that is used again would fire for other work. Whoever gave the signal away,
    /// to an access for example, is told when it was dropped: by the outcome of that.
    pub unsafe fn from_raw(device: &Device, fence: u64) -> Self {
        Self { device: device.clone(), fence: vk::Fence::from_raw(fence) }
    }
}

impl Signal for FenceSignal {
    fn wait(&self, timeout: Duration) -> Result<bool> {
        // SAFETY: the fence is valid and of this device (VUID-vkWaitForFences-pFences-parameter,
        // VUID-vkWaitForFences-pFences-parent), as whoever made the signal vouched. Waiting needs no
        // external synchronisation.
        let waited =
            unsafe { self.device.logical().ash().wait_for_fences(&[self.fence], true, nanoseconds(timeout)) };
        fired(&self.device, "wait for a Vulkan fence", waited)
    }
}

impl fmt::Debug for FenceSignal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FenceSignal").field("device", &self.device).field("fence", &self.fence).finish()
    }
}

/// Fires when an application's timeline semaphore reaches a value.
pub struct TimelineSignal {
    device: Device,
    semaphore: vk::Semaphore,
    value: u64,
    wait: vk::PFN_vkWaitSemaphores,
}

impl TimelineSignal {
    /// Of `semaphore`, a `VkSemaphore` of type TIMELINE, at `value`. Making such a semaphore needs the
    /// feature `timelineSemaphore`, which [`Instance::open_device`](crate::vulkan::Instance::open_device) enables
    /// where there is one.
    ///
    /// # Errors
    /// [`Kind::VulkanMissing`] where the device has neither Vulkan 1.2 nor the extension
    /// `VK_KHR_timeline_semaphore`.
    ///
    /// # Safety
    /// The semaphore is of `device`, of type TIMELINE, and is not destroyed until the signal is dropped, as with
    /// [`FenceSignal::from_raw`].
    pub unsafe fn from_raw(device: &Device, semaphore: u64, value: u64) -> Result<Self> {
        let (instance, _) = device.logical().ash_instance();
        // SAFETY: the device is valid and of this instance.
        let find = |name: &std::ffi::CStr| unsafe {
            instance.get_device_proc_addr(device.logical().ash().handle(), name.as_ptr())
        };
        let wait = find(c"vkWaitSemaphores").or_else(|| find(c"vkWaitSemaphoresKHR")).ok_or_else(|| {
            let why = "the device has no vkWaitSemaphores";
            Error::new(Kind::VulkanMissing, "wait for a timeline semaphore", why)
                .on(device.logical().name())
                .next("enable timelineSemaphore, of Vulkan 1.2 or VK_KHR_timeline_semaphore, or give a fence")
        })?;
        // SAFETY: the function of either name has this type.
        let wait = unsafe { mem::transmute::<unsafe extern "system" fn(), vk::PFN_vkWaitSemaphores>(wait) };
        Ok(Self { device: device.clone(), semaphore: vk::Semaphore::from_raw(semaphore), value, wait })
    }
}

impl Signal for TimelineSignal {
    fn wait(&self, timeout: Duration) -> Result<bool> {
        let (semaphores, values) = ([self.semaphore], [self.value]);
        let info = vk::SemaphoreWaitInfo::default().semaphores(&semaphores).values(&values);
        // SAFETY: the function is this device's, the structure outlives the call, and the semaphore is
        // valid, of this device and of type TIMELINE (VUID-VkSemaphoreWaitInfo-pSemaphores-03256), as
        // whoever made the signal vouched.
        let waited =
            unsafe { (self.wait)(self.device.logical().ash().handle(), &info, nanoseconds(timeout)) };
        fired(&self.device, "wait for a timeline semaphore", waited.result())
    }
}

impl fmt::Debug for TimelineSignal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TimelineSignal")
            .field("device", &self.device)
            .field("semaphore", &self.semaphore)
            .field("value", &self.value)
            .finish()
    }
}

/// Forever where it is more than Vulkan can count.
fn nanoseconds(timeout: Duration) -> u64 {
    u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX)
}

fn fired(device: &Device, tried: &'static str, waited: Result<(), vk::Result>) -> Result<bool> {
    match waited {
        Ok(()) => Ok(true),
        Err(vk::Result::TIMEOUT) => Ok(false),
        Err(result) => Err(failure(tried, result).on(device.logical().name())),
    }
}
