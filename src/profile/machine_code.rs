//! The speed of a model on a GPU that is not here, argued from the machine code of its kernels.
//!
//! * PTX is assembled for the GPU itself, as its driver would.
//! * [`super::steady`] counts the loop of each kernel of tensor cores, [`super::emulated`] its bank conflicts.
//! * [`super::predicted`] makes times of them, for the launches of the model and for problems that others have published
//!   figures of.

use super::emulated::{EmulationError, first_turns};
use super::family_name;
use super::gpus::{GPUS, Gpu};
use super::predicted::{LAUNCH_SECONDS, Limit, Prediction, Problem};
use super::recorded::Figure;
use super::steady::Steady;
use crate::compile::{Code, architecture_for};
use crate::measure;
use crate::predict::{self, Step};
use crate::sass::{self, SassError};
use codegen::cpu::CodegenError;
use codegen::nvptx::{self, Architecture};
use codegen::ptxas::{self, PtxasError, Tool};
use ir::families::attention::{Shape, shape_of};
use ir::families::gpu::{AttentionTile, ProductTile, attention_tile, product_tile};
use ir::families::{GroupView, LowerError, Lowered, dot};
use ir::graph::Family;
use ir::kernel::Kernel;
use ir::plan::{Cost, Launch};
use runtime::cuda::CTAS_PER_SM;
use runtime::gpu;
use serde::Serialize;

/// Tokens of the attention that is stated, causal.
const STATED_TOKENS: usize = 16_384;
/// Heads of it times their width: FlashAttention-3's setting (arXiv 2407.08608).
const STATED_WIDTH: usize = 2048;
/// Rows, columns and depth of the product that is stated.
const STATED_PRODUCT: usize = 8192;

/// What is argued of a model.
#[derive(Clone, Debug, Serialize)]
pub struct Argued {
    /// The GPU.
    pub gpu: &'static str,
    /// What its machine code is for.
    pub sm: String,
    /// Version of the assembler.
    pub ptxas: String,
    /// Kernels of tensor cores, in the order of first use.
    pub loops: Vec<KernelLoop>,
    /// One token after the prompt.
    pub decode: Phase,
    /// The prompt, into an empty cache.
    pub prefill: Phase,
}

/// A kernel of tensor cores.
#[derive(Clone, Debug, Serialize)]
pub struct KernelLoop {
    /// Its name in the plan.
    pub name: String,
    /// Text of its schedule.
    pub schedule: String,
    /// Its steady loop.
    pub steady: Steady,
    /// As [`Steady::serial`].
    pub serial: f64,
    /// As [`Steady::overlapped`].
    pub overlapped: f64,
    /// CTAs that an SM holds.
    pub resident_ctas: u32,
    /// The same tiles on a problem that figures are published of; none for those of few rows.
    pub stated: Option<Stated>,
}

/// A problem that others have published figures of.
#[derive(Clone, Debug, Serialize)]
pub struct Stated {
    /// `attention 128`, by the width of a head, or `product 8192`.
    pub problem: String,
    /// As [`Problem::tile_efficiency`].
    pub tile_efficiency: f64,
    /// 10^12 FLOPs of the result a second, at the lower of the two shares of the peak and at the higher.
    pub tflops: [f64; 2],
    /// Figures of this GPU.
    pub recorded: Vec<Figure>,
}

/// Steps of one kind.
#[derive(Clone, Debug, Serialize)]
pub struct Phase {
    /// Tokens of all steps.
    pub tokens: usize,
    /// Positions in the cache before the first.
    pub past: usize,
    /// Seconds at the higher of the two shares of the peak.
    pub least_s: f64,
    /// Seconds at the lower.
    pub most_s: f64,
    /// Each kernel, in the order of first use.
    pub kernels: Vec<KernelTime>,
}

/// All launches of a kernel in a phase.
#[derive(Clone, Debug, Serialize)]
pub struct KernelTime {
    /// Its name in the plan.
    pub name: String,
    /// Its generator.
    #[serde(serialize_with = "family_name")]
    pub family: Family,
    /// Launches.
    pub launches: usize,
    /// Bytes that they must move.
    pub bytes: u64,
    /// FLOPs of their results.
    pub flops: u64,
    /// What limits the first.
    pub limit: Limit,
    /// As [`Problem::tile_efficiency`], of the first.
    pub tile_efficiency: Option<f64>,
    /// Seconds of them all at the higher of the two shares of the peak.
    pub least_s: f64,
    /// Seconds of them all at the lower.
    pub most_s: f64,
}

