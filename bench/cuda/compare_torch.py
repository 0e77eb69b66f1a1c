# SPDX-License-Identifier: MIT
"""What PyTorch's own kernels take for the benches' shapes, on the same machine.

    python3 compare_torch.py out.json

Decode: scaled_dot_product_attention through cuDNN (enable_gqa), all heads dense, f16, graph replays
over rotating buffers of 512 MiB or more, as in decode_bench. Prefill: FlexAttention with a block mask
for the streaming half of the heads (64+256), bf16, in a graph and as separate calls, and cuDNN for the
dense half. Chunks: cuDNN after many stored tokens, without a mask. Names of tables after out.json
(decode, prefill, chunk) run only those.
"""
import json
import statistics
import sys

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention


def microseconds(call, guess_us):
    """Median of nine replays of a graph of enough calls for 2 ms, a call."""
    calls = max(4, min(400, int(2000 / guess_us)))
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for i in range(3):
            call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i)
    times = []
    for i in range(11):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        if i >= 2:
            times.append(start.elapsed_time(stop) * 1000 / calls)
    return statistics.median(times)


def microseconds_of_calls(call, guess_us):
    """Median of nine runs of enough calls for 2 ms without a graph, a call."""
    calls = max(4, min(400, int(2000 / guess_us)))
    times = []
    for run in range(11):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for i in range(calls):
            call(i)
        stop.record()
        stop.synchronize()
        if run >= 2:
            times.append(start.elapsed_time(stop) * 1000 / calls)
    return statistics.median(times)


def decode_cudnn(batch, length, num_qo_heads, num_kv_heads):
    row = batch * num_kv_heads * length * 128
    sets = max(2, -(-(512 << 20) // (row * 4)))
    q = torch.randn(batch, num_qo_heads, 1, 128, device="cuda", dtype=torch.float16)
    k, v = (torch.empty(sets, batch, num_kv_heads, length, 128, device="cuda", dtype=torch.float16)
            .normal_() for _ in range(2))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return microseconds(
            lambda i: F.scaled_dot_product_attention(q, k[i % sets], v[i % sets], enable_gqa=True),
            4 + row * 4 / 4.4e6)


def prefill_flex(n, timed):
    def sees(b, h, i, j):
        return (j <= i) & ((j < 64) | (i - j < 256))

    mask = create_block_mask(sees, None, None, n, n, device="cuda")
    q = torch.randn(1, 16, n, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, 4, n, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    attend = torch.compile(flex_attention, dynamic=False)
    attend(q, k, v, block_mask=mask, enable_gqa=True)
    return timed(lambda i: attend(q, k, v, block_mask=mask, enable_gqa=True), 500)


def prefill_cudnn(n):
    q = torch.randn(1, 16, n, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, 4, n, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return microseconds(
            lambda i: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), 5000)


def chunk_cudnn(past, n, num_qo_heads, num_kv_heads):
    q = torch.randn(1, num_qo_heads, n, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, num_kv_heads, past + n, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return microseconds(lambda i: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), 5000)


def main():
    rows = []

    def row(name, us):
        rows.append({"name": name, "us": round(us, 2)})
        print(f"{name:50s} {us:9.2f} us", flush=True)

    tables = sys.argv[2:] or ["decode", "prefill", "chunk"]
    for kv_heads, shapes in {
        8: [(1, 4096), (1, 16384), (1, 65536), (1, 131072), (1, 524288), (16, 4096), (16, 16384),
            (64, 4096), (64, 16384)],
        32: [(1, 4096), (1, 16384), (1, 65536), (1, 131072), (16, 4096), (16, 16384)],
    }.items() if "decode" in tables else []:
        for batch, length in shapes:
            row(f"cudnn/decode/32_{kv_heads}/f16/b{batch}/kv={length}/dense",
                decode_cudnn(batch, length, 32, kv_heads))
    for n in (8192, 32768, 65536) if "prefill" in tables else []:
        name = f"prefill/32_8/bf16/n={n}"
        row(f"flex/{name}/streaming_half_64+256", prefill_flex(n, microseconds))
        row(f"flex/{name}/streaming_half_64+256/no_graph", prefill_flex(n, microseconds_of_calls))
        row(f"cudnn/{name}/dense_half", prefill_cudnn(n))
    for n in (512, 8192) if "chunk" in tables else []:
        name = f"prefill/32_8/bf16/n={n}/past=131072"
        row(f"cudnn/{name}/dense", chunk_cudnn(131072, n, 32, 8))
        row(f"cudnn/{name}/dense_half", chunk_cudnn(131072, n, 16, 4))
    with open(sys.argv[1], "w") as file:
        json.dump({"torch": torch.__version__, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
