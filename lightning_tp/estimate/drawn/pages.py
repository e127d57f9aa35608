"""Reports as one HTML file each: no network, no scripts, fonts or styles from elsewhere; for a screen of any width, light or dark, and for paper.

Every picture is there twice, for wide and for narrow pages, of which a reader sees one; the numbers of each are in a table behind it. All names come
from the user's model, and are escaped.
"""

from __future__ import annotations

import math
import platform
import re
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from html import escape
from pathlib import Path

from lightning_tp._compat import version_of
from lightning_tp.core.files import write_text
from lightning_tp.core.units import count, seconds, share, size
from lightning_tp.estimate.drawn import charts, series
from lightning_tp.estimate.drawn.drawing import Drawing, check_page, style_of
from lightning_tp.estimate.drawn.picture import Picture
from lightning_tp.estimate.drawn.picture_drawing import NARROW, WIDE, draw_picture
from lightning_tp.estimate.drawn.picture_from_trace import of_world
from lightning_tp.estimate.drawn.series import block_collectives, stretches, time_parts
from lightning_tp.estimate.report.step import StepReport
from lightning_tp.estimate.report.tuning import TuningReport
from lightning_tp.plan.checked import CheckedPlan

PRODUCTS = 15  # largest products that are listed
MOST_ON_PAPER = 2.2  # times its width that a picture may be high, to be printed on one sheet
SHORT = 34  # letters of a cell that is not broken
CSS = """
:root{color-scheme:light dark;--page:#fff;--card:#f4f6f8;--ink:#1b1f24;--dim:#57606a;--line:#d5dbe1;--good:#12714f;--bad:#b42318;--link:#174a7e}
@media screen and (prefers-color-scheme:dark){:root{--page:#14171a;--card:#1e2328;--ink:#e8eaed;--dim:#a3adb8;--line:#3a424b;--good:#4cc296;
--bad:#ff8f85;--link:#79aef0}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:960px;padding:16px 20px 60px;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,'Segoe UI',
Roboto,'Liberation Sans',Arial,sans-serif}body.wide{max-width:1240px}
h1{font-size:1.6em;line-height:1.25;margin:.4em 0 .2em;overflow-wrap:anywhere}h2{font-size:1.25em;margin:2em 0 .5em;padding-top:.5em;
border-top:1px solid var(--line)}
p{margin:.5em 0;overflow-wrap:anywhere}.dim{color:var(--dim)}.good{color:var(--good);font-weight:600}.bad{color:var(--bad);font-weight:600}
nav{display:flex;flex-wrap:wrap;gap:4px 16px;margin:14px 0}a{color:var(--link)}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(190px,44vw),1fr));gap:10px;margin:16px 0;padding:0}
.facts div{background:var(--card);border-radius:8px;padding:10px 12px}.facts dt{color:var(--dim);font-size:.85em}
.facts dd{margin:0;font-size:1.25em;font-weight:600;overflow-wrap:anywhere}
.facts small{display:block;font-weight:400;font-size:.65em;color:var(--dim)}
figure{margin:14px 0}figure svg{display:block;width:100%;height:auto;max-width:880px}figure svg.narrow{display:none}
figcaption{color:var(--dim);font-size:.9em;margin-top:4px}
.scroll{overflow-x:auto;margin:8px 0}table{border-collapse:collapse;font-size:.9em;min-width:50%}
caption{text-align:left;color:var(--dim);padding:4px 0}
th,td{text-align:left;padding:4px 14px 4px 0;border-bottom:1px solid var(--line);vertical-align:top}
th{color:var(--dim);font-weight:600;white-space:nowrap}td.n,th.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
td.s{white-space:nowrap}td.k{min-width:14em}td.w{min-width:16em;overflow-wrap:anywhere}td svg{display:block;width:180px;height:18px}
details{margin:10px 0}summary{cursor:pointer;color:var(--link)}
code,pre{font-family:ui-monospace,'Liberation Mono',Consolas,monospace;font-size:.92em}pre{background:var(--card);border-radius:8px;padding:10px 12px;
white-space:pre-wrap;overflow-wrap:anywhere}
li{overflow-wrap:anywhere}
@media (max-width:640px){body{padding:10px 12px 40px}h1{font-size:1.35em}td.k{min-width:8em}
figure svg{display:none}figure svg.narrow{display:block;max-width:430px;margin:0 auto}}
@media print{body{max-width:none;font-size:11pt;padding:0}nav,summary{display:none}details::details-content{display:block;content-visibility:visible;
block-size:auto;opacity:1}h2{break-after:avoid}tr,.facts div{break-inside:avoid}figure.chart,figure.page{break-inside:avoid}
figure.page svg{max-height:205mm;width:auto}#plan{break-before:page}figure svg{display:block!important}
figure svg.narrow{display:none!important}.scroll{overflow:visible}table{font-size:8.5pt;width:100%}td.k,td.w{min-width:0}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""


def write_report(found: StepReport, path: str | Path, *, command: str = "") -> None:
    """Write an estimate as HTML; see `Estimate.html`.

    Raises:
        TPError: if the file can't be written.
    """
    check_page(path)
    write_text(path, report(found, command=command))


def report(found: StepReport, *, command: str = "") -> str:
    """The HTML of an estimate."""
    title = f"{found.model} on {found.dp * found.tp:,} x {found.hardware.name}"
    drawn, rules = "", ""
    if found.traced is not None:
        plan, world, whole = found.traced
        drawn = _picture(of_world(found.model, plan, world, whole))
        rules = _rules(plan)
    body = [
        f"<header><h1>{_heading(title)}</h1>",
        _sentence(found),
        _facts(found),
        "</header>",
        _nav(
            ("memory", "Memory"),
            ("collectives", "Collectives"),
            ("flops", "FLOPs"),
            ("time", "Time"),
            ("plan", "Plan"),
            ("assumed", "Assumed"),
        ),
        '<main><section id="memory"><h2>Memory</h2>',
        _memory(found),
        '</section><section id="collectives"><h2>Collectives</h2>',
        _collectives(found),
        '</section><section id="flops"><h2>FLOPs</h2>',
        _flops(found),
        '</section><section id="time"><h2>Time</h2>',
        _time(found),
        '</section><section id="plan"><h2>The plan</h2>',
        f"<p>{escape(found.plan)}</p>",
        drawn,
        rules,
        '</section><section id="assumed"><h2>What this rests on</h2><ul>',
        *(f"<li>{escape(a)}</li>" for a in found.assumptions),
        "</ul></section></main>",
        _made(command),
    ]
    return page(f"{title}: memory, communication and time of a training step", body)


def write_plan(plan: CheckedPlan, picture: Picture, path: str | Path, *, command: str = "", held: Sequence[str] = ()) -> None:
    """Write a plan as HTML: its picture, and its table with the reasons.

    Args:
        plan: checked.
        picture: of it.
        path: of the file.
        command: that made it.
        held: lines on what a rank holds and sends.

    Raises:
        TPError: if the file can't be written.
    """
    check_page(path)
    title = f"How {picture.model} is split over tp={picture.tp}"
    head = str(plan).splitlines()[0]
    lines = "".join(f"<p>{escape(line)}</p>" for line in (head, *held))
    body = [f"<header><h1>{_heading(title)}</h1>{lines}</header><main>", _picture(picture), _rules(plan), "</main>", _made(command)]
    write_text(path, page(title, body))


def write_choices(found: TuningReport, path: str | Path, *, command: str = "") -> None:
    """Write what `tune` found as HTML: the choices with their memory, the fastest first, and what is not possible.

    Raises:
        TPError: if the file can't be written.
    """
    check_page(path)
    model = f"{found.fits[0].model} on " if found.fits else ""
    hardware = found.fits[0].hardware.name if found.fits else "devices"
    unit = found.fits[0].unit if found.fits else "tokens"
    title = f"{model}{found.gpus:,} x {hardware}: what fits"
    most = max((max(e.memory.peak.total, e.hardware.usable_bytes) for e in found.fits), default=1.0)
    rows = []
    for i, e in enumerate(found.fits, 1):
        cells = [
            str(i),
            str(e.tp),
            str(e.dp),
            str(e.batch),
            str(e.accumulate),
            escape(e.activation_checkpointing),
            escape(e.precision),
        ]
        cells += [
            charts.bar_of(e, 180, most).svg(),
            size(e.needed),
            seconds(e.time.step),
            f"{e.tokens_per_s_per_device:,.0f}",
            f"{e.mfu:.1%}",
        ]
        rows.append(cells)
    names = ("", "tp", "dp", "batch", "accumulate", "checkpointing", "precision", "memory", "", "step", f"{unit}/s/device", "MFU")
    kinds = series.kinds_of([e.memory.peak for e in found.fits])
    key = Drawing(WIDE, label="Colors of the kinds of memory")
    key.height = charts.legend(key, [(k, k) for k in kinds], 4, WIDE)
    thin = Drawing(NARROW, label=key.label)
    thin.height = charts.legend(thin, [(k, k) for k in kinds], 4, NARROW)
    body = [
        f"<header><h1>{_heading(title)}</h1><p>{len(found.fits)} choices at {found.global_batch:,} samples a step, the fastest first. ",
        "The bars are a rank's memory at its peak by kind; the line is what a device has for it.</p></header><main>",
        _table("Choices that fit", names, rows, right=(0, 1, 2, 3, 4, 8, 9, 10, 11), ready=True),
        f"<figure>{key.svg(name='wide')}{thin.svg(name='narrow')}</figure>" if kinds else "",
        "<h2>Not possible</h2>" if found.refused else "",
        _table("What is refused, and why", ("choice", "reason"), [(r.what, r.why) for r in found.refused]) if found.refused else "",
        "<h2>What the fastest rests on</h2><ul>" if found.fits else "",
        *(f"<li>{escape(a)}</li>" for a in (found.fits[0].assumptions if found.fits else ())),
        "</ul>" if found.fits else "",
        "</main>",
        _made(command),
    ]
    write_text(path, page(title, body, wide=True))


def page(title: str, body: Iterable[str], wide: bool = False) -> str:
    """A whole page; `wide` for one that is mostly a table."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}{style_of()}</style></head><body{' class=wide' if wide else ''}>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


