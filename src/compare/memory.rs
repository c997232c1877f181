//! Tensors as a kernel's parameters hold them: packed, in panels, with a pitch; and back.
//!
//! Written from the layouts' text and not with the generators' code, which it helps to judge.

use ir::DType;
use ir::dim::MAX_SYMBOLS;
use ir::families::{Arg, storage};
use ir::graph::{Graph, GroupId, Layout, Pack, ValueId};
use ir::interp::Tensor;
use ir::kernel::Buffer;
use std::rc::Rc;

/// What a launch of `group` finds at an argument, in the order of the parameter's index space; `None` for what it makes.
pub fn held(
    graph: &Graph,
    group: GroupId,
    arg: &Arg,
    tensor: &dyn Fn(ValueId) -> Rc<Tensor>,
) -> Option<Vec<f64>> {
    match arg {
        Arg::Workspace { .. } => None,
        Arg::Pack(number) => Some(packed(&graph.packs[*number], tensor)),
        Arg::Value(id) => {
            // A cache holds what the last append before left in it.
            let before = |v: &ValueId| graph[*v].group.is_none_or(|of| of < group);
            let there = graph.ids().rfind(|&v| storage(graph, v) == *id && before(&v))?;
            Some(in_memory(&tensor(there), graph[*id].layout))
        }
    }
}

/// The tensor that a parameter holds.
pub fn tensor_of(graph: &Graph, id: ValueId, symbols: &[i64; MAX_SYMBOLS], held: &[f64]) -> Tensor {
    let ty = &graph[id].ty;
    let shape: Vec<usize> = ty.shape.iter().map(|dim| dim.eval(symbols) as usize).collect();
    let data = match cells(&shape, graph[storage(graph, id)].layout) {
        None => held.to_vec(),
        Some((cells, _)) => cells.into_iter().map(|cell| held[cell]).collect(),
    };
    Tensor { dtype: ty.dtype, shape, data }
}

/// The tensor that memory holds as `id`, by the layout of its text; `None` if the memory ends before the tensor does.
///
/// # Panics
///
/// On dtypes that no kernel keeps in memory.
pub fn stored(graph: &Graph, id: ValueId, symbols: &[i64; MAX_SYMBOLS], bytes: &[u8]) -> Option<Tensor> {
    let (ty, layout) = (&graph[id].ty, graph[storage(graph, id)].layout);
    let (elems, size) = (ty.elems(symbols), ty.dtype.bytes(1));
    // Before anything of its size is allocated.
    elems.checked_mul(size).filter(|&least| least <= bytes.len())?;
    let shape: Vec<usize> = ty.shape.iter().map(|dim| dim.eval(symbols) as usize).collect();
    let cells: Vec<usize> = match (cells(&shape, layout), layout) {
        (Some((cells, _)), _) => cells,
        (None, Some(Layout::Rows { pitch })) => {
            let row: usize = shape[1..].iter().product();
            (0..elems).map(|at| at / row * pitch + at % row).collect()
        }
        (None, _) => (0..elems).collect(),
    };
    let end = cells.iter().max().map_or(0, |last| last + 1);
    let held = decode(ty.dtype, bytes.get(..end.checked_mul(size)?)?);
    Some(Tensor { dtype: ty.dtype, data: cells.into_iter().map(|cell| held[cell]).collect(), shape })
}

/// Where each element of a parameter lies, in elements from its beginning, and the elements from there to its end.
pub fn positions(buffer: &Buffer, symbols: &[i64; MAX_SYMBOLS]) -> (Vec<usize>, usize) {
    let mut positions = vec![0];
    for (dim, &stride) in buffer.shape.iter().zip(&buffer.strides) {
        let along = |base: usize| (0..dim.eval(symbols)).map(move |i| base + (i * stride) as usize);
        positions = positions.into_iter().flat_map(along).collect();
    }
    let span = positions.iter().max().map_or(0, |last| last + 1);
    (positions, span)
}

fn packed(pack: &Pack, tensor: &dyn Fn(ValueId) -> Rc<Tensor>) -> Vec<f64> {
    let mut data = vec![0.0; pack.elems()];
    for (number, stream) in pack.streams.iter().enumerate() {
        let weight = tensor(stream.weight);
        for n in 0..pack.n {
            let row = &weight.data[stream.row(n) * pack.k..][..pack.k];
            row.iter().enumerate().for_each(|(k, &x)| data[pack.index(number, n, k)] = x);
        }
    }
    data
}

fn in_memory(tensor: &Tensor, layout: Option<Layout>) -> Vec<f64> {
    let Some((cells, len)) = cells(&tensor.shape, layout) else { return tensor.data.clone() };
    let mut data = vec![0.0; len];
    cells.into_iter().zip(&tensor.data).for_each(|(cell, &x)| data[cell] = x);
    data
}

/// Where the elements of a cache in pages or panels lie, and how many there are with the padding.
fn cells(shape: &[usize], layout: Option<Layout>) -> Option<(Vec<usize>, usize)> {
    let lanes = Pack::LANES;
    if let (Some(Layout::Pages { slots: page }), &[heads, slots, width]) = (layout, shape) {
        let place = |head: usize, slot: usize| ((slot / page * heads + head) * page + slot % page) * width;
        let rows = (0..heads).flat_map(|head| (0..slots).map(move |slot| place(head, slot)));
        return Some((rows.flat_map(|row| row..row + width).collect(), heads * slots * width));
    }
    // The axis that lies along the lanes, the one whose elements share words, and how long a word is.
    let (keys, word) = match layout? {
        Layout::Rows { .. } | Layout::Pages { .. } => return None,
        Layout::KeyPanels { word } => (true, word),
        Layout::ValuePanels { word } => (false, word),
    };
    let &[heads, slots, width] = shape else { unreachable!("caches have three axes") };
    let (across, along) = if keys { (slots, width) } else { (width, slots) };
    let (panels, words) = (across.div_ceil(lanes), along.div_ceil(word));
    let cell = |head: usize, slot: usize, column: usize| {
        let (a, b) = if keys { (slot, column) } else { (column, slot) };
        (((head * panels + a / lanes) * words + b / word) * lanes + a % lanes) * word + b % word
    };
    let (mut cells, all) = (Vec::new(), heads * panels * words * lanes * word);
    for head in 0..heads {
        for slot in 0..slots {
            cells.extend((0..width).map(|column| cell(head, slot, column)));
        }
    }
    Some((cells, all))
}

/// The numbers that bytes hold.
///
/// # Panics
///
/// On dtypes that no kernel keeps in memory.
pub fn decode(dtype: DType, bytes: &[u8]) -> Vec<f64> {
    let elem = |b: &[u8]| match dtype {
        DType::F32 => f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
        DType::BF16 => half::bf16::from_le_bytes([b[0], b[1]]).to_f64(),
        DType::F16 => half::f16::from_le_bytes([b[0], b[1]]).to_f64(),
        DType::I32 => f64::from(i32::from_le_bytes([b[0], b[1], b[2], b[3]])),
        DType::Bool => f64::from(b[0]),
        DType::F64 | DType::I8 | DType::U8 | DType::Block(_) => {
            unreachable!("no kernel keeps {dtype} in memory")
        }
    };
    bytes.chunks_exact(dtype.bytes(1)).map(elem).collect()
}
