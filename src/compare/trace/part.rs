//! Where two traces of the same tokens part.
//!
//! Values are compared by their names: programs that fuse otherwise are compared where both store.
//!
//! * Programs of one [arithmetic](super::arithmetic) and one llamac, whose kernels are of one numeric class, must give the
//!   same bits, up to the first value for which that does not hold.
//! * Else a value may be as far apart as on two devices ([`StoredBound`]). A greedy choice may differ at a near tie.

use super::{LOGITS, Trace, TraceError, TracedLaunch, TracedStep, TracedValue, in_use, steps};
use crate::compare::{Fault, Seen, layer_of};
use crate::judge::{self, Greedy, ReferenceStep, StoredBound};
use ir::DType;
use ir::families::numeric_class;
use ir::graph::Family;
use ir::interp::Tensor;
use ir::plan::PlanKernel;
use runtime::device::{DeviceError, Program, Want};
use runtime::interpreter::InterpretedProgram;
use std::collections::HashMap;

/// What came of comparing two traces.
#[derive(Clone, Debug, Default)]
pub struct Parting {
    /// Values that both have.
    pub values: usize,
    /// Those whose bits are equal.
    pub equal: usize,
    /// Values that one of both has alone.
    pub single: usize,
    /// Values whose bits differ and of which the oracle knows nothing.
    pub unjudged: usize,
    /// Greedy choices that differ where errors may decide.
    pub near_ties: usize,
    /// The largest share of a bound.
    pub worst: f64,
    /// The first value whose bits differ.
    pub bits: Option<Parted>,
    /// The first that is wrong: further apart than two devices may be, or of other bits where they must be the same.
    pub wrong: Option<Parted>,
}

/// A value in which two traces differ.
#[derive(Clone, Debug, PartialEq)]
pub struct Parted {
    /// The group in the first.
    pub group: String,
    /// Entry point, tokens, and positions before.
    pub step: (String, usize, usize),
    /// The value.
    pub value: String,
    /// The kernels that stored it.
    pub kernels: [PlanKernel; 2],
    /// The element that differs most, if one of those that both traces keep does.
    pub element: Option<Element>,
    /// What is wrong with it.
    pub why: String,
}

/// An element in two traces.
#[derive(Clone, Debug, PartialEq)]
pub struct Element {
    /// Where.
    pub index: Vec<usize>,
    /// What it is in each.
    pub found: [f64; 2],
}

impl Parted {
    /// As any fault: what the first trace has is judged by the second.
    pub fn fault(&self) -> Fault {
        let (layer, op) = layer_of(&self.group);
        let (op, kernel) = (Some(op.to_string()), &self.kernels[0]);
        let (kernel, schedule) = (Some(kernel.name.clone()), Some(kernel.schedule.clone()));
        let (index, found, expected) = match &self.element {
            Some(Element { index, found: [a, b] }) => (index.clone(), Seen::Number(*a), Seen::Number(*b)),
            None => (Vec::new(), Seen::Text("other bits".to_string()), Seen::Text("the same".to_string())),
        };
        Fault { layer, op, kernel, schedule, index, found, expected, what: self.what() }
    }

    fn what(&self) -> String {
        let (entry, tokens, past) = &self.step;
        let [a, b] = &self.kernels;
        let beside = match a == b {
            true => String::new(),
            false => format!(", beside kernel @{}, schedule \"{}\"", b.name, b.schedule),
        };
        format!("%{} in @{entry}, T = {tokens}, P = {past}{beside}: {}", self.value, self.why)
    }
}

/// How far apart a value of a step may be, by what was wanted of the step and the value's name.
pub type Bounds<'b> = &'b mut dyn FnMut(Want, &str) -> Result<Option<StoredBound>, DeviceError>;

