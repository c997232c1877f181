//! Runs PTX kernels on the CPU, and says what is wrong with them.
//!
//! A kernel's results are one thing to judge it by; here a kernel is also judged by what no result shows: an access outside
//! an allocation, bytes or registers that nobody wrote, lanes missing at an instruction that needs them all, two
//! accesses that nothing orders, a barrier that never opens. Such a thing ends the launch with a [`Report`].
//!
//! * Takes: a kernel as [`crate::ptx`] reads it, its parameter buffer, a [`Memory`].
//! * Gives: the memory as the kernel leaves it, and [`Counts`]; or the first thing that is wrong.
//! * Never: depends on anything but its arguments. One seed gives one schedule and one report.
//! * Meaning: the *PTX ISA*. Where that leaves something open, the file that decides says so.
//!
//! In reading order: this file (what a caller sees), `program` (a kernel made ready), `flow` (where lanes meet again),
//! `memory`, `arithmetic`, `float`, `matrix` (what instructions compute), `race` (what orders accesses), `access` (loads and
//! stores), `warp` (registers and lanes), `execute` (what each instruction does), what sm_90 added (`cluster`, `mbarrier`,
//! `bulk`, `wgmma`, `registers`), `grid` (CTAs, barriers, the schedule), `counts`.

mod access;
mod arithmetic;
mod bulk;
mod cluster;
mod counts;
mod execute;
mod float;
mod flow;
mod grid;
mod matrix;
mod mbarrier;
mod memory;
mod program;
mod race;
mod registers;
mod warp;
mod wgmma;

pub use counts::{Class, Counts, KernelCounts};
pub use memory::Memory;
pub use program::Program;

use crate::ptx::{Kernel, Space};
use std::fmt;
use std::str::FromStr;

/// What is known of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Sm {
    /// A100.
    Sm80,
    /// Ada consumer GPUs, as L4 and RTX 4090.
    Sm89,
    /// H100, H200, with the instructions of that architecture alone.
    Sm90a,
    /// Blackwell consumer GPUs.
    Sm120,
}

impl Sm {
    /// All, with the names that `.target` has for them and the bytes of shared memory that a CTA may use (CUDA C++
    /// Programming Guide, "Technical Specifications per Compute Capability").
    const ALL: [(Sm, &str, u32); 4] = [
        (Sm::Sm80, "sm_80", 163 << 10),
        (Sm::Sm89, "sm_89", 99 << 10),
        (Sm::Sm90a, "sm_90a", 227 << 10),
        (Sm::Sm120, "sm_120", 99 << 10),
    ];

    fn row(self) -> (Sm, &'static str, u32) {
        *Sm::ALL.iter().find(|(sm, ..)| *sm == self).expect("every machine has a row")
    }

    /// Its name in PTX.
    pub fn name(self) -> &'static str {
        self.row().1
    }

    /// Its compute capability in tenths: 8.0 is 80.
    pub fn capability(self) -> u32 {
        let digits: String = self.name().chars().filter(char::is_ascii_digit).collect();
        digits.parse().expect("a name has the number in it")
    }

    /// Bytes of shared memory that a CTA may use at most, static and dynamic.
    pub fn shared_bytes(self) -> u32 {
        self.row().2
    }
}

/// No machine has that name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no machine that is emulated; there are sm_80, sm_89, sm_90a and sm_120")]
pub struct UnknownSm(pub String);

impl FromStr for Sm {
    type Err = UnknownSm;

    fn from_str(name: &str) -> Result<Sm, UnknownSm> {
        let row = Sm::ALL.iter().find(|(_, known, _)| *known == name);
        row.map(|&(sm, ..)| sm).ok_or_else(|| UnknownSm(name.to_string()))
    }
}

/// How matrix instructions add.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Sums {
    /// Terms of a block aligned to the largest and cut off, as tensor cores do it.
    #[default]
    Truncated,
    /// Without error, rounded once.
    Exact,
}

