//! NVIDIA GPUs: an artifact's GPU code through the driver, which is looked for at run time.
//!
//! * [`driver`]: finding the driver, and what is asked of it.
//! * [`context`]: memory, modules, launches, graphs and events; all `unsafe` of this device but the driver's loading.
//!
//! All memory of a program is allocated when it is loaded, after its sum was compared with what is free; a state brings its
//! caches. All work is in the order of one stream.
//!
//! An entry point whose launches are the same at every step ([`GpuCode::is_constant`]: decode) is recorded as one CUDA graph
//! when a state first runs it, and replayed from then on: tokens and positions lie in buffers that are written before. The
//! last node writes the chosen token and the position behind for the next step: who goes on with that token sends nothing, and
//! four bytes come back.
//!
//! Grids that wait for those before them ([`gpu::Call::dependent`]) are launched so that they may begin early, alone and in
//! graphs; a driver before CUDA 12.3 cannot record that, and with it each begins when the one before has ended.

pub mod context;
pub mod driver;
#[cfg(test)]
mod fake;
#[cfg(test)]
mod tests;

use crate::artifact::Artifact;
use crate::cpu::weights_of;
use crate::device::{self, Device, DeviceError, Program, State, Step, StepOutputs, Tap, Tapped, Want};
use crate::fill::{self, Fill};
use crate::gpu::{self, Form, GpuCode};
use crate::manifest::{Manifest, TargetCode};
use context::{Buffer, Context, Event, Image, Module};
use driver::{Driver, Failure, Gpu, Version};
use ir::plan::{Entry, Place, Plan};
use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

/// A GPU that llamac has code for.
#[derive(Clone)]
pub struct Cuda {
    driver: Driver,
    gpu: Gpu,
}

impl Cuda {
    /// The GPU of this number.
    ///
    /// # Errors
    ///
    /// [`DeviceError::Driver`] if there is no driver or it is too old, if there is no such GPU, or it is too old.
    pub fn new(number: u32) -> Result<Cuda, DeviceError> {
        let driver = Driver::load().map_err(|none| refused(number, none.to_string()))?;
        Cuda::of(driver, number)
    }

    fn of(driver: Driver, number: u32) -> Result<Cuda, DeviceError> {
        let mut gpus = driver.gpus()?;
        if number as usize >= gpus.len() {
            let there: Vec<String> = gpus.iter().map(Gpu::to_string).collect();
            let there = if there.is_empty() { "none".to_string() } else { there.join("; ") };
            return Err(refused(number, format!("the driver has no such GPU; there is {there}")));
        }
        let gpu = gpus.swap_remove(number as usize);
        if gpu::takes(gpu.capability).is_empty() {
            return Err(refused(number, format!("{gpu}: compute capability 8.0 or later is needed")));
        }
        Ok(Cuda { driver, gpu })
    }

    /// Which it is.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// The version of CUDA that the driver has.
    pub fn version(&self) -> Version {
        self.driver.version
    }

    /// The GPU, ready for who launches kernels of his own.
    ///
    /// # Errors
    ///
    /// What the driver says.
    pub fn context(&self) -> Result<Arc<Context>, DeviceError> {
        Ok(Context::open(self.driver, self.gpu.clone())?)
    }

    /// As [`Device::load`], for who wants what only this device's program can do.
    ///
    /// # Errors
    ///
    /// As [`Device::load`].
    pub fn open(&self, artifact: &Artifact) -> Result<CudaProgram, DeviceError> {
        CudaProgram::load(artifact, self, None)
    }

    /// As [`Cuda::open`], with weights that the GPU makes from a seed: also of an artifact that has none.
    ///
    /// # Errors
    ///
    /// As [`Device::load`].
    pub fn open_filled(&self, artifact: &Artifact, seed: u64) -> Result<CudaProgram, DeviceError> {
        CudaProgram::load(artifact, self, Some(seed))
    }
}

fn refused(number: u32, said: String) -> DeviceError {
    DeviceError::Driver { device: format!("cuda:{number}"), said }
}

impl Device for Cuda {
    fn load(&mut self, artifact: &Artifact) -> Result<Box<dyn Program>, DeviceError> {
        Ok(Box::new(self.open(artifact)?))
    }

    fn load_tapped(&mut self, artifact: &Artifact) -> Result<Box<dyn Tapped>, DeviceError> {
        Ok(Box::new(self.open(artifact)?))
    }
}

