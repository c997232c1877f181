//! What each instruction does to a warp and to memory; branches are the warp's own.

use super::access::{
    Access, Checked, PARAM_WINDOW, Reach, Run, SHARED_WINDOW, Spot, at_lane, lanes, of_warp,
};
use super::arithmetic::{self as math, LANES, Lanes, Narrow, Source, Wide};
use super::cluster;
use super::grid::Random;
use super::matrix;
use super::program::Step;
use super::race::{How, Shown};
use super::warp::{ALL, Pause, Wait, Warp, blend};
use super::{Fault, Sums};
use crate::ptx::{
    Address, AtomicOp, BarrierOp, Logic, MbarrierOp, Op, Order, Pred, ReduceOp, Reg, ShuffleMode, Space,
    Type, UnaryOp, VoteMode,
};

/// What a warp does at a barrier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrival {
    pub id: u32,
    /// Threads that it counts; all of the CTA if it is not said.
    pub threads: Option<u32>,
    /// Does the warp wait?
    pub waits: bool,
    /// `bar.red`: what it is, and the predicate it goes to.
    pub reduce: Option<(ReduceOp, Pred)>,
    /// Lanes whose predicate is true.
    pub votes: u32,
}

/// A copy that has been asked for.
#[derive(Clone, Copy, Debug)]
pub struct AsyncCopy {
    lane: u32,
    /// The lane's group that it is in.
    group: u32,
    /// Where in the CTA's shared memory.
    to: usize,
    /// The allocation and where in it; of no meaning if nothing is read.
    from: (usize, usize),
    bytes: u32,
    /// How many it reads; the others become zeros.
    read: u32,
    landed: bool,
}

