//! Which candidates are measured, in which order, and which is chosen.
//!
//! Each kernel's candidates are tried in the order of its family's model of cost, the choices of other machines before them.
//! One is judged, then timed in turn with the default; the best are timed again, all in turn, with the schedule that was
//! chosen before. That one stays unless another is faster by more than the turns differ, so that tuning twice chooses the
//! same. Every measurement is in the table before the next begins.

use super::table::{Key, Outcome, Record, TableError, TableFile, Times, quantile};
use super::task::Task;
use super::worker::{Ask, On, Setup, Told, times_of};
use ir::families::{Candidate, numeric_class};
use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::ops::ControlFlow;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

/// How a search goes.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// For the whole of it.
    pub budget: Duration,
    /// For one answer of the worker.
    pub patience: Duration,
    /// Only schedules that give the default's bits.
    pub same_bits: bool,
}

/// Where a search is.
#[derive(Clone, Copy, Debug)]
pub struct Progress<'a> {
    /// The kernel.
    pub task: &'a Task,
    /// Number of the kernel among those that are tuned, and how many these are.
    pub number: [usize; 2],
    /// Candidates done.
    pub done: usize,
}

/// Why a search ends early.
#[derive(Debug, thiserror::Error)]
pub enum SearchError {
    /// The table's file.
    #[error(transparent)]
    Table(#[from] TableError),
    /// The worker cannot be started, or does not say that it is ready.
    #[error("the process that measures does not start: {why}")]
    Start {
        /// What is known.
        why: String,
    },
    /// `go_on` said so. What was measured is in the table.
    #[error("interrupted; what was measured is kept, and the next run goes on from there")]
    Interrupted,
}

/// Least gain for which another schedule is taken: below, what runs before and after a kernel weighs more.
const GAIN: f64 = 0.02;
/// Turns of the first look, of a closer one, and of the last. A candidate slower than this has the first alone.
const TURNS: [usize; 3] = [1, 2, 9];
const SLOWER: f64 = 1.1;
/// Schedules of the last turns, beside the default and the one chosen before.
const FINALISTS: usize = 4;
/// Seconds of each schedule in each turn, at least.
const SECONDS: f64 = 0.01;

/// A search for the kernels of one setup.
pub struct Search<'a> {
    /// What is tuned.
    pub setup: Setup,
    /// Starts a worker: a program that calls [`super::worker::serve`] on its standard input and output.
    pub start: &'a dyn Fn() -> Command,
    /// Compiler and machine of the records.
    pub compiler: String,
    /// See there.
    pub machine: String,
    /// How long.
    pub limits: Limits,
    /// Called before each measurement, and while one lasts.
    pub go_on: &'a mut dyn FnMut(Option<Progress<'_>>) -> ControlFlow<()>,
}

