//! Tests at the crate's boundary, one module a subject, one binary.

mod fake;

mod artifact;
mod conformance;
mod device;
mod generate;
mod map;
mod pool;
mod sample;
mod text;
