//! Causal attention by warpgroups, in bf16 or f16 (FlashAttention-3: Shah et al., arXiv 2407.08608).
//!
//! A CTA has 64 rows of each multiplying warpgroup; tiles of keys and of values come through a ring each. While the weights of
//! one tile are computed from its scores, the products of the weights before with their values go on, and the tensor cores'
//! next turn is the other warpgroup's: two numbered barriers let them begin their products in turns.
//!
//! Queries are stored to swizzled memory by the group that reads them, so that any number of heads may share a KV head. A head lies in
//! panels of 64 columns; what is beyond its width is zero.

use super::{ROWS, Ring, WARPS, panel, roles};
use crate::dtype::DType;
use crate::families::access::{Lowering, paged};
use crate::families::attention::{Shape, shape_of};
use crate::families::gpu::softmax::{Blocks, Ends, Operands, Positions, Rows, Softmax, operands};
use crate::families::gpu::{AttentionTile, chunk};
use crate::families::{GroupView, LowerError, Lowered};
use crate::kernel::warpgroup::{Left, MapId, ROW_BYTES, WARPGROUP, Warpgroup};
use crate::kernel::{BufferId, Builder, Expr, RegId, Type};
use crate::op::{Compare, Op};
use crate::schedule::{self, Field};
use crate::target::Gpu;

/// Barriers of their own, which a group's threads meet at when it stores queries: one a group, from here on.
const QUERIES: usize = 1;
/// Barriers at which groups wait for their turn: one a group, from here on.
const TURNS: usize = 3;
/// How many threads meet there: one group's that waits, the other's that has had its turn.
const BOTH: u16 = 2 * WARPGROUP;

/// Tile sizes of an attention of warpgroups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// Warpgroups that multiply: the tile has 64 rows of each.
    pub consumers: usize,
    /// Keys of a tile.
    pub keys: usize,
    /// Tiles in each ring.
    pub stages: usize,
}

impl Schedule {
    /// The fields, for text, tuning and the numeric class: maxima are taken tile by tile.
    pub fn fields(self) -> [Field; 3] {
        let field = |name, value, numeric| Field { name, value, numeric };
        [
            field("consumers", self.consumers, false),
            field("keys", self.keys, true),
            field("stages", self.stages, false),
        ]
    }

    /// Reads the text form.
    ///
    /// # Errors
    ///
    /// What does not fit, in words.
    pub fn parse(text: &str) -> Result<Schedule, String> {
        let mut fields = Schedule { consumers: 0, keys: 0, stages: 0 }.fields();
        schedule::parse(text, &mut fields)?;
        let [consumers, keys, stages] = fields.map(|f| f.value);
        match matches!(consumers, 1 | 2) && matches!(keys, 32 | 64 | 128) && (2..=4).contains(&stages) {
            true => Ok(Schedule { consumers, keys, stages }),
            false => Err("consumers must be 1 or 2, keys 32, 64 or 128, stages 2 to 4".to_string()),
        }
    }

    /// How an attention is cut.
    pub fn tile(self) -> AttentionTile {
        AttentionTile { rows: self.rows(), keys: self.keys, split: 0 }
    }

    fn rows(self) -> usize {
        ROWS * self.consumers
    }

    fn shared_bytes(self, panels: usize) -> usize {
        let tile = |rows: usize| panels * rows * ROW_BYTES;
        tile(self.rows()) + 2 * self.stages * tile(self.keys) + 4 * 8 * self.stages
    }

    /// Does it fit a head? Sums of a row and scores of a tile take half of a thread's registers at most, and a ring's memory.
    fn fits(self, shape: &Shape, gpu: &Gpu) -> bool {
        let panels = shape.d.div_ceil(panel(shape.dtype));
        let registers = (shape.d + self.keys) / 2 + self.keys / 4;
        shape.page.is_multiple_of(self.keys)
            && registers <= 168
            && self.shared_bytes(panels) <= gpu.shared_bytes
    }
}

