//! Graph IR: what is computed. SSA tensors over a closed op set, with symbolic extents.
//!
//! Values stand in an order in which operands precede users. A value's result type is written, not inferred;
//! [`infer`] says what it must be, and the verifier compares.
//!
//! After the `fuse` pass values belong to [`Group`]s, one kernel each; the values of a group stand together.

use crate::dim::{Dim, Symbols};
use crate::dtype::DType;
use crate::op::{Binary, Compare, DotAxes, Op, Reduction, Unary};
use petgraph::graph::DiGraph;
use std::collections::HashSet;

/// Index of a value in [`Graph::values`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ValueId(pub u32);

/// Index of a group in [`Graph::groups`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GroupId(pub u32);

/// Dtype and shape of a tensor.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TensorType {
    /// Element type.
    pub dtype: DType,
    /// Extents, outermost first; empty for a scalar.
    pub shape: Vec<Dim>,
}

impl TensorType {
    /// A tensor type.
    pub fn new(dtype: DType, shape: &[Dim]) -> TensorType {
        TensorType { dtype, shape: shape.to_vec() }
    }

    /// Number of elements for given symbols.
    pub fn elems(&self, symbols: &[i64; crate::dim::MAX_SYMBOLS]) -> usize {
        self.shape.iter().map(|d| d.eval(symbols) as usize).product()
    }
}

/// One SSA tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Value {
    /// Name in text, without `%`; unique in the graph.
    pub name: String,
    /// What it is.
    pub op: Op,
    /// Values that it reads, each earlier in the graph.
    pub operands: Vec<ValueId>,
    /// Its type.
    pub ty: TensorType,
    /// The kernel that computes it, once fused; `None` for what is bound (inputs, weights, states, constants).
    pub group: Option<GroupId>,
    /// How it lies in memory, where the `layout` pass chose; else rows without gaps.
    pub layout: Option<Layout>,
    /// Remarks that passes left, printed as comments above the value.
    pub remarks: Vec<String>,
}

/// How a tensor in memory is ordered. Text: `@ rows(2080)`, `@ key_panels(2)`, `@ value_panels(2)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Layout {
    /// Row-major, with `pitch` elements from one index of axis 0 to the next.
    Rows {
        /// At least the product of the other extents.
        pitch: usize,
    },
    /// A cache `[G, C, d]` in pages of so many slots: `[C/slots][G][slots][d]`.
    Pages {
        /// Slots of a page, which divide those of the cache.
        slots: usize,
    },
    /// A cache `[G, C, d]` as the packed operand of `q k^T`: `[G][C/16][d/word][16][word]`, 16 slots a panel.
    KeyPanels {
        /// Consecutive elements of `d` that one 32-bit word holds: 1 or 2.
        word: usize,
    },
    /// A cache `[G, C, d]` as the packed operand of `p v`: `[G][d/16][C/word][16][word]`, 16 columns a panel.
    ValuePanels {
        /// Consecutive slots that one 32-bit word holds: 1 or 2.
        word: usize,
    },
}

/// Packed weights of one segment of a `dot` group: `[n/lanes][streams][k/word][lanes][word]`. Column `n` of stream `s` is
/// row `rows(n)` of that stream's tensor; columns and `k` beyond the end are zero. On a CPU a panel has 16 columns, and a word
/// is 32 bits; on a GPU a panel is one column and its only word all of `k`: rows of memory.
///
/// Streams are rows that one output element needs together (gate and up; the two halves of a rotated head), so they
/// lie beside each other. The order depends on no vector width and no tile: one packing serves every CPU level,
/// prefill and decode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pack {
    /// Name in text, without `@`: group and segment.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Columns of each stream.
    pub n: usize,
    /// Length of the contraction.
    pub k: usize,
    /// Columns of a panel.
    pub lanes: usize,
    /// Elements of `k` in one word.
    pub word: usize,
    /// Where the columns come from.
    pub streams: Vec<Stream>,
}

/// The rows of a weight that make the columns of one stream: column `n` is row
/// `n / chunk * stride + n % chunk + offset`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stream {
    /// A `weight` of shape `[rows, k]`.
    pub weight: ValueId,
    /// Consecutive columns from consecutive rows.
    pub chunk: usize,
    /// Rows from one chunk to the next.
    pub stride: usize,
    /// First row.
    pub offset: usize,
}

impl Stream {
    /// The weight's row that is column `n`.
    pub fn row(&self, n: usize) -> usize {
        n / self.chunk * self.stride + n % self.chunk + self.offset
    }
}

impl Pack {
    /// Columns of a panel on a CPU, whatever the vector width: 16 words of 32 bits are one cache line.
    pub const LANES: usize = 16;

    /// Panels of each stream.
    pub fn panels(&self) -> usize {
        self.n.div_ceil(self.lanes)
    }

    /// Words of `k` in a column.
    pub fn words(&self) -> usize {
        self.k.div_ceil(self.word)
    }

    /// Elements in all, padding counted.
    pub fn elems(&self) -> usize {
        self.panels() * self.streams.len() * self.words() * self.lanes * self.word
    }