/// What a launch depends on beside kernel, grid and memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// The machine.
    pub sm: Sm,
    /// Chooses among the schedules that the ISA allows.
    pub seed: u64,
    /// How matrix instructions add.
    pub sums: Sums,
}

/// The shape of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    /// CTAs in x, y, z.
    pub ctas: [u32; 3],
    /// Threads of a CTA in x, y, z.
    pub threads: [u32; 3],
    /// CTAs of a cluster; 1 where there are none.
    pub cluster: u32,
    /// Bytes of dynamic shared memory.
    pub dynamic_shared: u32,
    /// May it begin before the grids before it have ended? Then all its threads have to wait for them
    /// (`griddepcontrol.wait`), and until then may touch nothing that those write, nor write what they read.
    pub dependent: bool,
}

/// Runs a kernel to its end. Who launches it often makes a [`Program`] of it once.
///
/// # Errors
///
/// [`Report`]: the first thing that is wrong. Memory is then as the kernel had it at that moment.
pub fn launch(
    kernel: &Kernel,
    grid: &Grid,
    params: &[u8],
    memory: &mut Memory,
    options: &Options,
) -> Result<Counts, Report> {
    Program::new(kernel).launch(grid, params, memory, options)
}

impl Program {
    /// As [`launch`].
    ///
    /// # Errors
    ///
    /// As [`launch`].
    pub fn launch(
        &self,
        grid: &Grid,
        params: &[u8],
        memory: &mut Memory,
        options: &Options,
    ) -> Result<Counts, Report> {
        grid::run(self, grid, params, memory, options).map_err(|report| *report)
    }
}

/// Something wrong, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The kernel.
    pub kernel: String,
    /// Line of the PTX text; 0 before the first instruction.
    pub line: u32,
    /// The CTA, in x, y, z.
    pub cta: [u32; 3],
    /// The warp in the CTA.
    pub warp: u32,
    /// The lane in the warp, if it is one lane's fault.
    pub lane: Option<u32>,
    /// What.
    pub fault: Fault,
}

impl std::error::Error for Report {}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Report { kernel, line, cta: [x, y, z], warp, lane, fault } = self;
        write!(f, "{kernel}, line {line}, CTA ({x}, {y}, {z}), warp {warp}")?;
        if let Some(lane) = lane {
            write!(f, ", lane {lane}")?;
        }
        write!(f, ": {fault}")
    }
}

