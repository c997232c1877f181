//! What a model has to tune: kernels whose family has a choice, each once, the dearest first.

use super::table::digest;
use crate::pipeline::Lowered;
use ir::DType;
use ir::dim::MAX_SYMBOLS;
use ir::families::alone::{alone, signature};
use ir::families::{Candidate, GroupView, LowerError, candidates};
use ir::graph::{Family, Graph, GroupId};
use ir::target::Target;

/// A kernel and the step that it is timed in.
#[derive(Clone, Debug)]
pub struct Task {
    /// Its group, alone in a graph.
    pub graph: Graph,
    /// Name without the layer.
    pub kernel: String,
    /// Its family.
    pub family: Family,
    /// Digest of its signature.
    pub group: String,
    /// Entry point that it was found in.
    pub entry: String,
    /// Launches of it there.
    pub launches: usize,
    /// Tokens of the step: the most that the entry point takes.
    pub tokens: usize,
    /// Positions in the cache before: half a cache for a single token, none for a prompt.
    pub past: usize,
    /// Every schedule, in the order of the model of cost; the first is the default.
    pub candidates: Vec<Candidate>,
}

impl Task {
    /// The group.
    pub fn view(&self) -> GroupView<'_> {
        GroupView::new(&self.graph, GroupId(0))
    }

    /// The graph with a schedule.
    pub fn with(&self, schedule: &str) -> Graph {
        let mut graph = self.graph.clone();
        graph.groups[0].schedule = (!schedule.is_empty()).then(|| schedule.to_string());
        graph
    }

    /// The step's symbols.
    pub fn symbols(&self, tokens: usize) -> [i64; MAX_SYMBOLS] {
        let mut symbols = [0; MAX_SYMBOLS];
        (symbols[0], symbols[1]) = (tokens as i64, self.past as i64);
        symbols
    }

    /// Element type of what it reads most of: for people.
    pub fn dtype(&self) -> DType {
        self.graph.packs.first().map_or_else(|| self.graph.values[0].ty.dtype, |pack| pack.dtype)
    }
}

/// The kernels of a model that have a choice, in the order of entry points and groups.
///
/// # Errors
///
/// When no family covers a group.
pub fn tasks(lowered: &Lowered, target: &Target) -> Result<Vec<Task>, LowerError> {
    let mut tasks: Vec<Task> = Vec::new();
    for entry in &lowered.entries {
        // Layers share kernels, and so do entry points: each is looked at once.
        let mut seen: Vec<usize> = Vec::new();
        for (view, launch) in GroupView::all(&entry.graph).iter().zip(&entry.launches) {
            if seen.contains(&launch.kernel) {
                continue;
            }
            seen.push(launch.kernel);
            let launches = entry.launches.iter().filter(|other| other.kernel == launch.kernel).count();
            let group = digest(&signature(view, &target.machine));
            let candidates = candidates(view, target)?;
            if candidates.len() < 2 || tasks.iter().any(|task| task.group == group) {
                continue;
            }
            let tokens = entry.graph.symbols.max()[0] as usize;
            tasks.push(Task {
                graph: alone(view).0,
                kernel: view.name().rsplit_once('.').map_or(view.name(), |(_, name)| name).to_string(),
                family: view.family(),
                group,
                entry: entry.graph.name.clone(),
                launches,
                tokens,
                past: if tokens == 1 { lowered.plan.context / 2 } else { 0 },
                candidates,
            });
        }
    }
    Ok(tasks)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::{Request, lower};
    use std::collections::BTreeMap;

    /// What is measured of one group holds for those that have its kernel, and for no other.
    #[test]
    fn groups_share_a_signature_just_when_they_share_a_kernel() {
        let target = Target::cpu("cpu:x86-64-v4", 32, 64);
        for (preset, dtype) in [("smollm2-135m", DType::F32), ("tinyllama-1.1b", DType::BF16)] {
            let config = models::preset(preset).unwrap();
            let request = Request { config: &config, dtype, context: 1024, measured: None };
            let lowered = lower(&request, &target).unwrap();
            let mut kernels: BTreeMap<String, usize> = BTreeMap::new();
            for entry in &lowered.entries {
                for (view, launch) in GroupView::all(&entry.graph).iter().zip(&entry.launches) {
                    let known = kernels.entry(signature(view, &target.machine)).or_insert(launch.kernel);
                    assert_eq!(*known, launch.kernel, "@{}", view.name());
                }
            }
            assert_eq!(kernels.len(), lowered.kernels.len());
        }
    }

    /// On a GPU what is best for 16 rows says nothing of 512: what one range of rows may choose from, those that share its
    /// record may too, and each range has its own.
    #[test]
    fn ranges_of_rows_are_tuned_each() {
        for warpgroups in [false, true] {
            let target = Target::gpu("a GPU", 227 << 10, warpgroups);
            let config = models::preset("smollm2-135m").unwrap();
            let request = Request { config: &config, dtype: DType::BF16, context: 1024, measured: None };
            let lowered = lower(&request, &target).unwrap();
            let mut choices: BTreeMap<String, Vec<Candidate>> = BTreeMap::new();
            for entry in &lowered.entries {
                for view in GroupView::all(&entry.graph) {
                    let may = candidates(&view, &target).unwrap();
                    let known =
                        choices.entry(signature(&view, &target.machine)).or_insert_with(|| may.clone());
                    assert_eq!(*known, may, "@{}", view.name());
                }
            }
            let tasks = tasks(&lowered, &target).unwrap();
            let of = |kernel: &str| tasks.iter().filter(|t| t.kernel == kernel).map(|t| t.tokens).collect();
            let rows: Vec<usize> = of("gate");
            assert_eq!(rows, [1, 16, 64, 512]);
        }
    }
}
