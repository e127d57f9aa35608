"""`lightning-tp`: look at the plan of a model, and check it against one process, from the command line.

`plan`, `estimate`, `tune` and `shapes` need no devices and no process group: the model may be on the meta device, and tp and dp of any size. `verify`
runs real processes on the CPU of this machine.

Exit status: 0 it is well, 1 the split model differs from one process, 2 a mistake of the user.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.util
import inspect
import json
import math
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_tp import cli_checkpoint, cli_estimate, cli_shapes
from lightning_tp._compat import version_of
from lightning_tp.cli_parser import TARGET, Parser, check_output, checked_plan_file, ended, examples
from lightning_tp.cli_script import is_script, run_script
from lightning_tp.comm import even_shard
from lightning_tp.declared import declared_plan
from lightning_tp.errors import TPError
from lightning_tp.estimate.draw import write_text
from lightning_tp.estimate.world import default_loss
from lightning_tp.infer import infer_plan
from lightning_tp.infer.trial import count_collectives
from lightning_tp.parity import Inputs, find_plan, scalar_loss, verify
from lightning_tp.plan import Plan
from lightning_tp.plan_check import any_split, splits_nothing
from lightning_tp.plan_table import starred
from lightning_tp.testing.ranks import RankError

SMALL = 20_000_000  # parameters, up to which a model of a config.json is built with weights
TOKENS = (2, 32)  # the made-up batch of a config.json
USE_LOCAL = "Use `backend='local'`."  # the advice of `to_torch`, which is none for a file
NOT_IN_TORCH = ("fused_colwise", "local_ops", "shard")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    args, extra = _parser().parse_known_args(arguments)
    if extra:
        args.parser.refuse(extra)
    args.command = shlex.join(["lightning-tp", *(sys.argv[1:] if arguments is None else arguments)])

    def run() -> int:
        try:
            status: int = args.run(args)
        except TPError as error:
            print(f"lightning-tp: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
        return status

    return ended(run)


def _parser() -> Parser:
    parser = Parser("lightning-tp", description=f"Tensor parallelism for PyTorch Lightning.\n\n{TARGET}", epilog=examples())
    version = f"lightning-tp {version_of('lightning-tp') or '(not installed)'}, torch {torch.__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(
        required=True, dest="name", metavar="plan | verify | estimate | tune | shapes | export | consolidate | inspect"
    )
    about = "how a model is split, what one rank holds, and the collectives of a step; no devices are needed"
    plan = commands.add_parser("plan", help=about, description=f"{about}\n\n{TARGET}", epilog=examples("plan"))
    plan.set_defaults(run=_plan)
    about = "train the model on tp x dp processes of this machine's CPU, and compare losses, gradients and weights with one process"
    check = commands.add_parser("verify", help=about, description=f"{about}\n\n{TARGET}", epilog=examples("verify"))
    check.set_defaults(run=_verify)
    for command in (plan, check):
        command.add_argument("target", metavar="TARGET", help="the model: see above")
        command.add_argument("--tp", type=int, default=2, metavar="N", help="ranks that share one model (default: %(default)s)")
        command.add_argument(
            "--dp", type=int, default=1, metavar="N", help="such groups; FSDP2 shards over them (default: %(default)s)"
        )
        command.add_argument("--plan", metavar="FILE", help="the JSON of a plan (default: the declared one, else the inferred one)")
        which = command.add_mutually_exclusive_group()
        which.add_argument("--declared", action="store_true", help="the plan that the model declares (Hugging Face), or an error")
        which.add_argument("--inferred", action="store_true", help="the plan that is found by running the model once")
        command.add_argument(
            "--no-sequence-parallel", action="store_true", help="whole activations between the split modules, not shards of tokens"
        )
    plan.add_argument("--json", metavar="FILE", help="write the plan as JSON; - for stdout, and nothing else there")
    plan.add_argument(
        "--emit-python",
        metavar="FILE",
        help="write `parallelize(model, tp_mesh)` for plain PyTorch, without this package; - for stdout",
    )
    cli_estimate.add_pictures(plan, "the plan as a picture of the model's blocks", "that picture and the table with its reasons")
    check.add_argument(
        "--steps", type=int, default=3, metavar="N", help="steps of the optimizer that are compared (default: %(default)s)"
    )
    check.add_argument(
        "--rtol", type=float, default=1e-3, metavar="X", help="the largest relative error allowed (default: %(default)s)"
    )
    cli_estimate.add_commands(commands)
    cli_shapes.add_command(commands)
    cli_checkpoint.add_commands(commands)
    for command in commands.choices.values():
        command.set_defaults(parser=command)
    return parser


def _plan(args: argparse.Namespace) -> int:
    _check_sizes(args)
    cli_estimate.check_pictures(args)
    check_output(args.json, "--json")
    check_output(args.emit_python, "--emit-python")
    args.plan = checked_plan_file(args.plan)
    target = load(args.target)
    plan = _choose(target, args)
    written = [(args.json, plan.to_json), (args.emit_python, lambda: python_source(plan, target.model, args.target))]
    texts = [(where, make()) for where, make in written if where is not None]  # before anything is written
    for where, text in texts:
        if where == "-":
            print(text)
            continue
        write_text(where, text if text.endswith("\n") else text + "\n")
    quiet, lines = "-" in (args.json, args.emit_python), list[str]()
    if not quiet:
        lines = [held_by_a_rank(plan, target.model, args.dp), _sent(plan, target, args.dp)]
        show(plan)
        print("\n".join(lines))
    drawn = cli_estimate.draw_plan(plan, target, args, lines)
    for where in () if quiet else (*(where for where, _ in texts), *drawn):
        print(f"Wrote {where}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    _check_sizes(args)
    if args.steps < 1:
        raise TPError(f"`--steps {args.steps}`: give a number of steps, 1 or more.")
    if not args.rtol > 0:
        raise TPError(f"`--rtol {args.rtol:g}`: give an error above 0, such as 1e-3.")
    args.plan = checked_plan_file(args.plan)
    target = load(args.target, weights=True)
    plan = _choose(target, args)
    try:
        report = verify(
            target.build,
            target.inputs,
            target.loss_fn,
            tp=args.tp,
            dp=args.dp,
            plan=plan,
            steps=args.steps,
            rtol=args.rtol,
            sequence_parallel=not args.no_sequence_parallel,
        )
    except RankError as error:
        print(f"NOT as in one process: the split model does not run. {error}", file=sys.stderr)
        return 1
    show(plan)
    print(report)
    return 0 if report.ok else 1


def _check_sizes(args: argparse.Namespace) -> None:
    for name in ("tp", "dp"):
        if getattr(args, name) < 1:
            raise TPError(f"`--{name} {getattr(args, name)}`: give a number of ranks, 1 or more.")


def _choose(target: Target, args: argparse.Namespace) -> Plan:
    """The plan that the options ask for, checked."""
    plan: Any = args.plan
    if plan is None and args.declared:
        plan = declared_plan(target.model, args.tp)
        if plan is None:
            raise TPError(f"`--declared`: {type(target.model).__name__} declares no plan. Leave it out, and one is inferred.")
    elif plan is None and args.inferred:
        plan = infer_plan(target.model, target.inputs, args.tp)
    elif plan is None:
        plan = target.plan
    found = find_plan(target.model, target.inputs, args.tp, plan, sequence_parallel=not args.no_sequence_parallel)
    if args.tp > 1 and not any_split(found.entries):
        raise TPError(splits_nothing(found, target.model, args.tp))
    return found


# ---------------------------------------------------------------------------------------------------------------- TARGET


@dataclass(frozen=True)
class Target:
    """What a TARGET stands for.

    Args:
        build: makes the model anew.
        model: one such model, perhaps on the meta device.
        inputs: what its forward is called with.
        loss_fn: a scalar from its output, or from (output, inputs).
        plan: that the model has as an attribute, as a LightningModule may, or its strategy.
        batch: samples that it is trained on at once, where that is known.
    """

    build: Callable[[], nn.Module]
    model: nn.Module
    inputs: Inputs
    loss_fn: Callable[..., Tensor]
    plan: Any = None
    batch: int | None = None


def load(text: str, *, weights: bool = False) -> Target:
    """The model, inputs and loss of a TARGET; with `weights`, on the CPU whatever its size.

    Raises:
        TPError: if there is no such thing, or it returns something else.
    """
    path = Path(text)
    if path.suffix == ".json" or (path / "config.json").is_file():
        return _hugging_face(path if path.suffix == ".json" else path / "config.json", weights)
    where, colon, name = text.rpartition(":")
    if path.is_dir():
        raise TPError(
            f"`{text}`: the folder has no config.json. A TARGET is that of a Hugging Face model, or path/to/file.py:function."
        )
    if is_script(text):
        return _script(text, weights)
    if where.endswith(".py") and not name:
        raise TPError(f"`{text}`: name the function in it that returns (model, inputs), as in {where}:build.")
    if not colon or not where or not name:
        raise TPError(
            f"`{text}`: a TARGET is package.module:function, path/to/file.py:function, path/to/train.py, or path/to/config.json."
        )
    module = _module(where, text)
    made = getattr(module, name, None)
    if made is None:
        near = [
            n
            for n, v in vars(module).items()
            if callable(v) and not n.startswith("_") and getattr(v, "__module__", "") == module.__name__
        ]
        raise TPError(f"`{text}`: {where} has no `{name}`." + (f" It has {', '.join(near)}." if near else ""))
    if inspect.isclass(made) and issubclass(made, nn.Module):
        return _lightning_module(made, text)
    if isinstance(made, nn.Module) or not callable(made):
        raise TPError(f"`{text}` is a {type(made).__name__}. Name a function without arguments that returns (model, inputs).")

    def call() -> tuple[Any, ...]:
        found = _called(made, text)
        if not isinstance(found, tuple) or len(found) not in (2, 3) or not isinstance(found[0], nn.Module):
            raise TPError(f"`{text}` returned a {type(found).__name__}; it has to be (model, inputs) or (model, inputs, loss_fn).")
        if len(found) == 3 and found[2] is not None and not callable(found[2]):
            raise TPError(
                f"`{text}`: the third value is a {type(found[2]).__name__}; it has to be a function of the output: a scalar."
            )
        return found

    torch.manual_seed(0)
    model, inputs, *loss = call()
    return Target(
        lambda: call()[0], model, _as_inputs(inputs), loss[0] if loss and loss[0] is not None else default_loss, _own_plan(model)
    )


def _script(text: str, weights: bool) -> Target:
    reached = run_script(text, _called, weights=weights)
    return Target(
        lambda: copy.deepcopy(reached.module),
        reached.module,
        _as_inputs(reached.inputs),
        reached.loss_fn,
        reached.plan if reached.plan is not None else _own_plan(reached.module),
        reached.batch,
    )


def _module(where: str, text: str) -> Any:
    if not where.endswith(".py"):
        if "" not in sys.path and str(Path.cwd()) not in sys.path:  # as `python -m` has it; a console script does not
            sys.path.insert(0, str(Path.cwd()))
        return _called(lambda: importlib.import_module(where), text)
    path = Path(where).resolve()
    if not path.is_file():
        raise TPError(f"`{text}`: there is no file {where}.")
    if str(path.parent) not in sys.path:  # as `python file.py` has it
        sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module, loader = importlib.util.module_from_spec(spec), spec.loader
    before = sys.modules.get(path.stem)
    sys.modules[path.stem] = module  # dataclasses look for it there
    try:
        _called(lambda: loader.exec_module(module), text)
    except TPError:
        sys.modules.pop(path.stem)
        if before is not None:
            sys.modules[path.stem] = before
        raise
    return module


def _called(fn: Callable[[], Any], text: str) -> Any:
    """What the user's code returns; an error of it in one line, with the place."""
    try:
        return fn()
    except TPError:
        raise
    except SystemExit as error:
        raise TPError(f"`{text}`: its code leaves Python, with sys.exit({error.code!r}).") from error
    except Exception as error:
        frame, tb = "", error.__traceback__
        while tb is not None:
            name = tb.tb_frame.f_code.co_filename
            if not any(part in name for part in ("lightning_tp", "importlib", "site-packages")):  # the user's own
                frame = f" ({name}, line {tb.tb_lineno})"
            tb = tb.tb_next
        raise TPError(f"`{text}`: {type(error).__name__}: {error}{frame}") from error


