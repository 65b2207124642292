"""Blocks fenced as ```math become MathML when the pages are built: no script, no font, nothing to fetch."""

from __future__ import annotations

from typing import Any

from latex2mathml.converter import convert


def fence(source: str, language: str, css_class: str, options: dict[str, Any], md: Any, **kwargs: Any) -> str:
    """A display equation for each blank-line-separated formula."""
    return "".join(f"<p>{convert(formula, display='block')}</p>" for formula in source.strip().split("\n\n"))


def on_config(config: Any) -> Any:
    """Registers the fence here: mkdocs.yml can only name functions of installed modules."""
    fences = config["mdx_configs"].setdefault("pymdownx.superfences", {}).setdefault("custom_fences", [])
    fences.append({"name": "math", "class": "math", "format": fence})
    return config
