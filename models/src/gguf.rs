//! GGUF files, versions 2 and 3: config, tensors and tokenizer in one file, presented as Hugging Face's.
//!
//! [`container`] reads the format; here its keys and tensors get their meaning. Source: ggml's `docs/gguf.md`, and
//! llama.cpp's `llama-arch.cpp`, `llama-model.cpp` and `convert_hf_to_gguf.py` for what architecture `llama` means.
//!
//! What is checked: every `llama.*` key is known or holds the value that changes nothing.

pub mod container;

use std::io;
use std::path::Path;

use indexmap::IndexMap;
use ir::DType;

use self::container::{Gguf, Value, shown};
use crate::checkpoint::{Format, OpenFile, Parts, StoredTensor};
use crate::config::{Config, Rope, RopeKind};
use crate::dequant;
use crate::error::ReadError;
use crate::tokenizer::{Origin, TokenizerError, TokenizerSource};
use crate::tokenizer_json::{self, ByteLevelBpe, Piece, PieceKind, Pieces};

/// Reads a GGUF file as a checkpoint.
pub(crate) fn read(file: &Path, open: OpenFile) -> Result<Parts, ReadError> {
    let bytes = match open(file) {
        Ok(bytes) => bytes,
        Err(source) if source.kind() == io::ErrorKind::NotFound => {
            let expected = "a Hugging Face directory or a .gguf file";
            return Err(ReadError::NoCheckpoint { file: file.into(), found: "nothing".into(), expected });
        }
        Err(source) => return Err(ReadError::Io { file: file.into(), source }),
    };
    let Gguf { version, metadata, mut tensors } = Gguf::read(file, (*bytes).as_ref())?;
    let rope_factors = take_rope_factors(file, &mut tensors, (*bytes).as_ref())?;
    for tensor in &mut tensors {
        tensor.name = hugging_face_name(&tensor.name);
    }

    let mut keys = Keys { metadata, file, prefix: "llama" };
    if keys.one_of("general.architecture", &["llama"])?.is_none() {
        return Err(keys.missing("general.architecture", "`llama`"));
    }
    let (tokenizer, special) = read_tokenizer(&mut keys)?;
    let chat_template = keys.string("tokenizer.chat_template")?;
    let config = read_config(&mut keys, &tensors, special, rope_factors)?;
    let ignored_keys = keys.finish()?;
    config.check(file)?;
    let files = vec![(file.to_owned(), bytes, tensors)];
    let format = Format::Gguf(version);
    Ok(Parts { config, format, ignored_keys, tokenizer, chat_template, files, pairs: true })
}

/// GGUF's names within a layer and Hugging Face's.
#[rustfmt::skip] // a table: one tensor a line
const LAYER_NAMES: [(&str, &str); 9] = [
    ("attn_norm",   "input_layernorm"),
    ("attn_q",      "self_attn.q_proj"),
    ("attn_k",      "self_attn.k_proj"),
    ("attn_v",      "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_norm",    "post_attention_layernorm"),
    ("ffn_gate",    "mlp.gate_proj"),
    ("ffn_up",      "mlp.up_proj"),
    ("ffn_down",    "mlp.down_proj"),
];

/// The Hugging Face name of a tensor, or the name as it is if it has none: no config asks for that one.
fn hugging_face_name(name: &str) -> String {
    let in_layer = || {
        let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
        let (stem, end) = rest.rsplit_once('.')?;
        let (_, stem) = LAYER_NAMES.iter().find(|row| row.0 == stem)?;
        Some(format!("model.layers.{layer}.{stem}.{end}"))
    };
    match name {
        "token_embd.weight" => "model.embed_tokens.weight".into(),
        "output_norm.weight" => "model.norm.weight".into(),
        "output.weight" => "lm_head.weight".into(),
        _ => in_layer().unwrap_or_else(|| name.to_owned()),
    }
}

