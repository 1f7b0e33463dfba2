import base64
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from tljax import report
from tljax.report import pictures

EMPTY = {"meta", "img", "br", "link", "input"}
CLASSES = ["<b>", 'Gala "red" & co', "Anjou"]


class Page(HTMLParser):
    """Checks the nesting and collects the text, the tags and the attributes."""

    def __init__(self, source):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, key, value) for key, value in attrs]
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)

    @property
    def said(self):
        return re.sub(r"\s+", " ", " ".join(self.text))  # also the no-break space before %


def summary():
    figures = {
        "examples": 661, "accuracy": 0.81234, "coarse_accuracy": 0.9056, "macro_f1": 0.7931, "nll": 0.6012,
        "ece": 0.0347, "per_class": {"<b>": 0.75, 'Gala "red" & co': None, "Anjou": 0.9},
        "confusion": [[75, 25, 0], [0, 0, 0], [1, 9, 90]],
    }  # fmt: skip
    return {
        "name": "fruit <i>partial</i>", "seed": 3, "model": "efficientnet_lite0",
        "strategy": "partial(last=4)",
        "weights": {"name": "lite0", "licence": "Apache-2.0", "origin": "https://example.org/weights"},
        "data": {"name": "fruit", "classes": 3, "train": 675, "val": 57, "test": 661, "licence": "MIT"},
        "plan": {"parameters": 3389950, "trainable": 1146104, "optimizer_bytes": 9168832, "digest": "pl4n"},
        "frozen": {"values": 2243846, "digest": "5ce2a0", "verified": True, "steps": 630},
        "best": {"step": 588, "epoch": 14.0, "metric": "val/accuracy", "value": 0.8772}, "test": figures,
        "val": {"accuracy": 0.877, "nll": 0.5, "examples": 57},
        "time": {"start": 3.2, "compile": 9.3, "train": 171.0, "eval": 12.2, "total": 204.0},
        "first_step_seconds": 15.2, "steps": 630, "epochs": 15, "images_per_second": 63.2,
        "flops_per_step": 1.83e10, "peak_memory_bytes": 2.1e9, "versions": {"jax": "0.10.2"},
        "devices": ["cpu:0"],
    }  # fmt: skip


@pytest.fixture
def workdir(tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps(summary()))
    (tmp_path / "config.json").write_text(json.dumps({"optim": {"lr": 0.00123, "name": "adamw"}, "augment": []}))
    (tmp_path / "plan.txt").write_text("stage <stem>\n18,862")
    rows = [
        {"step": 42, "epoch": 1.0, "val/loss": 0.777, "val/accuracy": 0.5},
        {"step": 10, "train/loss": 1.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 4')  # cut by SIGKILL
    pictures.confusion(summary()["test"]["confusion"], CLASSES, tmp_path / "confusion.png")
    for name in ("curves.png", "mistakes.png"):
        (tmp_path / name).write_bytes((tmp_path / "confusion.png").read_bytes())
    return tmp_path


def test_page_holds_everything(workdir):
    path = report.html(workdir)
    assert str(path) == str(workdir / "report.html")
    page = Page((workdir / "report.html").read_text())
    for figure in (
        "81.23 %", "90.56 %", "0.7931", "0.6012", "0.0347", "87.70 %", "1,146,104", "3,389,950",
        "33.8 %", "8.74 MiB",
        "step 588", "epoch 14", "0.877", "63 images/s", "18.3 GFLOP", "1.96 GiB", "3 min 24 s", "15.2 s",
        "9.30 s",
        "2 min 51 s", "2,243,846 frozen values", "5ce2a0", "after 630 steps", "75.0 %", "90.0 %", "661",
        "0.777",
        "Apache-2.0", "MIT", "https://example.org/weights", "0.10.2", "0.00123", "pl4n", "18,862", "seed 3",
    ):  # fmt: skip
        assert figure in page.said, figure
    for name in (*CLASSES, "fruit <i>partial</i>", "stage <stem>"):
        assert name in page.said, name
    assert "missing" not in page.said
    assert 'Gala "red" & co (25)' in page.said  # most often taken for
    assert not {"b>", "i>", "stem", "script", "link"} & set(page.tags)
    bars = [v for tag, key, v in page.attributes if key == "style" and v.startswith("width:") and tag == "div"]
    assert bars == ["width:75.0%", "width:90.0%"]  # weakest first, a class without examples has none


def test_page_escapes_markup(workdir):
    report.html(workdir)
    source = (workdir / "report.html").read_text()
    assert "<td><b></td>" not in source
    assert "<td>&lt;b&gt;</td>" in source
    assert source.count("<b>") == source.count("</b>")
    assert "<i>partial" not in source


def test_page_needs_no_network(workdir):
    report.html(workdir)
    source = (workdir / "report.html").read_text()
    page = Page(source)
    assert not [v for _, key, v in page.attributes if key in ("src", "href") and not v.startswith("data:image/png")]
    assert "url(" not in source
    assert "@import" not in source
    assert not re.findall(r"https?://", source.replace("https://example.org/weights", ""))  # text of the card only
    images = [v.split(",", 1)[1] for tag, key, v in page.attributes if (tag, key) == ("img", "src")]
    assert [base64.b64decode(image) for image in images] == [(workdir / "confusion.png").read_bytes()] * 3


def test_page_says_what_is_missing(tmp_path):
    report.html(tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    for name in ("summary.json", "config.json", "plan.txt", "metrics.jsonl", "curves.png", "confusion.png",
                 "mistakes.png"):  # fmt: skip
        assert f"{name} is missing" in page.said, name


def test_page_of_every_partial_summary(workdir):
    whole = summary()
    for key in whole:
        (workdir / "summary.json").write_text(json.dumps({k: v for k, v in whole.items() if k != key}))
        Page(report.html(workdir).read_text())
        (workdir / "summary.json").write_text(json.dumps({key: whole[key]}))
        Page(report.html(workdir).read_text())
    (workdir / "summary.json").write_text("{broken")
    assert "summary.json is missing" in Page(report.html(workdir).read_text()).said


def test_unverified_frozen_leaves_are_said(workdir):
    broken = summary()
    broken["frozen"]["verified"] = False
    (workdir / "summary.json").write_text(json.dumps(broken))
    said = Page(report.html(workdir).read_text()).said
    assert "not verified" in said
    assert "bit-identical" not in said


def test_page_of_measured_figures(workdir):
    rng = np.random.default_rng(0)
    figures = report.metrics.classification(rng.normal(size=(30, 3)), rng.integers(0, 3, 30), CLASSES)
    (workdir / "summary.json").write_text(json.dumps({"test": figures}))
    said = Page(report.html(workdir).read_text()).said
    assert f"{100 * figures['accuracy']:.2f} %" in said
