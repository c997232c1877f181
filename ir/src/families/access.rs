//! Inlines a group's element-wise expressions where a tile is loaded or stored.
//!
//! An element of a tensor is named by an *affine index*: for each axis a sum of loop variables with constant factors.
//! [`operand_index`] says which element of an operand an element of the result needs; it is the one place that knows
//! how `broadcast reshape transpose slice concat` move data. Analysis (which columns of a product does this output
//! need?) and code generation walk with the same function.
//!
//! One variable may be the *lane*: its values are computed together in a vector. An access is a vector load where the
//! last axis moves by one with the lane, a scalar where nothing does, and refused otherwise.

use super::{Arg, GroupView, LowerError, storage};
use crate::dim::Dim;
use crate::dtype::DType;
use crate::graph::{Layout, Pack, ValueId};
use crate::kernel::{self, Access, Arith, BufferId, Expr, Space, Type, WARP};
use crate::op::{Binary, Compare, Op, Reduction};

/// A loop variable that indices are made of.
#[derive(Clone, Debug)]
pub struct Var {
    /// Its value in the kernel. The lane's is 0.
    pub expr: Expr,
    /// It counts from 0 to here; `None` for a symbolic extent.
    pub extent: Option<i64>,
    /// Is it the lane of vectors?
    pub lane: bool,
}

/// `base + sum(factor * variable)`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Affine {
    /// Variable's index in [`Vars`] and factor, by variable; no zero factors.
    pub terms: Vec<(usize, i64)>,
    /// The part without a variable.
    pub base: Dim,
}

impl Affine {
    /// One variable.
    pub fn var(var: usize) -> Affine {
        Affine { terms: vec![(var, 1)], base: Dim::of(0) }
    }

    /// A constant.
    pub fn constant(base: Dim) -> Affine {
        Affine { terms: Vec::new(), base }
    }

    /// The sum.
    pub fn plus(mut self, other: &Affine) -> Affine {
        self.base = self.base + other.base;
        for &(var, factor) in &other.terms {
            match self.terms.iter_mut().find(|t| t.0 == var) {
                Some(term) => term.1 += factor,
                None => self.terms.push((var, factor)),
            }
        }
        self.terms.retain(|t| t.1 != 0);
        self.terms.sort_unstable();
        self
    }

    /// A constant more.
    pub fn offset(mut self, by: Dim) -> Affine {
        self.base = self.base + by;
        self
    }

    /// A multiple.
    pub fn times(mut self, factor: i64) -> Affine {
        self.base = self.base * factor;
        self.terms.iter_mut().for_each(|t| t.1 *= factor);
        self.terms.retain(|t| t.1 != 0);
        self
    }

    /// The factor of a variable.
    pub fn factor(&self, var: usize) -> i64 {
        self.terms.iter().find(|t| t.0 == var).map_or(0, |t| t.1)
    }
}

/// The variables of a walk.
#[derive(Clone, Debug, Default)]
pub struct Vars(pub Vec<Var>);

impl Vars {
    /// Adds a variable and gives the index that is it.
    pub fn add(&mut self, expr: Expr, extent: Option<i64>) -> Affine {
        self.0.push(Var { expr, extent, lane: false });
        Affine::var(self.0.len() - 1)
    }

    /// Adds the lane.
    pub fn add_lane(&mut self, lanes: u16) -> Affine {
        self.0.push(Var { expr: Expr::Int(0), extent: Some(lanes.into()), lane: true });
        Affine::var(self.0.len() - 1)
    }

    /// Lanes of vectors; 1 without a lane variable.
    pub fn lanes(&self) -> u16 {
        self.0.iter().find(|v| v.lane).map_or(1, |v| v.extent.expect("lanes are constant") as u16)
    }

    /// How the index moves with the lane.
    pub fn lane_factor(&self, index: &Affine) -> i64 {
        index.terms.iter().filter(|t| self.0[t.0].lane).map(|t| t.1).sum()
    }

    /// The index as kernel text, at lane 0.
    pub fn expr(&self, index: &Affine) -> Expr {
        let terms = index.terms.iter().filter(|t| !self.0[t.0].lane);
        let sum = terms.fold(Expr::Int(0), |sum, &(var, factor)| sum + self.0[var].expr.clone() * factor);
        sum + Expr::from(index.base)
    }

    /// Smallest and largest value, where the index has no symbol in it.
    pub fn range(&self, index: &Affine) -> Option<(i64, i64)> {
        let base = index.base.constant()?;
        index.terms.iter().try_fold((base, base), |(lo, hi), &(var, factor)| {
            let reach = (self.0[var].extent? - 1).max(0) * factor;
            Some((lo + reach.min(0), hi + reach.max(0)))
        })
    }

