"""Decide what a TARGET is, and load it."""

from __future__ import annotations

from pathlib import Path

from lightning_tp.cli.targets.function import load_function
from lightning_tp.cli.targets.hugging_face import load_config
from lightning_tp.cli.targets.script import is_script, load_script
from lightning_tp.cli.targets.target import Target
from lightning_tp.errors import TPError


def load(text: str, *, weights: bool = False) -> Target:
    """Load the model, inputs and loss of a TARGET.

    Args:
        text: As the help of the command line describes it.
        weights: Build the model with weights on the CPU, whatever its size.

    Raises:
        TPError: If there is no such thing, or it is something else.
    """
    path = Path(text)
    if path.suffix == ".json":
        return load_config(path, weights=weights)
    if (path / "config.json").is_file():
        return load_config(path / "config.json", weights=weights)
    if path.is_dir():
        raise TPError(
            f"`{text}`: the folder has no config.json. Name the folder of a Hugging Face model, or path/to/file.py:function."
        )
    if is_script(text):
        return load_script(text, weights=weights)
    where, _, name = text.rpartition(":")
    if where.endswith(".py") and not name:
        raise TPError(f"`{text}`: name the function in it that returns (model, inputs), such as {where}:build.")
    if not where or not name:
        raise TPError(
            f"`{text}`: a TARGET is package.module:function, path/to/file.py:function, path/to/train.py, or path/to/config.json."
        )
    return load_function(text)
