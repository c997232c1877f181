//! Groups values into kernels.
//!
//! * Takes: a verified graph; groups that it has are dissolved. Gives: the same values (views that several groups read are copied), each
//!   computed one in a group, the values of a group together, groups in an order in which they can run.
//! * Never: duplicates a product, or lets a group depend on itself through another.
//! * Each tensor between two groups has a remark on the group that stores it: why they are not one.
//! * A product takes first its prologue (the rows of its left operand, as far as nobody else reads them; on a GPU a product of
//!   one row only: the others copy their rows to shared memory without touching them), then what
//!   follows it element by element, as much as its family can store; products of one left operand share a group. What is
//!   left is row-wise where rows are reduced, else element-wise. Each group that stops early says why in a remark.
//! * Cost: O(values * group) in the worst case. Tests: `tests/ir/fuse/`.

use crate::families::{GroupView, LowerError, dot, storage};
use crate::graph::{Family, Graph, Group, GroupId, Value, ValueId};
use crate::op::Op;
use crate::target::{Machine, Target};
use petgraph::algo::toposort;
use petgraph::graph::DiGraph;
use std::collections::BTreeMap;

/// Groups values into kernels.
///
/// # Errors
///
/// Never on a verified graph.
pub fn fuse(graph: &mut Graph, target: &Target) {
    let on_gpu = matches!(target.machine, Machine::Gpu(_));
    graph.groups.clear();
    graph.packs.clear();
    graph.ids().for_each(|id| graph[id].group = None);
    let mut ctx = Ctx { users: graph.users(), graph, on_gpu };
    ctx.products();
    ctx.single(Family::Attention, |op| matches!(op, Op::Attention { .. }));
    ctx.sums_of_attentions();
    ctx.single(Family::Sample, |op| matches!(op, Op::Argmax));
    ctx.epilogues();
    ctx.rows();
    ctx.elements();
    copy_views(graph);
    sort(graph);
    remark_stored(graph, on_gpu);
}

/// Is the value bound from outside, or written where it is read?
fn is_bound(op: &Op) -> bool {
    matches!(op, Op::Input { .. } | Op::Weight { .. } | Op::State { .. } | Op::Constant { .. })
}

/// Does the op only move elements, so that whoever reads the result may as well read the operand?
pub fn is_view(op: &Op) -> bool {
    matches!(
        op,
        Op::Broadcast { .. } | Op::Reshape | Op::Transpose { .. } | Op::Slice { .. } | Op::Iota { .. }
    )
}

/// Does an element of the result need one element of each operand at most?
fn is_elementwise(op: &Op) -> bool {
    is_view(op)
        || matches!(
            op,
            Op::Cast | Op::Unary(_) | Op::Binary(_) | Op::Compare(_) | Op::Select | Op::Concat { .. }
        )
}

struct Ctx<'g> {
    graph: &'g mut Graph,
    users: Vec<Vec<ValueId>>,
    on_gpu: bool,
}

