//! `inspect`: what a model or an artifact is.

use super::error::CliError;
use super::prompt;
use super::screen::{Screen, bytes, columns, grouped, pairs, print, print_json};
use clap::Args;
use ir::DType;
use ir::plan::Plan;
use llamac::model::{Model, name_of};
use models::checkpoint::Format;
use models::{Checkpoint, Config, RopeKind};
use runtime::artifact::{Artifact, is_weights};
use runtime::gpu;
use runtime::manifest::{Manifest, TargetCode};
use serde::Serialize;
use serde_json::{Value, json};

#[derive(Args)]
#[command(after_help = "\
Example:
  llamac inspect builtin
  llamac inspect model.gguf --tensors
  llamac inspect model.llamac --verify")]
pub struct Options {
    /// Model or artifact
    model: String,
    /// List the tensors; of an artifact the buffers of its weights
    #[arg(long)]
    tensors: bool,
    /// Read an artifact's weights and check their digest
    #[arg(long)]
    verify: bool,
}

pub fn inspect(options: &Options, screen: &Screen) -> Result<(), CliError> {
    let model = Model::open(&options.model)?;
    if options.verify && !matches!(model, Model::Artifact(_)) {
        return Err(CliError::Usage("--verify: only an artifact has digests".into()));
    }
    let config = model.config()?;
    match &model {
        Model::Preset(_) => preset(options, &config, screen),
        Model::Checkpoint(checkpoint) => inspect_checkpoint(options, &model, checkpoint, screen),
        Model::Artifact(artifact) => inspect_artifact(options, &model, artifact, &config, screen),
    }
}

fn preset(options: &Options, config: &Config, screen: &Screen) -> Result<(), CliError> {
    let tensors = config.tensors();
    if screen.json {
        let list: Vec<Value> =
            tensors.iter().map(|(name, shape)| json!({ "name": name, "shape": shape })).collect();
        return print_json(&json!({
            "model": name_of(&options.model),
            "format": "preset",
            "config": config,
            "parameters": config.parameters(),
            "tensors": options.tensors.then_some(list),
        }));
    }
    let mut text = format!("{}: a published shape, without weights\n\n", name_of(&options.model));
    text += &pairs(&config_rows(config));
    if options.tensors {
        let rows: Vec<_> = tensors.iter().map(|(name, shape)| vec![name.clone(), shown(shape)]).collect();
        text += &format!("\n{}", columns(&["tensor", "shape"], &rows));
    }
    print(&text)
}

fn inspect_checkpoint(
    options: &Options,
    model: &Model,
    checkpoint: &Checkpoint,
    screen: &Screen,
) -> Result<(), CliError> {
    let config = &checkpoint.config;
    let format = match checkpoint.format {
        Format::HuggingFace => "Hugging Face directory".to_string(),
        Format::Gguf(version) => format!("GGUF, version {version}"),
    };
    let dtypes = checkpoint.stored_dtypes();
    let origin = checkpoint.tokenizer.as_ref().map(|t| t.origin.name());
    let pieces = match origin {
        Some(_) => Some(prompt::tokenizer(&options.model, model)?.vocab_size()),
        None => None,
    };
    if screen.json {
        let tensors = checkpoint.tensors().map(|t| {
            json!({ "name": t.name, "dtype": t.dtype.name(), "shape": t.shape, "file": t.file.display().to_string() })
        });
        return print_json(&json!({
            "model": name_of(&options.model),
            "format": format,
            "config": config,
            "parameters": config.parameters(),
            "dtypes": dtypes.iter().map(|(d, n)| (d.name().to_string(), json!(n))).collect::<serde_json::Map<_, _>>(),
            "tokenizer": origin.map(|origin| json!({ "origin": origin, "pieces": pieces })),
            "chat_template": checkpoint.chat_template,
            "ignored_keys": checkpoint.ignored_keys,
            "ignored_tensors": checkpoint.ignored_tensors,
            "tensors": options.tensors.then(|| tensors.collect::<Vec<_>>()),
        }));
    }
    let list: Vec<String> =
        dtypes.iter().map(|(dtype, count)| format!("{dtype} ({count} tensors)")).collect();
    let mut rows = config_rows(config);
    rows.push(("stored as", list.join(", ")));
    rows.push((
        "tokenizer",
        match (origin, pieces) {
            (Some(origin), Some(pieces)) => format!("{origin}, {pieces} pieces"),
            _ => "none".to_string(),
        },
    ));
    rows.push((
        "chat template",
        match &checkpoint.chat_template {
            Some(template) if screen.verbose => format!("\n{template}"),
            Some(template) => format!("{} characters; -v shows it", template.chars().count()),
            None => "none".to_string(),
        },
    ));
    rows.push(("ignored keys", some(&checkpoint.ignored_keys)));
    rows.push(("ignored tensors", some(&checkpoint.ignored_tensors)));
    let mut text = format!("{}: {format}\n\n{}", name_of(&options.model), pairs(&rows));
    if options.tensors {
        let size = |dtype: DType, shape: &[usize]| bytes(dtype.bytes(shape.iter().product()) as u64);
        let row = |t: &models::TensorInfo| {
            let file = t.file.file_name().map_or(String::new(), |f| f.display().to_string());
            vec![t.name.clone(), t.dtype.to_string(), shown(&t.shape), size(t.dtype, &t.shape), file]
        };
        let rows: Vec<_> = checkpoint.tensors().map(row).collect();
        text += &format!("\n{}", columns(&["tensor", "dtype", "shape", "size>", "file"], &rows));
    }
    print(&text)
}

