//! Files damaged at random give an error or a checkpoint, never a panic, and never ask for much memory. A bounded number of
//! cases, the same each time; `PROPTEST_CASES` asks for more.

use std::path::Path;
use std::sync::Arc;

use models::{Checkpoint, Config, FileBytes, Tokenizer, render_chat};
use proptest::prelude::*;

use serde_json::{Value, json};

use crate::damage::{check_memory, config, damage, damaged};
use crate::gguf_file::Gguf;
use crate::{numbers, shared};

/// Puts an odd value somewhere into a JSON text; `path` chooses the place, from the outside in.
fn with_odd_value(json: &mut Value, path: &[usize], odd: Value) {
    let Some((&step, rest)) = path.split_first() else { return *json = odd };
    let inner = match json {
        Value::Object(map) if !map.is_empty() => {
            let at = step % map.len();
            map.values_mut().nth(at)
        }
        Value::Array(list) if !list.is_empty() => {
            let at = step % list.len();
            list.get_mut(at)
        }
        _ => None,
    };
    match inner {
        Some(inner) => with_odd_value(inner, rest, odd),
        None => *json = odd,
    }
}

/// A place and what is put there.
fn odd_value() -> impl Strategy<Value = (Vec<usize>, Value)> {
    let odd = [
        "null",
        "true",
        "-1",
        "0",
        "1",
        "2",
        "3",
        "0.5",
        "1e308",
        "-1e-320",
        "4294967295",
        "4294967296",
        "18446744073709551615",
        "\"\"",
        "\"x\"",
        "\"<s>\"",
        "\"▁\"",
        "\"(\"",
        "\"linear\"",
        "\"yarn\"",
        "\"Sequence\"",
        "\"ByteLevel\"",
        "\"Metaspace\"",
        "\"Strip\"",
        "\"Regex\"",
        "[]",
        "[1]",
        "[\"a b\"]",
        "{}",
        "{\"type\": \"linear\", \"factor\": 3}",
    ];
    let odd = prop::sample::select(odd.to_vec()).prop_map(|text| serde_json::from_str(text).unwrap());
    (prop::collection::vec(any::<usize>(), 1..5), odd)
}

/// All tests of this program map less at once.
const MOST_BYTES: u64 = 4 << 30;

/// Opens a checkpoint whose file `name` is `bytes`, and reads all that it gives.
fn read_all(path: &Path, name: &str, bytes: Vec<u8>) {
    let bytes: FileBytes = Arc::new(bytes);
    let open = |file: &Path| -> std::io::Result<FileBytes> {
        if file.ends_with(name) { Ok(bytes.clone()) } else { Ok(Arc::new(std::fs::read(file)?)) }
    };
    let opened = Checkpoint::open(path, &open);
    check_memory(MOST_BYTES);
    let Ok(checkpoint) = opened else { return };
    for tensor in checkpoint.tensors() {
        numbers(&checkpoint, &tensor.name);
    }
    if let Some(tokenizer) = &checkpoint.tokenizer {
        run_tokenizer(&Tokenizer::from_json(&tokenizer.json).expect("what a reader gives can be read"));
    }
    if let Some(template) = &checkpoint.chat_template {
        let _ = render_chat(template, &[], "<s>", "</s>", true);
    }
}

fn run_tokenizer(tokenizer: &Tokenizer) {
    for text in ["", "Once upon  a time é🙂\n", "<s>a</s>"] {
        let Ok(ids) = tokenizer.encode(text, true) else { continue };
        let _ = tokenizer.decode(&ids, false);
        let _ = tokenizer.encode_rendered(text);
    }
    for id in 0..600 {
        tokenizer.token_bytes(id);
        let _ = tokenizer.decode(&[id], true);
    }
}