# -------------------------------------------------------------------------------------------------------------- sections


def _sentence(found: StepReport) -> str:
    has = size(found.hardware.memory_bytes)
    fit = (
        f'<span class="good">fits</span>: {size(found.needed)} of {has} on each device'
        if found.fits
        else f'<span class="bad">does not fit</span>: {size(found.needed)} of {has}, {size(found.over)} too much'
    )
    words = f"{found.precision}, {found.optimizer}, activation checkpointing: {found.activation_checkpointing}"
    return f"<p>A step of training {fit}.</p><p class='dim'>{escape(words)}</p>"


def _facts(found: StepReport) -> str:
    each = f"{found.tokens_per_s_per_device:,.0f} on a device"
    facts = [
        ("parameters", count(found.parameters), f"{count(found.held)} on a rank"),
        ("mesh", f"tp={found.tp} x dp={found.dp}", f"{found.dp * found.tp:,} devices"),
        (
            "batch",
            f"{found.batch} x {found.accumulate}" if found.accumulate > 1 else str(found.batch),
            f"{found.tokens:,} {found.unit} in a step",
        ),
        ("memory", size(found.needed), f"of {size(found.hardware.memory_bytes)}, all that is taken"),
        ("a step", seconds(found.time.step), f"{seconds(found.time.without_overlap)} without overlap"),
        (f"{found.unit}/s", f"{found.tokens_per_s:,.0f}", each),
        ("MFU", f"{found.mfu:.1%}", f"of {found.peak_flops / 1e12:,.0f} TFLOP/s"),
    ]
    cells = (f"<div><dt>{escape(a)}</dt><dd>{escape(b)}<small>{escape(c)}</small></dd></div>" for a, b, c in facts)
    return f'<dl class="facts">{"".join(cells)}</dl>'


