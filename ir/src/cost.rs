//! What a group costs: FLOPs, and the bytes that must move if each operand moves once.

use crate::dim::MAX_SYMBOLS;
use crate::families::{GroupView, attention, storage};
use crate::graph::ValueId;
use crate::op::Op;
use crate::plan::Cost;

/// Work of a group for given symbols, with `past` tokens in the cache.
pub fn cost(view: &GroupView<'_>, symbols: &[i64; MAX_SYMBOLS], past: i64) -> Cost {
    let graph = view.graph;
    let bytes = |id: ValueId| {
        let ty = &graph[id].ty;
        ty.dtype.bytes(ty.elems(symbols)) as u64
    };
    let mut total = Cost::default();
    let mut read: Vec<ValueId> = Vec::new();
    for &id in &view.values {
        let value = &graph[id];
        let elems = value.ty.elems(symbols) as u64;
        total.flops += match &value.op {
            Op::Unary(op) => u64::from(op.facts().flops) * elems,
            Op::Binary(op) => u64::from(op.facts().flops) * elems,
            Op::Reduce { .. } | Op::Argmax => graph.operand(id, 0).ty.elems(symbols) as u64,
            Op::Dot { axes } => {
                let lhs = &graph.operand(id, 0).ty;
                let extents = axes.lhs.iter().zip(&lhs.shape).filter(|(c, _)| !axes.out.contains(c));
                2 * elems * extents.map(|(_, d)| d.eval(symbols) as u64).product::<u64>()
            }
            Op::Attention { causal, .. } => {
                let (moved, flops) = attention_work(view, id, symbols, past, *causal);
                total.bytes += moved;
                flops
            }
            _ => 0,
        };
        for (number, &operand) in value.operands.iter().enumerate() {
            let cache = match value.op {
                Op::Attention { .. } => number == 1 || number == 2, // counted by tiles above
                Op::AttentionLse { .. } => number == 1,
                Op::CacheAppend => number == 0,
                _ => false,
            };
            if cache || view.has(operand) || read.contains(&operand) {
                continue;
            }
            read.push(operand);
            total.bytes += match value.op {
                // Only what is picked.
                Op::Gather if number == 0 => bytes(id),
                Op::Slice { .. } => bytes(id),
                _ => bytes(operand),
            };
        }
    }
    for &root in &view.roots {
        total.bytes += match graph[root].op {
            Op::CacheAppend => bytes(graph[root].operands[1]),
            _ => bytes(root),
        };
    }
    total
}

/// Bytes of K and V read and FLOPs done: whole tiles of keys up to each row's position, none beyond.
fn attention_work(
    view: &GroupView<'_>,
    id: ValueId,
    symbols: &[i64; MAX_SYMBOLS],
    past: i64,
    causal: bool,
) -> (u64, u64) {
    let graph = view.graph;
    let shape =
        |n: usize| graph.operand(id, n).ty.shape.iter().map(|d| d.eval(symbols)).collect::<Vec<i64>>();
    let (q, k) = (shape(0), shape(1));
    let (steps, heads, d, kv_heads) = (q[0], q[1], q[2], k[0]);
    let tile = attention::KEYS as i64;
    let tiles = |last: i64| last / tile + 1;
    let visited: i64 = (0..steps).map(|t| tiles(past + if causal { t } else { steps - 1 }) * tile).sum();
    let element = graph[storage(graph, graph[id].operands[1])].ty.dtype.bytes(1) as i64;
    let bytes = 2 * tiles(past + steps - 1) * tile * kv_heads * d * element;
    (bytes as u64, (4 * visited * heads * d) as u64)
}
