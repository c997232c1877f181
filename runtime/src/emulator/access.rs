//! Loads and stores of a warp: addresses, bounds, alignment, what was written before it is read, and by whom.

use super::arithmetic::{LANES, Wide};
use super::cluster::{self, ClusterBarrier, Landing, SharedMemory};
use super::counts::KernelCounts;
use super::memory::{Bytes, Memory};
use super::program::Program;
use super::race::{Cell, Conflict, How, Knowledge, Reason, Shadow, WHOLE};
use super::{Fault, Party};
use crate::ptx::Space;
use std::ops::Range;

/// Where shared memory lies among generic addresses.
pub const SHARED_WINDOW: u64 = 1 << 24;
/// Where the parameters lie among generic addresses.
pub const PARAM_WINDOW: u64 = 1 << 28;
/// Bytes of a window.
const WINDOW_BYTES: u64 = 1 << 24;
/// Banks of shared memory, 4 bytes wide.
const BANKS: u64 = 32;
/// Bytes that global memory moves at least.
const SECTOR_BYTES: u64 = 32;

/// Something wrong, and the lane if it is one's.
#[derive(Debug)]
pub struct Found {
    pub lane: Option<u32>,
    pub fault: Fault,
}

/// What may be wrong; boxed, as it seldom is.
pub type Checked<T> = Result<T, Box<Found>>;

/// A fault of one lane.
pub fn at_lane(lane: u32, fault: Fault) -> Box<Found> {
    Box::new(Found { lane: Some(lane), fault })
}

/// A fault of the whole warp.
pub fn of_warp(fault: Fault) -> Box<Found> {
    Box::new(Found { lane: None, fault })
}

/// All that the instructions of a CTA can reach.
pub struct Reach<'a> {
    pub memory: &'a mut Memory,
    /// Who accessed global memory in this grid, by allocation.
    pub shadows: &'a mut [Shadow],
    /// Shared memory of the CTAs of the cluster, by rank.
    pub cluster: &'a mut [SharedMemory],
    /// Which of them is the own.
    pub rank: usize,
    pub cluster_barrier: &'a mut ClusterBarrier,
    /// Copies to shared memory that mbarriers do not know to have ended.
    pub landings: &'a mut Vec<Landing>,
    pub params: &'a [u8],
    pub counts: &'a mut KernelCounts,
    /// To name others in a report: the code, the grid, warps of a CTA.
    pub program: &'a Program,
    pub ctas: [u32; 3],
    pub warps: u32,
    /// The CTA's number in the grid.
    pub number: u32,
}

/// A byte of the shared memory of a cluster: the CTA's rank, and where it is there.
pub type Location = (usize, usize);

/// Bytes that an access found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Spot {
    /// In the CTA of that rank.
    Shared(usize, Range<usize>),
    /// In the allocation of that number.
    Global(usize, Range<usize>),
    Params(Range<usize>),
}

/// What lanes access together: `bytes` bytes each, at addresses of one space.
#[derive(Clone, Copy)]
pub struct Access {
    pub space: Space,
    pub addresses: Wide,
    pub mask: u32,
    pub bytes: u32,
}

/// Lanes `first..first + lanes`: the first's bytes are at `address`, each other's `stride` behind those of the one before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    pub first: u32,
    pub lanes: u32,
    pub address: u64,
    /// As many as a lane has; 0 where all read the same.
    pub stride: u32,
}

impl Run {
    /// One lane.
    pub fn one(lane: u32, address: u64) -> Run {
        Run { first: lane, lanes: 1, address, stride: 0 }
    }

    /// A bit for each of its lanes.
    fn mask(&self) -> u32 {
        (u32::MAX >> (LANES as u32 - self.lanes)) << self.first
    }

    /// Bytes from the first to the last, `bytes` a lane.
    pub fn len(&self, bytes: u32) -> usize {
        (self.stride * (self.lanes - 1) + bytes) as usize
    }
}

impl Access {
    /// An access whose space is known, aligned to its size.
    pub fn new(space: Space, addresses: Wide, mask: u32, bytes: u32) -> Checked<Access> {
        let mut access = Access { space, addresses, mask, bytes };
        if space == Space::Generic {
            access.find_space()?;
        }
        let low = u64::from(bytes - 1);
        let wrong = |lane: u32| access.addresses[lane as usize] & low != 0;
        // All lanes at once first, those that do not run among them.
        if access.addresses.iter().fold(0, |all, address| all | address) & low != 0
            && let Some(lane) = lanes(mask).find(|&lane| wrong(lane))
        {
            let address = access.addresses[lane as usize];
            return Err(at_lane(lane, Fault::Misaligned { space: access.space, address, align: bytes }));
        }
        Ok(access)
    }

