//! Products of many rows by warpgroups: `y[t, n] = epilogue(sum over k of a[t, k] * w[n, k])`, in bf16 or f16.
//!
//! A CTA makes a tile of 64 rows a warpgroup by `bn` columns of each stream, 64 deep at a time. While a step is multiplied, the
//! next ones are fetched; a stage is free again when the product after the one that read it has begun. Neighbouring CTAs take
//! tiles of `band` rows of tiles, column by column: what they read at one time is small enough for the cache that they share.
//!
//! Weights are there before any grid begins: those of a CTA's first steps are fetched while the grids before still make the rows.

use super::{MULTIPROCESSORS, ROWS, Ring, WARPS, panel, roles};
use crate::dtype::DType;
use crate::families::access::Lowering;
use crate::families::dot::{DotGroup, Segment, analyse, stored_left};
use crate::families::gpu::gemm::{Finished, Sums};
use crate::families::gpu::{ProductTile, chunk, pack_of};
use crate::families::{GroupView, LowerError, Lowered};
use crate::kernel::warpgroup::{Left, MapId, MbarrierAt, Warpgroup};
use crate::kernel::{BufferId, Builder, Expr, RegId, Type};
use crate::op::Compare;
use crate::schedule::{self, Field};
use crate::target::Gpu;

/// Tile sizes of a product of warpgroups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// Warpgroups that multiply: the tile has 64 rows of each.
    pub consumers: usize,
    /// Columns of a CTA's tile, of each stream.
    pub bn: usize,
    /// Steps in the ring.
    pub stages: usize,
    /// Rows of tiles that neighbouring CTAs take together.
    pub band: usize,
}

impl Schedule {
    /// The fields, for text and tuning. None changes the order of a sum: `k` is taken in order, 16 by 16.
    pub fn fields(self) -> [Field; 4] {
        let Schedule { consumers, bn, stages, band } = self;
        [("consumers", consumers), ("bn", bn), ("stages", stages), ("band", band)]
            .map(|(name, value)| Field { name, value, numeric: false })
    }

    /// Reads the text form.
    ///
    /// # Errors
    ///
    /// What does not fit, in words.
    pub fn parse(text: &str) -> Result<Schedule, String> {
        let mut fields = Schedule { consumers: 0, bn: 0, stages: 0, band: 0 }.fields();
        schedule::parse(text, &mut fields)?;
        let [consumers, bn, stages, band] = fields.map(|f| f.value);
        let fits = matches!(consumers, 1 | 2) && bn.is_multiple_of(8) && (8..=256).contains(&bn);
        match fits && (2..=8).contains(&stages) && (1..=64).contains(&band) {
            true => Ok(Schedule { consumers, bn, stages, band }),
            false => {
                Err("consumers must be 1 or 2, bn a multiple of 8 up to 256, stages 2 to 8, band 1 to 64"
                    .to_string())
            }
        }
    }

    /// How a product is cut.
    pub fn tile(self) -> ProductTile {
        ProductTile { rows: self.rows(), columns: self.bn, depth: panel(DType::BF16), band: self.band }
    }

    fn rows(self) -> usize {
        ROWS * self.consumers
    }

    fn shared_bytes(self, streams: usize) -> usize {
        // Tiles begin at multiples of 1,024 bytes; two mbarriers a stage.
        let tile =
            |rows: usize| (self.stages * rows * crate::kernel::warpgroup::ROW_BYTES).next_multiple_of(1024);
        tile(self.rows()) + tile(streams * self.bn) + 16 * self.stages
    }

    /// What the whole product costs on an H100, in a unit of its own: rounds of CTAs, by the time of a tile. A tile of 64 rows
    /// and few columns waits for shared memory, which both operands are read from.
    fn cost(self, rows: usize, columns: usize, streams: usize) -> usize {
        let tiles = rows.div_ceil(self.rows()) * columns.div_ceil(self.bn);
        tiles.div_ceil(MULTIPROCESSORS) * self.consumers * (streams * self.bn + ROWS)
    }
}

/// The legal space, the preferred first; nothing where these kernels do not cover the group.
///
/// # Errors
///
/// As [`analyse`].
pub fn schedules(view: &GroupView<'_>, gpu: &Gpu) -> Result<Vec<String>, LowerError> {
    let group = analyse(view)?;
    if !covers(&group) {
        return Ok(Vec::new());
    }
    let streams = group.segments.iter().map(|s| s.streams.len()).max().unwrap_or(1);
    let columns = group.segments.iter().map(Segment::n).max().unwrap_or(1);
    let rows = view.graph.symbols.max()[0] as usize;
    let mut found = Vec::new();
    for consumers in [2, 1] {
        for bn in [256, 192, 128, 64] {
            for stages in [4, 3, 6, 2] {
                let band = rows.div_ceil(ROWS * consumers).clamp(1, 8);
                let schedule = Schedule { consumers, bn, stages, band };
                if streams * bn <= 256 && schedule.shared_bytes(streams) <= gpu.shared_bytes {
                    found.push(schedule);
                }
            }
        }
    }
    found.sort_by_key(|s| s.cost(rows, columns, streams));
    Ok(found.into_iter().map(|s| schedule::print(&s.fields())).collect())
}

