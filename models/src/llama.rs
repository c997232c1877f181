//! The one builder of the family: a step of a LLaMA-style decoder as a graph, by its config.
//!
//! A layer is `x + o(attention(rope(q(norm x)), rope(k(norm x)), v(norm x)))`, then `x + down(silu(gate(norm x)) * up(norm
//! x))`; RMSNorm before each half and before the head (Touvron et al. 2023, section 2.2). What differs between members of
//! the family is in [`Config`]; nothing else in llamac knows a model.

use crate::config::Config;
use ir::dim::Dim;
use ir::dtype::DType;
use ir::graph::{Builder, Graph, ValueId};
use ir::op::Binary;
use ir::plan::Give;

/// One entry point: how many tokens a step may have and what it gives back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Name of the graph and of the entry point.
    pub name: &'static str,
    /// Fewest and most tokens.
    pub tokens: (usize, usize),
    /// What it gives back.
    pub give: Give,
}

/// Slots of the cache for a context: whole tiles of keys.
pub fn cache_slots(context: usize) -> usize {
    context.next_multiple_of(ir::families::attention::KEYS)
}

/// The graph of one step.
///
/// * Inputs `tokens`, `positions`: i32 `[T]`; states `k.N`, `v.N`: `[kv_heads, C, head_dim]` for each layer.
/// * Outputs: `logits` f32 `[1, vocab]` (or `[T, vocab]`), `token` i32 `[1]`, and each state's next contents.
/// * Weights and every stored value are `dtype`; norms, softmax, rotation and accumulation are f32 inside.
pub fn graph(config: &Config, dtype: DType, context: usize, step: &Step) -> Graph {
    let mut b = Builder::new(step.name);
    let t = b.symbol("T", step.tokens.0 as i64, step.tokens.1 as i64);
    let t = if step.tokens.0 == step.tokens.1 { Dim::from(step.tokens.0) } else { t };
    b.symbol("P", 0, context as i64 - 1);
    let (hidden, heads, kv_heads, d) =
        (config.hidden_size, config.n_heads, config.n_kv_heads, config.head_dim);
    let slots = Dim::from(cache_slots(context));

    let tokens = b.input("tokens", DType::I32, &[t]);
    let pos = b.input("positions", DType::I32, &[t]);
    let table =
        b.weight("embed", "model.embed_tokens.weight", dtype, &[config.vocab_size.into(), hidden.into()]);
    let frequencies = config.rope.inverse_frequencies(d);
    let (cos, sin) = b.rope_tables(pos, &frequencies, config.rope.attention_factor());
    let mut x = b.gather("x", table, tokens);

    for layer in 0..config.n_layers {
        b.prefix(&format!("l{layer}."));
        let mut l = Layer { b: &mut b, dtype, path: format!("model.layers.{layer}") };
        let normed = l.norm("n", x, "input_layernorm", hidden, config.rms_norm_eps);
        let width = |n: usize| n * d;
        let bias = config.attention_bias;
        let q = l.linear("q", normed, "self_attn.q_proj", width(heads), hidden, bias);
        let k = l.linear("k", normed, "self_attn.k_proj", width(kv_heads), hidden, bias);
        let v = l.linear("v", normed, "self_attn.v_proj", width(kv_heads), hidden, bias);
        let [q, k, v] = [(q, "qh", heads), (k, "kh", kv_heads), (v, "vh", kv_heads)]
            .map(|(x, name, n)| l.b.reshape(name, x, &[t, n.into(), d.into()]));
        let q = l.b.rope("qr", q, cos, sin);
        let k = l.b.rope("kr", k, cos, sin);
        let shape = [Dim::from(kv_heads), slots, d.into()];
        l.b.prefix("");
        let (k_name, v_name) = (format!("k.{layer}"), format!("v.{layer}"));
        let k_cache = l.b.state(&k_name, dtype, &shape);
        let v_cache = l.b.state(&v_name, dtype, &shape);
        l.b.prefix(&format!("l{layer}."));
        let k_cache = l.b.cache_append("kc", k_cache, k, pos);
        let v_cache = l.b.cache_append("vc", v_cache, v, pos);
        l.b.output(&k_name, k_cache);
        l.b.output(&v_name, v_cache);
        let scale = 1.0 / (d as f64).sqrt();
        let attended = l.b.attention("a", q, k_cache, v_cache, pos, true, scale);
        let attended = l.b.reshape("af", attended, &[t, width(heads).into()]);
        let o = l.linear("o", attended, "self_attn.o_proj", hidden, width(heads), bias);
        let middle = l.b.binary("x1", Binary::Add, x, o);

        let normed = l.norm("m", middle, "post_attention_layernorm", hidden, config.rms_norm_eps);
        let (inner, bias) = (config.intermediate_size, config.mlp_bias);
        let gate = l.linear("gate", normed, "mlp.gate_proj", inner, hidden, bias);
        let up = l.linear("up", normed, "mlp.up_proj", inner, hidden, bias);
        let gate = l.b.cast("gate.f", gate, DType::F32);
        let gate = l.b.silu("silu", gate);
        let gate = l.b.cast("gate.s", gate, dtype);
        let h = l.b.binary("h", Binary::Mul, gate, up);
        let down = l.linear("down", h, "mlp.down_proj", hidden, inner, bias);
        x = l.b.binary("x2", Binary::Add, middle, down);
    }
    b.prefix("");

    let rows = match step.give {
        Give::All => x,
        Give::Last => b.slice("last", x, 0, t - Dim::of(1), Dim::of(1)),
        Give::Nothing => return b.finish(),
    };
    let mut l = Layer { b: &mut b, dtype, path: "model".to_string() };
    let normed = l.norm("norm", rows, "norm", hidden, config.rms_norm_eps);
    let head = match config.tied {
        true => table,
        false => b.weight("head", "lm_head.weight", dtype, &[config.vocab_size.into(), hidden.into()]),
    };
    let logits = b.dot("logits", "tk,nk->tn", normed, head, DType::F32);
    b.output("logits", logits);
    if step.give == Give::Last {
        let token = b.argmax("token", logits);
        b.output("token", token);
    }
    b.finish()
}