impl Warp {
    /// What an instruction does in the lanes of `active`, which is not 0.
    pub fn execute(
        &mut self,
        step: &Step,
        active: u32,
        reach: &mut Reach<'_>,
        random: &mut Random,
        sums: Sums,
        idle: &mut u64,
    ) -> Checked<Option<Pause>> {
        match &step.op {
            Op::Mov { d, a } => {
                let defined = self.defined(*a);
                let value = self.copied(*a);
                self.put(active, *d, value);
                self.hand_on(active, *d, defined);
            }
            Op::Selp { d, a, b, p } => {
                let chosen = self.predicate(*p);
                let defined = self.defined(*a) & chosen | self.defined(*b) & !chosen;
                let value = self.copied(*b);
                let other = self.copied(*a);
                self.put(active, *d, select(chosen, other, value));
                self.hand_on(active, *d, defined);
            }
            Op::MovPred { d, a } => {
                let (value, defined) = (self.predicate(*a), self.predicates_defined[usize::from(a.0)]);
                self.put_predicate(active, *d, value);
                self.predicates_defined[usize::from(d.0)] &= defined | !active;
            }
            Op::Pack { d, parts } => {
                let defined = parts.iter().fold(ALL, |all, &part| all & self.defined(part));
                let bits = if d.wide { 64 } else { 32 } / parts.len();
                let mut value = [0; LANES];
                for (at, &part) in parts.iter().enumerate() {
                    let part = self.narrow(part);
                    for lane in 0..LANES {
                        let low = u64::from(part[lane]) & (ALL >> (32 - bits)) as u64;
                        value[lane] |= low << (bits * at);
                    }
                }
                self.put(active, *d, Lanes::Wide(value));
                self.hand_on(active, *d, defined);
            }
            Op::Unpack { parts, a } => {
                let defined = self.defined(*a);
                let value = self.source(*a).extended(if a.wide { Type::B64 } else { Type::B32 });
                let bits = if a.wide { 64 } else { 32 } / parts.len();
                for (at, part) in parts.iter().enumerate() {
                    if let Some(part) = *part {
                        let cut = math::map(&value, |x| (x >> (bits * at)) as u32 & ALL >> (32 - bits));
                        self.put(active, part, Lanes::Narrow(cut));
                        self.hand_on(active, part, defined);
                    }
                }
            }
            Op::Unary { op, ty, mode, d, a } => {
                if *op == UnaryOp::Ex2 {
                    reach.counts.ex2 += u64::from(active.count_ones());
                }
                let value = math::unary(*op, *ty, *mode, self.source(*a));
                self.put(active, *d, value);
            }
            Op::Binary { op, ty, mode, d, a, b } => {
                let value = math::binary(*op, *ty, *mode, self.source(*a), self.source(*b));
                self.put(active, *d, value);
            }
            Op::Ternary { op, ty, mode, d, a, b, c } => {
                let value = math::ternary(*op, *ty, *mode, self.source(*a), self.source(*b), self.source(*c));
                self.put(active, *d, value);
            }
            Op::Wide { ty, d, a, b, c } => {
                let c = c.map(|c| self.source(c));
                let value = math::wide(*ty, self.source(*a), self.source(*b), c);
                self.put(active, *d, value);
            }
            Op::NotPred { d, a } => self.put_predicate(active, *d, !self.predicate(*a)),
            Op::LogicPred { op, d, a, b } => {
                let value = logic(*op, self.predicate(*a), self.predicate(*b));
                self.put_predicate(active, *d, value);
            }
            Op::Setp { cmp, ty, ftz, d, other, combine, a, b } => {
                let mut value = math::compare(*cmp, *ty, *ftz, self.source(*a), self.source(*b));
                let mut opposite = !value;
                if let Some((op, pred, negated)) = *combine {
                    let pred = if negated { !self.predicate(pred) } else { self.predicate(pred) };
                    (value, opposite) = (logic(op, value, pred), logic(op, opposite, pred));
                }
                self.put_predicate(active, *d, value);
                if let Some(other) = *other {
                    self.put_predicate(active, other, opposite);
                }
            }
            Op::Cvt { to, from, rounding, integral, mode, d, a } => {
                let value = math::convert(*to, *from, *rounding, *integral, *mode, self.source(*a), d.wide);
                self.put(active, *d, value);
            }
            Op::CvtPair { to, rounding, relu, d, a, b } => {
                let value = math::convert_pair(*to, *rounding, *relu, self.narrow(*a), self.narrow(*b));
                self.put(active, *d, Lanes::Narrow(value));
            }
            Op::Cvta { space, to, d, a } => {
                let window = match space {
                    Space::Shared | Space::SharedCluster => SHARED_WINDOW,
                    Space::Param => PARAM_WINDOW,
                    Space::Global | Space::Generic | Space::Const => 0,
                };
                let ty = if a.wide { Type::U64 } else { Type::U32 };
                let value = math::map(&self.source(*a).extended(ty), |x| {
                    if *to { x.wrapping_sub(window) } else { x.wrapping_add(window) }
                });
                self.put(active, *d, Lanes::Wide(value));
            }
            Op::Load { space, ty, order, d, address, .. } => {
                let bytes = ty.bits() / 8 * d.len() as u32;
                let access = Access::new(*space, self.addresses(*address), active, bytes)?;
                reach.count(&access, false);
                let how = How {
                    strong: order.strong(),
                    non_coherent: *order == Order::NonCoherent,
                    pc: step.pc,
                    ..How::default()
                };
                for run in access.runs(true) {
                    let spot = reach.spot(access.space, run, bytes)?;
                    reach.watch(&spot, run, bytes, how, &self.knowledge)?;
                    self.take(run, *ty, d, reach.read(&spot, run, bytes)?);
                    if how.strong {
                        reach.acquire(&spot, run, &mut self.knowledge, order.acquires());
                    }
                }
            }
            Op::Store { space, ty, order, address, a, .. } => {
                let size = ty.bits() / 8;
                let bytes = size * a.len() as u32;
                let access = Access::new(*space, self.addresses(*address), active, bytes)?;
                reach.count(&access, true);
                *idle = 0;
                let how = How { write: true, strong: order.strong(), pc: step.pc, ..How::default() };
                let mut buffer = [0; LANES * 32];
                for run in access.runs(false) {
                    let from = &mut buffer[..run.len(bytes)];
                    self.give(run, *ty, a, from);
                    let spot = reach.spot(access.space, run, bytes)?;
                    reach.watch(&spot, run, bytes, how, &self.knowledge)?;
                    reach.write(&spot, run, from)?;
                    if how.strong {
                        reach.release(&spot, run, &mut self.knowledge, (order.releases(), false));
                    }
                }
            }
            Op::Atomic { .. } => {
                *idle = 0;
                self.atomic(step, active, reach)?;
            }
            Op::Trap => return Err(at_lane(active.trailing_zeros(), Fault::Trap)),
            Op::Hint => {}
            Op::WaitForGrids => self.knowledge.unwaited &= !active,
            Op::Fence { .. } => self.knowledge.fence(lanes(active)),
            Op::Barrier { op, id, threads } => {
                self.together(active)?;
                *idle = 0;
                let (reduce, votes) = match op {
                    BarrierOp::Reduce(d, op, a) => (Some((*op, *d)), self.predicate(*a) & active),
                    BarrierOp::Sync | BarrierOp::Arrive => (None, 0),
                };
                return Ok(Some(Pause::Barrier(Arrival {
                    id: self.uniform(*id, active)?,
                    threads: threads.map(|threads| self.uniform(threads, active)).transpose()?,
                    waits: *op != BarrierOp::Arrive,
                    reduce,
                    votes,
                })));
            }
            Op::WarpSync { mask } => {
                let mask = self.named(*mask, active)?;
                self.knowledge.warp_sync(mask, mask == self.live);
            }
            Op::Shuffle { mode, d, p, a, b, c, mask } => {
                let active = self.named(*mask, active)?;
                let (b, c) = (self.narrow(*b), self.narrow(*c));
                let from: [(u32, bool); LANES] =
                    std::array::from_fn(|lane| shuffle_source(*mode, lane as u32, b[lane], c[lane]));
                if let Some(lane) = lanes(active).find(|&lane| active >> from[lane as usize].0 & 1 == 0) {
                    return Err(at_lane(lane, Fault::AbsentLane { of: from[lane as usize].0 }));
                }
                let a = self.narrow(*a);
                let value = Lanes::Narrow(math::map(&from, |(lane, _)| a[lane as usize]));
                self.put(active, *d, value);
                if let Some(p) = *p {
                    self.put_predicate(active, p, math::bits(&math::map(&from, |(_, inside)| inside)));
                }
            }
            Op::Vote { mode, a, negated, mask } => {
                let active = self.named(*mask, active)?;
                let votes = if *negated { !self.predicate(*a) } else { self.predicate(*a) } & active;
                let all = |holds: bool| if holds { ALL } else { 0 };
                match mode {
                    VoteMode::All(d) => self.put_predicate(active, *d, all(votes == active)),
                    VoteMode::Any(d) => self.put_predicate(active, *d, all(votes != 0)),
                    VoteMode::Uni(d) => self.put_predicate(active, *d, all(votes == active || votes == 0)),
                    VoteMode::Ballot(d) => self.put(active, *d, Lanes::Narrow([votes; LANES])),
                }
            }
            Op::Match { all, wide, d, a, mask } => {
                let active = self.named(*mask, active)?;
                let values = self.source(*a).extended(if *wide { Type::B64 } else { Type::B32 });
                let equal = |value: u64| {
                    lanes(active).filter(|&lane| values[lane as usize] == value).fold(0, |m, l| m | 1 << l)
                };
                match all {
                    None => self.put(active, *d, Lanes::Narrow(math::map(&values, equal))),
                    Some(p) => {
                        let same = equal(values[active.trailing_zeros() as usize]) == active;
                        self.put(active, *d, Lanes::Narrow([if same { active } else { 0 }; LANES]));
                        if let Some(p) = *p {
                            self.put_predicate(active, p, if same { ALL } else { 0 });
                        }
                    }
                }
            }
            Op::Redux { op, ty, d, a, mask } => {
                let active = self.named(*mask, active)?;
                let values = self.narrow(*a);
                let all = lanes(active).map(|lane| values[lane as usize]);
                let value = all.reduce(|x, y| combine(*op, *ty, u64::from(x), u64::from(y)) as u32);
                self.put(active, *d, Lanes::Narrow([value.unwrap_or(0); LANES]));
            }
            Op::ActiveMask { d } => self.put(active, *d, Lanes::Narrow([active; LANES])),
            Op::Mma { k, a_ty, b_ty, narrow, satfinite, d, a, b, c } => {
                self.together(active)?;
                reach.counts.matrix_macs += u64::from(16 * 8 * k);
                let registers = |part: &[Reg]| -> [&Narrow; 4] {
                    std::array::from_fn(|at| self.narrow(part[at.min(part.len() - 1)]))
                };
                let left = matrix::Left::new(*a_ty, &registers(a)[..a.len()]);
                let right = matrix::Right::new(*b_ty, &registers(b)[..b.len()]);
                let adding = matrix::Adding { narrow: *narrow, satfinite: *satfinite, sums };
                let value = matrix::multiply::<{ matrix::MMA_BLOCK }>(
                    &left,
                    &right,
                    adding,
                    &registers(c)[..c.len()],
                );
                for (&d, value) in d.iter().zip(value) {
                    self.put(active, d, Lanes::Narrow(value));
                }
            }
            Op::LoadMatrix { trans, d, address } => {
                self.together(active)?;
                self.load_matrix(step.pc, *trans, d, *address, reach)?;
            }
            Op::Copy { bytes, d, a, size } => {
                *idle = 0;
                let to = Access::new(Space::Shared, self.addresses(*d), active, *bytes)?;
                let from = Access::new(Space::Global, self.addresses(*a), active, *bytes)?;
                reach.counts.async_copies += u64::from(active.count_ones());
                reach.count(&to, true);
                // Bytes may land at once, or as late as the wait for them.
                let early = random.below(2) == 0;
                self.copy(step.pc, [to, from], *size, early, reach)?;
            }
            Op::CopyCommit => lanes(active).for_each(|lane| self.groups[lane as usize] += 1),
            Op::CopyWait(keep) => self.finish_copies(active, *keep, reach)?,
            Op::FenceProxyAsync(space) => {
                for (of, shown) in [(Space::Shared, Shown::Shared), (Space::Global, Shown::Global)] {
                    if space.is_none_or(|space| space == of) {
                        self.knowledge.show(active, active == self.live, shown);
                    }
                }
            }
            Op::FenceMbarrierInit => self.knowledge.show(active, active == self.live, Shown::Mbarriers),
            Op::Mbarrier { op, space, address } => {
                if !matches!(op, MbarrierOp::Wait { .. }) {
                    *idle = 0;
                }
                return self.mbarrier(step, (op, *space, *address), active, reach, random);
            }
            Op::StoreMatrix { trans, address, a } => {
                self.together(active)?;
                *idle = 0;
                self.store_matrix(step.pc, *trans, a, *address, reach)?;
            }
            Op::Elect { d, p, mask } => {
                let active = self.named(*mask, active)?;
                // Which lane is elected is not said, but that it is the same for the same mask.
                let lane = active.trailing_zeros();
                if let Some(d) = *d {
                    self.put(active, d, Lanes::Narrow([lane; LANES]));
                }
                self.put_predicate(active, *p, 1 << lane);
            }
            Op::MapA { space, d, a, rank } => {
                let window = window(*space);
                let ctas = reach.cluster.len();
                let ranks = self.narrow(*rank);
                if let Some(lane) = lanes(active).find(|&lane| ranks[lane as usize] as usize >= ctas) {
                    return Err(at_lane(lane, cluster::no_rank(u64::from(ranks[lane as usize]), ctas)));
                }
                let a = self.source(*a).extended(if a.wide { Type::U64 } else { Type::U32 });
                let value = std::array::from_fn(|lane| {
                    window + cluster::address(ranks[lane], a[lane].wrapping_sub(window))
                });
                self.put(active, *d, Lanes::Wide(value));
            }
            Op::GetCtaRank { space, d, a } => {
                let window = window(*space);
                let a = self.source(*a).extended(if a.wide { Type::U64 } else { Type::U32 });
                let rank = |a: u64| cluster::place(reach.rank, a.wrapping_sub(window)).0 as u32;
                self.put(active, *d, Lanes::Narrow(math::map(&a, rank)));
            }
            Op::ClusterArrive { releases } => {
                self.together(active)?;
                *idle = 0;
                if self.cluster_phase.is_some() {
                    return Err(of_warp(Fault::Cluster { problem: "the warp arrives twice" }));
                }
                let sent = match releases {
                    true => self.knowledge.send(active, true),
                    false => self.knowledge.send_fenced(active),
                };
                self.cluster_phase = Some(reach.cluster_barrier.arrive(&sent));
            }
            Op::ClusterWait => {
                self.together(active)?;
                *idle = 0;
                let Some(phase) = self.cluster_phase else {
                    return Err(of_warp(Fault::Cluster { problem: "the warp waits and has not arrived" }));
                };
                let Some(released) = reach.cluster_barrier.released(phase) else {
                    return Ok(Some(Pause::Again(Wait::Cluster)));
                };
                self.knowledge.learn(active, true, released);
                self.cluster_phase = None;
            }
            Op::TileLoad { d, tile, mbarrier, multicast } => {
                *idle = 0;
                self.load_tile(step, (*d, tile, *mbarrier, *multicast), active, reach)?;
            }
            Op::BulkLoad { d, a, bytes, mbarrier, multicast } => {
                *idle = 0;
                self.load_bulk(step, (*d, *a, *bytes, *mbarrier, *multicast), active, reach)?;
            }
            Op::TileStore { tile, a, reduce } => {
                *idle = 0;
                self.store_tile(step, (tile, *a, *reduce), active, reach)?;
            }
            Op::BulkStore { d, a, bytes } => {
                *idle = 0;
                self.store_bulk(step, (*d, *a, *bytes), active, reach)?;
            }
            Op::BulkCommit => self.commit_bulk(active),
            Op::BulkWait { keep, read } => self.wait_bulk(active, *keep, *read),
            Op::Wgmma(_) | Op::SetMaxRegisters { .. } => {
                self.together(active)?;
                *idle = 0;
                return Ok(Some(Pause::Again(Wait::Warpgroup)));
            }
            Op::WgmmaFence => {
                self.together(active)?;
                self.fragments.fence();
            }
            Op::WgmmaCommit => {
                self.together(active)?;
                self.commit_wgmma();
            }
            Op::WgmmaWait(keep) => {
                self.together(active)?;
                self.wait_wgmma(active, *keep);
            }
            Op::Branch { .. } | Op::BranchIndexed { .. } | Op::Exit => unreachable!("these are run by `run`"),
        }
        Ok(None)
    }

