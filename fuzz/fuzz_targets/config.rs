//! Any text as a `config.json` and as a tokenizer.

#![no_main]

use libfuzzer_sys::fuzz_target;
use models::{Config, Tokenizer};
use std::path::Path;

fuzz_target!(|text: &str| {
    if let Ok((config, _)) = Config::from_hf_json(text, Path::new("config.json")) {
        let frequencies = config.rope.inverse_frequencies(config.head_dim.min(1 << 16));
        assert!(frequencies.iter().all(|x| x.is_finite() && *x >= 0.0), "{:?}", config.rope);
    }
    if let Ok(tokenizer) = Tokenizer::from_json(text.as_bytes()) {
        let _ = tokenizer.encode("Once upon a time", true);
    }
});
