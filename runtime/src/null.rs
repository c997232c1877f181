//! The device that only checks: it loads an artifact for no machine in particular, looks at every launch as if it ran it,
//! and gives zeros.
//!
//! At load, beyond what [`ir::plan::verify`] finds in the plan alone:
//! * **bindings**: the weights that the plan names are in the file;
//! * **aliasing**: of two arguments of one launch that share bytes, both must be weights. A kernel is told that what it
//!   writes is its own, and writes arena and states.
//!
//! At each step: the entry point's symbols, and that inputs, results and caches hold what a step of this size at this
//! position reads and writes.

use crate::artifact::Artifact;
use crate::cpu::{read_plan, weights_of};
use crate::device::{Device, DeviceError, Program, State, Step, StepOutputs, Want};
use crate::manifest::Manifest;
use ir::plan::{Entry, Give, Place, Plan};
use std::path::PathBuf;

/// The device that only checks.
#[derive(Clone, Copy, Debug)]
pub struct Null;

impl Device for Null {
    fn load(&mut self, artifact: &Artifact) -> Result<Box<dyn Program>, DeviceError> {
        Ok(Box::new(NullProgram::load(artifact)?))
    }
}

/// A loaded artifact that never runs.
pub struct NullProgram {
    file: PathBuf,
    section: String,
    plan: Plan,
    context: usize,
}

/// The state of a [`NullProgram`]: nothing.
struct Nothing;

impl NullProgram {
    fn load(artifact: &Artifact) -> Result<NullProgram, DeviceError> {
        let manifest: Manifest = artifact.manifest()?;
        let Some(target) = manifest.targets.first() else {
            return Err(DeviceError::BadPlan {
                file: artifact.file().to_path_buf(),
                section: "plan".to_string(),
                said: "there is none: the artifact has no target".to_string(),
            });
        };
        artifact.require(&target.code_section())?;
        let plan = read_plan(artifact, target)?;
        weights_of(artifact, target, &plan)?;
        let (file, section) = (artifact.file().to_path_buf(), target.plan_section());
        let program = NullProgram { file, section, plan, context: manifest.context };
        for entry in &program.plan.entries {
            check_aliasing(&program.plan, entry).map_err(|said| program.bad(said))?;
        }
        Ok(program)
    }

    fn bad(&self, said: String) -> DeviceError {
        DeviceError::BadPlan { file: self.file.clone(), section: self.section.clone(), said }
    }

    /// Does a step of `tokens` after `past` fit what the plan gave its buffers?
    fn check_step(&self, entry: &Entry, tokens: usize, past: usize) -> Result<(), String> {
        for (symbol, value) in entry.symbols.0.iter().zip([tokens, past]) {
            let (value, min, max) = (value as i64, symbol.min, symbol.max);
            if value < min || max < value {
                return Err(format!("@{}: {} = {value}, not within {min}..{max}", entry.name, symbol.name));
            }
        }
        let rows = match entry.give {
            Give::Nothing | Give::Last => 1,
            Give::All => tokens,
        };
        let sizes = [
            (Some(entry.tokens), 4 * tokens),
            (Some(entry.positions), 4 * tokens),
            (entry.logits, 4 * rows * self.plan.vocab),
            (entry.token, 4),
        ];
        for (buffer, needed) in sizes {
            let Some(buffer) = buffer.map(|b| &self.plan.buffers[b]) else { continue };
            if buffer.bytes < needed {
                let (name, has) = (&buffer.name, buffer.bytes);
                return Err(format!("@{}: `{name}` has {has} bytes, the step needs {needed}", entry.name));
            }
        }
        if past + tokens > self.plan.context {
            let slots = self.plan.context;
            return Err(format!("@{}: {} positions, the cache has {slots}", entry.name, past + tokens));
        }
        Ok(())
    }
}

/// No two arguments of a launch share bytes, but for weights.
fn check_aliasing(plan: &Plan, entry: &Entry) -> Result<(), String> {
    for launch in &entry.launches {
        for (number, &a) in launch.args.iter().enumerate() {
            for &b in &launch.args[..number] {
                if share_bytes(plan, a, b) {
                    let (a, b) = (&plan.buffers[a].name, &plan.buffers[b].name);
                    let kernel = &plan.kernels[launch.kernel].name;
                    return Err(format!("@{}: arguments `{b}` and `{a}` of @{kernel} overlap", entry.name));
                }
            }
        }
    }
    Ok(())
}

/// Do two buffers have a byte in common that a kernel may write?
fn share_bytes(plan: &Plan, a: usize, b: usize) -> bool {
    let (x, y) = (&plan.buffers[a], &plan.buffers[b]);
    match (&x.place, &y.place) {
        (Place::Arena { offset: p }, Place::Arena { offset: q }) => p < &(q + y.bytes) && q < &(p + x.bytes),
        (Place::State, Place::State) => a == b,
        (Place::Weight { .. } | Place::Input | Place::Arena { .. } | Place::State, _) => false,
    }
}

impl Program for NullProgram {
    fn vocab(&self) -> usize {
        self.plan.vocab
    }

    fn context(&self) -> usize {
        self.context
    }

    fn max_tokens(&self, want: Want) -> usize {
        self.plan.max_tokens(want.give())
    }

    fn state(&self) -> Result<State, DeviceError> {
        Ok(State::new(Nothing))
    }

    fn run(&mut self, step: &Step<'_>, state: &mut State) -> Result<StepOutputs, DeviceError> {
        let (number, _) = step.entry(self, &self.plan, state)?;
        state.inner_mut::<Nothing>()?;
        let (tokens, past) = (step.tokens.len(), state.past());
        let entry = &self.plan.entries[number];
        self.check_step(entry, tokens, past).map_err(|said| self.bad(said))?;
        state.advance(tokens);
        let token = (step.want == Want::Token).then_some(0);
        Ok(StepOutputs { token, logits: vec![0.0; step.rows() * self.plan.vocab] })
    }
}
