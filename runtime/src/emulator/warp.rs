//! A warp: registers of 32 lanes, and which lanes run what.
//!
//! Lanes that part at a branch run one side after the other, in an order by seed, and meet again at the branch's immediate
//! post-dominator (the stack of Fung, Sham, Yuan and Aamodt, "Dynamic Warp Formation and Scheduling", 2007, section 2).

use super::access::{Checked, Location, Reach, at_lane, lanes};
use super::arithmetic::{self as math, LANES, Lanes, Narrow, Source, Wide};
use super::bulk::BulkGroups;
use super::execute::{Arrival, AsyncCopy};
use super::grid::Random;
use super::program::{Program, Step};
use super::race::Knowledge;
use super::wgmma::Fragments;
use super::{Fault, Sums};
use crate::ptx::{Constant, Op, Pred, Reg, Special};

/// All lanes.
pub const ALL: u32 = u32::MAX;

/// Lanes that run together.
#[derive(Clone, Copy, Debug)]
struct Frame {
    pc: u32,
    /// Where they stop, because the frame below goes on with them.
    join: u32,
    mask: u32,
}

/// Why a warp stops to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pause {
    /// Its turn is over.
    Turn,
    /// It is at a barrier.
    Barrier(Arrival),
    /// It has to wait before the instruction, which it tries again then.
    Again(Wait),
    /// All lanes have ended.
    Done,
}

/// What a warp waits for before it can run an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// The end of a phase of the mbarrier.
    Mbarrier(Location),
    /// The end of a phase of the cluster's barrier.
    Cluster,
    /// The other warps of its warpgroup, to run the instruction with them.
    Warpgroup,
    /// Registers that others give back.
    Registers,
}

/// A warp.
pub struct Warp {
    /// Lanes that there are: the last warp of a CTA may have fewer.
    pub existing: u32,
    /// Lanes that have not ended.
    pub live: u32,
    /// Its number in the CTA.
    pub number: u32,
    /// The line of the instruction that it ran last.
    pub line: u32,
    frames: Vec<Frame>,
    pub narrow: Vec<Narrow>,
    pub wide: Vec<Wide>,
    predicates: Vec<u32>,
    pub narrow_defined: Vec<u32>,
    pub wide_defined: Vec<u32>,
    pub predicates_defined: Vec<u32>,
    /// What it knows of the accesses of others.
    pub knowledge: Knowledge,
    /// Copies that have not landed for certain.
    pub copies: Vec<AsyncCopy>,
    /// Groups that each lane has closed.
    pub groups: Narrow,
    /// Bulk copies of its lanes from shared memory; empty before the first.
    bulk: Vec<BulkGroups>,
    /// The phase of the cluster's barrier that it has arrived at and not waited for.
    pub cluster_phase: Option<u32>,
    /// Its last wait for an mbarrier was in vain.
    pub gave_up: bool,
    /// Registers that `wgmma` has.
    pub fragments: Fragments,
}

/// What a CTA's threads know of where they are.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// The CTA's first warp, counted through the grid.
    pub first_warp: u32,
    pub cta: [u32; 3],
    pub ctas: [u32; 3],
    pub threads: [u32; 3],
    pub dynamic_begin: u32,
    pub dynamic_bytes: u32,
    /// CTAs of a cluster.
    pub cluster: u32,
    /// Which of them it is.
    pub rank: u32,
    /// Has the grid to wait for those before it?
    pub dependent: bool,
}

