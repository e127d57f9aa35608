"""What a model needs on a mesh that is not there: memory, communication, FLOPs and time of a step on one rank."""

from lightning_tp.estimate.cost.hardware import Hardware as Hardware
from lightning_tp.estimate.predict import Estimate as Estimate
from lightning_tp.estimate.predict import estimate as estimate
