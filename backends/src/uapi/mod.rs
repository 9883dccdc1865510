//! Kernel structs.
