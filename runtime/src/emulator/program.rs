//! A kernel made ready to run: what each instruction reads and writes, where branches join, few registers.
//!
//! LLVM gives every value a register of its own, over a thousand of them, and 32 lanes of each do not fit a cache. Here
//! values that are never alive together share one. A value that may be read before it is written is alive from the
//! beginning, so its register is nobody else's and stays undefined.

use super::counts::Class;
use super::flow;
use crate::ptx::{BarrierOp, Kernel, MatrixA, MbarrierOp, Op, Pred, Reg, Tile, VoteMode};
use std::collections::HashSet;

/// A kernel that can be launched many times.
#[derive(Debug)]
pub struct Program {
    /// The kernel as it was read: constants, names, sizes.
    pub(super) kernel: Kernel,
    /// Its code.
    pub(super) code: Vec<Step>,
    /// Constants of the kernel, by the registers they have here.
    pub(super) constants: Vec<Reg>,
    /// Registers of up to 32 bits and of 64.
    pub(super) registers: [usize; 2],
}

/// An instruction.
#[derive(Debug)]
pub(super) struct Step {
    pub op: Op,
    pub line: u32,
    pub class: Class,
    pub guard: Option<(Pred, bool)>,
    /// Its index. More than 65,535 instructions are refused at the launch.
    pub pc: u16,
    /// Where lanes that part here meet again.
    pub join: u32,
    /// Registers that must be defined in every lane that runs it.
    pub uses: Box<[Reg]>,
    /// Predicates that must be.
    pub use_predicates: Box<[Pred]>,
    /// Registers that are defined behind it.
    pub defines: Box<[Reg]>,
    /// Predicates that are.
    pub define_predicates: Box<[Pred]>,
    /// What `uses` are called in the text.
    pub names: Box<[Reg]>,
    /// Registers of a `wgmma` that it touches and is none, and what they are called in the text.
    pub fragments: Box<[(Reg, Reg)]>,
}

