"""The comparison: what is planned, what comes out, and how it is told."""

import csv
import io
import math
from pathlib import Path

import pytest
from rich.console import Console

from lightning_mtl.cli import main, report
from lightning_mtl.cli.compare import Run, Trained, collect, load, plan
from lightning_mtl.cli.comparison import Change, Comparison, Curves, Results, Row

ARMS = {"alone": ["--model.tasks=[a]", "--model.tasks=[b]"], "both, equal": ["--model.lr 0.5"]}
COMPARISON = Comparison(ARMS, {"a/accuracy": True, "b/mse": False}, "alone", lambda results: ["It says so."])


def results(seeds: int = 3, folder: Path | None = None) -> Results:
    rows = []
    for arm, worse in (("alone", 0.0), ("both, equal", 0.1)):
        for seed in range(seeds):
            scores = {"a/accuracy": 0.9 - worse + 0.01 * seed, "b/mse": 0.05 + worse}
            folders = [] if folder is None else [folder / f"{arm}-{seed}"]
            rows.append(Row(arm, seed, scores, 100 * worse, 3.0, folders))
    return Results(rows)


def test_one_run_per_command_line_and_seed():
    runs = plan(COMPARISON, Path("out"), [0, 4], ["alone", "both, equal"], ["--data.rows=8"])
    names = ["alone-1-seed0", "alone-2-seed0", "both-equal-seed0", "alone-1-seed4", "alone-2-seed4", "both-equal-seed4"]
    assert [run.folder.name for run in runs] == names
    last = runs[-1]
    assert (last.arm, last.seed) == ("both, equal", 4)
    assert last.arguments[0] == "fit"
    assert "--seed_everything=4" in last.arguments
    assert last.arguments[-3:] == ("--model.lr", "0.5", "--data.rows=8")


def test_delta_m_is_against_the_base_on_the_same_seed():
    done = {}
    for seed, level in ((0, 0.8), (1, 0.5)):
        for number, scores in enumerate(({"a/accuracy": level}, {"b/mse": 0.1})):
            done[Run("alone", seed, (), Path(f"alone-{number}-{seed}"))] = Trained(scores | {"loss": 1.0}, 2.0)
        done[Run("both, equal", seed, (), Path(f"both-{seed}"))] = Trained({"a/accuracy": 0.4, "b/mse": 0.1}, 3.0)
    found = collect(COMPARISON, done)
    assert found.arms == ["alone", "both, equal"]
    assert found.seeds == [0, 1]
    assert found.of("alone", "delta_m") == [0.0, 0.0]
    assert found.of("both, equal", "delta_m") == pytest.approx([25.0, 10.0])
    assert found.of("alone", "seconds") == [4.0, 4.0]
    assert found.of("alone", "a/accuracy") == [0.8, 0.5]
    assert all(math.isnan(value) for value in found.of("alone", "loss"))


def test_an_arm_without_a_score_is_judged_by_the_others():
    base = Run("alone", 0, (), Path("alone")), Trained({"a/accuracy": 0.8, "b/mse": 0.1}, 1.0)
    part = Run("both, equal", 0, (), Path("both")), Trained({"a/accuracy": 0.4}, 1.0)
    found = collect(COMPARISON, dict([base, part]))
    assert found.of("both, equal", "delta_m") == pytest.approx([50.0])


def test_auxiliary_tasks_do_not_count_in_delta_m_and_the_table_says_so():
    base = Run("alone", 0, (), Path("alone")), Trained({"a/accuracy": 0.8, "b/mse": 0.1}, 1.0)
    both = Run("both, equal", 0, (), Path("both")), Trained({"a/accuracy": 0.4, "b/mse": 0.2}, 1.0, ["b"])
    found = collect(COMPARISON, dict([base, both]))
    assert found.auxiliary == ["b/mse"]
    assert found.of("both, equal", "delta_m") == pytest.approx([50.0])
    assert found.of("both, equal", "b/mse") == [0.2]
    assert "main tasks only, without b/mse" in printed(found)
    assert "main tasks" not in printed(results(1))


def test_an_arm_of_auxiliary_tasks_only_has_no_delta_m():
    base = Run("alone", 0, (), Path("alone")), Trained({"a/accuracy": 0.8, "b/mse": 0.1}, 1.0)
    part = Run("both, equal", 0, (), Path("both")), Trained({"b/mse": 0.2}, 1.0, ["b"])
    assert math.isnan(collect(COMPARISON, dict([base, part])).of("both, equal", "delta_m")[0])


@pytest.mark.parametrize("score", ["b/mse", "loss/b"])
def test_a_score_belongs_to_the_task_in_its_name(score):
    comparison = Comparison(ARMS, {"a/b": True, score: False}, "alone", lambda results: [])
    done = {Run("alone", 0, (), Path("alone")): Trained({"a/b": 0.8, score: 0.1}, 1.0, ["b"])}
    assert collect(comparison, done).auxiliary == [score]


