//! Every instruction of the kernels that ship has a form in the conformance suite: what a GPU gives for it can be recorded, and
//! the emulator stands beside it.

use super::Checked;
use super::command::Place;
use codegen::nvptx::ARCHITECTURES;
use libtest_mimic::Trial;
use runtime::{conformance, fill, ptx};
use std::collections::BTreeSet;

/// Models whose kernels are looked at: small, with heads of 64, with heads of 128.
const MODELS: [&str; 3] = ["builtin", "preset:smollm2-135m", "preset:llama-7b"];

/// A test for each model, and one for what the runtime launches itself.
pub fn trials() -> Vec<Trial> {
    let of_model = |model: &'static str| {
        Trial::test(format!("instructions of {model} are in the conformance suite"), move || {
            Ok(model_has_forms(model)?)
        })
    };
    let runtime = "instructions of the runtime's own kernels are in the conformance suite";
    let mut trials: Vec<Trial> = MODELS.map(of_model).into();
    trials.push(Trial::test(runtime, || Ok(runtime_has_forms()?)));
    trials
}

/// Instructions of a text, with all their modifiers, that no form has in its kernel.
fn missing(text: &str) -> Checked<Vec<String>> {
    let kernels: Vec<String> = conformance::forms().iter().map(conformance::Form::ptx).collect();
    let mut known = BTreeSet::new();
    for kernel in &kernels {
        known.extend(ptx::opcodes(kernel)?);
    }
    Ok(ptx::opcodes(text)?.difference(&known).map(|opcode| opcode.to_string()).collect())
}

fn none_missing(what: &str, text: &str) -> Checked<()> {
    match &missing(text)?[..] {
        [] => Ok(()),
        missing => Err(format!(
            "{what}: no form in runtime/src/conformance has {}: add a row to a table there",
            missing.join(", ")
        )
        .into()),
    }
}

fn model_has_forms(model: &str) -> Checked<()> {
    let place = Place::new();
    for architecture in &ARCHITECTURES {
        for dtype in ["f32", "bf16"] {
            let target = format!("cuda:{}", architecture.cpu);
            let text = place.ok(&format!("emit {model} --stage ptx --target {target} --dtype {dtype}")).out;
            none_missing(&format!("{model} in {dtype} for {target}"), &text)?;
        }
    }
    Ok(())
}

fn runtime_has_forms() -> Checked<()> {
    let fill = fill::ptx();
    none_missing("weights from a seed", &fill)?;
    none_missing("the end of a step", include_str!("../../runtime/src/cuda/advance.ptx"))?;
    // One that nobody has is named.
    let planted = fill.replacen("xor.b64", "xor.b64.planted", 1);
    assert_eq!(missing(&planted)?, ["xor.b64.planted"]);
    Ok(())
}