/// Takes `rope_freqs.weight` out: what each pair's frequency is divided by.
fn take_rope_factors(
    file: &Path,
    tensors: &mut Vec<StoredTensor>,
    bytes: &[u8],
) -> Result<Option<Vec<f32>>, ReadError> {
    let Some(at) = tensors.iter().position(|tensor| tensor.name == "rope_freqs.weight") else {
        return Ok(None);
    };
    let StoredTensor { name, dtype, shape, bytes: range } = tensors.remove(at);
    if dtype != DType::F32 {
        return Err(ReadError::DType {
            file: file.into(),
            tensor: name,
            found: dtype.name().into(),
            known: &["F32"],
        });
    }
    let mut factors = vec![0.0; shape.iter().product()];
    dequant::decode(dtype, &bytes[range], &mut factors);
    Ok(Some(factors))
}

/// Metadata that has not been read yet.
struct Keys<'a> {
    metadata: IndexMap<String, Value>,
    file: &'a Path,
    /// The architecture, with which its keys begin.
    prefix: &'static str,
}

impl Keys<'_> {
    fn take(&mut self, key: &str) -> Option<Value> {
        self.metadata.shift_remove(key)
    }

    fn bad(&self, key: &str, found: &Value, expected: &str) -> ReadError {
        ReadError::Value {
            file: self.file.into(),
            key: key.into(),
            found: shown(found),
            expected: expected.into(),
        }
    }

    fn missing(&self, key: &str, expected: &'static str) -> ReadError {
        ReadError::MissingKey { file: self.file.into(), key: key.into(), expected }
    }

    fn integer(&mut self, key: &str) -> Result<Option<u32>, ReadError> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::Integer(found)) if (0..=1 << 31).contains(&found) => Ok(Some(found as u32)),
            Some(found) => Err(self.bad(key, &found, "an integer from 0 to 2^31")),
        }
    }

    /// A size of the architecture.
    fn size(&mut self, key: &str) -> Result<Option<usize>, ReadError> {
        let key = format!("{}.{key}", self.prefix);
        Ok(self.integer(&key)?.map(|size| size as usize))
    }

    fn required_size(&mut self, key: &str) -> Result<usize, ReadError> {
        let size = self.size(key)?;
        size.ok_or_else(|| self.missing(&format!("{}.{key}", self.prefix), "an integer"))
    }

    /// A number of the architecture. f32 stands for the shortest decimal that reads as it, which is what the
    /// converter was given: 1e-5 and not 9.99999975e-6.
    fn number(&mut self, key: &str) -> Result<Option<f64>, ReadError> {
        let key = format!("{}.{key}", self.prefix);
        match self.take(&key) {
            None => Ok(None),
            Some(Value::F32(found)) if found.is_finite() => {
                Ok(Some(found.to_string().parse().expect("a printed number reads as one")))
            }
            Some(Value::F64(found)) if found.is_finite() => Ok(Some(found)),
            Some(found) => Err(self.bad(&key, &found, "a finite floating-point number")),
        }
    }

    fn flag(&mut self, key: &str) -> Result<Option<bool>, ReadError> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::Bool(found)) => Ok(Some(found)),
            Some(found) => Err(self.bad(key, &found, "a boolean")),
        }
    }

    fn string(&mut self, key: &str) -> Result<Option<String>, ReadError> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::String(found)) => Ok(Some(found)),
            Some(found) => Err(self.bad(key, &found, "a string")),
        }
    }

    fn one_of(&mut self, key: &str, known: &'static [&'static str]) -> Result<Option<String>, ReadError> {
        let found = self.string(key)?;
        if let Some(found) = found.as_ref().filter(|found| !known.contains(&found.as_str())) {
            let found = found.chars().take(80).collect();
            return Err(ReadError::UnknownValue { file: self.file.into(), key: key.into(), found, known });
        }
        Ok(found)
    }

    fn strings(&mut self, key: &str) -> Result<Option<Vec<String>>, ReadError> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::Strings(found)) => Ok(Some(found)),
            Some(found) => Err(self.bad(key, &found, "an array of strings")),
        }
    }

    /// Judges the keys that nobody read: an error for the first that changes the mathematics, else their names.
    fn finish(self) -> Result<Vec<String>, ReadError> {
        let Keys { metadata, file, prefix } = self;
        for (key, value) in &metadata {
            if let Some(accepted) = accepted_instead(prefix, key, value) {
                return Err(ReadError::UnknownKey {
                    file: file.into(),
                    key: key.clone(),
                    found: shown(value),
                    expected: format!("{accepted} is accepted"),
                });
            }
        }
        Ok(metadata.into_keys().collect())
    }
}