def _lightning_module(made: type[nn.Module], text: str) -> Target:
    def build() -> nn.Module:
        model = _called(made, text)
        configure = getattr(model, "configure_model", None)
        if configure is not None and not list(model.parameters()):
            _called(configure, text)
        return model

    torch.manual_seed(0)
    model = build()
    inputs = getattr(model, "example_input_array", None)
    if inputs is None:
        raise TPError(
            f"`{text}`: {made.__name__} has no `example_input_array`, which says what its forward reads. Set it, or name a "
            "function that returns (model, inputs)."
        )
    return Target(build, model, _as_inputs(inputs), default_loss, _own_plan(model))


def _own_plan(model: nn.Module) -> Any:
    plan = getattr(model, "plan", None)
    return plan if isinstance(plan, (Plan, Mapping, str, Path)) else None


def _as_inputs(inputs: Any) -> Inputs:
    if isinstance(inputs, Mapping):
        return dict(inputs)
    return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)


def _hugging_face(path: Path, weights: bool) -> Target:
    """A model of transformers: on the meta device if it is large, with tokens made up."""
    if not path.is_file():
        raise TPError(f"`{path}`: there is no such file.")
    try:
        import transformers
    except ImportError:
        raise TPError(f"`{path}`: a Hugging Face model needs transformers: pip install 'lightning-tp[hf]'.") from None
    transformers.logging.set_verbosity_error()  # what it finds unusual in a config changes nothing here
    config: Any = _called(lambda: transformers.AutoConfig.from_pretrained(str(path)), str(path))
    causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    auto: Any = transformers.AutoModelForCausalLM if causal else transformers.AutoModel

    def build(**options: Any) -> nn.Module:
        model: nn.Module = _called(lambda: auto.from_config(config, **options), str(path))
        return model

    def build_for_real() -> nn.Module:
        return build(dtype=torch.float32)

    with torch.device("meta"):
        model = build()
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise TPError(
            f"`{path}`: {type(model).__name__} reads `{model.main_input_name}`, not tokens. Name a function that returns "
            "(model, inputs)."
        )
    text_config = config.get_text_config()
    length = min(TOKENS[1], getattr(text_config, "max_position_embeddings", None) or TOKENS[1])
    small = sum(p.numel() for p in model.parameters()) <= SMALL
    if weights or small:
        torch.manual_seed(0)
        model = build_for_real() if weights else build()
    device = next(model.parameters()).device
    ids = torch.randint(0, text_config.vocab_size, (TOKENS[0], length), generator=torch.Generator().manual_seed(0)).to(device)
    inputs: dict[str, Any] = {"input_ids": ids}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    else:
        inputs["use_cache"] = False
    if causal:
        inputs["labels"] = ids
    return Target(build_for_real, model, inputs, default_loss)


