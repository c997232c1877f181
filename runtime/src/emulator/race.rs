//! Races: two accesses to a byte, one of them a write, that nothing orders.
//!
//! Only what the ISA says orders accesses ("Memory Consistency Model"): the program order of a lane; `bar`, `bar.warp.sync`;
//! a release that an acquire reads, also by fences and relaxed atomics; `cp.async.wait_group` for the lane that copied.
//! Shuffles, votes and running side by side order nothing, nor does the schedule that happens to run: a race is found
//! whether or not its accesses meet.
//!
//! Asynchronous operations of sm_90 are agents of their own: bulk copies to shared memory are those of their mbarrier, at the
//! clock of its phase; bulk copies from it those of their lane, `wgmma` those of their warpgroup, at the clock of their
//! group. Who waits learns that clock. What they read and generic instructions wrote must moreover have passed a
//! `fence.proxy.async` of the lane that wrote it ("Async proxy"); so a message says of each lane also up to which clock
//! it did.
//!
//! Method: vector clocks and shadow memory, as FastTrack (Flanagan and Freund, 2009). A warp has one clock, raised at each
//! release; what it knows of another warp is the clock up to which that one's accesses came before. Where lanes of one
//! warp are concerned the lane counts too. The shadow keeps for each granule of 1 to 16 bytes, which is as small as the
//! accesses that it saw, the last write and reads: in shared memory the last of each warp, in global memory some, of
//! different CTAs where there are several.
//!
//! * Never: reports accesses that are ordered. It may miss a race where more reads are unordered than are kept.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

/// For a lane's number: all lanes of the warp.
pub const WHOLE: u8 = 32;
/// For a lane's number: `wgmma` of a warpgroup, whose first warp is the agent.
const WGMMA: u8 = 33;
/// For a lane's number: bulk copies that an mbarrier counts, which is the agent.
const MBARRIER: u8 = 34;
/// Added to a lane's number: the bulk copies of the lane that read shared memory.
const BULK_READ: u8 = 64;
/// Added to a lane's number: the bulk copies of the lane that write global memory.
const BULK_WRITE: u8 = 96;
/// Marks an agent that is no warp.
const ASYNCHRONOUS: u32 = 1 << 31;
/// Reads of a granule that the shadow of global memory keeps.
const GLOBAL_READS: usize = 4;
/// Bytes of a page of the shadow.
const PAGE_BYTES: usize = 1024;
/// The largest access of a lane, and the least that a lane's bytes are known by.
const LARGEST_GRANULE: usize = 16;

/// The access may meet others of its kind: an atomic, a relaxed or volatile one.
const STRONG: u8 = 0x10;
/// The access was a read that nobody may have written in this grid.
const NON_COHERENT: u8 = 0x20;
/// A copy that nobody has waited for: nothing comes after it.
const IN_FLIGHT: u8 = 0x40;

/// An access, as the shadow remembers it. The empty one has clock 0, before everything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cell {
    /// The warp, counted through the grid.
    pub agent: u32,
    /// The warp's clock at the time.
    clock: u32,
    /// The instruction's index.
    pub pc: u16,
    /// The lane, or [`WHOLE`].
    pub lane: u8,
    flags: u8,
}

impl Cell {
    /// Is it a copy that nobody has waited for?
    pub fn in_flight(&self) -> bool {
        self.flags & IN_FLIGHT != 0
    }

    /// Was it made by an asynchronous operation of sm_90?
    pub fn asynchronous(&self) -> bool {
        self.agent & ASYNCHRONOUS != 0
    }

    /// The warp, counted through the grid; `None` for what an mbarrier counts.
    pub fn warp(&self) -> Option<u32> {
        (self.lane != MBARRIER).then_some(self.agent & !ASYNCHRONOUS)
    }
}

/// Who an asynchronous operation is, and its clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    agent: u32,
    lane: u8,
    clock: u32,
}

impl Stamp {
    /// A copy that completes in phase `phase` of the mbarrier at `offset` in the CTA of rank `rank`.
    pub fn mbarrier(rank: usize, offset: usize, phase: u32) -> Stamp {
        let place = ((rank << 16) | (offset / 8)) as u32;
        Stamp { agent: ASYNCHRONOUS | place, lane: MBARRIER, clock: phase + 1 }
    }

    /// What a lane does now.
    pub fn lane(who: &Knowledge, lane: u32) -> Stamp {
        Stamp { agent: who.agent, lane: lane as u8, clock: who.clock }
    }

    /// Bulk copies of group `group` of a lane: what they read from shared memory, or what they write to global memory.
    pub fn bulk(who: &Knowledge, lane: u32, reads: bool, group: u32) -> Stamp {
        let kind = if reads { BULK_READ } else { BULK_WRITE };
        Stamp { agent: ASYNCHRONOUS | who.agent, lane: kind + lane as u8, clock: group + 1 }
    }

