//! The closed set of graph ops, with the meaning of the element-wise ones.
//!
//! A unary or binary op is one row of a table here: name, exact meaning in f64, condition number, cost.
//! Parser, printer, interpreters, cost model and op tests walk the rows. RMSNorm, RoPE, SiLU and softmax are no
//! ops: [`crate::graph::Builder`] composes them, and the fuser earns them back.

use crate::dim::Dim;

/// What a value computes from its operands. Shapes and dtypes stand in the value's type.
#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    /// Bound by the caller at each step.
    Input {
        /// Binding name.
        name: String,
    },
    /// Bound once, to a tensor of the checkpoint.
    Weight {
        /// The tensor's Hugging Face name.
        name: String,
    },
    /// Memory that lives from step to step. An `output` of the same name gives its next contents.
    State {
        /// Binding name.
        name: String,
    },
    /// Literal numbers: one for all elements, or one each in row-major order.
    Constant {
        /// `data.len()` is 1 or the number of elements.
        data: Vec<f64>,
    },
    /// Rounds to the result's dtype.
    Cast,
    /// One operand, element by element.
    Unary(Unary),
    /// Two operands of one shape, element by element.
    Binary(Binary),
    /// 1 where the relation holds, else 0; the result is `bool`.
    Compare(Compare),
    /// `select c, a, b`: `a` where `c` is true, else `b`.
    Select,
    /// The index along `axis`, no operand.
    Iota {
        /// Axis counted.
        axis: usize,
    },
    /// Repeats: axis `i` of the operand becomes axis `axes[i]` of the result.
    Broadcast {
        /// Strictly increasing.
        axes: Vec<usize>,
    },
    /// Same elements in row-major order, another shape.
    Reshape,
    /// Axis `i` of the result is axis `perm[i]` of the operand.
    Transpose {
        /// A permutation.
        perm: Vec<usize>,
    },
    /// Elements `start..start + extent` along `axis`; the extent stands in the type.
    Slice {
        /// Axis cut.
        axis: usize,
        /// First index kept.
        start: Dim,
    },
    /// Operands one after another along `axis`.
    Concat {
        /// Axis along which they lie.
        axis: usize,
    },
    /// Folds `axis` away.
    Reduce {
        /// Sum or maximum.
        kind: Reduction,
        /// Axis folded.
        axis: usize,
    },
    /// Contraction with named axes: `tk,nk->tn`. A letter in both operands and the result is a batch axis, one in
    /// both operands only is summed over (in at least f32).
    Dot {
        /// The axes' names.
        axes: DotAxes,
    },
    /// `gather table[V, ..], ids[T]`: row `ids[t]` of the table.
    Gather,
    /// `scatter_add into[V, ..], ids[T], rows[T, ..]`: adds each row to row `ids[t]`.
    ScatterAdd,
    /// `attention q[T, H, d], k[G, C, d], v[G, C, d], pos[T]`: softmax over the cache's slots. Defined by
    /// [`crate::graph::Builder::attention_expanded`].
    Attention {
        /// Row `t` sees slots `0..=pos[t]`; else every row sees slots `0..=max(pos)`.
        causal: bool,
        /// Factor on the scores, usually `1 / sqrt(d)`.
        scale: f64,
    },
    /// `attention_lse q[T, H, d], k[G, C, d], pos[T]`: the logarithm of the sum of the exponentials of the scores that an
    /// attention of the same operands has, f32 `[T, H]`: with it, attentions over parts of the keys are brought together.
    AttentionLse {
        /// As the attention's.
        causal: bool,
        /// As the attention's.
        scale: f64,
    },
    /// `cache_append cache[G, C, d], rows[T, G, d], pos[T]`: the cache with slot `pos[t]` replaced by row `t`.
    CacheAppend,
    /// Rounds to the block format in the result's type, along the last axis.
    Quantize,
    /// The numbers that a block format encodes.
    Dequantize,
    /// Index of the largest element along the last axis, the lowest on ties; `i32`.
    Argmax,
}

/// Axis names of a contraction, one lower-case letter an axis.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct DotAxes {
    /// First operand.
    pub lhs: Vec<char>,
    /// Second operand.
    pub rhs: Vec<char>,
    /// Result.
    pub out: Vec<char>,
}

impl DotAxes {
    /// Reads `tk,nk->tn`. Every letter of the result must be in an operand, no letter may be twice in one tensor.
    pub fn parse(text: &str) -> Option<DotAxes> {
        let (operands, out) = text.split_once("->")?;
        let (lhs, rhs) = operands.split_once(',')?;
        let axes =
            DotAxes { lhs: lhs.chars().collect(), rhs: rhs.chars().collect(), out: out.chars().collect() };
        let distinct = |names: &[char]| {
            names.iter().enumerate().all(|(i, c)| c.is_ascii_lowercase() && !names[..i].contains(c))
        };
        let known = axes.out.iter().all(|c| axes.lhs.contains(c) || axes.rhs.contains(c));
        let summed_in_both = axes
            .lhs
            .iter()
            .chain(&axes.rhs)
            .all(|c| axes.out.contains(c) || (axes.lhs.contains(c) && axes.rhs.contains(c)));
        (distinct(&axes.lhs) && distinct(&axes.rhs) && distinct(&axes.out) && known && summed_in_both)
            .then_some(axes)
    }

    /// The letters summed over, in the first operand's order.
    pub fn contracted(&self) -> Vec<char> {
        self.lhs.iter().copied().filter(|c| !self.out.contains(c)).collect()
    }
}

impl std::fmt::Display for DotAxes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text = |names: &[char]| names.iter().collect::<String>();
        write!(f, "{},{}->{}", text(&self.lhs), text(&self.rhs), text(&self.out))
    }
}

