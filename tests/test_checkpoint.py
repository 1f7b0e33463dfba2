"""Checkpoints: what comes back is what was saved; which are kept; what is refused."""

import socket

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import script

from tljax.checkpoint import Checkpoints
from tljax.errors import UserError
from tljax.step import State

STATE = State(
    step=jnp.int32(7),
    params={"stem": {"kernel": jnp.arange(6.0).reshape(2, 3)}, "head": {"bias": jnp.ones(3, jnp.bfloat16)}},
    stats={},
    optimizer=({"mu": {"stem": {"kernel": None}, "head": {"bias": jnp.ones(3)}}}, jnp.int32(7)),
    average=None,
)
LIKE = jax.eval_shape(lambda: STATE)


def test_a_state_with_absent_leaves_comes_back_bit_for_bit(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    notes = {"loss": 0.1 + 0.2, "classes": ["ä", "b"], "best": None}
    checkpoints.save(7, STATE, notes)
    checkpoints.wait()
    again = Checkpoints(tmp_path)
    assert again.latest() == 7
    assert again.notes(7) == notes
    restored = again.restore(7, LIKE)
    assert isinstance(restored, State)
    assert jax.tree.structure(restored) == jax.tree.structure(STATE)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(STATE)):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_the_best_and_the_last_two_are_kept_by_the_next_process_too(tmp_path):
    for steps in ((0, 1, 2), (3, 4, 5)):
        checkpoints = Checkpoints(tmp_path)
        for step in steps:
            checkpoints.save(step, STATE, {"step": step}, best=min(step, 1))
        checkpoints.close()
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps() == [1, 4, 5]
    checkpoints.save(5, STATE, {"again": True})  # the same step twice changes nothing
    checkpoints.wait()
    assert checkpoints.notes(5) == {"step": 5}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s._replace(params=s.params | {"tail": s.step}), "params/tail missing"),
        (lambda s: s._replace(params={"stem": s.params["stem"]}), "params/head/bias unexpected"),
        (
            lambda s: s._replace(params=s.params | {"stem": {"kernel": jax.ShapeDtypeStruct((3, 2), jnp.float32)}}),
            r"params/stem/kernel is \(2, 3\) float32, expected \(3, 2\) float32",
        ),
        (
            lambda s: s._replace(params=s.params | {"head": {"bias": jax.ShapeDtypeStruct((3,), jnp.float32)}}),
            r"params/head/bias is \(3,\) bfloat16, expected \(3,\) float32",
        ),
        (
            lambda s: s._replace(optimizer=({"mu": {"stem": {"kernel": s.step}, "head": {"bias": None}}}, s.step)),
            "optimizer/0/mu/stem/kernel missing",
        ),
    ],
)
def test_another_models_checkpoint_is_refused_with_the_leaves(tmp_path, change, message):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, STATE, {})
    checkpoints.wait()
    with pytest.raises(UserError, match=message):
        Checkpoints(tmp_path).restore(1, change(LIKE))


def test_an_unwritable_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot keep checkpoints in .*file"):
        Checkpoints(tmp_path / "file" / "checkpoints")


SIGNALLED = """
import os, signal, sys, time
import jax
jax.distributed.initialize(sys.argv[1], 1, 0)
from tljax.checkpoint import Checkpoints
checkpoints = Checkpoints(sys.argv[2])
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(3)  # JAX has heard of it, and all have agreed on a step
print([step for step in range(68, 71) if checkpoints.preempted(step)])
"""


def test_a_signal_before_the_first_step_of_a_run_that_goes_on_is_not_lost(tmp_path):
    """JAX's own count begins at 0, and says yes to one number only."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    out, err = script(SIGNALLED, address, str(tmp_path)).communicate(timeout=300)
    assert out == "[68]\n", err
