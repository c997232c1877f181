//! Token ids of awkward texts, as the libraries of the models' makers give them.

use models::Tokenizer;
use serde_json::Value;

use crate::gguf_file::Gguf;
use crate::{open, open_gguf, shared, smollm2};

/// Encodes and decodes all cases of the reference file.
fn check_cases(tokenizer: &Tokenizer, kind: &str) {
    let Some(file) = shared("reference/tokenizers.json") else { return };
    let reference: Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    let cases = reference["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 33);
    for case in cases {
        let text = case["text"].as_str().unwrap();
        let expected: Vec<u32> =
            case[kind].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
        assert_eq!(tokenizer.encode(text, false).unwrap(), expected, "{kind}: {text:?}");
        let decoded = case[format!("{kind}_decoded")].as_str().unwrap();
        assert_eq!(tokenizer.decode(&expected, false).unwrap(), decoded, "{kind}: {text:?}");
        // Token by token the same bytes come out, but for the space that decoding drops.
        let bytes: Vec<u8> = expected.iter().flat_map(|&id| tokenizer.token_bytes(id)).collect();
        let streamed = String::from_utf8_lossy(&bytes).into_owned();
        let streamed = match streamed.strip_prefix(' ') {
            Some(rest) if tokenizer.strips_leading_space() => rest,
            _ => &streamed,
        };
        assert_eq!(streamed, decoded, "{kind}: {text:?}");
    }
}

#[test]
fn stories_json() {
    let Some(dir) = shared("models/stories260K") else { return };
    let tokenizer = Tokenizer::from_json(&open(&dir).unwrap().tokenizer.unwrap().json).unwrap();
    assert_eq!(tokenizer.vocab_size(), 512);
    assert_eq!(tokenizer.encode("", true).unwrap(), [1]);
    assert_eq!(
        (tokenizer.piece(1), tokenizer.id("<s>"), tokenizer.piece(512)),
        (Some("<s>".into()), Some(1), None)
    );
    check_cases(&tokenizer, "stories260K_json");
}

#[test]
fn stories_gguf() {
    let Some(dir) = shared("models/stories260K") else { return };
    let source = open(&dir.join("stories260K.gguf")).unwrap().tokenizer.unwrap();
    let tokenizer = Tokenizer::from_json(&source.json).unwrap();
    assert_eq!(tokenizer.encode("a", true).unwrap(), [1, 261]);
    check_cases(&tokenizer, "stories260K_json");

    // The merges are the very ones that transformers' converter wrote.
    let theirs: Value = serde_json::from_slice(&std::fs::read(dir.join("tokenizer.json")).unwrap()).unwrap();
    let ours: Value = serde_json::from_slice(&source.json).unwrap();
    for part in ["model", "normalizer", "decoder", "added_tokens"] {
        assert!(ours[part] == theirs[part], "{part}");
    }
}

#[test]
fn stories_sentencepiece() {
    let Some(dir) = shared("models/stories260K") else { return };
    let copy = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors", "tokenizer.model"] {
        std::fs::copy(dir.join(file), copy.path().join(file)).unwrap();
    }
    let source = open(copy.path()).unwrap().tokenizer.unwrap();
    let tokenizer = Tokenizer::from_json(&source.json).unwrap();
    assert_eq!(tokenizer.encode("a", true).unwrap(), [1, 261]);
    check_cases(&tokenizer, "stories260K_model");
    // In a rendered chat template the control pieces are found.
    assert_eq!(tokenizer.encode_rendered("<s>a</s>").unwrap(), [1, 261, 2]);
}

#[test]
fn smollm2_gguf() {
    let Some(file) = smollm2() else { return };
    let checkpoint = open(&file).unwrap();
    let tokenizer = Tokenizer::from_json(&checkpoint.tokenizer.unwrap().json).unwrap();
    assert_eq!(tokenizer.vocab_size(), 49152);
    assert_eq!(tokenizer.encode("a", true).unwrap(), tokenizer.encode("a", false).unwrap());
    check_cases(&tokenizer, "smollm2");
}

