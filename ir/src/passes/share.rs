//! Lets the graphs of a model agree on what they share, so that each weight and each cache is stored once.
//!
//! * Takes: all graphs of a model, with layouts. Gives: the same; a state lies in all of them as the graph that reads it
//!   wants it, and those that only pick rows of a weight read the packing that another one's product has.
//! * Never: changes a value, or a layout or packing that is there.
//! * Cost: O(values of all graphs + packs * gathers). Tests: `tests/ir/share/`.

use crate::families::access::unpacked;
use crate::graph::{Graph, Layout, Pack};
use crate::op::Op;
use std::collections::BTreeMap;

/// Lets graphs agree on caches and packings.
pub fn share(graphs: &mut [&mut Graph]) {
    states(graphs);
    packings(graphs);
}

/// A graph that only picks rows of a weight reads a packing of the whole weight, where there is one.
fn packings(graphs: &mut [&mut Graph]) {
    let whole = |graph: &Graph, pack: &Pack| -> Option<(String, Pack)> {
        let [stream] = &pack.streams[..] else { return None };
        match &graph[stream.weight].op {
            Op::Weight { name } if stream.chunk == pack.n => Some((name.clone(), pack.clone())),
            _ => None,
        }
    };
    let known: Vec<(String, Pack)> =
        graphs.iter().flat_map(|g| g.packs.iter().filter_map(|p| whole(g, p)).collect::<Vec<_>>()).collect();
    for graph in graphs {
        for id in graph.ids() {
            let Op::Gather = graph[id].op else { continue };
            let table = graph[id].operands[0];
            let Op::Weight { name } = &graph[table].op else { continue };
            let packed = known.iter().find(|(n, _)| n == name);
            if let Some((_, pack)) = packed.filter(|_| unpacked(graph, table).is_none()) {
                let mut pack = pack.clone();
                pack.streams[0].weight = table;
                graph.packs.push(pack);
            }
        }
    }
}

/// A graph that only appends to a cache does not know how attention reads it.
fn states(graphs: &mut [&mut Graph]) {
    let mut known: BTreeMap<String, Layout> = BTreeMap::new();
    for value in graphs.iter().flat_map(|graph| &graph.values) {
        if let (Op::State { name }, Some(layout)) = (&value.op, value.layout) {
            // Another layout of another graph is for `lower` to refuse.
            known.entry(name.clone()).or_insert(layout);
        }
    }
    for value in graphs.iter_mut().flat_map(|graph| &mut graph.values) {
        if let Op::State { name } = &value.op {
            value.layout = known.get(name).copied();
        }
    }
}
