//! Speed as plan and ceilings give it: each launch takes as long as its bytes or its FLOPs do, whichever is longer
//! (Williams, Waterman and Patterson 2009, *Roofline*). Nothing runs faster; how much slower it runs, `bench` says.

use ir::families::attention::KEYS;
use ir::graph::Family;
use ir::plan::{Cost, Entry, Give, Launch, Place, Plan};
use serde::{Serialize, Serializer};

/// What a machine can do at most.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Ceilings {
    /// Bytes that it can read in a second.
    pub read_bytes_per_s: f64,
    /// FLOPs of dot products in a second.
    pub dot_flops: f64,
}

/// A step: which entry point, how many tokens, and how many are in the cache before.
#[derive(Clone, Copy, Debug)]
pub struct Step<'p> {
    /// The entry point.
    pub entry: &'p Entry,
    /// Tokens.
    pub tokens: usize,
    /// Positions in the cache.
    pub past: usize,
}

impl Ceilings {
    /// Seconds that work takes at least.
    pub fn seconds(&self, cost: Cost) -> f64 {
        (cost.bytes as f64 / self.read_bytes_per_s).max(cost.flops as f64 / self.dot_flops)
    }

    /// Seconds that a step takes at least.
    pub fn step_seconds(&self, plan: &Plan, step: &Step<'_>) -> f64 {
        step.entry.launches.iter().map(|launch| self.seconds(launch_cost(plan, step, launch))).sum()
    }
}

/// The decode step with `past` positions in the cache.
pub fn decode(plan: &Plan, past: usize) -> Option<Step<'_>> {
    Some(Step { entry: plan.decode()?, tokens: 1, past })
}

/// The steps of a prompt into an empty cache, as `runtime::device::feed` takes them.
pub fn prompt(plan: &Plan, tokens: usize) -> Vec<Step<'_>> {
    let (most, most_last) = (plan.max_tokens(Give::Nothing), plan.max_tokens(Give::Last));
    let (before, most) = if most == 0 { (Give::Last, most_last) } else { (Give::Nothing, most) };
    let mut steps = Vec::new();
    let mut past = 0;
    while past < tokens && most > 0 {
        let rest = tokens - past;
        let (give, n) = if rest <= most_last { (Give::Last, rest) } else { (before, most.min(rest - 1)) };
        let Some(number) = plan.entry_number(n, give) else { break };
        steps.push(Step { entry: &plan.entries[number], tokens: n, past });
        past += n;
    }
    steps
}

/// What a plan is told by: a decode step with the cache half full, and the longest prompt that is one step. A prompt of one
/// token is a decode step, which then stands for both.
pub fn decode_and_prompt(plan: &Plan) -> Vec<Step<'_>> {
    let mut steps: Vec<Step<'_>> = decode(plan, plan.context / 2).into_iter().collect();
    for step in prompt(plan, plan.max_tokens(Give::Last)) {
        if steps.iter().all(|known| known.entry.name != step.entry.name) {
            steps.push(step);
        }
    }
    steps
}

/// Work of a step.
pub fn step_cost(plan: &Plan, step: &Step<'_>) -> Cost {
    let mut sum = Cost::default();
    step.entry.launches.iter().for_each(|launch| sum += launch_cost(plan, step, launch));
    sum
}

/// What a kernel costs in a step, over all its launches there.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct KernelCost {
    /// The kernel.
    pub name: String,
    /// The step's entry point.
    pub entry: String,
    /// The kernel's family.
    #[serde(serialize_with = "family_name")]
    pub family: Family,
    /// Text of its schedule.
    pub schedule: String,
    /// How often it is launched.
    pub launches: usize,
    /// Bytes that it moves.
    pub bytes: u64,
    /// FLOPs that it does.
    pub flops: u64,
    /// Seconds that this takes at least.
    pub seconds: f64,
    /// How the schedule was chosen: `measured` or `predicted`.
    pub source: &'static str,
}

fn family_name<S: Serializer>(family: &Family, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(family.name())
}

