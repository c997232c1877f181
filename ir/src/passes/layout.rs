//! Chooses how weights, caches and activations lie in memory.
//!
//! * Takes: a fused graph. Gives: the same with a [`Pack`](crate::graph::Pack) for each segment of each product, panels
//!   for caches that attention reads (on a GPU a page), and a row pitch for tensors with a row a token.
//! * Never: changes a value. A packing depends on shapes and streams alone, so decode and prefill share it.
//! * Cost: O(values * groups). Tests: `tests/ir/layout/`.

use crate::dtype::DType;
use crate::families::{GroupView, dot, gpu, storage};
use crate::graph::{Family, Graph, Layout, ValueId};
use crate::op::Op;
use crate::target::{Machine, Target};

/// Is this a tensor between kernels with rows for the tokens of a step? What a program gives back lies without gaps.
fn many_rows(graph: &Graph, id: ValueId) -> bool {
    let shape = &graph[id].ty.shape;
    let is_output = graph.outputs.iter().any(|(_, output)| *output == id);
    let is_state = matches!(graph[storage(graph, id)].op, Op::State { .. });
    shape.len() > 1 && shape[0].constant().is_none() && !is_output && !is_state
}

/// Chooses layouts.
pub fn layout(graph: &mut Graph, target: &Target) {
    let on_gpu = matches!(target.machine, Machine::Gpu(_));
    let mut packs = Vec::new();
    let mut layouts = Vec::new();
    for view in GroupView::all(graph) {
        let rows = view.roots.iter().filter(|&&id| many_rows(graph, id));
        layouts.extend(rows.map(|&id| {
            let columns = graph[id].ty.shape[1..].iter().filter_map(|dim| dim.constant()).product::<i64>();
            (id, Layout::Rows { pitch: dot::row_pitch(columns as usize, graph[id].ty.dtype) })
        }));
        match view.family() {
            Family::Dot => {
                let Ok(group) = dot::analyse(&view) else { continue }; // `lower` says why.
                packs.extend(if on_gpu { gpu::packs(&view, &group) } else { dot::packs(&view, &group) });
            }
            Family::Attention => {
                for &id in view.values.iter().filter(|&&id| matches!(graph[id].op, Op::Attention { .. })) {
                    let word = if graph[id].ty.dtype == DType::BF16 { 2 } else { 1 };
                    let [keys, values] = [1, 2].map(|operand| storage(graph, graph[id].operands[operand]));
                    let of_panels = [Layout::KeyPanels { word }, Layout::ValuePanels { word }];
                    // One page holds all: more of them are another layout, and no other kernel.
                    let of_pages = graph[keys].ty.shape[1].constant().map(|all| all as usize);
                    let of_pages = of_pages.map(|slots| [Layout::Pages { slots }; 2]);
                    if let Some(of_both) = if on_gpu { of_pages } else { Some(of_panels) } {
                        layouts.extend([keys, values].into_iter().zip(of_both));
                    }
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
