//! The process that makes, judges and times candidates.
//!
//! It reads one JSON object a line and answers each with one. What it is asked for may crash it or keep it for ever: who
//! asks ([`super::search`]) keeps a clock, and starts another. What it does with a candidate is a `Bench`'s: on a CPU, on a
//! GPU, or on none.

use super::candidates::{Candidates, CandidatesError};
use super::gpu::GpuBench;
use super::table::Times;
use super::task::{Task, tasks};
#[cfg(feature = "compiler")]
use super::{cpu::CpuBench, predicted::PredictedBench};
use crate::check::device::Device;
use crate::check::{Distribution, Feed, Subject, launch};
use crate::pipeline::{Request, lower};
use ir::DType;
use ir::families::{LowerError, Lowered, numeric_class};
use ir::graph::GroupId;
use ir::target::{Gpu, Machine, Target, Vectors};
use models::Config;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::error::Error;
use std::io::{self, BufRead, Write};
use std::path::PathBuf;

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
    /// What kernels are compiled for.
    #[serde(with = "TargetText")]
    pub target: Target,
    /// Where they are timed.
    pub on: On,
}

/// Where candidates are timed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum On {
    /// On this CPU.
    Cpu {
        /// Workers.
        threads: usize,
    },
    /// On a GPU or the emulator.
    Gpu {
        /// Its name on the command line.
        device: String,
        /// The file that has their code; without one it is compiled.
        candidates: Option<PathBuf>,
    },
    /// Nowhere: their times are argued from their machine code for this GPU.
    Nowhere {
        /// Its name in [`crate::profile::gpus`].
        gpu: String,
    },
}

