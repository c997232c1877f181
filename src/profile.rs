//! Where the time of a step goes: each step is run whole and launch by launch, in turn, and the launches of a kernel are
//! added up over the layers.
//!
//! * Both ways run the same step on the same cache, whichever first alternates: the difference is the cost of measuring.
//! * The ceilings are measured between the steps, since a machine's speed changes: a share is the median of such pairs, a
//!   time the median of the steps.
//! * A kernel's time is from when its first worker began until its last was done.
//!
//! Of GPUs that are not here it is argued from machine code, in `machine_code`: [`steady`] counts the loop in which a kernel of
//! tensor cores spends its time, `emulated` its bank conflicts, [`gpus`] has what a GPU does in a cycle, [`predicted`] makes
//! times of them, [`recorded`] has what was measured.

#[cfg(feature = "compiler")]
pub mod emulated;
pub mod gpus;
#[cfg(feature = "compiler")]
pub mod machine_code;
pub mod predicted;
pub mod recorded;
pub mod steady;

use crate::predict::{self, Ceilings};
use ir::graph::Family;
use ir::plan::{Cost, Give, Plan};
use runtime::device::{DeviceError, State, Step, Tap, Tapped, Want};
use runtime::meter;
use serde::{Serialize, Serializer};
use serde_json::{Value, json};
use std::ops::Range;
use std::time::Instant;

/// What to run.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Tokens of the prompt.
    pub prompt: usize,
    /// Decode steps after it.
    pub new: usize,
    /// How often; one more turn, which takes page faults, is not counted.
    pub turns: usize,
}

/// What was measured.
#[derive(Clone, Debug)]
pub struct Profile {
    /// The prompt, into an empty cache.
    pub prefill: Phase,
    /// One token after the prompt.
    pub decode: Phase,
    /// Every step of the last turn.
    pub trace: Vec<TracedStep>,
}

/// Medians over like steps. Times are in seconds.
#[derive(Clone, Debug, Serialize)]
pub struct Phase {
    /// Tokens of a step.
    pub tokens: usize,
    /// Positions in the cache before the step: the median.
    pub past: usize,
    /// Steps measured.
    pub steps: usize,
    /// Time of a step that is run whole.
    pub seconds: f64,
    /// Time of a step that is run launch by launch.
    pub tapped_seconds: f64,
    /// Time of all kernels of a step.
    pub kernel_seconds: f64,
    /// The kernels' time as a share of the whole step's.
    pub sum_share: f64,
    /// What the machine could do meanwhile.
    pub ceilings: Ceilings,
    /// Each kernel, the one that takes longest first.
    pub kernels: Vec<KernelTime>,
}

/// All launches of a kernel in a step.
#[derive(Clone, Debug, Serialize)]
pub struct KernelTime {
    /// Its name in the plan.
    pub name: String,
    /// Its generator.
    #[serde(serialize_with = "family_name")]
    pub family: Family,
    /// Text of its schedule.
    pub schedule: String,
    /// Launches in a step.
    pub launches: usize,
    /// Time of them all.
    pub seconds: f64,
    /// Their share of the time of all kernels.
    pub share: f64,
    /// Bytes that they must move.
    pub bytes: u64,
    /// FLOPs that they do.
    pub flops: u64,
    /// What they cannot be faster than.
    pub limit: Limit,
    /// The least time by that limit, as a share of the time taken. Above 1 where operands come from a cache.
    pub share_of_limit: f64,
    /// The part of the time in which a worker works, over all workers; in the rest it waits for the others.
    pub busy: f64,
}

/// Which roof of the roofline a kernel is under.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Limit {
    /// Bytes a second.
    Memory,
    /// FLOPs a second.
    Compute,
}

impl Limit {
    /// Name in text.
    pub fn name(self) -> &'static str {
        match self {
            Limit::Memory => "memory",
            Limit::Compute => "compute",
        }
    }
}

fn family_name<S: Serializer>(family: &Family, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(family.name())
}

/// A step that was run launch by launch.
#[derive(Clone, Debug)]
pub struct TracedStep {
    /// Tokens.
    pub tokens: usize,
    /// Positions in the cache before.
    pub past: usize,
    /// Its time.
    pub seconds: f64,
    /// Its launches, in their order.
    pub launches: Vec<TracedLaunch>,
}

/// One launch.
#[derive(Clone, Debug)]
pub struct TracedLaunch {
    /// Its kernel, by number in the plan.
    pub kernel: usize,
    /// Its work.
    pub cost: Cost,
    /// From when the first worker began until the last was done, in seconds since the step began.
    pub span: Range<f64>,
    /// When each worker worked.
    pub workers: Vec<Range<f64>>,
}

/// A step, or the steps of a prompt: measured both ways.
#[derive(Clone, Debug)]
struct Sample {
    past: usize,
    whole: f64,
    tapped: f64,
    ceilings: Ceilings,
    /// By number in the plan.
    kernels: Vec<Work>,
}

/// What a kernel did in a sample.
#[derive(Clone, Copy, Debug, Default)]
struct Work {
    launches: usize,
    seconds: f64,
    busy_seconds: f64,
    cost: Cost,
}

