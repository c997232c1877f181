//! `y[t, n] = epilogue(sum over k of a[t, k] * w[n, k])`: one generator for products of any height, packed weights,
//! with any element-wise prologue (rows of `a` are made first, normalised for instance) and epilogue.
//!
//! A group has *segments*, run one after another without waiting: products of the same `a` with other weights (q, k and
//! v). The columns that one output element needs together are a segment's *streams* (gate and up; both halves of a
//! rotated head): they are packed beside each other, so an epilogue finds them in one tile. Nothing here knows what
//! they mean: streams are read off the group's expressions by [`analyse`].
//!
//! The micro-kernel is `mr` rows by `nr` vectors of 16 columns, all in registers, in one loop over `k`. Each output
//! element has one accumulator that takes `k` in order, so the bits depend on no tile size and not on the height: a
//! product of many rows gives what as many products of one row give.

use super::access::{Affine, Lowering, Piece, Scope, Source, Vars, operand_index, pieces, stored_value};
use super::{Candidate, GroupView, LowerError, Lowered, rowwise};
use crate::dim::Dim;
use crate::dtype::DType;
use crate::graph::{Pack, Stream, ValueId};
use crate::kernel::{BufferId, Builder, Expr, LANES, Type};
use crate::op::{Compare, Op};
use crate::schedule::{self, Field};
use crate::target::Vectors;
use std::cmp::Ordering;

/// Tile sizes of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DotSchedule {
    /// Rows of a register tile.
    pub mr: usize,
    /// Vectors of 16 columns of a register tile; a multiple of the number of streams.
    pub nr: usize,
    /// Words of `k` of a block: `kc * nr` vectors of weights stay in the nearest cache while all rows of a block pass. 0 for
    /// all of `k` at once.
    pub kc: usize,
    /// Rows of a block, whose sums wait in memory from one block of `k` to the next; a multiple of `mr`.
    pub mc: usize,
    /// How many turns ahead to ask for weights while rows pass, so that the next ones do not wait for memory; 0 for not at
    /// all.
    pub prefetch: usize,
}

impl DotSchedule {
    /// The fields, for text, tuning and the numeric class.
    pub fn fields(self) -> [Field; 5] {
        let DotSchedule { mr, nr, kc, mc, prefetch } = self;
        // None is numeric: a sum takes `k` in order whatever the blocks are.
        let field = |name, value| Field { name, value, numeric: false };
        [field("mr", mr), field("nr", nr), field("kc", kc), field("mc", mc), field("prefetch", prefetch)]
    }

    /// Reads the text form.
    ///
    /// # Errors
    ///
    /// What does not fit, in words.
    pub fn parse(text: &str) -> Result<DotSchedule, String> {
        let mut fields = DotSchedule { mr: 0, nr: 0, kc: 0, mc: 0, prefetch: 0 }.fields();
        schedule::parse(text, &mut fields)?;
        let [mr, nr, kc, mc, prefetch] = fields.map(|f| f.value);
        if mr == 0 || nr == 0 || mr * nr > 64 {
            return Err("mr and nr must be at least 1, and mr * nr at most 64".to_string());
        }
        if mc == 0 || mc % mr != 0 || mc > 1024 {
            return Err("mc must be a multiple of mr, from mr to 1024".to_string());
        }
        Ok(DotSchedule { mr, nr, kc, mc, prefetch })
    }
}

/// What a dot group is.
#[derive(Clone, Debug)]
pub struct DotGroup {
    /// The rows of the left operand.
    pub a: ValueId,
    /// Number of rows.
    pub m: Dim,
    /// Length of the contraction.
    pub k: usize,
    /// Dtype of the operands.
    pub dtype: DType,
    /// Products in the order in which they run.
    pub segments: Vec<Segment>,
}

/// A product whose outputs are made from the same streams: column `n` is element `(n / chunk, n % chunk)`.
#[derive(Clone, Debug)]
pub struct Segment {
    /// Chunks of columns (heads).
    pub chunks: usize,
    /// Columns of a chunk.
    pub chunk: usize,
    /// The product that each stream is part of, and its rows.
    pub streams: Vec<(ValueId, Stream)>,
    /// What is stored: root and the box of its index space.
    pub pieces: Vec<(ValueId, Piece)>,
}

