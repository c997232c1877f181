//! What a model is: the numbers of a `LlamaForCausalLM`, read from `config.json`, and the rotary frequencies
//! that follow from them.
//!
//! A config is trusted once it exists: [`Config::check`] has bounded every size, so that products of a few of
//! them fit `u64`, and every head count divides as attention needs it.

use std::f64::consts::PI;
use std::path::Path;

use indexmap::IndexMap;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::ReadError;
use crate::json;

/// A model of the LLaMA family, as data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Config {
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// Transformer layers.
    pub n_layers: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads; divides `n_heads`.
    pub n_kv_heads: usize,
    /// Elements of one head; even. Need not be `hidden_size / n_heads`.
    pub head_dim: usize,
    /// Added to the mean square in RMSNorm.
    pub rms_norm_eps: f64,
    /// Rotary embedding.
    pub rope: Rope,
    /// Biases on the q, k, v and o projections.
    pub attention_bias: bool,
    /// Biases on the gate, up and down projections.
    pub mlp_bias: bool,
    /// The head is the embedding, transposed; there is no `lm_head.weight`.
    pub tied: bool,
    /// Positions that the model was made for (`max_position_embeddings`).
    pub context: usize,
    /// Token that begins a text.
    pub bos: Option<u32>,
    /// Tokens that end a text.
    pub eos: Vec<u32>,
}

/// Rotary position embedding: pair `i` of a head turns by `position * inverse_frequencies[i]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rope {
    /// Base of the geometric series of wavelengths.
    pub theta: f64,
    /// How the frequencies are stretched for long contexts.
    pub kind: RopeKind,
}

/// How rotary frequencies are stretched, as `modeling_rope_utils.py` of transformers defines it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "kind")]
pub enum RopeKind {
    /// Not at all.
    Default,
    /// All by one factor (position interpolation, Chen et al. 2023).
    Linear {
        /// What frequencies are divided by.
        factor: f64,
    },
    /// Long wavelengths by `factor`, short ones not, those between by both in turn (LLaMA 3.1).
    Llama3 {
        /// What the frequencies of long wavelengths are divided by.
        factor: f64,
        /// Wavelengths above `original_context / low_freq_factor` are long.
        low_freq_factor: f64,
        /// Wavelengths below `original_context / high_freq_factor` are short.
        high_freq_factor: f64,
        /// Context before stretching.
        original_context: usize,
    },
    /// A ramp over the pairs between interpolation and extrapolation (YaRN, Peng et al. 2023), and a factor on
    /// cos and sin.
    Yarn {
        /// What the frequencies of long wavelengths are divided by.
        factor: f64,
        /// Context before stretching.
        original_context: usize,
        /// Pairs that turn more often than this in `original_context` keep their frequency.
        beta_fast: f64,
        /// Pairs that turn less often than this are divided by `factor`.
        beta_slow: f64,
        /// Factor on cos and sin; by default [`Rope::attention_factor`] works it out.
        attention_factor: Option<f64>,
        /// Numerator of the default attention factor.
        mscale: Option<f64>,
        /// Denominator of the default attention factor.
        mscale_all_dim: Option<f64>,
        /// Round the ends of the ramp outwards to whole pairs.
        truncate: bool,
    },
}

/// Rope kinds that are known, as configs write them.
const ROPE_KINDS: [&str; 4] = ["default", "linear", "llama3", "yarn"];