    /// Position of element `k` of column `n` of `stream`.
    pub fn index(&self, stream: usize, n: usize, k: usize) -> usize {
        let panel = n / self.lanes * self.streams.len() + stream;
        ((panel * self.words() + k / self.word) * self.lanes + n % self.lanes) * self.word + k % self.word
    }
}

/// Values that one kernel computes.
#[derive(Clone, Debug, PartialEq)]
pub struct Group {
    /// Name in text, without `@`; unique in the graph.
    pub name: String,
    /// The generator that lowers it.
    pub family: Family,
    /// Chosen by the `schedule` pass: the text form of the family's schedule.
    pub schedule: Option<String>,
    /// Was the schedule chosen by measuring, and not by the family's model of cost?
    pub measured: bool,
    /// Remarks that passes left, printed as comments above the group.
    pub remarks: Vec<String>,
}

/// Kernel families: the generators that `lower` may call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Family {
    /// Contractions with prologue and epilogue.
    Dot,
    /// Streamed softmax attention.
    Attention,
    /// A reduction of each row, with what follows it.
    Rowwise,
    /// Independent elements.
    Elementwise,
    /// Rows picked by index.
    Gather,
    /// Greedy choice.
    Sample,
}

impl Family {
    /// Every family.
    pub const ALL: [Family; 6] = [
        Family::Dot,
        Family::Attention,
        Family::Rowwise,
        Family::Elementwise,
        Family::Gather,
        Family::Sample,
    ];

    /// Name in text.
    pub fn name(self) -> &'static str {
        match self {
            Family::Dot => "dot",
            Family::Attention => "attention",
            Family::Rowwise => "rowwise",
            Family::Elementwise => "elementwise",
            Family::Gather => "gather",
            Family::Sample => "sample",
        }
    }
}

/// A computation.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct Graph {
    /// Name in text, without `@`.
    pub name: String,
    /// Symbolic extents with their ranges.
    pub symbols: Symbols,
    /// Operands precede users.
    pub values: Vec<Value>,
    /// Results by name; one with a state's name is that state's next contents.
    pub outputs: Vec<(String, ValueId)>,
    /// Kernels, in the order in which they run; empty before `fuse`.
    pub groups: Vec<Group>,
    /// Packed weights; empty before `layout`.
    pub packs: Vec<Pack>,
}

impl std::ops::Index<ValueId> for Graph {
    type Output = Value;
    fn index(&self, id: ValueId) -> &Value {
        &self.values[id.0 as usize]
    }
}

impl std::ops::IndexMut<ValueId> for Graph {
    fn index_mut(&mut self, id: ValueId) -> &mut Value {
        &mut self.values[id.0 as usize]
    }
}

impl Graph {
    /// Every value's id, in order.
    pub fn ids(&self) -> impl DoubleEndedIterator<Item = ValueId> + use<> {
        (0..self.values.len() as u32).map(ValueId)
    }

    /// The operand at `index` of `id`.
    pub fn operand(&self, id: ValueId, index: usize) -> &Value {
        &self[self[id].operands[index]]
    }

    /// The values that read each value, in order; a value that reads another twice stands there twice.
    pub fn users(&self) -> Vec<Vec<ValueId>> {
        let mut users = vec![Vec::new(); self.values.len()];
        for id in self.ids() {
            for operand in &self[id].operands {
                users[operand.0 as usize].push(id);
            }
        }
        users
    }

    /// Definitions to uses, with the operand's index on each edge. Node `i` is value `i`.
    pub fn def_use(&self) -> DiGraph<ValueId, usize> {
        let mut graph = DiGraph::with_capacity(self.values.len(), self.values.len());
        let nodes: Vec<_> = self.ids().map(|id| graph.add_node(id)).collect();
        for id in self.ids() {
            for (index, operand) in self[id].operands.iter().enumerate() {
                graph.add_edge(nodes[operand.0 as usize], nodes[id.0 as usize], index);
            }
        }
        graph
    }

    /// The value of that name.
    pub fn find(&self, name: &str) -> Option<ValueId> {
        self.ids().find(|&id| self[id].name == name)
    }

    /// The same graph with a symbol's range narrowed; a range of one value makes every use of it constant.
    pub fn specialise(&self, symbol: &str, min: i64, max: i64) -> Graph {
        let mut graph = self.clone();
        let Some(sym) = graph.symbols.find(symbol) else { return graph };
        graph.symbols.0[sym.0 as usize].min = min;
        graph.symbols.0[sym.0 as usize].max = max;
        graph.fix_symbols();
        graph
    }

    /// Makes every use of a symbol that has one value constant; gives the number of uses.
    pub fn fix_symbols(&mut self) -> usize {
        let mut fixed = 0;
        for (number, symbol) in
            self.symbols.0.iter().enumerate().filter(|(_, symbol)| symbol.min == symbol.max)
        {
            let mut fix = |dim: &mut Dim| {
                dim.base += i64::from(dim.coef[number]) * symbol.min;
                fixed += usize::from(std::mem::take(&mut dim.coef[number]) != 0);
            };
            for value in &mut self.values {
                value.ty.shape.iter_mut().for_each(&mut fix);
                if let Op::Slice { start, .. } = &mut value.op {
                    fix(start);
                }
            }
        }
        fixed
    }
}

