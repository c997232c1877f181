//! Every statement that synchronises a GPU kernel is taken out, one at a time: the emulator must report each that is missed.
//! Those inside a grid are taken out of the PTX; a `barrier`, which is the end of a grid, out of the kernel.
//!
//! Each kernel runs as [`llamac::check::device::Emulated`] does it, in three orders of warps. A report is what counts: wrong
//! numbers may come or not.

use crate::{Checked, machine};
use codegen::Backend;
use codegen::nvptx::{self, ARCHITECTURES, Architecture};
use ir::DType;
use ir::families::Lowered;
use ir::kernel::parse::parse;
use ir::kernel::{Kernel, Stmt};
use libtest_mimic::Trial;
use llamac::check::cases::{Case, cases, flash, gpu};
use llamac::check::device::{Device, Emulated, LaunchError};
use llamac::check::{Feed, Subject, results};
use runtime::emulator::Fault;

/// A case for each kind of kernel that synchronises: enough steps to go around its ring, and several turns of a worker.
const KERNELS: [&str; 11] = [
    "linear n 576 k 1536 f16 T 17 of 64",
    "linear n 1536 k 576 f32 T 17 of 64",
    "gated n 576 k 1536 bf16 T 17 of 64",
    "gated n 1536 k 576 f16 T 129 of 513",
    "flash d 64 of 3 f32 T 64 of 64 P 200",
    "flash d 64 of 7 bf16 T 64 of 64 P 600",
    "flash d 128 of 1 f16 T 64 of 64 P 600",
    "decode d 64 of 4 bf16 T 1 of 1 P 256",
    "decode d 64 of 4 f16 T 16 of 16 P 628",
    "decode d 128 of 4 f32 T 16 of 16 P 628",
    "greedy choice 576",
];

/// Attentions with several tiles of keys that need no mask, and several that do.
fn long() -> Vec<Case> {
    let case = |dtype, heads| flash(dtype, heads, (64, 64), 600, 0);
    vec![case(DType::BF16, (1, 7, 64)), case(DType::F16, (2, 1, 128))]
}

/// Statements that synchronise.
const STATEMENTS: [&str; 13] = [
    "bar.sync",
    "bar.arrive",
    "cp.async.wait_group",
    "cp.async.commit_group",
    "fence.proxy.async",
    "fence.mbarrier_init",
    "mbarrier.init",
    "mbarrier.arrive",
    "mbarrier.try_wait",
    "wgmma.fence",
    "wgmma.commit_group",
    "wgmma.wait_group",
    "griddepcontrol.wait",
];

/// A line without the statement that synchronises, if it has one. A wait for an mbarrier becomes one that is over at once.
fn without(line: &str) -> Option<String> {
    let at = STATEMENTS.iter().filter_map(|s| line.find(s)).min()?;
    let (before, statement) = line.split_at(at);
    let over = statement.strip_prefix("mbarrier.try_wait").and_then(|rest| {
        let ended = rest.split_whitespace().nth(1)?.trim_end_matches(',');
        Some(format!("setp.eq.u32 {ended}, 0, 0;"))
    });
    Some(before.to_string() + &over.unwrap_or_default())
}

/// Statements that may go, by GPU, kernel and number among those of the kernel, with the reason.
const REDUNDANT: [(&str, &str, usize, &str); 6] = [
    ("sm_80", "decode d 64 of 4 bf16 T 1 of 1 P 256", 6, ONE_STEP),
    ("sm_90a", "decode d 64 of 4 bf16 T 1 of 1 P 256", 7, ONE_STEP),
    ("sm_90a", "flash d 64 of 7 bf16 T 64 of 64 P 600", 26, FENCED),
    ("sm_90a", "flash d 64 of 7 bf16 T 64 of 64 P 600", 38, FENCED),
    ("sm_90a", "flash d 128 of 1 f16 T 64 of 64 P 600", 23, FENCED),
    ("sm_90a", "flash d 128 of 1 f16 T 64 of 64 P 600", 33, FENCED),
];

const ONE_STEP: &str = "one step has one tile that compares positions, the last: behind it none is copied";

const FENCED: &str = "the fence before the scores orders weights and sums too, where they are computed before it: the assembler may \
                      compute them later than the text, and then this one is needed";

/// One test a kernel.
pub fn trials() -> Vec<Trial> {
    let trial = |name: &'static str| {
        ARCHITECTURES.iter().map(move |gpu| {
            let name_of = format!("synchronisation {name} on {}", machine(gpu));
            Trial::test(name_of, move || deletions(name, gpu).map_err(Into::into))
        })
    };
    let mut trials: Vec<Trial> = KERNELS.into_iter().flat_map(trial).collect();
    trials.push(Trial::test("synchronisation of phases", || phases().map_err(Into::into)));
    trials
}

