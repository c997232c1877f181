//! `emit`: the text of any stage.

use super::error::CliError;
use super::plan::Lowering;
use super::screen::{Screen, print, print_json};
use super::source::BuildOptions;
use clap::{Args, ValueEnum};
use codegen::Backend;
use codegen::nvptx::ARCHITECTURES;
use ir::kernel::Kernel;
use llamac::compile::{Code, CompileError, Stage, lower};
use llamac::model::Model;
use llamac::pipeline::Request;
use serde_json::json;
use std::collections::BTreeSet;

#[derive(Args)]
#[command(after_help = "\
Example:
  llamac emit builtin --stage fused --entry decode
  llamac emit preset:tinyllama-1.1b --stage asm --kernel q --target cpu:x86-64-v3
  llamac emit builtin --stage ptx --target cuda:sm_80 > builtin.ptx")]
pub struct Options {
    /// Model or artifact
    model: String,
    /// Stage to show
    #[arg(long, value_enum)]
    stage: StageName,
    /// Only this kernel (stages kernels, llvm, asm, ptx and sass)
    #[arg(long, value_name = "NAME")]
    kernel: Option<String>,
    /// Only this entry point (stages graph and fused): decode, prefill, fill or logits_all
    #[arg(long, value_name = "NAME")]
    entry: Option<String>,
    /// Machine to compile for [default: this one; an artifact's first; cuda:sm_80 for ptx and sass]
    #[arg(long, value_name = "TARGET")]
    target: Option<String>,
    #[command(flatten)]
    build: BuildOptions,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum StageName {
    /// Graphs before any pass
    Graph,
    /// Graphs after all passes: groups, layouts, schedules
    Fused,
    /// Kernel IR
    Kernels,
    /// The plan: which kernels run on which bytes
    Plan,
    /// LLVM IR, before LLVM's own passes
    Llvm,
    /// Assembly
    Asm,
    /// PTX for cuda:sm_80, of the kernels that have a form for it
    Ptx,
    /// Machine code for cuda:sm_80, by ptxas and nvdisasm: `llamac doctor` says how to get them
    Sass,
}

pub fn emit(options: &Options, screen: &Screen) -> Result<(), CliError> {
    let stage = match options.stage {
        StageName::Graph => Stage::Graph,
        StageName::Fused => Stage::Fused,
        StageName::Kernels => Stage::Kernels,
        StageName::Plan => Stage::Plan,
        StageName::Llvm => Stage::Llvm,
        StageName::Asm => Stage::Asm,
        StageName::Ptx => Stage::Ptx,
        StageName::Sass => Stage::Sass,
    };
    if options.entry.is_some() && !matches!(stage, Stage::Graph | Stage::Fused) {
        return Err(CliError::Usage("--entry goes with --stage graph or fused".into()));
    }
    if options.kernel.is_some() && matches!(stage, Stage::Graph | Stage::Fused | Stage::Plan) {
        return Err(CliError::Usage("--kernel goes with --stage kernels, llvm, asm, ptx or sass".into()));
    }
    let model = Model::open(&options.model)?;
    let target = match (stage, &options.target) {
        (Stage::Ptx | Stage::Sass, None) => Some(ARCHITECTURES[0].name),
        (_, target) => target.as_deref(),
    };
    let lowering = Lowering::of(&model, &options.build, target, screen)?;
    let request = lowering.request();
    let backend = Backend::of(&lowering.target).map_err(CompileError::from)?;
    if !stage.is_of(&backend) {
        let name = options.stage.to_possible_value().expect("no value is hidden").get_name().to_string();
        return Err(CliError::Usage(format!("--target {} has no stage {name}", lowering.target)));
    }
    let text = one_stage(options, stage, &request, &lowering.target)?;
    if screen.json {
        let stage = options.stage.to_possible_value().expect("no value is hidden").get_name().to_string();
        return print_json(&json!({ "stage": stage, "text": text }));
    }
    print(&text)
}

fn one_stage(
    options: &Options,
    stage: Stage,
    request: &Request<'_>,
    target: &str,
) -> Result<String, CliError> {
    let code = lower(request, target, false)?;
    match (&options.kernel, &options.entry) {
        (Some(kernel), _) => one_kernel(&code, request, stage, kernel),
        (None, Some(entry)) => one_entry(&code, request, stage, entry),
        (None, None) => Ok(code.text(request, stage).map_err(CompileError::from)?),
    }
}

fn one_entry(code: &Code, request: &Request<'_>, stage: Stage, name: &str) -> Result<String, CliError> {
    let at = code.lowered.entries.iter().position(|e| e.graph.name == name).ok_or_else(|| {
        let known: Vec<&str> = code.lowered.entries.iter().map(|e| &*e.graph.name).collect();
        CliError::Usage(format!("there is no entry point `{name}`; there are {}", known.join(", ")))
    })?;
    Ok(match stage {
        Stage::Graph => request.graphs(&code.backend.target().machine)[at].0.to_string(),
        _ => code.lowered.entries[at].graph.to_string(),
    })
}

fn one_kernel(code: &Code, request: &Request<'_>, stage: Stage, name: &str) -> Result<String, CliError> {
    let kernel = find(&code.lowered.kernels, name)?;
    match (&code.backend, stage) {
        (Backend::Cpu(level), Stage::Llvm) => {
            return Ok(codegen::lower::function(kernel, level.features, &mut BTreeSet::new()));
        }
        (Backend::Cuda(_), Stage::Llvm | Stage::Ptx | Stage::Sass) => {
            let alone = std::slice::from_ref(kernel);
            let llvm = code.backend.llvm(&code.lowered.plan, alone, false).map_err(CompileError::from)?;
            let text = match stage {
                Stage::Ptx => code.backend.assembly(&llvm),
                Stage::Sass => code.backend.machine_code(&llvm),
                _ => Ok(llvm),
            };
            return Ok(text.map_err(CompileError::from)?);
        }
        _ => {}
    }
    let text = match stage {
        Stage::Kernels => return Ok(kernel.to_string()),
        _ => code.text(request, stage).map_err(CompileError::from)?,
    };
    // The function's label, up to the end of the function.
    let symbol = codegen::lower::symbol(name);
    let label = format!("{}:", symbol.trim_start_matches('@'));
    let lines: Vec<&str> = text.lines().collect();
    let quoted = label.trim_matches(':').trim_matches('"').to_string();
    let is_label = |line: &&str| {
        let head = line.split([':', '#']).next().unwrap_or_default().trim().trim_matches('"');
        line.contains(':') && head == quoted
    };
    let Some(begin) = lines.iter().position(is_label) else {
        return Err(CliError::Usage(format!("kernel `{name}` is inside its entry points in the assembly")));
    };
    let body = lines[begin..].iter().take_while(|line| !line.trim_start().starts_with(".Lfunc_end"));
    Ok(body.map(|line| format!("{line}\n")).collect())
}

fn find<'k>(kernels: &'k [Kernel], name: &str) -> Result<&'k Kernel, CliError> {
    kernels.iter().find(|k| k.name == name).ok_or_else(|| {
        let known: Vec<&str> = kernels.iter().map(|k| &*k.name).collect();
        CliError::Usage(format!("there is no kernel `{name}`; there are {}", known.join(", ")))
    })
}
