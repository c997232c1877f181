//! Bad input through the command: the exit code and the message, in text and in JSON; no panic; no file
//! left behind.
//!
//! Models are the built-in one with one thing changed; artifacts are compiled from it. What readers say of each wrong
//! field is tested beside them (`models/tests/it/bad.rs`, `runtime/tests/it/artifact.rs`).

use crate::command::{Place, Said};
use crate::gguf_file::Gguf;
use crate::skipped::skip;
use libtest_mimic::Trial;
use runtime::artifact::{Artifact, ArtifactWriter, MAGIC, is_weights};
use runtime::manifest::Manifest;
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use std::process::Command;

pub fn trials() -> Vec<Trial> {
    let tests: [(&str, fn()); 12] = [
        ("usage", usage),
        ("safetensors", safetensors),
        ("gguf", gguf),
        ("config", config),
        ("directories and tokenizers", directories),
        ("damaged artifacts", damaged_artifacts),
        ("foreign artifacts", foreign_artifacts),
        ("context", context),
        ("memory", memory),
        ("full disk", full_disk),
        ("size limit", size_limit),
        ("places that cannot be written", unwritable),
    ];
    let trial = |(name, test): (&str, fn())| {
        Trial::test(format!("bad {name}"), move || {
            test();
            Ok(())
        })
    };
    tests.into_iter().map(trial).collect()
}

/// How the command must refuse.
struct Refusal<'a> {
    exit: i32,
    /// Part of the message.
    says: &'a str,
    /// Parts of the fields `file`, `found` and `expected`; an empty one may be missing.
    facts: [&'a str; 3],
}

/// Runs the command with and without `--json`; it must refuse, and leave all files as they are.
fn refused(place: &Place, arguments: &str, refusal: &Refusal<'_>) {
    let before = place.files();
    let text = place.run(arguments);
    check_text(&text, refusal);
    check_json(&place.run(&format!("{arguments} --json")), refusal);
    assert_eq!(place.files(), before, "{arguments}: files left behind");
}

fn check_text(said: &Said, refusal: &Refusal<'_>) {
    let Said { command, exit, out, err, .. } = said;
    assert_eq!(*exit, Some(refusal.exit), "{command}: {err}");
    assert!(err.lines().any(|line| line.starts_with("error: ")), "{command}: {err}");
    assert!(err.contains(refusal.says), "{command}\nexpected: {}\n   found: {err}", refusal.says);
    assert_eq!(out, "", "{command}");
}

fn check_json(said: &Said, refusal: &Refusal<'_>) {
    let Said { command, exit, out, err, .. } = said;
    assert_eq!(*exit, Some(refusal.exit), "{command}: {err}");
    let told: Value = serde_json::from_str(err).unwrap_or_else(|error| panic!("{command}: {error}: {err}"));
    let keys: Vec<&String> = told.as_object().expect("an object").keys().collect();
    assert_eq!(keys, ["error", "exit", "expected", "file", "found"], "{command}");
    assert_eq!(told["exit"], refusal.exit, "{command}");
    let error = told["error"].as_str().expect("a text");
    assert!(error.contains(refusal.says), "{command}\nexpected: {}\n   found: {error}", refusal.says);
    for (key, part) in ["file", "found", "expected"].into_iter().zip(refusal.facts) {
        let fact = told[key].as_str().unwrap_or_default();
        assert!(fact.contains(part), "{command}: {key} is {fact:?}, expected {part:?}");
    }
    assert_eq!(out, "", "{command}");
}

/// The files of the built-in model.
fn builtin(name: &str) -> Vec<u8> {
    fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("builtin").join(name))
        .expect("a file of the built-in model")
}

/// A directory `m` with the built-in model.
fn model(place: &Place) {
    for name in ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"] {
        place.write(&format!("m/{name}"), builtin(name));
    }
}

