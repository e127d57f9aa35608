"""A plan for a model that nobody declared: run it once, follow every feature, split what can be split."""

from lightning_tp.infer.search import infer_by_call as infer_by_call
from lightning_tp.infer.search import infer_plan as infer_plan