/// What is wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// An access that does not lie in one allocation.
    #[error("{bytes} bytes of {} at {address:#x}: {near}", named(*.space))]
    OutOfBounds {
        /// Where.
        space: Space,
        /// The address in that space.
        address: u64,
        /// Bytes of the access.
        bytes: u32,
        /// Where that is, seen from the nearest allocation.
        near: String,
    },
    /// An address that is no multiple of what the access needs.
    #[error("{} at {address:#x} is not aligned to {align} bytes", named(*.space))]
    Misaligned {
        /// Where.
        space: Space,
        /// The address.
        address: u64,
        /// What it should be a multiple of.
        align: u32,
    },
    /// A read of a byte that nobody wrote.
    #[error("byte {at} of {of} is read, and nobody wrote it")]
    Unwritten {
        /// Which byte.
        at: u64,
        /// Of what.
        of: String,
    },
    /// A write to memory that was lent to be read.
    #[error("a write to {of}, which may only be read")]
    ReadOnly {
        /// The allocation.
        of: String,
    },
    /// Two accesses to a byte, one of them a write, that nothing orders.
    #[error("race: it {} byte {at} of {of}, which {other}", verb(*.wrote))]
    Race {
        /// Which byte.
        at: u64,
        /// Of what.
        of: String,
        /// Does the access write?
        wrote: bool,
        /// The one that was there before.
        other: Box<Party>,
    },
    /// An access to a byte that an earlier grid may touch at that time, one of the two a write.
    #[error(
        "race: it {} byte {at} of {of} before `griddepcontrol.wait`, and an earlier grid {} it",
        verb(*.wrote),
        verb(*.earlier_wrote)
    )]
    EarlierGrid {
        /// Which byte.
        at: u64,
        /// Of what.
        of: String,
        /// Does the access write?
        wrote: bool,
        /// Does the earlier grid?
        earlier_wrote: bool,
    },
    /// A lane of a grid that may begin early ends without having waited: who waits for it would not wait for those before.
    #[error(
        "it ends without `griddepcontrol.wait`: a grid that waits for this one would not wait for those before it"
    )]
    NoWaitForGrids,
    /// An asynchronous operation meets a byte that a generic instruction wrote, and no fence of the proxies lies between.
    #[error("no proxy fence of the writer: it {} byte {at} of {of}, which {other}", verb(*.wrote))]
    Unfenced {
        /// Which byte.
        at: u64,
        /// Of what.
        of: String,
        /// Does the asynchronous operation write?
        wrote: bool,
        /// The one that was there before.
        other: Box<Party>,
    },
    /// `ld.global.nc` of a byte that is written in the same grid.
    #[error("it {} byte {at} of {of}, which {other} in the same grid; one of the two is `.nc`", verb(*.wrote))]
    NonCoherent {
        /// Which byte.
        at: u64,
        /// Of what.
        of: String,
        /// Does the access write?
        wrote: bool,
        /// The one that was there before.
        other: Box<Party>,
    },
    /// An operand that has no value in that lane.
    #[error("{register} is not defined")]
    Undefined {
        /// Its name in the text.
        register: String,
    },
    /// Lanes are missing at an instruction that needs them all.
    #[error("lanes {expected:#010x} must run it together, lanes {found:#010x} do")]
    Divergent {
        /// A bit for every lane that must be there.
        expected: u32,
        /// A bit for every lane that is.
        found: u32,
    },
    /// A shuffle that reads a lane that takes no part.
    #[error("it reads lane {of}, which takes no part")]
    AbsentLane {
        /// The lane that is read.
        of: u32,
    },
    /// An operand of a barrier that no barrier can have.
    #[error("barrier {id}: {problem}")]
    Barrier {
        /// The barrier.
        id: u32,
        /// What is wrong with it.
        problem: String,
    },
    /// A use of an mbarrier that it does not have.
    #[error("mbarrier at {address:#x} of the CTA of rank {rank}: {problem}")]
    Mbarrier {
        /// Rank of its CTA in the cluster.
        rank: u32,
        /// Its address in shared memory.
        address: u64,
        /// What is wrong.
        problem: String,
    },
    /// A bulk copy by a tensor map that is none.
    #[error("there is no tensor map at {address:#x}")]
    NoTensorMap {
        /// Where.
        address: u64,
    },
    /// A lane ends, and a bulk copy that it asked for may still read shared memory.
    #[error("it ends before `cp.async.bulk.wait_group.read` of its copies from shared memory")]
    UnreadSource,
    /// A CTA ends, and another or a bulk copy may still access its shared memory.
    #[error("its CTA ends, and nothing says that this is over: its shared memory {other}")]
    EndsEarly {
        /// Who.
        other: Box<Party>,
    },
    /// A `wgmma`, or another instruction that has its registers.
    #[error("wgmma: {problem}")]
    Wgmma {
        /// What is wrong.
        problem: String,
    },
    /// A `setmaxnreg` that no warpgroup can do.
    #[error("setmaxnreg: {problem}")]
    Registers {
        /// What is wrong.
        problem: String,
    },
    /// The warps of a warpgroup are at different instructions that all of them must run.
    #[error("the four warps of a warpgroup must run it together; one is in line {other}")]
    Apart {
        /// Where one of them is.
        other: u32,
    },
    /// A use of `barrier.cluster` that no kernel can mean.
    #[error("barrier.cluster: {problem}")]
    Cluster {
        /// What is wrong.
        problem: &'static str,
    },
    /// Everybody waits.
    #[error("deadlock: {}", waiting_text(.waiting))]
    Deadlock {
        /// The warps that wait.
        waiting: Vec<Waiting>,
    },
    /// Warps run and nothing comes of it.
    #[error("nothing was written in {instructions} instructions: it waits for ever")]
    Endless {
        /// Instructions without an effect.
        instructions: u64,
    },
    /// The kernel's own `trap`.
    #[error("trap")]
    Trap,
    /// More than the machine has.
    #[error("{what}: {asked}, at most {limit}")]
    TooManyResources {
        /// Of what.
        what: &'static str,
        /// How much the launch needs.
        asked: u64,
        /// How much there is.
        limit: u64,
    },
    /// A launch that the kernel does not allow.
    #[error("{what}: the kernel has {expected}, the launch {found}")]
    Launch {
        /// What differs.
        what: &'static str,
        /// As the kernel has it.
        expected: u64,
        /// As the launch has it.
        found: u64,
    },
    /// Something that is not emulated.
    #[error("{what} is not supported")]
    Unsupported {
        /// What.
        what: &'static str,
    },
}

