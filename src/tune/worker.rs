//! The process that compiles, judges and times candidates.
//!
//! It reads one JSON object a line and answers each with one. What it is asked for may crash it or keep it for ever: who
//! asks ([`super::search`]) keeps a clock, and starts another.

use super::table::Times;
use super::task::{Task, tasks};
use crate::check::device::Device;
use crate::check::{Distribution, Feed, Subject, launch};
use crate::compile::CompileError;
use crate::measure::{Alone, Operands};
use crate::pipeline::{Request, lower};
use crate::predict::Ceilings;
use codegen::cpu::Level;
use ir::DType;
use ir::families::{GroupView, lower as lower_group, numeric_class};
use ir::graph::GroupId;
use models::Config;
use runtime::map::OwnedBuf;
use runtime::meter::{self, Dot, Meter};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::error::Error;
use std::io::{self, BufRead, Write};
use std::rc::Rc;

/// What to tune: the first line.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Setup {
    /// The model's shape.
    pub config: Config,
    /// Element type of weights and stored values.
    #[serde(serialize_with = "name_of", deserialize_with = "named")]
    pub dtype: DType,
    /// Positions that a sequence may have.
    pub context: usize,
    /// Name of the CPU level.
    pub target: String,
    /// Workers.
    pub threads: usize,
}

impl Setup {
    /// The kernels that a worker of this setup numbers, as the worker does.
    ///
    /// # Errors
    ///
    /// An unknown target or dtype, or a group without a kernel.
    pub fn tasks(&self) -> Result<Vec<Task>, CompileError> {
        let level = codegen::cpu::level(&self.target)?;
        let request =
            Request { config: &self.config, dtype: self.dtype, context: self.context, measured: None };
        Ok(tasks(&lower(&request, &level.target)?, &level.target)?)
    }
}

fn name_of<S: Serializer>(dtype: &DType, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(dtype.name())
}

fn named<'d, D: Deserializer<'d>>(from: D) -> Result<DType, D::Error> {
    let name = String::deserialize(from)?;
    DType::from_name(&name).ok_or_else(|| serde::de::Error::custom(format!("no dtype `{name}`")))
}

/// What a worker is asked.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Ask {
    /// Is a schedule right?
    Judge {
        /// Number of the task.
        task: usize,
        /// Text of the schedule.
        schedule: String,
    },
    /// How fast are schedules, each timed once a turn, beside the ceilings if asked?
    Time {
        /// Number of the task.
        task: usize,
        /// Texts of the schedules.
        schedules: Vec<String>,
        /// Turns.
        turns: usize,
        /// Seconds for each of them in each turn, at least; three runs at least.
        seconds: f64,
        /// Measure the ceilings too?
        ceilings: bool,
    },
}

/// What it answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Told {
    /// It is ready for questions.
    Ready,
    /// The schedule is right: the largest share of a bound that was used.
    Right {
        /// At most 1.
        share: f64,
    },
    /// The schedule is not right.
    Wrong {
        /// Why.
        why: String,
    },
    /// Seconds, and seconds at the ceilings.
    Timed {
        /// By schedule and turn.
        seconds: Vec<Vec<f64>>,
        /// What the ceilings of each turn allow at least, if that was asked for.
        limit_s: Vec<f64>,
    },
    /// What was asked cannot be done.
    Failed {
        /// Why.
        why: String,
    },
}

/// Seconds for which each ceiling is measured in a turn.
const CEILING_SECONDS: f64 = 0.02;

/// Multiplications of the oracle for one judgement, and the rows that they are spent on.
const JUDGED: u64 = 64 << 20;
const ROWS: [usize; 2] = [3, 40];