    /// The space that generic addresses point to. All lanes must agree, as they do where code is generated.
    fn find_space(&mut self) -> Checked<()> {
        let space = |address: u64| match address {
            SHARED_WINDOW.. if address < SHARED_WINDOW + cluster::STRIDE => (Space::Shared, SHARED_WINDOW),
            SHARED_WINDOW.. if address < SHARED_WINDOW + WINDOW_BYTES => {
                (Space::SharedCluster, SHARED_WINDOW)
            }
            PARAM_WINDOW.. if address < PARAM_WINDOW + WINDOW_BYTES => (Space::Param, PARAM_WINDOW),
            _ => (Space::Global, 0),
        };
        let mut known = None;
        for lane in lanes(self.mask) {
            let (found, window) = space(self.addresses[lane as usize]);
            if *known.get_or_insert(found) != found {
                let what = "an instruction whose lanes access different spaces";
                return Err(at_lane(lane, Fault::Unsupported { what }));
            }
            self.addresses[lane as usize] -= window;
        }
        self.space = known.unwrap_or(Space::Global);
        Ok(())
    }

    /// The runs, by lane. Lanes that access the same bytes are one run if `reads`.
    pub fn runs(&self, reads: bool) -> impl Iterator<Item = Run> {
        let Access { addresses, bytes, mut mask, .. } = *self;
        std::iter::from_fn(move || {
            let first = (mask != 0).then(|| mask.trailing_zeros())?;
            let address = addresses[first as usize];
            let follows = |lane: u32, stride: u32| {
                let expected = address.wrapping_add(u64::from((lane - first) * stride));
                lane < LANES as u32 && mask >> lane & 1 == 1 && addresses[lane as usize] == expected
            };
            let stride = if reads && follows(first + 1, 0) { 0 } else { bytes };
            let end = (first + 1..).find(|&lane| !follows(lane, stride)).unwrap_or(LANES as u32);
            mask &= u32::MAX.checked_shl(end).unwrap_or(0);
            Some(Run { first, lanes: end - first, address, stride })
        })
    }
}

/// The lanes of a mask.
pub fn lanes(mut mask: u32) -> impl Iterator<Item = u32> {
    std::iter::from_fn(move || {
        let lane = (mask != 0).then(|| mask.trailing_zeros())?;
        mask &= mask - 1;
        Some(lane)
    })
}