/// How an instruction touches an operand.
enum Operand<'a> {
    Use(&'a mut Reg),
    Define(&'a mut Reg),
    UsePredicate(Pred),
    DefinePredicate(Pred),
}

/// Calls `f` with every operand.
fn operands(op: &mut Op, f: &mut dyn FnMut(Operand<'_>)) {
    use Operand::{Define, DefinePredicate, Use, UsePredicate};
    match op {
        Op::Mov { d, a } | Op::Unary { d, a, .. } | Op::Cvt { d, a, .. } | Op::Cvta { d, a, .. } => {
            f(Use(a));
            f(Define(d));
        }
        Op::MovPred { d, a } | Op::NotPred { d, a } => {
            f(UsePredicate(*a));
            f(DefinePredicate(*d));
        }
        Op::Pack { d, parts } => {
            parts.iter_mut().for_each(|part| f(Use(part)));
            f(Define(d));
        }
        Op::Unpack { parts, a } => {
            f(Use(a));
            parts.iter_mut().flatten().for_each(|part| f(Define(part)));
        }
        Op::Binary { d, a, b, .. } | Op::CvtPair { d, a, b, .. } => {
            f(Use(a));
            f(Use(b));
            f(Define(d));
        }
        Op::Ternary { d, a, b, c, .. } => {
            [a, b, c].into_iter().for_each(|source| f(Use(source)));
            f(Define(d));
        }
        Op::Wide { d, a, b, c, .. } => {
            f(Use(a));
            f(Use(b));
            c.iter_mut().for_each(|c| f(Use(c)));
            f(Define(d));
        }
        Op::LogicPred { d, a, b, .. } => {
            f(UsePredicate(*a));
            f(UsePredicate(*b));
            f(DefinePredicate(*d));
        }
        Op::Setp { d, other, combine, a, b, .. } => {
            f(Use(a));
            f(Use(b));
            combine.iter().for_each(|(_, pred, _)| f(UsePredicate(*pred)));
            f(DefinePredicate(*d));
            other.iter().for_each(|other| f(DefinePredicate(*other)));
        }
        Op::Selp { d, a, b, p } => {
            f(Use(a));
            f(Use(b));
            f(UsePredicate(*p));
            f(Define(d));
        }
        Op::Load { d, address, .. } | Op::LoadMatrix { d, address, .. } => {
            f(Use(&mut address.base));
            d.iter_mut().for_each(|d| f(Define(d)));
        }
        Op::Store { address, a, .. } => {
            f(Use(&mut address.base));
            a.iter_mut().for_each(|a| f(Use(a)));
        }
        Op::Atomic { d, address, b, c, .. } => {
            f(Use(&mut address.base));
            b.iter_mut().for_each(|b| f(Use(b)));
            c.iter_mut().for_each(|c| f(Use(c)));
            d.iter_mut().for_each(|d| f(Define(d)));
        }
        Op::BranchIndexed { index, .. } => f(Use(index)),
        Op::Barrier { op, id, threads } => {
            f(Use(id));
            threads.iter_mut().for_each(|threads| f(Use(threads)));
            if let BarrierOp::Reduce(d, _, a) = op {
                f(UsePredicate(*a));
                f(DefinePredicate(*d));
            }
        }
        Op::WarpSync { mask } => f(Use(mask)),
        Op::Shuffle { d, p, a, b, c, mask, .. } => {
            [a, b, c, mask].into_iter().for_each(|source| f(Use(source)));
            f(Define(d));
            p.iter().for_each(|p| f(DefinePredicate(*p)));
        }
        Op::Vote { mode, a, mask, .. } => {
            f(UsePredicate(*a));
            f(Use(mask));
            match mode {
                VoteMode::All(d) | VoteMode::Any(d) | VoteMode::Uni(d) => f(DefinePredicate(*d)),
                VoteMode::Ballot(d) => f(Define(d)),
            }
        }
        Op::Match { all, d, a, mask, .. } => {
            f(Use(a));
            f(Use(mask));
            f(Define(d));
            all.iter().flatten().for_each(|p| f(DefinePredicate(*p)));
        }
        Op::Redux { d, a, mask, .. } => {
            f(Use(a));
            f(Use(mask));
            f(Define(d));
        }
        Op::ActiveMask { d } => f(Define(d)),
        Op::Mma { d, a, b, c, .. } => {
            [a, b, c].into_iter().for_each(|part| part.iter_mut().for_each(|source| f(Use(source))));
            d.iter_mut().for_each(|d| f(Define(d)));
        }
        Op::Copy { d, a, size, .. } => {
            f(Use(&mut d.base));
            f(Use(&mut a.base));
            size.iter_mut().for_each(|size| f(Use(size)));
        }
        Op::StoreMatrix { address, a, .. } => {
            f(Use(&mut address.base));
            a.iter_mut().for_each(|a| f(Use(a)));
        }
        Op::Mbarrier { op, address, .. } => {
            f(Use(&mut address.base));
            match op {
                MbarrierOp::Init(a) | MbarrierOp::ExpectTx(a) | MbarrierOp::CompleteTx(a) => f(Use(a)),
                MbarrierOp::Arrive { state, expect, count, no_complete: _ } => {
                    expect.iter_mut().chain(count).for_each(|a| f(Use(a)));
                    state.iter_mut().for_each(|state| f(Define(state)));
                }
                MbarrierOp::Wait { d, phase, block: _ } => {
                    f(Use(phase));
                    f(DefinePredicate(*d));
                }
                MbarrierOp::Inval | MbarrierOp::CopyArrive { noinc: _ } => {}
            }
        }
        Op::TileLoad { d, tile, mbarrier, multicast } => {
            f(Use(&mut d.base));
            tile_operands(tile, f);
            f(Use(&mut mbarrier.base));
            multicast.iter_mut().for_each(|mask| f(Use(mask)));
        }
        Op::TileStore { tile, a, reduce: _ } => {
            tile_operands(tile, f);
            f(Use(&mut a.base));
        }
        Op::BulkLoad { d, a, bytes, mbarrier, multicast } => {
            [&mut d.base, &mut a.base, bytes, &mut mbarrier.base].into_iter().for_each(|a| f(Use(a)));
            multicast.iter_mut().for_each(|mask| f(Use(mask)));
        }
        Op::BulkStore { d, a, bytes } => {
            [&mut d.base, &mut a.base, bytes].into_iter().for_each(|a| f(Use(a)));
        }
        Op::Wgmma(wgmma) => {
            match &mut wgmma.a {
                MatrixA::Registers(a) => a.iter_mut().for_each(|a| f(Use(a))),
                MatrixA::Shared(descriptor, _) => f(Use(descriptor)),
            }
            f(Use(&mut wgmma.b));
            f(UsePredicate(wgmma.scale_d));
            // Whether D is read is known when it runs, but its registers stay the same.
            wgmma.d.iter_mut().for_each(|d| f(Define(d)));
        }
        Op::Elect { d, p, mask } => {
            f(Use(mask));
            d.iter_mut().for_each(|d| f(Define(d)));
            f(DefinePredicate(*p));
        }
        Op::MapA { d, a, rank, .. } => {
            f(Use(a));
            f(Use(rank));
            f(Define(d));
        }
        Op::GetCtaRank { d, a, .. } => {
            f(Use(a));
            f(Define(d));
        }
        Op::Branch { .. } | Op::Exit | Op::Trap | Op::Hint | Op::WaitForGrids | Op::Fence { .. } => {}
        Op::CopyCommit | Op::CopyWait(_) | Op::FenceProxyAsync(_) | Op::FenceMbarrierInit => {}
        Op::BulkCommit | Op::BulkWait { .. } | Op::WgmmaFence | Op::WgmmaCommit | Op::WgmmaWait(_) => {}
        Op::SetMaxRegisters { .. } | Op::ClusterArrive { .. } | Op::ClusterWait => {}
    }
}

fn tile_operands(tile: &mut Tile, f: &mut dyn FnMut(Operand<'_>)) {
    f(Operand::Use(&mut tile.map));
    tile.coordinates.iter_mut().for_each(|coordinate| f(Operand::Use(coordinate)));
}

impl Program {
    /// CTAs of a cluster, along x.
    pub fn cluster(&self) -> u32 {
        self.kernel.cluster.unwrap_or(1)
    }

    /// Makes a kernel ready.
    pub fn new(kernel: &Kernel) -> Program {
        let joins = flow::joins(&kernel.code);
        let fragments = fragments(kernel);
        let [narrow, wide] = [false, true].map(|wide| Sharing::of(kernel, wide, &fragments));
        let place = |reg: Reg| Reg {
            index: if reg.wide { &wide } else { &narrow }.place[usize::from(reg.index)],
            ..reg
        };
        let step = |(at, instruction): (usize, &crate::ptx::Instruction)| {
            let mut step = Step {
                op: instruction.op.clone(),
                line: instruction.line,
                class: Class::of(&instruction.op),
                guard: instruction.guard,
                pc: at as u16,
                join: joins[at],
                uses: [].into(),
                use_predicates: [].into(),
                defines: [].into(),
                define_predicates: [].into(),
                names: [].into(),
                fragments: [].into(),
            };
            let (mut uses, mut defines, mut names) = (Vec::new(), Vec::new(), Vec::new());
            let (mut use_predicates, mut define_predicates) = (Vec::new(), Vec::new());
            let mut touched = Vec::new();
            operands(&mut step.op, &mut |operand| match operand {
                Operand::Use(reg) => {
                    touched.push((place(*reg), *reg));
                    names.push(*reg);
                    *reg = place(*reg);
                    uses.push(*reg);
                }
                Operand::Define(reg) => {
                    touched.push((place(*reg), *reg));
                    *reg = place(*reg);
                    defines.push(*reg);
                }
                Operand::UsePredicate(pred) => use_predicates.push(pred),
                Operand::DefinePredicate(pred) => define_predicates.push(pred),
            });
            if !matches!(step.op, Op::Wgmma(_)) {
                touched.retain(|(_, text)| fragments.contains(text));
                step.fragments = touched.into();
            }
            // A copy of what is not defined is not yet a use of it: these hand it on.
            let hands_on =
                matches!(step.op, Op::Mov { .. } | Op::Selp { .. } | Op::Pack { .. } | Op::Unpack { .. });
            if !hands_on {
                (step.uses, step.names, step.defines) = (uses.into(), names.into(), defines.into());
            }
            if !matches!(step.op, Op::MovPred { .. }) {
                step.use_predicates = use_predicates.into();
                step.define_predicates = define_predicates.into();
            }
            step
        };
        Program {
            code: kernel.code.iter().enumerate().map(step).collect(),
            constants: kernel.constants.iter().map(|&(reg, _)| place(reg)).collect(),
            registers: [narrow.count, wide.count],
            kernel: kernel.clone(),
        }
    }
}

/// Registers that a `wgmma` has: they are in flight behind it, so nobody may share them.
fn fragments(kernel: &Kernel) -> HashSet<Reg> {
    let of = |op: &Op| match op {
        Op::Wgmma(wgmma) => match &wgmma.a {
            MatrixA::Registers(a) => [&wgmma.d[..], &a[..]].concat(),
            MatrixA::Shared(..) => wgmma.d.to_vec(),
        },
        _ => Vec::new(),
    };
    kernel.code.iter().flat_map(|instruction| of(&instruction.op)).collect()
}

/// Which register of a bank each of the kernel's is.
struct Sharing {
    place: Vec<u16>,
    count: usize,
}

impl Sharing {
    /// Linear scan (Poletto and Sarkar 1999) over the intervals in which a register may be alive.
    fn of(kernel: &Kernel, wide: bool, alone: &HashSet<Reg>) -> Sharing {
        let count = usize::from(if wide { kernel.banks.wide } else { kernel.banks.narrow });
        let mut intervals = intervals(kernel, wide, count);
        for reg in alone.iter().filter(|reg| reg.wide == wide) {
            intervals[usize::from(reg.index)] = Some((0, kernel.code.len()));
        }
        let mut order: Vec<usize> = (0..count).filter(|&reg| intervals[reg].is_some()).collect();
        order.sort_by_key(|&reg| intervals[reg]);
        let mut place = vec![0; count];
        let mut ends: Vec<usize> = Vec::new();
        for reg in order {
            let (begin, end) = intervals[reg].expect("it was kept");
            let free = ends.iter().position(|&end| end < begin).unwrap_or(ends.len());
            ends.resize(ends.len().max(free + 1), 0);
            ends[free] = end;
            place[reg] = free as u16;
        }
        Sharing { place, count: ends.len().max(1) }
    }
}

/// First and last instruction between which each register may be alive.
fn intervals(kernel: &Kernel, wide: bool, count: usize) -> Vec<Option<(usize, usize)>> {
    let code = &kernel.code;
    let words = count.div_ceil(64);
    let mut found: Vec<Option<(usize, usize)>> = vec![None; count];
    let extend = |found: &mut Option<(usize, usize)>, at: usize| {
        *found = Some(found.map_or((at, at), |(begin, end)| (begin.min(at), end.max(at))));
    };
    // Constants are there from the beginning to the end.
    for (reg, _) in kernel.constants.iter().filter(|(reg, _)| reg.wide == wide) {
        found[usize::from(reg.index)] = Some((0, code.len()));
    }
    // What each instruction reads, and what it writes for certain.
    let touched: Vec<(Vec<usize>, Vec<usize>)> = code
        .iter()
        .map(|instruction| {
            let (mut uses, mut kills) = (Vec::new(), Vec::new());
            operands(&mut instruction.op.clone(), &mut |operand| match operand {
                Operand::Use(reg) if reg.wide == wide => uses.push(usize::from(reg.index)),
                Operand::Define(reg) if reg.wide == wide => kills.push(usize::from(reg.index)),
                _ => {}
            });
            if instruction.guard.is_some() {
                uses.append(&mut kills);
            }
            (uses, kills)
        })
        .collect();
    for (at, (uses, kills)) in touched.iter().enumerate() {
        uses.iter().chain(kills).for_each(|&reg| extend(&mut found[reg], at));
    }
    // Alive before an instruction, a bit a register; to a fixed point, from the back.
    let mut alive = vec![0u64; (code.len() + 1) * words];
    let next: Vec<Vec<usize>> = (0..code.len()).map(|at| flow::successors(code, at)).collect();
    let mut row = vec![0u64; words];
    loop {
        let mut changed = false;
        for at in (0..code.len()).rev() {
            row.fill(0);
            for &next in &next[at] {
                let after = &alive[next * words..][..words];
                row.iter_mut().zip(after).for_each(|(row, after)| *row |= after);
            }
            let (uses, kills) = &touched[at];
            kills.iter().for_each(|&reg| row[reg / 64] &= !(1 << (reg % 64)));
            uses.iter().for_each(|&reg| row[reg / 64] |= 1 << (reg % 64));
            let before = &mut alive[at * words..][..words];
            if *before != row {
                before.copy_from_slice(&row);
                changed = true;
            }
        }
        if !changed {
            break;
        }
    }
    for at in 0..code.len() {
        for (word, &bits) in alive[at * words..][..words].iter().enumerate() {
            let mut bits = bits;
            while bits != 0 {
                extend(&mut found[64 * word + bits.trailing_zeros() as usize], at);
                bits &= bits - 1;
            }
        }
    }
    found
}
