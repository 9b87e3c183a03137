"""The command line as a user meets it: what it prints, what it writes, and what it says when something is wrong."""

import json
import os
import re
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from corollary.base.registry import registry
from corollary.cli import main

SNAPSHOT = Path(__file__).parent / "snapshots" / "errors.json"
NETWORKS = """
    import torch
    from torch import nn

    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

    def digits():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))

    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            y = self.layer(x)
            if y.sum() > 0:
                return torch.relu(y)
            return y

    class Strange(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return torch.special.i0(torch.relu(self.layer(x)))

    not_a_network = 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working folder with a file of networks in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("COROLLARY_DATA", raising=False)  # what is known by name depends on it
    (tmp_path / "mynets.py").write_text(textwrap.dedent(NETWORKS))
    yield tmp_path
    sys.modules.pop("mynets", None)


def save_data(path: Path, x, y) -> str:
    np.savez(path, x=np.asarray(x, dtype=np.float32), y=np.asarray(y))
    return path.name


def test_inspect_writes_a_page_and_its_numbers(folder, capsys):
    code = main(["inspect", "mynets:make", "--data", "iris", "--probes", "at-a-glance", "--output", "out/page.html"])
    assert code == 0
    page = (folder / "out" / "page.html").read_text()
    assert page.startswith("<!doctype html>")
    assert len(page) < 3_000_000
    assert "http" not in page.replace("https://arxiv.org/abs/", "").replace("http://www.w3.org/", "")
    assert "<script" not in page
    numbers = json.loads((folder / "out" / "page.json").read_text())
    values = {m["name"]: m["value"] for section in numbers["sections"] for m in section["measurements"]}
    assert values["parameters"] == 4 * 8 + 8 + 8 * 3 + 3
    assert values["operations"] == 2 * (4 * 8 + 8 * 3)
    assert numbers["command"] == "corollary inspect mynets:make --data iris --probes at-a-glance --seed 0"
    assert "page.html" in capsys.readouterr().out


def test_json_goes_to_standard_output_alone(folder, capsys):
    assert main(["inspect", "mynets:make", "--data", "iris", "--probes", "at-a-glance", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "make"


def test_same_seed_gives_the_same_numbers(folder, capsys):
    """Of probes that do not measure more where there is more time: those may see fewer samples on a busy machine."""
    steady = "at-a-glance,codes,units,dimension,pixels,adversarial,reliance,collapse,opposing,utility"

    def numbers() -> list:
        assert main(["inspect", "mynets:make", "--data", "iris", "--json", "--seed", "3", "--probes", steady]) == 0
        return [section["measurements"] for section in json.loads(capsys.readouterr().out)["sections"]]

    assert json.dumps(numbers()) == json.dumps(numbers())


@pytest.mark.parametrize(("network", "named"), [("Branching", "if y.sum() > 0"), ("Strange", "special_i0")])
def test_a_network_that_cannot_be_understood_costs_probes_and_not_the_report(folder, capsys, network, named):
    assert main(["inspect", f"mynets.py:{network}", "--data", "iris", "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert "at-a-glance" in {section["probe"] for section in numbers["sections"]}
    assert all(reason and "Traceback" not in reason for reason in numbers["skipped"].values())
    said = " ".join([*numbers["skipped"].values(), *(note for s in numbers["sections"] for note in s["notes"])])
    assert named in said


def test_image_network_takes_flat_data_and_says_so(folder, capsys):
    assert main(["inspect", "mynets:digits", "--data", "digits", "--probes", "at-a-glance", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["notes"] == []


def test_without_data_the_probes_that_need_it_are_named(folder, capsys):
    assert main(["inspect", "mynets:make", "--json"]) == 0
    assert "it needs data" in " ".join(json.loads(capsys.readouterr().out)["skipped"].values())


def bad_inputs(folder: Path) -> dict[str, list[str]]:
    x = np.random.RandomState(0).rand(12, 4)
    labels = np.arange(12) % 3
    with_nan = x.copy()
    with_nan[2, 1] = np.nan
    (folder / "notes.txt").write_text("these are not the weights you are looking for")
    (folder / "broken.onnx").write_bytes(b"\x00\x01 not a network")
    (folder / "broken.pt2").write_bytes(b"\x00\x01 not a network")
    torch.save({"0.weight": torch.zeros(2, 2)}, folder / "other.pt")
    return {
        "no arguments to run": ["study", "run"],
        "unknown study": ["study", "run", "no-such-study"],
        "no stored result": ["study", "show", "network-capacity"],
        "missing model file": ["inspect", "nowhere.onnx"],
        "missing archive": ["inspect", "nowhere.pt2"],
        "not a model": ["inspect", "notes.txt"],
        "broken onnx": ["inspect", "broken.onnx"],
        "broken pt2": ["inspect", "broken.pt2"],
        "missing module": ["inspect", "no_such_module:make"],
        "missing factory": ["inspect", "mynets:absent"],
        "not a factory": ["inspect", "mynets:not_a_network"],
        "weights of another network": ["inspect", "mynets:make", "--weights", "other.pt"],
        "missing weights": ["inspect", "mynets:make", "--weights", "nowhere.safetensors"],
        "unknown probe": ["inspect", "mynets:make", "--probes", "aura"],
        "missing data file": ["inspect", "mynets:make", "--data", "nowhere.npz"],
        "unknown data name": ["inspect", "mynets:make", "--data", "numerals"],
        "wrong shape": ["inspect", "mynets:make", "--data", "digits"],
        "data with NaN": ["inspect", "mynets:make", "--data", save_data(folder / "nan.npz", with_nan, labels)],
        "labels out of range": [
            "inspect",
            "mynets:make",
            "--data",
            save_data(folder / "labels.npz", x, labels + 3),
        ],
        "more classes than outputs": [
            "inspect",
            "mynets:make",
            "--data",
            save_data(folder / "more.npz", x, np.arange(12) % 4),
        ],
        "empty data": ["inspect", "mynets:make", "--data", save_data(folder / "empty.npz", x[:0], labels[:0])],
        "cite a missing file": ["cite", "nowhere.json"],
        "wrong report ending": ["inspect", "mynets:make", "--probes", "at-a-glance", "--output", "report.pdf"],
    }


def test_misuse_ends_with_exit_code_2_and_advice(folder, capsys):
    said = {}
    for name, arguments in bad_inputs(folder).items():
        assert main(arguments) == 2, name
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err, name
        # The folder is another in each run, and what is registered grows: neither is what a message promises.
        text = captured.err.replace(str(folder), "FOLDER")
        said[name] = re.sub(r"(?<=Known: )[a-z-]+(, [a-z-]+)*(?=\.?$)", "...", text, flags=re.MULTILINE).splitlines()
    if os.environ.get("UPDATE_SNAPSHOTS"):
        SNAPSHOT.write_text(json.dumps(said, indent=2) + "\n")
    assert said == json.loads(SNAPSHOT.read_text())


def test_missing_extra_is_named(folder, capsys, monkeypatch):
    (folder / "net.onnx").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert main(["inspect", "net.onnx"]) == 2
    assert "pip install 'corollary[onnx]'" in capsys.readouterr().err


def test_pickled_weights_need_trust(folder, capsys):
    class Anything:
        pass

    Anything.__qualname__ = "Anything"
    globals()["Anything"] = Anything
    torch.save({"0.weight": Anything()}, folder / "pickled.pt")
    assert main(["inspect", "mynets:make", "--weights", "pickled.pt"]) == 2
    assert "--trust-pickle" in capsys.readouterr().err


def test_interrupted_study_loses_nothing_and_says_how_to_go_on(folder, capsys, monkeypatch):
    study_type = registry("studies").load("network-capacity")
    claims = study_type.claims
    monkeypatch.setattr(study_type, "claims", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["study", "run", "network-capacity", "--scale", "smoke"]) == 130
    assert "go on with: corollary study run network-capacity --scale smoke" in capsys.readouterr().err
    parts = {file: file.stat().st_mtime_ns for file in folder.glob("runs/network-capacity/*/parts/*.npz")}
    assert parts
    monkeypatch.setattr(study_type, "claims", claims)
    assert main(["study", "run", "network-capacity", "--scale", "smoke"]) == 0
    assert parts == {file: file.stat().st_mtime_ns for file in folder.glob("runs/network-capacity/*/parts/*.npz")}


def test_study_is_run_shown_reported_and_recorded(folder, capsys):
    assert main(["study", "run", "network-capacity", "--scale", "smoke", "--record", "kept", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert json.loads((folder / "kept" / "network-capacity.json").read_text()) == summary
    assert {claim["verdict"] for claim in summary["claims"]} <= {
        "computed, not judged at this scale",
        "not run at this scale",
    }
    assert main(["study", "show", "network-capacity"]) == 0
    assert main(["study", "report", "network-capacity"]) == 0
    page = (folder / "corollary-report-network-capacity.html").read_text()
    assert "Baldi" in page
    assert "data:text/csv;base64," in page


def test_cite_prints_each_paper_once(folder, capsys):
    assert main(["cite", "network-capacity", "network-capacity"]) == 0
    assert capsys.readouterr().out.count("1901.00434") == 1


@pytest.mark.parametrize(
    "arguments", [["--help"], ["study", "--help"], ["inspect", "--help"], ["study", "run", "--help"]]
)
def test_help_explains_itself(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    assert "corollary" in capsys.readouterr().out
