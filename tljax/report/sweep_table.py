"""What a sweep leaves: a row a member as CSV and parquet, the curves, and the best config as a file."""

import csv
import io
import json
import math
from collections.abc import Callable

from ml_collections import ConfigDict

from tljax.config import to_json
from tljax.report import ranking
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
    fields = row["fields"] | {k: v for k, v in row.get("config", {}).items() if k not in row["fields"]}
    fields = {k: v if isinstance(v, int | float | str) else json.dumps(v) for k, v in fields.items()}
    best = row["best"] or {}
    figures = {f"{split}/{k}": v for split in ("val", "test") for k, v in (row[split] or {}).items()}
    return (
        {"member": row["number"]} | fields | {f"n_{name}": row.get(f"n_{name}") for name in ("train", "val", "test")}
        | {name: row[name] for name in ("status", "steps", "epochs")}
        | {f"best_{name}": best.get(name) for name in ("step", "epoch")} | figures
        | {name: row.get(name) for name in ("seconds", "group", "how", "kept")}
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
    first = next(iter(ranking.ranked(ranking.settings(rows), metric)), None)
    if first is None or not math.isfinite(first.value):
        return f"no member has a {metric}: there is no best"
    chosen = first.setting.rows
    fields = ", ".join(f"{field} = {value!r}" for field, value in first.setting.fields.items())
    over = f", mean of {len(chosen)}" if len(chosen) > 1 else ""
    line = f"the best by {metric}, {first.value:.4g}{over}: {fields or 'there is one setting'}"
    config = to_json(config_of(chosen[0])).replace("\\", "\\\\").replace('"""', r"\"\"\"")
    text = line.replace("\\", "\\\\").replace('"""', "'''")
    folder.write("best.py", BEST.format(line=text, path=folder.path / "best.py", config=config))
    return line