def test_changes_are_paired_by_seed():
    change = results().change("both, equal", "alone", ["a/accuracy"])
    assert change.points == pytest.approx([-10.0] * 3)
    assert str(change) == "-10.0 points, up in 0 of 3 seeds"
    assert str(Change([0.26])) == "+0.3 points"


def printed(found: Results) -> str:
    console = Console(width=110, record=True, file=io.StringIO())
    console.print(report.table("small", COMPARISON, found))
    return " ".join(console.export_text().split())


def test_the_table_shows_spread_only_if_there_is_one():
    one, three = printed(results(1)), printed(results(3))
    assert "0.910 ± 0.010" in three
    assert "seeds 0, 1, 2" in three
    assert "±" not in one
    assert "(base)" in one
    assert "both, equal" in one


def test_the_reading_needs_all_arms_and_knows_its_limits():
    one, three = report.read(COMPARISON, results(1)), report.read(COMPARISON, results(3))
    assert one[0] == three[0] == "It says so."
    assert "One seed" in one[-1]
    assert "spread" in three[-1]
    part = Results([row for row in results(1).rows if row.arm == "alone"])
    assert "left out" in report.read(COMPARISON, part)[0]


@pytest.mark.parametrize("seeds", [1, 3])
def test_it_is_drawn_with_and_without_curves(tmp_path, seeds):
    found = results(seeds, tmp_path)
    comparison = Comparison(**{**vars(COMPARISON), "curves": [Curves("Conflict", "cosine", "alone", {"cosine": "ab"})]})
    report.draw("small", comparison, found, tmp_path / "without.png")
    (tmp_path / "alone-0").mkdir()
    (tmp_path / "alone-0" / "metrics.csv").write_text("step,cosine\n10,0.5\n20,\n30,-0.5\n")
    assert found.curve("alone", "cosine") == ([10, 30], [0.5, -0.5])
    report.draw("small", comparison, found, tmp_path / "with.png")
    assert (tmp_path / "with.png").stat().st_size > (tmp_path / "without.png").stat().st_size > 10_000


def test_end_to_end(recipe, capsys):
    assert main(["compare", str(recipe), "--epochs", "1", "--seeds", "3", "--out", "out", "--data.rows=8"]) == 0
    told = capsys.readouterr().out
    assert "4 runs, seeds 3" in told
    assert "1. Equal has" in told
    assert all(str(Path("out", name)) in told for name in ("rows.csv", "compare.png"))
    with Path("out/rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["arm"], row["seed"]) for row in rows] == [("alone", "3"), ("equal", "3"), ("pcgrad", "3")]
    assert float(rows[0]["delta_m"]) == 0.0
    assert rows[0]["runs"] == "alone-1-seed3 alone-2-seed3"
    assert "rows: 8" in Path("out", rows[1]["runs"], "config.yaml").read_text()
    with pytest.raises(SystemExit, match="2"):
        main(["compare", str(recipe), "--out", "out"])
    assert "`out` must be an empty or a new folder" in capsys.readouterr().err


def test_the_models_say_which_tasks_are_auxiliary(recipe, capsys):
    role = 'role="main" if name == "a" else "auxiliary"'
    recipe.write_text(recipe.read_text().replace("nn.Linear(3, 1)) for", f"nn.Linear(3, 1), {role}) for"))
    assert main(["compare", str(recipe), "--epochs", "1", "--arms", "equal", "--out", "out"]) == 0
    assert "main tasks only, without b/mae" in " ".join(capsys.readouterr().out.split())
    with Path("out/rows.csv").open() as file:
        alone, equal = csv.DictReader(file)
    worse = float(equal["a/mae"]) / float(alone["a/mae"]) - 1
    assert float(equal["delta_m"]) == pytest.approx(100 * worse)


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--arms", "eqaul"], "`arms` must be among alone, equal, pcgrad, got eqaul"),
        (["--data.row=8"], "Did you mean data.rows?"),
    ],
)
def test_mistakes_stop_before_any_process_is_started(recipe, capfd, arguments, text):
    with pytest.raises(SystemExit, match="2"):
        main(["compare", str(recipe), *arguments])
    assert text in capfd.readouterr().err


def test_a_recipe_without_a_comparison_says_so(recipe, capsys):
    recipe.write_text(recipe.read_text().replace("COMPARE", "OTHER"))
    with pytest.raises(SystemExit, match="2"):
        main(["compare", str(recipe)])
    assert "`recipe` must declare COMPARE, got 'small' without it" in capsys.readouterr().err


def test_a_recipe_is_imported_from_wherever_it_lies(recipe):
    module = load(recipe)
    assert module.__name__ == "small"
    assert module.Small.__module__ == "small"