/// A module of the checkpoint, as transformers divides the model: what it reads and gives, by the names of values in
/// [`graph`]'s text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// Such as `model.layers.3.mlp.down_proj`.
    pub name: String,
    /// Value that it reads; `tokens` for the embedding.
    pub input: String,
    /// Value that it gives.
    pub output: String,
}

/// Every module of a model in the order in which they end: parts before the whole.
pub fn modules(config: &Config, dtype: DType) -> Vec<Module> {
    let module = |name: &str, input: &str, output: &str| Module {
        name: name.to_string(),
        input: input.to_string(),
        output: output.to_string(),
    };
    let mut modules = vec![module("model.embed_tokens", "tokens", "x")];
    let mut hidden = "x".to_string();
    // Norms are f32 inside; only another dtype takes a cast, which bears their name.
    let norm = |name: &str| match dtype {
        DType::F32 => format!("{name}.y"),
        _ => name.to_string(),
    };
    for layer in 0..config.n_layers {
        let biased = |value: &'static str, bias: bool| match bias {
            true => format!("{value}.biased"),
            false => value.to_string(),
        };
        let (n, m) = (norm("n"), norm("m"));
        let (n, m) = (n.as_str(), m.as_str());
        let (of_attention, of_mlp) = (config.attention_bias, config.mlp_bias);
        let (o, down) = (biased("o", of_attention), biased("down", of_mlp));
        let parts = [
            ("input_layernorm", None, n.to_string()),
            ("self_attn.q_proj", Some(n), biased("q", of_attention)),
            ("self_attn.k_proj", Some(n), biased("k", of_attention)),
            ("self_attn.v_proj", Some(n), biased("v", of_attention)),
            ("self_attn.o_proj", Some("af"), o.clone()),
            ("self_attn", Some(n), o),
            ("post_attention_layernorm", Some("x1"), m.to_string()),
            ("mlp.gate_proj", Some(m), biased("gate", of_mlp)),
            ("mlp.up_proj", Some(m), biased("up", of_mlp)),
            ("mlp.down_proj", Some("h"), down.clone()),
            ("mlp", Some(m), down),
        ];
        let at = |value: &str| format!("l{layer}.{value}");
        for (name, input, output) in parts {
            let input = input.map_or(hidden.clone(), at);
            modules.push(module(&format!("model.layers.{layer}.{name}"), &input, &at(&output)));
        }
        let after = at("x2");
        modules.push(module(&format!("model.layers.{layer}"), &hidden, &after));
        hidden = after;
    }
    modules.push(module("model.norm", &hidden, &norm("norm")));
    modules.push(module("lm_head", &norm("norm"), "logits"));
    modules
}

/// Names and dtype of a layer's weights.
struct Layer<'b> {
    b: &'b mut Builder,
    dtype: DType,
    /// What the weights' names begin with.
    path: String,
}

impl Layer<'_> {
    fn norm(&mut self, name: &str, x: ValueId, weight: &str, n: usize, eps: f64) -> ValueId {
        let path = format!("{}.{weight}.weight", self.path);
        let weight = self.b.weight(&format!("{name}.weight"), &path, self.dtype, &[n.into()]);
        self.b.rms_norm(name, x, weight, eps)
    }

    fn linear(&mut self, name: &str, x: ValueId, weight: &str, n: usize, k: usize, bias: bool) -> ValueId {
        let path = format!("{}.{weight}", self.path);
        let w =
            self.b.weight(&format!("w{name}"), &format!("{path}.weight"), self.dtype, &[n.into(), k.into()]);
        let y = self.b.dot(name, "tk,nk->tn", x, w, self.dtype);
        if !bias {
            return y;
        }
        let bias = self.b.weight(&format!("b{name}"), &format!("{path}.bias"), self.dtype, &[n.into()]);
        let shape = self.b.shape(y);
        let bias = self.b.broadcast(&format!("b{name}.b"), bias, &[1], &shape);
        self.b.binary(&format!("{name}.biased"), Binary::Add, y, bias)
    }
}
