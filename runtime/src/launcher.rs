//! Kernels launched by themselves, on a GPU or on the emulator: for who judges or times them.
//!
//! No artifact is needed: code comes as it was compiled, memory as blocks that the caller fills.

use crate::conformance::Machine;
use crate::cuda::CTAS_PER_SM;
use crate::cuda::context::{Buffer, Event, Image, Module};
use crate::device::DeviceError;
use crate::emulator::{Memory, Program};
use crate::gpu::{self, GpuCode};
use crate::{ptx, ptx_emulator};
use ir::dim::MAX_SYMBOLS;
use ir::kernel::Kernel;
use ir::plan::Plan;
use std::time::Instant;

/// A machine, and the memory that was taken of it.
pub struct Launcher {
    machine: Machine,
    blocks: Blocks,
}

enum Blocks {
    Gpu(Vec<Buffer>),
    Emulated(Memory, Vec<(u64, usize)>),
}

/// Memory of a launcher, by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block(usize);

/// Kernels that a launcher can run.
pub struct Loaded {
    code: GpuCode,
    on: On,
}

/// The code of each phase.
enum On {
    Gpu(Module),
    Emulated(Vec<Program>),
}

fn failed(kernel: &str, said: impl ToString) -> DeviceError {
    DeviceError::Launch { kernel: kernel.to_string(), said: said.to_string() }
}

impl Launcher {
    /// A launcher without memory.
    pub fn new(machine: Machine) -> Launcher {
        let blocks = match &machine {
            Machine::Gpu(_) => Blocks::Gpu(Vec::new()),
            Machine::Emulator(_) => Blocks::Emulated(Memory::new(), Vec::new()),
        };
        Launcher { machine, blocks }
    }

    /// CTAs of a launch at most, as programs have them.
    pub fn most_ctas(&self) -> u32 {
        match &self.machine {
            Machine::Gpu(context) => CTAS_PER_SM * context.gpu.sms,
            Machine::Emulator(_) => ptx_emulator::MOST_CTAS,
        }
    }

    /// Takes memory and fills it.
    ///
    /// # Errors
    ///
    /// [`DeviceError::OutOfMemory`]; or what else the driver says.
    pub fn block(&mut self, bytes: &[u8]) -> Result<Block, DeviceError> {
        let number = match (&mut self.blocks, &self.machine) {
            (Blocks::Gpu(buffers), Machine::Gpu(context)) => {
                buffers.push(Buffer::zeroed(context, bytes.len())?);
                buffers.len() - 1
            }
            (Blocks::Emulated(memory, blocks), _) => {
                let address = memory.allocate(&format!("block {}", blocks.len()), bytes.len());
                blocks.push((address, bytes.len()));
                blocks.len() - 1
            }
            (Blocks::Gpu(_), Machine::Emulator(_)) => unreachable!("blocks are of the machine"),
        };
        self.write(Block(number), bytes)?;
        Ok(Block(number))
    }

    /// Fills memory from its beginning.
    ///
    /// # Errors
    ///
    /// What the driver says.
    ///
    /// # Panics
    ///
    /// If the bytes do not fit.
    pub fn write(&mut self, block: Block, bytes: &[u8]) -> Result<(), DeviceError> {
        match &mut self.blocks {
            Blocks::Gpu(buffers) => Ok(buffers[block.0].write(0, bytes)?),
            Blocks::Emulated(memory, blocks) => {
                memory.write(blocks[block.0].0, bytes);
                Ok(())
            }
        }
    }

    /// Reads so many bytes from the beginning of memory.
    ///
    /// # Errors
    ///
    /// What the driver says; of an earlier launch's fault too.
    ///
    /// # Panics
    ///
    /// If there are not as many.
    pub fn read(&self, block: Block, bytes: usize) -> Result<Vec<u8>, DeviceError> {
        match &self.blocks {
            Blocks::Gpu(buffers) => {
                let mut read = vec![0; bytes];
                buffers[block.0].read(0, &mut read)?;
                Ok(read)
            }
            Blocks::Emulated(memory, blocks) => Ok(memory.read(blocks[block.0].0, bytes).to_vec()),
        }
    }

