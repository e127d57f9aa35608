"""What users get wrong around checkpoints: one line and status 2 on the command line, one `TPError` on one screen in a run; nothing is lost."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lightning_tp as ltp
from lightning_tp import errors
from lightning_tp.checkpoint import Peers, StoragePath, remove, select_intact
from lightning_tp.cli.main import main
from lightning_tp.testing import run_ranks
from tests.checkpoint.runs import Net, data, trainer
from tests.checkpoint.test_commit import save

LONG = "n" * 300


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a whole checkpoint, and with much that is none."""
    monkeypatch.chdir(tmp_path)
    save(Path("good.ckpt"), 1)
    for name in ("later", "no_meta", "no_metadata", "no_manifest", "no_shard"):
        shutil.copytree("good.ckpt", f"{name}.ckpt")
    later(Path("later.ckpt"))
    Path("no_meta.ckpt/meta.pt").unlink()
    Path("no_metadata.ckpt/.metadata").unlink()
    Path("no_manifest.ckpt/manifest.json").write_text("[]")
    Path("no_shard.ckpt/__0_0.distcp").unlink()
    for name in ("empty", "folder.safetensors", "other"):
        Path(name).mkdir()
    Path("other/thesis.tex").write_text("mine")
    Path("text.ckpt").write_text("hello")
    Path("nothing.ckpt").write_text("")
    Path("dangling.ckpt").symlink_to("nowhere")
    Path("loop.ckpt").symlink_to("loop.ckpt")
    torch.save({"a": 1}, "no_tensors.ckpt")
    torch.save(torch.zeros(3), "tensor.pt")
    torch.save({"state_dict": {"w": torch.zeros(3)}, "optimizer_states": [{"x": 1}]}, "no_groups.ckpt")
    return tmp_path


def later(folder: Path) -> None:
    """Written by a later version."""
    file = folder / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 2}))


INPUTS = {
    "nowhere.ckpt": "there is no such file or folder",
    "hpc_ckpt_3.ckpt": "there is no such file or folder",
    "good.ckpt/manifest.json/x": "there is no such file or folder",
    "dangling.ckpt": "there is no such file or folder",
    "loop.ckpt": "there is no such file or folder",
    "loop.ckpt/x": "can't be opened: Too many levels of symbolic links",
    "empty": "is no checkpoint",
    "folder.safetensors": "is no checkpoint",
    "other": "is no checkpoint",
    "/dev/null": "neither a file nor a folder",
    LONG: "can't be opened: File name too long",
    "": "'' is no path",
    "a\0b": "is no path",
    "foo://x/y.ckpt": "`foo://x/y.ckpt` is a URL",
    "s3://bucket/a.ckpt": "`s3://bucket/a.ckpt` is a URL",
}
BROKEN = {
    "text.ckpt": "no checkpoint that `torch.load` can read",
    "nothing.ckpt": "no checkpoint that `torch.load` can read",
    "no_tensors.ckpt": "has no tensors in it: a",
    "tensor.pt": "has a Tensor in it",
    "later.ckpt": "has the format 2, and this version of lightning_tp reads 1. Install the version that wrote it",
    "no_meta.ckpt": "meta.pt",
    "no_metadata.ckpt": ".metadata",
    "no_manifest.ckpt": "manifest",
    "no_shard.ckpt": "__0_0.distcp",
}


