import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from fedsim.errors import ConfigError
from fedsim.report.plot import curves
from fedsim.report.runs import RunRecord, compare, differences, labels, read_run, rounds_to

PNG = b"\x89PNG\r\n\x1a\n"


def row(number: int, accuracy: float | None = None) -> dict[str, Any]:
    measured = {} if accuracy is None else {"test_loss": 1 - accuracy, "test_accuracy": accuracy}
    costs = {"seconds": 2.0, "bytes_up": 1_000_000, "bytes_down": 2_000_000}
    return {"round": number, "cohort": [0, 1], "train_loss": 1 / number, "failed": 0, **costs, **measured}


def run(folder: str, accuracies: list[float | None], **config: Any) -> RunRecord:
    rounds = [row(number, accuracy) for number, accuracy in enumerate(accuracies, 1)]
    return RunRecord(Path("/runs") / folder, {"rounds": len(rounds), **config}, rounds, {"rounds": len(rounds)})


def write(folder: Path, rounds: str, config: str = "{rounds: 3}", summary: str | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rounds.jsonl").write_text(rounds)
    (folder / "config.yaml").write_text(config)
    if summary is not None:
        (folder / "summary.json").write_text(summary)
    return folder


def cells(runs: list[RunRecord], target: float | None = None) -> list[list[str]]:
    """The table's rows, the bold ones in asterisks."""
    columns = [column.cells for column in compare(runs, target).columns]
    texts = [[Text(cell) if isinstance(cell, str) else cell for cell in column] for column in columns]
    return [[f"*{t.plain}*" if t.style == "bold" else t.plain for t in row] for row in zip(*texts, strict=True)]


def printed(runs: list[RunRecord], target: float | None = None, columns: int = 200) -> str:
    console = Console(width=columns, color_system=None, legacy_windows=False)
    with console.capture() as capture:
        console.print(compare(runs, target))
    return capture.get()


# The rule of McMahan et al. 2017


@pytest.mark.parametrize(
    ("accuracy", "crossing"),
    [
        (0.2, 1.0),  # there at the start
        (0.3, 1.5),
        (0.4, 2.0),
        (0.5, 3.5),  # the dip to 0.1 in round 3 does not count: from (3, best 0.4) to (4, 0.6)
        (0.6, 4.0),
        (0.7, 7.0),  # round 5 to 6 were not evaluated; (4, 0.6) to (10, 0.8)
        (0.9, None),
    ],
)
def test_crossings_of_a_curve_worked_out_by_hand(accuracy: float, crossing: float | None) -> None:
    found = rounds_to(accuracy, [1, 2, 3, 4, 10], [0.2, 0.4, 0.1, 0.6, 0.8])
    assert found == (None if crossing is None else pytest.approx(crossing))


@st.composite
def evaluations(draw: st.DrawFn) -> tuple[list[int], list[float]]:
    rounds = sorted(draw(st.sets(st.integers(1, 10_000), min_size=1, max_size=20)))
    return rounds, [draw(st.floats(0, 1)) for _ in rounds]


@given(evaluations(), st.floats(0, 1), st.floats(0, 1))
def test_a_higher_target_never_takes_fewer_rounds(
    curve: tuple[list[int], list[float]], one: float, other: float
) -> None:
    low, high = (rounds_to(target, *curve) for target in sorted([one, other]))
    assert high is None or (low is not None and low <= high)


@given(evaluations())
def test_every_new_best_is_reached_in_its_own_round(curve: tuple[list[int], list[float]]) -> None:
    for place, (number, value) in enumerate(zip(*curve, strict=True)):
        if value > max(curve[1][:place], default=-1):
            assert rounds_to(value, *curve) == number


@given(evaluations(), st.floats(0, 1))
def test_a_crossing_lies_between_the_evaluated_rounds_around_it(
    curve: tuple[list[int], list[float]], target: float
) -> None:
    crossing = rounds_to(target, *curve)
    rounds, accuracies = curve
    if crossing is None:
        assert max(accuracies) < target
    else:
        first = next(number for number, value in zip(*curve, strict=True) if value >= target)
        assert max([number for number in rounds if number < first], default=first) <= crossing <= first


def test_no_evaluation_no_crossing() -> None:
    assert rounds_to(0.0, [], []) is None


# Folders


def test_a_folder_reads_back_as_it_was_written(tmp_path: Path) -> None:
    rows = [row(1), row(2, 0.5)]
    config = {"rounds": 2, "strategy": {"name": "fedavg"}}
    lines = "".join(json.dumps(r) + "\n" for r in rows)
    found = read_run(write(tmp_path / "mine", lines, yaml.safe_dump(config), '{"rounds": 2}'))
    assert (found.name, found.config, found.rounds, found.summary) == ("mine", config, rows, {"rounds": 2})
    assert found.curve("test_accuracy") == ([2], [0.5])


def test_a_run_cut_at_any_byte_keeps_its_whole_lines(tmp_path: Path) -> None:
    lines = [json.dumps(row(number)) for number in (1, 2, 3)]
    text = "\n".join(lines) + "\n"
    for kept in range(len(text) + 1):
        found = read_run(write(tmp_path, text[:kept]))
        whole = sum(kept >= len("\n".join(lines[: i + 1])) for i in range(3))
        assert [r["round"] for r in found.rounds] == [1, 2, 3][:whole]
        assert found.summary is None


@pytest.mark.parametrize("name", ["config.yaml", "rounds.jsonl"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    (write(tmp_path, "") / name).unlink()
    with pytest.raises(ConfigError, match=rf"^{tmp_path / name}: No such file or directory; .*$"):
        read_run(tmp_path)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        read_run(tmp_path / "nowhere")


GOOD = json.dumps(row(1))


@pytest.mark.parametrize(
    ("broken", "file"),
    [
        ({"rounds": f'{GOOD}\n{{"rou\n{GOOD}\n'}, "rounds.jsonl, line 2"),
        ({"rounds": f"{GOOD}\n[1]\n"}, "rounds.jsonl, line 2"),
        ({"rounds": '{"round": 1}\n'}, "rounds.jsonl, line 1"),
        ({"rounds": f"{GOOD}\n\n"}, "rounds.jsonl, line 2"),
        ({"rounds": GOOD.replace("2.0", "1e400") + "\n"}, "rounds.jsonl, line 1"),
        ({"rounds": GOOD.replace("2.0", "NaN") + "\n"}, "rounds.jsonl, line 1"),
        ({"rounds": GOOD.replace("2.0", "-1") + "\n"}, "rounds.jsonl, line 1"),
        ({"rounds": GOOD.replace("2.0", "true") + "\n"}, "rounds.jsonl, line 1"),
        ({"rounds": GOOD.replace("2000000", "9" * 10**6) + "\n"}, "rounds.jsonl, line 1"),
        ({"rounds": GOOD.replace("2000000", "9" * 305) + "\n"}, "rounds.jsonl, line 1"),
        ({"rounds": json.dumps(row(1) | {"test_accuracy": "0.9"}) + "\n"}, "rounds.jsonl, line 1"),
        (
            {"rounds": json.dumps(row(1) | {"more": json.loads("[" * 60 + "]" * 60)}) + "\n"},
            "rounds.jsonl, line 1",
        ),
        ({"rounds": "[" * 10**5 + "\n"}, "rounds.jsonl, line 1"),
        ({"rounds": f"{GOOD}\n" * 3, "config": "{rounds: 2}"}, "rounds.jsonl"),
        ({"rounds": "", "summary": "[" * 10**5}, "summary.json"),
        ({"rounds": "", "summary": '{"rounds": Infinity}'}, "summary.json"),
        ({"rounds": "", "config": "a: " + "[" * 1000}, "config.yaml"),
        ({"rounds": "", "config": "a: &a [1, *a]"}, "config.yaml"),
        ({"rounds": "", "config": "\ud800".encode("utf-8", "surrogatepass").decode("latin1")}, "config.yaml"),
        ({"rounds": "", "config": "a: [1,\nb: }"}, "config.yaml"),
        ({"rounds": "", "config": "just words"}, "config.yaml"),
        ({"rounds": "", "summary": '{"rounds": 1'}, "summary.json"),
        ({"rounds": "", "summary": "[]"}, "summary.json"),
    ],
)
def test_a_broken_file_is_named_in_one_line(tmp_path: Path, broken: dict[str, str], file: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{tmp_path}/{file}: broken: .+$") as caught:
        read_run(write(tmp_path, **broken))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["config.yaml", "rounds.jsonl", "summary.json"])
def test_a_link_in_a_run_is_not_followed(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "run", GOOD, summary="{}")
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(ConfigError, match=f"run/{name}: Is a symbolic link"):
        read_run(folder)


# Tables


@given(
    st.lists(st.text(st.characters(exclude_characters="/\0"), min_size=1, max_size=120), max_size=5),
    st.sampled_from([None, 0.5, 0.987654321]),
    st.integers(80, 200),
)
def test_a_table_is_at_most_80_columns_wide(names: list[str], target: float | None, columns: int) -> None:
    runs = [run(name, [0.1, None, 0.6], note=name, key={name: 1}) for name in names]
    for line in printed(runs, target, columns).split("\n"):
        assert cell_len(line) <= 80


def test_a_table_holds_what_each_run_took_and_marks_the_best() -> None:
    runs = [run("quick", [0.2, 0.6, 0.5]), run("slow", [0.2, None, None, 0.8]), run("never", [0.1])]
    assert cells(runs, 0.5) == [
        ["quick", "3", "60.00%", "50.00%", "*1.8*", "*6.0*", "6"],  # 3 MB a round, two rounds
        ["slow", "4", "*80.00%*", "*80.00%*", "2.5", "9.0", "8"],
        ["never", "1", "10.00%", "10.00%", "-", "-", "*2*"],
    ]
    assert [megabytes for *_, megabytes, _ in cells(runs)] == ["9.0", "12.0", "*3.0*"]


def test_a_run_without_evaluations_or_rounds_has_its_row() -> None:
    blank = RunRecord(Path("/runs/blank"), {"rounds": 9}, [], None)
    assert cells([run("dark", [None, None]), blank], 0.5) == [
        ["dark", "2", "-", "-", "-", "-", "4"],
        ["blank", "0 of 9", "-", "-", "-", "-", "*0*"],
    ]


def test_names_that_collide_get_the_parents_that_tell_them_apart() -> None:
    runs = [run(folder, []) for folder in ("a/x/1", "b/x/1", "b/y/2", "b/x/3", "a/x/3", "1", "a/x/1")]
    assert labels(runs) == ["a/x/1", "b/x/1", "2", "b/x/3", "a/x/3", "runs/1", "a/x/1"]


def test_a_table_says_where_the_configs_differ() -> None:
    one = run("one", [], seed=0, strategy={"name": "fedavg"}, local={"lr": 0.1, "epochs": 1})
    two = run("two", [], seed=0, strategy={"name": "fedprox", "mu": None}, local={"lr": 0.2, "epochs": 1})
    assert differences([one, two]) == {
        "strategy.name": ["fedavg", "fedprox"],
        "local.lr": ["0.1", "0.2"],
    }  # and not strategy.mu, which only one of them has
    assert "local.lr: 0.1, 0.2\n" in "\n".join(line.strip() for line in printed([one, two]).split("\n"))
    assert "configs are the same" in printed([one, one])


# Pictures


@pytest.mark.parametrize("target", [None, 0.97])
@pytest.mark.parametrize(
    "runs",
    [
        [],
        [run("no rounds", [])],
        [run("one round", [0.5])],
        [run("no evaluations", [None] * 5)],
        [run("long", [0.5] * 10_000)],
        [run("$x^2", [0.5, 0.6]), run("_hidden", [None, 0.7])],
        [run(f"{'n' * 200}{number}", [0.5, 0.6], key=number) for number in range(41)],
    ],
    ids=["none", "empty", "one", "dark", "long", "names", "many"],
)
def test_a_picture_is_written_whatever_was_run(
    runs: list[RunRecord], target: float | None, tmp_path: Path
) -> None:
    curves(runs, tmp_path / "curves.png", target)
    picture = (tmp_path / "curves.png").read_bytes()
    assert picture.startswith(PNG)
    assert len(picture) > 10_000


def test_one_run_gives_one_picture_and_the_target_shows(tmp_path: Path) -> None:
    runs = [run("a", [0.1, 0.9]), run("b", [0.1, 0.8])]
    for name, target in (("first", None), ("again", None), ("aimed", 0.97)):
        curves(runs, tmp_path / name, target)
    first, again, aimed = ((tmp_path / name).read_bytes() for name in ("first", "again", "aimed"))
    assert first == again
    assert first != aimed
