//! The op suite: the table of `llamac::check::cases` on every device.
//!
//! On this machine's own code every case with its default schedule; interpreted and verified too. GPU code on the emulator, in
//! shapes of its own. The verb `check` walks the same table further.

use crate::{Checked, machine};
use codegen::Backend;
use codegen::nvptx::{ARCHITECTURES, Architecture};
use ir::DType;
use ir::families::LowerError;
use ir::graph::{Family, Layout};
use ir::op::Op;
use libtest_mimic::Trial;
use llamac::check::cases::{Case, cases, flash, gpu};
use llamac::check::device::Device;
use llamac::check::walk::{How, Report, Walk, walk};
use llamac::check::{Distribution, Feed, Subject, launch};
use runtime::emulator::Sums;
use std::ops::ControlFlow;

/// One test a family.
pub fn trials() -> Vec<Trial> {
    let trial = |family: Family| {
        Trial::test(format!("ops {}", family.name()), move || ops(family).map_err(Into::into))
    };
    let mut trials: Vec<Trial> = Family::ALL.map(trial).into();
    trials.extend(ARCHITECTURES.iter().map(|gpu| {
        Trial::test(format!("ops on ptx-emulator {}", machine(gpu)), || emulated(gpu).map_err(Into::into))
    }));
    trials.extend(ARCHITECTURES.iter().map(|gpu| {
        let name = format!("ops on ptx-emulator {}, caches in several pages", gpu.cpu);
        Trial::test(name, || paged(gpu).map_err(Into::into))
    }));
    trials
}

fn emulated(architecture: &'static Architecture) -> Checked<()> {
    // As far as anybody knows how matrix units add, and as nobody's do.
    for (name, sums) in [("", Sums::Truncated), (", exact sums", Sums::Exact)] {
        let backends = vec![Backend::Cuda(architecture)];
        let plan = Walk {
            family: None,
            schedules: Some(1),
            seed: 1,
            backends,
            how: vec![How::Code],
            gpu: None,
            sums,
        };
        let mut cases = gpu(false);
        cases.retain(|case| sums == Sums::Truncated || !case.name.contains(" f32 "));
        let report = walk(&plan, &cases, &mut |_, _| ControlFlow::Continue(()))?;
        sound(
            &format!("ops on ptx-emulator {}{name}", machine(architecture)),
            &report,
            &[architecture.name],
        )?;
    }
    Ok(())
}

/// Kernels are right for any number of pages, whatever the layout pass gives them.
fn paged(architecture: &'static Architecture) -> Checked<()> {
    let target = architecture.target();
    let of_attention = [(DType::BF16, 64, 129, 63), (DType::BF16, 128, 1, 200), (DType::F32, 24, 17, 200)];
    let attention = of_attention.map(|(dtype, d, t, past)| flash(dtype, (2, 3, d), (t, t), past, 0));
    let appended = |case: &Case| case.graph.values.iter().any(|value| matches!(value.op, Op::CacheAppend));
    let appends = cases().into_iter().filter(appended);
    let mut launches = 0;
    for case in attention.into_iter().chain(appends) {
        let mut subject = Subject::new(case.graph.clone(), &target);
        for id in subject.graph.ids().collect::<Vec<_>>() {
            if matches!(subject.graph[id].op, Op::State { .. }) {
                // 768 slots are six pages; other cases have fewer.
                let all = subject.graph[id].ty.shape[1].constant().ok_or("a cache without end")? as usize;
                subject.graph[id].layout =
                    Some(Layout::Pages { slots: all / if all == 768 { 6 } else { 2 } });
            }
        }
        let (tokens, past) = case.steps[0];
        let symbols = Case::symbols(tokens);
        let feed = Feed { symbols, past, distribution: Distribution::Normal, seed: 1 };
        let tensors = subject.tensors(&feed)?;
        for group in subject.groups() {
            let schedule = match subject.schedules(group, &target) {
                Err(LowerError::Unsupported { .. }) => continue, // Heads of two, which no GPU's kernel does.
                schedules => schedules?.swap_remove(0),
            };
            let lowered = subject.lower(group, &schedule, &target)?;
            let kernel = &lowered.kernel;
            let mut device = Device::of(&Backend::Cuda(architecture), std::slice::from_ref(kernel))?;
            let expected = subject.expected(group, &symbols, &tensors)?;
            launch(&subject, group, (0, &lowered), &mut device, (&symbols, &tensors), &expected)
                .map_err(|wrong| format!("{}, @{}: {wrong}", case.name, kernel.name))?;
            launches += 1;
        }
    }
    assert!(launches > 20, "{launches} launches");
    Ok(())
}

fn ops(family: Family) -> Checked<()> {
    let backends = vec![Backend::of("cpu:native")?];
    let plan = Walk {
        family: Some(family),
        schedules: Some(1),
        seed: 1,
        backends,
        how: vec![How::Code, How::Interpreter, How::Null],
        gpu: None,
        sums: Sums::default(),
    };
    let report = walk(&plan, &cases(), &mut |_, _| ControlFlow::Continue(()))?;
    sound(&format!("ops {}", family.name()), &report, &["cpu:native", "interpreter", "null"])
}

/// Tells what was judged; nothing may be wrong or refused, and something must have run on each device.
fn sound(name: &str, report: &Report, devices: &[&str]) -> Checked<()> {
    for ((family, dtype, device), tally) in &report.rows {
        println!(
            "ops {} {dtype} on {device}: {} launches, {:.3} of the hard bound ({}), {:.3} of the statistical",
            family.name(),
            tally.launches,
            tally.shares.hard,
            tally.worst,
            tally.shares.typical
        );
    }
    println!("{name}: {} launches", report.launches());
    if let Some(failure) = report.failures.first() {
        return Err(format!("{} launches are wrong, the first: {failure:#?}", report.failures.len()).into());
    }
    if let Some(why) = report.refused.first() {
        return Err(format!("{} groups without a kernel, the first: {why}", report.refused.len()).into());
    }
    for device in devices {
        if !report.rows.keys().any(|row| row.2 == *device) {
            return Err(format!("nothing ran on {device}").into());
        }
    }
    Ok(())
}
