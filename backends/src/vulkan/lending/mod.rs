//! Memory of a Vulkan device's own, given to others: lent as a dma-buf, or shared within one driver.

pub(crate) mod device_memory;
pub(crate) mod opaque;
