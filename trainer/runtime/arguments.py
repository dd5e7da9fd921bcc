"""Typed dataclasses as command lines: a field is a flag, with its help and its default.

Imports nothing heavy: `--help` and mistakes in the flags answer before torch is loaded.
"""

import argparse
import dataclasses
import difflib
import importlib.util
import sys
import traceback
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING, field
from pathlib import Path
from typing import Any, NoReturn

from model.files import forgive_text
from trainer.runtime import threads  # noqa: F401  before torch is loaded
from trainer.runtime.foreign_flags import explanation

ROOT = Path(__file__).resolve().parents[2]


def arg(
    default: Any,
    help: str,
    choices: list | None = None,
    nargs: str = "+",
    aliases: tuple[str, ...] = (),
    positional: bool = False,
) -> Any:
    """A dataclass field that is also a flag; a list default is copied for each instance.

    nargs: of a list. positional: written without a flag's name, and required. aliases: other names
    that the flag is known by, without dashes. They are accepted and hidden. A dataclass that
    overrides the field inherits them; one that overrides it with a plain value, as in
    `epochs: int = 3`, inherits everything else.
    """
    metadata = {"help": help, "choices": choices, "nargs": nargs, "aliases": aliases}
    metadata["positional"] = positional
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def parse_bool(text: str) -> bool:
    """True or False from 1, true, yes, on and their opposites."""
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(
        f"{text!r} is neither yes nor no: write 1 or 0, or only the flag"
    )


def flags_of(cls: type) -> dict[str, dict[str, Any]]:
    """{flag: "help", "choices", "nargs", "aliases"} of a dataclass, with what its bases gave."""
    found: dict[str, dict[str, Any]] = {}
    for base in reversed(cls.__mro__):
        for one in base.__dict__.get("__dataclass_fields__", {}).values():
            before = found.get(one.name, {"aliases": ()})
            aliases = dict.fromkeys([*before["aliases"], *one.metadata.get("aliases", ())])
            found[one.name] = {**before, **one.metadata, "aliases": tuple(aliases)}
    for flag in found.values():
        flag["aliases"] = tuple(alias for alias in flag["aliases"] if alias not in found)
    return found


def with_new_names(cls: type, arguments: dict) -> dict:
    """The arguments that an older version wrote, under the names that the flags have now."""
    new = {alias: name for name, flag in flags_of(cls).items() for alias in flag["aliases"]}
    return {new.get(name, name): value for name, value in arguments.items()}


class _Parser(argparse.ArgumentParser):
    """Takes flags by their whole names alone, and names the nearest ones for an unknown one."""

    def error(self, message: str) -> NoReturn:
        words = message.removeprefix("unrecognized arguments: ").split()
        unknown = [word.split("=")[0] for word in words if word.startswith("--")]
        if not message.startswith("unrecognized arguments: ") or not unknown:
            super().error(message)
        shown = [action for action in self._actions if action.help != argparse.SUPPRESS]
        known = [name for action in shown for name in action.option_strings]
        texts = {word: explanation(_bare(word), set(known)) for word in unknown}
        if any(texts.values()):
            listed = (f"{word} is not a flag here: {text}" for word, text in texts.items() if text)
            super().error("; ".join(listed))
        near = self.nearest(unknown[0], known)
        super().error(message + (f"; did you mean {' or '.join(near)}?" if near else ""))

    def nearest(self, unknown: str, known: list[str]) -> list[str]:
        """At most two flags that an unknown one may stand for; known: those of --help."""
        spelled = f"--{_bare(unknown)}"
        same = [f"--{one.dest}" for one in self._actions if spelled in one.option_strings]
        begins = [name for name in known if name.startswith(unknown)]
        similar = difflib.get_close_matches(spelled, known, cutoff=0.75)
        return same or list(dict.fromkeys([*similar, *begins]))[:2]


def _bare(flag: str) -> str:
    """The name of a flag that may be written with dashes in it: --batch-size is batch_size."""
    return flag.removeprefix("--").replace("-", "_")


class _Store(argparse.Action):
    """Stores a value; an error if the same flag was given before under another name."""

    def __call__(self, parser, namespace, values, option_string=None):
        names = namespace.__dict__.setdefault("_names", {})
        before = names.setdefault(self.dest, option_string)
        if before != option_string:
            parser.error(f"{before} and {option_string} are the same flag: leave one of them out")
        setattr(namespace, self.dest, values)


