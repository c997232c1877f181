//! Faults in plans: which kernels run in which order on which bytes.
//!
//! The plan's verifier refuses what it can see. The rest is compiled and runs; the first fault that is named must be the
//! launch with the fault, or one that uses the memory that it spoils.

use super::model::{Model, checkpoint};
use crate::Checked;
use ir::DType;
use ir::families::GroupView;
use ir::plan::{ALIGN, Place, Plan, verify};
use llamac::compare::layer_of;
use llamac::compare::ops::Ops;
use llamac::compare::weights::{BadWeight, weights};
use llamac::reference::ids;
use llamac::weights::Source;
use runtime::cpu::Cpu;
use runtime::device::{Program, Step, Want};
use runtime::manifest::WEIGHTS;
use std::collections::BTreeMap;

/// What can be wrong with a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    /// An argument of a launch lies on another.
    Overlap,
    /// A buffer begins a cache line late.
    WrongOffset,
    /// A buffer's place is given away before it is last read.
    ShortLife,
    /// Two weights lie in each other's place.
    SwappedWeights,
    /// Two launches in each other's place.
    SwappedLaunches,
    /// A launch is left out.
    MissingLaunch,
    /// Another buffer of the same kind and size.
    WrongArgument,
    /// Rows are appended to another layer's cache, or read from there.
    StaleCache,
    /// Token ids for positions: rows go to wrong slots of the cache.
    WrongPosition,
}

/// A plan with a fault.
struct Mutant {
    plan: Plan,
    /// The launches that may be blamed, each with its entry point's number: those with the fault, and those that use the
    /// memory that it spoils.
    guilty: Vec<(usize, usize)>,
    /// The buffers that the verifier or the comparison of weights may name.
    buffers: Vec<usize>,
}

impl Fault {
    const ALL: [Fault; 9] = [
        Fault::Overlap,
        Fault::WrongOffset,
        Fault::ShortLife,
        Fault::SwappedWeights,
        Fault::SwappedLaunches,
        Fault::MissingLaunch,
        Fault::WrongArgument,
        Fault::StaleCache,
        Fault::WrongPosition,
    ];

