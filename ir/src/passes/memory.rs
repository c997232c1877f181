//! Gives every tensor its bytes and writes the plan.
//!
//! * Takes: lowered graphs, one an entry point. Gives: the plan: weights and states once for all entry points, an arena
//!   in which tensors that do not live at the same time share bytes, launches with their costs.
//! * Never: lets a launch's result lie on one of its operands.
//! * Cost: O(launches * live tensors). Tests: `tests/ir/memory/`.

use super::lower::{Kernels, Launched};
use crate::cost::cost;
use crate::families::{Arg, GroupView, storage};
use crate::graph::{Graph, Layout, Pack, ValueId};
use crate::op::Op;
use crate::plan::{ALIGN, Entry, Give, Launch, Place, Plan, PlanBuffer, PlanKernel, WeightSource};
use std::collections::HashMap;

/// A lowered graph and what its entry point is for.
#[derive(Debug)]
pub struct Lowered<'g> {
    /// Scheduled graph.
    pub graph: &'g Graph,
    /// Its launches, one a group.
    pub launches: Vec<Launched>,
    /// What it gives back.
    pub give: Give,
}

/// Plans the memory of all entry points.
///
/// # Panics
///
/// On graphs that are no language model's: without `tokens` and `positions`.
pub fn memory(entries: &[Lowered<'_>], kernels: &Kernels) -> Plan {
    let mut plan = Plan::default();
    for kernel in &kernels.list {
        let (name, family, schedule) = (kernel.name.clone(), kernel.family, kernel.schedule.clone());
        plan.kernels.push(PlanKernel { name, family, schedule, measured: false });
    }
    let mut ctx = Ctx { plan, by_name: HashMap::new(), weights_end: 0 };
    for entry in entries {
        ctx.entry(entry);
    }
    ctx.plan
}

struct Ctx {
    plan: Plan,
    by_name: HashMap<String, usize>,
    weights_end: usize,
}

/// A tensor's place in the arena and the launches between which it lives.
struct Live {
    first: usize,
    last: usize,
    offset: usize,
    bytes: usize,
}

impl Ctx {
    fn entry(&mut self, lowered: &Lowered<'_>) {
        let Lowered { graph, launches, give } = lowered;
        let max = graph.symbols.max();
        let input =
            |name: &str| graph.ids().find(|&id| matches!(&graph[id].op, Op::Input { name: n } if n == name));
        let output = |name: &str| graph.outputs.iter().find(|(n, _)| n == name).map(|(_, id)| *id);

        // When each tensor lives: from the launch that makes it to the last that reads it; results to the end.
        let mut uses: HashMap<ValueId, (usize, usize)> = HashMap::new();
        for (at, launch) in launches.iter().enumerate() {
            for arg in &launch.args {
                if let Arg::Value(id) = arg {
                    uses.entry(*id).or_insert((at, at)).1 = at;
                }
            }
        }
        for (_, id) in &graph.outputs {
            if let Some(life) = uses.get_mut(id) {
                life.1 = launches.len();
            }
        }

        for (group, launch) in graph.groups.iter().zip(launches) {
            self.plan.kernels[launch.kernel].measured |= group.measured;
        }

        let mut live: Vec<Live> = Vec::new();
        let mut placed: HashMap<ValueId, usize> = HashMap::new();
        let mut planned = Vec::new();
        for (at, launch) in launches.iter().enumerate() {
            let mut args = Vec::new();
            for arg in &launch.args {
                args.push(match arg {
                    Arg::Pack(number) => self.pack(graph, &graph.packs[*number]),
                    Arg::Workspace { dtype, rows, pitch } => {
                        let bytes = dtype.bytes(rows.eval(&max) as usize * pitch);
                        let name = format!("{}.workspace", graph.groups[at].name);
                        self.arena(&mut live, &graph.name, &name, *dtype, bytes, (at, at))
                    }
                    Arg::Value(id) => match &graph[*id].op {
                        Op::Weight { .. } | Op::Constant { .. } => self.weight(graph, *id),
                        Op::State { name } => self.shared(name, Place::State, graph, *id),
                        Op::Input { name } => self.shared(name, Place::Input, graph, *id),
                        _ => *placed.entry(*id).or_insert_with(|| {
                            let value = &graph[*id];
                            let bytes = tensor_bytes(graph, *id);
                            self.arena(&mut live, &graph.name, &value.name, value.ty.dtype, bytes, uses[id])
                        }),
                    },
                });
            }
            planned.push((launch.kernel, args));
        }

        let views = GroupView::all(graph);
        let past = graph.symbols.0.get(1).map_or(0, |p| (p.max + 1) / 2);
        let launches = planned
            .into_iter()
            .zip(&views)
            .map(|((kernel, args), view)| Launch { kernel, args, cost: cost(view, &max, past) })
            .collect();
        let logits = output("logits").map(|id| placed[&id]);
        let token = output("token").map(|id| placed[&id]);
        if let Some(id) = output("logits") {
            self.plan.vocab = graph[id].ty.shape.last().and_then(|d| d.constant()).unwrap_or(0) as usize;
        }
        for id in graph.ids().filter(|&id| matches!(graph[id].op, Op::State { .. })) {
            self.plan.context = graph[id].ty.shape[1].constant().unwrap_or(0) as usize;
        }
        let tokens = input("tokens").expect("a step has tokens");
        let positions = input("positions").expect("a step has positions");
        let tokens = self.shared("tokens", Place::Input, graph, tokens);
        let positions = self.shared("positions", Place::Input, graph, positions);
        let (name, symbols, give) = (graph.name.clone(), graph.symbols.clone(), *give);
        self.plan.entries.push(Entry { name, symbols, give, tokens, positions, logits, token, launches });
    }

    /// The lowest place in the arena that nothing alive at the same time overlaps.
    fn arena(
        &mut self,
        live: &mut Vec<Live>,
        entry: &str,
        name: &str,
        dtype: crate::DType,
        bytes: usize,
        (first, last): (usize, usize),
    ) -> usize {
        let bytes = bytes.next_multiple_of(ALIGN);
        let mut others: Vec<&Live> = live.iter().filter(|l| l.first <= last && first <= l.last).collect();
        others.sort_by_key(|l| l.offset);
        let mut offset = 0;
        for other in others {
            if offset + bytes <= other.offset {
                break;
            }
            offset = offset.max(other.offset + other.bytes);
        }
        live.push(Live { first, last, offset, bytes });
        self.plan.arena_bytes = self.plan.arena_bytes.max(offset + bytes);
        self.push(format!("{entry}/{name}"), Place::Arena { offset }, dtype, bytes)
    }

    fn push(&mut self, name: String, place: Place, dtype: crate::DType, bytes: usize) -> usize {
        let extents = Vec::new();
        self.plan.buffers.push(PlanBuffer { name, place, dtype, extents, bytes });
        self.plan.buffers.len() - 1
    }

    /// A state or input: one for all entry points, as large as the largest needs.
    fn shared(&mut self, name: &str, place: Place, graph: &Graph, id: ValueId) -> usize {
        let bytes = tensor_bytes(graph, id).next_multiple_of(ALIGN);
        if let Some(&known) = self.by_name.get(name) {
            let buffer = &mut self.plan.buffers[known];
            buffer.bytes = buffer.bytes.max(bytes);
            return known;
        }
        let buffer = self.push(name.to_string(), place, graph[id].ty.dtype, bytes);
        if self.plan.buffers[buffer].place == Place::State {
            self.plan.buffers[buffer].extents = lying(graph, id);
        }
        self.by_name.insert(name.to_string(), buffer);
        buffer
    }

    fn stored(
        &mut self,
        key: String,
        name: String,
        source: WeightSource,
        dtype: crate::DType,
        bytes: usize,
    ) -> usize {
        if let Some(&known) = self.by_name.get(&key) {
            return known;
        }
        let bytes = bytes.next_multiple_of(ALIGN);
        let offset = self.weights_end;
        self.weights_end += bytes;
        let buffer = self.push(name, Place::Weight { offset, source }, dtype, bytes);
        self.by_name.insert(key, buffer);
        buffer
    }

    fn weight(&mut self, graph: &Graph, id: ValueId) -> usize {
        let (value, bytes) = (&graph[id], tensor_bytes(graph, id));
        let extents: Vec<usize> = value
            .ty
            .shape
            .iter()
            .map(|d| d.constant().expect("weights are of constant shape") as usize)
            .collect();
        let (name, source) = match &value.op {
            Op::Weight { name } => {
                let columns = extents.last().copied().unwrap_or(1);
                let rows = extents.iter().product::<usize>() / columns.max(1);
                (name.clone(), WeightSource::Tensor { name: name.clone(), rows, columns })
            }
            Op::Constant { data } => {
                let elems: usize = extents.iter().product();
                let data = if data.len() == elems { data.clone() } else { vec![data[0]; elems] };
                (value.name.clone(), WeightSource::Constant { data })
            }
            _ => unreachable!("called for weights and constants"),
        };
        // A constant is known by its numbers, a tensor by its name.
        let key = match &source {
            WeightSource::Constant { data } => format!("{:?} {data:?}", value.ty.dtype),
            WeightSource::Tensor { .. } | WeightSource::Pack { .. } => format!("tensor {name}"),
        };
        self.stored(key, name, source, value.ty.dtype, bytes)
    }

    fn pack(&mut self, graph: &Graph, pack: &Pack) -> usize {
        let names: Vec<String> = pack
            .streams
            .iter()
            .map(|stream| match &graph[stream.weight].op {
                Op::Weight { name } => name.clone(),
                _ => unreachable!("streams are rows of weights"),
            })
            .collect();
        let mut pack = pack.clone();
        pack.streams.iter_mut().for_each(|s| s.weight = ValueId(0));
        let streams = pack.streams.iter().zip(&names).map(|(s, n)| (n, s.chunk, s.stride, s.offset));
        let key = format!("{} {:?}", pack.n, streams.collect::<Vec<_>>());
        let (name, dtype, bytes) = (pack.name.clone(), pack.dtype, pack.dtype.bytes(pack.elems()));
        self.stored(key, name, WeightSource::Pack { pack, names }, dtype, bytes)
    }
}

/// Extents of a cache as it lies, row-major.
fn lying(graph: &Graph, id: ValueId) -> Vec<usize> {
    let extents: Vec<usize> =
        graph[id].ty.shape.iter().filter_map(|dim| dim.constant()).map(|extent| extent as usize).collect();
    let lanes = Pack::LANES;
    match (graph[id].layout, &extents[..]) {
        (Some(Layout::Pages { slots }), &[g, c, d]) => vec![c / slots, g, slots, d],
        (Some(Layout::KeyPanels { word }), &[g, c, d]) => {
            vec![g, c.div_ceil(lanes), d.div_ceil(word), lanes, word]
        }
        (Some(Layout::ValuePanels { word }), &[g, c, d]) => {
            vec![g, d.div_ceil(lanes), c.div_ceil(word), lanes, word]
        }
        _ => extents,
    }
}

/// Bytes of a tensor at the largest symbols, with the padding of its layout.
fn tensor_bytes(graph: &Graph, id: ValueId) -> usize {
    let value = &graph[storage(graph, id)];
    let max = graph.symbols.max();
    let extents: Vec<usize> = value.ty.shape.iter().map(|d| d.eval(&max) as usize).collect();
    let elems = match value.layout {
        None | Some(Layout::Pages { .. }) => extents.iter().product(),
        Some(Layout::Rows { pitch }) => extents[0] * pitch,
        Some(Layout::KeyPanels { word }) => {
            extents[0] * extents[1].next_multiple_of(Pack::LANES) * extents[2].next_multiple_of(word)
        }
        Some(Layout::ValuePanels { word }) => {
            extents[0] * extents[1].next_multiple_of(word) * extents[2].next_multiple_of(Pack::LANES)
        }
    };
    value.ty.dtype.bytes(elems)
}
