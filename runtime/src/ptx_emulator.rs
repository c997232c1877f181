//! The PTX emulator as a device: an artifact's GPU code, run warp by warp on the CPU, with every access checked.
//!
//! Each grid runs to its end before the next begins; what a grid that may begin early must not touch until it has waited is
//! reported all the same. The arena is unwritten when a step begins, and what a kernel shall write
//! when it begins: reading what nobody wrote is reported, as a race or a missing wait is. A report fails the step.

use crate::artifact::Artifact;
use crate::cpu::weights_of;
use crate::device::{self, Device, DeviceError, Program, State, Step, StepOutputs, Tap, Tapped, Want};
use crate::emulator::{self, Counts, Grid, Memory, Options, Sm, Sums};
use crate::fill::{self, Fill};
use crate::gpu::{self, Call, GpuCode};
use crate::manifest::Manifest;
use crate::ptx::Module;
use crate::tensor_map::TensorMap;
use ir::kernel::{Access, Space};
use ir::plan::{Entry, Place, Plan};
use std::borrow::Cow;
use std::convert::Infallible;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// An emulated GPU.
#[derive(Clone, Copy, Debug)]
pub struct PtxEmulator {
    /// Which.
    pub sm: Sm,
    /// Decides the order in which warps, CTAs and asynchronous work go on.
    pub seed: u64,
    /// How matrix units add.
    pub sums: Sums,
}

impl PtxEmulator {
    /// As [`Device::load`], for who asks what was counted.
    ///
    /// # Errors
    ///
    /// As [`Device::load`].
    pub fn open(&self, artifact: &Artifact) -> Result<EmulatedProgram, DeviceError> {
        EmulatedProgram::load(artifact, *self, None)
    }

    /// As [`PtxEmulator::open`], with weights that are made from a seed: also of an artifact that has none.
    ///
    /// # Errors
    ///
    /// As [`Device::load`].
    pub fn open_filled(&self, artifact: &Artifact, seed: u64) -> Result<EmulatedProgram, DeviceError> {
        EmulatedProgram::load(artifact, *self, Some(seed))
    }

    /// What its launches depend on.
    pub fn options(&self) -> Options {
        Options { sm: self.sm, seed: self.seed, sums: self.sums }
    }

    /// Makes weights from a seed.
    fn fill(&self, plan: &Plan, memory: &mut Memory, weights: u64, seed: u64) -> Result<(), DeviceError> {
        let failed = |said: String| DeviceError::Launch { kernel: "fill".to_string(), said };
        let module = Module::parse(&fill::ptx()).map_err(|e| failed(e.to_string()))?;
        for fill in fill::fills(plan, seed, weights, MOST_CTAS) {
            match fill {
                Fill::Constant(at, bytes) => memory.write(weights + at as u64, &bytes),
                Fill::Random(call) => {
                    let kernel = module.kernel(fill::SYMBOLS[call.phase]).expect("the module has both");
                    emulator::launch(kernel, &grid(&call, 1), &call.params, memory, &self.options())
                        .map_err(|report| failed(report.to_string()))?;
                }
            }
        }
        Ok(())
    }
}

/// Runs a grid.
///
/// # Errors
///
/// What the emulator reports, or that no driver takes a tensor map.
pub(crate) fn run(
    program: &emulator::Program,
    call: &Call,
    memory: &mut Memory,
    options: &Options,
) -> Result<Counts, String> {
    let grid = grid(call, program.cluster());
    let maps = call.maps.iter().map(TensorMap::encode).collect::<Result<Vec<_>, _>>();
    let params = gpu::with_maps(&call.params, maps.map_err(|refused| refused.to_string())?);
    program.launch(&grid, &params, memory, options).map_err(|report| report.to_string())
}

/// A launch's grid.
fn grid(call: &Call, cluster: u32) -> Grid {
    let (ctas, threads) = ([call.ctas, 1, 1], [call.threads, 1, 1]);
    Grid { ctas, threads, cluster, dynamic_shared: call.shared_bytes, dependent: call.dependent }
}

impl Device for PtxEmulator {
    fn load(&mut self, artifact: &Artifact) -> Result<Box<dyn Program>, DeviceError> {
        Ok(Box::new(self.open(artifact)?))
    }

