//! The passes, in the order in which a compilation runs them.

pub mod simplify;

pub mod fuse;
pub mod layout;
pub mod lower;
pub mod memory;
pub mod schedule;
pub mod share;

use crate::families::LowerError;
use crate::graph::Graph;
use crate::target::Target;

/// A pass, as `opt` and the pipeline know it.
#[derive(Clone, Copy, Debug)]
pub struct Pass {
    /// Name on the command line and in errors.
    pub name: &'static str,
    /// One line of meaning.
    pub does: &'static str,
    /// What it runs.
    pub run: Run,
}

/// What a pass makes of what.
#[derive(Clone, Copy, Debug)]
pub enum Run {
    /// A graph of a graph.
    Graph(fn(&mut Graph, &Target) -> Result<(), LowerError>),
    /// What only shows when all graphs of a model are seen together.
    Graphs(fn(&mut [&mut Graph])),
    /// Kernels of all scheduled graphs: [`lower::lower`].
    Kernels,
    /// The plan of all lowered graphs: [`memory::memory`].
    Plan,
}

/// Every pass, in order.
#[rustfmt::skip] // a table: one pass a line
pub const PASSES: [Pass; 7] = [
    Pass { name: "simplify", does: "folds constants, drops dead and repeated values",                                      run: Run::Graph(|graph, _| { simplify::simplify(graph); Ok(()) }) },
    Pass { name: "fuse",     does: "groups values into kernels",                                                           run: Run::Graph(|graph, target| { fuse::fuse(graph, target); Ok(()) }) },
    Pass { name: "layout",   does: "chooses the packing of each weight",                                                   run: Run::Graph(|graph, target| { layout::layout(graph, target); Ok(()) }) },
    Pass { name: "share",    does: "lets all graphs of a model agree on caches and packings, so that each is stored once", run: Run::Graphs(share::share) },
    Pass { name: "schedule", does: "gives each group a schedule",                                                          run: Run::Graph(schedule::schedule) },
    Pass { name: "lower",    does: "generates the kernels of the groups",                                                  run: Run::Kernels },
    Pass { name: "memory",   does: "gives every tensor its bytes and writes the plan",                                     run: Run::Plan },
];

/// The pass of that name.
pub fn find(name: &str) -> Option<&'static Pass> {
    PASSES.iter().find(|pass| pass.name == name)
}
