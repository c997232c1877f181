//! The plan: which kernels run in which order on which bytes. All that the run time needs to know of a program.
//!
//! * [`Plan::buffers`] is a table of memory: weights (with where each of their bytes comes from), states, inputs, and
//!   places in one arena. A launch names its arguments by index in that table; so do entry points their results.
//! * [`Plan::entries`] are functions of the code object, each for a range of `T` and for what is wanted back.
//! * [`mod@print`] is its text form, [`parse`] reads that, [`verify`] says whether a plan from a file may be trusted.

pub mod parse;
pub mod print;
pub mod verify;

use crate::dim::{MAX_SYMBOLS, Symbols};
use crate::dtype::DType;
use crate::graph::{Family, Graph, Pack};
use crate::kernel::Kernel;

/// A compiled program, but for its code and its weights' bytes.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Plan {
    /// Every piece of memory.
    pub buffers: Vec<PlanBuffer>,
    /// Every kernel, in the order of first use.
    pub kernels: Vec<PlanKernel>,
    /// Every entry point.
    pub entries: Vec<Entry>,
    /// Bytes of the arena: the most that an entry point needs.
    pub arena_bytes: usize,
    /// Slots of the KV cache.
    pub context: usize,
    /// Size of the vocabulary: columns of the logits.
    pub vocab: usize,
}

/// One piece of memory.
#[derive(Clone, Debug, PartialEq)]
pub struct PlanBuffer {
    /// Name in text: unique among weights and states; arena buffers bear their entry point's name in front.
    pub name: String,
    /// Where it is.
    pub place: Place,
    /// Element type.
    pub dtype: DType,
    /// Extents of a state as it lies, row-major: of a cache on a GPU `[pages, kv heads, page, head_dim]`. Empty elsewhere.
    pub extents: Vec<usize>,
    /// Size, padding counted.
    pub bytes: usize,
}

/// Where a buffer is.
#[derive(Clone, Debug, PartialEq)]
pub enum Place {
    /// In the artifact's weights, at this offset.
    Weight {
        /// Bytes from the beginning of the section; a multiple of [`ALIGN`].
        offset: usize,
        /// What it holds.
        source: WeightSource,
    },
    /// In the arena, while an entry point runs.
    Arena {
        /// Bytes from its beginning; a multiple of [`ALIGN`].
        offset: usize,
    },
    /// Zeroed at first, and kept from step to step.
    State,
    /// Given at each step.
    Input,
}

/// Alignment of every buffer: a cache line and a vector register.
pub const ALIGN: usize = 64;

/// What a weight buffer holds.
#[derive(Clone, Debug, PartialEq)]
pub enum WeightSource {
    /// A tensor of the checkpoint, row-major.
    Tensor {
        /// Hugging Face name.
        name: String,
        /// Rows (1 for a vector).
        rows: usize,
        /// Elements of a row.
        columns: usize,
    },
    /// Rows of tensors in panels. The `weight` of each stream is an index in `names`.
    Pack {
        /// Order of the elements; stream `s` reads tensor `names[s]`, its `weight` is not used.
        pack: Pack,
        /// Hugging Face names, one a stream.
        names: Vec<String>,
    },
    /// Numbers that the compiler made.
    Constant {
        /// In row-major order.
        data: Vec<f64>,
    },
}

/// A kernel as the run time knows it.
#[derive(Clone, Debug, PartialEq)]
pub struct PlanKernel {
    /// Its function in the code object.
    pub name: String,
    /// Its generator.
    pub family: Family,
    /// Text of its schedule.
    pub schedule: String,
    /// Was the schedule chosen by measuring, and not by the family's model of cost?
    pub measured: bool,
}

impl PlanKernel {
    /// How its schedule was chosen, in a word.
    pub fn source(&self) -> &'static str {
        if self.measured { "measured" } else { "predicted" }
    }
}

/// What an entry point gives back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Give {
    /// The cache alone: all but the last step of a long prompt.
    Nothing,
    /// Logits and greedy choice of the last position.
    Last,
    /// Logits of every position.
    All,
}

impl Give {
    /// Every kind.
    pub const ALL: [Give; 3] = [Give::Nothing, Give::Last, Give::All];