impl Rope {
    /// Radians a position for each of the `head_dim / 2` pairs, by the formulas of transformers, in f64.
    ///
    /// `head_dim` is even, as [`Config::check`] demands.
    pub fn inverse_frequencies(&self, head_dim: usize) -> Vec<f64> {
        let plain: Vec<f64> =
            (0..head_dim / 2).map(|i| self.theta.powf((2 * i) as f64 / head_dim as f64).recip()).collect();
        match self.kind {
            RopeKind::Default => plain,
            RopeKind::Linear { factor } => plain.into_iter().map(|frequency| frequency / factor).collect(),
            RopeKind::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                let stretch = |frequency: f64| {
                    let turns = original_context as f64 * frequency / (2.0 * PI);
                    if turns < low_freq_factor {
                        return frequency / factor;
                    }
                    if turns > high_freq_factor {
                        return frequency;
                    }
                    let smooth = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    (1.0 - smooth) * frequency / factor + smooth * frequency
                };
                plain.into_iter().map(stretch).collect()
            }
            RopeKind::Yarn { factor, original_context, beta_fast, beta_slow, truncate, .. } => {
                // The pair that turns `turns` times within the original context.
                let pair = |turns: f64| {
                    let ratio = original_context as f64 / (turns * 2.0 * PI);
                    head_dim as f64 * ratio.ln() / (2.0 * self.theta.ln())
                };
                let (mut low, mut high) = (pair(beta_fast), pair(beta_slow));
                if truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                // `head_dim - 1` and not `head_dim / 2 - 1`: transformers clamps so, and models were trained so.
                (low, high) = (low.max(0.0), high.min((head_dim - 1) as f64));
                if low == high {
                    high += 0.001;
                }
                let ramp = |i: usize| ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                let blend =
                    |(i, frequency): (usize, f64)| frequency / factor * ramp(i) + frequency * (1.0 - ramp(i));
                plain.into_iter().enumerate().map(blend).collect()
            }
        }
    }

    /// What cos and sin are multiplied by: 1 for all kinds but yarn, there the config's number or, without one,
    /// `m(mscale) / m(mscale_all_dim)` with `m(s) = 0.1 s ln(factor) + 1`, or `m(1)` where either is not given.
    pub fn attention_factor(&self) -> f64 {
        let RopeKind::Yarn { factor, attention_factor, mscale, mscale_all_dim, .. } = self.kind else {
            return 1.0;
        };
        if let Some(given) = attention_factor {
            return given;
        }
        let scale = |mscale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 };
        match (mscale, mscale_all_dim) {
            // Zero counts as not given, as in Python.
            (Some(mscale), Some(all)) if mscale != 0.0 && all != 0.0 => scale(mscale) / scale(all),
            _ => scale(1.0),
        }
    }
}

/// One size of a config.
type SizeOf = fn(&Config) -> usize;

/// Bounds of the sizes. Far above every model, and low enough that [`Config::parameters`] fits `u64`.
#[rustfmt::skip] // a table: one size a line
const LIMITS: [(&str, SizeOf, usize); 8] = [
    ("vocab_size",              |config| config.vocab_size,        1 << 28),
    ("hidden_size",             |config| config.hidden_size,       1 << 20),
    ("intermediate_size",       |config| config.intermediate_size, 1 << 22),
    ("num_hidden_layers",       |config| config.n_layers,          1 << 12),
    ("num_attention_heads",     |config| config.n_heads,           1 << 12),
    ("num_key_value_heads",     |config| config.n_kv_heads,        1 << 12),
    ("head_dim",                |config| config.head_dim,          1 << 12),
    ("max_position_embeddings", |config| config.context,           1 << 31),
];

