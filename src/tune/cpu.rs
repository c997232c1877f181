//! Candidates on this CPU.

use super::task::Task;
use super::worker::{Bench, Failed, policy};
use crate::check::device::Device;
use crate::measure::alone::{Alone, Operands};
use crate::predict::Ceilings;
use codegen::cpu::Level;
use ir::DType;
use ir::families::{GroupView, lower};
use ir::graph::GroupId;
use runtime::map::OwnedBuf;
use runtime::meter::{self, Dot, Meter};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

/// Seconds for which each ceiling is measured in a turn.
const CEILING_SECONDS: f64 = 0.02;

/// Bytes that the read ceiling is measured on, at least.
const LEAST_READ: usize = 1 << 16;

/// Compiled schedules that are kept for another turn.
const KEPT: usize = 8;

/// Compiles candidates for a CPU level and runs them.
pub(super) struct CpuBench {
    level: Level,
    threads: usize,
    meter: Meter,
    memory: OwnedBuf,
    dot: Dot,
    /// Of the task at hand.
    operands: Option<Rc<RefCell<Operands>>>,
    ready: BTreeMap<String, Alone>,
}

impl CpuBench {
    pub(super) fn new(level: &str, dtype: DType, threads: usize) -> Result<CpuBench, Failed> {
        Ok(CpuBench {
            level: codegen::cpu::level(level)?,
            threads,
            meter: Meter::new(threads),
            memory: meter::memory(usize::MAX)?,
            dot: if dtype == DType::BF16 { Dot::Bf16 } else { Dot::F32 },
            operands: None,
            ready: BTreeMap::new(),
        })
    }

    /// Compiles a schedule, or finds it compiled.
    fn alone(&mut self, task: &Task, schedule: &str) -> Result<&mut Alone, Failed> {
        if !self.ready.contains_key(schedule) {
            let graph = task.with(schedule);
            let view = GroupView::new(&graph, GroupId(0));
            let lowered = lower(&view, &self.level.target)?;
            let fit = self.operands.as_ref().filter(|operands| operands.borrow().fit(&lowered.kernel));
            let operands = match fit {
                Some(operands) => operands.clone(),
                None => {
                    let step = [task.tokens, task.past];
                    Rc::new(RefCell::new(Operands::new(&view, &lowered, step, false)?))
                }
            };
            let alone = Alone::on(&view, &lowered, &self.level, self.threads, operands.clone())?;
            self.operands.get_or_insert(operands);
            let default = &task.candidates[0].schedule;
            if self.ready.len() >= KEPT {
                let old = self.ready.keys().find(|known| *known != default).cloned();
                old.map(|old| self.ready.remove(&old));
            }
            self.ready.insert(schedule.to_string(), alone);
        }
        Ok(self.ready.get_mut(schedule).expect("it is there"))
    }
}

impl Bench for CpuBench {
    fn turn(&mut self) {
        self.operands = None;
        self.ready.clear();
    }

    fn policy(&mut self, task: &Task, schedule: &str) -> Result<Result<f64, String>, Failed> {
        policy(task, schedule, &self.level.target, |lowered| {
            Ok(Device::cpu(&self.level, std::slice::from_ref(&lowered.kernel))?)
        })
    }

    fn result(&mut self, task: &Task, schedule: &str) -> Result<[u8; 32], Failed> {
        Ok(self.alone(task, schedule)?.result()?)
    }

    fn time(&mut self, task: &Task, schedule: &str, seconds: f64) -> Result<f64, Failed> {
        // Whatever else the machine does makes a run longer, never shorter.
        Ok(self.alone(task, schedule)?.times(seconds).into_iter().fold(f64::INFINITY, f64::min))
    }

    fn limit(&mut self, task: &Task, schedule: &str) -> Result<f64, Failed> {
        // What the kernel finds in a cache, the meter does too.
        let bytes = self.operands.as_ref().map_or(self.memory.len(), |o| o.borrow().bytes());
        let memory = &self.memory[..bytes.clamp(LEAST_READ, self.memory.len())];
        let top = Ceilings {
            read_bytes_per_s: meter::best(&self.meter.read(memory, CEILING_SECONDS)),
            dot_flops: meter::best(&self.meter.dot(self.dot, CEILING_SECONDS)),
        };
        Ok(top.seconds(self.alone(task, schedule)?.cost))
    }
}
