//! `profile --static`: what is argued of a GPU from machine code.

use super::super::error::CliError;
use super::super::plan::Lowering;
use super::super::screen::{Screen, bandwidth, big, bytes, columns, flops, print, print_json, short};
use super::{Options, counted, percent, time};
use codegen::Backend;
use codegen::nvptx::{ARCHITECTURES, Architecture};
use ir::plan::Give;
use llamac::compile::{CompileError, architecture_for, lower};
use llamac::model::{Model, name_of};
use llamac::profile::gpus::{GPUS, Gpu};
use llamac::profile::machine_code::{self, Argued, KernelLoop, KernelTime, Phase, Stated, own_gpu};
use llamac::profile::recorded::{self, Figure};
use runtime::device::DeviceError;
use serde_json::json;

pub fn argue(options: &Options, screen: &Screen) -> Result<(), CliError> {
    // Without a target, the code that the GPU takes first.
    let best = |gpu: &Gpu| architecture_for(gpu.capability, gpu.cta_shared_bytes()).map(|a| a.name);
    let of_gpu = options.gpu.as_deref().and_then(Gpu::of).and_then(best).unwrap_or(ARCHITECTURES[0].name);
    let target = options.target.as_deref().unwrap_or(of_gpu);
    let Backend::Cuda(architecture) = Backend::of(target).map_err(CompileError::from)? else {
        return Err(CliError::Usage(format!(
            "--static is for GPUs: found --target {target}, expected {}",
            names()
        )));
    };
    let gpu = gpu(options, architecture)?;
    let model = Model::open(&options.model)?;
    let lowering = Lowering::of(&model, &options.build, Some(target), screen)?;
    let code = lower(&lowering.request(), target, false)?;
    let plan = &code.lowered.plan;
    let prompt = options.prompt.unwrap_or(plan.max_tokens(Give::Last).min(plan.context - 1).max(1));
    if prompt >= plan.context {
        return Err(DeviceError::ContextFull { past: prompt, tokens: 1, context: plan.context }.into());
    }
    let figures = recorded::parse(recorded::RECORDED).expect("a test reads them");
    let argued = machine_code::argue(&code, architecture, gpu, prompt, &figures)?;
    for unknown in argued.loops.iter().flat_map(|l| &l.steady.unknown) {
        screen.note(format!("{unknown}: not known which unit it takes; it counts as issued alone"));
    }
    let title = format!(
        "{} for {target}, {}, context {}, on {}",
        name_of(&options.model),
        lowering.dtype,
        lowering.context,
        gpu.product
    );
    if screen.json {
        return print_json(&json!({
            "model": name_of(&options.model),
            "target": target,
            "dtype": lowering.dtype.name(),
            "context": lowering.context,
            "source": "predicted",
            "argued": argued,
        }));
    }
    print(&format!("{title}\n{}\n\n{}", source(&argued, gpu), told(&argued)))
}

fn names() -> String {
    ARCHITECTURES.iter().map(|a| a.name).collect::<Vec<_>>().join(", ")
}

fn gpu(options: &Options, architecture: &Architecture) -> Result<&'static Gpu, CliError> {
    let named = options.gpu.as_deref().map(|name| {
        let known = || GPUS.iter().map(|gpu| gpu.name).collect::<Vec<_>>().join(", ");
        Gpu::of(name).ok_or_else(|| CliError::Usage(format!("--gpu: found {name}, expected {}", known())))
    });
    match named {
        Some(gpu) => gpu,
        None => Ok(own_gpu(architecture).expect("a GPU for every architecture")),
    }
}

/// Where the figures are from.
fn source(argued: &Argued, gpu: &Gpu) -> String {
    let recorded =
        argued.loops.iter().filter_map(|l| l.stated.as_ref()).map(|s| s.recorded.len()).sum::<usize>();
    let recorded = match recorded {
        0 => format!("no figure of an {} was recorded yet", gpu.name.to_uppercase()),
        _ => "measured stand beside them".to_string(),
    };
    format!("Predictions from machine code for {} by ptxas {}; {recorded}.", argued.sm, argued.ptxas)
}

