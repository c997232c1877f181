//! The levels: what each judges, and what it finds.

use super::{Found, LENGTHS, Level, Options, STEPS};
use crate::cli::error::CliError;
use crate::cli::screen::Screen;
use crate::cli::source::{self, BuildOptions, Ready};
use ir::DType;
use ir::interp::Rounding;
use ir::plan::Give;
use llamac::compare::layers::{Layers, LayersError};
use llamac::compare::logits::{Logits, LogitsFault};
use llamac::compare::ops::{Ops, OpsError};
use llamac::compare::reproducer::Reproducer;
use llamac::compare::{Fault, Seen, stored};
use llamac::pipeline::Request;
use llamac::reference::Reference;
use models::Config;
use models::llama::modules;
use runtime::device::DeviceError;
use runtime::interpreter::InterpretedProgram;

/// What is judged, and by what.
#[derive(Clone, Copy)]
pub struct Levels<'a> {
    /// As given.
    pub options: &'a Options,
    /// How what is not compiled is compiled.
    pub build: &'a BuildOptions,
    /// The artifact.
    pub ready: &'a Ready,
    /// Its model's shape.
    pub config: &'a Config,
    /// What another library says.
    pub reference: Option<&'a Reference>,
}

impl Levels<'_> {
    /// Judges at the level that was asked for; what is wrong above the ops is sought among them.
    pub fn judge(self, found: &mut Found, screen: &Screen) -> Result<(), CliError> {
        match (self.options.level, self.reference) {
            (_, Some(reference)) if self.options.modules => return self.modules(reference, found),
            (Level::Op, _) => return self.ops(found),
            (Level::Layer, _) => self.layers(found)?,
            (Level::Logits, _) => self.logits(found)?,
        }
        if found.fault.is_some() { self.localise(found, screen) } else { Ok(()) }
    }

    fn dtype(self) -> DType {
        DType::from_name(&self.ready.manifest.dtype).expect("an artifact's dtype is one")
    }

    fn interpreted(self, rounding: Rounding) -> Result<InterpretedProgram, CliError> {
        Ok(InterpretedProgram::load(&self.ready.artifact, rounding)?)
    }

    fn tokens(self, reference: Option<&Reference>) -> Vec<i32> {
        self.options.tokens(reference, self.config.vocab_size, self.ready.manifest.context)
    }

    /// Judges each launch, on the longest prompt.
    fn ops(self, found: &mut Found) -> Result<(), CliError> {
        let Levels { options, ready, config, .. } = self;
        let choices = ready.model_choices()?;
        let dtype = self.dtype();
        let request = Request { config, dtype, context: ready.manifest.context, measured: choices.as_ref() };
        let lowered = llamac::compile::lower(&request, &ready.target.name, true)?.lowered;
        let mut program = options.device()?.load_tapped(&ready.artifact)?;
        let mut weights = self.interpreted(Rounding::Stored)?;
        let tokens = self.tokens(self.reference);
        let mut ops = Ops::default();
        ops.judge(&mut *program, &lowered, &mut weights, &tokens)?;
        for (layer, shares) in &ops.layers {
            let of = layer.map_or("outside".to_string(), |layer| format!("layer {layer}"));
            let said =
                format!("{:.3} of the hard bound, {:.3} of the statistical", shares.hard, shares.typical);
            found.lines.push((of, said));
        }
        found.lines.push(("ops".to_string(), format!("{} launches judged", ops.launches)));
        found.worst = found.worst.max(ops.worst());
        (found.fault, found.reproducer) = (ops.fault, ops.case.map(Reproducer::Kernel));
        Ok(())
    }

    /// Asks each op whether it is to blame for wrong logits; where none is, the logits stay the first fault.
    fn localise(self, found: &mut Found, screen: &Screen) -> Result<(), CliError> {
        let build = BuildOptions { taps: true, ..self.build.clone() };
        let tapped = source::ready(&self.options.model, &build, screen);
        let logits = found.fault.take();
        match tapped.and_then(|ready| Levels { ready: &ready, ..self }.ops(found)) {
            // What shows no launches, or not those of this llamac, has nothing to say.
            Err(
                error @ (CliError::Device(DeviceError::NoTaps { .. } | DeviceError::NoLaunches { .. })
                | CliError::Ops(OpsError::OtherPlan)),
            ) => screen.note(format!("no op is looked at: {error}")),
            judged => judged?,
        }
        found.fault = found.fault.take().or(logits);
        Ok(())
    }

    /// Judges each layer, on the longest prompt; or the hidden states that a reference has.
    fn layers(self, found: &mut Found) -> Result<(), CliError> {
        let Levels { options, ready, config, .. } = self;
        let graphs = stored::fused(&ready.artifact, &ready.target, &ready.plan).map_err(LayersError::from)?;
        let mut program = options.device()?.load_tapped(&ready.artifact)?;
        let mut weights = self.interpreted(Rounding::Stored)?;
        let mut layers = Layers::default();
        match self.reference {
            Some(reference) => {
                let of = (reference, &*modules(config, self.dtype()));
                layers.judge_reference(&mut *program, &graphs, &mut weights, of)?;
            }
            None => {
                let tokens = self.tokens(None);
                layers.judge(&mut *program, &graphs, &mut weights, &tokens)?;
            }
        }
        found.take(layers);
        Ok(())
    }

    /// Judges each module by a reference's inputs and outputs.
    fn modules(self, reference: &Reference, found: &mut Found) -> Result<(), CliError> {
        let mut weights = self.interpreted(Rounding::Stored)?;
        let entry = self.ready.plan.entries.iter().find(|entry| entry.give == Give::All);
        let entry = entry.ok_or(LayersError::NoEntry)?;
        let mut layers = Layers::default();
        let graph = weights.graph(&entry.name)?.clone();
        layers.judge_modules(&graph, &mut weights, (reference, &modules(self.config, self.dtype())))?;
        found.take(layers);
        Ok(())
    }

    /// Judges what the program says.
    fn logits(self, found: &mut Found) -> Result<(), CliError> {
        let mut program = self.options.device()?.load(&self.ready.artifact)?;
        let mut honest = self.interpreted(Rounding::Stored)?;
        let mut exact = self.interpreted(Rounding::Exact)?;
        let interpreted;
        let (reference, by) = match self.reference {
            Some(reference) => (reference, "the reference"),
            None => {
                interpreted = Reference::interpreted(&mut exact, &mut honest, &LENGTHS, STEPS)?;
                (&interpreted, "the interpreter in f64")
            }
        };
        let mut logits = Logits::default();
        let judged = logits.judge(&mut *program, [&mut honest, &mut exact], reference, self.dtype())?;
        found.near_ties = logits.near_ties;
        found.worst = found.worst.max(logits.share);
        let Logits { share, positions, near_ties, steps, .. } = logits;
        found.lines.push((
            "logits".to_string(),
            format!(
                "{share:.3} of the bound by {by} at {positions} positions; {near_ties} near ties in {steps} greedy steps"
            ),
        ));
        found.fault = judged.err().map(|fault| {
            let what = fault.to_string();
            found.worst = found.worst.max(fault.share());
            let (index, seen, expected) = match fault {
                LogitsFault::Position { position, token, found, expected, .. } => {
                    (vec![position, token], found, expected)
                }
                LogitsFault::Spread { found, bound } | LogitsFault::Weights { found, bound } => {
                    (Vec::new(), found, bound)
                }
                LogitsFault::Greedy { step, found, token, .. } => {
                    (vec![step], f64::from(found), f64::from(token))
                }
            };
            let (found, expected) = (Seen::Number(seen), Seen::Number(expected));
            let op = Some("logits".to_string());
            Fault { layer: None, op, kernel: None, schedule: None, index, found, expected, what }
        });
        Ok(())
    }
}
