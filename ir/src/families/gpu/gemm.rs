//! Products of rows: `y[t, n] = epilogue(sum over k of a[t, k] * w[n, k])`.
//!
//! A CTA makes a tile of `bm` rows by `bn` columns of each stream. Tiles of `a` and `w`, 128 bytes deep, pass through a ring of
//! `stages` in swizzled memory: while one is multiplied, the next are copied. Neither the eight rows that a matrix load reads
//! nor the chunks that eight threads copy share a bank. Sums stay in registers, in the layout of [`Expr::Mma`], and the
//! epilogue is computed there. bf16 is multiplied by `mma`; f32 by FMA with the same layout.

use super::{ProductTile, chunk, copies, pack_of, panel};
use crate::dtype::DType;
use crate::families::access::Lowering;
use crate::families::dot::{DotGroup, Place, Segment, outputs, stored_left};
use crate::families::{GroupView, LowerError, Lowered};
use crate::kernel::warpgroup::ROW_BYTES;
use crate::kernel::{BufferId, Builder, Expr, RegId, Type, WARP};
use crate::op::Compare;
use crate::schedule::{self, Field};
use crate::target::Gpu;

/// Tile sizes of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// Rows of a CTA's tile.
    pub bm: usize,
    /// Columns of a CTA's tile, of each stream.
    pub bn: usize,
    /// Tiles in the ring.
    pub stages: usize,
    /// Warps along the rows.
    pub wm: usize,
    /// Warps along the columns.
    pub wn: usize,
}

impl Schedule {
    /// The fields, for text and tuning. None changes the order of a sum: `k` is taken in order, 16 by 16.
    pub fn fields(self) -> [Field; 5] {
        let Schedule { bm, bn, stages, wm, wn } = self;
        [("bm", bm), ("bn", bn), ("stages", stages), ("wm", wm), ("wn", wn)].map(|(name, value)| Field {
            name,
            value,
            numeric: false,
        })
    }

    /// Reads the text form.
    ///
    /// # Errors
    ///
    /// What does not fit, in words.
    pub fn parse(text: &str) -> Result<Schedule, String> {
        let mut fields = Schedule { bm: 0, bn: 0, stages: 0, wm: 0, wn: 0 }.fields();
        schedule::parse(text, &mut fields)?;
        let [bm, bn, stages, wm, wn] = fields.map(|f| f.value);
        if wm == 0 || wn == 0 || wm * wn > 32 {
            return Err("wm and wn must be at least 1, and wm * wn at most 32".to_string());
        }
        let multiple = |x: usize, of: usize| x > 0 && x <= 256 && x.is_multiple_of(of);
        if !multiple(bm, 16 * wm) || !multiple(bn, 16 * wn) {
            return Err("bm must be a multiple of 16 wm, bn of 16 wn, each at most 256".to_string());
        }
        if !(2..=8).contains(&stages) {
            return Err("stages must be 2 to 8".to_string());
        }
        Ok(Schedule { bm, bn, stages, wm, wn })
    }

    /// How a product is cut.
    pub fn tile(self) -> ProductTile {
        ProductTile { rows: self.bm, columns: self.bn, depth: panel(DType::BF16), band: 1 }
    }

    fn shared_bytes(self, streams: usize) -> usize {
        self.stages * (self.bm + streams * self.bn) * ROW_BYTES
    }

    /// Sums of a thread.
    fn sums(self, streams: usize) -> usize {
        streams * self.bm * self.bn / (self.wm * self.wn * usize::from(WARP))
    }

    /// Is there shared memory for eight warps? More registers an SM does not have for so many sums; with less, waits show.
    fn fills(self, streams: usize, gpu: &Gpu) -> bool {
        (8 / (self.wm * self.wn)).max(1) * self.shared_bytes(streams) <= gpu.shared_bytes
    }

    /// What the whole product costs on an A100, in a unit of its own: rounds of CTAs, by the time of a tile. That is what tensor
    /// cores take, or shared memory, if more: each warp reads its rows and columns, and copies bring each once.
    fn cost(self, rows: usize, segments: &[Segment]) -> usize {
        let Schedule { bm, bn, wm, wn, .. } = self;
        let across = segments.iter().map(|s| s.n().div_ceil(bn)).sum::<usize>();
        let streams = most_streams(segments);
        let shared = 16 * ((wn + 1) * bm + (wm + 1) * streams * bn);
        (rows.div_ceil(bm) * across).div_ceil(MULTIPROCESSORS) * shared.max(streams * bm * bn)
    }
}