# -------------------------------------------------------------------------------------------------------------- what it says


def show(plan: Plan) -> None:
    """The table of a plan; in colour on a terminal, if rich is there."""
    text = str(plan)
    try:
        if not sys.stdout.isatty():
            raise ImportError
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        print(text)
        return
    head, names, *lines = text.splitlines()
    titles = ("modules", "style", "whole -> on a rank", "reason")
    starts = [names.index(title) for title in titles]
    cells = [[line[a:b].strip() for a, b in zip(starts, [*starts[1:], None])] for line in lines]
    table = Table(*titles, title=head, title_justify="left", header_style="bold")
    for module, style, shapes, reason in cells:
        colour = "dim" if style.startswith("replicate") else "magenta" if style.startswith(("sequence", "prepare")) else "green"
        table.add_row(Text(module, "cyan"), Text(style, colour), Text(shapes), Text(reason, "dim"))
    Console().print(table)


def held_by_a_rank(plan: Plan, model: nn.Module, dp: int) -> str:
    """What the first rank, which holds no less than any other, has of the parameters: a line to read."""
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    total = held = size = 0
    for name, split in plan.splits.items():
        if name in plan.tied or name not in dtypes:
            continue
        shape = split.local_shape(plan.shapes[name], 0)
        rows = (len(even_shard(shape[0], 0, dp)), *shape[1:]) if shape else ()
        total += math.prod(plan.shapes[name])
        held += math.prod(rows)
        size += math.prod(rows) * dtypes[name].itemsize
    kinds = ", ".join(sorted({str(d).removeprefix("torch.") for d in dtypes.values()}))
    return (
        f"One rank of {dp * (plan.tp or 1)} (tp={plan.tp} x dp={dp}) holds {held:,} of {total:,} parameters "
        f"({held / max(1, total):.2%}), {_bytes(size)} in {kinds}"
    )