fn usage() {
    let place = Place::new();
    place.write("garbage.ir", "garbage");
    #[rustfmt::skip] // a table: one case a line
    let cases = [
        ("frobnicate", "unrecognized subcommand 'frobnicate'", ["", "", ""]),
        ("run builtin --frobnicate", "unexpected argument '--frobnicate'", ["", "", ""]),
        ("compile builtin", "required arguments were not provided", ["", "", ""]),
        ("compile builtin -o a --dtype f16", "expected f32 or bf16", ["", "", ""]),
        ("compile builtin -o a --ctx 0", "expected a number above zero", ["", "", ""]),
        ("compile builtin -o a --target cpu:z80", "`cpu:z80` is not known; there are cpu:native", ["", "cpu:z80", "cpu:aarch64"]),
        ("compile builtin -o a --target cpu:x86-64-v3 --target cpu:x86-64-v3", "--target cpu:x86-64-v3 stands there twice", ["", "", ""]),
        ("compile preset:llama-7b -o a", "has no weights: add --random-weights SEED, or --no-weights", ["preset:llama-7b", "", ""]),
        ("run preset:llama-7b", "has no weights: add --random-weights SEED", ["preset:llama-7b", "", ""]),
        ("run preset:llama-8b", "preset:llama-8b is not known; there are llama-7b", ["", "llama-8b", "llama-7b"]),
        ("run builtin --temp -1", "temperature is -1, expected 0 or more", ["", "-1", "0 or more"]),
        ("run builtin --top-p 2", "top-p is 2, expected above 0, at most 1", ["", "2", "at most 1"]),
        ("run builtin -f none.txt", "none.txt: cannot be read: No such file", ["none.txt", "", ""]),
        ("run builtin --tokens 1,x", "`x` is no token id", ["", "", ""]),
        ("run builtin --chat -p x", "builtin has no chat template; use -p TEXT", ["", "", ""]),
        ("run builtin --tokens 1,1280", "token 1280, expected 0..1280", ["", "1280", "0..1280"]),
        ("logits builtin --tokens 1,-1", "token -1, expected 0..1280", ["", "-1", "0..1280"]),
        ("tokenize builtin --decode 5000", "there are token ids 0 to 1279", ["", "", ""]),
        ("inspect builtin --verify", "--verify: only an artifact has digests", ["", "", ""]),
    ];
    place.ok("logits builtin --tokens 1"); // The cache has it now, and so no case writes a file.
    for (arguments, says, facts) in cases {
        refused(&place, arguments, &Refusal { exit: 2, says, facts });
    }
    let says = "there is no device `tpu` in this llamac; there is cpu";
    refused(&place, "run builtin --device tpu", &Refusal { exit: 7, says, facts: ["", "tpu", "cpu"] });
    // For want of a driver, or of so many GPUs.
    let says = "device cuda:99: ";
    refused(&place, "run builtin --device cuda:99", &Refusal { exit: 7, says, facts: ["", "", ""] });
    let says = "garbage.ir:1: column 1: expected `graph`, found `garbage`";
    refused(&place, "opt garbage.ir", &Refusal { exit: 3, says, facts: ["garbage.ir", "", ""] });
}

/// The header of a safetensors file, and its data.
fn parted(file: &[u8]) -> (String, &[u8]) {
    let length = u64::from_le_bytes(file[..8].try_into().expect("eight bytes")) as usize;
    (String::from_utf8(file[8..8 + length].to_vec()).expect("JSON"), &file[8 + length..])
}

fn joined(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
}

