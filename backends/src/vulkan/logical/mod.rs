//! A `VkDevice` as everything else stands on it: handles and functions, queues, commands. It knows of no buffer or image.

pub(crate) mod commands;
pub(crate) mod device;
pub(crate) mod families;
pub(crate) mod queue;
