//! A group as a graph of its own: what it reads is bound, what it stores is an output.
//!
//! Whoever looks at one kernel works on such a graph: the tuner, which times it; a reproducer, which keeps it as text.
//! Lowering its only group gives the kernel that the group has in the whole graph.

use super::{GroupView, attention, storage};
use crate::graph::{Family, Graph, Group, GroupId, Pack, Stream, Value, ValueId};
use crate::op::Op;
use crate::target::Machine;
use std::collections::BTreeMap;

/// The group, with the names that it has in the whole graph; and for each value the one that it is there.
///
/// What other groups compute becomes an input of the same type and layout; a cache that another group appended to is the
/// state that it lies in.
pub fn alone(view: &GroupView<'_>) -> (Graph, Vec<ValueId>) {
    let graph = view.graph;
    // What is read stands in the order of first use, so that layers of a model give the same text.
    let mut taken: Vec<ValueId> = Vec::new();
    for &operand in view.values.iter().flat_map(|&id| &graph[id].operands) {
        if !view.has(operand) && !taken.contains(&operand) {
            taken.push(operand);
        }
    }
    taken.extend(&view.values);
    let number: BTreeMap<ValueId, ValueId> = taken.iter().copied().zip((0..).map(ValueId)).collect();
    let value = |&id: &ValueId| {
        let of = &graph[id];
        let inside = view.has(id);
        let op = match &of.op {
            op if inside => op.clone(),
            op @ (Op::Input { .. } | Op::Weight { .. } | Op::State { .. } | Op::Constant { .. }) => {
                op.clone()
            }
            Op::CacheAppend => graph[storage(graph, id)].op.clone(),
            _ => Op::Input { name: of.name.clone() },
        };
        let kept = &graph[if inside { id } else { storage(graph, id) }];
        Value {
            name: kept.name.clone(),
            op,
            operands: if inside { of.operands.iter().map(|o| number[o]).collect() } else { Vec::new() },
            ty: of.ty.clone(),
            group: inside.then_some(GroupId(0)),
            layout: kept.layout,
            remarks: Vec::new(),
        }
    };
    let group = Group { remarks: Vec::new(), ..graph.groups[view.id.0 as usize].clone() };
    let own = |pack: &&Pack| match view.family() {
        Family::Dot => {
            pack.name.strip_prefix(view.name()).and_then(|n| n.strip_prefix('.')).is_some_and(is_number)
        }
        _ => true,
    };
    let of_these = |pack: &&Pack| pack.streams.iter().all(|stream| number.contains_key(&stream.weight));
    let pack = |pack: &Pack| {
        let stream = |stream: &Stream| Stream { weight: number[&stream.weight], ..stream.clone() };
        Pack { streams: pack.streams.iter().map(stream).collect(), ..pack.clone() }
    };
    let graph = Graph {
        name: view.name().to_string(),
        symbols: graph.symbols.clone(),
        values: taken.iter().map(value).collect(),
        outputs: view.roots.iter().map(|&root| (output_name(graph, root), number[&root])).collect(),
        groups: vec![group],
        packs: graph.packs.iter().filter(own).filter(of_these).map(pack).collect(),
    };
    (graph, taken)
}

/// A result's name; the next contents of a state bear the state's.
fn output_name(graph: &Graph, root: ValueId) -> String {
    match &graph[storage(graph, root)].op {
        Op::State { name } => name.clone(),
        _ => graph[root].name.clone(),
    }
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit())
}

/// What a group computes, as text in which nothing else counts: neither names nor the layer nor the schedule. On a CPU neither how
/// many rows a step has at most nor how many slots a cache, which moves addresses and no choice: groups that share a kernel have the same
/// text. On a GPU tiles are as tall as steps, and splits as many as slots: groups of the same text share a kernel.
pub fn signature(view: &GroupView<'_>, machine: &Machine) -> String {
    let (mut graph, _) = alone(view);
    graph.name = "alone".to_string();
    let on_cpu = matches!(machine, Machine::Cpu(_));
    let most = graph.symbols.max();
    graph.symbols = view.kernel_symbols();
    if !on_cpu {
        graph.symbols.0.iter_mut().zip(most).for_each(|(symbol, most)| symbol.max = most);
    }
    let rows: Vec<bool> = graph.values.iter().map(|value| value.layout.is_none()).collect();
    let is_cache: Vec<bool> =
        graph.ids().map(|id| matches!(graph[storage(&graph, id)].op, Op::State { .. })).collect();
    for (at, value) in graph.values.iter_mut().enumerate() {
        value.name = format!("v{at}");
        if let Op::Input { name } | Op::Weight { name } | Op::State { name } = &mut value.op
            // Positions are no numbers like others: kernels follow them.
            && name != "positions"
        {
            *name = format!("v{at}");
        }
        if on_cpu && is_cache[at] && !rows[at] {
            value.ty.shape[1] = attention::KEYS.into();
        }
    }
    graph.outputs = graph.outputs.iter().map(|&(_, id)| (output_name(&graph, id), id)).collect();
    graph.groups[0] =
        Group { name: "alone".to_string(), schedule: None, measured: false, ..graph.groups[0].clone() };
    graph.packs.iter_mut().enumerate().for_each(|(at, pack)| pack.name = format!("alone.{at}"));
    graph.to_string()
}
