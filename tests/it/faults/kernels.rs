//! Faults in kernels: each is planted at every place of every kernel of a few cases. The mutant runs in the kernel
//! interpreter, in memory laid out for the true kernel, on three of the distributions; a sample runs as native code too.

use crate::Checked;
use crate::skipped::skip;
use codegen::cpu::Level;
use ir::DType;
use ir::dim::MAX_SYMBOLS;
use ir::families::Lowered;
use ir::graph::GroupId;
use ir::kernel::interp::{FaultKind, KBuffer, Options, run};
use ir::kernel::{Access, Arith, Expr, Kernel, Space, Stmt, Type};
use ir::op::{Compare, Reduction};
use ir::target::Target;
use llamac::check::cases::{Case, cases};
use llamac::check::device::Device;
use llamac::check::walk::levels;
use llamac::check::{Distribution, Feed, Subject, Tensors, launch};
use llamac::judge::{Expected, Mismatch};
use std::collections::{BTreeMap, BTreeSet};

/// What can be wrong with a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    /// A loop ends one step early.
    DroppedTail,
    /// A loop begins one step late.
    DroppedHead,
    /// A loop runs one step too far.
    OneTooMany,
    /// The last turn of a split loop is left out.
    DroppedTurn,
    /// A comparison that takes its edge in, or leaves it out.
    MaskByOne,
    /// A choice the wrong way round.
    SwappedChoice,
    /// A factor is missing.
    MissingScale,
    /// A sign of a rotation.
    WrongSign,
    /// The halves of a rotation, paired the wrong way.
    WrongPairing,
    /// Two axes of a load in the wrong order.
    SwappedAxes,
    /// The element beside.
    LoadByOne,
    /// A row of a table, or a slot of a cache, beside the right one.
    SlotByOne,
    /// A slot of a cache keeps what was there.
    StaleSlot,
    /// A result is not stored.
    DroppedStore,
    /// All workers store to the first row.
    Race,
    /// What all workers made is read without waiting for them.
    MissingBarrier,
    /// Sums go on from the tile before.
    StaleAccumulator,
    /// Registers that nobody set.
    UninitialisedLane,
    /// One lane in place of the sum of all.
    DroppedFold,
    /// The larger for the smaller.
    MaxForMin,
    /// Rows that lie one element further apart than the memory's.
    WrongPitch,
    /// bf16 cut off, and not rounded.
    TruncatedStore,
    /// Sums cut off after each step, as tensor cores do.
    TruncatedSum,
    /// Sums kept in bf16.
    NarrowSum,
    /// Sums kept in f16: large ones are infinite.
    F16Sum,
    /// A function of 11 bits.
    CoarseFunction,
}

impl Fault {
    const ALL: [Fault; 26] = [
        Fault::DroppedTail,
        Fault::DroppedHead,
        Fault::OneTooMany,
        Fault::DroppedTurn,
        Fault::MaskByOne,
        Fault::SwappedChoice,
        Fault::MissingScale,
        Fault::WrongSign,
        Fault::WrongPairing,
        Fault::SwappedAxes,
        Fault::LoadByOne,
        Fault::SlotByOne,
        Fault::StaleSlot,
        Fault::DroppedStore,
        Fault::Race,
        Fault::MissingBarrier,
        Fault::StaleAccumulator,
        Fault::UninitialisedLane,
        Fault::DroppedFold,
        Fault::MaxForMin,
        Fault::WrongPitch,
        Fault::TruncatedStore,
        Fault::TruncatedSum,
        Fault::NarrowSum,
        Fault::F16Sum,
        Fault::CoarseFunction,
    ];

    /// Does it change how something is rounded, and nothing else? In places that weighs less than the bounds do, which the
    /// test prints; some place must be found out.
    fn rounds(self) -> bool {
        matches!(
            self,
            Fault::TruncatedStore
                | Fault::TruncatedSum
                | Fault::NarrowSum
                | Fault::F16Sum
                | Fault::CoarseFunction
        )
    }

