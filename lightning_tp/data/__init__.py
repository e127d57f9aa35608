"""Data of the ranks: loaders on a mesh, batches that are compared, positions to resume from; and random tokens, which need no download."""

from lightning_tp.data.random_tokens import RandomTokens as RandomTokens
