//! `wgmma`: products of a warpgroup whose operands lie in shared memory, and registers that are in flight meanwhile.
//!
//! Source: PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions": "Register Fragments and Shared Memory Matrix Layouts",
//! "Matrix Descriptor Format", "Strides"; for matrices without swizzle the canonical layouts of CUTLASS
//! (`cute/atom/mma_traits_sm90_gmma.hpp`), which say the same in one line each.
//!
//! The four warps of a warpgroup run it together. Values are computed at once: who touches a register or a byte of it
//! before `wgmma.wait_group` has retired its group could tell, and is reported. So is a register that was touched since the last
//! `wgmma.fence`, other than by a `wgmma` of the same shape that adds to it.

use super::access::{Checked, Reach, Run, lanes, of_warp};
use super::arithmetic::{LANES, Lanes, Narrow};
use super::matrix::{Adding, K_BYTES, Left, Right, WGMMA_BLOCK, multiply};
use super::program::Step;
use super::race::{How, Proxy, Stamp};
use super::warp::Warp;
use super::{Fault, Sums};
use crate::ptx::{MatrixA, MatrixType, Reg, Space, Wgmma};
use crate::tensor_map::Swizzle;

/// Warps of a warpgroup.
pub const WARPS: usize = 4;
/// Rows of A.
const M: usize = 64;

/// What is known of a register that a `wgmma` has.
#[derive(Clone, Copy, Debug, Default)]
struct Fragment {
    /// The last group that reads it as A, from 1.
    as_a: u32,
    /// The last group that adds to it.
    as_d: u32,
    /// The columns of that one.
    columns: u32,
    /// After how many fences another instruction touched it last, from 1.
    touched: u32,
}

/// The registers of a warp that `wgmma` has, and its groups.
#[derive(Debug, Default)]
pub struct Fragments {
    /// By index; empty before the first.
    known: Vec<Fragment>,
    /// `wgmma.fence`.
    fences: u32,
    /// Groups that are closed.
    closed: u32,
    /// Groups that are retired.
    retired: u32,
}

impl Fragments {
    fn at(&mut self, reg: Reg) -> &mut Fragment {
        let index = usize::from(reg.index);
        if self.known.len() <= index {
            self.known.resize(index + 1, Fragment::default());
        }
        &mut self.known[index]
    }

    /// Another instruction touches the register. Says whether it is in flight.
    pub fn touch(&mut self, reg: Reg) -> bool {
        let (fences, retired) = (self.fences, self.retired);
        let fragment = self.at(reg);
        fragment.touched = fences + 1;
        fragment.as_a.max(fragment.as_d) > retired
    }

    /// `wgmma.fence`.
    pub fn fence(&mut self) {
        self.fences += 1;
    }

    /// A `wgmma` with so many columns has these registers.
    fn issue(&mut self, wgmma: &Wgmma) -> Result<(), &'static str> {
        if self.fences == 0 {
            return Err("no wgmma.fence comes before");
        }
        let (fences, group, retired) = (self.fences, self.closed + 1, self.retired);
        let a: &[Reg] = if let MatrixA::Registers(a) = &wgmma.a { a } else { &[] };
        for (&reg, is_a) in a.iter().map(|reg| (reg, true)).chain(wgmma.d.iter().map(|reg| (reg, false))) {
            let fragment = self.at(reg);
            if fragment.touched > fences {
                return Err("its registers were touched since the last wgmma.fence");
            }
            let added = fragment.as_d > retired && (is_a || fragment.columns != wgmma.n);
            if added || !is_a && fragment.as_a > retired {
                return Err("its registers are in flight in a wgmma of another shape");
            }
            if is_a {
                fragment.as_a = group;
            } else {
                (fragment.as_d, fragment.columns) = (group, wgmma.n);
            }
        }
        Ok(())
    }
}

/// A matrix in shared memory ("Matrix Descriptor Format").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Descriptor {
    begin: u64,
    /// "Leading dimension byte offset".
    leading: u64,
    /// "Stride dimension byte offset".
    stride: u64,
    swizzle: Swizzle,
}

impl Descriptor {
    fn new(bits: u64) -> Result<Descriptor, &'static str> {
        let field = |at: u32| (bits >> at & 0x3FFF) << 4;
        if bits >> 49 & 7 != 0 {
            return Err("a base offset in a descriptor is not supported: patterns begin where addresses do");
        }
        let swizzles = [Swizzle::None, Swizzle::Bytes128, Swizzle::Bytes64, Swizzle::Bytes32];
        let swizzle = swizzles[(bits >> 62) as usize];
        Ok(Descriptor { begin: field(0), leading: field(16), stride: field(32), swizzle })
    }

    /// Where 16 bytes of a row lie, `chunk` of its [`K_BYTES`].
    fn of_row(&self, row: u64, chunk: u64) -> u64 {
        let Descriptor { begin, leading, stride, swizzle } = *self;
        let next = if swizzle == Swizzle::None { leading } else { 16 };
        swizzle.place(begin + row / 8 * stride + row % 8 * swizzle.span() + chunk * next)
    }

    /// Where the elements of rows `row` to `row + 8` lie at `k`, if rows are innermost. They have 16 bits.
    fn of_k(&self, k: u64, row: u64) -> u64 {
        let Descriptor { begin, leading, stride, swizzle } = *self;
        let (span, rows) = (swizzle.span(), swizzle.span() / 2);
        let (of_rows, of_k) = if swizzle == Swizzle::None { (stride, leading) } else { (leading, stride) };
        swizzle.place(begin + row / rows * of_rows + k / 8 * of_k + k % 8 * span + 2 * (row % rows))
    }
}

