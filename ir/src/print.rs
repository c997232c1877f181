//! Graph text. [`crate::parse`] reads it back: `parse(print(g)) == g` for every graph that the verifier accepts.
//!
//! ```text
//! graph @half(T in 1..64) {
//!   %x = input "x" : f32[T, 4]
//!   // A remark stands above its value.
//!   %c = constant 0.5 : f32[T, 4]
//!   group @scale : elementwise, schedule "rows 4" {
//!     %y = mul %x, %c : f32[T, 4] @ rows(8)
//!   }
//!   output "y" = %y : f32[T, 4]
//! }
//! ```
//!
//! Nothing is aligned, so that a longer name changes one line and not its neighbours. A pack stands after the
//! last of its weights, and after the pack before it.

use crate::dim::{Dim, Symbols};
use crate::graph::{Graph, Group, Layout, Pack, Stream, TensorType, Value, ValueId};
use crate::op::Op;
use std::fmt::{self, Display, Formatter, Write};

/// The text of a graph.
pub fn graph(graph: &Graph) -> String {
    graph.to_string()
}

impl Display for Graph {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} {{", head(self))?;
        let mut packs = packs_by_place(self).into_iter().peekable();
        let mut open = None;
        for id in self.ids() {
            let group = self[id].group;
            if open != group {
                if open.is_some() {
                    writeln!(f, "  }}")?;
                }
                if let Some(new) = group.and_then(|g| self.groups.get(g.0 as usize)) {
                    remarks(f, "  ", &new.remarks)?;
                    writeln!(f, "  {} {{", group_head(new))?;
                }
                open = group;
            }
            let indent = if open.is_some() { "    " } else { "  " };
            remarks(f, indent, &self[id].remarks)?;
            writeln!(f, "{indent}{}", value(self, id))?;
            while let Some((_, index)) = packs.next_if(|&(place, _)| place <= id) {
                writeln!(f, "{indent}{}", pack(self, &self.packs[index]))?;
            }
        }
        if open.is_some() {
            writeln!(f, "  }}")?;
        }
        for index in 0..self.outputs.len() {
            writeln!(f, "  {}", output(self, index))?;
        }
        writeln!(f, "}}")
    }
}

/// Name and symbols: `graph @tinyllama(T = 1, P in 0..2048)`.
pub fn head(graph: &Graph) -> String {
    let symbols: Vec<String> = graph.symbols.0.iter().map(symbol).collect();
    format!("graph @{}({})", graph.name, symbols.join(", "))
}

fn symbol(symbol: &crate::dim::Symbol) -> String {
    let crate::dim::Symbol { name, min, max } = symbol;
    if min == max { format!("{name} = {min}") } else { format!("{name} in {min}..{max}") }
}

fn remarks(f: &mut Formatter<'_>, indent: &str, remarks: &[String]) -> fmt::Result {
    remarks.iter().try_for_each(|remark| match remark.as_str() {
        "" => writeln!(f, "{indent}//"),
        text => writeln!(f, "{indent}// {text}"),
    })
}

/// Each pack's index with the value after which it stands, in the order of the packs.
fn packs_by_place(graph: &Graph) -> Vec<(ValueId, usize)> {
    let mut place = ValueId(0);
    let mut places = Vec::with_capacity(graph.packs.len());
    for (index, pack) in graph.packs.iter().enumerate() {
        place = pack.streams.iter().map(|s| s.weight).chain([place]).max().expect("a chain of one or more");
        places.push((place, index));
    }
    places
}

/// A group's first line, without the brace: `group @l0.qkv : dot, schedule "mr 6, nr 4" measured`.
pub fn group_head(group: &Group) -> String {
    let Group { name, family, schedule, measured, remarks: _ } = group;
    let mut text = format!("group @{name} : {}", family.name());
    if let Some(schedule) = schedule {
        text += &format!(", schedule {}", quoted(schedule));
        text += if *measured { " measured" } else { "" };
    }
    text
}

/// A pack's line.
pub fn pack(graph: &Graph, pack: &Pack) -> String {
    let Pack { name, dtype, n, k, lanes, word, streams } = pack;
    let streams: Vec<String> = streams.iter().map(|s| stream(graph, *n, s)).collect();
    let streams = streams.join(", ");
    let lanes = if *lanes == Pack::LANES { String::new() } else { format!("lanes = {lanes}, ") };
    format!("pack @{name} : {dtype} {{ n = {n}, k = {k}, {lanes}word = {word}, streams = [{streams}] }}")
}

/// `%w[n / 32 * 64 + n % 32 + 32]`; `%w[n]` where the one chunk is the whole: `chunk = stride = n`.
fn stream(graph: &Graph, n: usize, stream: &Stream) -> String {
    let Stream { weight, chunk, stride, offset } = stream;
    let row = match (*chunk, *stride) {
        (chunk, stride) if chunk == n && stride == n => "n".to_string(),
        (chunk, stride) => format!("n / {chunk} * {stride} + n % {chunk}"),
    };
    let offset = if *offset == 0 { String::new() } else { format!(" + {offset}") };
    format!("{}[{row}{offset}]", name_of(graph, *weight))
}

/// `%name`; an id that names no value stays readable, for the verifier's messages.
pub fn name_of(graph: &Graph, id: ValueId) -> String {
    match graph.values.get(id.0 as usize) {
        Some(value) => format!("%{}", value.name),
        None => format!("%<no value {}>", id.0),
    }
}

