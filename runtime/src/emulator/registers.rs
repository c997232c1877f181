//! `setmaxnreg`: registers that warps give back to their CTA and take from it.
//!
//! Source: PTX ISA, "setmaxnreg". The CTA has what its warps had in the beginning; one that asks for more than there is waits.

use super::Fault;
use crate::ptx::Kernel;

/// Registers of a multiprocessor (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability").
const REGISTERS: u32 = 64 << 10;
/// The most that a thread has.
const MOST: u32 = 255;
/// What registers of a thread are given in.
const UNIT: u32 = 8;

/// Registers of a CTA.
#[derive(Debug)]
pub struct Registers {
    /// Of each thread, by warp; `None` where the kernel does not say what it begins with.
    of: Option<Vec<u32>>,
    /// Those that nobody has, counted as of the threads of one warp.
    free: u32,
    /// Some were given back.
    pub given: bool,
}

impl Registers {
    /// Of a CTA with so many warps. It begins with `.maxnreg`, or with as many as the threads of
    /// `.minnctapersm` CTAs of `.maxntid` may have.
    pub fn new(kernel: &Kernel, warps: u32) -> Registers {
        let of_threads = |threads: u32| (REGISTERS / threads.max(1) / UNIT * UNIT).min(MOST);
        let together = kernel.min_ctas.unwrap_or(1).max(1);
        let begin = kernel.max_registers.or(kernel.max_threads.map(|threads| of_threads(threads * together)));
        Registers { of: begin.map(|begin| vec![begin; warps as usize]), free: 0, given: false }
    }

    /// The warps from `first` on of a warpgroup change what they have. Says whether they may go on.
    pub fn set(&mut self, first: usize, warps: usize, increase: bool, asked: u32) -> Result<bool, Fault> {
        let wrong = |problem: String| Err(Fault::Registers { problem });
        let Some(of) = &mut self.of else {
            return wrong("the kernel has no .maxntid and no .maxnreg, so it is ignored".into());
        };
        let of = &mut of[first..first + warps];
        let has = of[0];
        if increase && asked < has || !increase && asked > has {
            return wrong(format!("a thread has {has} registers, it cannot be made {asked} by that"));
        }
        let more = (asked.max(has) - has) * warps as u32;
        if more > self.free {
            return Ok(false);
        }
        self.free = self.free - more + (has - asked.min(has)) * warps as u32;
        self.given |= asked < has;
        of.fill(asked);
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ptx::Module;

    #[test]
    fn registers_come_from_those_who_gave_them() {
        let text = ".version 8.0\n.target sm_90a\n.entry k() .maxntid 384 { ret; }";
        let kernel = &Module::parse(text).unwrap().kernels[0];
        let registers = || Registers::new(kernel, 12);
        // 168 at first: 24 and twice 240 are as many, 32 and twice 240 are not.
        let mut r = registers();
        assert_eq!(r.set(4, 4, true, 240), Ok(false));
        assert_eq!(r.set(0, 4, false, 24), Ok(true));
        assert!(r.given);
        assert_eq!((r.set(4, 4, true, 240), r.set(8, 4, true, 240)), (Ok(true), Ok(true)));
        let mut r = registers();
        assert_eq!(r.set(0, 4, false, 32), Ok(true));
        assert_eq!((r.set(4, 4, true, 240), r.set(8, 4, true, 240)), (Ok(true), Ok(false)));
        assert!(r.set(0, 4, false, 40).is_err() && r.set(4, 4, true, 232).is_err());
        let unknown = &Module::parse(&text.replace(".maxntid 384", "")).unwrap().kernels[0];
        assert!(Registers::new(unknown, 4).set(0, 4, true, 240).is_err());
    }
}