/// Element-wise functions of one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)] // see the table
pub enum Unary {
    Neg,
    Abs,
    Exp,
    Log,
    Sqrt,
    Rsqrt,
    Recip,
    Sin,
    Cos,
    Tanh,
}

/// All that most of the compiler asks of a unary op. One row an op, and this is the only table.
pub struct UnaryFacts {
    /// Name in text.
    pub name: &'static str,
    /// Exact meaning on one element, in f64: the interpreters' oracle. Nothing that they judge may call it.
    pub eval: fn(f64) -> f64,
    /// Condition number `|x f'(x) / f(x)|`: how much a relative error grows.
    pub condition: fn(f64) -> f64,
    /// Cost in the plan, FLOPs an element.
    pub flops: u32,
}

impl Unary {
    /// Every unary op.
    pub const ALL: [Unary; 10] = [
        Unary::Neg,
        Unary::Abs,
        Unary::Exp,
        Unary::Log,
        Unary::Sqrt,
        Unary::Rsqrt,
        Unary::Recip,
        Unary::Sin,
        Unary::Cos,
        Unary::Tanh,
    ];

    /// The op's row.
    #[rustfmt::skip] // a table: one op a line
    pub fn facts(self) -> UnaryFacts {
        match self {
            Unary::Neg   => UnaryFacts { name: "neg",   eval: |x| -x,               condition: |_| 1.0,                            flops: 1 },
            Unary::Abs   => UnaryFacts { name: "abs",   eval: f64::abs,             condition: |_| 1.0,                            flops: 1 },
            Unary::Exp   => UnaryFacts { name: "exp",   eval: f64::exp,             condition: f64::abs,                           flops: 12 },
            Unary::Log   => UnaryFacts { name: "log",   eval: f64::ln,              condition: |x| 1.0 / x.ln().abs(),             flops: 14 },
            Unary::Sqrt  => UnaryFacts { name: "sqrt",  eval: f64::sqrt,            condition: |_| 0.5,                            flops: 4 },
            Unary::Rsqrt => UnaryFacts { name: "rsqrt", eval: |x| x.sqrt().recip(), condition: |_| 0.5,                            flops: 4 },
            Unary::Recip => UnaryFacts { name: "recip", eval: f64::recip,           condition: |_| 1.0,                            flops: 4 },
            Unary::Sin   => UnaryFacts { name: "sin",   eval: f64::sin,             condition: |x| (x / x.tan()).abs(),            flops: 16 },
            Unary::Cos   => UnaryFacts { name: "cos",   eval: f64::cos,             condition: |x| (x * x.tan()).abs(),            flops: 16 },
            Unary::Tanh  => UnaryFacts { name: "tanh",  eval: f64::tanh,            condition: |x| (2.0 * x / (2.0 * x).sinh()).abs(), flops: 16 },
        }
    }
}

/// Element-wise functions of two numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)] // see the table
pub enum Binary {
    Add,
    Sub,
    Mul,
    Div,
    Max,
    Min,
}

/// One row of the binary ops' table.
pub struct BinaryFacts {
    /// Name in text.
    pub name: &'static str,
    /// Exact meaning on one element, in f64. `max` and `min` give NaN where an operand is NaN.
    pub eval: fn(f64, f64) -> f64,
    /// Cost in the plan, FLOPs an element.
    pub flops: u32,
}

impl Binary {
    /// Every binary op.
    pub const ALL: [Binary; 6] =
        [Binary::Add, Binary::Sub, Binary::Mul, Binary::Div, Binary::Max, Binary::Min];

    /// The op's row.
    #[rustfmt::skip] // a table: one op a line
    pub fn facts(self) -> BinaryFacts {
        match self {
            Binary::Add => BinaryFacts { name: "add", eval: |a, b| a + b, flops: 1 },
            Binary::Sub => BinaryFacts { name: "sub", eval: |a, b| a - b, flops: 1 },
            Binary::Mul => BinaryFacts { name: "mul", eval: |a, b| a * b, flops: 1 },
            Binary::Div => BinaryFacts { name: "div", eval: |a, b| a / b, flops: 4 },
            Binary::Max => BinaryFacts { name: "max", eval: |a, b| if a.is_nan() || a > b { a } else { b }, flops: 1 },
            Binary::Min => BinaryFacts { name: "min", eval: |a, b| if a.is_nan() || a < b { a } else { b }, flops: 1 },
        }
    }
}

/// Relations between two numbers; every one is false where an operand is NaN, except `ne`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)] // the names are the relations
pub enum Compare {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
}

impl Compare {
    /// Every relation.
    pub const ALL: [Compare; 6] =
        [Compare::Eq, Compare::Ne, Compare::Lt, Compare::Le, Compare::Gt, Compare::Ge];

    /// Name in text, after `compare.`.
    pub fn name(self) -> &'static str {
        match self {
            Compare::Eq => "eq",
            Compare::Ne => "ne",
            Compare::Lt => "lt",
            Compare::Le => "le",
            Compare::Gt => "gt",
            Compare::Ge => "ge",
        }
    }

    /// Whether the relation holds.
    pub fn eval(self, a: f64, b: f64) -> bool {
        match self {
            Compare::Eq => a == b,
            Compare::Ne => a != b,
            Compare::Lt => a < b,
            Compare::Le => a <= b,
            Compare::Gt => a > b,
            Compare::Ge => a >= b,
        }
    }
}

/// How an axis is folded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reduction {
    /// Sum, in at least f32.
    Sum,
    /// Largest element.
    Max,
}

impl Reduction {
    /// Name in text, after `reduce.`.
    pub fn name(self) -> &'static str {
        match self {
            Reduction::Sum => "sum",
            Reduction::Max => "max",
        }
    }
}
