"""Every shipped config denotes an experiment: its plan, its optimizer and its phases exist."""

from pathlib import Path

import pytest

from tljax import command, cost, experiment, plan
from tljax.weights import CARDS

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_it_has_a_plan_and_says_its_command(file):
    config = command.from_command_line([f"--config={file}"], "").config
    exp = experiment.build(config, 14)
    phases = exp.in_time(675)
    assert phases[-1].stop == experiment.total_steps(config, 675)[0]
    for phase in phases:
        exp.optimizer(phase, 675)
    assert f"python -m tljax.train --config=configs/{file.name}" in file.read_text()


IN_PACKAGES = sorted({card.model for card in CARDS.values() if card.source.startswith(("package:", "npm:"))})


@pytest.mark.parametrize("model", IN_PACKAGES)
def test_the_main_job_takes_every_network_of_which_a_package_has_weights_and_none_of_its_norms(model):
    (file,) = (file for file in CONFIGS if file.stem == "partial")
    exp = experiment.build(command.from_command_line([f"--config={file}:model={model}"], "").config, 14)
    ((_, found),) = exp.plans
    norms = {leaf.path.rpartition("/")[0] for leaf in found.leaves if leaf.path.endswith("/scale")}
    assert norms
    assert not found.live_norms
    assert not norms & {leaf.path.rpartition("/")[0] for leaf in found.trainable}
    assert {leaf.path.split("/")[0] for leaf in found.trainable} == set(exp.model.stages[-3:])


def test_the_plan_of_phases_is_told(capsys):
    (gradual,) = (file for file in CONFIGS if file.stem == "gradual")
    assert plan.main([f"--config={gradual}"]) == 0
    out = capsys.readouterr().out
    assert "phase 1, 0.5 epochs: 17,934 train, in head" in out
    assert "phase 3, 0.5 epochs: 1,035,534 train, in block16 … head" in out
    assert "phase 19, rest: 3,388,942 train, in stem … head" in out


def test_what_bitfit_leaves_on_the_table_is_told():
    (file,) = (file for file in CONFIGS if file.stem == "bitfit")
    exp = experiment.build(command.from_command_line([f"--config={file}"], "").config, 14)
    plan = exp.plans[0][1]
    forward = dict.fromkeys(plan.stages, 3.0)
    # 19 stages forward, the gradient of the activations back through 18, and of the head's kernel: 17 of 38 passes.
    assert cost.remark(plan, forward) == (
        "a bias trains in 'stem': the backward pass runs through all 17 stages 'block1' … 'top', of which no kernel "
        "trains: 45 % of the step"
    )


def test_each_phase_of_gradual_unfreezing_has_a_triangle_of_its_own():
    (file,) = (file for file in CONFIGS if file.stem == "gradual")
    exp = experiment.build(command.from_command_line([f"--config={file}"], "").config, 14)
    found = exp.in_time(675)
    peak = exp.config.optim.lr
    for phase in (found[0], found[1], found[-1]):
        _, schedule = exp.optimizer(phase, 675)
        length = phase.stop - phase.start
        rates = [float(schedule(step)) for step in range(phase.start, phase.stop + 1)]
        assert rates[0] == pytest.approx(peak / 32, rel=1e-5)
        assert rates[-1] == pytest.approx(peak / 32, rel=1e-5)
        assert rates[round(length / 10)] == pytest.approx(max(rates)) == pytest.approx(peak)