    fn load_tapped(&mut self, artifact: &Artifact) -> Result<Box<dyn Tapped>, DeviceError> {
        Ok(Box::new(self.open(artifact)?))
    }
}

/// A loaded artifact on the emulator.
pub struct EmulatedProgram {
    device: PtxEmulator,
    file: PathBuf,
    context: usize,
    code: GpuCode,
    /// Of each phase of the code.
    phases: Vec<emulator::Program>,
    memory: Arc<Mutex<Memory>>,
    /// Of each buffer of the plan; 0 for states, which are a [`State`]'s own.
    addresses: Vec<u64>,
    arena: Range<u64>,
    counts: Counts,
}

/// The caches of a conversation, in the device's memory.
struct Caches {
    memory: Arc<Mutex<Memory>>,
    /// Of each buffer of the plan that is a state.
    addresses: Vec<(usize, u64)>,
}

impl Drop for Caches {
    fn drop(&mut self) {
        let mut memory = locked(&self.memory);
        self.addresses.iter().for_each(|&(_, address)| memory.release(address));
    }
}

fn locked(memory: &Mutex<Memory>) -> MutexGuard<'_, Memory> {
    memory.lock().unwrap_or_else(PoisonError::into_inner)
}

impl EmulatedProgram {
    fn load(
        artifact: &Artifact,
        device: PtxEmulator,
        seed: Option<u64>,
    ) -> Result<EmulatedProgram, DeviceError> {
        let manifest: Manifest = artifact.manifest()?;
        let target =
            gpu::choose(artifact.file(), &manifest, device.sm.capability(), device.sm.shared_bytes())?;
        let code = GpuCode::read(artifact, target)?;
        let failed = |kernel: &str, said: String| DeviceError::Launch { kernel: kernel.to_string(), said };
        let module = Module::parse(&code.ptx).map_err(|e| failed(&target.code_section(), e.to_string()))?;
        let mut phases = Vec::new();
        for phase in &code.phases {
            let name = &code.kernels[phase.kernel].name;
            let ptx = module.kernel(&gpu::symbol(&phase.code.name));
            let ptx = ptx.ok_or_else(|| failed(name, "its PTX is not in the module".to_string()))?;
            phases.push(emulator::Program::new(ptx));
            let (needs, has) = (phase.shared_bytes, device.sm.shared_bytes());
            if needs > has {
                let said = format!("it needs {needs} bytes of shared memory, the GPU has {has}");
                return Err(failed(name, said));
            }
        }
        let mut memory = Memory::new();
        let arena = memory.allocate("arena", code.plan.arena_bytes);
        let weights = match seed {
            Some(seed) => {
                let weights = memory.allocate("weights", code.plan.weight_bytes());
                device.fill(&code.plan, &mut memory, weights, seed)?;
                Some(weights)
            }
            // The section's end may be padded; buffers lie in what the plan counts.
            None => weights_of(artifact, target, &code.plan)?
                .map(|(bytes, range)| memory.borrow("weights", bytes, range)),
        };
        let address = |buffer: &ir::plan::PlanBuffer| match buffer.place {
            Place::Weight { offset, .. } => weights.map_or(0, |address| address + offset as u64),
            Place::Arena { offset } => arena + offset as u64,
            Place::Input => memory.allocate(&buffer.name, buffer.bytes),
            Place::State => 0,
        };
        let addresses = code.plan.buffers.iter().map(address).collect();
        Ok(EmulatedProgram {
            device,
            file: artifact.file().to_path_buf(),
            context: manifest.context,
            arena: arena..arena + code.plan.arena_bytes as u64,
            code,
            phases,
            memory: Arc::new(Mutex::new(memory)),
            addresses,
            counts: Counts::default(),
        })
    }

    /// What all launches so far did.
    pub fn counts(&self) -> &Counts {
        &self.counts
    }

