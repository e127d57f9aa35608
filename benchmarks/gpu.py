"""What one GPU says of lightning_tp on CUDA, in under 8 minutes.

    python benchmarks/gpu.py                        # a JSON line for each section, then one for all
    python benchmarks/gpu.py --only kernels,waits   # some; --list names them
    python benchmarks/gpu.py --pretend              # small, on a pretended GPU: only to see that every section runs
    python benchmarks/gpu.py --cpu                  # small, on the CPU: likewise

Three kinds of sections. Ranks that share the GPU: kernels, random numbers and autograd's threads are real, and each collective goes through host
memory to gloo, since NCCL wants a GPU for each rank. One process that stands for one rank of tp = 2, 4, 8: shards are real, and a fake process
group moves nothing; what its kernels take. And an NCCL group of one rank. Not covered: communication between GPUs.

Each section runs in a process of its own, which is killed at its limit; what fails is said in its line. Exit status 0: all gave a result, and
nothing in it is not as it should be. Figures of a pretended GPU or the CPU mean nothing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUDGET = 460.0  # seconds for all
LEAST = 10.0  # seconds with which a section is begun

# name -> the file with the function, and after how many seconds it is killed; in the order in which they run
SECTIONS = {
    "env": ("ranks", 40),
    "waits": ("shards", 30),
    "ranks_parity": ("ranks", 110),
    "nccl_of_one": ("ranks", 60),
    "kernels": ("shards", 100),
    "dispatch": ("shards", 60),
    "memory": ("shards", 60),
    "ranks_random": ("ranks", 110),
    "ranks_rest": ("ranks", 90),
    "attention": ("shards", 40),
    "losses": ("shards", 30),
    "compiled": ("shards", 150),
}


def arguments() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--pretend", action="store_true", help="on a pretended GPU, with small sizes")
    where.add_argument("--cpu", action="store_true", help="on the CPU, with small sizes")
    parser.add_argument("--small", action="store_true", help="small sizes on the GPU")
    parser.add_argument("--only", help="names of sections, with commas between them")
    parser.add_argument("--list", action="store_true", help="show the sections, run nothing")
    parser.add_argument("--out", type=Path, help="also write the lines to this file")
    parser.add_argument(
        "--slow", type=float, default=1.0, help="times the limits of all sections and of the whole, for a slow machine"
    )
    parser.add_argument("--section", help=argparse.SUPPRESS)
    args = parser.parse_args()
    unknown = set(args.only.split(",")) - SECTIONS.keys() if args.only else set()
    if unknown:
        parser.error(f"there is no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    return args


def run_here(name: str, pretend: bool) -> None:
    """Run a section in this process, and print what it found."""
    warnings.filterwarnings("ignore")
    sys.path[:0] = [str(ROOT), str(ROOT / "tests/cuda/pretend")]
    if pretend:
        import pretend_cuda

        pretend_cuda.install(devices=1)  # before torch is imported
    try:
        found = getattr(importlib.import_module(f"gpu_study.{SECTIONS[name][0]}"), name)()
    except Exception:
        found = {"failed": traceback.format_exc()[-1500:]}
    print("RESULT " + json.dumps(found, default=str), flush=True)
    os._exit(0)


def run(name: str, limit: float, args: argparse.Namespace) -> dict[str, Any]:
    """Run a section in a process of its own."""
    began = time.monotonic()
    small = args.small or args.pretend or args.cpu
    environment = {
        **{"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **os.environ},
        **{"GPU_STUDY_DEVICE": "cpu" if args.cpu else "cuda", "GPU_STUDY_SMALL": str(int(small))},
    }
    command = [sys.executable, __file__, "--section", name, *(["--pretend"] if args.pretend else [])]
    late = None
    with tempfile.TemporaryFile("w+") as log:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, start_new_session=True)
        try:
            output, _ = child.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            late = f"killed after {limit:.0f} s"
            os.killpg(child.pid, signal.SIGKILL)
            output, _ = child.communicate()
        log.seek(0)
        errors = log.read()
    line: dict[str, Any] = {"section": name, "seconds": round(time.monotonic() - began, 1)}
    found = next((x.removeprefix("RESULT ") for x in output.splitlines() if x.startswith("RESULT ")), None)
    if found is None:
        return {**line, "failed": late or "it ended without a result", "last words": errors[-1500:]}
    result = json.loads(found)
    return {**line, "failed": result["failed"]} if "failed" in result else {**line, "result": result}


def wrong(node: Any, where: str) -> list[str]:
    """The places of what says that it is not ok."""
    if not isinstance(node, dict):
        return []
    below = [place for key, value in node.items() for place in wrong(value, f"{where}/{key}")]
    return ([where] if node.get("ok") is False else []) + below


def main() -> int:
    args = arguments()
    if args.list:
        print("\n".join(f"{name:<13} at most {limit:>3} s" for name, (_, limit) in SECTIONS.items()))
        return 0
    if args.section:
        run_here(args.section, args.pretend)
    began, lines = time.monotonic(), []
    for name in args.only.split(",") if args.only else SECTIONS:
        limit = min(SECTIONS[name][1] * args.slow, BUDGET * args.slow - (time.monotonic() - began))
        lines.append(run(name, limit, args) if limit >= LEAST else {"section": name, "failed": "no time was left"})
        print(json.dumps(lines[-1]), flush=True)
    failed = [line["section"] for line in lines if "failed" in line]
    bad = [place for line in lines for place in wrong(line.get("result"), line["section"])]
    seconds = round(time.monotonic() - began, 1)
    lines.append({"section": "all", "seconds": seconds, "without a result": failed, "not as they should be": bad})
    print(json.dumps(lines[-1]), flush=True)
    if args.out:
        args.out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return 1 if failed or bad else 0


if __name__ == "__main__":
    sys.exit(main())
