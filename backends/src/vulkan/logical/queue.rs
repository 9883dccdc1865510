//! `Queue`: a queue of a device, and whoever submits to it, one at a time.
//!
//! A queue is externally synchronised (vkQueueSubmit, "Host Synchronization"). Of a device that we open nobody else has the
//! queues. An application's is submitted to by the application as well, so its lock is asked for, each time.

use std::panic::{self, AssertUnwindSafe};
use std::sync::OnceLock;

use ash::vk;
use parking_lot::Mutex;

use crate::vulkan::failure::failure;
use crate::{Error, Kind, Result};

/// An application's: calls what it is given while nobody else uses the queue.
pub(crate) type QueueLock = Box<dyn Fn(&mut (dyn FnMut() + Send)) + Send + Sync>;

/// One queue of a device.
pub(crate) struct Queue {
    handle: vk::Queue,
    /// Between engines of ours. The innermost lock: nothing of an application's is called under it.
    ours: Mutex<()>,
    access: Access,
    pub(crate) family_index: u32,
    pub(crate) family: vk::QueueFamilyProperties,
}

/// Who else submits to a queue.
enum Access {
    Nobody,
    /// An application, which may have said under which lock.
    Application(OnceLock<QueueLock>),
}

impl Queue {
    /// Of a device of our own.
    pub(crate) fn own(handle: vk::Queue, family_index: u32, family: vk::QueueFamilyProperties) -> Self {
        Self { handle, ours: Mutex::new(()), access: Access::Nobody, family_index, family }
    }

    /// An application's, which nobody may submit to yet.
    pub(crate) fn of_application(
        handle: vk::Queue,
        family_index: u32,
        family: vk::QueueFamilyProperties,
    ) -> Self {
        let access = Access::Application(OnceLock::new());
        Self { access, ..Self::own(handle, family_index, family) }
    }

    /// Takes the application's lock.
    pub(crate) fn set_lock(&self, lock: QueueLock) -> Result<()> {
        const TRIED: &str = "take a lock for a Vulkan queue";
        let refused = |why| Err(Error::new(Kind::InvalidInput, TRIED, why));
        match &self.access {
            Access::Nobody => refused("peervram opened the device: nobody else has its queue"),
            Access::Application(slot) => slot.set(lock).or_else(|_| refused("its queue has one already")),
        }
    }

    /// Whether somebody said how to submit to it.
    pub(crate) fn check(&self, tried: &'static str) -> Result<()> {
        match &self.access {
            Access::Application(lock) if lock.get().is_none() => {
                let why = "the queue is the application's, and nobody said under which lock to submit to it";
                Err(Error::new(Kind::Unsupported, tried, why)
                    .next("give the lock: vulkan::Device::with_queue_lock"))
            }
            _ => Ok(()),
        }
    }

    /// Calls `submit` once, while nobody else uses the queue. An error means that nothing was submitted.
    pub(crate) fn submit(
        &self,
        tried: &'static str,
        mut submit: impl FnMut(vk::Queue) -> Result<(), vk::Result> + Send,
    ) -> Result<()> {
        self.check(tried)?;
        let mut answer = None;
        let mut once = || {
            if answer.is_none() {
                let _one_at_a_time = self.ours.lock();
                answer = Some(submit(self.handle));
            }
        };
        let panicked = match &self.access {
            Access::Nobody => {
                once();
                false
            }
            Access::Application(lock) => {
                let lock = lock.get().expect("it was checked");
                // Nothing of ours is left half done by a panic: what was submitted is known by its answer.
                panic::catch_unwind(AssertUnwindSafe(|| lock(&mut once))).is_err()
            }
        };
        match answer {
            Some(answer) => {
                if panicked {
                    tracing::error!("the application's queue lock panicked after a submission");
                }
                answer.map_err(|result| failure(tried, result))
            }
            None => {
                let why = if panicked {
                    "the application's queue lock panicked before it called what it was given"
                } else {
                    "the application's queue lock did not call what it was given"
                };
                Err(Error::new(Kind::InvalidInput, tried, why).next(
                    "have it call its argument once, under the lock that the application submits under",
                ))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn application() -> Queue {
        Queue::of_application(vk::Queue::null(), 0, Default::default())
    }

    #[test]
    fn an_applications_queue_is_submitted_to_under_its_lock_only() {
        let queue = application();
        let refused = queue.submit("test", |_| Ok(())).unwrap_err();
        assert_eq!(refused.kind(), Kind::Unsupported);
        assert!(refused.next_step().is_some_and(|next| next.contains("with_queue_lock")), "{refused}");
        let lock = std::sync::Arc::new(Mutex::new(0));
        let applications = std::sync::Arc::clone(&lock);
        queue
            .set_lock(Box::new(move |submit| {
                let mut submissions = applications.lock();
                submit();
                // Twice is once.
                submit();
                *submissions += 1;
            }))
            .unwrap();
        let calls = std::sync::atomic::AtomicUsize::new(0);
        let submitted = queue.submit("test", |_| {
            assert!(lock.is_locked(), "the application's lock is held");
            calls.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            Ok(())
        });
        submitted.unwrap();
        assert_eq!((*lock.lock(), calls.into_inner()), (1, 1));
        let lost = queue.submit("test", |_| Err(vk::Result::ERROR_DEVICE_LOST)).unwrap_err();
        assert_eq!(lost.kind(), Kind::Vulkan, "what the driver says is told");
        assert_eq!(queue.set_lock(Box::new(|_| ())).unwrap_err().kind(), Kind::InvalidInput);
    }

    #[test]
    fn a_lock_that_does_not_call_or_panics_is_an_error_and_no_panic() {
        let queue = application();
        queue.set_lock(Box::new(|_| ())).unwrap();
        let error = queue.submit("test", |_| Ok(())).unwrap_err();
        assert!(error.why().contains("did not call"), "{error}");
        let queue = application();
        queue.set_lock(Box::new(|_| panic!("before"))).unwrap();
        let error = queue.submit("test", |_| Ok(())).unwrap_err();
        assert!(error.why().contains("panicked before"), "{error}");
        let queue = application();
        let after: QueueLock = Box::new(|submit| {
            submit();
            panic!("after");
        });
        queue.set_lock(after).unwrap();
        queue.submit("test", |_| Ok(())).expect("what was submitted runs");
    }

    #[test]
    fn the_queue_of_a_device_of_our_own_takes_no_lock() {
        let queue = Queue::own(vk::Queue::null(), 0, Default::default());
        assert_eq!(queue.set_lock(Box::new(|_| ())).unwrap_err().kind(), Kind::InvalidInput);
        queue.submit("test", |_| Ok(())).unwrap();
    }
}