/// Compares two traces in the order of the first. `bounds` is asked where bits differ, and says `None` of a value that the
/// oracle does not have: what reads it is judged.
///
/// # Errors
///
/// [`TraceError::Apart`]; what `bounds` says.
pub fn part(a: &Trace, b: &Trace, bounds: Bounds<'_>) -> Result<Parting, TraceError> {
    if a.tokens != b.tokens {
        return apart("tokens", format!("{:?}", a.tokens), format!("{:?}", b.tokens));
    }
    let same_code = a.arithmetic == b.arithmetic && a.compiler == b.compiler && a.dtype == b.dtype;
    let mut parting = Parting::default();
    for step in &a.steps {
        // A trace of logits alone has one step.
        let like = |other: &&TracedStep| {
            (other.want, other.tokens, other.past) == (step.want, step.tokens, step.past)
        };
        let Some(other_step) = b.steps.iter().find(like) else { continue };
        let launches = other_step.launches.iter();
        let mut theirs: HashMap<&str, (&TracedLaunch, &TracedValue)> =
            launches.flat_map(|l| l.values.iter().map(move |v| (v.name.as_str(), (l, v)))).collect();
        for (launch, value) in step.launches.iter().flat_map(|l| l.values.iter().map(move |v| (l, v))) {
            let Some((other_launch, other)) = theirs.remove(value.name.as_str()) else {
                parting.single += 1;
                continue;
            };
            if value.shape != other.shape {
                let shape = |v: &TracedValue| format!("%{} {:?}", v.name, v.shape);
                return apart("shapes", shape(value), shape(other));
            }
            parting.values += 1;
            if value.dtype == other.dtype && value.digest == other.digest {
                parting.equal += 1;
                continue;
            }
            let kernels = [&a.kernels[launch.kernel], &b.kernels[other_launch.kernel]];
            let same_bits = same_code && parting.bits.is_none() && class(kernels[0]) == class(kernels[1]);
            let (differences, element) = differences(value, other);
            let mut parted = Parted {
                group: launch.group.clone(),
                step: (step.entry.clone(), step.tokens, step.past),
                value: value.name.clone(),
                kernels: kernels.map(Clone::clone),
                element,
                why: match value.dtype == other.dtype {
                    true => "other bits".to_string(),
                    false => format!("{} beside {}", value.dtype, other.dtype),
                },
            };
            parting.bits.get_or_insert_with(|| parted.clone());
            let why = if same_bits {
                Some("other bits, for which no schedule or instruction is a reason".to_string())
            } else if value.dtype.is_float() {
                let whole = differences.len() == value.shape.iter().product::<usize>();
                let bound = bounds(step.want, &value.name)?;
                parting.unjudged += usize::from(bound.is_none());
                let share = bound.map_or(0.0, |bound| bound.share(&differences, whole));
                parting.worst = parting.worst.max(share);
                // What is no number on one side is beyond every bound.
                let wrong = share > 1.0 || differences.contains(&f64::INFINITY);
                wrong.then(|| format!("{share:.2} of how far apart two devices may be"))
            } else {
                let near =
                    near_tie(step, value, other, bounds(step.want, LOGITS)?.map(|bound| bound.element()));
                parting.near_ties += usize::from(near);
                (!near).then(|| "another choice, where errors do not decide".to_string())
            };
            if let (Some(why), None) = (why, &parting.wrong) {
                parted.why = why;
                parting.wrong = Some(parted);
            }
        }
        parting.single += theirs.len();
    }
    match parting.values {
        0 => apart("values", format!("none of {}", b.model), format!("none of {}", a.model)),
        _ => Ok(parting),
    }
}

fn apart<T>(what: &'static str, a: String, b: String) -> Result<T, TraceError> {
    Err(TraceError::Apart { what, a, b })
}

/// The part of a kernel that decides the order of its sums. What this llamac cannot read is a class of its own.
fn class(kernel: &PlanKernel) -> (Family, String) {
    let class = numeric_class(kernel.family, &kernel.schedule);
    (kernel.family, class.unwrap_or_else(|_| kernel.schedule.clone()))
}

/// The differences of the elements that both traces keep, and the element that differs most, if one does.
fn differences(a: &TracedValue, b: &TracedValue) -> (Vec<f64>, Option<Element>) {
    let (mut differences, mut largest, mut element) = (Vec::new(), 0.0, None);
    for &(at, x) in &a.samples {
        let Some(y) = b.at(at) else { continue };
        let difference = match x == y || x.is_nan() && y.is_nan() {
            true => 0.0,
            false if (x - y).is_nan() => f64::INFINITY,
            false => (x - y).abs(),
        };
        differences.push(difference);
        if difference > largest {
            let index = judge::index_of(at, &a.shape);
            (largest, element) = (difference, Some(Element { index, found: [x, y] }));
        }
    }
    (differences, element)
}