    /// `wgmma` of group `group` of the warpgroup that the warp is in: of all its warps, by the first.
    pub fn wgmma(who: &Knowledge, group: u32) -> Stamp {
        let leader = who.agent - who.own() as u32 % who.warps + 4 * who.warpgroup();
        Stamp { agent: ASYNCHRONOUS | leader, lane: WGMMA, clock: group + 1 }
    }

    /// The warp's own part of it, which it waits for.
    pub fn part_of_wgmma(who: &Knowledge, group: u32) -> Stamp {
        Stamp { agent: ASYNCHRONOUS | who.agent, ..Stamp::wgmma(who, group) }
    }

    /// What who waited for it knows.
    pub fn known(self) -> ((u32, u8), u32) {
        ((self.agent, self.lane), self.clock)
    }
}

/// What a fence of the proxies shows to asynchronous operations, of a lane's accesses. It is added to the lane's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shown {
    /// `fence.proxy.async`: those of shared memory.
    Shared = 128,
    /// `fence.proxy.async`: those of global memory.
    Global = 161,
    /// `fence.mbarrier_init`: mbarriers that it made.
    Mbarriers = 194,
}

/// What an access must be able to see of the generic writes before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Proxy {
    /// Those that came before.
    #[default]
    Generic,
    /// Of an mbarrier of the own CTA: those that came before, be it only by `fence.mbarrier_init`.
    Mbarrier,
    /// Of them, those with `fence.proxy.async` behind them.
    Async,
    /// Of an mbarrier, from elsewhere: those with it or with `fence.mbarrier_init`.
    FarMbarrier,
}

/// What was released, or what a lane knows beside its warp: the clocks of warps and lanes that came before.
pub type Message = BTreeMap<(u32, u8), u32>;

/// Takes over what another message says.
pub fn merge(into: &mut Message, from: &Message) {
    for (&who, &clock) in from {
        let known = into.entry(who).or_default();
        *known = clock.max(*known);
    }
}

/// What one lane knows beside its warp.
#[derive(Clone, Debug, Default)]
struct LaneKnowledge {
    /// What it acquired.
    acquired: Message,
    /// What it read by relaxed accesses: the next fence acquires it.
    read: Message,
    /// What its last fence released: the next relaxed write publishes it.
    fenced: Option<Message>,
}

/// What a warp knows of the accesses of others.
#[derive(Clone, Debug)]
pub struct Knowledge {
    /// The warp, counted through the grid.
    agent: u32,
    /// The first warp of its cluster.
    first: u32,
    /// Warps of its CTA.
    warps: u32,
    /// The clock of its accesses from now on.
    clock: u32,
    /// For each warp of the cluster, the clock up to which its accesses came before all lanes here. Its own: up to which its
    /// lanes' accesses came before each other's.
    seen: Vec<u32>,
    /// The same for warps and lanes of other clusters, and for asynchronous operations.
    far: Message,
    /// Which of its own lanes' accesses came before which lanes', where only some have synchronised.
    pairs: Option<Box<[[u32; 32]; 32]>>,
    /// By lane; empty while no lane knows more than the warp.
    lanes: Vec<LaneKnowledge>,
    /// Lanes that have not waited for the grids before.
    pub unwaited: u32,
}

impl Knowledge {
    /// Of warp `warp` in a cluster of `ctas` CTAs of `warps` warps, the first of which is `first` in the grid.
    pub fn new(first: u32, warp: u32, warps: u32, ctas: u32) -> Knowledge {
        Knowledge {
            agent: first + warp,
            first,
            warps,
            clock: 1,
            seen: vec![0; (warps * ctas) as usize],
            far: Message::new(),
            pairs: None,
            lanes: Vec::new(),
            unwaited: 0,
        }
    }

    fn own(&self) -> usize {
        (self.agent - self.first) as usize
    }

    /// Which warpgroup of its CTA it is in.
    fn warpgroup(&self) -> u32 {
        self.own() as u32 % self.warps / 4
    }

    fn lane(&mut self, lane: u32) -> &mut LaneKnowledge {
        if self.lanes.is_empty() {
            self.lanes = vec![LaneKnowledge::default(); 32];
        }
        &mut self.lanes[lane as usize]
    }

    /// Did the access come before what `lane` does now?
    #[inline(always)]
    fn after(&self, cell: &Cell, lane: u8) -> bool {
        let warp = cell.agent.wrapping_sub(self.first) as usize;
        let own = cell.agent == self.agent && cell.lane == lane && lane < WHOLE && !cell.in_flight();
        cell.clock == 0
            || self.seen.get(warp).is_some_and(|&seen| cell.clock <= seen)
            || own
            || self.after_by_lane(cell, lane)
    }

