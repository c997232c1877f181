//! CTAs and their barriers, and who runs when.
//!
//! A turn is some instructions of one warp; the seed chooses the warp and how many. Bulk copies end at once, or at any
//! time, or when nobody can go on without them: by seed too. Clusters, or CTAs where there are none, begin in an order by
//! seed, one or two at a time. Where they do not get on, because they wait for one that has not begun, another is let in: then at
//! most so many run together as the grid has.

use super::access::{Checked, Found, Reach, of_warp};
use super::cluster::{ClusterBarrier, Landing, MOST_CTAS, SharedMemory};
use super::counts::{Counts, KernelCounts};
use super::execute::Arrival;
use super::mbarrier;
use super::memory::Memory;
use super::program::Program;
use super::race::{Knowledge, Shadow};
use super::registers::Registers;
use super::warp::{Pause, Place, Wait, Warp};
use super::wgmma;
use super::{Fault, Grid, Options, Report, Sm, Waiting};
use crate::ptx::{Kernel, Op, ReduceOp};

/// Barriers of a CTA (PTX ISA, "bar, barrier").
const BARRIERS: usize = 16;
/// The most instructions of a turn.
const LONGEST_TURN: u32 = 64;
/// Turns without the end of a CTA after which another is let in.
const PATIENCE: u32 = 512;
/// Instructions without a write, a barrier or an end after which a kernel seems to wait for a copy.
const LONG_IDLE: u64 = 1 << 12;
/// As many after which it waits for ever: some seconds.
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
    /// At a barrier of the CTA.
    Barrier {
        id: u32,
        line: u32,
    },
    /// Before an instruction.
    Waits {
        on: Wait,
        line: u32,
    },
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
    warps: Vec<Warp>,
    registers: Registers,
    states: Vec<State>,
    barriers: [Barrier; BARRIERS],
}

