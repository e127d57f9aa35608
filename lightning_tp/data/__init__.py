"""Data that needs no download: random tokens for speed, bytes of source files for learning."""

from lightning_tp.data.random_tokens import RandomTokens
from lightning_tp.data.text import ByteText, StdlibText, bigram_loss

__all__ = ["ByteText", "RandomTokens", "StdlibText", "bigram_loss"]
