"""The fixed parts of the report page: measures, style, patterns and the one small script."""

from __future__ import annotations

GUTTER = 44
"""Pixels left of the first step, for the labels of rows."""


def column(steps: int) -> int:
    """Width of one step in pixels: wide for few steps; many steps scroll."""
    return max(11, min(30, 800 // max(steps, 1)))


def canvas(steps: int) -> int:
    """Width of a drawing in pixels: all steps, and room for the headings of very short runs."""
    return max(GUTTER + steps * column(steps) + 8, 480)


STYLE = """
:root{--bg:#fff;--fg:#1c2024;--dim:#5b6570;--line:#d9dee3;--panel:#f5f7f9;--mark:#fff;
--compute:#0063a6;--reuse:#e39b00;--forecast:#00875f;--skip:#8b95a0;--warn:#8a1c00;--warnbg:#fff0e8}
@media (prefers-color-scheme:dark){:root{--bg:#14171a;--fg:#e8ebee;--dim:#9aa5b1;--line:#333b43;--panel:#1d2226;
--mark:#14171a;--compute:#4ea8de;--reuse:#f0b429;--forecast:#3cc79a;--skip:#7d8894;--warn:#ffb59e;--warnbg:#3a1d14}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);font:15px/1.45 system-ui,sans-serif}
main{max-width:960px;margin:0 auto;padding:24px 16px 64px}
h1{font-size:1.6rem;margin:0;overflow-wrap:anywhere}h2{font-size:1.05rem;margin:28px 0 8px}
.sub,small{color:var(--dim)}.sub{margin:4px 0 16px;overflow-wrap:anywhere}
.warning{border-left:5px solid var(--warn);background:var(--warnbg);color:var(--warn);padding:10px 14px;margin:10px 0;
overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(160px,1fr));gap:10px}
.tiles div{background:var(--panel);border-radius:8px;padding:12px 14px}
.tiles strong{display:block;font-size:1.45rem}.tiles span{color:var(--dim)}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:6px 22px;padding:0;margin:18px 0 0}
.legend svg{vertical-align:-3px}
.scroll{overflow-x:auto}svg{display:block;font:11px system-ui,sans-serif}.legend svg{display:inline}
text{fill:var(--dim)}.end{text-anchor:end}.mid{text-anchor:middle}
.compute{fill:var(--compute)}.reuse{fill:url(#p-reuse)}.forecast{fill:url(#p-forecast)}
.skip{fill:url(#p-skip);stroke:var(--skip);stroke-width:.6}
.grid{stroke:var(--line)}.signal{fill:none;stroke:var(--fg);stroke-width:1.3}.spread{stroke:var(--dim);stroke-width:3;opacity:.4}
.limit{stroke:var(--warn);stroke-width:1.6;stroke-dasharray:4 3}
.filled{fill:var(--compute);stroke:var(--compute)}.hollow{fill:var(--bg);stroke:var(--fg);stroke-width:1.3}
.media{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,280px),1fr));gap:14px}
figure{margin:0}figcaption{color:var(--dim);margin-top:4px;overflow-wrap:anywhere}
video,img{width:100%;background:#000;border-radius:6px}
button{margin-top:10px;padding:9px 16px;border:1px solid var(--line);border-radius:6px;background:var(--panel);
color:var(--fg);font:inherit;cursor:pointer}
table{border-collapse:collapse}th,td{text-align:left;padding:5px 16px 5px 0;border-bottom:1px solid var(--line);
vertical-align:top}td{white-space:nowrap}.facts td{white-space:normal;overflow-wrap:anywhere}th{font-weight:600}.facts th{color:var(--dim);font-weight:400;white-space:nowrap}
pre{background:var(--panel);border-radius:8px;padding:12px 14px;overflow-x:auto;margin:0}
"""

PATTERNS = """<svg width="0" height="0" style="position:absolute" aria-hidden="true"><defs>
<pattern id="p-reuse" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">
<rect width="5" height="5" style="fill:var(--reuse)"/><rect width="1.6" height="5" style="fill:var(--mark)"/></pattern>
<pattern id="p-forecast" width="5" height="5" patternUnits="userSpaceOnUse">
<rect width="5" height="5" style="fill:var(--forecast)"/><circle cx="2.5" cy="2.5" r="1.2" style="fill:var(--mark)"/></pattern>
<pattern id="p-skip" width="6" height="6" patternUnits="userSpaceOnUse">
<rect width="6" height="6" style="fill:var(--bg)"/><circle cx="3" cy="3" r=".9" style="fill:var(--skip)"/></pattern>
</defs></svg>"""

SCRIPT = """const button=document.getElementById('together');
if(button)button.onclick=()=>{const all=[...document.querySelectorAll('video')];const start=all[0].paused;
all.forEach(v=>{v.currentTime=all[0].currentTime;start?v.play():v.pause()})};"""
