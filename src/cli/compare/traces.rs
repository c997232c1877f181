//! `--record`, `--against` and `--bisect`: what each launch stores, on this machine and on others.

use super::super::error::CliError;
use super::super::screen::{Screen, bytes, grouped, print, print_json};
use super::super::source::Ready;
use super::{Found, Options};
use ir::DType;
use ir::interp::Rounding;
use llamac::compare::stored;
use llamac::compare::trace::part::{Oracle, Parted, Parting, part};
use llamac::compare::trace::{SAMPLES, Trace, TraceError, text};
use llamac::judge::StoredBound;
use runtime::artifact::Artifact;
use runtime::cpu::read_plan;
use runtime::device::{DeviceError, Want};
use runtime::interpreter::InterpretedProgram;
use runtime::manifest::Manifest;
use runtime::whole_file;
use serde_json::json;
use std::fs;
use std::path::Path;

/// Writes what each launch stores to a file.
pub fn record(
    options: &Options,
    file: &Path,
    ready: &Ready,
    tokens: &[i32],
    screen: &Screen,
) -> Result<(), CliError> {
    let trace = run(options, &ready.artifact, tokens, SAMPLES)?;
    let text = trace.to_string();
    whole_file::write(file, text.len() as u64, |path| fs::write(path, &text))?;
    let (launches, values) = (trace.launches(), trace.values());
    if screen.json {
        return print_json(&json!({
            "trace": file, "bytes": text.len(), "launches": launches, "values": values, "tokens": tokens,
        }));
    }
    let (launches, values) = (grouped(launches as u64), grouped(values as u64));
    let size = bytes(text.len() as u64);
    print(&format!("{}: {values} values of {launches} launches, {size}\n", file.display()))
}

/// Reads a trace.
pub fn read(file: &Path) -> Result<Trace, CliError> {
    let failed = |source| CliError::Read { file: file.to_path_buf(), source };
    let said = |line, message| CliError::Text { file: file.to_path_buf(), line, message };
    let bytes = fs::read(file).map_err(failed)?;
    let text = std::str::from_utf8(&bytes).map_err(|error| said(1, error.to_string()))?;
    text::parse(text).map_err(|error| said(error.line, error.to_string()))
}

/// Judges this machine's run by a trace.
pub fn against(options: &Options, trace: &Trace, ready: &Ready, found: &mut Found) -> Result<(), CliError> {
    let ours = run(options, &ready.artifact, &trace.tokens, usize::MAX)?;
    if ours.dtype != trace.dtype {
        let (what, [a, b]) = ("dtypes", [ours.dtype, trace.dtype].map(|dtype| dtype.to_string()));
        return Err(TraceError::Apart { what, a, b }.into());
    }
    let mut oracle = None;
    let mut bounds = |want: Want, value: &str| {
        if oracle.is_none() {
            let mut exact = InterpretedProgram::load(&ready.artifact, Rounding::Exact)?;
            let mut stored = InterpretedProgram::load(&ready.artifact, Rounding::Stored)?;
            oracle = Some(Oracle::of(&ours, &mut exact, (&mut stored, ours.dtype))?);
        }
        Ok(oracle.as_ref().and_then(|oracle| oracle.bound(want, value)))
    };
    let parting = part(&ours, trace, &mut bounds)?;
    found.lines.push(("trace".to_string(), told(trace)));
    found.lines.push(("this".to_string(), told(&ours)));
    add(&parting, found);
    Ok(())
}