def parse_command(
    commands: dict[str, type], about: str, argv: Sequence[str] | None = None
) -> tuple[str, Any]:
    """(name, `parse_args` of its dataclass) of a command line whose first word names a command.

    Without any word the error shows the first command of `about`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(
        allow_abbrev=False,
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s COMMAND ...   (COMMAND --help lists its flags)",
    )
    parser.add_argument("command", choices=list(commands), metavar="|".join(commands))
    if not argv:
        example = next(line.strip() for line in about.splitlines() if ".py " in line)
        parser.error(f"which command, {', '.join(commands)}? For example: {example}")
    name = parser.parse_args(argv[:1]).command
    return name, parse_args(commands[name], argv[1:], name)


def parse_args(cls: type, argv: Sequence[str] | None = None, command: str = "") -> Any:
    """Fill the dataclass `cls` from the command line (default: this process's), then `check()` it.

    command: the word before its flags, of a program with several commands. Switches work as
    `--flag`, `--flag 1` and `--flag 0`. `given` on the result is the set of flags that were
    written. A mistake, in the syntax or found by `check` (ValueError), ends the program with status
    2 and says what to change.
    """
    places = [name.upper() for name, flag in flags_of(cls).items() if flag.get("positional")]
    parser = _Parser(
        allow_abbrev=False,
        description=sys.modules[cls.__module__].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=" ".join(["%(prog)s", *places, "[--flag value ...]   (--help lists the flags)"]),
        prog=f"{Path(sys.argv[0]).name} {command}" if command else None,
    )
    hints, flags = typing.get_type_hints(cls), flags_of(cls)
    for one in dataclasses.fields(cls):
        kind, flag = hints[one.name], flags[one.name]
        options = {"choices": flag["choices"], "dest": one.name, "action": _Store}
        if isinstance(kind, types.UnionType):  # int | None: the flag takes an int
            kind = next(part for part in kind.__args__ if part is not type(None))
        if kind is bool:
            kind, options = parse_bool, options | {"nargs": "?", "const": True}
        elif typing.get_origin(kind) is list:
            kind, options = kind.__args__[0], options | {"nargs": flag["nargs"]}
        options |= {"type": kind, "default": argparse.SUPPRESS}
        if flag.get("positional"):
            del options["dest"]
            parser.add_argument(one.name, help=_help(one, flag["help"]), **options)
            continue
        parser.add_argument(f"--{one.name}", help=_help(one, flag["help"]), **options)
        for alias in flag["aliases"]:
            parser.add_argument(f"--{alias}", help=argparse.SUPPRESS, **options)
    given = vars(parser.parse_args(argv))
    given.pop("_names", None)
    args = cls(**given)
    args.given = set(given)
    try:
        getattr(args, "check", lambda: None)()
    except ValueError as error:
        parser.error(str(error))
    return args


def _help(one: dataclasses.Field, text: str) -> str:
    default = one.default if one.default is not MISSING else one.default_factory()
    shown = " ".join(map(str, default)) if isinstance(default, list) else default
    note = "" if shown in (None, "") else f" (default: {shown})"
    return (text + note).replace("%", "%%").replace(f"{ROOT}/", "")


def check_flags(cls: type, module_name: str) -> None:
    """Parse the command line at once if the module of that name runs as the program.

    A script calls it before its heavy imports: `--help` and mistakes then answer immediately.
    """
    if module_name == "__main__":
        forgive_text()
        sys.excepthook = without_traceback_of_interrupts
        parse_args(cls)


def without_traceback_of_interrupts(
    kind: type[BaseException], error: BaseException, trace: types.TracebackType | None
) -> None:
    """Ctrl-C while the heavy libraries load is no fault whose place matters."""
    if issubclass(kind, KeyboardInterrupt):
        print("\ninterrupted before anything was begun", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def check_positive(args: Any, *names: str) -> None:
    """ValueError unless each of these flags is above 0, or None."""
    for name in names:
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            raise ValueError(f"--{name} {getattr(args, name)}: give more than 0")


def check_not_negative(args: Any, *names: str) -> None:
    """ValueError unless each of these flags is 0 or more, or None."""
    for name in names:
        if getattr(args, name) is not None and not getattr(args, name) >= 0:
            raise ValueError(f"--{name} {getattr(args, name)}: give 0 or more")


def check_ratio(args: Any, *names: str) -> None:
    """ValueError unless each of these flags is a ratio from 0 to 1."""
    for name in names:
        if not 0 <= getattr(args, name) <= 1:
            raise ValueError(f"--{name} {getattr(args, name)}: give a ratio from 0 to 1")


def check_installed(flag: str, package: str, wanted: str | None = None) -> None:
    """ValueError unless the package that the flag needs is there; wanted: what to give pip.

    Imports nothing.
    """
    known = (
        sys.modules.get(package) if package in sys.modules else importlib.util.find_spec(package)
    )
    if known is None:
        raise ValueError(
            f"{flag} needs a package that is not installed: "
            f"python -m pip install {wanted or package}"
        )


def command(main: Callable[[], object]) -> None:
    """Run `main()` as a program: a user's mistake ends it with one line, a bug with a traceback.

    The user's mistakes are the errors that this project raises itself: ValueError, OSError,
    ImportError, FloatingPointError and MemoryError with a message of ours.
    """
    forgive_text()
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: everything saved is intact; --from_resume resumes a training run")
    except (ValueError, OSError, ImportError, FloatingPointError, MemoryError) as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
        if not raised_in.is_relative_to(ROOT) or "site-packages" in raised_in.parts:
            raise
        sys.exit(f"error: {error}")
