//! Generates each group's kernel.
//!
//! * Takes: a scheduled graph. Gives: kernels, and for each group which kernel it launches on what; groups that differ
//!   only in their operands and in names share one.
//! * Never: decides anything: family, layout and schedule stand in the graph.
//! * Cost: O(size of the kernels). Tests: `tests/ir/lower/`.

use crate::families::{Arg, GroupView, LowerError, lower as lower_group};
use crate::graph::Graph;
use crate::kernel::Kernel;
use crate::target::Target;
use std::collections::HashMap;

/// Kernels without repetition, under unique names.
#[derive(Clone, Debug, Default)]
pub struct Kernels {
    /// In the order of first use.
    pub list: Vec<Kernel>,
    /// Kernels already made, by a cheap digest of what they look like without their name.
    known: HashMap<u64, Vec<usize>>,
}

impl Kernels {
    /// The index of a kernel equal to this one but for names. That of the kernel is made unique.
    pub fn add(&mut self, mut kernel: Kernel) -> usize {
        let digest = digest(&kernel);
        let nameless = nameless(&kernel);
        let alike = self.known.get(&digest).into_iter().flatten();
        if let Some(&at) = alike.into_iter().find(|&&at| self::nameless(&self.list[at]) == nameless) {
            return at;
        }
        let wanted = std::mem::take(&mut kernel.name);
        let taken = |n: &str| self.list.iter().any(|k| k.name == n);
        kernel.name = match taken(&wanted) {
            false => wanted,
            true => (1..).map(|i| format!("{wanted}.{i}")).find(|n| !taken(n)).expect("numbers do not end"),
        };
        self.list.push(kernel);
        self.known.entry(digest).or_default().push(self.list.len() - 1);
        self.list.len() - 1
    }
}

/// A kernel without names: norms of a layer do the same under two.
fn nameless(kernel: &Kernel) -> Kernel {
    let mut kernel = kernel.clone();
    kernel.name.clear();
    kernel.vars.iter_mut().for_each(|var| var.name.clear());
    kernel.regs.iter_mut().for_each(|file| file.name.clear());
    kernel.buffers.iter_mut().for_each(|buffer| buffer.name.clear());
    kernel
}

fn digest(kernel: &Kernel) -> u64 {
    use std::hash::{Hash, Hasher};
    let mut hasher = std::hash::DefaultHasher::new();
    (kernel.family, &kernel.schedule, kernel.buffers.len(), kernel.vars.len()).hash(&mut hasher);
    for buffer in &kernel.buffers {
        (&buffer.shape, &buffer.strides, buffer.dtype).hash(&mut hasher);
    }
    hasher.finish()
}

/// A group's launch.
#[derive(Clone, Debug, PartialEq)]
pub struct Launched {
    /// Index in [`Kernels::list`].
    pub kernel: usize,
    /// What is bound to its parameters.
    pub args: Vec<Arg>,
}

/// Lowers every group, in order.
///
/// # Errors
///
/// When a family does not cover a group.
pub fn lower(graph: &Graph, target: &Target, kernels: &mut Kernels) -> Result<Vec<Launched>, LowerError> {
    let views = GroupView::all(graph);
    views
        .iter()
        .map(|view| {
            let lowered = lower_group(view, target)?;
            Ok(Launched { kernel: kernels.add(lowered.kernel), args: lowered.args })
        })
        .collect()
}
