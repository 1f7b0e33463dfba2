"""report.html: everything a workdir holds, on one page that needs no network and no scripts."""

import base64
import json
from html import escape

from etils import epath

from tljax.report import text
from tljax.report.style import CSS

PICTURES = (
    ("curves.png", "Learning curves", "Loss, accuracy and learning rate; the best evaluation on val is marked."),
    ("confusion.png", "Confusion", "A row is a label, a column a guess; colour is the share of the row."),
    ("mistakes.png", "Worst mistakes", "The wrong guesses that the model was surest of."),
)
SOURCE_PICTURES = (  # where there is a source task
    ("forgetting.png", "Forgetting", "The source task before and after, and how far each stage's features moved."),
    ("wise_ft.png", "Between loaded and trained", "Target against source, on the straight path between the weights."),
)
FIGURES = (  # key, name, what it means, how it is written
    ("accuracy", "accuracy", "guesses that are right", lambda v: text.percent(v, 2)),
    ("coarse_accuracy", "coarse accuracy", "right up to the coarse class", lambda v: text.percent(v, 2)),
    ("macro_f1", "macro F1", "mean F1 of the classes", lambda v: f"{v:.4f}"),
    ("nll", "negative log-likelihood", "nats; lower is better", lambda v: f"{v:.4f}"),
    ("ece", "calibration error", "15 bins; lower is better", lambda v: f"{v:.4f}"),
)
# No picture, style or script from elsewhere can load, whatever a class or file name contains.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
TONES = ("#163f73", "#2f6db5", "#6fa3d8", "#a9c9e8", "#d9691e", "#f0b483", "#7b8794", "#23825a")


def html(workdir) -> epath.Path:
    """Writes `workdir/report.html` from what the workdir holds; returns its path. It says what is missing."""
    workdir = epath.Path(workdir)
    summary, config = _json(workdir / "summary.json"), _json(workdir / "config.json")
    name = (summary or {}).get("name") or workdir.name
    parts = [_head(name, summary or {})]
    if summary is None:
        parts.append(_section("Final figures", _missing("summary.json")))
    else:
        parts += [_cards(summary), _splits(summary)]
    parts += [_picture(workdir, *PICTURES[0]), _per_class(summary or {})]
    parts += [_picture(workdir, *picture) for picture in PICTURES[1:]]
    parts += [_picture(workdir, *picture) for picture in SOURCE_PICTURES if (workdir / picture[0]).exists()]
    parts += [_plan(workdir, summary or {}), _times(summary or {}), _evaluations(workdir)]
    parts += [_origins(summary or {}), _listings(config, summary)]
    path = workdir / "report.html"
    path.write_text(document(name, parts), encoding="utf-8")
    return path


def document(name: str, parts: list[str]) -> str:
    """A whole page of some parts, empty ones left out, under a title."""
    body = "\n".join(part for part in parts if part)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{_e(name)} · tljax</title>\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_e(POLICY)}">\n<style>{CSS}</style>\n</head>\n'
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _head(name, summary: dict) -> str:
    data, weights = summary.get("data") or {}, summary.get("weights") or {}
    said = [
        summary.get("model"), summary.get("strategy"), data.get("name"),
        f"weights {weights['name']}" if weights.get("name") else "random weights" if summary else None,
        f"seed {summary['seed']}" if summary.get("seed") is not None else None,
    ]  # fmt: skip
    return f'<header><h1>{_e(name)}</h1><p class="lead">{_e(" · ".join(str(s) for s in said if s))}</p></header>'


def _cards(summary: dict) -> str:
    split = "test" if summary.get("test") else "val"
    figures = summary.get(split) or {}
    main = [
        (write(figures[key]), f"{split} {name}", meaning)
        for key, name, meaning, write in FIGURES
        if figures.get(key) is not None
    ]
    plan, best, spent = (summary.get(key) or {} for key in ("plan", "best", "time"))
    small = []
    if plan.get("parameters"):
        share = text.percent(plan["trainable"] / plan["parameters"])
        small.append((f"{plan['trainable']:,}", f"trainable of {plan['parameters']:,} parameters ({share})", ""))
    if plan.get("optimizer_bytes") is not None:
        small.append((text.size(plan["optimizer_bytes"]), "optimizer state", ""))
    if summary.get("evaluated_step") is not None:
        small.append((f"step {summary['evaluated_step']:,}", "the checkpoint of these figures", ""))
    if best.get("step") is not None:
        chosen = [f"{best.get('metric', '')} {text.number(best.get('value'))}"]
        chosen += [f"epoch {best['epoch']:g}"] if best.get("epoch") is not None else []
        small.append((f"step {best['step']:,}", f"best on val: {', '.join(chosen)}", ""))
    if summary.get("images_per_second"):
        small.append((f"{summary['images_per_second']:,.0f} images/s", "in training", ""))
    if summary.get("input_wait"):
        small.append((text.percent(summary["input_wait"]["share"]), "of it without a batch: input wait", ""))
    if summary.get("flops_per_step"):
        small.append((text.flops(summary["flops_per_step"]), "a training step, as compiled", ""))
    if summary.get("peak_memory_bytes"):
        small.append((text.size(summary["peak_memory_bytes"]), "peak memory", ""))
    if spent.get("total") is not None:
        first = summary.get("first_step_seconds")
        note = "" if first is None else f", {text.duration(first)} to the first step"
        small.append((text.duration(spent["total"]), f"in all{note}", ""))
    if not main:
        return _section("Final figures", _missing("test of summary.json")) + _grid(small, "small")
    return _grid(main, "") + _grid(small, "small")