impl Reach<'_> {
    /// Where so many bytes are; `None`: nowhere.
    #[inline(always)]
    fn place(&self, space: Space, address: u64, bytes: usize) -> Option<Spot> {
        let of = |len: usize| {
            let end = address.checked_add(bytes as u64).filter(|&end| end <= len as u64)?;
            Some(address as usize..end as usize)
        };
        match space {
            Space::Shared => of(self.own_bytes().len()).map(|range| Spot::Shared(self.rank, range)),
            Space::SharedCluster => self.find_in_cluster(address, bytes).ok(),
            Space::Global => {
                self.memory.find(address, bytes).map(|(index, range)| Spot::Global(index, range))
            }
            Space::Param | Space::Const | Space::Generic => of(self.params.len()).map(Spot::Params),
        }
    }

    /// What is wrong where so many bytes are nowhere.
    fn outside(&self, space: Space, address: u64, bytes: u32) -> Fault {
        let near = match space {
            Space::Shared => format!("the CTA has {} bytes", self.own_bytes().len()),
            Space::SharedCluster => match self.find_in_cluster(address, bytes as usize) {
                Err(fault) => return fault,
                Ok(_) => unreachable!("it is nowhere"),
            },
            Space::Global => self.memory.near(address),
            Space::Param | Space::Const | Space::Generic => format!("there are {} bytes", self.params.len()),
        };
        Fault::OutOfBounds { space, address, bytes, near }
    }

    fn own_bytes(&self) -> &Bytes {
        &self.cluster[self.rank].bytes
    }

    /// The shared memory of the own CTA.
    pub fn own(&mut self) -> &mut SharedMemory {
        &mut self.cluster[self.rank]
    }

    fn find_in_cluster(&self, address: u64, bytes: usize) -> Result<Spot, Fault> {
        let (rank, offset) = cluster::place(self.rank, address);
        let Some(memory) = self.cluster.get(rank) else {
            return Err(cluster::no_rank(rank as u64, self.cluster.len()));
        };
        let outside = |near: String| {
            Err(Fault::OutOfBounds { space: Space::SharedCluster, address, bytes: bytes as u32, near })
        };
        match offset as usize + bytes <= memory.bytes.len() {
            _ if memory.gone => outside(format!("the CTA of rank {rank} has ended")),
            true => Ok(Spot::Shared(rank, offset as usize..offset as usize + bytes)),
            false => outside(format!("a CTA has {} bytes", memory.bytes.len())),
        }
    }

    /// Where the bytes of a run are, `bytes` a lane; if they are nowhere, the lane that is wrong.
    #[inline]
    pub fn spot(&self, space: Space, run: Run, bytes: u32) -> Checked<Spot> {
        match self.place(space, run.address, run.len(bytes)) {
            Some(spot) => Ok(spot),
            None => Err(self.nowhere(space, run, bytes)),
        }
    }

    #[cold]
    fn nowhere(&self, space: Space, run: Run, bytes: u32) -> Box<Found> {
        let address = |at: u32| run.address.wrapping_add(u64::from(at * run.stride));
        // With guards between allocations one lane at least is outside.
        let outside = |&at: &u32| self.place(space, address(at), bytes as usize).is_none();
        match (0..run.lanes).find(outside) {
            Some(at) => at_lane(run.first + at, self.outside(space, address(at), bytes)),
            None => at_lane(run.first, self.outside(space, run.address, run.len(bytes) as u32)),
        }
    }

    /// Is the access ordered with those before it? It is remembered for those to come.
    pub fn watch(&mut self, spot: &Spot, run: Run, bytes: u32, how: How, who: &Knowledge) -> Checked<()> {
        let (shadow, range) = match spot {
            Spot::Shared(rank, range) => (&mut self.cluster[*rank].shadow, range),
            Spot::Global(index, range) if run.mask() & who.unwaited != 0 => {
                if let Some((at, earlier_wrote)) =
                    self.memory.touched_before(*index, range.clone(), how.write)
                {
                    let (at, of, wrote) = (at as u64, self.name(spot), how.write);
                    return Err(at_lane(run.first, Fault::EarlierGrid { at, of, wrote, earlier_wrote }));
                }
                (&mut self.shadows[*index], range)
            }
            // What nobody can write needs no watching.
            Spot::Global(index, range) if !self.memory.bytes(*index).read_only() => {
                (&mut self.shadows[*index], range)
            }
            Spot::Global(..) | Spot::Params(_) => return Ok(()),
        };
        let run_bytes = (range.start, range.len());
        let how = How { whole: how.whole || run.lanes > 1 && run.stride == 0, ..how };
        shadow.access(who, how, (run.first, bytes as usize), run_bytes).map_err(|conflict| {
            let Conflict { at, lane, other, other_wrote, reason } = conflict;
            let (at, of, wrote, other) =
                (at as u64, self.name(spot), how.write, Box::new(self.party(other, other_wrote)));
            let fault = match reason {
                Reason::NonCoherent => Fault::NonCoherent { at, of, wrote, other },
                Reason::Race => Fault::Race { at, of, wrote, other },
                Reason::Unfenced => Fault::Unfenced { at, of, wrote, other },
            };
            at_lane(lane, fault)
        })
    }

    /// As [`Reach::watch`], of an operation of one lane on any number of bytes.
    pub fn watch_bytes(&mut self, spot: &Spot, run: Run, how: How, who: &Knowledge) -> Checked<()> {
        let (Spot::Shared(_, range) | Spot::Global(_, range) | Spot::Params(range)) = spot;
        // As large an access as its address and length allow.
        let granule = 1 << (range.start | range.len() | 16).trailing_zeros();
        self.watch(spot, run, granule, how, who)
    }

    /// Who made an access.
    fn party(&self, cell: Cell, wrote: bool) -> Party {
        let warp = cell.warp();
        let number = warp.map_or(self.number, |warp| warp / self.warps);
        let [x, y, _] = self.ctas;
        Party {
            line: self.program.code[usize::from(cell.pc)].line,
            cta: [number % x, number / x % y, number / x / y],
            warp: warp.map(|warp| warp % self.warps),
            lane: (cell.lane < WHOLE).then_some(u32::from(cell.lane)),
            wrote,
            in_flight: cell.in_flight() || cell.asynchronous(),
        }
    }

    /// The own CTA ends: others must be done with its shared memory.
    pub fn end<'k>(&self, warps: impl Iterator<Item = &'k Knowledge> + Clone) -> Checked<()> {
        match self.cluster[self.rank].shadow.unfinished(warps) {
            None => Ok(()),
            Some((cell, wrote)) => {
                Err(of_warp(Fault::EndsEarly { other: Box::new(self.party(cell, wrote)) }))
            }
        }
    }

    fn name(&self, spot: &Spot) -> String {
        match spot {
            Spot::Shared(rank, _) if *rank == self.rank => "shared memory".into(),
            Spot::Shared(rank, _) => format!("shared memory of the CTA of rank {rank}"),
            Spot::Global(index, _) => format!("`{}`", self.memory.name(*index)),
            Spot::Params(_) => "the parameters".into(),
        }
    }

    /// The bytes, all of them written before. They are of lanes from `run.first` on, `bytes` each.
    pub fn read(&self, spot: &Spot, run: Run, bytes: u32) -> Checked<&[u8]> {
        let (all, range) = match spot {
            Spot::Shared(rank, range) => (&self.cluster[*rank].bytes, range),
            Spot::Global(index, range) => (self.memory.bytes(*index), range),
            Spot::Params(range) => return Ok(&self.params[range.clone()]),
        };
        match all.first_unwritten(range.clone()) {
            None => Ok(&all.all()[range.clone()]),
            Some(at) => {
                let lane = run.first + (at - range.start) as u32 / bytes;
                Err(at_lane(lane, Fault::Unwritten { at: at as u64, of: self.name(spot) }))
            }
        }
    }

    /// Writes bytes that a run's lanes have.
    pub fn write(&mut self, spot: &Spot, run: Run, from: &[u8]) -> Checked<()> {
        let (to, range) = match spot {
            Spot::Shared(rank, range) => (&mut self.cluster[*rank].bytes, range),
            Spot::Global(index, range) => (self.memory.bytes_mut(*index), range),
            Spot::Params(_) => {
                return Err(at_lane(
                    run.first,
                    Fault::Unsupported { what: "a write to parameters or constants" },
                ));
            }
        };
        let Some(all) = to.all_mut() else {
            return Err(at_lane(run.first, Fault::ReadOnly { of: self.name(spot) }));
        };
        all[range.clone()].copy_from_slice(from);
        to.mark(range.clone(), true);
        Ok(())
    }

    /// Strong reads take over what was released at their places.
    pub fn acquire(&mut self, spot: &Spot, run: Run, who: &mut Knowledge, acquires: bool) {
        let (shadow, range) = match spot {
            Spot::Shared(rank, range) => (&mut self.cluster[*rank].shadow, range),
            Spot::Global(index, range) => (&mut self.shadows[*index], range),
            Spot::Params(_) => return,
        };
        for at in 0..run.lanes {
            shadow.acquire(who, run.first + at, range.start + (at * run.stride) as usize, acquires);
        }
    }

    /// Strong writes publish what their lanes know; an atomic goes on with what was published before.
    pub fn release(&mut self, spot: &Spot, run: Run, who: &mut Knowledge, (releases, atomic): (bool, bool)) {
        let (shadow, range) = match spot {
            Spot::Shared(rank, range) => (&mut self.cluster[*rank].shadow, range),
            Spot::Global(index, range) => (&mut self.shadows[*index], range),
            Spot::Params(_) => return,
        };
        for at in 0..run.lanes {
            shadow.release(who, run.first + at, range.start + (at * run.stride) as usize, releases, atomic);
        }
    }

    /// Counts an access: its bytes, and the sectors or the passes over the banks that it takes.
    pub fn count(&mut self, access: &Access, written: bool) {
        let bytes = u64::from(access.mask.count_ones() * access.bytes);
        self.counts.moved(access.space, written, bytes);
        match access.space {
            Space::Global => self.counts.sectors += sectors(access),
            Space::Shared => {
                let (passes, least) = passes(access);
                self.counts.shared_passes += passes;
                self.counts.bank_conflicts += passes - least;
            }
            Space::Param | Space::Const | Space::Generic | Space::SharedCluster => {}
        }
    }
}

