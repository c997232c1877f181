//! What `compare` judges: a program against a reference, a checkpoint and the interpreter.
//!
//! * [`weights`]: the graph and each packed weight of an artifact, bit for bit against the checkpoint.
//! * [`ops`] (feature `compiler`): each launch, on what the program itself fed it.
//! * [`stored`]: what a launch has left in memory, value by value; [`memory`]: tensors as a kernel's parameters hold them.
//! * [`trace`] (feature `compiler`): what each launch stores, as a text for other machines, and where two of them part.
//! * [`reproducer`] (feature `compiler`): a fault in a folder, and that shown again.
//! * [`layers`] (feature `compiler`): what each layer gives, and what each module of a reference does.
//! * [`logits`]: what the program says, against reference logits.
//!
//! Tolerances are [`crate::judge`]'s.

#[cfg(feature = "compiler")]
pub mod layers;
pub mod logits;
pub mod memory;
#[cfg(feature = "compiler")]
pub mod ops;
#[cfg(feature = "compiler")]
pub mod reproducer;
pub mod stored;
#[cfg(feature = "compiler")]
pub mod trace;
pub mod weights;

use serde::Serialize;
use std::fmt;

/// The first thing that is wrong, and where.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Fault {
    /// Layer, from 0; none outside of the layers.
    pub layer: Option<usize>,
    /// Group of the graph, module of the checkpoint, or value.
    pub op: Option<String>,
    /// The kernel that reads or computes it.
    pub kernel: Option<String>,
    /// The kernel's schedule.
    pub schedule: Option<String>,
    /// Where in the tensor.
    pub index: Vec<usize>,
    /// What stands there.
    pub found: Seen,
    /// What should.
    pub expected: Seen,
    /// The tensor, and by how much it is wrong.
    pub what: String,
}

/// A number, or text where there is none.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Seen {
    Number(f64),
    Text(String),
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Seen::Number(x) => write!(f, "{x:e}"),
            Seen::Text(text) => f.write_str(text),
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(layer) = self.layer {
            write!(f, "layer {layer}, ")?;
        }
        if let Some(op) = &self.op {
            write!(f, "{op}")?;
            if let (Some(kernel), Some(schedule)) = (&self.kernel, &self.schedule) {
                write!(f, " (kernel @{kernel}, schedule \"{schedule}\")")?;
            }
            f.write_str(": ")?;
        }
        let Fault { index, found, expected, what, .. } = self;
        match index.is_empty() {
            true => write!(f, "{what}: found {found}, expected {expected}"),
            false => write!(f, "{what}: element {index:?} is {found}, expected {expected}"),
        }
    }
}

/// The layer in the name of a value (`l3.q`), a state (`k.3`) or a tensor (`model.layers.3.mlp.up_proj.weight`), and the
/// rest of the name.
pub fn layer_of(name: &str) -> (Option<usize>, &str) {
    let number = |text: &str| text.parse::<usize>().ok();
    let after = name.strip_prefix("model.layers.").or_else(|| name.strip_prefix('l'));
    if let Some((layer, rest)) = after.and_then(|rest| rest.split_once('.'))
        && let Some(layer) = number(layer)
    {
        return (Some(layer), rest);
    }
    // The layer itself.
    if let Some(layer) = name.strip_prefix("model.layers.").and_then(number) {
        return (Some(layer), name);
    }
    match name.split_once('.') {
        Some((state @ ("k" | "v"), layer)) => (number(layer), state),
        _ => (None, name),
    }
}

#[cfg(test)]
mod tests {
    use super::layer_of;

    #[test]
    fn layers_stand_in_names() {
        assert_eq!(layer_of("l3.q"), (Some(3), "q"));
        assert_eq!(layer_of("v.12"), (Some(12), "v"));
        assert_eq!(layer_of("model.layers.0.mlp.up_proj.weight"), (Some(0), "mlp.up_proj.weight"));
        assert_eq!(layer_of("model.layers.7"), (Some(7), "model.layers.7"));
        assert_eq!(layer_of("logits"), (None, "logits"));
        assert_eq!(layer_of("model.norm.weight"), (None, "model.norm.weight"));
    }
}