    /// Splits `index` into `(index / by, index % by)`, where the parts are affine: factors that are multiples of `by`
    /// go up, the rest must stay below `by`.
    fn split(&self, index: &Affine, by: i64) -> Option<(Affine, Affine)> {
        let base = index.base.constant()?;
        let (mut up, mut low) =
            (Affine::constant(Dim::of(base.div_euclid(by))), Affine::constant(Dim::of(base.rem_euclid(by))));
        for &(var, factor) in &index.terms {
            if factor % by == 0 { up.terms.push((var, factor / by)) } else { low.terms.push((var, factor)) }
        }
        let (lo, hi) = self.range(&low)?;
        (0 <= lo && hi < by).then_some((up, low))
    }
}

/// Where an operand's element lies.
#[derive(Clone, Debug)]
pub enum Source {
    /// At this index of the operand.
    At(Vec<Affine>),
    /// The element does not come from this operand (of a `concat`).
    Elsewhere,
    /// Part of the range comes from here: the variable must be cut at this value.
    Cut {
        /// The variable.
        var: usize,
        /// First value of the second part.
        at: i64,
    },
    /// No affine index.
    No,
}

/// Which element of operand `number` the element `index` of `id` needs. For ops that move or map elements one to one.
pub fn operand_index(
    graph: &crate::Graph,
    vars: &Vars,
    id: ValueId,
    index: &[Affine],
    number: usize,
) -> Source {
    let value = &graph[id];
    let operand = graph.operand(id, number);
    match &value.op {
        Op::Cast | Op::Unary(_) | Op::Binary(_) | Op::Compare(_) | Op::Select => Source::At(index.to_vec()),
        Op::Broadcast { axes } => Source::At(axes.iter().map(|&axis| index[axis].clone()).collect()),
        Op::Transpose { perm } => {
            let mut moved = vec![Affine::constant(Dim::of(0)); perm.len()];
            for (axis, &from) in perm.iter().enumerate() {
                moved[from] = index[axis].clone();
            }
            Source::At(moved)
        }
        Op::Slice { axis, start } => {
            let mut moved = index.to_vec();
            moved[*axis] = moved[*axis].clone().offset(*start);
            Source::At(moved)
        }
        Op::Concat { axis } => {
            let extent = |i: usize| graph.operand(id, i).ty.shape[*axis].constant();
            let Some(begin) = (0..number).map(extent).sum::<Option<i64>>() else { return Source::No };
            let Some(end) = extent(number).map(|e| begin + e) else { return Source::No };
            let Some((lo, hi)) = vars.range(&index[*axis]) else { return Source::No };
            if hi < begin || end <= lo {
                return Source::Elsewhere;
            }
            if begin <= lo && hi < end {
                let mut moved = index.to_vec();
                moved[*axis] = moved[*axis].clone().offset(Dim::of(-begin));
                return Source::At(moved);
            }
            let at = if lo < begin { begin } else { end };
            match index[*axis].terms[..] {
                [(var, 1)] => Source::Cut { var, at: at - index[*axis].base.base },
                _ => Source::No,
            }
        }
        Op::Reshape => {
            reshaped(vars, &value.ty.shape, index, &operand.ty.shape).map_or(Source::No, Source::At)
        }
        _ => Source::No,
    }
}

/// The element of a tensor of shape `to` that is element `index` of the same data in shape `from`.
fn reshaped(vars: &Vars, from: &[Dim], index: &[Affine], to: &[Dim]) -> Option<Vec<Affine>> {
    // Equal leading axes stay as they are: among them a symbolic one.
    let lead = from.iter().zip(to).take_while(|(a, b)| a == b).count();
    let mut linear = Affine::constant(Dim::of(0));
    for (axis, extent) in from.iter().enumerate().skip(lead) {
        linear = linear.times(extent.constant()?).plus(&index[axis]);
    }
    let mut out = Vec::new();
    for extent in to[lead..].iter().skip(1).rev() {
        let (up, low) = vars.split(&linear, extent.constant()?)?;
        out.push(low);
        linear = up;
    }
    if to.len() > lead {
        out.push(linear);
    } else if linear != Affine::constant(Dim::of(0)) && vars.range(&linear) != Some((0, 0)) {
        return None;
    }
    out.extend(index[..lead].iter().rev().cloned());
    out.reverse();
    Some(out)
}

/// A box of a tensor's index space, whose every element is computed alike: `start[axis]..start[axis] + extent[axis]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Piece {
    /// First index on each axis.
    pub start: Vec<i64>,
    /// Extent on each axis; `None` for a symbolic axis.
    pub extent: Vec<Option<i64>>,
}

