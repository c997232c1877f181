//! `doctor`: what is here, what is missing, and how to get it.

use super::ceilings;
use super::error::CliError;
use super::screen::{Screen, bandwidth, bytes, flops, pairs, print, print_json};
use clap::Args;
#[cfg(feature = "compiler")]
use codegen::ptxas::{CURE, Program, PtxasError, Tool};
use ir::DType;
use runtime::cuda::driver::{Driver, NoDriver};
use runtime::{map, meter, pool};
use serde::Serialize;
use serde_json::json;
#[cfg(feature = "compiler")]
use std::fs;

#[derive(Args)]
#[command(after_help = "\
Example:
  llamac doctor
  llamac doctor --json")]
pub struct Options {}

/// Something that may be there or not.
#[derive(Serialize)]
struct Part {
    name: &'static str,
    /// What was found; none if it is missing.
    found: Option<String>,
    /// What one goes without.
    without: &'static str,
    /// The command that gets it.
    cure: &'static str,
}

/// Seconds that each ceiling is measured for.
const METER_SECONDS: f64 = 0.2;

pub fn doctor(_: &Options, screen: &Screen) -> Result<(), CliError> {
    let threads = pool::physical_cores();
    let large = usize::MAX;
    let bf16 = ceilings::measure(threads, DType::BF16, large, METER_SECONDS)?.best();
    let f32 = ceilings::measure(threads, DType::F32, large, METER_SECONDS)?.best();
    let read = bf16.read_bytes_per_s.max(f32.read_bytes_per_s);
    let features = runtime::cpu::features();
    let parts = parts();
    let cpu = runtime::cpu::model_name();
    let (total, available) = (map::total_bytes(), map::available_bytes());
    if screen.json {
        return print_json(&json!({
            "llamac": env!("CARGO_PKG_VERSION"),
            "cpu": cpu,
            "features": features,
            "physical_cores": threads,
            "threads": pool::allowed_cores().len(),
            "memory": { "total": total, "available": available },
            "largest_cache": meter::cache_bytes(),
            "ceilings": { "read_bytes_per_s": read, "dot_flops_f32": f32.dot_flops, "dot_flops_bf16": bf16.dot_flops },
            "cache_folder": cache_folder(),
            "parts": parts,
        }));
    }
    let known = |size: Option<u64>| size.map_or("?".to_string(), bytes);
    let bf16_form = if meter::has_bf16_dot() { "vdpbf16ps" } else { "by conversion to f32" };
    let mut text = pairs(&[
        ("llamac", env!("CARGO_PKG_VERSION").to_string()),
        ("CPU", cpu),
        ("features", features.join(" ")),
        ("cores", format!("{threads} physical, {} threads", pool::allowed_cores().len())),
        ("memory", format!("{}, {} available", known(total), known(available))),
        ("largest cache", known(meter::cache_bytes().map(|b| b as u64))),
        ("read", format!("{} by {threads} threads", bandwidth(read))),
        ("dot f32", flops(f32.dot_flops)),
        ("dot bf16", format!("{} ({bf16_form})", flops(bf16.dot_flops))),
        ("cache folder", cache_folder()),
    ]);
    text.push('\n');
    let found = |part: &Part| part.found.clone().unwrap_or_else(|| "missing".to_string());
    let rows: Vec<(&str, String)> = parts.iter().map(|part| (part.name, found(part))).collect();
    text += &pairs(&rows);
    for part in parts.iter().filter(|part| part.found.is_none()) {
        text += &format!("\n{} is missing. Without it: {}.\n  {}\n", part.name, part.without, part.cure);
    }
    print(&text)
}

fn parts() -> Vec<Part> {
    let mut parts = compiler();
    parts.push(Part {
        name: "CUDA driver",
        found: driver(),
        without: "no model runs on a GPU",
        cure: "install NVIDIA's driver: apt-get install nvidia-driver (component non-free)",
    });
    parts
}

#[cfg(feature = "compiler")]
fn compiler() -> Vec<Part> {
    vec![
        Part { name: "LLVM", found: Some(codegen::cpu::llvm_version()), without: "", cure: "" },
        Part {
            name: "linker",
            found: codegen::link::linker().map(|(name, version)| format!("{name} ({version})")),
            without: "nothing can be compiled",
            cure: "apt-get install lld-22",
        },
        tool(Tool::Ptxas, "artifacts for GPUs have PTX alone, which the driver assembles at load"),
        tool(
            Tool::Nvdisasm,
            "neither `emit --stage sass` nor `profile --static` can read a GPU's machine code",
        ),
    ]
}

#[cfg(feature = "compiler")]
fn tool(tool: Tool, without: &'static str) -> Part {
    let found = match tool.find() {
        Ok(Program { file, version }) => Some(format!("{version}, {}", file.display())),
        Err(PtxasError::Missing(_)) => None,
        // Named, and no such program: the fault is worth more than a cure.
        Err(why) => Some(why.to_string()),
    };
    Part { name: tool.name(), found, without, cure: CURE }
}

#[cfg(not(feature = "compiler"))]
fn compiler() -> Vec<Part> {
    vec![Part {
        name: "compiler",
        found: None,
        without: "artifacts run, and nothing can be compiled",
        cure: "cargo install llamac, with its default features",
    }]
}

#[cfg(feature = "compiler")]
fn cache_folder() -> String {
    let folder = super::cache::folder();
    let files = fs::read_dir(&folder).into_iter().flatten().flatten();
    let sizes: Vec<u64> = files.filter_map(|f| f.metadata().ok()).map(|m| m.len()).collect();
    let total: u64 = sizes.iter().sum();
    format!("{} ({} in {} files; may be removed)", folder.display(), bytes(total), sizes.len())
}

#[cfg(not(feature = "compiler"))]
fn cache_folder() -> String {
    "none: nothing is compiled".to_string()
}

/// The driver's version and the GPUs that it has, or what is wrong with it; none if it is not there.
fn driver() -> Option<String> {
    let driver = match Driver::load() {
        Ok(driver) => driver,
        Err(NoDriver::Absent) => return None,
        Err(unusable) => return Some(unusable.to_string()),
    };
    let gpus = match driver.gpus() {
        Ok(gpus) if gpus.is_empty() => "no GPU".to_string(),
        Ok(gpus) => gpus.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
        Err(failure) => failure.to_string(),
    };
    Some(format!("CUDA {}; {gpus}", driver.version))
}