fn told(argued: &Argued) -> String {
    let mut text = String::new();
    if !argued.loops.is_empty() {
        let rows: Vec<_> = argued.loops.iter().map(looped).collect();
        text += &format!(
            "steady loops of tensor cores: cycles of an SM a trip, by unit; shares of the peak\n\n{}\n{LEGEND}\n",
            columns(&LOOP_HEADS, &rows)
        );
    }
    text + &phase("decode", &argued.decode) + "\n" + &phase("prefill", &argued.prefill)
}

const LOOP_HEADS: [&str; 14] = [
    "kernel",
    "T>",
    "X>",
    "F>",
    "A>",
    "I>",
    "S>",
    "conflicts>",
    "serial>",
    "overlapped>",
    "CTAs>",
    "problem",
    "tiles>",
    "TFLOP/s",
];

const LEGEND: &str = "\
T tensor cores, X exp2 and the like, F f32, A integers and conversions, I issue, S shared memory with its conflicts.
serial: T waits for the longest of X F A I. overlapped: nothing waits. CTAs: held by an SM. problem: the same tiles on causal
attention of 16k tokens, heads * width = 2048, or a product of 8192^3; tiles: its FLOPs a FLOP that SMs could do meanwhile.
";

fn looped(kernel: &KernelLoop) -> Vec<String> {
    let KernelLoop { name, steady: s, serial, overlapped, resident_ctas, stated, .. } = kernel;
    let cycles = |cycles: f64| format!("{cycles:.0}");
    let mut row = vec![name.clone()];
    row.extend([s.tensor, s.special, s.float, s.integer, s.issue, s.shared].map(cycles));
    row.extend([format!("{:.2}", s.conflicts), format!("{serial:.2}"), format!("{overlapped:.2}")]);
    row.push(resident_ctas.to_string());
    let Some(Stated { problem, tile_efficiency, tflops, recorded }) = stated else { return row };
    let [low, high] = tflops.map(short);
    let measured = |figure: &Figure| format!("; measured {} ({})", short(figure.tflops), figure.date);
    let measured: String = recorded.iter().map(measured).collect();
    row.extend([problem.clone(), format!("{tile_efficiency:.2}"), format!("{low} to {high}{measured}")]);
    row
}

const PHASE_HEADS: [&str; 9] =
    ["kernel", "family", "launches>", "bytes>", "FLOPs>", "tiles>", "limit", "time", "share>"];

fn phase(name: &str, phase: &Phase) -> String {
    let Phase { tokens, past, least_s, most_s, kernels } = phase;
    let row = |kernel: &KernelTime| {
        vec![
            kernel.name.clone(),
            kernel.family.name().to_string(),
            kernel.launches.to_string(),
            bytes(kernel.bytes),
            big(kernel.flops as f64).trim_end().to_string(),
            kernel.tile_efficiency.map_or(String::new(), |tiles| format!("{tiles:.2}")),
            kernel.limit.name().to_string(),
            range(kernel.least_s, kernel.most_s),
            percent(kernel.most_s / most_s),
        ]
    };
    let rows: Vec<_> = kernels.iter().map(row).collect();
    let moved: u64 = kernels.iter().map(|kernel| kernel.bytes).sum();
    let done: u64 = kernels.iter().map(|kernel| kernel.flops).sum();
    let speed = |seconds: &f64| short(*tokens as f64 / seconds);
    let speeds = match speed(most_s) == speed(least_s) {
        true => speed(least_s),
        false => format!("{} to {}", speed(most_s), speed(least_s)),
    };
    format!(
        "{name}, {} after {past}: {}, {speeds} tok/s at most, which are {} and {}\n\n{}",
        counted(*tokens, "token"),
        range(*least_s, *most_s),
        bandwidth(moved as f64 / least_s),
        flops(done as f64 / least_s),
        columns(&PHASE_HEADS, &rows)
    )
}

/// `1.23 ms`, or `1.23 ms to 2.34 ms`.
fn range(least_s: f64, most_s: f64) -> String {
    let (least, serial) = (time(least_s), time(most_s));
    if least == serial { least } else { format!("{least} to {serial}") }
}