impl Piece {
    /// Variables for the axes and the index that they make.
    pub fn vars(&self) -> (Vars, Vec<Affine>) {
        let mut vars = Vars::default();
        let axes = self.extent.iter().zip(&self.start);
        let index =
            axes.map(|(&extent, &start)| vars.add(Expr::Int(0), extent).offset(Dim::of(start))).collect();
        (vars, index)
    }
}

/// Cuts a value's index space into boxes on each of which every `concat` below it takes one operand. `leaf` ends the
/// walk at values that are not inlined.
pub fn pieces(view: &GroupView<'_>, root: ValueId, leaf: &dyn Fn(ValueId) -> bool) -> Option<Vec<Piece>> {
    let shape = &view.graph[root].ty.shape;
    let whole = Piece { start: vec![0; shape.len()], extent: shape.iter().map(|d| d.constant()).collect() };
    let (mut open, mut done) = (vec![whole], Vec::new());
    while let Some(piece) = open.pop() {
        let (vars, index) = piece.vars();
        match cut(view, &vars, root, &index, leaf)? {
            None => done.push(piece),
            Some((axis, at)) => {
                let (mut first, mut second) = (piece.clone(), piece);
                first.extent[axis] = Some(at);
                second.start[axis] += at;
                second.extent[axis] = second.extent[axis].map(|e| e - at);
                open.push(second);
                open.push(first);
            }
        }
    }
    Some(done)
}

/// Where the walk below `id` wants the box cut; the outer `None` if it cannot be walked.
fn cut(
    view: &GroupView<'_>,
    vars: &Vars,
    id: ValueId,
    index: &[Affine],
    leaf: &dyn Fn(ValueId) -> bool,
) -> Option<Option<(usize, i64)>> {
    if leaf(id)
        || !view.has(id)
        || matches!(view.graph[id].op, Op::Gather | Op::Iota { .. } | Op::Constant { .. })
    {
        return Some(None);
    }
    for number in 0..view.graph[id].operands.len() {
        match operand_index(view.graph, vars, id, index, number) {
            Source::At(moved) => {
                if let Some(at) = cut(view, vars, view.graph[id].operands[number], &moved, leaf)? {
                    return Some(Some(at));
                }
            }
            Source::Elsewhere => {}
            Source::Cut { var, at } => return Some(Some((var, at))),
            Source::No => return None,
        }
    }
    Some(None)
}

/// A kernel being generated from a group: the builder, its parameters, and the inliner.
pub struct Lowering<'a, 'g> {
    /// The group.
    pub view: &'a GroupView<'g>,
    /// The kernel.
    pub k: kernel::Builder,
    /// What the parameters are bound to, in order.
    pub args: Vec<Arg>,
    buffers: Vec<BufferId>,
    /// The threads that do a row together, on a GPU.
    warp: Option<Warp>,
}

/// A warp of a CTA, as one of its threads sees it.
#[derive(Clone, Debug)]
pub struct Warp {
    /// Warps of the CTA.
    pub count: usize,
    /// This one's number.
    pub number: Expr,
    /// This thread's lane.
    pub lane: Expr,
}

/// What is known in the block being written: values already computed there.
#[derive(Clone, Default)]
pub struct Scope {
    /// Loop variables.
    pub vars: Vars,
    /// Elements named by a `let`.
    elements: Vec<(ValueId, Vec<Affine>, Expr)>,
}

impl Scope {
    /// A block with these variables.
    pub fn new(vars: Vars) -> Scope {
        Scope { vars, elements: Vec::new() }
    }
}

/// What a root stores: the value whose index space its loops run over. Appending to a cache stores the rows; a reshape
/// stores what it reshapes.
pub fn stored_value(view: &GroupView<'_>, root: ValueId) -> ValueId {
    let value = &view.graph[root];
    match value.op {
        Op::CacheAppend if view.has(root) => value.operands[1],
        Op::Reshape if view.has(root) && view.has(value.operands[0]) => stored_value(view, value.operands[0]),
        _ => root,
    }
}

/// Values that the family itself supplies: folded rows, accumulators.
pub type Leaf<'l> = dyn Fn(ValueId, &[Affine]) -> Option<Expr> + 'l;

impl<'a, 'g> Lowering<'a, 'g> {
    /// Begins the kernel of a group.
    pub fn new(view: &'a GroupView<'g>) -> Lowering<'a, 'g> {
        let group = &view.graph.groups[view.id.0 as usize];
        let schedule = group.schedule.clone().unwrap_or_default();
        let k = kernel::Builder::new(tail(&group.name), group.family, schedule, view.kernel_symbols());
        Lowering { view, k, args: Vec::new(), buffers: Vec::new(), warp: None }
    }

