"""`natgrad inspect`: one page about a metric and the run that made it, which opens without a network."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import natgrad
from natgrad.cli.inspect import figures as figures
from natgrad.cli.inspect import spectra
from natgrad.cli.inspect.spectra import SavedMetric, Spectrum
from natgrad.fisher.coverage import readable
from natgrad.optim import journal
from natgrad.optim.normalised import NormalisedStep
from natgrad.state.files import write_whole

METRIC = "metric.safetensors"  # in the folder of a run
PAGE = "inspect.html"

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1180px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .4rem; }
p.note { color: #555; max-width: 46rem; } .path { color: #555; word-break: break-all; }
.tiles { display: flex; flex-wrap: wrap; gap: .6rem 2.2rem; margin: 1.2rem 0; }
.tile b { display: block; font-size: 1.35rem; font-weight: 600; } .tile span { color: #555; font-size: .85rem; }
.verdict { border-left: 4px solid #0072B2; padding: .3rem .9rem; background: #f3f7fa; }
.verdict.warn { border-color: #D55E00; background: #fdf3ec; }
img { max-width: 100%; height: auto; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .86rem; }
th, td { text-align: right; padding: .22rem .55rem; border-bottom: 1px solid #e4e4e4; white-space: nowrap; }
th:first-child, td:first-child, td.left, th.left { text-align: left; } th { font-weight: 600; }
td.warn { color: #B04A00; font-weight: 600; }
"""


@dataclass(frozen=True)
class Source:
    """What was found under the path that the user gave."""

    given: Path
    metric: Path
    records: list[dict[str, Any]]

    @property
    def last(self) -> dict[str, Any]:
        return self.records[-1] if self.records else {}

    @property
    def cosines(self) -> dict[str, Any]:
        return self.last.get("cosines", {})


def find(given: str | os.PathLike[str]) -> Source:
    """The metric file and the journal of a run's folder, or of the folder that a metric file lies in.

    Raises:
        FileNotFoundError: there is no metric file.
        ValueError: the journal cannot be read.
    """
    path = Path(given)
    metric = path / METRIC if path.is_dir() else path
    if not metric.is_file():
        what = f"the folder {path} holds no {METRIC}" if path.is_dir() else f"there is no file {path}"
        raise FileNotFoundError(f"{what}; `natgrad train --out DIR` writes one, and so does metric.save(path)")
    log = metric.parent / journal.NAME
    return Source(path, metric, list(journal.lines(log)) if log.is_file() else [])


def write(given: str | os.PathLike[str], page: Path | None = None, damping: float | None = None) -> list[Path]:
    """Write the page, and its figures beside it as PNG; the files written, the page first.

    Args:
        given: the folder of a run, or a metric file.
        page: the HTML file; None puts it beside the metric.
        damping: relative damping to show; None takes the run's, or the default step rule's.

    Raises:
        FileNotFoundError, ValueError: as `find` and `natgrad.cli.inspect.spectra.load`; or the metric has seen no data.
    """
    source = find(given)
    relative = damping is not None or str(source.last.get("damping_meaning", "relative")).startswith("relative")
    value = damping if damping is not None else float(source.last.get("damping") or NormalisedStep().damping)
    metric = spectra.load(source.metric, value, relative)
    if not metric.spectra:
        raise ValueError(f"the metric in {source.metric} has seen no data: there is no spectrum to show")
    page = source.metric.with_name(PAGE) if page is None else page
    drawn = draw(metric, source)
    written = [page]
    for name, image in drawn.items():
        written.append(page.with_name(f"{page.stem}-{name}.png"))
        write_whole(written[-1], image)
    write_whole(page, render(metric, source, value, relative, drawn).encode())
    return written


def escaped(text: object) -> str:
    """Return what a file says, for the page to show and not to run."""
    return html.escape(str(text))


def draw(metric: SavedMetric, source: Source) -> dict[str, bytes]:
    found = metric.spectra
    names = [s.name for s in found]
    last = [source.cosines.get(n) for n in names]
    drawn = {
        "cosines": figures.png(figures.cosines(names, [s.cosine for s in found], last)),
        "spectra": figures.png(figures.spectra(found)),
    }
    if len(source.records) > 1:
        drawn["over-time"] = figures.png(figures.over_time(source.records))
    return drawn