    /// All lanes of the warp must be here.
    pub fn together(&self, active: u32) -> Checked<()> {
        if active == self.existing {
            return Ok(());
        }
        Err(of_warp(Fault::Divergent { expected: self.existing, found: active }))
    }

    /// The lanes that a mask names, and no others, must be here.
    pub fn named(&self, mask: Reg, active: u32) -> Checked<u32> {
        let masks = self.narrow(mask);
        for lane in lanes(active) {
            let expected = masks[lane as usize] & self.existing;
            if expected != active {
                return Err(at_lane(lane, Fault::Divergent { expected, found: active }));
            }
        }
        Ok(active)
    }

    /// An operand that must be the same in all lanes.
    fn uniform(&self, reg: Reg, active: u32) -> Checked<u32> {
        let values = self.narrow(reg);
        let first = values[active.trailing_zeros() as usize];
        match lanes(active).find(|&lane| values[lane as usize] != first) {
            None => Ok(first),
            Some(lane) => Err(at_lane(lane, Fault::Unsupported { what: "a barrier that lanes disagree on" })),
        }
    }

    pub fn addresses(&self, address: Address) -> Wide {
        let offset = address.offset as u64;
        match self.source(address.base) {
            Source::Narrow(base) => math::map(base, |base| u64::from(base).wrapping_add(offset)),
            Source::Wide(base) => math::map(base, |base| base.wrapping_add(offset)),
        }
    }

