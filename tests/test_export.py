"""An exported file gives what the run's network gives, whoever runs it, or is not there."""

import json
import re
from pathlib import Path

import pytest
import torch
from covering import in_turn, sampled
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import fedsim
import fedsim.cli
import fedsim.export.trained
import fedsim.export.write
from fedsim.errors import ConfigError
from fedsim.experiment.build import build
from fedsim.experiment.config import load
from fedsim.export.formats import NAMES, trtexec
from fedsim.export.fusion import fused
from fedsim.export.trained import load_trained, make_network
from fedsim.export.write import export
from fedsim.models.inception import ParallelB
from fedsim.models.options import make

CONFIG = {
    "rounds": 1,
    "data": {"name": "digits", "clients": 4},
    "model": {"name": "cnn_bn", "widths": [3, 4]},
    "strategy": "fedavg",
    "cohort": {"name": "uniform", "fraction": 0.5},
    "local": {"lr": 0.1, "steps": 5, "batch_size": 8},
    "runtime": "serial",
    "hooks": [],
}
FORMATS = ["onnx", "torch", "safetensors"]  # those that can be run here


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run whose batch norms have moved."""
    return fedsim.run(CONFIG, out=tmp_path_factory.mktemp("runs") / "run").folder


@pytest.fixture(scope="module")
def onnx(run, tmp_path_factory):
    """The same as ONNX."""
    return export(run, out=tmp_path_factory.mktemp("files") / "a.onnx").path


@pytest.fixture
def fedsim_(tmp_path, monkeypatch, fedsim_):
    """Calls the command in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return fedsim_


def session(path):
    from onnxruntime import InferenceSession

    return InferenceSession(path, providers=["CPUExecutionProvider"])


def runs(path, format, run):
    """The file as a function of a batch."""
    if format == "onnx":
        opened = session(path)
        return lambda x: torch.from_numpy(opened.run(["logits"], {"x": x.numpy()})[0])
    if format == "torch":
        return torch.export.load(path).module()
    network = fused(make(load(run / "config.yaml").model, (1, 8, 8), 10))
    network.load_state_dict(load_file(path))
    return network


def about(path, format):
    """What the file says of itself."""
    if format == "onnx":
        return json.loads(session(path).get_modelmeta().custom_metadata_map["fedsim"])
    if format == "torch":
        torch.export.load(path, extra_files=(files := {"fedsim.json": ""}))
        return json.loads(files["fedsim.json"])
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["fedsim"])


def near(got, wanted):
    assert got.shape == wanted.shape
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


# What is exported


def test_the_network_is_the_run_s_without_its_data(run, monkeypatch):
    simulation = build(load(run / "config.yaml"))
    monkeypatch.setattr(fedsim.data.FederatedData, "__init__", None)
    network, _, example, classes = load_trained(run)
    assert (example.shape, classes) == (simulation.data.shape, 10)
    wanted = load_file(run / "model.safetensors")
    assert network.state_dict().keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in network.state_dict().items())
    assert not network.training


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_gives_what_the_network_gives_for_any_batch(run, tmp_path, format):
    made = export(run, format, tmp_path / "file")
    assert 0 <= made.difference < 1e-5
    assert made.bytes == made.path.stat().st_size
    network, _, example, _ = load_trained(run)
    found = runs(made.path, format, run)
    for batch in (1, 2, 7):
        x = torch.randn(batch, *example.shape)
        near(found(x), network(x).detach())


@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_raw_pixels_are_normalised_as_the_run_s_data_are(run, tmp_path, format):
    data, rows = build(load(run / "config.yaml")).data, torch.arange(5)
    made = export(run, format, tmp_path / "file", normalise=True)
    raw = data._x_test[rows]
    assert raw.dtype == torch.uint8
    near(runs(made.path, format, run)(raw), load_trained(run).network(data.test_batch(rows)[0]).detach())