    /// Begins the kernel of a group whose workers are CTAs of so many warps.
    pub fn of_warps(view: &'a GroupView<'g>, count: usize) -> Lowering<'a, 'g> {
        let mut l = Lowering::new(view);
        l.k.threads(count * usize::from(WARP));
        let lane = l.k.let_("lane", Expr::Thread % i64::from(WARP));
        let number = l.k.let_("warp", Expr::Thread / i64::from(WARP));
        l.warp = Some(Warp { count, number, lane });
        l
    }

    /// The warp of a GPU's kernel.
    ///
    /// # Panics
    ///
    /// In a CPU's.
    pub fn warp(&self) -> Warp {
        self.warp.clone().expect("begun by of_warps")
    }

    /// Runs `body` for each row: on a CPU a turn is a row; on a GPU a warp does one.
    pub fn each_row(&mut self, rows: Expr, body: impl FnOnce(&mut Self, Expr)) {
        let Some(Warp { count, number, .. }) = self.warp.clone() else {
            return self.parallel("t", rows, body);
        };
        let turns = (rows.clone() + (count - 1)) / count;
        self.parallel("rows", turns, |l, turn| {
            let t = l.k.let_("t", turn * count + number);
            l.only(t.clone().compare(Compare::Lt, rows), |l| body(l, t));
        });
    }

    /// Runs `body` once a row: on a GPU by the warp's first lane.
    pub fn once(&mut self, body: impl FnOnce(&mut Self)) {
        match self.warp.clone() {
            None => body(self),
            Some(Warp { lane, .. }) => self.only(lane.compare(Compare::Eq, 0usize), body),
        }
    }

    /// `if cond { ... }`, with the whole lowering inside.
    pub fn only(&mut self, cond: Expr, body: impl FnOnce(&mut Self)) {
        self.k.open();
        body(self);
        let then = self.k.close();
        self.k.if_else(cond, then, Vec::new());
    }

    /// Folds a scalar that each thread of a row has; all get the result.
    pub fn folded(&mut self, kind: Reduction, value: Expr) -> Expr {
        let sign = match kind {
            Reduction::Sum => Arith::Add,
            Reduction::Max => Arith::Max,
        };
        let masks = [16, 8, 4, 2, 1].into_iter().filter(|_| self.warp.is_some());
        masks.fold(value, |value, mask| {
            let value = self.k.let_("part", value);
            Expr::Arith(sign, Box::new(value.clone()), Box::new(value.shuffle(mask)))
        })
    }

    /// Lanes of the vectors that a row is done in.
    pub fn width(&self) -> u16 {
        if self.warp.is_some() { 8 } else { kernel::LANES }
    }

    /// Ends the kernel.
    pub fn finish(self) -> super::Lowered {
        super::Lowered { kernel: self.k.finish(), args: self.args }
    }

    fn bind(
        &mut self,
        arg: Arg,
        name: &str,
        access: Access,
        dtype: DType,
        shape: &[Dim],
        strides: Option<Vec<i64>>,
    ) -> BufferId {
        if let Some(at) = self.args.iter().position(|a| *a == arg && !matches!(a, Arg::Workspace { .. })) {
            return self.buffers[at];
        }
        let buffer = self.k.buffer(name, Space::Global(access), dtype, shape, strides);
        self.args.push(arg);
        self.buffers.push(buffer);
        buffer
    }

    /// A tensor in memory as a parameter. The name says its role, not which tensor it is, so that layers share kernels.
    pub fn tensor(&mut self, name: &str, id: ValueId, access: Access) -> BufferId {
        let graph = self.view.graph;
        let id = storage(graph, id);
        let value = &graph[id];
        let dims = |shape: &[usize]| -> Vec<Dim> { shape.iter().map(|&n| n.into()).collect() };
        let extent =
            |axis: usize| value.ty.shape[axis].constant().expect("caches are of constant shape") as usize;
        let (shape, strides) = match value.layout {
            None => (value.ty.shape.clone(), None),
            Some(Layout::Rows { pitch }) => {
                let mut strides = kernel::row_major(&value.ty.shape);
                strides[0] = pitch as i64;
                (value.ty.shape.clone(), Some(strides))
            }
            Some(Layout::Pages { slots }) => (dims(&[extent(1) / slots, extent(0), slots, extent(2)]), None),
            Some(Layout::KeyPanels { word }) => {
                let (g, c, d) = (extent(0), extent(1), extent(2));
                let lanes = Pack::LANES;
                (dims(&[g, c.div_ceil(lanes), d.div_ceil(word), lanes * word]), None)
            }
            Some(Layout::ValuePanels { word }) => {
                let (g, c, d) = (extent(0), extent(1), extent(2));
                let lanes = Pack::LANES;
                (dims(&[g, d.div_ceil(lanes), c.div_ceil(word), lanes * word]), None)
            }
        };
        let dtype = value.ty.dtype;
        self.bind(Arg::Value(id), name, access, dtype, &shape, strides)
    }

