//! `mbarrier`: who has arrived, which bytes are still to come, and what the end of a phase orders.
//!
//! Source: PTX ISA, "Parallel Synchronization and Communication Instructions: mbarrier", with its "Phase", "Tracking
//! asynchronous operations by the mbarrier object". A phase is over when no arrival is missing and no byte. What arrived
//! came before what waited for the phase. The object's own bytes in shared memory say nothing; here its state lies beside.
//!
//! `try_wait` gives up when it fails for the first time, and by seed where it need not: who does not try again is found out in
//! both. Then it stops the warp until a phase of its CTA's mbarriers ends, so nobody spins, and a deadlock is one at once.

use super::Fault;
use super::access::{Access, Checked, Location, Reach, Spot, at_lane, lanes};
use super::arithmetic::Lanes;
use super::grid::Random;
use super::program::Step;
use super::race::{How, Message, Proxy, Stamp, merge};
use super::warp::{Pause, Wait, Warp};
use crate::ptx::{Address, MbarrierOp, Reg, Space};
use std::collections::BTreeMap;

/// The most arrivals of a phase, and bytes that may be missing (PTX ISA, "mbarrier", "Size and alignment").
const MOST: u32 = (1 << 20) - 1;
/// Of so many waits for a phase that is over, one gives up at first.
const PATIENT_WAITS: usize = 8;

#[derive(Debug)]
struct Mbarrier {
    /// Arrivals of a phase.
    count: u32,
    /// Those that are missing.
    pending: u32,
    /// Bytes that are missing. Below 0 where they come before they are expected.
    tx: i64,
    /// Bytes of copies that are on their way.
    coming: i64,
    /// Phases that are over.
    phase: u32,
    /// What arrived in this phase.
    arrived: Message,
    /// What arrived in those before.
    released: Message,
}

/// The mbarriers of a CTA, by their offsets in shared memory.
#[derive(Debug, Default)]
pub struct Mbarriers {
    known: BTreeMap<usize, Mbarrier>,
    /// A phase has ended: who waits may look again.
    pub ended: bool,
}

/// What is wrong with the use of an mbarrier.
type Used<T> = Result<T, String>;

impl Mbarriers {
    fn at(&mut self, offset: usize) -> Used<&mut Mbarrier> {
        self.known.get_mut(&offset).ok_or_else(|| "there is none".into())
    }

    fn init(&mut self, offset: usize, count: u32) -> Used<()> {
        if count == 0 || count > MOST {
            return Err(format!("it counts {count} arrivals, 1 to {MOST} can be"));
        }
        let (arrived, released) = (Message::new(), Message::new());
        let new = Mbarrier { count, pending: count, tx: 0, coming: 0, phase: 0, arrived, released };
        match self.known.insert(offset, new) {
            Some(_) => Err("it is one already".into()),
            None => Ok(()),
        }
    }

    fn inval(&mut self, offset: usize) -> Used<()> {
        self.at(offset)?;
        self.known.remove(&offset);
        Ok(())
    }

    /// So many bytes more (or fewer) are missing.
    fn expect(&mut self, offset: usize, bytes: i64) -> Used<()> {
        let mbarrier = self.at(offset)?;
        mbarrier.tx += bytes;
        match mbarrier.tx.unsigned_abs() <= u64::from(MOST) {
            true => Ok(()),
            false => Err(format!("{} bytes are missing, at most {MOST} can be", mbarrier.tx)),
        }
    }

    /// So many arrivals. Returns the phase that they are of.
    fn arrive(&mut self, (rank, offset): (usize, usize), count: u32, message: &Message) -> Used<u32> {
        let mbarrier = self.at(offset)?;
        let pending = mbarrier.pending.checked_sub(count);
        mbarrier.pending = pending.ok_or_else(|| {
            format!("{count} arrive, {} of {} are missing", mbarrier.pending, mbarrier.count)
        })?;
        merge(&mut mbarrier.arrived, message);
        let phase = mbarrier.phase;
        self.end_phase(rank, offset)?;
        Ok(phase)
    }

    /// A copy of so many bytes begins. Returns the phase that it is of.
    pub fn announce(&mut self, offset: usize, bytes: u32) -> Used<u32> {
        let mbarrier = self.at(offset)?;
        mbarrier.coming += i64::from(bytes);
        Ok(mbarrier.phase)
    }

    /// It ends.
    pub fn complete(&mut self, rank: usize, offset: usize, bytes: u32) -> Used<()> {
        self.at(offset)?.coming -= i64::from(bytes);
        self.expect(offset, -i64::from(bytes))?;
        self.end_phase(rank, offset)
    }