impl Ctx<'_> {
    fn open(&mut self, family: Family, named_by: ValueId) -> GroupId {
        let name = self.graph[named_by].name.clone();
        self.graph.groups.push(Group { name, family, schedule: None, measured: false, remarks: Vec::new() });
        GroupId(self.graph.groups.len() as u32 - 1)
    }

    fn group(&self, id: ValueId) -> Option<GroupId> {
        self.graph[id].group
    }

    fn take(&mut self, id: ValueId, group: GroupId) {
        self.graph[id].group = Some(group);
    }

    /// Free to be taken: computed, and in no group.
    fn is_free(&self, id: ValueId) -> bool {
        self.group(id).is_none() && !is_bound(&self.graph[id].op)
    }

    /// Products, those of one left operand together, each with its prologue.
    fn products(&mut self) {
        let mut by_left: BTreeMap<ValueId, GroupId> = BTreeMap::new();
        for id in self.graph.ids() {
            if !matches!(self.graph[id].op, Op::Dot { .. }) {
                continue;
            }
            let left = self.graph[id].operands[0];
            let linear = dot::is_linear(self.graph, id).is_some();
            let group = match by_left.get(&left) {
                Some(&group) if linear => group,
                _ => self.open(Family::Dot, id),
            };
            self.take(id, group);
            if linear {
                by_left.insert(left, group);
            }
        }
        for (left, group) in by_left {
            let one_row = self.graph[left].ty.shape[0].constant() == Some(1);
            if self.on_gpu && !one_row {
                continue;
            }
            self.absorb_operands(left, group, true);
        }
    }

    /// Takes `id` and, before it, what only this group reads.
    fn absorb_operands(&mut self, id: ValueId, group: GroupId, reductions: bool) {
        let op = &self.graph[id].op;
        let fits = is_elementwise(op) || reductions && matches!(op, Op::Reduce { .. });
        let inside = self.users[id.0 as usize].iter().all(|&u| self.group(u) == Some(group));
        let is_output = self.graph.outputs.iter().any(|(_, o)| *o == id);
        if !self.is_free(id) || !fits || !inside || is_output || self.joins_products(id) {
            return;
        }
        // Its reader may need the new version, and so could run neither before nor after the append.
        if self.reads_old_state(id) {
            return;
        }
        self.take(id, group);
        for operand in self.graph[id].operands.clone() {
            self.absorb_operands(operand, group, reductions);
        }
    }

    /// Does it read a state that is appended to afterwards?
    fn reads_old_state(&self, id: ValueId) -> bool {
        let appends = |operand: &ValueId, user: &ValueId| {
            matches!(self.graph[*user].op, Op::CacheAppend) && self.graph[*user].operands[0] == *operand
        };
        self.graph[id].operands.iter().any(|o| self.users[o.0 as usize].iter().any(|user| appends(o, user)))
    }

    /// Does it join two values of which one follows a product, element by element, and is read nowhere else? Then it is
    /// that product's to store: one tensor between the groups, where the operands would be two. Whether other entry
    /// points read it more often does not matter then: it is rounded in all of them.
    fn joins_products(&self, id: ValueId) -> bool {
        let Value { op: Op::Binary(_), operands, .. } = &self.graph[id] else { return false };
        operands[0] != operands[1] && self.follows_product(id) == Some(true)
    }

    /// Is a product among what the value is computed from element by element? `None` if a reduction is.
    fn follows_product(&self, id: ValueId) -> Option<bool> {
        let mut found = false;
        for &operand in &self.graph[id].operands {
            let op = &self.graph[operand].op;
            match op {
                Op::Reduce { .. } => return None,
                Op::Dot { .. } => found |= dot::is_linear(self.graph, operand).is_some(),
                // What several read is stored.
                _ if is_elementwise(op)
                    && self.is_free(operand)
                    && self.users[operand.0 as usize].len() == 1 =>
                {
                    found |= self.follows_product(operand)?;
                }
                _ => {}
            }
        }
        Some(found)
    }

    /// Each op of a kind is a group of its own.
    fn single(&mut self, family: Family, is: impl Fn(&Op) -> bool) {
        for id in self.graph.ids() {
            if is(&self.graph[id].op) {
                let group = self.open(family, id);
                self.take(id, group);
            }
        }
    }

    /// The logarithm of an attention's sums is the attention's to store, if it stands behind it.
    fn sums_of_attentions(&mut self) {
        let ids: Vec<ValueId> = self.graph.ids().collect();
        for &id in &ids {
            let Value { op: Op::AttentionLse { causal, scale }, operands, .. } = &self.graph[id] else {
                continue;
            };
            let of = Op::Attention { causal: *causal, scale: *scale };
            let same = |other: ValueId| {
                let of_other = &self.graph[other].operands;
                self.graph[other].op == of && [of_other[0], of_other[1], of_other[3]] == operands[..]
            };
            let attention = ids.iter().copied().find(|&other| other < id && same(other));
            let group = match attention.and_then(|attention| self.group(attention)) {
                Some(group) => group,
                None => self.open(Family::Attention, id),
            };
            self.take(id, group);
        }
    }

    /// What follows a product element by element, as much as the family can store.
    fn epilogues(&mut self) {
        for group in (0..self.graph.groups.len() as u32).map(GroupId) {
            if self.graph.groups[group.0 as usize].family != Family::Dot {
                continue;
            }
            let mut taken = self.followers(group);
            loop {
                for &id in &taken {
                    self.take(id, group);
                }
                let Err(why) = self.check_dot(group) else { break };
                for &id in &taken {
                    self.graph[id].group = None;
                }
                let Some(last) = taken.pop() else { break };
                let why = match why {
                    LowerError::Unsupported { what, .. } => what,
                    LowerError::Schedule { .. } => why.to_string(),
                };
                let remark = format!("not fused: %{}: {why}", self.graph[last].name);
                self.graph.groups[group.0 as usize].remarks = vec![remark];
            }
        }
    }

    /// Values, in order, that could follow in the group: each of their operands is in it, or is there before it runs.
    fn followers(&self, group: GroupId) -> Vec<ValueId> {
        // What depends on the group, and whether only through values that could be in it.
        #[derive(Clone, Copy, PartialEq)]
        enum Depends {
            No,
            Inside,
            Outside,
        }
        let mut depends = vec![Depends::No; self.graph.values.len()];
        let mut taken = Vec::new();
        for id in self.graph.ids() {
            let value = &self.graph[id];
            if self.group(id) == Some(group) {
                depends[id.0 as usize] = Depends::Inside;
                continue;
            }
            let seen = |of: Depends| value.operands.iter().any(|o| depends[o.0 as usize] == of);
            let fits = is_elementwise(&value.op) || matches!(value.op, Op::CacheAppend);
            depends[id.0 as usize] = match (seen(Depends::Outside), seen(Depends::Inside)) {
                (true, _) => Depends::Outside,
                (false, false) => Depends::No,
                (false, true) if fits && self.is_free(id) => {
                    taken.push(id);
                    Depends::Inside
                }
                (false, true) => Depends::Outside,
            };
        }
        taken
    }

    /// Can the family store what the group's outputs are now?
    fn check_dot(&self, group: GroupId) -> Result<(), LowerError> {
        let members = self.graph.ids().filter(|&id| self.group(id) == Some(group)).collect();
        dot::analyse(&GroupView::of(self.graph, group, members, &self.users)).map(drop)
    }

    /// Reductions with what only they read, and what follows in the same rows.
    fn rows(&mut self) {
        for id in self.graph.ids() {
            if !matches!(self.graph[id].op, Op::Reduce { .. }) || !self.is_free(id) {
                continue;
            }
            let group = self.open(Family::Rowwise, id);
            self.take(id, group);
            for follower in self.followers_of_rows(id) {
                self.take(follower, group);
            }
            let members: Vec<ValueId> = self.graph.ids().filter(|&v| self.group(v) == Some(group)).collect();
            for member in members.into_iter().rev() {
                for operand in self.graph[member].operands.clone() {
                    self.absorb_operands(operand, group, true);
                }
            }
        }
    }

    /// Reductions and element-wise values after a reduction that stay in its rows.
    fn followers_of_rows(&self, first: ValueId) -> Vec<ValueId> {
        let rows = &self.graph[first].ty.shape;
        let width = self.graph.operand(first, 0).ty.shape.last();
        let in_rows = |id: ValueId| {
            let shape = &self.graph[id].ty.shape;
            shape == rows || shape.len() == rows.len() + 1 && shape.starts_with(rows) && shape.last() == width
        };
        let last_axis = |id: ValueId| match self.graph[id].op {
            Op::Reduce { axis, .. } => axis + 1 == self.graph.operand(id, 0).ty.shape.len(),
            _ => false,
        };
        let mut taken = vec![first];
        for id in self.graph.ids().filter(|&id| id > first) {
            let value = &self.graph[id];
            let simple = matches!(value.op, Op::Cast | Op::Unary(_) | Op::Binary(_) | Op::Broadcast { .. });
            let reads_group = value.operands.iter().any(|o| taken.contains(o));
            let others_before = value.operands.iter().all(|&o| {
                taken.contains(&o)
                    || is_bound(&self.graph[o].op)
                    || o < first && !self.depends(o, first)
                    || self.is_free(o) && !self.depends(o, first)
            });
            if self.is_free(id) && in_rows(id) && (simple || last_axis(id)) && reads_group && others_before {
                taken.push(id);
            }
        }
        taken
    }

    fn depends(&self, id: ValueId, on: ValueId) -> bool {
        id == on || self.graph[id].operands.iter().any(|&o| o >= on && self.depends(o, on))
    }

    /// What is left: gathers with what only they feed, and element-wise values joined to the one value that reads them.
    fn elements(&mut self) {
        for id in self.graph.ids().rev() {
            let is_copied =
                is_view(&self.graph[id].op) && self.is_read_by_groups(id) && !self.reads_old_state(id);
            if !self.is_free(id) || is_copied {
                continue;
            }
            let family =
                if matches!(self.graph[id].op, Op::Gather) { Family::Gather } else { Family::Elementwise };
            let group = self.open(family, id);
            self.take(id, group);
            // A value that others read as well is stored anyway; those of one shape may be stored by one kernel.
            for operand in self.graph[id].operands.clone() {
                self.absorb_operands(operand, group, false);
            }
        }
        self.join_siblings();
    }

    /// A view that is no output: whoever reads it takes a copy.
    fn is_read_by_groups(&self, id: ValueId) -> bool {
        !self.graph.outputs.iter().any(|(_, o)| *o == id) && !self.users[id.0 as usize].is_empty()
    }

    /// Element-wise groups whose roots read one free value in the same rows become one: cosine and sine of an angle.
    fn join_siblings(&mut self) {
        for id in self.graph.ids().rev() {
            if !self.is_joinable(id) {
                continue;
            }
            let mut groups: Vec<GroupId> =
                self.users[id.0 as usize].iter().filter_map(|&u| self.group(u)).collect();
            groups.sort_unstable();
            groups.dedup();
            let elementwise = |g: &GroupId| self.graph.groups[g.0 as usize].family == Family::Elementwise;
            if groups.len() < 2 || !groups.iter().all(elementwise) || !self.read_no_others(&groups, id) {
                continue;
            }
            let Some(own) = self.group(id) else { continue };
            for value in &mut self.graph.values {
                if value.group.is_some_and(|group| groups.contains(&group)) {
                    value.group = Some(own);
                }
            }
        }
        self.drop_empty();
    }

    /// Is it the root of an element-wise group, read only by values of its own shape?
    fn is_joinable(&self, id: ValueId) -> bool {
        let elementwise = |g: GroupId| self.graph.groups[g.0 as usize].family == Family::Elementwise;
        let users = &self.users[id.0 as usize];
        self.group(id).is_some_and(elementwise)
            && users.len() > 1
            && users.iter().all(|&u| self.graph[u].ty.shape == self.graph[id].ty.shape)
    }

    /// Do the groups read only `id`, each other, and what is bound? What else they read may depend on one of them.
    fn read_no_others(&self, groups: &[GroupId], id: ValueId) -> bool {
        let inside = |id: ValueId| self.group(id).is_some_and(|group| groups.contains(&group));
        let fits = |&o: &ValueId| o == id || inside(o) || is_bound(&self.graph[o].op);
        self.graph.ids().filter(|&member| inside(member)).all(|m| self.graph[m].operands.iter().all(fits))
    }

    fn drop_empty(&mut self) {
        let mut used = vec![false; self.graph.groups.len()];
        self.graph.values.iter().filter_map(|v| v.group).for_each(|g| used[g.0 as usize] = true);
        let mut number = 0;
        let renamed: Vec<GroupId> = used
            .iter()
            .map(|&keep| {
                number += u32::from(keep);
                GroupId(number.saturating_sub(1))
            })
            .collect();
        let mut keep = used.iter();
        self.graph.groups.retain(|_| *keep.next().expect("one flag a group"));
        for group in self.graph.values.iter_mut().filter_map(|v| v.group.as_mut()) {
            *group = renamed[group.0 as usize];
        }
    }
}

