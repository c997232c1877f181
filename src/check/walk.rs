//! Every case with every schedule, on every step, distribution and device.
//!
//! A group reads what the graph interpreter stored, so one oracle serves all of its schedules and devices.

use super::cases::Case;
use super::device::{Device, LoadError};
use super::{Feed, Subject, Tensors, launch, results};
use crate::compare::reproducer::KernelCase;
use crate::judge::{Expected, Shares};
use codegen::Backend;
use codegen::cpu::{CodegenError, LEVELS};
use ir::DType;
use ir::families::{GroupView, LowerError, Lowered};
use ir::graph::{Family, GroupId};
use ir::interp::InterpError;
use ir::kernel::Kernel;
use ir::random::Rng;
use ir::target::Target;
use runtime::cuda::context::Context;
use runtime::emulator::Sums;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;
use std::sync::Arc;

/// What is walked, and how far.
#[derive(Clone)]
pub struct Walk {
    /// Only groups of this family.
    pub family: Option<Family>,
    /// Schedules of a group: the default and others drawn from its legal space; `None` for all.
    pub schedules: Option<usize>,
    /// Of numbers and schedules.
    pub seed: u64,
    /// What kernels are compiled for, of one kind of machine; the first is also the target of what is interpreted.
    pub backends: Vec<Backend>,
    /// What is done with kernels.
    pub how: Vec<How>,
    /// The GPU that runs a GPU's code, if not the emulator.
    pub gpu: Option<Arc<Context>>,
    /// How an emulated GPU's matrix units add.
    pub sums: Sums,
}

/// What is done with kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// Compiled and run.
    Code,
    /// Interpreted: with the default schedule and the first distribution, for it is slow.
    Interpreter,
    /// Verified, with what is bound to them.
    Null,
}

/// The levels that this machine runs, and the names of those that it does not.
///
/// # Errors
///
/// When the machine is below every level.
pub fn levels() -> Result<(Vec<Backend>, Vec<&'static str>), CodegenError> {
    let features = runtime::cpu::features();
    let (mut here, mut missing) = (Vec::new(), Vec::new());
    for (name, _) in LEVELS {
        let level = codegen::cpu::level(name)?;
        match level.requires.iter().all(|needed| features.contains(&needed.as_str())) {
            true => here.push(Backend::Cpu(level)),
            false => missing.push(name),
        }
    }
    Ok((here, missing))
}

/// What a row of the table is about: family, dtype of what is stored, device.
pub type Row = (Family, DType, String);

/// What came of a row.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Launches that were judged.
    pub launches: usize,
    /// The worst shares of the bounds.
    pub shares: Shares,
    /// The case that used the largest share of the hard bound.
    pub worst: String,
}

/// A launch that is wrong.
#[derive(Clone, Debug)]
pub struct Failure {
    /// The family.
    pub family: Family,
    /// The case's name.
    pub case: String,
    /// The group's.
    pub group: String,
    /// The schedule's text.
    pub schedule: String,
    /// Where it ran.
    pub device: String,
    /// What it ran on.
    pub feed: Feed,
    /// What is wrong: worst element, found and expected, or what the launch did.
    pub why: String,
}

/// What a walk found.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Rows that have launches.
    pub rows: BTreeMap<Row, Tally>,
    /// Groups that no family covers, with the reason; they are not tried.
    pub refused: BTreeSet<String>,
    /// Launches that are wrong, the first of each kernel.
    pub failures: Vec<Failure>,
    /// The first of them, to be looked at alone.
    pub case: Option<Box<KernelCase>>,
}

impl Report {
    /// Launches in all.
    pub fn launches(&self) -> usize {
        self.rows.values().map(|tally| tally.launches).sum()
    }
}

/// Why a walk cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum WalkError {
    /// Kernels could not be compiled or loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A schedule of the legal space that its own family refuses.
    #[error(transparent)]
    Lower(#[from] LowerError),
    /// A case that the interpreter refuses.
    #[error("case `{case}`: {error}")]
    Case {
        /// Its name.
        case: String,
        /// What the interpreter said.
        error: InterpError,
    },
    /// The caller had enough.
    #[error("interrupted")]
    Interrupted,
}