impl Search<'_> {
    /// Tunes each task, those that take most of a step first.
    ///
    /// # Errors
    ///
    /// [`SearchError`].
    pub fn run(&mut self, tasks: &[Task], file: &mut TableFile) -> Result<(), SearchError> {
        let end = Instant::now() + self.limits.budget;
        let mut order: Vec<(f64, usize)> = weights(tasks).into_iter().zip(0..).collect();
        order.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        let mut worker = None;
        let mut rest: f64 = order.iter().map(|(weight, _)| weight).sum();
        for (at, &(weight, number)) in order.iter().enumerate() {
            // What one kernel does not use is for the others.
            let now = Instant::now();
            let share = end.saturating_duration_since(now).mul_f64((weight / rest).clamp(0.0, 1.0));
            rest -= weight;
            let mut one = One {
                task: &tasks[number],
                number,
                place: [at + 1, tasks.len()],
                until: now + share,
                worker: &mut worker,
                file: &mut *file,
            };
            self.one(&mut one)?;
        }
        Ok(())
    }

    fn one(&mut self, one: &mut One<'_>) -> Result<(), SearchError> {
        let key = Key {
            group: one.task.group.clone(),
            target: self.setup.target.name.clone(),
            compiler: self.compiler.clone(),
            machine: self.machine.clone(),
            predicted: matches!(self.setup.on, On::Nowhere { .. }),
        };
        let default = one.task.candidates[0].schedule.clone();
        let mut known = Known::of(one, &key);
        for Next { rank, cost, schedule } in self.order(one, &key) {
            if known.by_schedule.contains_key(&schedule) {
                continue;
            }
            if Instant::now() >= one.until && !known.by_schedule.is_empty() {
                break;
            }
            let progress = Progress { task: one.task, number: one.place, done: known.by_schedule.len() };
            if (self.go_on)(Some(progress)).is_break() {
                return Err(SearchError::Interrupted);
            }
            let outcome = self.measure(one, &default, &schedule, (rank, cost))?;
            self.record(one, &key, &schedule, outcome.clone())?;
            known.by_schedule.insert(schedule, outcome);
            if !matches!(known.by_schedule.get(&default), Some(Outcome::Timed { .. })) {
                // Nothing can be held against it.
                return Ok(());
            }
        }
        let tried = known.by_schedule.len();
        if known.chosen.as_ref().is_some_and(|(_, of)| *of == tried) {
            return Ok(());
        }
        self.choose(one, &key, &default, &known)
    }

    /// Schedules in the order in which they are tried: the default, what others chose, and the rest as the model of cost says.
    /// That is the family's own, unless the table has times that were argued from machine code.
    fn order(&self, one: &One<'_>, key: &Key) -> Vec<Next> {
        let class = |schedule: &str| numeric_class(one.task.family, schedule).unwrap_or_default();
        let default = &one.task.candidates[0].schedule;
        let mut order: Vec<Next> = Vec::new();
        for Candidate { schedule, cost } in &one.task.candidates {
            if !self.limits.same_bits || class(schedule) == class(default) {
                order.push(Next { rank: 0, cost: *cost, schedule: schedule.clone() });
            }
        }
        let argued = one.file.table.predicted(&key.target, &key.group, &key.compiler);
        if !argued.is_empty() && !key.predicted {
            order.iter_mut().for_each(|next| next.cost = argued.get(&*next.schedule).copied());
            let seconds = |next: &Next| next.cost.unwrap_or(f64::INFINITY);
            order.sort_by(|a, b| seconds(a).total_cmp(&seconds(b)));
        }
        order.iter_mut().enumerate().for_each(|(rank, next)| next.rank = rank);
        let hints: Vec<&str> = one.file.table.hints(key).map(|record| record.schedule.as_str()).collect();
        order.sort_by_key(|next| {
            let hinted = hints.contains(&next.schedule.as_str());
            (next.schedule != *default, !hinted, next.rank)
        });
        order
    }

    /// Judges and times one schedule.
    fn measure(
        &mut self,
        one: &mut One<'_>,
        default: &str,
        schedule: &str,
        (rank, cost): (usize, Option<f64>),
    ) -> Result<Outcome, SearchError> {
        let judge = Ask::Judge { task: one.number, schedule: schedule.to_string() };
        let share = match self.ask(one, &judge)? {
            Ok(Told::Right { share }) => share,
            Ok(Told::Wrong { why }) => return Ok(Outcome::Wrong { why }),
            Ok(told) => return Ok(unexpected(told)),
            Err(outcome) => return Ok(outcome),
        };
        let mut times = Times::default();
        for turns in [TURNS[0], TURNS[1]] {
            if times.best_ratio() > SLOWER {
                break;
            }
            let schedules = vec![default.to_string(), schedule.to_string()];
            let ask = Ask::Time { task: one.number, schedules, turns, seconds: SECONDS, ceilings: false };
            match self.ask(one, &ask)? {
                Ok(Told::Timed { seconds, .. }) => {
                    let more = times_of(&seconds, 1);
                    times.seconds.extend(more.seconds);
                    times.default_s.extend(more.default_s);
                }
                Ok(told) => return Ok(unexpected(told)),
                Err(outcome) => return Ok(outcome),
            }
        }
        Ok(Outcome::Timed { share, rank, cost, times })
    }

    /// The last turns: the default, the schedule chosen before, and the fastest.
    fn choose(
        &mut self,
        one: &mut One<'_>,
        key: &Key,
        default: &str,
        known: &Known,
    ) -> Result<(), SearchError> {
        let mut fastest: Vec<(f64, &String)> = Vec::new();
        for (schedule, outcome) in &known.by_schedule {
            if let Outcome::Timed { times, .. } = outcome {
                fastest.push((times.best_ratio(), schedule));
            }
        }
        fastest.sort_by(|a, b| a.0.total_cmp(&b.0));
        let mut schedules = vec![default.to_string()];
        schedules
            .extend(known.chosen.as_ref().map(|(schedule, _)| schedule.clone()).filter(|s| s != default));
        let incumbent = schedules.len() - 1;
        for (_, schedule) in fastest.into_iter().take(FINALISTS) {
            if !schedules.contains(schedule) {
                schedules.push(schedule.clone());
            }
        }
        let Some(first) = self.turns(one, &schedules)? else { return Ok(()) };
        let best = (0..schedules.len()).min_by(|&a, &b| {
            let ratio = |number| first.times(number, incumbent).ratio();
            ratio(a).total_cmp(&ratio(b))
        });
        let chosen = best.filter(|&best| first.faster(best, incumbent)).unwrap_or(incumbent);
        // Where buffers lie makes a difference too: what is faster must be so in another process.
        if !key.predicted {
            *one.worker = None;
        }
        let last = [0, incumbent, chosen].map(|number| schedules[number].clone());
        let Some(again) = self.turns(one, &last)? else { return Ok(()) };
        let chosen = if again.faster(2, 1) { 2 } else { 1 };
        let outcome = Outcome::Chosen {
            tried: known.by_schedule.len(),
            legal: one.task.candidates.len(),
            times: again.times(if last[chosen] == last[0] { 0 } else { chosen }, 0),
            limit_s: again.limit_s,
        };
        self.record(one, key, &last[chosen], outcome)
    }

    /// Times schedules in many turns. Each was timed before: `None`, if something goes wrong now, is the machine's doing, and
    /// the next run tries again.
    fn turns(&mut self, one: &mut One<'_>, schedules: &[String]) -> Result<Option<Turns>, SearchError> {
        let (task, schedules, turns) = (one.number, schedules.to_vec(), TURNS[2]);
        let ask = Ask::Time { task, schedules, turns, seconds: SECONDS, ceilings: true };
        Ok(match self.ask(one, &ask)? {
            Ok(Told::Timed { seconds, limit_s }) => Some(Turns { seconds, limit_s }),
            Ok(_) | Err(_) => None,
        })
    }

    fn record(
        &self,
        one: &mut One<'_>,
        key: &Key,
        schedule: &str,
        outcome: Outcome,
    ) -> Result<(), SearchError> {
        let task = one.task;
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        Ok(one.file.append(Record {
            key: key.clone(),
            kernel: task.kernel.clone(),
            family: task.family.name().to_string(),
            dtype: self.setup.dtype.name().to_string(),
            tokens: task.tokens,
            schedule: schedule.to_string(),
            class: numeric_class(task.family, schedule).unwrap_or_default(),
            when: since.unwrap_or_default().as_secs(),
            outcome,
        })?)
    }

    /// Asks the worker, starting one if there is none. A worker that does not answer in time, or ends, is an outcome.
    fn ask(&mut self, one: &mut One<'_>, ask: &Ask) -> Result<Result<Told, Outcome>, SearchError> {
        let mut worker = match one.worker.take() {
            Some(worker) => worker,
            None => self.start()?,
        };
        let answer = worker.ask(ask, self.limits.patience, &mut || (self.go_on)(None));
        match answer {
            Answer::Told(told) => {
                // After a fault a GPU does nothing any more for the process that caused it: the next candidate has another.
                if !matches!(told, Told::Wrong { .. } | Told::Failed { .. }) {
                    *one.worker = Some(worker);
                }
                Ok(Ok(told))
            }
            Answer::Late => Ok(Err(Outcome::Hung { waited_s: self.limits.patience.as_secs_f64() })),
            Answer::Ended => {
                // Ctrl-C reaches the worker too: that is no fault of the candidate.
                if (self.go_on)(None).is_break() {
                    return Err(SearchError::Interrupted);
                }
                Ok(Err(Outcome::Crashed { why: worker.why() }))
            }
            Answer::Interrupted => Err(SearchError::Interrupted),
        }
    }

    fn start(&mut self) -> Result<Worker, SearchError> {
        let failed = |error: io::Error| SearchError::Start { why: error.to_string() };
        let mut worker = Worker::start((self.start)()).map_err(failed)?;
        let setup = serde_json::to_string(&self.setup).expect("a setup is plain data");
        match worker.line(&setup, self.limits.patience, &mut || (self.go_on)(None)) {
            Answer::Told(Told::Ready) => Ok(worker),
            Answer::Interrupted => Err(SearchError::Interrupted),
            Answer::Late => Err(SearchError::Start { why: "no answer in time".to_string() }),
            Answer::Told(_) | Answer::Ended => Err(SearchError::Start { why: worker.why() }),
        }
    }
}