def _grid(cards, kind: str) -> str:
    tiles = ""
    for i, (value, name, meaning) in enumerate(cards):
        said = "".join(f"<span>{_e(s).replace(' %', '&nbsp;%')}</span>" for s in (name, meaning) if s)
        tiles += f'<div class="card{"" if i or kind else " main"}"><b>{_e(value)}</b>{said}</div>'
    return f'<div class="cards {kind}">{tiles}</div>' if tiles else ""


def _splits(summary: dict) -> str:
    """Test beside val, where there are both."""
    splits = [(name, summary[name]) for name in ("test", "val") if summary.get(name)]
    if len(splits) < 2:
        return ""
    rows = []
    for key, name, _, write in (*FIGURES, ("examples", "examples", "", text.thousands)):
        values = [figures.get(key) for _, figures in splits]
        if any(value is not None for value in values):
            rows.append([_e(name), *("-" if value is None else _e(write(value)) for value in values)])
    return _section("Test and val", _table(["", *(name for name, _ in splits)], rows, "slim"))


def _per_class(summary: dict) -> str:
    split = "test" if summary.get("test") else "val"
    figures = summary.get(split) or {}
    classes = figures.get("per_class")
    if not classes:
        return _section("Accuracy per class", _missing("per_class of summary.json"))
    matrix = figures.get("confusion")
    rows = []
    for i, (name, accuracy) in enumerate(classes.items()):
        counts = matrix[i] if matrix else []
        wrong = {guess: n for j, (guess, n) in enumerate(zip(classes, counts)) if n and j != i}
        most = max(wrong, key=wrong.get, default=None)
        taken = "" if most is None else f"{_e(most)} ({wrong[most]:,})"
        bar = "" if accuracy is None else _bar(accuracy)
        count = _e(f"{sum(counts):,}" if counts else "-")
        rows.append((accuracy is None, accuracy or 0, [_e(name), bar, _e(text.percent(accuracy)), count, taken]))
    rows.sort(key=lambda row: row[:2])
    cells = "".join(
        f'<tr><td>{name}</td><td class="bar">{bar}</td><td class="n">{accuracy}</td>'
        f'<td class="n few">{count}</td><td>{taken}</td></tr>'
        for _, _, (name, bar, accuracy, count, taken) in rows
    )
    top = '<th>class</th><th></th><th class="n">accuracy</th><th class="n few">examples</th>'
    top += "<th>most often taken for</th>"
    note = f'<p class="note">{_e(split)}, the weakest class first.</p>'
    return _section("Accuracy per class", f'<div class="wide"><table><tr>{top}</tr>{cells}</table></div>{note}')


def _bar(share: float) -> str:
    return f'<div class="track"><div class="fill" style="width:{100 * share:.1f}%"></div></div>'


def _picture(workdir, name: str, title: str, caption: str) -> str:
    path = workdir / name
    data = path.read_bytes() if path.exists() else b""
    if not data.startswith(b"\x89PNG"):
        return _section(title, _missing(name))
    width = int.from_bytes(data[16:20], "big") / 1.4  # drawn at 150 dpi: at this size its text is that of the page
    image = f'<img alt="{_e(title)}" style="max-width:{width:.0f}px" src="data:image/png;base64,'
    image += base64.b64encode(data).decode() + '">'
    return _section(title, f'<div class="picture">{image}</div><p class="note">{_e(caption)}</p>')


def _plan(workdir, summary: dict) -> str:
    path, frozen = workdir / "plan.txt", summary.get("frozen") or {}
    body = f"<pre>{_e(path.read_text())}</pre>" if path.exists() else _missing("plan.txt")
    if frozen.get("values"):
        held = f"{frozen['values']:,} frozen values: "
        steps = f" after {frozen['steps']:,} steps" if frozen.get("steps") is not None else ""
        proof = f"digest {frozen.get('digest', '-')}"
        good = f'<span class="good">bit-identical to those of the start{steps}</span>'
        verdict = good if frozen.get("verified") else '<span class="bad">not verified</span>'
        body += f'<p class="note">{_e(held)}{verdict} ({_e(proof)}).</p>'
    return _section("Plan", body)


