//! `PaintingOwner`: lends a device's memory from the demo's own process, and paints it for a client that can only show.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use peervram::backends::{Aperture, DmaRange, DmaRanges, Exporter as _, Mapping, Owner, PciAddress};
use peervram::broker::{Broker, Offer, Policy, Rule, Who};
use peervram::{Lender, Result};

use crate::arguments::ranges_of;
use crate::opened::Opened;
use crate::picture::{Picture, layout_of, of_bytes};

/// By which name the memory is lent.
pub const MEMORY: &str = "vram";

/// A broker in this process, and the brush.
pub struct PaintingOwner {
    painter: Arc<Painter>,
    // Fields drop in this order: a broker lets go of the lender.
    _broker: Broker,
    _lender: Arc<Lender<Opened>>,
}

impl PaintingOwner {
    /// Lends the beginning of the VRAM of `address`, room for `picture`, to user number `user`.
    pub fn serve(
        address: PciAddress,
        size_bytes: u64,
        picture: &Picture,
        user: u32,
        socket: &Path,
    ) -> Result<Self> {
        let device = crate::reset::open(address)?;
        let ranges = ranges_of(&device, None, &[DmaRange::new(0, size_bytes)])?;
        let painter = Arc::new(Painter { view: device.map(&ranges)?, picture: Mutex::new(picture.clone()) });
        let lender = Arc::new(Lender::new(device));
        let aperture = Aperture::owned(ranges, Arc::clone(&painter) as _);
        let offer = Offer::with_reset(MEMORY, &lender, aperture, |lender, options| lender.reset(options))?;
        let policy = Policy::owner_only().and(Rule::allow(Who::User(user)));
        let broker = Broker::serve(Broker::listen(socket)?, vec![offer], policy)?;
        Ok(Self { painter, _broker: broker, _lender: lender })
    }

    /// Paints what is to be seen first: a lease begins with zeros.
    pub fn paint(&self) -> Result<()> {
        self.painter.paint()
    }

    /// What is painted when the memory comes back.
    pub fn set_next(&self, picture: &Picture) {
        *self.painter.picture.lock().unwrap_or_else(PoisonError::into_inner) = picture.clone();
    }

    /// What the owner sees in the memory.
    pub fn seen(&self) -> Result<Picture> {
        let layout = layout_of(&self.painter.picture.lock().unwrap_or_else(PoisonError::into_inner));
        let mut bytes = vec![0; layout.end_bytes() as usize];
        self.painter.view.read(0, &mut bytes)?;
        of_bytes(layout, bytes)
    }
}

/// Answers for plain memory, and paints it anew whenever it was taken back.
struct Painter {
    view: Arc<Mapping>,
    picture: Mutex<Picture>,
}

impl Painter {
    fn paint(&self) -> Result<()> {
        self.view.write(0, self.picture.lock().unwrap_or_else(PoisonError::into_inner).bytes())
    }
}

impl Owner for Painter {
    fn name(&self) -> &str {
        "the demo's owner"
    }

    fn flush(&self, _: &DmaRanges) -> Result<()> {
        Ok(())
    }

    fn invalidate(&self, _: &DmaRanges) -> Result<()> {
        Ok(())
    }

    fn quiesce(&self, _: &DmaRanges) -> Result<()> {
        Ok(())
    }

    fn resume(&self, _: &DmaRanges) -> Result<()> {
        self.paint()
    }
}
