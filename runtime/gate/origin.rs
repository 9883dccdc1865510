//! `Origin`: where memory comes from that another process lends to this one.

/// What whoever lends memory to this process says of it, without a message.
pub(crate) trait Origin: Send + Sync {
    /// Whether the memory is what this process has heard of: it was not taken back since. It is asked whenever an access ends,
    /// so it neither blocks nor takes long.
    fn is_as_heard(&self) -> bool;
}
