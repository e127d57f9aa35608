"""Compile the extension, once for each version of torch, of Python and of its source, into a cache outside of the checkout."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("extension.cpp")
CACHE = "PRETEND_CUDA_CACHE"  # environment variable: the folder, instead of one in the temporary folder
NAME = "pretend_cuda_ext"
TORCH = "2.13"  # whose headers and private names the extension is written for
NO_COMPILER = "pretended GPUs need a C++ compiler: c++, g++ or clang++ on the PATH, or CXX"


def what_is_missing() -> str | None:
    """Return why there can be no pretended GPUs here, or None if there can be."""
    if not sys.platform.startswith("linux"):
        return "pretended GPUs need Linux"
    if torch_is_for_gpus():
        return "pretended GPUs need torch's build for the CPU"
    if not (version := importlib.metadata.version("torch")).startswith(f"{TORCH}."):
        return f"pretended GPUs are written for torch {TORCH}; this is {version}"
    if library_path().exists():
        return None
    if compiler() is None:
        return NO_COMPILER
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "pretended GPUs need the headers of Python"
    try:
        cache().mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        return f"pretended GPUs are compiled into a folder that can't be made; set {CACHE} to another: {error}"
    if not os.access(cache(), os.W_OK | os.X_OK):
        return f"pretended GPUs are compiled into {cache()}, which can't be written to; set {CACHE} to another folder"
    return None


def torch_is_for_gpus() -> bool:
    """Return whether torch was built for GPUs, without importing it."""
    values: dict[str, object] = {}
    exec((torch_folder() / "version.py").read_text(), values)
    return any(values.get(name) is not None for name in ("cuda", "hip", "xpu"))


def torch_folder() -> Path:
    """Return the folder of torch, without importing it."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def compiler() -> list[str] | None:
    """Return the command of the C++ compiler."""
    named = os.environ.get("CXX")
    commands = [shlex.split(named)] if named else [["c++"], ["g++"], ["clang++"]]
    return next((command for command in commands if shutil.which(command[0])), None)


def cache() -> Path:
    """Return the folder of all that is compiled."""
    return Path(os.environ.get(CACHE) or Path(tempfile.gettempdir()) / f"pretend_cuda-{os.getuid()}")


def library_path() -> Path:
    """Return where the compiled extension is, or will be."""
    key = hashlib.sha256(SOURCE.read_bytes() + sys.version.encode()).hexdigest()[:12]
    return cache() / f"torch-{importlib.metadata.version('torch')}-{key}" / f"{NAME}.so"


def library() -> Path:
    """Return the compiled extension; compile it if this torch has none yet, which takes a minute or two."""
    made = library_path()
    if made.exists():
        return made
    cache().mkdir(mode=0o700, parents=True, exist_ok=True)
    made.parent.mkdir(exist_ok=True)
    with open(made.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the others wait for the first
        if not made.exists():
            _compile(made)
    return made


def _compile(to: Path) -> None:
    found = compiler()
    if found is None:
        raise RuntimeError(NO_COMPILER)
    torch = torch_folder()
    command = [
        *(*found, "-O1", "-std=c++20", "-fPIC", "-shared", "-w"),
        *(f"-DTORCH_EXTENSION_NAME={NAME}", "-DTORCH_API_INCLUDE_EXTENSION_H", "-DUSE_DISTRIBUTED", "-DUSE_C10D_GLOO"),
        *(f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}", f"-I{sysconfig.get_paths()['include']}"),
        *(str(SOURCE), "-o", f"{to}.part", f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"),
    ]
    print(f"Pretended GPUs: compiling {SOURCE.name} into {to.parent}, once; a minute or two ..", file=sys.stderr, flush=True)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"The extension for pretended GPUs could not be compiled:\n{' '.join(command)}\n{done.stderr[-4000:]}")
    os.replace(f"{to}.part", to)


def load_before_torch() -> None:
    """Load the extension before torch is imported, which asks for its CUDA hooks once and keeps what it finds."""
    lib = torch_folder() / "lib"
    for name in ("libtorch_global_deps.so", "libc10.so", "libtorch_cpu.so", "libtorch.so", "libshm.so", "libtorch_python.so"):
        if (lib / name).exists():
            ctypes.CDLL(str(lib / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library()), mode=ctypes.RTLD_LOCAL)
