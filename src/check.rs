//! Kernels judged one by one, each alone with what it reads.
//!
//! * [`cases`]: the table of graphs that every walk goes through; [`Distribution`]: the numbers that they are fed.
//! * [`Subject`]: a graph after all passes, of which each group is lowered with any of its schedules.
//! * [`device`]: where a launch runs.
//! * [`walk`]: cases times schedules, shapes, distributions and devices.
//!
//! What counts as right is [`crate::judge`]'s to say.

pub mod cases;
pub mod device;
#[cfg(feature = "compiler")]
pub mod walk;

use crate::compare::memory;
use crate::judge::group::expect;
use crate::judge::{Expected, Mismatch, Shares};
use device::{Device, Held, LaunchError};
use ir::DType;
use ir::dim::MAX_SYMBOLS;
use ir::families::{self, Arg, GroupView, LowerError, Lowered};
use ir::graph::{Graph, GroupId, TensorType, ValueId};
use ir::interp::{InterpError, Rounding, Tensor, compute, interpret};
use ir::op::Op;
use ir::passes::{fuse, layout, share, simplify};
use ir::random::Rng;
use ir::target::Target;
use std::collections::HashMap;
use std::rc::Rc;

/// How inputs, weights and caches are drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Distribution {
    /// Of mean 0 and variance 1.
    Normal,
    /// Normal, one in a hundred 100 times as large.
    Outliers,
    /// Near the subnormal edge: normal times 2^-118 to 2^-133; in f16 2^-6 to 2^-21.
    Tiny,
    /// Neighbours that cancel but for 1 %.
    Cancelling,
    /// A sum of the indices, each axis with a factor of its own: swapped axes show.
    Structured,
}

impl Distribution {
    /// Every distribution.
    pub const ALL: [Distribution; 5] = [
        Distribution::Normal,
        Distribution::Outliers,
        Distribution::Tiny,
        Distribution::Cancelling,
        Distribution::Structured,
    ];

    /// Name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Distribution::Normal => "normal",
            Distribution::Outliers => "outliers",
            Distribution::Tiny => "tiny",
            Distribution::Cancelling => "cancelling",
            Distribution::Structured => "structured",
        }
    }

    /// A tensor of floats, rounded to its dtype.
    pub fn tensor(self, rng: &mut Rng, dtype: DType, shape: &[usize]) -> Tensor {
        // Twelve uniform numbers of variance 1/3 have a sum of variance 4.
        let normal = |rng: &mut Rng| (0..12).map(|_| rng.unit()).sum::<f64>() / 2.0;
        let edge = if dtype == DType::F16 { -6.0 } else { -118.0 };
        let one = |rng: &mut Rng, at: usize| match self {
            Distribution::Normal => normal(rng),
            Distribution::Outliers if rng.below(100) == 0 => 100.0 * normal(rng),
            Distribution::Outliers => normal(rng),
            Distribution::Tiny => normal(rng) * f64::exp2(edge - rng.below(16) as f64),
            Distribution::Cancelling if at.is_multiple_of(2) => 1.0 + 0.01 * normal(rng),
            Distribution::Cancelling => -1.0 + 0.01 * normal(rng),
            // Whole numbers below 128: exact in bf16, and of both signs.
            Distribution::Structured => {
                let (mut rest, mut sum) = (at, 0);
                for (axis, extent) in shape.iter().enumerate().rev() {
                    sum += (2 * axis + 1) * (rest % extent);
                    rest /= extent;
                }
                (sum % 127) as f64 / 64.0 - 1.0
            }
        };
        let data: Vec<f64> = (0..shape.iter().product()).map(|at| one(rng, at)).collect();
        Tensor::new(dtype, shape, &data)
    }
}

/// What a graph is run on: its symbols, how much the caches hold, and the numbers.
#[derive(Clone, Copy, Debug)]
pub struct Feed {
    /// Values of the graph's symbols.
    pub symbols: [i64; MAX_SYMBOLS],
    /// Positions that were in the caches before.
    pub past: i64,
    /// How floats are drawn.
    pub distribution: Distribution,
    /// Of the numbers; each tensor has its own, by its name.
    pub seed: u64,
}