    /// A tensor in memory of which axis 0 is rows and the others together are columns, as `[rows, columns]`.
    pub fn rows(&mut self, name: &str, id: ValueId) -> BufferId {
        let value = &self.view.graph[id];
        let columns: i64 =
            value.ty.shape[1..].iter().map(|d| d.constant().expect("constant columns")).product();
        let pitch = match value.layout {
            Some(Layout::Rows { pitch }) => pitch as i64,
            _ => columns,
        };
        let shape = [value.ty.shape[0], Dim::of(columns)];
        self.bind(Arg::Value(id), name, Access::Read, value.ty.dtype, &shape, Some(vec![pitch, 1]))
    }

    /// Packed weights as a parameter: `[panels, streams, k/word, lanes word]`.
    pub fn pack(&mut self, name: &str, number: usize) -> BufferId {
        let pack = &self.view.graph.packs[number];
        let shape = [pack.panels(), pack.streams.len(), pack.words(), pack.lanes * pack.word].map(Dim::from);
        self.bind(Arg::Pack(number), name, Access::Read, pack.dtype, &shape, None)
    }

    /// Memory of this launch alone, `[rows, columns]`.
    pub fn workspace(
        &mut self,
        name: &str,
        dtype: DType,
        rows: Dim,
        columns: usize,
        pitch: usize,
    ) -> BufferId {
        let arg = Arg::Workspace { dtype, rows, pitch };
        let strides = Some(vec![pitch as i64, 1]);
        self.bind(arg, name, Access::Write, dtype, &[rows, columns.into()], strides)
    }

    /// The element `index` of `id`, as f32 (or i32, `bool`) lanes or a scalar.
    ///
    /// # Errors
    ///
    /// Where an access is no vector and no scalar, or an op has no element-wise meaning.
    pub fn value_at(
        &mut self,
        scope: &mut Scope,
        id: ValueId,
        index: &[Affine],
        leaf: &Leaf<'_>,
    ) -> Result<Expr, LowerError> {
        if let Some(given) = leaf(id, index) {
            return Ok(given);
        }
        if let Some((_, _, known)) = scope.elements.iter().find(|(v, i, _)| *v == id && i == index) {
            return Ok(known.clone());
        }
        let graph = self.view.graph;
        let value = &graph[id];
        let inside = self.view.has(id);
        let expr = match &value.op {
            Op::Constant { data } if data.len() == 1 => {
                return Ok(literal(data[0], value.ty.dtype));
            }
            Op::Iota { axis } => {
                let at = &index[*axis];
                let base = scope.vars.expr(at).cast(DType::I32);
                match scope.vars.lane_factor(at) {
                    0 => base,
                    1 => {
                        let lanes = scope.vars.lanes();
                        base.splat(lanes) + Expr::Iota { lanes }
                    }
                    _ => return Err(self.view.unsupported("an iota that the lanes stride over")),
                }
            }
            _ if !inside => self.load(scope, id, index)?,
            Op::Gather => {
                let row = self.value_at(scope, value.operands[1], &index[..1], leaf)?;
                let row = self.k.let_("row", row.index());
                let mut moved = index.to_vec();
                moved[0] = scope.vars.add(row, None);
                self.value_at(scope, value.operands[0], &moved, leaf)?
            }
            Op::Concat { .. } => {
                let sources =
                    (0..value.operands.len()).map(|n| operand_index(graph, &scope.vars, id, index, n));
                let found = sources.enumerate().find_map(|(n, s)| match s {
                    Source::At(moved) => Some((n, moved)),
                    _ => None,
                });
                let Some((number, moved)) = found else {
                    return Err(self.view.unsupported("a concat that a loop straddles"));
                };
                return self.value_at(scope, value.operands[number], &moved, leaf);
            }
            _ => {
                let mut operands = Vec::new();
                for number in 0..value.operands.len() {
                    let Source::At(moved) = operand_index(graph, &scope.vars, id, index, number) else {
                        return Err(self.view.unsupported(format!("%{} read at such an index", value.name)));
                    };
                    operands.push(self.value_at(scope, value.operands[number], &moved, leaf)?);
                }
                match combine(&self.k, &value.op, value.ty.dtype, operands) {
                    Some(expr) => expr,
                    None => return Err(self.view.unsupported(format!("%{} inside a kernel", value.name))),
                }
            }
        };
        // What comes from memory bears no tensor's name: layers share kernels.
        let expr = self.k.let_(if inside { tail(&value.name) } else { "x" }, expr);
        scope.elements.push((id, index.to_vec(), expr.clone()));
        Ok(expr)
    }