/// Streaming multiprocessors of an A100, for choosing tiles.
const MULTIPROCESSORS: usize = 108;

/// Sums of a thread at most: half of its registers.
const MOST_SUMS: usize = 128;

fn most_streams(segments: &[Segment]) -> usize {
    segments.iter().map(|s| s.streams.len()).max().unwrap_or(1)
}

/// The legal space, the preferred first.
///
/// # Errors
///
/// As [`crate::families::dot::analyse`].
pub fn schedules(view: &GroupView<'_>, gpu: &Gpu) -> Result<Vec<String>, LowerError> {
    let group = crate::families::dot::analyse(view)?;
    let streams = most_streams(&group.segments);
    let most = view.graph.symbols.max()[0] as usize;
    // A warp of the larger tiles has 64 rows by 64 columns, of all streams: it reads less than it multiplies.
    let tiles: &[(usize, usize, usize, usize)] = match most {
        0..=16 => &[(16, 64, 1, 4), (16, 32, 1, 2)],
        17..=64 => &[(64, 64, 2, 2), (32, 64, 1, 4), (16, 64, 1, 4)],
        _ => &[
            (128, 256, 2, 4),
            (256, 128, 4, 2),
            (128, 192, 2, 3),
            (128, 128, 2, 4),
            (128, 128, 2, 2),
            (128, 96, 2, 3),
            (64, 128, 2, 2),
            (128, 64, 2, 2),
            (64, 64, 2, 2),
            (32, 64, 1, 4),
        ],
    };
    let mut found = Vec::new();
    for &(bm, bn, wm, wn) in tiles {
        for stages in [4, 3, 2] {
            let schedule = Schedule { bm, bn, stages, wm, wn };
            if schedule.shared_bytes(streams) <= gpu.shared_bytes && schedule.sums(streams) <= MOST_SUMS {
                found.push(schedule);
            }
        }
    }
    // Few rows are bound by reading weights, which small tiles spread over more CTAs.
    if most > 64 {
        found.sort_by_key(|s| (s.cost(most, &group.segments), !s.fills(streams, gpu)));
    }
    let found: Vec<String> = found.into_iter().map(|s| schedule::print(&s.fields())).collect();
    match found.is_empty() {
        true => Err(view.unsupported("streams that do not fit a tile")),
        false => Ok(found),
    }
}

/// The kernel of a product of rows.
///
/// # Errors
///
/// Where the left operand is not in memory in rows of whole 16 bytes, or weights have no layout.
pub fn lower(view: &GroupView<'_>, group: &DotGroup, schedule: Schedule) -> Result<Lowered, LowerError> {
    let mut l = Lowering::of_warps(view, schedule.wm * schedule.wn);
    let Some(stored) = stored_left(view, group.a) else {
        return Err(view.unsupported("rows that are made where they are multiplied"));
    };
    let a = l.rows("a", stored);
    if !(l.k.kernel()[a].strides[0] as usize).is_multiple_of(chunk(group.dtype)) {
        return Err(view.unsupported("rows that do not begin at multiples of 16 bytes"));
    }
    // One ring for all segments: they run one after another.
    let Schedule { bm, bn, stages, .. } = schedule;
    let (streams, deep) = (most_streams(&group.segments), panel(group.dtype));
    let tile_a = l.k.swizzled("tile_a", group.dtype, &[stages, bm, deep]);
    let tile_w = l.k.swizzled("tile_w", group.dtype, &[stages, streams * bn, deep]);
    for (number, segment) in group.segments.iter().enumerate() {
        product(&mut l, group, segment, number, [a, tile_a, tile_w], schedule)?;
    }
    Ok(l.finish())
}

/// A tile as its threads see it.
struct Tile<'a> {
    group: &'a DotGroup,
    s: Schedule,
    streams: usize,
    /// In global memory: `a[t, k]`, `w[n, stream, 0, k]`.
    a: BufferId,
    w: BufferId,
    /// In shared memory: `[stage, row, k]`, `[stage, stream * bn + column, k]`.
    tile_a: BufferId,
    tile_w: BufferId,
    /// First row and column.
    m: Expr,
    n: Expr,
    /// Columns of each stream.
    columns: usize,
    /// First row and column of this warp in the tile.
    warp_m: Expr,
    warp_n: Expr,
    lane: Expr,
    sums: Sums,
}