impl Segment {
    /// Columns of each stream.
    pub fn n(&self) -> usize {
        self.chunks * self.chunk
    }
}

/// Is this a product of rows with a weight, `y[t, n] = sum a[t, k] w[n, k]`? Gives the weight.
pub fn is_linear(graph: &crate::Graph, id: ValueId) -> Option<ValueId> {
    let Op::Dot { axes } = &graph[id].op else { return None };
    let weight = graph[id].operands[1];
    let form = match (&axes.lhs[..], &axes.rhs[..], &axes.out[..]) {
        ([t, k], [n, k2], [t2, n2]) => t == t2 && k == k2 && n == n2,
        _ => false,
    };
    let shape = &graph[weight].ty.shape;
    let float = matches!(graph[weight].ty.dtype, DType::F32 | DType::BF16 | DType::F16);
    let constant = shape.iter().all(|d| d.constant().is_some());
    (form && float && constant && matches!(graph[weight].op, Op::Weight { .. })).then_some(weight)
}

/// Reads segments and streams off a group.
///
/// # Errors
///
/// Where outputs need columns in a way that no packing puts beside each other; `fuse` then takes less into the group.
pub fn analyse(view: &GroupView<'_>) -> Result<DotGroup, LowerError> {
    let graph = view.graph;
    let dots: Vec<ValueId> = view.values.iter().copied().filter(|&v| is_linear(graph, v).is_some()).collect();
    let Some(&first) = dots.first() else { return Err(view.unsupported("a group without a product")) };
    let (a, ty) = (graph[first].operands[0], &graph.operand(first, 0).ty);
    let m = ty.shape[0];
    if dots.iter().any(|&d| graph[d].operands[0] != a) {
        return Err(view.unsupported("products of different operands"));
    }
    let k = ty.shape[1].constant().expect("a linear product's width is constant") as usize;
    let is_dot = |id: ValueId| dots.contains(&id);

    let mut segments: Vec<Segment> = Vec::new();
    for &root in &view.roots {
        let source = stored_value(view, root);
        if graph[source].ty.shape.first() != Some(&m) {
            return Err(view.unsupported("an output that has not the product's rows"));
        }
        let cut =
            pieces(view, source, &is_dot).ok_or_else(|| view.unsupported("an index that is not affine"))?;
        for piece in cut {
            let (vars, index) = piece.vars();
            let mut found = Vec::new();
            columns(view, &vars, source, &index, &is_dot, &mut found)?;
            let (chunks, chunk) = match piece.extent[..] {
                [_, Some(n)] => (1, n as usize),
                [_, Some(chunks), Some(chunk)] => (chunks as usize, chunk as usize),
                _ => return Err(view.unsupported("an output that is not rows of columns or of heads")),
            };
            if found.is_empty() {
                return Err(view.unsupported("an output of which a part needs no product"));
            }
            let mut streams = Vec::new();
            for (dot, column) in found {
                let base = column.base.constant().filter(|&b| b >= 0);
                let stride = if piece.extent.len() == 3 { column.factor(1) } else { chunk as i64 };
                let along = column.factor(piece.extent.len() - 1);
                let (Some(offset), true) = (base, along == 1 && stride > 0) else {
                    return Err(view.unsupported("columns that are not read in order"));
                };
                let weight = graph[dot].operands[1];
                let stream = Stream { weight, chunk, stride: stride as usize, offset: offset as usize };
                streams.push((dot, stream));
            }
            streams.sort_by_key(|(dot, s)| (*dot, s.offset));
            let same = |s: &&mut Segment| s.chunks == chunks && s.chunk == chunk && s.streams == streams;
            match segments.iter_mut().find(same) {
                Some(segment) => segment.pieces.push((root, piece)),
                None => segments.push(Segment { chunks, chunk, streams, pieces: vec![(root, piece)] }),
            }
        }
    }
    // No column may be computed twice, and none may be missing: a product is never duplicated.
    for &dot in &dots {
        let width = graph[dot].ty.shape[1].constant().expect("constant width") as usize;
        // Runs of columns, each chunk one.
        let mut runs: Vec<(usize, usize)> = Vec::new();
        for segment in &segments {
            for (_, stream) in segment.streams.iter().filter(|s| s.0 == dot) {
                runs.extend(
                    (0..segment.chunks)
                        .map(|c| stream.row(c * segment.chunk))
                        .map(|r| (r, r + segment.chunk)),
                );
            }
        }
        runs.sort_unstable();
        let mut end = 0;
        for (first, last) in runs {
            match first.cmp(&end) {
                Ordering::Less => return Err(view.unsupported("a column that two outputs need")),
                Ordering::Equal => end = last,
                Ordering::Greater => break,
            }
        }
        if end != width {
            return Err(view.unsupported("a product with columns that no output needs"));
        }
    }
    Ok(DotGroup { a, m, k, dtype: ty.dtype, segments })
}