/// Why operands do not fit an op.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TypeError {
    /// Wrong number of operands.
    #[error("takes {expected} operands, has {found}")]
    Operands {
        /// Count found.
        found: usize,
        /// Count expected.
        expected: usize,
    },
    /// Operands whose shapes must be equal are not.
    #[error("shapes differ")]
    Shapes,
    /// Operands whose dtypes must be equal are not.
    #[error("dtypes differ: {0} and {1}")]
    DTypes(DType, DType),
    /// An operand has another dtype than the op takes.
    #[error("operand {index} is {found}, expected {expected}")]
    DType {
        /// Which operand.
        index: usize,
        /// Its dtype.
        found: DType,
        /// What the op takes.
        expected: &'static str,
    },
    /// An operand has another rank than the op takes.
    #[error("operand {index} has {found} axes, expected {expected}")]
    Rank {
        /// Which operand.
        index: usize,
        /// Its rank.
        found: usize,
        /// What the op takes.
        expected: usize,
    },
    /// An attribute names an axis that is not there.
    #[error("there is no axis {axis}")]
    Axis {
        /// The axis named.
        axis: usize,
    },
    /// Extents that must agree do not.
    #[error("{what} disagree")]
    Extents {
        /// Which extents.
        what: &'static str,
    },
    /// The type written is not the one that follows from the operands.
    #[error("the type written is not the type that follows from the operands")]
    Result,
    /// An attribute has a value that means nothing.
    #[error("{what}")]
    Attribute {
        /// What is wrong with it.
        what: &'static str,
    },
}

/// Checks that `op` on `operands` has type `ty`. Ops that cannot know their whole result type (inputs, constants,
/// casts, reshapes, broadcasts, slices) take the rest from `ty`.
///
/// # Errors
///
/// The first rule broken.
pub fn check(op: &Op, operands: &[&TensorType], ty: &TensorType) -> Result<(), TypeError> {
    let inferred = infer(op, operands, ty)?;
    if inferred == *ty { Ok(()) } else { Err(TypeError::Result) }
}