impl Cta {
    fn new(program: &Program, place: &Place) -> Cta {
        let threads: u32 = place.threads.iter().product();
        let warps = threads.div_ceil(32);
        Cta {
            index: place.cta,
            registers: Registers::new(&program.kernel, warps),
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
            self.states[warp] = State::Barrier { id: arrival.id, line };
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

impl Cta {
    /// Runs the instruction that a warpgroup is at, if all its warps are.
    fn run_together(
        &mut self,
        warp: usize,
        program: &Program,
        reach: &mut Reach<'_>,
        options: &Options,
    ) -> Checked<()> {
        let first = warp / wgmma::WARPS * wgmma::WARPS;
        let Some(warps) = self.warps.get_mut(first..first + wgmma::WARPS) else {
            let problem = "the CTA's last warpgroup has not four warps".into();
            return Err(of_warp(Fault::Wgmma { problem }));
        };
        let states = &mut self.states[first..first + wgmma::WARPS];
        let at_it = |state: &State| matches!(state, State::Waits { on: Wait::Warpgroup, .. });
        if !states.iter().all(at_it) {
            return Ok(());
        }
        let pc = warps[0].pc();
        if let Some(other) = warps.iter().find(|warp| warp.pc() != pc) {
            return Err(of_warp(Fault::Apart { other: other.line }));
        }
        let step = &program.code[pc as usize];
        let goes_on = match &step.op {
            Op::Wgmma(wgmma) => wgmma::run(warps, step, wgmma, reach, options.sums).map(|()| true)?,
            Op::SetMaxRegisters { increase, registers } => {
                self.registers.set(first, wgmma::WARPS, *increase, *registers).map_err(of_warp)?
            }
            op => unreachable!("{op:?} is no warpgroup's"),
        };
        for (warp, state) in warps.iter_mut().zip(states) {
            let State::Waits { on, .. } = state else { unreachable!("all of them wait") };
            *on = Wait::Registers;
            if goes_on {
                warp.advance();
                reach.counts.instructions[step.class as usize] += 1;
                *state = State::Ready;
            }
        }
        Ok(())
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
    let cluster = u64::from(grid.cluster);
    if let Some(expected) = kernel.cluster.filter(|&expected| expected != grid.cluster) {
        return refuse(Fault::Launch {
            what: "CTAs of a cluster",
            expected: u64::from(expected),
            found: cluster,
        });
    }
    if grid.cluster > MOST_CTAS || grid.cluster > 1 && options.sm != Sm::Sm90a {
        let limit = if options.sm == Sm::Sm90a { u64::from(MOST_CTAS) } else { 1 };
        return refuse(Fault::TooManyResources { what: "CTAs of a cluster", asked: cluster, limit });
    }
    if grid.cluster == 0 || !grid.ctas[0].is_multiple_of(grid.cluster) {
        let (expected, found) = (cluster, u64::from(grid.ctas[0]));
        return refuse(Fault::Launch { what: "a multiple of the cluster's CTAs along x", expected, found });
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

/// CTAs that run together.
struct Cluster {
    /// The number of the first in the grid.
    first: u32,
    ctas: Vec<Cta>,
    memory: Vec<SharedMemory>,
    barrier: ClusterBarrier,
    landings: Vec<Landing>,
}

/// When bulk copies end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Arrivals {
    AtOnce,
    AnyTime,
    WhenNeeded,
}

impl Cluster {
    fn new(program: &Program, grid: &Grid, first: u32) -> Cluster {
        let kernel = &program.kernel;
        let warps = grid.threads.iter().product::<u32>().div_ceil(32);
        let [x, y, _] = grid.ctas;
        let cta = |rank: u32| {
            let number = first + rank;
            let place = Place {
                first_warp: number * warps,
                cta: [number % x, number / x % y, number / x / y],
                ctas: grid.ctas,
                threads: grid.threads,
                dynamic_begin: kernel.dynamic_shared,
                dynamic_bytes: grid.dynamic_shared,
                cluster: grid.cluster,
                rank,
                dependent: grid.dependent,
            };
            Cta::new(program, &place)
        };
        let bytes = kernel.dynamic_shared + grid.dynamic_shared;
        Cluster {
            first,
            ctas: (0..grid.cluster).map(cta).collect(),
            memory: (0..grid.cluster).map(|_| SharedMemory::new(bytes, warps * grid.cluster)).collect(),
            barrier: ClusterBarrier::default(),
            landings: Vec::new(),
        }
    }

    fn states(&self) -> impl Iterator<Item = (usize, usize, State)> {
        self.ctas.iter().enumerate().flat_map(|(rank, cta)| {
            cta.states.iter().enumerate().map(move |(warp, &state)| (rank, warp, state))
        })
    }

    /// A warp that can go on: its CTA's rank and its number.
    fn choose(&self, random: &mut Random) -> Option<(usize, usize)> {
        let ready = || self.states().filter(|(_, _, state)| *state == State::Ready);
        let count = ready().count();
        let nth = (count > 0).then(|| random.below(count))?;
        ready().nth(nth).map(|(rank, warp, _)| (rank, warp))
    }

    /// A bulk copy ends, if one is on its way.
    fn land(&mut self, random: &mut Random) -> Result<bool, (Landing, Fault)> {
        if self.landings.is_empty() {
            return Ok(false);
        }
        let landing = self.landings.swap_remove(random.below(self.landings.len()));
        let (rank, offset) = landing.place;
        self.memory[rank]
            .mbarriers
            .complete(rank, offset, landing.bytes)
            .map_err(|problem| (landing, mbarrier::fault(landing.place, problem)))?;
        Ok(true)
    }

    /// Who waits for something that has happened since looks again.
    fn wake(&mut self) {
        let live = || self.states().filter(|(_, _, state)| *state != State::Done).count();
        let mut happened = self.barrier.arrived() && self.barrier.ends(live() as u32);
        for memory in &mut self.memory {
            happened |= std::mem::take(&mut memory.mbarriers.ended);
        }
        for cta in &mut self.ctas {
            happened |= std::mem::take(&mut cta.registers.given);
        }
        for state in self.ctas.iter_mut().flat_map(|cta| &mut cta.states).filter(|_| happened) {
            if matches!(state, State::Waits { on: Wait::Mbarrier(_) | Wait::Cluster | Wait::Registers, .. }) {
                *state = State::Ready;
            }
        }
    }

    /// All warps that have not ended wait.
    fn deadlock(&self, kernel: &Kernel) -> Box<Report> {
        let waiting = |(rank, warp, state): (usize, usize, State)| {
            let (what, line) = match state {
                State::Barrier { id, line } => (format!("barrier {id}"), line),
                State::Waits { on: Wait::Mbarrier((of, offset)), line } => {
                    let missing = self.memory[of].mbarriers.missing(offset);
                    (format!("the mbarrier at {offset:#x}, whose {missing}"), line)
                }
                State::Waits { on: Wait::Cluster, line } => ("the cluster's barrier".into(), line),
                State::Waits { on: Wait::Warpgroup, line } => ("its warpgroup".into(), line),
                State::Waits { on: Wait::Registers, line } => ("registers".into(), line),
                State::Ready | State::Done => return None,
            };
            Some(Waiting { cta: self.ctas[rank].index, warp: warp as u32, line, what })
        };
        let waiting: Vec<Waiting> = self.states().filter_map(waiting).collect();
        let (cta, line, warp) = waiting.first().map_or(([0; 3], 0, 0), |w| (w.cta, w.line, w.warp));
        let fault = Fault::Deadlock { waiting };
        Box::new(Report { kernel: kernel.name.clone(), line, cta, warp, lane: None, fault })
    }
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
    let firsts = (0..x * y * z).step_by(grid.cluster as usize);
    let mut waiting: Vec<u32> = if grid.threads.contains(&0) { Vec::new() } else { firsts.collect() };
    random.shuffle(&mut waiting);
    let mut resident = 1 + random.below(2);
    // Of its own, so that kernels without bulk copies have the schedules that they would have had.
    let mut fortune = Random::new(!options.seed);
    let arrivals = [Arrivals::AtOnce, Arrivals::AnyTime, Arrivals::WhenNeeded][fortune.below(3)];
    let mut clusters: Vec<Cluster> = Vec::new();
    let warps = grid.threads.iter().product::<u32>().div_ceil(32);
    memory.begin_grid(grid.dependent);
    let mut shadows: Vec<Shadow> = (0..memory.count()).map(|_| Shadow::global()).collect();
    let mut idle = 0;
    let mut turns = 0;
    loop {
        while clusters.len() < resident
            && let Some(first) = waiting.pop()
        {
            clusters.push(Cluster::new(program, grid, first));
        }
        if clusters.is_empty() {
            break;
        }
        let at = random.below(clusters.len());
        let cluster = &mut clusters[at];
        let late = |cluster: &Cluster, (landing, fault): (Landing, Fault)| {
            let Landing { rank, warp, line, .. } = landing;
            let (kernel, cta) = (kernel.name.clone(), cluster.ctas[rank].index);
            Box::new(Report { kernel, line, cta, warp, lane: None, fault })
        };
        let Some((rank, warp)) = cluster.choose(&mut random) else {
            if !cluster.land(&mut fortune).map_err(|found| late(cluster, found))? {
                return Err(cluster.deadlock(kernel));
            }
            cluster.wake();
            continue;
        };
        let cta = &mut cluster.ctas[rank];
        let turn = 1 + random.below(LONGEST_TURN as usize) as u32;
        let report = |cta: &Cta, line, found: Box<Found>| {
            let Found { lane, fault } = *found;
            let kernel = kernel.name.clone();
            Box::new(Report { kernel, line, cta: cta.index, warp: warp as u32, lane, fault })
        };
        let mut reach = Reach {
            memory,
            shadows: &mut shadows,
            cluster: &mut cluster.memory,
            rank,
            cluster_barrier: &mut cluster.barrier,
            landings: &mut cluster.landings,
            params,
            counts: &mut counts,
            program,
            ctas: grid.ctas,
            warps,
            number: cluster.first + rank as u32,
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
            Pause::Again(on) => {
                cta.states[warp] = State::Waits { on, line };
                if on == Wait::Warpgroup {
                    let ran = cta.run_together(warp, program, &mut reach, options);
                    ran.map_err(|found| report(cta, line, found))?;
                }
            }
            Pause::Done => {
                if cta.warps[warp].knowledge.unwaited != 0 {
                    return Err(report(cta, line, of_warp(Fault::NoWaitForGrids)));
                }
                cta.states[warp] = State::Done;
                idle = 0;
                let gone = cta.states.iter().all(|&state| state == State::Done);
                if gone && (reach.cluster.len() > 1 || reach.own().mbarriers.any()) {
                    let ended = reach.end(cta.warps.iter().map(|warp| &warp.knowledge));
                    ended.map_err(|found| report(cta, line, found))?;
                }
                reach.own().gone = gone;
            }
        }
        let lands = match arrivals {
            Arrivals::AtOnce => cluster.landings.len(),
            Arrivals::AnyTime => fortune.below(2),
            // Who asks again and again, without waiting, needs it too.
            Arrivals::WhenNeeded => usize::from(idle > LONG_IDLE),
        };
        for _ in 0..lands {
            if cluster.land(&mut fortune).map_err(|found| late(cluster, found))? {
                idle = 0;
            }
        }
        cluster.wake();
        turns += 1;
        if turns > PATIENCE {
            (turns, resident) = (0, resident + 1);
        }
        if cluster.memory.iter().all(|memory| memory.gone) {
            clusters.swap_remove(at);
            turns = 0;
        }
    }
    memory.end_grid(shadows);
    Ok(Counts { kernels: [(kernel.name.clone(), counts)].into() })
}
