//! Says whether a graph is one. Everything that a pass, an interpreter or a generator may take for granted of a
//! graph is checked here, in this order:
//!
//! 1. Symbols: at most [`MAX_SYMBOLS`], each with a name of its own and `0 <= min <= max <=` [`MAX_EXTENT`].
//! 2. Names: those of the graph, values, groups and packs can be written in text (letters, digits, `_`, `.`,
//!    `-`) and are unique among their kind; so are output names and the names under which inputs, weights and
//!    states are bound. A remark is one line.
//! 3. Order: operands precede users; outputs, groups and packs name values and groups that exist.
//! 4. Extents: at most [`MAX_RANK`] axes, only symbols of the graph, and for every value that the symbols may
//!    take positive and at most [`MAX_EXTENT`]; at most [`MAX_ELEMS`] elements. A slice stays inside its axis.
//! 5. Types: each value's type is the one that [`graph::check`] derives. Block formats are made by `weight`,
//!    `input`, `state`, `quantize` and `gather` only, and the last axis holds whole blocks.
//! 6. States: linear use, so that memory may be updated in place. A state, and every version of it, is read by
//!    at most one `cache_append`, as its cache; nobody reads a version once it was appended to; an output
//!    named like a state is a version of it, the last one.
//! 7. Groups: not empty; the values of one stand together, and groups stand in their order. Inputs, weights,
//!    states and constants are in none.
//! 8. Packs: each stream's weight is a `weight` of the pack's dtype and of `k` columns, every column `n` comes
//!    from a row that it has, nothing is empty, and words are no longer than a padded row.
//! 9. Layouts: a pitch holds a row, panels are of a tensor with three axes and words of 1 or 2.

use crate::dim::{Dim, MAX_SYMBOLS, Symbols};
use crate::dtype::DType;
use crate::graph::{self, Graph, GroupId, Layout, Pack, Stream, TensorType, TypeError, Value, ValueId};
use crate::op::Op;
use crate::print;
use std::collections::HashSet;

/// Largest extent, symbol and attribute: what 8 TiB of bytes can be indexed by.
pub const MAX_EXTENT: i64 = 1 << 43;
/// Largest number of elements of a tensor.
pub const MAX_ELEMS: i64 = MAX_EXTENT;
/// Largest factor on a symbol in an extent.
pub const MAX_COEF: i64 = 1 << 16;
/// Most axes of a tensor.
pub const MAX_RANK: usize = 8;
/// Most operands of a value: sums of so many extents do not overflow.
pub const MAX_OPERANDS: usize = 4096;

/// What is wrong with a graph, and where.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{text}\n  {fault}")]
pub struct VerifyError {
    /// The line of text at fault: a value's, a group's, a pack's, an output's or the graph's.
    pub text: String,
    /// What is wrong with it.
    pub fault: Fault,
}

