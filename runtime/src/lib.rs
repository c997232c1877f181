//! Runs what llamac compiled. There is no compiler here: an artifact goes in, text comes out.
//!
//! In reading order:
//!
//! * [`map`]: files and memory from the kernel.
//! * [`whole_file`]: files that are whole or not there.
//! * [`artifact`]: the file that `compile` writes and everything else opens.
//! * [`device`]: what a device is: programs, steps, states, errors.
//! * [`manifest`]: what an artifact says of itself.
//! * [`pool`]: the worker threads of a CPU device; [`code`]: generated code and how it is called; [`cpu`]: the device
//!   that does.
//! * [`interpreter`]: the oracle as a device; [`null`]: the device that only checks.
//! * [`fill`]: weights from a seed, made on a GPU.
//! * [`gpu`]: what GPUs have in common, [`tensor_map`]: what they are told of tensors; [`cuda`]: the device that runs on
//!   them; [`ptx_emulator`]: the one that emulates them.
//! * [`launcher`]: kernels launched by themselves on either.
//! * [`meter`]: how fast this machine can read and multiply, which is what speeds are measured against.
//! * [`gpu_meter`]: the same of a GPU.
//! * [`ptx`]: PTX text as a typed module: every instruction that kernels use, by name; [`emulator`] runs it, and says what
//!   is wrong with it.
//! * [`conformance`]: each instruction alone, on the emulator and on a GPU, judged by what the PTX ISA says.
//! * [`sample`]: the next token from logits.
//! * [`text`]: text from the bytes of tokens, as they come.
//! * [`generate`]: the loop over all of these.
//!
//! `unsafe` lives where memory, threads and generated code meet; each block cites an invariant from its file's head.

pub mod artifact;
pub mod code;
pub mod conformance;
pub mod cpu;
pub mod cuda;
pub mod device;
pub mod emulator;
pub mod fill;
pub mod generate;
pub mod gpu;
pub mod gpu_meter;
pub mod interpreter;
pub mod launcher;
pub mod manifest;
pub mod map;
pub mod meter;
pub mod null;
pub mod pool;
pub mod ptx;
pub mod ptx_emulator;
pub mod sample;
pub mod tensor_map;
pub mod text;
pub mod whole_file;
