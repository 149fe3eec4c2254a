"""`key=value` arguments checked against a dataclass, help as a table, and errors as one sentence.

    @dataclass(frozen=True)
    class Config:
        ipc: int = field(default=10, metadata={"help": "images per class", "unit": "images", "minimum": 1})

    def main(argv: list[str]) -> None:
        config = parse(Config, argv, prog="python methods/dm.py", description="Distribution matching.")

    if __name__ == "__main__":
        sys.exit(guard(main, sys.argv[1:]))

Metadata of a field, all optional: help, unit, choices (tuple), minimum (number), source (where a default comes from).
Types: bool, int, float, str, tuples and lists of these (`seeds=0,1,2`; nothing after the `=` is the empty one), and
each of them or None (`budget=none`). A field without a default must be given.
"""

import math
import os
import select
import sys
import textwrap
import traceback
import types
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from difflib import get_close_matches
from functools import reduce
from operator import or_
from typing import TypeVar, Union, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

Config = TypeVar("Config")

HELP = ("help", "--help", "-h")
WIDTH = 100  # columns of the help table
LONGEST = 30  # characters of a default that has a column
BOOLEANS = ("true", "false", "yes", "no", "on", "off", "1", "0")
KINDS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}


class UsageError(ValueError):
    """A wrong key or value on the command line: exit status 2."""


class HelpShown(Exception):
    """Help was asked for and has been printed."""


def parse(config_class: type[Config], argv: list[str], *, prog: str, description: str) -> Config:
    """An instance of `config_class` from arguments such as `["ipc=10", "seeds=0,1"]`.

    UsageError for a key that is unknown, missing or given twice, a value of the wrong type, below the minimum or not
    among the choices, and for whatever ValueError the class itself raises. Raises HelpShown after printing the help.
    """
    if any(argument in HELP for argument in argv):
        print(help_text(config_class, prog=prog, description=description))
        raise HelpShown
    known = {item.name: item for item in fields(config_class)}
    texts: dict[str, str] = {}
    for argument in argv:
        key, equals, text = argument.partition("=")
        if not equals:
            raise UsageError(f"argument '{argument}' is not of the form key=value; keys: {', '.join(known)}")
        if key not in known:
            raise UsageError(f"unknown key '{key}'{_nearest(key, known)}; allowed: {', '.join(known)}")
        if key in texts:
            raise UsageError(f"key '{key}' is given twice: {texts[key]!r} and {text!r}")
        texts[key] = text
    for key, item in known.items():
        if key not in texts and item.default is MISSING and item.default_factory is MISSING:
            raise UsageError(f"key '{key}' must be given: {key}=<{_kind(_hint(config_class, key))}>")
    values = {key: _value(config_class, known[key], text) for key, text in texts.items()}
    try:
        return config_class(**values)
    except ValueError as error:
        raise UsageError(str(error)) from error


def no_arguments(argv: list[str], *, prog: str, description: str) -> None:
    """For commands without settings: UsageError for any argument. Raises HelpShown after printing the help."""
    if any(argument in HELP for argument in argv):
        print(f"usage: {prog}\n\n{textwrap.fill(description, WIDTH)}")
        raise HelpShown
    if argv:
        raise UsageError(f"{' '.join(argv)!r} is unknown; {prog} takes no arguments")


def guard(main: Callable[[list[str]], None], argv: list[str]) -> int:
    """Runs `main(argv)` and returns the exit status: 0 done or help shown, 2 wrong usage, 1 failed, 130 interrupted.

    UsageError, ValueError, OSError and RuntimeError become one sentence on stderr; `debug=true` among the arguments,
    or DD_DEBUG=1 in the environment, prints the traceback before it. Other exceptions are bugs and pass through.
    141, without a word: whoever read the output has gone, as `| head` does.
    """
    status = _status(main, argv)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        status = 141
    if status == 141:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python flushes once more, and complains
    return status