    /// Runs `write` for vectors of [`Lowering::width`], or, where an access refuses that, for scalars.
    ///
    /// # Errors
    ///
    /// Those of the scalar form.
    pub fn vector_or_scalar(
        &mut self,
        write: &dyn Fn(&mut Self, u16) -> Result<(), LowerError>,
    ) -> Result<(), LowerError> {
        let before = (self.k.clone(), self.args.clone(), self.buffers.clone());
        if write(self, self.width()).is_ok() {
            return Ok(());
        }
        (self.k, self.args, self.buffers) = before;
        write(self, 1)
    }

    /// Loops over `extent` elements of a last axis: whole vectors, then one with the lanes that are left. `body` gets
    /// the variables with the index added, and the index. The threads of a warp take vectors in turn.
    ///
    /// # Errors
    ///
    /// Those of the body.
    pub fn along(
        &mut self,
        vars: &Vars,
        extent: i64,
        lanes: u16,
        body: &mut dyn FnMut(&mut Self, Vars, Affine) -> Result<(), LowerError>,
    ) -> Result<(), LowerError> {
        let width = i64::from(lanes);
        let (whole, rest) = (extent / width, extent % width);
        let mut result = Ok(());
        let mut run = |l: &mut Self, at: Expr, (count, width): (i64, i64), lanes: u16| {
            let mut vars = vars.clone();
            let mut index = vars.add(at, Some(count)).times(width);
            if lanes > 1 || width > 1 {
                index = index.plus(&vars.add_lane(lanes));
            }
            result = std::mem::replace(&mut result, Ok(())).and_then(|()| body(l, vars, index));
        };
        match (whole, self.warp.clone()) {
            (0, _) => {}
            (1, None) => run(self, Expr::Int(0), (1, width), lanes),
            (_, None) => self.looped("j", whole.into(), |l, j| run(l, j, (whole, width), lanes)),
            (_, Some(Warp { lane, .. })) => {
                let var = self.k.open_loop("j");
                run(self, Expr::Var(var), (whole, width), lanes);
                self.k.close_for(var, lane, whole.into(), WARP.into());
            }
        }
        match self.warp.clone().filter(|_| rest > 0) {
            // One element each: odd vectors have no instructions.
            Some(Warp { lane, .. }) => {
                let at = Expr::from(whole * width) + lane.clone();
                self.only(lane.compare(Compare::Lt, rest), |l| run(l, at, (extent, 1), 1));
            }
            None if rest > 0 => run(self, whole.into(), (whole + 1, width), rest as u16),
            None => {}
        }
        result
    }

    /// `for name in 0..count`, with the whole lowering inside.
    pub fn looped(&mut self, name: &str, count: Expr, body: impl FnOnce(&mut Self, Expr)) {
        self.stepped(name, count, 1, body);
    }

    /// `for name in 0..end step step`, with the whole lowering inside.
    pub fn stepped(&mut self, name: &str, end: Expr, step: i64, body: impl FnOnce(&mut Self, Expr)) {
        let var = self.k.open_loop(name);
        body(self, Expr::Var(var));
        self.k.close_for(var, Expr::Int(0), end, step);
    }

    /// `parallel name in 0..count`, with the whole lowering inside.
    pub fn parallel(&mut self, name: &str, count: Expr, body: impl FnOnce(&mut Self, Expr)) {
        let var = self.k.open_loop(name);
        body(self, Expr::Var(var));
        self.k.close_parallel(var, count);
    }

    /// `if cond { body(true) } else { body(false) }`, with the whole lowering inside.
    pub fn branch(&mut self, cond: Expr, mut body: impl FnMut(&mut Self, bool)) {
        self.k.open();
        body(self, true);
        let then = self.k.close();
        self.k.open();
        body(self, false);
        let otherwise = self.k.close();
        self.k.if_else(cond, then, otherwise);
    }