    #[inline(never)]
    fn after_by_lane(&self, cell: &Cell, lane: u8) -> bool {
        if cell.in_flight() {
            return false;
        }
        if let (true, Some(pairs)) = (cell.agent == self.agent && cell.lane.max(lane) < WHOLE, &self.pairs)
            && cell.clock <= pairs[usize::from(lane)][usize::from(cell.lane)]
        {
            return true;
        }
        let acquired = self.lanes.get(usize::from(lane)).map(|known| &known.acquired);
        let says = |agent: u32| {
            [Some(&self.far), acquired].into_iter().flatten().any(|message: &Message| {
                let of = |lane| message.get(&(agent, lane)).is_some_and(|&clock| cell.clock <= clock);
                of(WHOLE) || of(cell.lane)
            })
        };
        // Each warp of a warpgroup waits for its own part of a `wgmma`.
        let agents = if cell.lane == WGMMA { cell.agent..cell.agent + 4 } else { cell.agent..cell.agent + 1 };
        agents.into_iter().all(says)
    }

    /// What the lane has done and seen so far, for others.
    fn released(&self, lane: u32) -> Message {
        let mut message = self.far.clone();
        for (warp, &seen) in self.seen.iter().enumerate().filter(|(_, seen)| **seen > 0) {
            message.insert((self.first + warp as u32, WHOLE), seen);
        }
        if let Some(known) = self.lanes.get(lane as usize) {
            merge(&mut message, &known.acquired);
        }
        if let Some(pairs) = &self.pairs {
            let row = pairs[lane as usize].iter().enumerate().filter(|(_, clock)| **clock > 0);
            row.for_each(|(of, &clock)| _ = message.insert((self.agent, of as u8), clock));
        }
        message.insert((self.agent, lane as u8), self.clock);
        message
    }

    /// Does `lane` know of a fence that showed the access?
    fn is_shown(&self, cell: &Cell, lane: u8, shown: Shown) -> bool {
        let says = |message: &Message| {
            let of = |lane| {
                let fence = message.get(&(cell.agent, shown as u8 + lane));
                fence.is_some_and(|&clock| cell.clock <= clock)
            };
            of(WHOLE) || of(cell.lane)
        };
        !cell.asynchronous()
            && (says(&self.far)
                || self.lanes.get(usize::from(lane)).is_some_and(|known| says(&known.acquired)))
    }

    /// A fence of the proxies, by the lanes of `mask`; `all`: these are all that there are.
    pub fn show(&mut self, mask: u32, all: bool, shown: Shown) {
        let (agent, clock) = (self.agent, self.clock);
        if all {
            self.far.insert((agent, shown as u8 + WHOLE), clock);
        }
        for lane in super::access::lanes(mask) {
            let fence = ((agent, shown as u8 + lane as u8), clock);
            if !all {
                self.lane(lane).acquired.extend([fence]);
            }
            // This one is a release too, of nothing else.
            if shown == Shown::Mbarriers {
                self.lane(lane).fenced.get_or_insert_default().extend([fence]);
            }
        }
        self.clock += 1;
    }

    /// What fences of the lanes of `mask` released, for a relaxed arrival.
    pub fn send_fenced(&self, mask: u32) -> Message {
        let mut message = Message::new();
        let fenced = |lane: u32| self.lanes.get(lane as usize)?.fenced.as_ref();
        super::access::lanes(mask).filter_map(fenced).for_each(|fenced| merge(&mut message, fenced));
        message
    }

    /// What the lanes of `mask` have done and seen so far, for who waits for it; `all`: these are all that there are.
    pub fn send(&mut self, mask: u32, all: bool) -> Message {
        let mut message = Message::new();
        for lane in super::access::lanes(mask) {
            if !all || self.pairs.is_some() || message.is_empty() {
                merge(&mut message, &self.released(lane));
            } else if let Some(known) = self.lanes.get(lane as usize) {
                merge(&mut message, &known.acquired);
            }
        }
        if all {
            message.insert((self.agent, WHOLE), self.clock);
        }
        self.clock += 1;
        message
    }

    /// The lanes of `mask` have waited for what was sent; `all`: these are all that there are.
    pub fn learn(&mut self, mask: u32, all: bool, message: &Message) {
        if !all {
            return super::access::lanes(mask).for_each(|lane| self.receive(lane, message, true));
        }
        for (&(agent, lane), &clock) in message {
            let known = match self.seen.get_mut(agent.wrapping_sub(self.first) as usize) {
                Some(seen) if lane == WHOLE => seen,
                _ => self.far.entry((agent, lane)).or_default(),
            };
            *known = clock.max(*known);
        }
    }

    /// As [`Knowledge::learn`], of asynchronous operations up to one.
    pub fn learn_stamp(&mut self, mask: u32, all: bool, stamp: Stamp) {
        self.learn(mask, all, &[stamp.known()].into());
    }