/// What would be accepted in place of a value that changes the mathematics, or makes the file a part of one.
fn accepted_instead(prefix: &str, key: &str, value: &Value) -> Option<&'static str> {
    if key == "split.count" {
        return (!matches!(value, Value::Integer(0 | 1))).then_some("a file that is not split");
    }
    let inner = key.strip_prefix(prefix)?.strip_prefix('.')?;
    match NEUTRAL.iter().find(|row| row.0 == inner) {
        None => Some("a file without it"),
        Some((_, "")) => None,
        Some((_, neutral)) => (shown(value) != *neutral).then_some(neutral),
    }
}

/// Keys of the architecture that nobody reads, and the value that changes nothing; empty where none does.
const NEUTRAL: [(&str, &str); 10] = [
    ("attention.causal", "true"),
    ("attention.layer_norm_epsilon", ""),
    ("attention.sliding_window", "0"),
    ("expert_count", "0"),
    ("expert_used_count", "0"),
    ("rope.scaling.finetuned", ""),
    ("rope.scaling.yarn_ext_factor", "1"),
    ("rope.scaling.yarn_log_multiplier", "0"),
    ("tensor_data_layout", ""),
    ("use_parallel_residual", "false"),
];

/// Rope scalings that are known, as GGUF writes them.
const ROPE_SCALINGS: [&str; 3] = ["none", "linear", "yarn"];

/// Tokens that the tokenizer's metadata names.
struct Special {
    bos: Option<u32>,
    eos: Vec<u32>,
    n_tokens: Option<usize>,
}

fn read_config(
    keys: &mut Keys,
    tensors: &[StoredTensor],
    special: Special,
    rope_factors: Option<Vec<f32>>,
) -> Result<Config, ReadError> {
    let hidden_size = keys.required_size("embedding_length")?;
    let n_heads = keys.required_size("attention.head_count")?;
    let key_length = keys.size("attention.key_length")?;
    let head_dim = match key_length {
        Some(head_dim) => head_dim,
        None => hidden_size.checked_div(n_heads).unwrap_or(0),
    };
    // Values as long as keys, all of a head turned: no LLaMA is otherwise.
    for key in ["attention.value_length", "rope.dimension_count"] {
        if let Some(found) = keys.size(key)?.filter(|&found| found != head_dim) {
            let expected = format!("{head_dim}, the length of a head's keys");
            return Err(keys.bad(&format!("llama.{key}"), &Value::Integer(found as i128), &expected));
        }
    }
    let vocab_size = match keys.size("vocab_size")?.or(special.n_tokens) {
        Some(vocab_size) => vocab_size,
        None => return Err(keys.missing("llama.vocab_size", "an integer")),
    };
    let context = keys.required_size("context_length")?;
    let has = |name: &str| tensors.iter().any(|tensor| tensor.name == name);
    Ok(Config {
        vocab_size,
        hidden_size,
        intermediate_size: keys.required_size("feed_forward_length")?,
        n_layers: keys.required_size("block_count")?,
        n_heads,
        n_kv_heads: keys.size("attention.head_count_kv")?.unwrap_or(n_heads),
        head_dim,
        rms_norm_eps: match keys.number("attention.layer_norm_rms_epsilon")? {
            Some(eps) => eps,
            None => return Err(keys.missing("llama.attention.layer_norm_rms_epsilon", "a number")),
        },
        rope: read_rope(keys, head_dim, context, rope_factors)?,
        attention_bias: has("model.layers.0.self_attn.q_proj.bias"),
        mlp_bias: has("model.layers.0.mlp.gate_proj.bias"),
        tied: !has("lm_head.weight"),
        context,
        bos: special.bos,
        eos: special.eos,
    })
}