    /// What a step gives back, by the names of its outputs.
    pub fn of(graph: &Graph) -> Give {
        let has = |wanted: &str| graph.outputs.iter().any(|(name, _)| name == wanted);
        match (has("logits"), has("token")) {
            (false, _) => Give::Nothing,
            (true, true) => Give::Last,
            (true, false) => Give::All,
        }
    }

    /// Name in text.
    pub fn name(self) -> &'static str {
        match self {
            Give::Nothing => "nothing",
            Give::Last => "last",
            Give::All => "all",
        }
    }
}

/// An entry point: one function that all workers call.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// Its function in the code object.
    pub name: String,
    /// Symbols with the ranges that it is good for; `T` is the first.
    pub symbols: Symbols,
    /// What it gives back.
    pub give: Give,
    /// Buffer of the tokens, i32 `[T]`.
    pub tokens: usize,
    /// Buffer of the positions, i32 `[T]`.
    pub positions: usize,
    /// Buffer of the logits, f32 `[rows, vocab]`.
    pub logits: Option<usize>,
    /// Buffer of the greedy choice, i32 `[1]`.
    pub token: Option<usize>,
    /// Kernels in order; a barrier stands after each.
    pub launches: Vec<Launch>,
}

/// One execution of a kernel.
#[derive(Clone, Debug, PartialEq)]
pub struct Launch {
    /// Index in [`Plan::kernels`].
    pub kernel: usize,
    /// Indices in [`Plan::buffers`], one a parameter.
    pub args: Vec<usize>,
    /// Work at the entry point's largest symbols, with the cache half full.
    pub cost: Cost,
}

/// Work of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Cost {
    /// Floating-point operations; a multiply-add is two.
    pub flops: u64,
    /// Bytes that must come from memory or go there: each operand once.
    pub bytes: u64,
}

impl std::ops::AddAssign for Cost {
    fn add_assign(&mut self, other: Cost) {
        // A plan from a file may say anything.
        self.flops = self.flops.saturating_add(other.flops);
        self.bytes = self.bytes.saturating_add(other.bytes);
    }
}

/// The memory that a program needs, from [`Plan::totals`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Totals {
    /// The weights section, padding counted; mapped from the artifact.
    pub weight_bytes: usize,
    /// All states of one sequence.
    pub kv_cache_bytes: usize,
    /// Arena and inputs.
    pub workspace_bytes: usize,
    /// All of these.
    pub total_bytes: usize,
}

impl Plan {
    /// Kernels for who launches each by itself: an entry point a kernel, `launch.N`, and a buffer a parameter.
    pub fn alone(kernels: &[Kernel]) -> Plan {
        let params = kernels.iter().map(|kernel| kernel.params().count());
        let buffer = |number: usize| PlanBuffer {
            name: number.to_string(),
            place: Place::State,
            dtype: DType::U8,
            extents: Vec::new(),
            bytes: 0,
        };
        let entry = |(number, (kernel, params)): (usize, (&Kernel, usize))| Entry {
            name: format!("launch.{number}"),
            symbols: kernel.symbols.clone(),
            give: Give::Nothing,
            tokens: 0,
            positions: 0,
            logits: None,
            token: None,
            launches: vec![Launch { kernel: number, args: (0..params).collect(), cost: Cost::default() }],
        };
        let planned = |kernel: &Kernel| PlanKernel {
            name: kernel.name.clone(),
            family: kernel.family,
            schedule: kernel.schedule.clone(),
            measured: false,
        };
        Plan {
            buffers: (0..params.clone().max().unwrap_or(0)).map(buffer).collect(),
            kernels: kernels.iter().map(planned).collect(),
            entries: kernels.iter().zip(params).enumerate().map(entry).collect(),
            ..Plan::default()
        }
    }

    /// Bytes of the weights section.
    pub fn weight_bytes(&self) -> usize {
        let ends = self.buffers.iter().filter_map(|b| match b.place {
            Place::Weight { offset, .. } => Some(offset.saturating_add(b.bytes)),
            Place::Arena { .. } | Place::State | Place::Input => None,
        });
        ends.max().unwrap_or(0)
    }

    /// Bytes of all states.
    pub fn state_bytes(&self) -> usize {
        self.sum_bytes(&Place::State)
    }

    /// Bytes of all inputs.
    pub fn input_bytes(&self) -> usize {
        self.sum_bytes(&Place::Input)
    }

    fn sum_bytes(&self, place: &Place) -> usize {
        let sizes = self.buffers.iter().filter(|b| b.place == *place).map(|b| b.bytes);
        sizes.fold(0, usize::saturating_add)
    }

