"""tljax: transfer learning in JAX, where freezing is data.

For a training loop of one's own: `plan = tljax.build(rules, params)`, then `plan.split`, `plan.merge`,
`plan.live`, and `tljax.freeze(optimizer, plan)`. They serve any pytree of parameters.
"""

import importlib
import time

STARTED = time.perf_counter()  # as near to the command as Python code comes: for the time to the first step
_HOMES = {"Plan": "plan", "build": "plan", "freeze": "optim", "lint": "leaks", "scales": "optim"}
__all__ = ["STARTED", "Plan", "build", "freeze", "lint", "scales"]


def __getattr__(name: str):
    # Late, so that `import tljax` costs nothing and `python -m tljax.plan` finds its module not yet imported.
    if name in _HOMES:
        return getattr(importlib.import_module(f"tljax.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'tljax' has no attribute {name!r}")