    /// `fence`, by the lanes given.
    pub fn fence(&mut self, lanes: impl Iterator<Item = u32>) {
        for lane in lanes {
            let read = std::mem::take(&mut self.lane(lane).read);
            merge(&mut self.lane(lane).acquired, &read);
            self.lane(lane).fenced = Some(self.released(lane));
        }
        self.clock += 1;
    }

    /// What a strong write of the lane publishes.
    fn publish(&mut self, lane: u32, releases: bool) -> Option<Message> {
        if !releases {
            return self.lanes.get(lane as usize)?.fenced.clone();
        }
        let message = self.released(lane);
        self.clock += 1;
        Some(message)
    }

    /// A strong read of the lane has seen what was published.
    fn receive(&mut self, lane: u32, message: &Message, acquires: bool) {
        let known = self.lane(lane);
        merge(if acquires { &mut known.acquired } else { &mut known.read }, message);
    }

    /// `bar.warp.sync` by the lanes of `mask`; `all`: these are all that there are.
    pub fn warp_sync(&mut self, mask: u32, all: bool) {
        let lanes = || super::access::lanes(mask);
        if all {
            let own = self.own();
            self.seen[own] = self.clock;
            self.pairs = None;
            self.gather();
        } else {
            let mut pairs = self.pairs.take().unwrap_or_else(|| Box::new([[0; 32]; 32]));
            let mut row = [0; 32];
            for lane in lanes() {
                row.iter_mut().zip(pairs[lane as usize]).for_each(|(all, one)| *all = one.max(*all));
            }
            lanes().for_each(|lane| row[lane as usize] = self.clock);
            lanes().for_each(|lane| pairs[lane as usize] = row);
            self.pairs = Some(pairs);
            if !self.lanes.is_empty() {
                let mut all = Message::new();
                lanes().for_each(|lane| merge(&mut all, &self.lanes[lane as usize].acquired));
                lanes().for_each(|lane| self.lanes[lane as usize].acquired = all.clone());
            }
        }
        self.clock += 1;
    }

    /// What lanes acquired, the warp knows now.
    fn gather(&mut self) {
        for lane in &mut self.lanes {
            merge(&mut self.far, &std::mem::take(&mut lane.acquired));
        }
    }

    /// A barrier of a CTA opens. `parties`: who is at it, and whether it waited.
    pub fn barrier(parties: &mut [(&mut Knowledge, bool)]) {
        let mut seen: Vec<u32> = Vec::new();
        let mut far = Message::new();
        for (party, _) in parties.iter_mut() {
            party.gather();
            seen.resize(party.seen.len(), 0);
            seen.iter_mut().zip(&party.seen).for_each(|(all, &one)| *all = one.max(*all));
            seen[party.own()] = party.clock;
            merge(&mut far, &party.far);
        }
        for (party, waited) in parties {
            if *waited {
                party.seen.clone_from(&seen);
                party.far.clone_from(&far);
                party.pairs = None;
            }
            party.clock += 1;
        }
    }
}

/// How an access counts.
#[derive(Clone, Copy, Debug, Default)]
pub struct How {
    /// Does it write?
    pub write: bool,
    /// May it meet others like it?
    pub strong: bool,
    /// `ld.global.nc`.
    pub non_coherent: bool,
    /// By all lanes of the warp, as `ldmatrix` does.
    pub whole: bool,
    /// An asynchronous copy's write.
    pub in_flight: bool,
    /// An asynchronous operation of sm_90, and which.
    pub stamp: Option<Stamp>,
    /// What it must see.
    pub proxy: Proxy,
    /// The instruction's index.
    pub pc: u16,
}

/// Why two accesses may not meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Nothing orders them.
    Race,
    /// One of them is `ld.global.nc`, which no order helps.
    NonCoherent,
    /// The later one is asynchronous, and no proxy fence lies between.
    Unfenced,
}

/// Two accesses that nothing orders.
#[derive(Clone, Copy, Debug)]
pub struct Conflict {
    /// The byte, counted as the run's offset is.
    pub at: usize,
    /// The lane of the later one.
    pub lane: u32,
    /// The one that was there.
    pub other: Cell,
    /// Did that one write?
    pub other_wrote: bool,
    /// Why that is wrong.
    pub reason: Reason,
}

/// A cell that an access may not meet; whether it wrote; why.
type Found = (Cell, bool, Reason);

/// Cells of consecutive bytes, for each granule of them: as few as the accesses so far allow.
#[derive(Clone, Debug)]
struct Page {
    /// Bytes of a granule, as a power of two. No access to the page is smaller.
    granule: u32,
    /// Cells of a granule: the last write, and the reads by slot.
    stride: usize,
    cells: Vec<Cell>,
}

impl Page {
    fn new(slots: usize) -> Page {
        let stride = 1 + slots;
        let cells = vec![Cell::default(); PAGE_BYTES / LARGEST_GRANULE * stride];
        Page { granule: LARGEST_GRANULE.ilog2(), stride, cells }
    }

