#!/usr/bin/env python3
"""Writes a reference file for `llamac compare --reference`: what transformers computes with a model, in f64.

  write-reference.py MODEL -o FILE.safetensors --prompt "Once upon a time" --tokens 1,403,7
  llamac compare MODEL --level layer --reference FILE.safetensors

MODEL is a directory that transformers' AutoModelForCausalLM opens. The file has, for each prompt, logits at every position,
the hidden state behind each layer and a greedy continuation; with --modules also what every module reads and gives. The
format is described in llamac's src/reference.rs.

f64 is the truth: weights are the stored numbers, and everything after them is f64. `model.double()` alone is not that:
transformers computes norms, rotary angles and softmax in f32, whatever the weights are. So each f32 that its code asks for
is made f64, and a result of any other float type stops the script. The f32 run is transformers as it is; its errors
against f64 say how large an honest f32 error is.

needs: torch, transformers, safetensors (CPU versions are enough)
"""
import argparse
import json
import os
import platform
import re

import torch
import transformers
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode

FORMAT = "llamac-reference-1"


class Double(TorchFunctionMode):
    """Takes f64 wherever f32 is asked for; with `strict`, no result may be of a narrower float."""

    def __init__(self, strict):
        super().__init__()
        self.strict = strict

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def wide(x):
            return torch.float64 if x is torch.float32 else x

        if function is torch.Tensor.float:
            function = torch.Tensor.double
        out = function(*map(wide, args), **{key: wide(x) for key, x in (kwargs or {}).items()})
        if self.strict and torch.is_tensor(out) and out.is_floating_point() and out.dtype != torch.float64:
            raise SystemExit(f"{function} gives {out.dtype}: the run is not in f64")
        return out


def load(path, dtype):
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager")
    return model.eval()


def is_hidden(name):
    """Is it a module that gives the hidden state between layers?"""
    return name.endswith(("embed_tokens", "model.norm")) or re.search(r"\.layers\.\d+$", name) is not None


def run(model, tokens, seen=None, modules=False):
    """Logits [T, V]; `seen` takes what modules read and give, by NAME.input and NAME.output, [T, width] each."""
    def keep(name, x):
        # Ids, and tensors that are not of one row for each token, are no hidden states.
        if torch.is_tensor(x) and x.is_floating_point() and x.dim() == 3 and x.shape[:2] == (1, len(tokens)):
            seen[name] = x[0].detach().clone()

    def hook(name):
        def after(_, args, kwargs, out):
            if modules:
                keep(f"{name}.input", args[0] if args else kwargs.get("hidden_states"))
            keep(f"{name}.output", out[0] if isinstance(out, tuple) else out)
        return after

    handles = []
    if seen is not None:
        for name, module in model.named_modules():
            # The rotary embedding gives tables, not hidden states. The whole model has no name.
            if name and "rotary" not in name and (modules or is_hidden(name)):
                handles.append(module.register_forward_hook(hook(name), with_kwargs=True))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    return logits


def greedy(model, tokens, steps):
    """Best token, second best and margin of each step, the whole text anew each time. No token stops it."""
    tokens, picked = list(tokens), []
    for _ in range(steps):
        top = torch.topk(run(model, tokens)[-1], 2)
        picked.append((int(top.indices[0]), int(top.indices[1]), float(top.values[0] - top.values[1])))
        tokens.append(picked[-1][0])
    return picked


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory of the model")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="file to write (.safetensors)")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a prompt, by the model's tokenizer")
    parser.add_argument("--tokens", action="append", default=[], metavar="IDS", help="a prompt as token ids: 1,2,3")
    parser.add_argument("--steps", type=int, default=8, metavar="N", help="greedy steps after each prompt [8]")
    parser.add_argument("--modules", action="store_true", help="inputs and outputs of every module, too")
    parser.add_argument("--top", type=int, metavar="K", help="the K largest logits alone, for a large vocabulary")
    options = parser.parse_args()
    prompts = [[int(token) for token in ids.split(",")] for ids in options.tokens]
    if options.prompt:
        tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
        prompts += [tokenizer(text)["input_ids"] for text in options.prompt]
    if not prompts or not all(prompts):
        parser.error("give at least one prompt of at least one token, by --prompt or --tokens")
    # More threads would change the f32 errors from run to run.
    torch.set_num_threads(1)

    tensors, described, exact = {}, [], []
    with Double(strict=False):
        model = load(options.model, torch.float64)
    vocab = model.config.vocab_size
    bad = [token for tokens in prompts for token in tokens if not 0 <= token < vocab]
    if bad:
        parser.error(f"token {bad[0]}: the model has tokens 0 to {vocab - 1}")
    with Double(strict=True):
        for number, tokens in enumerate(prompts):
            seen = {}
            logits = run(model, tokens, seen, options.modules)
            exact.append(logits)
            steps = greedy(model, tokens, options.steps)
            tensors[f"p{number}.tokens"] = torch.tensor(tokens, dtype=torch.int32)
            if options.top is None:
                tensors[f"p{number}.logits_f64"] = logits
            else:
                top = torch.topk(logits, options.top, dim=-1)
                tensors[f"p{number}.top_tokens"] = top.indices.to(torch.int32)
                tensors[f"p{number}.top_logits"] = top.values
            columns = list(zip(*steps)) or [(), (), ()]
            tensors[f"p{number}.greedy"] = torch.tensor(columns[0], dtype=torch.int32)
            tensors[f"p{number}.greedy_second"] = torch.tensor(columns[1], dtype=torch.int32)
            tensors[f"p{number}.greedy_margin"] = torch.tensor(columns[2], dtype=torch.float64)
            tensors.update({f"p{number}.{name}": x for name, x in seen.items()})
    del model

    model = load(options.model, torch.float32)
    for number, tokens in enumerate(prompts):
        logits = exact[number]
        logits_f32 = run(model, tokens)
        described.append({
            "length": len(tokens),
            "f32_max_error": float((logits_f32.double() - logits).abs().max()),
        })
        print(f"prompt {number}: {len(tokens)} tokens, largest error of a logit in f32 {described[-1]['f32_max_error']:.2e}")

    about = {
        "format": FORMAT, "model": os.path.basename(os.path.normpath(options.model)), "steps": options.steps, "full_logits": options.top is None,
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__},
        "prompts": described,
    }
    save_file({name: x.contiguous() for name, x in tensors.items()}, options.output,
              metadata={"reference": json.dumps(about)})


if __name__ == "__main__":
    main()
