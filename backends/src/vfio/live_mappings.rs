//! The live mappings of a device, so that all of them can be swapped for shadow memory at once.
//!
//! A mapping made while the others are shadowed starts as shadow memory: its maker may not know that the memory is
//! away.

use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use crate::{Error, Kind, Mapping, Result};

/// The mappings that were made and not dropped yet.
#[derive(Debug, Default)]
pub(super) struct LiveMappings(Mutex<Live>);

#[derive(Debug, Default)]
struct Live {
    state: State,
    mappings: Vec<Weak<Mapping>>,
}

/// What a mapping that is made now begins as.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum State {
    #[default]
    Mapped,
    Shadowed,
    Buried,
}

impl LiveMappings {
    /// Makes a mapping, and keeps it in mind.
    pub(super) fn make(&self, make: impl FnOnce() -> Result<Mapping>) -> Result<Arc<Mapping>> {
        let mut live = self.0.lock();
        if live.state == State::Buried {
            return Err(Error::new(Kind::Gone, "map a BAR", "the device is being closed")
                .next("open the device again"));
        }
        let mapping = Arc::new(make()?);
        if live.state == State::Shadowed {
            mapping.shadow()?;
        }
        live.mappings.retain(|mapping| mapping.strong_count() > 0);
        live.mappings.push(Arc::downgrade(&mapping));
        Ok(mapping)
    }

    pub(super) fn shadow(&self) -> Result<()> {
        let mut live = self.0.lock();
        if live.state == State::Mapped {
            live.state = State::Shadowed;
        }
        live.each(Mapping::shadow)
    }

    pub(super) fn unshadow(&self) -> Result<()> {
        let mut live = self.0.lock();
        if live.state == State::Shadowed {
            live.state = State::Mapped;
        }
        live.each(Mapping::unshadow)
    }

    pub(super) fn retire(&self) -> Result<()> {
        let mut live = self.0.lock();
        live.state = State::Buried;
        live.each(Mapping::retire)
    }
}

impl Live {
    /// Does that to every mapping, and tells the first error.
    fn each(&self, act: impl Fn(&Mapping) -> Result<()>) -> Result<()> {
        let mut result = Ok(());
        for mapping in self.mappings.iter().filter_map(Weak::upgrade) {
            result = result.and(act(&mapping));
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn make(file: &Arc<std::fs::File>) -> Result<Mapping> {
        Mapping::new(file.clone(), &[(0, 4096)])
    }

    fn file() -> Arc<std::fs::File> {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        Arc::new(file)
    }

    #[test]
    fn mappings_share_their_devices_state_from_birth() {
        let (file, mappings) = (file(), LiveMappings::default());
        let first = mappings.make(|| make(&file)).unwrap();
        mappings.shadow().unwrap();
        let second = mappings.make(|| make(&file)).unwrap();
        assert!(first.is_shadowed() && second.is_shadowed());
        mappings.unshadow().unwrap();
        let third = mappings.make(|| make(&file)).unwrap();
        assert!(!first.is_shadowed() && !second.is_shadowed() && !third.is_shadowed());
    }

    #[test]
    fn what_was_dropped_is_forgotten() {
        let (file, mappings) = (file(), LiveMappings::default());
        for _ in 0..10 {
            drop(mappings.make(|| make(&file)).unwrap());
        }
        let _live = mappings.make(|| make(&file)).unwrap();
        assert_eq!(mappings.0.lock().mappings.len(), 1);
        assert_eq!(Arc::strong_count(&file), 2);
    }

    #[test]
    fn after_a_burial_nothing_holds_the_device_and_nothing_is_mapped() {
        let (file, mappings) = (file(), LiveMappings::default());
        let mapping = mappings.make(|| make(&file)).unwrap();
        mappings.retire().unwrap();
        assert_eq!(Arc::strong_count(&file), 1);
        assert_eq!(mappings.make(|| make(&file)).unwrap_err().kind(), Kind::Gone);
        assert_eq!(mappings.unshadow().unwrap_err().kind(), Kind::Gone);
        mappings.shadow().unwrap();
        assert!(mapping.is_shadowed());
    }
}