def _memory(found: StepReport) -> str:
    m = found.memory
    kinds = sorted(m.peak.kinds.items(), key=lambda x: -x[1])
    at_peak = [(k, size(n), share(n, m.peak.total)) for k, n in kinds] + [("together", size(m.peak.total), "100%")]
    held = [(k, size(getattr(m, k))) for k in ("parameters", "gradients", "optimizer", "buffers")]
    held += [(f"kept for the backward: {k}", size(n)) for k, n in sorted(m.activations.items(), key=lambda x: -x[1])]
    over = [(s.name, size(s.begin), size(s.end), size(s.most)) for s in stretches(found)]
    return "".join(
        (
            _figure(lambda w: charts.memory_over_step(found, w)),
            _more(
                "Numbers over the step",
                _table("Bytes alive over the step", ("moments", "first", "last", "most"), over, right=(1, 2, 3)),
            ),
            _figure(lambda w: charts.memory_at_peak(found, w)),
            _more(
                "Numbers at the peak",
                _table(f"At the {m.peak.name}", ("kind", "bytes", "share"), at_peak, right=(1, 2))
                + _table("Held from one step to the next, and kept from forward to backward", ("kind", "bytes"), held, right=(1,)),
            ),
        )
    )


def _collectives(found: StepReport) -> str:
    _, names, rows = next(t for t in found.tables() if t[0].startswith("Collectives"))
    blocks = [
        (r.where, r.phase, r.kind, r.axis, f"{r.ranks:,}", size(r.bytes), str(r.each), f"{r.blocks:,}", size(r.total))
        for r in block_collectives(found)
    ]
    heads = ("where", "phase", "kind", "axis", "ranks", "bytes of one", "in a block", "blocks", "in all")
    if not blocks:
        return "<p>None: there is one rank on each axis.</p>"
    return "".join(
        (
            _table("Collectives of a step, bytes of the whole tensors", names, rows, right=(2, 3, 4)),
            _figure(lambda w: charts.collectives(found, w)),
            _more("Collectives by block", _table("In a step", heads, blocks, right=(4, 5, 6, 7, 8))),
        )
    )