/// Gives each group its own copy of the views that it reads, so that views are never stored.
fn copy_views(graph: &mut Graph) {
    let old = std::mem::take(&mut graph.values);
    let mut renamed: Vec<ValueId> = Vec::with_capacity(old.len());
    let mut copies: BTreeMap<(ValueId, GroupId), ValueId> = BTreeMap::new();
    let mut values: Vec<Value> = Vec::with_capacity(old.len());

    fn copy(
        id: ValueId,
        group: GroupId,
        old: &[Value],
        renamed: &[ValueId],
        values: &mut Vec<Value>,
        copies: &mut BTreeMap<(ValueId, GroupId), ValueId>,
    ) -> ValueId {
        let value = &old[id.0 as usize];
        if value.group.is_some() || !is_view(&value.op) {
            return renamed[id.0 as usize];
        }
        if let Some(&known) = copies.get(&(id, group)) {
            return known;
        }
        let operands = value.operands.iter().map(|&o| copy(o, group, old, renamed, values, copies)).collect();
        let mut name = value.name.clone();
        let taken = |n: &str, values: &[Value]| values.iter().any(|v| v.name == n);
        let number = copies.range((id, GroupId(0))..=(id, GroupId(u32::MAX))).count();
        if number > 0 {
            name = (number..)
                .map(|i| format!("{}.v{i}", value.name))
                .find(|n| !taken(n, values))
                .expect("numbers do not end");
        }
        values.push(Value { name, operands, group: Some(group), ..value.clone() });
        let new = ValueId(values.len() as u32 - 1);
        copies.insert((id, group), new);
        new
    }

    for value in &old {
        let operands = match value.group {
            Some(group) => value
                .operands
                .iter()
                .map(|&o| copy(o, group, &old, &renamed, &mut values, &mut copies))
                .collect(),
            None => value.operands.iter().map(|&o| renamed[o.0 as usize]).collect(),
        };
        if value.group.is_none() && is_view(&value.op) {
            renamed.push(ValueId(u32::MAX)); // Read through copies only.
            continue;
        }
        values.push(Value { operands, ..value.clone() });
        renamed.push(ValueId(values.len() as u32 - 1));
    }
    for (_, id) in &mut graph.outputs {
        *id = renamed[id.0 as usize];
    }
    graph.values = values;
}

