//! How long a launch takes on a GPU that is not here.
//!
//! A kernel of tensor cores takes as long as the CTAs of the fullest SM: what these execute, padding and masked keys among it, at
//! the share of the peak that the steady loop has, which lies between two ([`Steady::serial`], [`Steady::overlapped`]). All else
//! takes as long as its FLOPs by FMA. Nothing is faster than its bytes; what these limit takes a launch more, since nothing hides
//! its beginning and end.

use super::gpus::Gpu;
use super::steady::Steady;
use ir::families::attention::Shape;
use ir::families::gpu::{AttentionTile, ProductTile};
use ir::plan::Cost;
use serde::Serialize;

/// Seconds of a launch in a captured graph.
pub const LAUNCH_SECONDS: f64 = 1.3e-6;

/// What a launch of a kernel of tensor cores does.
#[derive(Clone, Debug, PartialEq)]
pub struct Problem {
    /// FLOPs without which there is no result.
    pub flops: u64,
    /// Bytes that must be moved, each once.
    pub bytes: u64,
    /// FLOPs of the turns that are done, a list for each loop over turns.
    pub turns: Vec<Vec<u64>>,
}

impl Problem {
    /// Products of `m` rows with weights of depth `k`: columns of so many streams, one segment after another.
    pub fn product(
        [m, k]: [usize; 2],
        segments: &[(usize, usize)],
        bytes: u64,
        tile: ProductTile,
    ) -> Problem {
        let ProductTile { rows, columns, depth, band } = tile;
        let turns = segments.iter().map(|&(n, streams)| {
            let of_tile = (2 * rows * columns * streams * k.next_multiple_of(depth)) as u64;
            let of_band = band * n.div_ceil(columns);
            let row = |turn: usize| (turn / of_band * band + turn % of_band % band) * rows;
            let turns = 0..m.div_ceil(band * rows) * of_band;
            turns.map(|turn| if row(turn) < m { of_tile } else { 0 }).collect()
        });
        let all: usize = segments.iter().map(|(n, streams)| n * streams).sum();
        Problem { flops: 2 * (m * k * all) as u64, bytes, turns: turns.collect() }
    }

    /// Causal attention of `tokens` behind `past` others; the heads that share keys are rows beside each other. Unless keys are
    /// split, the last rows, which see the most, begin first.
    pub fn attention(shape: &Shape, [tokens, past]: [usize; 2], bytes: u64, tile: AttentionTile) -> Problem {
        let Shape { per_kv, kv_heads, d, slots, .. } = *shape;
        let AttentionTile { rows: bm, keys, split } = tile;
        let rows = tokens * per_kv;
        let step = (4 * bm * keys * d.next_multiple_of(16)) as u64;
        // Steps of the keys that a tile's last row sees.
        let seen = |tile: usize| (past + (rows.min((tile + 1) * bm) - 1) / per_kv) / keys + 1;
        let tiles = 0..rows.div_ceil(bm);
        let turns = match split.checked_div(keys) {
            None | Some(0) => tiles.rev().flat_map(|tile| vec![step * seen(tile) as u64; kv_heads]).collect(),
            Some(steps) => {
                let splits = slots.div_ceil(split);
                let of_split =
                    |tile: usize, at: usize| seen(tile).saturating_sub(at * steps).min(steps) as u64;
                let of_tile =
                    |tile: usize| (0..splits).map(|at| step * of_split(tile, at)).collect::<Vec<_>>();
                tiles.flat_map(|tile| of_tile(tile).repeat(kv_heads)).collect()
            }
        };
        let pairs: usize = (past + 1..=past + tokens).sum();
        Problem { flops: (4 * d * per_kv * kv_heads * pairs) as u64, bytes, turns: vec![turns] }
    }

    /// What each CTA does if there are `most` at most. As the run time launches them: turns are dealt out to CTAs in order, one
    /// loop's behind the other's.
    fn ctas(&self, most: usize) -> Vec<u64> {
        let turns = self.turns.concat();
        let count = turns.len().min(most);
        (0..count).map(|cta| turns.iter().skip(cta).step_by(count).sum()).collect()
    }

    /// FLOPs of the result for each that the SMs could do until the fullest of them is done, if each holds `resident` CTAs: 1 if
    /// none is done beyond edges and none idles.
    pub fn tile_efficiency(&self, gpu: &Gpu, resident: u32, most: u32) -> f64 {
        let sms = gpu.sms as usize;
        let fullest = fullest(&self.ctas(most as usize), sms, resident as usize);
        self.flops as f64 / (sms as f64 * fullest as f64)
    }
}

/// What the fullest SM has to do. First each gets `resident` CTAs in turn; then the next goes to whichever has had least (list
/// scheduling: Graham 1969), as it is the first that is done with one.
fn fullest(ctas: &[u64], sms: usize, resident: usize) -> u64 {
    let mut loads = vec![0; sms];
    for (number, cta) in ctas.iter().enumerate() {
        let least = || (0..sms).min_by_key(|&sm| loads[sm]).unwrap_or(0);
        let sm = if number < sms * resident { number % sms } else { least() };
        loads[sm] += cta;
    }
    loads.into_iter().max().unwrap_or(0)
}

/// What a launch cannot be faster than.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Limit {
    /// Tensor cores, with what they wait for.
    Tensor,
    /// Additions and multiplications in f32.
    Float,
    /// Memory.
    Memory,
}

impl Limit {
    /// Name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Limit::Tensor => "tensor",
            Limit::Float => "f32",
            Limit::Memory => "memory",
        }
    }
}

