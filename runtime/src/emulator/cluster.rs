//! Clusters: CTAs that run together and reach each other's shared memory. Where there are none, each CTA is one.
//!
//! Source: PTX ISA, "Cluster of Cooperative Thread Arrays", "mapa", "barrier.cluster". An address of `.shared::cluster` is one
//! of `.shared::cta` for the own CTA, as on hardware, and above that the rank and the offset.

use super::Fault;
use super::access::Location;
use super::mbarrier::Mbarriers;
use super::memory::Bytes;
use super::race::{Message, Shadow, merge};

/// Addresses of `.shared::cluster` from one CTA to the next: more than the shared memory of any.
pub const STRIDE: u64 = 1 << 19;
/// CTAs that a cluster may have (16 with the attribute for more than 8).
pub const MOST_CTAS: u32 = 16;

/// The shared memory of a CTA, who accessed it, and the mbarriers in it.
pub struct SharedMemory {
    pub bytes: Bytes,
    pub shadow: Shadow,
    pub mbarriers: Mbarriers,
    /// Its CTA has ended: nobody may access it any more.
    pub gone: bool,
}

impl SharedMemory {
    /// Of so many bytes, in a cluster of so many warps.
    pub fn new(bytes: u32, warps: u32) -> SharedMemory {
        SharedMemory {
            bytes: Bytes::unwritten(bytes as usize),
            shadow: Shadow::shared(warps),
            mbarriers: Mbarriers::default(),
            gone: false,
        }
    }
}

/// The address that an offset in the CTA of a rank has among those of the cluster.
pub fn address(rank: u32, offset: u64) -> u64 {
    u64::from(rank + 1) * STRIDE + offset % STRIDE
}

/// The rank and the offset that an address of `.shared::cluster` means in the CTA of rank `own`.
pub fn place(own: usize, address: u64) -> (usize, u64) {
    match (address / STRIDE).checked_sub(1) {
        None => (own, address),
        Some(rank) => (rank as usize, address % STRIDE),
    }
}

/// `barrier.cluster`: all warps that have not ended arrive, then those that wait go on.
#[derive(Debug, Default)]
pub struct ClusterBarrier {
    /// Phases that are over.
    phase: u32,
    arrived: u32,
    sent: Message,
    released: Message,
}

impl ClusterBarrier {
    /// A warp arrives, of so many that there are. Returns the phase that it may wait for.
    pub fn arrive(&mut self, message: &Message) -> u32 {
        self.arrived += 1;
        merge(&mut self.sent, message);
        self.phase
    }

    /// Has a warp arrived in this phase?
    pub fn arrived(&self) -> bool {
        self.arrived > 0
    }

    /// Is the phase over that all `warps` arrive at? It ends once.
    pub fn ends(&mut self, warps: u32) -> bool {
        let ends = warps > 0 && self.arrived >= warps;
        if ends {
            self.phase += 1;
            self.arrived = 0;
            self.released = std::mem::take(&mut self.sent);
        }
        ends
    }

    /// What was sent in a phase that is over.
    pub fn released(&self, phase: u32) -> Option<&Message> {
        (phase < self.phase).then_some(&self.released)
    }
}

/// Bytes of a bulk copy that are on their way to an mbarrier; those in memory are there already, as nobody may look.
#[derive(Clone, Copy, Debug)]
pub struct Landing {
    pub place: Location,
    pub bytes: u32,
    /// Who asked for them: the CTA's rank, the warp, the line.
    pub rank: usize,
    pub warp: u32,
    pub line: u32,
}

/// An address that is none of a cluster's.
pub fn no_rank(rank: u64, ctas: usize) -> Fault {
    Fault::TooManyResources { what: "the rank of a CTA", asked: rank, limit: ctas as u64 - 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_say_their_rank() {
        assert_eq!(place(2, 4096), (2, 4096));
        assert_eq!(place(2, address(0, 4096)), (0, 4096));
        assert_eq!(place(0, address(15, 232_440)), (15, 232_440));
        // What was mapped may be mapped again.
        assert_eq!(address(1, address(3, 8)), address(1, 8));
    }

    #[test]
    fn a_barrier_opens_when_all_are_there() {
        let mut barrier = ClusterBarrier::default();
        assert_eq!(barrier.arrive(&Message::new()), 0);
        assert!(!barrier.ends(2) && barrier.released(0).is_none());
        barrier.arrive(&Message::new());
        assert!(barrier.ends(2) && !barrier.ends(2) && barrier.released(0).is_some());
        assert_eq!(barrier.arrive(&Message::new()), 1);
    }
}
