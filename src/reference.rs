//! Reference files: what a model's logits are in f64, and its greedy continuations.
//!
//! A file is safetensors with one JSON object, `reference`, in its metadata. For prompt `I` of `T` tokens:
//!
//! | tensor | type and shape | meaning |
//! |---|---|---|
//! | `pI.tokens` | i32 `[T]` | the prompt |
//! | `pI.logits_f64` | f64 `[T, V]` | logits at every position |
//! | `pI.top_tokens`, `pI.top_logits` | i32, f64 `[T, K]` | instead: the K largest alone |
//! | `pI.greedy`, `pI.greedy_second` | i32 `[N]` | the best and second best token of each greedy step |
//! | `pI.greedy_margin` | f64 `[N]` | by how much the best is better |
//! | `pI.NAME.input`, `pI.NAME.output` | f64 `[T, W]` | optional: what the module NAME (`model.layers.3`, `model.layers.3.mlp.down_proj`) reads and gives |
//!
//! and `reference.prompts[I].f32_max_error`: the largest error of a logit of the library that wrote the file, in f32.
//! `tools/write-reference.py` writes such a file.

use crate::compare::logits::all_logits;
use crate::file_error::FileError;
use crate::judge::ReferenceStep;
use ir::interp::Tensor;
use runtime::device::{DeviceError, Program, Step, Want, feed};
use runtime::interpreter::InterpretedProgram;
use safetensors::SafeTensors;
use safetensors::tensor::Dtype;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// What a model should say.
#[derive(Clone, Debug)]
pub struct Reference {
    /// One after the other, each from position 0.
    pub prompts: Vec<Prompt>,
}

/// What a model should say to one prompt.
#[derive(Clone, Debug)]
pub struct Prompt {
    /// At least one.
    pub tokens: Vec<i32>,
    /// Which logits are known at each position, by token, and what they are in f64.
    pub logits: Vec<Vec<(usize, f64)>>,
    /// Are all logits known?
    pub whole: bool,
    /// Largest error of a logit of an honest f32 program.
    pub f32_error: f64,
    /// Its greedy continuation.
    pub greedy: Vec<ReferenceStep>,
    /// What modules read and give, in f64, by `NAME.input` and `NAME.output`; `[T, width]` each.
    pub modules: BTreeMap<String, Tensor>,
}

impl Reference {
    /// Reads a file for a model with `vocab` tokens.
    ///
    /// # Errors
    ///
    /// [`FileError`].
    pub fn read(file: &Path, vocab: usize) -> Result<Reference, FileError> {
        let bytes = fs::read(file).map_err(|source| FileError::Read { file: file.to_path_buf(), source })?;
        let format = |source| FileError::Format { file: file.to_path_buf(), source };
        let (_, metadata) = SafeTensors::read_metadata(&bytes).map_err(format)?;
        let tensors = SafeTensors::deserialize(&bytes).map_err(format)?;
        let text = metadata.metadata().as_ref().and_then(|m| m.get("reference")).cloned().unwrap_or_default();
        let described: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
        let reader = Reader { file, tensors, vocab };
        let Some(described) = described["prompts"].as_array().filter(|prompts| !prompts.is_empty()) else {
            return Err(reader.content("metadata `reference`", "no prompts", "a list of prompts"));
        };
        let prompt = |(number, of): (usize, &serde_json::Value)| {
            let f32_error = of["f32_max_error"].as_f64().ok_or_else(|| {
                reader.content(format!("prompt {number}: `f32_max_error`"), "nothing", "a number")
            })?;
            let prompt = reader.prompt(number, f32_error)?;
            Ok(Prompt { modules: reader.modules(number, prompt.tokens.len())?, ..prompt })
        };
        Ok(Reference { prompts: described.iter().enumerate().map(prompt).collect::<Result<_, _>>()? })
    }

    /// What the interpreters say where there is no file: the truth in f64 by `exact`, an honest error by `stored`, which
    /// rounds what it stores. Prompts are of ids from a fixed sequence; `steps` greedy steps follow each.
    ///
    /// # Errors
    ///
    /// What an interpreter says, such as that a prompt does not fit.
    pub fn interpreted(
        exact: &mut InterpretedProgram,
        stored: &mut InterpretedProgram,
        lengths: &[usize],
        steps: usize,
    ) -> Result<Reference, DeviceError> {
        let mut prompts = Vec::new();
        let (vocab, context) = (exact.vocab(), exact.context());
        let mut ids = ids(vocab);
        for &length in lengths.iter().filter(|&&length| length + steps <= context) {
            let tokens: Vec<i32> = ids.by_ref().take(length).collect();
            let mut state = exact.state()?;
            let logits = feed(exact, &tokens, None, Want::AllLogits, &mut state)?.logits;
            let honest = all_logits(stored, &tokens, None)?;
            let errors = logits.iter().zip(&honest).map(|(a, b)| f64::from((a - b).abs()));
            let f32_error = errors.fold(0.0, f64::max);
            let mut greedy = Vec::new();
            let mut last = logits[logits.len() - vocab..].to_vec();
            for _ in 0..steps {
                let step = best_two(&last);
                greedy.push(step);
                last = exact.run(&Step { tokens: &[step.token], want: Want::Logits }, &mut state)?.logits;
            }
            let row = |row: &[f32]| row.iter().map(|&x| f64::from(x)).enumerate().collect();
            let logits = logits.chunks_exact(vocab).map(row).collect();
            let modules = BTreeMap::new();
            prompts.push(Prompt { tokens, logits, whole: true, f32_error, greedy, modules });
        }
        Ok(Reference { prompts })
    }
}