    /// Makes granules as small as an access of so many bytes.
    fn refine(&mut self, bytes: usize) {
        let times = (1 << self.granule) / bytes;
        let cells = self.cells.chunks_exact(self.stride);
        self.cells = cells.flat_map(|cells| std::iter::repeat_n(cells, times)).flatten().copied().collect();
        self.granule = bytes.ilog2();
    }

    /// Makes room for slots up to one.
    fn grow(&mut self, slot: usize) {
        let stride = slot + 2;
        let mut grown = vec![Cell::default(); self.cells.len() / self.stride * stride];
        for (to, from) in grown.chunks_exact_mut(stride).zip(self.cells.chunks_exact(self.stride)) {
            to[..self.stride].copy_from_slice(from);
        }
        (self.cells, self.stride) = (grown, stride);
    }

    /// The cells of the granule that a byte of the page is in.
    #[inline(always)]
    fn at(&mut self, byte: usize) -> &mut [Cell] {
        let first = (byte >> self.granule) * self.stride;
        &mut self.cells[first..first + self.stride]
    }

    /// All writes, then the reads of each slot.
    fn by_slot(&self) -> impl Iterator<Item = (usize, &Cell)> {
        let of = |slot| self.cells[slot..].iter().step_by(self.stride).map(move |cell| (slot, cell));
        (0..self.stride).flat_map(of)
    }
}

/// Who accessed a memory last.
#[derive(Debug)]
pub struct Shadow {
    pages: Vec<Option<Page>>,
    /// Reads that are kept of a granule.
    slots: usize,
    /// Has each warp of the CTA a read of its own?
    by_warp: bool,
    /// What was released, by the first byte.
    released: HashMap<usize, Message>,
    /// The write that the last asynchronous operation met: by whom, how, and which. What they meet are mostly writes of one
    /// operation, and what once came before always will have.
    met: ((u32, u8, Proxy), Cell),
}

impl Shadow {
    /// Of global memory.
    pub fn global() -> Shadow {
        Shadow::new(GLOBAL_READS, false)
    }

    /// Of the shared memory of a CTA in a cluster with so many warps. Behind a read of each warp come those of asynchronous
    /// operations, once there are any.
    pub fn shared(warps: u32) -> Shadow {
        Shadow::new(warps as usize, true)
    }

    fn new(slots: usize, by_warp: bool) -> Shadow {
        let met = ((0, 0, Proxy::Generic), Cell::default());
        Shadow { pages: Vec::new(), slots, by_warp, released: HashMap::new(), met }
    }

    fn page(pages: &mut Vec<Option<Page>>, slots: usize, at: usize) -> &mut Page {
        if pages.len() <= at {
            pages.resize(at + 1, None);
        }
        pages[at].get_or_insert_with(|| Page::new(slots))
    }