impl Config {
    /// Reads a Hugging Face `config.json`, in either spelling of the rope settings (`rope_theta` and
    /// `rope_scaling` at the top, or both in `rope_parameters`); defaults are those of transformers'
    /// `LlamaConfig`. Also gives the keys that were read past because they do not touch the mathematics.
    ///
    /// # Errors
    ///
    /// [`ReadError`] with `file` and the key: not an object, a key missing, twice, of the wrong type or out of
    /// range; an unknown architecture, activation or rope kind; a key that changes what is computed.
    pub fn from_hf_json(text: &str, file: &Path) -> Result<(Config, Vec<String>), ReadError> {
        let mut keys = Keys::new(json::object(text.as_bytes(), file)?, "", file);
        keys.one_of("model_type", &["llama"])?;
        keys.architecture()?;
        keys.one_of("hidden_act", &["silu", "swish"])?;

        let hidden_size = keys.required_size("hidden_size")?;
        let n_heads = keys.required_size("num_attention_heads")?;
        let head_dim = match keys.size("head_dim")? {
            Some(head_dim) => head_dim,
            None if hidden_size.is_multiple_of(n_heads) => hidden_size / n_heads,
            None => {
                let expected = format!("a multiple of num_attention_heads = {n_heads}, or a key `head_dim`");
                return Err(keys.bad_value("hidden_size", &hidden_size.to_string(), expected));
            }
        };
        let context = keys.size("max_position_embeddings")?.unwrap_or(2048);
        let config = Config {
            vocab_size: keys.required_size("vocab_size")?,
            hidden_size,
            intermediate_size: keys.required_size("intermediate_size")?,
            n_layers: keys.required_size("num_hidden_layers")?,
            n_heads,
            n_kv_heads: keys.size("num_key_value_heads")?.unwrap_or(n_heads),
            head_dim,
            rms_norm_eps: keys.number("rms_norm_eps")?.unwrap_or(1e-6),
            rope: keys.rope(context)?,
            attention_bias: keys.flag("attention_bias")?.unwrap_or(false),
            mlp_bias: keys.flag("mlp_bias")?.unwrap_or(false),
            tied: keys.flag("tie_word_embeddings")?.unwrap_or(false),
            context,
            bos: if keys.has("bos_token_id") { keys.token("bos_token_id")? } else { Some(1) },
            eos: if keys.has("eos_token_id") { keys.tokens("eos_token_id")? } else { vec![2] },
        };
        let ignored = keys.finish()?;
        config.check(file)?;
        Ok((config, ignored))
    }

    /// Does everything hold that the rest of the program takes for granted? Sizes are positive and bounded, heads
    /// divide, rotary numbers are finite and positive.
    ///
    /// # Errors
    ///
    /// [`ReadError::Value`] with the name that `config.json` has for the number at fault.
    pub fn check(&self, file: &Path) -> Result<(), ReadError> {
        let bad = |key: &str, found: String, expected: String| {
            Err(ReadError::Value { file: file.into(), key: key.into(), found, expected })
        };
        for (key, size, limit) in LIMITS {
            let found = size(self);
            if found == 0 || found > limit {
                return bad(key, found.to_string(), format!("1..={limit}"));
            }
        }
        if !self.n_heads.is_multiple_of(self.n_kv_heads) {
            let expected = format!("a multiple of num_key_value_heads = {}", self.n_kv_heads);
            return bad("num_attention_heads", self.n_heads.to_string(), expected);
        }
        if !self.head_dim.is_multiple_of(2) {
            return bad("head_dim", self.head_dim.to_string(), "an even number: rope turns pairs".into());
        }
        if !(0.0..1.0).contains(&self.rms_norm_eps) {
            return bad("rms_norm_eps", self.rms_norm_eps.to_string(), "0 <= eps < 1".into());
        }
        for (key, token) in
            self.bos.iter().map(|t| ("bos_token_id", t)).chain(self.eos.iter().map(|t| ("eos_token_id", t)))
        {
            if *token as usize >= self.vocab_size {
                return bad(key, token.to_string(), format!("below vocab_size = {}", self.vocab_size));
            }
        }
        self.rope.check().or_else(|(key, found, expected)| bad(key, found, expected.into()))
    }

    /// Numbers in all tensors together; a tied head counts once.
    pub fn parameters(&self) -> u64 {
        self.tensors().iter().map(|(_, shape)| shape.iter().map(|&dim| dim as u64).product::<u64>()).sum()
    }

    /// Hugging Face names and shapes (`[out, in]` for projections) of the tensors that this config asks for.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let Config { vocab_size, hidden_size: hidden, intermediate_size: inter, .. } = *self;
        let (q, kv) = (self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim);
        let mut tensors = vec![("model.embed_tokens.weight".to_owned(), vec![vocab_size, hidden])];
        for layer in 0..self.n_layers {
            let mut push =
                |name: &str, shape: Vec<usize>| tensors.push((format!("model.layers.{layer}.{name}"), shape));
            push("input_layernorm.weight", vec![hidden]);
            for (name, out) in [("q", q), ("k", kv), ("v", kv)] {
                push(&format!("self_attn.{name}_proj.weight"), vec![out, hidden]);
                if self.attention_bias {
                    push(&format!("self_attn.{name}_proj.bias"), vec![out]);
                }
            }
            push("self_attn.o_proj.weight", vec![hidden, q]);
            if self.attention_bias {
                push("self_attn.o_proj.bias", vec![hidden]);
            }
            push("post_attention_layernorm.weight", vec![hidden]);
            for (name, out, input) in
                [("gate", inter, hidden), ("up", inter, hidden), ("down", hidden, inter)]
            {
                push(&format!("mlp.{name}_proj.weight"), vec![out, input]);
                if self.mlp_bias {
                    push(&format!("mlp.{name}_proj.bias"), vec![out]);
                }
            }
        }
        tensors.push(("model.norm.weight".into(), vec![hidden]));
        if !self.tied {
            tensors.push(("lm_head.weight".into(), vec![vocab_size, hidden]));
        }
        tensors
    }
}