/// A loaded artifact on a GPU.
pub struct CudaProgram {
    file: PathBuf,
    manifest_context: usize,
    code: GpuCode,
    context: Arc<Context>,
    module: Arc<Module>,
    weights: Buffer,
    arena: Buffer,
    /// By their buffer's number in the plan.
    inputs: BTreeMap<usize, Buffer>,
    /// Ends a recorded step.
    advance: Arc<Module>,
    /// The entry point that wrote its own next tokens and positions, and what they are.
    ahead: Option<(usize, [Vec<u8>; 2])>,
}

/// The caches of a conversation, in the GPU's memory.
struct Caches {
    context: Arc<Context>,
    /// Of each buffer of the plan that is a state.
    buffers: BTreeMap<usize, Buffer>,
    /// What an entry point launches on them, recorded.
    graphs: BTreeMap<usize, context::Graph>,
}

/// CTAs of a launch at most, for each multiprocessor: as many as hide the latency of memory. Further turns are taken by those
/// that are done. (Chosen so that CTAs of 128 threads fill half of a multiprocessor's 2048; not measured yet.)
pub const CTAS_PER_SM: u32 = 8;

/// Is there room for so many bytes?
fn check_room(needed: u64, available: u64) -> Result<(), DeviceError> {
    if needed > available {
        return Err(DeviceError::OutOfMemory { needed, available });
    }
    Ok(())
}

impl CudaProgram {
    fn load(artifact: &Artifact, device: &Cuda, seed: Option<u64>) -> Result<CudaProgram, DeviceError> {
        let manifest: Manifest = artifact.manifest()?;
        let target = gpu::choose(artifact.file(), &manifest, device.gpu.capability, device.gpu.shared_bytes)?;
        let code = GpuCode::read(artifact, target)?;
        let context = Context::open(device.driver, device.gpu.clone())?;
        let module = load_module(artifact, target, &code, &context)?;
        // With the caches of one state: a program that can hold none is of no use.
        check_room(code.plan.totals().total_bytes as u64, context.free_bytes()?)?;
        let zeroed = |bytes| Buffer::zeroed(&context, bytes);
        let weights = zeroed(code.plan.weight_bytes())?;
        match seed {
            Some(seed) => fill(&context, &code.plan, &weights, seed)?,
            None => {
                if let Some((bytes, range)) = weights_of(artifact, target, &code.plan)? {
                    // The section's end may be padded.
                    weights.write(0, &(*bytes).as_ref()[range][..code.plan.weight_bytes()])?;
                }
            }
        }
        let arena = zeroed(code.plan.arena_bytes)?;
        let inputs = buffers(&code.plan, &Place::Input, &context)?;
        let mut advance = Module::load(&context, &Image::Ptx(include_str!("cuda/advance.ptx")))?;
        advance.add("advance", "k_advance", 0)?;
        Ok(CudaProgram {
            file: artifact.file().to_path_buf(),
            manifest_context: manifest.context,
            code,
            context,
            module: Arc::new(module),
            weights,
            arena,
            inputs,
            advance: Arc::new(advance),
            ahead: None,
        })
    }

