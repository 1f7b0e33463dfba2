"""What a sweep leaves: a row a member as CSV and parquet, the curves, and the best config as a file."""

import csv
import io
import json
import math
from collections.abc import Callable

import numpy as np
from ml_collections import ConfigDict

from tljax.config import to_json
from tljax.grid import REPEATS, setting
from tljax.workdir import Workdir

BEST = '''"""{line}

    python -m tljax.train --config={path}
"""

from tljax.config import from_json


def get_config():
    return from_json("""{config}""")
'''


def flat(row: dict) -> dict:
    """A row of a group as a row of the tables: one value a column, no curve."""
    fields = {k: v if isinstance(v, int | float | str) else json.dumps(v) for k, v in row["fields"].items()}
    best = row["best"] or {}
    figures = {f"{split}/{k}": v for split in ("val", "test") for k, v in (row[split] or {}).items()}
    return (
        {"member": row["number"]} | fields | {name: row[name] for name in ("status", "steps", "epochs")}
        | {f"best_{name}": best.get(name) for name in ("step", "epoch")} | figures | {"seconds": row["seconds"]}
    )  # fmt: skip


def write(folder: Workdir, rows: list[dict]) -> None:
    """Writes `sweep.csv`, `sweep.parquet` and `curves.jsonl` (with `member` in each row) anew, each whole."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    told = [flat(row) for row in rows]
    columns = list(max(told, key=len, default={}))  # who has diverged has no figures
    columns += sorted({name for row in told for name in row} - set(columns))
    table = io.StringIO()
    writer = csv.DictWriter(table, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(told)
    folder.write("sweep.csv", table.getvalue())
    parquet = io.BytesIO()
    pq.write_table(pa.table({name: [row.get(name) for row in told] for name in columns}), parquet)
    folder.write("sweep.parquet", parquet.getvalue())
    lines = (json.dumps({"member": row["number"]} | point) + "\n" for row in rows for point in row["curve"])
    folder.write("curves.jsonl", "".join(lines))


def best(folder: Workdir, rows: list[dict], metric: str, config_of: Callable[[dict], ConfigDict]) -> str:
    """Writes the config of the row that is the best by a metric, `best.py`; returns what it says of it.

    The figure is that of val, averaged over the seeds and folds of otherwise equal members: the luckiest of many is
    not the best. One that has diverged counts as the worst, and one that was eliminated is not chosen.
    """
    settings: dict[str, list[dict]] = {}
    for row in rows:
        settings.setdefault(setting(row["fields"]), []).append(row)
    name, sign = metric.removeprefix("val/"), -1 if metric == "val/nll" else 1

    def value(found: list[dict]) -> float:
        each = [row["val"][name] if row["val"] else -sign * math.inf for row in found]
        return float(np.mean(each))

    ended = [found for found in settings.values() if not any(row["status"].startswith("eliminated") for row in found)]
    chosen = max(ended, key=lambda found: sign * value(found), default=None)
    if chosen is None or not math.isfinite(value(chosen)):
        return f"no member has a {metric}: there is no best"
    fields = ", ".join(f"{field} = {value!r}" for field, value in chosen[0]["fields"].items() if field not in REPEATS)
    over = f", mean of {len(chosen)}" if len(chosen) > 1 else ""
    line = f"the best by {metric}, {value(chosen):.4g}{over}: {fields or 'there is one setting'}"
    config = to_json(config_of(chosen[0])).replace("\\", "\\\\").replace('"""', r"\"\"\"")
    text = line.replace("\\", "\\\\").replace('"""', "'''")
    folder.write("best.py", BEST.format(line=text, path=folder.path / "best.py", config=config))
    return line
