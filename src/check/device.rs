//! Where a launch runs: code on this CPU, on a GPU or on the emulator of one, the kernel interpreter, or nowhere.
//!
//! Code comes from the compiler, where there is one (feature `compiler`), or is given.

#[cfg(feature = "compiler")]
mod compiled;

use crate::compare::memory::{decode, positions};
#[cfg(feature = "compiler")]
use codegen::{
    Backend,
    cpu::{CodegenError, Level},
    nvptx::{self, Architecture},
};
#[cfg(feature = "compiler")]
pub use compiled::Compiled;
use ir::DType;
use ir::dim::MAX_SYMBOLS;
use ir::families::Arg;
use ir::kernel::interp::{self, Fault, KBuffer};
use ir::kernel::{Access, Buffer, Kernel, Space, verify};
use runtime::device::DeviceError;
use runtime::emulator::{self, Grid, Memory, Report, Sm, Sums};
use runtime::gpu;
use runtime::launcher::{Block, Launcher, Loaded};
use runtime::map::MapError;
use runtime::ptx::{Module, PtxError};
use runtime::tensor_map::TensorMapError;
#[cfg(feature = "compiler")]
use runtime::{code::CodeError, conformance::Machine, cuda::context::Context};
use std::ops::Range;
#[cfg(feature = "compiler")]
use std::sync::Arc;

/// What a parameter holds before a launch, in the order of its index space; `None` where the launch has to write it all.
pub type Held = Option<Vec<f64>>;

