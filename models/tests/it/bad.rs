//! Wrong files give the error that names what is wrong: file, tensor or key, found, expected.
//!
//! Configs are files in `tests/bad/config/`, each beside the message that it must give (`UPDATE_EXPECT=1` accepts new
//! ones). Binary files are right ones with one thing changed.

use std::path::Path;

use models::{Config, ReadError, Tokenizer};

use crate::gguf_file::{ARRAY, Gguf, STRING};
use crate::{open, whole_message};

/// One thing changed in a right file.
type Change<'a> = &'a dyn Fn(&mut Gguf) -> &mut Gguf;

fn message<T>(result: Result<T, ReadError>) -> String {
    result.err().map_or("no error".into(), |error| whole_message(&error))
}

#[test]
fn configs() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/bad/config");
    let mut files: Vec<_> = std::fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|file| file.extension().is_some_and(|end| end == "json"));
    files.sort();
    assert!(files.len() > 20, "files in {}", dir.display());
    for file in files {
        let text = std::fs::read_to_string(&file).unwrap();
        let name = file.file_name().unwrap();
        let found = message(Config::from_hf_json(&text, Path::new(name))) + "\n";
        let beside = file.with_extension("error");
        if std::env::var_os("UPDATE_EXPECT").is_some() {
            std::fs::write(&beside, &found).unwrap();
        }
        let expected = std::fs::read_to_string(&beside).unwrap_or_default();
        assert_eq!(found, expected, "{}: UPDATE_EXPECT=1 accepts", file.display());
        assert_ne!(found, "no error\n", "{}", file.display());
    }
}

/// Opens a GGUF file of these bytes; gives the message without the folder's name.
fn open_gguf(bytes: &[u8]) -> String {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("m.gguf");
    std::fs::write(&file, bytes).unwrap();
    message(open(&file)).replace(&format!("{}/", dir.path().display()), "")
}

#[test]
fn gguf_metadata() {
    let changed = |change: Change| {
        let mut gguf = Gguf::small();
        change(&mut gguf);
        open_gguf(&gguf.finish())
    };
    assert_eq!(changed(&|g| g), "no error");
    #[rustfmt::skip] // a table: one case a line
    let cases: [(Change, &str); 22] = [
        (&|g| g.version(4), "m.gguf: version 4 of the format, known are [2, 3]"),
        (&|g| g.string("general.architecture", "qwen2"), "`general.architecture` is `qwen2`, known are llama"),
        (&|g| g.u32("general.alignment", 3), "`general.alignment` is 3, expected a power of two up to 2^20"),
        (&|g| g.raw("llama.block_count", STRING, &[1, 0, 0, 0, 0, 0, 0, 0, b'x']), "`llama.block_count` is \"x\", expected an integer"),
        (&|g| g.u32("llama.block_count", 0), "is 0, expected 1..="),
        (&|g| g.u32("llama.block_count", 2), "no tensor `model.layers.1.input_layernorm.weight`, the config asks for one of shape [4]"),
        (&|g| g.u32("llama.embedding_length", 8), "`model.embed_tokens.weight` is [6, 4], the config asks for [6, 8]"),
        (&|g| g.u32("llama.attention.head_count_kv", 3), "`num_attention_heads` is 1, expected a multiple of num_key_value_heads = 3"),
        (&|g| g.u32s("llama.attention.head_count", &[1, 1]), "`llama.attention.head_count` is 2 integers, expected an integer"),
        (&|g| g.u32("llama.rope.dimension_count", 2), "`llama.rope.dimension_count` is 2, expected 4"),
        (&|g| g.u32("llama.expert_count", 8), "key `llama.expert_count` (= 8) is not supported"),
        (&|g| g.f32("llama.logit_scale", 2.0), "key `llama.logit_scale` (= 2) is not supported"),
        (&|g| g.string("llama.rope.scaling.type", "longrope"), "`llama.rope.scaling.type` is `longrope`, known are none, linear, yarn"),
        (&|g| g.tensor("rope_freqs.weight", &[2], &[1.0, 3.0]), "key `rope_freqs.weight` (= 2 factors from Some(1.0) to Some(3.0)) is not supported"),
        (&|g| g.u32("split.count", 2), "key `split.count` (= 2) is not supported"),
        (&|g| g.string("tokenizer.ggml.model", "bert"), "`tokenizer.ggml.model` is `bert`, known are llama, gpt2"),
        (&|g| g.string("tokenizer.ggml.model", "llama"), "no key `tokenizer.ggml.tokens`"),
        (&|g| g.string("tokenizer.ggml.model", "gpt2").string("tokenizer.ggml.pre", "qwen2"), "`tokenizer.ggml.pre` is `qwen2`, known are default, gpt-2, llama-bpe, smollm"),
        (&|g| { g.string("tokenizer.ggml.model", "llama").strings("tokenizer.ggml.tokens", &["a", "a"]) }, "piece \"a\" stands twice: ids 0 and 1"),
        (&|g| { g.string("tokenizer.ggml.model", "llama").strings("tokenizer.ggml.tokens", &["a"]).u32s("tokenizer.ggml.token_type", &[1, 1]) }, "token types: found 2, expected 1"),
        (&|g| { g.string("tokenizer.ggml.model", "gpt2").strings("tokenizer.ggml.tokens", &["a", "b"]).strings("tokenizer.ggml.merges", &["a b"]) }, "merge \"a b\" is not two pieces"),
        (&|g| g.raw("general.x", ARRAY, &[0, 0, 0, 0, 255, 255, 255, 255, 255, 255, 255, 255]), "18446744073709551615 general.x needs bytes up to 18446744073709551615"),
    ];
    for (change, expected) in cases {
        let found = changed(change);
        assert!(found.contains(expected), "expected: {expected}\n   found: {found}");
    }
}

