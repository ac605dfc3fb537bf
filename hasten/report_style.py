"""The fixed parts of the report page: measures, colours, style and the one small script."""

from __future__ import annotations

GUTTER = 44
"""Pixels left of the first step, for the labels of rows."""


def column(steps: int) -> int:
    """Width of one step in pixels: wide for few steps; many steps scroll."""
    return max(11, min(30, 800 // max(steps, 1)))


def canvas(steps: int) -> int:
    """Width of a drawing in pixels: all steps, and room for the headings of very short runs."""
    return max(GUTTER + steps * column(steps) + 8, 480)


PALETTE = """--bg:#fff;--fg:#1c2024;--dim:#5b6570;--line:#d9dee3;--panel:#f5f7f9;--mark:#fff;--accent:#0063a6;
--compute:#0063a6;--sparse:#5b8fc7;--reuse:#e39b00;--forecast:#00875f;--skip:#8b95a0;--warn:#8a1c00;--warnbg:#fff0e8"""
PALETTE_DARK = """--bg:#14171a;--fg:#e8ebee;--dim:#9aa5b1;--line:#333b43;--panel:#1d2226;--mark:#14171a;--accent:#4ea8de;
--compute:#4ea8de;--sparse:#2f6c9c;--reuse:#f0b429;--forecast:#3cc79a;--skip:#7d8894;--warn:#ffb59e;--warnbg:#3a1d14"""

DRAWN = """
svg.drawn{display:block;font:11px system-ui,sans-serif;max-width:none}.drawn text{fill:var(--dim)}
.drawn .end{text-anchor:end}.drawn .mid{text-anchor:middle}
.drawn .compute{fill:var(--compute)}.drawn .sparse{fill:var(--sparse)}.drawn .reuse{fill:var(--reuse)}
.drawn .forecast{fill:var(--forecast)}.drawn .skip{fill:var(--bg);stroke:var(--skip);stroke-width:.6}
.drawn .sign{fill:none;stroke:var(--mark);stroke-width:1.3;pointer-events:none}.drawn .on-reuse{stroke:#1c2024}
.drawn .on-skip{stroke:var(--skip);stroke-width:1.6}.drawn .on-sparse{stroke:#fff}
.drawn .grid{stroke:var(--line)}.drawn .signal{fill:none;stroke:var(--fg);stroke-width:1.3}
.drawn .spread{stroke:var(--dim);stroke-width:3;opacity:.4}
.drawn .limit{stroke:var(--warn);stroke-width:1.6;stroke-dasharray:4 3}
.drawn .filled{fill:var(--compute);stroke:var(--compute)}.drawn .hollow{fill:var(--bg);stroke:var(--fg);stroke-width:1.3}
"""
"""What the drawings of reports need wherever they stand; every rule is about `svg.drawn`."""

STYLE = f"""
:root{{{PALETTE}}}
@media (prefers-color-scheme:dark){{:root{{{PALETTE_DARK}}}}}
""" + DRAWN + """*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);font:15px/1.45 system-ui,sans-serif}
main{max-width:960px;margin:0 auto;padding:24px 16px 64px}
h1{font-size:1.6rem;margin:0;overflow-wrap:anywhere}h2{font-size:1.05rem;margin:28px 0 8px}
.sub,small{color:var(--dim)}.sub{margin:4px 0 16px;overflow-wrap:anywhere}
.warning{border-left:5px solid var(--warn);background:var(--warnbg);color:var(--warn);padding:10px 14px;margin:10px 0;
overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(160px,1fr));gap:10px}
.tiles div{background:var(--panel);border-radius:8px;padding:12px 14px}
.tiles strong{display:block;font-size:1.45rem;font-variant-numeric:tabular-nums}.tiles span{color:var(--dim)}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:6px 22px;padding:0;margin:18px 0 0}
.legend svg.drawn{display:inline;vertical-align:-3px}
.scroll{overflow-x:auto}
.media{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,280px),1fr));gap:14px}
figure{margin:0}.media figcaption{color:var(--dim);margin-top:4px;overflow-wrap:anywhere}
.media video,.media img{width:100%;background:#000;border-radius:6px}
#together{margin-top:10px;padding:9px 16px;border:1px solid var(--line);border-radius:6px;background:var(--panel);
color:var(--fg);font:inherit;cursor:pointer}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}th,td{text-align:left;padding:5px 16px 5px 0;border-bottom:1px solid var(--line);
vertical-align:top}td{white-space:nowrap}.facts td{white-space:normal;overflow-wrap:anywhere}th{font-weight:600}.facts th{color:var(--dim);font-weight:400;white-space:nowrap}
pre{background:var(--panel);border-radius:8px;padding:12px 14px;overflow-x:auto;margin:0}
"""

SCRIPT = """const button=document.getElementById('together');
if(button)button.onclick=()=>{const all=[...document.querySelectorAll('video')];const start=all[0].paused;
all.forEach(v=>{v.currentTime=all[0].currentTime;start?v.play():v.pause()})};"""