/// The legal space, the preferred first; nothing where these kernels do not cover the group.
///
/// # Errors
///
/// When the group is no attention.
pub fn schedules(view: &GroupView<'_>, gpu: &Gpu) -> Result<Vec<String>, LowerError> {
    let shape = shape_of(view)?;
    if !matches!(shape.dtype, DType::BF16 | DType::F16) || !shape.d.is_multiple_of(8) || shape.d > 256 {
        return Ok(Vec::new());
    }
    let rows = view.graph.symbols.max()[0] as usize * shape.per_kv;
    let consumers = if rows > ROWS { [2, 1] } else { [1, 2] };
    let mut found = Vec::new();
    for consumers in consumers {
        for keys in [128, 64, 32] {
            for stages in [2, 3] {
                let schedule = Schedule { consumers, keys, stages };
                if schedule.fits(&shape, gpu) {
                    found.push(schedule::print(&schedule.fields()));
                }
            }
        }
    }
    Ok(found)
}

/// The whole kernel's memory and counters.
struct Tile {
    s: Schedule,
    shape: Shape,
    /// Steps of 16 along a head, and its panels.
    steps: usize,
    panels: usize,
    q: BufferId,
    /// Boxes of a tile's keys and values, one panel wide.
    keys: MapId,
    values: MapId,
    /// In shared memory: `[panel, row, column]`, `[stage, panel, key, column]`.
    tile_q: BufferId,
    tile_k: BufferId,
    tile_v: BufferId,
    ring_k: Ring,
    ring_v: Ring,
}

/// A multiplying warpgroup's registers in a turn.
struct Group<'a> {
    tile: &'a Tile,
    /// Its number.
    number: Expr,
    lane: Expr,
    /// Tiles that went through the rings in turns before.
    done: Expr,
    softmax: Softmax,
    /// Weights as left operands: `[keys / 16]`.
    weights: RegId,
    sums: Blocks,
}

/// The kernel of an attention.
///
/// # Errors
///
/// Where shapes are symbolic behind the first axis, a dtype or head is not covered, or the schedule does not fit.
pub fn lower(view: &GroupView<'_>, s: Schedule, gpu: &Gpu) -> Result<Lowered, LowerError> {
    let shape = shape_of(view)?;
    if !schedules(view, gpu)?.contains(&schedule::print(&s.fields())) {
        return Err(
            view.unsupported(format!("{} with a head of {} and {} slots", shape.dtype, shape.d, shape.slots))
        );
    }
    let Op::Attention { causal, scale } = view.graph[view.values[0]].op else {
        unreachable!("shape_of looked")
    };
    let mut l = Lowering::of_warps(view, WARPS * (1 + s.consumers));
    let Operands { q, k: keys, v: values, pos, to } = operands(&mut l)?;
    let warp = l.warp();
    let positions = Positions { pos, lane: warp.lane.clone() };
    let (columns, panels) = (panel(shape.dtype), shape.d.div_ceil(panel(shape.dtype)));
    let k = &mut l.k;
    let tile = Tile {
        s,
        shape,
        steps: shape.d.div_ceil(16),
        panels,
        q,
        keys: k.map("keys", keys, &[1, 1, s.keys, columns]),
        values: k.map("values", values, &[1, 1, s.keys, columns]),
        tile_q: k.swizzled("tile_q", shape.dtype, &[panels, s.rows(), columns]),
        tile_k: k.swizzled("tile_k", shape.dtype, &[s.stages, panels, s.keys, columns]),
        tile_v: k.swizzled("tile_v", shape.dtype, &[s.stages, panels, s.keys, columns]),
        ring_k: Ring::new(k, "k", s.stages, s.consumers),
        ring_v: Ring::new(k, "v", s.stages, s.consumers),
    };
    roles(&mut l, s.consumers, |l, consumer| {
        let k = &mut l.k;
        let done = k.reg("done", Type::Index, &[], Some(Expr::Int(0)));
        if let Some(number) = consumer.as_ref().filter(|_| s.consumers > 1) {
            // The first group has the first turn.
            k.if_(number.clone().compare(Compare::Eq, 1usize), |k| {
                k.warpgroup(Warpgroup::Pass { id: TURNS.into(), threads: BOTH });
            });
        }
        k.parallel("turn", Rows::tiles(&shape, s.rows()) * shape.kv_heads, |k, turn| {
            let rows = Rows::of_turn(k, (shape, causal), &positions, s.rows(), &turn);
            let before = k.let_("before", k.get(done, &[]));
            let ends = rows.tiles_of_keys(k, s.keys);
            match &consumer {
                None => k.if_(warp.lane.clone().compare(Compare::Eq, 0usize), |k| {
                    tile.fetch(k, &rows, &ends, &before);
                }),
                Some(number) => {
                    let row = number.clone() * ROWS
                        + (warp.number.clone() % WARPS) * 16usize
                        + warp.lane.clone() / 4usize;
                    let mine = k.let_("mine", row);
                    tile.store_queries(k, &rows, number);
                    let scores = Blocks::new(k, "scores", s.keys / 8, false, None);
                    let group = Group {
                        tile: &tile,
                        number: number.clone(),
                        lane: warp.lane.clone(),
                        done: before.clone(),
                        softmax: Softmax::new(k, &rows, &ends, (&mine, &warp.lane), s.keys, scale, scores),
                        weights: k.reg(
                            "weights",
                            Type::Vector { dtype: shape.dtype, lanes: 8 },
                            &[s.keys / 16],
                            None,
                        ),
                        sums: Blocks::new(k, "sums", shape.d / 8, false, Some(0.0)),
                    };
                    group.attend(k, &ends);
                    group.softmax.store(k, (&rows, &mine), group.sums, to);
                }
            }
            k.set(done, &[], before + ends.end.clone());
        });
    });
    Ok(l.finish())
}