def test_constants_by_channel():
    example = fedsim.export.trained.Example(shape=(2, 1, 1), dtype="uint8", scale=(2.0, 3.0), shift=(1.0, 5.0))
    x = torch.tensor([[[[4]], [[6]]]], dtype=torch.uint8)
    wanted = torch.tensor([[[[7.0]], [[13.0]]]])
    assert torch.equal(fedsim.export.write.Normalised(nn.Identity(), example)(x), wanted)


@pytest.mark.parametrize(("format", "fuse"), sampled(in_turn(FORMATS, [True, False]), FORMATS, [True, False]))
def test_a_file_says_what_it_is(run, tmp_path, format, fuse):
    normalise = not fuse
    made = export(run, format, tmp_path / "file", fuse=fuse, normalise=normalise, check=False)
    said = about(made.path, format)
    assert made.difference is None
    assert said["model"] == load(run / "config.yaml").model
    assert (said["fused"], said["normalised"], said["classes"]) == (fuse, normalise, 10)
    assert said["example"] == json.loads((run / "partition.json").read_text())["example"]


def test_a_fixed_batch_is_fixed(run, tmp_path):
    path = export(run, out=tmp_path / "file", batch=4).path
    assert session(path).get_inputs()[0].shape == [4, 1, 8, 8]


def test_any_batch_is_any_and_pixels_are_bytes(onnx, run, tmp_path):
    assert session(onnx).get_inputs()[0].shape == ["batch", 1, 8, 8]
    raw = export(run, out=tmp_path / "file", normalise=True).path
    assert session(raw).get_inputs()[0].type == "tensor(uint8)"


def test_the_running_mean_is_exported_where_there_is_one(run, tmp_path):
    with pytest.raises(ConfigError, match=r"^--ema: .* has no ema\.safetensors"):
        export(run, out=tmp_path / "file", ema=True)
    other = tmp_path / "run"
    other.mkdir()
    for name in ("config.yaml", "partition.json"):
        (other / name).write_bytes((run / name).read_bytes())
    save_file(
        {n: torch.ones_like(v) for n, v in load_file(run / "model.safetensors").items()}, other / "ema.safetensors"
    )
    assert (load_trained(other, ema=True).network.fc.weight == 1).all()


def test_where_the_run_began_does_not_matter(tmp_path):
    begin = make("cnn_bn", (1, 8, 8), 10)
    save_file(begin.state_dict(), tmp_path / "begin.safetensors")
    config = CONFIG | {"model": {"name": "cnn_bn", "weights": str(tmp_path / "begin.safetensors")}}
    folder = fedsim.run(config, out=tmp_path / "run").folder
    (tmp_path / "begin.safetensors").unlink()
    assert load_trained(folder).network.fc.weight.shape == begin.fc.weight.shape


# Fusion


def operations(content):
    import onnx

    return [node.op_type for node in onnx.load_from_string(content).graph.node]


def test_what_is_fused_has_no_norm_and_what_is_not_has(run, tmp_path):
    names = {
        fuse: set(load_file(export(run, "safetensors", tmp_path / str(fuse), fuse=fuse).path))
        for fuse in (True, False)
    }
    assert names[False] == set(load_file(run / "model.safetensors"))
    assert names[True] == {f"{layer}.{kind}" for layer in ("conv1", "conv2", "fc") for kind in ("weight", "bias")}


def test_onnx_runtime_takes_convolution_and_relu_as_one(onnx, tmp_path):
    from onnxruntime import GraphOptimizationLevel, InferenceSession, SessionOptions

    assert operations(onnx.read_bytes()).count("Relu") == 2
    options = SessionOptions()
    options.graph_optimization_level = GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
    left = operations((tmp_path / "optimised.onnx").read_bytes())
    assert left.count("FusedConv") == 2
    assert "Relu" not in left


# What goes wrong is one line, and leaves nothing behind


