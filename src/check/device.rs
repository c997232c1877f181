//! Where a launch runs: code on this CPU, a GPU's on the emulator, the kernel interpreter, or nowhere.

use crate::compare::memory::{decode, positions};
use codegen::Backend;
use codegen::cpu::{CodegenError, Form, Level};
use codegen::nvptx::{self, Architecture};
use ir::DType;
use ir::dim::MAX_SYMBOLS;
use ir::kernel::interp::{self, Fault, KBuffer};
use ir::kernel::{Access, Buffer, Kernel, Space, verify};
use ir::plan::{Cost, Entry, Give, Launch, Plan, PlanKernel};
use runtime::code::{Code, CodeError, Guarded};
use runtime::emulator::{self, Grid, Memory, Report, Sm, Sums};
use runtime::gpu;
use runtime::map::MapError;
use runtime::ptx::{Module, PtxError};
use runtime::tensor_map::TensorMapError;
use std::ops::Range;

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
}

/// Why kernels could not be made ready.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// LLVM, or the linker.
    #[error(transparent)]
    Codegen(#[from] CodegenError),
    /// The system's loader.
    #[error(transparent)]
    Code(#[from] CodeError),
    /// The emulator's reader: a fault of it, or of LLVM.
    #[error("PTX of generated code")]
    Ptx(#[from] PtxError),
}

/// Runs launches of a list of kernels.
pub enum Device {
    /// Their code for one CPU level.
    Cpu(Box<Compiled>),
    /// Their PTX on the emulator.
    Emulated(Box<Emulated>),
    /// The kernel interpreter: bounds, unwritten reads, races.
    Interpreter,
    /// Verifies kernels and what is bound to them.
    Null,
}

impl Device {
    /// Compiles kernels for a back end: a CPU's that this machine runs, or a GPU's, which the emulator runs.
    ///
    /// # Errors
    ///
    /// What LLVM, the linker or the loader said.
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
    pub fn cpu(level: &Level, kernels: &[Kernel]) -> Result<Device, LoadError> {
        Ok(Device::Cpu(Box::new(Compiled::new(level, kernels)?)))
    }

    /// Runs kernel `number` on what its parameters hold; gives what they hold then, or `None` where nothing ran.
    ///
    /// # Errors
    ///
    /// What is wrong, before any number is looked at.
    pub fn run(
        &mut self,
        number: usize,
        kernel: &Kernel,
        held: &[Held],
        symbols: [i64; MAX_SYMBOLS],
    ) -> Result<Option<Vec<Vec<f64>>>, LaunchError> {
        check_binding(kernel, held, &symbols)?;
        match self {
            Device::Cpu(compiled) => compiled.run(number, kernel, held, symbols).map(Some),
            Device::Emulated(emulated) => emulated.run(number, kernel, held, symbols).map(Some),
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

/// Code of kernels, each its own entry point, for one worker and for two.
pub struct Compiled {
    by_workers: [Code; 2],
}

impl Compiled {
    fn new(level: &Level, kernels: &[Kernel]) -> Result<Compiled, LoadError> {
        let mut plan = Plan::default();
        let mut named = Vec::new();
        for (number, kernel) in kernels.iter().enumerate() {
            let kernel = Kernel { name: number.to_string(), ..kernel.clone() };
            let (name, family, schedule) = (kernel.name.clone(), kernel.family, kernel.schedule.clone());
            let args = (0..kernel.params().count()).collect();
            let launches = vec![Launch { kernel: number, args, cost: Cost::default() }];
            plan.kernels.push(PlanKernel { name, family, schedule, measured: false });
            plan.entries.push(Entry {
                name: format!("launch.{number}"),
                symbols: kernel.symbols.clone(),
                give: Give::Nothing,
                tokens: 0,
                positions: 0,
                logits: None,
                token: None,
                launches,
            });
            named.push(kernel);
        }
        let text = codegen::lower::module(&plan, &named, level.features, false);
        let object = codegen::link::link(&codegen::cpu::compile(&text, level, Form::Object)?)?;
        let load = |threads| Code::load(&object, plan.entries.iter().map(|e| e.name.as_str()), threads);
        Ok(Compiled { by_workers: [load(1)?, load(2)?] })
    }

    /// Runs three times, by one worker and by two, in memory full of NaN and full of large numbers: the bits must be the
    /// same, and what is not written is not the same.
    fn run(
        &mut self,
        number: usize,
        kernel: &Kernel,
        held: &[Held],
        symbols: [i64; MAX_SYMBOLS],
    ) -> Result<Vec<Vec<f64>>, LaunchError> {
        /// Every byte. As f32 or bf16 it is a NaN.
        const NAN: u8 = 0xFF;
        /// As f32 or bf16 it is 3.4e38.
        const LARGE: u8 = 0x7F;
        let params: Vec<Param> = kernel.params().map(|(_, buffer)| Param::new(buffer, &symbols)).collect();
        let mut launch = |workers: usize, poison: u8| -> Result<Vec<Vec<u8>>, LaunchError> {
            let with = params.iter().zip(held);
            let before: Vec<Vec<u8>> = with.map(|(param, held)| param.bytes(held, poison)).collect();
            let mut buffers = Vec::new();
            for bytes in &before {
                let mut buffer = Guarded::zeroed(bytes.len())?;
                buffer.bytes_mut().copy_from_slice(bytes);
                buffers.push(buffer);
            }
            self.by_workers[workers - 1].run_on(number, &mut buffers, symbols);
            for ((param, buffer), before) in params.iter().zip(&buffers).zip(&before) {
                if !buffer.is_intact() || !param.keeps(before, buffer.bytes()) {
                    return Err(LaunchError::Strayed { param: param.buffer.name.clone() });
                }
            }
            let elems = params.iter().zip(&buffers).map(|(param, buffer)| param.elems(buffer.bytes()));
            Ok(elems.collect())
        };
        let first = launch(1, NAN)?;
        for (workers, poison) in [(2, NAN), (1, LARGE)] {
            let again = launch(workers, poison)?;
            for (param, (first, again)) in params.iter().zip(first.iter().zip(&again)) {
                let size = param.buffer.dtype.bytes(1);
                let Some(byte) = first.iter().zip(again).position(|(a, b)| a != b) else { continue };
                let (param, at) = (param.buffer.name.clone(), byte / size);
                return Err(match workers {
                    2 => LaunchError::Workers { param, at },
                    _ => LaunchError::Leftover { param, at },
                });
            }
        }
        Ok(params.iter().zip(&first).map(|(param, bytes)| decode(param.buffer.dtype, bytes)).collect())
    }
}

/// PTX of kernels, for the emulator.
pub struct Emulated {
    /// Of each kernel: its phases.
    programs: Vec<Vec<emulator::Program>>,
    sm: Sm,
    sums: Sums,
}

impl Emulated {
    fn new(architecture: &Architecture, kernels: &[Kernel]) -> Result<Emulated, LoadError> {
        let numbered =
            |(number, kernel): (usize, &Kernel)| Kernel { name: number.to_string(), ..kernel.clone() };
        let named: Vec<Kernel> = kernels.iter().enumerate().map(numbered).collect();
        let ptx = nvptx::compile(&nvptx::llvm(&named, architecture)?, architecture)?;
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
        let phase = |name: &str| module.kernel(&nvptx::symbol(name)).map(emulator::Program::new);
        let phases = |number: usize| {
            let first = phase(&number.to_string()).expect("every kernel is in it");
            let further = (1..).map_while(|after| phase(&format!("{number}..{after}")));
            [first].into_iter().chain(further).collect()
        };
        Ok(Emulated { programs: (0..kernels).map(phases).collect(), sm, sums: Sums::default() })
    }

    /// Runs three times, in other orders of warps and with fewer CTAs: the bits must be the same.
    fn run(
        &mut self,
        number: usize,
        kernel: &Kernel,
        held: &[Held],
        symbols: [i64; MAX_SYMBOLS],
    ) -> Result<Vec<Vec<f64>>, LaunchError> {
        let params: Vec<Param> = kernel.params().map(|(_, buffer)| Param::new(buffer, &symbols)).collect();
        let phases = kernel.phases();
        let launch = |seed: u64, turns_each: i64| -> Result<Vec<Vec<u8>>, LaunchError> {
            let mut memory = Memory::new();
            let mut bytes = Vec::new();
            let mut addresses = Vec::new();
            for (param, held) in params.iter().zip(held) {
                let size = param.buffer.dtype.bytes(1);
                let address = memory.allocate(&param.buffer.name, param.span * size);
                if held.is_some() {
                    memory.write(address, &param.bytes(held, 0));
                    // What lies between rows nobody wrote.
                    for gap in param.gaps() {
                        memory.forget(address + (gap.start * size) as u64, gap.len() * size);
                    }
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
            let again = launch(seed, turns_each)?;
            for (param, (first, again)) in params.iter().zip(first.iter().zip(&again)) {
                if let Some(byte) = first.iter().zip(again).position(|(a, b)| a != b) {
                    let at = byte / param.buffer.dtype.bytes(1);
                    return Err(LaunchError::Workers { param: param.buffer.name.clone(), at });
                }
            }
        }
        Ok(params.iter().zip(&first).map(|(param, bytes)| decode(param.buffer.dtype, bytes)).collect())
    }
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