/// The type of `op` on `operands`; `hint` is the type written, for what does not follow from the operands.
///
/// # Errors
///
/// The first rule broken.
pub fn infer(op: &Op, operands: &[&TensorType], hint: &TensorType) -> Result<TensorType, TypeError> {
    let count = |expected| match operands.len() {
        found if found == expected => Ok(()),
        found => Err(TypeError::Operands { found, expected }),
    };
    let axis_of = |ty: &TensorType, axis: usize| ty.shape.get(axis).copied().ok_or(TypeError::Axis { axis });
    let rank = |index: usize, expected: usize| match operands[index].shape.len() {
        found if found == expected => Ok(()),
        found => Err(TypeError::Rank { index, found, expected }),
    };
    let float = |index: usize| match operands[index].dtype {
        dtype if dtype.is_float() => Ok(()),
        found => Err(TypeError::DType { index, found, expected: "a float" }),
    };
    let integer = |index: usize| match operands[index].dtype {
        DType::I32 => Ok(()),
        found => Err(TypeError::DType { index, found, expected: "i32" }),
    };
    let agree =
        |holds: bool, what: &'static str| if holds { Ok(()) } else { Err(TypeError::Extents { what }) };
    match op {
        Op::Input { .. } | Op::Weight { .. } | Op::State { .. } => count(0).map(|()| hint.clone()),
        Op::Constant { data } => {
            count(0)?;
            let elems: Option<i64> = hint.shape.iter().map(|d| d.constant()).product();
            if data.len() == 1 || elems == Some(data.len() as i64) {
                Ok(hint.clone())
            } else {
                Err(TypeError::Attribute { what: "a constant has one number, or one for each element" })
            }
        }
        Op::Iota { axis } => count(0).and_then(|()| axis_of(hint, *axis)).map(|_| hint.clone()),
        Op::Cast => {
            count(1)?;
            Ok(TensorType { dtype: hint.dtype, shape: operands[0].shape.clone() })
        }
        Op::Unary(_) => {
            count(1)?;
            float(0)?;
            Ok(operands[0].clone())
        }
        Op::Binary(_) | Op::Compare(_) => {
            count(2)?;
            if operands[0].dtype != operands[1].dtype {
                return Err(TypeError::DTypes(operands[0].dtype, operands[1].dtype));
            }
            if operands[0].shape != operands[1].shape {
                return Err(TypeError::Shapes);
            }
            let dtype = if matches!(op, Op::Compare(_)) { DType::Bool } else { operands[0].dtype };
            Ok(TensorType { dtype, shape: operands[0].shape.clone() })
        }
        Op::Select => {
            count(3)?;
            if operands[0].dtype != DType::Bool {
                return Err(TypeError::DType { index: 0, found: operands[0].dtype, expected: "bool" });
            }
            if operands[1].dtype != operands[2].dtype {
                return Err(TypeError::DTypes(operands[1].dtype, operands[2].dtype));
            }
            if operands[0].shape != operands[1].shape || operands[1].shape != operands[2].shape {
                return Err(TypeError::Shapes);
            }
            Ok(operands[1].clone())
        }
        Op::Broadcast { axes } => {
            count(1)?;
            rank(0, axes.len())?;
            if !axes.windows(2).all(|w| w[0] < w[1]) {
                return Err(TypeError::Attribute { what: "broadcast axes must increase" });
            }
            for (&axis, &extent) in axes.iter().zip(&operands[0].shape) {
                agree(axis_of(hint, axis)? == extent, "the operand's extents and the result's")?;
            }
            Ok(TensorType { dtype: operands[0].dtype, shape: hint.shape.clone() })
        }
        Op::Reshape => {
            count(1)?;
            agree(same_elems(&operands[0].shape, &hint.shape), "the numbers of elements")?;
            Ok(TensorType { dtype: operands[0].dtype, shape: hint.shape.clone() })
        }
        Op::Transpose { perm } => {
            count(1)?;
            rank(0, perm.len())?;
            let mut seen = perm.clone();
            seen.sort_unstable();
            if !seen.iter().enumerate().all(|(i, &p)| i == p) {
                return Err(TypeError::Attribute { what: "perm must name each axis once" });
            }
            let shape = perm.iter().map(|&p| operands[0].shape[p]).collect();
            Ok(TensorType { dtype: operands[0].dtype, shape })
        }
        Op::Slice { axis, start } => {
            count(1)?;
            let (whole, extent) = (axis_of(operands[0], *axis)?, axis_of(hint, *axis)?);
            // The end may lie before the axis' end; where all are constants it must not lie behind it.
            if let (Some(whole), Some(start), Some(extent)) =
                (whole.constant(), start.constant(), extent.constant())
            {
                agree(
                    0 <= start && 0 <= extent && start.saturating_add(extent) <= whole,
                    "the slice and the axis",
                )?;
            }
            let mut ty = operands[0].clone();
            ty.shape[*axis] = extent;
            Ok(ty)
        }
        Op::Concat { axis } => {
            let Some(first) = operands.first() else {
                return Err(TypeError::Operands { found: 0, expected: 1 });
            };
            let mut ty = (*first).clone();
            axis_of(first, *axis)?;
            for other in &operands[1..] {
                if other.dtype != first.dtype {
                    return Err(TypeError::DTypes(first.dtype, other.dtype));
                }
                let same = other.shape.len() == first.shape.len()
                    && (0..first.shape.len()).all(|i| i == *axis || other.shape[i] == first.shape[i]);
                if !same {
                    return Err(TypeError::Shapes);
                }
                ty.shape[*axis] = ty.shape[*axis] + other.shape[*axis];
            }
            Ok(ty)
        }
        Op::Reduce { axis, .. } => {
            count(1)?;
            float(0)?;
            axis_of(operands[0], *axis)?;
            let mut ty = operands[0].clone();
            ty.shape.remove(*axis);
            Ok(ty)
        }
        Op::Dot { axes } => {
            count(2)?;
            rank(0, axes.lhs.len())?;
            rank(1, axes.rhs.len())?;
            float(0)?;
            if operands[0].dtype != operands[1].dtype {
                return Err(TypeError::DTypes(operands[0].dtype, operands[1].dtype));
            }
            let extent = |c: char| {
                let l = axes.lhs.iter().position(|&x| x == c).map(|i| operands[0].shape[i]);
                let r = axes.rhs.iter().position(|&x| x == c).map(|i| operands[1].shape[i]);
                agree(l.is_none() || r.is_none() || l == r, "the extents of an axis in both operands")?;
                Ok(l.or(r).expect("DotAxes::parse saw each letter in an operand"))
            };
            axes.contracted().into_iter().try_for_each(|c| extent(c).map(drop))?;
            let shape = axes.out.iter().map(|&c| extent(c)).collect::<Result<_, _>>()?;
            // The result is f32 or the operands' dtype: what is stored after accumulation.
            let dtype = if hint.dtype == DType::F32 { DType::F32 } else { operands[0].dtype };
            Ok(TensorType { dtype, shape })
        }
        Op::Gather => {
            count(2)?;
            integer(1)?;
            rank(1, 1)?;
            axis_of(operands[0], 0)?;
            let mut ty = operands[0].clone();
            ty.shape[0] = operands[1].shape[0];
            Ok(ty)
        }
        Op::ScatterAdd => {
            count(3)?;
            integer(1)?;
            rank(1, 1)?;
            axis_of(operands[0], 0)?;
            let mut rows = operands[0].clone();
            rows.shape[0] = operands[1].shape[0];
            if rows == *operands[2] { Ok(operands[0].clone()) } else { Err(TypeError::Shapes) }
        }
        Op::Attention { .. } => {
            count(4)?;
            (0..3).try_for_each(|i| rank(i, 3))?;
            rank(3, 1)?;
            integer(3)?;
            float(0)?;
            let (q, k, v) = (operands[0], operands[1], operands[2]);
            if q.dtype != k.dtype || k.dtype != v.dtype {
                return Err(TypeError::DTypes(q.dtype, k.dtype));
            }
            agree(k.shape == v.shape && q.shape[2] == k.shape[2], "head sizes or cache shapes")?;
            agree(q.shape[0] == operands[3].shape[0], "queries and positions")?;
            let heads = (q.shape[1].constant(), k.shape[0].constant());
            agree(matches!(heads, (Some(h), Some(g)) if g > 0 && h % g == 0), "heads and KV heads")?;
            Ok(q.clone())
        }
        Op::AttentionLse { .. } => {
            count(3)?;
            (0..2).try_for_each(|i| rank(i, 3))?;
            rank(2, 1)?;
            integer(2)?;
            float(0)?;
            let (q, k) = (operands[0], operands[1]);
            if q.dtype != k.dtype {
                return Err(TypeError::DTypes(q.dtype, k.dtype));
            }
            agree(q.shape[2] == k.shape[2], "head sizes")?;
            agree(q.shape[0] == operands[2].shape[0], "queries and positions")?;
            let heads = (q.shape[1].constant(), k.shape[0].constant());
            agree(matches!(heads, (Some(h), Some(g)) if g > 0 && h % g == 0), "heads and KV heads")?;
            Ok(TensorType { dtype: DType::F32, shape: q.shape[..2].to_vec() })
        }
        Op::CacheAppend => {
            count(3)?;
            rank(0, 3)?;
            rank(1, 3)?;
            rank(2, 1)?;
            integer(2)?;
            let (cache, rows) = (operands[0], operands[1]);
            if cache.dtype != rows.dtype {
                return Err(TypeError::DTypes(cache.dtype, rows.dtype));
            }
            let fit = cache.shape[0] == rows.shape[1] && cache.shape[2] == rows.shape[2];
            agree(fit && rows.shape[0] == operands[2].shape[0], "cache, rows and positions")?;
            Ok(cache.clone())
        }
        Op::Quantize => {
            count(1)?;
            float(0)?;
            match hint.dtype {
                DType::Block(_) => Ok(TensorType { dtype: hint.dtype, shape: operands[0].shape.clone() }),
                _ => Err(TypeError::Attribute { what: "quantize makes a block format" }),
            }
        }
        Op::Dequantize => {
            count(1)?;
            match operands[0].dtype {
                DType::Block(_) => Ok(TensorType { dtype: hint.dtype, shape: operands[0].shape.clone() }),
                found => Err(TypeError::DType { index: 0, found, expected: "a block format" }),
            }
        }
        Op::Argmax => {
            count(1)?;
            float(0)?;
            let mut shape = operands[0].shape.clone();
            shape.pop().ok_or(TypeError::Axis { axis: 0 })?;
            Ok(TensorType { dtype: DType::I32, shape })
        }
    }
}

