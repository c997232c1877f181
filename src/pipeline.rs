//! From a config to kernels and a plan: every stage of a compilation, each of which can be looked at.

use crate::tune::table::{Choices, Record, digest};
use ir::families::alone::signature;
use ir::families::{GroupView, LowerError};
use ir::graph::Graph;
use ir::kernel::Kernel;
use ir::passes::Run;
use ir::passes::lower::{Kernels, Launched};
use ir::passes::schedule::pin;
use ir::plan::{Give, Plan};
use ir::target::{Machine, Target};
use ir::{DType, passes};
use models::Config;
use models::llama::{self, Step};
use std::time::Instant;

/// Most tokens of a prefill step: longer prompts are cut, which changes no bit.
pub const CHUNK: usize = 512;
/// Most tokens of a step that gives every position's logits: they are as large as the vocabulary.
pub const ALL_LOGITS: usize = 64;

/// What is compiled: a model's shape in a dtype, for so many positions.
#[derive(Clone, Debug)]
pub struct Request<'a> {
    /// The model.
    pub config: &'a Config,
    /// Dtype of weights and stored values.
    pub dtype: DType,
    /// Positions that a sequence may have.
    pub context: usize,
    /// Schedules that were measured, or argued from machine code: they are taken, and the model of cost chooses the others.
    pub measured: Option<&'a Choices>,
}

/// Entry points for steps of more than one token, by the most that they take: that give the last position's logits, and none.
type Ranges = &'static [(usize, &'static str, &'static str)];

/// On a CPU one kernel serves any number of rows.
const CPU_RANGES: Ranges = &[(CHUNK, "prefill", "fill")];

/// Tiles of a GPU are as tall as a step has rows, so that few rows wait for no empty ones.
const GPU_RANGES: Ranges =
    &[(16, "prefill_16", "fill_16"), (64, "prefill_64", "fill_64"), (CHUNK, "prefill", "fill")];

impl Request<'_> {
    /// The entry points for a machine, as graphs before any pass.
    pub fn graphs(&self, machine: &Machine) -> Vec<(Graph, Give)> {
        let step = |name, tokens, give| Step { name, tokens, give };
        let mut steps = vec![step("decode", (1, 1), Give::Last)];
        let ranges = match machine {
            Machine::Cpu(_) => CPU_RANGES,
            Machine::Gpu(_) => GPU_RANGES,
        };
        let (mut after_decode, mut first) = (2, 1);
        for &(most, prefill, fill) in ranges {
            let most = most.min(self.context);
            if after_decode <= most {
                steps.push(step(prefill, (after_decode, most), Give::Last));
            }
            if first <= most {
                steps.push(step(fill, (first, most), Give::Nothing));
            }
            (after_decode, first) = (most.max(1) + 1, most + 1);
        }
        steps.push(step("logits_all", (1, ALL_LOGITS.min(self.context)), Give::All));
        let graph = |s: &Step| llama::graph(self.config, self.dtype, self.context, s);
        steps.iter().map(|s| (graph(s), s.give)).collect()
    }

    /// The text of these graphs, as an artifact holds it.
    pub fn text(&self, machine: &Machine) -> String {
        let texts: Vec<String> = self.graphs(machine).iter().map(|(graph, _)| graph.to_string()).collect();
        texts.join("\n")
    }
}

/// One entry point after all passes.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The graph with groups, layouts and schedules.
    pub graph: Graph,
    /// A launch for each group.
    pub launches: Vec<Launched>,
    /// What it gives back.
    pub give: Give,
}

/// A model lowered for one target.
#[derive(Clone, Debug)]
pub struct Lowered {
    /// Name of the target, as on the command line.
    pub target: String,
    /// Entry points.
    pub entries: Vec<Entry>,
    /// Their kernels, without repetition.
    pub kernels: Vec<Kernel>,
    /// What runs on which bytes.
    pub plan: Plan,
    /// Seconds that each pass took over all entry points, in the order in which they ran; `graph` builds them.
    pub seconds: Vec<(&'static str, f64)>,
}

impl Lowered {
    /// The records of the choices that groups took for a target, each once.
    pub fn taken(&self, Target { name: target, machine }: &Target, choices: &Choices) -> Vec<Record> {
        let groups = self.entries.iter().flat_map(|entry| GroupView::all(&entry.graph));
        let found = groups.filter_map(|view| choices.get(target, &digest(&signature(&view, machine))));
        let mut taken: Vec<Record> = Vec::new();
        for record in found {
            if !taken.contains(record) {
                taken.push(record.clone());
            }
        }
        taken
    }
}

/// Runs every pass on every entry point.
///
/// # Errors
///
/// When no kernel family covers a group.
pub fn lower(request: &Request<'_>, target: &Target) -> Result<Lowered, LowerError> {
    let mut seconds = Vec::new();
    let mut graphs = timed(&mut seconds, "graph", || request.graphs(&target.machine));
    for pass in &passes::PASSES {
        if let (Some(choices), "schedule") = (request.measured, pass.name) {
            graphs.iter_mut().for_each(|(graph, _)| {
                pin(graph, &|view| {
                    let record = choices.get(&target.name, &digest(&signature(view, &target.machine)))?;
                    Some((record.schedule.clone(), !record.key.predicted))
                })
            });
        }
        timed(&mut seconds, pass.name, || match pass.run {
            Run::Graph(run) => graphs.iter_mut().try_for_each(|(graph, _)| run(graph, target)),
            Run::Graphs(run) => {
                run(&mut graphs.iter_mut().map(|(graph, _)| graph).collect::<Vec<_>>());
                Ok(())
            }
            // Below: what they give is no graph.
            Run::Kernels | Run::Plan => Ok(()),
        })?;
    }
    let mut kernels = Kernels::default();
    let entries = timed(&mut seconds, "lower", || {
        let entry = |(graph, give): (Graph, Give)| {
            let launches = passes::lower::lower(&graph, target, &mut kernels)?;
            Ok(Entry { graph, launches, give })
        };
        graphs.into_iter().map(entry).collect::<Result<Vec<_>, LowerError>>()
    })?;
    let planned: Vec<_> = entries
        .iter()
        .map(|e| passes::memory::Lowered { graph: &e.graph, launches: e.launches.clone(), give: e.give })
        .collect();
    let plan = timed(&mut seconds, "memory", || passes::memory::memory(&planned, &kernels));
    drop(planned);
    Ok(Lowered { target: target.name.clone(), entries, kernels: kernels.list, plan, seconds })
}

fn timed<T>(seconds: &mut Vec<(&'static str, f64)>, name: &'static str, work: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let done = work();
    let took = start.elapsed().as_secs_f64();
    match seconds.iter_mut().find(|(n, _)| *n == name) {
        Some((_, sum)) => *sum += took,
        None => seconds.push((name, took)),
    }
    done
}