impl Warp {
    /// Warp `number` of a CTA, at the kernel's beginning.
    pub fn new(program: &Program, place: &Place, number: u32) -> Warp {
        let [x, y, z] = place.threads;
        let threads = x * y * z;
        let count = (threads - 32 * number).min(32);
        let existing = ALL >> (32 - count);
        let warps = threads.div_ceil(32);
        let first = place.first_warp - place.rank * warps;
        let [narrow, wide] = program.registers;
        let predicates = usize::from(program.kernel.banks.predicates);
        let mut warp = Warp {
            existing,
            live: existing,
            number,
            line: 0,
            frames: vec![Frame { pc: 0, join: program.code.len() as u32, mask: existing }],
            narrow: vec![[0; LANES]; narrow],
            wide: vec![[0; LANES]; wide],
            predicates: vec![0; predicates],
            narrow_defined: vec![0; narrow],
            wide_defined: vec![0; wide],
            predicates_defined: vec![0; predicates],
            knowledge: Knowledge::new(first, place.rank * warps + number, warps, place.cluster),
            copies: Vec::new(),
            groups: [0; LANES],
            bulk: Vec::new(),
            cluster_phase: None,
            gave_up: false,
            fragments: Fragments::default(),
        };
        warp.knowledge.unwaited = if place.dependent { existing } else { 0 };
        for (&reg, &(_, constant)) in program.constants.iter().zip(&program.kernel.constants) {
            let value: Wide = std::array::from_fn(|lane| match constant {
                Constant::Bits(bits) => bits,
                Constant::Shared(offset) => u64::from(offset),
                Constant::Dynamic(offset) => u64::from(place.dynamic_begin + offset),
                Constant::Param(offset) => u64::from(offset),
                Constant::Special(special) => u64::from(special_value(special, place, number, lane as u32)),
            });
            warp.put(ALL, reg, Lanes::Wide(value));
        }
        for &(pred, value) in &program.kernel.constant_predicates {
            warp.put_predicate(ALL, pred, if value { ALL } else { 0 });
        }
        warp
    }

