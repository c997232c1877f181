//! The op suite: the table of `llamac::check::cases` on every device.
//!
//! On this machine's own code every case with its default schedule; interpreted and verified too. GPU code on the emulator, in
//! shapes of its own. The verb `check` walks the same table further.

use crate::Checked;
use codegen::Backend;
use codegen::nvptx::{ARCHITECTURES, Architecture};
use ir::graph::Family;
use libtest_mimic::Trial;
use llamac::check::cases::{cases, gpu};
use llamac::check::walk::{How, Report, Walk, walk};
use runtime::emulator::Sums;
use std::ops::ControlFlow;

/// One test a family.
pub fn trials() -> Vec<Trial> {
    let trial = |family: Family| {
        Trial::test(format!("ops {}", family.name()), move || ops(family).map_err(Into::into))
    };
    let mut trials: Vec<Trial> = Family::ALL.map(trial).into();
    trials.extend(ARCHITECTURES.iter().map(|gpu| {
        Trial::test(format!("ops on ptx-emulator {}", gpu.cpu), || emulated(gpu).map_err(Into::into))
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
        sound(&format!("ops on ptx-emulator {}{name}", architecture.cpu), &report, &[architecture.name])?;
    }
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