fn inspect_artifact(
    options: &Options,
    model: &Model,
    artifact: &Artifact,
    config: &Config,
    screen: &Screen,
) -> Result<(), CliError> {
    let manifest: Manifest = artifact.manifest()?;
    if options.verify {
        artifact.verify()?;
    }
    let mut plans = Vec::new();
    for target in &manifest.targets {
        plans.push(runtime::cpu::read_plan(artifact, target)?);
    }
    let mut gpus = Vec::new();
    for target in &manifest.targets {
        gpus.push(gpu_code(artifact, target)?);
    }
    let runs_here = runtime::cpu::choose(artifact.file(), &manifest).ok().map(|target| target.name.clone());
    let pieces = match model.tokenizer() {
        Some(_) => Some(prompt::tokenizer(&options.model, model)?.vocab_size()),
        None => None,
    };
    let digests = match (manifest.weights, options.verify) {
        (_, true) => "all checked",
        (true, false) => "checked, but for the weights (--verify)",
        (false, false) => "checked",
    };
    if screen.json {
        let targets: Vec<Value> = manifest.targets.iter().zip(&plans).zip(&gpus).map(|((target, plan), gpu)| json!({
            "name": target.name,
            "requires": target.requires,
            "shared_bytes": target.shared_bytes,
            "gpu": gpu,
            "entries": plan.entries.iter().map(|e| json!({
                "name": e.name,
                "tokens": [e.symbols.0.first().map(|s| s.min), e.symbols.0.first().map(|s| s.max)],
                "gives": e.give.name(),
                "launches": e.launches.len(),
            })).collect::<Vec<_>>(),
            "kernels": plan.kernels.iter().map(|k| json!({
                "name": k.name, "family": k.family.name(), "schedule": k.schedule, "source": k.source(),
            })).collect::<Vec<_>>(),
        })).collect();
        let sections: Vec<Value> = artifact.sections().iter().map(|s| json!({
            "name": s.name, "offset": s.offset, "bytes": s.length, "digest": s.digest.to_hex().as_str(),
        })).collect();
        return print_json(&json!({
            "model": manifest.model,
            "format": "artifact",
            "config": config,
            "parameters": config.parameters(),
            "dtype": manifest.dtype,
            "context": manifest.context,
            "weights": manifest.weights,
            "taps": manifest.taps,
            "compiler": manifest.compiler,
            "llvm": manifest.llvm,
            "digest": artifact.digest().to_hex().as_str(),
            "runs_here": runs_here,
            "targets": targets,
            "sections": sections,
            "tokenizer": pieces.map(|pieces| json!({ "pieces": pieces })),
            "chat_template": model.chat_template(),
        }));
    }

    let names: Vec<&str> = manifest.targets.iter().map(|t| &*t.name).collect();
    let mut text = format!("{}: artifact of {}\n\n", artifact.file().display(), manifest.model);
    let mut rows = vec![
        (
            "compiled",
            format!(
                "{}, context {}, by llamac {} with LLVM {}",
                manifest.dtype, manifest.context, manifest.compiler, manifest.llvm
            ),
        ),
        ("targets", names.join(", ")),
        (
            "runs here",
            runs_here.map_or("no: no target fits this machine".to_string(), |name| format!("yes, {name}")),
        ),
        (
            "weights",
            if manifest.weights { "in it".to_string() } else { "none: code and plan alone".to_string() },
        ),
        (
            "taps",
            if manifest.taps { "yes: profile and compare --level op can run it" } else { "none" }.to_string(),
        ),
        ("digest", artifact.digest().to_hex().to_string()),
        ("digests", digests.to_string()),
    ];
    rows.extend(config_rows(config));
    rows.push(("tokenizer", pieces.map_or("none".to_string(), |pieces| format!("{pieces} pieces"))));
    rows.push((
        "chat template",
        match model.chat_template() {
            Some(template) if screen.verbose => format!("\n{template}"),
            Some(template) => format!("{} characters; -v shows it", template.chars().count()),
            None => "none".to_string(),
        },
    ));
    text += &pairs(&rows);
    for ((target, plan), gpu) in manifest.targets.iter().zip(&plans).zip(&gpus) {
        text += &format!("\n{} (needs {}", target.name, target.requires.join(" "));
        if target.shared_bytes > 0 {
            text += &format!(", {} of shared memory a CTA", bytes(target.shared_bytes as u64));
        }
        if let Some(GpuCode { ptx_isa, cubin }) = gpu {
            let cubin = match cubin {
                Some(cubin) => format!("{} of machine code by ptxas {}", bytes(cubin.bytes), cubin.ptxas),
                None => "no machine code".to_string(),
            };
            text += &format!(" and PTX ISA {ptx_isa}; {cubin}");
        }
        text += ")\n";
        text += &entries_table(plan);
        text += &format!("\n{}", kernels_table(plan));
    }
    let line = |s: &runtime::artifact::Section| {
        let kind = if is_weights(&s.name) && !options.verify { "" } else { "checked" };
        vec![s.name.clone(), bytes(s.length), s.digest.to_hex()[..16].to_string(), kind.to_string()]
    };
    let rows: Vec<_> = artifact.sections().iter().map(line).collect();
    text += &format!("\n{}", columns(&["section", "size>", "digest", ""], &rows));
    if options.tensors
        && let Some(plan) = plans.first()
    {
        text += &format!("\n{}", weights_table(plan));
    }
    print(&text)
}