/// Do two shapes hold equally many elements, whatever the symbols are? Products of symbolic extents are compared
/// factor by factor: the symbolic ones must be the same, the constant ones must have one product.
fn same_elems(a: &[Dim], b: &[Dim]) -> bool {
    let split = |shape: &[Dim]| {
        let mut symbolic: Vec<Dim> = shape.iter().copied().filter(|d| d.constant().is_none()).collect();
        symbolic.sort_unstable();
        let constant = shape.iter().filter_map(|d| d.constant()).try_fold(1i64, |p, d| p.checked_mul(d));
        (symbolic, constant)
    };
    split(a) == split(b)
}

/// Builds a graph value by value. Types are checked as they come.
///
/// # Panics
///
/// Every method panics on operands that do not fit: that is a fault of the caller's code. Text from outside goes
/// through the parser, which gives errors.
#[derive(Debug, Default)]
pub struct Builder {
    graph: Graph,
    prefix: String,
    names: HashSet<String>,
}

impl Builder {
    /// An empty graph.
    pub fn new(name: &str) -> Builder {
        Builder { graph: Graph { name: name.to_string(), ..Graph::default() }, ..Builder::default() }
    }

    /// Names a symbolic extent with its range.
    pub fn symbol(&mut self, name: &str, min: i64, max: i64) -> Dim {
        self.graph.symbols.add(name, min, max).into()
    }

    /// Sets what following names begin with (`l0.`), so that they stay readable and unique.
    pub fn prefix(&mut self, prefix: &str) {
        self.prefix = prefix.to_string();
    }

    /// Ends the graph.
    pub fn finish(self) -> Graph {
        self.graph
    }

    /// The type of a value.
    pub fn ty(&self, id: ValueId) -> &TensorType {
        &self.graph[id].ty
    }

    /// The extents of a value.
    pub fn shape(&self, id: ValueId) -> Vec<Dim> {
        self.ty(id).shape.clone()
    }

    /// Adds a value of a type that follows from the operands, except for what `dtype` and `shape` say.
    fn push(&mut self, name: &str, op: Op, operands: &[ValueId], hint: TensorType) -> ValueId {
        let types: Vec<&TensorType> = operands.iter().map(|&id| &self.graph[id].ty).collect();
        let ty = infer(&op, &types, &hint).unwrap_or_else(|e| panic!("%{name} = {op:?} of {types:?}: {e}"));
        let mut unique = format!("{}{name}", self.prefix);
        if self.names.contains(&unique) {
            let base = unique;
            let free = |n: &String| !self.names.contains(n);
            unique = (1..).map(|i| format!("{base}.{i}")).find(free).expect("numbers do not end");
        }
        self.names.insert(unique.clone());
        let operands = operands.to_vec();
        self.graph.values.push(Value {
            name: unique,
            op,
            operands,
            ty,
            group: None,
            layout: None,
            remarks: Vec::new(),
        });
        ValueId(self.graph.values.len() as u32 - 1)
    }

