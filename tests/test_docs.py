"""The code in the README and the documentation runs: each page's ```python blocks in order, in one namespace."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGES = [
    page for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if "```python" in page.read_text()
]
NEEDS: dict[str, str] = {}  # page name → optional package, without which it is skipped

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = NEEDS.get(page.name)
    if package is not None and importlib.util.find_spec(package) is None:
        pytest.skip(f"{page.name} needs {package}")
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    namespace: dict[str, object] = {"__name__": page.stem}
    default = torch.get_default_dtype()
    try:
        for match in BLOCK.finditer(text):
            line = text.count("\n", 0, match.start(1))
            # blank lines in front, so that an error names the line of the page
            exec(compile("\n" * line + match.group(1), str(page), "exec"), namespace)
    finally:
        torch.set_default_dtype(default)


def test_there_are_pages_with_code() -> None:
    assert {"README.md", "mathematics.md"} <= {page.name for page in PAGES}


def test_links_and_pictures_exist() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"