impl Rope {
    /// The first number out of range: key, found, expected.
    fn check(&self) -> Result<(), (&'static str, String, &'static str)> {
        let above = |key, value: f64, least: f64, expected| match value.is_finite() && value > least {
            true => Ok(()),
            false => Err((key, value.to_string(), expected)),
        };
        let positive = |key, value: f64| above(key, value, 0.0, "a positive number");
        let context = |found: usize| match (1..=1 << 31).contains(&found) {
            true => Ok(()),
            false => Err(("original_max_position_embeddings", found.to_string(), "1..=2^31")),
        };
        above("rope_theta", self.theta, 1.0, "a number above 1")?;
        match self.kind {
            RopeKind::Default => Ok(()),
            RopeKind::Linear { factor } => positive("factor", factor),
            RopeKind::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                positive("factor", factor)?;
                positive("low_freq_factor", low_freq_factor)?;
                above("high_freq_factor", high_freq_factor, low_freq_factor, "more than low_freq_factor")?;
                context(original_context)
            }
            RopeKind::Yarn {
                factor,
                original_context,
                beta_fast,
                beta_slow,
                attention_factor,
                mscale,
                mscale_all_dim,
                truncate: _,
            } => {
                positive("factor", factor)?;
                positive("beta_slow", beta_slow)?;
                above("beta_fast", beta_fast, beta_slow, "more than beta_slow")?;
                positive("attention_factor", attention_factor.unwrap_or(1.0))?;
                above("mscale", mscale.unwrap_or(0.0), -1.0, "a number that is not negative")?;
                above(
                    "mscale_all_dim",
                    mscale_all_dim.unwrap_or(0.0),
                    -1.0,
                    "a number that is not negative",
                )?;
                context(original_context)
            }
        }
    }
}

/// Keys that are read past: they steer training, caching, sampling or the library, not what is computed.
#[rustfmt::skip] // a list
const HARMLESS: [&str; 38] = [
    "_attn_implementation_autoset", "_name_or_path", "add_cross_attention", "attention_dropout",
    "attn_implementation", "cross_attention_hidden_size", "decoder_start_token_id", "dtype",
    "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "gradient_checkpointing", "id2label",
    "initializer_range", "is_decoder", "label2id", "max_sequence_length", "output_attentions",
    "output_hidden_states", "pad_token_id", "prefix", "pretraining_tp", "problem_type", "return_dict",
    "rope_interleaved_training", "sep_token_id", "task_specific_params", "tf_legacy_loss",
    "tie_encoder_decoder", "tokenizer_class", "torch_dtype", "torchscript", "transformers.js_config",
    "transformers_version", "unk_token_id", "unsloth_fixed", "unsloth_version", "use_cache",
];

/// Keys that change what is computed, unless they hold the value here.
const NEUTRAL: [(&str, &str); 14] = [
    ("attn_logit_softcapping", "null"),
    ("embedding_multiplier", "1"),
    ("final_logit_softcapping", "null"),
    ("is_encoder_decoder", "false"),
    ("layer_types", "null"),
    ("logit_scale", "1"),
    ("num_local_experts", "null"),
    ("partial_rotary_factor", "1"),
    ("pruned_heads", "{}"),
    ("qk_layernorm", "false"),
    ("quantization_config", "null"),
    ("rope_interleaved", "false"),
    ("sliding_window", "null"),
    ("use_sliding_window", "false"),
];

