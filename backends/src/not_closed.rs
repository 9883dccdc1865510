//! `NotClosed`: an error that gives back what it happened to.

use std::fmt;

use crate::Error;

/// What could not be closed, or made into something else, and why. `?` makes an [`Error`] of it and drops the
/// value; [`into_parts`](NotClosed::into_parts) gives it back, to be tried again.
#[must_use = "the value is in it, and is dropped with it"]
pub struct NotClosed<T> {
    /// Boxed, so that results stay small.
    value: Box<T>,
    error: Error,
}

impl<T> NotClosed<T> {
    /// `value` could not be closed, for the reason in `error`.
    pub fn new(value: T, error: Error) -> Self {
        Self { value: Box::new(value), error }
    }

    /// Why.
    pub fn error(&self) -> &Error {
        &self.error
    }

    /// The value, unchanged, and the error.
    pub fn into_parts(self) -> (T, Error) {
        (*self.value, self.error)
    }
}

impl<T> From<NotClosed<T>> for Error {
    fn from(not_closed: NotClosed<T>) -> Self {
        not_closed.error
    }
}

impl<T> fmt::Display for NotClosed<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

/// As the error prints: whatever the value is.
impl<T> fmt::Debug for NotClosed<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.error, f)
    }
}

impl<T> std::error::Error for NotClosed<T> {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Kind, Result};

    fn close(value: String) -> Result<(), NotClosed<String>> {
        Err(NotClosed::new(value, Error::new(Kind::StillInUse, "close a device", "it is mapped")))
    }

    #[test]
    fn the_question_mark_takes_it_and_the_value_can_be_had_back() {
        let ask = || -> Result<()> { Ok(close("device".into())?) };
        assert_eq!(ask().unwrap_err().kind(), Kind::StillInUse);
        let not_closed = close("device".into()).unwrap_err();
        assert_eq!(format!("{not_closed:?}"), "cannot close a device: it is mapped");
        let (value, error) = not_closed.into_parts();
        assert_eq!((value.as_str(), error.kind()), ("device", Kind::StillInUse));
    }
}