    fn like(&self, id: ValueId) -> TensorType {
        self.ty(id).clone()
    }

    /// Data that the caller binds at each step.
    pub fn input(&mut self, name: &str, dtype: DType, shape: &[Dim]) -> ValueId {
        self.push(name, Op::Input { name: name.to_string() }, &[], TensorType::new(dtype, shape))
    }

    /// A tensor of the checkpoint, shown in text as `short`.
    pub fn weight(&mut self, short: &str, name: &str, dtype: DType, shape: &[Dim]) -> ValueId {
        self.push(short, Op::Weight { name: name.to_string() }, &[], TensorType::new(dtype, shape))
    }

    /// Memory that lives from step to step.
    pub fn state(&mut self, name: &str, dtype: DType, shape: &[Dim]) -> ValueId {
        self.push(name, Op::State { name: name.to_string() }, &[], TensorType::new(dtype, shape))
    }

    /// One number for every element.
    pub fn constant(&mut self, name: &str, x: f64, dtype: DType, shape: &[Dim]) -> ValueId {
        self.push(name, Op::Constant { data: vec![x] }, &[], TensorType::new(dtype, shape))
    }

    /// A vector of numbers.
    pub fn constants(&mut self, name: &str, data: &[f64], dtype: DType) -> ValueId {
        let ty = TensorType::new(dtype, &[data.len().into()]);
        self.push(name, Op::Constant { data: data.to_vec() }, &[], ty)
    }

    /// Names a result; with a state's name it is that state's next contents.
    pub fn output(&mut self, name: &str, id: ValueId) {
        self.graph.outputs.push((name.to_string(), id));
    }

    /// Rounds to another dtype; nothing where it is that already.
    pub fn cast(&mut self, name: &str, x: ValueId, dtype: DType) -> ValueId {
        if self.ty(x).dtype == dtype {
            return x;
        }
        let ty = TensorType { dtype, shape: self.shape(x) };
        self.push(name, Op::Cast, &[x], ty)
    }

    /// A unary op.
    pub fn unary(&mut self, name: &str, op: Unary, x: ValueId) -> ValueId {
        self.push(name, Op::Unary(op), &[x], self.like(x))
    }

    /// A binary op on equal types.
    pub fn binary(&mut self, name: &str, op: Binary, a: ValueId, b: ValueId) -> ValueId {
        self.push(name, Op::Binary(op), &[a, b], self.like(a))
    }

    /// A relation, element by element.
    pub fn compare(&mut self, name: &str, op: Compare, a: ValueId, b: ValueId) -> ValueId {
        self.push(name, Op::Compare(op), &[a, b], self.like(a))
    }

    /// `a` where `c`, else `b`.
    pub fn select(&mut self, name: &str, c: ValueId, a: ValueId, b: ValueId) -> ValueId {
        self.push(name, Op::Select, &[c, a, b], self.like(a))
    }

    /// The index along `axis`.
    pub fn iota(&mut self, name: &str, axis: usize, dtype: DType, shape: &[Dim]) -> ValueId {
        self.push(name, Op::Iota { axis }, &[], TensorType::new(dtype, shape))
    }

    /// Repeats `x` to `shape`; its axis `i` becomes axis `axes[i]`.
    pub fn broadcast(&mut self, name: &str, x: ValueId, axes: &[usize], shape: &[Dim]) -> ValueId {
        let ty = TensorType::new(self.ty(x).dtype, shape);
        self.push(name, Op::Broadcast { axes: axes.to_vec() }, &[x], ty)
    }

    /// The same elements in another shape.
    pub fn reshape(&mut self, name: &str, x: ValueId, shape: &[Dim]) -> ValueId {
        let ty = TensorType::new(self.ty(x).dtype, shape);
        self.push(name, Op::Reshape, &[x], ty)
    }

    /// Axes in another order.
    pub fn transpose(&mut self, name: &str, x: ValueId, perm: &[usize]) -> ValueId {
        self.push(name, Op::Transpose { perm: perm.to_vec() }, &[x], self.like(x))
    }

    /// `extent` elements from `start` on along `axis`.
    pub fn slice(&mut self, name: &str, x: ValueId, axis: usize, start: Dim, extent: Dim) -> ValueId {
        let mut ty = self.like(x);
        ty.shape[axis] = extent;
        self.push(name, Op::Slice { axis, start }, &[x], ty)
    }

    /// One after another along `axis`.
    pub fn concat(&mut self, name: &str, parts: &[ValueId], axis: usize) -> ValueId {
        self.push(name, Op::Concat { axis }, parts, self.like(parts[0]))
    }

    /// Folds `axis` away.
    pub fn reduce(&mut self, name: &str, kind: Reduction, x: ValueId, axis: usize) -> ValueId {
        self.push(name, Op::Reduce { kind, axis }, &[x], self.like(x))
    }

