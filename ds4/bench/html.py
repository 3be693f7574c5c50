"""A comparison as one HTML file that needs nothing else: no script, no network."""

from collections.abc import Sequence
from html import escape
from typing import Any

from .compare import Row, not_alike, nothing_in, tables
from .plots import Plot, plots
from .svg import mark
from .tables import Table

# Okabe and Ito's colours, told apart by all kinds of sight; lighter ones on a dark ground.
_LIGHT = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7a5c00", "#56b4e9", "#000000", "#8a5a9c"
_DARK = "#56b4e9", "#e69f00", "#2fd0a0", "#e8a0c8", "#f0e442", "#9ad0f5", "#ffffff", "#c9a0dc"

_STYLE = """
:root{--bg:#fff;--fg:#1b1f24;--dim:#57606a;--line:#d0d7de;--soft:#f3f5f7;--band:#0072b214;
--bad:#b3261e;LIGHT}
@media (prefers-color-scheme:dark){:root{--bg:#14171b;--fg:#e6e9ec;--dim:#a3abb3;--line:#3a4149;
--soft:#1f242a;--band:#56b4e91f;--bad:#ff8a80;DARK}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:62rem;padding:1.5rem;background:var(--bg);color:var(--fg);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
h1{font-size:1.6rem;margin:.2rem 0 1rem}h2{font-size:1.25rem;margin:2.2rem 0 .6rem}
h3{font-size:1rem;margin:1.4rem 0 .4rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.86rem;width:100%;
font-variant-numeric:tabular-nums}
th,td{padding:.35rem .55rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left;white-space:normal;min-width:9rem}
th{color:var(--dim);font-weight:600;vertical-align:bottom;white-space:normal}
td.bad{color:var(--bad);font-style:italic}
ul.notes{color:var(--dim);font-size:.86rem;margin:.4rem 0;padding-left:1.2rem}
figure{margin:1.2rem 0 2rem}figcaption{font-size:.86rem;color:var(--dim)}
svg{width:100%;height:auto;display:block}.scroll>svg{min-width:42rem}
svg text{fill:var(--fg);font:13px system-ui,-apple-system,"Segoe UI",sans-serif}
svg .tick{fill:var(--dim)}svg .title{font-weight:600}
svg .label{font-size:12px;paint-order:stroke;stroke:var(--bg);stroke-width:4px}
svg .grid{stroke:var(--line);stroke-width:1}svg .axis{stroke:var(--dim);stroke-width:1}
svg .line{fill:none;stroke:var(--c);stroke-width:2}
svg .mark{fill:var(--c);stroke:var(--bg);stroke-width:1}
svg .window{fill:var(--band)}svg .invalid{fill:none;stroke:var(--bad);stroke-dasharray:4 3}
.p0{fill:var(--s0);--c:var(--s0)}.p1{fill:var(--s1);--c:var(--s1)}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;font-size:.86rem;margin:.3rem 0}
.legend span{display:inline-flex;align-items:center;gap:.4rem}.legend svg{width:16px;height:16px}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem 1rem;font-size:.86rem}
dt{color:var(--dim)}dd{margin:0;overflow-wrap:anywhere}
"""

_MEANING = """
<h2>What the figures mean</h2>
<ul class="notes">
<li>TTFT: from sending a request to its first output. TPOT: (end - first output) / (output tokens
- 1), for each request. ITL: each gap between tokens. p50 is the median.</li>
<li>J/output tok: all energy of the window over its output tokens, prompts included; net: less what
the idle machine takes in that time; decode only: less the prompts' share, measured apart.</li>
<li>chip: what the processor says of itself. dc-system: the machine behind its power supply. wall:
before it, what is paid for. Figures of unlike scopes are never compared; "estimated wall" was
worked out from another scope by a calibration.</li>
<li>invalid: the meter left a gap, contradicted itself or did not cover the window; the reason
stands below the table.</li>
</ul>
"""


def page(rows: Sequence[Row], results: Sequence[dict[str, Any]]) -> str:
    """The whole document."""
    labels = [str(one["label"]) for one in results]
    title = "; ".join(labels)
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f"<title>{escape(title)}</title><style>{_style()}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        *(_machine(one) for one in results),
    ]
    drawn = plots(rows, results)
    if drawn:
        parts += ["<h2>Plots</h2>", *map(_plot, drawn)]
    parts += ["<h2>Tables</h2>", *map(_table, tables(rows))]
    apart = [*nothing_in(results), *not_alike(rows)]
    if apart:
        parts += ["<h2>Not compared</h2>", _notes(apart)]
    return "\n".join([*parts, _MEANING, "</body></html>"]) + "\n"


def _style() -> str:
    colours = [
        "".join(f"--s{i}:{colour};" for i, colour in enumerate(chosen))
        for chosen in (_LIGHT, _DARK)
    ]
    classes = "".join(f".s{i}{{--c:var(--s{i})}}" for i in range(len(_LIGHT)))
    return _STYLE.replace("LIGHT", colours[0]).replace("DARK", colours[1]) + classes


def _machine(one: dict[str, Any]) -> str:
    env = one["environment"]
    sources = one["power"]["sources"]
    targets = [
        f"{t['model']}, {t['recipe']} ({t.get('quality', 'quality unknown')}), {t.get('reached')}"
        for t in one["targets"]
    ]
    facts = {
        "machine": "; ".join([*_gpus(env["machine"]), env["machine"]["cpu"]]),
        "memory": env["machine"]["memory"],
        "model": "; ".join(targets),
        "power": "; ".join(f"{s['name']}: {s['scope']}" for s in sources) or "no meter",
        "settings": "; ".join(env.get("gpu_settings") or []) or None,
        "measured": f"{env['time']}, commit {env['commit']}",
        "command": env["command"],
    }
    lines = [
        f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>"
        for name, value in facts.items()
        if value
    ]
    return f"<h3>{escape(str(one['label']))}</h3><dl>{''.join(lines)}</dl>"


def _gpus(machine: dict[str, Any]) -> list[str]:
    return [gpu for gpu in machine["gpus"] if gpu != "none found"]


def _plot(plot: Plot) -> str:
    legend = "".join(f"<span>{_key(style)}{escape(name)}</span>" for style, name in plot.legend)
    return (
        f"<figure><h3>{escape(plot.heading)}</h3>"
        f'<div class="scroll">{plot.drawing}</div>'
        f'<div class="legend">{legend}</div>'
        f"<figcaption>{escape(plot.caption)}</figcaption></figure>"
    )


def _key(style: int) -> str:
    """The mark of a series; of a part of a bar, which has a negative style, a square."""
    kind, shape = (f"s{style % len(_LIGHT)}", style) if style >= 0 else (f"p{-1 - style}", 1)
    return f'<svg viewBox="0 0 16 16" class="{kind}" aria-hidden="true">{mark(8, 8, shape)}</svg>'


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in table.headings)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in table.rows)
    whole = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    rows = f'<div class="scroll"><table>{whole}</table></div>' if table.rows else ""
    return f"<h3>{escape(table.title)}</h3>{rows}{_notes(table.notes)}"


def _cell(text: str) -> str:
    return f'<td class="bad">{text}</td>' if text == "invalid" else f"<td>{escape(text)}</td>"


def _notes(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    return f'<ul class="notes">{"".join(f"<li>{escape(note)}</li>" for note in notes)}</ul>'