/// Tensors by value.
pub type Tensors = HashMap<ValueId, Rc<Tensor>>;

/// A graph after all passes, but for the choice of schedules.
#[derive(Clone, Debug)]
pub struct Subject {
    /// With groups and layouts.
    pub graph: Graph,
}

impl Subject {
    /// Runs the passes, for a kind of machine.
    pub fn new(mut graph: Graph, target: &Target) -> Subject {
        simplify::simplify(&mut graph);
        fuse::fuse(&mut graph, target);
        layout::layout(&mut graph, target);
        share::share(&mut [&mut graph]);
        Subject { graph }
    }

    /// Every group.
    pub fn groups(&self) -> impl Iterator<Item = GroupId> + use<> {
        (0..self.graph.groups.len() as u32).map(GroupId)
    }

    /// The legal space of a group.
    ///
    /// # Errors
    ///
    /// When no family covers it.
    pub fn schedules(&self, group: GroupId, target: &Target) -> Result<Vec<String>, LowerError> {
        families::schedules(&GroupView::new(&self.graph, group), target)
    }

    /// The kernel of a group with a schedule; the graph keeps the schedule.
    ///
    /// # Errors
    ///
    /// When no family covers it.
    pub fn lower(&mut self, group: GroupId, schedule: &str, target: &Target) -> Result<Lowered, LowerError> {
        self.graph.groups[group.0 as usize].schedule = (!schedule.is_empty()).then(|| schedule.to_string());
        families::lower(&GroupView::new(&self.graph, group), target)
    }

    /// Draws what is bound, and computes every value as the graph interpreter stores it.
    ///
    /// # Errors
    ///
    /// What the interpreter says.
    pub fn tensors(&self, feed: &Feed) -> Result<Tensors, InterpError> {
        let mut tensors = Tensors::new();
        let mut bind = |name: &str, ty: &TensorType| Ok(Rc::new(self.bound(name, ty, feed)));
        let mut keep = |id: ValueId, tensor: &Tensor| {
            tensors.insert(id, Rc::new(tensor.clone()));
        };
        interpret(&self.graph, &feed.symbols, Rounding::Stored, &mut bind, Some(&mut keep))?;
        for id in self.graph.ids() {
            let value = &self.graph[id];
            match &value.op {
                // Nothing may read it; a group may still name it.
                Op::Input { name } | Op::Weight { name } | Op::State { name } => {
                    tensors.entry(id).or_insert_with(|| Rc::new(self.bound(name, &value.ty, feed)));
                }
                Op::Constant { .. } => {
                    tensors.insert(id, Rc::new(compute(value, &[], &feed.symbols, Rounding::Stored)?));
                }
                _ => {}
            }
        }
        Ok(tensors)
    }

    fn bound(&self, name: &str, ty: &TensorType, feed: &Feed) -> Tensor {
        let seed = name.bytes().fold(feed.seed, |hash, byte| Rng(hash ^ u64::from(byte)).bits());
        let mut rng = Rng(seed);
        let shape: Vec<usize> = ty.shape.iter().map(|dim| dim.eval(&feed.symbols) as usize).collect();
        if ty.dtype.is_float() {
            return feed.distribution.tensor(&mut rng, ty.dtype, &shape);
        }
        let below = self.indexed_rows(name);
        let one = |at: usize| match below {
            Some(rows) => rng.below(rows) as f64,
            None => feed.past as f64 + at as f64,
        };
        let data: Vec<f64> = (0..shape.iter().product()).map(one).collect();
        Tensor::new(ty.dtype, &shape, &data)
    }

