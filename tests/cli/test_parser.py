"""Usage errors are one line, and the help explains every option."""

from __future__ import annotations

import pytest

from lightning_tp.cli.main import main, make_parser


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--help"),
        (["plann", "x"], "invalid choice: 'plann'"),
        (["plan", "x", "--tp", "two"], "argument --tp: invalid int value: 'two'"),
        (["estimate", "x", "--precison", "fp4"], "unrecognized arguments: `--precison fp4`, did you mean `--precision`?"),
        (["plan", "x", "--emit-pyton", "-"], "unrecognized arguments: `--emit-pyton -`, did you mean `--emit-python`?"),
        (["estimate", "x", "--activation-checkpointing", "full"], "invalid choice: 'full'"),
        (["tune", "x", "--gpus", "8"], "required: --global-batch. See `lightning-tp tune --help`"),
    ],
)
def test_a_mistake_in_the_options_is_one_line(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    out, err = capsys.readouterr()
    assert left.value.code == 2 and not out
    assert err.startswith("lightning-tp: ") and err.count("\n") == 1 and says in err


@pytest.mark.parametrize("command", ["plan", "verify", "estimate", "tune", "export", "consolidate", "inspect"])
def test_help_explains_every_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    out = capsys.readouterr().out
    assert f"\nexamples:\n  lightning-tp {command} " in out and "exit status: 0 success" in out
    assert ("TARGET is one of" in out) == (command not in ("export", "consolidate", "inspect"))
    parser = (
        make_parser()
        .parse_args(
            [
                command,
                *{"tune": ["x", "--gpus", "1", "--global-batch", "1"], "export": ["a", "b"]}.get(
                    command, ["a", "b"] if command == "consolidate" else ["x"]
                ),
            ]
        )
        .parser
    )
    for action in parser._actions:
        assert action.help and len(action.help) > 3, action.dest
        if isinstance(action.default, (int, float, str)) and not isinstance(action.default, bool) and action.dest != "help":
            assert "%(default)" in action.help, action.dest