    /// The kernel with the fault at the place of that number; `None` behind the last.
    fn plant(self, kernel: &Kernel, place: usize) -> Option<Kernel> {
        let mut mutant = kernel.clone();
        // Places to pass by; `None` once the fault is planted.
        let mut left = Some(place);
        let mut here = |fits: bool| {
            let found = fits && left == Some(0);
            if fits {
                left = left.and_then(|n| n.checked_sub(1));
            }
            found
        };
        for buffer in &mut mutant.buffers {
            let fits = self == Fault::WrongPitch && buffer.shape.len() > 1 && buffer.space != Space::Local;
            if here(fits) {
                buffer.strides[0] += 1;
            }
        }
        each_block(&mut mutant.body, &mut |block| {
            for at in 0..block.len() {
                if self.fits_stmt(kernel, &block[at]) && here(true) {
                    self.change_stmt(block, at);
                    return;
                }
            }
        });
        each_expr(&mut mutant.body, &mut |expr| {
            if let Some(changed) = self.changed(kernel, expr)
                && here(true)
            {
                *expr = changed;
            }
        });
        left.is_none().then_some(mutant)
    }

    fn fits_stmt(self, kernel: &Kernel, stmt: &Stmt) -> bool {
        let updates = |stmt: &Stmt| matches!(stmt, Stmt::Store { buffer, .. } if kernel[*buffer].space == Space::Global(Access::ReadWrite));
        match self {
            Fault::DroppedTail | Fault::DroppedHead | Fault::OneTooMany => matches!(stmt, Stmt::For { .. }),
            Fault::DroppedTurn => matches!(stmt, Stmt::Parallel { .. }),
            Fault::StaleSlot => updates(stmt),
            Fault::DroppedStore => matches!(stmt, Stmt::Store { .. }) && !updates(stmt),
            Fault::Race => {
                matches!(stmt, Stmt::Store { buffer, .. } if kernel[*buffer].space != Space::Local)
            }
            Fault::MissingBarrier => matches!(stmt, Stmt::Barrier),
            Fault::StaleAccumulator => match stmt {
                Stmt::For { body, .. } => body.iter().any(|s| matches!(s, Stmt::Reg { init: Some(_), .. })),
                _ => false,
            },
            Fault::UninitialisedLane => matches!(stmt, Stmt::Reg { init: Some(_), .. }),
            _ => false,
        }
    }

    fn change_stmt(self, block: &mut Vec<Stmt>, at: usize) {
        match (self, &mut block[at]) {
            (Fault::DroppedTail, Stmt::For { hi, step, .. }) => *hi = hi.clone() - *step,
            (Fault::OneTooMany, Stmt::For { hi, step, .. }) => *hi = hi.clone() + *step,
            (Fault::DroppedHead, Stmt::For { lo, step, .. }) => *lo = lo.clone() + *step,
            (Fault::DroppedTurn, Stmt::Parallel { count, .. }) => *count = count.clone() - 1i64,
            (Fault::Race, Stmt::Store { index, .. }) => index[0] = Expr::Int(0),
            (Fault::UninitialisedLane, Stmt::Reg { init, .. }) => *init = None,
            (Fault::StaleAccumulator, Stmt::For { body, .. }) => {
                let is_reg = |s: &Stmt| matches!(s, Stmt::Reg { init: Some(_), .. });
                let reg = body.remove(body.iter().position(is_reg).expect("fits_stmt saw it"));
                block.insert(at, reg);
            }
            _ => drop(block.remove(at)),
        }
    }

