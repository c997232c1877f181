//! Control flow of machine code, and the loop in which a kernel spends its time.
//!
//! Loops are natural ones: a header, and the blocks from which a branch back to it can be reached without passing it. A loop
//! that can be entered in two places is none here.
//!
//! The **steady loop** is the innermost one with matrix instructions. Where there are several, such as one for tiles that are
//! masked and one for those that are not, it is that with the fewest instructions for the same matrix work.
//!
//! A **trip** is once through it. Each block counts once, and what can be skipped is taken to be done, so that no count is too
//! low. Not on it are loops inside that can be gone around: in the steady state what they wait for has come.

use super::units::Matrix;
use super::{Code, Instruction};
use petgraph::Direction::{self, Incoming, Outgoing};
use petgraph::algo::dominators::simple_fast;
use petgraph::graph::{DiGraph, NodeIndex};
use std::collections::BTreeSet;
use std::ops::Range;

/// Basic blocks of a kernel and the ways between them.
#[derive(Debug)]
pub struct Flow<'c> {
    code: &'c Code,
    /// The instructions of each block.
    blocks: DiGraph<Range<usize>, ()>,
    loops: Vec<Loop>,
}

/// A natural loop.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Loop {
    header: NodeIndex,
    blocks: BTreeSet<NodeIndex>,
}

impl Loop {
    fn is_inside(&self, outer: &Loop) -> bool {
        self.header != outer.header && outer.blocks.is_superset(&self.blocks)
    }
}

/// Instructions of a trip, in the order of their addresses.
pub type Trip<'c> = Vec<&'c Instruction>;

/// Where control goes behind an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ways {
    /// To the next one.
    On,
    /// To its targets, or to the next one.
    Either,
    /// To its targets.
    Away,
}

fn ways(instruction: &Instruction) -> Ways {
    match instruction.name() {
        // Taken by warps whose lanes have parted. Where tensor cores work they are together.
        "BRA" if instruction.has("DIV") => Ways::On,
        // A branch may have a condition among its operands: `@P1 BRA P2, L`.
        "BRA" if !instruction.operands.starts_with('`') => Ways::Either,
        // `ptxas` writes some branches out of a loop as calls. Calls of functions come back.
        "CALL" => Ways::Either,
        "BRA" | "EXIT" | "RET" | "BRX" | "JMP" | "JMX" | "KILL" | "BPT" => match instruction.guard {
            Some(_) => Ways::Either,
            None => Ways::Away,
        },
        _ => Ways::On,
    }
}

impl<'c> Flow<'c> {
    /// Finds blocks and loops.
    pub fn of(code: &'c Code) -> Flow<'c> {
        let mut starts = BTreeSet::from([0, code.instructions.len()]);
        for (at, instruction) in code.instructions.iter().enumerate() {
            if ways(instruction) != Ways::On {
                starts.insert(at + 1);
                starts.extend(&instruction.targets);
            }
        }
        let starts: Vec<usize> = starts.into_iter().collect();
        let mut blocks = DiGraph::new();
        for pair in starts.windows(2) {
            blocks.add_node(pair[0]..pair[1]);
        }
        for number in blocks.node_indices() {
            let end = blocks[number].end;
            let last = &code.instructions[end - 1];
            let (next, targets) = match ways(last) {
                Ways::On => (Some(end), &[][..]),
                Ways::Either => (Some(end), &last.targets[..]),
                Ways::Away => (None, &last.targets[..]),
            };
            for to in next.iter().chain(targets) {
                // The end of the text is no block.
                if let Some(block) =
                    starts.binary_search(to).ok().filter(|&block| block < blocks.node_count())
                {
                    blocks.update_edge(number, NodeIndex::new(block), ());
                }
            }
        }
        let loops = loops(&blocks);
        Flow { code, blocks, loops }
    }

    /// The trip of the steady loop; `None` where no loop has matrix instructions.
    pub fn steady(&self) -> Option<Trip<'c>> {
        let trips = self.loops.iter().map(|l| (l, self.trip(l)));
        let working: Vec<(&Loop, Trip<'c>)> = trips.filter(|(_, trip)| work(trip) > 0).collect();
        let innermost = |outer: &Loop| !working.iter().any(|(inner, _)| inner.is_inside(outer));
        let share = |trip: &Trip| trip.len() as f64 / work(trip) as f64;
        let found = working.iter().filter(|(l, _)| innermost(l)).map(|(_, trip)| trip);
        found.min_by(|a, b| share(a).total_cmp(&share(b))).cloned()
    }

    /// The trip of the loop that copies tiles by TMA and multiplies nothing: that of a producer warp.
    pub fn producer(&self) -> Option<Trip<'c>> {
        let trips = self.loops.iter().map(|l| self.trip(l));
        let copies = |trip: &Trip| work(trip) == 0 && trip.iter().any(|i| i.name() == "UTMALDG");
        // A copy may stand in a loop of its own, over the lanes that are to do it.
        trips.filter(copies).max_by_key(Vec::len)
    }

