//! Mechanism.