fn read_rope(
    keys: &mut Keys,
    head_dim: usize,
    context: usize,
    rope_factors: Option<Vec<f32>>,
) -> Result<Rope, ReadError> {
    let theta = keys.number("rope.freq_base")?.unwrap_or(10_000.0);
    let scaling = keys.one_of("llama.rope.scaling.type", &ROPE_SCALINGS)?;
    let factor = match keys.number("rope.scaling.factor")? {
        Some(factor) => Some(factor),
        // The old name, which meant linear scaling.
        None => keys.number("rope.scale_linear")?,
    };
    let original = keys.size("rope.scaling.original_context_length")?.filter(|&original| original != 0);
    let attn_factor = keys.number("rope.scaling.attn_factor")?;
    let yarn_attn_factor = keys.number("rope.scaling.yarn_attn_factor")?;
    let beta_fast = keys.number("rope.scaling.yarn_beta_fast")?;
    let beta_slow = keys.number("rope.scaling.yarn_beta_slow")?;

    // Factors of 1 and 0 mean no scaling in llama.cpp.
    let scales = factor.filter(|&factor| factor != 0.0 && factor != 1.0);
    let kind = match (scaling.as_deref(), scales) {
        (Some("yarn"), Some(factor)) => RopeKind::Yarn {
            factor,
            original_context: original.unwrap_or(context),
            beta_fast: beta_fast.unwrap_or(32.0),
            beta_slow: beta_slow.unwrap_or(1.0),
            // A factor beside the one that llama.cpp works out itself.
            attention_factor: attn_factor.or(yarn_attn_factor).map(|extra| extra * (0.1 * factor.ln() + 1.0)),
            mscale: None,
            mscale_all_dim: None,
            truncate: true,
        },
        (Some("linear") | None, Some(factor)) => RopeKind::Linear { factor },
        _ => RopeKind::Default,
    };
    let Some(factors) = rope_factors else { return Ok(Rope { theta, kind }) };
    llama3_kind(&factors, theta, head_dim, &kind).map(|kind| Rope { theta, kind }).ok_or_else(|| ReadError::UnknownKey {
        file: keys.file.into(),
        key: "rope_freqs.weight".into(),
        found: format!("{} factors from {:?} to {:?}", factors.len(), factors.first(), factors.last()),
        expected: "factors of rope kind llama3 with low_freq_factor 1, high_freq_factor 4 and an original context of \
                   8192 are known"
            .into(),
    })
}

/// The rope kind whose frequencies these factors divide. Converters write the factors and not the settings that they
/// follow from; the settings are LLaMA 3's, but for `factor`, which is the largest.
fn llama3_kind(factors: &[f32], theta: f64, head_dim: usize, otherwise: &RopeKind) -> Option<RopeKind> {
    if *otherwise != RopeKind::Default || factors.len() != head_dim / 2 || theta <= 1.0 {
        return None;
    }
    let factor = f64::from(*factors.last()?);
    let kind =
        RopeKind::Llama3 { factor, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 8192 };
    let plain = Rope { theta, kind: RopeKind::Default }.inverse_frequencies(head_dim);
    let stretched = Rope { theta, kind: kind.clone() }.inverse_frequencies(head_dim);
    let same = |((plain, stretched), &found): ((&f64, &f64), &f32)| {
        // The converter computes in f32: some units in the last place.
        (plain / stretched / f64::from(found) - 1.0).abs() < 1e-5
    };
    plain.iter().zip(&stretched).zip(factors).all(same).then_some(kind)
}

/// Tokenizers that are known, as GGUF writes them.
const TOKENIZERS: [&str; 2] = ["llama", "gpt2"];