/// Rows of a matrix, each with its bytes of k.
type Rows = Vec<[u8; K_BYTES]>;

/// Reads a matrix; warp `w` of the group answers for the `w`-th quarter of its rows.
fn gather(
    warps: &[Warp],
    step: &Step,
    descriptor: Descriptor,
    (rows, trans): (usize, bool),
    reach: &mut Reach<'_>,
) -> Checked<Rows> {
    let mut found = vec![[0; K_BYTES]; rows];
    let part = |warp: &Warp| {
        let stamp = Some(Stamp::wgmma(&warp.knowledge, warp.fragments.closed));
        How { whole: true, proxy: Proxy::Async, stamp, pc: step.pc, ..How::default() }
    };
    let parts: Vec<How> = warps.iter().map(part).collect();
    let mut read = |row: usize, address: u64| -> Checked<[u8; 16]> {
        let number = row * WARPS / rows;
        let run = Run::one(0, address);
        let spot = reach.spot(Space::Shared, run, 16)?;
        reach.watch(&spot, run, 16, parts[number], &warps[number].knowledge)?;
        Ok(reach.read(&spot, run, 16)?.try_into().expect("16 bytes"))
    };
    if trans {
        for k in 0..K_BYTES / 2 {
            for row in (0..rows).step_by(8) {
                let eight = read(row, descriptor.of_k(k as u64, row as u64))?;
                for (row, element) in found[row..row + 8].iter_mut().zip(eight.chunks_exact(2)) {
                    row[2 * k..2 * k + 2].copy_from_slice(element);
                }
            }
        }
    } else {
        for (row, found) in found.iter_mut().enumerate() {
            for (chunk, to) in found.chunks_exact_mut(16).enumerate() {
                to.copy_from_slice(&read(row, descriptor.of_row(row as u64, chunk as u64))?);
            }
        }
    }
    reach.counts.moved(Space::Shared, false, (rows * K_BYTES) as u64);
    Ok(found)
}

/// The four warps of a warpgroup run a `wgmma`.
pub fn run(warps: &mut [Warp], step: &Step, wgmma: &Wgmma, reach: &mut Reach<'_>, sums: Sums) -> Checked<()> {
    let wrong = |problem: &str| of_warp(Fault::Wgmma { problem: problem.to_string() });
    let (n, types) = (wgmma.n as usize, wgmma.types);
    let adds = warps[0].uniform_predicate(wgmma.scale_d);
    let adds = adds.filter(|_| warps.iter().all(|warp| warp.uniform_predicate(wgmma.scale_d) == adds));
    let adds = adds.ok_or_else(|| wrong("its lanes disagree on whether it adds"))?;
    for warp in warps.iter_mut() {
        warp.fragments.issue(wgmma).map_err(wrong)?;
    }
    let descriptor = |reg: Reg| {
        let bits = warps[0].wide(reg)[0];
        let all = warps.iter().all(|warp| warp.wide(reg).iter().all(|&other| other == bits));
        if all { Descriptor::new(bits) } else { Err("its lanes disagree on a descriptor") }.map_err(wrong)
    };
    let b = gather(warps, step, descriptor(wgmma.b)?, (n, wgmma.trans_b), reach)?;
    // Of 8 columns each.
    let rights: Vec<Right> =
        b.as_chunks().0.iter().map(|columns| Right::of_columns(types.1, columns)).collect();
    let a = match &wgmma.a {
        MatrixA::Registers(_) => None,
        MatrixA::Shared(reg, trans) => Some(gather(warps, step, descriptor(*reg)?, (M, *trans), reach)?),
    };
    let k = if matches!(types.0, MatrixType::Bf16 | MatrixType::F16) { K_BYTES / 2 } else { K_BYTES };
    reach.counts.matrix_macs += (M * n * k) as u64;
    for (number, warp) in warps.iter_mut().enumerate() {
        let mut left = match (&wgmma.a, &a) {
            (MatrixA::Registers(registers), _) => {
                let a: [&Narrow; 4] = std::array::from_fn(|at| warp.narrow(registers[at]));
                Left::new(types.0, &a)
            }
            (MatrixA::Shared(..), rows) => {
                let rows = rows.as_ref().expect("it was gathered");
                Left::of_rows(types.0, &rows.as_chunks().0[number])
            }
        };
        if wgmma.negate.0 != wgmma.negate.1 {
            left.negate();
        }
        let adding = Adding { narrow: false, satfinite: wgmma.satfinite, sums };
        for (right, registers) in rights.iter().zip(wgmma.d.chunks_exact(4)) {
            let mut c = [[0; LANES]; 4];
            if adds {
                for (c, &reg) in c.iter_mut().zip(registers) {
                    *c = *warp.defined_narrow(reg).ok_or_else(|| wrong("an accumulator is not defined"))?;
                }
            }
            let d = multiply::<WGMMA_BLOCK>(&left, right, adding, &c.each_ref());
            for (&reg, value) in registers.iter().zip(d) {
                warp.put(u32::MAX, reg, Lanes::Narrow(value));
            }
        }
    }
    Ok(())
}