/// A schedule that is to be tried.
struct Next {
    /// Its place in the order of the model of cost.
    rank: usize,
    /// What that says of it.
    cost: Option<f64>,
    schedule: String,
}

/// A task with what its search uses.
struct One<'a> {
    task: &'a Task,
    number: usize,
    place: [usize; 2],
    until: Instant,
    worker: &'a mut Option<Worker>,
    file: &'a mut TableFile,
}

/// Seconds of some schedules, turn by turn.
struct Turns {
    seconds: Vec<Vec<f64>>,
    limit_s: Vec<f64>,
}

impl Turns {
    fn times(&self, of: usize, beside: usize) -> Times {
        Times { seconds: self.seconds[of].clone(), default_s: self.seconds[beside].clone() }
    }

    /// Is a schedule faster than another by more than the turns differ?
    fn faster(&self, of: usize, beside: usize) -> bool {
        quantile(&self.times(of, beside).ratios(), 0.75) < 1.0 - GAIN
    }
}

/// What the table knows of a kernel here.
struct Known {
    /// The last outcome of each schedule.
    by_schedule: BTreeMap<String, Outcome>,
    /// What was chosen, and of how many.
    chosen: Option<(String, usize)>,
}

impl Known {
    fn of(one: &One<'_>, key: &Key) -> Known {
        let mut known = Known { by_schedule: BTreeMap::new(), chosen: None };
        for record in one.file.table.records.iter().filter(|record| record.key == *key) {
            match &record.outcome {
                Outcome::Chosen { tried, .. } => known.chosen = Some((record.schedule.clone(), *tried)),
                outcome => drop(known.by_schedule.insert(record.schedule.clone(), outcome.clone())),
            }
        }
        known
    }
}

