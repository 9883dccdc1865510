//! `Reaper`: threads that do nothing but close descriptors whose close can block without a limit.
//!
//! Descriptors lie in *lanes*: those of one device wait for one another, as they do in the kernel, and for no other
//! device's. A lane has one thread while there is something in it, so that there are at most as many threads as there
//! are devices with something to close, and [`FOREIGN_LANES`] for dma-bufs of devices that are not known here.
//! One thread stays and waits for the next.
//!
//! Where there is no thread to be had, descriptors stay open until the next one is to be closed, which tries again.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, LazyLock};
use std::thread;

use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::PciAddress;

/// How many lanes there are for what other processes export: by inode, since their device is not known.
const FOREIGN_LANES: u64 = 16;

/// Descriptors whose close may wait for each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Lane {
    Device(PciAddress),
    Foreign(u64),
}

impl Lane {
    /// A descriptor of a file that another process made.
    pub fn of_inode(inode: u64) -> Self {
        Self::Foreign(inode % FOREIGN_LANES)
    }
}

/// Closes what is added to it, by dropping it.
pub(crate) struct Reaper<T> {
    state: Mutex<State<T>>,
    /// A lane has descriptors to close and no thread serves it.
    added: Condvar,
    start: fn(Box<dyn FnOnce() + Send>) -> io::Result<()>,
}

struct State<T> {
    lanes: BTreeMap<Lane, Queue<T>>,
    /// Threads that wait.
    idle: usize,
    /// Threads that were started and have not looked for a lane yet.
    starting: usize,
}

struct Queue<T> {
    left: VecDeque<T>,
    /// A thread closes what is in it.
    is_served: bool,
}

impl<T: Send + 'static> Reaper<T> {
    /// A separate reaper; [`Reaper::of_process`] is the one that the process shares.
    fn new(start: fn(Box<dyn FnOnce() + Send>) -> io::Result<()>) -> Arc<Self> {
        let state = Mutex::new(State { lanes: BTreeMap::new(), idle: 0, starting: 0 });
        Arc::new(Self { state, added: Condvar::new(), start })
    }

    /// Closes `one` soon. Does not block.
    pub fn add(self: &Arc<Self>, lane: Lane, one: T) {
        let mut state = self.state.lock();
        let empty = || Queue { left: VecDeque::new(), is_served: false };
        state.lanes.entry(lane).or_insert_with(empty).left.push_back(one);
        let waiting = state.lanes.values().filter(|queue| !queue.is_served).count();
        let is_short = waiting > state.idle + state.starting;
        state.starting += usize::from(is_short);
        drop(state);
        self.added.notify_one();
        if is_short {
            let reaper = Arc::clone(self);
            if let Err(error) = (self.start)(Box::new(move || reaper.serve())) {
                self.state.lock().starting -= 1;
                tracing::error!(%error, "no thread to close dma-bufs on: they are closed with the next one");
            }
        }
    }

    /// Serves lanes until another thread waits for the next one.
    fn serve(&self) {
        let mut state = self.state.lock();
        state.starting -= 1;
        loop {
            let unserved = state.lanes.iter_mut().find(|(_, queue)| !queue.is_served);
            let Some((&lane, queue)) = unserved else {
                if state.idle > 0 {
                    return;
                }
                state.idle += 1;
                self.added.wait(&mut state);
                state.idle -= 1;
                continue;
            };
            queue.is_served = true;
            while let Some(one) = state.lanes.get_mut(&lane).and_then(|queue| queue.left.pop_front()) {
                MutexGuard::unlocked(&mut state, || drop(one));
            }
            state.lanes.remove(&lane);
        }
    }
}

fn start(work: Box<dyn FnOnce() + Send>) -> io::Result<()> {
    thread::Builder::new().name("peervram-reaper".into()).spawn(work).map(drop)
}

impl Reaper<OwnedFd> {
    /// The one of this process.
    pub fn of_process() -> &'static Arc<Self> {
        static PROCESS: LazyLock<Arc<Reaper<OwnedFd>>> = LazyLock::new(|| Reaper::new(start));
        &PROCESS
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
    use std::time::Duration;

    const PATIENCE: Duration = Duration::from_secs(20);

    /// A descriptor whose close waits until it is told.
    struct Descriptor {
        number: usize,
        go_on: Option<Receiver<()>>,
        closed: Sender<usize>,
    }

    impl Drop for Descriptor {
        fn drop(&mut self) {
            if let Some(go_on) = self.go_on.take() {
                go_on.recv().ok();
            }
            self.closed.send(self.number).ok();
        }
    }

    fn device(number: u8) -> Lane {
        Lane::Device(format!("0000:{number:02x}:00.0").parse().unwrap())
    }

    #[test]
    fn a_close_that_blocks_holds_up_its_own_device_only() {
        let reaper = Reaper::new(start);
        let (closed, told) = channel();
        let (release, go_on) = channel();
        let plain = |number| Descriptor { number, go_on: None, closed: closed.clone() };
        reaper.add(device(1), Descriptor { number: 0, go_on: Some(go_on), closed: closed.clone() });
        reaper.add(device(1), plain(1));
        for number in 2..200 {
            reaper.add(device(2 + (number % 5) as u8), plain(number));
        }
        let mut all: Vec<usize> = (2..200).map(|_| told.recv_timeout(PATIENCE).unwrap()).collect();
        all.sort_unstable();
        assert!(all.into_iter().eq(2..200));
        // The second one of the device waits for the first.
        assert_eq!(told.recv_timeout(Duration::from_millis(50)), Err(RecvTimeoutError::Timeout));
        release.send(()).unwrap();
        assert_eq!([told.recv_timeout(PATIENCE).unwrap(), told.recv_timeout(PATIENCE).unwrap()], [0, 1]);
    }

    #[test]
    fn there_are_no_more_threads_than_lanes() {
        static STARTED: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
        let reaper = Reaper::new(|work| {
            STARTED.fetch_add(1, Ordering::SeqCst);
            start(work)
        });
        let (closed, told) = channel();
        let releases: Vec<Sender<()>> = (0..1000)
            .map(|number| {
                let (release, go_on) = channel();
                let one = Descriptor { number, go_on: Some(go_on), closed: closed.clone() };
                reaper.add(Lane::of_inode(number as u64), one);
                release
            })
            .collect();
        assert_eq!(reaper.state.lock().lanes.len(), FOREIGN_LANES as usize);
        assert_eq!(STARTED.load(Ordering::SeqCst), FOREIGN_LANES as usize);
        drop(releases);
        let mut all: Vec<usize> = (0..1000).map(|_| told.recv_timeout(PATIENCE).unwrap()).collect();
        all.sort_unstable();
        assert!(all.into_iter().eq(0..1000));
    }

    #[test]
    fn what_no_thread_could_be_had_for_is_closed_with_the_next() {
        static FAILS: AtomicBool = AtomicBool::new(true);
        let reaper = Reaper::new(|work| match FAILS.swap(false, Ordering::SeqCst) {
            true => Err(rustix::io::Errno::AGAIN.into()),
            false => start(work),
        });
        let (closed, told) = channel();
        let plain = |number| Descriptor { number, go_on: None, closed: closed.clone() };
        reaper.add(device(1), plain(0));
        assert_eq!(told.recv_timeout(Duration::from_millis(50)), Err(RecvTimeoutError::Timeout));
        reaper.add(device(2), plain(1));
        let mut both = [told.recv_timeout(PATIENCE).unwrap(), told.recv_timeout(PATIENCE).unwrap()];
        both.sort_unstable();
        assert_eq!(both, [0, 1]);
    }
}
