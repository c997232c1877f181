//! The steady loop of a kernel of tensor cores: how long each part of an SM is busy with a trip, counted in its machine code.
//!
//! If all parts worked side by side, a trip would take as long as the busiest of them; if tensor cores waited for the rest of it
//! each time, as long as both. The truth lies between: FlashAttention-3 reaches the latter share of the peak (arXiv 2407.08608),
//! good products of matrices nearly the former. Latencies and barriers are not in it: that these are hidden is for the kernel
//! to see to.

use super::gpus::{Gpu, INTEGER_LANES, ISSUED, SHARED_BYTES, SPECIAL_LANES};
use crate::sass::Code;
use crate::sass::flow::{Flow, Trip};
use crate::sass::units::{Matrix, Unit, shared_bytes};
use serde::Serialize;
use std::collections::BTreeSet;

/// Lanes of a warp.
const LANES: f64 = 32.0;
/// Warps of a producer's warpgroup: `setmaxnreg` is for whole warpgroups (PTX ISA).
const PRODUCERS: u32 = 4;

/// A trip of all warps of a CTA that multiply, in cycles of an SM.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Steady {
    /// Warps that multiply.
    pub warps: u32,
    /// Operations of their matrix instructions.
    pub flops: u64,
    /// Tensor cores (T).
    pub tensor: f64,
    /// Approximate functions (X).
    pub special: f64,
    /// Additions and multiplications in f32 (F).
    pub float: f64,
    /// Integers, comparisons, conversions (A).
    pub integer: f64,
    /// Issuing instructions of all kinds (I).
    pub issue: f64,
    /// Shared memory, conflicts among it (S).
    pub shared: f64,
    /// Passes over the banks of shared memory for each that would do without conflicts.
    pub conflicts: f64,
    /// Names of instructions whose unit is not known: they count as issued alone.
    pub unknown: BTreeSet<String>,
    /// Instructions of a trip of the warp that copies for the others, where one does.
    pub producer: Option<usize>,
}

impl Steady {
    /// Counts a kernel of so many threads a CTA. `conflicts` is as in [`Steady::conflicts`]. `None` without a loop of matrix
    /// instructions.
    pub fn of(code: &Code, threads: u32, conflicts: f64, gpu: &Gpu) -> Option<Steady> {
        let flow = Flow::of(code);
        let producer = flow.producer().map(|trip| trip.len());
        let all = threads.div_ceil(32);
        let warps = if producer.is_some() { all.saturating_sub(PRODUCERS).max(1) } else { all };
        Some(Steady { producer, ..count(&flow.steady()?, warps, conflicts, gpu) })
    }

    /// Share of the peak if tensor cores wait for all else: `T / (T + max(X, F, A, I))`.
    pub fn serial(&self) -> f64 {
        let Steady { tensor, special, float, integer, issue, .. } = *self;
        tensor / (tensor + special.max(float).max(integer).max(issue))
    }

    /// Share of the peak if nothing waits: `T / max(T, X, F, A, I, S)`.
    pub fn overlapped(&self) -> f64 {
        let Steady { tensor, special, float, integer, issue, shared, .. } = *self;
        tensor / tensor.max(special).max(float).max(integer).max(issue).max(shared)
    }
}

fn count(trip: &Trip, warps: u32, conflicts: f64, gpu: &Gpu) -> Steady {
    let of_all = f64::from(warps);
    let lanes =
        |unit: Unit| LANES * of_all * trip.iter().filter(|i| Unit::of(i) == Some(unit)).count() as f64;
    let matrices = || trip.iter().filter_map(|i| Matrix::of(i));
    let of_warp = |matrix: Matrix| {
        matrix.flops_of_16_bits() as f64 / matrix.warps as f64 / gpu.tensor_flops(matrix.warps)
    };
    let unknown = trip.iter().filter(|i| Unit::of(i).is_none()).map(|i| i.name().to_string());
    Steady {
        warps,
        flops: matrices().map(|matrix| matrix.flops() / matrix.warps).sum::<u64>() * u64::from(warps),
        tensor: of_all * matrices().map(of_warp).sum::<f64>(),
        special: lanes(Unit::Special) / SPECIAL_LANES,
        float: lanes(Unit::Float) / gpu.float_lanes,
        integer: lanes(Unit::Integer) / INTEGER_LANES,
        issue: of_all * trip.len() as f64 / ISSUED,
        shared: of_all * trip.iter().map(|i| shared_bytes(i)).sum::<u64>() as f64 / SHARED_BYTES * conflicts,
        conflicts,
        unknown: unknown.collect(),
        producer: None,
    }
}