    /// Where a buffer of the plan is.
    fn place<'a>(&'a self, caches: &'a Caches, buffer: usize) -> (&'a Buffer, usize) {
        match self.code.plan.buffers[buffer].place {
            Place::Weight { offset, .. } => (&self.weights, offset),
            Place::Arena { offset } => (&self.arena, offset),
            Place::Input => (&self.inputs[&buffer], 0),
            Place::State => (&caches.buffers[&buffer], 0),
        }
    }

    /// Runs a step; with `after` launch by launch.
    fn step(
        &mut self,
        step: &Step<'_>,
        state: &mut State,
        after: Option<&mut dyn FnMut(Tap<'_>)>,
    ) -> Result<StepOutputs, DeviceError> {
        let (number, symbols) = step.entry(self, &self.code.plan, state)?;
        let past = state.past();
        let caches = state.inner_mut::<Caches>()?;
        if !Arc::ptr_eq(&caches.context, &self.context) {
            return Err(DeviceError::ForeignState);
        }
        let Entry { tokens, positions, .. } = self.code.plan.entries[number];
        let held = step.inputs(past);
        let ahead = self.ahead.take();
        if ahead.is_none_or(|(entry, next)| entry != number || next != held) {
            for (buffer, bytes) in [tokens, positions].into_iter().zip(&held) {
                self.inputs[&buffer].write(0, bytes)?;
            }
        }

        let calls = |caches: &Caches| {
            let address = |buffer| {
                let (memory, at) = self.place(caches, buffer);
                memory.address() + at as u64
            };
            let addresses: Vec<u64> = (0..self.code.plan.buffers.len()).map(address).collect();
            self.code.calls(number, &addresses, &symbols, CTAS_PER_SM * self.context.gpu.sms)
        };
        let replayed = after.is_none() && self.code.is_constant(number);
        match after {
            Some(after) => self.tapped(number, &calls(caches), caches, after)?,
            None if replayed => {
                if !caches.graphs.contains_key(&number) {
                    let end = self.advance(number).map(|call| (&self.advance, call));
                    caches.graphs.insert(number, self.module.record(&calls(caches).concat(), end)?);
                }
                caches.graphs[&number].launch()?;
            }
            None => calls(caches).iter().flatten().try_for_each(|call| self.module.launch(call))?,
        }
        // What a kernel does wrong is seen no later than here.
        self.context.wait().map_err(|failure| DeviceError::Launch {
            kernel: format!("a kernel of @{}", self.code.plan.entries[number].name),
            said: failure.to_string(),
        })?;

        let read = |buffer, count| -> Result<Vec<u8>, Failure> {
            let (memory, at) = self.place(caches, buffer);
            let mut bytes = vec![0; count];
            memory.read(at, &mut bytes).map(|()| bytes)
        };
        let entry = &self.code.plan.entries[number];
        let outputs = StepOutputs::of(step, entry, self.code.plan.vocab, read)?;
        state.advance(step.tokens.len());
        if let (true, Some(token)) = (replayed && self.advance(number).is_some(), outputs.token) {
            let next = Step { tokens: &[token], ..*step };
            self.ahead = Some((number, next.inputs(state.past())));
        }
        Ok(outputs)
    }

    /// The end of an entry point's recorded step, if it is of one token and chooses the next.
    fn advance(&self, entry: usize) -> Option<gpu::Call> {
        let Entry { tokens, positions, token, ref symbols, .. } = self.code.plan.entries[entry];
        let chosen = token.filter(|_| symbols.0.first().is_some_and(|t| t.max == 1))?;
        let Place::Arena { offset } = self.code.plan.buffers[chosen].place else { return None };
        let chosen = self.arena.address() + offset as u64;
        let params = [chosen, self.inputs[&tokens].address(), self.inputs[&positions].address()];
        Some(gpu::Call {
            phase: 0,
            ctas: 1,
            threads: 1,
            shared_bytes: 0,
            params: params.iter().flat_map(|address| address.to_le_bytes()).collect(),
            maps: Vec::new(),
            dependent: false,
        })
    }

    /// Launches one by one, each between two events.
    fn tapped(
        &self,
        number: usize,
        launches: &[Vec<gpu::Call>],
        caches: &Caches,
        after: &mut dyn FnMut(Tap<'_>),
    ) -> Result<(), DeviceError> {
        let entry = &self.code.plan.entries[number];
        let origin = Event::record(&self.context)?;
        for (launch, calls) in launches.iter().enumerate() {
            let begin = Event::record(&self.context)?;
            calls.iter().try_for_each(|call| self.module.launch(call))?;
            // What the kernel does wrong is seen by whatever is asked next.
            let failed = |failure: Failure| DeviceError::Launch {
                kernel: self.code.kernels[entry.launches[launch].kernel].name.clone(),
                said: failure.to_string(),
            };
            let end = Event::record(&self.context).map_err(failed)?;
            self.context.wait().map_err(failed)?;
            let workers = [begin.seconds_since(&origin)?..end.seconds_since(&origin)?];
            let seen = Seen { program: self, caches, failed: RefCell::new(None) };
            after(Tap { entry, launch, workers: &workers, memory: &seen });
            if let Some(failure) = seen.failed.into_inner() {
                return Err(failure.into());
            }
        }
        Ok(())
    }
}

/// Makes weights from a seed.
fn fill(context: &Arc<Context>, plan: &Plan, weights: &Buffer, seed: u64) -> Result<(), DeviceError> {
    let mut module = Module::load(context, &Image::Ptx(&fill::ptx()))?;
    fill::SYMBOLS.iter().try_for_each(|symbol| module.add(symbol, symbol, 0))?;
    for fill in fill::fills(plan, seed, weights.address(), CTAS_PER_SM * context.gpu.sms) {
        match fill {
            Fill::Constant(at, bytes) => weights.write(at, &bytes)?,
            Fill::Random(call) => module.launch(&call)?,
        }
    }
    Ok(context.wait()?)
}

/// A buffer for each of the plan's at this place.
fn buffers(
    plan: &Plan,
    place: &Place,
    context: &Arc<Context>,
) -> Result<BTreeMap<usize, Buffer>, DeviceError> {
    let wanted = plan.buffers.iter().enumerate().filter(|(_, buffer)| buffer.place == *place);
    wanted.map(|(number, buffer)| Ok((number, Buffer::zeroed(context, buffer.bytes)?))).collect()
}

/// Loads a target's code in the best form that the driver takes, and looks up its entries.
fn load_module(
    artifact: &Artifact,
    target: &TargetCode,
    code: &GpuCode,
    context: &Arc<Context>,
) -> Result<Module, DeviceError> {
    let gpu = &context.gpu;
    let failed = |phase: &gpu::Phase, said: String| DeviceError::Launch {
        kernel: code.kernels[phase.kernel].name.clone(),
        said,
    };
    for phase in &code.phases {
        let (needs, has) = (phase.shared_bytes, gpu.shared_bytes);
        if needs > has {
            let said = format!("it needs {needs} bytes of shared memory, {gpu} has {has}");
            return Err(failed(phase, said));
        }
    }
    let mut module = load_image(artifact, target, code, context)?;
    for phase in &code.phases {
        let (name, symbol) = (&code.kernels[phase.kernel].name, gpu::symbol(&phase.code.name));
        let added = module.add(name, &symbol, phase.shared_bytes);
        added.map_err(|failure| failed(phase, failure.to_string()))?;
    }
    Ok(module)
}

fn load_image(
    artifact: &Artifact,
    target: &TargetCode,
    code: &GpuCode,
    context: &Arc<Context>,
) -> Result<Module, DeviceError> {
    let has = |section: &str| artifact.section(section).is_some();
    let mut refusal = None;
    for (form, section) in gpu::images(target, has, context.gpu.capability) {
        let image = match form {
            Form::Cubin => Image::Cubin(artifact.require(&section)?),
            Form::Ptx => Image::Ptx(&code.ptx),
        };
        // A driver refuses machine code of a compiler that came after it, and takes the PTX beside it.
        match Module::load(context, &image) {
            Ok(module) => return Ok(module),
            Err(failure) => refusal = Some((section, failure.to_string())),
        }
    }
    let (section, said) = refusal.expect("a target that was chosen and read has PTX for this GPU");
    Err(DeviceError::BadPlan { file: artifact.file().to_path_buf(), section, said })
}

/// Memory between two launches.
struct Seen<'a> {
    program: &'a CudaProgram,
    caches: &'a Caches,
    /// Why a buffer could not be read: it was shown as zeros, and the step fails.
    failed: RefCell<Option<Failure>>,
}