fn safetensors() {
    let place = Place::new();
    model(&place);
    let right = builtin("model.safetensors");
    let (header, data) = parted(&right);
    let changed = |from: &str, to: &str| {
        assert!(header.contains(from), "{from}");
        joined(&header.replacen(from, to, 1), data)
    };
    let norm = r#""model.layers.0.input_layernorm.weight":{"dtype":"BF16","shape":[128],"data_offsets":[327680,327936]}"#;
    let norm_again = format!("{norm},{norm}");
    let longer = [&right[..], &[0; 7]].concat();
    #[rustfmt::skip] // a table: one case a line
    let cases = [
        (right[..right.len() / 2].to_vec(), "the file has 1089360", ["", "1089360"]),
        (right[..right.len() - 1].to_vec(), "the file has 2178719", ["", "2178719"]),
        (right[..100].to_vec(), "the header needs bytes up to", ["100", ""]),
        (vec![], "the header's length needs bytes up to 8, the file has 0", ["0", "8"]),
        ([&[255; 8], &right[8..]].concat(), "the header's length is 18446744073709551615, at most", ["18446744073709551615", "at most"]),
        (joined("[]", data), "not the JSON expected", ["", ""]),
        (longer, "belong to no tensor", ["", ""]),
        (changed("[327680,327936]", "[327424,327680]"), "inside `model.embed_tokens.weight`, which ends at", ["", ""]),
        (changed("[327680,327936]", "[327680,18446744073709551615]"), "model.layers.0.input_layernorm.weight", ["", ""]),
        (changed(r#""BF16","shape":[128]"#, r#""I16","shape":[128]"#), "`model.layers.0.input_layernorm.weight` is stored as I16, known are F32, BF16, F16", ["I16", "F32"]),
        (changed(norm, &norm_again), "tensor `model.layers.0.input_layernorm.weight` stands twice", ["model.layers.0.input_layernorm.weight", ""]),
        (changed(r#""shape":[128]"#, r#""shape":[2,64]"#), "`model.layers.0.input_layernorm.weight` is [2, 64], the config asks for [128]", ["[2, 64]", "[128]"]),
        (changed("layers.0.input_layernorm", "layers.0.layernorm"), "no tensor `model.layers.0.input_layernorm.weight`, the config asks for one of shape [128]", ["nothing", "model.layers.0.input_layernorm.weight [128]"]),
    ];
    for (bytes, says, [found, expected]) in cases {
        place.write("m/model.safetensors", bytes);
        let facts = ["m", found, expected];
        for verb in ["compile m -o a.llamac", "run m -p x", "inspect m"] {
            refused(&place, verb, &Refusal { exit: 3, says, facts });
        }
    }
    fs::remove_file(place.path("m/model.safetensors")).expect("it is there");
    let weights: serde_json::Map<String, Value> =
        [("model.norm.weight".to_string(), json!("model-00002-of-00002.safetensors"))].into_iter().collect();
    place.write("m/model.safetensors.index.json", json!({ "weight_map": weights }).to_string());
    let says =
        "m/model-00002-of-00002.safetensors: shard is missing; the index puts `model.norm.weight` there";
    let facts = ["model-00002-of-00002.safetensors", "nothing", "model.norm.weight"];
    refused(&place, "compile m -o a.llamac", &Refusal { exit: 3, says, facts });
}

fn gguf() {
    let place = Place::new();
    let right = Gguf::small().finish();
    place.write("m.gguf", &right);
    place.ok("compile m.gguf -o right.llamac");
    let norm = "blk.0.attn_norm.weight";
    let changed = |change: &dyn Fn(&mut Gguf) -> &mut Gguf| {
        let mut gguf = Gguf::small();
        change(&mut gguf);
        gguf.finish()
    };
    #[rustfmt::skip] // a table: one case a line
    let cases = [
        (right[..right.len() - 1].to_vec(), "the file has", ["", ""]),
        (right[..200].to_vec(), "needs bytes up to", ["200", ""]),
        (right[..3].to_vec(), "no checkpoint: found a file", ["", "a GGUF file"]),
        (changed(&|g| g.version(9)), "version 9 of the format, known are [2, 3]", ["9", "[2, 3]"]),
        (changed(&|g| g.string("general.architecture", "mamba")), "`general.architecture` is `mamba`, known are llama", ["mamba", "llama"]),
        (changed(&|g| g.string("llama.rope.scaling.type", "longrope")), "`llama.rope.scaling.type` is `longrope`, known are", ["longrope", "linear"]),
        (changed(&|g| g.u32("llama.expert_count", 8)), "key `llama.expert_count` (= 8) is not supported", ["llama.expert_count", ""]),
        (changed(&|g| g.u32("llama.embedding_length", 8)), "`model.embed_tokens.weight` is [6, 4], the config asks for [6, 8]", ["[6, 4]", "[6, 8]"]),
        (changed(&|g| g.offset(norm, 32)), "inside `token_embd.weight`", ["", ""]),
        (changed(&|g| g.offset(norm, 1 << 40)), "lies at bytes", ["", ""]),
        (changed(&|g| g.twice(norm)), "tensor `blk.0.attn_norm.weight` stands twice", ["blk.0.attn_norm.weight", ""]),
        (changed(&|g| g.bytes_tensor(norm, &[4], 10, vec![0; 16])), "is stored as Q2_K, known are F32", ["Q2_K", "F32"]),
        (changed(&|g| g.bytes_tensor(norm, &[1 << 60], 0, vec![0; 16])), "blk.0.attn_norm.weight", ["", ""]),
    ];
    for (bytes, says, [found, expected]) in cases {
        place.write("m.gguf", bytes);
        let facts = ["m.gguf", found, expected];
        for verb in ["compile m.gguf -o a.llamac", "logits m.gguf --tokens 1"] {
            refused(&place, verb, &Refusal { exit: 3, says, facts });
        }
    }
}

fn config() {
    let place = Place::new();
    model(&place);
    let right: Value = serde_json::from_slice(&builtin("config.json")).expect("JSON");
    #[rustfmt::skip] // a table: one case a line
    let cases = [
        ("architectures", json!(["MambaForCausalLM"]), "is `MambaForCausalLM`, known are LlamaForCausalLM", ["MambaForCausalLM", "LlamaForCausalLM"]),
        ("hidden_act", json!("gelu"), "`hidden_act` is `gelu`, known are silu", ["gelu", "silu"]),
        ("rope_scaling", json!({ "rope_type": "longrope", "factor": 2.0 }), "`longrope`, known are default, linear, llama3, yarn", ["longrope", "yarn"]),
        ("embedding_multiplier", json!(12), "key `embedding_multiplier`", ["embedding_multiplier", ""]),
        ("hidden_size", json!(256), "the config asks for", ["", "256"]),
        ("num_attention_heads", json!("four"), "`num_attention_heads`", ["four", ""]),
        ("num_hidden_layers", json!(9), "no tensor `model.layers.5", ["nothing", "model.layers.5"]),
        ("num_hidden_layers", json!(4), "has no place in the model", ["model.layers.4", ""]),
        ("vocab_size", Value::Null, "`vocab_size`", ["", ""]),
    ];
    for (key, value, says, [found, expected]) in cases {
        let mut config = right.clone();
        config[key] = value;
        place.write("m/config.json", config.to_string());
        for verb in ["compile m -o a.llamac", "run m -p x"] {
            refused(&place, verb, &Refusal { exit: 3, says, facts: ["m", found, expected] });
        }
    }
}

fn directories() {
    let place = Place::new();
    let compile = |says, facts| refused(&place, "compile m -o a.llamac", &Refusal { exit: 3, says, facts });
    compile(
        "m: no checkpoint: found nothing, expected a Hugging Face directory or a .gguf file",
        ["m", "nothing", ".gguf"],
    );
    fs::create_dir(place.path("m")).expect("a folder");
    compile(
        "found a directory without config.json, expected config.json, or a .gguf file",
        ["m", "a directory", "config.json"],
    );
    model(&place);
    place.write("m/config.json", "{");
    compile("m/config.json: not the JSON expected", ["config.json", "", ""]);
    model(&place);
    place.write("m/tokenizer.json", "{}");
    compile("m/tokenizer.json", ["tokenizer.json", "", ""]);
    model(&place);
    place.write("m/tokenizer_config.json", json!({ "chat_template": "{% for" }).to_string());
    let says = "template";
    place.ok("logits m --tokens 1"); // Compiles: the template is asked only by `--chat`.
    refused(&place, "run m --chat -p x", &Refusal { exit: 3, says, facts: ["", "", ""] });
    // Weights that give no numbers.
    let right = builtin("model.safetensors");
    let (header, mut data) = {
        let (header, data) = parted(&right);
        (header, data.to_vec())
    };
    data[..1024].fill(0xFF);
    place.write("m/model.safetensors", joined(&header, &data));
    place.ok("logits m --tokens 5");
    refused(&place, "run m --tokens 0 -n 1", &Refusal { exit: 3, says: "NaN", facts: ["", "", ""] });
}

/// Compiles the built-in model to `right.llamac`, for 64 positions.
fn artifact(place: &Place) -> Vec<u8> {
    place.ok("compile builtin -o right.llamac --ctx 64");
    place.read("right.llamac")
}

fn damaged_artifacts() {
    let place = Place::new();
    let right = artifact(&place);
    let verbs = [
        "run bad.llamac -p x",
        "logits bad.llamac --tokens 1",
        "inspect bad.llamac",
        "tokenize bad.llamac x",
    ];
    let refused = |bytes: &[u8], says: &str, facts: [&str; 3]| {
        place.write("bad.llamac", bytes);
        for verb in verbs {
            refused(&place, verb, &Refusal { exit: 4, says, facts });
        }
    };
    let opened = Artifact::open(&place.path("right.llamac")).expect("the right one");
    for section in opened.sections().iter().filter(|section| !is_weights(&section.name)) {
        let mut bytes = right.clone();
        bytes[(section.offset + section.length / 2) as usize] ^= 1;
        let says = format!("digest of section `{}` is", section.name);
        refused(&bytes, &says, ["bad.llamac", "", &section.digest.to_hex()]);
    }
    let flipped = |at: usize| {
        let mut bytes = right.clone();
        bytes[at] ^= 1;
        bytes
    };
    let at = |at: usize| u64::from_le_bytes(right[at..at + 8].try_into().expect("eight bytes")) as usize;
    refused(&flipped(20), "digest of header is", ["bad.llamac", "", ""]);
    refused(&flipped(at(16)), "digest of manifest is", ["bad.llamac", "", ""]);
    refused(&flipped(at(64)), "digest of section table is", ["bad.llamac", "", ""]);
    refused(
        &flipped(8),
        "artifact version is 0, this program reads 1: compile the model again",
        ["bad.llamac", "0", "1"],
    );
    for length in [8, 4096, right.len() / 2, right.len() - 1] {
        refused(
            &right[..length],
            &format!("file is {length} bytes, expected"),
            ["bad.llamac", &length.to_string(), ""],
        );
    }
    refused(&[&right[..], &[0]].concat(), "bytes, expected", ["bad.llamac", "", ""]);
    refused(&[], "not a llamac artifact: begins with ", ["bad.llamac", "", ""]);
    refused(b"GGUF and more", "not a llamac artifact: begins with 47475546", ["bad.llamac", "", ""]);
    fs::remove_file(place.path("bad.llamac")).expect("it is there");
    for verb in verbs {
        let says = "bad.llamac: cannot be mapped: No such file";
        self::refused(&place, verb, &Refusal { exit: 4, says, facts: ["bad.llamac", "", ""] });
    }

    // Weights are read on demand; `--verify` asks for them.
    let weights = opened.sections().iter().find(|section| is_weights(&section.name)).expect("weights");
    place.write("bad.llamac", flipped((weights.offset + 10) as usize));
    place.ok("inspect bad.llamac");
    let says = "digest of section `weights` is";
    self::refused(
        &place,
        "inspect bad.llamac --verify",
        &Refusal { exit: 4, says, facts: ["bad.llamac", "", ""] },
    );
    // Without the ending the magic says what it is.
    assert_eq!(right[..8], MAGIC);
    place.write("bad", flipped(8));
    self::refused(
        &place,
        "run bad -p x",
        &Refusal { exit: 4, says: "artifact version is 0", facts: ["bad", "0", "1"] },
    );

    // A damaged file in the cache is made again.
    let first = place.ok("run builtin -p Once --temp 0 -n 8");
    let cached =
        place.files().into_iter().find(|file| file.starts_with("cache/")).expect("a cached artifact");
    place.write(&cached, &place.read(&cached)[..5000]);
    let again = place.ok("run builtin -p Once --temp 0 -n 8");
    assert!(again.err.contains("compiling again"), "{}", again.err);
    assert_eq!(again.out, first.out);
}

/// Writes the right artifact anew, with valid digests, and something changed in its manifest and sections.
fn forged(place: &Place, change: impl FnOnce(&mut Manifest, &mut Vec<(String, Vec<u8>)>)) {
    let right = Artifact::open(&place.path("right.llamac")).expect("the right one");
    let mut manifest: Manifest = right.manifest().expect("its manifest");
    let contents = |name: &str| right.section(name).expect("a section of the table").to_vec();
    let mut sections: Vec<_> = right.sections().iter().map(|s| (s.name.clone(), contents(&s.name))).collect();
    change(&mut manifest, &mut sections);
    let mut writer = ArtifactWriter::create(&place.path("bad.llamac"), None).expect("room");
    for (name, contents) in sections {
        let mut section = writer.section(&name).expect("a name");
        section.append(&contents).expect("room");
        section.end().expect("room");
    }
    writer.finish(&manifest).expect("room");
}

fn foreign_artifacts() {
    let place = Place::new();
    artifact(&place);
    let refused = |says: &str, facts: [&str; 3]| {
        for verb in ["run bad.llamac -p x", "logits bad.llamac --tokens 1", "bench bad.llamac -p 1 -n 1"] {
            refused(&place, verb, &Refusal { exit: 4, says, facts });
        }
    };
    let here = std::env::consts::ARCH;
    forged(&place, |manifest, _| manifest.targets[0].requires.push("avx1024".to_string()));
    refused("bad.llamac: needs cpu:native (avx1024), this machine is", ["bad.llamac", here, "avx1024"]);
    forged(&place, |manifest, _| manifest.targets[0].arch = "riscv64".to_string());
    refused("needs cpu:native (riscv64)", ["bad.llamac", here, "riscv64"]);
    forged(&place, |manifest, _| manifest.targets[0].abi = 99);
    refused("needs cpu:native (ABI 99)", ["bad.llamac", "ABI", "ABI 99"]);
    forged(&place, |manifest, _| manifest.targets.clear());
    refused("bad.llamac: needs ", ["bad.llamac", here, ""]);
    forged(&place, |manifest, _| manifest.targets[0].name = "cpu:other".to_string());
    refused("no section `plan.cpu:other`", ["bad.llamac", "nothing", "plan.cpu:other"]);
    let section = |sections: &mut Vec<(String, Vec<u8>)>, name: &str, contents: &[u8]| {
        sections.iter_mut().find(|(n, _)| n == name).expect("a section").1 = contents.to_vec();
    };
    forged(&place, |_, sections| section(sections, "plan.cpu:native", b"no plan"));
    refused("bad.llamac: section `plan.cpu:native`", ["bad.llamac", "", ""]);
    forged(&place, |_, sections| section(sections, "plan.cpu:native", &[0xFF; 9]));
    refused("bad.llamac: section `plan.cpu:native`", ["bad.llamac", "", ""]);
    forged(&place, |_, sections| section(sections, "weights", b"few"));
    refused("section `weights`: 3 bytes, the plan needs", ["bad.llamac", "", ""]);
    place.ok("compile builtin -o bad.llamac --ctx 64 --target cpu:aarch64");
    if here != "aarch64" {
        refused("bad.llamac: needs cpu:aarch64 (aarch64), this machine is", ["bad.llamac", here, "aarch64"]);
        let shown = place.ok("inspect bad.llamac");
        assert!(shown.out.contains("no: no target fits this machine"), "{}", shown.out);
    }
    place.ok("compile builtin -o bad.llamac --ctx 64 --no-weights");
    for verb in ["run bad.llamac -p x", "logits bad.llamac --tokens 1"] {
        let says =
            "bad.llamac has no weights: it was compiled with --no-weights; compile it again without that";
        self::refused(&place, verb, &Refusal { exit: 2, says, facts: ["bad.llamac", "", ""] });
    }
}

fn context() {
    let place = Place::new();
    artifact(&place);
    place.write("long.txt", "Once upon a time there was a fox. ".repeat(20));
    let tokens = vec!["5"; 65].join(",");
    let says_65 = "context full: 0 positions in the cache and 65 more, compiled for 64";
    let says_model = "expected 1 to 512, the model's own";
    #[rustfmt::skip] // a table: one case a line
    let cases = [
        (format!("run right.llamac --tokens {tokens}"), says_65, ["", "65", "64"]),
        (format!("logits right.llamac --tokens {tokens}"), says_65, ["", "65", "64"]),
        (format!("logits right.llamac --chunk 1 --tokens {tokens}"), says_65, ["", "65", "64"]),
        ("run right.llamac -f long.txt".to_string(), "context full: 0 positions in the cache and", ["", "", "64"]),
        ("run right.llamac -p x --ctx 65".to_string(), says_65, ["", "65", "64"]),
        ("compile builtin -o a.llamac --ctx 513".to_string(), says_model, ["", "513", "512"]),
        ("run builtin -p x --ctx 513".to_string(), says_model, ["", "513", "512"]),
        ("plan builtin --ctx 513".to_string(), says_model, ["", "513", "512"]),
    ];
    for (arguments, says, facts) in cases {
        refused(&place, &arguments, &Refusal { exit: 5, says, facts });
    }
    // A text that grows until the cache is full ends there, and says so.
    let full = place.ok("run right.llamac -p Once --temp 0 --ignore-eos -n 500");
    assert!(full.err.contains("[context full: 64 positions"), "{}", full.err);
    let full = place.ok("run right.llamac -p Once --temp 0 --ignore-eos -n 500 --json").json();
    assert_eq!(full["stop_reason"], "context_full");
    let (prompt, tokens) = (full["prompt_tokens"].as_array(), full["tokens"].as_array());
    // The last token is written and not run.
    assert_eq!(prompt.map_or(0, Vec::len) + tokens.map_or(0, Vec::len), 65);
}

fn memory() {
    let place = Place::new();
    let mut gguf = Gguf::small();
    // Two caches of 2^31 positions and 4 numbers of 4 bytes, and the largest workspace: 64 GiB and more.
    gguf.u32("llama.context_length", 1 << 31);
    place.write("m.gguf", gguf.finish());
    place.ok("compile m.gguf -o large.llamac --ctx 2147483647");
    let there = runtime::map::available_bytes().unwrap_or(u64::MAX);
    if there > 60 << 30 {
        return skip("bad memory", &format!("there are {there} bytes"));
    }
    for verb in ["run large.llamac --tokens 1", "logits large.llamac --tokens 1"] {
        let says = "out of memory: ";
        refused(&place, verb, &Refusal { exit: 6, says, facts: ["", "", "6"] });
    }
}

/// A file system with room for so many bytes, gone when dropped; none where this user may not mount one.
struct Small<'a>(&'a Path);

impl Small<'_> {
    fn mount(folder: &Path, bytes: usize) -> Option<Small<'_>> {
        fs::create_dir_all(folder).expect("a folder");
        let size = format!("size={bytes}");
        let mounted =
            Command::new("mount").args(["-t", "tmpfs", "-o", &size, "llamac-test"]).arg(folder).output();
        mounted.is_ok_and(|output| output.status.success()).then_some(Small(folder))
    }
}

impl Drop for Small<'_> {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg(self.0).status();
        assert!(unmounted.is_ok_and(|status| status.success()), "{} stays mounted", self.0.display());
    }
}

