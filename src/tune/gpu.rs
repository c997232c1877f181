//! Candidates on a GPU, or on the emulator of one.
//!
//! Each is launched with as many CTAs as a program would, on operands that no cache holds: several copies, used in turn. A GPU
//! times itself, from one event to another; of the emulator the time is that of emulating.

use super::candidates::Candidates;
#[cfg(feature = "compiler")]
use super::candidates::compile;
use super::task::Task;
use super::worker::{Bench, Failed, policy};
use crate::check::device::{Device, Emulated, numbered};
use crate::measure::{UNWRITTEN, cold_copies, fill, is_position, sizes, symbols, written};
use crate::predict::Ceilings;
use ir::families::{GroupView, Lowered, lower};
use ir::graph::GroupId;
use ir::random::Rng;
use ir::target::Target;
use runtime::conformance::Machine;
use runtime::cuda::Cuda;
use runtime::emulator::{Options, Sm, Sums};
use runtime::gpu_meter;
use runtime::launcher::{Block, Launcher, Loaded};
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

/// Runs of a candidate in a turn, at least; one more goes before.
const RUNS: usize = 3;

/// Code of a kernel, whose name in it is `0`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Code {
    /// For any driver.
    pub ptx: String,
    /// For the GPU itself, where `ptxas` was.
    pub cubin: Option<Vec<u8>>,
}

/// Where code comes from.
enum Source {
    File(Box<Candidates>),
    #[cfg(feature = "compiler")]
    Compiler,
}

/// A device by its name on the command line: `cuda:N`, or `ptx-emulator:SM`.
///
/// # Errors
///
/// What the driver says; a name that is neither.
pub fn machine(device: &str) -> Result<Machine, Box<dyn std::error::Error>> {
    if let Some(number) = device.strip_prefix("cuda:").and_then(|number| number.parse().ok()) {
        return Ok(Machine::Gpu(Cuda::new(number)?.context()?));
    }
    let sm: Option<Sm> = device.strip_prefix("ptx-emulator:").and_then(|sm| sm.parse().ok());
    let sm = sm.ok_or_else(|| format!("{device}: no GPU"))?;
    Ok(Machine::Emulator(Options { sm, seed: 0, sums: Sums::default() }))
}

/// Runs candidates on a GPU.
pub(super) struct GpuBench {
    target: Target,
    machine: Machine,
    source: Source,
    ceilings: Option<Ceilings>,
    /// Of the task at hand.
    launcher: Launcher,
    ready: BTreeMap<String, Alone>,
    operands: BTreeMap<Vec<usize>, Operands>,
}

/// A candidate that is ready.
struct Alone {
    lowered: Lowered,
    loaded: Loaded,
    /// Bytes of its parameters: the key of its operands.
    sizes: Vec<usize>,
}

/// What candidates run on: in copies, one block a parameter.
struct Operands {
    copies: Vec<Vec<Block>>,
    turn: usize,
}

impl GpuBench {
    pub(super) fn new(target: &Target, device: &str, file: Option<&Path>) -> Result<GpuBench, Failed> {
        let machine = machine(device)?;
        let source = match file {
            Some(file) => Source::File(Box::new(Candidates::open(file)?)),
            #[cfg(feature = "compiler")]
            None => Source::Compiler,
            #[cfg(not(feature = "compiler"))]
            None => return Err("this program has no compiler".into()),
        };
        Ok(GpuBench {
            target: target.clone(),
            launcher: Launcher::new(machine.clone()),
            machine,
            source,
            ceilings: None,
            ready: BTreeMap::new(),
            operands: BTreeMap::new(),
        })
    }

    fn code(&self, task: &Task, schedule: &str, lowered: &Lowered) -> Result<Code, Failed> {
        match &self.source {
            Source::File(candidates) => Ok(candidates.code(task, schedule, &lowered.kernel)?),
            #[cfg(feature = "compiler")]
            Source::Compiler => Ok(compile(&lowered.kernel, &self.target)?),
        }
    }

