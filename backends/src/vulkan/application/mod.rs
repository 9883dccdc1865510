//! An application's own work on what was imported: its barriers, and what it signals at its end.

pub(crate) mod record;
pub(crate) mod signal;
