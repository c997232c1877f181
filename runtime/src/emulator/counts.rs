//! What kernels did, counted.

use crate::ptx::{Op, Space, UnaryOp};
use std::collections::BTreeMap;
use std::ops::AddAssign;

/// Kinds of instructions.
#[allow(missing_docs, reason = "the names say it")]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Class {
    Integer,
    Float,
    /// `ex2` and the other approximate functions.
    Special,
    Convert,
    Move,
    Predicate,
    Load,
    Store,
    Atomic,
    Branch,
    /// Shuffles, votes, `match`, `redux`.
    Exchange,
    Synchronise,
    Matrix,
    MatrixLoad,
    AsyncCopy,
    /// Products of warpgroups.
    MatrixGroup,
    /// Bulk copies, with and without a tensor map.
    BulkCopy,
}

impl Class {
    /// How many there are.
    pub const COUNT: usize = Class::BulkCopy as usize + 1;

    /// The kind of an instruction.
    pub fn of(op: &Op) -> Class {
        match op {
            Op::Unary { op: UnaryOp::Ex2 | UnaryOp::Lg2 | UnaryOp::Rcp | UnaryOp::Rsqrt, .. } => {
                Class::Special
            }
            Op::Unary { op: UnaryOp::Sqrt | UnaryOp::Sin | UnaryOp::Cos | UnaryOp::Tanh, .. } => {
                Class::Special
            }
            Op::Unary { ty, .. } | Op::Binary { ty, .. } | Op::Ternary { ty, .. } => {
                if ty.float() {
                    Class::Float
                } else {
                    Class::Integer
                }
            }
            Op::Wide { .. } => Class::Integer,
            Op::Cvt { .. } | Op::CvtPair { .. } => Class::Convert,
            Op::Mov { .. } | Op::Pack { .. } | Op::Unpack { .. } | Op::Selp { .. } | Op::Cvta { .. } => {
                Class::Move
            }
            Op::MovPred { .. } | Op::NotPred { .. } | Op::LogicPred { .. } | Op::Setp { .. } => {
                Class::Predicate
            }
            Op::Load { .. } => Class::Load,
            Op::Store { .. } => Class::Store,
            Op::Atomic { .. } => Class::Atomic,
            Op::Branch { .. } | Op::BranchIndexed { .. } | Op::Exit | Op::Trap => Class::Branch,
            Op::Shuffle { .. }
            | Op::Vote { .. }
            | Op::Match { .. }
            | Op::Redux { .. }
            | Op::ActiveMask { .. } => Class::Exchange,
            Op::Hint | Op::WaitForGrids | Op::Fence { .. } | Op::Barrier { .. } | Op::WarpSync { .. } => {
                Class::Synchronise
            }
            Op::Mma { .. } => Class::Matrix,
            Op::LoadMatrix { .. } => Class::MatrixLoad,
            Op::Copy { .. } | Op::CopyCommit | Op::CopyWait(_) => Class::AsyncCopy,
            Op::TileLoad { .. } | Op::TileStore { .. } | Op::BulkLoad { .. } | Op::BulkStore { .. } => {
                Class::BulkCopy
            }
            Op::BulkCommit | Op::BulkWait { .. } => Class::BulkCopy,
            Op::StoreMatrix { .. } => Class::Store,
            Op::Wgmma(_) => Class::MatrixGroup,
            Op::Elect { .. } => Class::Exchange,
            Op::MapA { .. } | Op::GetCtaRank { .. } => Class::Integer,
            Op::FenceProxyAsync(_) | Op::FenceMbarrierInit | Op::Mbarrier { .. } => Class::Synchronise,
            Op::WgmmaFence | Op::WgmmaCommit | Op::WgmmaWait(_) => Class::Synchronise,
            Op::SetMaxRegisters { .. } | Op::ClusterArrive { .. } | Op::ClusterWait => Class::Synchronise,
        }
    }
}

