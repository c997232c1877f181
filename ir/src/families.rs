//! Kernel families: generators from a fused group and a schedule to kernel IR.
//!
//! A family knows shapes and expressions, never a model or a machine's name. The parts of a group that are not the
//! family's own algorithm (what is done to a tile when it is loaded or stored) are inlined by [`access`].

pub mod access;
pub mod alone;
pub mod attention;
pub mod dot;
pub mod elementwise;
pub mod gpu;
pub mod rowwise;
pub mod sample;

use crate::dim::{Dim, Symbols};
use crate::dtype::DType;
use crate::graph::{Family, Graph, GroupId, ValueId};
use crate::kernel::Kernel;
use crate::op::Op;
use crate::schedule::numeric_class as numeric_part;
use crate::target::{Machine, Target};
use access::Lowering;

/// What a launch binds to a parameter of its kernel.
#[derive(Clone, Debug, PartialEq)]
pub enum Arg {
    /// A tensor in memory: an input, weight, constant, state, or another group's result.
    Value(ValueId),
    /// Packed weights: index in [`Graph::packs`].
    Pack(usize),
    /// Memory that this launch alone uses.
    Workspace {
        /// Element type.
        dtype: DType,
        /// Rows.
        rows: Dim,
        /// Elements from row to row.
        pitch: usize,
    },
}

/// A kernel with what its launch binds, parameter by parameter.
#[derive(Clone, Debug, PartialEq)]
pub struct Lowered {
    /// The kernel; groups that differ only in their operands give equal kernels.
    pub kernel: Kernel,
    /// One for each parameter.
    pub args: Vec<Arg>,
}

/// Why a group cannot be lowered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LowerError {
    /// No generator covers this.
    #[error("group @{group}: no {family} kernel for {what}", family = .family.name())]
    Unsupported {
        /// The group.
        group: String,
        /// Its family.
        family: Family,
        /// What is missing.
        what: String,
    },
    /// The schedule's text does not fit the family.
    #[error("group @{group}: schedule `{schedule}`: {what}")]
    Schedule {
        /// The group.
        group: String,
        /// Its text.
        schedule: String,
        /// What is wrong.
        what: String,
    },
}

/// A fused group with what its generator asks about it.
#[derive(Clone, Debug)]
pub struct GroupView<'g> {
    /// The whole graph.
    pub graph: &'g Graph,
    /// The group.
    pub id: GroupId,
    /// Its values, operands first.
    pub values: Vec<ValueId>,
    /// Those that others read, or that are outputs: what the kernel stores.
    pub roots: Vec<ValueId>,
}

