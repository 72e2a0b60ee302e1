"""The page around a report: headings, tables, texts and places for charts; styles and scripts are inside the file."""

import html
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from embedsmith.core.errors import MissingExtraError
from embedsmith.core.files import atomic_file
from embedsmith.evaluate.result import finite_or_none


@dataclass(frozen=True)
class Section:
    """One heading with its content, which is HTML already. `key` is its anchor."""

    key: str
    title: str
    body: str


PAGE_MARK = '<link rel="icon" href="data:,"><style>'
"""Stands in every page that is made here, so that one is told from another's file."""


def page(title: str, lead: str, summary: Sequence[str], sections: Sequence[Section]) -> str:
    """The whole document. Errors: `MissingExtraError` where a chart is wanted and plotly is not installed."""
    shown = [section for section in sections if section.body]
    links = "".join(f'<a href="#{section.key}">{html.escape(section.title)}</a>' for section in shown)
    parts = "".join(
        f'<section id="{section.key}"><h2>{html.escape(section.title)}</h2>{section.body}</section>'
        for section in shown
    )
    words = "".join(f"<p>{paragraph}</p>" for paragraph in summary)
    words = f'<div class="summary">{words}</div>' if words else ""
    script = ""
    if 'class="chart"' in parts:
        try:
            from plotly.offline import get_plotlyjs
        except ImportError as error:
            raise MissingExtraError("plotly", "report") from error
        plotly = str(get_plotlyjs()).replace("</script", "<\\/script")
        script = f"<script>{plotly}</script><script>{_DRAW}</script>"
    return _PAGE.format(
        title=html.escape(title),
        lead=html.escape(lead),
        style=_STYLE,
        links=links,
        words=words,
        parts=parts,
        script=script,
    )


def chart(
    data: Sequence[dict[str, Any]], *, title: str, x: str = "", y: str = "", height: int = 340, **layout: Any
) -> str:
    """A plotly figure by its traces; colours and sizes come from the page."""
    axes = {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}}
    for name, more in layout.items():
        axes[name] = {**axes.get(name, {}), **more} if isinstance(more, dict) else more
    spec = json.dumps({"data": list(data), "layout": {"height": height, **axes}}, allow_nan=False).replace(
        "<", "\\u003c"
    )
    return (
        f'<figure><figcaption>{html.escape(title)}</figcaption><div class="chart" style="height:{height}px"></div>'
        f'<script type="application/json">{spec}</script></figure>'
    )


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], numbers_from: int = 1, numbers_to: int | None = None
) -> str:
    """A table. Cells are HTML; columns from `numbers_from` to before `numbers_to` (the end by default) are aligned to
    the right. With `numbers_to` the last column is words about the row; on a phone they stand below its numbers."""
    stop = len(head) if numbers_to is None else numbers_to
    if not rows:
        return ""

    def line(cells: Sequence[str], tag: str) -> str:
        kinds = (" class=n" if numbers_from <= place < stop else "" for place in range(len(cells)))
        return "".join(f"<{tag}{kind}>{cell}</{tag}>" for cell, kind in zip(cells, kinds))

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    names = line([html.escape(name) for name in head], "th")
    kind = "" if numbers_to is None else ' class="told"'
    return f'<div class="wide"><table{kind}><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table></div>'


def finite(values: Sequence[float]) -> list[float | None]:
    """Numbers as JSON has them: what is not finite is a gap in a chart."""
    return [finite_or_none(value) for value in values]


def charts(figures: Sequence[str]) -> str:
    """Figures side by side where there is room; those that are empty are left out."""
    shown = [each for each in figures if each]
    return f'<div class="charts">{"".join(shown)}</div>' if shown else ""


_PACKAGES = ("embedsmith", "torch", "transformers", "accelerate", "numpy", "sentence-transformers", "mteb")


def environment() -> dict[str, str]:
    """Versions and machine, for the report and for repeating the run."""
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def save_environment(output: Path) -> None:
    """Versions and machine of this start of the run, as `environment.json`."""
    with atomic_file(output / "environment.json") as file:
        json.dump(environment(), file, indent=2)


def environment_section(saved: Mapping[str, Any] | None) -> Section:
    """What was saved with the run; without it, what there is now."""
    rows = [[html.escape(str(k)), html.escape(str(v))] for k, v in (saved or environment()).items()]
    note = "" if saved is not None else '<p class="soft">Of the machine that made this report.</p>'
    return Section("environment", "Environment", note + table(("what", "version"), rows, numbers_from=9))


