"""What README.md and docs/ show works as it stands, and their tables name what there is.

The commands in `bash` blocks are run, by default the README's; those in `sh` blocks and sentences are only parsed.
"""

import json
import re
import runpy
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
import ray
import yaml
from covering import sampled
from typer.main import get_command
from typer.testing import CliRunner

import fedsim.listing
from fedsim.base.catalogue import options_of
from fedsim.cli.commands import app
from fedsim.errors import ClientError, ConfigError, RoundError
from fedsim.experiment.config import Config, load, parse_overrides, resolve
from fedsim.export.formats import FORMATS
from fedsim.flower.node import NodeSettings
from fedsim.listing import KINDS
from fedsim.strategies import CATALOGUE as STRATEGIES
from fedsim.training.recipe import Recipe

ROOT = Path(__file__).parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
README = PAGES["README.md"]
OTHERS = {name: (ROOT / name).read_text() for name in ("CONTRIBUTING.md", "CHANGELOG.md", "launch/README.md")}
COMMANDS = get_command(app).commands
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
SHORTER = {
    "run": ["rounds=2"],
    "bench": ["rounds=2", "--repeats", "1", "--sides", "fedsim serial"],
    "profile": ["--repeats", "1"],
    "sweep": ["--jobs", "1"],
}  # the same commands, in less time


def blocks(language, text):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def with_blocks(language):
    return [name for name, text in PAGES.items() if blocks(language, text)]


