//! `Lazy`: an object of a device that is made at its first use, and may fail to be.

use std::sync::Arc;

use crate::Result;

/// An object, once somebody asked for it.
pub(crate) struct Lazy<T>(Option<Arc<T>>);

impl<T> Lazy<T> {
    /// Nothing yet.
    pub(crate) const fn new() -> Self {
        Self(None)
    }

    /// The object, made by `make` if it is not there.
    pub(crate) fn get(&mut self, make: impl FnOnce() -> Result<T>) -> Result<Arc<T>> {
        if let Some(value) = &self.0 {
            return Ok(Arc::clone(value));
        }
        let value = Arc::new(make()?);
        self.0 = Some(Arc::clone(&value));
        Ok(value)
    }

    /// Lets go of one that will not do, so that the next [`get`](Lazy::get) makes another.
    pub(crate) fn drop_if(&mut self, will_not_do: impl FnOnce(&T) -> bool) {
        self.0.take_if(|value| will_not_do(value));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Error, Kind};

    #[test]
    fn an_object_is_made_once_and_again_after_a_failure() {
        let mut slot = Lazy::new();
        assert!(slot.get(|| Err(Error::new(Kind::Vulkan, "test", "not yet"))).is_err());
        assert_eq!(*slot.get(|| Ok(1)).unwrap(), 1);
        assert_eq!(*slot.get(|| Ok(2)).unwrap(), 1);
        slot.drop_if(|value| *value == 1);
        assert_eq!(*slot.get(|| Ok(3)).unwrap(), 3);
    }
}