/// Answers every line of `input` on `output`, to the end of the input.
///
/// # Errors
///
/// When the first line is no setup, or the pipe breaks.
pub fn serve(input: impl BufRead, mut output: impl Write) -> Result<(), Box<dyn Error>> {
    let mut lines = input.lines();
    let setup: Setup = serde_json::from_str(&lines.next().ok_or("no setup")??)?;
    let mut worker = Worker::new(&setup)?;
    tell(&mut output, &Told::Ready)?;
    for line in lines {
        let told = match worker.answer(serde_json::from_str(&line?)?) {
            Ok(told) => told,
            Err(error) => Told::Failed { why: with_causes(&*error) },
        };
        tell(&mut output, &told)?;
    }
    Ok(())
}

fn tell(output: &mut impl Write, told: &Told) -> io::Result<()> {
    writeln!(output, "{}", serde_json::to_string(told).expect("an answer is plain data"))?;
    output.flush()
}

/// An error with what caused it, in one line.
fn with_causes(error: &(dyn Error + 'static)) -> String {
    let causes = std::iter::successors(error.source(), |&e| e.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

struct Worker {
    level: Level,
    threads: usize,
    tasks: Vec<Task>,
    meter: Meter,
    memory: OwnedBuf,
    dot: Dot,
    /// Of the task at hand.
    at: usize,
    operands: Option<Rc<RefCell<Operands>>>,
    ready: BTreeMap<String, Alone>,
    /// The default's share of the bounds, and the digest of its result.
    default: Option<(f64, [u8; 32])>,
}

/// Bytes that the read ceiling is measured on, at least.
const LEAST_READ: usize = 1 << 16;

/// Compiled schedules that are kept for another turn.
const KEPT: usize = 8;

impl Worker {
    fn new(setup: &Setup) -> Result<Worker, Box<dyn Error>> {
        let level = codegen::cpu::level(&setup.target)?;
        Ok(Worker {
            level,
            threads: setup.threads,
            tasks: setup.tasks()?,
            meter: Meter::new(setup.threads),
            memory: meter::memory(usize::MAX)?,
            dot: if setup.dtype == DType::BF16 { Dot::Bf16 } else { Dot::F32 },
            at: 0,
            operands: None,
            ready: BTreeMap::new(),
            default: None,
        })
    }

    fn answer(&mut self, ask: Ask) -> Result<Told, Box<dyn Error>> {
        match ask {
            Ask::Judge { task, schedule } => {
                self.turn_to(task)?;
                self.judge(&schedule)
            }
            Ask::Time { task, schedules, turns, seconds, ceilings } => {
                self.turn_to(task)?;
                self.time(&schedules, turns, seconds, ceilings)
            }
        }
    }

    /// Forgets what belongs to another task.
    fn turn_to(&mut self, task: usize) -> Result<(), Box<dyn Error>> {
        if task >= self.tasks.len() {
            return Err(format!("task {task}: there are {}", self.tasks.len()).into());
        }
        if task != self.at {
            (self.at, self.operands, self.default) = (task, None, None);
            self.ready.clear();
        }
        Ok(())
    }

    /// Compiles a schedule, or finds it compiled.
    fn alone(&mut self, schedule: &str) -> Result<&mut Alone, Box<dyn Error>> {
        if !self.ready.contains_key(schedule) {
            let task = &self.tasks[self.at];
            let graph = task.with(schedule);
            let view = GroupView::new(&graph, GroupId(0));
            let lowered = lower_group(&view, &self.level.target)?;
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

    /// The default is judged by the policy on a few rows. Of another schedule a whole step must have the default's bits; one
    /// that adds in another order is judged by the policy too.
    fn judge(&mut self, schedule: &str) -> Result<Told, Box<dyn Error>> {
        let task = &self.tasks[self.at];
        let family = task.family;
        let default = task.candidates[0].schedule.clone();
        if self.default.is_none() {
            let share = match self.policy(&default)? {
                Ok(share) => share,
                Err(why) => {
                    return Ok(Told::Wrong { why: format!("the default schedule, {default}: {why}") });
                }
            };
            self.default = Some((share, self.alone(&default)?.result()?));
        }
        let (share, expected) = self.default.expect("it is set");
        if schedule == default {
            return Ok(Told::Right { share });
        }
        if numeric_class(family, schedule)? != numeric_class(family, &default)? {
            return Ok(match self.policy(schedule)? {
                Ok(share) => Told::Right { share },
                Err(why) => Told::Wrong { why },
            });
        }
        Ok(match self.alone(schedule)?.result()? == expected {
            true => Told::Right { share },
            false => Told::Wrong { why: format!("other bits than by schedule {default}") },
        })
    }

    /// Judges a schedule on a few rows of random numbers: the largest share of a bound, or what is wrong.
    fn policy(&self, schedule: &str) -> Result<Result<f64, String>, Box<dyn Error>> {
        let task = &self.tasks[self.at];
        let mut subject = Subject { graph: task.graph.clone() };
        let lowered = subject.lower(GroupId(0), schedule, &self.level.target)?;
        let row = ir::cost::cost(&task.view(), &task.symbols(1), task.past as i64).flops / 2;
        let rows = ((JUDGED / row.max(1)) as usize).clamp(ROWS[0], ROWS[1]).min(task.tokens);
        let feed = Feed {
            symbols: task.symbols(rows),
            past: task.past as i64,
            distribution: Distribution::Normal,
            seed: 1,
        };
        let tensors = subject.tensors(&feed)?;
        let expected = subject.expected(GroupId(0), &feed.symbols, &tensors)?;
        let mut device = Device::cpu(&self.level, std::slice::from_ref(&lowered.kernel))?;
        let launched =
            launch(&subject, GroupId(0), (0, &lowered), &mut device, (&feed.symbols, &tensors), &expected);
        Ok(launched.map(|(_, shares)| shares.hard.max(shares.typical)).map_err(|wrong| wrong.to_string()))
    }

    fn time(
        &mut self,
        schedules: &[String],
        turns: usize,
        seconds: f64,
        ceilings: bool,
    ) -> Result<Told, Box<dyn Error>> {
        let mut times = vec![Vec::new(); schedules.len()];
        let mut limit_s = Vec::new();
        for turn in 0..turns {
            // Who runs first finds the caches as the ceilings left them: each does in its turn.
            for at in 0..schedules.len() {
                let number = (turn + at) % schedules.len();
                // Whatever else the machine does makes a run longer, never shorter.
                let runs = self.alone(&schedules[number])?.times(seconds);
                times[number].push(runs.into_iter().fold(f64::INFINITY, f64::min));
            }
            if ceilings {
                // What the kernel finds in a cache, the meter does too.
                let bytes = self.operands.as_ref().map_or(self.memory.len(), |o| o.borrow().bytes());
                let memory = &self.memory[..bytes.clamp(LEAST_READ, self.memory.len())];
                let top = Ceilings {
                    read_bytes_per_s: meter::best(&self.meter.read(memory, CEILING_SECONDS)),
                    dot_flops: meter::best(&self.meter.dot(self.dot, CEILING_SECONDS)),
                };
                limit_s.push(top.seconds(self.alone(&schedules[0])?.cost));
            }
        }
        Ok(Told::Timed { seconds: times, limit_s })
    }
}

/// Seconds of one schedule of an answer, beside those of the first.
pub fn times_of(seconds: &[Vec<f64>], number: usize) -> Times {
    Times { seconds: seconds[number].clone(), default_s: seconds[0].clone() }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A schedule that gives other bits than the default is not timed.
    #[test]
    fn other_bits_are_wrong() {
        let config = crate::model::Model::open("builtin").unwrap().config().unwrap();
        let setup =
            Setup { config, dtype: DType::F32, context: 64, target: "cpu:native".to_string(), threads: 1 };
        let mut worker = Worker::new(&setup).unwrap();
        let schedules: Vec<String> = worker.tasks[0].candidates.iter().map(|c| c.schedule.clone()).collect();
        for schedule in &schedules[..2] {
            assert!(matches!(worker.judge(schedule).unwrap(), Told::Right { share } if share <= 1.0));
        }
        worker.default = Some((0.5, [0; 32]));
        assert!(matches!(worker.judge(&schedules[1]).unwrap(), Told::Wrong { .. }));
    }
}
