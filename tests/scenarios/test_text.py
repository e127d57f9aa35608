"""The text of the examples. ByteText, StdlibText: windows, no leak over the split, a fixed order of files. bigram_loss: against hand counts."""

from __future__ import annotations

import doctest
import math
from pathlib import Path

import pytest
import torch

from examples import text as examples_text
from examples.text import ByteText, StdlibText, bigram_loss
from lightning_tp.errors import TPError


def write(folder: Path, **files: bytes) -> Path:
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def whole(text: str | Path | list[str | Path], **kwargs: object) -> bytes:
    """Both splits, put together again."""
    parts = [ByteText(text, 1, "train", **kwargs), ByteText(text, 1, "val", **kwargs)]  # type: ignore[arg-type]
    return b"".join(bytes(part.bytes.tolist()) for part in parts)


def test_windows_are_next_byte_pairs(tmp_path: Path) -> None:
    text = ByteText(write(tmp_path, a_txt=bytes(range(100))), seq_len=10)
    assert text[2]["tokens"].tolist() == list(range(20, 30))
    assert text[2]["targets"].tolist() == list(range(21, 31))
    assert text[2]["tokens"].dtype == torch.int64


@pytest.mark.parametrize("stride", [1, 3, 10, 17])
def test_windows_cover_the_split_and_do_not_leak(tmp_path: Path, stride: int) -> None:
    content = bytes(range(200))  # each byte once, so a byte tells where it came from
    folder = write(tmp_path, a_txt=content[:150], b_txt=content[150:])
    for split, start, stop in (("train", 0, 180), ("val", 180, 200)):
        text = ByteText(folder, 10, split, stride=stride)  # type: ignore[arg-type]
        assert bytes(text.bytes.tolist()) == content[start:stop]
        firsts = [int(window["tokens"][0]) for window in text]  # type: ignore[attr-defined]
        assert firsts == list(range(start, stop - 10, stride))  # to the last window that has a target for each token
        assert int(text[len(text) - 1]["targets"][-1]) < stop
        with pytest.raises(IndexError):
            text[len(text)]


def test_files_are_read_in_order_of_path(tmp_path: Path) -> None:
    write(tmp_path, c_py=b"3" * 10, a__z_py=b"1" * 10, b_py=b"2" * 10, a__skip_txt=b"x" * 10)
    write(tmp_path / ".git", a_py=b"x" * 10)
    (tmp_path / ".hidden.py").write_bytes(b"x" * 10)
    assert whole(tmp_path, pattern="*.py") == b"1" * 10 + b"2" * 10 + b"3" * 10
    assert whole(tmp_path, pattern="*.py", max_bytes=15) == b"1" * 10 + b"2" * 5
    assert whole([tmp_path / "c.py", tmp_path / "b.py"]) == b"3" * 10 + b"2" * 10


def test_stdlib_is_fixed_and_clean() -> None:
    train, val = StdlibText(64), StdlibText(64, "val")
    source = bytes(train.bytes.tolist()) + bytes(val.bytes.tolist())
    assert len(source) > 5_000_000
    assert 0.0999 < len(val.bytes) / len(source) < 0.1001
    assert b"class OrderedDict(dict)" in source
    assert b"class GrammarTests(unittest.TestCase)" not in source  # test/test_grammar.py
    assert b"class RandomTokens" not in source
    assert b"class LightningModule" not in source  # site-packages
    assert torch.equal(StdlibText(64, max_bytes=10_000).bytes, train.bytes[:9_000])


def test_bigram_loss_by_hand() -> None:
    # "abac" has the pairs ab, ba, ac. p(b|a) = (1 + k) / (2 + 256 k), p(a|b) = (1 + k) / (1 + 256 k); "aba" has ab, ba.
    k = 0.5
    by_hand = -(math.log((1 + k) / (2 + 256 * k)) + math.log((1 + k) / (1 + 256 * k))) / 2
    assert bigram_loss(b"abac", b"aba", smoothing=[k]) == pytest.approx(by_hand, abs=1e-12)


def test_bigram_takes_the_best_smoothing() -> None:
    train, val = b"the cat sat on the mat. " * 3, b"the rat sat on the cat."
    tried = [bigram_loss(train, val, smoothing=[k]) for k in (0.01, 0.1, 1.0)]
    assert bigram_loss(train, val, smoothing=(0.01, 0.1, 1.0)) == min(tried) < max(tried)
    assert bigram_loss(train, val) <= min(tried)


def test_bigram_bounds() -> None:
    noise = torch.randint(256, (200_000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert bigram_loss(noise[:180_000], noise[180_000:]) == pytest.approx(math.log(256), abs=0.05)
    train, val = StdlibText(64, max_bytes=2_000_000), StdlibText(64, "val", max_bytes=2_000_000)
    unigram = torch.bincount(val.bytes.long(), minlength=256) / len(val.bytes)
    entropy = -(unigram * unigram.clamp_min(1e-30).log()).sum().item()
    assert 1.5 < bigram_loss(train.bytes, val.bytes) < entropy


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    write(tmp_path, a_txt=bytes(100))
    with pytest.raises(TPError, match=r"`seq_len=20` needs 21 bytes, and the 'val' split has 10 of the 100"):
        ByteText(tmp_path, 20, "val")
    with pytest.raises(TPError, match="split='test'"):
        ByteText(tmp_path, 4, "test")  # type: ignore[arg-type]
    with pytest.raises(TPError, match="no file below"):
        ByteText(tmp_path, 4, pattern="*.py")
    with pytest.raises(TPError, match="there is no"):
        ByteText(tmp_path / "missing", 4)
    with pytest.raises(TPError, match="`stride=0`"):
        ByteText(tmp_path, 4, stride=0)
    with pytest.raises(TPError, match="`val_bytes` has 1 bytes"):
        bigram_loss(b"abc", b"a")
    with pytest.raises(TPError, match="smoothing"):
        bigram_loss(b"abc", b"abc", smoothing=[0.0])


def test_the_examples_of_the_docstrings() -> None:
    found = doctest.testmod(examples_text)
    assert found.attempted and not found.failed