    /// A trip through a loop.
    fn trip(&self, whole: &Loop) -> Trip<'c> {
        let mut blocks = whole.blocks.clone();
        for inner in self.loops.iter().filter(|inner| inner.is_inside(whole)) {
            let around = self.circle(whole.header, &blocks.difference(&inner.blocks).copied().collect());
            if !around.is_empty() {
                blocks = around;
            }
        }
        blocks.into_iter().flat_map(|block| &self.code.instructions[self.blocks[block].clone()]).collect()
    }

    /// Those of `blocks` that lie on a way from `header` back to it inside of them.
    fn circle(&self, header: NodeIndex, blocks: &BTreeSet<NodeIndex>) -> BTreeSet<NodeIndex> {
        let inside = |block: NodeIndex| blocks.contains(&block);
        let [after, before] = [Outgoing, Incoming].map(|way| reach(&self.blocks, header, way, inside));
        after.intersection(&before).copied().collect()
    }
}

/// Matrix work of a trip, in FLOPs.
fn work(trip: &Trip) -> u64 {
    trip.iter().filter_map(|instruction| Matrix::of(instruction)).map(|matrix| matrix.flops()).sum()
}

/// The blocks that can be reached from one by one way or more, through blocks that `passes` lets.
fn reach(
    blocks: &DiGraph<Range<usize>, ()>,
    from: NodeIndex,
    way: Direction,
    passes: impl Fn(NodeIndex) -> bool,
) -> BTreeSet<NodeIndex> {
    let mut found = BTreeSet::new();
    let mut open = vec![from];
    while let Some(block) = open.pop() {
        open.extend(blocks.neighbors_directed(block, way).filter(|&b| passes(b) && found.insert(b)));
    }
    found
}

/// Natural loops, in the order of their headers; those of one header are one.
fn loops(blocks: &DiGraph<Range<usize>, ()>) -> Vec<Loop> {
    let Some(entry) = blocks.node_indices().next() else { return Vec::new() };
    let dominators = simple_fast(blocks, entry);
    let mut loops: Vec<Loop> = Vec::new();
    for header in blocks.node_indices() {
        let dominates =
            |&block: &NodeIndex| dominators.dominators(block).is_some_and(|mut d| d.any(|d| d == header));
        let mut body = BTreeSet::new();
        for latch in blocks.neighbors_directed(header, Incoming).filter(dominates) {
            // A block that branches to itself is a loop alone.
            let inside = if latch == header {
                BTreeSet::new()
            } else {
                reach(blocks, latch, Incoming, |b| b != header)
            };
            body.extend(inside);
            body.extend([latch, header]);
        }
        if !body.is_empty() {
            loops.push(Loop { header, blocks: body });
        }
    }
    loops
}