    /// The plan with the fault, at each of its places.
    fn plant(self, plan: &Plan) -> Vec<Mutant> {
        let mut mutants = Vec::new();
        let mut with = |guilty: Vec<(usize, usize)>, buffers: Vec<usize>, change: &dyn Fn(&mut Plan)| {
            let mut mutant = plan.clone();
            change(&mut mutant);
            mutants.push(Mutant { plan: mutant, guilty, buffers });
        };
        let arena = |b: usize| match plan.buffers[b].place {
            Place::Arena { offset } => Some(offset),
            Place::Weight { .. } | Place::State | Place::Input => None,
        };
        let numbers = 0..plan.buffers.len();
        for (e, entry) in plan.entries.iter().enumerate() {
            let users = |buffers: &[usize]| -> Vec<(usize, usize)> {
                let uses = |l: &usize| entry.launches[*l].args.iter().any(|arg| buffers.contains(arg));
                (0..entry.launches.len()).filter(uses).map(|l| (e, l)).collect()
            };
            // First and last launch that name a buffer.
            let life = |b: usize| {
                let of = users(&[b]);
                Some((of.first()?.1, of.last()?.1))
            };
            for (l, launch) in entry.launches.iter().enumerate() {
                match self {
                    Fault::Overlap => {
                        let args: Vec<usize> =
                            launch.args.iter().copied().filter(|&b| arena(b).is_some()).collect();
                        for (number, &a) in args.iter().enumerate() {
                            for &b in &args[..number] {
                                let moved = |p: &mut Plan| p.buffers[b].place = plan.buffers[a].place.clone();
                                with(Vec::new(), vec![b], &moved);
                            }
                        }
                    }
                    Fault::SwappedLaunches => {
                        // The next launch, and the next of the same kernel.
                        let same = (l + 1..entry.launches.len())
                            .find(|&m| entry.launches[m].kernel == launch.kernel);
                        let next = Some(l + 1).filter(|&m| m < entry.launches.len() && Some(m) != same);
                        for m in next.into_iter().chain(same) {
                            with(vec![(e, l), (e, m)], Vec::new(), &|p| p.entries[e].launches.swap(l, m));
                        }
                    }
                    Fault::MissingLaunch => {
                        with(vec![(e, l)], Vec::new(), &|p| drop(p.entries[e].launches.remove(l)));
                    }
                    Fault::WrongArgument | Fault::StaleCache | Fault::WrongPosition => {
                        for (at, &right) in launch.args.iter().enumerate() {
                            let Some(wrong) = self.stand_in(plan, e, l, right) else { continue };
                            with(users(&[right, wrong]), vec![right, wrong], &|p| {
                                p.entries[e].launches[l].args[at] = wrong;
                            });
                        }
                    }
                    Fault::WrongOffset | Fault::ShortLife | Fault::SwappedWeights => {}
                }
            }
            for b in numbers.clone() {
                let (Some(offset), Some((first, last))) = (arena(b), life(b)) else { continue };
                match self {
                    Fault::WrongOffset => {
                        with(Vec::new(), vec![b], &|p| {
                            p.buffers[b].place = Place::Arena { offset: offset + ALIGN }
                        });
                    }
                    Fault::ShortLife => {
                        let written = |&c: &usize| {
                            arena(c).is_some() && life(c).is_some_and(|of| first < of.0 && of.0 <= last)
                        };
                        if let Some(c) = numbers.clone().find(written) {
                            let moved = |p: &mut Plan| p.buffers[c].place = plan.buffers[b].place.clone();
                            with(Vec::new(), vec![c], &moved);
                        }
                    }
                    _ => {}
                }
            }
        }
        if self == Fault::SwappedWeights {
            for a in numbers {
                let weight = |b: usize| match &plan.buffers[b].place {
                    Place::Weight { offset, .. } => Some((*offset, plan.buffers[b].bytes)),
                    Place::Arena { .. } | Place::State | Place::Input => None,
                };
                let twin = |&b: &usize| weight(a).zip(weight(b)).is_some_and(|(a, b)| a.1 == b.1);
                let Some(b) = (a + 1..plan.buffers.len()).find(twin) else { continue };
                with(Vec::new(), vec![a, b], &|p| {
                    for (to, from) in [(a, b), (b, a)] {
                        let offset = weight(from).expect("twins are weights").0;
                        if let Place::Weight { offset: own, .. } = &mut p.buffers[to].place {
                            *own = offset;
                        }
                    }
                });
            }
        }
        mutants
    }

    /// The buffer that takes an argument's place. It has the same size and is no argument of the launch, so that nothing
    /// but the plan is wrong: the code stays within its memory.
    fn stand_in(self, plan: &Plan, entry: usize, launch: usize, right: usize) -> Option<usize> {
        let entry = &plan.entries[entry];
        let (args, own) = (&entry.launches[launch].args, &plan.buffers[right]);
        let fits = |&b: &usize| {
            let other = &plan.buffers[b];
            let kind = match (&own.place, &other.place) {
                (Place::Input, Place::Input) => {
                    self == Fault::WrongPosition && right == entry.positions && b == entry.tokens
                }
                (Place::State, Place::State) => self == Fault::StaleCache,
                (Place::Weight { .. }, Place::Weight { .. }) => self == Fault::WrongArgument,
                (Place::Arena { .. }, Place::Arena { .. }) => {
                    // Of the same entry point.
                    self == Fault::WrongArgument && entry.launches.iter().any(|l| l.args.contains(&b))
                }
                (Place::Input | Place::State | Place::Weight { .. } | Place::Arena { .. }, _) => false,
            };
            kind && b != right && !args.contains(&b) && (other.dtype, other.bytes) == (own.dtype, own.bytes)
        };
        (0..plan.buffers.len()).find(fits)
    }
}

/// What became of a mutant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fate {
    /// The plan's verifier refuses it.
    Verifier,
    /// The weights are not where it says.
    Weights,
    /// A launch is wrong.
    Op,
    /// What the program says is wrong, and each launch is right.
    Logits,
    /// Other bits, and nothing is wrong with them.
    Within,
    /// The right program's bits: no fault.
    Same,
}