/// Why a launch is wrong, whatever its numbers are.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say what the fields are")]
pub enum LaunchError {
    #[error("memory beside `%{param}` was written, or what the kernel may only read")]
    Strayed { param: String },
    #[error("`%{param}`, element {at}: workers in another number or order store other bits")]
    Workers { param: String, at: usize },
    #[error("`%{param}`, element {at}: what is stored depends on what memory held before")]
    Leftover { param: String, at: usize },
    #[error(transparent)]
    Emulated(#[from] Box<Report>),
    #[error(transparent)]
    Fault(#[from] Box<Fault>),
    #[error(transparent)]
    Verify(#[from] Box<verify::VerifyError>),
    #[error("{args} arguments for {params} parameters")]
    Count { args: usize, params: usize },
    #[error("`%{param}` has {expected} elements, its argument {found}")]
    Size { param: String, found: usize, expected: usize },
    #[error("`%{param}` is only read, and its argument has nothing in it")]
    Empty { param: String },
    #[error("a tensor map of it: {0}")]
    Map(#[from] TensorMapError),
    #[error("no memory for a launch")]
    Memory(#[from] MapError),
    #[error(transparent)]
    Gpu(#[from] Box<DeviceError>),
}

/// Why kernels could not be made ready.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// LLVM, or the linker.
    #[cfg(feature = "compiler")]
    #[error(transparent)]
    Codegen(#[from] CodegenError),
    /// The system's loader.
    #[cfg(feature = "compiler")]
    #[error(transparent)]
    Code(#[from] CodeError),
    /// A GPU, or its driver.
    #[error(transparent)]
    Gpu(#[from] DeviceError),
    /// The emulator's reader: a fault of it, or of LLVM.
    #[error("PTX of generated code")]
    Ptx(#[from] PtxError),
}

/// Runs launches of a list of kernels.
pub enum Device {
    /// Their code for one CPU level.
    #[cfg(feature = "compiler")]
    Cpu(Box<Compiled>),
    /// Their code on a GPU.
    Gpu(Box<OnGpu>),
    /// Their PTX on the emulator.
    Emulated(Box<Emulated>),
    /// The kernel interpreter: bounds, unwritten reads, races.
    Interpreter,
    /// Verifies kernels and what is bound to them.
    Null,
}

impl Device {
    /// Compiles kernels for a GPU that is here, which runs them.
    ///
    /// # Errors
    ///
    /// What LLVM or the driver said.
    #[cfg(feature = "compiler")]
    pub fn gpu(
        gpu: &Arc<Context>,
        architecture: &Architecture,
        kernels: &[Kernel],
    ) -> Result<Device, LoadError> {
        let kernels = numbered(kernels);
        let ptx = nvptx::compile(&nvptx::llvm(&kernels, architecture)?, architecture)?;
        let launcher = Launcher::new(Machine::Gpu(gpu.clone()));
        let loaded = launcher.load(&kernels, &ptx, None)?;
        Ok(Device::of_loaded(launcher, loaded))
    }

    /// Kernels that a GPU has loaded already.
    pub fn of_loaded(launcher: Launcher, loaded: Loaded) -> Device {
        Device::Gpu(Box::new(OnGpu { launcher, loaded }))
    }

    /// Compiles kernels for a back end: a CPU's that this machine runs, or a GPU's, which the emulator runs.
    ///
    /// # Errors
    ///
    /// What LLVM, the linker or the loader said.
    #[cfg(feature = "compiler")]
    pub fn of(backend: &Backend, kernels: &[Kernel]) -> Result<Device, LoadError> {
        match backend {
            Backend::Cpu(level) => Device::cpu(level, kernels),
            Backend::Cuda(architecture) => {
                Ok(Device::Emulated(Box::new(Emulated::new(architecture, kernels)?)))
            }
        }
    }

    /// The same with another way for an emulated GPU's matrix units to add.
    pub fn adding(mut self, sums: Sums) -> Device {
        if let Device::Emulated(emulated) = &mut self {
            emulated.sums = sums;
        }
        self
    }

    /// Compiles kernels for a level that this machine runs.
    ///
    /// # Errors
    ///
    /// What LLVM, the linker or the loader said.
    #[cfg(feature = "compiler")]
    pub fn cpu(level: &Level, kernels: &[Kernel]) -> Result<Device, LoadError> {
        Ok(Device::Cpu(Box::new(Compiled::new(level, kernels)?)))
    }

    /// Runs kernel `number`, which a launch binds to `args`, on what its parameters hold; gives what they hold then, or `None` where nothing ran.
    ///
    /// # Errors
    ///
    /// What is wrong, before any number is looked at.
    pub fn run(
        &mut self,
        number: usize,
        kernel: &Kernel,
        args: &[Arg],
        held: &[Held],
        symbols: [i64; MAX_SYMBOLS],
    ) -> Result<Option<Vec<Vec<f64>>>, LaunchError> {
        check_binding(kernel, held, &symbols)?;
        match self {
            #[cfg(feature = "compiler")]
            Device::Cpu(compiled) => compiled.run(number, kernel, held, symbols).map(Some),
            Device::Gpu(gpu) => gpu.run(number, kernel, held, symbols).map(Some),
            Device::Emulated(emulated) => emulated.run(number, kernel, args, held, symbols).map(Some),
            Device::Interpreter => {
                let bound = |((_, buffer), held): ((_, &Buffer), &Held)| match held {
                    Some(data) => KBuffer::from_data(buffer, &symbols, data),
                    None => KBuffer::unwritten(buffer, &symbols),
                };
                let mut params: Vec<KBuffer> = kernel.params().zip(held).map(bound).collect();
                interp::run(kernel, &symbols, &mut params, interp::Options::default())?;
                Ok(Some(params.iter().map(KBuffer::data).collect()))
            }
            Device::Null => Ok(None),
        }
    }
}

/// A valid kernel, and for each parameter as many elements as it names.
fn check_binding(kernel: &Kernel, held: &[Held], symbols: &[i64; MAX_SYMBOLS]) -> Result<(), LaunchError> {
    verify::verify(kernel)?;
    let params = kernel.params().count();
    if params != held.len() {
        return Err(LaunchError::Count { args: held.len(), params });
    }
    for ((_, buffer), held) in kernel.params().zip(held) {
        let param = buffer.name.clone();
        match held {
            Some(data) => {
                let (found, expected) = (data.len(), positions(buffer, symbols).0.len());
                if found != expected {
                    return Err(LaunchError::Size { param, found, expected });
                }
            }
            None if buffer.space != Space::Global(Access::Write) => return Err(LaunchError::Empty { param }),
            None => {}
        }
    }
    Ok(())
}

/// PTX of kernels, for the emulator.
pub struct Emulated {
    /// Of each kernel: its phases.
    programs: Vec<Vec<emulator::Program>>,
    sm: Sm,
    sums: Sums,
}

impl Emulated {
    #[cfg(feature = "compiler")]
    fn new(architecture: &Architecture, kernels: &[Kernel]) -> Result<Emulated, LoadError> {
        let ptx = nvptx::compile(&nvptx::llvm(&numbered(kernels), architecture)?, architecture)?;
        let sm = architecture.cpu.parse().expect("the emulator knows every architecture");
        Ok(Emulated::of_ptx(&ptx, kernels.len(), sm)?)
    }

    /// The text of a module of so many kernels, named by their numbers: for who changes it.
    ///
    /// # Errors
    ///
    /// What the reader does not know.
    ///
    /// # Panics
    ///
    /// Without such kernels.
    pub fn of_ptx(ptx: &str, kernels: usize, sm: Sm) -> Result<Emulated, PtxError> {
        let module = Module::parse(ptx)?;
        let phase = |name: &str| module.kernel(&gpu::symbol(name)).map(emulator::Program::new);
        let phases = |number: usize| {
            let first = phase(&number.to_string()).expect("every kernel is in it");
            let further = (1..).map_while(|after| phase(&format!("{number}..{after}")));
            [first].into_iter().chain(further).collect()
        };
        Ok(Emulated { programs: (0..kernels).map(phases).collect(), sm, sums: Sums::default() })
    }

    /// Runs three times, in other orders of warps and with fewer CTAs: the bits must be the same. All but weights counts as what
    /// grids before may still write.
    fn run(
        &mut self,
        number: usize,
        kernel: &Kernel,
        args: &[Arg],
        held: &[Held],
        symbols: [i64; MAX_SYMBOLS],
    ) -> Result<Vec<Vec<f64>>, LaunchError> {
        let params: Vec<Param> = kernel.params().map(|(_, buffer)| Param::new(buffer, &symbols)).collect();
        let phases = kernel.phases();
        let launch = |seed: u64, turns_each: i64| -> Result<Vec<Vec<u8>>, LaunchError> {
            let mut memory = Memory::new();
            let mut bytes = Vec::new();
            let mut addresses = Vec::new();
            for (number, (param, held)) in params.iter().zip(held).enumerate() {
                let size = param.buffer.dtype.bytes(1);
                let address = memory.allocate(&param.buffer.name, param.span * size);
                if held.is_some() {
                    memory.write(address, &param.bytes(held, 0));
                    // What lies between rows nobody wrote.
                    for gap in param.gaps() {
                        memory.forget(address + (gap.start * size) as u64, gap.len() * size);
                    }
                }
                if !matches!(args.get(number), Some(Arg::Pack(_))) {
                    memory.touched_by_earlier(address, param.span * size, true);
                }
                bytes.extend(address.to_le_bytes());
                addresses.push(address);
            }
            for (_, &value) in kernel.symbols.0.iter().zip(&symbols) {
                bytes.extend((value as i32).to_le_bytes());
            }
            let options = emulator::Options { sm: self.sm, seed, sums: self.sums };
            for (phase, program) in phases.iter().zip(&self.programs[number]) {
                let grid = Grid {
                    ctas: [((phase.turns(&symbols) - 1) / turns_each + 1) as u32, 1, 1],
                    threads: [phase.threads.into(), 1, 1],
                    cluster: program.cluster(),
                    dynamic_shared: phase.shared_bytes() as u32,
                    // All code for it waits for the grids before it.
                    dependent: self.sm == Sm::Sm90a,
                };
                let maps = gpu::tensor_maps(phase, &addresses, &symbols);
                let maps = maps.iter().map(|map| map.encode().map_err(LaunchError::Map));
                let bytes = gpu::with_maps(&bytes, maps.collect::<Result<Vec<_>, _>>()?);
                program.launch(&grid, &bytes, &mut memory, &options).map_err(Box::new)?;
            }
            let read = |(param, &address): (&Param, &u64)| {
                let bytes = param.span * param.buffer.dtype.bytes(1);
                param.elems(memory.read(address, bytes))
            };
            Ok(params.iter().zip(&addresses).map(read).collect())
        };
        let first = launch(1, 1)?;
        for (seed, turns_each) in [(2, i64::MAX), (3, 2)] {
            if let Some((param, at)) = differs(&params, &first, &launch(seed, turns_each)?) {
                return Err(LaunchError::Workers { param, at });
            }
        }
        Ok(decoded(&params, &first))
    }
}

/// Kernels on a GPU.
pub struct OnGpu {
    launcher: Launcher,
    loaded: Loaded,
}

impl OnGpu {
    /// Runs three times, with other numbers of CTAs, in memory full of NaN and full of large numbers: the bits must be the same,
    /// and what is not written is not the same.
    fn run(
        &mut self,
        number: usize,
        kernel: &Kernel,
        held: &[Held],
        symbols: [i64; MAX_SYMBOLS],
    ) -> Result<Vec<Vec<f64>>, LaunchError> {
        let params: Vec<Param> = kernel.params().map(|(_, buffer)| Param::new(buffer, &symbols)).collect();
        let device = |error: DeviceError| LaunchError::Gpu(Box::new(error));
        let all = self.launcher.most_ctas();
        let mut launch = |most_ctas: u32, poison: u8| -> Result<Vec<Vec<u8>>, LaunchError> {
            self.launcher.clear();
            let with = params.iter().zip(held);
            let before: Vec<Vec<u8>> = with.map(|(param, held)| param.bytes(held, poison)).collect();
            let blocks = before.iter().map(|bytes| self.launcher.block(bytes));
            let blocks = blocks.collect::<Result<Vec<Block>, _>>().map_err(device)?;
            self.launcher.launch(&self.loaded, number, &blocks, &symbols, most_ctas).map_err(device)?;
            let mut elems = Vec::new();
            for ((param, &block), before) in params.iter().zip(&blocks).zip(&before) {
                let after = self.launcher.read(block, before.len()).map_err(device)?;
                if !param.keeps(before, &after) {
                    return Err(LaunchError::Strayed { param: param.buffer.name.clone() });
                }
                elems.push(param.elems(&after));
            }
            Ok(elems)
        };
        let first = launch(all, NAN)?;
        for (most_ctas, poison) in [(3, NAN), (all, LARGE)] {
            let again = launch(most_ctas, poison)?;
            if let Some((param, at)) = differs(&params, &first, &again) {
                return Err(match most_ctas == all {
                    false => LaunchError::Workers { param, at },
                    true => LaunchError::Leftover { param, at },
                });
            }
        }
        Ok(decoded(&params, &first))
    }
}

/// Every byte of memory that holds nothing. As f32 or bf16 it is a NaN.
const NAN: u8 = 0xFF;
/// Another. As f32 or bf16 it is 3.4e38.
const LARGE: u8 = 0x7F;

/// The first parameter, with its element, that two launches left in other bits.
fn differs(params: &[Param<'_>], first: &[Vec<u8>], again: &[Vec<u8>]) -> Option<(String, usize)> {
    params.iter().zip(first.iter().zip(again)).find_map(|(param, (first, again))| {
        let byte = first.iter().zip(again).position(|(a, b)| a != b)?;
        Some((param.buffer.name.clone(), byte / param.buffer.dtype.bytes(1)))
    })
}

/// The elements of each parameter.
fn decoded(params: &[Param<'_>], elems: &[Vec<u8>]) -> Vec<Vec<f64>> {
    params.iter().zip(elems).map(|(param, bytes)| decode(param.buffer.dtype, bytes)).collect()
}

/// Kernels under the names that their code has here.
pub(crate) fn numbered(kernels: &[Kernel]) -> Vec<Kernel> {
    let named = |(number, kernel): (usize, &Kernel)| Kernel { name: number.to_string(), ..kernel.clone() };
    kernels.iter().enumerate().map(named).collect()
}

/// A parameter with where its elements lie.
struct Param<'k> {
    buffer: &'k Buffer,
    positions: Vec<usize>,
    span: usize,
}

impl<'k> Param<'k> {
    fn new(buffer: &'k Buffer, symbols: &[i64; MAX_SYMBOLS]) -> Param<'k> {
        let (positions, span) = positions(buffer, symbols);
        Param { buffer, positions, span }
    }

    /// The memory before a launch: what is held, and poison elsewhere.
    fn bytes(&self, held: &Held, poison: u8) -> Vec<u8> {
        let size = self.buffer.dtype.bytes(1);
        let mut bytes = vec![poison; self.span * size];
        for (&position, &x) in self.positions.iter().zip(held.iter().flatten()) {
            encode(self.buffer.dtype, x, &mut bytes[position * size..][..size]);
        }
        bytes
    }

    /// Is what lies between the elements as it was, and the elements too if they may only be read?
    fn keeps(&self, before: &[u8], after: &[u8]) -> bool {
        if self.buffer.space == Space::Global(Access::Read) {
            return before == after;
        }
        let mut own = vec![false; self.span];
        self.positions.iter().for_each(|&position| own[position] = true);
        let size = self.buffer.dtype.bytes(1);
        let pairs = before.chunks_exact(size).zip(after.chunks_exact(size));
        pairs.zip(own).all(|((before, after), own)| own || before == after)
    }

    /// Runs of positions that hold no element.
    fn gaps(&self) -> Vec<Range<usize>> {
        let mut taken = self.positions.clone();
        taken.sort_unstable();
        let ends = taken.windows(2).map(|pair| pair[0] + 1..pair[1]);
        ends.filter(|gap| !gap.is_empty()).collect()
    }

    /// The bytes of the elements, one after the other.
    fn elems(&self, bytes: &[u8]) -> Vec<u8> {
        let size = self.buffer.dtype.bytes(1);
        self.positions.iter().flat_map(|&position| &bytes[position * size..][..size]).copied().collect()
    }
}

/// The bytes of a number, which the dtype can hold.
///
/// # Panics
///
/// On dtypes that no kernel keeps in memory, or if `out` is not as long as an element.
pub fn encode(dtype: DType, x: f64, out: &mut [u8]) {
    match dtype {
        DType::F32 => out.copy_from_slice(&(x as f32).to_le_bytes()),
        DType::BF16 => out.copy_from_slice(&half::bf16::from_f32(x as f32).to_le_bytes()),
        DType::F16 => out.copy_from_slice(&half::f16::from_f32(x as f32).to_le_bytes()),
        DType::I32 => out.copy_from_slice(&(x as i32).to_le_bytes()),
        DType::Bool => out[0] = u8::from(x != 0.0),
        DType::F64 | DType::I8 | DType::U8 | DType::Block(_) => {
            unreachable!("no kernel keeps {dtype} in memory")
        }
    }
}