def commands(language, text):
    return [line for block in blocks(language, text) for line in block.splitlines() if line.startswith("fedsim ")]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder in which the pages' paths are right, and what is written is thrown away."""
    for name in ("configs", "launch"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fedsim_(line):
    _, *arguments = shlex.split(line, comments=True)
    return CliRunner().invoke(app, [*arguments, *SHORTER.get(arguments[0], [])], catch_exceptions=False)


# Commands


def test_the_readme_shows_what_a_simulation_needs():
    shown = {shlex.split(line)[1] for line in commands("bash", README)}
    assert shown == {"run", "resume", "partition", "compare", "list", "bench", "profile", "export", "sweep"}


@pytest.mark.parametrize("page", sampled([("README.md",)], with_blocks("bash")))
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of processes that Ray lets go of as it shuts down
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_commands_run(checkout, page):
    try:
        for line in commands("bash", PAGES[page]):
            result = fedsim_(line)
            assert result.exit_code == 0, (line, result.output)
    finally:
        ray.shutdown()  # which `auto` would try in other tests


@pytest.mark.parametrize("page", PAGES)
def test_all_commands_are_ones_that_there_are(checkout, page):
    for line in [*commands("bash", PAGES[page]), *commands("sh", PAGES[page])]:
        _, name, *arguments = shlex.split(line, comments=True)
        with COMMANDS[name].make_context(name, arguments) as context:  # raises for options that it lacks
            if name in ("run", "partition", "bench"):
                load(context.params["config"], parse_overrides(context.params["settings"] or []))
    for block in blocks("sh", PAGES[page]):
        for script in re.findall(r"^launch/\S+", block, re.MULTILINE):
            assert (ROOT / script).is_file()


@pytest.mark.parametrize("page", PAGES)
def test_commands_within_sentences_are_ones_that_there_are(page):
    text = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    for span in re.findall(r"`fedsim (.+?)`", text, re.DOTALL):
        name, *arguments = shlex.split(span)
        known = {option for parameter in COMMANDS[name].params for option in parameter.opts}
        assert {each for each in arguments if each.startswith("--")} <= known, span
        assert all((ROOT / each).exists() for each in arguments if each.startswith("configs/")), span


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_paths_are_of_files_that_there_are(page):
    for path in re.findall(
        r"`((?:configs|docs|fedsim|launch|strategies|tests)/[\w./-]*)`", (PAGES | OTHERS)[page]
    ):
        assert re.search("NAME|FAMILY", path) or (ROOT / path).exists(), path


def test_the_table_of_places_names_every_package():
    packages = {f"fedsim/{file.parent.name}/" for file in (ROOT / "fedsim").glob("*/__init__.py")}
    section = OTHERS["CONTRIBUTING.md"].partition("## Where each thing lives")[2].partition("\n## ")[0]
    assert packages <= {*re.findall(r"`(fedsim/\w+/)`", section)}


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md"])
def test_targets_of_make_are_ones_that_there_are(page):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    text = (PAGES | OTHERS)[page]
    for span in re.findall(r"^make ([a-z -]+)|`make ([a-z -]+)", text, re.MULTILINE):
        assert set("".join(span).split()) <= {*targets}, span


# Code and configs


def test_a_strategy_of_your_own(checkout, monkeypatch):
    code = next(block for block in blocks("python", README) if "my_strategy.py" in block)
    (checkout / "my_strategy.py").write_text(code)
    monkeypatch.syspath_prepend(checkout)
    line = next(line for block in blocks("bash", README) for line in block.splitlines() if "my_strategy" in line)
    assert len(code.splitlines()) <= 30
    assert fedsim_(line.removeprefix("PYTHONPATH=. ")).exit_code == 0


def test_a_strategy_with_bounds_of_its_own(checkout, monkeypatch):
    """Which it needs; and all weights twice as large are the same weights."""
    code = next(block for block in blocks("python", PAGES["docs/strategies.md"]) if "my_twice.py" in block)
    (checkout / "my_twice.py").write_text(code)
    (checkout / "my_once.py").write_text(code.replace("weight=2 * ", "weight="))
    (checkout / "my_fault.py").write_text(code.replace("def max_steps", "def _unused"))
    monkeypatch.syspath_prepend(checkout)
    for module in ("my_twice", "my_once"):
        line = f"fedsim run configs/quickstart.yaml runtime=serial strategy={module}:Twice --out {module}"
        assert fedsim_(line).exit_code == 0
    twice, once = (json.loads(Path(name, "summary.json").read_text()) for name in ("my_twice", "my_once"))
    assert twice["fingerprint"] == once["fingerprint"]
    with pytest.raises(RoundError, match="override max_steps"):
        fedsim_("fedsim run configs/quickstart.yaml runtime=serial strategy=my_fault:Twice --out my_fault")


def test_a_strategy_with_numbers_of_its_own(checkout, monkeypatch):
    """Which ends its run where a step is small, and says so."""
    code = next(block for block in blocks("python", PAGES["docs/strategies.md"]) if "my_converged.py" in block)
    (checkout / "my_converged.py").write_text(code)
    monkeypatch.syspath_prepend(checkout)
    line = "fedsim run configs/quickstart.yaml runtime=serial rounds=3 strategy=my_converged:Converged --out run"
    done = fedsim_(f"{line} strategy.step=1e9")
    assert "stopped: the model has moved by " in done.output
    [record] = map(json.loads, Path("run/rounds.jsonl").read_text().splitlines())
    assert 0 < record["metrics"]["step"] <= record["metrics"]["norm"]


SEVERAL = {"my_clusters": ["Clusters"], "my_parts": ["Slices", "TopK"], "my_downloads": ["FixedClusters"]}


def test_the_strategies_of_groups_positions_and_downloads_run(checkout, monkeypatch):
    for code in blocks("python", PAGES["docs/strategies.md"]):
        if (name := code.partition(".py\n")[0].removeprefix("# ")) in SEVERAL:
            (checkout / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(checkout)
    for module, names in SEVERAL.items():
        for name in names:
            line = f"fedsim run configs/quickstart.yaml runtime=serial rounds=1 hooks=[] --out {name}"
            assert fedsim_(f"{line} strategy={module}:{name}").exit_code == 0


WRONG = {  # by file of the walk-through an error in it, and the law that finds it
    "my_scaffold": {
        "info.participation * ": ("", "test_the_servers_c_is_the_mean_of_all"),
        "g - c_k + c": ("g + c_k - c", "test_after_one_full_step_c_is_the_gradient_of_the_client"),
        "torch.where(k_lr > 0, c_k - c + (x - y) / k_lr, c_k)": (
            "c_k - c + (x - y) / k_lr",
            "test_a_learning_rate_of_0_moves_nothing",
        ),
        '"delta": y - x': ('"delta": 2 * (y - x)', "test_one_full_step_of_everyone_is_fedavg"),
    },
    "my_wrappers": {
        "buffers_as_changes: ClassVar = True": (
            "buffers_as_changes: ClassVar = False",
            "test_model_and_statistics_move_by_no_more_than_the_norm",
        ),
        "message[name] + client": ("2 * message[name] + client", "test_the_top_of_everything_is_everything"),
        "whole.scatter(0, places, 0.0)": ("whole", "test_what_is_not_sent_is_kept"),
    },
}


@pytest.fixture
def walk_through(checkout, monkeypatch):
    """docs/write-an-algorithm.md, whose files are in the folder."""
    monkeypatch.syspath_prepend(checkout)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # it would hide a change of the same size and second
    page = PAGES["docs/write-an-algorithm.md"]
    for code in blocks("python", page):
        (checkout / code.partition("\n")[0].removeprefix("# ")).write_text(code)
    yield page
    for module in [name for name in sys.modules if name.startswith("my_")]:
        del sys.modules[module]


@pytest.mark.parametrize("module", WRONG)
def test_the_laws_of_the_walk_through_hold_and_find_errors(checkout, walk_through, module):
    file, laws = checkout / f"{module}.py", (checkout / f"{module}_test.py").read_text()
    code = file.read_text()

    def laws_of(code):
        file.write_text(code)
        sys.modules.pop(module, None)
        made = {}
        exec(laws, made)
        return {name: law for name, law in made.items() if name.startswith("test_")}

    for right, (wrong, found_by) in WRONG[module].items():
        assert code.count(right) == 1
        with pytest.raises((AssertionError, ClientError)):
            laws_of(code.replace(right, wrong))[found_by]()
    right = laws_of(code)
    assert right.keys() == {found_by for _, found_by in WRONG[module].values()}
    for law in right.values():
        law()


def test_the_wrappers_of_the_walk_through_run_one_in_the_other(checkout, walk_through):
    [line] = blocks("bash", walk_through)[1].splitlines()
    assert fedsim_(f"{line.removeprefix('PYTHONPATH=. ')} runtime=serial hooks=[]").exit_code == 0


def test_the_wrappers_of_the_walk_through_refuse_what_they_cannot_change(checkout, walk_through):
    line = "fedsim run configs/quickstart.yaml runtime=serial --out run"
    for strategy, error, said in (
        (
            "my_wrappers:Clip, inner: fednova",
            ConfigError,
            "changes of the model, and FedNova sends",
        ),
        ("my_wrappers:TopK, inner: {name: my_wrappers:TopK, inner: fedavg}", ClientError, "send all positions"),
        ("my_wrappers:TopK, share: 2.0, inner: fedavg", ConfigError, "strategy.share: 2.0 should be above 0"),
    ):
        with pytest.raises(error, match=said):
            fedsim_(f"{line} 'strategy={{name: {strategy}}}'")


def test_the_runs_of_the_walk_through_have_one_fingerprint(checkout, walk_through):
    for line in blocks("bash", walk_through)[0].splitlines():
        assert fedsim_(line.removeprefix("PYTHONPATH=. ")).exit_code == 0
    one, two = (json.loads(Path(name, "summary.json").read_text())["fingerprint"] for name in ("one", "two"))
    assert one == two


def test_a_hook_of_your_own(checkout, monkeypatch):
    code = next(block for block in blocks("python", PAGES["docs/hooks.md"]) if "my_hooks.py" in block)
    (checkout / "my_hooks.py").write_text(code)
    monkeypatch.syspath_prepend(checkout)
    result = fedsim_("fedsim run configs/quickstart.yaml 'hooks=[my_hooks:Notify]' local.epochs=9 --out run")
    assert "of run" in result.output


@pytest.mark.parametrize("page", with_blocks("python"))
@pytest.mark.filterwarnings("ignore:changed. rounds")  # by a resume that makes a run longer
def test_the_python_examples(checkout, page):
    for code in blocks("python", PAGES[page]):
        if not code.startswith("# my_"):  # which the tests above run
            exec(code, {})


@pytest.mark.parametrize("page", with_blocks("yaml"))
def test_the_configs_are_valid(page):
    whole = yaml.safe_load(blocks("yaml", README)[0])
    for part in map(yaml.safe_load, blocks("yaml", PAGES[page])):
        NodeSettings.of(part) if "name" in part else resolve(whole | part)


# Tables


def tables(page):
    """The cells of each row of each table; the first row is the head."""
    found = re.findall(r"(?:^\|.*\|\n)+", PAGES[page], re.MULTILINE)
    return [
        [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.splitlines()]
        for table in found
    ]


def column(page, head):
    """The cells below `head`, of the one table that has such a column."""
    (found,) = [table for table in tables(page) if head in table[0]]
    return [row[found[0].index(head)] for row in found[2:]]


@pytest.mark.parametrize(
    ("page", "head", "there_are"),
    [
        ("docs/config.md", "key", Config.model_fields),
        ("docs/config.md", "catalogue", KINDS.keys() - {"settings"}),
        ("docs/data.md", "dataset", KINDS["datasets"]),
        ("docs/data.md", "partition", KINDS["partitions"]),
        ("docs/models.md", "names", KINDS["models"]),
        (
            "docs/training.md",
            "option of `local`",
            {*options_of(Recipe).model_fields, "schedule", "loss", "augment"},
        ),
        ("docs/strategies.md", "strategy", KINDS["strategies"]),
        ("docs/runtimes.md", "runtime", KINDS["runtimes"]),
        ("docs/hooks.md", "hook", KINDS["hooks"]),
        ("docs/export.md", "`--format`", FORMATS),
        ("docs/installing.md", "extra", EXTRAS),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_table_names_all_that_there_is_and_nothing_else(page, head, there_are):
    named = [name for cell in column(page, head) for name in re.findall(r"`([\w.]+)`", cell)]
    assert sorted(named) == sorted(there_are)


def algorithms():
    """(names, file, row) of docs/algorithms.md, where a row is a dictionary by the heads."""
    for head, _, *rows in tables("docs/algorithms.md"):
        for row in rows:
            file = ROOT / "docs" / re.search(r"\]\((\S+)\)", row[0])[1]
            yield re.findall(r"`(\w+)`", row[0]), file.resolve(), dict(zip(head, row, strict=True))


def test_the_page_of_algorithms_names_each_with_its_file():
    found = {name: file for names, file, _ in algorithms() for name in names}
    assert found == {
        name: ROOT / "strategies" / f"{entry.partition(':')[0].replace('.', '/')}.py"
        for name, entry in STRATEGIES.entries.items()
    }


def test_the_page_of_algorithms_is_right_about_lengths_and_papers():
    for names, file, row in algorithms():
        text = file.read_text()
        assert abs(int(row["lines"]) - len(text.splitlines())) <= 10, names
        papers = re.findall(r"\]\((https://[^)]+)\)", row["paper"])
        assert papers, names
        assert all(paper in text.split('"""')[1] for paper in papers), names


def test_the_page_of_algorithms_names_tests_that_there_are():
    for names, _, row in algorithms():
        tests = re.findall(r"`([\w/]+\.py)::(\w+)`", row["test"])
        assert tests, names
        for file, test in tests:
            assert f"\ndef {test}(" in (ROOT / file).read_text(), test


def test_the_number_of_networks():
    assert f"{len([*KINDS['models']])} networks" in README
    assert f"{len([*KINDS['models']])} networks" in PAGES["docs/models.md"]


def test_the_page_of_options_is_up_to_date(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["listing.py", str(tmp_path)])
    runpy.run_path(fedsim.listing.__file__, run_name="__main__")  # as `make docs`, without its imports
    assert (tmp_path / "options.md").read_text() == PAGES["docs/options.md"], "`make docs` writes it"


# Links


def anchors(text):
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, *OTHERS])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", (PAGES | OTHERS)[page]):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text()), target


def test_the_readme_is_short_and_links_every_page():
    assert len(README.splitlines()) <= 200
    assert {name for name in PAGES if f"]({name})" not in README} == {"README.md"}
