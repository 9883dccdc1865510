//! `Flag`: a signal that this process fires itself, for work of its CPU.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use super::Signal;
use crate::Result;

/// A signal that fires when it is [`set`](Flag::set). Clones are the same flag.
///
/// A flag that is dropped without having been set never fires: whoever works sets it, also where
/// the work fails.
#[derive(Debug, Clone, Default)]
pub struct Flag(Arc<(Mutex<bool>, Condvar)>);

impl Flag {
    /// A flag that has not fired yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Fires it. Setting it again changes nothing.
    pub fn set(&self) {
        let (is_set, changed) = &*self.0;
        *is_set.lock() = true;
        changed.notify_all();
    }
}

impl Signal for Flag {
    fn wait(&self, timeout: Duration) -> Result<bool> {
        let (is_set, changed) = &*self.0;
        let mut is_set = is_set.lock();
        changed.wait_while_for(&mut is_set, |is_set| !*is_set, timeout);
        Ok(*is_set)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    #[test]
    fn it_fires_when_it_is_set_and_stays_so() {
        let flag = Flag::new();
        assert!(!flag.wait(Duration::ZERO).unwrap());
        assert!(!flag.wait(Duration::from_millis(1)).unwrap());
        flag.set();
        flag.set();
        assert!(flag.wait(Duration::ZERO).unwrap());
        assert!(flag.wait(Duration::MAX).unwrap());
    }

    #[test]
    fn everybody_who_waits_is_told() {
        let flag = Flag::new();
        thread::scope(|scope| {
            let waiters: Vec<_> = (0..3).map(|_| scope.spawn(|| flag.wait(Duration::MAX).unwrap())).collect();
            flag.clone().set();
            assert!(waiters.into_iter().all(|waiter| waiter.join().unwrap()));
        });
    }
}