/// Sectors that an access touches.
fn sectors(access: &Access) -> u64 {
    let mut last = 0;
    let mut sorted = true;
    let mut count = 0;
    for run in access.runs(true) {
        let begin = run.address / SECTOR_BYTES;
        let end = (run.address + run.len(access.bytes) as u64).div_ceil(SECTOR_BYTES);
        sorted &= begin + 1 >= last;
        count += end - begin.max(last).min(end);
        last = end;
    }
    if sorted {
        return count;
    }
    let mut all: Vec<u64> =
        lanes(access.mask).map(|lane| access.addresses[lane as usize] / SECTOR_BYTES).collect();
    all.sort_unstable();
    all.dedup();
    all.len() as u64
}

/// Passes over the banks that an access takes, and that it would take without conflicts. Lanes are served as many at a time
/// as fill 128 bytes.
fn passes(access: &Access) -> (u64, u64) {
    let at_once = (128 / access.bytes).clamp(1, LANES as u32);
    let words = u64::from(access.bytes.div_ceil(4));
    let (mut passes, mut least) = (0, 0);
    for begin in (0..LANES as u32).step_by(at_once as usize) {
        let mask = access.mask >> begin & (u32::MAX >> (LANES as u32 - at_once));
        if mask == 0 {
            continue;
        }
        least += 1;
        // Most accesses take a bank each: a bit for every bank.
        let banks = |lane: u32| {
            let bank = access.addresses[(begin + lane) as usize] / 4 % BANKS;
            u32::MAX >> (BANKS - words) << bank
        };
        let mut taken = 0;
        let alone = |lane: u32| {
            let before = taken;
            taken |= banks(lane);
            before & banks(lane) == 0
        };
        if lanes(mask).all(alone) {
            passes += 1;
            continue;
        }
        // The word that each bank has been asked for, and how often for another.
        let mut asked = [u64::MAX; BANKS as usize];
        let mut others: Vec<u64> = Vec::new();
        for lane in lanes(mask) {
            let first = access.addresses[(begin + lane) as usize] / 4;
            for word in first..first + words {
                let bank = &mut asked[(word % BANKS) as usize];
                if *bank == u64::MAX {
                    *bank = word;
                } else if *bank != word && !others.contains(&word) {
                    others.push(word);
                }
            }
        }
        let worst = (0..BANKS).map(|bank| others.iter().filter(|&&word| word % BANKS == bank).count()).max();
        passes += 1 + if others.is_empty() { 0 } else { worst.unwrap_or(0) as u64 };
    }
    (passes, least)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shared(bytes: u32, address: impl Fn(u64) -> u64) -> Access {
        let addresses = std::array::from_fn(|lane| address(lane as u64));
        Access { space: Space::Shared, addresses, mask: u32::MAX, bytes }
    }

    #[test]
    fn banks_are_counted() {
        assert_eq!(passes(&shared(4, |lane| 4 * lane)), (1, 1));
        assert_eq!(passes(&shared(4, |lane| 128 * lane)), (32, 1));
        assert_eq!(passes(&shared(4, |_| 64)), (1, 1));
        assert_eq!(passes(&shared(16, |lane| 16 * lane)), (4, 4));
        assert_eq!(passes(&shared(16, |lane| 128 * (lane % 8))), (32, 4));
        // The usual swizzle: row `r` has its chunk at `r & 7`.
        assert_eq!(passes(&shared(16, |lane| 128 * lane + 16 * (lane & 7))), (4, 4));
    }

    #[test]
    fn sectors_are_counted() {
        let global = |bytes, address: fn(u64) -> u64| {
            sectors(&Access { space: Space::Global, ..shared(bytes, address) })
        };
        assert_eq!(global(4, |lane| 4 * lane), 4);
        assert_eq!(global(4, |lane| 4 + 4 * lane), 5);
        assert_eq!(global(4, |lane| 64 * lane), 32);
        assert_eq!(global(4, |lane| 4 * (31 - lane)), 4);
        assert_eq!(global(4, |_| 0), 1);
        assert_eq!(global(16, |lane| 32 * (lane / 2) + 16 * (lane % 2)), 16);
    }

    #[test]
    fn runs_end_where_lanes_or_addresses_do() {
        let mut access = shared(4, |lane| if lane < 20 { 4 * lane } else { 4 * lane + 4 });
        access.mask = !(1 << 5);
        let runs: Vec<_> = access.runs(true).collect();
        let run = |first, lanes, address| Run { first, lanes, address, stride: 4 };
        assert_eq!(runs, [run(0, 5, 0), run(6, 14, 24), run(20, 12, 84)]);
        let same = shared(4, |lane| lane / 16 * 4);
        let run = |first, address| Run { first, lanes: 16, address, stride: 0 };
        assert_eq!(same.runs(true).collect::<Vec<_>>(), [run(0, 0), run(16, 4)]);
        assert_eq!(same.runs(false).count(), 31);
    }
}