/// Why nothing can be argued.
#[derive(Debug, thiserror::Error)]
pub enum ArgueError {
    /// A tool is missing, or refuses the code.
    #[error(transparent)]
    Codegen(#[from] CodegenError),
    /// The machine code cannot be read.
    #[error(transparent)]
    Sass(#[from] SassError),
    /// A kernel does not run on the emulator.
    #[error("@{kernel}: no bank conflicts are counted")]
    Emulation {
        /// The kernel.
        kernel: String,
        /// What the emulator says.
        source: EmulationError,
    },
    /// A group is not what its kernel does.
    #[error(transparent)]
    Lower(#[from] LowerError),
    /// A GPU that does not run such code.
    #[error("--gpu {gpu}: found compute capability {has}, {target} runs on {fit}")]
    Unfit {
        /// The GPU.
        gpu: &'static str,
        /// Its compute capability and shared memory.
        has: String,
        /// What the code is for.
        target: &'static str,
        /// GPUs that run it.
        fit: String,
    },
}

impl From<PtxasError> for ArgueError {
    fn from(error: PtxasError) -> ArgueError {
        ArgueError::Codegen(error.into())
    }
}

/// The GPU that an architecture's code is meant for: the first that takes it before all other.
pub fn own_gpu(architecture: &Architecture) -> Option<&'static Gpu> {
    let best = |gpu: &&Gpu| architecture_for(gpu.capability, gpu.cta_shared_bytes());
    GPUS.iter().find(|gpu| best(gpu).is_some_and(|best| best.name == architecture.name))
}

/// What a GPU's own machine code of an architecture's PTX is for.
fn sm_of(architecture: &Architecture, gpu: &Gpu) -> Result<String, ArgueError> {
    let runs = |gpu: &Gpu| {
        let fits = architecture.shared_bytes <= gpu.cta_shared_bytes() as usize;
        fits && gpu::takes(gpu.capability).iter().any(|&(sm, _)| sm == architecture.cpu)
    };
    if !runs(gpu) {
        let fit: Vec<&str> = GPUS.iter().filter(|gpu| runs(gpu)).map(|gpu| gpu.name).collect();
        let has = format!(
            "{} with {} KiB of shared memory a CTA",
            gpu::capability_text(gpu.capability),
            gpu.cta_shared_bytes() >> 10
        );
        let target = architecture.name;
        return Err(ArgueError::Unfit { gpu: gpu.name, has, target, fit: fit.join(", ") });
    }
    // Code that is for one architecture alone bears its letter.
    Ok(match architecture.cpu.ends_with('a') {
        true => architecture.cpu.to_string(),
        false => format!("sm_{}", gpu.capability),
    })
}

/// Argues the speed of a model that was lowered for a GPU's architecture: a prompt of so many tokens, and one token after it.
/// `figures` were recorded.
///
/// # Errors
///
/// [`ArgueError`].
pub fn argue(
    code: &Code,
    architecture: &Architecture,
    gpu: &'static Gpu,
    prompt: usize,
    figures: &[Figure],
) -> Result<Argued, ArgueError> {
    let assembled = Assembled::of(&code.llvm, architecture, gpu)?;
    let mut arguing = Arguing { code, assembled: &assembled, figures, loops: Vec::new() };
    let plan = &code.lowered.plan;
    let decode = arguing.phase(&predict::decode(plan, prompt).into_iter().collect::<Vec<_>>())?;
    let prefill = arguing.phase(&predict::prompt(plan, prompt))?;
    let loops = arguing.loops;
    let Assembled { sm, ptxas, .. } = assembled;
    Ok(Argued { gpu: gpu.name, sm, ptxas, loops, decode, prefill })
}

/// What is argued of a kernel by itself.
pub struct Alone {
    /// Its time in a step.
    pub prediction: Prediction,
    /// What `ptxas` could not do well: of such code the model knows too little.
    pub losses: Vec<String>,
}

/// Argues the time of a group's kernel in a step of `tokens` behind `past` others.
///
/// # Errors
///
/// [`ArgueError`].
pub fn alone(
    view: &GroupView<'_>,
    lowered: &Lowered,
    architecture: &Architecture,
    gpu: &'static Gpu,
    [tokens, past]: [usize; 2],
) -> Result<Alone, ArgueError> {
    let kernel = &lowered.kernel;
    let llvm = nvptx::llvm(std::slice::from_ref(kernel), architecture)?;
    let assembled = Assembled::of(&llvm, architecture, gpu)?;
    let positions = lowered.args.iter().position(|arg| measure::is_position(view, arg));
    let looped = assembled.steady(kernel, positions, [tokens, past])?;
    let cost = ir::cost::cost(view, &measure::symbols([tokens, past]), past as i64);
    let tiles = Tiles::of(view, &kernel.schedule, tokens)?;
    let looped = looped.as_ref().map(|(steady, resident)| (steady, *resident));
    let prediction = assembled.predict(kernel, tiles.as_ref(), looped, [tokens, past], cost);
    Ok(Alone { prediction, losses: assembled.report.losses() })
}

/// Kernels as a GPU's machine code.
struct Assembled<'a> {
    architecture: &'a Architecture,
    gpu: &'static Gpu,
    sm: String,
    ptxas: String,
    report: ptxas::Report,
    codes: Vec<sass::Code>,
}

impl Assembled<'_> {
    fn of<'a>(
        llvm: &str,
        architecture: &'a Architecture,
        gpu: &'static Gpu,
    ) -> Result<Assembled<'a>, ArgueError> {
        let sm = sm_of(architecture, gpu)?;
        let (ptxas, nvdisasm) = (Tool::Ptxas.find()?, Tool::Nvdisasm.find()?);
        let ptxas::Cubin { bytes, report } =
            ptxas::assemble(&ptxas, &nvptx::compile(llvm, architecture)?, &sm)?;
        let codes = sass::parse(&ptxas::disassemble(&nvdisasm, &bytes)?)?;
        Ok(Assembled { architecture, gpu, sm, ptxas: ptxas.version, report, codes })
    }

    /// CTAs of a kernel's launch, as the run time limits them.
    fn most_ctas(&self, kernel: &Kernel) -> u32 {
        gpu::most_ctas(kernel, CTAS_PER_SM * self.gpu.sms)
    }

    /// The loop of a kernel of tensor cores and the CTAs that an SM holds; `None` if it has no such loop. `positions` is the
    /// parameter of the step's positions.
    fn steady(
        &self,
        kernel: &Kernel,
        positions: Option<usize>,
        step: [usize; 2],
    ) -> Result<Option<(Steady, u32)>, ArgueError> {
        let threads = u32::from(kernel.threads);
        // A kernel with barriers is several in machine code.
        let phases = kernel.phases().into_iter().map(|phase| nvptx::symbol(&phase.name));
        let mut found = phases.filter_map(|symbol| {
            let code = self.codes.iter().find(|code| code.symbol == symbol)?;
            Some((symbol, Steady::of(code, threads, 1.0, self.gpu)?))
        });
        let Some((symbol, bare)) = found.next() else { return Ok(None) };
        let counts = first_turns(self.architecture, kernel, positions, step);
        let counts =
            counts.map_err(|source| ArgueError::Emulation { kernel: kernel.name.clone(), source })?;
        let conflicts = counts.conflict_factor();
        let steady = Steady { shared: bare.shared * conflicts, conflicts, ..bare };
        let report = self.report.kernels.iter().find(|report| report.kernel == symbol);
        let registers = report.map_or(255, |report| report.registers);
        Ok(Some((steady, self.gpu.resident(threads, registers, kernel.shared_bytes() as u32))))
    }

    /// The time of a launch of a kernel.
    fn predict(
        &self,
        kernel: &Kernel,
        tiles: Option<&Tiles>,
        looped: Option<(&Steady, u32)>,
        step: [usize; 2],
        cost: Cost,
    ) -> Prediction {
        let predicted = match (tiles, looped) {
            (Some(tiles), Some((steady, resident))) => {
                let problem = tiles.problem(step, cost.bytes);
                Prediction::tensor(&problem, steady, self.gpu, resident, self.most_ctas(kernel))
            }
            _ => Prediction::other(cost, self.gpu),
        };
        // Each phase behind the first is a launch.
        let more = (kernel.phases().len() - 1) as f64 * LAUNCH_SECONDS;
        let (least_s, most_s) = (predicted.least_s + more, predicted.most_s + more);
        Prediction { least_s, most_s, ..predicted }
    }
}