/// A byte-level vocabulary: the 256 bytes, `12 123 1234 ab Ġa`, and `xyz`, to which no merge leads.
fn byte_level(pre: &str) -> Tokenizer {
    let bytes = ('\0'..='\u{143}').filter(|c| {
        let printable = ('!'..='~').contains(c) || ('¡'..='¬').contains(c) || ('®'..='ÿ').contains(c);
        printable || *c >= '\u{100}'
    });
    let mut tokens: Vec<String> = bytes.map(String::from).collect();
    tokens.extend(["12", "123", "1234", "ab", "Ġa", "xyz", "<|end|>"].map(String::from));
    let tokens: Vec<&str> = tokens.iter().map(String::as_str).collect();
    assert_eq!(tokens.len(), 263);
    let mut kinds = vec![1; 262];
    kinds.push(3);
    let mut gguf = Gguf::small();
    gguf.string("tokenizer.ggml.model", "gpt2")
        .string("tokenizer.ggml.pre", pre)
        .strings("tokenizer.ggml.tokens", &tokens)
        .u32s("tokenizer.ggml.token_type", &kinds)
        .strings("tokenizer.ggml.merges", &["1 2", "12 3", "123 4", "a b", "Ġ a"])
        .u32("tokenizer.ggml.bos_token_id", 5);
    Tokenizer::from_json(&open_gguf(&gguf).tokenizer.unwrap().json).unwrap()
}

#[test]
fn ways_to_cut_text_into_words() {
    let pieces = |pre: &str, text: &str| {
        let tokenizer = byte_level(pre);
        let ids = tokenizer.encode(text, false).unwrap();
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
        ids.into_iter().map(|id| tokenizer.piece(id).unwrap()).collect::<Vec<_>>().join("|")
    };
    assert_eq!(pieces("gpt-2", "12345 ab"), "1234|5|Ġ|ab");
    assert_eq!(pieces("smollm", "12345 ab"), "1|2|3|4|5|Ġ|ab");
    assert_eq!(pieces("llama-bpe", "12345 ab"), "123|4|5|Ġ|ab");
    assert_eq!(pieces("default", "12345 ab"), "123|4|5|Ġ|ab");
    // LLaMA 3 takes whole words of the vocabulary as they are, others put them together.
    assert_eq!(pieces("llama-bpe", "xyz"), "xyz");
    assert_eq!(pieces("gpt-2", "xyz"), "x|y|z");
    // Of two spaces GPT-2 gives the second to the word, and each way finds special tokens.
    assert_eq!(pieces("gpt-2", "ab  a<|end|>"), "ab|Ġ|Ġa|<|end|>");
    assert_eq!(pieces("default", "é\n\n"), "Ã|©|Ċ|Ċ");
}

#[test]
fn llama_3_begins_with_bos() {
    assert_eq!(byte_level("llama-bpe").encode("", true).unwrap(), [5]);
    assert_eq!(byte_level("gpt-2").encode("", true).unwrap(), [0; 0]);
}

/// `tokenizer_config.json` decides on BOS and EOS, where it speaks of them.
#[test]
fn settings_beside_the_tokenizer() {
    let Some(dir) = shared("models/stories260K") else { return };
    for name in ["tokenizer.json", "tokenizer.model"] {
        let ids = |settings: &str| {
            let copy = tempfile::tempdir().unwrap();
            for file in ["config.json", "model.safetensors", name] {
                std::fs::copy(dir.join(file), copy.path().join(file)).unwrap();
            }
            std::fs::write(copy.path().join("tokenizer_config.json"), settings).unwrap();
            let source = open(copy.path()).unwrap().tokenizer.unwrap();
            Tokenizer::from_json(&source.json).unwrap().encode("a", true).unwrap()
        };
        assert_eq!(ids("{}"), [1, 261], "{name}");
        assert_eq!(ids(r#"{"add_bos_token": false, "bos_token": "<s>"}"#), [261], "{name}");
        let both = r#"{"add_bos_token": true, "add_eos_token": true, "bos_token": {"content": "<s>"}, "eos_token": "</s>"}"#;
        assert_eq!(ids(both), [1, 261, 2], "{name}");
        assert_eq!(ids(r#"{"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>"}"#), [1, 261], "{name}");
    }
}