/// Is a product one for these kernels?
fn covers(group: &DotGroup) -> bool {
    matches!(group.dtype, DType::BF16 | DType::F16)
}

/// What a segment's turns need.
struct Part {
    segment: usize,
    streams: usize,
    columns: usize,
    /// Boxes of weights: rows are columns of the product.
    weights: MapId,
}

/// A tile of the product.
struct Tile {
    s: Schedule,
    /// Steps of 64 along `k`.
    steps: usize,
    rows: Expr,
    /// Boxes of the left operand.
    left: MapId,
    ring: Ring,
    /// In shared memory: `[stage, 0, row, k]`, `[stage, 0, stream * bn + column, k]`.
    tile_a: BufferId,
    tile_w: BufferId,
}

/// The kernel of a product of rows.
///
/// # Errors
///
/// Where the left operand is not in memory in rows of whole 16 bytes, or weights have no layout.
pub fn lower(view: &GroupView<'_>, group: &DotGroup, s: Schedule) -> Result<Lowered, LowerError> {
    if !covers(group) {
        return Err(view.unsupported(format!("products of warpgroups in {}", group.dtype)));
    }
    let mut l = Lowering::of_warps(view, WARPS * (1 + s.consumers));
    let Some(stored) = stored_left(view, group.a) else {
        return Err(view.unsupported("rows that are made where they are multiplied"));
    };
    let a = l.rows("a", stored);
    if !(l.k.kernel()[a].strides[0] as usize).is_multiple_of(chunk(group.dtype)) {
        return Err(view.unsupported("rows that do not begin at multiples of 16 bytes"));
    }
    let streams = group.segments.iter().map(|segment| segment.streams.len()).max().unwrap_or(1);
    let deep = panel(group.dtype);
    let left = l.k.map("rows", a, &[s.rows(), deep]);
    let mut parts = Vec::new();
    for (number, segment) in group.segments.iter().enumerate() {
        let pack = pack_of(&l, number)?;
        let w = l.pack("w", pack);
        let weights = l.k.map("weights", w, &[s.bn, 1, 1, deep]);
        parts.push(Part { segment: number, streams: segment.streams.len(), columns: segment.n(), weights });
    }
    let tile = Tile {
        s,
        steps: group.k.div_ceil(deep),
        rows: Expr::from(group.m),
        left,
        tile_a: l.k.swizzled("tile_a", group.dtype, &[s.stages, 1, s.rows(), deep]),
        tile_w: l.k.swizzled("tile_w", group.dtype, &[s.stages, 1, streams * s.bn, deep]),
        ring: Ring::new(&mut l.k, "tile", s.stages, s.consumers),
    };
    let mut result = Ok(());
    roles(&mut l, s.consumers, |l, consumer| {
        // How often the ring was filled in turns before.
        let done = l.k.reg("done", Type::Index, &[], Some(Expr::Int(0)));
        if consumer.is_some() {
            l.k.warpgroup(Warpgroup::AwaitGrids);
        }
        for part in &parts {
            tile.turns(l, part, |l, m, n| {
                match &consumer {
                    None => l.once(|l| tile.fetch(l, part, done, m, n)),
                    Some(consumer) => {
                        let sums = tile.multiply(l, part, done, consumer);
                        let stored = tile.finish(l, part, sums, m, n).store(
                            l,
                            &group.segments[part.segment],
                            &tile.rows,
                        );
                        result = std::mem::replace(&mut result, Ok(())).and(stored);
                    }
                }
                let more = l.k.get(done, &[]) + tile.steps;
                l.k.set(done, &[], more);
            });
        }
    });
    // Threads that fetch nothing wait here.
    l.k.warpgroup(Warpgroup::AwaitGrids);
    result?;
    Ok(l.finish())
}

impl Tile {
    /// The tiles that this CTA makes: the first row and column of each.
    fn turns(
        &self,
        l: &mut Lowering<'_, '_>,
        part: &Part,
        mut body: impl FnMut(&mut Lowering<'_, '_>, &Expr, &Expr),
    ) {
        let Schedule { bn, band, .. } = self.s;
        let bm = self.s.rows();
        let down = part.columns.div_ceil(bn);
        let bands = (self.rows.clone() + (band * bm - 1)) / (band * bm);
        l.parallel("turn", bands * (band * down), |l, turn| {
            let inside = l.k.let_("inside", turn.clone() % (band * down));
            let m = l.k.let_("m", (turn / (band * down) * band + inside.clone() % band) * bm);
            let n = l.k.let_("n", inside / band * bn);
            // The last band may have fewer rows.
            l.only(m.clone().compare(Compare::Lt, self.rows.clone()), |l| body(l, &m, &n));
        });
    }

