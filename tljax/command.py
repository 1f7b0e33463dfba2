"""A command's two ends: its flags, and how it exits when something goes wrong."""

import os
import re
import sys
import traceback
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from tljax import cluster, stores
from tljax.config import flatten
from tljax.errors import UserError, nearest

HELP = {"--help", "-h", "--helpfull"}

# Before epath first looks for TensorFlow, which takes seconds to import, and reads no s3:// by itself.
os.environ.setdefault("EPATH_USE_TF", "false")


def help_if_asked(description: str, config: bool = True, rest: str = "", **more: str) -> None:
    """Prints what `from_command_line` would for `--help`, and exits, where the command line asks for it.

    For the top of a command's module: its other imports take seconds.
    """
    if HELP & set(sys.argv[1:]):
        print(_help(description, config, rest, more))
        raise SystemExit(0)


def from_command_line(argv: list[str], description: str, config: bool = True, **more: str) -> flags.FlagValues:
    """Parses flags: `--config=FILE[:ARGUMENTS] --config.FIELD=VALUE` if `config`, and those in `more` ({name: help}).

    `description` may be a module's docstring, of which `--help` shows the first paragraph.
    Returns the values: `.config`, one attribute a flag ("" where not given), and `.rest`, what is no flag, where
    `more` has `rest`. Raises UserError.
    """
    values = flags.FlagValues()
    rest_help = more.pop("rest", None)
    for name, text in more.items():
        flags.DEFINE_string(name, "", text, flag_values=values)
    if HELP & set(argv):
        print(_help(description, config, rest_help, more))
        raise SystemExit(0)
    given = ""
    if config:
        config_flags.DEFINE_config_file(
            "config", help_string="config file", flag_values=values, sys_argv=["tljax", *argv]
        )
        given = _config_file(argv)
        # The library executes every file into this one module: what an earlier file defined must not linger.
        sys.modules.pop("config_config", None)
    try:
        rest = values(["tljax", *argv])[1:]
        if rest and rest_help is None:
            raise UserError(f"unexpected argument {rest[0]!r}: flags are written --name=value")
        if config and not isinstance(values.config, ConfigDict):
            raise UserError(f"{given} has no function get_config() that returns a ConfigDict")
    except (AttributeError, KeyError) as error:  # an override of a field that does not exist
        raise _unknown_field(argv, given) or UserError(f"{given}: {_one_line(error)}") from error
    except flags.Error as error:
        raise UserError(_one_line(error)) from error
    except UserError:
        raise
    except Exception as error:  # whatever the config file does
        raise UserError(f"{given}: {type(error).__name__}: {_one_line(error)}") from error
    if rest_help is not None:
        flags.DEFINE_list("rest", rest, rest_help, flag_values=values)
        values(["tljax"])
    return values


def _help(description: str, config: bool, rest: str | None, more: dict[str, str]) -> str:
    lines = [description.split("\n\n")[0].strip(), "", "Flags:"]
    if config:
        lines += ["  --config=FILE[:ARGUMENTS]  an experiment, see configs/"]
        lines += ["  --config.FIELD=VALUE       changes a field of it, as --config.optim.lr=3e-4"]
    lines += [f"  {'--' + name + '=…':<25}  {text}" for name, text in more.items()]
    return "\n".join(lines + ([f"  {'…':<25}  {rest}"] if rest else []))


def _config_file(argv: list[str]) -> str:
    given = [a.split("=", 1)[1] for a in argv if re.match(r"--?config=", a)]
    if not given:
        raise UserError("no --config: give an experiment, as --config=configs/partial.py")
    file = Path(given[-1].split(":")[0])
    if not file.is_file():
        there = [str(p) for p in sorted(file.parent.glob("*.py"))]
        raise UserError(f"no config file {str(file)!r}{nearest(str(file), there)}")
    return given[-1]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _unknown_field(argv: list[str], given: str) -> UserError | None:
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=["tljax"])  # not the overrides
    try:
        values(["tljax", f"--config={given}"])
        fields = flatten(values.config)
    except Exception:
        return None
    for name in re.findall(r"--?config\.([\w.]+)", "\n".join(argv)):
        if name not in fields:
            return UserError(f"unknown config field {name!r}{nearest(name, fields)}")
    return None


LOST = re.compile("closed by peer|connection (reset|refused)|socket closed", re.IGNORECASE)  # as gloo and JAX say it


def run(main) -> None:
    """Runs `main(argv)`. What the user can mend becomes one line on stderr and exit code 2; Ctrl-C, 130."""
    # What the libraries' C++ threads cannot raise, Python prints; it reaches us as an exception of theirs anyway.
    sys.unraisablehook = lambda *_: None
    try:
        code = main(sys.argv[1:])
    except KeyboardInterrupt:
        cluster.failing()
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        _fail(130, "interrupted")
    except Exception as error:
        cluster.failing(error)
        line = explained(error)
        if line is None:
            traceback.print_exc()
            _fail(1, f"{type(error).__name__}: {_one_line(error)[:200]}")
        sys.stderr.write(f"error: {line}\n")  # in one piece, where several processes write
        _fail(cluster.RESTART if _lost(error) else 2, line)
    cluster.leave()
    sys.stdout.flush()
    raise SystemExit(code)


def explained(error: Exception) -> str | None:
    """The one line for what the user, not the code, must mend: bad input, the file system, memory; else None."""
    if isinstance(error, UserError):
        return _one_line(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    short = type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in str(error)
    if short or isinstance(error, MemoryError):
        where = _one_line(error)[:200]
        return f"out of memory: {where}; try a smaller config.batch_size or a larger config.optim.accumulate"
    if stores.failed(error):
        return f"a store cannot be read or written ({stores.explained(error, '')})"
    if _lost(error):
        return f"another process of this run is gone; start all of them again ({_one_line(error)[:200]})"
    return None


def _lost(error: Exception) -> bool:
    return type(error).__name__ == "JaxRuntimeError" and bool(LOST.search(str(error)))


def _fail(code: int, line: str) -> None:
    """Exits; the other processes of a run are told why."""
    sys.stdout.flush()
    sys.stderr.flush()
    cluster.failed(code, line)
    raise SystemExit(code)