fn full_disk() {
    let place = Place::new();
    artifact(&place);
    // Stdout that is full needs no rights.
    for arguments in ["inspect right.llamac", "run right.llamac -p Once -n 4", "tokenize builtin x"] {
        let full = fs::OpenOptions::new().write(true).open("/dev/full").expect("the device");
        let said = Said::of(place.command(arguments).stdout(full));
        assert_eq!(said.exit, Some(6), "{arguments}: {}", said.err);
        assert!(
            said.err.contains("stdout: cannot be written: No space left on device"),
            "{arguments}: {}",
            said.err
        );
    }
    let folder = place.path("small");
    let Some(small) = Small::mount(&folder, 256 << 10) else {
        return skip("bad full disk", "this user may not mount a small file system");
    };
    let tokens = vec!["5"; 60].join(",");
    let refused = |arguments: &str, file| {
        let says = "no room: the file needs ";
        refused(&place, arguments, &Refusal { exit: 6, says, facts: [file, "", ""] });
    };
    // Weights are refused beforehand, logits when the disk is full; the cache as any other place.
    refused("compile builtin -o small/a.llamac", "small/a.llamac");
    refused(&format!("logits right.llamac --tokens {tokens} -o small/l.safetensors"), "small/l.safetensors");
    let said = Said::of(place.command("run builtin -p x").env("XDG_CACHE_HOME", &folder));
    check_text(&said, &Refusal { exit: 6, says: "no room: the file needs ", facts: ["", "", ""] });
    // Little enough that neither code nor the first text fits.
    drop(small);
    let _small = Small::mount(&folder, 64 << 10).expect("as before");
    refused("compile builtin -o small/a.llamac --no-weights", "small/a.llamac");
    refused("compile builtin -o a.llamac --keep small", "small/cpu-native/graph.ir");
    assert_eq!(place.files(), ["right.llamac"]);
}