/// A rule that a graph breaks.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[allow(missing_docs)] // the messages say what the fields are
pub enum Fault {
    #[error("more than {MAX_SYMBOLS} symbols")]
    Symbols,
    #[error("the range of `{0}` is not within 0..{MAX_EXTENT}, or is empty")]
    Range(String),
    #[error("`{0}` is no name: letters, digits, `_`, `.` and `-` make one")]
    Name(String),
    #[error("a second {what} `{name}`")]
    Duplicate { what: &'static str, name: String },
    #[error("a remark is one line")]
    Remark,
    #[error("operand {0} does not come before its user")]
    Order(usize),
    #[error("there is no such {0}")]
    Missing(&'static str),
    #[error("more than {MAX_RANK} axes")]
    Rank,
    #[error("more than {MAX_OPERANDS} operands")]
    Operands,
    #[error("an extent names a symbol that the graph has not")]
    Symbol,
    #[error("an extent runs from {min} to {max}, which is not within 1..{MAX_EXTENT}")]
    Extent { min: i128, max: i128 },
    #[error("more than {MAX_ELEMS} elements")]
    Elems,
    #[error("the slice leaves its axis for some value of the symbols")]
    Slice,
    #[error("{0}")]
    Type(#[from] TypeError),
    #[error("this op does not make {0}")]
    Block(DType),
    #[error("the last axis must be a constant multiple of {0} elements, a block")]
    WholeBlocks(usize),
    #[error("a second append to `{0}`: the state would be two tensors")]
    SecondAppend(String),
    #[error("reads `{0}` after it was appended to")]
    Stale(String),
    #[error("state `{0}` can only become a version of itself, the last one")]
    Next(String),
    #[error("the values of a group stand together, groups in their order, none empty")]
    Group,
    #[error("a value that is bound or constant belongs to no group")]
    Bound,
    #[error("a pack has columns, a `k`, words that a padded row holds and chunks of 1 or more")]
    Pack,
    #[error("`%{name}` is not a `weight` of shape [rows, {k}] and dtype {dtype}")]
    Stream { name: String, k: usize, dtype: DType },
    #[error("column {column} would be row {row} of `%{name}`, which has {rows}")]
    Row { name: String, column: u128, row: u128, rows: i64 },
    #[error("the layout does not fit the type")]
    Layout,
}

/// Checks all that the head of this file lists.
///
/// # Errors
///
/// The first rule broken, with the text of the line that breaks it.
pub fn verify(graph: &Graph) -> Result<(), VerifyError> {
    let of_graph = |fault| VerifyError { text: print::head(graph), fault };
    symbols(&graph.symbols).and_then(|()| name(&graph.name)).map_err(of_graph)?;

    let mut seen = Seen::default();
    for id in graph.ids() {
        // The type is shown as far as it makes sense: the symbols were checked, operands may be missing.
        let of_value = |fault| VerifyError { text: print::value(graph, id), fault };
        value(graph, id, &mut seen).map_err(of_value)?;
    }
    for (index, (name, id)) in graph.outputs.iter().enumerate() {
        let of_output = |fault| VerifyError { text: print::output(graph, index), fault };
        let exists = if (id.0 as usize) < graph.values.len() { Ok(()) } else { Err(Fault::Missing("value")) };
        exists.and_then(|()| once("output", name, &mut seen.outputs)).map_err(of_output)?;
    }
    states(graph)?;
    groups(graph, &mut seen)?;
    for one in &graph.packs {
        let of_pack = |fault| VerifyError { text: print::pack(graph, one), fault };
        pack(graph, one, &mut seen).map_err(of_pack)?;
    }
    Ok(())
}

/// Names met so far, by kind.
#[derive(Default)]
struct Seen<'a> {
    values: HashSet<&'a str>,
    bindings: HashSet<&'a str>,
    outputs: HashSet<&'a str>,
    groups: HashSet<&'a str>,
    packs: HashSet<&'a str>,
}

fn once<'a>(what: &'static str, name: &'a str, seen: &mut HashSet<&'a str>) -> Result<(), Fault> {
    if seen.insert(name) { Ok(()) } else { Err(Fault::Duplicate { what, name: name.to_string() }) }
}

fn name(name: &str) -> Result<(), Fault> {
    let fits = !name.is_empty() && name.chars().all(print::is_name_char);
    if fits { Ok(()) } else { Err(Fault::Name(name.to_string())) }
}

fn remarks(remarks: &[String]) -> Result<(), Fault> {
    let one_line = remarks.iter().all(|remark| !remark.contains(['\n', '\r']));
    if one_line { Ok(()) } else { Err(Fault::Remark) }
}

fn symbols(symbols: &Symbols) -> Result<(), Fault> {
    if symbols.0.len() > MAX_SYMBOLS {
        return Err(Fault::Symbols);
    }
    let mut seen = HashSet::new();
    for symbol in &symbols.0 {
        let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
        if !symbol.name.chars().all(word) || !symbol.name.starts_with(|c: char| c.is_ascii_alphabetic()) {
            return Err(Fault::Name(symbol.name.clone()));
        }
        once("symbol", &symbol.name, &mut seen)?;
        if !(0 <= symbol.min && symbol.min <= symbol.max && symbol.max <= MAX_EXTENT) {
            return Err(Fault::Range(symbol.name.clone()));
        }
    }
    Ok(())
}

/// Smallest and largest value of `dim`: an affine form has them at corners of the symbols' ranges.
fn range(symbols: &Symbols, dim: Dim) -> Result<(i128, i128), Fault> {
    let (mut min, mut max) = (i128::from(dim.base), i128::from(dim.base));
    for (index, coef) in dim.coef.into_iter().enumerate().filter(|(_, coef)| *coef != 0) {
        let symbol = symbols.0.get(index).ok_or(Fault::Symbol)?;
        let [at_min, at_max] = [symbol.min, symbol.max].map(|x| i128::from(coef) * i128::from(x));
        min += at_min.min(at_max);
        max += at_min.max(at_max);
        if i64::from(coef).abs() > MAX_COEF {
            return Err(Fault::Extent { min, max });
        }
    }
    Ok((min, max))
}

/// Rule 4 for a type.
fn extents(symbols: &Symbols, ty: &TensorType) -> Result<(), Fault> {
    if ty.shape.len() > MAX_RANK {
        return Err(Fault::Rank);
    }
    let mut elems = 1i128;
    for &dim in &ty.shape {
        let (min, max) = range(symbols, dim)?;
        if min < 1 || max > i128::from(MAX_EXTENT) || dim.base.unsigned_abs() > MAX_EXTENT as u64 {
            return Err(Fault::Extent { min, max });
        }
        elems *= max;
        if elems > i128::from(MAX_ELEMS) {
            return Err(Fault::Elems);
        }
    }
    Ok(())
}

/// Rules 2 to 5 and 9 for a value.
fn value<'a>(graph: &'a Graph, id: ValueId, seen: &mut Seen<'a>) -> Result<(), Fault> {
    let Value { name, op, operands, ty, group, layout, remarks } = &graph[id];
    self::name(name)?;
    once("value", name, &mut seen.values)?;
    self::remarks(remarks)?;
    if let Op::Input { name } | Op::Weight { name } | Op::State { name } = op {
        once("binding", name, &mut seen.bindings)?;
    }
    if let Some(index) = operands.iter().position(|&operand| operand >= id) {
        return Err(Fault::Order(index));
    }
    if operands.len() > MAX_OPERANDS {
        return Err(Fault::Operands);
    }
    if group.is_some_and(|GroupId(group)| group as usize >= graph.groups.len()) {
        return Err(Fault::Missing("group"));
    }
    extents(&graph.symbols, ty)?;
    let types: Vec<&TensorType> = operands.iter().map(|&operand| &graph[operand].ty).collect();
    graph::check(op, &types, ty)?;
    if let Op::Slice { axis, start } = op {
        let whole = types[0].shape[*axis];
        let (first, _) = range(&graph.symbols, *start)?;
        if start.base.unsigned_abs() > MAX_EXTENT as u64 {
            return Err(Fault::Slice);
        }
        let (left, _) = range(&graph.symbols, whole - *start - ty.shape[*axis])?;
        if first < 0 || left < 0 {
            return Err(Fault::Slice);
        }
    }
    if let DType::Block(block) = ty.dtype {
        let makes_blocks =
            matches!(op, Op::Input { .. } | Op::Weight { .. } | Op::State { .. } | Op::Quantize | Op::Gather);
        if !makes_blocks {
            return Err(Fault::Block(ty.dtype));
        }
        let elems = block.facts().elems;
        let last = ty.shape.last().and_then(|dim| dim.constant());
        if last.is_none_or(|last| last % elems as i64 != 0) {
            return Err(Fault::WholeBlocks(elems));
        }
    }
    match layout {
        None => Ok(()),
        Some(layout) if layout_fits(&graph.symbols, *layout, ty)? => Ok(()),
        Some(_) => Err(Fault::Layout),
    }
}