/// Collects the products' columns that element `index` of `id` needs.
fn columns(
    view: &GroupView<'_>,
    vars: &Vars,
    id: ValueId,
    index: &[Affine],
    is_dot: &dyn Fn(ValueId) -> bool,
    found: &mut Vec<(ValueId, Affine)>,
) -> Result<(), LowerError> {
    if is_dot(id) {
        if index[0] != Affine::var(0) {
            return Err(view.unsupported("rows that an epilogue moves"));
        }
        let entry = (id, index[1].clone());
        if !found.contains(&entry) {
            found.push(entry);
        }
        return Ok(());
    }
    if !view.has(id) {
        return Ok(());
    }
    if matches!(
        view.graph[id].op,
        Op::Reduce { .. } | Op::Attention { .. } | Op::AttentionLse { .. } | Op::Argmax | Op::Dot { .. }
    ) {
        return Err(view.unsupported(format!("%{} after a product", view.graph[id].name)));
    }
    for number in 0..view.graph[id].operands.len() {
        if let Source::At(moved) = operand_index(view.graph, vars, id, index, number) {
            columns(view, vars, view.graph[id].operands[number], &moved, is_dot, found)?;
        }
    }
    Ok(())
}

/// Elements of `k` that are multiplied together: those of four bytes.
fn word(dtype: DType) -> usize {
    if dtype == DType::BF16 { 2 } else { 1 }
}

/// The packings that a group's weights need, one a segment.
pub fn packs(view: &GroupView<'_>, group: &DotGroup) -> Vec<Pack> {
    let word = word(group.dtype);
    let pack = |(number, segment): (usize, &Segment)| Pack {
        name: format!("{}.{number}", view.name()),
        dtype: group.dtype,
        n: segment.n(),
        k: group.k,
        lanes: Pack::LANES,
        word,
        streams: segment.streams.iter().map(|(_, stream)| stream.clone()).collect(),
    };
    group.segments.iter().enumerate().map(pack).collect()
}

/// A group whose products a CPU has instructions for.
fn covered(view: &GroupView<'_>) -> Result<DotGroup, LowerError> {
    match analyse(view)? {
        group if group.dtype == DType::F16 => Err(view.unsupported("products in f16")),
        group => Ok(group),
    }
}

/// Register tiles that a machine can hold, best first by the model: loads for each multiplication, and how evenly
/// panels fall on tiles and on two, four and eight workers.
///
/// # Errors
///
/// As [`analyse`], and for products in f16.
pub fn candidates(view: &GroupView<'_>, vectors: &Vectors) -> Result<Vec<Candidate>, LowerError> {
    let group = covered(view)?;
    let streams = group.segments.iter().map(|s| s.streams.len()).max().unwrap_or(1);
    let one_row = group.m.constant() == Some(1);
    let words = group.k.div_ceil(word(group.dtype));
    let wide = vectors.per_vector();
    let mut ranked: Vec<(f64, DotSchedule)> = Vec::new();
    for mr in 1..=if one_row { 1 } else { 12 } {
        for nr in (streams..=6).filter(|nr| group.segments.iter().all(|s| nr % s.streams.len() == 0)) {
            // Accumulators, one vector of each column, and a broadcast.
            if (mr * nr + nr) * wide + 1 > vectors.registers && mr * nr > streams {
                continue;
            }
            for (kc, mc) in blocks(words, mr, nr, one_row) {
                for prefetch in 0..=usize::from(!one_row) {
                    let schedule = DotSchedule { mr, nr, kc, mc, prefetch };
                    let cost = group_cost(&group, schedule, wide);
                    ranked.push((cost, schedule));
                }
            }
        }
    }
    if ranked.is_empty() {
        return Err(view.unsupported("streams that do not fit a register tile"));
    }
    ranked.sort_by(|a, b| a.0.total_cmp(&b.0));
    let candidate = |&(cost, schedule): &(f64, DotSchedule)| Candidate {
        schedule: schedule::print(&schedule.fields()),
        cost: Some(cost),
    };
    Ok(ranked.iter().map(candidate).collect())
}

