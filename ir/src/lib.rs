//! The middle of llamac: what is computed (graph IR), how one kernel computes it (kernel IR), and which
//! kernels run on which bytes (plan). Each level has types, a printer, a parser, a verifier and an
//! interpreter. Nothing here knows LLVM, a file or a device.

#![forbid(unsafe_code)]

pub mod dim;
pub mod dtype;
pub mod graph;
pub mod interp;
pub mod op;
pub mod parse;
pub mod print;
pub mod random;
pub mod verify;

pub mod cost;
pub mod families;
pub mod kernel;
pub mod passes;
pub mod plan;
pub mod schedule;
pub mod target;

pub use dim::Dim;
pub use dtype::DType;
pub use graph::{Graph, ValueId};
pub use op::Op;