/// Seconds of decode steps between two measurements of the ceilings.
const BLOCK_SECONDS: f64 = 0.2;

/// Runs prompts and decode steps. `ceilings` measures what the machine can do now, with as many workers.
///
/// # Errors
///
/// [`DeviceError::ContextFull`] before anything is run; [`DeviceError::NoTaps`]; or what the machine says.
pub fn profile(
    program: &mut dyn Tapped,
    options: &Options,
    ceilings: &mut dyn FnMut() -> Ceilings,
) -> Result<Profile, DeviceError> {
    let Options { prompt, new, turns } = *options;
    if prompt + new > program.context() {
        return Err(DeviceError::ContextFull { past: prompt, tokens: new, context: program.context() });
    }
    let plan = program.plan().clone();
    let (mut prefill, mut decode, mut trace) = (Vec::new(), Vec::new(), Vec::new());
    for turn in 0..=turns {
        trace.clear();
        let state = program.state()?;
        let tapped_first = turn % 2 == 0;
        let mut turned = Turn { program, plan: &plan, state, trace: &mut trace, tapped_first };
        let (prompts, steps) = turned.run(prompt, new, ceilings)?;
        if turn > 0 {
            prefill.push(prompts);
            decode.extend(steps);
        }
    }
    Ok(Profile { prefill: phase(&plan, prompt, &prefill), decode: phase(&plan, 1, &decode), trace })
}

/// A prompt into an empty cache, and steps after it.
struct Turn<'a> {
    program: &'a mut dyn Tapped,
    plan: &'a Plan,
    state: State,
    trace: &'a mut Vec<TracedStep>,
    tapped_first: bool,
}

impl Turn<'_> {
    fn run(
        &mut self,
        prompt: usize,
        new: usize,
        ceilings: &mut dyn FnMut() -> Ceilings,
    ) -> Result<(Sample, Vec<Sample>), DeviceError> {
        let vocab = self.program.vocab() as i32;
        let tokens: Vec<i32> = (0..prompt as i32).map(|i| (i * 7 + 1) % vocab).collect();
        let mut before = ceilings();
        let mut prefill = self.sample(0, before);
        let mut token = None;
        for step in predict::prompt(self.plan, prompt) {
            let want = if step.entry.give == Give::Nothing { Want::Nothing } else { Want::Token };
            let tokens = &tokens[step.past..][..step.tokens];
            // Whoever writes to a page of the cache first waits for it: neither way of running is to be the one.
            self.program.run(&Step { tokens, want }, &mut self.state)?;
            token = self.both(&step, tokens, want, &mut prefill)?;
        }
        let after = ceilings();
        prefill.ceilings = between(before, after);
        before = after;

        let mut decode = Vec::new();
        while decode.len() < new {
            let (begin, first) = (Instant::now(), decode.len());
            while decode.len() < new && begin.elapsed().as_secs_f64() < BLOCK_SECONDS {
                let past = self.state.past();
                let step = predict::decode(self.plan, past).expect("verified: a plan has a decode step");
                let mut sample = self.sample(past, before);
                token = self.both(&step, &[token.unwrap_or_default()], Want::Token, &mut sample)?;
                decode.push(sample);
            }
            let after = ceilings();
            decode[first..].iter_mut().for_each(|sample| sample.ceilings = between(before, after));
            before = after;
        }
        Ok((prefill, decode))
    }

    fn sample(&self, past: usize, ceilings: Ceilings) -> Sample {
        Sample {
            past,
            whole: 0.0,
            tapped: 0.0,
            ceilings,
            kernels: vec![Work::default(); self.plan.kernels.len()],
        }
    }

    /// Runs a step whole and launch by launch, and adds what both took to the sample. Gives the token.
    fn both(
        &mut self,
        step: &predict::Step<'_>,
        tokens: &[i32],
        want: Want,
        sample: &mut Sample,
    ) -> Result<Option<i32>, DeviceError> {
        let given = Step { tokens, want };
        let mut taken = Vec::with_capacity(step.entry.launches.len());
        let (mut token, mut seconds) = (None, 0.0);
        for tapped in [self.tapped_first, !self.tapped_first] {
            self.state.truncate(step.past);
            let begin = Instant::now();
            if tapped {
                // Short, or the workers go to sleep between launches.
                let mut after = |tap: Tap<'_>| taken.push((tap.span(), tap.workers.to_vec()));
                token = self.program.run_tapped(&given, &mut self.state, &mut after)?.token;
                seconds = begin.elapsed().as_secs_f64();
                sample.tapped += seconds;
            } else {
                self.program.run(&given, &mut self.state)?;
                sample.whole += begin.elapsed().as_secs_f64();
            }
        }
        self.tapped_first = !self.tapped_first;

        let launches = step.entry.launches.iter().zip(taken).map(|(launch, (span, workers))| {
            let cost = predict::launch_cost(self.plan, step, launch);
            TracedLaunch { kernel: launch.kernel, cost, span, workers }
        });
        let launches: Vec<_> = launches.collect();
        for launch in &launches {
            let work = &mut sample.kernels[launch.kernel];
            let busy: f64 = launch.workers.iter().map(|worker| worker.end - worker.start).sum();
            work.launches += 1;
            work.seconds += launch.span.end - launch.span.start;
            work.busy_seconds += busy / launch.workers.len() as f64;
            work.cost += launch.cost;
        }
        self.trace.push(TracedStep { tokens: step.tokens, past: step.past, seconds, launches });
        Ok(token)
    }
}

