"""Draw docs/img/architecture.svg: the folders of the package by floor, and what imports what, read from the sources.

    python docs/architecture.py

The order is that of `FLOORS` in tests/test_layers.py, the one place where it is written down.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PURPOSE = {
    "errors": "TPError; one error on one rank's screen",
    "_compat": "private parts of torch",
    "core": "collectives, modules, operators on shards",
    "data": "one batch for all ranks of a group",
    "styles": "how one module is split",
    "plan": "rules as written, and as checked",
    "shards": "a parameter and its shard; gradients, state dicts",
    "checkpoint": "save, commit, find, convert",
    "apply": "parallelize: the order of steps",
    "infer": "a plan for a model nobody declared",
    "estimate": "memory, communication and time, without devices",
    "verify": "one process against the mesh",
    "trainer": "TPStrategy and FabricTPStrategy",
    "callbacks": "drift, shards, throughput",
    "testing": "real ranks and parity in tests",
    "cli": "lightning-tp",
}

BOX = {"boxstyle": "round,pad=0.02", "fc": "#eef3fb", "ec": "#44546a", "lw": 1, "zorder": 2}
ARROW = {"arrowstyle": "-|>", "mutation_scale": 8, "lw": 1.0, "color": "#6b7a90", "zorder": 1}


def edges() -> tuple[list[list[str]], set[tuple[str, str]]]:
    """(the floors from the ground up, (importer, imported) of folders)."""
    sys.path.insert(0, str(ROOT))
    from tests.test_layers import FACES, FLOORS, IMPORTS

    floors = [sorted(unit for unit in row if unit in PURPOSE) for row in FLOORS]
    pairs = {(m.partition(".")[0], to.partition(".")[0]) for m, found in IMPORTS.items() if m not in FACES for to in found}
    pairs = {(a, b) for a, b in pairs if a != b and a in PURPOSE and b in PURPOSE}
    return [row for row in floors if row], {(a, b) for a, b in pairs if not _leads_by(a, b, pairs)}


def _leads_by(a: str, b: str, pairs: set[tuple[str, str]]) -> bool:
    """Whether `a` reaches `b` by way of a third: then the picture needs no arrow of its own for it."""
    seen, todo = set(), [to for x, to in pairs if x == a and to != b]
    while todo:
        unit = todo.pop()
        if unit not in seen:
            seen.add(unit)
            todo += [to for x, to in pairs if x == unit]
    return b in seen


def draw(path: Path) -> None:
    """Write the picture to `path`, an SVG."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "lightning_tp", "svg.fonttype": "none", "font.family": "sans-serif"})
    import matplotlib.pyplot as plt
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

    floors, pairs = edges()
    figure, ax = plt.subplots(figsize=(11, 1.15 * len(floors)))
    ax.set_xlim(0, 100)
    ax.set_ylim(-0.2, len(floors))
    ax.axis("off")
    center: dict[str, tuple[float, float]] = {}
    for level, row in enumerate(floors):
        width = min(40.0, 96 / len(row))
        for i, unit in enumerate(row):
            x = 50 + (i - (len(row) - 1) / 2) * width
            center[unit] = (x, level + 0.35)
            box = FancyBboxPatch((x - width / 2 + 1.5, level + 0.08), width - 3, 0.54, **BOX)
            ax.add_patch(box)
            ax.text(x, level + 0.45, unit, ha="center", va="center", fontsize=11, fontweight="bold", color="#1f2a3a", zorder=3)
            ax.text(
                x,
                level + 0.22,
                PURPOSE[unit],
                ha="center",
                va="center",
                fontsize=7.4 if len(row) > 3 else 8.5,
                color="#33415c",
                zorder=3,
            )
    for a, b in sorted(pairs):
        (xa, ya), (xb, yb) = center[a], center[b]
        ax.add_patch(FancyArrowPatch((xa, ya - 0.29), (xb, yb + 0.29), **ARROW))
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight", pad_inches=0.05)


if __name__ == "__main__":
    draw(ROOT / "docs" / "img" / "architecture.svg")