/// Who made the other access of two.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Party {
    /// Line of the PTX text.
    pub line: u32,
    /// The CTA.
    pub cta: [u32; 3],
    /// The warp in it; `None` for a copy that an mbarrier counts.
    pub warp: Option<u32>,
    /// The lane, if it was not the whole warp.
    pub lane: Option<u32>,
    /// Did it write?
    pub wrote: bool,
    /// Is it an asynchronous operation that nobody has waited for?
    pub in_flight: bool,
}

impl fmt::Display for Party {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Party { line, cta: [x, y, z], warp, lane, wrote, in_flight } = self;
        let verb = match (in_flight, wrote) {
            (true, true) => "is being copied to",
            (true, false) => "is being read",
            (false, true) => "was written",
            (false, false) => "was read",
        };
        write!(f, "{verb} in line {line} by CTA ({x}, {y}, {z})")?;
        if let Some(warp) = warp {
            write!(f, ", warp {warp}")?;
        }
        lane.map_or(Ok(()), |lane| write!(f, ", lane {lane}"))
    }
}

fn verb(wrote: bool) -> &'static str {
    if wrote { "writes" } else { "reads" }
}

/// A warp that waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// The CTA.
    pub cta: [u32; 3],
    /// The warp in it.
    pub warp: u32,
    /// Where it waits.
    pub line: u32,
    /// For what.
    pub what: String,
}

/// One line for any number of warps.
fn waiting_text(waiting: &[Waiting]) -> String {
    let one = |w: &Waiting| format!("warp {} in line {} for {}", w.warp, w.line, w.what);
    let shown: Vec<String> = waiting.iter().take(4).map(one).collect();
    let more = waiting.len().saturating_sub(shown.len());
    format!("{}{}", shown.join(", "), if more > 0 { format!(" and {more} more") } else { String::new() })
}

/// What a memory is called in a report.
fn named(space: Space) -> &'static str {
    match space {
        Space::Generic => "memory",
        Space::Global => "global memory",
        Space::Shared => "shared memory",
        Space::SharedCluster => "shared memory of the cluster",
        Space::Param => "the parameters",
        Space::Const => "constant memory",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machines_are_known_by_name() {
        for (sm, name, _) in Sm::ALL {
            assert_eq!((name.parse(), sm.name()), (Ok(sm), name));
        }
        assert_eq!(Sm::Sm80.shared_bytes(), 166_912);
        assert!("sm_90".parse::<Sm>().unwrap_err().to_string().contains("`sm_90`"));
    }

    /// All that a report says, in a line.
    #[test]
    fn reports_are_short() {
        let waiting = |warp| Waiting { cta: [0; 3], warp, line: 7, what: "barrier 1".into() };
        let fault = Fault::Deadlock { waiting: (0..6).map(waiting).collect() };
        let report = Report { kernel: "k".into(), line: 7, cta: [2, 0, 1], warp: 3, lane: None, fault };
        let waits: Vec<_> = (0..4).map(|warp| format!("warp {warp} in line 7 for barrier 1")).collect();
        let expected = format!("k, line 7, CTA (2, 0, 1), warp 3: deadlock: {} and 2 more", waits.join(", "));
        assert_eq!(report.to_string(), expected);
    }
}
