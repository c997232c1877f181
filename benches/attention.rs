//! Causal attention beside the same attention without the mask: masked tiles are neither loaded nor computed, so half of
//! the work and some diagonal tiles are left.
//!
//! `cargo bench --bench attention -- [tokens] [heads] [kv heads] [head dim]`

use ir::families::{self, GroupView};
use ir::passes::{PASSES, Run};
use llamac::measure::alone::Alone;
use runtime::meter::{self, Dot, Meter};

/// Turns of causal and full attention, of which the median counts.
const TURNS: usize = 9;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let numbers = std::env::args().skip(1).filter_map(|a| a.parse().ok());
    let numbers: Vec<usize> = numbers.collect();
    let number = |at: usize, default| numbers.get(at).copied().unwrap_or(default);
    let (tokens, heads, kv_heads, d) = (number(0, 2048), number(1, 32), number(2, 4), number(3, 64));
    let threads = runtime::pool::physical_cores();
    let level = codegen::cpu::level("cpu:native")?;
    println!(
        "attention of {tokens} tokens, {heads} heads, {kv_heads} of keys and values, head dim {d}, {threads} threads"
    );
    for (dtype, dot) in [("bf16", Dot::Bf16), ("f32", Dot::F32)] {
        let attention = |causal: bool| -> Result<Alone, Box<dyn std::error::Error>> {
            let slots = tokens.next_multiple_of(families::attention::KEYS);
            let (q, kv) = (format!("{dtype}[T, {heads}, {d}]"), format!("{dtype}[{kv_heads}, {slots}, {d}]"));
            let new = format!("{dtype}[T, {kv_heads}, {d}]");
            let mut graph = ir::parse::graph(&format!(
                "graph @attention(T in 1..{tokens}) {{
                   %q = input \"q\" : {q}
                   %n = input \"n\" : {new}
                   %pos = input \"positions\" : i32[T]
                   %k = state \"k\" : {kv}
                   %v = state \"v\" : {kv}
                   %kc = cache_append %k, %n, %pos : {kv}
                   %vc = cache_append %v, %n, %pos : {kv}
                   %a = attention %q, %kc, %vc, %pos {{ causal = {causal}, scale = 0.125 }} : {q}
                   output \"a\" = %a : {q}
                   output \"k\" = %kc : {kv}
                   output \"v\" = %vc : {kv}
                 }}"
            ))
            .map_err(|e| e.to_string())?;
            for pass in PASSES {
                if let Run::Graph(run) = pass.run {
                    run(&mut graph, &level.target)?;
                }
            }
            let views = GroupView::all(&graph);
            let view =
                views.iter().find(|v| v.family() == ir::graph::Family::Attention).ok_or("no attention")?;
            let lowered = families::lower(view, &level.target)?;
            Ok(Alone::new(view, &lowered, &level, threads, [tokens, 0], true)?)
        };
        let (mut causal, mut full) = (attention(true)?, attention(false)?);
        let mut meter = Meter::new(threads);
        let (mut ratios, mut shares) = (Vec::new(), Vec::new());
        for _ in 0..TURNS {
            let peak = meter::median(&meter.dot(dot, 0.05));
            let (with, without) = (meter::median(&causal.times(0.1)), meter::median(&full.times(0.1)));
            ratios.push(with / without);
            shares.push(
                [&causal, &full]
                    .map(|a| a.cost.flops as f64)
                    .iter()
                    .zip([with, without])
                    .map(|(f, s)| f / s / peak)
                    .collect::<Vec<f64>>(),
            );
        }
        let share = |at: usize| 100.0 * meter::median(&shares.iter().map(|s| s[at]).collect::<Vec<f64>>());
        println!(
            "{dtype:4}  causal / full: {:.3} of the time, {:.3} of the work; {:.1} % and {:.1} % of the dot peak",
            meter::median(&ratios),
            causal.cost.flops as f64 / full.cost.flops as f64,
            share(0),
            share(1),
        );
    }
    Ok(())
}