fn between(before: Ceilings, after: Ceilings) -> Ceilings {
    Ceilings {
        read_bytes_per_s: (before.read_bytes_per_s + after.read_bytes_per_s) / 2.0,
        dot_flops: (before.dot_flops + after.dot_flops) / 2.0,
    }
}

/// Medians of samples, which are of like steps: their kernels are the same.
fn phase(plan: &Plan, tokens: usize, samples: &[Sample]) -> Phase {
    let median =
        |value: &dyn Fn(&Sample) -> f64| meter::median(&samples.iter().map(value).collect::<Vec<_>>());
    let sum = |sample: &Sample| sample.kernels.iter().map(|work| work.seconds).sum::<f64>();
    let ceilings = Ceilings {
        read_bytes_per_s: median(&|s| s.ceilings.read_bytes_per_s),
        dot_flops: median(&|s| s.ceilings.dot_flops),
    };
    let launched = samples.first().into_iter().flat_map(|sample| sample.kernels.iter().enumerate());
    let kernels = launched.filter(|(_, work)| work.launches > 0).map(|(number, work)| {
        let of = |value: &dyn Fn(&Work) -> f64| median(&|s| value(&s.kernels[number]));
        let (bytes, flops) = (of(&|w| w.cost.bytes as f64), of(&|w| w.cost.flops as f64));
        let compute = flops / ceilings.dot_flops > bytes / ceilings.read_bytes_per_s;
        KernelTime {
            name: plan.kernels[number].name.clone(),
            family: plan.kernels[number].family,
            schedule: plan.kernels[number].schedule.clone(),
            launches: work.launches,
            seconds: of(&|w| w.seconds),
            share: median(&|s| s.kernels[number].seconds / sum(s)),
            bytes: bytes as u64,
            flops: flops as u64,
            limit: if compute { Limit::Compute } else { Limit::Memory },
            share_of_limit: median(&|s| {
                s.ceilings.seconds(s.kernels[number].cost) / s.kernels[number].seconds
            }),
            busy: of(&|w| w.busy_seconds / w.seconds),
        }
    });
    let mut kernels: Vec<_> = kernels.collect();
    kernels.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
    Phase {
        tokens,
        past: median(&|s| s.past as f64) as usize,
        steps: samples.len(),
        seconds: median(&|s| s.whole),
        tapped_seconds: median(&|s| s.tapped),
        kernel_seconds: median(&sum),
        sum_share: median(&|s| sum(s) / s.whole),
        ceilings,
        kernels,
    }
}

/// Steps as a trace for Perfetto and `chrome://tracing`, in their JSON format: a lane of steps, and one a worker. The steps
/// stand one behind the other, without what was run between them. Times are in microseconds.
///
/// Source: *Trace Event Format*, complete events (`X`) and metadata (`M`).
pub fn trace(plan: &Plan, model: &str, steps: &[TracedStep]) -> Value {
    let nanos = |seconds: f64| (seconds * 1e9).round();
    let named = |what: &str, lane: usize, name: String| json!({"ph": "M", "pid": 0, "tid": lane, "name": what, "args": {"name": name}});
    let mut events =
        vec![named("process_name", 0, model.to_string()), named("thread_name", 0, "steps".to_string())];
    let workers = steps.iter().flat_map(|step| &step.launches).map(|launch| launch.workers.len()).max();
    events.extend((0..workers.unwrap_or(0)).map(|w| named("thread_name", w + 1, format!("worker {w}"))));
    let mut origin = 0.0;
    for step in steps {
        let event = |lane: usize, name: String, span: Range<f64>, args: Value| {
            // A nanosecond of air: a viewer that adds both as floats must not find the next event inside of this one.
            let (at, end) = (nanos(origin + span.start), nanos(origin + span.end) - 1.0);
            json!({"ph": "X", "pid": 0, "tid": lane, "name": name, "ts": at / 1e3, "dur": (end - at).max(0.0) / 1e3, "args": args})
        };
        let name = format!("{} tokens after {}", step.tokens, step.past);
        let args = json!({"tokens": step.tokens, "past": step.past});
        events.push(event(0, name, 0.0..step.seconds, args));
        for (number, launch) in step.launches.iter().enumerate() {
            let kernel = &plan.kernels[launch.kernel];
            let Cost { flops, bytes } = launch.cost;
            for (worker, span) in launch.workers.iter().enumerate() {
                let args = json!({
                    "launch": number, "family": kernel.family.name(), "bytes": bytes, "flops": flops,
                });
                events.push(event(worker + 1, kernel.name.clone(), span.clone(), args));
            }
        }
        origin += step.seconds;
    }
    json!({"displayTimeUnit": "ms", "traceEvents": events})
}