/// How long a launch takes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Prediction {
    /// Seconds at the higher of the two shares of the peak.
    pub least_s: f64,
    /// Seconds at the lower. For kernels without tensor cores as the least: nothing is known of what they wait for.
    pub most_s: f64,
    /// What limits the former.
    pub limit: Limit,
    /// As [`Problem::tile_efficiency`].
    pub tile_efficiency: Option<f64>,
}

impl Prediction {
    /// Of a kernel of tensor cores.
    pub fn tensor(problem: &Problem, steady: &Steady, gpu: &Gpu, resident: u32, most: u32) -> Prediction {
        let efficiency = problem.tile_efficiency(gpu, resident, most);
        // FLOPs a cycle in this loop's dtype.
        let peak = f64::from(gpu.sms) * gpu.clock_hz * steady.flops as f64 / steady.tensor;
        let busy = problem.flops as f64 / (peak * efficiency);
        let (overlapped, serial) = (steady.overlapped(), steady.serial());
        let range = [busy / overlapped.max(serial), busy / overlapped.min(serial)];
        Prediction { tile_efficiency: Some(efficiency), ..bounded(range, problem.bytes, Limit::Tensor, gpu) }
    }

    /// Of any other kernel.
    pub fn other(cost: Cost, gpu: &Gpu) -> Prediction {
        let busy = cost.flops as f64 / (2.0 * gpu.float_lanes * f64::from(gpu.sms) * gpu.clock_hz);
        bounded([busy, busy], cost.bytes, Limit::Float, gpu)
    }
}

fn bounded([least, most]: [f64; 2], bytes: u64, limit: Limit, gpu: &Gpu) -> Prediction {
    let floor = bytes as f64 / gpu.bytes_per_s;
    let (limit, launch) = if floor >= least { (Limit::Memory, LAUNCH_SECONDS) } else { (limit, 0.0) };
    Prediction {
        least_s: least.max(floor) + launch,
        most_s: most.max(floor) + launch,
        limit,
        tile_efficiency: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ir::DType;

    const A100: &Gpu = &super::super::gpus::GPUS[0];

    const TILE: ProductTile = ProductTile { rows: 128, columns: 128, depth: 32, band: 1 };

    #[test]
    fn whole_tiles_on_whole_sms_waste_nothing() {
        let rows = 128 * A100.sms as usize;
        let problem = Problem::product([rows, 4096], &[(128, 1)], 0, TILE);
        assert_eq!(problem.tile_efficiency(A100, 1, u32::MAX), 1.0);
        // Half a tile of rows, and one CTA more than there are SMs.
        let problem = Problem::product([64, 4096], &[(rows, 1)], 0, TILE);
        assert_eq!(problem.tile_efficiency(A100, 1, u32::MAX), 0.5);
        let problem = Problem::product([128, 4096], &[(rows + 128, 1)], 0, TILE);
        assert!((problem.tile_efficiency(A100, 1, u32::MAX) - 109.0 / 216.0).abs() < 1e-9);
        // Bands of four rows of tiles, of which one is there.
        let problem = Problem::product([128, 4096], &[(256, 1)], 0, ProductTile { band: 4, ..TILE });
        let turn = 2 * 128 * 128 * 4096;
        assert_eq!(problem.turns, [[turn, 0, 0, 0, turn, 0, 0, 0]]);
        // Two segments that each fill half of the SMs.
        let problem = Problem::product([128, 4096], &[(rows / 2, 1), (rows / 2, 1)], 0, TILE);
        assert_eq!(problem.tile_efficiency(A100, 1, u32::MAX), 1.0);
    }

    #[test]
    fn ctas_go_to_the_sm_that_has_least() {
        assert_eq!(fullest(&[5, 1, 1, 1, 1, 1], 2, 1), 5);
        // What is there together from the beginning is dealt out in turn.
        assert_eq!(fullest(&[5, 1, 1, 1, 1, 1], 2, 3), 7);
        assert_eq!(fullest(&[], 2, 1), 0);
    }

    /// Causal attention visits half of all keys and the diagonal's tiles.
    #[test]
    fn attention_executes_whole_tiles() {
        let steps = ir::dim::Dim::from(512);
        let slots = 1 << 14;
        let shape = Shape { steps, per_kv: 1, kv_heads: 16, d: 128, slots, page: slots, dtype: DType::BF16 };
        let problem =
            Problem::attention(&shape, [1 << 14, 0], 0, AttentionTile { rows: 64, keys: 64, split: 0 });
        let (tiles, of_tile) = (256, 4 * 64 * 64 * 128);
        assert_eq!(problem.turns[0].iter().sum::<u64>(), 16 * of_tile * tiles * (tiles + 1) / 2);
        assert!(problem.turns[0].is_sorted_by(|a, b| a >= b));
        let useful = 4 * 128 * 16 * (1 << 14) * ((1 << 14) + 1) / 2;
        assert_eq!(problem.flops, useful);
        // One token behind 300 others: two splits that it sees, and those that nobody does.
        let tile = AttentionTile { rows: 16, keys: 64, split: 256 };
        let problem = Problem::attention(&Shape { kv_heads: 1, slots: 1024, ..shape }, [1, 300], 0, tile);
        let step = 4 * 16 * 64 * 128;
        assert_eq!(problem.turns, [[4 * step, step, 0, 0]]);
    }

    #[test]
    fn nothing_is_faster_than_its_bytes() {
        let slow = Prediction::other(Cost { flops: 1, bytes: 2_039_000_000 }, A100);
        assert_eq!((slow.limit, slow.least_s), (Limit::Memory, 1e-3 + LAUNCH_SECONDS));
        let busy = Prediction::other(Cost { flops: 1 << 40, bytes: 1 }, A100);
        assert_eq!(busy.limit, Limit::Float);
        assert!(busy.least_s > 0.05 && busy.most_s == busy.least_s);
    }
}
