"""Train a Hugging Face Llama sharded across two processes. No plan is given: one is inferred, and compared with
the one that the model declares.

    python examples/03_hugging_face_llama.py

    Plan, inferred: as declared by LlamaForCausalLM, and with sequence parallelism, tp=2: 857,216 parameters, a rank holds 429,184 (50.1%); ..
    ..
    Loaded into the plain model: largest difference of the logits 7.6e-06
    Loss 0.008 after 200 steps

The LightningModule is an ordinary one that does not know about ranks. At the end the full weights are loaded into the
plain model, which gives the same logits.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # on the CPU, one thread per rank; torch reads it on import

import argparse

import lightning as L
import torch
from torch.utils.data import ConcatDataset, DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import lightning_tp as ltp
from lightning_tp.callbacks import ShardSummary

CONFIG = LlamaConfig(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=344,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
)


class HuggingFaceModule(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = LlamaForCausalLM(CONFIG)

    def training_step(self, batch, batch_idx):
        loss = self.model(input_ids=batch["tokens"], labels=batch["tokens"]).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


class Export(L.Callback):
    """Load the full weights into the plain model, and compare its logits."""

    def on_fit_end(self, trainer, module):
        tokens = torch.arange(64, device=module.device)[None]
        with torch.no_grad():
            logits = (
                module.model.eval()(input_ids=tokens).logits.full_tensor().cpu()
            )  # a collective, as is the next line: all ranks run it
        weights = ltp.full_state_dict(module.model)
        plain = LlamaForCausalLM(CONFIG).eval()
        plain.load_state_dict(weights)
        with torch.no_grad():
            difference = (plain(input_ids=tokens.cpu()).logits - logits).abs().max()
        trainer.print(f"Loaded into the plain model: largest difference of the logits {difference:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a Hugging Face Llama without a plan.")
    parser.add_argument("--max-steps", type=int, default=200)
    parser.add_argument("--fast", action="store_true", help="run 8 steps only, as a smoke test")
    args = parser.parse_args()
    steps = 8 if args.fast else args.max_steps

    L.seed_everything(1)
    items = ltp.RandomTokens(num_items=32, seq_len=64, vocab_size=CONFIG.vocab_size)
    data = DataLoader(ConcatDataset([items] * -(-steps * 8 // len(items))), batch_size=8)
    module = HuggingFaceModule()
    trainer = L.Trainer(
        accelerator="cuda" if torch.cuda.device_count() >= 2 else "cpu",
        devices=2,
        strategy=ltp.TPStrategy(tp=2),
        max_epochs=1,
        max_steps=steps,
        callbacks=[ltp.Throughput(), ShardSummary(), Export()],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    trainer.print(f"Loss {trainer.callback_metrics['loss']:.3f} after {trainer.global_step} steps")


if __name__ == "__main__":
    main()