/// What an artifact has for a GPU.
#[derive(Serialize)]
struct GpuCode {
    /// Version of the PTX ISA that its PTX asks for: a driver must know it.
    ptx_isa: String,
    /// Machine code; none where PTX is all.
    cubin: Option<Cubin>,
}

/// Machine code of one GPU.
#[derive(Serialize)]
struct Cubin {
    /// Version of the `ptxas` that wrote it.
    ptxas: String,
    bytes: u64,
}

/// What a target has for a GPU; none if it is a CPU's.
fn gpu_code(artifact: &Artifact, target: &TargetCode) -> Result<Option<GpuCode>, CliError> {
    if target.arch != gpu::ARCH {
        return Ok(None);
    }
    let ptx = String::from_utf8_lossy(artifact.require(&target.code_section())?);
    let ptx_isa = gpu::isa(&ptx).unwrap_or("?").to_string();
    let cubin = match &target.ptxas {
        Some(ptxas) => {
            let bytes = artifact.require(&target.cubin_section())?.len() as u64;
            Some(Cubin { ptxas: ptxas.clone(), bytes })
        }
        None => None,
    };
    Ok(Some(GpuCode { ptx_isa, cubin }))
}

fn entries_table(plan: &Plan) -> String {
    let row = |e: &ir::plan::Entry| {
        let range = e.symbols.0.first().map_or(String::new(), |t| match t.min == t.max {
            true => t.min.to_string(),
            false => format!("{}..{}", t.min, t.max),
        });
        vec![e.name.clone(), range, e.give.name().to_string(), e.launches.len().to_string()]
    };
    let rows: Vec<_> = plan.entries.iter().map(row).collect();
    columns(&["entry", "tokens>", "gives", "launches>"], &rows)
}

