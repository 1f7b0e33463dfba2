"""A run's adapters as files: `python -m tljax.adapters --workdir=… --save=…`, or merged into plain weights."""

from tljax import command

USAGE = {
    "description": __doc__,
    "config": False,
    "workdir": "the run",
    "checkpoint": "best, last or a step (default: what config.select says)",
    "save": "a file for the adapters and what trained beside them",
    "merge": "a file for the whole plain weights",
}
if __name__ == "__main__":  # before what is slow to import
    command.help_if_asked(**USAGE)

from tljax import frozen_dtype, phases, plan
from tljax.adapters import files, merge
from tljax.errors import UserError
from tljax.evaluate import restore
from tljax.report import text
from tljax.report.console import Console, quiet_libraries
from tljax.workdir import Workdir


def main(argv: list[str]) -> int:
    """Writes a run's adapters, with its head, or its weights with the adapters folded in, as safetensors."""
    flags = command.from_command_line(argv, **USAGE)
    if not flags.workdir or not (flags.save or flags.merge):
        raise UserError("expected --workdir=RUN and --save=FILE or --merge=FILE")
    quiet_libraries()
    exp, layout, params, stats, notes = restore(Workdir(flags.workdir), flags.checkpoint)
    params, stats = layout.to_host((params, stats))
    params = frozen_dtype.widened(exp, params)
    adapters, console = getattr(exp.model, "adapters", ()), Console()
    values = plan.flat({"params": params, "batch_stats": stats})
    if flags.save:
        if not adapters:
            raise UserError(f"{flags.workdir} has no adapters: its strategy is {exp.config.strategy!r}")
        so_far = exp.in_time(notes["examples"])
        still = phases.never_trained(so_far[: phases.index(so_far, notes["step"]) + 1])
        kept = files.save(flags.save, adapters, values, [path for path in values if path not in still])
        console.print(f"{len(kept)} leaves, {text.size(sum(v.nbytes for v in kept.values()))}, in {flags.save}")
    if flags.merge:
        if adapters:
            values = plan.flat({"params": merge(exp.model, params), "batch_stats": stats})
        files.write(flags.merge, values, {"model": exp.config.model})
        console.print(f"{len(values)} leaves, {text.size(sum(v.nbytes for v in values.values()))}, in {flags.merge}")
    return 0


if __name__ == "__main__":
    command.run(main)
