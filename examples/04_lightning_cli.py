"""Train a Llama with Lightning's own command line; needs the extra `cli` (`pip install -e ".[cli]"`).

    python examples/04_lightning_cli.py fit --trainer.devices=2 --trainer.strategy=tp
    python examples/04_lightning_cli.py fit --trainer.devices=4 --trainer.strategy=TPStrategy --trainer.strategy.tp=2
    python examples/04_lightning_cli.py fit --config config.yaml --model.config.dim=256
    python examples/04_lightning_cli.py fit --trainer.strategy.help=TPStrategy

`strategy=tp` is `TPStrategy` with its defaults: the model is sharded across all devices. The same works for `validate`, `test` and `predict`,
which take a `--ckpt_path`. With options, in a file such as this config.yaml:

    trainer:
      devices: 2
      max_steps: 100
      strategy:
        class_path: lightning_tp.TPStrategy
        init_args:
          tp: 2
          activation_checkpointing: block
    model:
      config: {dim: 128, num_layers: 4}
      lr: 0.001
    data:
      batch_size: 16
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # on the CPU, one thread per rank; torch reads it on import

import sys

import lightning as L
import torch
from lightning.pytorch.cli import LightningCLI
from llama import PLAN, LlamaModule
from torch.utils.data import DataLoader

import lightning_tp as ltp  # also registers strategy="tp"


class SplitLlama(ltp.TensorParallel, LlamaModule):
    """The Llama of examples/llama.py with its plan, so that the command line need not name one."""

    plan = PLAN

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.loss(batch), sync_dist=True)

    def predict_step(self, batch, batch_idx):
        return self.model(batch["tokens"]).argmax(-1)  # (B, T), the most likely next tokens


class RandomTokensData(L.LightningDataModule):
    def __init__(self, vocab_size: int = 512, seq_len: int = 64, num_items: int = 1024, batch_size: int = 8) -> None:
        super().__init__()
        self.items = ltp.RandomTokens(num_items, seq_len, vocab_size)
        self.held_out = ltp.RandomTokens(16, seq_len, vocab_size, seed=1)
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.items, batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.held_out, batch_size=self.batch_size)

    test_dataloader = predict_dataloader = val_dataloader


class CLI(LightningCLI):
    def add_arguments_to_parser(self, parser) -> None:
        parser.link_arguments("data.vocab_size", "model.config.vocab_size")


def main(args: list[str] | None = None) -> CLI:
    if sys.argv[1:] == ["--fast"]:  # run 8 steps only, as a smoke test
        sys.argv[1:] = ["fit", "--trainer.devices=2", "--trainer.strategy=tp", "--trainer.max_steps=8"]
    return CLI(
        SplitLlama,
        RandomTokensData,
        trainer_defaults={
            "accelerator": "auto" if torch.cuda.is_available() else "cpu",
            "max_epochs": 1,
            "callbacks": [ltp.Throughput()],
            "logger": False,
            "enable_checkpointing": False,
            "enable_model_summary": False,
        },
        save_config_callback=None,
        args=args,
    )


if __name__ == "__main__":
    main()