    /// What the fault makes of an expression; `None` where it has no place.
    fn changed(self, kernel: &Kernel, expr: &Expr) -> Option<Expr> {
        let ty = kernel.type_of(expr);
        let float = matches!(ty, Type::Vector { dtype: DType::F32, .. });
        let narrowed = |dtype: DType| expr.clone().cast(dtype).cast(DType::F32);
        let scaled = |by: f64| expr.clone() * Expr::f32(by, ty.lanes());
        let sums = matches!(expr, Expr::Fma(..) | Expr::DotBf16(..));
        match (self, expr) {
            (Fault::MaskByOne, Expr::Compare(op, a, b)) => {
                let beside = match op {
                    Compare::Lt => Compare::Le,
                    Compare::Le => Compare::Lt,
                    Compare::Gt => Compare::Ge,
                    Compare::Ge => Compare::Gt,
                    Compare::Eq | Compare::Ne => return None,
                };
                Some(Expr::Compare(beside, a.clone(), b.clone()))
            }
            (Fault::SwappedChoice, Expr::Select(c, a, b)) => {
                Some(Expr::Select(c.clone(), b.clone(), a.clone()))
            }
            (Fault::MissingScale, Expr::Arith(Arith::Mul, a, _)) if float => Some((**a).clone()),
            (Fault::WrongSign, Expr::Arith(Arith::Sub, a, b)) if float => {
                Some(Expr::Arith(Arith::Add, a.clone(), b.clone()))
            }
            (Fault::WrongPairing, Expr::Arith(Arith::Sub, a, b)) if float => {
                Some(Expr::Arith(Arith::Sub, b.clone(), a.clone()))
            }
            (Fault::SwappedAxes, Expr::Load { buffer, index, lanes }) if index.len() > 1 => {
                let mut index = index.clone();
                let last = index.len() - 1;
                index.swap(last - 1, last);
                Some(Expr::Load { buffer: *buffer, index, lanes: *lanes })
            }
            (Fault::LoadByOne, Expr::Load { buffer, index, lanes }) => {
                let mut index = index.clone();
                let last = index.pop()?;
                index.push(last + 1i64);
                Some(Expr::Load { buffer: *buffer, index, lanes: *lanes })
            }
            (Fault::SlotByOne, Expr::Index(_)) => Some(expr.clone() + 1i64),
            (Fault::DroppedFold, Expr::Reduce(Reduction::Sum, x)) => Some((**x).clone().lanes(0, 1)),
            (Fault::MaxForMin, Expr::Arith(Arith::Max, a, b)) => {
                Some(Expr::Arith(Arith::Min, a.clone(), b.clone()))
            }
            (Fault::MaxForMin, Expr::Arith(Arith::Min, a, b)) => {
                Some(Expr::Arith(Arith::Max, a.clone(), b.clone()))
            }
            // Half a unit below, rounded to nearest, is cut off.
            (Fault::TruncatedStore, Expr::Cast { value, dtype: DType::BF16 }) => {
                let value = (**value).clone();
                let lanes = kernel.type_of(&value).lanes();
                let is_f32 = matches!(kernel.type_of(&value), Type::Vector { dtype: DType::F32, .. });
                is_f32.then(|| (value * Expr::f32(1.0 - 1.0 / 512.0, lanes)).cast(DType::BF16))
            }
            // The next number below, in size.
            (Fault::TruncatedSum, _) if sums => Some(scaled(1.0 - f64::exp2(-24.0))),
            (Fault::NarrowSum, _) if sums => Some(narrowed(DType::BF16)),
            (Fault::F16Sum, _) if sums => Some(narrowed(DType::F16)),
            (Fault::CoarseFunction, Expr::Unary(..)) if float => Some(narrowed(DType::F16)),
            _ => None,
        }
    }
}

fn each_block(block: &mut Vec<Stmt>, see: &mut dyn FnMut(&mut Vec<Stmt>)) {
    see(block);
    for stmt in block {
        stmt.blocks_mut().into_iter().for_each(|inside| each_block(inside, see));
    }
}

/// Every expression of values; those that only say where a register is are constants and stay, and what is asked for early has
/// no value.
fn each_expr(block: &mut Vec<Stmt>, see: &mut dyn FnMut(&mut Expr)) {
    each_block(block, &mut |block| {
        for stmt in block {
            match stmt {
                Stmt::Set { value, .. } => within(value, see),
                Stmt::Prefetch { .. } => {}
                other => other.exprs_mut().into_iter().for_each(|e| within(e, see)),
            }
        }
    });
}

fn within(expr: &mut Expr, see: &mut dyn FnMut(&mut Expr)) {
    // Operands first: a change is not looked at again.
    if !matches!(expr, Expr::Reg { .. }) {
        expr.operands_mut().into_iter().for_each(|e| within(e, see));
    }
    see(expr);
}

/// What became of a mutant, the surest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fate {
    /// The kernel verifier refuses it.
    Verifier,
    /// The kernel interpreter: bounds, unwritten or undefined reads, races, elements never written, another pitch.
    Interpreter,
    /// An element beyond the hard bound.
    Hard,
    /// All elements within the hard bound, and the whole beyond the statistical one.
    Statistical,
    /// Other bits, and within both bounds.
    Within,
    /// The true kernel's bits: no fault.
    Same,
}

