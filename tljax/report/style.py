"""The style sheet of report.html."""

CSS = """
:root { color-scheme: light; --ink: #1f2933; --grey: #616e7c; --line: #e4e7eb; --blue: #2f6db5;
  --pale: #f5f7fa; --green: #23825a; --red: #c0392b; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: var(--pale); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial,
  sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 60px; }
header { margin: 12px 4px 24px; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 0 0 14px; }
.lead { color: var(--grey); margin: 0; overflow-wrap: anywhere; }
section { background: white; border: 1px solid var(--line); border-radius: 12px; padding: 22px 24px;
  margin: 0 0 18px; }
.cards { display: flex; flex-wrap: wrap; gap: 12px; margin: 0 0 18px; }
.cards + .cards { margin-top: -6px; }
.card { background: white; border: 1px solid var(--line); border-radius: 12px; padding: 14px 16px;
  flex: 1 1 165px; min-width: 0; }
.card b { display: block; font-size: 1.55rem; line-height: 1.25; font-weight: 650; overflow-wrap: anywhere;
  font-variant-numeric: tabular-nums; }
.card span { color: var(--grey); font-size: .84rem; display: block; overflow-wrap: anywhere; }
.card.main { background: var(--blue); border-color: var(--blue); color: white; }
.card.main span { color: #e3edf8; }
.cards.small .card { flex-basis: 240px; } .cards.small .card b { font-size: 1.15rem; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--grey); font-weight: 600; font-size: .82rem; }
th, td { padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line); vertical-align: middle; }
tr:last-child td { border-bottom: 0; }
td { overflow-wrap: break-word; }
table.slim { max-width: 560px; }
td.n, th.n { text-align: right; white-space: nowrap; }
td.bar { width: 42%; min-width: 90px; }
.track { background: #edf1f5; border-radius: 4px; height: 12px; }
.fill { background: var(--blue); border-radius: 4px; height: 12px; }
.note { color: var(--grey); font-size: .88rem; margin: 12px 0 0; }
.missing { color: var(--grey); font-style: italic; margin: 0; }
.good { color: var(--green); } .bad { color: var(--red); font-weight: 600; }
.wide { overflow-x: auto; } .scroll { max-height: 460px; overflow: auto; }
a { color: var(--blue); }
.picture { overflow-x: auto; } img { display: block; width: 100%; height: auto; margin: 0 auto; }
pre { margin: 0; font-size: .8rem; line-height: 1.4; overflow-x: auto;
  font-family: ui-monospace, SFMono-Regular, Menlo, "DejaVu Sans Mono", "Liberation Mono", monospace; }
.stack { display: flex; height: 22px; border-radius: 6px; overflow: hidden; background: #edf1f5; }
.stack i { display: block; }
.legend { display: flex; flex-wrap: wrap; gap: 6px 20px; margin: 12px 0 0; padding: 0; list-style: none;
  font-size: .88rem; }
.legend i { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 7px; }
dl { margin: 0; font-size: .86rem; columns: 2; column-gap: 36px; }
dl div { display: flex; gap: 14px; justify-content: space-between; break-inside: avoid; padding: 3px 0;
  border-bottom: 1px solid var(--line); }
dt { color: var(--grey); } dd { margin: 0; text-align: right; overflow-wrap: anywhere; min-width: 0; }
details + details { margin-top: 14px; } summary { cursor: pointer; font-weight: 600; }
details > :not(summary) { margin-top: 12px; }
@media (max-width: 700px) {
  main { padding: 14px 10px 40px; } section { padding: 16px 14px; border-radius: 10px; }
  dl { columns: 1; } h1 { font-size: 1.5rem; }
  .cards { gap: 8px; } .card, .cards.small .card { padding: 10px 12px; flex-basis: 150px; }
  .card b { font-size: 1.25rem; } th, td { padding-right: 8px; } td.bar { width: 18%; min-width: 44px; }
  .few { display: none; } .picture img { min-width: 600px; }
}
@media print { body { background: white; } section, .card { break-inside: avoid; } }
"""
