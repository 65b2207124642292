"""Imports run one way: from room to room, and from file to file inside a room, wherever they stand."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import natgrad

# Each room may import those before it.
ROOMS = ("linalg", "metric", "capture", "blocks", "distributed", "fisher", "function_space", "optim", "uses", "cli")
FACES = (
    "__init__",
    "__main__",
    "operators",
    "checkpoint",
    "huggingface",
    "testing",
)  # public names, and what needs none of them

ROOT = Path(natgrad.__file__).parent
MODULES = sorted(p.relative_to(ROOT) for p in ROOT.rglob("*.py"))
LONGEST = 400  # lines of a file


def name_of(module: Path) -> str:
    parts = ("natgrad", *module.with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(m): m for m in MODULES}


def imported(module: Path) -> set[str]:
    """Files of natgrad that a file imports: at its top, in functions, under TYPE_CHECKING."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import; write it out"
            assert node.module is not None
            named = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {n if n in FILES else node.module for n in named}
    return {n for n in found if n in FILES}


def room_of(module: Path) -> str:
    return module.parts[0].removesuffix(".py")


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_go_down(module: Path) -> None:
    own = room_of(module)
    assert own in (*ROOMS, *FACES), f"{module} is in no room: add it to ROOMS"
    if own in FACES:
        return
    for name in imported(module):
        other = room_of(FILES[name])
        if other in FACES:
            assert own == "cli", f"{module} imports {name}: only the command line uses the public names"
        else:
            assert ROOMS.index(other) <= ROOMS.index(own), f"{module} imports {name} from a higher room"


def test_no_files_import_each_other_in_a_circle() -> None:
    try:
        TopologicalSorter({n: imported(m) for n, m in FILES.items()}).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {error.args[1]}")


def test_a_stranger_finds_few_rooms_and_short_files() -> None:
    assert len({room_of(m) for m in MODULES}) <= 16
    long = {str(m): n for m in MODULES if (n := len((ROOT / m).read_text(encoding="utf-8").splitlines())) > LONGEST}
    assert not long, f"files of more than {LONGEST} lines: {long}"


def test_the_metric_does_without_the_compiler() -> None:
    """Importing torch._dynamo takes a second, which the first refresh would have to wait for."""
    code = (
        "import sys, torch, natgrad as ng; model = torch.nn.Linear(3, 2); "
        "metric = ng.Fisher(model, torch.nn.MSELoss()); metric.update(torch.randn(5, 3)); metric.factors('weight'); "
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