    fn copied(&self, reg: Reg) -> Lanes {
        match self.source(reg) {
            Source::Narrow(lanes) => Lanes::Narrow(*lanes),
            Source::Wide(lanes) => Lanes::Wide(*lanes),
        }
    }

    /// The lanes of `active` are defined only where the source was.
    fn hand_on(&mut self, active: u32, reg: Reg, defined: u32) {
        let bank = if reg.wide { &mut self.wide_defined } else { &mut self.narrow_defined };
        bank[usize::from(reg.index)] &= defined | !active;
    }

    /// Loaded bytes into registers.
    fn take(&mut self, run: Run, ty: Type, d: &[Reg], from: &[u8]) {
        let size = ty.bits() as usize / 8;
        let lanes = run.first as usize..(run.first + run.lanes) as usize;
        for (at, reg) in d.iter().enumerate() {
            let index = usize::from(reg.index);
            let mut parts = from.chunks_exact(size * d.len()).map(|lane| &lane[at * size..][..size]);
            match (reg.wide, size) {
                (false, 4) if run.stride != 0 => {
                    for (lane, part) in self.narrow[index][lanes.clone()].iter_mut().zip(parts) {
                        *lane = u32::from_le_bytes(part.try_into().expect("4 bytes"));
                    }
                }
                _ => {
                    let mut value = 0;
                    for lane in lanes.clone() {
                        // Lanes that read the same share the one part.
                        value = parts.next().map_or(value, |part| extended(ty, part));
                        match reg.wide {
                            true => self.wide[index][lane] = value,
                            false => self.narrow[index][lane] = value as u32,
                        }
                    }
                }
            }
        }
    }

