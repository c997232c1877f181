//! Kernels to PTX.
//!
//! A worker is a CTA; the iterations of `parallel` are dealt out to the CTAs of the grid, so any grid computes the whole. A
//! kernel's parameters are the addresses of its buffers, then its symbols as 32-bit integers, each in the order of its
//! text, then its tensor maps, 128 bytes each at multiples of 64. Its shared memory is dynamic: the launch says how much, as [`ir::kernel::Kernel::shared_bytes`] does. A kernel with
//! barriers is an entry for each of its phases ([`Kernel::phases`]), with the parameters of the whole.
//!
//! On sm_90a grids may begin before those before them have ended: a phase that does not say where it waits for that
//! ([`ir::kernel::warpgroup`]) does so at its beginning.

use crate::cpu::{CodegenError, Form, PASSES, emit};
use crate::lower::threads::scopes;
use crate::lower::{Features, Pause, declare_shared, ending, function};
use inkwell::targets::{InitializationConfig, Target};
use ir::kernel::warpgroup::Warpgroup;
use ir::kernel::{Buffer, Kernel, Stmt};
use std::collections::BTreeSet;

/// A GPU that PTX can be made for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Architecture {
    /// As on the command line: `cuda:sm_80`. No two have one.
    pub name: &'static str,
    /// LLVM's name of it, which is PTX's.
    pub cpu: &'static str,
    /// LLVM's feature for the lowest version of the ISA that has what is used.
    pub isa: &'static str,
    /// What it is, in a line.
    pub meaning: &'static str,
    /// Bytes of shared memory that a kernel's CTA may use. One machine may have several: GPUs differ in what they allow.
    pub shared_bytes: usize,
    /// Has it what [`ir::kernel::warpgroup`] tells of?
    pub warpgroups: bool,
}

/// LLVM's name of the machine.
pub(crate) const TRIPLE: &str = "nvptx64-nvidia-cuda";

/// Version of how kernels are called: their parameters, names and shared memory. `runtime::gpu` has the same number.
pub const ABI: u32 = 1;

/// Every architecture.
pub const ARCHITECTURES: [Architecture; 3] = [
    Architecture {
        name: "cuda:sm_80",
        cpu: "sm_80",
        isa: "+ptx74",
        meaning: "NVIDIA GPUs from Ampere (2020) on with 163 KiB of shared memory for a CTA, as A100",
        shared_bytes: 163 << 10,
        warpgroups: false,
    },
    Architecture {
        name: "cuda:sm_80-99k",
        cpu: "sm_80",
        isa: "+ptx74",
        meaning: "the same with 99 KiB: all NVIDIA GPUs from Ampere on, as GeForce RTX 30 to 50",
        shared_bytes: 99 << 10,
        warpgroups: false,
    },
    Architecture {
        name: "cuda:sm_90a",
        cpu: "sm_90a",
        isa: "+ptx80",
        meaning: "NVIDIA Hopper GPUs (H100, H200), and no others",
        shared_bytes: 227 << 10,
        warpgroups: true,
    },
];

/// All architectures of a machine: `sm_80`.
pub fn of_machine(cpu: &str) -> impl Iterator<Item = &'static Architecture> {
    ARCHITECTURES.iter().filter(move |a| a.cpu == cpu)
}

/// The architecture of that name.
pub fn architecture(name: &str) -> Option<&'static Architecture> {
    ARCHITECTURES.iter().find(|a| a.name == name)
}

impl Architecture {
    /// What schedules ask.
    pub fn target(&self) -> ir::target::Target {
        ir::target::Target::gpu(self.name, self.shared_bytes, self.warpgroups)
    }
}

/// A kernel's name in PTX, which knows no dots: `q.1` is `k_q$1`, and its second phase `k_q$1$$1`.
pub fn symbol(kernel: &str) -> String {
    format!("k_{}", kernel.replace('.', "$"))
}

/// The kernel of that name in PTX.
pub fn kernel(symbol: &str) -> String {
    symbol.strip_prefix("k_").unwrap_or(symbol).replace('$', ".")
}

/// Can PTX for this architecture be made of this kernel?
///
/// # Errors
///
/// [`CodegenError::Unsupported`], which names what is missing.
pub fn check(kernel: &Kernel, architecture: &Architecture) -> Result<(), CodegenError> {
    let large = |buffer: &&Buffer| {
        let bytes = buffer.span().checked_mul(buffer.dtype.bytes(1) as i64);
        bytes.is_none_or(|bytes| bytes >= 1 << 33) || buffer.span() > i64::from(i32::MAX)
    };
    let what = if kernel.threads == 1 {
        "a worker of one thread".to_string()
    } else if kernel.needs_warpgroups() && !architecture.warpgroups {
        "a statement of warpgroups".to_string()
    } else if kernel.shared_bytes() > architecture.shared_bytes as i64 {
        format!("{} bytes of shared memory, beyond {},", kernel.shared_bytes(), architecture.shared_bytes)
    } else if let Some(buffer) = kernel.buffers.iter().find(large) {
        format!("%{}, whose indices have more than 32 bits,", buffer.name)
    } else {
        return Ok(());
    };
    Err(CodegenError::Unsupported {
        kernel: kernel.name.clone(),
        target: architecture.name.to_string(),
        what,
    })
}

/// PTX of a module's text, in the lowest version of the ISA that has what is used.
///
/// # Errors
///
/// When LLVM refuses the text, which is a fault of [`crate::lower`].
pub fn compile(llvm: &str, architecture: &Architecture) -> Result<String, CodegenError> {
    Target::initialize_nvptx(&InitializationConfig::default());
    // A call would pass vectors through parameter memory.
    let passes = format!("always-inline,{PASSES}");
    let ptx = emit(llvm, TRIPLE, architecture.cpu, architecture.isa, &passes, Form::Assembly)?;
    Ok(String::from_utf8_lossy(&ptx).trim_end_matches('\0').to_string())
}

/// LLVM IR text of a module of kernels.
///
/// # Errors
///
/// As [`check`].
pub fn llvm(kernels: &[Kernel], architecture: &Architecture) -> Result<String, CodegenError> {
    let mut text = declare_shared(kernels);
    let mut needs = BTreeSet::new();
    for kernel in kernels {
        check(kernel, architecture)?;
        for mut phase in kernel.phases() {
            if architecture.warpgroups && !phase.awaits_grids() {
                phase.body.insert(0, Stmt::Warpgroup(Warpgroup::AwaitGrids));
            }
            text += &function(&phase, Features { bf16: true, pause: Pause::Grid }, &mut needs);
        }
    }
    let buffers = kernels.iter().map(|kernel| kernel.buffers.len()).max().unwrap_or(0);
    Ok(text + &ending(needs) + &scopes(buffers))
}
