"""The headline by PyTorch, as one JSON object: causal attention by each back end, and products of 8192 cubed."""

import json

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

TURNS = 20


def seconds(run):
    """The median of events around single calls, after a warm-up."""
    for _ in range(3):
        run()
    times = []
    for _ in range(TURNS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return sorted(times)[TURNS // 2]


def attention(head_dim, backend):
    """FLOP/s of causal attention over 16k tokens, heads x head_dim = 2048; half of the products count."""
    tokens, heads = 16384, 2048 // head_dim
    q, k, v = (torch.randn(1, heads, tokens, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    with sdpa_kernel(backend):
        time = seconds(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    return 4 * tokens * tokens * 2048 / 2 / time


def product():
    """FLOP/s of torch.mm."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / seconds(lambda: torch.mm(a, b))


result = {"torch": torch.__version__, "device": torch.cuda.get_device_name(), "mm_8192": product()}
for head_dim in (64, 128):
    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
        try:
            result[f"attention_{head_dim}_{name}"] = attention(head_dim, backend)
        except RuntimeError as error:
            result[f"attention_{head_dim}_{name}"] = str(error).splitlines()[0]
print(json.dumps(result))