def _bytes(n: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "bytes" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} GiB"


def _sent(plan: Plan, target: Target, dp: int) -> str:
    of = "Collectives of one forward and backward on the tensor-parallel axis"
    try:
        counts = collectives(plan, target)
    except Exception as error:  # the model runs on made-up values here: what it makes of them is no reason to hide the plan
        return f"{of}: not counted, {type(error).__name__}: {' '.join(str(error).split())}"
    what = ", ".join(f"{n} {name}" for name, n in sorted(counts.items())) or "none"
    return f"{of}: {what}" + ("; those of FSDP2 on the data-parallel axis come on top" if dp > 1 else "")


def collectives(plan: Plan, target: Target) -> dict[str, int]:
    """Collectives on the tensor-parallel axis in one forward and backward, by name; nothing is sent."""
    assert plan.tp is not None
    if plan.tp == 1:
        return {}
    return count_collectives(target.model, lambda m, x: scalar_loss(m, x, target.loss_fn), target.inputs, plan, plan.tp)


# ------------------------------------------------------------------------------------------------------- for plain PyTorch


def python_source(plan: Plan, model: nn.Module, target: str) -> str:
    """A Python file with a function `parallelize(model, tp_mesh)` that splits the model by PyTorch's own styles.

    Raises:
        TPError: if torch has no counterpart of some rules; it lists their modules.
    """
    refused: dict[str, list[str]] = {}
    for entry in plan.entries:
        why = ""
        if entry.style.name in NOT_IN_TORCH:
            why = f"`{entry.style.name}`"
        else:
            try:
                Plan(plan.rules, plan.source, (entry,), plan.tp, plan.tied).to_torch(model)
            except TPError as error:
                why = str(error).removeprefix(f"`{entry.where}`: ").replace(USE_LOCAL, "").strip(" .")
        if why:
            refused.setdefault(why, []).append(starred(entry.where))
    tied = [name for name in sorted(plan.tied) if name in plan.splits and plan.splits[name].dim is not None]
    if tied:
        refused["tied weights, which torch's styles untie without a word"] = tied
    if refused:
        what = "; ".join(f"{', '.join(f'`{n}`' for n in dict.fromkeys(names))} ({why})" for why, names in refused.items())
        raise TPError(
            f"`--emit-python`: torch.distributed.tensor.parallel has no counterpart of {what}. Use `parallelize` of lightning_tp."
        )
    styles = {name: _style_source(style) for name, style in plan.to_torch(model).items()}
    folded = _folded(styles, [name for name, _ in model.named_modules(remove_duplicate=False)])
    words = sorted(
        {word for source in folded.values() for word in re.findall(r"\b[A-Z]\w+(?=\()", source)} - {"Partial", "Replicate", "Shard"}
    )
    placements = sorted({word for source in folded.values() for word in re.findall(r"\b(?:Partial|Replicate|Shard)(?=\()", source)})
    lines = [
        f'"""How {type(model).__name__} is split over a tensor-parallel axis, in plain PyTorch.',
        "",
        f"Written by `lightning-tp plan {target} --tp {plan.tp} --emit-python`, from a plan that was {plan.source}. The model's",
        f"code has to count its heads by -1: on a rank there are 1/{plan.tp} of them.",
        *([f"Sequences have to be as long as a multiple of {plan.tp}."] if any("Shard(1)" in x for x in folded.values()) else []),
        '"""',
        "",
        "from torch import nn",
        "from torch.distributed.device_mesh import DeviceMesh",
        *([f"from torch.distributed.tensor import {', '.join(placements)}"] if placements else []),
        f"from torch.distributed.tensor.parallel import {', '.join([*words, 'parallelize_module'])}",
        "",
        "",
        "def parallelize(model: nn.Module, tp_mesh: DeviceMesh) -> nn.Module:",
        f'    """Split the model over the {plan.tp} ranks of `tp_mesh`, in place."""',
        "    plan = {",
        *(f"        {json.dumps(name)}: {source}," for name, source in folded.items()),
        "    }",
        "    return parallelize_module(model, tp_mesh, plan)",
    ]
    return "\n".join(lines) + "\n"