struct Arguing<'a> {
    code: &'a Code,
    assembled: &'a Assembled<'a>,
    figures: &'a [Figure],
    loops: Vec<KernelLoop>,
}

impl Arguing<'_> {
    fn phase(&mut self, steps: &[Step<'_>]) -> Result<Phase, ArgueError> {
        let lowered = &self.code.lowered;
        let mut kernels: Vec<KernelTime> = Vec::new();
        for step in steps {
            let entry = lowered.entries.iter().find(|entry| entry.graph.name == step.entry.name);
            let groups = entry.map(|entry| GroupView::all(&entry.graph)).unwrap_or_default();
            for (view, launch) in groups.iter().zip(&step.entry.launches) {
                let Prediction { least_s, most_s, limit, tile_efficiency } =
                    self.predict(view, step, launch)?;
                let cost = predict::launch_cost(&lowered.plan, step, launch);
                let kernel = &lowered.plan.kernels[launch.kernel];
                match kernels.iter_mut().find(|known| known.name == kernel.name) {
                    Some(known) => {
                        known.launches += 1;
                        known.bytes += cost.bytes;
                        known.flops += cost.flops;
                        known.least_s += least_s;
                        known.most_s += most_s;
                    }
                    None => kernels.push(KernelTime {
                        name: kernel.name.clone(),
                        family: kernel.family,
                        launches: 1,
                        bytes: cost.bytes,
                        flops: cost.flops,
                        limit,
                        tile_efficiency,
                        least_s,
                        most_s,
                    }),
                }
            }
        }
        Ok(Phase {
            tokens: steps.iter().map(|step| step.tokens).sum(),
            past: steps.first().map_or(0, |step| step.past),
            least_s: kernels.iter().map(|kernel| kernel.least_s).sum(),
            most_s: kernels.iter().map(|kernel| kernel.most_s).sum(),
            kernels,
        })
    }

    fn predict(
        &mut self,
        view: &GroupView<'_>,
        step: &Step<'_>,
        launch: &Launch,
    ) -> Result<Prediction, ArgueError> {
        let lowered = &self.code.lowered;
        let cost = predict::launch_cost(&lowered.plan, step, launch);
        let kernel = &lowered.kernels[launch.kernel];
        let tiles = Tiles::of(view, &lowered.plan.kernels[launch.kernel].schedule, step.tokens)?;
        let looped = match &tiles {
            Some(tiles) => self.looped(step, launch, tiles)?.cloned(),
            None => None,
        };
        let looped = looped.as_ref().map(|known| (&known.steady, known.resident_ctas));
        let at = [step.tokens, step.past];
        Ok(self.assembled.predict(kernel, tiles.as_ref(), looped, at, cost))
    }

    /// The loop of a kernel of tensor cores, counted at its first launch; `None` if it has none.
    fn looped(
        &mut self,
        step: &Step<'_>,
        launch: &Launch,
        tiles: &Tiles,
    ) -> Result<Option<&KernelLoop>, ArgueError> {
        let lowered = &self.code.lowered;
        let planned = &lowered.plan.kernels[launch.kernel];
        if let Some(known) = self.loops.iter().position(|known| known.name == planned.name) {
            return Ok(Some(&self.loops[known]));
        }
        let Assembled { architecture, gpu, .. } = *self.assembled;
        let positions = launch.args.iter().position(|&arg| arg == step.entry.positions);
        let kernel = &lowered.kernels[launch.kernel];
        let looped = self.assembled.steady(kernel, positions, [step.tokens, step.past])?;
        let Some((steady, resident_ctas)) = looped else { return Ok(None) };
        let stated = tiles.stated().map(|(name, problem)| {
            let most = self.assembled.most_ctas(kernel);
            let predicted = Prediction::tensor(&problem, &steady, gpu, resident_ctas, most);
            let of_this = |figure: &&Figure| {
                (&*figure.gpu, &*figure.target, &*figure.problem) == (gpu.name, architecture.name, &*name)
            };
            let tflops = |seconds: f64| problem.flops as f64 / seconds / 1e12;
            Stated {
                tile_efficiency: predicted.tile_efficiency.unwrap_or_default(),
                tflops: [predicted.most_s, predicted.least_s].map(tflops),
                recorded: self.figures.iter().filter(of_this).cloned().collect(),
                problem: name,
            }
        });
        self.loops.push(KernelLoop {
            name: planned.name.clone(),
            schedule: planned.schedule.clone(),
            serial: steady.serial(),
            overlapped: steady.overlapped(),
            steady,
            resident_ctas,
            stated,
        });
        Ok(self.loops.last())
    }
}

