//! Chooses how weights, caches and activations lie in memory.
//!
//! * Takes: a fused graph. Gives: the same with a [`Pack`](crate::graph::Pack) for each segment of each product, panels
//!   for caches that attention reads, and a row pitch for what a product of many rows reads.
//! * Never: changes a value. A packing depends on shapes and streams alone, so decode and prefill share it.
//! * Cost: O(values * groups). Tests: `tests/ir/layout/`.

use crate::dtype::DType;
use crate::families::{GroupView, dot, storage};
use crate::graph::{Family, Graph, Layout};
use crate::op::Op;

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