    /// Rows of the smallest table that the input picks from; `None` for positions.
    fn indexed_rows(&self, input: &str) -> Option<usize> {
        let graph = &self.graph;
        let names = |id: ValueId| matches!(&graph[id].op, Op::Input { name } if name == input);
        let tables = graph.values.iter().filter(|v| matches!(v.op, Op::Gather) && names(v.operands[1]));
        tables.filter_map(|v| graph[v.operands[0]].ty.shape[0].constant()).min().map(|rows| rows as usize)
    }

    /// What each root of a group must be near to.
    ///
    /// # Errors
    ///
    /// What the interpreter says.
    pub fn expected(
        &self,
        group: GroupId,
        symbols: &[i64; MAX_SYMBOLS],
        tensors: &Tensors,
    ) -> Result<Vec<Expected>, InterpError> {
        expect(&GroupView::new(&self.graph, group), symbols, &mut |id| tensors[&id].clone())
    }

    /// What the parameters of a group's launch hold before it.
    pub fn held(&self, group: GroupId, args: &[Arg], tensors: &Tensors) -> Vec<Held> {
        let tensor = |id: ValueId| tensors[&id].clone();
        args.iter().map(|arg| memory::held(&self.graph, group, arg, &tensor)).collect()
    }

    /// The roots of a group, of what its parameters hold after a launch.
    pub fn results(
        &self,
        group: GroupId,
        args: &[Arg],
        symbols: &[i64; MAX_SYMBOLS],
        after: &[Vec<f64>],
    ) -> Vec<(ValueId, Tensor)> {
        let view = GroupView::new(&self.graph, group);
        let result = |&root: &ValueId| {
            let place = Arg::Value(families::storage(&self.graph, root));
            let at = args.iter().position(|arg| *arg == place).expect("a root is an argument of its launch");
            (root, memory::tensor_of(&self.graph, root, symbols, &after[at]))
        };
        view.roots.iter().map(result).collect()
    }
}

/// A group's launch that is not right.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say what the fields are")]
pub enum Wrong {
    #[error(transparent)]
    Launch(#[from] LaunchError),
    #[error("%{value}: {mismatch}")]
    Result { value: String, mismatch: Mismatch },
}

impl Wrong {
    /// How far beyond the bounds it is.
    pub fn shares(&self) -> Shares {
        match self {
            Wrong::Result { mismatch, .. } => mismatch.shares(),
            Wrong::Launch(_) => Shares { hard: f64::INFINITY, ..Shares::default() },
        }
    }
}

/// Launches a group's kernel; gives what it stored, which is nothing on a device that gives nothing.
///
/// # Errors
///
/// What is wrong before any number is looked at.
pub fn results(
    subject: &Subject,
    group: GroupId,
    (number, lowered): (usize, &Lowered),
    device: &mut Device,
    (symbols, tensors): (&[i64; MAX_SYMBOLS], &Tensors),
) -> Result<Vec<(ValueId, Tensor)>, LaunchError> {
    let held = subject.held(group, &lowered.args, tensors);
    let after = device.run(number, &lowered.kernel, &lowered.args, &held, *symbols)?;
    Ok(after.map_or_else(Vec::new, |after| subject.results(group, &lowered.args, symbols, &after)))
}

/// Launches a group's kernel and judges what it stored: gives the results, if the device gives any, and their shares of
/// the bounds.
///
/// # Errors
///
/// What is wrong.
pub fn launch(
    subject: &Subject,
    group: GroupId,
    kernel: (usize, &Lowered),
    device: &mut Device,
    bound: (&[i64; MAX_SYMBOLS], &Tensors),
    expected: &[Expected],
) -> Result<(Vec<(ValueId, Tensor)>, Shares), Wrong> {
    let results = results(subject, group, kernel, device, bound)?;
    let mut shares = Shares::default();
    for ((id, tensor), expected) in results.iter().zip(expected) {
        let judged = expected
            .check(tensor)
            .map_err(|mismatch| Wrong::Result { value: subject.graph[*id].name.clone(), mismatch })?;
        shares = shares.worst(judged);
    }
    Ok((results, shares))
}
