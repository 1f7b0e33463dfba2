import re

from rich.console import Console

from tljax.report.table import plan_table


def layout():
    rows, names = [], ["stem", *(f"block{i}" for i in range(1, 17)), "top", "head"]
    for i, name in enumerate(names):
        trains = 1234567 if i > 12 else 0
        rows.append(
            {"stage": name, "parameters": 1234567, "trainable": trains,
             "multiplier": "0.1–1" if trains else 0,
             "decay": "some" if trains else "no", "norm": "moving" if trains else "stored",
             "optimizer_bytes": 8 * trains}
        )  # fmt: skip
    totals = {k: sum(r[k] for r in rows) for k in ("parameters", "trainable", "optimizer_bytes")}
    long = "(" + "|".join(names[:13]) + ")/.*"
    rules = [("head/.*", 1.0, 2), {"pattern": long, "multiplier": 0.0, "leaves": 1109}]
    return rows, totals, long, plan_table(rows, {**totals, "digest": "ab12"}, rules)


def test_a_row_a_stage_with_every_figure():
    rows, totals, _, table = layout()
    lines = str(table).splitlines()
    for row in rows:
        (line,) = [line for line in lines if line.split()[:1] == [row["stage"]]]
        trains = "1,234,567" if row["trainable"] else "0"
        size = ["9.42", "MiB"] if row["trainable"] else ["0", "B"]
        assert line.split()[1:] == [
            "1,234,567",
            trains,
            str(row["multiplier"]),
            row["decay"],
            row["norm"],
            *size,
        ]
    (total,) = [line for line in lines if line.startswith("total")]
    assert f"{totals['parameters']:,}" in total
    assert f"{totals['trainable']:,}" in total
    assert f"{100 * totals['trainable'] / totals['parameters']:.1f} % of the parameters train" in lines
    assert "digest: ab12" in lines


def test_width_and_columns():
    _, _, _, table = layout()
    lines = str(table).splitlines()
    assert max(map(len, lines)) <= 100
    assert len({line.index("stored") for line in lines if "stored" in line}) == 1
    assert "\x1b" not in str(table)


def test_rules_are_whole_and_in_order():
    _, _, long, table = layout()
    below = str(table).split("decides)")[1]
    assert below.index("head/.*") < below.index("(stem|")
    assert re.search(r"1 +2 +head/\.\*", below)
    assert re.search(r"0 +1,109 +\(stem\|", below)
    assert long in re.sub(r"\s", "", below)  # broken over lines, nothing lost


def test_terminal_shows_the_same_text():
    _, _, _, table = layout()
    console = Console(force_terminal=True, color_system="standard", width=60, file=None)
    with console.capture() as capture:
        console.print(table, soft_wrap=True)
    shown = capture.get()
    assert "\x1b[" in shown
    assert re.sub(r"\x1b\[[0-9;]*m", "", shown).rstrip("\n") == str(table)


def test_nothing_trainable_no_rules_and_long_names():
    name = "a" * 80
    rows = [{"stage": name, "parameters": 0, "trainable": 0, "multiplier": 0, "decay": "no", "norm": "-",
             "optimizer_bytes": 0}]  # fmt: skip
    lines = str(plan_table(rows, {"parameters": 0, "trainable": 0, "optimizer_bytes": 0}, [])).splitlines()
    assert max(map(len, lines)) <= 100
    assert any(line.startswith("aaa") and "…" in line for line in lines)


def test_a_long_group_of_stages_is_broken_at_its_commas():
    names = [f"encoder_block{i}" for i in range(12)]
    pattern = f"{{{','.join(names)}}} & **/bias"
    row = {"stage": "head", "parameters": 1, "trainable": 1, "multiplier": 1, "decay": "no", "norm": "-"}
    totals = {"parameters": 1, "trainable": 1, "optimizer_bytes": 0}
    table = str(plan_table([row | {"optimizer_bytes": 0}], totals, [(pattern, 0.3, 12)]))
    assert pattern.replace(" ", "") in re.sub(r"\s", "", table)  # nothing lost
    assert all(name in table for name in names)  # and none torn
    assert max(map(len, table.splitlines())) <= 100
    assert table.splitlines()[-1].strip()