/// Blocks of `k` and of rows to choose from, `(kc, mc)`: none, or as many words as 256 KiB and 24 KiB of weights hold.
fn blocks(words: usize, mr: usize, nr: usize, one_row: bool) -> Vec<(usize, usize)> {
    let mut blocks = vec![(0, mr)];
    if !one_row {
        let sizes = [512 << 10, 256 << 10, 24 << 10].map(|bytes: usize| bytes / (64 * nr));
        let pieces = sizes.map(|most| words.div_ceil(words.div_ceil(most)).next_multiple_of(16));
        blocks
            .extend(pieces.into_iter().filter(|&kc| kc < words).map(|kc| (kc, 96usize.next_multiple_of(mr))));
        blocks.dedup();
    }
    blocks
}

/// Relative cost of a group: its multiplications, times what each of them waits for. The numbers are fitted to what `llamac
/// tune --report` shows.
fn group_cost(group: &DotGroup, schedule: DotSchedule, wide: usize) -> f64 {
    let DotSchedule { mr, nr, kc, mc: _, prefetch } = schedule;
    let words = group.k.div_ceil(word(group.dtype));
    let turns_of = |s: &Segment| s.n().div_ceil(Pack::LANES).div_ceil(nr / s.streams.len());
    // Segments follow each other without waiting, so workers are idle at the end of the last one alone.
    let turns: usize = group.segments.iter().map(turns_of).sum();
    let done = (turns * nr * words) as f64;
    let idle: f64 =
        [2, 4, 8].iter().map(|w| (turns.div_ceil(*w) * w) as f64 / turns as f64).sum::<f64>() / 3.0;
    if group.m.constant() == Some(1) {
        // A row streams weights, which the hardware asks for early by itself. A step of `k` takes a multiplication's latency,
        // some six cycles: three vectors a step reach the memory's rate, two hardly, one does not.
        let wait = [1.2, 1.05, 1.01, 1.0, 1.0, 1.02][(nr - 1).min(5)];
        return done * idle * if prefetch > 0 { 1.1 * wait } else { wait };
    }
    // A sum waits for its last multiplication: two pipelines that take four cycles (f32) or six (bf16) want as many sums.
    let sums = (mr * nr * wide) as f64;
    let wanted = if group.dtype == DType::BF16 { 12.0 } else { 8.0 };
    let chain = (1.0 + (wanted / sums).powi(8)).powf(0.125);
    // Loads hide behind the multiplications, until there are more than half as many.
    let ratio = (mr + nr) as f64 / (mr * nr) as f64;
    let loads = 1.0 + 0.05 * ratio + 0.3 * (ratio - 0.6).max(0.0);
    // The last tile of a step of a few hundred rows is half empty.
    let rest = 1.0 + (mr - 1) as f64 / 512.0;
    // The weights of a turn are read again for each tile: they should stay in a core's larger cache, of a mebibyte or so.
    // Storing sums between blocks costs something too.
    let block = (if kc == 0 { words } else { kc } * nr * 64) as f64 / f64::from(1 << 20);
    let spills = (1.0 + 0.15 * block.powi(4).min(10.0)) * if kc > 0 { 1.01 + 3.0 / kc as f64 } else { 1.0 };
    done * idle * chain * loads * rest * spills * if prefetch > 0 { 1.0 } else { 1.02 }
}

/// The kernel of a dot group.
///
/// # Errors
///
/// As [`candidates`], and where the schedule does not fit.
pub fn lower(view: &GroupView<'_>, vectors: &Vectors) -> Result<Lowered, LowerError> {
    let group = covered(view)?;
    let text = match &view.graph.groups[view.id.0 as usize].schedule {
        Some(text) => text.clone(),
        None => candidates(view, vectors)?.swap_remove(0).schedule,
    };
    let schedule = DotSchedule::parse(&text).map_err(|what| LowerError::Schedule {
        group: view.name().to_string(),
        schedule: text,
        what,
    })?;
    let mut l = Lowering::new(view);
    let a = left_operand(&mut l, &group)?;
    for (number, segment) in group.segments.iter().enumerate() {
        product(&mut l, &group, &schedule, segment, number, a)?;
    }
    Ok(l.finish())
}