    fn step(
        &mut self,
        step: &Step<'_>,
        state: &mut State,
        after: &mut dyn FnMut(Tap<'_>),
    ) -> Result<StepOutputs, DeviceError> {
        let (number, symbols) = step.entry(self, &self.code.plan, state)?;
        let past = state.past();
        let caches = state.inner_mut::<Caches>()?;
        if !Arc::ptr_eq(&caches.memory, &self.memory) {
            return Err(DeviceError::ForeignState);
        }
        let mut addresses = self.addresses.clone();
        caches.addresses.iter().for_each(|&(buffer, address)| addresses[buffer] = address);
        let memory = self.memory.clone();
        let mut memory = locked(&memory);
        memory.forget(self.arena.start, (self.arena.end - self.arena.start) as usize);
        let Entry { tokens, positions, .. } = self.code.plan.entries[number];
        let [held, at] = step.inputs(past);
        memory.write(addresses[tokens], &held);
        memory.write(addresses[positions], &at);
        let origin = Instant::now();
        for (launch, calls) in self.code.calls(number, &addresses, &symbols, MOST_CTAS).iter().enumerate() {
            let begin = origin.elapsed().as_secs_f64();
            let counts = self.launch(number, launch, calls, &addresses, &mut memory)?;
            self.counts += counts;
            let workers = [begin..origin.elapsed().as_secs_f64()];
            let entry = &self.code.plan.entries[number];
            let seen = &Seen { plan: &self.code.plan, memory: &memory, addresses: &addresses };
            after(Tap { entry, launch, workers: &workers, memory: seen });
        }
        state.advance(step.tokens.len());
        let read = |buffer: usize, count| Ok::<_, Infallible>(memory.read(addresses[buffer], count));
        let Ok(outputs) = StepOutputs::of(step, &self.code.plan.entries[number], self.code.plan.vocab, read);
        Ok(outputs)
    }

    fn launch(
        &self,
        entry: usize,
        number: usize,
        calls: &[Call],
        addresses: &[u64],
        memory: &mut Memory,
    ) -> Result<Counts, DeviceError> {
        let launch = &self.code.plan.entries[entry].launches[number];
        let kernel = &self.code.kernels[launch.kernel];
        for ((_, param), &arg) in kernel.params().zip(&launch.args) {
            if param.space == Space::Global(Access::Write) {
                memory.forget(addresses[arg], self.code.plan.buffers[arg].bytes);
            }
        }
        let failed = |said| DeviceError::Launch { kernel: kernel.name.clone(), said };
        let options = self.device.options();
        let mut counts = Counts::default();
        for call in calls {
            counts += run(&self.phases[call.phase], call, memory, &options).map_err(failed)?;
        }
        Ok(counts)
    }
}

/// CTAs of a launch at most: further turns are taken by those that are done.
pub(crate) const MOST_CTAS: u32 = 64;

/// Memory between two launches.
struct Seen<'a> {
    plan: &'a Plan,
    memory: &'a Memory,
    addresses: &'a [u64],
}

impl device::Memory for Seen<'_> {
    fn bytes(&self, buffer: usize) -> Cow<'_, [u8]> {
        Cow::Borrowed(self.memory.read(self.addresses[buffer], self.plan.buffers[buffer].bytes))
    }
}

impl Program for EmulatedProgram {
    fn vocab(&self) -> usize {
        self.code.plan.vocab
    }

    fn context(&self) -> usize {
        self.context
    }

    fn max_tokens(&self, want: Want) -> usize {
        self.code.plan.max_tokens(want.give())
    }

    fn state(&self) -> Result<State, DeviceError> {
        let mut memory = locked(&self.memory);
        let mut addresses = Vec::new();
        for (number, buffer) in self.code.plan.buffers.iter().enumerate() {
            if buffer.place == Place::State {
                let address = memory.allocate(&buffer.name, buffer.bytes);
                memory.write(address, &vec![0; buffer.bytes]);
                addresses.push((number, address));
            }
        }
        Ok(State::new(Caches { memory: self.memory.clone(), addresses }))
    }

    fn run(&mut self, step: &Step<'_>, state: &mut State) -> Result<StepOutputs, DeviceError> {
        self.step(step, state, &mut |_| ())
    }
}

impl Tapped for EmulatedProgram {
    fn plan(&self) -> &Plan {
        &self.code.plan
    }

    fn run_tapped(
        &mut self,
        step: &Step<'_>,
        state: &mut State,
        after: &mut dyn FnMut(Tap<'_>),
    ) -> Result<StepOutputs, DeviceError> {
        self.step(step, state, after)
    }
}

impl std::fmt::Debug for EmulatedProgram {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EmulatedProgram").field("file", &self.file).finish_non_exhaustive()
    }
}