impl Tile {
    /// Fetches all tiles of keys and values.
    fn fetch(&self, k: &mut Builder, rows: &Rows, ends: &Ends, before: &Expr) {
        let bytes = self.panels * self.s.keys * ROW_BYTES;
        k.for_("tile", 0usize, ends.end.clone(), 1, |k, at| {
            let n = k.let_("n", before.clone() + at.clone());
            let slot = k.let_("slot", at * self.s.keys);
            for (ring, to, map) in
                [(&self.ring_k, self.tile_k, self.keys), (&self.ring_v, self.tile_v, self.values)]
            {
                ring.fill(k, &n, bytes, |k, stage, full| {
                    for number in 0..self.panels {
                        let place = vec![stage.clone(), number.into(), Expr::Int(0), Expr::Int(0)];
                        let column = number * panel(self.shape.dtype);
                        let cache = &k.kernel()[k.kernel().maps[map.0 as usize].buffer].shape;
                        let index = paged(cache, rows.head.clone(), slot.clone(), column.into());
                        k.warpgroup(Warpgroup::Fetch { to, place, map, index, at: full.clone() });
                    }
                });
            }
        });
    }

    /// Stores a group's queries to its rows, with zeros up to whole steps.
    fn store_queries(&self, k: &mut Builder, rows: &Rows, group: &Expr) {
        let wide = chunk(self.shape.dtype);
        let (threads, chunks) = (usize::from(WARPGROUP), self.steps * 16 / wide);
        let meet = |k: &mut Builder| {
            k.warpgroup(Warpgroup::Meet { id: group.clone() + QUERIES, threads: WARPGROUP });
        };
        // The group's other warps may still multiply the queries before.
        meet(k);
        k.unroll("c", ROWS * chunks / threads, |k, c| {
            let number = k.let_("number", c * threads + Expr::Thread % threads);
            let row = k.let_("row", group.clone() * ROWS + number.clone() / chunks);
            let column = k.let_("column", number % chunks * wide);
            let to = [
                column.clone() / panel(self.shape.dtype),
                row.clone(),
                column.clone() % panel(self.shape.dtype),
            ];
            let zeros =
                Expr::Const { value: 0.0, ty: Type::Vector { dtype: self.shape.dtype, lanes: wide as u16 } };
            let copy = |k: &mut Builder| {
                let [t, head] = rows.place(rows.existing(row.clone()));
                let query = k.load(self.q, &[t, head, column.clone()], wide as u16);
                k.store(self.tile_q, &to, query);
            };
            if (self.steps * 16) == self.shape.d {
                return copy(k);
            }
            k.open();
            copy(k);
            let then = k.close();
            k.open();
            k.store(self.tile_q, &to, zeros);
            let otherwise = k.close();
            k.if_else(column.clone().compare(Compare::Lt, self.shape.d), then, otherwise);
        });
        k.warpgroup(Warpgroup::FenceAsync);
        // Several groups meet before each product anyhow.
        if self.s.consumers == 1 {
            meet(k);
        }
    }
}