def render(metric: SavedMetric, source: Source, damping: float, relative: bool, drawn: Mapping[str, bytes]) -> str:
    about = metric.about
    kind = "relative to the mean eigenvalue" if relative else "absolute"
    parts = [
        f"<h1>natgrad inspect</h1><p class=path>{escaped(source.given)}</p>",
        f"<p>{escaped(about['criterion'])} ({escaped(about['reduction'])}), kind “{escaped(about['kind'])}”, "
        f"{len(metric.parameters)} parameters in {len(metric.spectra)} blocks, {about['seen']:,} data seen, "
        f"damping {damping:g} ({kind}).</p>",
        tiles(source.last, metric),
        verdict(metric.spectra, source.cosines),
        section(
            "Is it still natural gradient?",
            "The cosine between the direction taken and the gradient, for each block. Open circles are what spectrum "
            "and damping let expect of a gradient drawn from the metric itself; full ones are the last step of the run. "  # noqa: E501
            "At 1 the metric has no say: lower the damping, or look for a scale that makes the factors too small.",
            image("cosines", drawn),
        ),
    ]
    if "over-time" in drawn:
        parts.append(section("Over time", "", image("over-time", drawn)))
    shown = min(len(metric.spectra), figures.PANELS)
    which = "Each block" if shown == len(metric.spectra) else f"The {shown} largest of {len(metric.spectra)} blocks"
    parts += [
        section(
            "Spectra",
            f"{which}: eigenvalues in descending order, and as damped. Where the curves part, damping decides.",
            image("spectra", drawn),
        ),
        section("Blocks", "", block_table(metric.spectra, source.cosines)),
        section("Coverage", "", coverage(metric)),
    ]
    body = "\n".join(parts)
    return (
        f"<!doctype html>\n<html lang=en><meta charset=utf-8>\n<meta name=viewport content='width=device-width'>\n"
        f"<title>natgrad inspect: {escaped(source.given.name)}</title>\n<style>{STYLE}</style>\n<body>\n{body}\n"
        f"<p class=note>natgrad {natgrad.__version__}</p>\n</body></html>\n"
    )


def tiles(last: Mapping[str, Any], metric: SavedMetric) -> str:
    shown: list[tuple[str, str]] = []
    if last:
        shown += [(f"{last['steps']:,}", "steps"), (f"{last['refreshes']:,}", "refreshes")]
        shown += [(f"{100 * last['share_of_time']:.0f} %", "of the time inside step()")]
        shown += [
            (str(last[k]), k.replace("_", " ")) for k in ("skipped", "dropped_statistics", "kept_factors") if k in last
        ]
    total = sum(s.memory for s in metric.spectra)
    shown += [(readable(total), "of statistics"), (str(len(metric.uncovered)), "parameters without curvature")]
    return (
        "<div class=tiles>"
        + "".join(f"<div class=tile><b>{escaped(b)}</b><span>{escaped(t)}</span></div>" for b, t in shown)
        + "</div>"
    )


def verdict(found: Sequence[Spectrum], last: Mapping[str, Any]) -> str:
    """One sentence: whether the metric has a say."""
    now: dict[str, float] = {s.name: s.cosine if last.get(s.name) is None else last[s.name] for s in found}
    plain = [n for n, c in now.items() if c >= figures.PLAIN]
    if not plain:
        said = "No block has become plain gradient descent: every direction differs from its gradient."
        return f"<p class=verdict>{said}</p>"
    which = "Every block" if len(plain) == len(now) else f"{len(plain)} of {len(now)} blocks"
    listed = "" if len(plain) == len(now) else " (" + escaped(", ".join(plain)) + ")"
    return (
        f"<p class='verdict warn'>{which}{listed}: the direction is the gradient to within {figures.PLAIN:g}. There the "  # noqa: E501
        "metric changes the length of the step and nothing else.</p>"
    )


def section(title: str, note: str, body: str) -> str:
    return f"<h2>{title}</h2>" + (f"<p class=note>{note}</p>" if note else "") + body


def image(name: str, drawn: Mapping[str, bytes]) -> str:
    return f"<img alt='{name}' src='data:image/png;base64,{base64.b64encode(drawn[name]).decode()}'>"


def block_table(found: Sequence[Spectrum], last: Mapping[str, Any]) -> str:
    heads = (
        "block",
        "structure",
        "sizes",
        "memory",
        "largest",
        "condition",
        "zero",
        "effective rank",
        "below damping",
        "cos, expected",
        "cos, last",
    )
    rows = []
    for s in found:
        cos = last.get(s.name)
        warn = " class=warn" if (cos if cos is not None else s.cosine) >= figures.PLAIN else ""
        cells = [
            f"<td class=left>{escaped(', '.join(s.names))}</td><td class=left>{escaped(s.structure)}</td>",
            f"<td>{escaped(s.sizes)}</td><td>{readable(s.memory)}</td><td>{float(s.values[0]):.2g}</td>",
            f"<td>{s.condition:.1e}</td><td>{s.null} of {len(s.values):,}</td><td>{s.effective_rank:.1f}</td>",
            f"<td>{100 * s.damped_share:.0f} %</td><td>{s.cosine:.3f}</td>",
            f"<td{warn}>{'' if cos is None else f'{cos:.3f}'}</td>",
        ]
        rows.append("<tr>" + "".join(cells) + "</tr>")
    head = "".join(f"<th{' class=left' if h == 'structure' else ''}>{h}</th>" for h in heads)
    return f"<div class=wide><table><tr>{head}</tr>{''.join(rows)}</table></div>"


def coverage(metric: SavedMetric) -> str:
    if not metric.uncovered:
        return "<p>Every parameter has a block.</p>"
    rows = "".join(
        f"<tr><td>{escaped(n)}</td><td>{escaped('×'.join(map(str, metric.parameters[n])) or 'scalar')}</td></tr>"
        for n in metric.uncovered
    )
    return (
        "<p class=note>No block holds these; the optimizer trains them by an Adam-like rule. "
        "<code>print(metric.coverage())</code> says why.</p>"
        f"<table><tr><th>parameter</th><th>shape</th></tr>{rows}</table>"
    )
