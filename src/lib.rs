//! llamac: a tensor compiler and kernel generator for LLaMA-family models.
//!
//! * [`model`]: the MODEL argument of every verb.
//! * [`pipeline`]: a model's graphs through every pass to kernels and a plan.
//! * [`weights`]: a checkpoint's tensors in the order and packing that the plan wants.
//! * [`predict`]: what a plan's steps cost, and how long they take at least.
//! * [`diff`]: what differs between two plans, kernel by kernel.
//! * [`eval`]: how well a model predicts text, over any device.
//! * [`profile`]: the time of each kernel of a step.
//! * [`sass`]: machine code of GPUs as text.
//! * [`sampled`]: some rows of what a large step's kernels stored, judged.
//! * [`judge`]: what counts as right; the only place with tolerances.
//! * [`file_error`]: why a file that belongs to a comparison cannot be used.
//! * [`mod@reference`]: files that say what a model's logits are; [`compare`]: a program against them and the checkpoint.
//! * [`measure`]: the time of one kernel alone.
//! * [`check`]: kernels judged one by one.
//! * [`tune`]: schedules chosen by measuring.
//! * [`compile`] (feature `compiler`): code for each target, and the artifact.

pub mod check;
pub mod compare;
#[cfg(feature = "compiler")]
pub mod compile;
pub mod diff;
pub mod eval;
pub mod file_error;
pub mod judge;
pub mod measure;
pub mod model;
pub mod pipeline;
pub mod predict;
pub mod profile;
pub mod reference;
pub mod sampled;
pub mod sass;
pub mod tune;
pub mod weights;