impl Group<'_> {
    /// All tiles of keys, the next one's scores always under way beside the last one's sums.
    fn attend(&self, k: &mut Builder, ends: &Ends) {
        self.turn(k, |k| self.scores(k, &Expr::Int(0)));
        k.warpgroup(Warpgroup::Retire { newest: 0, sums: vec![self.softmax.scores.reg], after: Vec::new() });
        self.tile.ring_k.release(k, &self.lane, self.done.clone());
        self.softmax.weights(k, &Expr::Int(0), true);
        self.take_weights(k);
        let whole = k.let_("unmasked", ends.whole.clone().max(1i64));
        k.for_("tile", 1usize, whole.clone(), 1, |k, at| self.step(k, &at, false));
        k.for_("tile", whole, ends.end.clone(), 1, |k, at| self.step(k, &at, true));
        let last = k.let_("behind", ends.end.clone() - 1usize);
        self.products(k, &last);
        k.warpgroup(Warpgroup::Retire { newest: 0, sums: vec![self.sums.reg], after: Vec::new() });
        self.tile.ring_v.release(k, &self.lane, self.done.clone() + last);
    }

    fn step(&self, k: &mut Builder, at: &Expr, masked: bool) {
        let last = k.let_("behind", at.clone() - 1usize);
        self.turn(k, |k| {
            self.scores(k, at);
            self.products(k, &last);
        });
        k.warpgroup(Warpgroup::Retire { newest: 1, sums: vec![self.softmax.scores.reg], after: Vec::new() });
        self.tile.ring_k.release(k, &self.lane, self.done.clone() + at.clone());
        let shrinks = self.softmax.weights(k, at, masked);
        let mut after: Vec<Expr> =
            (0..self.tile.s.keys / 8).map(|j| k.get(self.softmax.scores.reg, &[j.into()])).collect();
        // Last a number that is never negative, as far as the machine shall know.
        after.extend(self.softmax.parts(k));
        k.warpgroup(Warpgroup::Retire { newest: 0, sums: vec![self.sums.reg], after });
        self.tile.ring_v.release(k, &self.lane, self.done.clone() + last);
        self.sums.scale(k, self.tile.shape.d / 8, &shrinks);
        self.take_weights(k);
    }

    /// Begins products when it is this group's turn.
    fn turn(&self, k: &mut Builder, begin: impl FnOnce(&mut Builder)) {
        let alone = self.tile.s.consumers == 1;
        if !alone {
            k.warpgroup(Warpgroup::Meet { id: self.number.clone() + TURNS, threads: BOTH });
        }
        begin(k);
        if !alone {
            k.warpgroup(Warpgroup::Pass { id: Expr::from(TURNS + 1) - self.number.clone(), threads: BOTH });
        }
    }

    /// Begins `scores = q k^T`.
    fn scores(&self, k: &mut Builder, at: &Expr) {
        let Tile { steps, tile_q, tile_k, .. } = *self.tile;
        let stage = self.tile.ring_k.filled(k, &(self.done.clone() + at.clone()));
        k.warpgroup(Warpgroup::FenceRegisters);
        let per_panel = panel(self.tile.shape.dtype) / 16;
        for step in 0..steps {
            let (number, column) = (Expr::from(step / per_panel), Expr::from(step % per_panel * 16));
            k.warpgroup(Warpgroup::Product {
                sums: self.softmax.scores.reg,
                index: Vec::new(),
                add: step > 0,
                left: Left::Shared(tile_q, vec![number.clone(), self.number.clone() * ROWS, column.clone()]),
                right: tile_k,
                place: vec![stage.clone(), number, Expr::Int(0), column],
                trans: false,
            });
        }
        k.warpgroup(Warpgroup::Close);
    }

    /// Begins `sums += weights v`.
    fn products(&self, k: &mut Builder, at: &Expr) {
        let stage = self.tile.ring_v.filled(k, &(self.done.clone() + at.clone()));
        k.warpgroup(Warpgroup::FenceRegisters);
        k.unroll("s", self.tile.s.keys / 16, |k, s| {
            k.warpgroup(Warpgroup::Product {
                sums: self.sums.reg,
                index: Vec::new(),
                add: true,
                left: Left::Registers(k.get(self.weights, std::slice::from_ref(&s))),
                right: self.tile.tile_v,
                place: vec![stage.clone(), Expr::Int(0), s * 16usize, Expr::Int(0)],
                trans: true,
            });
        });
        k.warpgroup(Warpgroup::Close);
    }

    /// Two blocks of weights are a left operand.
    fn take_weights(&self, k: &mut Builder) {
        k.unroll("s", self.tile.s.keys / 16, |k, s| {
            let [low, high] = [0i64, 1].map(|e| k.get(self.softmax.scores.reg, &[s.clone() * 2usize + e]));
            k.set(self.weights, &[s], low.join(high).cast(self.tile.shape.dtype));
        });
    }
}