#[test]
fn gguf_tensors() {
    let changed = |change: Change| {
        let mut gguf = Gguf::small();
        change(&mut gguf);
        open_gguf(&gguf.finish())
    };
    let norm = "blk.0.attn_norm.weight";
    #[rustfmt::skip] // a table: one case a line
    let cases: [(Change, &str); 12] = [
        (&|g| g.offset(norm, 33), "begins at offset 33, expected a multiple of 32"),
        (&|g| g.offset(norm, 32), "tensor `blk.0.attn_norm.weight` begins at byte 1088, inside `token_embd.weight`, which ends at 1152"),
        (&|g| g.offset(norm, u64::MAX - 31), "lies at bytes 18446744073709551615..18446744073709551615, the file has"),
        (&|g| g.twice("blk.0.attn_q.weight"), "tensor `blk.0.attn_q.weight` stands twice"),
        (&|g| g.bytes_tensor(norm, &[4], 10, vec![0; 16]), "is stored as Q2_K, known are F32, F16, BF16, Q8_0"),
        (&|g| g.bytes_tensor(norm, &[4], 2, vec![0; 18]), "has dims [4], expected a first dim of whole q4_0 blocks of 32"),
        (&|g| g.bytes_tensor(norm, &[0, 4], 0, vec![]), "has dims [0, 4], expected a product from 1"),
        (&|g| g.bytes_tensor(norm, &[1 << 32, 1 << 32], 0, vec![]), "has dims [4294967296, 4294967296]"),
        (&|g| g.bytes_tensor(norm, &[1, 1, 1, 1, 4], 0, vec![]), "expected 1 to 4 dims, the file says 5"),
        (&|g| g.bytes_tensor(norm, &[1 << 60], 0, vec![0; 16]), "lies at bytes"),
        (&|g| g.tensor("blk.0.attn_q.bias", &[4], &[0.0; 4]), "no tensor `model.layers.0.self_attn.k_proj.bias`"),
        (&|g| g.tensor("blk.0.attn_sub_norm.weight", &[4], &[0.0; 4]), "tensor `blk.0.attn_sub_norm.weight` [4] has no place in the model"),
    ];
    for (change, expected) in cases {
        let found = changed(change);
        assert!(found.contains(expected), "expected: {expected}\n   found: {found}");
    }
}

