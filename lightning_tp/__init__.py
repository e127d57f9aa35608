"""Tensor parallelism for any PyTorch Lightning transformer.

What is listed here is the API; anything else may change.
"""

from lightning_tp.apply.materialize import init_on_meta as init_on_meta
from lightning_tp.apply.parallelize import parallelize as parallelize
from lightning_tp.callbacks.drift import DriftWatch as DriftWatch
from lightning_tp.callbacks.throughput import Throughput as Throughput
from lightning_tp.checkpoint.export import consolidate as consolidate
from lightning_tp.checkpoint.export import export as export
from lightning_tp.checkpoint.weights.pretrained import load_from_checkpoint as load_from_checkpoint
from lightning_tp.checkpoint.weights.pretrained import load_pretrained as load_pretrained
from lightning_tp.data.random_tokens import RandomTokens as RandomTokens
from lightning_tp.errors import TPError as TPError
from lightning_tp.estimate import Estimate as Estimate
from lightning_tp.estimate import estimate as estimate
from lightning_tp.infer import infer_plan as infer_plan
from lightning_tp.plan.plan import Plan as Plan
from lightning_tp.plan.rule import Rule as Rule
from lightning_tp.shards.grad_norm import clip_grad_norm_ as clip_grad_norm_
from lightning_tp.shards.grad_norm import grad_norms as grad_norms
from lightning_tp.shards.state_dict import full_gradients as full_gradients
from lightning_tp.shards.state_dict import full_state_dict as full_state_dict
from lightning_tp.trainer.fabric import FabricTPStrategy as FabricTPStrategy
from lightning_tp.trainer.mixin import TensorParallel as TensorParallel
from lightning_tp.trainer.strategy import TPStrategy as TPStrategy
from lightning_tp.verify.verify import ParityReport as ParityReport
from lightning_tp.verify.verify import verify as verify