impl device::Memory for Seen<'_> {
    fn bytes(&self, buffer: usize) -> Cow<'_, [u8]> {
        let (memory, at) = self.program.place(self.caches, buffer);
        let mut bytes = vec![0; self.program.code.plan.buffers[buffer].bytes];
        if let Err(failure) = memory.read(at, &mut bytes) {
            self.failed.borrow_mut().get_or_insert(failure);
        }
        Cow::Owned(bytes)
    }
}

impl Program for CudaProgram {
    fn vocab(&self) -> usize {
        self.code.plan.vocab
    }

    fn context(&self) -> usize {
        self.manifest_context
    }

    fn max_tokens(&self, want: Want) -> usize {
        self.code.plan.max_tokens(want.give())
    }

    fn state(&self) -> Result<State, DeviceError> {
        check_room(self.code.plan.state_bytes() as u64, self.context.free_bytes()?)?;
        let buffers = buffers(&self.code.plan, &Place::State, &self.context)?;
        Ok(State::new(Caches { context: self.context.clone(), buffers, graphs: BTreeMap::new() }))
    }

    fn run(&mut self, step: &Step<'_>, state: &mut State) -> Result<StepOutputs, DeviceError> {
        self.step(step, state, None)
    }
}

impl Tapped for CudaProgram {
    fn plan(&self) -> &Plan {
        &self.code.plan
    }

    fn run_tapped(
        &mut self,
        step: &Step<'_>,
        state: &mut State,
        after: &mut dyn FnMut(Tap<'_>),
    ) -> Result<StepOutputs, DeviceError> {
        self.step(step, state, Some(after))
    }
}

impl std::fmt::Debug for CudaProgram {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CudaProgram").field("file", &self.file).finish_non_exhaustive()
    }
}