    /// Registers as bytes to be stored, one behind the other.
    fn give(&self, run: Run, ty: Type, a: &[Reg], to: &mut [u8]) {
        let size = ty.bits() as usize / 8;
        let first = run.first as usize;
        for (at, &reg) in a.iter().enumerate() {
            let parts = to.chunks_exact_mut(size * a.len()).map(|lane| &mut lane[at * size..][..size]);
            match self.source(reg) {
                Source::Narrow(lanes) => parts.zip(&lanes[first..]).for_each(|(part, lane)| {
                    part.copy_from_slice(&lane.to_le_bytes()[..size]);
                }),
                Source::Wide(lanes) => parts.zip(&lanes[first..]).for_each(|(part, lane)| {
                    part.copy_from_slice(&lane.to_le_bytes()[..size]);
                }),
            }
        }
    }

    /// `atom`, `red`: lane by lane, each a read and a write that nothing comes between.
    fn atomic(&mut self, step: &Step, active: u32, reach: &mut Reach<'_>) -> Checked<()> {
        let Op::Atomic { op, ty, space, order, d, address, b, c, .. } = &step.op else {
            unreachable!("it is an atomic")
        };
        let size = ty.bits() / 8;
        let access = Access::new(*space, self.addresses(*address), active, size * b.len() as u32)?;
        reach.count(&access, true);
        let how = How { write: true, strong: true, pc: step.pc, ..How::default() };
        for lane in lanes(active) {
            for (at, &b) in b.iter().enumerate() {
                let address = access.addresses[lane as usize] + u64::from(size) * at as u64;
                let run = Run::one(lane, address);
                let spot = reach.spot(access.space, run, size)?;
                reach.watch(&spot, run, size, how, &self.knowledge)?;
                let old = extended(*ty, reach.read(&spot, run, size)?);
                let value = |reg: Reg| self.source(reg).extended(*ty)[lane as usize];
                let new = match *c {
                    Some(c) if old == value(b) => value(c),
                    Some(_) => old,
                    None => combine(*op, *ty, old, value(b)),
                };
                reach.write(&spot, run, &new.to_le_bytes()[..size as usize])?;
                reach.acquire(&spot, run, &mut self.knowledge, order.acquires());
                reach.release(&spot, run, &mut self.knowledge, (order.releases(), true));
                match *d {
                    Some(d) if d.wide => self.wide[usize::from(d.index)][lane as usize] = old,
                    Some(d) => self.narrow[usize::from(d.index)][lane as usize] = old as u32,
                    None => {}
                }
            }
        }
        Ok(())
    }

