//! A topology as it would be: what a fix changes, so that the same prediction can be asked of the outcome.
//!
//! Pure, and nothing on the machine changes.

use super::{Above, Acs, Place, Reading, Topology};
use crate::PciAddress;

impl Topology {
    /// This topology with access control that redirects nothing at these functions.
    #[must_use]
    pub fn without_redirects(&self, at: &[PciAddress]) -> Self {
        self.changed(|place| {
            if let (true, Reading::Known(config)) = (at.contains(&place.address()), &mut place.config) {
                config.clear_acs_control(Acs::REDIRECTS);
            }
        })
    }

    /// This topology with a function below another bridge, as if the card had been put into that slot.
    #[must_use]
    pub fn moved(&self, function: PciAddress, below: PciAddress) -> Self {
        self.changed(|place| {
            if place.address() == function {
                place.above = Above::Bridge(below);
            }
        })
    }

    /// This topology with another kernel release.
    #[must_use]
    pub fn with_kernel_release(&self, release: &str) -> Self {
        Self { kernel_release: Reading::Known(release.to_owned()), ..self.clone() }
    }

    /// Functions on the bus of a bridge, in order.
    pub fn below(&self, bridge: PciAddress) -> impl Iterator<Item = &Place> {
        self.places.iter().filter(move |place| place.above == Above::Bridge(bridge))
    }

    fn changed(&self, change: impl FnMut(&mut Place)) -> Self {
        let mut changed = self.clone();
        changed.places.iter_mut().for_each(change);
        changed
    }
}