    /// Stores an element of a root; `index` is in the space of [`stored_value`].
    ///
    /// # Errors
    ///
    /// Where the lanes do not lie beside each other in a plain tensor.
    pub fn store_at(
        &mut self,
        scope: &mut Scope,
        root: ValueId,
        index: &[Affine],
        value: Expr,
        leaf: &Leaf<'_>,
    ) -> Result<(), LowerError> {
        let graph = self.view.graph;
        let lanes = self.k.kernel().type_of(&value).lanes();
        match graph[root].op {
            Op::CacheAppend => {
                let slot = self.value_at(scope, graph[root].operands[2], &index[..1], leaf)?;
                let slot = self.k.let_("slot", slot.index());
                let state = storage(graph, root);
                let buffer = self.tensor("cache", state, Access::ReadWrite);
                let [head, column] = [&index[1], &index[2]].map(|i| scope.vars.expr(i));
                if !matches!(graph[state].layout, Some(Layout::KeyPanels { .. } | Layout::ValuePanels { .. }))
                {
                    let at = paged(&self.k.kernel()[buffer].shape, head, slot, column);
                    self.k.store(buffer, &at, value);
                    return Ok(());
                }
                for lane in 0..lanes {
                    let column = column.clone() + i64::from(lane);
                    let at = cache_index(graph[state].layout, head.clone(), slot.clone(), column);
                    let element = if lanes == 1 { value.clone() } else { value.clone().lanes(lane, 1) };
                    self.k.store(buffer, &at, element);
                }
                Ok(())
            }
            Op::Reshape if stored_value(self.view, root) != root => {
                let inner = graph[root].operands[0];
                let moved = reshaped(&scope.vars, &graph[inner].ty.shape, index, &graph[root].ty.shape);
                let moved = moved.ok_or_else(|| self.view.unsupported("a reshape that cuts rows"))?;
                self.store_plain(scope, root, &moved, value)
            }
            _ => self.store_plain(scope, root, index, value),
        }
    }

    fn store_plain(
        &mut self,
        scope: &Scope,
        root: ValueId,
        index: &[Affine],
        value: Expr,
    ) -> Result<(), LowerError> {
        let (lanes, has) = (scope.vars.lanes(), self.k.kernel().type_of(&value).lanes());
        let outer = &index[..index.len().saturating_sub(1)];
        let along = index.last().map_or(0, |i| scope.vars.lane_factor(i));
        if outer.iter().any(|i| scope.vars.lane_factor(i) != 0) || (lanes > 1 && along != 1) {
            return Err(self.view.unsupported("lanes that stride over a result"));
        }
        let buffer = self.tensor("y", root, Access::Write);
        let at: Vec<Expr> = index.iter().map(|i| scope.vars.expr(i)).collect();
        self.k.store(buffer, &at, value.splat(lanes / has));
        Ok(())
    }

    /// Loads an element of a tensor in memory, floats as f32.
    fn load(&mut self, scope: &Scope, id: ValueId, index: &[Affine]) -> Result<Expr, LowerError> {
        let graph = self.view.graph;
        if let Some(number) = unpacked(graph, id) {
            return self.load_packed(scope, number, index);
        }
        let buffer = self.tensor("in", id, Access::Read);
        let outer = &index[..index.len().saturating_sub(1)];
        let moves = outer.iter().any(|i| scope.vars.lane_factor(i) != 0);
        let lanes = match index.last().map_or(0, |i| scope.vars.lane_factor(i)) {
            0 if !moves => 1,
            1 if !moves => scope.vars.lanes(),
            _ => return Err(self.view.unsupported(format!("lanes that stride over %{}", graph[id].name))),
        };
        let at: Vec<Expr> = index.iter().map(|i| scope.vars.expr(i)).collect();
        let loaded = self.k.load(buffer, &at, lanes);
        Ok(match graph[id].ty.dtype {
            DType::BF16 | DType::F16 => loaded.cast(DType::F32),
            DType::F64 | DType::F32 | DType::I32 | DType::I8 | DType::U8 | DType::Bool | DType::Block(_) => {
                loaded
            }
        })
    }

    /// Loads an element of a weight that is only stored packed: by scalars, where it is in panels.
    fn load_packed(&mut self, scope: &Scope, number: usize, index: &[Affine]) -> Result<Expr, LowerError> {
        let Pack { lanes, word, .. } = self.view.graph.packs[number];
        let (lanes, word) = (lanes as i64, word as i64);
        let buffer = self.pack("table", number);
        if self.view.graph.packs[number].words() == 1 && lanes == 1 {
            let lanes = match [&index[0], &index[1]].map(|i| scope.vars.lane_factor(i)) {
                [0, 0] => 1,
                [0, 1] => scope.vars.lanes(),
                _ => return Err(self.view.unsupported("lanes that stride over packed weights")),
            };
            let [row, k] = [&index[0], &index[1]].map(|i| scope.vars.expr(i));
            let zero = Expr::Int(0);
            return Ok(self.k.load(buffer, &[row, zero.clone(), zero, k], lanes).cast(DType::F32));
        }
        if index.iter().any(|i| scope.vars.lane_factor(i) != 0) {
            return Err(self.view.unsupported("lanes over packed weights"));
        }
        let [row, k] = [&index[0], &index[1]].map(|i| scope.vars.expr(i));
        let at = [row.clone() / lanes, Expr::Int(0), k.clone() / word, row % lanes * word + k % word];
        Ok(self.k.load(buffer, &at, 1).cast(DType::F32))
    }
}