def _flops(found: StepReport) -> str:
    total = sum(p.flops for p in found.products)
    ridge = found.peak_flops / found.hardware.memory_bandwidth
    rows = []
    for p in found.products[:PRODUCTS]:
        shape = f"{p.m:,} x {p.k:,} times {p.k:,} x {p.n:,}" if p.k else "a convolution"
        if p.kind == "attention":
            shape = f"{p.m:,} queries, {p.n:,} keys of {p.k:,}"
        many = f"{p.batch:,} x " if p.batch > 1 else ""
        intensity = p.flops / p.count / p.bytes if p.bytes else math.inf
        bound = "FLOPs" if intensity >= ridge else "memory"
        rows.append(
            (
                p.module or "(the model)",
                p.phase,
                many + shape,
                f"{p.count:,}",
                _flop(p.flops),
                share(p.flops, total),
                f"{intensity:,.0f}",
                bound,
            )
        )
    part = found.flops.rank * found.tp / max(1, found.flops.model)
    done = (
        f"a rank computes {_flop(found.flops.rank)}; the {found.tp} together {part:.1%} of the model's (of causal attention half)"
    )
    heads = ("module", "phase", "sizes", "count", "FLOPs", "share", "FLOPs/byte", "bound by")
    return "".join(
        (
            f"<p>A micro-batch takes {_flop(found.flops.model)} of the model; {done}.</p>",
            _table(
                f"The largest {len(rows)} of {len(found.products)} kinds of products on a rank", heads, rows, right=(3, 4, 5, 6)
            ),
            _figure(
                lambda w: charts.roofline(found, w),
                f"From {ridge:,.0f} FLOPs for each byte on, the device computes rather than waits for its memory.",
            ),
        )
    )


