//! [`Engine`](super::Engine): ready-made work of a device on imported buffers and images.
//!
//! An import does not need it. It is how somebody who has just imported memory sees that the device reaches it: the command
//! line's `import` and `demo`, the first program of the book, the samples and the tests all work by it, so that it is part of
//! the library.

pub(crate) mod checksum;
pub(crate) mod copy;
pub(crate) mod copy_image;
pub(crate) mod engine;
pub(crate) mod paint;
