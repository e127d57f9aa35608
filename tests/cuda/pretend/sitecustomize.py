"""Run by Python when it starts with this folder on PYTHONPATH: the process has the GPUs of the one that started it."""

import importlib.machinery
import importlib.util
import os
import sys

_here = os.path.dirname(os.path.abspath(__file__))
if os.environ.get("PRETEND_CUDA") or os.environ.get("PRETEND_CUDA_TRAINERS"):
    import pretend_cuda

    pretend_cuda.on_import()

# the one that would have run without this
_others = [path for path in sys.path if os.path.abspath(path or ".") != _here]
_next = importlib.machinery.PathFinder.find_spec("sitecustomize", _others)
if _next is not None and _next.loader is not None:
    _next.loader.exec_module(importlib.util.module_from_spec(_next))