/// Reads `tokenizer.ggml.*`.
fn read_tokenizer(keys: &mut Keys) -> Result<(Option<TokenizerSource>, Special), ReadError> {
    let mut id = |name: &str| keys.integer(&format!("tokenizer.ggml.{name}_token_id"));
    let (bos, eos, unknown) = (id("bos")?, id("eos")?, id("unknown")?);
    // What ends a turn or a message ends generation too, as in llama.cpp.
    let ends = [eos, id("eot")?, id("eom")?];
    let mut eos_list: Vec<u32> = Vec::new();
    for token in ends.into_iter().flatten() {
        if !eos_list.contains(&token) {
            eos_list.push(token);
        }
    }
    let mut special = Special { bos, eos: eos_list, n_tokens: None };

    let Some(model) = keys.one_of("tokenizer.ggml.model", &TOKENIZERS)? else { return Ok((None, special)) };
    let add_bos = keys.flag("tokenizer.ggml.add_bos_token")?;
    let add_eos = keys.flag("tokenizer.ggml.add_eos_token")?.unwrap_or(false);
    let add_space_prefix = keys.flag("tokenizer.ggml.add_space_prefix")?;
    let pre = match model.as_str() {
        "gpt2" => keys.one_of("tokenizer.ggml.pre", &tokenizer_json::PRE_NAMES)?.unwrap_or("default".into()),
        // Of no meaning to sentencepiece.
        _ => keys.string("tokenizer.ggml.pre")?.unwrap_or_default(),
    };
    let Some(tokens) = keys.strings("tokenizer.ggml.tokens")? else {
        return Err(keys.missing("tokenizer.ggml.tokens", "an array of strings"));
    };
    special.n_tokens = Some(tokens.len());
    let scores = match keys.take("tokenizer.ggml.scores") {
        None => vec![0.0; tokens.len()],
        Some(Value::Floats(scores)) => scores,
        Some(found) => return Err(keys.bad("tokenizer.ggml.scores", &found, "an array of floats")),
    };
    let kinds = match keys.take("tokenizer.ggml.token_type") {
        None => vec![1; tokens.len()],
        Some(Value::Integers(kinds)) => kinds,
        Some(found) => return Err(keys.bad("tokenizer.ggml.token_type", &found, "an array of integers")),
    };
    let merges = keys.strings("tokenizer.ggml.merges")?;

    let file = keys.file;
    let refused = |source| ReadError::Tokenizer { file: file.into(), source };
    let pieces = zip_pieces(tokens, &scores, &kinds).map_err(refused)?;
    let source = if model == "llama" {
        let pieces = Pieces {
            pieces,
            unknown,
            bos: bos.filter(|_| add_bos.unwrap_or(true)),
            eos: eos.filter(|_| add_eos),
            space_in_front: add_space_prefix.unwrap_or(true),
            merge_spaces: false,
            specials_in_text: true,
        };
        tokenizer_json::from_pieces(&pieces, Origin::GgufLlama)
    } else {
        let Some(merges) = merges else {
            return Err(keys.missing("tokenizer.ggml.merges", "an array of strings"));
        };
        let bpe = ByteLevelBpe {
            pieces,
            merges,
            bos: bos.filter(|_| add_bos.unwrap_or(pre == "llama-bpe")),
            eos: eos.filter(|_| add_eos),
            space_in_front: add_space_prefix.unwrap_or(false),
            pre,
        };
        tokenizer_json::from_byte_level(&bpe)
    };
    Ok((Some(source.map_err(refused)?), special))
}

/// Kinds of tokens, by their numbers (`llama_token_type`).
fn zip_pieces(tokens: Vec<String>, scores: &[f64], kinds: &[i64]) -> Result<Vec<Piece>, TokenizerError> {
    for (what, found) in [("scores", scores.len()), ("token types", kinds.len())] {
        if found != tokens.len() {
            return Err(TokenizerError::Count { what, found: found as u64, expected: tokens.len() as u64 });
        }
    }
    let piece = |((text, &score), &kind): ((String, &f64), &i64)| {
        let kind = match kind {
            1 => PieceKind::Normal,
            2 => PieceKind::Unknown,
            3 => PieceKind::Control,
            4 => PieceKind::UserDefined,
            5 => PieceKind::Unused,
            6 => PieceKind::Byte,
            _ => {
                let known = &["1 normal", "2 unknown", "3 control", "4 user defined", "5 unused", "6 byte"];
                return Err(TokenizerError::Kind { what: "token type", found: kind.to_string(), known });
            }
        };
        Ok(Piece { text, score, kind })
    };
    tokens.into_iter().zip(scores).zip(kinds).map(piece).collect()
}
