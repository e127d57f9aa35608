"""What a model needs on a mesh that is not there: memory, communication, FLOPs and time of a step on one rank."""

from lightning_tp.estimate.hardware import Hardware as Hardware
from lightning_tp.estimate.predict import estimate as estimate
from lightning_tp.estimate.report import Estimate as Estimate
from lightning_tp.estimate.shapes import Shapes as Shapes
from lightning_tp.estimate.shapes import shapes as shapes