    fn end_phase(&mut self, rank: usize, offset: usize) -> Used<()> {
        let mbarrier = self.at(offset)?;
        if mbarrier.pending > 0 || mbarrier.tx != 0 {
            return Ok(());
        }
        if mbarrier.coming != 0 {
            let coming = mbarrier.coming;
            return Err(format!(
                "its phase ends while {coming} bytes are on their way: too few are expected"
            ));
        }
        merge(&mut mbarrier.released, &std::mem::take(&mut mbarrier.arrived));
        let (agent, clock) = Stamp::mbarrier(rank, offset, mbarrier.phase).known();
        mbarrier.released.insert(agent, clock);
        mbarrier.phase += 1;
        mbarrier.pending = mbarrier.count;
        self.ended = true;
        Ok(())
    }

    /// Are there any?
    pub fn any(&self) -> bool {
        !self.known.is_empty()
    }

    /// For a report: what the phase waits for.
    pub fn missing(&self, offset: usize) -> String {
        match self.known.get(&offset) {
            Some(Mbarrier { count, pending, tx, phase, .. }) => {
                format!("phase {phase} lacks {pending} of {count} arrivals and {tx} bytes")
            }
            None => "there is none".into(),
        }
    }
}

/// A fault of an mbarrier.
pub fn fault((rank, offset): Location, problem: String) -> Fault {
    Fault::Mbarrier { rank: rank as u32, address: offset as u64, problem }
}

impl Warp {
    /// What an `mbarrier` instruction does; a pause if it has to wait.
    pub fn mbarrier(
        &mut self,
        step: &Step,
        (op, space, address): (&MbarrierOp, Space, Address),
        active: u32,
        reach: &mut Reach<'_>,
        random: &mut Random,
    ) -> Checked<Option<Pause>> {
        let access = Access::new(space, self.addresses(address), active, 8)?;
        let writes = matches!(op, MbarrierOp::Init(_) | MbarrierOp::Inval);
        // Lanes, by the mbarrier that they are at.
        let mut places: BTreeMap<Location, u32> = BTreeMap::new();
        for run in access.runs(!writes) {
            let spot = reach.spot(access.space, run, 8)?;
            let Spot::Shared(rank, range) = &spot else {
                return Err(at_lane(
                    run.first,
                    Fault::Unsupported { what: "an mbarrier outside shared memory" },
                ));
            };
            let proxy = if *rank == reach.rank { Proxy::Mbarrier } else { Proxy::FarMbarrier };
            let how = How { write: writes, strong: !writes, proxy, pc: step.pc, ..How::default() };
            reach.watch(&spot, run, 8, how, &self.knowledge)?;
            for at in 0..run.lanes {
                let place = (*rank, range.start + (at * run.stride) as usize);
                *places.entry(place).or_default() |= 1 << (run.first + at);
            }
            if writes {
                reach.write(&spot, run, &vec![0; range.len()])?;
            }
        }
        if let MbarrierOp::Wait { d, phase, block } = op {
            return self.wait_for_phase((*d, *phase, *block), places, active, reach, random);
        }
        if let MbarrierOp::CopyArrive { .. } = op {
            self.finish_copies(active, None, reach)?;
        }
        for (place, mask) in places {
            let first = mask.trailing_zeros();
            let wrong = |problem| at_lane(first, fault(place, problem));
            let of =
                |warp: &Warp, reg: Reg| lanes(mask).map(|lane| warp.narrow(reg)[lane as usize]).sum::<u32>();
            let message = match op {
                MbarrierOp::Arrive { .. } | MbarrierOp::CopyArrive { .. } => {
                    self.knowledge.send(mask, mask == self.live)
                }
                _ => Message::new(),
            };
            let mbarriers = &mut reach.cluster[place.0].mbarriers;
            match op {
                MbarrierOp::Init(count) => {
                    let count = self.narrow(*count)[first as usize];
                    mbarriers.init(place.1, count).map_err(wrong)?;
                }
                MbarrierOp::Inval => mbarriers.inval(place.1).map_err(wrong)?,
                MbarrierOp::ExpectTx(bytes) => {
                    mbarriers.expect(place.1, i64::from(of(self, *bytes))).map_err(wrong)?;
                }
                MbarrierOp::CompleteTx(bytes) => {
                    mbarriers.expect(place.1, -i64::from(of(self, *bytes))).map_err(wrong)?;
                    mbarriers.end_phase(place.0, place.1).map_err(wrong)?;
                }
                MbarrierOp::Arrive { state, expect, count, no_complete } => {
                    if let Some(expect) = expect {
                        mbarriers.expect(place.1, i64::from(of(self, *expect))).map_err(wrong)?;
                    }
                    let count = count.map_or(mask.count_ones(), |count| of(self, count));
                    let before = mbarriers.at(place.1).map_err(wrong)?.phase;
                    let phase = mbarriers.arrive(place, count, &message).map_err(wrong)?;
                    if *no_complete && mbarriers.at(place.1).map_err(wrong)?.phase != before {
                        return Err(wrong("`noComplete` ends its phase".into()));
                    }
                    if let Some(state) = *state {
                        self.put(mask, state, Lanes::Wide([u64::from(phase); 32]));
                    }
                }
                MbarrierOp::CopyArrive { noinc } => {
                    let count = mask.count_ones();
                    if !noinc {
                        mbarriers.at(place.1).map_err(wrong)?.pending += count;
                    }
                    mbarriers.arrive(place, count, &message).map_err(wrong)?;
                }
                MbarrierOp::Wait { .. } => unreachable!("it returned above"),
            }
        }
        Ok(None)
    }

