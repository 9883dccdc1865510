//! `InFlight`: an access that lasts until a device is done.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use peervram_backends::Importer;

use crate::Outcome;
use crate::attachment::Attachment;
use crate::gate::InFlight as GateInFlight;

/// An access that lasts until a device is done. Dropping it ends nothing: the signal does.
#[must_use = "it says how the work ended, and when what the signal looks at may be destroyed"]
pub struct InFlight<I: Importer> {
    attachment: Attachment<I>,
    in_gate: Arc<GateInFlight>,
}

impl<I: Importer> InFlight<I> {
    pub(crate) fn new(attachment: Attachment<I>, in_gate: Arc<GateInFlight>) -> Self {
        Self { attachment, in_gate }
    }

    /// Waits for the end, at most `timeout`, and says how it ended. Nothing where it goes on, or where its signal
    /// is lost and nobody can know.
    ///
    /// An outcome also says that the signal was dropped and that no thread looks at it: what it is made of, a
    /// `VkFence` for example, may be destroyed or used again. On a [staged](crate::Path::Staged) path the wait goes
    /// on beyond `timeout` where this thread is the one that copies back.
    pub fn wait(&self, timeout: Duration) -> Option<Outcome> {
        self.attachment.inner().gate.settle(&self.in_gate, timeout)
    }

    /// Ends it, signal or not. You say that the device is done: that it was lost, for example. On a staged
    /// path nothing is copied back then.
    ///
    /// Blocks until no thread looks at the signal any more, as after [`InFlight::wait`]. One that looks does so for
    /// up to 50 ms at a time.
    pub fn abandon(self) -> Outcome {
        self.attachment.inner().gate.give_up(&self.in_gate)
    }
}

impl<I: Importer> fmt::Debug for InFlight<I> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InFlight").field("gate", &self.attachment.inner().gate).finish_non_exhaustive()
    }
}