/// A key that no list names is taken to change the mathematics if its name holds one of these, and read past
/// otherwise.
#[rustfmt::skip] // a list
const SUSPICIOUS: [&str; 25] = [
    "act", "adapter", "alibi", "attention", "attn", "bias", "cap", "dim", "expert", "factor", "head",
    "hidden", "layer", "lora", "moe", "multiplier", "norm", "quant", "residual", "rope", "rotary", "scal",
    "softmax", "window", "yarn",
];

/// Keys of a rope object, whatever its kind.
#[rustfmt::skip] // a list
const ROPE_KEYS: [&str; 15] = [
    "attention_factor", "beta_fast", "beta_slow", "factor", "finetuned", "high_freq_factor",
    "low_freq_factor", "mscale", "mscale_all_dim", "original_max_position_embeddings",
    "partial_rotary_factor", "rope_theta", "rope_type", "truncate", "type",
];

/// Keys of a JSON object that have not been read yet.
struct Keys<'a> {
    map: IndexMap<String, Value>,
    /// Stands before each key in messages: the object's own key and a dot.
    prefix: &'a str,
    file: &'a Path,
}

impl<'a> Keys<'a> {
    fn new(map: IndexMap<String, Value>, prefix: &'a str, file: &'a Path) -> Keys<'a> {
        Keys { map, prefix, file }
    }

    fn has(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    /// Takes the key out; `null` is as good as no key.
    fn take(&mut self, key: &str) -> Option<Value> {
        self.map.shift_remove(key).filter(|value| !value.is_null())
    }

    fn bad_value(&self, key: &str, found: &str, expected: impl Into<String>) -> ReadError {
        let key = format!("{}{key}", self.prefix);
        ReadError::Value { file: self.file.into(), key, found: found.into(), expected: expected.into() }
    }

    fn missing(&self, key: &str, expected: &'static str) -> ReadError {
        ReadError::MissingKey { file: self.file.into(), key: format!("{}{key}", self.prefix), expected }
    }

    /// Takes a value of one type out, by the `serde_json` accessor of that type.
    fn typed<T>(
        &mut self,
        key: &str,
        expected: &str,
        get: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<T>, ReadError> {
        let Some(value) = self.take(key) else { return Ok(None) };
        get(&value).map(Some).ok_or_else(|| self.bad_value(key, &shown(&value), expected))
    }

    fn size(&mut self, key: &str) -> Result<Option<usize>, ReadError> {
        // 2^31 is the largest limit of any size; the key's own follows in `Config::check`.
        self.typed(key, "a whole number from 1 to 2^31", |value| {
            value.as_u64().filter(|size| (1..=1 << 31).contains(size)).map(|size| size as usize)
        })
    }

    fn required_size(&mut self, key: &str) -> Result<usize, ReadError> {
        let size = self.size(key)?;
        size.ok_or_else(|| self.missing(key, "a whole number"))
    }

    fn number(&mut self, key: &str) -> Result<Option<f64>, ReadError> {
        self.typed(key, "a number", Value::as_f64)
    }

    fn required_number(&mut self, key: &str) -> Result<f64, ReadError> {
        let number = self.number(key)?;
        number.ok_or_else(|| self.missing(key, "a number"))
    }

    fn flag(&mut self, key: &str) -> Result<Option<bool>, ReadError> {
        self.typed(key, "true or false", Value::as_bool)
    }

    fn token(&mut self, key: &str) -> Result<Option<u32>, ReadError> {
        self.typed(key, "a token id", token_id)
    }

    /// One token id or a list of them.
    fn tokens(&mut self, key: &str) -> Result<Vec<u32>, ReadError> {
        let tokens = self.typed(key, "a token id or a list of them", token_ids)?;
        Ok(tokens.unwrap_or_default())
    }

    /// The value of a key that names one of a few things.
    fn one_of(&mut self, key: &str, known: &'static [&'static str]) -> Result<Option<String>, ReadError> {
        let found = self.typed(key, "a string", |value| value.as_str().map(str::to_owned))?;
        if let Some(found) = found.as_ref().filter(|found| !known.contains(&found.as_str())) {
            let key = format!("{}{key}", self.prefix);
            return Err(ReadError::UnknownValue { file: self.file.into(), key, found: found.clone(), known });
        }
        Ok(found)
    }

    fn architecture(&mut self) -> Result<(), ReadError> {
        let known = &["LlamaForCausalLM"];
        let names = self.typed("architectures", "a list of names", |value| {
            value.as_array()?.iter().map(|name| name.as_str().map(str::to_owned)).collect::<Option<Vec<_>>>()
        })?;
        match names {
            None => Ok(()),
            Some(names) if names.iter().any(|name| known.contains(&name.as_str())) => Ok(()),
            Some(names) => Err(ReadError::UnknownValue {
                file: self.file.into(),
                key: "architectures".into(),
                found: names.join(", "),
                known,
            }),
        }
    }

    /// Rope settings in either spelling. Both at once must say the same.
    fn rope(&mut self, context: usize) -> Result<Rope, ReadError> {
        let theta = self.number("rope_theta")?;
        let mut found: Option<(&str, Rope)> = None;
        for (key, prefix) in [("rope_scaling", "rope_scaling."), ("rope_parameters", "rope_parameters.")] {
            let Some(value) = self.typed(key, "an object", |value| value.as_object().cloned())? else {
                continue;
            };
            let mut keys = Keys::new(value.into_iter().collect(), prefix, self.file);
            let rope = keys.rope_object(theta, context)?;
            for (name, value) in keys.map {
                self.map.insert(format!("{prefix}{name}"), value);
            }
            if let Some((other, _)) = found.as_ref().filter(|(_, other)| *other != rope) {
                return Err(self.bad_value(
                    key,
                    &format!("{rope:?}"),
                    format!("what `{other}` says, or only one of them"),
                ));
            }
            found = Some((key, rope));
        }
        let default = Rope { theta: theta.unwrap_or(10_000.0), kind: RopeKind::Default };
        Ok(found.map_or(default, |(_, rope)| rope))
    }

    /// Settings inside `rope_scaling` or `rope_parameters`. Known keys that this kind has no use for stay.
    fn rope_object(&mut self, outer_theta: Option<f64>, context: usize) -> Result<Rope, ReadError> {
        let theta = self.number("rope_theta")?;
        if let (Some(inner), Some(outer)) = (theta, outer_theta)
            && inner != outer
        {
            return Err(self.bad_value(
                "rope_theta",
                &inner.to_string(),
                format!("{outer}, as the key `rope_theta` says"),
            ));
        }
        let (new, old) = (self.one_of("rope_type", &ROPE_KINDS)?, self.one_of("type", &ROPE_KINDS)?);
        if let (Some(new), Some(old)) = (&new, &old)
            && new != old
        {
            return Err(self.bad_value("rope_type", new, format!("{old}, as the key `type` beside it says")));
        }
        let kind = match new.or(old).as_deref().unwrap_or("default") {
            "linear" => RopeKind::Linear { factor: self.required_number("factor")? },
            "llama3" => RopeKind::Llama3 {
                factor: self.required_number("factor")?,
                low_freq_factor: self.required_number("low_freq_factor")?,
                high_freq_factor: self.required_number("high_freq_factor")?,
                original_context: self.size("original_max_position_embeddings")?.unwrap_or(context),
            },
            "yarn" => RopeKind::Yarn {
                factor: self.required_number("factor")?,
                original_context: self.size("original_max_position_embeddings")?.unwrap_or(context),
                beta_fast: self.number("beta_fast")?.unwrap_or(32.0),
                beta_slow: self.number("beta_slow")?.unwrap_or(1.0),
                attention_factor: self.number("attention_factor")?,
                mscale: self.number("mscale")?,
                mscale_all_dim: self.number("mscale_all_dim")?,
                truncate: self.flag("truncate")?.unwrap_or(true),
            },
            _ => RopeKind::Default,
        };
        Ok(Rope { theta: theta.or(outer_theta).unwrap_or(10_000.0), kind })
    }

    /// Judges the keys that nobody read: an error for the first that changes the mathematics, else their names.
    fn finish(self) -> Result<Vec<String>, ReadError> {
        for (key, value) in &self.map {
            if let Some(accepted) = accepted_instead(key, value) {
                return Err(ReadError::UnknownKey {
                    file: self.file.into(),
                    key: key.clone(),
                    found: shown(value),
                    expected: format!("{accepted} is accepted"),
                });
            }
        }
        Ok(self.map.into_keys().collect())
    }
}