/// The rows of `a` in memory: as they lie there, or made by the prologue in a workspace.
fn left_operand(l: &mut Lowering<'_, '_>, group: &DotGroup) -> Result<BufferId, LowerError> {
    let word = word(group.dtype);
    let whole_words = group.k.is_multiple_of(word);
    if let Some(stored) = stored_left(l.view, group.a).filter(|_| whole_words) {
        return Ok(l.rows("a", stored));
    }
    let columns = group.k.next_multiple_of(word);
    let a = l.workspace("a", group.dtype, group.m, columns, row_pitch(columns, group.dtype));
    l.vector_or_scalar(&|l, lanes| {
        let mut result = Ok(());
        l.parallel("t", group.m.into(), |l, t| result = left_row(l, group, a, t, lanes));
        result
    })?;
    l.k.barrier();
    Ok(a)
}

/// The tensor in memory whose rows are the left operand, if there is one: reshapes that keep the rows are seen through.
pub fn stored_left(view: &GroupView<'_>, a: ValueId) -> Option<ValueId> {
    let value = &view.graph[a];
    if !view.has(a) {
        return (!matches!(value.op, Op::Constant { .. })).then_some(a);
    }
    let operand = *value.operands.first()?;
    let keeps_rows =
        matches!(value.op, Op::Reshape) && view.graph[operand].ty.shape.first() == value.ty.shape.first();
    if keeps_rows { stored_left(view, operand) } else { None }
}

fn left_row(
    l: &mut Lowering<'_, '_>,
    group: &DotGroup,
    a: BufferId,
    t: Expr,
    lanes: u16,
) -> Result<(), LowerError> {
    let mut vars = Vars::default();
    let row = vars.add(t.clone(), group.m.constant());
    let folds = rowwise::fold(l, &vars, std::slice::from_ref(&row), &[group.a], lanes)?;
    let leaf = |id: ValueId, _: &[Affine]| folds.iter().find(|f| f.0 == id).map(|f| f.1.clone());
    l.along(&vars, group.k as i64, lanes, &mut |l, vars, column| {
        let at = vars.expr(&column);
        let now = vars.lanes();
        let mut scope = Scope::new(vars);
        let x = l.value_at(&mut scope, group.a, &[row.clone(), column], &leaf)?;
        let has = l.k.kernel().type_of(&x).lanes();
        l.k.store(a, &[t.clone(), at], x.splat(now / has));
        Ok(())
    })?;
    if group.k % 2 == 1 && group.dtype == DType::BF16 {
        l.k.store(a, &[t, group.k.into()], Expr::f32(0.0, 1));
    }
    Ok(())
}

/// Elements from row to row, so that rows that are read together do not fall on the same cache sets: a multiple of
/// 64 bytes, and not of 4 KiB.
pub fn row_pitch(columns: usize, dtype: DType) -> usize {
    let line = 64 / dtype.bytes(1);
    let pitch = columns.next_multiple_of(line);
    if (pitch * dtype.bytes(1)).is_multiple_of(2048) { pitch + line } else { pitch }
}