/// Cases that share a module: linking costs more than compiling a kernel.
const TOGETHER: usize = 16;

/// Goes through the cases; `progress` is told how many of how many are done.
///
/// # Errors
///
/// What keeps it from going on; a wrong launch does not.
pub fn walk(
    walk: &Walk,
    cases: &[Case],
    progress: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
) -> Result<Report, WalkError> {
    let mut report = Report::default();
    for (chunk, some) in cases.chunks(TOGETHER).enumerate() {
        let mut ctx = Ctx { walk, devices: Vec::new(), report: &mut report };
        let prepared = ctx.prepare(some)?;
        for (number, prepared) in prepared.into_iter().enumerate() {
            if progress(chunk * TOGETHER + number, cases.len()).is_break() {
                return Err(WalkError::Interrupted);
            }
            ctx.run(prepared)?;
        }
    }
    Ok(report)
}

/// A kernel and the device that it runs on.
struct Try {
    group: GroupId,
    schedule: String,
    lowered: Lowered,
    /// Index in [`Ctx::devices`].
    device: usize,
    /// The kernel's number there.
    number: usize,
    /// It is not run again then.
    failed: bool,
}

/// A case with all that is to be run.
struct Prepared<'c> {
    case: &'c Case,
    subject: Subject,
    tries: Vec<Try>,
}

struct Ctx<'w> {
    walk: &'w Walk,
    /// The back ends, then the interpreter and `null`.
    devices: Vec<(String, Device)>,
    report: &'w mut Report,
}

