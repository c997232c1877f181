//! CTAs and their barriers, and who runs when.
//!
//! A turn is some instructions of one warp; the seed chooses the warp and how many. CTAs begin in an order by seed, one
//! or two at a time. Where they do not get on, because they wait for one that has not begun, another is let in: then at
//! most so many run together as the grid has.

use super::access::{Found, Reach, of_warp};
use super::counts::{Counts, KernelCounts};
use super::execute::Arrival;
use super::memory::{Bytes, Memory};
use super::program::Program;
use super::race::{Knowledge, Shadow};
use super::warp::{Pause, Place, Warp};
use super::{Fault, Grid, Options, Report, Waiting};
use crate::ptx::{Kernel, ReduceOp};

/// Barriers of a CTA (PTX ISA, "bar, barrier").
const BARRIERS: usize = 16;
/// The most instructions of a turn.
const LONGEST_TURN: u32 = 64;
/// Turns without the end of a CTA after which another is let in.
const PATIENCE: u32 = 512;
/// Instructions without a write, a barrier or an end after which a kernel waits for ever: some seconds.
const IDLE_LIMIT: u64 = 1 << 26;
/// Threads that a CTA may have.
const MOST_THREADS: u64 = 1024;

/// Numbers by seed: SplitMix64 (Steele, Lea and Flood 2014).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// Numbers of a seed.
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ z >> 31
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    /// A random order (Fisher and Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for at in (1..items.len()).rev() {
            items.swap(at, self.below(at + 1));
        }
    }
}

/// What a warp is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Ready,
    Waits { barrier: u32, line: u32 },
    Done,
}

/// A barrier that somebody is at.
#[derive(Clone, Debug, Default)]
struct Barrier {
    /// Threads that open it; 0 while nobody is there.
    threads: u32,
    arrived: u32,
    /// Warps at it, and what they wait for.
    warps: Vec<(u32, Arrival)>,
}

struct Cta {
    index: [u32; 3],
    shared: Bytes,
    shadow: Shadow,
    warps: Vec<Warp>,
    states: Vec<State>,
    barriers: [Barrier; BARRIERS],
}

impl Cta {
    fn new(program: &Program, place: &Place) -> Cta {
        let threads: u32 = place.threads.iter().product();
        let warps = threads.div_ceil(32);
        Cta {
            index: place.cta,
            shared: Bytes::unwritten(place.shared_bytes as usize),
            shadow: Shadow::shared(warps),
            warps: (0..warps).map(|number| Warp::new(program, place, number)).collect(),
            states: vec![State::Ready; warps as usize],
            barriers: std::array::from_fn(|_| Barrier::default()),
        }
    }

    fn threads(&self) -> u32 {
        32 * self.warps.len() as u32
    }

    /// A warp comes to a barrier. Returns whether it opened.
    fn arrive(&mut self, warp: usize, line: u32, arrival: Arrival) -> Result<bool, Fault> {
        let all = self.threads();
        let problem = |problem: String| Err(Fault::Barrier { id: arrival.id, problem });
        let Some(barrier) = self.barriers.get_mut(arrival.id as usize) else {
            return problem(format!("there are {BARRIERS}"));
        };
        // The last warp's missing lanes count: a barrier counts warps (PTX ISA, "bar, barrier").
        let threads = arrival.threads.unwrap_or(all);
        if threads == 0 || !threads.is_multiple_of(32) || threads > all {
            return problem(format!("it counts {threads} threads, a multiple of 32 up to {all} can be"));
        }
        if barrier.threads != 0 && barrier.threads != threads {
            return problem(format!("it counts {threads} threads, for others at it {}", barrier.threads));
        }
        if barrier.warps.iter().any(|(known, _)| *known as usize == warp) {
            return problem("the warp is at it twice".into());
        }
        barrier.threads = threads;
        barrier.arrived += 32;
        barrier.warps.push((warp as u32, arrival));
        if arrival.waits {
            self.states[warp] = State::Waits { barrier: arrival.id, line };
        }
        if barrier.arrived < threads {
            return Ok(false);
        }
        let opened = std::mem::take(barrier);
        let waits = |warp: usize| {
            opened.warps.iter().find(|(known, _)| *known as usize == warp).map(|(_, a)| a.waits)
        };
        let at_it = self.warps.iter_mut().enumerate();
        let mut parties: Vec<_> =
            at_it.filter_map(|(at, warp)| Some((&mut warp.knowledge, waits(at)?))).collect();
        Knowledge::barrier(&mut parties);
        for &(warp, arrival) in &opened.warps {
            if let Some((op, pred)) = arrival.reduce {
                let mut votes = opened.warps.iter().map(|&(warp, arrival)| (warp, arrival.votes));
                let value = match op {
                    ReduceOp::And => votes.all(|(warp, votes)| votes == self.warps[warp as usize].existing),
                    ReduceOp::Or => votes.any(|(_, votes)| votes != 0),
                };
                self.warps[warp as usize].answer(pred, value);
            }
            if arrival.waits {
                self.states[warp as usize] = State::Ready;
            }
        }
        Ok(true)
    }
}