/// A task's part of the time of the steps that it is in: by bytes for a token, by FLOPs for a prompt.
fn weights(tasks: &[Task]) -> Vec<f64> {
    let work = |task: &Task| {
        let cost = ir::cost::cost(&task.view(), &task.symbols(task.tokens), task.past as i64);
        (task.launches as u64 * if task.tokens == 1 { cost.bytes } else { cost.flops }) as f64
    };
    let whole = |single: bool| tasks.iter().filter(|t| (t.tokens == 1) == single).map(work).sum::<f64>();
    let whole = [whole(false), whole(true)];
    tasks.iter().map(|task| work(task) / whole[usize::from(task.tokens == 1)].max(1.0)).collect()
}

fn unexpected(told: Told) -> Outcome {
    match told {
        Told::Failed { why } => Outcome::Crashed { why },
        told => Outcome::Crashed { why: format!("an answer to another question: {told:?}") },
    }
}

/// A process that measures.
struct Worker {
    child: Child,
    input: ChildStdin,
    lines: Receiver<String>,
    /// What it wrote on stderr.
    words: thread::JoinHandle<String>,
}

enum Answer {
    Told(Told),
    Late,
    Ended,
    Interrupted,
}

impl Worker {
    fn start(mut command: Command) -> io::Result<Worker> {
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let pipes = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let (Some(input), Some(output), Some(mut errors)) = pipes else { unreachable!("all are piped") };
        let (send, lines) = channel();
        thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if send.send(line).is_err() {
                    break;
                }
            }
        });
        let words = thread::spawn(move || {
            let mut text = String::new();
            // What cannot be read is not told.
            let _ = errors.read_to_string(&mut text);
            text
        });
        Ok(Worker { child, input, lines, words })
    }

    fn ask(&mut self, ask: &Ask, patience: Duration, go_on: &mut dyn FnMut() -> ControlFlow<()>) -> Answer {
        self.line(&serde_json::to_string(ask).expect("a question is plain data"), patience, go_on)
    }

    fn line(&mut self, line: &str, patience: Duration, go_on: &mut dyn FnMut() -> ControlFlow<()>) -> Answer {
        if writeln!(self.input, "{line}").and_then(|()| self.input.flush()).is_err() {
            return Answer::Ended;
        }
        let late = Instant::now() + patience;
        loop {
            match self.lines.recv_timeout(Duration::from_millis(50)) {
                Ok(line) => return serde_json::from_str(&line).map_or(Answer::Ended, Answer::Told),
                Err(RecvTimeoutError::Disconnected) => return Answer::Ended,
                Err(RecvTimeoutError::Timeout) if go_on().is_break() => return Answer::Interrupted,
                Err(RecvTimeoutError::Timeout) if Instant::now() >= late => return Answer::Late,
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }

    /// How it ended, and its last words.
    fn why(mut self) -> String {
        let _ = self.child.kill();
        let how = self.child.wait().map_or("it is gone".to_string(), |status| status.to_string());
        let words = std::mem::replace(&mut self.words, thread::spawn(String::new));
        let text = words.join().unwrap_or_default();
        match text.lines().rfind(|line| !line.trim().is_empty()) {
            Some(last) => format!("{how}: {}", last.trim()),
            None => how,
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // One that hangs is not waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