    /// A contraction, stored as `dtype` (that of the operands, or f32).
    pub fn dot(&mut self, name: &str, axes: &str, a: ValueId, b: ValueId, dtype: DType) -> ValueId {
        let axes = DotAxes::parse(axes).expect("axes of a contraction");
        self.push(name, Op::Dot { axes }, &[a, b], TensorType::new(dtype, &[]))
    }

    /// Rows of a table by index.
    pub fn gather(&mut self, name: &str, table: ValueId, ids: ValueId) -> ValueId {
        self.push(name, Op::Gather, &[table, ids], self.like(table))
    }

    /// Attention over a cache, streamed. See [`Op::Attention`].
    #[allow(clippy::too_many_arguments)] // the operands of the op
    pub fn attention(
        &mut self,
        name: &str,
        q: ValueId,
        k: ValueId,
        v: ValueId,
        pos: ValueId,
        causal: bool,
        scale: f64,
    ) -> ValueId {
        self.push(name, Op::Attention { causal, scale }, &[q, k, v, pos], self.like(q))
    }

    /// The logarithms of the sums of an attention's exponentials. See [`Op::AttentionLse`].
    pub fn attention_lse(
        &mut self,
        name: &str,
        q: ValueId,
        k: ValueId,
        pos: ValueId,
        causal: bool,
        scale: f64,
    ) -> ValueId {
        let ty = TensorType::new(DType::F32, &[]);
        self.push(name, Op::AttentionLse { causal, scale }, &[q, k, pos], ty)
    }

    /// The cache with rows put at their positions.
    pub fn cache_append(&mut self, name: &str, cache: ValueId, rows: ValueId, pos: ValueId) -> ValueId {
        self.push(name, Op::CacheAppend, &[cache, rows, pos], self.like(cache))
    }

    /// Index of the largest along the last axis.
    pub fn argmax(&mut self, name: &str, x: ValueId) -> ValueId {
        self.push(name, Op::Argmax, &[x], self.like(x))
    }

    // Compositions.

    /// A constant of `like`'s type.
    fn constant_like(&mut self, name: &str, x: f64, like: ValueId) -> ValueId {
        let TensorType { dtype, shape } = self.like(like);
        self.constant(name, x, dtype, &shape)
    }

    /// `x / sqrt(mean(x^2) + eps) * weight` over the last axis (Zhang and Sennrich 2019), in f32, stored as `x` is.
    ///
    /// * `x`: `[T, n]`; `weight`: `[n]`.
    pub fn rms_norm(&mut self, name: &str, x: ValueId, weight: ValueId, eps: f64) -> ValueId {
        let (shape, dtype) = (self.shape(x), self.ty(x).dtype);
        let n = shape[1].constant().expect("a constant width") as f64;
        let x32 = self.cast(&format!("{name}.x"), x, DType::F32);
        let square = self.binary(&format!("{name}.sq"), Binary::Mul, x32, x32);
        let sum = self.reduce(&format!("{name}.sum"), Reduction::Sum, square, 1);
        let inv_n = self.constant_like(&format!("{name}.inv"), 1.0 / n, sum);
        let mean = self.binary(&format!("{name}.mean"), Binary::Mul, sum, inv_n);
        let eps = self.constant_like(&format!("{name}.eps"), eps, sum);
        let shifted = self.binary(&format!("{name}.var"), Binary::Add, mean, eps);
        let scale = self.unary(&format!("{name}.r"), Unary::Rsqrt, shifted);
        let scale = self.broadcast(&format!("{name}.rb"), scale, &[0], &shape);
        let normed = self.binary(&format!("{name}.n"), Binary::Mul, x32, scale);
        let w32 = self.cast(&format!("{name}.w"), weight, DType::F32);
        let w32 = self.broadcast(&format!("{name}.wb"), w32, &[1], &shape);
        let scaled = self.binary(&format!("{name}.y"), Binary::Mul, normed, w32);
        self.cast(name, scaled, dtype)
    }

    /// Cosine and sine tables of rotary embedding, f32 `[T, d/2]` each: `factor * cos(pos * frequency)`.
    pub fn rope_tables(&mut self, pos: ValueId, frequencies: &[f64], factor: f64) -> (ValueId, ValueId) {
        let shape = [self.shape(pos)[0], frequencies.len().into()];
        let pos = self.cast("pos.f", pos, DType::F32);
        let pos = self.broadcast("pos.b", pos, &[0], &shape);
        let frequencies = self.constants("freq", frequencies, DType::F32);
        let frequencies = self.broadcast("freq.b", frequencies, &[1], &shape);
        let angle = self.binary("angle", Binary::Mul, pos, frequencies);
        let (mut cos, mut sin) = (self.unary("cos", Unary::Cos, angle), self.unary("sin", Unary::Sin, angle));
        if factor != 1.0 {
            let factor = self.constant_like("rope.factor", factor, cos);
            cos = self.binary("cos.f", Binary::Mul, cos, factor);
            sin = self.binary("sin.f", Binary::Mul, sin, factor);
        }
        (cos, sin)
    }