def _folded(styles: Mapping[str, str], everything: Iterable[str]) -> dict[str, str]:
    """One pattern for the modules of all blocks, where it stands for these and no others."""
    groups: dict[str, list[str]] = {}
    for name in styles:
        groups.setdefault(starred(name), []).append(name)
    every = Counter(starred(name) for name in everything)
    folded: dict[str, str] = {}
    for star, names in groups.items():
        if len({styles[n] for n in names}) == 1 and every[star] == len(names):
            folded[star] = styles[names[0]]
        else:
            folded |= {n: styles[n] for n in names}
    return folded


def _style_source(style: Any) -> str:
    """The expression that makes one of torch's styles."""
    from torch.distributed.tensor import parallel as torch_tp

    if isinstance(style, (torch_tp.ColwiseParallel, torch_tp.RowwiseParallel)):
        arrives, leaves = _placements([style.input_layouts[0], style.output_layouts[0]])
        whole = "" if style.use_local_output else ", use_local_output=False"
        return f"{type(style).__name__}(input_layouts={arrives}, output_layouts={leaves}{whole})"
    if isinstance(style, torch_tp.SequenceParallel):
        return "SequenceParallel()"
    if isinstance(style, torch_tp.PrepareModuleInput):
        options = []
        if style.input_layouts:
            options += [
                f"input_layouts={_tuple(style.input_layouts)}",
                f"desired_input_layouts={_tuple(style.desired_input_layouts)}",
            ]
        if style.input_kwarg_layouts:
            options += [
                f"{n}={{{', '.join(f'{json.dumps(k)}: {_placements([v])[0]}' for k, v in getattr(style, n).items())}}}"
                for n in ("input_kwarg_layouts", "desired_input_kwarg_layouts")
            ]
        if style.use_local_output:
            options.append("use_local_output=True")
        return f"PrepareModuleInput({', '.join(options)})"
    if isinstance(style, torch_tp.PrepareModuleOutput):
        left, read = _tuple(style.output_layouts), _tuple(style.desired_output_layouts)
        return f"PrepareModuleOutput(output_layouts={left}, desired_output_layouts={read})"
    raise AssertionError(f"a style of torch that `to_torch` never makes: {type(style).__name__}")


def _tuple(placements: Any) -> str:
    found = _placements(placements)
    return f"({', '.join(found)},)" if len(found) == 1 else f"({', '.join(found)})"


def _placements(placements: Any) -> list[str]:
    return [
        "None" if p is None else f"Shard({p.dim})" if p.is_shard() else "Partial()" if p.is_partial() else "Replicate()"
        for p in placements
    ]


if __name__ == "__main__":
    sys.exit(main())