/// One segment: panels split over the workers, `nr` vectors of columns a turn, all rows in tiles of `mr`.
fn product(
    l: &mut Lowering<'_, '_>,
    group: &DotGroup,
    schedule: &DotSchedule,
    segment: &Segment,
    number: usize,
    a: BufferId,
) -> Result<(), LowerError> {
    let DotSchedule { nr, kc, prefetch, .. } = *schedule;
    let streams = segment.streams.len();
    if nr % streams != 0 {
        return Err(LowerError::Schedule {
            group: l.view.name().to_string(),
            schedule: schedule::print(&schedule.fields()),
            what: format!("nr must be a multiple of the {streams} streams"),
        });
    }
    let one_row = group.m.constant() == Some(1);
    let name = format!("{}.{number}", l.view.name());
    let pack_number = l.view.graph.packs.iter().position(|p| p.name == name);
    let Some(pack_number) = pack_number else { return Err(l.view.unsupported("weights without a layout")) };
    let pack = l.view.graph.packs[pack_number].clone();
    let (panels, per_turn) = (pack.panels(), nr / streams);
    let words = pack.words();
    let kc = if kc == 0 { words } else { kc.min(words) };
    let (mr, mc) = match (one_row, kc == words) {
        (true, _) => (1, 1),
        // Nothing waits: a tile is finished in one go.
        (false, true) => (schedule.mr, schedule.mr),
        (false, false) => (schedule.mr, schedule.mc),
    };
    let w = l.pack("w", pack_number);
    let sums = l.k.local("tile", DType::F32, &[mc, nr * Pack::LANES]);

    let mut result = Ok(());
    l.parallel("turn", panels.div_ceil(per_turn).into(), |l, turn| {
        let panel = |j: Expr| {
            let panel = turn.clone() * per_turn + j;
            if panels % per_turn == 0 { panel } else { panel.min(panels - 1) }
        };
        let mut rows = |l: &mut Lowering<'_, '_>, m: Expr| {
            let count = if one_row { Expr::Int(1) } else { (Expr::from(group.m) - m.clone()).min(mc) };
            let count = if mc == 1 { count } else { l.k.let_("rows", count) };
            let ahead = if one_row { 0 } else { prefetch * per_turn };
            let micro = MicroKernel { group, pack: &pack, mr, nr, ahead, a, w, sums, panel: &panel, m: &m };
            micro.block(&mut l.k, count.clone(), [0usize.into(), kc.into()], true);
            l.k.for_("from", kc, words, kc as i64, |k, from| {
                let to = (from.clone() + kc).min(words);
                micro.block(k, count.clone(), [from, to], false);
            });
            l.looped("i", count, |l, i| {
                let t = l.k.let_("t", m.clone() + i.clone());
                l.looped("p", per_turn.into(), |l, p| {
                    let at = l.k.let_("panel", panel(p.clone()));
                    let tile = Tile { buffer: sums, row: i, column: p * (streams * Pack::LANES) };
                    let ended = epilogue(l, segment, &tile, &t, &at);
                    result = std::mem::replace(&mut result, Ok(())).and(ended);
                });
            });
        };
        if one_row {
            rows(l, Expr::Int(0));
        } else {
            l.stepped("m", group.m.into(), mc as i64, rows);
        }
    });
    result
}

/// `mr` rows by `nr` vectors of columns in registers.
struct MicroKernel<'a> {
    group: &'a DotGroup,
    pack: &'a Pack,
    mr: usize,
    nr: usize,
    /// How many panels ahead weights are asked for; 0 for not at all.
    ahead: usize,
    a: BufferId,
    w: BufferId,
    /// Sums of a block of rows: `[mc, 16 nr]`.
    sums: BufferId,
    /// The `j`-th panel of this turn.
    panel: &'a dyn Fn(Expr) -> Expr,
    /// First row of the block.
    m: &'a Expr,
}

