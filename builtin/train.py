"""Trains the built-in model on stories of `grammar.py` and writes it beside this file.

    python3 train.py                  the committed model
    python3 train.py --steps 20 --out try

Writes tokenizer.json, config.json, generation_config.json,
tokenizer_config.json and model.safetensors.  The model is a LLaMA as
transformers' LlamaForCausalLM has it (`reference.py` checks that the two
agree), written out here because a hundred lines are quicker to read, and
faster on a small machine, than a general one is to configure.
"""

import argparse
import json
import math
import pathlib
import random
import time

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn

import grammar

SEED = 1  # of the weights and the training stories
TOKENIZER_SEED = 2  # of the stories the vocabulary is counted on
HELD_OUT_SEED = 3  # of the stories the loss is measured on

STEPS = 3600
BATCH = 24  # stories
POOL = 8  # batches drawn at once and sorted by length, so that little is padding
PEAK_RATE, WARMUP = 4e-3, 100
WEIGHT_DECAY, CLIP = 0.1, 1.0

BOS, EOS = 0, 1
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.05,
    "intermediate_size": 352,
    "max_position_embeddings": 512,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 5,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 1280,
}

# ------------------------------------------------------------- the tokenizer


def train_tokenizer():
    """A byte-level BPE: all 256 bytes are in it, so every text has an encoding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    text = (story for _, story in zip(range(20000), grammar.stories(TOKENIZER_SEED)))
    tokenizer.train_from_iterator(text, trainer)
    assert tokenizer.get_vocab_size() == CONFIG["vocab_size"], tokenizer.get_vocab_size()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", BOS)]
    )
    return tokenizer


# ----------------------------------------------------------------- the model


def rope_tables(length, head_dim, theta):
    """Cosines and sines, each half of a head turning with the other half."""
    frequency = theta ** (-torch.arange(0, head_dim, 2) / head_dim)
    angle = torch.outer(torch.arange(length), frequency)
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Rotary position embedding of x: [batch, heads, length, head_dim]."""
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head_dim = c["head_dim"]
        queries = c["num_attention_heads"] * self.head_dim
        keys = c["num_key_value_heads"] * self.head_dim
        self.q_proj = nn.Linear(c["hidden_size"], queries, bias=False)
        self.k_proj = nn.Linear(c["hidden_size"], keys, bias=False)
        self.v_proj = nn.Linear(c["hidden_size"], keys, bias=False)
        self.o_proj = nn.Linear(queries, c["hidden_size"], bias=False)

    def forward(self, x, cos, sin):
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        # In full rather than by F.scaled_dot_product_attention: on a CPU, at
        # this size, the plain product is the faster of the two.
        scores = q @ k.transpose(2, 3) * self.head_dim**-0.5
        ahead = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        y = scores.masked_fill(ahead, -math.inf).softmax(-1) @ v
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c["hidden_size"], c["intermediate_size"], bias=False)
        self.up_proj = nn.Linear(c["hidden_size"], c["intermediate_size"], bias=False)
        self.down_proj = nn.Linear(c["intermediate_size"], c["hidden_size"], bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.mlp = MLP(c)

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """The decoder with its tied head; attribute names are those of the checkpoint."""

    def __init__(self, c):
        super().__init__()
        self.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.layers = nn.ModuleList(Layer(c) for _ in range(c["num_hidden_layers"]))
        self.norm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        tables = rope_tables(c["max_position_embeddings"], c["head_dim"], c["rope_theta"])
        self.register_buffer("cos", tables[0], persistent=False)
        self.register_buffer("sin", tables[1], persistent=False)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=c["initializer_range"])

    def forward(self, ids):
        """Logits [batch, length, vocab] of ids [batch, length]."""
        x = self.embed_tokens(ids)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x) @ self.embed_tokens.weight.T


# -------------------------------------------------------------- the training


def batches(tokenizer, seed):
    """Batches of stories without end, as (inputs, targets) with targets -100 at padding."""
    source, rng = grammar.stories(seed), random.Random(seed)
    while True:
        texts = [next(source) for _ in range(BATCH * POOL)]
        pool = [e.ids + [EOS] for e in tokenizer.encode_batch_fast(texts)]
        pool.sort(key=len)
        for start in sorted(range(0, len(pool), BATCH), key=lambda _: rng.random()):
            rows = pool[start : start + BATCH]
            length = max(map(len, rows))
            ids = torch.tensor([row + [EOS] * (length - len(row)) for row in rows])
            real = torch.arange(length) < torch.tensor([[len(row)] for row in rows])
            yield ids[:, :-1], ids[:, 1:].masked_fill(~real[:, 1:], -100)


def loss_of(model, inputs, targets):
    return F.cross_entropy(model(inputs).flatten(0, 1).float(), targets.flatten(), ignore_index=-100)


def rate(step, steps):
    """Linear warm-up, then a cosine down to zero."""
    if step < WARMUP:
        return PEAK_RATE * (step + 1) / WARMUP
    return PEAK_RATE * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (steps - WARMUP)))


def train(tokenizer, steps):
    torch.manual_seed(SEED)
    model = Llama(CONFIG)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    norms = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    print(f"{sum(p.numel() for p in model.parameters())} parameters", flush=True)
    start, tokens, recent = time.time(), 0, []
    for step, (inputs, targets) in zip(range(steps), batches(tokenizer, SEED)):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, inputs, targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        tokens += inputs.numel()
        recent.append(loss.item())
        if (step + 1) % 100 == 0 or step + 1 == steps:
            mean, recent = sum(recent) / len(recent), []
            print(f"step {step + 1}  loss {mean:.4f}  {tokens} tokens  {time.time() - start:.0f} s", flush=True)
    return model


@torch.no_grad()
def held_out_loss(model, tokenizer, count=20):
    """Mean loss per token over `count` batches that training has not drawn."""
    losses = [loss_of(model, *batch).item() for _, batch in zip(range(count), batches(tokenizer, HELD_OUT_SEED))]
    return sum(losses) / len(losses)


# ----------------------------------------------------------------- the files


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description="Train the built-in model.")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)

    tokenizer = train_tokenizer()
    tokenizer.save(str(args.out / "tokenizer.json"))
    write_json(args.out / "config.json", CONFIG)
    write_json(args.out / "generation_config.json", {"bos_token_id": BOS, "eos_token_id": EOS})
    write_json(
        args.out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "clean_up_tokenization_spaces": False,
            "model_max_length": CONFIG["max_position_embeddings"],
        },
    )

    model = train(tokenizer, args.steps)
    print(f"held-out loss {held_out_loss(model, tokenizer):.4f} in f32")
    weights = {f"model.{name}": p.detach().bfloat16() for name, p in model.named_parameters()}
    save_file(weights, args.out / "model.safetensors", metadata={"format": "pt"})
    for name, p in model.named_parameters():
        p.data.copy_(weights[f"model.{name}"])
    print(f"held-out loss {held_out_loss(model, tokenizer):.4f} as stored in bf16")


if __name__ == "__main__":
    main()