/// What would be accepted in place of a value that changes the mathematics. Keys of rope settings have a dot in them.
fn accepted_instead(key: &str, value: &Value) -> Option<&'static str> {
    if value.is_null() || HARMLESS.contains(&key) {
        return None;
    }
    let (inner, in_rope) = key.split_once('.').map_or((key, false), |(_, inner)| (inner, true));
    if let Some((_, neutral)) = NEUTRAL.iter().find(|row| row.0 == inner) {
        // `1`, `1.0` and `1e0` are one number.
        let same = match value.as_f64() {
            Some(number) => neutral.parse() == Ok(number),
            None => serde_json::from_str(neutral).is_ok_and(|neutral: Value| neutral == *value),
        };
        return (!same).then_some(neutral);
    }
    let harmless = match in_rope {
        true => ROPE_KEYS.contains(&inner),
        false => !SUSPICIOUS.iter().any(|stem| key.contains(stem)),
    };
    (!harmless).then_some("a config without it")
}

/// A JSON number as a token id. Tokens are i32 in graphs.
fn token_id(value: &Value) -> Option<u32> {
    value.as_u64().filter(|&id| id <= i32::MAX as u64).map(|id| id as u32)
}

/// One token id or a list of them.
pub(crate) fn token_ids(value: &Value) -> Option<Vec<u32>> {
    match value {
        Value::Array(ids) => ids.iter().map(token_id).collect(),
        one => token_id(one).map(|id| vec![id]),
    }
}