    pub fn source(&self, reg: Reg) -> Source<'_> {
        let index = usize::from(reg.index);
        if reg.wide { Source::Wide(&self.wide[index]) } else { Source::Narrow(&self.narrow[index]) }
    }

    pub fn narrow(&self, reg: Reg) -> &Narrow {
        self.source(reg).narrow()
    }

    /// A register of 64 bits.
    pub fn wide(&self, reg: Reg) -> &Wide {
        &self.wide[usize::from(reg.index)]
    }

    pub fn defined(&self, reg: Reg) -> u32 {
        let bank = if reg.wide { &self.wide_defined } else { &self.narrow_defined };
        bank[usize::from(reg.index)]
    }

    /// A register whose lanes are all defined.
    pub fn defined_narrow(&self, reg: Reg) -> Option<&Narrow> {
        (self.defined(reg) == ALL).then(|| self.narrow(reg))
    }

    fn define(&mut self, mask: u32, reg: Reg) {
        let bank = if reg.wide { &mut self.wide_defined } else { &mut self.narrow_defined };
        bank[usize::from(reg.index)] |= mask;
    }

    /// Writes the lanes of `mask`, cut or extended by zeros to the register's bank; they are defined then.
    pub fn put(&mut self, mask: u32, reg: Reg, lanes: Lanes) {
        let index = usize::from(reg.index);
        match (reg.wide, lanes) {
            (false, Lanes::Narrow(lanes)) => blend(mask, &mut self.narrow[index], &lanes),
            (true, Lanes::Wide(lanes)) => blend(mask, &mut self.wide[index], &lanes),
            (false, Lanes::Wide(lanes)) => {
                blend(mask, &mut self.narrow[index], &math::map(&lanes, |x| x as u32))
            }
            (true, Lanes::Narrow(lanes)) => blend(mask, &mut self.wide[index], &math::map(&lanes, u64::from)),
        }
        self.define(mask, reg);
    }

    pub fn predicate(&self, pred: Pred) -> u32 {
        self.predicates[usize::from(pred.0)]
    }

    pub fn put_predicate(&mut self, mask: u32, pred: Pred, value: u32) {
        let predicate = &mut self.predicates[usize::from(pred.0)];
        *predicate = *predicate & !mask | value & mask;
        self.predicates_defined[usize::from(pred.0)] |= mask;
    }

    /// The bulk copies of a lane.
    pub fn bulk(&mut self, lane: u32) -> &mut BulkGroups {
        if self.bulk.is_empty() {
            self.bulk = vec![BulkGroups::default(); LANES];
        }
        &mut self.bulk[lane as usize]
    }

    /// The predicates of a barrier that has opened.
    pub fn answer(&mut self, pred: Pred, value: bool) {
        self.put_predicate(self.existing, pred, if value { ALL } else { 0 });
    }

    /// Runs up to `turn` instructions. `idle` counts those since something was written last.
    pub fn run(
        &mut self,
        program: &Program,
        reach: &mut Reach<'_>,
        random: &mut Random,
        sums: Sums,
        turn: u32,
        idle: &mut u64,
    ) -> Checked<Pause> {
        for _ in 0..turn {
            let Some(&Frame { pc, join, mask }) = self.frames.last() else { return Ok(Pause::Done) };
            if pc == join || pc as usize >= program.code.len() || mask & self.live == 0 {
                if pc as usize >= program.code.len() {
                    self.live &= !mask;
                }
                self.frames.pop();
                continue;
            }
            let step = &program.code[pc as usize];
            self.line = step.line;
            *idle += 1;
            reach.counts.instructions[step.class as usize] += 1;
            let mut active = mask & self.live;
            if let Some((pred, when)) = step.guard {
                self.check_predicate(pred, active)?;
                active &= if when { self.predicate(pred) } else { !self.predicate(pred) };
            }
            match &step.op {
                Op::Branch { target } => {
                    self.branch(step, active, &[(*target, active)], random);
                    continue;
                }
                Op::BranchIndexed { index, targets } => {
                    self.check(step, program, active)?;
                    let index = *self.narrow(*index);
                    let mut sides: Vec<(u32, u32)> = Vec::new();
                    for lane in lanes(active) {
                        let at = index[lane as usize] as usize;
                        let Some(&target) = targets.get(at) else {
                            return Err(at_lane(lane, Fault::Unsupported { what: "a jump beyond its list" }));
                        };
                        match sides.iter_mut().find(|(known, _)| *known == target) {
                            Some((_, mask)) => *mask |= 1 << lane,
                            None => sides.push((target, 1 << lane)),
                        }
                    }
                    self.branch(step, active, &sides, random);
                    continue;
                }
                Op::Exit => {
                    let unread =
                        |(lane, groups): (usize, &BulkGroups)| active >> lane & 1 == 1 && groups.unread();
                    if let Some(lane) = self.bulk.iter().enumerate().position(unread) {
                        return Err(at_lane(lane as u32, Fault::UnreadSource));
                    }
                    self.live &= !active;
                    self.advance();
                    continue;
                }
                _ => {}
            }
            if active == 0 {
                self.advance();
                continue;
            }
            self.check(step, program, active)?;
            if !step.fragments.is_empty() {
                self.touch_fragments(step, |reg| program.kernel.register_name(reg))?;
            }
            let pause = self.execute(step, active, reach, random, sums, idle)?;
            if let Some(Pause::Again(_)) = pause {
                reach.counts.instructions[step.class as usize] -= 1;
                return Ok(pause.expect("it was one"));
            }
            for &reg in &step.defines {
                self.define(active, reg);
            }
            for &pred in &step.define_predicates {
                self.predicates_defined[usize::from(pred.0)] |= active;
            }
            self.advance();
            if let Some(pause) = pause {
                return Ok(pause);
            }
        }
        Ok(Pause::Turn)
    }

    /// The next instruction.
    pub fn pc(&self) -> u32 {
        self.frames.last().map_or(u32::MAX, |frame| frame.pc)
    }

    /// The next instruction is the one behind it.
    pub fn advance(&mut self) {
        if let Some(frame) = self.frames.last_mut() {
            frame.pc += 1;
        }
    }

    /// `sides`: lanes that jump, and where to; the others of the frame go on with the next instruction.
    fn branch(&mut self, step: &Step, taken: u32, sides: &[(u32, u32)], random: &mut Random) {
        let frame = self.frames.last_mut().expect("a frame runs");
        let mask = frame.mask & self.live;
        if let (true, [(target, _)]) = (taken == mask, sides) {
            frame.pc = *target;
            return;
        }
        if taken == 0 {
            frame.pc += 1;
            return;
        }
        let stay = (frame.pc + 1, mask & !taken);
        let mut all: Vec<(u32, u32)> =
            sides.iter().copied().chain([stay]).filter(|(_, mask)| *mask != 0).collect();
        // Lanes wait at the join; a frame that would only wait there itself is not kept.
        let join = step.join;
        if join == frame.join {
            self.frames.pop();
        } else {
            frame.pc = join;
        }
        random.shuffle(&mut all);
        let sides = all.into_iter().filter(|(pc, _)| *pc != join);
        self.frames.extend(sides.map(|(pc, mask)| Frame { pc, join, mask }));
    }

    fn check_predicate(&self, pred: Pred, active: u32) -> Checked<()> {
        match active & !self.predicates_defined[usize::from(pred.0)] {
            0 => Ok(()),
            missing => {
                let register = "a predicate".to_string();
                Err(at_lane(missing.trailing_zeros(), Fault::Undefined { register }))
            }
        }
    }

    /// Are all operands defined in the lanes that run?
    fn check(&self, step: &Step, program: &Program, active: u32) -> Checked<()> {
        for (&reg, &name) in step.uses.iter().zip(&step.names) {
            let missing = active & !self.defined(reg);
            if missing != 0 {
                let register = program.kernel.register_name(name);
                return Err(at_lane(missing.trailing_zeros(), Fault::Undefined { register }));
            }
        }
        step.use_predicates.iter().try_for_each(|&pred| self.check_predicate(pred, active))
    }
}

