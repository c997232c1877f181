//! Which part of a streaming multiprocessor (SM) an instruction occupies, and for how much.
//!
//! Sources: *CUDA C++ Programming Guide*, "Arithmetic Instructions" (results of an SM a cycle), for what the parts are; *CUDA
//! Binary Utilities*, "Instruction Set Reference", for the names.

use super::Instruction;

/// A part of an SM that instructions wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Tensor cores: see [`Matrix`].
    Tensor,
    /// Approximate functions.
    Special,
    /// Addition, multiplication and both, in f32.
    Float,
    /// Integers, comparisons, selections, moves and conversions.
    Integer,
    /// Shared memory: see [`shared_bytes`].
    Shared,
    /// None that is counted: control, barriers, global memory, what a warp does once in the uniform datapath.
    Issue,
}

#[rustfmt::skip] // a table: a unit a row
const UNITS: [(Unit, &[&str]); 6] = [
    (Unit::Tensor,  &["HMMA", "IMMA", "HGMMA", "IGMMA", "QGMMA"]),
    (Unit::Special, &["MUFU"]),
    (Unit::Float,   &["FADD", "FMUL", "FFMA", "HADD2", "HMUL2", "HFMA2"]),
    (Unit::Integer, &[
        "FMNMX", "FSETP", "FSEL", "FSET", "FCHK", "HMNMX2", "HSETP2", "HSET2",
        "IADD3", "VIADD", "IMAD", "IABS", "IMNMX", "VIMNMX", "VIADDMNMX", "ISETP", "LEA", "LOP3", "SHF", "SEL", "PRMT", "SGXT", "BMSK",
        "BREV", "FLO", "POPC", "PLOP3", "P2R", "R2P", "MOV", "CS2R", "F2F", "F2FP", "F2I", "I2F", "I2FP", "FRND", "I2I",
    ]),
    (Unit::Shared,  &["LDS", "STS", "LDSM", "STSM", "LDGSTS", "ATOMS"]),
    (Unit::Issue,   &[
        "BRA", "CALL", "RET", "EXIT", "BRX", "BSSY", "BSYNC", "BREAK", "WARPSYNC", "NOP", "NANOSLEEP", "YIELD", "ELECT", "VOTE", "SHFL",
        "BAR", "DEPBAR", "LDGDEPBAR", "WARPGROUP", "SYNCS", "FENCE", "MEMBAR", "ERRBAR", "CCTL", "USETMAXREG", "ACQBULK", "PREEXIT",
        "LDG", "STG", "LDC", "ATOMG", "RED", "REDUX", "UTMALDG", "UTMASTG", "UTMACMDFLUSH", "UTMAPF", "UBLKCP", "S2R", "S2UR", "R2UR", "UR2UP",
        "ULDC", "UMOV", "UIADD3", "UIMAD", "ULEA", "ULOP3", "USHF", "USEL", "UISETP", "UPLOP3", "UPRMT", "USGXT", "UFLO", "UPOPC", "UP2UR", "R2B", "B2R",
    ]),
];

impl Unit {
    /// The unit of an instruction; `None` if it is not known.
    pub fn of(instruction: &Instruction) -> Option<Unit> {
        let name = instruction.name();
        UNITS.iter().find(|(_, names)| names.contains(&name)).map(|&(unit, _)| unit)
    }
}

/// A matrix instruction: `d[m, n] += a[m, k] b[k, n]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Matrix {
    /// Rows of the sum.
    pub m: u64,
    /// Its columns.
    pub n: u64,
    /// Terms of each element.
    pub k: u64,
    /// Warps that do it together.
    pub warps: u64,
    /// Bits of an element of the operands.
    pub bits: u64,
}

impl Matrix {
    /// Reads the shape from names such as `HMMA.16816` and `HGMMA.64x128x16` (PTX ISA, "Matrix Shape"); `None` for all that is
    /// no matrix instruction.
    pub fn of(instruction: &Instruction) -> Option<Matrix> {
        let shape = instruction.modifiers().nth(1)?;
        let (sizes, warps) = match instruction.name() {
            "HMMA" | "IMMA" => (vec!["16", "8", shape.strip_prefix("168")?], 1),
            "HGMMA" | "IGMMA" | "QGMMA" => (shape.split('x').collect(), 4),
            _ => return None,
        };
        // More than 256 has none of them.
        let size = |at: usize| sizes.get(at)?.parse().ok().filter(|size| (1..=256).contains(size));
        let bits = match instruction.name() {
            _ if instruction.has("TF32") => 32,
            "HMMA" | "HGMMA" => 16,
            _ => 8,
        };
        Some(Matrix { m: size(0)?, n: size(1)?, k: size(2)?, warps, bits })
    }

    /// Operations; a multiply-add is two.
    pub fn flops(&self) -> u64 {
        2 * self.m * self.n * self.k
    }

    /// Operations in 16 bits that take as long: tensor cores do twice as many in half as many bits.
    pub fn flops_of_16_bits(&self) -> u64 {
        self.flops() * self.bits / 16
    }
}

/// Bytes that an instruction moves between registers or global memory and shared memory, for each warp. A warp occupies the
/// memory for 128 bytes at least. Of a warpgroup's product they are the operands that lie there: `b`, and `a` if it has a
/// descriptor too.
pub fn shared_bytes(instruction: &Instruction) -> u64 {
    let lane = || match instruction.modifiers().find_map(|part| part.parse().ok()) {
        Some(bits @ (32 | 64 | 128)) => bits / 8,
        _ => 4_u64,
    };
    match (Unit::of(instruction), Matrix::of(instruction)) {
        (Some(Unit::Shared), _) => match instruction.name() {
            // `LDSM.16.M88.4`: matrices of 8 by 8 by 16 bits.
            "LDSM" | "STSM" => {
                128 * instruction.modifiers().last().and_then(|last| last.parse().ok()).unwrap_or(1).min(4)
            }
            _ => 32 * lane(),
        },
        (Some(Unit::Tensor), Some(matrix)) => {
            let Matrix { m, n, k, warps, bits } = matrix;
            let described = instruction.operands.matches("gdesc[").count();
            let a = instruction.operands().nth(1).is_some_and(|a| a.starts_with("gdesc["));
            // One descriptor register names both: `HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], R24`.
            let elements = match (described, a) {
                (0, _) => 0,
                (_, true) => m * k + k * n,
                (_, false) => k * n,
            };
            elements * bits / 8 / warps
        }
        _ => 0,
    }
}
