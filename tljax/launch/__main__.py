"""Runs an experiment on other machines: `python -m tljax.launch tpu_vm --config=configs/partial.py … --dry-run`.

A target is a file of launch/: local, slurm, tpu_vm, skypilot, jobset, ray (for sweeps) or docker. `--dry-run` prints
what would run, filled in and checked; a manifest can be handed on as it is. See docs/launch.md.
"""

import sys

from tljax import command

FIRST = (
    "Runs an experiment on other machines: `python -m tljax.launch TARGET --config=… [--dry-run]`; targets: local, "
    "slurm, tpu_vm, skypilot, jobset, ray, docker. `TARGET --help` lists the settings of one (docs/launch.md)."
)

import os
import re
import shlex
import subprocess
from pathlib import Path

from tljax import config as configs
from tljax import grid
from tljax.errors import UserError, unknown
from tljax.launch import settings, templates
from tljax.launch.targets import TARGETS, Plan, Run, Target

DRY = ("--dry-run", "--dry_run", "-dry-run", "-dry_run")


def main(argv: list[str]) -> int:
    """Prints or does what a target does. Returns the exit code of the first step that fails, or 0."""
    name = next((a for a in argv if not a.startswith("-")), None)
    if name is None:
        if command.HELP & set(argv):
            print(FIRST)
            return 0
        raise UserError(f"no target: give one of {', '.join(TARGETS)} first, as `python -m tljax.launch local`")
    if name not in TARGETS:
        raise unknown("target", name, TARGETS)
    target, dry = TARGETS[name], any(a in DRY for a in argv)
    argv = [_whole(a, target) for a in argv if a not in DRY and a != name]
    given = command.from_command_line(
        argv, f"Target {name}: see the first lines of launch/, and docs/launch.md.", _needs_config(target, argv),
        workdir="the folder on this machine where the run ends up (default: runs/NAME-DIGEST)",
        name="of the run and of its machines (default: from the config)",
        **{flag: f"{s.help}{f' (default: {s.default})' if s.default else ''}" for flag, s in target.settings.items()},
    )  # fmt: skip
    values = settings.values(name, target.settings, {flag: getattr(given, flag) for flag in target.settings})
    run = _run(name, target, given, argv)
    plan = target.plan(values, run)
    for line in _header(name, plan, run, given, dry):
        print(f"# {line}" if dry else line)
    if dry:
        print(plan.manifest, end="")
        return 0
    return _do(plan)


def _whole(argument: str, target: Target) -> str:
    """An argument as `--name=value`: flags that are given alone are true. Raises UserError for others."""
    found = re.fullmatch(r"--?([\w.]+)", argument)
    if not found or argument in command.HELP:
        return argument
    setting = target.settings.get(found[1])
    if setting is not None and setting.read is settings.yes:
        return f"{argument}=true"
    raise UserError(f"{argument} has no value: flags are written --name=value")


def _needs_config(target: Target, argv: list[str]) -> bool:
    """Whether a config must be given: an image can be made without."""
    return not ("push" in target.settings and any(re.match("--?push=true", a, re.IGNORECASE) for a in argv))


def _run(name: str, target: Target, given, argv: list[str]) -> Run:
    """What is run, from the config and its overrides. Raises UserError where they are wrong."""
    if not _needs_config(target, argv):
        return Run("tljax", (), "")
    config = given.config
    if target.module == "sweep":
        grid.space(config)
    elif "sweep" in config:
        raise UserError(f"the config is a sweep's: that is for target ray, or for tljax.sweep --launch, not for {name}")
    else:
        configs.check(config)
    folder = f"{config.name}-{configs.digest(config)}"
    short = re.sub(r"[^a-z0-9]+", "-", config.name.lower()).strip("-")[:24].lstrip("0123456789-")
    called = given.name or f"{short or 'run'}-{configs.digest(config)}"
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,37}[a-z0-9])?", called):
        raise UserError(f"--name: {called!r}: expected up to 39 lower-case letters, digits, hyphens, a letter first")
    arguments = tuple(a for a in argv if re.match(r"--?config(\.|=)", a))
    if target.takes_source:
        arguments = tuple(_inside(a, templates.source(name), name) for a in arguments)
    return Run(called, arguments, given.workdir or f"runs/{folder}")


def _inside(argument: str, source: Path, target: str) -> str:
    """`--config=FILE` as it is called in the clone on the machines. Raises UserError where it is elsewhere."""
    found = re.fullmatch(r"--?config=([^:]*)(:.*)?", argument, re.DOTALL)
    if not found:
        return argument
    file = Path(found[1]).resolve()
    if not file.is_relative_to(source):
        raise UserError(f"--config = {found[1]!r}: {target} takes the files of {source} to its machines, not this one")
    return f"--config={file.relative_to(source)}{found[2] or ''}"


def _header(name: str, plan: Plan, run: Run, given, dry: bool) -> list[str]:
    """What is told before anything starts."""
    lines = [f"{name}: {plan.takes}"]
    place = str(given.config.data.source).partition(":")[2] if run.name != "tljax" and "config" in given else ""
    if place and "://" not in place and name not in ("local", "slurm") and given.config.data.source[:5] != "tfds:":
        lines.append(f"note: {place} (config.data.source) is a path, that must be there on each machine")
    if dry:
        if plan.file:
            lines.append(f"the manifest below, as {plan.file}:")
        for step in plan.steps:
            lines.append(str(step))
            if step.shows:
                lines += [f"  {line}" for line in _calls(step)]
    return lines + [f"{what}: {how}" for what, how in plan.later]


def _calls(step) -> list[str]:
    """The calls that a script would make, as it prints them."""
    environment = os.environ | dict(step.environment) | {"DRY_RUN": "1"}
    found = subprocess.run(step.command, env=environment, capture_output=True, text=True)
    if found.returncode:
        raise UserError(found.stderr.strip().removeprefix("error: ") or f"{step.command[0]} fails")
    return found.stdout.splitlines()


def _do(plan: Plan) -> int:
    """Runs the steps. Returns the exit code of the first that fails, or 0."""
    if plan.file:
        plan.file.parent.mkdir(parents=True, exist_ok=True)
        plan.file.write_text(plan.manifest)
    for step in plan.steps:
        print(f"$ {shlex.join(step.command)}", flush=True)
        try:
            process = subprocess.Popen(step.command, env=os.environ | dict(step.environment))
        except FileNotFoundError:
            raise UserError(f"{step.command[0]} is not there; --dry-run prints what it would be told") from None
        while True:
            try:
                code = process.wait()
                break
            except KeyboardInterrupt:  # which reaches the step as well: it says how it ends
                continue
        if code:
            print(f"{step.command[0]} ended with exit code {code}", file=sys.stderr)
            return code if code > 0 else 128 - code
    return 0


if __name__ == "__main__":
    command.run(main)