    /// Gives back all memory.
    pub fn clear(&mut self) {
        *self = Launcher::new(self.machine.clone());
    }

    /// Makes kernels ready. Of a GPU the machine code is tried first, where there is some; the driver compiles PTX.
    ///
    /// # Errors
    ///
    /// What the driver says, with its compiler's log; a kernel that needs more shared memory than there is.
    pub fn load(&self, kernels: &[Kernel], ptx: &str, cubin: Option<&[u8]>) -> Result<Loaded, DeviceError> {
        let code = GpuCode::new(Plan::alone(kernels), kernels.to_vec(), ptx.to_string());
        let has = match &self.machine {
            Machine::Gpu(context) => context.gpu.shared_bytes,
            Machine::Emulator(options) => options.sm.shared_bytes(),
        };
        if let Some(phase) = code.phases.iter().find(|phase| phase.shared_bytes > has) {
            let said = format!("it needs {} bytes of shared memory, the GPU has {has}", phase.shared_bytes);
            return Err(failed(&code.kernels[phase.kernel].name, said));
        }
        let on = match &self.machine {
            Machine::Gpu(context) => {
                let machine_code = cubin.and_then(|bytes| Module::load(context, &Image::Cubin(bytes)).ok());
                let mut module = match machine_code {
                    Some(module) => module,
                    None => Module::load(context, &Image::Ptx(ptx))?,
                };
                for phase in &code.phases {
                    let name = &code.kernels[phase.kernel].name;
                    module.add(name, &gpu::symbol(&phase.code.name), phase.shared_bytes)?;
                }
                On::Gpu(module)
            }
            Machine::Emulator(_) => {
                let module = ptx::Module::parse(ptx).map_err(|error| failed("a module", error))?;
                let program = |phase: &gpu::Phase| {
                    let ptx = module.kernel(&gpu::symbol(&phase.code.name));
                    let missing = || failed(&phase.code.name, "its PTX is not in the module");
                    Ok(Program::new(ptx.ok_or_else(missing)?))
                };
                On::Emulated(code.phases.iter().map(program).collect::<Result<_, DeviceError>>()?)
            }
        };
        Ok(Loaded { code, on })
    }

    /// Launches a kernel, by its number, on a block for each parameter, with so many CTAs at most, and waits for it. Gives the
    /// seconds: a GPU's own, or those that emulating took.
    ///
    /// # Errors
    ///
    /// [`DeviceError::Launch`]. After a fault a GPU does nothing any more.
    pub fn launch(
        &mut self,
        loaded: &Loaded,
        kernel: usize,
        blocks: &[Block],
        symbols: &[i64; MAX_SYMBOLS],
        most_ctas: u32,
    ) -> Result<f64, DeviceError> {
        let addresses: Vec<u64> = blocks
            .iter()
            .map(|block| match &self.blocks {
                Blocks::Gpu(buffers) => buffers[block.0].address(),
                Blocks::Emulated(_, blocks) => blocks[block.0].0,
            })
            .collect();
        let calls = loaded.code.calls(kernel, &addresses, symbols, most_ctas).concat();
        let name = &loaded.code.kernels[kernel].name;
        match (&loaded.on, &self.machine, &mut self.blocks) {
            (On::Gpu(module), Machine::Gpu(context), _) => {
                let begin = Event::record(context)?;
                calls.iter().try_for_each(|call| module.launch(call))?;
                let end = Event::record(context).map_err(|failure| failed(name, failure))?;
                context.wait().map_err(|failure| failed(name, failure))?;
                Ok(end.seconds_since(&begin)?)
            }
            (On::Emulated(programs), Machine::Emulator(options), Blocks::Emulated(memory, _)) => {
                let begin = Instant::now();
                for call in &calls {
                    ptx_emulator::run(&programs[call.phase], call, memory, options)
                        .map_err(|said| failed(name, said))?;
                }
                Ok(begin.elapsed().as_secs_f64())
            }
            _ => unreachable!("kernels and blocks are of the machine"),
        }
    }
}