/// A report of what happened before the first instruction.
fn refused(kernel: &Kernel, fault: Fault) -> Box<Report> {
    Box::new(Report { kernel: kernel.name.clone(), line: 0, cta: [0; 3], warp: 0, lane: None, fault })
}

/// Does the launch fit the kernel and the machine?
fn check(kernel: &Kernel, grid: &Grid, params: &[u8], options: &Options) -> Result<(), Box<Report>> {
    let refuse = |fault| Err(refused(kernel, fault));
    let product = |counts: [u32; 3]| counts.iter().map(|&count| u64::from(count)).product::<u64>();
    let threads = product(grid.threads);
    if threads > MOST_THREADS {
        return refuse(Fault::TooManyResources {
            what: "threads of a CTA",
            asked: threads,
            limit: MOST_THREADS,
        });
    }
    if let Some(limit) = kernel.max_threads.filter(|&limit| threads > u64::from(limit)) {
        let limit = u64::from(limit);
        return refuse(Fault::TooManyResources { what: "threads of a CTA", asked: threads, limit });
    }
    if let Some(expected) = kernel.required_threads.filter(|&expected| threads != u64::from(expected)) {
        return refuse(Fault::Launch {
            what: "threads of a CTA",
            expected: u64::from(expected),
            found: threads,
        });
    }
    let shared = u64::from(kernel.dynamic_shared) + u64::from(grid.dynamic_shared);
    let limit = u64::from(options.sm.shared_bytes());
    if shared > limit {
        return refuse(Fault::TooManyResources { what: "bytes of shared memory", asked: shared, limit });
    }
    if grid.cluster != 1 {
        return refuse(Fault::Unsupported { what: "a cluster of more than one CTA" });
    }
    let warps = product(grid.ctas).saturating_mul(threads.div_ceil(32));
    for (what, asked, limit) in
        [("warps of a grid", warps, 1 << 31), ("instructions", kernel.code.len() as u64, 1 << 16)]
    {
        if asked > limit {
            return refuse(Fault::TooManyResources { what, asked, limit });
        }
    }
    if params.len() != kernel.param_bytes() as usize {
        let (expected, found) = (u64::from(kernel.param_bytes()), params.len() as u64);
        return refuse(Fault::Launch { what: "bytes of parameters", expected, found });
    }
    Ok(())
}