/// Puts bound values first, then the groups in an order in which they can run, each value before its users.
fn sort(graph: &mut Graph) {
    let mut order = DiGraph::<GroupId, ()>::new();
    let nodes: Vec<_> = (0..graph.groups.len() as u32).map(|g| order.add_node(GroupId(g))).collect();
    for id in graph.ids() {
        for &operand in &graph[id].operands {
            if let (Some(from), Some(to)) = (graph[operand].group, graph[id].group)
                && from != to
            {
                order.update_edge(nodes[from.0 as usize], nodes[to.0 as usize], ());
            }
        }
    }
    // An older version of a state is read before the next one is written over it.
    let users = graph.users();
    for id in graph.ids().filter(|&id| matches!(graph[id].op, Op::CacheAppend)) {
        debug_assert!(matches!(graph[storage(graph, id)].op, Op::State { .. } | Op::Input { .. }));
        for &reader in &users[graph[id].operands[0].0 as usize] {
            if let (Some(from), Some(to)) = (graph[reader].group, graph[id].group)
                && from != to
            {
                order.update_edge(nodes[from.0 as usize], nodes[to.0 as usize], ());
            }
        }
    }
    let sorted = toposort(&order, None).expect("groups were formed so that none depends on itself");
    // Among the orders that are possible: the one nearest to the graph's own.
    let mut waiting: Vec<(ValueId, GroupId)> =
        sorted.iter().map(|&n| (last_value(graph, order[n]), order[n])).collect();
    waiting.sort_unstable();
    let mut done: Vec<GroupId> = Vec::new();
    while !waiting.is_empty() {
        let ready = |group: GroupId| {
            let node = nodes[group.0 as usize];
            order.neighbors_directed(node, petgraph::Direction::Incoming).all(|n| done.contains(&order[n]))
        };
        let at = waiting.iter().position(|w| ready(w.1)).expect("the order has no cycle");
        done.push(waiting.remove(at).1);
    }
    let mut ids: Vec<ValueId> = graph.ids().filter(|&id| graph[id].group.is_none()).collect();
    for &group in &done {
        ids.extend(graph.ids().filter(|&id| graph[id].group == Some(group)));
    }
    let mut renamed = vec![ValueId(0); graph.values.len()];
    for (new, old) in ids.iter().enumerate() {
        renamed[old.0 as usize] = ValueId(new as u32);
    }
    let group_of =
        |old: GroupId| GroupId(done.iter().position(|&g| g == old).expect("every group is there") as u32);
    let old = std::mem::take(&mut graph.values);
    graph.values = ids
        .iter()
        .map(|id| {
            let mut value = old[id.0 as usize].clone();
            value.operands.iter_mut().for_each(|o| *o = renamed[o.0 as usize]);
            value.group = value.group.map(group_of);
            value
        })
        .collect();
    for (_, id) in &mut graph.outputs {
        *id = renamed[id.0 as usize];
    }
    graph.groups = done.iter().map(|g| graph.groups[g.0 as usize].clone()).collect();
}