/// What each kernel costs in each of the steps, in the order of first use.
pub fn kernels<'p>(
    plan: &Plan,
    steps: impl IntoIterator<Item = Step<'p>>,
    ceilings: Ceilings,
) -> Vec<KernelCost> {
    let mut costs: Vec<KernelCost> = Vec::new();
    for step in steps {
        for launch in &step.entry.launches {
            let Cost { flops, bytes } = launch_cost(plan, &step, launch);
            let seconds = ceilings.seconds(Cost { flops, bytes });
            let kernel = &plan.kernels[launch.kernel];
            match costs.iter_mut().find(|cost| cost.name == kernel.name && cost.entry == step.entry.name) {
                Some(cost) => {
                    cost.launches += 1;
                    cost.bytes += bytes;
                    cost.flops += flops;
                    cost.seconds += seconds;
                }
                None => costs.push(KernelCost {
                    name: kernel.name.clone(),
                    entry: step.entry.name.clone(),
                    family: kernel.family,
                    schedule: kernel.schedule.clone(),
                    launches: 1,
                    bytes,
                    flops,
                    seconds,
                    source: kernel.source(),
                }),
            }
        }
    }
    costs
}

/// Work of a launch in a step. The plan has it for the largest step with the cache half full: weights are read once
/// whatever the step, attention goes with the keys that it visits, all else with the tokens.
pub fn launch_cost(plan: &Plan, step: &Step<'_>, launch: &Launch) -> Cost {
    let max = step.entry.max();
    let (most, half) = (max[0].max(1) as usize, (max[1].max(0) as usize).div_ceil(2));
    let Cost { flops, bytes } = launch.cost;
    let scale = |count: u64, part: f64| (count as f64 * part) as u64;
    let rows = step.tokens as f64 / most as f64;
    let sum_of = |keep: fn(&Place) -> bool| {
        let args = launch.args.iter().map(|&arg| &plan.buffers[arg]);
        args.filter(|b| keep(&b.place)).map(|b| b.bytes as u64).fold(0, u64::saturating_add)
    };
    match plan.kernels[launch.kernel].family {
        Family::Attention => {
            let cache = sum_of(|place| *place == Place::State);
            let of_cache = |tokens: usize, past: usize| {
                let slots = (past + tokens).next_multiple_of(KEYS).min(plan.context);
                scale(cache, slots as f64 / plan.context.max(1) as f64)
            };
            let other = bytes.saturating_sub(of_cache(most, half));
            Cost {
                flops: scale(flops, visited(step.tokens, step.past) / visited(most, half)),
                bytes: of_cache(step.tokens, step.past) + scale(other, rows),
            }
        }
        Family::Dot | Family::Rowwise | Family::Elementwise | Family::Sample => {
            let weights = sum_of(|place| matches!(place, Place::Weight { .. })).min(bytes);
            Cost { flops: scale(flops, rows), bytes: weights + scale(bytes - weights, rows) }
        }
        // Rows picked from a weight.
        Family::Gather => Cost { flops: scale(flops, rows), bytes: scale(bytes, rows) },
    }
}

/// Keys that causal attention visits: whole tiles up to each row's position.
fn visited(tokens: usize, past: usize) -> f64 {
    (past..past + tokens).map(|position| ((position / KEYS + 1) * KEYS) as f64).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::{CHUNK, Request, lower};
    use ir::DType;
    use ir::target::Target;

    fn plan() -> Plan {
        let config = models::preset("smollm2-135m").unwrap();
        let request = Request { config: &config, dtype: DType::BF16, context: 1024, measured: None };
        let target = Target::cpu("cpu:x86-64-v4", 32, 64);
        lower(&request, &target).unwrap().plan
    }

    #[test]
    fn prompts_are_cut_as_feed_cuts_them() {
        let plan = plan();
        let cut = |tokens| {
            let steps = prompt(&plan, tokens);
            steps.iter().map(|s| (s.entry.give, s.tokens, s.past)).collect::<Vec<_>>()
        };
        assert_eq!(cut(1), [(Give::Last, 1, 0)]);
        assert_eq!(cut(CHUNK), [(Give::Last, CHUNK, 0)]);
        assert_eq!(cut(CHUNK + 3), [(Give::Nothing, CHUNK, 0), (Give::Last, 3, CHUNK)]);
    }

    #[test]
    fn the_plans_own_step_costs_what_the_plan_says() {
        let plan = plan();
        for entry in &plan.entries {
            let step = Step { entry, tokens: entry.max()[0] as usize, past: 512 };
            let (found, expected) = (step_cost(&plan, &step), entry.cost());
            assert_eq!(found.flops, expected.flops, "{}", entry.name);
            assert!(
                found.bytes.abs_diff(expected.bytes) <= 8 * entry.launches.len() as u64,
                "{}",
                entry.name
            );
        }
        let (short, long) = (decode(&plan, 64).unwrap(), decode(&plan, 1000).unwrap());
        let (short, long) = (step_cost(&plan, &short), step_cost(&plan, &long));
        assert!(short.bytes < long.bytes && short.flops < long.flops);
    }
}