impl MicroKernel<'_> {
    /// Adds the products of words `from..to` of `k` to the sums of `count` rows, or begins them.
    fn block(&self, k: &mut Builder, count: Expr, [from, to]: [Expr; 2], begins: bool) {
        let MicroKernel { group, pack, mr, nr, ahead, a, w, sums, .. } = *self;
        let lanes = LANES * pack.word as u16;
        let vector = Type::Vector { dtype: group.dtype, lanes };
        let streams = pack.streams.len();
        // One tile needs no loop.
        let single =
            mr == k.kernel()[sums].shape[0].constant().expect("a local's shape is constant") as usize;
        let tile = |k: &mut Builder, r: Expr| {
            let last = Expr::from(group.m) - 1i64;
            let row = |i: Expr| match group.m.constant() {
                Some(1) => Expr::Int(0),
                _ => (self.m.clone() + r.clone() + i).min(last.clone()),
            };
            let acc = k.reg("acc", Type::f32(LANES), &[mr, nr], begins.then(|| Expr::f32(0.0, LANES)));
            let b = k.reg("b", vector, &[nr], None);
            let each = |k: &mut Builder, body: &mut dyn FnMut(&mut Builder, Expr, Expr)| {
                k.unroll("i", mr, |k, i| k.unroll("j", nr, |k, j| body(k, i, j)));
            };
            let place = |i: &Expr, j: &Expr| [r.clone() + i.clone(), j.clone() * Pack::LANES];
            if !begins {
                each(k, &mut |k, i, j| {
                    let sum = k.load(sums, &place(&i, &j), LANES);
                    k.set(acc, &[i, j], sum);
                });
            }
            let step = |k: &mut Builder, at: Expr| {
                k.unroll("j", nr, |k, j| {
                    let place =
                        [(self.panel)(j.clone() / streams), j.clone() % streams, at.clone(), Expr::Int(0)];
                    let column = k.load(w, &place, lanes);
                    k.set(b, &[j], column);
                });
                k.unroll("i", mr, |k, i| {
                    let x = k.load(a, &[row(i.clone()), at * pack.word], pack.word as u16);
                    let x = k.let_("x", x.splat(LANES));
                    k.unroll("j", nr, |k, j| {
                        let (sum, column) =
                            (k.get(acc, &[i.clone(), j.clone()]), k.get(b, std::slice::from_ref(&j)));
                        let sum = match group.dtype {
                            DType::BF16 => sum.dot_bf16(x.clone(), column),
                            _ => x.clone().fma(column, sum),
                        };
                        k.set(acc, &[i, j], sum);
                    });
                });
            };
            if ahead == 0 {
                k.for_("k", from.clone(), to.clone(), 1, step);
            } else {
                // Each of the first tiles asks for one vector of columns of a later turn.
                let number = k.let_("number", (self.m.clone() + r.clone()) / mr);
                k.open();
                k.for_("k", from.clone(), to.clone(), 1, |k, at| {
                    let panel = (self.panel)(number.clone() / streams) + ahead;
                    k.prefetch(w, &[panel, number.clone() % streams, at.clone(), Expr::Int(0)]);
                    step(k, at);
                });
                let asking = k.close();
                k.open();
                k.for_("k", from.clone(), to.clone(), 1, step);
                let not = k.close();
                k.if_else(number.compare(Compare::Lt, nr), asking, not);
            }
            each(k, &mut |k, i, j| {
                let sum = k.get(acc, &[i.clone(), j.clone()]);
                k.store(sums, &place(&i, &j), sum);
            });
        };
        match single {
            true => tile(k, Expr::Int(0)),
            false => k.for_("r", 0usize, count, mr as i64, tile),
        }
    }
}

/// Where a finished panel's sums lie: stream `s`, column `c` at `[row, column + 16 s + c]`.
struct Tile {
    buffer: BufferId,
    row: Expr,
    column: Expr,
}

/// Stores what the outputs are made of a finished panel: as vectors where 16 columns lie in one chunk, else one by one.
fn epilogue(
    l: &mut Lowering<'_, '_>,
    segment: &Segment,
    tile: &Tile,
    t: &Expr,
    panel: &Expr,
) -> Result<(), LowerError> {
    let lanes = Pack::LANES;
    if segment.chunk.is_multiple_of(lanes) {
        return vectors(l, segment, tile, t, panel);
    }
    if segment.chunks > 1 || segment.chunk < lanes {
        return scalars(l, segment, tile, t, panel);
    }
    // One chunk with a rest: whole panels as vectors, the last one by one.
    let mut result = Ok(());
    let whole = segment.chunk / lanes;
    l.branch(panel.clone().compare(Compare::Lt, whole), |l, holds| {
        let done =
            if holds { vectors(l, segment, tile, t, panel) } else { scalars(l, segment, tile, t, panel) };
        result = std::mem::replace(&mut result, Ok(())).and(done);
    });
    result
}

fn vectors(
    l: &mut Lowering<'_, '_>,
    segment: &Segment,
    tile: &Tile,
    t: &Expr,
    panel: &Expr,
) -> Result<(), LowerError> {
    let lanes = Pack::LANES;
    let per_chunk = segment.chunk / lanes;
    let mut vars = Vars::default();
    let row = vars.add(t.clone(), None);
    let (chunk, part) = match segment.chunks {
        1 => (None, vars.add(panel.clone(), Some(per_chunk as i64))),
        chunks => {
            let chunk = l.k.let_("head", panel.clone() / per_chunk);
            let part = l.k.let_("part", panel.clone() % per_chunk);
            (Some(vars.add(chunk, Some(chunks as i64))), vars.add(part, Some(per_chunk as i64)))
        }
    };
    let column = part.times(lanes as i64).plus(&vars.add_lane(LANES));
    let sums = tile.sums(l, segment, Expr::Int(0), LANES);
    outputs(l, segment, Place { vars, row, chunk, column }, &sums)
}