    /// Copies of the lanes of `active` arrive, all but those of each lane's newest `keep` groups; `None`: all, committed or
    /// not.
    pub fn finish_copies(&mut self, active: u32, keep: Option<u32>, reach: &mut Reach<'_>) -> Checked<()> {
        for copy in std::mem::take(&mut self.copies) {
            let open = self.groups[copy.lane as usize];
            let covered = keep.is_none_or(|keep| copy.group + keep < open);
            if !covered || active >> copy.lane & 1 == 0 {
                self.copies.push(copy);
                continue;
            }
            if !copy.landed {
                copy.land(reach)?;
            }
            reach.own().shadow.settle(&self.knowledge, copy.lane, copy.to, copy.bytes as usize);
        }
        Ok(())
    }

    /// Asynchronous copies begin: their targets are nobody's until they are waited for.
    fn copy(
        &mut self,
        pc: u16,
        [to, from]: [Access; 2],
        size: Option<Reg>,
        early: bool,
        reach: &mut Reach<'_>,
    ) -> Checked<()> {
        let bytes = to.bytes;
        let read: Narrow =
            std::array::from_fn(|lane| size.map_or(bytes, |size| self.narrow(size)[lane].min(bytes)));
        let whole = lanes(from.mask).filter(|&lane| read[lane as usize] == bytes).fold(0, |m, l| m | 1 << l);
        let mut sources = [(0, 0); LANES];
        let mut request = |run: Run, bytes: u32, reach: &mut Reach<'_>| -> Checked<()> {
            let spot = reach.spot(Space::Global, run, bytes)?;
            reach.watch(&spot, run, bytes, How { pc, ..How::default() }, &self.knowledge)?;
            if let Spot::Global(allocation, range) = spot {
                for at in 0..run.lanes {
                    sources[(run.first + at) as usize] = (allocation, range.start + (at * bytes) as usize);
                }
            }
            Ok(())
        };
        for run in (Access { mask: whole, ..from }).runs(false) {
            request(run, bytes, reach)?;
        }
        for lane in lanes(from.mask & !whole) {
            // Any number of bytes may be read, in pieces as large as an access may have; the first is asked for last.
            let read = read[lane as usize];
            let piece = 1 << read.trailing_zeros().min(4);
            for at in (0..read).step_by(piece as usize).rev() {
                let run = Run::one(lane, from.addresses[lane as usize] + u64::from(at));
                request(run, piece, reach)?;
            }
        }
        let how = How { write: true, in_flight: true, pc, ..How::default() };
        for lane in lanes(to.mask) {
            let at = lane as usize;
            let run = Run::one(lane, to.addresses[at]);
            let spot = reach.spot(Space::Shared, run, bytes)?;
            reach.watch(&spot, run, bytes, how, &self.knowledge)?;
            let copy = AsyncCopy {
                lane,
                group: self.groups[at],
                to: to.addresses[at] as usize,
                from: sources[at],
                bytes,
                read: read[at],
                landed: early,
            };
            if early {
                copy.land(reach)?;
            }
            self.copies.push(copy);
        }
        Ok(())
    }

    /// Row `r` of matrix `j` starts at the address that lane `8 j + r` has (PTX ISA, "ldmatrix").
    fn load_matrix(
        &mut self,
        pc: u16,
        trans: bool,
        d: &[Reg],
        address: Address,
        reach: &mut Reach<'_>,
    ) -> Checked<()> {
        let rows = ALL >> (LANES - 8 * d.len());
        let access = Access::new(Space::Shared, self.addresses(address), rows, 16)?;
        reach.count(&access, false);
        let mut rows = [[[0; 16]; 8]; 4];
        for run in access.runs(false) {
            let spot = reach.spot(Space::Shared, run, 16)?;
            reach.watch(&spot, run, 16, How { whole: true, pc, ..How::default() }, &self.knowledge)?;
            let from = reach.read(&spot, run, 16)?;
            let rows = &mut rows.as_flattened_mut()[run.first as usize..];
            rows.iter_mut().zip(from.as_chunks().0).for_each(|(row, from)| *row = *from);
        }
        for (rows, &d) in rows.iter().zip(d) {
            let half = |(row, column): (usize, usize)| {
                u32::from(u16::from_le_bytes([rows[row][2 * column], rows[row][2 * column + 1]]))
            };
            let value = if trans {
                std::array::from_fn(|lane| {
                    let [low, high] = matrix::place_ldmatrix(lane, trans);
                    half(high) << 16 | half(low)
                })
            } else {
                // A lane behind the other, as they lie.
                let pairs = rows.as_flattened().as_chunks().0;
                std::array::from_fn(|lane| u32::from_le_bytes(pairs[lane]))
            };
            self.put(ALL, d, Lanes::Narrow(value));
        }
        Ok(())
    }
}