fn kernels_table(plan: &Plan) -> String {
    let row = |k: &ir::plan::PlanKernel| {
        vec![k.name.clone(), k.family.name().to_string(), k.source().to_string(), k.schedule.clone()]
    };
    let rows: Vec<_> = plan.kernels.iter().map(row).collect();
    columns(&["kernel", "family", "chosen by", "schedule"], &rows)
}

fn weights_table(plan: &Plan) -> String {
    let row = |b: &ir::plan::PlanBuffer| match &b.place {
        ir::plan::Place::Weight { offset, source } => {
            let what = match source {
                ir::plan::WeightSource::Tensor { .. } => "rows",
                ir::plan::WeightSource::Pack { .. } => "panels",
                ir::plan::WeightSource::Constant { .. } => "constant",
            };
            Some(vec![
                b.name.clone(),
                b.dtype.to_string(),
                what.to_string(),
                bytes(b.bytes as u64),
                offset.to_string(),
            ])
        }
        _ => None,
    };
    let rows: Vec<_> = plan.buffers.iter().filter_map(row).collect();
    columns(&["buffer", "dtype", "layout", "size>", "offset>"], &rows)
}

fn config_rows(config: &Config) -> Vec<(&'static str, String)> {
    let Config {
        vocab_size, hidden_size, intermediate_size, n_layers, n_heads, n_kv_heads, head_dim, ..
    } = config;
    let mut biases = Vec::new();
    biases.extend(config.attention_bias.then_some("attention"));
    biases.extend(config.mlp_bias.then_some("MLP"));
    let ids = |ids: &[u32]| match ids {
        [] => "none".to_string(),
        ids => ids.iter().map(u32::to_string).collect::<Vec<_>>().join(", "),
    };
    vec![
        ("parameters", grouped(config.parameters())),
        ("layers", n_layers.to_string()),
        ("width", format!("{hidden_size}, MLP {intermediate_size}")),
        ("heads", format!("{n_heads} of {head_dim}, {n_kv_heads} for keys and values")),
        (
            "vocabulary",
            format!("{vocab_size}{}", if config.tied { ", head tied to the embedding" } else { "" }),
        ),
        ("context", config.context.to_string()),
        ("rope", rope(config)),
        ("norm", format!("RMS, eps {:e}", config.rms_norm_eps)),
        ("biases", if biases.is_empty() { "none".to_string() } else { biases.join(", ") }),
        ("begins with", ids(config.bos.as_slice())),
        ("ends with", ids(&config.eos)),
    ]
}

fn rope(config: &Config) -> String {
    let theta = config.rope.theta;
    match &config.rope.kind {
        RopeKind::Default => format!("default, theta {theta}"),
        RopeKind::Linear { factor } => format!("linear, theta {theta}, factor {factor}"),
        RopeKind::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => format!(
            "llama3, theta {theta}, factor {factor} ({low_freq_factor} to {high_freq_factor}) over {original_context}"
        ),
        RopeKind::Yarn { factor, original_context, beta_fast, beta_slow, .. } => format!(
            "yarn, theta {theta}, factor {factor} over {original_context}, beta {beta_fast} to {beta_slow}, attention {}",
            config.rope.attention_factor()
        ),
    }
}

fn shown(shape: &[usize]) -> String {
    format!("[{}]", shape.iter().map(usize::to_string).collect::<Vec<_>>().join(", "))
}

fn some(names: &[String]) -> String {
    if names.is_empty() { "none".to_string() } else { names.join(", ") }
}