/// Places where a fault may stay within the bounds: softmax is the same for any number in the maximum's place.
const ANY_MAXIMUM: [(Fault, usize, &str); 6] = [
    (Fault::DroppedTail, 0, "softmax 33 f32"),
    (Fault::DroppedHead, 0, "softmax 33 f32"),
    (Fault::SwappedChoice, 0, "softmax 33 f32"),
    (Fault::MaxForMin, 0, "softmax 33 f32"),
    (Fault::MaxForMin, 1, "softmax 33 f32"),
    (Fault::StaleAccumulator, 1, "attention heads 3 of 3 d 18 bf16"),
];

/// A group of a case with all that its mutants are run on.
struct Patient {
    case: &'static str,
    lowered: Lowered,
    subject: Subject,
    group: GroupId,
    runs: Vec<Run>,
}

struct Run {
    symbols: [i64; MAX_SYMBOLS],
    tensors: Tensors,
    before: Vec<KBuffer>,
    true_after: Vec<KBuffer>,
    expected: Vec<Expected>,
}

/// Cases whose kernels get faults: each family, f32 and bf16, with tails.
const PATIENTS: [&str; 13] = [
    "gated n 17 k 33 f32",
    "norm before a product n 17 k 33 bf16",
    "linear n 17 k 33 f32",
    "linear n 576 k 192 f32",
    "linear one row n 33 k 17 bf16",
    "residual n 17 k 33 bf16",
    "attention heads 4 of 2 d 32 f32",
    "attention heads 3 of 3 d 18 bf16",
    "softmax 33 f32",
    "norm 33 bf16",
    "rows by index 17 bf16",
    "arithmetic 17 f32",
    "greedy choice 33",
];

pub fn kernels() -> Checked<()> {
    let level = codegen::cpu::level("cpu:x86-64-v4")?;
    let mut fates: BTreeMap<Fault, BTreeMap<Fate, usize>> = BTreeMap::new();
    let (mut within, mut sample) = (Vec::new(), Vec::new());
    let patients = patients(&level.target)?;
    for patient in &patients {
        let name = patient.case;
        for fault in Fault::ALL {
            let mut sampled = false;
            for place in 0.. {
                let Some(mutant) = fault.plant(&patient.lowered.kernel, place) else { break };
                let fate = patient.fate(&mutant);
                *fates.entry(fault).or_default().entry(fate).or_default() += 1;
                if fate == Fate::Within {
                    let what = format!("{fault:?} {place} of @{} of `{name}`", mutant.name);
                    if !fault.rounds() && !ANY_MAXIMUM.contains(&(fault, place, name)) {
                        return Err(format!("{what} is not caught\n{mutant}").into());
                    }
                    within.push(what);
                }
                // Code that strays from its memory would end the test.
                if matches!(fate, Fate::Hard | Fate::Statistical) && !std::mem::replace(&mut sampled, true) {
                    sample.push((fault, patient, mutant));
                }
            }
        }
    }
    for (fault, fates) in &fates {
        let counts: Vec<String> = fates.iter().map(|(fate, count)| format!("{fate:?} {count}")).collect();
        println!("fault {fault:?}: {}", counts.join(", "));
    }
    for one in &within {
        println!("within both bounds: {one}");
    }
    let count = |fault: Fault, fate: Fate| fates.get(&fault).and_then(|f| f.get(&fate)).copied().unwrap_or(0);
    for fault in Fault::ALL {
        let caught = [Fate::Verifier, Fate::Interpreter, Fate::Hard, Fate::Statistical];
        if caught.iter().all(|&fate| count(fault, fate) == 0) {
            return Err(format!("{fault:?} was never caught").into());
        }
    }
    // Without the statistical bound these would pass.
    if Fault::ALL.iter().all(|&fault| count(fault, Fate::Statistical) == 0) {
        return Err("no fault needs the statistical bound".into());
    }
    match levels()?.0.iter().any(|here| here.name() == level.name) {
        true => native(&level, &sample),
        false => {
            skip("faults in kernels as native code", &format!("this machine does not run {}", level.name));
            Ok(())
        }
    }
}