/// Two greedy choices, of which the first's logits say that errors of `bound` may decide.
fn near_tie(step: &TracedStep, ours: &TracedValue, theirs: &TracedValue, bound: Option<f64>) -> bool {
    let logits = step.launches.iter().flat_map(|l| &l.values).find(|value| value.name == LOGITS);
    let (Some(logits), Some(bound)) = (logits, bound) else { return false };
    let ([(_, token)], [(_, second)]) = (&ours.samples[..], &theirs.samples[..]) else { return false };
    let vocab = logits.shape.last().copied().unwrap_or(0);
    let row = logits.shape.iter().product::<usize>() - vocab;
    let logit = |token: f64| if 0.0 <= token { logits.at(row.checked_add(token as usize)?) } else { None };
    let (Some(best), Some(other)) = (logit(*token), logit(*second)) else { return false };
    let (token, second) = (*token as i32, *second as i32);
    judge::greedy(ReferenceStep { token, second, margin: best - other }, second, bound) == Greedy::NearTie
}

/// What the interpreters say of each value: how far apart two devices may be in it.
pub struct Oracle {
    /// By what was wanted of the step; values by name.
    steps: Vec<(Want, HashMap<String, StoredBound>)>,
}

impl Oracle {
    /// Runs the tokens of a trace by `exact`, which rounds nothing, and by `stored`, which rounds what it stores as programs
    /// of `dtype` do, on the same weights.
    ///
    /// # Errors
    ///
    /// What an interpreter says.
    pub fn of(
        trace: &Trace,
        exact: &mut InterpretedProgram,
        (stored, dtype): (&mut InterpretedProgram, DType),
    ) -> Result<Oracle, DeviceError> {
        let (exact, mut stored) = (values(trace, exact)?, values(trace, stored)?);
        let steps = exact.into_iter().zip(&mut stored).map(|((want, exact), (_, stored))| {
            let bound = |(name, exact): (String, Vec<f64>)| {
                let stored = stored.remove(&name).filter(|stored| stored.len() == exact.len())?;
                Some((name, StoredBound::new(dtype, &exact, &stored)))
            };
            (want, exact.into_iter().filter_map(bound).collect())
        });
        Ok(Oracle { steps: steps.collect() })
    }

    /// How far apart two devices may be in a value.
    pub fn bound(&self, want: Want, value: &str) -> Option<StoredBound> {
        let step = self.steps.iter().find(|step| step.0 == want);
        step.and_then(|(_, values)| values.get(value)).copied()
    }
}

/// Values of a step, by name.
type Values = HashMap<String, Vec<f64>>;

/// The values of a trace as an interpreter computes them.
fn values(trace: &Trace, program: &mut InterpretedProgram) -> Result<Vec<(Want, Values)>, DeviceError> {
    let mut all = Vec::new();
    let mut state = program.state()?;
    for step in steps(&trace.tokens, program) {
        if step.want != Want::Token {
            state = program.state()?;
        }
        let traced = trace.steps.iter().find(|traced| traced.want == step.want);
        let traced = traced.into_iter().flat_map(|step| &step.launches).flat_map(|launch| &launch.values);
        let shapes: HashMap<&str, &[usize]> =
            traced.map(|value| (value.name.as_str(), &value.shape[..])).collect();
        let slots = state.past() + step.tokens.len();
        let mut values = Values::new();
        let mut keep = |name: &str, tensor: &Tensor| {
            if let Some(&shape) = shapes.get(name) {
                // Of a cache the trace has the slots in use.
                let found = in_use(tensor.clone(), shape != &tensor.shape[..], slots);
                values.insert(name.to_string(), found.data);
            }
        };
        program.run_seen(&step, &mut state, &mut keep)?;
        all.push((step.want, values));
    }
    Ok(all)
}
