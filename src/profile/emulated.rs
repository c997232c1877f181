//! Bank conflicts of kernels, counted where their PTX is emulated.

use crate::measure;
use codegen::cpu::CodegenError;
use codegen::nvptx::{self, Architecture};
use ir::kernel::{Access, Expr, Kernel, Space, Stmt};
use runtime::emulator::{Counts, Grid, KernelCounts, Memory, Options, Program, Report, Sums};
use runtime::gpu;
use runtime::ptx::{Module, PtxError};
use runtime::tensor_map::{TensorMap, TensorMapError};
use std::sync::Arc;

/// Why a kernel cannot be emulated.
#[derive(Debug, thiserror::Error)]
pub enum EmulationError {
    /// LLVM refuses it.
    #[error(transparent)]
    Codegen(#[from] CodegenError),
    /// The emulator does not know its PTX.
    #[error("PTX of generated code")]
    Ptx(#[from] PtxError),
    /// A tensor map that no driver takes.
    #[error(transparent)]
    Map(#[from] TensorMapError),
    /// It does something wrong.
    #[error("generated code: {0}")]
    Report(Box<Report>),
}

/// What a launch of a kernel does, in the first turn of each loop over turns, with zeros for all numbers: which banks are met
/// depends on neither. `tokens` behind `past` others are in the step, whose positions are the parameter of that number.
///
/// # Errors
///
/// What LLVM or the emulator says.
pub fn first_turns(
    architecture: &Architecture,
    kernel: &Kernel,
    positions: Option<usize>,
    [tokens, past]: [usize; 2],
) -> Result<KernelCounts, EmulationError> {
    let mut first = kernel.clone();
    take_one(&mut first.body);
    let ptx = nvptx::compile(&nvptx::llvm(std::slice::from_ref(&first), architecture)?, architecture)?;
    let module = Module::parse(&ptx)?;
    let mut memory = Memory::new();
    let mut addresses = Vec::new();
    let symbols = measure::symbols([tokens, past]);
    for (number, ((_, buffer), bytes)) in kernel.params().zip(measure::sizes(kernel, &symbols)).enumerate() {
        addresses.push(if positions == Some(number) {
            let address = memory.allocate(&buffer.name, bytes);
            let positions = (past..past + tokens).flat_map(|at| (at as i32).to_le_bytes());
            memory.write(address, &positions.collect::<Vec<u8>>());
            address
        } else if buffer.space == Space::Global(Access::Read) {
            // No memory is taken for zeros that nobody reads.
            memory.borrow(&buffer.name, Arc::new(vec![0_u8; bytes]), 0..bytes)
        } else {
            let address = memory.allocate(&buffer.name, bytes);
            memory.write(address, &vec![0; bytes]);
            address
        });
    }
    let mut params: Vec<u8> = addresses.iter().flat_map(|address| address.to_le_bytes()).collect();
    params.extend(kernel.symbols.0.iter().zip(symbols).flat_map(|(_, value)| (value as i32).to_le_bytes()));
    let sm = architecture.cpu.parse().expect("the emulator knows every architecture");
    let options = Options { sm, seed: 0, sums: Sums::default() };
    let mut counts = Counts::default();
    for phase in first.phases() {
        let code = module.kernel(&nvptx::symbol(&phase.name)).expect("it was compiled");
        let program = Program::new(code);
        let grid = Grid {
            ctas: [1, 1, 1],
            threads: [phase.threads.into(), 1, 1],
            cluster: program.cluster(),
            dynamic_shared: phase.shared_bytes() as u32,
            dependent: false,
        };
        let maps = gpu::tensor_maps(&phase, &addresses, &symbols);
        let maps = maps.iter().map(TensorMap::encode).collect::<Result<Vec<_>, _>>()?;
        let ran = program.launch(&grid, &gpu::with_maps(&params, maps), &mut memory, &options);
        counts += ran.map_err(|report| EmulationError::Report(Box::new(report)))?;
    }
    Ok(counts.total())
}

/// Leaves one turn to each loop over turns; groups of threads may have loops of their own.
fn take_one(block: &mut [Stmt]) {
    for stmt in block {
        match stmt {
            Stmt::Parallel { count, .. } => *count = Expr::Int(1),
            Stmt::If { then, otherwise, .. } => {
                [then, otherwise].into_iter().for_each(|block| take_one(block))
            }
            _ => {}
        }
    }
}
