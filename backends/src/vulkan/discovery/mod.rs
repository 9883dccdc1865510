//! What there is before a device is made: the loader and its instance, physical devices and their extensions, and which of
//! them is meant. Nothing here makes a `VkDevice`.

pub(crate) mod extensions;
pub(crate) mod import_policy;
pub(crate) mod instance;
pub(crate) mod physical_device;
pub(crate) mod selector;