    /// Loads a candidate and makes its operands, if that was not done yet.
    fn prepare(&mut self, task: &Task, schedule: &str) -> Result<(), Failed> {
        if self.ready.contains_key(schedule) {
            return Ok(());
        }
        let graph = task.with(schedule);
        let view = GroupView::new(&graph, GroupId(0));
        let lowered = lower(&view, &self.target)?;
        let code = self.code(task, schedule, &lowered)?;
        let kernels = numbered(std::slice::from_ref(&lowered.kernel));
        let loaded = self.launcher.load(&kernels, &code.ptx, code.cubin.as_deref())?;
        let sizes = sizes(&lowered.kernel, &symbols([task.tokens, task.past]));
        if !self.operands.contains_key(&sizes) {
            let copies = match self.machine {
                Machine::Gpu(_) => cold_copies(sizes.iter().sum()),
                // There is no cache to go past.
                Machine::Emulator(_) => 1,
            };
            let mut rng = Rng(1);
            let params = lowered.kernel.params().zip(&lowered.args).zip(&sizes);
            let held: Vec<Vec<u8>> = params
                .map(|(((_, buffer), arg), &bytes)| {
                    let mut held = vec![0; bytes];
                    let past = is_position(&view, arg).then_some(task.past);
                    fill(&mut held, buffer.dtype, past, &mut rng);
                    held
                })
                .collect();
            let copy = |_| held.iter().map(|held| self.launcher.block(held)).collect::<Result<Vec<_>, _>>();
            let copies = (0..copies).map(copy).collect::<Result<_, _>>()?;
            self.operands.insert(sizes.clone(), Operands { copies, turn: 0 });
        }
        self.ready.insert(schedule.to_string(), Alone { lowered, loaded, sizes });
        Ok(())
    }
}

impl Bench for GpuBench {
    fn turn(&mut self) {
        self.ready.clear();
        self.operands.clear();
        self.launcher.clear();
    }

    fn policy(&mut self, task: &Task, schedule: &str) -> Result<Result<f64, String>, Failed> {
        policy(task, schedule, &self.target, |lowered| {
            let code = self.code(task, schedule, lowered)?;
            Ok(match &self.machine {
                Machine::Emulator(options) => {
                    Device::Emulated(Box::new(Emulated::of_ptx(&code.ptx, 1, options.sm)?))
                }
                Machine::Gpu(_) => {
                    let launcher = Launcher::new(self.machine.clone());
                    let kernels = numbered(std::slice::from_ref(&lowered.kernel));
                    let loaded = launcher.load(&kernels, &code.ptx, code.cubin.as_deref())?;
                    Device::of_loaded(launcher, loaded)
                }
            })
        })
    }

    fn result(&mut self, task: &Task, schedule: &str) -> Result<[u8; 32], Failed> {
        self.prepare(task, schedule)?;
        let Alone { lowered, loaded, sizes } = &self.ready[schedule];
        let blocks = &self.operands[sizes].copies[0];
        let written = written(&lowered.kernel);
        for &at in &written {
            self.launcher.write(blocks[at], &vec![UNWRITTEN; sizes[at]])?;
        }
        let symbols = symbols([task.tokens, task.past]);
        let most_ctas = self.launcher.most_ctas();
        self.launcher.launch(loaded, 0, blocks, &symbols, most_ctas)?;
        let mut hasher = blake3::Hasher::new();
        for &at in &written {
            hasher.update(&self.launcher.read(blocks[at], sizes[at])?);
        }
        Ok(hasher.finalize().into())
    }

    fn time(&mut self, task: &Task, schedule: &str, seconds: f64) -> Result<f64, Failed> {
        self.prepare(task, schedule)?;
        let Alone { loaded, sizes, .. } = &self.ready[schedule];
        let Operands { copies, turn } = self.operands.get_mut(sizes).expect("it is prepared");
        let (symbols, most_ctas) = (symbols([task.tokens, task.past]), self.launcher.most_ctas());
        let mut run = || {
            *turn = (*turn + 1) % copies.len();
            self.launcher.launch(loaded, 0, &copies[*turn], &symbols, most_ctas)
        };
        // Clocks, and code that comes from memory.
        run()?;
        let (begin, mut shortest) = (Instant::now(), f64::INFINITY);
        let mut runs = 0;
        while runs < RUNS || begin.elapsed().as_secs_f64() < seconds {
            shortest = run()?.min(shortest);
            runs += 1;
        }
        Ok(shortest)
    }

    fn limit(&mut self, task: &Task, _: &str) -> Result<f64, Failed> {
        let ceilings = match self.ceilings {
            Some(ceilings) => ceilings,
            None => {
                let [read_bytes_per_s, dot_flops] = gpu_meter::ceilings(&self.machine)?;
                *self.ceilings.insert(Ceilings { read_bytes_per_s, dot_flops })
            }
        };
        Ok(ceilings.seconds(ir::cost::cost(&task.view(), &task.symbols(task.tokens), task.past as i64)))
    }
}