/// Finds where two artifacts of one model part. Without taps in both, their logits are all that there is.
pub fn bisect(
    options: &Options,
    files: &[String],
    found: &mut Found,
    screen: &Screen,
) -> Result<(), CliError> {
    let [a, b] = files else { unreachable!("clap asks for two") };
    let open = |file: &String| -> Result<(Artifact, Manifest), CliError> {
        let artifact = Artifact::open(Path::new(file))?;
        let manifest: Manifest = artifact.manifest()?;
        Ok((artifact, manifest))
    };
    let shows = |(artifact, manifest): (&Artifact, &Manifest)| -> Result<bool, CliError> {
        let target = options.device.machine()?.choose(artifact.file(), manifest)?;
        Ok(manifest.taps && artifact.section(&target.fused_section()).is_some())
    };
    let ((a, of_a), (b, of_b)) = (open(a)?, open(b)?);
    let vocab = |manifest: &Manifest| manifest.config["vocab_size"].as_u64().unwrap_or(0);
    if vocab(&of_a) != vocab(&of_b) {
        let (what, [a, b]) = ("vocabularies", [&of_a, &of_b].map(|manifest| vocab(manifest).to_string()));
        return Err(TraceError::Apart { what, a, b }.into());
    }
    let tokens = options.tokens(None, vocab(&of_a) as usize, of_a.context.min(of_b.context));
    let tapped = shows((&a, &of_a))? && shows((&b, &of_b))?;
    let trace = |artifact: &Artifact| match tapped {
        true => run(options, artifact, &tokens, usize::MAX),
        false => logits(options, artifact, &tokens),
    };
    let [trace_a, trace_b] = [trace(&a)?, trace(&b)?];
    if !tapped {
        screen.note("not both have taps (compile --taps): no kernel can be named, only logits are compared");
    }

    let mut oracle = None;
    let mut bounds = |want: Want, value: &str| -> Result<Option<StoredBound>, DeviceError> {
        if oracle.is_none() {
            // The one with the finer numbers says what is true, the other how much is lost: on the same weights.
            let f32 = DType::F32;
            let (fine, coarse, dtype) =
                if trace_a.dtype == f32 { (&a, &b, trace_b.dtype) } else { (&b, &a, trace_a.dtype) };
            let mut exact = InterpretedProgram::load(fine, Rounding::Exact)?;
            let mut stored = InterpretedProgram::load(coarse, Rounding::Stored)?;
            stored.take_weights(&mut exact)?;
            oracle = Some(Oracle::of(&trace_a, &mut exact, (&mut stored, dtype))?);
        }
        Ok(oracle.as_ref().and_then(|oracle| oracle.bound(want, value)))
    };
    let parting = part(&trace_a, &trace_b, &mut bounds)?;
    for (of, file, trace) in [("a", &a, &trace_a), ("b", &b, &trace_b)] {
        found.lines.push((of.to_string(), format!("{}: {}", file.file().display(), told(trace))));
    }
    add(&parting, found);
    Ok(())
}

fn add(parting: &Parting, found: &mut Found) {
    let Parting { values, equal, single, unjudged, near_ties, worst, bits, wrong } = parting;
    let [values, equal] = [values, equal].map(|&count| grouped(count as u64));
    let mut said = format!("{values} compared, {equal} equal to the bit");
    if *single > 0 {
        said += &format!("; {} that one of both has alone", grouped(*single as u64));
    }
    if *unjudged > 0 {
        said += &format!("; {unjudged} that the interpreter does not have");
    }
    if *near_ties > 0 {
        said += &format!("; {near_ties} near ties");
    }
    found.lines.push(("values".to_string(), said));
    if let Some(bits) = bits {
        found.lines.push(("bits".to_string(), format!("differ from {}", bits.fault())));
        let share = format!("{worst:.3} of what two devices may be apart, at the most");
        found.lines.push(("apart".to_string(), share));
    }
    (found.worst, found.near_ties) = (found.worst.max(*worst), *near_ties);
    [found.fault, found.difference] = [wrong, bits].map(|parted| parted.as_ref().map(Parted::fault));
}

fn told(trace: &Trace) -> String {
    let Trace { model, dtype, target, arithmetic, compiler, .. } = trace;
    format!("{model}, {dtype}, {target} by {arithmetic}, llamac {compiler}")
}

fn run(options: &Options, artifact: &Artifact, tokens: &[i32], samples: usize) -> Result<Trace, CliError> {
    let manifest: Manifest = artifact.manifest()?;
    let target = options.device.machine()?.choose(artifact.file(), &manifest)?;
    let mut program = options.device()?.load_tapped(artifact)?;
    let graphs = stored::fused(artifact, target, program.plan()).map_err(TraceError::from)?;
    Ok(Trace::record(&mut *program, (&manifest, target), &graphs, tokens, samples)?)
}

fn logits(options: &Options, artifact: &Artifact, tokens: &[i32]) -> Result<Trace, CliError> {
    let manifest: Manifest = artifact.manifest()?;
    let target = options.device.machine()?.choose(artifact.file(), &manifest)?;
    let plan = read_plan(artifact, target)?;
    let mut program = options.device()?.load(artifact)?;
    Ok(Trace::record_logits(&mut *program, (&manifest, target), &plan, tokens, usize::MAX)?)
}