@pytest.mark.parametrize(
    ("format", "missing"),
    [("onnx", "onnx"), ("onnx", "onnxscript"), ("tensorrt", "tensorrt"), ("tensorrt", "onnx")],
)
def test_what_is_missing_is_named(fedsim_, run, monkeypatch, format, missing):
    monkeypatch.setattr(fedsim.export.write, "find_spec", lambda name: None if name == missing else object())
    done = fedsim_("export", run, "--format", format, "--out", "file")
    way_out = "pip install tensorrt" if missing == "tensorrt" else "pip install -e '.[export]' in fedsim's folder"
    assert (done.status, done.out) == (2, "")
    assert re.fullmatch(
        rf"fedsim: --format: {format} needs {missing}; {re.escape(way_out)} installs it.*\n", done.err
    )
    assert not list(Path().iterdir())


def test_without_onnx_runtime_it_says_that_it_did_not_look(fedsim_, run, monkeypatch):
    monkeypatch.setattr(fedsim.export.write, "find_spec", lambda name: None if name == "onnxruntime" else object())
    assert "\nnot checked: ONNX Runtime is not installed\n" in fedsim_("export", run, "--out", "file").out


def test_a_file_that_gives_something_else_is_not_written(fedsim_, run, monkeypatch):
    def wrong(network, shape):
        result = fused(network, shape)
        result.get_parameter("fc.bias").data += 1
        return result

    monkeypatch.setattr(fedsim.export.write, "fused", wrong)
    done = fedsim_("export", run, "--format", "torch", "--out", "file")
    assert (done.status, done.out) == (2, "")
    assert re.fullmatch(
        r"fedsim: --check: outputs of the torch file differ by \S+ of the largest; --no.*\n", done.err
    )
    assert not list(Path().iterdir())
    assert fedsim_("export", run, "--format", "torch", "--out", "file", "--no-check").status == 0
    assert [path.name for path in Path().iterdir()] == ["file"]


