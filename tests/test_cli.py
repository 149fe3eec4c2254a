"""Arguments: every wrong one is refused with what is allowed, every right one arrives as typed."""

import math
import os
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Optional

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.cli import HelpShown, UsageError, guard, help_text, no_arguments, parse

CALM = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy


@dataclass(frozen=True)
class Config:
    dataset: str = field(metadata={"help": "name of the data set", "choices": ("digits", "cifar10", "imagenette")})
    ipc: int = field(default=10, metadata={"help": "images per class", "unit": "images", "minimum": 1})
    rate: float = field(default=0.25, metadata={"help": "learning rate of the images, Adam", "minimum": 0,
                                                "source": "paper, appendix B, Table 9, second row of the lower half"})
    resume: bool = field(default=True, metadata={"help": "continue a killed run"})
    seeds: tuple[int, ...] = field(default=(0, 1, 2), metadata={"help": "one student each", "minimum": 0})
    only: list[str] = field(default_factory=list, metadata={"help": "cells to run"})
    losses: tuple[str, ...] = field(default=("ce",), metadata={"choices": ("ce", "bn")})
    budget: float | None = field(default=None, metadata={"help": "stop before", "unit": "hours", "minimum": 0.1})
    layer: Optional[int] = None  # noqa: UP045 - both spellings are in use
    sizes: tuple[int, ...] | None = None
    out: str = "runs"

    def __post_init__(self):
        if self.out == "/":
            raise ValueError("out=/ is not a folder to fill")


def read(*arguments: str) -> Config:
    return parse(Config, ["dataset=digits", *arguments], prog="python x.py", description="A test.")


def test_defaults_and_every_type():
    assert read() == Config("digits")
    config = read("ipc=3", "rate=1e-3", "resume=false", "seeds=4, 5", "only=table1,table2", "losses=bn,ce", "budget=2",
                  "layer=7", "sizes=32,64", "out=a=b, c")
    assert config == Config("digits", 3, 0.001, False, (4, 5), ["table1", "table2"], ("bn", "ce"), 2.0, 7, (32, 64),
                            "a=b, c")
    assert type(config.budget) is float and type(config.seeds) is tuple and type(config.only) is list


def test_a_command_without_settings_shows_its_help_and_refuses_the_rest(capsys):
    facts = {"prog": "python -m x", "description": "Writes a page."}
    assert no_arguments([], **facts) is None
    with pytest.raises(UsageError, match="'a=1' is unknown; python -m x takes no arguments"):
        no_arguments(["a=1"], **facts)
    assert guard(lambda argv: no_arguments(argv, **facts), ["--help"]) == 0
    assert capsys.readouterr().out == "usage: python -m x\n\nWrites a page.\n"


def test_none_and_empty():
    config = read("budget=none", "layer=null", "sizes=None", "seeds=", "only=", "out=")
    assert (config.budget, config.layer, config.sizes) == (None, None, None)
    assert (config.seeds, config.only, config.out) == ((), [], "")
    assert read("out=none").out == "none" and read("only=none").only == ["none"]  # not optional: just words


@pytest.mark.parametrize("argument, words", [
    ("ipcs=3", r"unknown key 'ipcs' \(did you mean 'ipc'\?\); allowed: dataset, ipc, rate"),
    ("zzz=3", r"unknown key 'zzz'; allowed: dataset, ipc"),
    ("--ipc=3", r"unknown key '--ipc' \(did you mean 'ipc'\?\)"),
    ("ipc", r"'ipc' is not of the form key=value"),
    ("ipc=ten", r"ipc=ten: not a whole number"),
    ("ipc=1.0", r"ipc=1.0: not a whole number"),
    ("ipc=", r"ipc=: not a whole number"),
    ("ipc=none", r"ipc=none: not a whole number"),
    ("ipc=0", r"ipc=0: must be at least 1"),
    ("ipc=-3", r"ipc=-3: must be at least 1"),
    ("rate=fast", r"rate=fast: not a finite number"),
    ("rate=nan", r"rate=nan: not a finite number"),
    ("rate=inf", r"rate=inf: not a finite number"),
    ("rate=-0.5", r"rate=-0.5: must be at least 0"),
    ("resume=maybe", r"resume=maybe: not true or false"),
    ("resume=2", r"resume=2: not true or false"),
    ("seeds=1,x", r"seeds=1,x: not a comma-separated list, each a whole number"),
    ("seeds=1,,2", r"seeds=1,,2: not a comma-separated list"),
    ("seeds=1,-2", r"seeds=1,-2: must be at least 0"),
    ("losses=ce,bm", r"losses=ce,bm: 'bm' is not allowed \(did you mean 'bn'\?\); allowed: ce, bn"),
    ("budget=0", r"budget=0: must be at least 0.1"),
    ("layer=top", r"layer=top: not a whole number, or none"),
    ("out=${ipc}", r"out=\$\{ipc\}: not text"),
    ("out=/", r"out=/ is not a folder to fill"),
    ("dataset=digits", r"'dataset' is given twice: 'digits' and 'digits'"),
])
def test_wrong_arguments_are_named_with_what_is_allowed(argument, words):
    with pytest.raises(UsageError, match=f"^{words}" if not words.startswith("'") else words):
        read(argument)