/// Sums of a warp in registers: `[stream, rows / 16, columns / 8]`, four of each thread's.
#[derive(Clone, Copy)]
pub(super) struct Sums {
    pub reg: RegId,
    /// Is each a vector of four, for `mma`?
    pub mma: bool,
}

/// A warp's part of a finished tile.
pub(super) struct Finished {
    pub streams: usize,
    /// Columns of each stream.
    pub columns: usize,
    /// Columns of a CTA's tile, of each stream.
    pub bn: usize,
    /// First row and column of the warp.
    pub row: Expr,
    pub column: Expr,
    pub lane: Expr,
    /// Blocks of 16 rows and of 8 columns.
    pub across: usize,
    pub along: usize,
    pub sums: Sums,
}

impl Sums {
    /// Elements `2 half` and `2 half + 1`, or one of them.
    fn get(&self, k: &Builder, place: [Expr; 3], half: &Expr, lane: Option<u16>) -> Expr {
        let [s, i, j] = place;
        match (self.mma, half, lane) {
            (false, _, Some(lane)) => k.get(self.reg, &[s, i, j, half.clone() * 2usize + i64::from(lane)]),
            (false, _, None) => {
                let one =
                    |e: i64| k.get(self.reg, &[s.clone(), i.clone(), j.clone(), half.clone() * 2usize + e]);
                one(0).join(one(1))
            }
            (true, Expr::Int(half), None) => k.get(self.reg, &[s, i, j]).lanes(2 * *half as u16, 2),
            (true, Expr::Int(half), Some(lane)) => {
                k.get(self.reg, &[s, i, j]).lanes(2 * *half as u16 + lane, 1)
            }
            (true, _, _) => unreachable!("halves are written out"),
        }
    }
}

fn product(
    l: &mut Lowering<'_, '_>,
    group: &DotGroup,
    segment: &Segment,
    number: usize,
    [a, tile_a, tile_w]: [BufferId; 3],
    s: Schedule,
) -> Result<(), LowerError> {
    let Schedule { bm, bn, stages, wm, wn } = s;
    let (streams, columns, dtype) = (segment.streams.len(), segment.n(), group.dtype);
    let pack = pack_of(l, number)?;
    let w = l.pack("w", pack);
    let warp = l.warp();
    let steps = group.k.div_ceil(panel(dtype));
    let rows = Expr::from(group.m);
    let (tiles_m, tiles_n) = ((rows.clone() + (bm - 1)) / bm, columns.div_ceil(bn));
    let mut result = Ok(());
    l.parallel("turn", tiles_m * tiles_n, |l, turn| {
        // Neighbouring CTAs share rows: they stay in the cache while weights stream.
        let m = l.k.let_("m", turn.clone() / tiles_n * bm);
        let n = l.k.let_("n", turn % tiles_n * bn);
        let warp_m = l.k.let_("warp_m", warp.number.clone() / wn * (bm / wm));
        let warp_n = l.k.let_("warp_n", warp.number.clone() % wn * (bn / wn));
        let mma = dtype != DType::F32;
        let (across, along) = (bm / wm / 16, bn / wn / 8);
        let (ty, dims) = match mma {
            true => (Type::f32(4), vec![streams, across, along]),
            false => (Type::f32(1), vec![streams, across, along, 4]),
        };
        let reg = l.k.reg("sums", ty, &dims, Some(Expr::f32(0.0, ty.lanes())));
        let lane = warp.lane.clone();
        let sums = Sums { reg, mma };
        let tile =
            Tile { group, s, streams, a, w, tile_a, tile_w, m, n, columns, warp_m, warp_n, lane, sums };
        let k = &mut l.k;
        for step in 0..stages - 1 {
            if step < steps {
                tile.fetch(k, step.into(), step.into());
            }
            k.commit();
        }
        k.for_("step", 0usize, steps, 1, |k, step| {
            // Everybody's copies of this step are there, and everybody is done with the stage that is copied to next.
            k.wait(stages - 2);
            k.sync();
            let next = k.let_("next", step.clone() + (stages - 1));
            k.if_(next.clone().compare(Compare::Lt, steps), |k| {
                tile.fetch(k, next.clone() % stages, next.clone())
            });
            k.commit();
            let stage = k.let_("stage", step % stages);
            if mma { tile.multiply_mma(k, stage) } else { tile.multiply_fma(k, stage) }
        });
        // Others may still read the last step's stage: does the next turn begin with copying over it?
        if (steps - 1) % stages < steps.min(stages - 1) {
            k.sync();
        }
        let finished = Finished {
            streams,
            columns,
            bn,
            row: tile.m.clone() + tile.warp_m.clone(),
            column: tile.n.clone() + tile.warp_n.clone(),
            lane: tile.lane.clone(),
            across,
            along,
            sums,
        };
        result = finished.store(l, segment, &rows);
    });
    result
}

