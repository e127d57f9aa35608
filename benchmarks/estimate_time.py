"""How long an estimate takes, and how much memory, on one thread.

    OMP_NUM_THREADS=1 python benchmarks/estimate_time.py

Llama 2 70B on 2,048 and Llama 3.1 405B on 16,384 devices, all blocks, from nothing: the plan is inferred and the step traced.
Each in a process of its own, whose largest resident size is printed; the time is without importing torch and transformers.
"""

from __future__ import annotations

import multiprocessing
import resource
import time
import warnings

import torch

SIZES = {  # width, inner, blocks, heads, key/value heads, vocabulary, tokens, (dp, tp)
    "Llama 2 7B on 64": (4096, 11008, 32, 32, 32, 32000, 4096, (32, 2)),
    "Llama 2 70B on 2,048": (8192, 28672, 80, 64, 8, 32000, 4096, (256, 8)),
    "Llama 2 70B on 32": (8192, 28672, 80, 64, 8, 32000, 4096, (4, 8)),
    "Llama 2 70B, 8 blocks": (8192, 28672, 8, 64, 8, 32000, 4096, (256, 8)),
    "Llama 3.1 405B on 16,384": (16384, 53248, 126, 128, 8, 128256, 8192, (2048, 8)),
}


def one(name: str) -> None:
    import transformers as hf

    from lightning_tp import estimate

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    width, inner, blocks, heads, kv, vocab, tokens, mesh = SIZES[name]
    config = hf.LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=blocks, num_attention_heads=heads, num_key_value_heads=kv,
        vocab_size=vocab, max_position_embeddings=tokens,
    )  # fmt: skip
    ids = torch.zeros(1, 32, dtype=torch.long)
    build = hf.LlamaForCausalLM  # imported late by transformers: not what is measured
    start, busy = time.perf_counter(), time.process_time()
    with torch.device("meta"):
        model = build(config)
    found = estimate(
        model, {"input_ids": ids, "labels": ids, "use_cache": False}, mesh, seq=tokens, activation_checkpointing="block"
    )
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{name:26} {seconds:6.1f} s ({busy:.1f} s of the CPU), {peak:.2f} GiB at most", flush=True)
    print(f"{'':26} {found.headline.splitlines()[1]}")


def main() -> None:
    for name in SIZES:
        process = multiprocessing.get_context("spawn").Process(target=one, args=(name,))
        process.start()
        process.join()


if __name__ == "__main__":
    main()