#[test]
fn gguf_cut_short() {
    let right = Gguf::small().finish();
    for length in 0..right.len() {
        let found = open_gguf(&right[..length]);
        let named = ["needs bytes up to", "the file has", "m.gguf: no checkpoint: found a file of"];
        assert!(named.iter().any(|part| found.contains(part)), "{length} bytes: {found}");
    }
}

/// The message for a safetensors file of this header and so many bytes of data.
fn read_safetensors(header: &str, data_bytes: usize) -> String {
    let file = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![0; data_bytes]].concat();
    message(models::safetensors::read(Path::new("m.safetensors"), &file))
}

#[test]
fn safetensors_headers() {
    let right = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"BF16","shape":[1,2],"data_offsets":[8,12]}}"#;
    assert_eq!(read_safetensors(right, 12), "no error");
    #[rustfmt::skip] // a table: one case a line
    let cases = [
        (r#"{"a":7}"#, 0, "m.safetensors: not the JSON expected"),
        (r#"{"a":{"dtype":"F32","shape":[2]}}"#, 0, "missing field `data_offsets`"),
        (r#"{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}"#, 8, "not the JSON expected"),
        (&right.replace("BF16", "I64"), 12, "tensor `b` is stored as I64, known are F32, BF16, F16"),
        (&right.replace("\"b\"", "\"a\""), 12, "tensor `a` stands twice"),
        (&right.replace("[2]", "[3]"), 12, "tensor `a` has 8 bytes, its shape and type need 12"),
        (&right.replace("[2]", "[4294967296,4294967296]"), 12, "expected a product that 64 bits hold"),
        (&right.replace("[8,12]", "[12,8]"), 12, "tensor `b` lies at bytes 131..127, the file has 131"),
        (&right.replace("[8,12]", "[8,18446744073709551615]"), 12, "..18446744073709551615, the file has"),
        (&right.replace("[8,12]", "[4,8]"), 12, "tensor `b` begins at byte 122, inside `a`, which ends at 126"),
        (&right.replace("[8,12]", "[9,13]"), 13, "bytes 127..128 belong to no tensor"),
        (right, 11, "tensor `b` lies at bytes 127..131, the file has 130"),
        (right, 14, "bytes 131..133 belong to no tensor"),
    ];
    for (header, data_bytes, expected) in cases {
        let found = read_safetensors(header, data_bytes);
        assert!(found.contains(expected), "expected: {expected}\n   found: {found}");
    }

    let read = |bytes: &[u8]| message(models::safetensors::read(Path::new("m"), bytes));
    assert_eq!(read(&[1, 2]), "m: the header's length needs bytes up to 8, the file has 2");
    assert_eq!(read(&[9, 0, 0, 0, 0, 0, 0, 0, b'{']), "m: the header needs bytes up to 17, the file has 9");
    assert_eq!(
        read(&[255; 9]),
        "m: the header's length is 18446744073709551615, at most 100000000 is accepted"
    );
}

#[test]
fn directories() {
    let dir = tempfile::tempdir().unwrap();
    let found = || message(open(dir.path())).replace(dir.path().to_str().unwrap(), "m");
    let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
    assert_eq!(
        found(),
        "m: no checkpoint: found a directory without config.json, expected config.json, or a .gguf file"
    );
    let config = r#"{"vocab_size": 8, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1,
        "num_attention_heads": 1}"#;
    write("config.json", config);
    let expected = "m: no checkpoint: found a directory without either, expected model.safetensors or model.safetensors.index.json";
    assert_eq!(found(), expected);

    write("model.safetensors.index.json", r#"{"weight_map": {"a": "../a.safetensors"}}"#);
    let expected = "m/model.safetensors.index.json: `weight_map.a` is \"../a.safetensors\", expected the name of a .safetensors file beside the index";
    assert_eq!(found(), expected);
    write("model.safetensors.index.json", r#"{"weight_map": {"a": "a.safetensors"}}"#);
    assert_eq!(found(), "m/a.safetensors: shard is missing; the index puts `a` there");
    let header = "{}";
    let empty = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat();
    std::fs::write(dir.path().join("a.safetensors"), &empty).unwrap();
    assert_eq!(found(), "m/a.safetensors: no tensor `a`; the index puts it there");

    std::fs::write(dir.path().join("model.safetensors"), &empty).unwrap();
    assert_eq!(found(), "m: no tensor `model.embed_tokens.weight`, the config asks for one of shape [8, 4]");
    write("generation_config.json", r#"{"eos_token_id": [1, 9]}"#);
    assert_eq!(found(), "m/generation_config.json: `eos_token_id` is 9, expected below vocab_size = 8");
    std::fs::write(dir.path().join("config.json"), [0xff]).unwrap();
    assert_eq!(found(), "m/config.json: the file is not UTF-8");
    std::fs::remove_file(dir.path().join("config.json")).unwrap();
    std::fs::create_dir(dir.path().join("config.json")).unwrap();
    assert!(found().starts_with("m/config.json: cannot be read: "), "{}", found());
    std::fs::remove_dir(dir.path().join("config.json")).unwrap();
    write("config.json", config);
    write("generation_config.json", "{");
    assert!(found().starts_with("m/generation_config.json: not the JSON expected: EOF"), "{}", found());
}

#[test]
fn tokenizers() {
    let right = serde_json::json!({
        "added_tokens": [{ "id": 2, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true }],
        "decoder": { "type": "Fuse" },
        "model": { "type": "BPE", "vocab": { "a": 0, "b": 1, "<s>": 2 }, "merges": [] },
    });
    let with = |path: &str, value: serde_json::Value| {
        let mut json = right.clone();
        let (parent, key) = path.rsplit_once('/').unwrap();
        json.pointer_mut(parent).unwrap()[key] = value;
        let tokenizer = Tokenizer::from_json(&serde_json::to_vec(&json).unwrap());
        tokenizer.err().map_or("no error".into(), |error| whole_message(&error))
    };
    let json = |text: &str| serde_json::from_str(text).unwrap();
    assert_eq!(with("/version", "1.0".into()), "no error");
    let template = |text: &str| {
        json(&format!(
            r#"{{"type": "TemplateProcessing", "single": {text}, "pair": [], "special_tokens": {{}}}}"#
        ))
    };
    #[rustfmt::skip] // a table: one case a line
    let cases = [
        ("/model/type", "Unigram".into(), "model type `Unigram` is not known, known are BPE"),
        ("/model/dropout", 0.1.into(), "drops merges at random (dropout 0.1)"),
        ("/model/end_of_word_suffix", "</w>".into(), "subword prefix or suffix `</w>` is not known"),
        ("/model/merges", json(r#"["<s> <s>"]"#), "bytes of the longest merge: found 6, expected 3"),
        ("/model/merges", json(r#"[["a", "b"]]"#), "Token `ab` out of vocabulary"),
        ("/model/vocab", json(r#"{"<s>": 2, "a": 4294967295}"#), "largest token id: found 4294967295"),
        ("/added_tokens/0/id", 7.into(), "added token \"<s>\" has id Some(2), its entry says 7"),
        ("/normalizer", json(r#"{"type": "Precompiled"}"#), "normalizer `Precompiled` is not known"),
        ("/pre_tokenizer", json(r#"{"type": "Sequence", "pretokenizers": [{"type": "FixedLength"}]}"#), "pre-tokenizer `FixedLength`"),
        ("/decoder", 5.into(), "decoder `none` is not known"),
        ("/decoder", json(r#"{"type": "Strip", "content": " ", "start": 0, "stop": 1}"#), "decoder Strip stop `1`"),
        ("/post_processor", json(r#"{"type": "BertProcessing"}"#), "post-processor `BertProcessing` is not known"),
        ("/post_processor", template(r#"[{"Sequence": {"id": "B", "type_id": 0}}]"#), "expected special tokens that it lists"),
        ("/post_processor", template(r#"[{"SpecialToken": {"id": "x", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]"#), "expected special tokens that it lists"),
    ];
    for (path, value, expected) in cases {
        let found = with(path, value);
        assert!(found.contains(expected), "expected: {expected}\n   found: {found}");
    }
    let message = |bytes: &[u8]| whole_message(&Tokenizer::from_json(bytes).err().unwrap());
    assert!(message(b"{}").starts_with("not a tokenizer.json: missing field `model`"));
}