pub fn blend<T: Copy>(mask: u32, to: &mut [T; LANES], from: &[T; LANES]) {
    if mask == ALL {
        *to = *from;
        return;
    }
    for lane in 0..LANES {
        to[lane] = if mask >> lane & 1 == 1 { from[lane] } else { to[lane] };
    }
}

fn special_value(special: Special, place: &Place, warp: u32, lane: u32) -> u32 {
    let [x, y, z] = place.threads;
    let thread = 32 * warp + lane;
    let bit = 1u32 << lane;
    match special {
        Special::Tid(0) => thread % x,
        Special::Tid(1) => thread / x % y,
        Special::Tid(_) => thread / x / y,
        Special::Ntid(axis) => place.threads[usize::from(axis)],
        Special::Ctaid(axis) => place.cta[usize::from(axis)],
        Special::Nctaid(axis) => place.ctas[usize::from(axis)],
        Special::LaneId => lane,
        Special::WarpId => warp,
        Special::NwarpId => (x * y * z).div_ceil(32),
        Special::LanemaskEq => bit,
        Special::LanemaskLt => bit - 1,
        Special::LanemaskLe => bit | (bit - 1),
        Special::LanemaskGt => !(bit | (bit - 1)),
        Special::LanemaskGe => !(bit - 1),
        Special::DynamicSharedBytes => place.dynamic_bytes,
        Special::ClusterCtaRank | Special::ClusterCtaid(0) => place.rank,
        Special::ClusterNctaRank | Special::ClusterNctaid(0) => place.cluster,
        Special::ClusterCtaid(_) => 0,
        Special::ClusterNctaid(_) => 1,
        Special::ClusterId(0) => place.cta[0] / place.cluster,
        Special::ClusterId(axis) => place.cta[usize::from(axis)],
        Special::NclusterId(0) => place.ctas[0] / place.cluster,
        Special::NclusterId(axis) => place.ctas[usize::from(axis)],
    }
}