/// Token ids that look like none in particular: a fixed sequence.
pub fn ids(vocab: usize) -> impl Iterator<Item = i32> {
    (1u64..).map(move |n| ((n.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 33) as usize % vocab) as i32)
}

/// The best token of a row and the second best, the lowest id on ties.
fn best_two(row: &[f32]) -> ReferenceStep {
    let best = |but: usize| {
        let others = (0..row.len()).filter(|&id| id != but);
        others.reduce(|best, id| if row[id] > row[best] { id } else { best }).unwrap_or(0)
    };
    let token = best(usize::MAX);
    let second = best(token);
    let margin = f64::from(row[token]) - f64::from(row[second]);
    ReferenceStep { token: token as i32, second: second as i32, margin }
}

struct Reader<'f> {
    file: &'f Path,
    tensors: SafeTensors<'f>,
    vocab: usize,
}

impl Reader<'_> {
    fn content(&self, what: impl ToString, found: impl ToString, expected: impl ToString) -> FileError {
        let (file, what) = (self.file.to_path_buf(), what.to_string());
        FileError::Content { file, what, found: found.to_string(), expected: expected.to_string() }
    }

    fn prompt(&self, number: usize, f32_error: f64) -> Result<Prompt, FileError> {
        let name = |name: &str| format!("p{number}.{name}");
        let tokens = self.ids(&name("tokens"), None)?;
        if tokens.is_empty() {
            return Err(self.content(name("tokens"), "no token", "at least one"));
        }
        let whole = self.tensors.tensor(&name("logits_f64")).is_ok();
        let known: Vec<(usize, f64)> = if whole {
            let all = self.f64s(&name("logits_f64"), tokens.len() * self.vocab)?;
            all.into_iter().enumerate().map(|(at, x)| (at % self.vocab, x)).collect()
        } else {
            let ids = self.ids(&name("top_tokens"), None)?;
            let values = self.f64s(&name("top_logits"), ids.len())?;
            ids.into_iter().map(|id| id as usize).zip(values).collect()
        };
        let row = known.len() / tokens.len();
        if row == 0 || !known.len().is_multiple_of(tokens.len()) {
            return Err(self.content(
                name("top_tokens"),
                known.len(),
                format!("rows for {} tokens", tokens.len()),
            ));
        }
        let best = self.ids(&name("greedy"), None)?;
        let second = self.ids(&name("greedy_second"), Some(best.len()))?;
        let margins = self.f64s(&name("greedy_margin"), best.len())?;
        let steps = best.into_iter().zip(second).zip(margins);
        let greedy = steps.map(|((token, second), margin)| ReferenceStep { token, second, margin }).collect();
        let logits = known.chunks_exact(row).map(<[_]>::to_vec).collect();
        let modules = BTreeMap::new();
        Ok(Prompt { tokens, logits, whole, f32_error, greedy, modules })
    }

    /// What modules read and give.
    fn modules(&self, number: usize, tokens: usize) -> Result<BTreeMap<String, Tensor>, FileError> {
        let prefix = format!("p{number}.");
        let mut modules = BTreeMap::new();
        for name in self.tensors.names() {
            let Some(module) = name.strip_prefix(&prefix) else { continue };
            if !module.ends_with(".input") && !module.ends_with(".output") {
                continue;
            }
            let bytes = self.bytes(name, Dtype::F64)?;
            let shape = self.tensors.tensor(name).map_or(Vec::new(), |tensor| tensor.shape().to_vec());
            if shape.len() != 2 || shape[0] != tokens {
                return Err(self.content(name, format!("{shape:?}"), format!("[{tokens}, width]")));
            }
            let data = bytes.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b)).collect();
            modules.insert(module.to_string(), Tensor { dtype: ir::DType::F64, shape, data });
        }
        Ok(modules)
    }

    /// Token ids of the model.
    fn ids(&self, name: &str, len: Option<usize>) -> Result<Vec<i32>, FileError> {
        let bytes = self.bytes(name, Dtype::I32)?;
        let ids: Vec<i32> = bytes.as_chunks().0.iter().map(|b| i32::from_le_bytes(*b)).collect();
        if let Some(len) = len.filter(|&len| len != ids.len()) {
            return Err(self.content(name, ids.len(), len));
        }
        let known = |id: i32| usize::try_from(id).is_ok_and(|id| id < self.vocab);
        match ids.iter().find(|&&id| !known(id)) {
            Some(id) => Err(self.content(name, format!("token {id}"), format!("0..{}", self.vocab))),
            None => Ok(ids),
        }
    }

    fn f64s(&self, name: &str, len: usize) -> Result<Vec<f64>, FileError> {
        let bytes = self.bytes(name, Dtype::F64)?;
        if bytes.len() != 8 * len {
            return Err(self.content(name, format!("{} numbers", bytes.len() / 8), len));
        }
        Ok(bytes.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b)).collect())
    }

    fn bytes(&self, name: &str, dtype: Dtype) -> Result<&[u8], FileError> {
        let Ok(tensor) = self.tensors.tensor(name) else {
            return Err(self.content(name, "nothing", format!("a tensor of {dtype:?}")));
        };
        if tensor.dtype() != dtype {
            return Err(self.content(name, format!("{:?}", tensor.dtype()), format!("{dtype:?}")));
        }
        Ok(tensor.data())
    }
}
