//! The run: many tests on many machines, and what is told of it.

pub mod report;
pub mod routes;
mod schedule;
pub mod suite;
mod table;