fn size_limit() {
    let place = Place::new();
    let memory = place.ok("plan builtin --bandwidth 10GB --flops 100GB --json").json()["memory"].clone();
    let weights = memory["weights"].as_u64().expect("a number of bytes");
    // Limits that the weights alone pass, and that what is written before them does. `sh` counts by 512 bytes.
    for blocks in [weights / 512 / 2, weights / 512 + 1] {
        let limited = format!(
            "ulimit -f {blocks} && exec {} compile builtin -o a.llamac",
            env!("CARGO_BIN_EXE_llamac")
        );
        let said = Said::of(&mut place.program(Path::new("sh"), &["-c", &limited]));
        check_text(
            &said,
            &Refusal { exit: 6, says: "a.llamac: no room: the file needs ", facts: ["", "", ""] },
        );
        assert_eq!(place.files(), [""; 0]);
    }
}

fn unwritable() {
    let place = Place::new();
    artifact(&place);
    place.write("file", "");
    fs::create_dir(place.path("folder")).expect("a folder");
    #[rustfmt::skip] // a table: one case a line
    let cases = [
        ("compile builtin -o none/a.llamac", "none/a.llamac: cannot be written: No such file or directory", "none/a.llamac"),
        ("compile builtin -o folder", "folder: cannot be written: Is a directory", "folder"),
        ("compile builtin -o file/a.llamac", "cannot be written: Not a directory", "file/a.llamac"),
        // The kernel lets nobody make files there, root neither.
        ("compile builtin -o /proc/a.llamac", "/proc/a.llamac: cannot be written: ", "/proc/a.llamac"),
        ("compile builtin -o a.llamac --keep file", "file/cpu-native: cannot be written: ", "file/cpu-native"),
        ("logits right.llamac --tokens 1 -o none/l.safetensors", "cannot be written: No such file", "none/l.safetensors"),
        ("logits right.llamac --tokens 1 -o folder", "cannot be written: Is a directory", "folder"),
    ];
    for (arguments, says, file) in cases {
        refused(&place, arguments, &Refusal { exit: 2, says, facts: [file, "", ""] });
    }
}
