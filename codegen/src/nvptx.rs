//! Kernels to PTX, for families whose rows or elements are independent: row-wise, element-wise, gather, sample.
//!
//! A worker is a thread of the grid; the iterations of `parallel` are dealt out to them, so any grid computes the whole. A
//! kernel's parameters are the addresses of its buffers, then its symbols as 64-bit integers, each in the order of its
//! text. Products and attention need schedules of their own on a GPU and are refused here.

use crate::cpu::{CodegenError, Form, PASSES, emit};
use crate::lower::{Features, Pause, ending, function};
use inkwell::targets::{InitializationConfig, Target};
use ir::graph::Family;
use ir::kernel::{Kernel, Space, Stmt};
use std::collections::BTreeSet;

/// The target's name on the command line.
pub const SM_80: &str = "cuda:sm_80";

/// What schedules may count on: the 255 registers of four bytes that a thread can name.
pub fn target() -> ir::target::Target {
    ir::target::Target { name: SM_80.to_string(), vector_registers: 255, vector_bytes: 4 }
}

/// A kernel's name in PTX, which knows no dots: `q.1` is `k_q$1`.
pub fn symbol(kernel: &str) -> String {
    format!("k_{}", kernel.replace('.', "$"))
}

/// Is there a form of this kernel for a grid of threads?
///
/// # Errors
///
/// [`CodegenError::Unsupported`], which names what is missing.
pub fn check(kernel: &Kernel) -> Result<(), CodegenError> {
    let what = match kernel.family {
        Family::Dot => "a product (its tiles need shared memory and mma.sync)",
        Family::Attention => "attention (its tiles need shared memory, mma.sync and cp.async)",
        Family::Rowwise | Family::Elementwise | Family::Gather | Family::Sample => {
            if kernel.body.iter().any(|s| matches!(s, Stmt::Barrier)) {
                "a barrier of all workers"
            } else if kernel.buffers.iter().any(|b| b.space == Space::Local) {
                "memory on the stack"
            } else {
                return Ok(());
            }
        }
    };
    Err(CodegenError::Unsupported {
        kernel: kernel.name.clone(),
        target: SM_80.to_string(),
        what: what.to_string(),
    })
}

/// PTX of a module of kernels for `sm_80` and later, in the lowest version of the ISA that has what is used (7.4).
///
/// # Errors
///
/// As [`check`], or when LLVM refuses the text.
pub fn ptx(kernels: &[&Kernel]) -> Result<String, CodegenError> {
    let mut text = String::new();
    let mut needs = BTreeSet::new();
    for kernel in kernels {
        check(kernel)?;
        text += &function(kernel, Features { bf16: false, pause: Pause::Grid }, &mut needs);
    }
    text += &ending(needs);
    Target::initialize_nvptx(&InitializationConfig::default());
    // A call would pass 16 lanes through parameter memory.
    let passes = format!("always-inline,{PASSES}");
    let ptx = emit(&text, "nvptx64-nvidia-cuda", "sm_80", "+ptx74", &passes, Form::Assembly)?;
    Ok(String::from_utf8_lossy(&ptx).trim_end_matches('\0').to_string())
}