/// Runs a grid to its end.
pub fn run(
    program: &Program,
    grid: &Grid,
    params: &[u8],
    memory: &mut Memory,
    options: &Options,
) -> Result<Counts, Box<Report>> {
    let kernel = &program.kernel;
    check(kernel, grid, params, options)?;
    let mut random = Random::new(options.seed);
    let mut counts = KernelCounts { launches: 1, ..KernelCounts::default() };
    let [x, y, z] = grid.ctas;
    let mut waiting: Vec<u32> = if grid.threads.contains(&0) { Vec::new() } else { (0..x * y * z).collect() };
    random.shuffle(&mut waiting);
    let mut resident = 1 + random.below(2);
    let mut ctas: Vec<Cta> = Vec::new();
    let warps = grid.threads.iter().product::<u32>().div_ceil(32);
    let mut shadows: Vec<Shadow> = (0..memory.count()).map(|_| Shadow::global()).collect();
    let mut idle = 0;
    let mut turns = 0;
    loop {
        while ctas.len() < resident
            && let Some(number) = waiting.pop()
        {
            let place = Place {
                first_warp: number * warps,
                cta: [number % x, number / x % y, number / x / y],
                ctas: grid.ctas,
                threads: grid.threads,
                shared_bytes: kernel.dynamic_shared + grid.dynamic_shared,
                dynamic_begin: kernel.dynamic_shared,
                dynamic_bytes: grid.dynamic_shared,
                cluster: 1,
                rank: 0,
            };
            ctas.push(Cta::new(program, &place));
        }
        if ctas.is_empty() {
            break;
        }
        let at = random.below(ctas.len());
        let cta = &mut ctas[at];
        let ready = |cta: &Cta| cta.states.iter().filter(|&&state| state == State::Ready).count();
        let count = ready(cta);
        if count == 0 {
            return Err(deadlock(kernel, cta));
        }
        let nth = random.below(count);
        let is_ready = |(_, state): &(usize, &State)| **state == State::Ready;
        let (warp, _) = cta.states.iter().enumerate().filter(is_ready).nth(nth).expect("it was counted");
        let turn = 1 + random.below(LONGEST_TURN as usize) as u32;
        let report = |cta: &Cta, line, found: Box<Found>| {
            let Found { lane, fault } = *found;
            let kernel = kernel.name.clone();
            Box::new(Report { kernel, line, cta: cta.index, warp: warp as u32, lane, fault })
        };
        let mut reach = Reach {
            memory,
            shadows: &mut shadows,
            shared: &mut cta.shared,
            shared_shadow: &mut cta.shadow,
            params,
            counts: &mut counts,
            program,
            ctas: grid.ctas,
            warps,
        };
        let paused = cta.warps[warp].run(program, &mut reach, &mut random, options.sums, turn, &mut idle);
        let line = cta.warps[warp].line;
        match paused.map_err(|found| report(cta, line, found))? {
            Pause::Turn if idle > IDLE_LIMIT => {
                return Err(report(cta, line, of_warp(Fault::Endless { instructions: idle })));
            }
            Pause::Turn => {}
            Pause::Barrier(arrival) => {
                let opened =
                    cta.arrive(warp, line, arrival).map_err(|fault| report(cta, line, of_warp(fault)))?;
                counts.barriers += u64::from(opened);
            }
            Pause::Done => {
                cta.states[warp] = State::Done;
                idle = 0;
            }
        }
        turns += 1;
        if turns > PATIENCE {
            (turns, resident) = (0, resident + 1);
        }
        if ctas[at].states.iter().all(|&state| state == State::Done) {
            ctas.swap_remove(at);
            turns = 0;
        }
    }
    Ok(Counts { kernels: [(kernel.name.clone(), counts)].into() })
}

/// All warps of a CTA that have not ended wait.
fn deadlock(kernel: &Kernel, cta: &Cta) -> Box<Report> {
    let waiting = |(warp, state): (usize, &State)| match *state {
        State::Waits { barrier, line } => Some(Waiting { cta: cta.index, warp: warp as u32, line, barrier }),
        State::Ready | State::Done => None,
    };
    let waiting: Vec<Waiting> = cta.states.iter().enumerate().filter_map(waiting).collect();
    let (line, warp) = waiting.first().map_or((0, 0), |first| (first.line, first.warp));
    let fault = Fault::Deadlock { waiting };
    Box::new(Report { kernel: kernel.name.clone(), line, cta: cta.index, warp, lane: None, fault })
}
