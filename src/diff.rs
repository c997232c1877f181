//! What differs between two plans, kernel by kernel.
//!
//! A kernel of one plan is the other's kernel of the same name in the same step; numbers that names got only to be unique
//! (`q.1`) are left out. Steps are a decode step with the cache half full, a chunk's prefill, and of the other entry points,
//! at their largest, those kernels that no step before has.

use crate::predict::{self, Ceilings, KernelCost, Step};
use ir::families;
use ir::plan::Plan;
use serde::Serialize;

/// What became of a kernel from A to B.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// Only B has it.
    Added,
    /// Only A has it.
    Gone,
    /// Family, schedule, launches, bytes or FLOPs are others.
    Changed,
}

/// A kernel that is not the same in both plans.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct KernelDiff {
    /// The step's entry point.
    pub entry: String,
    /// The kernel, without a number.
    pub name: String,
    /// What became of it.
    pub change: Change,
    /// In A.
    pub a: Option<KernelCost>,
    /// In B.
    pub b: Option<KernelCost>,
    /// Does it add in another order, so that the bits of its results differ?
    pub other_bits: bool,
}

/// Kernels of two plans.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Kernels {
    /// How many are the same.
    pub same: usize,
    /// The others, in A's order, then those that only B has.
    pub differ: Vec<KernelDiff>,
}

/// Compares the kernels of two plans, each with the ceilings of its dtype.
pub fn kernels(a: (&Plan, Ceilings), b: (&Plan, Ceilings)) -> Kernels {
    let mut theirs = costs(b.0, b.1);
    let mut kernels = Kernels::default();
    let diff = |(entry, name, _): Key, change, a, b, other_bits| KernelDiff {
        entry,
        name,
        change,
        a,
        b,
        other_bits,
    };
    for (key, a) in costs(a.0, a.1) {
        let Some(at) = theirs.iter().position(|(k, _)| *k == key) else {
            kernels.differ.push(diff(key, Change::Gone, Some(a), None, false));
            continue;
        };
        let (_, b) = theirs.remove(at);
        let what = |c: &KernelCost| (c.family, c.schedule.clone(), c.launches, c.bytes, c.flops);
        if what(&a) == what(&b) {
            kernels.same += 1;
            continue;
        }
        let other_bits = numeric_class(&a) != numeric_class(&b);
        kernels.differ.push(diff(key, Change::Changed, Some(a), Some(b), other_bits));
    }
    kernels.differ.extend(theirs.into_iter().map(|(key, b)| diff(key, Change::Added, None, Some(b), false)));
    kernels
}

/// What decides the order of a kernel's sums: its family, and fields of its schedule. All of a schedule that this version
/// cannot read.
fn numeric_class(cost: &KernelCost) -> (&'static str, String) {
    let class = families::numeric_class(cost.family, &cost.schedule);
    (cost.family.name(), class.unwrap_or_else(|_| cost.schedule.clone()))
}

/// Entry point, name without a number, and which of that name it is there.
type Key = (String, String, usize);

fn costs(plan: &Plan, ceilings: Ceilings) -> Vec<(Key, KernelCost)> {
    let mut steps = predict::decode_and_prompt(plan);
    let told = steps.len();
    let at_largest =
        plan.entries.iter().map(|entry| Step { entry, tokens: entry.max()[0] as usize, past: 0 });
    steps.extend(at_largest);
    let mut costs: Vec<(Key, KernelCost)> = Vec::new();
    for (number, step) in steps.into_iter().enumerate() {
        for cost in predict::kernels(plan, [step], ceilings) {
            let name = base(&cost.name).to_string();
            if number >= told && costs.iter().any(|(_, known)| known.name == cost.name) {
                continue;
            }
            let before = costs.iter().filter(|((e, n, _), _)| *e == cost.entry && *n == name).count();
            costs.push(((cost.entry.clone(), name, before), cost));
        }
    }
    costs
}

/// A kernel's name without the number that made it unique.
fn base(name: &str) -> &str {
    match name.rsplit_once('.') {
        Some((base, number)) if !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()) => base,
        _ => name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::{Request, lower};
    use ir::DType;
    use ir::target::Target;

    const CEILINGS: Ceilings = Ceilings { read_bytes_per_s: 1e10, dot_flops: 1e11 };

    fn plan(dtype: DType) -> Plan {
        let config = models::preset("smollm2-135m").unwrap();
        let request = Request { config: &config, dtype, context: 1024, measured: None };
        let target = Target::cpu("cpu:x86-64-v4", 32, 64);
        lower(&request, &target).unwrap().plan
    }

    #[test]
    fn a_plan_does_not_differ_from_itself() {
        let plan = plan(DType::BF16);
        let found = kernels((&plan, CEILINGS), (&plan, CEILINGS));
        assert_eq!((found.same, found.differ), (plan.kernels.len(), vec![]));
    }

    #[test]
    fn each_change_is_found() {
        let a = plan(DType::BF16);
        let mut b = a.clone();
        let number = |name: &str| a.kernels.iter().position(|k| k.name == name).unwrap();
        for (name, from, to) in [("a", "keys 64", "keys 128"), ("down", "prefetch 0", "prefetch 1")] {
            let schedule = &mut b.kernels[number(name)].schedule;
            *schedule = schedule.replace(from, to);
        }
        b.kernels[number("token")].name = "other".into();
        let found = kernels((&a, CEILINGS), (&b, CEILINGS));
        let seen: Vec<_> =
            found.differ.iter().map(|d| (&*d.entry, &*d.name, d.change, d.other_bits)).collect();
        let expected = [
            ("decode", "a", Change::Changed, true),
            ("decode", "down", Change::Changed, false),
            ("decode", "token", Change::Gone, false),
            ("decode", "other", Change::Added, false),
        ];
        assert_eq!(seen, expected);
        assert_eq!(found.same, a.kernels.len() - 3);
    }

    #[test]
    fn another_dtype_changes_bytes() {
        let (a, b) = (plan(DType::BF16), plan(DType::F32));
        let found = kernels((&a, CEILINGS), (&b, CEILINGS));
        let gate = found.differ.iter().find(|d| d.name == "gate" && d.entry == "decode").unwrap();
        let bytes = |cost: &Option<KernelCost>| cost.as_ref().unwrap().bytes;
        assert!(bytes(&gate.b) > 2 * bytes(&gate.a) * 9 / 10 && gate.change == Change::Changed);
    }
}
