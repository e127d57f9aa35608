"""Train a Llama split over two processes in a loop of your own, with Lightning Fabric instead of a Trainer.

    python examples/06_fabric.py
    fabric run --devices=2 --accelerator=cpu examples/06_fabric.py      # needs the extra `fabric`: pip install -e ".[fabric]"

    Loss 1.407 after 100 steps; guessing is 6.238
    Saved, loaded into a new model: loss 1.177 and 1.177

The model and its optimizer are those of one process; `fabric.setup` splits the one, and the other goes on with the shards.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # on the CPU, one thread a rank; torch reads it when it is imported

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
    parser.add_argument("--tp", type=int, default=2, help="ranks that share one model (2)")
    parser.add_argument("--dp", type=int, default=1, help="groups of such ranks (1)")
    parser.add_argument("--max-steps", type=int, default=100)
    parser.add_argument("--fast", action="store_true", help="8 steps, to see that it runs")
    args = parser.parse_args()
    steps = 8 if args.fast else args.max_steps

    by_cli = os.environ.get("LT_CLI_USED") == "1"  # `fabric run` says which devices, and has started the ranks
    devices = args.tp * args.dp
    where = {} if by_cli else {"accelerator": "cuda" if torch.cuda.device_count() >= devices else "cpu", "devices": devices}
    example = torch.zeros(2, 64, dtype=torch.long)  # (B, T): what `forward` is called with, to find the plan
    fabric = Fabric(strategy=ltp.FabricTPStrategy(tp=args.tp, inputs=(example,)), **where)
    if not by_cli:
        fabric.launch()
    fabric.seed_everything(1)

    model = Llama(CONFIG)
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=3e-3))
    items = ltp.RandomTokens(num_items=32, seq_len=64, vocab_size=CONFIG.vocab_size)
    data = fabric.setup_dataloaders(DataLoader(items, batch_size=8 // args.dp, shuffle=True))  # dealt out over the groups

    step = 0
    while step < steps:
        for batch in data:
            loss = loss_of(model, batch)
            fabric.backward(loss)
            fabric.clip_gradients(model, optimizer, max_norm=1.0)  # the norm of the whole model's gradients
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % 20 == 0:
                fabric.print(f"step {step}: loss {fabric.all_reduce(loss.detach().clone()):.3f}")
            if step == steps:
                break
    fabric.print(
        f"Loss {fabric.all_reduce(loss.detach().clone()):.3f} after {step} steps; guessing is {math.log(CONFIG.vocab_size):.3f}"
    )

    path = Path(fabric.broadcast(tempfile.mkdtemp())) / "checkpoint"  # a folder, each rank writes what it holds
    fabric.save(path, {"model": model, "optimizer": optimizer, "step": step})
    other = fabric.setup(Llama(CONFIG))
    fabric.load(path, {"model": other})
    with torch.no_grad():
        losses = [float(fabric.all_reduce(loss_of(m, batch))) for m in (model, other)]
    fabric.print(f"Saved, loaded into a new model: loss {losses[0]:.3f} and {losses[1]:.3f}")
    if fabric.is_global_zero:
        shutil.rmtree(path.parent)


if __name__ == "__main__":
    main()
