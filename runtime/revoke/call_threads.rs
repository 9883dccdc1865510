//! `CallThreads`: where the kernel's calls are made.
//!
//! A call may never come back, so it is made on a thread that nobody waits for. One whose call did come
//! back is kept for the next: starting a thread costs more than everything else that is done around a call
//! with few attachments.

use std::io;
use std::sync::Arc;

use crate::sync::mpsc::{Sender, channel};
use crate::sync::{self, Mutex, Thread};

/// A call, with all that surrounds it.
pub(crate) type Work = Box<dyn FnOnce() + Send>;

/// Threads for calls: one that waits for the next, and as many as there are calls under way.
#[derive(Default)]
pub(crate) struct CallThreads {
    idle: Arc<Mutex<Option<Idle>>>,
}

/// A thread that waits. It ends when this is dropped.
struct Idle(Sender<(Work, Idle)>);

impl CallThreads {
    /// Does `work` on another thread, at once.
    ///
    /// # Errors
    /// No thread could be started; with the work given back.
    pub fn run(&self, work: Work) -> Result<(), (Work, io::Error)> {
        // The lock is not held while a thread is started.
        let idle = self.idle.lock().take();
        let idle = match idle.map_or_else(|| self.start(), Ok) {
            Ok(idle) => idle,
            Err(error) => return Err((work, error)),
        };
        let thread = idle.0.clone();
        // A thread that is idle listens: one that panics takes its `Idle` with it.
        thread.send((work, idle)).map_err(|sent| (sent.0.0, io::ErrorKind::BrokenPipe.into()))
    }

    fn start(&self) -> io::Result<Idle> {
        let (sender, receiver) = channel::<(Work, Idle)>();
        // It must not keep alive what keeps it.
        let home = Arc::downgrade(&self.idle);
        sync::start(Thread::Call, move || {
            while let Ok((work, idle)) = receiver.recv() {
                work();
                if let Some(home) = home.upgrade() {
                    // Where another one waits already, this one ends.
                    home.lock().get_or_insert(idle);
                }
            }
        })?;
        Ok(Idle(sender))
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;
    use std::sync::mpsc::Receiver;
    use std::thread::{ThreadId, current, sleep};
    use std::time::{Duration, Instant};

    /// Runs what waits for a word of `go`, and tells its thread then.
    fn run(threads: &CallThreads, go: Receiver<()>) -> Receiver<ThreadId> {
        let (tell, told) = channel();
        let work = Box::new(move || {
            go.recv().ok();
            tell.send(current().id()).ok();
        });
        assert!(threads.run(work).is_ok());
        told
    }

    fn now() -> Receiver<()> {
        channel().1
    }

    fn wait_until_idle(threads: &CallThreads) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while threads.idle.lock().is_none() {
            assert!(Instant::now() < deadline, "no thread came back");
            sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn a_thread_whose_call_came_back_makes_the_next() {
        let threads = CallThreads::default();
        let first = run(&threads, now()).recv().unwrap();
        wait_until_idle(&threads);
        assert_eq!(run(&threads, now()).recv().unwrap(), first);
    }

    #[test]
    fn a_call_that_does_not_come_back_holds_up_no_other() {
        let threads = CallThreads::default();
        let (go, gone) = channel();
        let stuck = run(&threads, gone);
        let other = run(&threads, now()).recv().unwrap();
        wait_until_idle(&threads);
        go.send(()).unwrap();
        assert_ne!(stuck.recv().unwrap(), other);
    }

    #[test]
    fn a_panic_costs_its_thread_and_nothing_else() {
        let threads = CallThreads::default();
        let (tell, told) = channel::<()>();
        let work = Box::new(move || {
            let _tell = tell;
            panic!("as a test of panics");
        });
        assert!(threads.run(work).is_ok());
        assert!(told.recv().is_err());
        assert!(run(&threads, now()).recv().is_ok());
    }

    #[test]
    fn an_idle_thread_ends_with_its_owner() {
        let threads = CallThreads::default();
        run(&threads, now()).recv().unwrap();
        wait_until_idle(&threads);
        let home = Arc::downgrade(&threads.idle);
        drop(threads);
        assert!(home.upgrade().is_none());
    }
}
