"""The arithmetic of docs/scaling.md, on a program whose figures are made up."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import scaling
import scaling_page

RECORD = {
    "model": "resnet50", "strategy": "full", "layout": "replicated", "chips": 256, "images_a_chip": 32, "size": 224,
    "parameters": 100, "trainable": 100, "theory": 10**9, "held": {"replicated": 10**9}, "flops": 1.97e12,
    "bytes_accessed": 8.19e9, "arguments": 10**9, "results": 0, "temporary": 3 * 10**9, "code": 0,
    "collectives": {"all-reduce": 10**9}, "versions": {"jax": "1", "libtpu": "2"},
}  # fmt: skip


def test_what_each_resource_takes_of_a_step():
    times = scaling_page.seconds(RECORD)
    assert times["MXU"] == pytest.approx(0.01)
    assert times["HBM"] == pytest.approx(0.01)
    assert times["ICI"] == pytest.approx(2 * 255 / 256 * 1e9 / 200e9)  # a ring passes all but one part twice
    assert times["network"] == pytest.approx(32 * 8 * 110e3 / 25e9)  # 6.4 Tbit/s for 32 hosts


def test_gathered_and_scattered_leaves_pass_once_within_their_group():
    laid = RECORD | {"layout": "fsdp 8", "collectives": {"all-gather": 8000, "reduce-scatter": 1000}}
    assert scaling_page.passed(laid) == 7000 + 7000


def test_the_document_says_what_is_there_and_what_is_not():
    names = [case.name for case in scaling.cases()]
    assert len(set(names)) == len(names)
    told = scaling_page.document({("resnet50", "full"): RECORD}, [RECORD], scaling.MODELS, len(names))
    assert f"{len(names) - 1} of {len(names)} programs\nare not compiled yet" in told
    assert "| ResNet-50, full | 100 % | 1,000,000,000 | - | - | 1,000,000,000 |" in told
    assert "| replicated | 1 GB | 1 GB | 3 GB | 4 GB (25 %) |" in told