fn scalars(
    l: &mut Lowering<'_, '_>,
    segment: &Segment,
    tile: &Tile,
    t: &Expr,
    panel: &Expr,
) -> Result<(), LowerError> {
    let mut result = Ok(());
    let left = Expr::from(segment.n()) - panel.clone() * Pack::LANES;
    l.looped("lane", left.min(Pack::LANES), |l, lane| {
        let n = l.k.let_("n", panel.clone() * Pack::LANES + lane.clone());
        let place = Place::of(l, segment, t, &n, 1);
        let sums = tile.sums(l, segment, lane, 1);
        result = outputs(l, segment, place, &sums);
    });
    result
}

impl Tile {
    /// The sums of each stream at `lanes` columns from `lane` on.
    fn sums(&self, l: &mut Lowering<'_, '_>, segment: &Segment, lane: Expr, lanes: u16) -> Vec<Expr> {
        let sum = |stream: usize| {
            let at = self.column.clone() + (stream * Pack::LANES) + lane.clone();
            let sum = l.k.load(self.buffer, &[self.row.clone(), at], lanes);
            l.k.let_("sum", sum)
        };
        (0..segment.streams.len()).map(sum).collect()
    }
}

/// Where in the index space of a segment's outputs something is stored.
pub struct Place {
    vars: Vars,
    row: Affine,
    /// `None` where there is one chunk only.
    chunk: Option<Affine>,
    column: Affine,
}

impl Place {
    /// Row `t`, and `lanes` columns from `n` on, which lie in one chunk: its length and `n` are multiples of `lanes`.
    pub fn of(l: &mut Lowering<'_, '_>, segment: &Segment, t: &Expr, n: &Expr, lanes: u16) -> Place {
        let mut vars = Vars::default();
        let row = vars.add(t.clone(), None);
        let (chunk, part) = match segment.chunks {
            1 => (None, n.clone()),
            chunks => {
                let chunk = l.k.let_("head", n.clone() / segment.chunk);
                let part = l.k.let_("part", n.clone() % segment.chunk);
                (Some(vars.add(chunk, Some(chunks as i64))), part)
            }
        };
        if lanes == 1 {
            let column = vars.add(part, Some(segment.chunk as i64));
            return Place { vars, row, chunk, column };
        }
        let number = l.k.let_("number", part / i64::from(lanes));
        let column = vars.add(number, Some(segment.chunk as i64 / i64::from(lanes))).times(lanes.into());
        let column = column.plus(&vars.add_lane(lanes));
        Place { vars, row, chunk, column }
    }
}

/// Evaluates and stores each output of a segment at one place; `sums` are the products' columns there, one a stream.
///
/// # Errors
///
/// Where an access is no vector and no scalar.
pub fn outputs(
    l: &mut Lowering<'_, '_>,
    segment: &Segment,
    place: Place,
    sums: &[Expr],
) -> Result<(), LowerError> {
    let Place { vars, row, chunk, column } = place;
    let mut scope = Scope::new(vars);
    let leaf = |id: ValueId, index: &[Affine]| {
        let offset = index.get(1)?.base.constant()?;
        let is = |(dot, stream): &(ValueId, Stream)| *dot == id && stream.offset as i64 == offset;
        segment.streams.iter().position(is).map(|s| sums[s].clone())
    };
    for (root, piece) in &segment.pieces {
        // A single chunk may be an axis of its own, or none.
        let chunk = chunk.clone().unwrap_or(Affine::constant(Dim::of(0)));
        let place = match piece.start.len() {
            2 => vec![row.clone(), column.clone()],
            _ => vec![row.clone(), chunk, column.clone()],
        };
        let index: Vec<Affine> =
            place.into_iter().zip(&piece.start).map(|(index, &start)| index.offset(Dim::of(start))).collect();
        let value = l.value_at(&mut scope, stored_value(l.view, *root), &index, &leaf)?;
        l.store_at(&mut scope, *root, &index, value, &leaf)?;
    }
    Ok(())
}