impl Ctx<'_> {
    /// Lowers and compiles.
    fn prepare<'c>(&mut self, cases: &'c [Case]) -> Result<Vec<Prepared<'c>>, WalkError> {
        let walk = self.walk;
        let mut modules: Vec<Vec<Kernel>> = vec![Vec::new(); walk.backends.len()];
        let mut prepared = Vec::new();
        for case in cases {
            let mut subject = Subject::new(case.graph.clone(), &walk.backends[0].target());
            let seed = case.name.bytes().fold(walk.seed, |hash, byte| Rng(hash ^ u64::from(byte)).bits());
            let (mut rng, mut tries) = (Rng(seed), Vec::new());
            for group in subject.groups() {
                let family = subject.graph.groups[group.0 as usize].family;
                if walk.family.is_some_and(|wanted| wanted != family) {
                    continue;
                }
                for (device, backend) in walk.backends.iter().enumerate() {
                    let lowered = self.lower(&mut subject, group, &backend.target(), &mut rng);
                    let lowered = match lowered {
                        Err(LowerError::Unsupported { what, .. }) => {
                            self.report.refused.insert(format!("{}: {what}", case.name));
                            continue;
                        }
                        lowered => lowered?,
                    };
                    if let (0, Some((schedule, default))) = (device, lowered.first()) {
                        for (after, how) in [How::Interpreter, How::Null].into_iter().enumerate() {
                            if walk.how.contains(&how) {
                                let (schedule, lowered) = (schedule.clone(), default.clone());
                                let device = walk.backends.len() + after;
                                tries.push(Try {
                                    group,
                                    schedule,
                                    lowered,
                                    device,
                                    number: 0,
                                    failed: false,
                                });
                            }
                        }
                    }
                    if !walk.how.contains(&How::Code) {
                        continue;
                    }
                    for (schedule, lowered) in lowered {
                        let number = modules[device].len();
                        modules[device].push(lowered.kernel.clone());
                        tries.push(Try { group, schedule, lowered, device, number, failed: false });
                    }
                }
            }
            prepared.push(Prepared { case, subject, tries });
        }
        for (backend, kernels) in walk.backends.iter().zip(&modules) {
            // Where nothing is to be compiled, nothing will run.
            let device = match (&walk.gpu, backend) {
                _ if kernels.is_empty() => Device::Null,
                (Some(gpu), Backend::Cuda(architecture)) => Device::gpu(gpu, architecture, kernels)?,
                _ => Device::of(backend, kernels)?.adding(walk.sums),
            };
            self.devices.push((backend.name().to_string(), device));
        }
        self.devices.push(("interpreter".to_string(), Device::Interpreter));
        self.devices.push(("null".to_string(), Device::Null));
        Ok(prepared)
    }

    /// A group with its default schedule, and with as many others as asked for.
    fn lower(
        &self,
        subject: &mut Subject,
        group: GroupId,
        target: &Target,
        rng: &mut Rng,
    ) -> Result<Vec<(String, Lowered)>, LowerError> {
        let mut schedules = subject.schedules(group, target)?;
        while self.walk.schedules.is_some_and(|most| schedules.len() > most.max(1)) {
            schedules.remove(1 + rng.below(schedules.len() - 1));
        }
        let lower = |schedule: String| subject.lower(group, &schedule, target).map(|l| (schedule, l));
        schedules.into_iter().map(lower).collect()
    }

    fn run(&mut self, prepared: Prepared<'_>) -> Result<(), WalkError> {
        let Prepared { case, subject, mut tries } = prepared;
        if tries.is_empty() {
            return Ok(());
        }
        let refused = |error| WalkError::Case { case: case.name.clone(), error };
        for &(tokens, past) in &case.steps {
            for &distribution in &case.distributions {
                let feed = Feed { symbols: Case::symbols(tokens), past, distribution, seed: self.walk.seed };
                let tensors = subject.tensors(&feed).map_err(refused)?;
                for group in subject.groups() {
                    let slow = self.walk.backends.len();
                    let runs = |t: &&mut Try| {
                        t.group == group
                            && !t.failed
                            && (t.device < slow || distribution == case.distributions[0])
                    };
                    let mut of_group = tries.iter_mut().filter(runs).peekable();
                    if of_group.peek().is_none() {
                        continue;
                    }
                    let expected = subject.expected(group, &feed.symbols, &tensors).map_err(refused)?;
                    for one in of_group {
                        self.judge(case, &subject, one, &feed, &tensors, &expected);
                    }
                }
            }
        }
        Ok(())
    }

    fn judge(
        &mut self,
        case: &Case,
        subject: &Subject,
        one: &mut Try,
        feed: &Feed,
        tensors: &Tensors,
        expected: &[Expected],
    ) {
        let (name, device) = &mut self.devices[one.device];
        let kernel = (one.number, &one.lowered);
        let judged = launch(subject, one.group, kernel, device, (&feed.symbols, tensors), expected);
        let view = GroupView::new(&subject.graph, one.group);
        let (family, dtype) = (view.family(), subject.graph[view.roots[0]].ty.dtype);
        let tally = self.report.rows.entry((family, dtype, name.clone())).or_default();
        tally.launches += 1;
        match judged {
            Ok((_, shares)) => {
                if shares.hard >= tally.shares.hard {
                    tally.worst = format!("{}, {}", case.name, feed.distribution.name());
                }
                tally.shares = tally.shares.worst(shares);
            }
            Err(wrong) => {
                one.failed = true;
                if self.report.case.is_none() {
                    // A launch that goes astray has no results.
                    let found = results(subject, one.group, kernel, device, (&feed.symbols, tensors));
                    let mut graph = subject.graph.clone();
                    graph.groups[one.group.0 as usize].schedule =
                        (!one.schedule.is_empty()).then(|| one.schedule.clone());
                    // What is interpreted is lowered for the first.
                    let backend = self.walk.backends.get(one.device).unwrap_or(&self.walk.backends[0]);
                    let stored = |id| tensors[&id].clone();
                    self.report.case = Some(Box::new(KernelCase::of(
                        &GroupView::new(&graph, one.group),
                        (&one.lowered.kernel, backend.name()),
                        (&feed.symbols, &stored),
                        &found.unwrap_or_default(),
                        expected,
                    )));
                }
                let shares = wrong.shares();
                tally.worst = format!("{}, {}", case.name, feed.distribution.name());
                tally.shares = tally.shares.worst(shares);
                self.report.failures.push(Failure {
                    family,
                    case: case.name.clone(),
                    group: view.name().to_string(),
                    schedule: one.schedule.clone(),
                    device: name.clone(),
                    feed: *feed,
                    why: wrong.to_string(),
                });
            }
        }
    }
}
