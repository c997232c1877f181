//! `emit`: the text of any stage.

use super::error::CliError;
use super::plan::Lowering;
use super::screen::{Screen, print, print_json};
use super::source::BuildOptions;
use clap::{Args, ValueEnum};
use llamac::compile::{Code, CompileError, Stage, lower};
use llamac::model::Model;
use llamac::pipeline::Request;
use serde_json::json;
use std::collections::BTreeSet;

#[derive(Args)]
#[command(after_help = "\
Example:
  llamac emit builtin --stage fused --entry decode
  llamac emit preset:tinyllama-1.1b --stage asm --kernel q --target cpu:x86-64-v3")]
pub struct Options {
    /// Model or artifact
    model: String,
    /// Stage to show
    #[arg(long, value_enum)]
    stage: StageName,
    /// Only this kernel (stages kernels, llvm, asm and ptx)
    #[arg(long, value_name = "NAME")]
    kernel: Option<String>,
    /// Only this entry point (stages graph and fused): decode, prefill, fill or logits_all
    #[arg(long, value_name = "NAME")]
    entry: Option<String>,
    /// Machine to compile for [default: this one; an artifact's first]
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
    /// Machine code of a GPU
    Sass,
}

pub fn emit(options: &Options, screen: &Screen) -> Result<(), CliError> {
    let stage = match options.stage {
        StageName::Graph => Some(Stage::Graph),
        StageName::Fused => Some(Stage::Fused),
        StageName::Kernels => Some(Stage::Kernels),
        StageName::Plan => Some(Stage::Plan),
        StageName::Llvm => Some(Stage::Llvm),
        StageName::Asm => Some(Stage::Asm),
        StageName::Ptx => None,
        StageName::Sass => {
            let cure = "write PTX with --stage ptx and assemble it: ptxas -arch=sm_80 k.ptx -o k.cubin; nvdisasm k.cubin";
            return Err(CliError::Usage(format!("llamac makes no SASS yet; {cure}")));
        }
    };
    if options.entry.is_some() && !matches!(stage, Some(Stage::Graph | Stage::Fused)) {
        return Err(CliError::Usage("--entry goes with --stage graph or fused".into()));
    }
    if options.kernel.is_some() && matches!(stage, Some(Stage::Graph | Stage::Fused | Stage::Plan)) {
        return Err(CliError::Usage("--kernel goes with --stage kernels, llvm, asm or ptx".into()));
    }
    let model = Model::open(&options.model)?;
    let target = options.target.as_deref().filter(|t| stage.is_some() || *t != codegen::nvptx::SM_80);
    let lowering = Lowering::of(&model, &options.build, target)?;
    let request = lowering.request();
    let code = lower(&request, &lowering.target)?;
    let text = match (stage, &options.kernel, &options.entry) {
        (None, kernel, _) => ptx(&code, kernel.as_deref(), screen)?,
        (Some(stage), Some(kernel), _) => one_kernel(&code, &request, stage, kernel)?,
        (Some(stage), None, Some(entry)) => one_entry(&code, &request, stage, entry)?,
        (Some(stage), None, None) => code.text(&request, stage).map_err(CompileError::from)?,
    };
    if screen.json {
        let stage = options.stage.to_possible_value().expect("no value is hidden").get_name().to_string();
        return print_json(&json!({ "stage": stage, "text": text }));
    }
    print(&text)
}

fn one_entry(code: &Code, request: &Request<'_>, stage: Stage, name: &str) -> Result<String, CliError> {
    let at = code.lowered.entries.iter().position(|e| e.graph.name == name).ok_or_else(|| {
        let known: Vec<&str> = code.lowered.entries.iter().map(|e| &*e.graph.name).collect();
        CliError::Usage(format!("there is no entry point `{name}`; there are {}", known.join(", ")))
    })?;
    Ok(match stage {
        Stage::Graph => request.graphs()[at].0.to_string(),
        _ => code.lowered.entries[at].graph.to_string(),
    })
}

fn one_kernel(code: &Code, request: &Request<'_>, stage: Stage, name: &str) -> Result<String, CliError> {
    let kernel = find(code, name)?;
    let text = match stage {
        Stage::Kernels => return Ok(kernel.to_string()),
        Stage::Llvm => {
            return Ok(codegen::lower::function(kernel, code.level.features, &mut BTreeSet::new()));
        }
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

fn find<'c>(code: &'c Code, name: &str) -> Result<&'c ir::kernel::Kernel, CliError> {
    code.lowered.kernels.iter().find(|k| k.name == name).ok_or_else(|| {
        let known: Vec<&str> = code.lowered.kernels.iter().map(|k| &*k.name).collect();
        CliError::Usage(format!("there is no kernel `{name}`; there are {}", known.join(", ")))
    })
}

/// PTX of one kernel, or of all that have a form for a grid; the others are named on stderr.
fn ptx(code: &Code, kernel: Option<&str>, screen: &Screen) -> Result<String, CliError> {
    if let Some(name) = kernel {
        return Ok(codegen::nvptx::ptx(find(code, name)?).map_err(CompileError::from)?);
    }
    let mut texts = Vec::new();
    let mut refused = Vec::new();
    for kernel in &code.lowered.kernels {
        if codegen::nvptx::covers(kernel.family) {
            match codegen::nvptx::ptx(kernel) {
                Ok(text) => texts.push(text),
                Err(codegen::cpu::CodegenError::Unsupported { .. }) => refused.push(&*kernel.name),
                Err(error) => return Err(CompileError::from(error).into()),
            }
        } else {
            refused.push(&*kernel.name);
        }
    }
    if !refused.is_empty() {
        screen.note(format!("no form for a GPU yet: {}", refused.join(", ")));
    }
    Ok(texts.join("\n"))
}