impl Warp {
    /// An instruction that is no `wgmma` has registers of one.
    pub fn touch_fragments(&mut self, step: &Step, name: impl Fn(Reg) -> String) -> Checked<()> {
        for &(reg, text) in &step.fragments {
            if self.fragments.touch(reg) {
                let problem =
                    format!("{} is in flight: no wgmma.wait_group has retired its group", name(text));
                return Err(of_warp(Fault::Wgmma { problem }));
            }
        }
        Ok(())
    }

    /// `wgmma.commit_group`.
    pub fn commit_wgmma(&mut self) {
        self.fragments.closed += 1;
    }

    /// `wgmma.wait_group`.
    pub fn wait_wgmma(&mut self, active: u32, keep: u32) {
        let Some(retired) = self.fragments.closed.checked_sub(keep).filter(|&retired| retired > 0) else {
            return;
        };
        self.fragments.retired = self.fragments.retired.max(retired);
        let stamp = Stamp::part_of_wgmma(&self.knowledge, retired - 1);
        self.knowledge.learn_stamp(active, true, stamp);
    }

    /// What a predicate is in all lanes, if it is the same.
    fn uniform_predicate(&self, pred: crate::ptx::Pred) -> Option<bool> {
        let votes = lanes(u32::MAX).map(|lane| self.predicate(pred) >> lane & 1 == 1);
        let (first, mut others) = (self.predicate(pred) & 1 == 1, votes);
        others.all(|vote| vote == first).then_some(first)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn descriptor(swizzle: u64, leading: u64, stride: u64) -> Descriptor {
        Descriptor::new(1024 >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | swizzle << 62).unwrap()
    }

    /// Figures of the ISA, "Strides": which row and chunk comes after which.
    #[test]
    fn matrices_lie_as_the_isa_says() {
        // K-major, 128 bytes: 8 rows of 128 bytes, chunk `c` of row `r` at `c ^ r`; the next 8 rows a stride further.
        let d = descriptor(1, 16, 1024);
        assert_eq!(
            [d.of_row(0, 0), d.of_row(0, 1), d.of_row(1, 0), d.of_row(1, 1)],
            [1024, 1040, 1168, 1152]
        );
        assert_eq!(
            [d.of_row(7, 0), d.of_row(8, 0), d.of_row(63, 1)],
            [1024 + 7 * 128 + 7 * 16, 2048, 8 * 1024 + 7 * 128 + 6 * 16]
        );
        // 64 bytes: rows of 64 bytes, chunks change with every second row; 32 bytes: with every fourth.
        let d = descriptor(2, 16, 512);
        assert_eq!(
            [d.of_row(1, 0), d.of_row(2, 0), d.of_row(2, 1), d.of_row(8, 0)],
            [1088, 1024 + 128 + 16, 1024 + 128, 1536]
        );
        let d = descriptor(3, 16, 256);
        assert_eq!(
            [d.of_row(3, 0), d.of_row(4, 0), d.of_row(4, 1), d.of_row(8, 1)],
            [1120, 1024 + 128 + 16, 1024 + 128, 1296]
        );
        // None: core matrices of 8 rows of 16 bytes, leading in k, stride in rows.
        let d = descriptor(0, 128, 256);
        assert_eq!(
            [d.of_row(1, 0), d.of_row(0, 1), d.of_row(8, 0), d.of_row(9, 1)],
            [1040, 1152, 1280, 1424]
        );
        // Rows innermost, 128 bytes: 64 rows at a k, 8 of k a pattern.
        let d = descriptor(1, 4096, 1024);
        assert_eq!(
            [d.of_k(0, 8), d.of_k(1, 0), d.of_k(8, 0), d.of_k(0, 64)],
            [1040, 1024 + 128 + 16, 2048, 5120]
        );
        let d = descriptor(2, 4096, 512);
        assert_eq!(
            [d.of_k(1, 0), d.of_k(2, 0), d.of_k(8, 0), d.of_k(0, 32)],
            [1088, 1024 + 128 + 16, 1536, 5120]
        );
        let d = descriptor(3, 4096, 256);
        assert_eq!(
            [d.of_k(1, 8), d.of_k(4, 0), d.of_k(8, 0), d.of_k(0, 16)],
            [1072, 1024 + 128 + 16, 1280, 5120]
        );
        let d = descriptor(0, 128, 256);
        assert_eq!([d.of_k(1, 0), d.of_k(8, 0), d.of_k(0, 8)], [1040, 1152, 1280]);
        assert!(Descriptor::new(1 << 49).is_err());
    }
}