fn layout_fits(symbols: &Symbols, layout: Layout, ty: &TensorType) -> Result<bool, Fault> {
    Ok(match layout {
        Layout::Rows { pitch } => {
            let mut row = 1;
            for &dim in ty.shape.iter().skip(1) {
                row *= range(symbols, dim)?.1;
            }
            !ty.shape.is_empty() && row <= pitch as i128 && pitch as i128 <= i128::from(MAX_EXTENT)
        }
        Layout::Pages { slots } => {
            let all = ty.shape.get(1).and_then(|dim| dim.constant());
            ty.shape.len() == 3 && slots > 0 && all.is_some_and(|all| all % slots as i64 == 0)
        }
        Layout::KeyPanels { word } | Layout::ValuePanels { word } => {
            ty.shape.len() == 3 && (word == 1 || word == 2)
        }
    })
}

/// Rule 6.
fn states(graph: &Graph) -> Result<(), VerifyError> {
    let fault = |id: ValueId, fault| VerifyError { text: print::value(graph, id), fault };
    // The state of which a value is a version, and the append that replaced that version.
    let mut state_of: Vec<Option<ValueId>> = vec![None; graph.values.len()];
    let mut replaced: Vec<bool> = vec![false; graph.values.len()];
    for id in graph.ids() {
        let Value { op, operands, .. } = &graph[id];
        // Reads first: `cache_append %c, %rows, %pos` reads rows and positions before it writes `%c`.
        if let Some(stale) = operands.iter().find(|operand| replaced[operand.0 as usize]) {
            let name = graph[*stale].name.clone();
            let appends_again = matches!(op, Op::CacheAppend) && operands[0] == *stale;
            return Err(fault(
                id,
                if appends_again { Fault::SecondAppend(name) } else { Fault::Stale(name) },
            ));
        }
        match op {
            Op::State { .. } => state_of[id.0 as usize] = Some(id),
            Op::CacheAppend => {
                let cache = operands[0].0 as usize;
                replaced[cache] = state_of[cache].is_some();
                state_of[id.0 as usize] = state_of[cache];
            }
            _ => {}
        }
    }
    let state_named = |name: &str| {
        graph.ids().find(|&id| matches!(&graph[id].op, Op::State { name: bound } if bound == name))
    };
    for (index, (name, id)) in graph.outputs.iter().enumerate() {
        let of_output = |fault| VerifyError { text: print::output(graph, index), fault };
        if replaced[id.0 as usize] {
            return Err(of_output(Fault::Stale(graph[*id].name.clone())));
        }
        if let Some(state) = state_named(name)
            && state_of[id.0 as usize] != Some(state)
        {
            return Err(of_output(Fault::Next(name.clone())));
        }
    }
    Ok(())
}