def _times(summary: dict) -> str:
    spent = {k: v for k, v in (summary.get("time") or {}).items() if v is not None}
    parts = {k: v for k, v in spent.items() if k != "total"}
    if not parts:
        return _section("Time", _missing("time of summary.json"))
    total = max(spent.get("total", 0), sum(parts.values())) or 1
    tones = {key: TONES[i % len(TONES)] for i, key in enumerate(parts)}
    stack = "".join(
        f'<i style="width:{100 * v / total:.2f}%;background:{tones[k]}" title="{_e(k)}"></i>' for k, v in parts.items()
    )
    legend = "".join(
        f'<li><i style="background:{tones[k]}"></i>{_e(k)} {_e(text.duration(v))}</li>' for k, v in parts.items()
    )
    said = f'<p class="note">{_e(text.duration(spent["total"]))} in all.</p>' if "total" in spent else ""
    return _section("Time", f'<div class="stack">{stack}</div><ul class="legend">{legend}</ul>{said}')


def _evaluations(workdir) -> str:
    """Every evaluation of metrics.jsonl, folded up."""
    path = workdir / "metrics.jsonl"
    if not path.exists():
        return _section("Evaluations", _missing("metrics.jsonl"))
    rows = [row for row in map(_parsed, path.read_text().splitlines()) if row]
    found = [row for row in rows if any(key.startswith("val/") for key in row)]
    if not found:
        return _section("Evaluations", '<p class="missing">None was made in this run.</p>')
    keys = [k for k in dict.fromkeys(k for row in found for k in row) if k.startswith("val/")]
    keys = [k for k in keys if any(isinstance(row.get(k), int | float) for row in found)]
    cells = [
        [_e(text.thousands(row.get("step"))), _e(text.number(row.get("epoch")))]
        + [_e(text.number(row.get(k))) if isinstance(row.get(k), int | float) else "-" for k in keys]
        for row in found
    ]
    table = _table(["step", "epoch", *keys], cells)
    return _section("Evaluations", f"<details><summary>{len(found)} during the run</summary>{table}</details>")


def _origins(summary: dict) -> str:
    weights, data = summary.get("weights") or {}, summary.get("data") or {}
    pairs = {f"weights: {k}": v for k, v in weights.items()} | {f"data: {k}": v for k, v in data.items()}
    pairs |= {f"version: {k}": v for k, v in (summary.get("versions") or {}).items()}
    pairs["devices"] = summary.get("devices")
    pairs = {k: v for k, v in pairs.items() if v is not None}
    return _section("Weights, data, software", _listing(pairs)) if pairs else ""


def _listings(config, summary) -> str:
    parts = []
    for name, content in (("config.json", config), ("summary.json", summary)):
        body = _missing(name) if content is None else _listing(_flat(content))
        parts.append(f"<details><summary>{name}</summary>{body}</details>")
    return _section("Config and summary", "".join(parts))


def _listing(pairs: dict) -> str:
    items = "".join(f"<div><dt>{_e(k)}</dt><dd>{_e(_value(v))}</dd></div>" for k, v in pairs.items())
    return f"<dl>{items}</dl>"


def _flat(tree: dict, prefix: str = "") -> dict:
    """`{"optim.lr": 0.001}`; the confusion matrix is left to its picture."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        elif key != "confusion":
            flat[f"{prefix}{key}"] = value
    return flat


def _value(value) -> str:
    if isinstance(value, list) and all(isinstance(v, str) for v in value):
        return ", ".join(value) or "[]"
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def _table(head, rows, kind: str = "") -> str:
    """A table of escaped cells: the first column text, the others numbers."""
    top = _cells("th", map(_e, head))
    body = "".join(f"<tr>{_cells('td', row)}</tr>" for row in rows)
    return f'<div class="wide"><table class="{kind}"><tr>{top}</tr>{body}</table></div>'


def _cells(tag: str, cells) -> str:
    return "".join(f"<{tag}{' class=n' if i else ''}>{cell}</{tag}>" for i, cell in enumerate(cells))


def _section(title: str, body: str) -> str:
    return f"<section><h2>{_e(title)}</h2>{body}</section>"


def _missing(what: str) -> str:
    return f'<p class="missing">{_e(what)} is missing from the workdir.</p>'


def _parsed(line: str):
    """One JSON object, or None: the last line of a run that was killed may be cut short."""
    try:
        found = json.loads(line)
    except json.JSONDecodeError:
        return None
    return found if isinstance(found, dict) else None


def _json(path):
    return _parsed(path.read_text()) if path.exists() else None


def _e(value) -> str:
    return escape(str(value), quote=True)