def test_required_and_choice():
    with pytest.raises(UsageError, match="'dataset' must be given"):
        parse(Config, [], prog="x", description="")
    with pytest.raises(UsageError, match=r"'cifar' is not allowed \(did you mean 'cifar10'\?\); allowed: digits, c"):
        parse(Config, ["dataset=cifar"], prog="x", description="")


def test_help_is_a_table_of_at_most_100_columns(capsys):
    for word in ("help", "--help", "-h"):
        with pytest.raises(HelpShown):
            read("ipc=wrong", word)
    text = help_text(Config, prog="python x.py", description="A test. " * 30)
    assert "  ipc      10          images" in capsys.readouterr().out
    lines = text.splitlines()
    assert lines[0] == "usage: python x.py key=value ..." and max(map(len, lines)) <= 100
    row = {line.split()[0]: line for line in lines if line.startswith("  ") and line[2] != " "}
    assert row["ipc"].split() == ["ipc", "10", "images", "images", "per", "class", "(at", "least", "1)"]
    assert "digits, cifar10, imagenette" in row["dataset"] and "(required)" in row["dataset"]
    assert row["seeds"].split()[1] == "0,1,2" and row["budget"].split()[1:3] == ["none", "hours"]
    assert row["layer"].endswith("a whole number, or none") and row["resume"].split()[1] == "true"
    assert "second row of the lower half]" in " ".join(text.split())  # a long meaning is wrapped, not cut


@CALM
@given(st.integers(1), st.floats(0, allow_infinity=False), st.lists(st.integers(0)), st.booleans())
def test_numbers_arrive_exactly(ipc, rate, seeds, resume):
    config = read(f"ipc={ipc}", f"rate={rate!r}", f"seeds={','.join(map(str, seeds))}", f"resume={resume}")
    assert (config.ipc, config.rate, config.seeds, config.resume) == (ipc, rate, tuple(seeds), resume)


@CALM
@given(st.text().filter(lambda text: "${" not in text and text not in ("???", "/")))
def test_text_arrives_unchanged(text):
    assert read(f"out={text}").out == text


@CALM
@given(st.lists(st.text(st.characters(blacklist_characters=",", blacklist_categories=["Cs"]), min_size=1)
                .map(str.strip).filter(lambda text: text and "${" not in text and text != "???")))
def test_lists_of_text_arrive_unchanged(words):
    assert read(f"only={','.join(words)}").only == words


@CALM
@given(st.sampled_from(["ipc", "rate", "resume", "seeds", "losses", "budget", "layer", "sizes", "out"]), st.text())
def test_any_text_gives_the_declared_type_or_a_usage_error(key, text):
    try:
        value = getattr(read(f"{key}={text}"), key)
    except UsageError as error:
        assert str(error).startswith(f"{key}={text}") and len(str(error)) > len(f"{key}={text}")
        return
    kinds = {"ipc": int, "rate": float, "resume": bool, "seeds": tuple, "losses": tuple, "out": str}
    assert isinstance(value, kinds.get(key, (int, float, tuple, type(None))))
    assert not (isinstance(value, float) and math.isnan(value))


@pytest.mark.parametrize("error, status, words", [
    (None, 0, ""),
    (HelpShown(), 0, ""),
    (UsageError("unknown key 'x'"), 2, "error: unknown key 'x'\n"),
    (ValueError("teacher has 10 classes, not 5\nmore"), 1, "error: teacher has 10 classes, not 5\n"),
    (FileNotFoundError(2, "No such file or directory", "a.pt"), 1, "error: a.pt: No such file or directory\n"),
    (OSError("cannot write runs/x: full"), 1, "error: cannot write runs/x: full\n"),
    (RuntimeError(), 1, "error: RuntimeError\n"),
    (FloatingPointError("the loss is nan at step 7"), 1, "error: the loss is nan at step 7\n"),
    (KeyboardInterrupt(), 130, "interrupted\n"),
])
def test_guard_says_one_sentence(capsys, monkeypatch, error, status, words):
    monkeypatch.delenv("DD_DEBUG", raising=False)

    def main(argv: list[str]) -> None:
        assert argv == ["ipc=1"]  # debug= is the guard's own
        if error is not None:
            raise error

    assert guard(main, ["ipc=1"]) == status
    assert capsys.readouterr().err == words
    assert guard(main, ["ipc=1", "debug=true"]) == status
    said = capsys.readouterr().err
    assert said.endswith(words) and ("Traceback" in said) == (status in (1, 2))
    monkeypatch.setenv("DD_DEBUG", "1")
    guard(main, ["ipc=1"])
    assert ("Traceback" in capsys.readouterr().err) == ("Traceback" in said)


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("length", [10, 10**6])
def test_a_reader_that_has_gone_is_no_error(length, buffered):
    code = f"import sys; from common.cli import guard; sys.exit(guard(lambda a: print('x' * {length}), []))"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    if not buffered:
        environment["PYTHONUNBUFFERED"] = "1"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 141


def test_another_broken_pipe_is_an_error(capsys):
    def main(argv):
        raise BrokenPipeError("a worker has gone")

    assert guard(main, []) == 1
    assert "a worker has gone" in capsys.readouterr().err


def test_guard_lets_bugs_through():
    with pytest.raises(KeyError):
        guard(lambda argv: {}["bug"], [])
