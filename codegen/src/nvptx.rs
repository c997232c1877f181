//! Kernels to PTX, for families whose rows or elements are independent: row-wise, element-wise, gather, sample.
//!
//! A worker is a thread of the grid; the iterations of `parallel` are dealt out to them. Products and attention have
//! schedules of their own on a GPU and are refused here.

use crate::cpu::{CodegenError, Form, emit};
use crate::lower::{Features, Pause, ending, function};
use inkwell::targets::{InitializationConfig, Target};
use ir::graph::Family;
use ir::kernel::{Kernel, Stmt};
use std::collections::BTreeSet;

/// The target's name on the command line.
pub const SM_80: &str = "cuda:sm_80";

/// A kernel's name in PTX: letters, digits and underscores.
pub fn symbol(kernel: &str) -> String {
    let plain: String = kernel.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
    format!("k_{plain}")
}

/// Has this family's kernels a form for a grid of threads?
pub fn covers(family: Family) -> bool {
    match family {
        Family::Rowwise | Family::Elementwise | Family::Gather | Family::Sample => true,
        Family::Dot | Family::Attention => false,
    }
}

/// LLVM IR of a kernel for a grid.
///
/// # Errors
///
/// [`CodegenError::Unsupported`] for a family that is not covered, or a kernel whose workers wait for each other.
pub fn llvm(kernel: &Kernel) -> Result<String, CodegenError> {
    let unsupported = |what: &str| CodegenError::Unsupported {
        kernel: kernel.name.clone(),
        target: SM_80.to_string(),
        what: what.to_string(),
    };
    if !covers(kernel.family) {
        return Err(unsupported(&format!("the {} family", kernel.family.name())));
    }
    if kernel.body.iter().any(|s| matches!(s, Stmt::Barrier)) {
        return Err(unsupported("a barrier of all workers"));
    }
    let mut needs = BTreeSet::new();
    let text = function(kernel, Features { bf16: false, pause: Pause::Grid }, &mut needs);
    Ok(text + &ending(needs))
}

/// PTX of a kernel for `sm_80` and later, in the lowest version of the ISA that has what is used (7.4).
///
/// # Errors
///
/// As [`llvm()`], or when LLVM refuses the text.
pub fn ptx(kernel: &Kernel) -> Result<String, CodegenError> {
    let text = llvm(kernel)?;
    Target::initialize_nvptx(&InitializationConfig::default());
    let ptx = emit(&text, "nvptx64-nvidia-cuda", "sm_80", "+ptx74", Form::Assembly)?;
    Ok(String::from_utf8_lossy(&ptx).trim_end_matches('\0').to_string())
}