/// [`Target`], as text.
#[derive(Serialize, Deserialize)]
#[serde(remote = "Target")]
struct TargetText {
    name: String,
    #[serde(with = "MachineText")]
    machine: Machine,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Machine")]
enum MachineText {
    Cpu(#[serde(with = "VectorsText")] Vectors),
    Gpu(#[serde(with = "GpuText")] Gpu),
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Vectors")]
struct VectorsText {
    registers: usize,
    bytes: usize,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Gpu")]
struct GpuText {
    shared_bytes: usize,
    warpgroups: bool,
}

/// Why it is not known what to tune.
#[derive(Debug, thiserror::Error)]
pub enum TasksError {
    /// No kernel for a group.
    #[error(transparent)]
    Lower(#[from] LowerError),
    /// A file of candidates.
    #[error(transparent)]
    Candidates(#[from] CandidatesError),
}

impl Setup {
    /// The kernels that a worker of this setup numbers, as the worker does.
    ///
    /// # Errors
    ///
    /// A group without a kernel; a file of candidates that cannot be read.
    pub fn tasks(&self) -> Result<Vec<Task>, TasksError> {
        let request =
            Request { config: &self.config, dtype: self.dtype, context: self.context, measured: None };
        let tasks = tasks(&lower(&request, &self.target)?, &self.target)?;
        Ok(match &self.on {
            On::Gpu { candidates: Some(file), .. } => Candidates::open(file)?.restrict(tasks),
            On::Cpu { .. } | On::Gpu { .. } | On::Nowhere { .. } => tasks,
        })
    }

    fn bench(&self) -> Result<Box<dyn Bench>, Failed> {
        Ok(match &self.on {
            On::Gpu { device, candidates } => {
                Box::new(GpuBench::new(&self.target, device, candidates.as_deref())?)
            }
            #[cfg(feature = "compiler")]
            On::Cpu { threads } => Box::new(CpuBench::new(&self.target.name, self.dtype, *threads)?),
            #[cfg(feature = "compiler")]
            On::Nowhere { gpu } => Box::new(PredictedBench::new(&self.target, gpu)?),
            #[cfg(not(feature = "compiler"))]
            On::Cpu { .. } | On::Nowhere { .. } => return Err("this program has no compiler".into()),
        })
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

/// Why something cannot be done, in words.
pub(super) type Failed = Box<dyn Error>;

/// What is known of the default schedule: its share of the bounds, and the digest of a whole step's results.
pub(super) type Default = (f64, [u8; 32]);

/// What judges and times candidates, of one task after the other.
pub(super) trait Bench {
    /// Forgets what belongs to another task.
    fn turn(&mut self);

    /// Judges a schedule by the policy, on a few rows of random numbers: the largest share of a bound, or what is wrong.
    fn policy(&mut self, task: &Task, schedule: &str) -> Result<Result<f64, String>, Failed>;

    /// Digest of the bits that a whole step gives.
    fn result(&mut self, task: &Task, schedule: &str) -> Result<[u8; 32], Failed>;

    /// The default is judged by the policy. Of another schedule a whole step must have the default's bits; one that adds in
    /// another order is judged by the policy too.
    fn judge(
        &mut self,
        task: &Task,
        schedule: &str,
        known: &mut Option<Default>,
    ) -> Result<Result<f64, String>, Failed> {
        let default = &task.candidates[0].schedule;
        if known.is_none() {
            match self.policy(task, default)? {
                Ok(share) => *known = Some((share, self.result(task, default)?)),
                Err(why) => return Ok(Err(format!("the default schedule, {default}: {why}"))),
            }
        }
        let (share, expected) = known.expect("it is set");
        if schedule == default {
            return Ok(Ok(share));
        }
        if numeric_class(task.family, schedule)? != numeric_class(task.family, default)? {
            return self.policy(task, schedule);
        }
        Ok(match self.result(task, schedule)? == expected {
            true => Ok(share),
            false => Err(format!("other bits than by schedule {default}")),
        })
    }

    /// Seconds of one launch of a whole step, the shortest of what is measured in about `seconds`.
    fn time(&mut self, task: &Task, schedule: &str, seconds: f64) -> Result<f64, Failed>;

    /// Seconds that the ceilings, as they are now, allow at least; `schedule` was timed.
    fn limit(&mut self, task: &Task, schedule: &str) -> Result<f64, Failed>;
}

/// Multiplications of the oracle for one judgement, and the rows that they are spent on.
const JUDGED: u64 = 64 << 20;
const ROWS: [usize; 2] = [3, 40];

/// [`Bench::policy`] of a kernel on the device that `on` makes of it.
pub(super) fn policy(
    task: &Task,
    schedule: &str,
    target: &Target,
    on: impl FnOnce(&Lowered) -> Result<Device, Failed>,
) -> Result<Result<f64, String>, Failed> {
    let mut subject = Subject { graph: task.graph.clone() };
    let lowered = subject.lower(GroupId(0), schedule, target)?;
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
    let mut device = on(&lowered)?;
    let launched =
        launch(&subject, GroupId(0), (0, &lowered), &mut device, (&feed.symbols, &tensors), &expected);
    Ok(launched.map(|(_, shares)| shares.hard.max(shares.typical)).map_err(|wrong| wrong.to_string()))
}

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
    tasks: Vec<Task>,
    bench: Box<dyn Bench>,
    /// The task at hand.
    at: usize,
    /// Of its default schedule.
    default: Option<Default>,
}

impl Worker {
    fn new(setup: &Setup) -> Result<Worker, Failed> {
        Ok(Worker { tasks: setup.tasks()?, bench: setup.bench()?, at: 0, default: None })
    }

    fn answer(&mut self, ask: Ask) -> Result<Told, Failed> {
        match ask {
            Ask::Judge { task, schedule } => {
                self.turn_to(task)?;
                Ok(match self.bench.judge(&self.tasks[task], &schedule, &mut self.default)? {
                    Ok(share) => Told::Right { share },
                    Err(why) => Told::Wrong { why },
                })
            }
            Ask::Time { task, schedules, turns, seconds, ceilings } => {
                self.turn_to(task)?;
                self.time(&schedules, turns, seconds, ceilings)
            }
        }
    }

    /// Forgets what belongs to another task.
    fn turn_to(&mut self, task: usize) -> Result<(), Failed> {
        if task >= self.tasks.len() {
            return Err(format!("task {task}: there are {}", self.tasks.len()).into());
        }
        if task != self.at {
            (self.at, self.default) = (task, None);
            self.bench.turn();
        }
        Ok(())
    }

    fn time(
        &mut self,
        schedules: &[String],
        turns: usize,
        seconds: f64,
        ceilings: bool,
    ) -> Result<Told, Failed> {
        let task = &self.tasks[self.at];
        let mut times = vec![Vec::new(); schedules.len()];
        let mut limit_s = Vec::new();
        for turn in 0..turns {
            // Who runs first finds the caches as the ceilings left them: each does in its turn.
            for at in 0..schedules.len() {
                let number = (turn + at) % schedules.len();
                times[number].push(self.bench.time(task, &schedules[number], seconds)?);
            }
            if ceilings {
                limit_s.push(self.bench.limit(task, &schedules[0])?);
            }
        }
        Ok(Told::Timed { seconds: times, limit_s })
    }
}

/// Seconds of one schedule of an answer, beside those of the first.
pub fn times_of(seconds: &[Vec<f64>], number: usize) -> Times {
    Times { seconds: seconds[number].clone(), default_s: seconds[0].clone() }
}

#[cfg(all(test, feature = "compiler"))]
mod tests {
    use super::*;

    /// A schedule that gives other bits than the default is not timed.
    #[test]
    fn other_bits_are_wrong() {
        let config = crate::model::Model::open("builtin").unwrap().config().unwrap();
        let target = codegen::cpu::level("cpu:native").unwrap().target;
        let on = On::Cpu { threads: 1 };
        let setup = Setup { config, dtype: DType::F32, context: 64, target, on };
        let mut worker = Worker::new(&setup).unwrap();
        let schedules: Vec<String> = worker.tasks[0].candidates.iter().map(|c| c.schedule.clone()).collect();
        let judge = |worker: &mut Worker, schedule: &String| {
            worker.answer(Ask::Judge { task: 0, schedule: schedule.clone() }).unwrap()
        };
        for schedule in &schedules[..2] {
            assert!(matches!(judge(&mut worker, schedule), Told::Right { share } if share <= 1.0));
        }
        worker.default = Some((0.5, [0; 32]));
        assert!(matches!(judge(&mut worker, &schedules[1]), Told::Wrong { .. }));
    }
}