/// Rule 7.
fn groups<'a>(graph: &'a Graph, seen: &mut Seen<'a>) -> Result<(), VerifyError> {
    for group in &graph.groups {
        let of_group = |fault| VerifyError { text: print::group_head(group), fault };
        name(&group.name)
            .and_then(|()| once("group", &group.name, &mut seen.groups))
            .and_then(|()| remarks(&group.remarks))
            .map_err(of_group)?;
    }
    let of_value = |id: ValueId, fault| VerifyError { text: print::value(graph, id), fault };
    let mut next = 0;
    let mut before = None;
    for id in graph.ids() {
        let Value { op, group, .. } = &graph[id];
        let bound =
            matches!(op, Op::Input { .. } | Op::Weight { .. } | Op::State { .. } | Op::Constant { .. });
        match group {
            Some(_) if bound => return Err(of_value(id, Fault::Bound)),
            Some(group) if before != Some(*group) => {
                if group.0 != next {
                    return Err(of_value(id, Fault::Group));
                }
                next += 1;
            }
            _ => {}
        }
        before = *group;
    }
    match graph.groups.get(next as usize) {
        Some(empty) => Err(VerifyError { text: print::group_head(empty), fault: Fault::Group }),
        None => Ok(()),
    }
}

/// Rule 8.
fn pack<'a>(graph: &'a Graph, pack: &'a Pack, seen: &mut Seen<'a>) -> Result<(), Fault> {
    let Pack { name, dtype, n, k, lanes, word, streams } = pack;
    self::name(name)?;
    once("pack", name, &mut seen.packs)?;
    let limit = MAX_EXTENT as usize;
    let empty = *n == 0 || *k == 0 || streams.is_empty() || *n > limit || *k > limit;
    // A word that is all of `k` may be padded to whole cache lines.
    if empty || !(1..=1024).contains(lanes) || *word == 0 || *word > k.next_multiple_of(64) {
        return Err(Fault::Pack);
    }
    for Stream { weight, chunk, stride, offset } in streams {
        let Some(value) = graph.values.get(weight.0 as usize) else { return Err(Fault::Missing("value")) };
        if *chunk == 0 || [chunk, stride, offset].into_iter().any(|&x| x > limit) {
            return Err(Fault::Pack);
        }
        let rows = match (&value.op, value.ty.shape.as_slice()) {
            (Op::Weight { .. }, [rows, columns]) if columns.constant() == Some(*k as i64) => rows.constant(),
            _ => None,
        };
        let Some(rows) = rows.filter(|_| value.ty.dtype == *dtype) else {
            return Err(Fault::Stream { name: value.name.clone(), k: *k, dtype: *dtype });
        };
        // Rows rise within a chunk and from chunk to chunk (`stride` may be less than `chunk`), so the largest is
        // that of the last column or of the last full chunk's last column.
        let [n, chunk, stride, offset] = [*n, *chunk, *stride, *offset].map(|x| x as u128);
        for column in [n - 1, (n / chunk * chunk).saturating_sub(1)] {
            let row = column / chunk * stride + column % chunk + offset;
            if row >= rows as u128 {
                return Err(Fault::Row { name: value.name.clone(), column, row, rows });
            }
        }
    }
    Ok(())
}

