"""``natgrad solve`` and the problems it ships."""

import math

import pytest
import torch
import typer
from typer.testing import CliRunner

import natgrad as ng
from natgrad.cli.app import main
from natgrad.cli.problems.burgers import VISCOSITY, exact_solution
from natgrad.cli.problems.catalogue import PROBLEMS
from natgrad.cli.problems.poisson import pair_products, sine_product
from natgrad.cli.solve import pick_network, solve

app = typer.Typer()
app.command()(solve)


def invoke(*words):
    return CliRunner().invoke(app, list(words), env={"COLUMNS": "200"})


def test_first_losses_are_the_published_ones():
    """Same seeds and draws as the published curves."""
    expected = {
        ("poisson2d", "small"): 48.92347435,
        ("poisson2d", "large"): 46.92645720,
        ("poisson5d", "small"): 121.7103353,
    }
    for (name, network), loss in expected.items():
        problem = PROBLEMS[name]
        setting = problem.prepare(problem.networks[network], 1)
        metric = setting.metric("auto")
        assert isinstance(metric, ng.GaussNewton)
        got = float(metric.observe(setting.batch(0)))
        assert got == pytest.approx(loss, rel=1e-8)


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_problem_steps_downhill_and_draws(name, tmp_path):
    problem = PROBLEMS[name]
    widths = {"ising-chain": (6, 4), "deep-ritz": (1, 6, 1)}.get(name, (next(iter(problem.networks.values()))[0], 6, 1))
    result = invoke(name, "--network", "-".join(map(str, widths)), "--steps", "3", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    rows = [r.split(",") for r in (tmp_path / "log.csv").read_text().splitlines()]
    assert [r[0] for r in rows[1:]] == ["1", "2", "3"]
    assert all(math.isfinite(float(v)) for r in rows[1:] for v in r)
    if name in ("poisson2d", "burgers", "deep-ritz"):
        assert float(rows[3][2]) <= float(rows[1][2])
    for picture in ("solution.png", "error_field.png", "error_curve.png"):
        assert (tmp_path / picture).stat().st_size > 5000


def test_exact_solutions_solve_their_equations():
    x = torch.rand(5, 2, dtype=torch.float64)

    def lap(u, x):
        return torch.stack([torch.func.hessian(lambda y: u(y[None])[0])(p).trace() for p in x])

    torch.testing.assert_close(lap(sine_product, x), -2 * math.pi**2 * sine_product(x))
    torch.testing.assert_close(
        lap(pair_products, torch.rand(3, 10, dtype=torch.float64)), torch.zeros(3, dtype=torch.float64)
    )
    at = torch.tensor([0.3, 0.4], dtype=torch.float64)

    def u(p):
        return exact_solution(p[None])[0]

    (u_t, u_x), u_xx = torch.func.jacrev(u)(at), torch.func.hessian(u)(at)[1, 1]
    assert abs(float(u_t + u(at) * u_x - VISCOSITY * u_xx)) < 1e-6
    start = torch.tensor([[0.0, 0.25]], dtype=torch.float64)
    assert float(exact_solution(start)) == pytest.approx(-math.sin(math.pi / 4), abs=1e-6)


def test_resume_goes_on_where_it_stopped(tmp_path):
    words = ["poisson5d", "--network", "5-6-1"]
    for folder, steps in (("whole", ["4"]), ("parts", ["2", "4"])):
        for i, n in enumerate(steps):
            result = invoke(*words, "--out", str(tmp_path / folder), "--steps", n, *["--resume"] * bool(i))
            assert result.exit_code == 0, result.output

    def read(folder):
        return [r.split(",")[2:] for r in (tmp_path / folder / "log.csv").read_text().splitlines()]

    assert read("whole") == read("parts")
    other = invoke(*words, "--out", str(tmp_path / "parts"), "--seed", "2", "--resume")
    assert other.exit_code == 2
    assert "seed was 1, is 2" in " ".join(other.output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["poison2d"], "there is no problem 'poison2d'; the problems are poisson2d, poisson5d"),
        (["poisson2d", "--solver", "qr"], "solver must be one of 'auto'"),
        (["poisson2d", "--network", "big"], "'big' is neither one of small, large nor widths"),
        (["poisson2d", "--network", "3-5-1"], "looks like 2-64-1, got 3-5-1"),
        (["poisson2d", "--resume", "--out", "nowhere"], "there is no checkpoint"),
        (["poisson2d", "--seconds=-1"], "Invalid value for '--seconds'"),
    ],
)
def test_wrong_words_are_answered(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke(*words)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


def test_no_time_takes_no_step(tmp_path):
    result = invoke("deep-ritz", "--seconds", "0", "--out", str(tmp_path))
    assert result.exit_code == 1
    assert "no step was taken" in result.output


def test_widths_and_names():
    problem = PROBLEMS["poisson2d"]
    assert pick_network(problem, "") == ("small", (2, 64, 1))
    assert pick_network(problem, "large") == ("large", (2, 64, 64, 48, 48, 1))
    assert pick_network(problem, "2-7-1") == ("2-7-1", (2, 7, 1))


def test_errors_point_to_the_help_of_the_command_that_was_typed(capsys):
    assert main(["solve", "poisson2d", "--solver", "qr"]) == 2
    assert capsys.readouterr().err.rstrip().endswith("got 'qr'. Try 'natgrad solve --help'.")
    assert main(["slove"]) == 2
    assert capsys.readouterr().err.rstrip().endswith("Did you mean 'solve'? Try 'natgrad --help'.")