    /// The memory that the program needs.
    pub fn totals(&self) -> Totals {
        let (weight_bytes, kv_cache_bytes) = (self.weight_bytes(), self.state_bytes());
        let workspace_bytes = self.arena_bytes.saturating_add(self.input_bytes());
        let total_bytes = weight_bytes.saturating_add(kv_cache_bytes).saturating_add(workspace_bytes);
        Totals { weight_bytes, kv_cache_bytes, workspace_bytes, total_bytes }
    }

    /// The entry point that makes one token from one: `T = 1` alone, with logits and greedy choice.
    pub fn decode(&self) -> Option<&Entry> {
        let one = |e: &&Entry| e.symbols.0.first().is_some_and(|t| t.min == 1 && t.max == 1);
        self.entries.iter().filter(one).find(|e| e.give == Give::Last)
    }

    /// FLOPs of one decode step with the cache half full; `None` if there is no [`Plan::decode`].
    pub fn flops_per_token(&self) -> Option<u64> {
        self.decode().map(|e| e.cost().flops)
    }

    /// Bytes that one decode step moves from and to memory, weights among them, with the cache half full.
    pub fn bytes_per_token(&self) -> Option<u64> {
        self.decode().map(|e| e.cost().bytes)
    }

    /// Launches of one decode step.
    pub fn launches_per_token(&self) -> Option<usize> {
        self.decode().map(|e| e.launches.len())
    }

    /// The index of the entry point for `tokens` tokens that gives what is wanted.
    pub fn entry_number(&self, tokens: usize, give: Give) -> Option<usize> {
        let fits =
            |e: &Entry| e.symbols.0.first().is_some_and(|t| t.min <= tokens as i64 && tokens as i64 <= t.max);
        self.entries.iter().position(|e| e.give == give && fits(e))
    }

    /// The longest step that gives what is wanted.
    pub fn max_tokens(&self, give: Give) -> usize {
        let ends = self.entries.iter().filter(|e| e.give == give).map(|e| e.symbols.max()[0] as usize);
        ends.max().unwrap_or(0)
    }
}

impl Entry {
    /// Work of a whole step.
    pub fn cost(&self) -> Cost {
        let mut sum = Cost::default();
        self.launches.iter().for_each(|l| sum += l.cost);
        sum
    }

    /// The function of one launch alone, in code with taps.
    pub fn tap(&self, launch: usize) -> String {
        format!("{}.{launch}", self.name)
    }

    /// Largest values of the symbols.
    pub fn max(&self) -> [i64; MAX_SYMBOLS] {
        self.symbols.max()
    }
}

/// A small plan that has one of everything.
#[cfg(test)]
const TINY: &str = include_str!("../../tests/plan/tiny.plan");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn totals_are_sums() {
        let plan = parse::parse(TINY).unwrap();
        let totals = plan.totals();
        assert_eq!(totals.weight_bytes, 4160 + 192);
        assert_eq!(totals.kv_cache_bytes, 2048);
        assert_eq!(totals.workspace_bytes, 2176 + 2 * 64);
        assert_eq!(totals.total_bytes, 4352 + 2048 + 2304);
        assert_eq!(plan.flops_per_token(), Some(1280 + 1024 + 32));
        assert_eq!(plan.bytes_per_token(), Some(68 + 2300 + 1344 + 132));
        assert_eq!(plan.launches_per_token(), Some(4));
    }

    #[test]
    fn without_a_decode_step_nothing_is_said_of_it() {
        let mut plan = parse::parse(TINY).unwrap();
        plan.entries[0].symbols.0[0].max = 2;
        assert_eq!((plan.decode(), plan.flops_per_token(), plan.launches_per_token()), (None, None, None));
        assert_eq!(Plan::default().totals().total_bytes, 0);
    }

    #[test]
    fn totals_of_an_unverified_plan_do_not_overflow() {
        let mut plan = parse::parse(TINY).unwrap();
        plan.buffers.iter_mut().for_each(|b| b.bytes = usize::MAX);
        plan.entries[0].launches.iter_mut().for_each(|l| l.cost.flops = u64::MAX);
        assert_eq!(plan.totals().total_bytes, usize::MAX);
        assert_eq!(plan.flops_per_token(), Some(u64::MAX));
    }
}