impl Tile<'_> {
    /// Begins to copy a step's tiles to a stage; beyond `k` they are zero.
    fn fetch(&self, k: &mut Builder, stage: Expr, step: Expr) {
        let Schedule { bm, bn, wm, wn, .. } = self.s;
        let (wide, deep) = (chunk(self.group.dtype), panel(self.group.dtype));
        let last = Expr::from(self.group.m) - 1usize;
        let begin = k.let_("begin", step * deep);
        copies(k, bm, deep / wide, wm * wn, |k, row, chunk| {
            let column = k.let_("column", chunk * wide);
            let at = k.let_("at", begin.clone() + column.clone());
            let left = (Expr::from(self.group.k) - at.clone()).max(0i64).min(wide);
            let from = [(self.m.clone() + row.clone()).min(last.clone()), at];
            k.copy((self.tile_a, &[stage.clone(), row, column]), (self.a, &from), left);
        });
        copies(k, self.streams * bn, deep / wide, wm * wn, |k, row, chunk| {
            let column = k.let_("column", chunk * wide);
            let at = k.let_("at", begin.clone() + column.clone());
            // Rows of weights are padded with zeros to whole chunks.
            let padded = self.group.k.next_multiple_of(wide);
            let left = (Expr::from(padded) - at.clone()).max(0i64).min(wide);
            let from = [
                (self.n.clone() + row.clone() % bn).min(self.columns - 1),
                row.clone() / bn,
                Expr::Int(0),
                at,
            ];
            k.copy((self.tile_w, &[stage.clone(), row, column]), (self.w, &from), left);
        });
    }

    fn warp_tile(&self) -> (usize, usize) {
        let Schedule { bm, bn, wm, wn, .. } = self.s;
        (bm / wm / 16, bn / wn / 8)
    }

    /// Adds the product of a stage's tiles, by `mma`.
    fn multiply_mma(&self, k: &mut Builder, stage: Expr) {
        let (across, along) = self.warp_tile();
        let lane = self.lane.clone();
        let dtype = self.group.dtype;
        let left = k.reg("left", Type::Vector { dtype, lanes: 8 }, &[across], None);
        let right = k.reg("right", Type::Vector { dtype, lanes: 8 }, &[along / 2], None);
        // Where this lane's row of the matrices begins: of `a` 16 rows by 16, of `w` 16 columns by 16.
        let row_a = k.let_("row_a", self.warp_m.clone() + lane.clone() % 16usize);
        let deep_a = k.let_("deep_a", lane.clone() / 16usize * 8usize);
        let row_w =
            k.let_("row_w", self.warp_n.clone() + lane.clone() % 8usize + lane.clone() / 16usize * 8usize);
        let deep_w = k.let_("deep_w", lane / 8usize % 2usize * 8usize);
        k.unroll("d", panel(dtype) / 16, |k, d| {
            let deep = d * 16usize;
            k.unroll("i", across, |k, i| {
                let at = [stage.clone(), row_a.clone() + i.clone() * 16usize, deep.clone() + deep_a.clone()];
                let loaded = k.matrix(self.tile_a, &at, 4, false);
                k.set(left, &[i], loaded);
            });
            k.unroll("s", self.streams, |k, s| {
                k.unroll("j", along / 2, |k, j| {
                    let row = row_w.clone() + s.clone() * self.s.bn + j.clone() * 16usize;
                    let at = [stage.clone(), row, deep.clone() + deep_w.clone()];
                    let loaded = k.matrix(self.tile_w, &at, 4, false);
                    k.set(right, &[j], loaded);
                });
                k.unroll("i", across, |k, i| {
                    k.unroll("j", along / 2, |k, j| {
                        for part in 0..2u16 {
                            let place = [s.clone(), i.clone(), j.clone() * 2usize + i64::from(part)];
                            let b = k.get(right, std::slice::from_ref(&j)).lanes(4 * part, 4);
                            let sum =
                                k.get(self.sums.reg, &place).mma(k.get(left, std::slice::from_ref(&i)), b);
                            k.set(self.sums.reg, &place, sum);
                        }
                    });
                });
            });
        });
    }

    /// Adds the product of a stage's tiles, by FMA: a thread has two rows and two columns of each 16 by 8.
    fn multiply_fma(&self, k: &mut Builder, stage: Expr) {
        let (across, along) = self.warp_tile();
        let lane = self.lane.clone();
        let four = Type::f32(4);
        let left = k.reg("left", four, &[across, 2], None);
        let right = k.reg("right", four, &[2], None);
        let row_a = k.let_("row_a", self.warp_m.clone() + lane.clone() / 4usize);
        let row_w = k.let_("row_w", self.warp_n.clone() + lane % 4usize * 2usize);
        k.for_("deep", 0usize, panel(self.group.dtype), 4, |k, deep| {
            k.unroll("i", across, |k, i| {
                k.unroll("h", 2, |k, h| {
                    let row = row_a.clone() + i.clone() * 16usize + h.clone() * 8usize;
                    let loaded = k.load(self.tile_a, &[stage.clone(), row, deep.clone()], 4);
                    k.set(left, &[i.clone(), h], loaded);
                });
            });
            k.unroll("s", self.streams, |k, s| {
                k.unroll("j", along, |k, j| {
                    k.unroll("e", 2, |k, e| {
                        let row = row_w.clone() + s.clone() * self.s.bn + j.clone() * 8usize + e.clone();
                        let loaded = k.load(self.tile_w, &[stage.clone(), row, deep.clone()], 4);
                        k.set(right, &[e], loaded);
                    });
                    k.unroll("i", across, |k, i| {
                        k.unroll("h", 2, |k, h| {
                            k.unroll("e", 2, |k, e| {
                                let place = [s.clone(), i.clone(), j.clone(), h.clone() * 2usize + e.clone()];
                                let x = k.get(left, &[i.clone(), h.clone()]);
                                let y = k.get(right, &[e]);
                                let mut sum = k.get(self.sums.reg, &place);
                                for lane in 0..4 {
                                    sum = x.clone().lanes(lane, 1).fma(y.clone().lanes(lane, 1), sum);
                                }
                                k.set(self.sums.reg, &place, sum);
                            });
                        });
                    });
                });
            });
        });
    }
}