/// A launch cut into tiles.
enum Tiles {
    Product { rows: usize, k: usize, segments: Vec<(usize, usize)>, tile: ProductTile },
    Attention { shape: Shape, tile: AttentionTile },
}

impl Tiles {
    /// How a group's launch is cut by a schedule, if it is.
    fn of(view: &GroupView<'_>, schedule: &str, tokens: usize) -> Result<Option<Tiles>, LowerError> {
        Ok(match view.family() {
            Family::Dot => {
                let group = dot::analyse(view)?;
                let segments = group.segments.iter().map(|s| (s.n(), s.streams.len())).collect();
                let rows = group.m.constant().map_or(tokens, |rows| rows as usize);
                product_tile(schedule).map(|tile| Tiles::Product { rows, k: group.k, segments, tile })
            }
            Family::Attention => {
                let shape = shape_of(view)?;
                attention_tile(schedule).map(|tile| Tiles::Attention { shape, tile })
            }
            Family::Rowwise | Family::Elementwise | Family::Gather | Family::Sample => None,
        })
    }

    fn problem(&self, [tokens, past]: [usize; 2], bytes: u64) -> Problem {
        match self {
            Tiles::Product { rows, k, segments, tile } => {
                Problem::product([*rows, *k], segments, bytes, *tile)
            }
            Tiles::Attention { shape, tile } => Problem::attention(shape, [tokens, past], bytes, *tile),
        }
    }

