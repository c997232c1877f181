//! Any bytes as a GGUF file: metadata, tokenizer, template, tensors.

#![no_main]

use libfuzzer_sys::fuzz_target;
use models::{Checkpoint, FileBytes, Tokenizer, render_chat};
use std::path::Path;
use std::sync::Arc;

fuzz_target!(|bytes: &[u8]| {
    let file: FileBytes = Arc::new([b"GGUF\x03\0\0\0", bytes].concat());
    let Ok(checkpoint) = Checkpoint::open(Path::new("m.gguf"), &|_| Ok(file.clone())) else { return };
    for tensor in checkpoint.tensors() {
        let rows = if tensor.shape.len() == 1 { 1 } else { tensor.shape[0] };
        let mut out = vec![0.0; tensor.shape.iter().product()];
        checkpoint.read_rows(&tensor.name, 0..rows, &mut out).expect("the tensor was checked");
    }
    if let Some(tokenizer) = &checkpoint.tokenizer {
        let tokenizer = Tokenizer::from_json(&tokenizer.json).expect("what a reader gives can be read");
        let _ = tokenizer.encode("Once upon a time", true);
    }
    if let Some(template) = &checkpoint.chat_template {
        let _ = render_chat(template, &[], "<s>", "</s>", true);
    }
});
