//! What must, and must not, stand in the steady loop of a kernel.

use super::flow::{Flow, Trip};
use super::units::Matrix;
use super::{Code, Instruction};
use std::ops::Range;

/// What is wrong with a loop.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Breach {
    /// It is not there.
    #[error("{symbol}: found no {what}, expected one")]
    NoLoop {
        /// The kernel, as in PTX.
        symbol: String,
        /// The loop.
        what: &'static str,
    },
    /// It lacks what it is there for.
    #[error("found a loop without {name}, expected one with it")]
    Lacks {
        /// Name of an instruction.
        name: &'static str,
    },
    /// It does what others are to do.
    #[error("found `{found}` in a loop, expected none")]
    Has {
        /// The instruction.
        found: String,
    },
    /// Sums move between registers.
    #[error("found `{found}` in a loop, expected sums to stay where they are")]
    Moves {
        /// The instruction.
        found: String,
    },
    /// Tensor cores have nothing to do meanwhile.
    #[error(
        "found `{found}` with no product in flight, expected it between an HGMMA and the DEPBAR that retires it"
    )]
    Exposed {
        /// The instruction.
        found: String,
    },
}

/// A kernel whose warps are specialised (sm_90a): the consumers' loop multiplies, touches no memory but by descriptors and moves
/// no sum; the producer's copies by TMA.
///
/// # Errors
///
/// The first [`Breach`].
pub fn specialised(code: &Code) -> Result<(), Breach> {
    let flow = Flow::of(code);
    let missing = |what| Breach::NoLoop { symbol: code.symbol.clone(), what };
    let consumer = flow.steady().ok_or_else(|| missing("loop with matrix instructions"))?;
    holds(&consumer, &["HGMMA"])?;
    lacks(&consumer, &["LDG", "LDS", "LDSM", "STS"])?;
    keeps_sums(&consumer)?;
    flow.producer().map(drop).ok_or_else(|| missing("loop with UTMALDG and without matrix instructions"))
}

/// A kernel for sm_80: its loop copies asynchronously, loads matrices and multiplies.
///
/// # Errors
///
/// The first [`Breach`].
pub fn pipelined(code: &Code) -> Result<(), Breach> {
    let missing = Breach::NoLoop { symbol: code.symbol.clone(), what: "loop with matrix instructions" };
    holds(&Flow::of(code).steady().ok_or(missing)?, &["HMMA", "LDSM", "LDGSTS"])
}

/// Each of these stands in the loop.
///
/// # Errors
///
/// [`Breach::Lacks`].
pub fn holds(trip: &Trip, names: &[&'static str]) -> Result<(), Breach> {
    let missing = names.iter().find(|&&name| !trip.iter().any(|i| i.name() == name));
    missing.map_or(Ok(()), |&name| Err(Breach::Lacks { name }))
}

/// None of these stands in the loop.
///
/// # Errors
///
/// [`Breach::Has`].
pub fn lacks(trip: &Trip, names: &[&'static str]) -> Result<(), Breach> {
    let found = trip.iter().find(|i| names.contains(&i.name()));
    found.map_or(Ok(()), |found| Err(Breach::Has { found: found.to_string() }))
}

/// Sums of warpgroups that go from trip to trip stay in their registers.
///
/// # Errors
///
/// [`Breach::Moves`].
pub fn keeps_sums(trip: &Trip) -> Result<(), Breach> {
    let sums = |i: &Instruction| {
        let first = register(i.operands().next()?)?;
        // A thread has a 128th of 64 rows, in f32.
        let matrix = Matrix::of(i).filter(|matrix| matrix.warps > 1)?;
        Some(first..first + (matrix.m * matrix.n / 128) as u32)
    };
    let products: Vec<(&Instruction, Range<u32>)> =
        trip.iter().filter_map(|i| Some((*i, sums(i)?))).collect();
    // Sums that begin anew in each trip are free once they were read.
    let is_new =
        |first| products.iter().any(|(i, sums)| sums.start == first && i.operands().any(|o| o == "RZ"));
    let kept: Vec<&Range<u32>> =
        products.iter().map(|(_, sums)| sums).filter(|sums| !is_new(sums.start)).collect();
    let is_kept =
        |operand: &str| register(operand).is_some_and(|r| kept.iter().any(|sums| sums.contains(&r)));
    let is_move = |i: &&&Instruction| i.name() == "MOV" || i.opcode.starts_with("IMAD.MOV");
    let found = trip.iter().filter(is_move).find(|i| i.operands().any(is_kept));
    found.map_or(Ok(()), |found| Err(Breach::Moves { found: found.to_string() }))
}

/// While exponentials are computed, a product is in flight.
///
/// # Errors
///
/// [`Breach::Exposed`].
pub fn hides_exponentials(trip: &Trip) -> Result<(), Breach> {
    // Groups that were issued; the last may be still open.
    let (mut closed, mut open) = (0, false);
    // What a trip leaves in flight the next one begins with.
    for turn in 0..2 {
        for instruction in trip {
            match instruction.name() {
                "HGMMA" => {
                    let last = instruction.operands().any(|operand| operand == "gsb0");
                    (closed, open) = if last { (closed + 1, false) } else { (closed, true) };
                }
                "WARPGROUP" if instruction.has("DEPBAR") => {
                    let left = instruction.operands().nth(1).and_then(|left| left.strip_prefix("0x"));
                    let left = left.and_then(|left| u32::from_str_radix(left, 16).ok()).unwrap_or(0);
                    closed = closed.min(left);
                }
                "MUFU" if instruction.has("EX2") && turn > 0 && closed == 0 && !open => {
                    return Err(Breach::Exposed { found: instruction.to_string() });
                }
                _ => {}
            }
        }
    }
    Ok(())
}

/// The number of a register, such as `R24` or `R24.reuse`; a thread has at most 255.
fn register(operand: &str) -> Option<u32> {
    operand.strip_prefix('R')?.split('.').next()?.parse().ok().filter(|&number| number < 255)
}
