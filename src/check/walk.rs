//! Every case with every schedule, on every step, distribution and device.
//!
//! A group reads what the graph interpreter stored, so one oracle serves all of its schedules and devices.

use super::cases::Case;
use super::device::{Device, LoadError};
use super::{Distribution, Feed, Subject, Wrong, launch};
use crate::judge::Shares;
use codegen::cpu::{CodegenError, LEVELS, Level};
use ir::DType;
use ir::families::{GroupView, LowerError, Lowered};
use ir::graph::{Family, GroupId};
use ir::interp::InterpError;
use ir::random::Rng;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;

/// What is walked, and how far.
#[derive(Clone, Debug)]
pub struct Walk {
    /// Only groups of this family.
    pub family: Option<Family>,
    /// Schedules of a group: the default and others drawn from its legal space; `None` for all.
    pub schedules: Option<usize>,
    /// Of numbers and schedules.
    pub seed: u64,
    /// CPU levels; the first is also the target of what is interpreted.
    pub levels: Vec<Level>,
    /// Are kernels also interpreted and verified? With the default schedule and the first distribution: it is slow.
    pub interpreters: bool,
}

/// The levels that this machine runs, and the names of those that it does not.
///
/// # Errors
///
/// When the machine is below every level.
pub fn levels() -> Result<(Vec<Level>, Vec<&'static str>), CodegenError> {
    let features = runtime::cpu::features();
    let (mut here, mut missing) = (Vec::new(), Vec::new());
    for (name, _) in LEVELS {
        let level = codegen::cpu::level(name)?;
        match level.requires.iter().all(|needed| features.contains(&needed.as_str())) {
            true => here.push(level),
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
    for (number, case) in cases.iter().enumerate() {
        if progress(number, cases.len()).is_break() {
            return Err(WalkError::Interrupted);
        }
        try_case(walk, case, &mut report)?;
    }
    Ok(report)
}

/// A device with the kernels that it runs.
struct Ready {
    name: String,
    device: Device,
    kernels: Vec<(GroupId, String, Lowered)>,
    /// Is it the interpreter, or `null`? Then not everything is run.
    slow: bool,
    /// Kernels that have failed: they are not run again.
    failed: BTreeSet<usize>,
}

fn try_case(walk: &Walk, case: &Case, report: &mut Report) -> Result<(), WalkError> {
    let mut subject = Subject::new(case.graph.clone());
    let mut rng = Rng(case.name.bytes().fold(walk.seed, |hash, byte| Rng(hash ^ u64::from(byte)).bits()));
    let family_of = |subject: &Subject, group: GroupId| subject.graph.groups[group.0 as usize].family;
    let wanted = |subject: &Subject, group| walk.family.is_none_or(|f| f == family_of(subject, group));
    let groups: Vec<GroupId> = subject.groups().filter(|&group| wanted(&subject, group)).collect();
    let mut devices = Vec::new();
    for (number, level) in walk.levels.iter().enumerate() {
        let mut kernels = Vec::new();
        for &group in &groups {
            let mut schedules = match subject.schedules(group, &level.target) {
                Ok(schedules) => schedules,
                Err(LowerError::Unsupported { what, .. }) => {
                    report.refused.insert(format!("{}: {what}", case.name));
                    continue;
                }
                Err(error @ LowerError::Schedule { .. }) => return Err(error.into()),
            };
            // The default stands first; of the others as many as asked for.
            while walk.schedules.is_some_and(|most| schedules.len() > most.max(1)) {
                schedules.remove(1 + rng.below(schedules.len() - 1));
            }
            for schedule in schedules {
                match subject.lower(group, &schedule, &level.target) {
                    Ok(lowered) => kernels.push((group, schedule, lowered)),
                    Err(LowerError::Unsupported { what, .. }) => {
                        report.refused.insert(format!("{}: {what}", case.name));
                        break;
                    }
                    Err(error @ LowerError::Schedule { .. }) => return Err(error.into()),
                }
            }
        }
        if number == 0 && walk.interpreters {
            let mut default = kernels.clone();
            default.dedup_by_key(|(group, _, _)| *group);
            for (name, device) in [("interpreter", Device::Interpreter), ("null", Device::Null)] {
                let (name, kernels) = (name.to_string(), default.clone());
                devices.push(Ready { name, device, kernels, slow: true, failed: BTreeSet::new() });
            }
        }
        let list: Vec<_> = kernels.iter().map(|(_, _, lowered)| lowered.kernel.clone()).collect();
        let device = Device::cpu(level, &list)?;
        devices.push(Ready {
            name: level.name.clone(),
            device,
            kernels,
            slow: false,
            failed: BTreeSet::new(),
        });
    }
    let refused = |error| WalkError::Case { case: case.name.clone(), error };
    for &(tokens, past) in &case.steps {
        for distribution in Distribution::ALL {
            let feed = Feed { symbols: Case::symbols(tokens), past, distribution, seed: walk.seed };
            let tensors = subject.tensors(&feed).map_err(refused)?;
            for &group in &groups {
                let mut expected = None;
                for ready in &mut devices {
                    if ready.slow && distribution != Distribution::ALL[0] {
                        continue;
                    }
                    for (number, (of, schedule, lowered)) in ready.kernels.iter().enumerate() {
                        if *of != group || ready.failed.contains(&number) {
                            continue;
                        }
                        if expected.is_none() {
                            let found = subject.expected(group, &feed.symbols, &tensors).map_err(refused)?;
                            expected = Some(found);
                        }
                        let expected = expected.as_deref().expect("made above");
                        let with = (&feed.symbols, &tensors);
                        let judged =
                            launch(&subject, group, (number, lowered), &mut ready.device, with, expected);
                        let view = GroupView::new(&subject.graph, group);
                        let dtype = subject.graph[view.roots[0]].ty.dtype;
                        let row = (view.family(), dtype, ready.name.clone());
                        let tally = report.rows.entry(row).or_default();
                        tally.launches += 1;
                        match judged {
                            Ok((_, shares)) => {
                                if shares.hard >= tally.shares.hard {
                                    tally.worst = format!("{}, {}", case.name, distribution.name());
                                }
                                tally.shares = tally.shares.worst(shares);
                            }
                            Err(wrong) => {
                                ready.failed.insert(number);
                                let (case, schedule) = (case.name.clone(), schedule.clone());
                                report.failures.push(failure(&view, case, schedule, &ready.name, feed, &wrong));
                            }
                        }
                    }
                }
            }
        }
    }
    Ok(())
}

fn failure(
    view: &GroupView<'_>,
    case: String,
    schedule: String,
    device: &str,
    feed: Feed,
    wrong: &Wrong,
) -> Failure {
    let (family, group, device) = (view.family(), view.name().to_string(), device.to_string());
    Failure { family, case, group, schedule, device, feed, why: wrong.to_string() }
}