pub fn plans() -> Checked<()> {
    let mut fates: BTreeMap<Fault, BTreeMap<Fate, usize>> = BTreeMap::new();
    // Plans in bf16 differ in sizes alone: a part of their places is enough.
    for (dtype, every) in [(DType::F32, 1), (DType::BF16, 4)] {
        let mut model = Model::new(dtype)?;
        let right = model.lowered.plan.clone();
        verify::verify(&right)?;
        let none = Mutant { plan: right.clone(), guilty: Vec::new(), buffers: Vec::new() };
        let truth = said(&mut Cpu { threads: 1 }.open(&model.with_plan(&right)?)?, &tokens(&model))?;
        assert_eq!(fate(&mut model, &none, &truth)?, Fate::Same);
        for fault in Fault::ALL {
            for (place, mutant) in fault.plant(&right).iter().enumerate().step_by(every) {
                let fate =
                    fate(&mut model, mutant, &truth).map_err(|said| format!("{fault:?} {place}: {said}"))?;
                if fate == Fate::Within {
                    return Err(format!("{fault:?} {place} is not caught:\n{}", mutant.plan).into());
                }
                *fates.entry(fault).or_default().entry(fate).or_default() += 1;
            }
        }
    }
    for (fault, fates) in &fates {
        let counts: Vec<String> = fates.iter().map(|(fate, count)| format!("{fate:?} {count}")).collect();
        println!("fault {fault:?}: {}", counts.join(", "));
    }
    for fault in Fault::ALL {
        let caught = fates.get(&fault).into_iter().flatten().filter(|(fate, _)| **fate < Fate::Within);
        assert!(caught.map(|(_, count)| count).sum::<usize>() > 1, "{fault:?} was caught at no two places");
    }
    Ok(())
}

/// What becomes of a mutant; an error if another thing than the fault is named.
fn fate(model: &mut Model, mutant: &Mutant, truth: &[f32]) -> Checked<Fate> {
    let Mutant { plan, guilty, buffers } = mutant;
    let name = |b: &usize| plan.buffers[*b].name.clone();
    if let Err(error) = verify::verify(plan) {
        let said = error.to_string();
        let named = buffers.iter().any(|b| said.contains(&format!("`{}`", name(b))));
        return if named || !guilty.is_empty() { Ok(Fate::Verifier) } else { Err(said.into()) };
    }
    let artifact = model.with_plan(plan)?;
    let section = artifact.require(WEIGHTS)?;
    let right = checkpoint(&model.tensors)?;
    if let Err(BadWeight { buffer, fault }) = weights(section, plan, &Source::Checkpoint(&right))? {
        return if buffers.contains(&buffer) { Ok(Fate::Weights) } else { Err(fault.to_string().into()) };
    }
    let mut program = Cpu { threads: 1 }.open(&artifact)?;
    let tokens = tokens(model);
    // The fault is the compiler's: it believes in the same plan.
    let mut lowered = model.lowered.clone();
    lowered.plan = plan.clone();
    let mut ops = Ops::default();
    ops.judge(&mut program, &lowered, &mut model.weights()?, &tokens)?;
    if let Some(fault) = ops.fault {
        let group = |&(entry, launch): &(usize, usize)| {
            let graph = &model.lowered.entries[entry].graph;
            let (layer, op) = layer_of(GroupView::all(graph)[launch].name());
            (fault.layer, fault.op.as_deref()) == (layer, Some(op))
        };
        return if guilty.iter().any(group) { Ok(Fate::Op) } else { Err(fault.to_string().into()) };
    }
    if model.logits(&mut program)?.is_err() {
        return Ok(Fate::Logits);
    }
    Ok(if said(&mut program, &tokens)? == truth { Fate::Same } else { Fate::Within })
}

fn tokens(model: &Model) -> Vec<i32> {
    ids(model.config.vocab_size).take(9).collect()
}

/// Logits of all tokens in one step but the last, and of that in a decode step.
fn said(program: &mut dyn Program, tokens: &[i32]) -> Checked<Vec<f32>> {
    let (before, last) = tokens.split_at(tokens.len() - 1);
    let mut state = program.state()?;
    let mut logits = program.run(&Step { tokens: before, want: Want::AllLogits }, &mut state)?.logits;
    logits.extend(program.run(&Step { tokens: last, want: Want::Logits }, &mut state)?.logits);
    Ok(logits)
}