def _status(main: Callable[[list[str]], None], argv: list[str]) -> int:
    debug = "debug=true" in argv or os.environ.get("DD_DEBUG") == "1"
    try:
        main([argument for argument in argv if argument not in ("debug=true", "debug=false")])
        return 0
    except HelpShown:
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
        if isinstance(error, BrokenPipeError) and _reader_has_gone():
            return 141
        if debug:
            traceback.print_exc()
        print(f"error: {_sentence(error)}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def _reader_has_gone() -> bool:
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # no poll on this system, or no file behind stdout
        return False


def help_text(config_class: type, *, prog: str, description: str) -> str:
    """Every field with its default, unit, meaning and allowed values, one line each where 100 columns hold it."""
    rows = [("key", "default", "unit", "meaning")]
    for item in fields(config_class):
        default, meaning = _shown_default(item), _meaning(config_class, item)
        if len(default) > LONGEST:  # one that would push all meanings out of the terminal
            default, meaning = "(long)", f"{meaning}; default: {default}"
        rows.append((item.name, default, item.metadata.get("unit") or "", meaning))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [f"usage: {prog} key=value ...", "", *textwrap.wrap(description, WIDTH), ""]
    for *cells, meaning in rows:
        start = "  " + "".join(f"{cell:<{width}}  " for cell, width in zip(cells, widths, strict=True))
        pieces = textwrap.wrap(meaning, max(WIDTH - len(start), 30), break_on_hyphens=False) or [""]
        lines += [(start + pieces[0]).rstrip(), *(" " * len(start) + piece for piece in pieces[1:])]
    if any(item.metadata.get("source") for item in fields(config_class)):
        lines += ["", "In [brackets]: where a default comes from."]
    return "\n".join([*lines, "", "debug=true prints the traceback of an error."])


def _value(config_class: type, item: Field, text: str) -> object:
    """The text of one argument as the type of its field, checked against choices and minimum."""
    hint = _hint(config_class, item.name)
    inner, optional = _without_none(hint)
    if optional and text.lower() in ("none", "null"):
        return None
    sequence = get_origin(inner) in (tuple, list)
    pieces = [piece.strip() for piece in text.split(",")] if text.strip() else []
    element = get_args(inner)[0] if sequence else inner
    wrong = UsageError(f"{item.name}={text}: not {_kind(hint)}")
    for piece in pieces if sequence else [text]:
        if "${" in piece or piece == "???" or (element is bool and piece.lower() not in BOOLEANS):
            raise wrong
    typed = OmegaConf.structured(config_class)
    OmegaConf.set_readonly(typed, False)
    try:
        OmegaConf.update(typed, item.name, pieces if sequence else text)
    except OmegaConfBaseException:
        raise wrong from None
    value = typed[item.name]
    if sequence:
        value = get_origin(inner)(value)
    _check(item, text, value if sequence else [value], wrong)
    return value


def _check(item: Field, text: str, values: list, wrong: UsageError) -> None:
    choices, minimum = item.metadata.get("choices"), item.metadata.get("minimum")
    for value in values:
        if isinstance(value, float) and not math.isfinite(value):
            raise wrong
        if choices and value not in choices:
            near = _nearest(value, choices)
            raise UsageError(f"{item.name}={text}: '{value}' is not allowed{near}; allowed: {_listed(choices)}")
        if minimum is not None and value < minimum:
            raise UsageError(f"{item.name}={text}: must be at least {minimum}")


def _hint(config_class: type, name: str) -> object:
    return get_type_hints(config_class)[name]


def _without_none(hint: object) -> tuple[object, bool]:
    """(int, True) for Optional[int] and `int | None`, (int, False) for int."""
    if get_origin(hint) not in (Union, types.UnionType):
        return hint, False
    rest = tuple(part for part in get_args(hint) if part is not types.NoneType)
    return reduce(or_, rest), len(rest) < len(get_args(hint))


def _kind(hint: object) -> str:
    """A type in words, for messages and help."""
    inner, optional = _without_none(hint)
    if get_origin(inner) in (tuple, list):
        words = "a comma-separated list, each " + _kind(get_args(inner)[0])
    else:
        words = KINDS.get(inner, str(inner))
    return f"{words}, or none" if optional else words


def _listed(choices: tuple) -> str:
    """The choices in one line, without the empty one, which the help text of its field explains."""
    return ", ".join(str(choice) for choice in choices if choice != "")


def _nearest(word: object, allowed) -> str:
    """` (did you mean 'x'?)` where something allowed resembles the word, else nothing."""
    near = get_close_matches(str(word), map(str, allowed), n=1, cutoff=0.5)
    return f" (did you mean '{near[0]}'?)" if near else ""


def _shown_default(item: Field) -> str:
    default = item.default if item.default_factory is MISSING else item.default_factory()
    if default is MISSING:
        return "(required)"
    if isinstance(default, (tuple, list)):
        choices = item.metadata.get("choices", ())
        return "(all)" if len(choices) > 1 and tuple(default) == tuple(choices) else ",".join(map(str, default))
    return str(default).lower() if default is None or isinstance(default, bool) else str(default)


def _meaning(config_class: type, item: Field) -> str:
    facts = item.metadata
    words = facts.get("help") or _kind(_hint(config_class, item.name))
    if facts.get("choices"):
        words += f"; one of {_listed(facts['choices'])}"
    if facts.get("minimum") is not None:
        words += f" (at least {facts['minimum']})"
    return words + (f" [{facts['source']}]" if facts.get("source") else "")


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