def _time(found: StepReport) -> str:
    rows = [(name, seconds(a), f"{a / found.time.step:.1%}", seconds(b)) for name, _, a, b in time_parts(found)]
    rows.append(("a step", seconds(found.time.step), "100%", seconds(found.time.without_overlap)))
    return _figure(lambda w: charts.time_of_step(found, w)) + _table(
        "Seconds of a step on a rank", ("part", "with overlap", "share", "one after the other"), rows, right=(1, 2, 3)
    )


def _picture(picture: Picture) -> str:
    caption = "A box is a module with a rank's share of its weight; yellow bars are collectives; the bar at the left is what an activation is."
    return _figure(lambda w: draw_picture(picture, w), caption, chart=False)


def _rules(plan: CheckedPlan) -> str:
    total, held = plan.numel, max(map(plan.local_numel, range(plan.tp)))
    caption = f"The plan ({plan.source}): {total:,} parameters, up to {held:,} per rank of tp={plan.tp}"
    return _table(caption, ("modules", "style", "full shape -> local shard", "reason"), plan.rows)


def _made(command: str) -> str:
    names = ("lightning-tp", "torch", "lightning", "transformers")
    versions = ", ".join(f"{n} {v}" for n in names if (v := version_of(n)))
    made = f"<pre>{escape(command)}</pre>" if command else ""
    how = f"{versions}, Python {platform.python_version()}"
    return f'<footer><h2>How this was made</h2>{made}<p class="dim">{date.today().isoformat()}, {escape(how)}</p></footer>'


# ----------------------------------------------------------------------------------------------------------------- parts


def _figure(draw: Callable[[float], Drawing], caption: str = "", chart: bool = True) -> str:
    wide = draw(WIDE)
    both = wide.svg(name="wide") + draw(NARROW).svg(name="narrow")
    name = " class=chart" if chart else " class=page" if wide.height < MOST_ON_PAPER * wide.width else ""  # fits on one sheet
    words = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure{name}>{both}{words}</figure>"


def _table(
    caption: str, names: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[int] = (), ready: bool = False
) -> str:
    """A table; the columns `right` are numbers. `ready`: the cells are HTML already."""

    rows, last = list(rows), len(names) - 1
    long = {i for i in (0, last) if any(len(row[i]) > SHORT * (0.6 if i == 0 else 1) for row in rows)}

    def kind(i: int, text: str) -> str:
        if i in right:
            return ' class="n"'
        return f' class="{"k" if i == 0 else "w"}"' if i in long else ' class="s"' if len(text) <= SHORT else ""

    head = "".join(f'<th scope="col"{kind(i, n) if i in right else ""}>{escape(n)}</th>' for i, n in enumerate(names))
    lines = "\n".join(
        "<tr>" + "".join(f"<td{kind(i, c)}>{c if ready else _cell(c)}</td>" for i, c in enumerate(row)) + "</tr>" for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def _heading(text: str) -> str:
    """A title; the name of a class may break before each of its words."""
    return "<wbr>".join(escape(part) for part in re.split(r"(?<=[a-z0-9])(?=[A-Z])", text))


def _cell(text: str) -> str:
    """The text of a cell; long names may break behind a dot."""
    return re.sub(r"\.(?=[A-Za-z_*{])", ".<wbr>", escape(text)) if len(text) > 16 else escape(text)


def _more(words: str, inside: str) -> str:
    return f"<details><summary>{escape(words)}</summary>{inside}</details>"


def _nav(*sections: tuple[str, str]) -> str:
    links = "".join(f'<a href="#{where}">{escape(words)}</a>' for where, words in sections)
    return f'<nav aria-label="Sections">{links}</nav>'


def _flop(n: float) -> str:
    for unit, scale in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6)):
        if n >= scale:
            return f"{n / scale:.3g} {unit}"
    return f"{n:,.0f} FLOP"
