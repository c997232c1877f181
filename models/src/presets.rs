//! Configs of published models, for plans and random weights.
//!
//! Numbers are those of the models' own `config.json`; a test holds them to the published parameter counts.

use crate::config::{Config, Rope, RopeKind};

/// A published model.
#[derive(Clone, Copy, Debug)]
pub struct Preset {
    /// Name, as in `preset:NAME`.
    pub name: &'static str,
    /// Numbers in all its tensors.
    pub parameters: u64,
    hidden: usize,
    inter: usize,
    layers: usize,
    /// Query heads, key and value heads, elements of a head.
    heads: (usize, usize, usize),
    vocab: usize,
    eps: f64,
    theta: f64,
    context: usize,
    /// Factor of rope kind llama3, whose other numbers are the same in all these models.
    rope_factor: Option<f64>,
    tied: bool,
    /// BOS and EOS.
    special: (u32, u32),
}

/// LLaMA's and LLaMA 2's `<s>` and `</s>`; LLaMA 3's `<|begin_of_text|>` and `<|end_of_text|>`; SmolLM2's
/// `<|endoftext|>`, which is both.
const LLAMA: (u32, u32) = (1, 2);
const LLAMA3: (u32, u32) = (128_000, 128_001);
const SMOLLM2: (u32, u32) = (0, 0);

/// Every preset.
#[rustfmt::skip] // a table: one model a line
pub const PRESETS: [Preset; 18] = [
    Preset { name: "llama-7b",       hidden: 4096,  inter: 11008, layers: 32,  heads: (32, 32, 128), vocab: 32000,  eps: 1e-6, theta: 1e4,   context: 2048,   rope_factor: None,       tied: false, special: LLAMA,   parameters: 6_738_415_616 },
    Preset { name: "llama-13b",      hidden: 5120,  inter: 13824, layers: 40,  heads: (40, 40, 128), vocab: 32000,  eps: 1e-6, theta: 1e4,   context: 2048,   rope_factor: None,       tied: false, special: LLAMA,   parameters: 13_015_864_320 },
    Preset { name: "llama-33b",      hidden: 6656,  inter: 17920, layers: 60,  heads: (52, 52, 128), vocab: 32000,  eps: 1e-6, theta: 1e4,   context: 2048,   rope_factor: None,       tied: false, special: LLAMA,   parameters: 32_528_943_616 },
    Preset { name: "llama-65b",      hidden: 8192,  inter: 22016, layers: 80,  heads: (64, 64, 128), vocab: 32000,  eps: 1e-6, theta: 1e4,   context: 2048,   rope_factor: None,       tied: false, special: LLAMA,   parameters: 65_285_660_672 },
    Preset { name: "llama2-7b",      hidden: 4096,  inter: 11008, layers: 32,  heads: (32, 32, 128), vocab: 32000,  eps: 1e-5, theta: 1e4,   context: 4096,   rope_factor: None,       tied: false, special: LLAMA,   parameters: 6_738_415_616 },
    Preset { name: "llama2-13b",     hidden: 5120,  inter: 13824, layers: 40,  heads: (40, 40, 128), vocab: 32000,  eps: 1e-5, theta: 1e4,   context: 4096,   rope_factor: None,       tied: false, special: LLAMA,   parameters: 13_015_864_320 },
    Preset { name: "llama2-70b",     hidden: 8192,  inter: 28672, layers: 80,  heads: (64, 8, 128),  vocab: 32000,  eps: 1e-5, theta: 1e4,   context: 4096,   rope_factor: None,       tied: false, special: LLAMA,   parameters: 68_976_648_192 },
    Preset { name: "llama3-8b",      hidden: 4096,  inter: 14336, layers: 32,  heads: (32, 8, 128),  vocab: 128256, eps: 1e-5, theta: 5e5,   context: 8192,   rope_factor: None,       tied: false, special: LLAMA3,  parameters: 8_030_261_248 },
    Preset { name: "llama3-70b",     hidden: 8192,  inter: 28672, layers: 80,  heads: (64, 8, 128),  vocab: 128256, eps: 1e-5, theta: 5e5,   context: 8192,   rope_factor: None,       tied: false, special: LLAMA3,  parameters: 70_553_706_496 },
    Preset { name: "llama3.1-8b",    hidden: 4096,  inter: 14336, layers: 32,  heads: (32, 8, 128),  vocab: 128256, eps: 1e-5, theta: 5e5,   context: 131072, rope_factor: Some(8.0),  tied: false, special: LLAMA3,  parameters: 8_030_261_248 },
    Preset { name: "llama3.1-70b",   hidden: 8192,  inter: 28672, layers: 80,  heads: (64, 8, 128),  vocab: 128256, eps: 1e-5, theta: 5e5,   context: 131072, rope_factor: Some(8.0),  tied: false, special: LLAMA3,  parameters: 70_553_706_496 },
    Preset { name: "llama3.1-405b",  hidden: 16384, inter: 53248, layers: 126, heads: (128, 8, 128), vocab: 128256, eps: 1e-5, theta: 5e5,   context: 131072, rope_factor: Some(8.0),  tied: false, special: LLAMA3,  parameters: 405_853_388_800 },
    Preset { name: "llama3.2-1b",    hidden: 2048,  inter: 8192,  layers: 16,  heads: (32, 8, 64),   vocab: 128256, eps: 1e-5, theta: 5e5,   context: 131072, rope_factor: Some(32.0), tied: true,  special: LLAMA3,  parameters: 1_235_814_400 },
    Preset { name: "llama3.2-3b",    hidden: 3072,  inter: 8192,  layers: 28,  heads: (24, 8, 128),  vocab: 128256, eps: 1e-5, theta: 5e5,   context: 131072, rope_factor: Some(32.0), tied: true,  special: LLAMA3,  parameters: 3_212_749_824 },
    Preset { name: "tinyllama-1.1b", hidden: 2048,  inter: 5632,  layers: 22,  heads: (32, 4, 64),   vocab: 32000,  eps: 1e-5, theta: 1e4,   context: 2048,   rope_factor: None,       tied: false, special: LLAMA,   parameters: 1_100_048_384 },
    Preset { name: "smollm2-135m",   hidden: 576,   inter: 1536,  layers: 30,  heads: (9, 3, 64),    vocab: 49152,  eps: 1e-5, theta: 1e5,   context: 8192,   rope_factor: None,       tied: true,  special: SMOLLM2, parameters: 134_515_008 },
    Preset { name: "smollm2-360m",   hidden: 960,   inter: 2560,  layers: 32,  heads: (15, 5, 64),   vocab: 49152,  eps: 1e-5, theta: 1e5,   context: 8192,   rope_factor: None,       tied: true,  special: SMOLLM2, parameters: 361_821_120 },
    Preset { name: "smollm2-1.7b",   hidden: 2048,  inter: 8192,  layers: 24,  heads: (32, 32, 64),  vocab: 49152,  eps: 1e-5, theta: 1.3e5, context: 8192,   rope_factor: None,       tied: true,  special: SMOLLM2, parameters: 1_711_376_384 },
];