    /// Lanes from `first` on access `len` bytes from `offset` on, `bytes` each.
    ///
    /// # Errors
    ///
    /// The first [`Conflict`].
    pub fn access(
        &mut self,
        who: &Knowledge,
        how: How,
        (first, bytes): (u32, usize),
        (offset, len): (usize, usize),
    ) -> Result<(), Conflict> {
        let flags = if how.strong { STRONG } else { 0 } | if how.non_coherent { NON_COHERENT } else { 0 };
        let flags = flags | if how.in_flight { IN_FLIGHT } else { 0 };
        let clock = if how.in_flight { u32::MAX } else { who.clock };
        let cell = |lane: u32| {
            if let Some(Stamp { agent, lane, clock }) = how.stamp {
                return Cell { agent, clock, pc: how.pc, lane, flags };
            }
            let lane = if how.whole { WHOLE } else { lane as u8 };
            Cell { agent: who.agent, clock, pc: how.pc, lane, flags }
        };
        let judge = Judge { who, how, slots: self.slots, by_warp: self.by_warp };
        let by = if how.whole { WHOLE } else { first as u8 };
        let mut met = if self.met.0 == (who.agent, by, how.proxy) { self.met.1 } else { Cell::default() };
        let lane_shift = bytes.trailing_zeros();
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let page = Shadow::page(&mut self.pages, self.slots, at / PAGE_BYTES);
            if bytes < 1 << page.granule {
                page.refine(bytes);
            }
            if self.by_warp && !how.write {
                let slot = judge.own_slot(cell(first).lane);
                if page.stride < slot + 2 {
                    page.grow(slot);
                }
            }
            let page_end = end.min((at / PAGE_BYTES + 1) * PAGE_BYTES);
            while at < page_end {
                // An asynchronous operation is one lane's, or the warp's.
                let many = if how.stamp.is_some() { 0 } else { (at - offset) >> lane_shift };
                let lane = first + many as u32;
                let by = if how.whole { WHOLE } else { lane as u8 };
                judge.judge(page.at(at % PAGE_BYTES), cell(lane), by, &mut met).map_err(
                    |(other, other_wrote, reason)| Conflict { at, lane, other, other_wrote, reason },
                )?;
                at += 1 << page.granule;
            }
            at = page_end;
        }
        // What is strong may have met what nothing orders.
        if how.stamp.is_some() && !how.strong {
            self.met = ((who.agent, by, how.proxy), met);
        }
        Ok(())
    }

    /// What was accessed: runs of bytes, and whether they were written.
    pub fn touched(&self) -> impl Iterator<Item = (Range<usize>, bool)> {
        let pages =
            self.pages.iter().enumerate().filter_map(|(at, page)| Some((at * PAGE_BYTES, page.as_ref()?)));
        pages.flat_map(|(begin, page)| {
            let touched = page.cells.iter().enumerate().filter(|(_, cell)| cell.clock != 0);
            touched.map(move |(n, _)| {
                let granule = n / page.stride;
                let bytes = begin + (granule << page.granule)..begin + ((granule + 1) << page.granule);
                // The first cell of a granule is the last write.
                (bytes, n % page.stride == 0)
            })
        })
    }

    /// An access, and whether it wrote, of another CTA of the cluster or of a copy that an mbarrier counts, of which none of
    /// the CTA's warps knows that it came before now.
    pub fn unfinished<'k>(&self, warps: impl Iterator<Item = &'k Knowledge> + Clone) -> Option<(Cell, bool)> {
        let far = |cell: &Cell| {
            let own = |who: &Knowledge| {
                let begin = who.agent - who.own() as u32 % who.warps;
                cell.agent.wrapping_sub(begin) < who.warps
            };
            cell.clock != 0
                && if cell.asynchronous() { cell.lane == MBARRIER } else { !warps.clone().any(own) }
        };
        let known = |cell: &Cell| warps.clone().any(|who| (0..=WHOLE).any(|lane| who.after(cell, lane)));
        let mut met = Cell::default();
        let mut is_unfinished = |cell: &Cell| {
            let new = std::mem::replace(&mut met, *cell) != *cell;
            new && far(cell) && !known(cell)
        };
        let mut cells = self.pages.iter().flatten().flat_map(Page::by_slot);
        cells.find(|(_, cell)| is_unfinished(cell)).map(|(slot, cell)| (*cell, slot == 0))
    }

    /// A lane has waited for its copy: the bytes are its own writes from now on.
    pub fn settle(&mut self, who: &Knowledge, lane: u32, offset: usize, len: usize) {
        // A copy is aligned to its size, so it lies in one page.
        let page = Shadow::page(&mut self.pages, self.slots, offset / PAGE_BYTES);
        for byte in (offset % PAGE_BYTES..offset % PAGE_BYTES + len).step_by(1 << page.granule) {
            let cell = &mut page.at(byte)[0];
            if cell.in_flight() && cell.agent == who.agent && u32::from(cell.lane) == lane {
                cell.flags &= !IN_FLIGHT;
                cell.clock = who.clock;
            }
        }
    }

    /// A lane's strong read of the bytes at `offset` takes over what was released there.
    pub fn acquire(&self, who: &mut Knowledge, lane: u32, offset: usize, acquires: bool) {
        if let Some(message) = self.released.get(&offset) {
            who.receive(lane, message, acquires);
        }
    }

    /// A lane's strong write to the bytes at `offset` publishes what it knows. What an atomic replaces goes on with it.
    pub fn release(&mut self, who: &mut Knowledge, lane: u32, offset: usize, releases: bool, atomic: bool) {
        let before = self.released.remove(&offset).filter(|_| atomic);
        let message = match (before, who.publish(lane, releases)) {
            (Some(mut before), Some(new)) => {
                merge(&mut before, &new);
                Some(before)
            }
            (before, new) => before.or(new),
        };
        if let Some(message) = message {
            self.released.insert(offset, message);
        }
    }
}

/// One access, on its way through the words that it touches.
struct Judge<'a> {
    who: &'a Knowledge,
    how: How,
    slots: usize,
    by_warp: bool,
}