    /// Rotary embedding on halves (Su et al. 2021; Hugging Face's order): `[a, b] -> [a cos - b sin, b cos + a sin]`.
    ///
    /// * `x`: `[T, heads, d]`, any float dtype, in f32 inside; `cos`, `sin`: f32 `[T, d/2]`.
    pub fn rope(&mut self, name: &str, x: ValueId, cos: ValueId, sin: ValueId) -> ValueId {
        let (mut shape, dtype) = (self.shape(x), self.ty(x).dtype);
        let half = self.shape(cos)[1];
        let x32 = self.cast(&format!("{name}.x"), x, DType::F32);
        let a = self.slice(&format!("{name}.a"), x32, 2, Dim::of(0), half);
        let b = self.slice(&format!("{name}.b"), x32, 2, half, half);
        shape[2] = half;
        let cos = self.broadcast(&format!("{name}.cos"), cos, &[0, 2], &shape);
        let sin = self.broadcast(&format!("{name}.sin"), sin, &[0, 2], &shape);
        let mut mul = |tail: &str, p, q| self.binary(&format!("{name}.{tail}"), Binary::Mul, p, q);
        let (ac, bs, bc, as_) = (mul("ac", a, cos), mul("bs", b, sin), mul("bc", b, cos), mul("as", a, sin));
        let first = self.binary(&format!("{name}.0"), Binary::Sub, ac, bs);
        let second = self.binary(&format!("{name}.1"), Binary::Add, bc, as_);
        let joined = self.concat(&format!("{name}.r"), &[first, second], 2);
        self.cast(name, joined, dtype)
    }

    /// `x / (1 + exp(-x))`.
    pub fn silu(&mut self, name: &str, x: ValueId) -> ValueId {
        let negated = self.unary(&format!("{name}.neg"), Unary::Neg, x);
        let exp = self.unary(&format!("{name}.exp"), Unary::Exp, negated);
        let one = self.constant_like(&format!("{name}.one"), 1.0, x);
        let below = self.binary(&format!("{name}.den"), Binary::Add, one, exp);
        self.binary(name, Binary::Div, x, below)
    }

    /// `exp(x - max) / sum(exp(x - max))` over the last axis.
    pub fn softmax(&mut self, name: &str, x: ValueId) -> ValueId {
        let shape = self.shape(x);
        let last = shape.len() - 1;
        let outer: Vec<usize> = (0..last).collect();
        let max = self.reduce(&format!("{name}.max"), Reduction::Max, x, last);
        let max = self.broadcast(&format!("{name}.maxb"), max, &outer, &shape);
        let shifted = self.binary(&format!("{name}.sh"), Binary::Sub, x, max);
        let exp = self.unary(&format!("{name}.exp"), Unary::Exp, shifted);
        let sum = self.reduce(&format!("{name}.sum"), Reduction::Sum, exp, last);
        let sum = self.broadcast(&format!("{name}.sumb"), sum, &outer, &shape);
        self.binary(name, Binary::Div, exp, sum)
    }

    /// What [`Op::Attention`] means, spelt out: scores, mask, softmax, weighted sum, all in f32.
    #[allow(clippy::too_many_arguments)] // the operands of the op
    pub fn attention_expanded(
        &mut self,
        name: &str,
        q: ValueId,
        k: ValueId,
        v: ValueId,
        pos: ValueId,
        causal: bool,
        scale: f64,
    ) -> ValueId {
        let (q_shape, k_shape, dtype) = (self.shape(q), self.shape(k), self.ty(q).dtype);
        let (t, heads, d, kv_heads) = (q_shape[0], q_shape[1], q_shape[2], k_shape[0]);
        let per_kv = heads.constant().expect("constant heads") / kv_heads.constant().expect("constant heads");
        let n = |tail: &str| format!("{name}.{tail}");
        let [q, k, v] = [(q, "q"), (k, "k"), (v, "v")].map(|(x, tail)| self.cast(&n(tail), x, DType::F32));
        let q = self.reshape(&n("qg"), q, &[t, kv_heads, Dim::of(per_kv), d]);
        let scores = self.dot(&n("s"), "tghd,gcd->tghc", q, k, DType::F32);
        let shape = self.shape(scores);
        let factor = self.constant_like(&n("scale"), scale, scores);
        let scores = self.binary(&n("ss"), Binary::Mul, scores, factor);
        let slot = self.iota(&n("slot"), 3, DType::I32, &shape);
        let last = if causal {
            self.broadcast(&n("pos"), pos, &[0], &shape)
        } else {
            let pos = self.cast(&n("posf"), pos, DType::F32);
            let max = self.reduce(&n("posmax"), Reduction::Max, pos, 0);
            let max = self.cast(&n("posi"), max, DType::I32);
            self.broadcast(&n("pos"), max, &[], &shape)
        };
        let seen = self.compare(&n("seen"), Compare::Le, slot, last);
        let never = self.constant(&n("never"), f64::NEG_INFINITY, DType::F32, &shape);
        let masked = self.select(&n("masked"), seen, scores, never);
        let p = self.softmax(&n("p"), masked);
        let out = self.dot(&n("o"), "tghc,gcd->tghd", p, v, DType::F32);
        let out = self.reshape(&n("of"), out, &[t, heads, d]);
        self.cast(name, out, dtype)
    }
}