    /// The same tiles on the problem that is stated for them, in numbers of two bytes; and its name. None where keys are split:
    /// that is for few rows.
    fn stated(&self) -> Option<(String, Problem)> {
        match self {
            Tiles::Product { segments, tile, .. } => {
                let n = STATED_PRODUCT;
                let streams = segments.iter().map(|&(_, streams)| streams).max().unwrap_or(1);
                let problem = Problem::product([n, n], &[(n / streams, streams)], 6 * (n * n) as u64, *tile);
                Some((format!("product {n}"), problem))
            }
            Tiles::Attention { shape, tile } if tile.split == 0 => {
                let heads = (STATED_WIDTH / shape.d).max(1);
                let kv_heads = (heads / shape.per_kv).max(1);
                let bytes = 4 * STATED_TOKENS * shape.d * kv_heads * (shape.per_kv + 1);
                let shape = Shape { kv_heads, ..*shape };
                let problem = Problem::attention(&shape, [STATED_TOKENS, 0], bytes as u64, *tile);
                Some((format!("attention {}", shape.d), problem))
            }
            Tiles::Attention { .. } => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use codegen::nvptx::ARCHITECTURES;

    #[test]
    fn code_is_assembled_for_a_gpu_that_runs_it() {
        let of = |architecture: &Architecture, gpu| sm_of(architecture, Gpu::of(gpu).unwrap());
        let [ampere, small, hopper] = &ARCHITECTURES;
        assert_eq!([ampere, small, hopper].map(|a| own_gpu(a).unwrap().name), ["a100", "rtx4090", "h100"]);
        assert_eq!(
            ["a100", "h100", "rtx4090"].map(|gpu| of(small, gpu).unwrap()),
            ["sm_80", "sm_90", "sm_89"]
        );
        assert_eq!(of(hopper, "h200").unwrap(), "sm_90a");
        let refused = of(ampere, "rtx4090").unwrap_err().to_string();
        assert_eq!(
            refused,
            "--gpu rtx4090: found compute capability 8.9 with 99 KiB of shared memory a CTA, cuda:sm_80 runs on a100, h100, h200"
        );
    }
}