impl Finished {
    /// Computes and stores its outputs, for as many rows as there are.
    pub fn store(&self, l: &mut Lowering<'_, '_>, segment: &Segment, rows: &Expr) -> Result<(), LowerError> {
        let (across, along) = (self.across, self.along);
        let lane = self.lane.clone();
        let pairs = segment.chunk.is_multiple_of(2);
        let first = l.k.let_("row", self.row.clone() + lane.clone() / 4usize);
        let column = l.k.let_("column", self.column.clone() + lane % 4usize * 2usize);
        let mut result = Ok(());
        for half in 0..2usize {
            let i = l.k.open_loop("i");
            let t = l.k.let_("t", first.clone() + Expr::Var(i) * 16usize + 8 * half);
            l.only(t.clone().compare(Compare::Lt, rows.clone()), |l| {
                let j = l.k.open_loop("j");
                for lane in if pairs { vec![None] } else { vec![Some(0), Some(1)] } {
                    let n = column.clone() + Expr::Var(j) * 8usize + i64::from(lane.unwrap_or(0));
                    let n = l.k.let_("n", n);
                    let mut one = |l: &mut Lowering<'_, '_>| {
                        let sums: Vec<Expr> = (0..self.streams)
                            .map(|s| {
                                let place = [s.into(), Expr::Var(i), Expr::Var(j)];
                                let sum = self.sums.get(&l.k, place, &half.into(), lane);
                                l.k.let_("sum", sum)
                            })
                            .collect();
                        let place = Place::of(l, segment, &t, &n, if lane.is_none() { 2 } else { 1 });
                        let stored = outputs(l, segment, place, &sums);
                        result = std::mem::replace(&mut result, Ok(())).and(stored);
                    };
                    if self.columns.is_multiple_of(self.bn) {
                        one(l);
                    } else {
                        l.only(n.clone().compare(Compare::Lt, self.columns), one);
                    }
                }
                l.k.close_unroll(j, along);
            });
            l.k.close_unroll(i, across);
        }
        result
    }
}