    /// Fetches a tile's steps. Where the ring was never filled, weights fill it before the rows are waited for.
    fn fetch(&self, l: &mut Lowering<'_, '_>, part: &Part, done: RegId, m: &Expr, n: &Expr) {
        let bytes = (self.s.rows() + part.streams * self.s.bn) * crate::kernel::warpgroup::ROW_BYTES;
        let (k, ring) = (&mut l.k, self.s.stages.min(self.steps));
        let fresh = k.get(done, &[]).compare(Compare::Eq, 0usize);
        k.if_(fresh.clone(), |k| {
            k.for_("step", 0usize, ring, 1, |k, step| {
                let full = (self.ring.full, step.clone());
                k.warpgroup(Warpgroup::Expect { at: full.clone(), bytes: bytes as u32 });
                self.fetch_weights(k, part, n, &step, (&step, &full));
            });
            k.warpgroup(Warpgroup::AwaitGrids);
            k.for_("step", 0usize, ring, 1, |k, step| {
                self.fetch_rows(k, m, &step, (&step, &(self.ring.full, step.clone())));
            });
        });
        let ahead = k.let_("ahead", fresh.select(ring.into(), 0usize.into()));
        k.for_("step", ahead, self.steps, 1, |k, step| {
            let count = k.let_("count", k.get(done, &[]) + step.clone());
            self.ring.fill(k, &count, bytes, |k, stage, full| {
                self.fetch_rows(k, m, &step, (stage, full));
                self.fetch_weights(k, part, n, &step, (stage, full));
            });
        });
    }

    fn fetch_rows(&self, k: &mut Builder, m: &Expr, step: &Expr, (stage, full): (&Expr, &MbarrierAt)) {
        let place = vec![stage.clone(), 0usize.into(), 0usize.into(), 0usize.into()];
        let index = vec![m.clone(), step.clone() * self.deep(k)];
        k.warpgroup(Warpgroup::Fetch { to: self.tile_a, place, map: self.left, index, at: full.clone() });
    }

    fn fetch_weights(
        &self,
        k: &mut Builder,
        part: &Part,
        n: &Expr,
        step: &Expr,
        (stage, full): (&Expr, &MbarrierAt),
    ) {
        for stream in 0..part.streams {
            let place = vec![stage.clone(), 0usize.into(), (stream * self.s.bn).into(), 0usize.into()];
            let index = vec![n.clone(), stream.into(), 0usize.into(), step.clone() * self.deep(k)];
            let (to, map) = (self.tile_w, part.weights);
            k.warpgroup(Warpgroup::Fetch { to, place, map, index, at: full.clone() });
        }
    }

    /// Columns of a step.
    fn deep(&self, k: &Builder) -> usize {
        panel(k.kernel()[self.tile_a].dtype)
    }

    /// The sums of a tile: `[stream, 1, columns / 8]`.
    fn multiply(&self, l: &mut Lowering<'_, '_>, part: &Part, done: RegId, consumer: &Expr) -> RegId {
        let lane = l.warp().lane;
        let k = &mut l.k;
        let dims = [part.streams, 1, self.s.bn / 8];
        let sums = k.reg("sums", Type::f32(4), &dims, Some(Expr::f32(0.0, 4)));
        let row = k.let_("row", consumer.clone() * ROWS);
        k.for_("step", 0usize, self.steps, 1, |k, step| {
            let count = k.let_("count", k.get(done, &[]) + step.clone());
            let stage = self.ring.filled(k, &count);
            k.warpgroup(Warpgroup::FenceRegisters);
            k.unroll("d", 4, |k, d| {
                let deep = d * 16usize;
                for stream in 0..part.streams {
                    let at = |row: Expr| vec![stage.clone(), Expr::Int(0), row, deep.clone()];
                    k.warpgroup(Warpgroup::Product {
                        sums,
                        index: vec![stream.into(), Expr::Int(0)],
                        add: true,
                        left: Left::Shared(self.tile_a, at(row.clone())),
                        right: self.tile_w,
                        place: at((stream * self.s.bn).into()),
                        trans: false,
                    });
                }
            });
            k.warpgroup(Warpgroup::Close);
            // The product of the step before is done: its stage may be filled again.
            k.warpgroup(Warpgroup::Retire { newest: 1, sums: Vec::new(), after: Vec::new() });
            k.if_(step.compare(Compare::Gt, 0usize), |k| self.ring.release(k, &lane, count - 1usize));
        });
        k.warpgroup(Warpgroup::Retire { newest: 0, sums: vec![sums], after: Vec::new() });
        let last = k.get(done, &[]) + (self.steps - 1);
        self.ring.release(k, &lane, last);
        sums
    }

    /// A warp's part of the tile: 16 rows by all columns.
    fn finish(&self, l: &mut Lowering<'_, '_>, part: &Part, sums: RegId, m: &Expr, n: &Expr) -> Finished {
        let warp = l.warp();
        Finished {
            streams: part.streams,
            columns: part.columns,
            bn: self.s.bn,
            row: l.k.let_("first", m.clone() + (warp.number - WARPS) * 16usize),
            column: n.clone(),
            lane: warp.lane,
            across: 1,
            along: self.s.bn / 8,
            sums: Sums { reg: sums, mma: true },
        }
    }
}
