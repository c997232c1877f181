//! Every checkpoint opens, and its numbers are the ones stored.

use models::checkpoint::Format;

use models::{Message, ReadError, Rope, RopeKind, preset, render_chat};

use crate::gguf_file::Gguf;
use crate::{numbers, open, open_gguf, shared, smollm2};

#[test]
fn every_variant_opens() {
    let Some(variants) = shared("models/variants") else { return };
    let mut opened = 0;
    for entry in std::fs::read_dir(variants).unwrap() {
        let dir = entry.unwrap().path();
        let checkpoint = open(&dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
        let elems: usize = checkpoint.tensors().map(|tensor| tensor.shape.iter().product::<usize>()).sum();
        assert_eq!(elems as u64, checkpoint.config.parameters());
        for tensor in checkpoint.tensors() {
            assert!(numbers(&checkpoint, &tensor.name).iter().all(|x| x.is_finite()), "{}", tensor.name);
        }
        opened += 1;
    }
    assert_eq!(opened, 14);
}

#[test]
fn configs_say_what_the_variants_table_says() {
    let Some(variants) = shared("models/variants") else { return };
    let config = |name: &str| open(&variants.join(name)).unwrap().config;
    let mha = config("llama1-mha");
    assert_eq!((mha.n_heads, mha.n_kv_heads, mha.head_dim, mha.attention_bias), (4, 4, 16, false));
    assert_eq!(config("head-dim").head_dim, 24);
    assert_eq!(config("gqa4").rope, Rope { theta: 500_000.0, kind: RopeKind::Default });
    assert!(config("tied").tied && config("biases").mlp_bias && config("biases").attention_bias);
    assert_eq!(config("rope-linear-old").rope.kind, RopeKind::Linear { factor: 4.0 });
    assert_eq!(config("rope-default-new").rope.theta, 250_000.0);
    assert_eq!(config("rope-llama3-new").eos, [2, 5, 7]);
    assert_eq!(config("rope-yarn-old").rope.attention_factor(), 0.1 * 4f64.ln() + 1.0);
    assert_eq!(config("rope-yarn-new").rope.attention_factor(), 1.25);
}

#[test]
fn stories_opens() {
    let Some(dir) = shared("models/stories260K") else { return };
    let checkpoint = open(&dir).unwrap();
    assert_eq!(checkpoint.format, Format::HuggingFace);
    assert_eq!(checkpoint.config.parameters(), 260_032);
    assert_eq!((checkpoint.config.bos, checkpoint.config.eos.as_slice()), (Some(1), &[2][..]));
    let ignored = ["attention_dropout", "initializer_range", "pretraining_tp", "use_cache", "torch_dtype"];
    assert_eq!(checkpoint.ignored_keys, ignored);
}

#[test]
fn the_gguf_holds_the_same_model() {
    let Some(dir) = shared("models/stories260K") else { return };
    let (directory, gguf) = (open(&dir).unwrap(), open(&dir.join("stories260K.gguf")).unwrap());
    assert_eq!(gguf.format, Format::Gguf(3));
    assert_eq!(directory.config, gguf.config);
    for tensor in directory.tensors() {
        assert_eq!(numbers(&directory, &tensor.name), numbers(&gguf, &tensor.name), "{}", tensor.name);
    }
    assert_eq!(gguf.ignored_keys, ["general.name", "general.license", "general.file_type"]);
}

#[test]
fn every_block_format_is_read() {
    let Some(file) = shared("models/quant-mixed.gguf") else { return };
    let checkpoint = open(&file).unwrap();
    let mut types: Vec<&str> =
        checkpoint.stored_dtypes().into_iter().map(|(dtype, _)| dtype.name()).collect();
    types.sort_unstable();
    assert_eq!(types, ["bf16", "f16", "f32", "q4_0", "q4_1", "q4_k", "q5_0", "q5_1", "q5_k", "q6_k", "q8_0"]);
    for (name, expected) in GGUF_PY {
        let mut numbers = numbers(&checkpoint, name);
        if name.contains("q_proj") || name.contains("k_proj") {
            numbers = interleaved(&numbers, checkpoint.config.head_dim, checkpoint.config.hidden_size);
        }
        // FNV-1a, over words.
        let hash = numbers.iter().fold(0xcbf2_9ce4_8422_2325u64, |hash, x| {
            (hash ^ u64::from(x.to_bits())).wrapping_mul(0x100_0000_01b3)
        });
        assert_eq!(hash, expected, "{name}");
    }
}

/// Digests of what gguf-py 0.19 (`gguf.quants.dequantize`) makes of the tensors of quant-mixed.gguf, in the file's row
/// order.
const GGUF_PY: [(&str, u64); 21] = [
    ("model.embed_tokens.weight", 0xd49217ad07817b65),
    ("model.layers.0.input_layernorm.weight", 0x8b7b7efcef2a0a2a),
    ("model.layers.0.self_attn.q_proj.weight", 0x1b0393e9782953ed),
    ("model.layers.0.self_attn.k_proj.weight", 0x9909ab4a56cb4c81),
    ("model.layers.0.self_attn.v_proj.weight", 0xd816cbf5495c42bb),
    ("model.layers.0.self_attn.o_proj.weight", 0x1d1803e36e61c925),
    ("model.layers.0.post_attention_layernorm.weight", 0xc9a3b8c3590bd649),
    ("model.layers.0.mlp.gate_proj.weight", 0xf25d93d86e470725),
    ("model.layers.0.mlp.up_proj.weight", 0xb60a1fcd0c690125),
    ("model.layers.0.mlp.down_proj.weight", 0x4ea6ae4572238075),
    ("model.layers.1.input_layernorm.weight", 0x24b95f264cad64a1),
    ("model.layers.1.self_attn.q_proj.weight", 0x80cd8baadcb57ba5),
    ("model.layers.1.self_attn.k_proj.weight", 0x84fdcd80451f0325),
    ("model.layers.1.self_attn.v_proj.weight", 0x00c822ce65952325),
    ("model.layers.1.self_attn.o_proj.weight", 0xe1c16c380e7ca4bd),
    ("model.layers.1.post_attention_layernorm.weight", 0x3a39d06f508cd481),
    ("model.layers.1.mlp.gate_proj.weight", 0xf1d6f43fa970a125),
    ("model.layers.1.mlp.up_proj.weight", 0xfcff61cbe1d75825),
    ("model.layers.1.mlp.down_proj.weight", 0xc3e86e5aebadffc5),
    ("model.norm.weight", 0xd869a753e71286bc),
    ("lm_head.weight", 0x55d06a03316a465f),
];

/// Rows of q or k as GGUF orders them: pairs `(i, i + head_dim / 2)` of a head side by side.
fn interleaved(rows: &[f32], head_dim: usize, row_elems: usize) -> Vec<f32> {
    let row = |at: usize| &rows[at * row_elems..][..row_elems];
    let heads = (0..rows.len() / row_elems).step_by(head_dim);
    let pairs =
        heads.flat_map(|head| (0..head_dim / 2).flat_map(move |i| [head + i, head + i + head_dim / 2]));
    pairs.flat_map(|at| row(at).to_vec()).collect()
}

#[test]
fn version_2_and_rows_in_halves() {
    let mut gguf = Gguf::small();
    gguf.version(2);
    let checkpoint = open_gguf(&gguf);
    assert_eq!(checkpoint.format, Format::Gguf(2));
    assert_eq!(checkpoint.config.rms_norm_eps, 1e-5);
    // The one head's rows 0, 1, 2, 3 lie in the file as 0, 2, 1, 3.
    let q = numbers(&checkpoint, "model.layers.0.self_attn.q_proj.weight");
    assert_eq!(q[..4], [0.0, 1.0, 2.0, 3.0]);
    assert_eq!(q[4..8], [8.0, 9.0, 10.0, 11.0]);
    assert_eq!(numbers(&checkpoint, "model.layers.0.self_attn.v_proj.weight")[4..8], [4.0, 5.0, 6.0, 7.0]);
    let mut row = [0.0; 4];
    checkpoint.read_rows("model.layers.0.self_attn.q_proj.weight", 1..2, &mut row).unwrap();
    assert_eq!(row, q[4..8]);
}

#[test]
fn biases_and_a_tied_head() {
    let mut gguf = Gguf::small();
    gguf.tensors.retain(|tensor| tensor.0 != "output.weight");
    for name in ["q", "k", "v", "output"] {
        gguf.tensor(&format!("blk.0.attn_{name}.bias"), &[4], &[0.0, 1.0, 2.0, 3.0]);
    }
    let checkpoint = open_gguf(&gguf);
    assert!(checkpoint.config.attention_bias && checkpoint.config.tied && !checkpoint.config.mlp_bias);
    assert_eq!(numbers(&checkpoint, "model.layers.0.self_attn.q_proj.bias"), [0.0, 2.0, 1.0, 3.0]);
    assert_eq!(numbers(&checkpoint, "model.layers.0.self_attn.v_proj.bias"), [0.0, 1.0, 2.0, 3.0]);
}

#[test]
fn rope_settings_of_gguf() {
    let kind = |change: &dyn Fn(&mut Gguf)| {
        let mut gguf = Gguf::small();
        change(&mut gguf);
        open_gguf(&gguf).config.rope
    };
    let linear = kind(&|g| {
        g.string("llama.rope.scaling.type", "linear").f32("llama.rope.scaling.factor", 4.0);
    });
    assert_eq!(linear.kind, RopeKind::Linear { factor: 4.0 });
    let yarn = kind(&|g| {
        g.string("llama.rope.scaling.type", "yarn")
            .f32("llama.rope.scaling.factor", 2.0)
            .u32("llama.rope.scaling.original_context_length", 32)
            .f32("llama.rope.scaling.attn_factor", 0.5);
    });
    assert_eq!(yarn.attention_factor(), 0.5 * (0.1 * 2f64.ln() + 1.0));
    assert!(matches!(yarn.kind, RopeKind::Yarn { original_context: 32, beta_fast: 32.0, .. }));

    // Two pairs of LLaMA 3.2: wavelengths 6.3 and 4443, which turns 1.84 times in 8192: between the two ends.
    let llama3 = RopeKind::Llama3 {
        factor: 32.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_context: 8192,
    };
    let factors = |theta: f64| {
        let (plain, stretched) =
            (Rope { theta, kind: RopeKind::Default }, Rope { theta, kind: llama3.clone() });
        let pairs = plain.inverse_frequencies(8).into_iter().zip(stretched.inverse_frequencies(8));
        pairs.map(|(plain, stretched)| (plain / stretched) as f32).collect::<Vec<f32>>()
    };
    let found = kind(&|g| {
        *g = with_heads_of_8();
        g.f32("llama.rope.freq_base", 500_000.0).tensor("rope_freqs.weight", &[4], &factors(500_000.0));
    });
    assert_eq!(found, Rope { theta: 500_000.0, kind: llama3.clone() });
}

/// The small model with one head of 8 and not of 4.
fn with_heads_of_8() -> Gguf {
    let mut gguf = Gguf::small();
    gguf.u32("llama.attention.key_length", 8).u32("llama.attention.value_length", 8);
    for name in ["q", "k", "v"] {
        gguf.tensor(&format!("blk.0.attn_{name}.weight"), &[4, 8], &[0.5; 32]);
    }
    gguf.tensor("blk.0.attn_output.weight", &[8, 4], &[0.5; 32]);
    gguf
}

#[test]
fn smollm2_opens() {
    let Some(file) = smollm2() else { return };
    let checkpoint = open(&file).unwrap();
    // The preset is the base model; the chat model begins and ends turns with other tokens.
    let mut config = checkpoint.config.clone();
    assert_eq!((config.bos, config.eos.as_slice()), (Some(1), &[2][..]));
    (config.bos, config.eos) = (Some(0), vec![0]);
    assert_eq!(config, preset("smollm2-135m").unwrap());
    let types: Vec<(&str, usize)> =
        checkpoint.stored_dtypes().iter().map(|(dtype, n)| (dtype.name(), *n)).collect();
    assert_eq!(types, [("q4_1", 210), ("f32", 61), ("q8_0", 1)]);

    let hello = Message { role: "user".into(), content: "Hi".into() };
    let text = render_chat(&checkpoint.chat_template.unwrap(), &[hello], "", "", true).unwrap();
    assert!(text.ends_with("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"), "{text}");
}

#[test]
fn tables_that_the_config_implies_are_read_past() {
    let Some(dir) = shared("models/variants/tied") else { return };
    let checkpoint = open(&dir).unwrap();
    let copy = tempfile::tempdir().unwrap();
    std::fs::copy(dir.join("config.json"), copy.path().join("config.json")).unwrap();
    let mut file = std::fs::read(dir.join("model.safetensors")).unwrap();
    let add = |file: &[u8], name: &str, shape: &str, data_bytes: usize| {
        let header_bytes = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        let (header, data) = (str::from_utf8(&file[8..8 + header_bytes]).unwrap(), &file[8 + header_bytes..]);
        let (begin, end) = (data.len(), data.len() + data_bytes);
        let entry =
            format!(r#","{name}":{{"dtype":"F32","shape":{shape},"data_offsets":[{begin},{end}]}}}}"#);
        let header = header.trim_end().strip_suffix('}').unwrap().to_owned() + &entry;
        [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data, &vec![0; data_bytes]].concat()
    };
    file = add(&file, "lm_head.weight", "[320,64]", 320 * 64 * 4);
    file = add(&file, "model.layers.0.self_attn.rotary_emb.inv_freq", "[8]", 32);
    std::fs::write(copy.path().join("model.safetensors"), &file).unwrap();
    let more = open(copy.path()).unwrap();
    assert_eq!(more.ignored_tensors, ["lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"]);
    assert_eq!(more.tensors().count(), checkpoint.tensors().count());
}

#[test]
fn rows_that_are_not_there() {
    let checkpoint = open_gguf(&Gguf::small());
    let mut out = [0.0; 8];
    let name = "lm_head.weight"; // 6 rows of 4
    assert!(checkpoint.read_rows(name, 4..6, &mut out).is_ok());
    let rows = checkpoint.read_rows(name, 5..7, &mut out);
    assert!(matches!(rows, Err(ReadError::Rows { expected: 6, .. })));
    let buffer = checkpoint.read_rows(name, 0..1, &mut out);
    assert!(matches!(buffer, Err(ReadError::Buffer { found: 8, expected: 4, .. })));
    let absent = checkpoint.read_rows("lm_head.bias", 0..1, &mut out);
    assert!(matches!(absent, Err(ReadError::MissingTensor { .. })));
}