    fn wait_for_phase(
        &mut self,
        (d, phase, block): (crate::ptx::Pred, Reg, bool),
        places: BTreeMap<Location, u32>,
        active: u32,
        reach: &mut Reach<'_>,
        random: &mut Random,
    ) -> Checked<Option<Pause>> {
        // "Potentially blocking": it may return before the phase is over, after a time that depends on the system (PTX ISA,
        // "mbarrier.test_wait, mbarrier.try_wait").
        let impatient = block && !self.gave_up && random.below(PATIENT_WAITS) == 0;
        let mut over = 0;
        for (&place, &mask) in &places {
            let first = mask.trailing_zeros();
            let mbarriers = &mut reach.cluster[place.0].mbarriers;
            let mbarrier = mbarriers.at(place.1).map_err(|problem| at_lane(first, fault(place, problem)))?;
            let is_over = |lane: u32| match phase.wide {
                true => u64::from(mbarrier.phase) > self.wide(phase)[lane as usize],
                false => mbarrier.phase & 1 != self.narrow(phase)[lane as usize] & 1,
            };
            let done = lanes(mask)
                .filter(|&lane| !impatient && is_over(lane))
                .fold(0, |mask, lane| mask | 1 << lane);
            if done != 0 {
                self.knowledge.learn(done, done == self.live, &mbarrier.released);
            }
            over |= done;
        }
        let first = places.keys().next().copied().unwrap_or_default();
        // The first time it gives up.
        if over == 0 && block && std::mem::replace(&mut self.gave_up, true) {
            return Ok(Some(Pause::Again(Wait::Mbarrier(first))));
        }
        self.gave_up &= over == 0;
        self.put_predicate(active, d, over);
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: Location = (0, 64);

    fn with(count: u32) -> Mbarriers {
        let mut mbarriers = Mbarriers::default();
        mbarriers.init(AT.1, count).unwrap();
        mbarriers
    }

    #[test]
    fn a_phase_ends_with_its_last_arrival_and_byte() {
        let mut m = with(2);
        assert_eq!(m.arrive(AT, 1, &Message::new()), Ok(0));
        m.expect(AT.1, 32).unwrap();
        assert_eq!(m.arrive(AT, 1, &Message::new()), Ok(0));
        assert!(!m.ended);
        assert_eq!(m.missing(AT.1), "phase 0 lacks 0 of 2 arrivals and 32 bytes");
        assert_eq!(m.announce(AT.1, 32), Ok(0));
        m.complete(AT.0, AT.1, 32).unwrap();
        assert!(m.ended);
        assert_eq!(m.missing(AT.1), "phase 1 lacks 2 of 2 arrivals and 0 bytes");
        // Bytes may come before they are expected.
        assert_eq!(m.announce(AT.1, 16), Ok(1));
        m.complete(AT.0, AT.1, 16).unwrap();
        m.expect(AT.1, 16).unwrap();
        assert_eq!(m.arrive(AT, 2, &Message::new()), Ok(1));
        assert_eq!(m.announce(AT.1, 16), Ok(2));
    }

    #[test]
    fn what_an_mbarrier_cannot_be_used_for() {
        let mut m = with(2);
        assert!(m.arrive(AT, 3, &Message::new()).unwrap_err().contains("3 arrive, 2 of 2 are missing"));
        assert!(m.init(AT.1, 1).unwrap_err().contains("already"));
        assert!(m.init(8, 0).is_err() && m.init(8, 1 << 20).is_err() && m.inval(8).is_err());
        assert!(m.expect(AT.1, 1 << 20).is_err());
        // A copy that nobody expects is on its way when the phase ends.
        let mut m = with(1);
        m.announce(AT.1, 16).unwrap();
        assert!(m.arrive(AT, 1, &Message::new()).unwrap_err().contains("16 bytes are on their way"));
    }
}