proptest! {
    #![proptest_config(config(2000))]

    #[test]
    fn a_small_gguf(damages in prop::collection::vec(damage(), 1..4)) {
        read_all(Path::new("m.gguf"), "m.gguf", damaged(&Gguf::small().finish(), &damages));
    }

    #[test]
    fn a_config(damages in prop::collection::vec(damage(), 1..4)) {
        let right = include_bytes!("../../../tests/bad/config/rope-kind-dynamic.json");
        if let Ok(text) = String::from_utf8(damaged(right, &damages)) {
            let _ = Config::from_hf_json(&text, Path::new("config.json"));
        }
    }

    #[test]
    fn odd_values_in_a_config(kind in 0..3usize, odd in prop::collection::vec(odd_value(), 1..3)) {
        let rope = [
            json!({ "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "truncate": false,
                    "beta_fast": 32, "beta_slow": 1, "mscale": 1, "mscale_all_dim": 1, "rope_theta": 1e4 }),
            json!({ "rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 64,
                    "low_freq_factor": 1, "high_freq_factor": 4 }),
            json!({ "type": "linear", "factor": 4.0 }),
        ];
        let mut config = json!({
            "architectures": ["LlamaForCausalLM"], "vocab_size": 32, "hidden_size": 8, "intermediate_size": 16,
            "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4,
            "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "eos_token_id": [2, 3], "bos_token_id": 1,
            "rope_parameters": rope[kind], "tie_word_embeddings": true, "attention_bias": true,
        });
        for (path, odd) in odd {
            with_odd_value(&mut config, &path[..path.len().min(2)], odd);
        }
        if let Ok((config, _)) = Config::from_hf_json(&config.to_string(), Path::new("config.json")) {
            config.parameters();
            let frequencies = config.rope.inverse_frequencies(config.head_dim);
            prop_assert!(frequencies.iter().all(|x| x.is_finite() && *x >= 0.0), "{:?}: {:?}", config.rope, frequencies);
            prop_assert!(config.rope.attention_factor().is_finite());
        }
    }

    #[test]
    fn a_chat_template(damages in prop::collection::vec(damage(), 1..4)) {
        let right = "{% for m in messages[1:] %}{{ bos_token + m['role'].strip() + m.content | tojson(indent=2) }}{% endfor %}\
                     {{ strftime_now('%d %b %Y') }}{% if not messages %}{{ raise_exception('none') }}{% endif %}";
        if let Ok(text) = String::from_utf8(damaged(right.as_bytes(), &damages)) {
            let _ = render_chat(&text, &[], "<s>", "</s>", true);
        }
    }
}

/// Files of `stories260K` that are damaged.
const STORIES: [&str; 5] =
    ["stories260K.gguf", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json"];

proptest! {
    #![proptest_config(config(300))]

    #[test]
    fn files_of_stories(name in prop::sample::select(&STORIES), damages in prop::collection::vec(damage(), 1..4)) {
        let Some(dir) = shared("models/stories260K") else { return Ok(()) };
        let bytes = damaged(&std::fs::read(dir.join(name)).unwrap(), &damages);
        let path = if name.ends_with(".gguf") { dir.join(name) } else { dir };
        read_all(&path, name, bytes);
    }

    #[test]
    fn odd_values_in_a_tokenizer(odd in prop::collection::vec(odd_value(), 1..3)) {
        let Some(dir) = shared("models/stories260K") else { return Ok(()) };
        let mut json: Value = serde_json::from_slice(&std::fs::read(dir.join("tokenizer.json")).unwrap()).unwrap();
        for (path, odd) in odd {
            with_odd_value(&mut json, &path, odd);
        }
        if let Ok(tokenizer) = Tokenizer::from_json(json.to_string().as_bytes()) {
            run_tokenizer(&tokenizer);
        }
    }

    #[test]
    fn a_sentencepiece_model(damages in prop::collection::vec(damage(), 1..4)) {
        let Some(dir) = shared("models/stories260K") else { return Ok(()) };
        let bytes = damaged(&std::fs::read(dir.join("tokenizer.model")).unwrap(), &damages);
        if let Ok(pieces) = models::sentencepiece::read(&bytes)
            && let Ok(source) = models::tokenizer_json::from_pieces(&pieces, models::tokenizer::Origin::SentencePiece)
        {
            run_tokenizer(&Tokenizer::from_json(&source.json).expect("what a reader gives can be read"));
        }
    }

    #[test]
    fn shards_and_their_index(damages in prop::collection::vec(damage(), 1..4)) {
        let Some(dir) = shared("models/variants/sharded-bf16") else { return Ok(()) };
        let name = "model.safetensors.index.json";
        let bytes = damaged(&std::fs::read(dir.join(name)).unwrap(), &damages);
        read_all(&dir, name, bytes);
    }

    /// Our header reader against that of the format's makers: it refuses all that theirs refuses, and what it refuses
    /// alone is a type that no LLaMA has, a name that stands twice, or an unknown field.
    #[test]
    fn safetensors_headers(damages in prop::collection::vec(damage(), 1..3)) {
        let right = br#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"BF16","shape":[1,2],"data_offsets":[8,12]}}"#;
        let header = damaged(right, &damages);
        let file = [&(header.len() as u64).to_le_bytes()[..], &header, &[0; 12]].concat();
        let ours = models::safetensors::read(Path::new("m"), &file);
        match (ours, safetensors::SafeTensors::deserialize(&file)) {
            (Ok(ours), Ok(theirs)) => prop_assert_eq!(ours.len(), theirs.len()),
            (Ok(_), Err(error)) => prop_assert!(false, "they refuse: {}", error),
            (Err(_), _) => {}
        }
    }
}
