//! How a device copies bytes: the engines that verification and staged copies use, and what work on a device is made of
//! (shaders, staging memory, its clock).

pub(crate) mod copy_engine;
pub(crate) mod lazy;
pub(crate) mod pipeline;
pub(crate) mod staging;
pub(crate) mod stopwatch;
