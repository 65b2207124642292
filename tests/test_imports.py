"""A module imports only from lower levels. A new module gets its level here, or this test fails."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import natgrad

LEVELS = {
    "trees": 0,
    "closed_forms": 0,
    "likelihoods": 0,
    "heads": 0,
    "layouts": 0,
    "rows": 0,
    "views": 0,
    "pieces": 0,
    "decomposed": 0,
    "averages": 0,
    "ops": 0,
    "capture": 0,
    "kronecker": 0,
    "sides": 0,
    "triangles": 0,
    "coverage": 0,
    "runs": 0,
    "jet": 0,
    "adam": 0,
    "compiled": 0,
    "huggingface": 0,
    "interrupts": 0,
    "packing": 0,
    "checkpoint_files": 0,
    "weight_average": 0,
    "step_arithmetic": 0,
    "operators": 0,
    "jacobian": 0,
    "solvers": 1,
    "iterative": 1,
    "options": 1,
    "metric": 1,
    "residuals": 1,
    "blocks": 1,
    "kronecker_blocks": 1,
    "kronecker_inverse": 1,
    "batched": 1,
    "eigenvalue_block": 1,
    "layers": 1,
    "passes": 1,
    "watch": 2,
    "metric_file": 2,
    "block_metric": 2,
    "fisher": 2,
    "covered": 2,
    "own_pass": 2,
    "linear_tap": 2,
    "layer_rows": 2,
    "root_metric": 2,
    "function_space": 2,
    "variational": 2,
    "quantum": 2,
    "hessian": 2,
    "steps": 2,
    "agreement": 2,
    "attendance": 2,
    "wrappers": 2,
    "ownership": 2,
    "searches": 2,
    "model_steps": 2,
    "normalised": 2,
    "rules": 2,
    "quadratic": 2,
    "spectra": 2,
    "optimizer": 3,
    "step_rules": 2,
    "estimator": 2,
    "collection": 1,
    "backward_pass": 1,
    "batch_statistics": 1,
    "structures": 1,
    "strategy": 1,
    "cholesky": 0,
    "krylov": 0,
    "metric_protocols": 0,
    "ranks": 2,
    "data_parallel": 2,
    "fully_sharded": 2,
    "fsdp": 2,
    "setup": 2,
    "report": 3,
    "journal": 3,
    "saved": 3,
    "checkpoint": 3,
    "inspect_figures": 4,
    "inspect_report": 4,
    "inspect_cli": 5,
    "tasks": 4,
    "solve_cli": 5,
    "cli": 5,
    "__main__": 5,
}

# Within the folder of tasks: what a task is, the tasks, the list of them, what runs them.
TASK_LEVELS = {
    "task": 0,
    "networks": 0,
    "problem": 0,
    "pictures": 0,
    "poisson": 1,
    "burgers": 1,
    "deep_ritz": 1,
    "ising": 1,
    "catalogue": 2,
    "files": 1,
    "idx": 1,
    "digits_autoencoder": 2,
    "digits_classifier": 3,
    "mnist_autoencoder": 3,
    "__init__": 4,
    "contenders": 1,
    "crew": 0,
    "launch": 1,
    "display": 1,
    "training": 2,
    "compare": 3,
}

ROOT = Path(natgrad.__file__).parent
MODULES = sorted(p.relative_to(ROOT) for p in ROOT.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Dotted names under natgrad that a file imports when it is loaded.

    What stands in functions or under TYPE_CHECKING does not run then; it only names types or breaks a cycle.
    """
    found: set[str] = set()

    def visit(nodes: list[ast.stmt]) -> None:
        for node in nodes:
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import; write it out"
                assert node.module is not None
                found.update(f"{node.module}.{alias.name}" for alias in node.names)
            elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
                visit(node.body + node.orelse)
            elif isinstance(node, ast.Try):
                visit(node.body)

    visit(ast.parse(path.read_text(encoding="utf-8")).body)
    return {name for name in found if name.split(".")[0] == "natgrad"}


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_go_down(module: Path) -> None:
    if module == Path("__init__.py"):
        return  # the package itself names what is public, from every level
    own = module.parts[0].removesuffix(".py")
    assert own in LEVELS, f"{module} has no level: add it to LEVELS"
    for name in imported(ROOT / module):
        parts = name.split(".")
        if len(parts) == 1 or parts[1] not in LEVELS:
            assert LEVELS[own] >= 4, f"{module} imports {name}: only tasks and the command line use the public names"
        elif parts[1] == own == "tasks":
            inner = module.stem
            assert inner in TASK_LEVELS, f"{module} has no level: add it to TASK_LEVELS"
            other = parts[2] if len(parts) > 2 and parts[2] in TASK_LEVELS else "__init__"
            assert TASK_LEVELS[other] <= TASK_LEVELS[inner], f"{module} imports {name} from a higher level"
        else:
            assert LEVELS[parts[1]] <= LEVELS[own], f"{module} imports {name} from a higher level"


def test_no_level_is_left_over_for_tasks() -> None:
    assert set(TASK_LEVELS) == {p.stem for p in (ROOT / "tasks").glob("*.py")}