/// The config of the preset of that name.
pub fn preset(name: &str) -> Option<Config> {
    PRESETS.iter().find(|preset| preset.name == name).map(Preset::config)
}

impl Preset {
    /// The model's config.
    pub fn config(&self) -> Config {
        let llama3 = |factor| RopeKind::Llama3 {
            factor,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 8192,
        };
        Config {
            vocab_size: self.vocab,
            hidden_size: self.hidden,
            intermediate_size: self.inter,
            n_layers: self.layers,
            n_heads: self.heads.0,
            n_kv_heads: self.heads.1,
            head_dim: self.heads.2,
            rms_norm_eps: self.eps,
            rope: Rope { theta: self.theta, kind: self.rope_factor.map_or(RopeKind::Default, llama3) },
            attention_bias: false,
            mlp_bias: false,
            tied: self.tied,
            context: self.context,
            bos: Some(self.special.0),
            eos: vec![self.special.1],
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn parameters_are_the_published_ones() {
        for preset in PRESETS {
            let config = preset.config();
            config.check(Path::new(preset.name)).unwrap();
            assert_eq!(config.parameters(), preset.parameters, "{}", preset.name);
        }
    }

    #[test]
    fn names_find_their_row() {
        let config = preset("llama3.2-1b").unwrap();
        assert_eq!((config.hidden_size, config.tied, config.rope.theta), (2048, true, 5e5));
        assert!(preset("llama4").is_none());
    }
}