impl Warp {
    /// As [`Warp::load_matrix`], in the other direction.
    fn store_matrix(
        &mut self,
        pc: u16,
        trans: bool,
        a: &[Reg],
        address: Address,
        reach: &mut Reach<'_>,
    ) -> Checked<()> {
        let rows = ALL >> (LANES - 8 * a.len());
        let access = Access::new(Space::Shared, self.addresses(address), rows, 16)?;
        reach.count(&access, true);
        let mut bytes = [0; 16 * LANES];
        for (matrix, &a) in a.iter().enumerate() {
            for (lane, value) in self.narrow(a).iter().enumerate() {
                for (i, (row, column)) in matrix::place_ldmatrix(lane, trans).into_iter().enumerate() {
                    let at = 16 * (8 * matrix + row) + 2 * column;
                    bytes[at..at + 2].copy_from_slice(&value.to_le_bytes()[2 * i..2 * i + 2]);
                }
            }
        }
        for run in access.runs(false) {
            let spot = reach.spot(Space::Shared, run, 16)?;
            let how = How { write: true, whole: true, pc, ..How::default() };
            reach.watch(&spot, run, 16, how, &self.knowledge)?;
            reach.write(&spot, run, &bytes[16 * run.first as usize..][..run.len(16)])?;
        }
        Ok(())
    }
}