/// What the launches of one kernel did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KernelCounts {
    /// Launches.
    pub launches: u64,
    /// Instructions of warps by [`Class`]; one that no lane of the warp runs counts too, as it is issued.
    pub instructions: [u64; Class::COUNT],
    /// Bytes that lanes loaded from global memory, asynchronous copies among them.
    pub global_read_bytes: u64,
    /// Bytes that lanes stored to global memory.
    pub global_written_bytes: u64,
    /// Sectors of 32 bytes that those accesses touched, counted for each instruction.
    pub sectors: u64,
    /// Bytes that lanes loaded from shared memory.
    pub shared_read_bytes: u64,
    /// Bytes that lanes stored to shared memory, asynchronous copies among them.
    pub shared_written_bytes: u64,
    /// Passes over the banks of shared memory.
    pub shared_passes: u64,
    /// Those of them that would not be if no two lanes met in a bank.
    pub bank_conflicts: u64,
    /// Multiply-adds of matrix instructions.
    pub matrix_macs: u64,
    /// `ex2` of lanes that ran it.
    pub ex2: u64,
    /// Barriers of CTAs that opened.
    pub barriers: u64,
    /// Asynchronous copies of lanes.
    pub async_copies: u64,
}

impl KernelCounts {
    /// Instructions of warps, of all kinds.
    pub fn warp_instructions(&self) -> u64 {
        self.instructions.iter().sum()
    }

    /// Instructions of warps of one kind.
    pub fn of(&self, class: Class) -> u64 {
        self.instructions[class as usize]
    }

    /// Passes over the banks of shared memory for each that would do if no two lanes met; 1 if there are none.
    pub fn conflict_factor(&self) -> f64 {
        match self.shared_passes - self.bank_conflicts {
            0 => 1.0,
            free => self.shared_passes as f64 / free as f64,
        }
    }

    /// Counts what lanes move between registers and a memory.
    pub(super) fn moved(&mut self, space: Space, written: bool, bytes: u64) {
        match (space, written) {
            (Space::Shared, false) => self.shared_read_bytes += bytes,
            (Space::Shared, true) => self.shared_written_bytes += bytes,
            (Space::Global, false) => self.global_read_bytes += bytes,
            (Space::Global, true) => self.global_written_bytes += bytes,
            _ => {}
        }
    }
}

impl AddAssign<&KernelCounts> for KernelCounts {
    fn add_assign(&mut self, other: &KernelCounts) {
        let KernelCounts {
            launches,
            instructions,
            global_read_bytes,
            global_written_bytes,
            sectors,
            shared_read_bytes,
            shared_written_bytes,
            shared_passes,
            bank_conflicts,
            matrix_macs,
            ex2,
            barriers,
            async_copies,
        } = other;
        self.launches += launches;
        self.instructions.iter_mut().zip(instructions).for_each(|(sum, count)| *sum += count);
        self.global_read_bytes += global_read_bytes;
        self.global_written_bytes += global_written_bytes;
        self.sectors += sectors;
        self.shared_read_bytes += shared_read_bytes;
        self.shared_written_bytes += shared_written_bytes;
        self.shared_passes += shared_passes;
        self.bank_conflicts += bank_conflicts;
        self.matrix_macs += matrix_macs;
        self.ex2 += ex2;
        self.barriers += barriers;
        self.async_copies += async_copies;
    }
}

/// What launches did, kernel by kernel. Counts of several launches add up.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// By the kernel's name.
    pub kernels: BTreeMap<String, KernelCounts>,
}

impl Counts {
    /// Of all kernels together.
    pub fn total(&self) -> KernelCounts {
        self.kernels.values().fold(KernelCounts::default(), |mut sum, counts| {
            sum += counts;
            sum
        })
    }
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Counts) {
        for (kernel, counts) in other.kernels {
            *self.kernels.entry(kernel).or_default() += &counts;
        }
    }
}
