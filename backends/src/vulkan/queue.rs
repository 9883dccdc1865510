//! `Queue`: a queue of a device, and whoever submits to it, one at a time; and which families of a device get one.
//!
//! A queue is externally synchronised (vkQueueSubmit, "Host Synchronization"). Of a device that we open nobody else has the
//! queues. An application's is submitted to by the application as well, so its lock is asked for, each time.
//!
//! A device that we open gets a queue that computes, and beside it one that only transfers, where it has a family of
//! those: on many GPUs that is a copy engine of its own, which moves bytes while shaders run. Its buffers are then shared by both
//! families, so that either may work on them without a hand-over between.

use std::panic::{self, AssertUnwindSafe};
use std::sync::OnceLock;

use ash::vk;
use parking_lot::Mutex;

use super::failure::failure;
use crate::{Error, Kind, Result};

/// An application's: calls what it is given while nobody else uses the queue.
pub(super) type QueueLock = Box<dyn Fn(&mut (dyn FnMut() + Send)) + Send + Sync>;

/// One queue of a device.
pub(super) struct Queue {
    handle: vk::Queue,
    /// Between engines of ours. The innermost lock: nothing of an application's is called under it.
    ours: Mutex<()>,
    access: Access,
    pub(super) family_index: u32,
    pub(super) family: vk::QueueFamilyProperties,
}

/// Who else submits to a queue.
enum Access {
    Nobody,
    /// An application, which may have said under which lock.
    Application(OnceLock<QueueLock>),
}

impl Queue {
    /// Of a device of our own.
    pub(super) fn own(handle: vk::Queue, family_index: u32, family: vk::QueueFamilyProperties) -> Self {
        Self { handle, ours: Mutex::new(()), access: Access::Nobody, family_index, family }
    }

    /// An application's, which nobody may submit to yet.
    pub(super) fn of_application(
        handle: vk::Queue,
        family_index: u32,
        family: vk::QueueFamilyProperties,
    ) -> Self {
        let access = Access::Application(OnceLock::new());
        Self { access, ..Self::own(handle, family_index, family) }
    }

    /// Takes the application's lock.
    pub(super) fn set_lock(&self, lock: QueueLock) -> Result<()> {
        const TRIED: &str = "take a lock for a Vulkan queue";
        let refused = |why| Err(Error::new(Kind::InvalidInput, TRIED, why));
        match &self.access {
            Access::Nobody => refused("peervram opened the device: nobody else has its queue"),
            Access::Application(slot) => slot.set(lock).or_else(|_| refused("its queue has one already")),
        }
    }

    /// Whether somebody said how to submit to it.
    pub(super) fn check(&self, tried: &'static str) -> Result<()> {
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
    pub(super) fn submit(
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

/// Families, by their numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Families {
    pub(super) computes: u32,
    pub(super) only_transfers: Option<u32>,
}

impl Families {
    /// The families that a device of our own takes queues of; none where none computes. Two only where buffers that two
    /// families share `can_be_handed_over` to the outside.
    pub(super) fn choose(families: &[vk::QueueFamilyProperties], can_be_handed_over: bool) -> Option<Self> {
        let first = |is_it: &dyn Fn(vk::QueueFlags) -> bool| {
            let has =
                |family: &vk::QueueFamilyProperties| family.queue_count > 0 && is_it(family.queue_flags);
            families.iter().position(has).map(|index| index as u32)
        };
        let computes = first(&|flags| flags.contains(vk::QueueFlags::COMPUTE))?;
        // Families of video engines and the like transfer, too, and are no faster at it than they have to be.
        let beside = vk::QueueFlags::TRANSFER | vk::QueueFlags::SPARSE_BINDING | vk::QueueFlags::PROTECTED;
        let only_transfers =
            first(&|flags| flags.contains(vk::QueueFlags::TRANSFER) && (flags & !beside).is_empty());
        Some(Self { computes, only_transfers: only_transfers.filter(|_| can_be_handed_over) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const G: vk::QueueFlags = vk::QueueFlags::GRAPHICS;
    const C: vk::QueueFlags = vk::QueueFlags::COMPUTE;
    const T: vk::QueueFlags = vk::QueueFlags::TRANSFER;
    const S: vk::QueueFlags = vk::QueueFlags::SPARSE_BINDING;
    const DECODES: vk::QueueFlags = vk::QueueFlags::VIDEO_DECODE_KHR;
    const ENCODES: vk::QueueFlags = vk::QueueFlags::VIDEO_ENCODE_KHR;

    fn chosen(families: &[(vk::QueueFlags, u32)]) -> Option<(u32, Option<u32>)> {
        let families: Vec<_> = families
            .iter()
            .map(|&(queue_flags, queue_count)| vk::QueueFamilyProperties {
                queue_flags,
                queue_count,
                ..Default::default()
            })
            .collect();
        let (both, one) = (Families::choose(&families, true), Families::choose(&families, false));
        // Without synchronization2 the same, less the family that would share.
        assert_eq!(one, both.map(|families| Families { only_transfers: None, ..families }));
        both.map(|families| (families.computes, families.only_transfers))
    }

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

    #[test]
    fn one_family_for_everything_gets_one_queue() {
        assert_eq!(chosen(&[(G | C | T, 1)]), Some((0, None)));
    }

    #[test]
    fn a_family_that_only_transfers_gets_one_too() {
        assert_eq!(chosen(&[(G | C | T | S, 16), (T | S, 2), (C | T | S, 8)]), Some((0, Some(1))));
        assert_eq!(chosen(&[(T, 1), (G, 1), (C, 1)]), Some((2, Some(0))));
    }

    #[test]
    fn engines_of_another_kind_are_left_alone() {
        let of_video = [(G | C | T, 1), (C | T, 4), (DECODES, 1), (T | DECODES, 1), (T | ENCODES, 1)];
        assert_eq!(chosen(&of_video), Some((0, None)));
        // A family beside compute is no copy engine.
        assert_eq!(chosen(&[(G, 1), (C | T, 1)]), Some((1, None)));
        // A bit that this release does not know stands for something else than copies.
        assert_eq!(chosen(&[(C, 1), (T | vk::QueueFlags::from_raw(1 << 20), 1)]), Some((0, None)));
    }

    #[test]
    fn families_without_queues_are_none() {
        assert_eq!(chosen(&[(C, 1), (T, 0), (T | S, 1)]), Some((0, Some(2))));
        assert_eq!(chosen(&[(C, 0), (T, 1)]), None);
        assert_eq!(chosen(&[]), None);
    }
}