_STYLE = """
:root{color-scheme:light dark;--bg:#fbfaf8;--card:#fff;--ink:#1d2125;--soft:#5d666f;--line:#e2ddd5;--accent:#0b6e69;
--good:#1a7f4b;--bad:#b3372f}
@media (prefers-color-scheme:dark){:root{--bg:#14171a;--card:#1c2024;--ink:#e6e4e0;--soft:#9aa4ad;--line:#30363c;
--accent:#5cc7bf;--good:#63c78d;--bad:#ee8077}}
*{box-sizing:border-box}html{scroll-behavior:smooth;scroll-padding-top:3.4rem;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
header,main{max-width:1080px;margin:0 auto;padding:0 20px}header{padding-top:28px}
h1{font-size:1.6rem;line-height:1.25;margin:0 0 4px;overflow-wrap:anywhere}.lead{color:var(--soft);margin:0 0 14px;
overflow-wrap:anywhere}
.summary{background:var(--card);border:1px solid var(--line);border-left:4px solid var(--accent);border-radius:8px;
padding:4px 18px;margin:0 0 16px}.summary p{margin:.6rem 0}
nav{position:sticky;top:0;z-index:5;background:var(--bg);border-bottom:1px solid var(--line)}
nav div{max-width:1080px;margin:0 auto;padding:8px 20px;display:flex;flex-wrap:wrap;gap:4px 12px;white-space:nowrap}
nav a{color:var(--accent);text-decoration:none;font-size:.92rem}nav a:hover{text-decoration:underline}
section{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 18px 18px;margin:18px 0}
h2{font-size:1.15rem;margin:.2rem 0 .8rem}h3{font-size:1rem;margin:1.1rem 0 .4rem}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,430px),1fr));gap:14px}
figure{margin:0;min-width:0}figcaption{font-weight:600;font-size:.92rem;margin:6px 0 2px}
.chart{width:100%;min-width:0;overflow:hidden}
.wide{overflow-x:auto}.charts+.wide{margin-top:18px}table{border-collapse:collapse;width:100%;font-size:.92rem;font-variant-numeric:tabular-nums}
th,td{padding:6px 10px;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}th{color:var(--soft);
font-weight:600}.n{text-align:right;white-space:nowrap}.good{color:var(--good)}.bad{color:var(--bad)}.soft{color:var(--soft)}
details{border:1px solid var(--line);border-radius:8px;margin:8px 0;padding:0 12px}summary{cursor:pointer;padding:8px 0;
overflow-wrap:anywhere}
.text{margin:4px 0 10px;padding-left:10px;border-left:3px solid var(--line);white-space:pre-wrap;overflow-wrap:anywhere}
.label{color:var(--soft);font-size:.85rem;margin:8px 0 0}pre{overflow:auto;max-height:26rem;font-size:.84rem;
line-height:1.45;margin:6px 0}
.steps{margin:0;padding-left:1.3rem}.steps li{margin:.5rem 0}.command{white-space:pre-wrap;overflow-wrap:anywhere;
border:1px solid var(--line);border-radius:6px;padding:8px 10px}
footer{max-width:1080px;margin:0 auto;padding:6px 20px 40px;color:var(--soft);font-size:.85rem}
@media (max-width:600px){header,main{padding-left:12px;padding-right:12px}section{padding:10px 12px 14px}
h1{font-size:1.3rem}nav{position:static}nav div{padding:8px 12px;flex-wrap:wrap;white-space:normal}
html{scroll-padding-top:.5rem}th,td{padding:5px 7px;overflow-wrap:anywhere}
th.n,td.n{white-space:normal;overflow-wrap:normal}
pre{white-space:pre-wrap;overflow-wrap:anywhere}
.told tr{display:flex;flex-wrap:wrap;border-bottom:1px solid var(--line)}
.told th,.told td{border:0}.told tr>:first-child{flex:1 1 0}.told tr>:last-child{flex:1 0 100%;padding-top:0}
.told thead th:last-child{display:none}}
"""

_DRAW = """
(function(){
const dark=window.matchMedia('(prefers-color-scheme: dark)');
function theme(){const s=getComputedStyle(document.documentElement),v=n=>s.getPropertyValue(n).trim();
return {ink:v('--ink'),soft:v('--soft'),line:v('--line'),card:v('--card')};}
function styled(layout){const t=theme(),phone=window.innerWidth<600,out=Object.assign({},layout);
const axis={gridcolor:t.line,zerolinecolor:t.line,linecolor:t.line,automargin:true};
for(const k of Object.keys(layout).filter(k=>/^[xy]axis/.test(k)))out[k]=Object.assign({},axis,layout[k]);
return Object.assign({paper_bgcolor:'rgba(0,0,0,0)',plot_bgcolor:'rgba(0,0,0,0)',font:{color:t.ink,size:phone?11:12},
margin:{l:8,r:8,t:8,b:8},hoverlabel:{bgcolor:t.card,font:{color:t.ink}},
legend:{orientation:'h',x:0,y:1.02,yanchor:'bottom',font:{size:phone?10:11}},
colorway:dark.matches?['#5cc7bf','#f0a35e','#9db7f5','#ee8fb0','#b5cf6b','#c9a8f0','#e6d36b','#8fd0ee']
:['#0b7a74','#c2570c','#3d5fc0','#b0316a','#5a7d12','#7a45b8','#8f7500','#1f7aa8']},out);}
const charts=[...document.querySelectorAll('.chart')].map(node=>({node,
spec:JSON.parse(node.parentNode.querySelector('script').textContent)}));
function draw(){for(const c of charts)Plotly.react(c.node,c.spec.data,styled(c.spec.layout),
{responsive:true,displaylogo:false,displayModeBar:false});}
draw();dark.addEventListener('change',draw);
document.querySelectorAll('details').forEach(d=>d.addEventListener('toggle',()=>{
d.querySelectorAll('.chart').forEach(n=>Plotly.Plots.resize(n));}));
})();
"""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><link rel="icon" href="data:,"><style>{style}</style></head><body>
<header><h1>{title}</h1><p class="lead">{lead}</p>{words}</header>
<nav><div>{links}</div></nav><main>{parts}</main>
<footer>Made with embedsmith. This file needs no network.</footer>
{script}</body></html>
"""