/// A JSON value as messages show it: cut where it is long.
pub(crate) fn shown(value: &Value) -> String {
    const LIMIT: usize = 80;
    let text = value.to_string();
    match text.char_indices().nth(LIMIT) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(found: &[f64], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(expected) {
            assert!((found / expected - 1.0).abs() < 1e-14, "{found} is not {expected}");
        }
    }

    #[test]
    fn plain_and_linear_frequencies() {
        let rope = Rope { theta: 10_000.0, kind: RopeKind::Default };
        near(&rope.inverse_frequencies(8), &[1.0, 0.1, 0.01, 0.001]);
        let rope = Rope { theta: 10_000.0, kind: RopeKind::Linear { factor: 4.0 } };
        near(&rope.inverse_frequencies(8), &[0.25, 0.025, 0.0025, 0.00025]);
        assert_eq!(rope.attention_factor(), 1.0);
    }

    /// Expected numbers are numpy's, from transformers' formulas. Of these pairs the first keeps its frequency (it
    /// turns 64 / 2 pi = 10.2 > 4 times), so does the second (5.7), the third and fourth lie between, the last are
    /// divided by 8.
    #[test]
    fn llama3_frequencies() {
        let kind = RopeKind::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 64,
        };
        let found = Rope { theta: 10_000.0, kind }.inverse_frequencies(32);
        near(
            &found[..6],
            &[
                1.0,
                0.5623413251903491,
                0.24438459943539834,
                0.0643098724277271,
                0.013042256043820465,
                0.007029266564879363,
            ],
        );
        near(&found[15..], &[2.2228492625486534e-05]);
    }

    /// Expected numbers are numpy's: the ramp goes from pair 0 to pair 3, or from 0.81 to 2.62 where not truncated.
    #[test]
    fn yarn_frequencies() {
        let yarn = |factor, beta_fast, beta_slow, truncate| Rope {
            theta: 10_000.0,
            kind: RopeKind::Yarn {
                factor,
                original_context: 64,
                beta_fast,
                beta_slow,
                attention_factor: None,
                mscale: None,
                mscale_all_dim: None,
                truncate,
            },
        };
        near(
            &yarn(4.0, 32.0, 1.0, true).inverse_frequencies(16),
            &[
                1.0,
                0.23717082451262847,
                0.05,
                0.007905694150420948,
                0.0025,
                0.000790569415042095,
                0.00025,
                7.905694150420948e-05,
            ],
        );
        near(
            &yarn(8.0, 4.0, 0.5, false).inverse_frequencies(16),
            &[
                1.0,
                0.28740859576652095,
                0.042441793456175964,
                0.003952847075210474,
                0.00125,
                0.0003952847075210475,
                0.000125,
                3.952847075210474e-05,
            ],
        );
    }

    #[test]
    fn yarn_attention_factors() {
        let factor = |factor, attention_factor, mscale, mscale_all_dim| {
            let kind = RopeKind::Yarn {
                factor,
                original_context: 64,
                beta_fast: 32.0,
                beta_slow: 1.0,
                attention_factor,
                mscale,
                mscale_all_dim,
                truncate: true,
            };
            Rope { theta: 10_000.0, kind }.attention_factor()
        };
        near(&[factor(4.0, None, None, None)], &[1.138_629_436_111_989]); // 0.1 ln 4 + 1
        assert_eq!(factor(4.0, Some(1.25), None, None), 1.25);
        assert_eq!(factor(0.5, None, None, None), 1.0);
        near(&[factor(4.0, None, Some(2.0), Some(1.0))], &[1.277_258_872_223_978 / 1.138_629_436_111_989]);
        assert_eq!(factor(4.0, None, Some(0.0), Some(1.0)), factor(4.0, None, None, None));
    }

    /// A small config with `change` laid over it; `null` takes a key away.
    fn read(change: Value) -> Result<(Config, Vec<String>), ReadError> {
        let mut config = serde_json::json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "vocab_size": 32, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
        });
        for (key, value) in change.as_object().unwrap() {
            config[key] = value.clone();
        }
        Config::from_hf_json(&config.to_string(), Path::new("config.json"))
    }

    #[test]
    fn defaults_are_those_of_transformers() {
        let (config, ignored) = read(serde_json::json!({ "num_key_value_heads": null })).unwrap();
        assert_eq!((config.n_kv_heads, config.head_dim, config.rms_norm_eps), (2, 4, 1e-6));
        assert_eq!(config.rope, Rope { theta: 10_000.0, kind: RopeKind::Default });
        assert_eq!((config.tied, config.bos, &config.eos[..]), (false, Some(1), &[2][..]));
        assert_eq!(ignored, [""; 0]);
        // 2 embeddings, q and o of 8 x 8, k and v too, three of 16 x 8, three norms.
        assert_eq!(config.parameters(), 2 * 256 + 4 * 64 + 3 * 128 + 3 * 8);
    }

    #[test]
    fn both_spellings_of_rope_must_agree() {
        let linear = serde_json::json!({ "rope_type": "linear", "factor": 2.0, "rope_theta": 500.0 });
        let (config, _) =
            read(serde_json::json!({ "rope_parameters": linear, "rope_theta": 500.0 })).unwrap();
        assert_eq!(config.rope, Rope { theta: 500.0, kind: RopeKind::Linear { factor: 2.0 } });
        let both = serde_json::json!({ "rope_parameters": linear, "rope_scaling": { "type": "linear", "factor": 2.0 } });
        assert!(matches!(read(both), Err(ReadError::Value { key, .. }) if key == "rope_parameters"));
        let both = serde_json::json!({ "rope_parameters": linear, "rope_theta": 600.0 });
        assert!(
            matches!(read(both), Err(ReadError::Value { key, .. }) if key == "rope_parameters.rope_theta")
        );
    }

    #[test]
    fn harmless_keys_are_listed() {
        let more = serde_json::json!({
            "use_cache": true, "pretraining_tp": 2, "sliding_window": null, "partial_rotary_factor": 1.0, "my_note": 7,
            "rope_scaling": { "type": "default", "factor": 3.0 },
        });
        let (_, mut ignored) = read(more).unwrap();
        ignored.sort_unstable();
        let expected = [
            "my_note",
            "partial_rotary_factor",
            "pretraining_tp",
            "rope_scaling.factor",
            "sliding_window",
            "use_cache",
        ];
        assert_eq!(ignored, expected);
    }

    #[test]
    fn configs_survive_json() {
        let config = crate::preset("llama3.1-8b").unwrap();
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<Config>(&text).unwrap(), config);
    }
}