impl<'g> GroupView<'g> {
    /// Looks at one group. O(values of the graph).
    pub fn new(graph: &'g Graph, id: GroupId) -> GroupView<'g> {
        let values: Vec<ValueId> = graph.ids().filter(|&v| graph[v].group == Some(id)).collect();
        GroupView::of(graph, id, values, &graph.users())
    }

    /// Every group at once. O(values + uses).
    pub fn all(graph: &'g Graph) -> Vec<GroupView<'g>> {
        let mut values = vec![Vec::new(); graph.groups.len()];
        for id in graph.ids() {
            if let Some(group) = graph[id].group {
                values[group.0 as usize].push(id);
            }
        }
        let users = graph.users();
        let with_ids = (0..).map(GroupId).zip(values);
        with_ids.map(|(id, values)| GroupView::of(graph, id, values, &users)).collect()
    }

    /// Looks at a group whose values, in order, and the graph's users are known.
    pub fn of(graph: &'g Graph, id: GroupId, values: Vec<ValueId>, users: &[Vec<ValueId>]) -> GroupView<'g> {
        let stored = |v: &ValueId| {
            users[v.0 as usize].iter().any(|&u| graph[u].group != Some(id))
                || graph.outputs.iter().any(|(_, o)| o == v)
        };
        let roots = values.iter().copied().filter(stored).collect();
        GroupView { graph, id, values, roots }
    }

    /// Is the value computed by this group?
    pub fn has(&self, id: ValueId) -> bool {
        self.graph[id].group == Some(self.id)
    }

    /// The group's name.
    pub fn name(&self) -> &'g str {
        &self.graph.groups[self.id.0 as usize].name
    }

    /// The group's family.
    pub fn family(&self) -> Family {
        self.graph.groups[self.id.0 as usize].family
    }

    /// An error about something that the family has no generator for.
    pub fn unsupported(&self, what: impl Into<String>) -> LowerError {
        LowerError::Unsupported { group: self.name().to_string(), family: self.family(), what: what.into() }
    }

    /// Symbols for the kernel: fixed ones keep their value; the others may be anything from 1 on, so that entry points
    /// that differ in the range of `T` share kernels.
    pub fn kernel_symbols(&self) -> Symbols {
        let mut symbols = self.graph.symbols.clone();
        symbols
            .0
            .iter_mut()
            .filter(|s| s.min != s.max)
            .for_each(|s| (s.min, s.max) = (0, i64::from(i32::MAX)));
        symbols
    }
}

/// The tensor in memory that holds a value's contents: for an appended cache the state that it began as.
pub fn storage(graph: &Graph, id: ValueId) -> ValueId {
    match graph[id].op {
        Op::CacheAppend => storage(graph, graph[id].operands[0]),
        _ => id,
    }
}

/// A schedule that a family may use for a group.
#[derive(Clone, Debug, PartialEq)]
pub struct Candidate {
    /// Its text; empty where the family has no choice.
    pub schedule: String,
    /// What the family's model of cost says, in a unit of its own: good for comparing the candidates of one group. `None`
    /// where candidates stand in an order of preference alone.
    pub cost: Option<f64>,
}

/// The legal space of a group on a machine: every schedule that its family may use, the best by its model of cost first.
/// A family without a choice has one empty text.
///
/// # Errors
///
/// When the family does not cover the group.
pub fn candidates(view: &GroupView<'_>, target: &Target) -> Result<Vec<Candidate>, LowerError> {
    check_extents(view)?;
    let by_preference = |schedule| Candidate { schedule, cost: None };
    let vectors = match &target.machine {
        Machine::Cpu(vectors) => vectors,
        Machine::Gpu(gpu) => return Ok(gpu::schedules(view, gpu)?.into_iter().map(by_preference).collect()),
    };
    match view.family() {
        Family::Dot => dot::candidates(view, vectors),
        Family::Attention => {
            Ok(attention::schedules(view, vectors)?.into_iter().map(by_preference).collect())
        }
        Family::Rowwise | Family::Elementwise | Family::Gather | Family::Sample => {
            Ok(vec![by_preference(String::new())])
        }
    }
}

/// The texts of [`candidates`].
///
/// # Errors
///
/// As those.
pub fn schedules(view: &GroupView<'_>, target: &Target) -> Result<Vec<String>, LowerError> {
    Ok(candidates(view, target)?.into_iter().map(|candidate| candidate.schedule).collect())
}

/// The part of a schedule that decides the bits of a result: kernels that agree in it add in the same order. Empty where
/// every schedule gives the same bits.
///
/// # Errors
///
/// What in the text does not fit the family, in words.
pub fn numeric_class(family: Family, schedule: &str) -> Result<String, String> {
    match family {
        _ if let Some(fields) = gpu::fields(family, schedule) => Ok(numeric_part(&fields)),
        Family::Dot => Ok(numeric_part(&dot::DotSchedule::parse(schedule)?.fields())),
        Family::Attention => Ok(numeric_part(&attention::AttentionSchedule::parse(schedule)?.fields())),
        Family::Rowwise | Family::Elementwise | Family::Gather | Family::Sample => Ok(String::new()),
    }
}

/// Generates the kernel of a group.
///
/// # Errors
///
/// When the family does not cover the group, or the schedule does not fit it.
pub fn lower(view: &GroupView<'_>, target: &Target) -> Result<Lowered, LowerError> {
    check_extents(view)?;
    let vectors = match &target.machine {
        Machine::Cpu(vectors) => vectors,
        Machine::Gpu(gpu) => return gpu::lower(view, gpu),
    };
    match view.family() {
        Family::Dot => dot::lower(view, vectors),
        Family::Attention => attention::lower(view, vectors),
        Family::Rowwise => rowwise::lower(Lowering::new(view)),
        Family::Elementwise | Family::Gather => elementwise::lower(Lowering::new(view)),
        Family::Sample => sample::lower(view),
    }
}

/// A row's length is part of a kernel, so of each tensor only the first extent may be a symbol.
fn check_extents(view: &GroupView<'_>) -> Result<(), LowerError> {
    let operands = view.values.iter().flat_map(|&id| &view.graph[id].operands);
    let symbolic = |id: &&ValueId| view.graph[**id].ty.shape.iter().skip(1).any(|d| d.constant().is_none());
    match view.values.iter().chain(operands).find(symbolic) {
        Some(&id) => {
            Err(view
                .unsupported(format!("%{}: a symbolic extent behind the first axis", view.graph[id].name)))
        }
        None => Ok(()),
    }
}
