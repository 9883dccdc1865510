//! Host memory imported into a real Vulkan driver.
//!
//! Runs on whatever `libvulkan.so.1` finds; Mesa's lavapipe is enough (from version 25 on it takes
//! a memfd for a dma-buf, before that host pointers only). Without a loader, a device, or the
//! extension that a test is about, the test skips aloud; `PEERVRAM_REQUIRE_VULKAN=1` makes a
//! missing device a failure.
//!
//! `PEERVRAM_REQUIRE_VALIDATION=1` says that Khronos' validation layers watch, as `cargo xtask test` has it, and makes it a
//! failure where they do not.
#![cfg(all(feature = "vulkan", feature = "host"))]

mod application;
mod crossing;
mod exported;
mod images;
mod machine;
mod pretended;
mod refusals;
mod signal;
mod validation;