impl Judge<'_> {
    /// Compares an access `by` a lane with those before it, and remembers it.
    #[inline(always)]
    fn judge(&self, cells: &mut [Cell], cell: Cell, by: u8, met: &mut Cell) -> Result<(), Found> {
        let who = self.who;
        let (wrote, reads) = cells.split_first_mut().expect("there is a cell for the write");
        let both_strong = |other: &Cell| other.flags & cell.flags & STRONG != 0;
        if self.how.stamp.is_none() || *wrote != *met {
            if !who.after(wrote, by) && !both_strong(wrote) && !self.finds_made(wrote, by) {
                return Err((*wrote, true, Reason::Race));
            }
            if self.how.proxy != Proxy::Generic && !self.sees(wrote, by) {
                return Err((*wrote, true, Reason::Unfenced));
            }
            *met = *wrote;
        }
        if self.how.non_coherent && wrote.clock != 0 {
            return Err((*wrote, true, Reason::NonCoherent));
        }
        if self.how.write {
            for read in reads.iter() {
                if read.clock != 0 && read.flags & NON_COHERENT != 0 {
                    return Err((*read, false, Reason::NonCoherent));
                }
                if !who.after(read, by) && !both_strong(read) {
                    return Err((*read, false, Reason::Race));
                }
            }
            *wrote = cell;
            return Ok(());
        }
        let slot = if self.by_warp { Some(self.own_slot(cell.lane)) } else { self.slot(reads, by) };
        if let Some(slot) = slot {
            let read = &mut reads[slot];
            // What several lanes of the warp have read, unordered among themselves, is read by all.
            let several = cell.lane <= WHOLE
                && read.agent == cell.agent
                && read.lane != cell.lane
                && !who.after(read, cell.lane);
            let flags = if several { cell.flags & (read.flags | !STRONG) } else { cell.flags };
            *read = Cell { lane: if several { WHOLE } else { cell.lane }, flags, ..cell };
        }
        Ok(())
    }

    /// Is it of an mbarrier that a fence showed when it was made?
    #[inline(never)]
    fn finds_made(&self, wrote: &Cell, by: u8) -> bool {
        let mbarrier = matches!(self.how.proxy, Proxy::Mbarrier | Proxy::FarMbarrier);
        mbarrier && self.who.is_shown(wrote, by, Shown::Mbarriers)
    }

    /// Can the write, which came before, be seen through the proxy?
    #[inline(never)]
    fn sees(&self, wrote: &Cell, by: u8) -> bool {
        let memory = if self.by_warp { Shown::Shared } else { Shown::Global };
        let fenced = || self.who.is_shown(wrote, by, memory);
        wrote.clock == 0
            || wrote.asynchronous()
            || match self.how.proxy {
                Proxy::Generic | Proxy::Mbarrier => true,
                Proxy::Async => fenced(),
                Proxy::FarMbarrier => fenced() || self.finds_made(wrote, by),
            }
    }

    /// Where a read of shared memory is kept: that of each warp, the last bulk copy's, that of each warpgroup's `wgmma`.
    #[inline(always)]
    fn own_slot(&self, lane: u8) -> usize {
        match lane {
            0..=WHOLE => self.who.own(),
            WGMMA => self.slots + 1 + self.who.warpgroup() as usize,
            _ => self.slots,
        }
    }

    /// Which of the reads of global memory gives way, if one does: the warp's own; one that came before; where all are of
    /// other CTAs, the last.
    fn slot(&self, reads: &[Cell], lane: u8) -> Option<usize> {
        let cta = |cell: &Cell| cell.agent.wrapping_sub(self.who.first) < self.who.seen.len() as u32;
        let mut reads = reads.iter();
        let own = reads.clone().position(|read| read.agent == self.who.agent && read.clock != 0);
        let old = || reads.clone().position(|read| self.who.after(read, lane));
        own.or_else(old).or_else(|| (!reads.any(cta)).then_some(self.slots - 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const READ: How = How {
        write: false,
        strong: false,
        non_coherent: false,
        whole: false,
        in_flight: false,
        stamp: None,
        proxy: Proxy::Generic,
        pc: 1,
    };
    const WRITE: How = How { write: true, pc: 2, ..READ };

    fn touch(shadow: &mut Shadow, who: &Knowledge, how: How, lane: u32, offset: usize) -> bool {
        shadow.access(who, how, (lane, 4), (offset, 4)).is_ok()
    }

    /// Two warps of one CTA.
    fn two() -> (Knowledge, Knowledge, Shadow) {
        (Knowledge::new(8, 0, 2, 1), Knowledge::new(8, 1, 2, 1), Shadow::shared(2))
    }

    #[test]
    fn only_a_barrier_orders_warps() {
        let (mut a, mut b, mut shadow) = two();
        assert!(touch(&mut shadow, &a, WRITE, 3, 64));
        let found = shadow.access(&b, READ, (5, 4), (64, 4)).unwrap_err();
        assert_eq!((found.lane, found.other.lane, found.other.pc, found.other_wrote), (5, 3, 2, true));
        Knowledge::barrier(&mut [(&mut a, true), (&mut b, true)]);
        assert!(touch(&mut shadow, &b, READ, 5, 64));
        // The write after the read needs one more.
        assert!(!touch(&mut shadow, &a, WRITE, 3, 64));
    }

    #[test]
    fn who_arrives_without_waiting_learns_nothing() {
        let (mut a, mut b, mut shadow) = two();
        assert!(touch(&mut shadow, &a, WRITE, 0, 0) && touch(&mut shadow, &b, WRITE, 0, 4));
        Knowledge::barrier(&mut [(&mut a, false), (&mut b, true)]);
        assert!(touch(&mut shadow, &b, READ, 0, 0));
        assert!(!touch(&mut shadow, &a, READ, 0, 4));
    }

    #[test]
    fn lanes_of_a_warp_are_apart_until_they_synchronise() {
        let (mut a, _, mut shadow) = two();
        assert!(touch(&mut shadow, &a, WRITE, 0, 0) && touch(&mut shadow, &a, READ, 0, 0));
        assert!(!touch(&mut shadow, &a, READ, 1, 0));
        a.warp_sync(0b0011, false);
        assert!(touch(&mut shadow, &a, READ, 1, 0) && !touch(&mut shadow, &a, READ, 2, 0));
        // What lane 1 knows of lane 0, lane 2 learns from lane 1.
        a.warp_sync(0b0110, false);
        assert!(touch(&mut shadow, &a, READ, 2, 0) && !touch(&mut shadow, &a, READ, 3, 0));
        a.warp_sync(u32::MAX, true);
        assert!(touch(&mut shadow, &a, READ, 3, 0));
    }

    #[test]
    fn a_release_that_is_acquired_orders_ctas() {
        let (mut a, mut b) = (Knowledge::new(0, 0, 1, 1), Knowledge::new(1, 0, 1, 1));
        let mut shadow = Shadow::global();
        let atomic = How { strong: true, ..WRITE };
        for (releases, acquires) in [(true, true), (false, true), (true, false), (false, false)] {
            let (offset, flag) = (64 * usize::from(releases) + 128 * usize::from(acquires), 1024);
            assert!(touch(&mut shadow, &a, WRITE, 0, offset));
            assert!(touch(&mut shadow, &a, atomic, 0, flag));
            shadow.release(&mut a, 0, flag, releases, false);
            assert!(touch(&mut shadow, &b, atomic, 4, flag));
            shadow.acquire(&mut b, 4, flag, acquires);
            assert_eq!(touch(&mut shadow, &b, READ, 4, offset), releases && acquires);
            // Only the lane that acquired it knows.
            assert!(!touch(&mut shadow, &b, READ, 5, offset));
        }
        // Fences on both sides do for relaxed accesses.
        assert!(touch(&mut shadow, &a, WRITE, 0, 512));
        a.fence([0].into_iter());
        shadow.release(&mut a, 0, 1024, false, true);
        shadow.acquire(&mut b, 4, 1024, false);
        assert!(!touch(&mut shadow, &b, READ, 4, 512));
        b.fence([4].into_iter());
        assert!(touch(&mut shadow, &b, READ, 4, 512));
    }

    #[test]
    fn a_copy_in_flight_is_nobodys() {
        let (a, _, mut shadow) = two();
        assert!(touch(&mut shadow, &a, How { in_flight: true, ..WRITE }, 0, 0));
        assert!(!touch(&mut shadow, &a, READ, 0, 0));
        shadow.settle(&a, 0, 0, 4);
        assert!(touch(&mut shadow, &a, READ, 0, 0) && !touch(&mut shadow, &a, READ, 1, 0));
    }

    #[test]
    fn a_reduction_that_met_another_vouches_for_no_plain_copy() {
        let (a, b, mut shadow) = two();
        let atomic = How { strong: true, ..WRITE };
        assert!(touch(&mut shadow, &a, atomic, 0, 0) && touch(&mut shadow, &a, atomic, 0, 4));
        let reduction = How { stamp: Some(Stamp::bulk(&b, 0, false, 0)), ..atomic };
        assert!(touch(&mut shadow, &b, reduction, 0, 0));
        assert!(!touch(&mut shadow, &b, How { strong: false, ..reduction }, 0, 4));
    }

    #[test]
    fn bytes_of_a_word_are_apart() {
        let (a, b, mut shadow) = two();
        let half = |shadow: &mut Shadow, who, how, lane, offset| {
            shadow.access(who, how, (lane, 2), (offset, 2)).is_ok()
        };
        assert!(half(&mut shadow, &a, WRITE, 0, 0) && half(&mut shadow, &b, WRITE, 1, 2));
        assert!(half(&mut shadow, &a, READ, 0, 0) && !half(&mut shadow, &a, READ, 0, 2));
        assert!(!touch(&mut shadow, &a, READ, 0, 0));
        // Two atomics may meet, an atomic and a plain access may not.
        let atomic = How { strong: true, ..WRITE };
        assert!(touch(&mut shadow, &a, atomic, 0, 8) && touch(&mut shadow, &b, atomic, 0, 8));
        assert!(!touch(&mut shadow, &b, READ, 1, 8));
    }
}
