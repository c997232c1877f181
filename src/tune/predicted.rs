//! Candidates without the GPU: their times are argued from their machine code, as `profile --static` does.
//!
//! A candidate is dropped if the emulator reports something of its first turns, or if `ptxas` spills registers or takes
//! messages C75xx to it, which the model knows nothing of. Its results are not judged: `check` does that for every schedule.

use super::task::Task;
use super::worker::{Bench, Default, Failed};
use crate::profile::gpus::{GPUS, Gpu};
use crate::profile::machine_code::{Alone, ArgueError, alone};
use crate::profile::predicted::Prediction;
use codegen::nvptx::{self, ARCHITECTURES, Architecture};
use ir::families::{GroupView, lower};
use ir::graph::GroupId;
use ir::target::Target;
use std::collections::BTreeMap;

/// Argues candidates' times.
pub(super) struct PredictedBench {
    architecture: &'static Architecture,
    target: Target,
    gpu: &'static Gpu,
    /// Of the task at hand.
    known: BTreeMap<String, Prediction>,
}

impl PredictedBench {
    pub(super) fn new(target: &Target, gpu: &str) -> Result<PredictedBench, Failed> {
        let known = || ARCHITECTURES.map(|architecture| architecture.name).join(", ");
        let architecture = nvptx::architecture(&target.name)
            .ok_or_else(|| format!("{}: expected one of {}", target.name, known()))?;
        let names = || GPUS.map(|gpu| gpu.name).join(", ");
        let gpu = Gpu::of(gpu).ok_or_else(|| format!("{gpu}: expected one of {}", names()))?;
        Ok(PredictedBench { architecture, target: target.clone(), gpu, known: BTreeMap::new() })
    }

    fn predict(&mut self, task: &Task, schedule: &str) -> Result<Result<Prediction, String>, Failed> {
        if let Some(&known) = self.known.get(schedule) {
            return Ok(Ok(known));
        }
        let graph = task.with(schedule);
        let view = GroupView::new(&graph, GroupId(0));
        let lowered = lower(&view, &self.target)?;
        let step = [task.tokens, task.past];
        let Alone { prediction, losses } = match alone(&view, &lowered, self.architecture, self.gpu, step) {
            Err(ArgueError::Emulation { source, .. }) => return Ok(Err(source.to_string())),
            argued => argued?,
        };
        if let Some(loss) = losses.first() {
            return Ok(Err(format!("ptxas: {loss}")));
        }
        self.known.insert(schedule.to_string(), prediction);
        Ok(Ok(prediction))
    }

    fn predicted(&mut self, task: &Task, schedule: &str) -> Result<Prediction, Failed> {
        Ok(self.predict(task, schedule)??)
    }
}

impl Bench for PredictedBench {
    fn turn(&mut self) {
        self.known.clear();
    }

    fn policy(&mut self, task: &Task, schedule: &str) -> Result<Result<f64, String>, Failed> {
        Ok(self.predict(task, schedule)?.map(|_| 0.0))
    }

    fn result(&mut self, _: &Task, _: &str) -> Result<[u8; 32], Failed> {
        Err("nothing runs where times are argued".into())
    }

    fn judge(
        &mut self,
        task: &Task,
        schedule: &str,
        _: &mut Option<Default>,
    ) -> Result<Result<f64, String>, Failed> {
        self.policy(task, schedule)
    }

    fn time(&mut self, task: &Task, schedule: &str, _: f64) -> Result<f64, Failed> {
        // The truth lies between.
        let Prediction { least_s, most_s, .. } = self.predicted(task, schedule)?;
        Ok((least_s + most_s) / 2.0)
    }

    fn limit(&mut self, task: &Task, _: &str) -> Result<f64, Failed> {
        let cost = ir::cost::cost(&task.view(), &task.symbols(task.tokens), task.past as i64);
        Ok(self.gpu.least_seconds(cost))
    }
}