/// Runs mutants as code for this machine: what the numbers of the interpreter show, those of the code show too.
fn native(level: &Level, sample: &[(Fault, &Patient, Kernel)]) -> Checked<()> {
    let mutants: Vec<Kernel> = sample.iter().map(|(_, _, mutant)| mutant.clone()).collect();
    let mut device = Device::cpu(level, &mutants)?;
    let mut kinds = BTreeSet::new();
    for (number, (fault, patient, mutant)) in sample.iter().enumerate() {
        let Patient { subject, group, .. } = patient;
        let lowered = Lowered { kernel: mutant.clone(), ..patient.lowered.clone() };
        let mut wrong = |one: &Run| {
            let fed = (&one.symbols, &one.tensors);
            launch(subject, *group, (number, &lowered), &mut device, fed, &one.expected).is_err()
        };
        if !patient.runs.iter().any(&mut wrong) {
            return Err(format!("{fault:?} of @{} of `{}` is not caught", mutant.name, patient.case).into());
        }
        kinds.insert(fault);
    }
    println!("as native code: {} mutants of {} kinds, all caught", sample.len(), kinds.len());
    assert!(kinds.len() > Fault::ALL.len() / 2, "only {kinds:?} ran as native code");
    Ok(())
}

fn patients(target: &Target) -> Checked<Vec<Patient>> {
    let table = cases();
    let mut patients = Vec::new();
    for name in PATIENTS {
        let case = table.iter().find(|case| case.name == name).ok_or(format!("there is no case `{name}`"))?;
        patients.extend(of_case(name, case, target)?);
    }
    Ok(patients)
}

fn of_case(name: &'static str, case: &Case, target: &Target) -> Checked<Vec<Patient>> {
    let mut subject = Subject::new(case.graph.clone(), target);
    // Rows that fill no tile, and slots beside a tile's edge.
    let (tokens, past) = *case.steps.iter().find(|step| step.0 == 5).unwrap_or(&case.steps[0]);
    let mut patients = Vec::new();
    for group in subject.groups() {
        let schedule = subject.schedules(group, target)?.swap_remove(0);
        let lowered = subject.lower(group, &schedule, target)?;
        let mut runs = Vec::new();
        for distribution in [Distribution::Normal, Distribution::Cancelling, Distribution::Structured] {
            let feed = Feed { symbols: Case::symbols(tokens), past, distribution, seed: 1 };
            let tensors = subject.tensors(&feed)?;
            let held = subject.held(group, &lowered.args, &tensors);
            let bound = |((_, buffer), held): (_, &Option<Vec<f64>>)| match held {
                Some(data) => KBuffer::from_data(buffer, &feed.symbols, data),
                None => KBuffer::unwritten(buffer, &feed.symbols),
            };
            let before: Vec<KBuffer> = lowered.kernel.params().zip(&held).map(bound).collect();
            let mut true_after = before.clone();
            run(&lowered.kernel, &feed.symbols, &mut true_after, Options::default())?;
            let expected = subject.expected(group, &feed.symbols, &tensors)?;
            runs.push(Run { symbols: feed.symbols, tensors, before, true_after, expected });
        }
        patients.push(Patient { case: name, lowered, subject: subject.clone(), group, runs });
    }
    Ok(patients)
}

impl Patient {
    /// The surest of all runs.
    fn fate(&self, mutant: &Kernel) -> Fate {
        let fates = self.runs.iter().map(|one| self.fate_of(mutant, one));
        fates.min().expect("several runs")
    }

    fn fate_of(&self, mutant: &Kernel, one: &Run) -> Fate {
        let mut after = one.before.clone();
        if let Err(fault) = run(mutant, &one.symbols, &mut after, Options::default()) {
            return if matches!(fault.kind, FaultKind::Invalid(_)) {
                Fate::Verifier
            } else {
                Fate::Interpreter
            };
        }
        let data: Vec<Vec<f64>> = after.iter().map(KBuffer::data).collect();
        let results = self.subject.results(self.group, &self.lowered.args, &one.symbols, &data);
        let true_data: Vec<Vec<f64>> = one.true_after.iter().map(KBuffer::data).collect();
        let truth = self.subject.results(self.group, &self.lowered.args, &one.symbols, &true_data);
        if results.iter().zip(&truth).all(|(a, b)| a.1.same_bits(&b.1)) {
            return Fate::Same;
        }
        let judged = results.iter().zip(&one.expected).map(|((_, tensor), expected)| expected.check(tensor));
        let fate = |judged| match judged {
            Ok(_) => Fate::Within,
            Err(Mismatch::Spread { .. }) => Fate::Statistical,
            Err(Mismatch::Element { .. } | Mismatch::Type { .. }) => Fate::Hard,
        };
        judged.map(fate).min().expect("a group has a root")
    }
}