def one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the command line says of a mistake; checked to be one line, at once, with status 2."""
    start = time.monotonic()
    status = main(arguments)
    out, err = capsys.readouterr()
    assert status == 2 and not out and err.startswith("lightning-tp: ") and err.count("\n") == 1, (status, out, err)
    assert time.monotonic() - start < 5
    return err


def test_what_is_read_on_the_command_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(os.listdir(here))
    for name, said in {**INPUTS, **BROKEN}.items():
        for command in ("inspect", "export", "consolidate"):
            out = [] if command == "inspect" else [str(here / "out")]
            if command == "inspect" and name in BROKEN:  # it says so of a checkpoint
                assert main([command, name]) == 1
                assert said in capsys.readouterr().out, name
            else:
                text = one_line([command, name, *out], capsys)
                assert said in text or "is no checkpoint" in text, (command, name, text)
                assert text.count("Nothing of it was loaded") <= 1 and ".. " not in text and not text.endswith("..\n"), text
    assert "no `param_groups`" in one_line(["consolidate", "no_groups.ckpt", "out"], capsys)
    assert sorted(os.listdir(here)) == before


@pytest.mark.parametrize("command", ["export", "consolidate"])
def test_where_it_is_written_on_the_command_line(command: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("old.ckpt").write_text("old")
    before = sorted(os.listdir(here))
    for out, said in (
        ("text.ckpt/x", "`text.ckpt` is no folder"),
        ("old.ckpt", "is there already"),
        ("loop.ckpt/x", "Too many levels"),
        ("/proc/x", "No such file or directory"),
        ("good.ckpt/x", "lies in the checkpoint that is read"),
        (".", "has in it, the checkpoint that is read"),
        ("s3://bucket/x", "is a URL"),
        ("foo://x", "is a URL"),
        ("", "is no path"),
        ("a\0b", "is no path"),
        (LONG, "File name too long"),
    ):
        assert said in one_line([command, "good.ckpt", out], capsys), out
    assert sorted(os.listdir(here)) == before and Path("old.ckpt").read_text() == "old"
    assert main([command, "good.ckpt", "neu & schön 模型"]) == 0
    assert main(["inspect", "neu & schön 模型"]) == 0


def as_nobody(body: Callable[[], None]) -> None:
    """In a process that owns nothing here."""
    pid = os.fork()
    if pid == 0:
        try:
            if not os.geteuid():
                os.setgid(65534)
                os.setuid(65534)
            body()
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.fixture
def public(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that anybody can reach, unlike pytest's."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        monkeypatch.chdir(folder)
        yield Path(folder)
        monkeypatch.undo()


def test_what_may_not_be_read_or_written(public: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = public
    save(Path("good.ckpt"), 1)
    assert main(["export", "good.ckpt", "st"]) == 0 and main(["consolidate", "good.ckpt", "one.ckpt"]) == 0
    assert main(["inspect", "good.ckpt", "--verify"]) == 0  # all modules are there that are imported late
    capsys.readouterr()
    for name in ("manifest.json", "meta.pt", ".metadata", "__0_0.distcp", ""):
        shutil.copytree("good.ckpt", f"closed {name}")
        Path(f"closed {name}", name).chmod(0)
    Path("one.ckpt").chmod(0)
    Path("st/model.safetensors").chmod(0)
    here.chmod(0o555)

    def body() -> None:
        for name in ("closed ", "closed manifest.json", "closed meta.pt", "closed .metadata", "closed __0_0.distcp"):
            for command in (["export"], ["consolidate"]):
                assert "can't be" in one_line([*command, name, "/tmp/out"], capsys), name
            with pytest.raises(ltp.TPError, match="can't be read: "):
                select_intact(StoragePath(name), Peers(alone=True))
            assert main(["inspect", name, "--verify"]) in (1, 2)
            capsys.readouterr()
        for name in ("one.ckpt", "st"):
            capsys.readouterr()
            assert "can't be read: Permission denied" in one_line(["export", name, "/tmp/out"], capsys)
        for command in ("export", "consolidate"):
            assert "Permission denied" in one_line([command, "good.ckpt", "out"], capsys)
        with pytest.raises(ltp.TPError, match=r"new\.ckpt` could not be written: PermissionError"):
            save(Path("new.ckpt"), 2)
        with pytest.raises(ltp.TPError, match=r"good\.ckpt` could not be removed: Permission denied"):
            remove(StoragePath("good.ckpt"))

    before = sorted(os.listdir(here))
    try:
        as_nobody(body)
    finally:
        here.chmod(0o755)
        Path("closed ").chmod(0o755)
    assert sorted(os.listdir(here)) == before and select_intact(StoragePath("good.ckpt"), Peers())[1] is None


def test_a_path_is_where_it_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the process goes elsewhere while a save is under way."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    place = StoragePath("a.ckpt")
    monkeypatch.chdir(tmp_path / "elsewhere")
    inside, beside = place / "meta.pt", place.parent
    assert inside.path == str(tmp_path / "a.ckpt" / "meta.pt") and beside.path == str(tmp_path)
    assert str(place) == "a.ckpt", "as the user knows it"


# ------------------------------------------------------------------------------------------------------------------ in a run


class Wide(Net):
    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.model.up, self.model.down = nn.Linear(16, 64), nn.Linear(64, 16)


class More(Net):
    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.model.head2 = nn.Linear(16, 11)


class Sgd(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Groups(Net):
    def configure_optimizers(self) -> Any:
        p = list(self.parameters())
        return torch.optim.AdamW([{"params": p[:2]}, {"params": p[2:]}])


class Two(Net):
    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        p = list(self.parameters())
        return [torch.optim.AdamW(p[:2]), torch.optim.AdamW(p[2:])]


MODULES: dict[type[Net], str] = {
    Wide: r"`model.up.weight`",
    More: "has no `model.head2.weight`",
    Sgd: "of another kind than this SGD: it has `betas`, and no `momentum`",
    Groups: "has 1 group(s) of parameters, and this AdamW has 2",
    Two: "optimizer",
}
WORDS = {
    "nowhere.ckpt": "there is nothing of this name. Nothing of it was loaded. The newest one there that is whole is",
    "empty": "is no checkpoint",
    "text.ckpt": "no archive of torch's",
    "later.ckpt": "can't be read: `",
    "dangling.ckpt": "there is nothing of this name",
    "no_weights.ckpt": "it contains a dict without `state_dict`",
    "list.ckpt": "it contains a list",
    "weights.ckpt": "has 0 optimizer state(s) and the module 1 optimizer(s), so training can't resume from it",
    "folder.ckpt/meta.pt": "it contains a dict without `state_dict`",
    "foo://x/y.ckpt": "the file system of this URL is not known here (Protocol not known: foo)",
    "memory://none.ckpt": "there is nothing of this name",
    "best": "`ModelCheckpoint` is not configured",
    "hpc": "no HPC checkpoint was found",
    LONG: "there is nothing of this name",
}
FINE = ("last", "last.ckpt", "./folder.ckpt", "gewöhnlich 模 型.ckpt")


def fit(path: str, module: type[Net] = Net) -> str:
    """What this rank says of a run that begins with this checkpoint."""
    start = time.monotonic()
    try:
        trainer().fit(module(), data(), ckpt_path=path)
        said = ""
    except (ltp.TPError, SystemExit) as error:
        said = f"{type(error).__name__} {error}"
    assert time.monotonic() - start < 10, path
    return said


def test_what_a_run_begins_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "HEAD_START", 0.0)
    monkeypatch.chdir(tmp_path)

    def saves() -> None:
        for name, module, whole in (("folder", Net, False), ("file", Net, True), ("sgd", Sgd, True)):
            run = trainer(max_epochs=1, strategy=dict(save_distributed_checkpoint=not whole))
            run.fit(module(), data())
            run.save_checkpoint(f"{name}.ckpt")

    run_ranks(saves, 2, init=False)
    shutil.copytree("folder.ckpt", "later.ckpt")
    later(Path("later.ckpt"))
    shutil.copytree("folder.ckpt", FINE[-1])
    Path("last.ckpt").symlink_to("folder.ckpt")
    Path("dangling.ckpt").symlink_to("nowhere")
    Path("empty").mkdir()
    Path("text.ckpt").write_text("hello")
    torch.save({"a": 1}, "no_weights.ckpt")
    torch.save([1], "list.ckpt")
    torch.save({"state_dict": Net().state_dict(), "pytorch-lightning_version": "2.6.6"}, "weights.ckpt")
    before = sorted(os.listdir(tmp_path))

    def body() -> dict[str, str]:
        said = {path: fit(path) for path in (*WORDS, *FINE)}
        said |= {f"{path} {of.__name__}": fit(path, of) for path in ("folder.ckpt", "file.ckpt") for of in MODULES}
        return {**said, "sgd.ckpt": fit("sgd.ckpt")}

    first, second = run_ranks(body, 2, init=False)
    expected = {**WORDS, **{f"{p} {of.__name__}": m for p in ("folder.ckpt", "file.ckpt") for of, m in MODULES.items()}}
    expected["sgd.ckpt"] = "of another kind than this AdamW: it has `momentum`, and no `betas`"
    for name, text in expected.items():
        assert first[name].startswith("TPError") and text in first[name] and second[name] == "SystemExit 1", (name, first[name])
    assert not any(said[name] for name in FINE for said in (first, second))
    assert sorted(os.listdir(tmp_path)) == before
