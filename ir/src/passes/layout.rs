//! Chooses how weights, caches and activations lie in memory.
//!
//! * Takes: a fused graph. Gives: the same with a [`Pack`](crate::graph::Pack) for each segment of each product, panels
//!   for caches that attention reads, and a row pitch for what a product of many rows reads.
//! * Never: changes a value. A packing depends on shapes and streams alone, so decode and prefill share it.
//! * Cost: O(values * groups). Tests: `tests/ir/layout/`.

use crate::dtype::DType;
use crate::families::{self, GroupView, dot, storage};
use crate::graph::{Family, Graph, Layout, Pack};
use crate::op::Op;
use std::collections::BTreeMap;

/// Chooses layouts.
pub fn layout(graph: &mut Graph) {
    let mut packs = Vec::new();
    let mut layouts = Vec::new();
    for view in GroupView::all(graph) {
        match view.family() {
            Family::Dot => {
                let Ok(group) = dot::analyse(&view) else { continue }; // `lower` says why.
                packs.extend(dot::packs(&view, &group));
                let left = dot::stored_left(&view, group.a).filter(|&a| graph[a].group.is_some());
                if let Some(left) = left.filter(|_| group.m.constant().is_none()) {
                    layouts.push((left, Layout::Rows { pitch: dot::row_pitch(group.k, group.dtype) }));
                }
            }
            Family::Attention => {
                for &id in view.values.iter().filter(|&&id| matches!(graph[id].op, Op::Attention { .. })) {
                    let word = if graph[id].ty.dtype == DType::BF16 { 2 } else { 1 };
                    let cache = |operand: usize| storage(graph, graph[id].operands[operand]);
                    layouts.push((cache(1), Layout::KeyPanels { word }));
                    layouts.push((cache(2), Layout::ValuePanels { word }));
                }
            }
            Family::Rowwise | Family::Elementwise | Family::Gather | Family::Sample => {}
        }
    }
    graph.packs = packs;
    for (id, layout) in layouts {
        graph[id].layout = Some(layout);
    }
}

/// Lets graphs agree on what they share: a state lies as the graph that reads it wants it, in all of them; those that
/// only pick rows of a weight read the packing that another one's product has, so that a weight is stored once.
pub fn share(graphs: &mut [&mut Graph]) {
    share_states(graphs);
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
            if let Some((_, pack)) = packed.filter(|_| families::access::unpacked(graph, table).is_none()) {
                let mut pack = pack.clone();
                pack.streams[0].weight = table;
                graph.packs.push(pack);
            }
        }
    }
}

/// A graph that only appends to a cache does not know how attention reads it.
fn share_states(graphs: &mut [&mut Graph]) {
    let mut known: BTreeMap<String, Layout> = BTreeMap::new();
    for value in graphs.iter().flat_map(|graph| &graph.values) {
        if let (Op::State { name }, Some(layout)) = (&value.op, value.layout) {
            let first = *known.entry(name.clone()).or_insert(layout);
            assert_eq!(first, layout, "state `{name}` is read in two layouts");
        }
    }
    for value in graphs.iter_mut().flat_map(|graph| &mut graph.values) {
        if let Op::State { name } = &value.op {
            value.layout = known.get(name).copied();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::passes::fuse::fuse;

    #[test]
    fn a_cache_lies_alike_in_all_graphs() {
        let head = "%q = input \"q\" : f32[T, 2, 8]
            %r = input \"r\" : f32[T, 2, 8]
            %pos = input \"positions\" : i32[T]
            %k = state \"k\" : f32[2, 64, 8]
            %v = state \"v\" : f32[2, 64, 8]
            %kc = cache_append %k, %r, %pos : f32[2, 64, 8]
            %vc = cache_append %v, %r, %pos : f32[2, 64, 8]";
        let reads = "%a = attention %q, %kc, %vc, %pos { causal = true, scale = 1.0 } : f32[T, 2, 8]
            output \"a\" = %a : f32[T, 2, 8]";
        let ends = "output \"k\" = %kc : f32[2, 64, 8] output \"v\" = %vc : f32[2, 64, 8]";
        let [mut fill, mut step] = ["", reads].map(|middle| {
            let text = format!("graph @g(T in 1..4) {{ {head} {middle} {ends} }}");
            let mut graph = crate::parse::graph(&text).unwrap();
            fuse(&mut graph);
            layout(&mut graph);
            graph
        });
        let of = |graph: &Graph, name: &str| graph[graph.find(name).unwrap()].layout;
        assert_eq!(of(&fill, "k"), None);
        share(&mut [&mut fill, &mut step]);
        for graph in [&fill, &step] {
            assert_eq!(of(graph, "k"), Some(Layout::KeyPanels { word: 1 }));
            assert_eq!(of(graph, "v"), Some(Layout::ValuePanels { word: 1 }));
        }
    }
}
