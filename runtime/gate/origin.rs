//! `Origin`: where memory comes from that another process lends to this one.

use super::Closed;
use crate::RevokeCause;

/// What whoever lends memory to this process says of it, without a message. It is looked at whenever an access begins and
/// ends, so it neither blocks nor takes long.
pub(crate) trait Origin: Send + Sync {
    /// Where the memory is now, as compared with what this process has heard.
    fn state(&self) -> OriginState;
}

/// Where memory is that another process lends.
#[cfg_attr(not(feature = "broker"), allow(dead_code, reason = "of clients of a broker"))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OriginState {
    /// It is what this process has heard of.
    Same,
    /// It was taken back, and maybe given back: this process has not heard of it yet.
    Taken,
    /// It is gone for good.
    Gone,
}

impl OriginState {
    /// Why an access to memory of `generation`, as this process counts, does not begin.
    pub(super) fn closed(self, generation: u64) -> Closed {
        let is_gone = self == Self::Gone;
        Closed { generation, cause: is_gone.then_some(RevokeCause::ExporterGone), is_gone }
    }
}
