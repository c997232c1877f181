//! Random graphs: compiled code and the kernel interpreter against the graph interpreter.
//!
//! Each group runs on what the groups before it stored, in guarded and poisoned memory, with a schedule of its legal space
//! drawn at random, and is judged alone. A group that no family covers is computed by the graph interpreter: what follows
//! it is tried all the same. Seeds are fixed; a failure prints the seed of the smallest graph that fails.

use crate::Checked;
use ir::dim::MAX_SYMBOLS;
use ir::families::{GroupView, LowerError};
use ir::graph::{Family, GroupId};
use ir::interp::{Rounding, Tensor, compute};
use ir::kernel::Kernel;
use ir::op::Unary;
use ir::random::{MAX_T, Rng, random_graph};
use libtest_mimic::Trial;
use llamac::check::device::Device;
use llamac::check::{Distribution, Feed, Subject, Tensors, launch};
use llamac::judge::{Shares, function_ulp};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestError, TestRng, TestRunner};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

/// Random graphs a level.
const CASES: [(&str, u32); 3] = [("cpu:native", 160), ("cpu:x86-64-v3", 40), ("cpu:x86-64-v4", 40)];

/// One test a level.
pub fn trials() -> Vec<Trial> {
    CASES
        .map(|(level, cases)| {
            Trial::test(format!("random graphs on {level}"), move || graphs(level, cases).map_err(Into::into))
        })
        .into()
}

/// What was tried, by family: groups, how many of them had no kernel, and how near they came.
type Tried = BTreeMap<Family, (usize, usize, Shares)>;

fn graphs(level: &str, cases: u32) -> Checked<()> {
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    let rng = TestRng::deterministic_rng(config.rng_algorithm);
    let tried = RefCell::new(Tried::new());
    let outcome = TestRunner::new_with_rng(config, rng).run(&(any::<u64>(), 1..30usize), |(seed, size)| {
        graph(level, seed, size, &mut tried.borrow_mut()).map_err(|e| TestCaseError::fail(e.to_string()))
    });
    match outcome {
        Ok(()) => {}
        Err(TestError::Fail(why, (seed, size))) => {
            return Err(format!("random_graph({seed}, {size}): {why}").into());
        }
        Err(TestError::Abort(why)) => return Err(why.to_string().into()),
    }
    let tried = tried.into_inner();
    for (family, (groups, refused, shares)) in &tried {
        let Shares { hard, typical, elems, open } = shares;
        println!(
            "random {level} {}: {groups} groups, {refused} without a kernel; {elems} elements ({open} open), \
             {hard:.3} of the hard bound, {typical:.3} of the statistical",
            family.name()
        );
    }
    for family in Family::ALL {
        let (groups, refused, _) = tried.get(&family).copied().unwrap_or_default();
        if groups == refused {
            return Err(format!("no {} kernel was tried", family.name()).into());
        }
    }
    Ok(())
}

fn graph(level: &str, seed: u64, size: usize, tried: &mut Tried) -> Checked<()> {
    let level = codegen::cpu::level(level)?;
    let mut rng = Rng(seed);
    let t = 1 + rng.below(MAX_T as usize) as i64;
    let mut symbols = [0; MAX_SYMBOLS];
    symbols[0] = t;
    let past = rng.pick(&[0, 3, ir::random::SLOTS - t]);
    let mut graph = random_graph(seed, size);
    // Kernels for one row are others.
    if rng.below(3) == 0 {
        symbols[0] = 1;
        graph = graph.specialise("T", 1, 1);
    }
    let mut subject = Subject::new(graph, &level.target);
    let feed = Feed { symbols, past, distribution: rng.pick(&Distribution::ALL), seed };
    let mut tensors = subject.tensors(&feed)?;

    let mut lowered = Vec::new();
    for group in subject.groups() {
        let made = subject.schedules(group, &level.target).and_then(|schedules| {
            let schedule = &schedules[rng.below(schedules.len())];
            subject.lower(group, schedule, &level.target)
        });
        match made {
            Ok(made) => lowered.push(Some(made)),
            Err(LowerError::Unsupported { .. }) => lowered.push(None),
            Err(error @ LowerError::Schedule { .. }) => return Err(error.into()),
        }
    }
    let kernels: Vec<Kernel> = lowered.iter().flatten().map(|l| l.kernel.clone()).collect();
    let mut cpu = Device::cpu(&level, &kernels)?;
    let mut number = 0;
    for (group, made) in subject.groups().zip(&lowered) {
        let family = subject.graph.groups[group.0 as usize].family;
        let (groups, refused, shares) = tried.entry(family).or_default();
        *groups += 1;
        let Some(made) = made else {
            *refused += 1;
            interpret(&subject, group, &symbols, &mut tensors)?;
            continue;
        };
        let failed = |on: &str, why: &dyn std::fmt::Display| {
            format!("{on}, {feed:?}: {why}\n{}\n{}", subject.graph, made.kernel)
        };
        let expected = subject.expected(group, &symbols, &tensors)?;
        let on = |name: &str, device: &mut Device| {
            let with = (&symbols, &tensors);
            launch(&subject, group, (number, made), device, with, &expected).map_err(|e| failed(name, &e))
        };
        let (results, of_cpu) = on(&level.name, &mut cpu)?;
        let (interpreted, _) = on("interpreter", &mut Device::Interpreter)?;
        on("null", &mut Device::Null)?;
        *shares = shares.worst(of_cpu);
        // Near the subnormal edge AVX-512's conversion to bf16 takes subnormals for zero.
        if is_exact(&made.kernel) && feed.distribution != Distribution::Tiny {
            for ((id, a), (_, b)) in results.iter().zip(&interpreted) {
                if let Some(at) = (0..a.data.len()).find(|&at| !same(a.data[at], b.data[at])) {
                    let what = format!("%{}, element {at}: {:e}", subject.graph[*id].name, a.data[at]);
                    return Err(failed(&what, &format!("the interpreter has {:e}", b.data[at])).into());
                }
            }
        }
        tensors.extend(results.into_iter().map(|(id, tensor)| (id, Rc::new(tensor))));
        number += 1;
    }
    Ok(())
}

/// The same number; zeros and NaNs may differ in their sign.
fn same(a: f64, b: f64) -> bool {
    a == b || a.is_nan() && b.is_nan()
}

/// Does the kernel interpreter say each bit of what this computes? Not where functions err, and not where the machine
/// rounds as it likes.
fn is_exact(kernel: &Kernel) -> bool {
    let text = kernel.to_string();
    let errs = |op: Unary| function_ulp(op) > 0.5 && text.contains(&format!("{}(", op.facts().name));
    !text.contains("dot.bf16(") && !Unary::ALL.into_iter().any(errs)
}

/// Computes a group as the graph interpreter does.
fn interpret(
    subject: &Subject,
    group: GroupId,
    symbols: &[i64; MAX_SYMBOLS],
    tensors: &mut Tensors,
) -> Checked<()> {
    let view = GroupView::new(&subject.graph, group);
    for &id in &view.values {
        let value = &subject.graph[id];
        let operands: Vec<Rc<Tensor>> = value.operands.iter().map(|o| tensors[o].clone()).collect();
        let rounding = if view.roots.contains(&id) { Rounding::Stored } else { Rounding::Exact };
        tensors.insert(id, Rc::new(compute(value, &operands, symbols, rounding)?));
    }
    Ok(())
}