fn last_value(graph: &Graph, group: GroupId) -> ValueId {
    graph.ids().rev().find(|&id| graph[id].group == Some(group)).expect("no group is empty")
}

/// Leaves a remark on each group for what it stores and other groups read: why they are not one kernel.
fn remark_stored(graph: &mut Graph, on_gpu: bool) {
    let users = graph.users();
    for id in graph.ids() {
        // A cache is memory whoever reads it.
        let Some(own) = graph[id].group.filter(|_| !matches!(graph[id].op, Op::CacheAppend)) else {
            continue;
        };
        let readers = users[id.0 as usize].iter().filter_map(|&user| graph[user].group);
        let mut readers: Vec<GroupId> = readers.filter(|&reader| reader != own).collect();
        readers.sort_unstable();
        readers.dedup();
        let group = |id: GroupId| &graph.groups[id.0 as usize];
        let why = match readers[..] {
            [] => continue,
            [reader] => why_apart(graph, id, own, reader, on_gpu),
            [first, second] => format!("@{} and @{} read it", group(first).name, group(second).name),
            _ => format!("{} kernels read it", readers.len()),
        };
        let remark = format!("not fused: %{}: {why}", graph[id].name);
        graph.groups[own.0 as usize].remarks.push(remark);
    }
}

/// Why `reader` is not part of `own`, whose `id` nobody else reads.
fn why_apart(graph: &Graph, id: ValueId, own: GroupId, reader: GroupId, on_gpu: bool) -> String {
    let (from, to) = (&graph.groups[own.0 as usize], &graph.groups[reader.0 as usize]);
    let name = &to.name;
    match (from.family, to.family) {
        (_, Family::Attention) => format!("attention @{name} reads whole heads"),
        (_, Family::Sample) => format!("the choice @{name} reads whole rows"),
        (_, Family::Rowwise) => format!("the reduction @{name} reads whole rows"),
        (Family::Gather, _) => "a gather is a kernel of its own".to_string(),
        (_, Family::Dot) if on_gpu && is_summed(graph, id, reader) => {
            format!("the product @{name} copies rows as they lie in memory")
        }
        (_, Family::Dot) if is_summed(graph, id, reader) => {
            format!("the product @{name} sums over whole rows")
        }
        (_, Family::Dot) => format!("the epilogue of @{name} takes only what follows its product"),
        (from, to @ (Family::Elementwise | Family::Gather)) => {
            format!("no rule joins {} to {} @{name}", from.name(), to.name())
        }
    }
}

/// Is the value, by way of the group's prologue, in the rows that its products sum over?
fn is_summed(graph: &Graph, id: ValueId, group: GroupId) -> bool {
    fn reads(graph: &Graph, from: ValueId, id: ValueId, group: GroupId) -> bool {
        from == id
            || graph[from].group == Some(group)
                && graph[from].operands.iter().any(|&operand| reads(graph, operand, id, group))
    }
    let products = graph.ids().filter(|&v| graph[v].group == Some(group));
    products
        .filter(|&v| matches!(graph[v].op, Op::Dot { .. }))
        .any(|product| reads(graph, graph[product].operands[0], id, group))
}