@pytest.mark.parametrize(("format", "fuse"), sampled(in_turn(FORMATS, [False, True]), FORMATS, [True, False]))
def test_a_network_with_branches_in_threads(run, tmp_path, monkeypatch, format, fuse):
    options = {} if fuse else {"fuse": False, "batch": 1}
    layers = ParallelB(1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(481, 10)
    network = nn.Sequential(*layers).eval()
    monkeypatch.setattr(
        fedsim.export.write, "load_trained", lambda run, ema: load_trained(run)._replace(network=network)
    )
    assert export(run, format, tmp_path / "file", **options).difference < 1e-5


class Bound(nn.Module):
    """Takes two examples, and no other number."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        return self.fc(x.reshape(2, 64))


def test_a_network_for_one_batch_size_only(run, tmp_path, monkeypatch):
    monkeypatch.setattr(
        fedsim.export.write, "load_trained", lambda run, ema: load_trained(run)._replace(network=Bound().eval())
    )
    with pytest.raises(
        ConfigError, match=r"^model: cannot be exported, or not with any number[^\n]+--batch 1[^\n]+$"
    ):
        export(run, "torch", tmp_path / "file")
    assert export(run, "torch", tmp_path / "file", batch=2).difference < 1e-5


def broken(name, content):
    def change(folder):
        (folder / name).write_bytes(content) if content is not None else (folder / name).unlink()

    return change


def as_a_link(name):
    def change(folder):
        (folder / name).rename(folder.parent / name)
        (folder / name).symlink_to(folder.parent / name)

    return change


def of_another_network(folder):
    save_file({"fc.weight": torch.ones(2)}, folder / "model.safetensors")


def with_partition_record(change):
    def write(folder):
        change(content := json.loads((folder / "partition.json").read_text()))
        (folder / "partition.json").write_text(json.dumps(content))

    return write


def of_examples(*shape):
    return with_partition_record(lambda content: content["example"].update(shape=shape))


def of_classes(classes):
    return with_partition_record(lambda content: content.update(classes=classes))


of_an_older_version = with_partition_record(lambda content: content.pop("example"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (broken("config.yaml", None), "is no folder of a run; it has no config.yaml"),
        (
            broken("partition.json", None),
            "partition.json: No such file or directory; is its folder that of a run?",
        ),
        (broken("partition.json", b"{"), "partition.json: does not describe an example; fedsim resume"),
        (of_an_older_version, "partition.json: does not describe an example; fedsim resume"),
        (broken("model.safetensors", None), "model.safetensors: cannot be read: No such file or directory"),
        (as_a_link("model.safetensors"), "model.safetensors: cannot be read: Is a symbolic link"),
        (as_a_link("config.yaml"), "config.yaml: cannot be read: Is a symbolic link"),
        (broken("model.safetensors", b"abc"), "model.safetensors: does not hold the weights of the run's network"),
        (of_examples(1, 200_000, 200_000), "model: cannot be made for 10 classes and examples of shape (1, 2000"),
        (of_examples(1, 10**30, 1), "neither may have more than 268,435,456"),
        (of_classes(10**12), "model: cannot be made for 1000000000000 classes and examples of shape (1, 8, 8)"),
        (of_classes(11), "model.safetensors: does not hold the weights of the run's network"),
        (of_another_network, "model.safetensors: does not hold the weights of the run's network"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_folder_that_is_no_run_or_broken(fedsim_, run, tmp_path, change, message):
    folder = tmp_path / "copy"
    folder.mkdir()
    for name in ("config.yaml", "partition.json", "model.safetensors"):
        (folder / name).write_bytes((run / name).read_bytes())
    change(folder)
    done = fedsim_("export", folder, "--out", "file")
    assert (done.status, done.out) == (2, "")
    assert message in done.err
    assert done.err.count("\n") == 1
    assert not Path("file").exists()


def test_a_network_larger_than_the_machine_is_not_made(monkeypatch):
    monkeypatch.setattr(fedsim.export.trained, "memory", lambda: 2**20)
    with pytest.raises(
        ConfigError, match=r"^model: cannot be made .* \(1, 99, 99\): it has .*, more than half of"
    ):
        make_network({"name": "2nn"}, (1, 99, 99), 10)
    assert make_network({"name": "2nn", "weights": None}, (1, 8, 8), 10).training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "there"], "--out: there exists; name another file"),
        (["--out", "no/file"], "--out: no/file cannot be written; is there such a folder?"),
        (["--out", "file", "--batch", "0"], "--batch: '0' should be a whole number >= 1, or dynamic"),
        (["--out", "file", "--batch", "many"], "--batch: 'many' should be a whole number >= 1, or dynamic"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_options(fedsim_, run, options, message):
    Path("there").write_text("mine")
    done = fedsim_("export", run, *options)
    assert (done.status, done.out, done.err) == (2, "", f"fedsim: {message}\n")
    assert Path("there").read_text() == "mine"
    assert not Path("file").exists()


def test_examples_that_are_not_normalised(tmp_path):
    data = {"name": "synthetic_iid", "clients": 30}
    folder = fedsim.run(CONFIG | {"data": data, "model": "2nn"}, out=tmp_path / "run").folder
    with pytest.raises(ConfigError, match=r"^--normalise: this run's examples are not normalised$"):
        export(folder, "torch", normalise=True)
    assert export(folder, "torch").path == folder / NAMES["torch"]


# The command


def test_the_command_says_what_it_wrote_and_how_near_it_is(fedsim_, run):
    done = fedsim_("export", run, "--out", "a.onnx")
    lines = done.out.splitlines()
    assert (done.status, done.err) == (0, "")
    assert re.fullmatch(r"onnx: a\.onnx, 0\.\d\d MB", lines[0])
    assert re.fullmatch(r"checked: its outputs differ by \d\.\de-\d\d of the largest", lines[1])
    assert lines[2] == f"TensorRT: {trtexec(Path('a.onnx'), (1, 8, 8))}"


def test_tensorrt_s_command():
    sizes = "--minShapes=x:1x3x32x32 --optShapes=x:32x3x32x32 --maxShapes=x:256x3x32x32"
    assert trtexec(Path("a.onnx"), (3, 32, 32)) == f"trtexec --onnx=a.onnx --saveEngine=a.engine {sizes}"
    assert trtexec(Path("a b.onnx"), (3, 32, 32), 4) == "trtexec '--onnx=a b.onnx' '--saveEngine=a b.engine'"