/// A kernel of which each phase is a grid; in one grid its CTAs race.
fn phases() -> Checked<()> {
    let text = include_str!("../lower/ptx/phases.ir");
    let rows = 4;
    let x: Vec<f64> = (0..rows * 32).map(f64::from).collect();
    let run = |text: &str| -> Checked<Result<Vec<Vec<f64>>, LaunchError>> {
        let kernels = parse(text)?;
        let mut device = Device::of(&Backend::of("cuda:sm_80")?, &kernels)?;
        let held = [Some(x.clone()), Some(x.clone()), None];
        Ok(device.run(0, &kernels[0], &[], &held, Case::symbols(rows.into())).map(Option::unwrap_or_default))
    };
    let stored = run(text)??;
    // `x[T - 1 - u, lane] + x[u, 31 - lane]`.
    let expected = (0..rows).flat_map(|u| (0..32).map(move |i| (rows - 1 - u) * 32 + i + u * 32 + 31 - i));
    assert!(stored[2].iter().copied().eq(expected.map(f64::from)), "{:?}", stored[2]);
    match run(&text.replace("  barrier\n", ""))? {
        Err(LaunchError::Emulated(report)) if matches!(report.fault, Fault::Race { .. }) => {
            println!("synchronisation of phases: {report}");
            Ok(())
        }
        other => Err(format!("without the barrier: {other:?}").into()),
    }
}

fn deletions(name: &'static str, architecture: &'static Architecture) -> Checked<()> {
    let table: Vec<Case> = cases().into_iter().chain(gpu(true)).chain(long()).collect();
    let case = table.iter().find(|case| case.name == name).ok_or("there is no such case")?;
    let target = architecture.target();
    let mut subject = Subject::new(case.graph.clone(), &target);
    let (tokens, past) = *case.steps.last().ok_or("a case has steps")?;
    let symbols = Case::symbols(tokens);
    let feed = Feed { symbols, past, distribution: case.distributions[0], seed: 1 };
    let tensors = subject.tensors(&feed)?;
    let (mut deleted, mut kept) = (0, 0);
    let mut not_missed = Vec::new();
    for group in subject.groups() {
        let schedule = subject.schedules(group, &target)?.swap_remove(0);
        let lowered = subject.lower(group, &schedule, &target)?;
        let compile = |lowered: &Lowered| -> Checked<String> {
            let kernel = Kernel { name: "0".to_string(), ..lowered.kernel.clone() };
            Ok(nvptx::compile(&nvptx::llvm(&[kernel], architecture)?, architecture)?)
        };
        let run_as = |lowered: &Lowered, ptx: &str| -> Checked<Result<(), LaunchError>> {
            let mut device = Device::Emulated(Box::new(Emulated::of_ptx(ptx, 1, architecture.cpu.parse()?)?));
            Ok(results(&subject, group, (0, lowered), &mut device, (&symbols, &tensors)).map(drop))
        };
        let ptx = compile(&lowered)?;
        let run = |ptx: &str| run_as(&lowered, ptx);
        run(&ptx)?.map_err(|e| format!("as it is: {e}"))?;
        let barriers = lowered.kernel.body.iter().enumerate();
        for (place, _) in barriers.filter(|(_, stmt)| matches!(stmt, Stmt::Barrier)) {
            let mut changed = lowered.clone();
            changed.kernel.body.remove(place);
            match run_as(&changed, &compile(&changed)?)? {
                Err(LaunchError::Emulated(_)) => deleted += 1,
                other => return Err(format!("a barrier is not missed: {other:?}").into()),
            }
        }
        let lines: Vec<&str> = ptx.lines().collect();
        let places = (0..lines.len()).filter_map(|at| Some((at, without(lines[at])?)));
        for (number, (place, less)) in places.enumerate() {
            let statement = lines[place].trim();
            let mut changed = lines.clone();
            changed[place] = &less;
            let redundant = REDUNDANT.iter().find(|r| (r.0, r.1, r.2) == (architecture.cpu, name, number));
            match (run(&changed.join("\n"))?, redundant) {
                (Err(LaunchError::Emulated(_)), None) => {}
                (Ok(()), Some(_)) => kept += 1,
                (Err(_), Some(why)) => {
                    return Err(format!("not redundant ({}): {number} {statement}", why.3).into());
                }
                (Err(other), None) => {
                    return Err(format!("no report, but {other}: {number} {statement}").into());
                }
                (Ok(()), None) => {
                    let around = &lines[place.saturating_sub(3)..(place + 4).min(lines.len())];
                    not_missed.push(format!("{number} {statement}\n{}", around.join("\n")));
                }
            }
            deleted += 1;
        }
    }
    println!(
        "synchronisation {name} on {}: {deleted} statements, of which {kept} may go; each other is missed",
        architecture.cpu
    );
    assert!(deleted > 0, "nothing to delete");
    if !not_missed.is_empty() {
        return Err(format!("{name} on {}: not missed: {}", architecture.cpu, not_missed.join("\n\n")).into());
    }
    Ok(())
}
