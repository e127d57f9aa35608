"""Train a Llama sharded across two processes in your own training loop, with Lightning Fabric instead of a Trainer.

    python examples/06_fabric.py
    fabric run --devices=2 --accelerator=cpu examples/06_fabric.py      # needs the extra `fabric`: pip install -e ".[fabric]"

    Loss 1.407 after 100 steps (uniform prediction: 6.238)
    Saved, and loaded into a new model: loss 1.177 and 1.177

Model and optimizer are written as for a single process; `fabric.setup` shards the model, and the optimizer updates the shards.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # on the CPU, one thread per rank; torch reads it on import

import argparse
import math
import shutil
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from llama import Llama, LlamaConfig
from torch.utils.data import DataLoader

import lightning_tp as ltp

CONFIG = LlamaConfig(vocab_size=512, dim=128, num_layers=4, num_heads=8, num_kv_heads=4, hidden_dim=344)


def loss_of(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(batch["tokens"]).flatten(0, 1), batch["targets"].flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a Llama with Fabric.")
    parser.add_argument("--tp", type=int, default=2, help="tensor-parallel size (default: 2)")
    parser.add_argument("--dp", type=int, default=1, help="data-parallel size (default: 1)")
    parser.add_argument("--max-steps", type=int, default=100)
    parser.add_argument("--fast", action="store_true", help="run 8 steps only, as a smoke test")
    args = parser.parse_args()
    steps = 8 if args.fast else args.max_steps

    by_cli = os.environ.get("LT_CLI_USED") == "1"  # `fabric run` chooses the devices, and has started the ranks
    devices = args.tp * args.dp
    where = {} if by_cli else {"accelerator": "cuda" if torch.cuda.device_count() >= devices else "cpu", "devices": devices}
    example = torch.zeros(2, 64, dtype=torch.long)  # (B, T): what `forward` is called with, to infer the plan
    fabric = Fabric(strategy=ltp.FabricTPStrategy(tp=args.tp, inputs=(example,)), **where)
    if not by_cli:
        fabric.launch()
    fabric.seed_everything(1)

    model = Llama(CONFIG)
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=3e-3))
    items = ltp.RandomTokens(num_items=32, seq_len=64, vocab_size=CONFIG.vocab_size)
    data = fabric.setup_dataloaders(DataLoader(items, batch_size=8 // args.dp, shuffle=True))  # sharded over dp

    step = 0
    while step < steps:
        for batch in data:
            loss = loss_of(model, batch)
            fabric.backward(loss)
            fabric.clip_gradients(model, optimizer, max_norm=1.0)  # the norm of the gradients of the full model
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % 20 == 0:
                fabric.print(f"step {step}: loss {fabric.all_reduce(loss.detach().clone()):.3f}")
            if step == steps:
                break
    fabric.print(
        f"Loss {fabric.all_reduce(loss.detach().clone()):.3f} after {step} steps (uniform prediction: {math.log(CONFIG.vocab_size):.3f})"
    )

    path = Path(fabric.broadcast(tempfile.mkdtemp())) / "checkpoint"  # a folder, to which each rank writes its shards
    fabric.save(path, {"model": model, "optimizer": optimizer, "step": step})
    other = fabric.setup(Llama(CONFIG))
    fabric.load(path, {"model": other})
    with torch.no_grad():
        losses = [float(fabric.all_reduce(loss_of(m, batch))) for m in (model, other)]
    fabric.print(f"Saved, and loaded into a new model: loss {losses[0]:.3f} and {losses[1]:.3f}")
    if fabric.is_global_zero:
        shutil.rmtree(path.parent)


if __name__ == "__main__":
    main()
