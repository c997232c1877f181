//! Kernel IR to machine code.
//!
//! [`lower`] writes LLVM IR text, one `match` an op; [`math`] has the vector functions that it calls; [`cpu`] knows the
//! CPU levels and makes objects; [`link`] makes them loadable; [`nvptx`] knows the GPU architectures and makes PTX;
//! [`ptxas`] makes machine code of PTX, where NVIDIA's assembler is; [`backend`] is all of them by name. LLVM parses the text,
//! optimises and emits: nothing else in llamac knows it.

pub mod backend;
pub mod cpu;
pub mod link;
pub mod lower;
pub mod math;
pub mod nvptx;
pub mod ptxas;

pub use backend::Backend;