impl AsyncCopy {
    /// Its bytes arrive, zeros for those that it does not read.
    fn land(&self, reach: &mut Reach<'_>) -> Checked<()> {
        let mut data = [0; 16];
        let run = Run::one(self.lane, self.to as u64);
        if self.read > 0 {
            let (allocation, start) = self.from;
            let spot = Spot::Global(allocation, start..start + self.read as usize);
            data[..self.read as usize].copy_from_slice(reach.read(&spot, run, self.read)?);
            reach.counts.moved(Space::Global, false, u64::from(self.read));
        }
        let spot = Spot::Shared(reach.rank, self.to..self.to + self.bytes as usize);
        reach.write(&spot, run, &data[..self.bytes as usize])
    }
}

/// Where shared memory begins among the addresses of `mapa` and `getctarank`.
fn window(space: Space) -> u64 {
    if space == Space::Generic { SHARED_WINDOW } else { 0 }
}

fn select(chosen: u32, a: Lanes, b: Lanes) -> Lanes {
    match (a, b) {
        (Lanes::Narrow(a), Lanes::Narrow(mut b)) => {
            blend(chosen, &mut b, &a);
            Lanes::Narrow(b)
        }
        (Lanes::Wide(a), Lanes::Wide(mut b)) => {
            blend(chosen, &mut b, &a);
            Lanes::Wide(b)
        }
        _ => unreachable!("the parser checks widths"),
    }
}

fn logic(op: Logic, a: u32, b: u32) -> u32 {
    match op {
        Logic::And => a & b,
        Logic::Or => a | b,
        Logic::Xor => a ^ b,
    }
}

/// A value in memory, extended to 64 bits.
fn extended(ty: Type, bytes: &[u8]) -> u64 {
    let mut all = [0; 8];
    all[..bytes.len()].copy_from_slice(bytes);
    math::extend(ty, u64::from_le_bytes(all))
}

/// What an atomic or a reduction makes of two values.
pub fn combine(op: AtomicOp, ty: Type, a: u64, b: u64) -> u64 {
    use crate::ptx::{BinaryOp, FloatMode};
    let binary = |op| {
        let lanes = if ty.wide() {
            math::binary(op, ty, FloatMode::default(), Source::Wide(&[a; LANES]), Source::Wide(&[b; LANES]))
        } else {
            let (a, b) = ([a as u32; LANES], [b as u32; LANES]);
            math::binary(op, ty, FloatMode::default(), Source::Narrow(&a), Source::Narrow(&b))
        };
        match lanes {
            Lanes::Narrow(lanes) => u64::from(lanes[0]),
            Lanes::Wide(lanes) => lanes[0],
        }
    };
    match op {
        AtomicOp::Add => binary(BinaryOp::Add),
        AtomicOp::Min => binary(BinaryOp::Min),
        AtomicOp::Max => binary(BinaryOp::Max),
        AtomicOp::And => a & b,
        AtomicOp::Or => a | b,
        AtomicOp::Xor => a ^ b,
        AtomicOp::Exch => b,
        AtomicOp::Cas => unreachable!("`cas` has its own operands"),
        // PTX ISA, "atom": these wrap at `b`.
        AtomicOp::Inc => {
            if a >= b {
                0
            } else {
                a + 1
            }
        }
        AtomicOp::Dec => {
            if a == 0 || a > b {
                b
            } else {
                a - 1
            }
        }
    }
}

/// The lane that a shuffle reads, and whether it lies in the segment (PTX ISA, "shfl.sync").
fn shuffle_source(mode: ShuffleMode, lane: u32, b: u32, c: u32) -> (u32, bool) {
    let (b, clamp, segment) = (b & 31, c & 31, c >> 8 & 31);
    let last = lane & segment | clamp & !segment;
    let (from, inside) = match mode {
        ShuffleMode::Up => (lane.wrapping_sub(b), lane as i32 - b as i32 >= last as i32),
        ShuffleMode::Down => (lane + b, lane + b <= last),
        ShuffleMode::Bfly => (lane ^ b, lane ^ b <= last),
        ShuffleMode::Idx => {
            let from = lane & segment | b & !segment;
            (from, from <= last)
        }
    };
    if inside { (from, true) } else { (lane, false) }
}