/// What text cannot say; the rest stands in `tests/ir/verify/`.
#[cfg(test)]
mod tests {
    use super::*;
    use crate::dim::Sym;
    use crate::parse;

    /// The fault of a sound graph after a change.
    fn after(change: impl FnOnce(&mut Graph)) -> String {
        let text = "graph @f(T in 1..4) {
          %x = input \"x\" : f32[T]
          group @g : elementwise {
            %y = neg %x : f32[T]
            %z = neg %y : f32[T]
          }
          %c = constant 1.0 : f32[T]
          group @h : elementwise {
            %v = mul %z, %c : f32[T]
          }
          %w = weight \"w\" : f32[4, 4]
          pack @p : f32 { n = 4, k = 4, word = 1, streams = [%w[n]] }
          output \"v\" = %v : f32[T]
        }";
        let mut graph = parse::graph(text).unwrap();
        verify(&graph).unwrap();
        change(&mut graph);
        verify(&graph).unwrap_err().to_string()
    }

    #[test]
    fn names() {
        assert!(after(|g| g.values[1].name = "x y".to_string()).contains("`x y` is no name"));
        assert!(after(|g| g.values[1].name = "x".to_string()).contains("a second value `x`"));
        assert!(after(|g| g.groups[1].name = "g".to_string()).contains("a second group `g`"));
        assert!(after(|g| g.packs.push(g.packs[0].clone())).contains("a second pack `p`"));
        assert!(after(|g| g.outputs.push(g.outputs[0].clone())).contains("a second output `v`"));
        assert!(after(|g| g.values[1].remarks.push("two\nlines".to_string())).contains("one line"));
    }

    #[test]
    fn ids() {
        let error = after(|g| g.values[1].operands = vec![ValueId(2)]);
        assert_eq!(error, "%y = neg %z : f32[T]\n  operand 0 does not come before its user");
        assert!(after(|g| g.values[1].operands = vec![ValueId(99)]).starts_with("%y = neg %<no value 99>"));
        assert!(after(|g| g.outputs[0].1 = ValueId(99)).contains("there is no such value"));
        assert!(after(|g| g.values[1].group = Some(GroupId(7))).contains("there is no such group"));
        assert!(after(|g| g.packs[0].streams[0].weight = ValueId(99)).contains("there is no such value"));
    }

    #[test]
    fn groups_stand_together() {
        // The constant parts `%v` from `%y` and `%z`.
        assert!(after(|g| g.values[4].group = Some(GroupId(0))).contains("stand together"));
        assert!(after(|g| g.values[4].group = None).contains("stand together"));
        let swap = |g: &mut Graph| {
            for value in [1, 2, 4] {
                g.values[value].group.as_mut().unwrap().0 ^= 1;
            }
        };
        assert!(after(swap).contains("stand together"));
    }

    #[test]
    fn bounds() {
        let many = |g: &mut Graph| (0..4).for_each(|i| g.symbols.0.push(symbol(i)));
        assert!(after(many).contains("more than 4 symbols"));
        assert!(after(|g| g.values[0].ty.shape = vec![Dim::of(1); 9]).contains("more than 8 axes"));
        let unknown = Dim::from(Sym(3)) + Dim::of(1);
        assert!(after(|g| g.values[0].ty.shape = vec![unknown]).contains("a symbol that the graph has not"));
        assert!(after(|g| g.values[1].operands = vec![ValueId(0); 5000]).contains("more than 4096 operands"));
    }

    fn symbol(number: usize) -> crate::dim::Symbol {
        crate::dim::Symbol { name: format!("S{number}"), min: 1, max: 2 }
    }
}