/// An output's line.
pub fn output(graph: &Graph, index: usize) -> String {
    let (name, id) = &graph.outputs[index];
    let ty = graph.values.get(id.0 as usize).map(|v| tensor_type(&graph.symbols, &v.ty)).unwrap_or_default();
    format!("output {} = {} : {ty}", quoted(name), name_of(graph, *id))
}

/// A value's line, without its remarks.
pub fn value(graph: &Graph, id: ValueId) -> String {
    let Value { name, op, operands, ty, group: _, layout, remarks: _ } = &graph[id];
    let mut text = format!("%{name} = {}", op_name(op));
    for (index, &operand) in operands.iter().enumerate() {
        text += if index == 0 { " " } else { ", " };
        text += &name_of(graph, operand);
    }
    text += &attributes(&graph.symbols, op);
    text += &format!(" : {}", tensor_type(&graph.symbols, ty));
    if let Some(layout) = layout {
        text += &format!(" @ {}", self::layout(*layout));
    }
    text
}

/// The word after `=`.
pub fn op_name(op: &Op) -> String {
    match op {
        Op::Input { .. } => "input".to_string(),
        Op::Weight { .. } => "weight".to_string(),
        Op::State { .. } => "state".to_string(),
        Op::Constant { .. } => "constant".to_string(),
        Op::Cast => "cast".to_string(),
        Op::Unary(unary) => unary.facts().name.to_string(),
        Op::Binary(binary) => binary.facts().name.to_string(),
        Op::Compare(relation) => format!("compare.{}", relation.name()),
        Op::Select => "select".to_string(),
        Op::Iota { .. } => "iota".to_string(),
        Op::Broadcast { .. } => "broadcast".to_string(),
        Op::Reshape => "reshape".to_string(),
        Op::Transpose { .. } => "transpose".to_string(),
        Op::Slice { .. } => "slice".to_string(),
        Op::Concat { .. } => "concat".to_string(),
        Op::Reduce { kind, .. } => format!("reduce.{}", kind.name()),
        Op::Dot { .. } => "dot".to_string(),
        Op::Gather => "gather".to_string(),
        Op::ScatterAdd => "scatter_add".to_string(),
        Op::Attention { .. } => "attention".to_string(),
        Op::AttentionLse { .. } => "attention_lse".to_string(),
        Op::CacheAppend => "cache_append".to_string(),
        Op::Quantize => "quantize".to_string(),
        Op::Dequantize => "dequantize".to_string(),
        Op::Argmax => "argmax".to_string(),
    }
}

/// What stands after the operands: a binding name, numbers, or fields in braces.
fn attributes(symbols: &Symbols, op: &Op) -> String {
    match op {
        Op::Input { name } | Op::Weight { name } | Op::State { name } => format!(" {}", quoted(name)),
        Op::Constant { data } => match data.as_slice() {
            [x] => format!(" {}", float(*x)),
            data => format!(" [{}]", data.iter().map(|&x| float(x)).collect::<Vec<_>>().join(", ")),
        },
        Op::Iota { axis } | Op::Concat { axis } | Op::Reduce { kind: _, axis } => {
            format!(" {{ axis = {axis} }}")
        }
        Op::Broadcast { axes } => format!(" {{ axes = {axes:?} }}"),
        Op::Transpose { perm } => format!(" {{ perm = {perm:?} }}"),
        Op::Slice { axis, start } => format!(" {{ axis = {axis}, start = {} }}", symbols.show(*start)),
        Op::Dot { axes } => format!(" {{ axes = \"{axes}\" }}"),
        Op::Attention { causal, scale } | Op::AttentionLse { causal, scale } => {
            format!(" {{ causal = {causal}, scale = {} }}", float(*scale))
        }
        Op::Cast
        | Op::Unary(_)
        | Op::Binary(_)
        | Op::Compare(_)
        | Op::Select
        | Op::Reshape
        | Op::Gather
        | Op::ScatterAdd
        | Op::CacheAppend
        | Op::Quantize
        | Op::Dequantize
        | Op::Argmax => String::new(),
    }
}

/// `bf16[T, 64]`; a scalar is `f32[]`.
pub fn tensor_type(symbols: &Symbols, ty: &TensorType) -> String {
    let extents: Vec<String> = ty.shape.iter().map(|&dim: &Dim| symbols.show(dim)).collect();
    format!("{}[{}]", ty.dtype, extents.join(", "))
}

/// `rows(96)`, as it stands after `@`.
pub fn layout(layout: Layout) -> String {
    match layout {
        Layout::Rows { pitch } => format!("rows({pitch})"),
        Layout::Pages { slots } => format!("pages({slots})"),
        Layout::KeyPanels { word } => format!("key_panels({word})"),
        Layout::ValuePanels { word } => format!("value_panels({word})"),
    }
}

/// The shortest decimal that reads back as the same bits; `nan`, `inf`, `-inf`.
pub fn float(x: f64) -> String {
    if x.is_nan() { "nan".to_string() } else { format!("{x:?}") }
}

/// `text` in quotes, with `"`, `\` and control characters escaped.
pub fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if c.is_control() => write!(out, "\\u{{{:x}}}", c as u32).expect("a string takes all"),
            c => out.push(c),
        }
    }
    out + "\""
}

/// May `c` stand in a name after `%` or `@`?
pub fn is_name_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-')
}
