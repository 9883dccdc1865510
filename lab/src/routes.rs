//! What a run has found out about routes, over all its machines.

/// The table's name.
pub const TABLE: &str = "routes";
