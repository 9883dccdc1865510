//! A guarded owner.

use std::sync::Arc;

use peervram_backends::{Aperture, DmaRanges, Engine, Owner};

use super::engine::{GuardedEngine, OfOwner};
use super::{Hook, ask, call};
use crate::Result;

/// What an owner is called that cannot be asked.
const NAMELESS: &str = "an owner";

/// An aperture whose owner is guarded, where it has one.
pub(crate) fn guard_owner(aperture: Aperture) -> Aperture {
    if aperture.owner().is_none() {
        return aperture;
    }
    let ranges = aperture.ranges().clone();
    Aperture::owned(ranges, Arc::new(Guard(GuardedEngine(OfOwner(aperture)))))
}

/// The owner of an aperture, with its engine.
struct Guard(GuardedEngine<OfOwner>);

impl Guard {
    fn owner(&self) -> &dyn Owner {
        let OfOwner(aperture) = &self.0.0;
        aperture.owner().expect("only an aperture with an owner is guarded")
    }

    fn whose(&self) -> String {
        self.owner().name().to_owned()
    }
}

#[deny(clippy::missing_trait_methods)]
impl Owner for Guard {
    fn name(&self) -> &str {
        ask(Hook::OwnerName, String::new, NAMELESS, || self.owner().name())
    }

    fn flush(&self, ranges: &DmaRanges) -> Result<()> {
        call(Hook::OwnerFlush, || self.whose(), || self.owner().flush(ranges))
    }

    fn invalidate(&self, ranges: &DmaRanges) -> Result<()> {
        call(Hook::OwnerInvalidate, || self.whose(), || self.owner().invalidate(ranges))
    }

    fn quiesce(&self, ranges: &DmaRanges) -> Result<()> {
        call(Hook::OwnerQuiesce, || self.whose(), || self.owner().quiesce(ranges))
    }

    fn resume(&self, ranges: &DmaRanges) -> Result<()> {
        call(Hook::OwnerResume, || self.whose(), || self.owner().resume(ranges))
    }

    fn engine(&self) -> Option<&dyn Engine<DmaRanges>> {
        let has_engine = || self.owner().engine().is_some();
        ask(Hook::OwnerEngine, || self.whose(), false, has_engine).then_some(&self.0 as _)
    }
}