/// The pack that holds a weight which is stored in no other form.
pub fn unpacked(graph: &crate::Graph, id: ValueId) -> Option<usize> {
    if !matches!(graph[id].op, Op::Weight { .. }) {
        return None;
    }
    let whole = |p: &Pack| p.streams.len() == 1 && p.streams[0].weight == id && p.streams[0].chunk == p.n;
    graph.packs.iter().position(whole)
}

/// Where element `(head, slot, column)` lies in a cache that is a parameter `[pages, heads, slots, columns]`, or has no pages.
pub fn paged(shape: &[Dim], head: Expr, slot: Expr, column: Expr) -> Vec<Expr> {
    let extent = |axis: usize| shape[axis].constant().expect("caches are of constant shape");
    match shape.len() {
        4 if extent(0) == 1 => vec![Expr::Int(0), head, slot, column],
        4 => vec![slot.clone() / extent(2), head, slot % extent(2), column],
        _ => vec![head, slot, column],
    }
}

/// Where element `(head, slot, column)` of a cache in panels lies.
fn cache_index(layout: Option<Layout>, head: Expr, slot: Expr, column: Expr) -> Vec<Expr> {
    let lanes = Pack::LANES as i64;
    match layout {
        Some(Layout::KeyPanels { word }) => {
            let word = word as i64;
            let lane = slot.clone() % lanes * word + column.clone() % word;
            vec![head, slot / lanes, column / word, lane]
        }
        Some(Layout::ValuePanels { word }) => {
            let word = word as i64;
            let lane = column.clone() % lanes * word + slot.clone() % word;
            vec![head, column / lanes, slot / word, lane]
        }
        Some(Layout::Rows { .. } | Layout::Pages { .. }) | None => {
            unreachable!("a cache in panels")
        }
    }
}

/// A constant as its dtype holds it, f32 where it is a float.
fn literal(value: f64, dtype: DType) -> Expr {
    let value = dtype.round(value);
    let dtype = if dtype.is_float() { DType::F32 } else { dtype };
    Expr::Const { value, ty: Type::Vector { dtype, lanes: 1 } }
}

/// An element-wise op on operands that are scalars or vectors of one width.
fn combine(k: &kernel::Builder, op: &Op, dtype: DType, operands: Vec<Expr>) -> Option<Expr> {
    let lanes = operands.iter().map(|e| k.kernel().type_of(e).lanes()).max().unwrap_or(1);
    let mut operands = operands.into_iter().map(|e| {
        let has = k.kernel().type_of(&e).lanes();
        e.splat(lanes / has)
    });
    let mut next = || operands.next().expect("the verifier counted the operands");
    Some(match op {
        // Inside a group floats keep f32; only what is stored is rounded.
        Op::Cast => {
            let from = next();
            let is = k.kernel().type_of(&from);
            let to = if dtype.is_float() { DType::F32 } else { dtype };
            if matches!(is, Type::Vector { dtype: d, .. } if d == to) { from } else { from.cast(to) }
        }
        Op::Unary(op) => next().unary(*op),
        Op::Binary(op) => {
            let (a, b) = (next(), next());
            let sign = match op {
                Binary::Add => Arith::Add,
                Binary::Sub => Arith::Sub,
                Binary::Mul => Arith::Mul,
                Binary::Div => Arith::Div,
                Binary::Max => Arith::Max,
                Binary::Min => Arith::Min,
            };
            Expr::Arith(sign, Box::new(a), Box::new(b))
        }
        Op::Compare(op) => {
            let a = next();
            a.compare(*op, next())
        }
        Op::Select => {
            let (c, a) = (next(), next());
            c.select(a, next())
        }
        Op::Broadcast { .. } | Op::Reshape | Op::Transpose { .. } | Op::Slice { .. } => next(),
        _ => return None,
    })
}

/// A name without what stands before its first dot (`l3.q.cos` -> `q.cos`): names in kernels do not tell the layer.
pub fn tail(name: &str) -> &str {
    name.split_once('.').map_or(name, |(_, rest)| rest)
}
