"""Judges the built-in model and writes expected.json, both by way of transformers.

    python3 reference.py              the model beside this file

Checks that train.py's model and transformers' LlamaForCausalLM give the same
logits, writes what other implementations are to reproduce, and has the reader
of `grammar.py` judge what the model writes.
"""

import argparse
import pathlib

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import grammar
from train import CONFIG, HELD_OUT_SEED, Llama, write_json

PROMPTS = [
    "Once upon a time",
    "Once upon a time there was a brave little fox named Pip.",
    "One day I met a shy rabbit named Mia. She had a red kite that her aunt had given her.",
]
CONTINUATION = 64
SAMPLES, TEMPERATURE, SAMPLE_SEED = 200, 0.8, 1
OPENINGS = 100  # held-out stories whose first sentence is continued greedily


def check_logits(folder, theirs, tokenizer):
    """The largest difference between the logits of our model and of transformers'."""
    ours = Llama(CONFIG)
    weights = load_file(folder / "model.safetensors")
    ours.load_state_dict({name.removeprefix("model."): w.float() for name, w in weights.items()})
    worst = 0.0
    for _, story in zip(range(20), grammar.stories(HELD_OUT_SEED)):
        ids = tokenizer(story, return_tensors="pt").input_ids
        worst = max(worst, (ours(ids) - theirs(ids).logits).abs().max().item())
    assert worst < 1e-3, worst
    return worst


def expected(model, tokenizer, prompt):
    """The greedy continuation of `prompt`, and by how much each choice was made."""
    ids = tokenizer(prompt).input_ids
    chosen, margins = [], []
    for _ in range(CONTINUATION):
        logits = model(torch.tensor([ids + chosen])).logits[0, -1]
        best = logits.topk(8)
        if not chosen:
            top = [{"id": i, "logit": round(x, 5)} for i, x in zip(best.indices.tolist(), best.values.tolist())]
        chosen.append(best.indices[0].item())
        margins.append(round((best.values[0] - best.values[1]).item(), 5))
    return {
        "prompt": prompt,
        "ids": ids,
        "top8_after_prompt": top,
        "greedy_ids": chosen,
        "greedy_margins": margins,
        "greedy_text": tokenizer.decode(chosen),
    }


def generate(model, tokenizer, prompts, **how):
    """The stories that `prompts`, of one length in tokens, lead to."""
    ids = torch.tensor(prompts)
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=CONFIG["max_position_embeddings"] - ids.shape[1],
        pad_token_id=CONFIG["eos_token_id"],
        **how,
    )
    return tokenizer.batch_decode(out, skip_special_tokens=True)


def judge(name, stories):
    """Prints how many stories, and how many of their sentences, the reader accepts."""
    sentences = [sentence for story in stories for sentence in grammar.split_sentences(story)]
    good = sum(map(grammar.accepts, sentences))
    verdicts = [grammar.accepts_story(story) for story in stories]
    whole = sum(accepted for accepted, _ in verdicts)
    print(f"{name}: {whole} of {len(stories)} stories accepted, {good} of {len(sentences)} sentences")
    for story, (accepted, reason) in zip(stories, verdicts):
        if not accepted:
            print(f"    refused ({reason})")


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description="Judge the built-in model and write expected.json.")
    parser.add_argument("--model", type=pathlib.Path, default=pathlib.Path(__file__).parent)
    parser.add_argument("--show", type=int, default=3, help="how many sampled stories to print")
    args = parser.parse_args()
    torch.set_num_threads(2)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    print(f"{model.num_parameters()} parameters; logits agree to {check_logits(args.model, model, tokenizer):.1e}")

    cases = [expected(model, tokenizer, prompt) for prompt in PROMPTS]
    write_json(args.model / "expected.json", {"weights": "bfloat16", "arithmetic": "float32", "cases": cases})
    for case in cases:
        print(f"smallest margin {min(case['greedy_margins']):.4f}: {case['prompt']}")

    torch.manual_seed(SAMPLE_SEED)
    begin = [[CONFIG["bos_token_id"]]] * SAMPLES
    sampled = generate(model, tokenizer, begin, do_sample=True, temperature=TEMPERATURE, top_k=0, top_p=1.0)
    judge(f"sampled at temperature {TEMPERATURE}, seed {SAMPLE_SEED}", sampled)

    told = (grammar.split_sentences(s)[0] for s in grammar.stories(HELD_OUT_SEED))
    openings = [tokenizer(sentence).input_ids for _, sentence in zip(range(OPENINGS), told)]
    greedy = [generate(model, tokenizer, [ids], do_sample=False)[0] for ids in openings]
    judge("greedy from held-out openings", greedy)

    print("", *sampled[: args.show], sep="\n\n")


if __name__ == "__main__":
    main()
