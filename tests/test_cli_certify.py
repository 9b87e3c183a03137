"""`corollary certify` as a user meets it: the last line, the exit code, the files, and what it says to misuse."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from corollary.base.registry import registry
from corollary.cli import main
from corollary.verify.counterexample import Counterexample

NETWORKS = """
    import torch
    from torch import nn

    def small():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))

    def image():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4, 1))
        return net, torch.zeros(1, 1, 2, 3)

    class Bessel(nn.Module):
        def forward(self, x):
            return torch.special.i0(x).sum(1, keepdim=True)

    def broken():
        raise ValueError("no network today")
"""


def prop(inputs: int, bound: float) -> str:
    """Every input in [-1, 1]; the output is to stay below the bound."""
    lines = [f"(declare-const X_{i} Real)" for i in range(inputs)] + ["(declare-const Y_0 Real)"]
    lines += [f"(assert (<= X_{i} 1)) (assert (>= X_{i} -1))" for i in range(inputs)]
    return "\n".join([*lines, f"(assert (>= Y_0 {bound}))"])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with networks and properties: `never` and `always` violated, `close` only just not."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "nets.py").write_text(textwrap.dedent(NETWORKS))
    (tmp_path / "never.vnnlib").write_text(prop(2, 100.0))
    (tmp_path / "always.vnnlib").write_text(prop(2, -100.0))
    (tmp_path / "pixels.vnnlib").write_text(prop(6, -100.0))
    yield tmp_path
    sys.modules.pop("nets", None)


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))


def test_proved_is_unsat_and_zero(folder, capsys):
    assert main(["certify", "nets.py:small", "never.vnnlib"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "unsat\n"  # in a pipe the verdict and nothing else
    assert captured.err == ""


def test_violated_is_sat_and_one_and_the_counterexample_is_true(folder, capsys):
    assert main(["certify", "nets.py:small", "always.vnnlib", "--counterexample", "out/found.txt"]) == 1
    assert capsys.readouterr().out == "sat\n"
    found = Counterexample.read(folder / "out" / "found.txt")
    assert bool((found.x.abs() <= 1).all())
    with torch.no_grad():
        assert float(small()(found.x.float())) == pytest.approx(float(found.y), abs=1e-6)
    assert float(found.y) >= -100


def test_a_proof_leaves_no_counterexample(folder):
    assert main(["certify", "nets.py:small", "never.vnnlib", "--counterexample", "found.txt"]) == 0
    assert not (folder / "found.txt").exists()


def test_unknown_is_three_with_the_reason_beside_it(folder, capsys):
    assert main(["certify", "nets.py:Bessel", "never.vnnlib", "--timeout", "5"]) == 3
    captured = capsys.readouterr()
    assert captured.out == "unknown\n"
    assert "i0" in captured.err


def test_out_of_time_is_four(folder, capsys):
    assert main(["certify", "nets.py:small", "never.vnnlib", "--timeout", "1e-9"]) == 4
    assert capsys.readouterr().out == "timeout\n"


def test_json_is_all_there_is(folder, capsys):
    assert main(["certify", "nets.py:small", "always.vnnlib", "--json", "--seed", "3", "--dtype", "float64"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["verdict"], found["network"], found["property"]) == ("sat", "nets.py:small", "always.vnnlib")
    assert len(found["counterexample"]["x"]) == 2
    assert {"load", "read", "attack"} <= found["seconds"].keys()
    assert isinstance(found["domains"], int)
    assert found["configuration"] == {"split": "auto", "dtype": "float64", "seed": 3, "timeout": 60.0}
    assert "torch" in found["environment"]


def test_a_terminal_is_told_what_is_done(folder, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes standard error for a terminal then
    assert main(["certify", "nets.py:small", "always.vnnlib"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "sat\n"
    assert "a counterexample by random points and gradients" in captured.err
    assert "(X_0 " in captured.err


def test_a_factory_may_give_the_shape_of_an_input(folder, capsys):
    """Properties are flat; images are not."""
    assert main(["certify", "nets.py:image", "pixels.vnnlib"]) == 1
    assert capsys.readouterr().out == "sat\n"


def test_weights_beside_a_factory(folder, capsys):
    """With all weights at zero the output is 0 and nothing else."""
    torch.save({name: torch.zeros_like(value) for name, value in small().state_dict().items()}, folder / "zero.pt")
    (folder / "zero.vnnlib").write_text(prop(2, 0.0))
    (folder / "more.vnnlib").write_text(prop(2, 1e-3))
    assert main(["certify", "nets.py:small", "zero.vnnlib", "--weights", "zero.pt"]) == 1
    assert main(["certify", "nets.py:small", "more.vnnlib", "--weights", "zero.pt"]) == 0
    assert capsys.readouterr().out == "sat\nunsat\n"


@pytest.fixture
def onnx_file(folder) -> Path:
    """The small network as an ONNX file."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    state = {name.replace(".", "_"): value.numpy() for name, value in small().state_dict().items()}
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    nodes = [
        helper.make_node("Gemm", ["x", "0_weight", "0_bias"], ["h"], transB=1),
        helper.make_node("Relu", ["h"], ["a"]),
        helper.make_node("Gemm", ["a", "2_weight", "2_bias"], ["y"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 2])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 1])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in state.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "small.onnx")
    return folder / "small.onnx"


def test_onnx_files_are_replayed_as_they_are(onnx_file, folder, capsys):
    assert main(["certify", "small.onnx", "never.vnnlib"]) == 0
    assert main(["certify", "small.onnx", "always.vnnlib", "--counterexample", "found.txt"]) == 1
    assert capsys.readouterr().out == "unsat\nsat\n"
    found = Counterexample.read(folder / "found.txt")
    with torch.no_grad():
        assert float(small()(found.x.float())) == pytest.approx(float(found.y), abs=1e-5)


def test_saved_programs_are_read(folder, capsys):
    batch = ({0: torch.export.Dim.AUTO},)
    torch.export.save(torch.export.export(small(), (torch.zeros(2, 2),), dynamic_shapes=batch), folder / "small.pt2")
    assert main(["certify", "small.pt2", "always.vnnlib"]) == 1
    assert capsys.readouterr().out == "sat\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give a network and a property"),
        (["nets.py:small"], "give a network and a property"),
        (["nowhere.onnx", "never.vnnlib"], "there is no file nowhere.onnx"),
        (["nets.py:small", "nowhere.vnnlib"], "there is no file nowhere.vnnlib"),
        (["nets.py:small", "nets.py"], "nets.py"),
        (["nets.py:broken", "never.vnnlib"], "no network today"),
        (["nets.py:small", "pixels.vnnlib"], "let the factory return the pair (module, example)\nOn the middle"),
        (["nets.py:small", "never.vnnlib", "--timeout", "0"], "positive number of seconds"),
        (["nets.py:small", "never.vnnlib", "--jobs", "2"], "are for a batch"),
        (["nets.py:small", "never.vnnlib", "--batch", "list.csv"], "a batch names its own networks"),
        (["--batch", "nowhere.csv"], "cannot read the instances"),
    ],
)
def test_misuse_is_two_with_advice(folder, capsys, arguments, said):
    assert main(["certify", *arguments]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.out == ""


def test_a_failure_of_our_own_is_not_taken_for_a_violation(folder, capsys, monkeypatch):
    """Python ends with 1 after a traceback, and 1 says that the property is violated."""

    def fails(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setitem(registry("certify")._objects, "files", fails)
    assert main(["certify", "nets.py:small", "never.vnnlib"]) == 70
    assert "a bug" in capsys.readouterr().err


def test_a_batch_prints_its_table_and_ends_with_one_after_an_error(folder, capsys):
    """Rows without a problem run in processes of their own: tests/verify/test_batch.py."""
    (folder / "list.csv").write_text("suite,onnx,vnnlib,timeout_s,verdict\ns,too,short\n")
    arguments = ["certify", "--batch", "list.csv", "--results", "results.csv", "--record", "kept", "--seed", "4"]
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out.splitlines()[2].startswith("| s | 1 | 0 | 0 | 0 | 0 | 1 | 0 |")
    assert "line 2" in captured.err
    content = json.loads((folder / "kept" / "certify-list.json").read_text())
    assert content["command"] == "corollary certify --batch list.csv --jobs 1 --split auto --dtype auto --seed 4"
    assert main([*arguments, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["suites"][0]["error"] == 1
    assert len((folder / "results.csv").read_text().splitlines()) == 2


def test_an_interrupted_batch_says_how_to_go_on(folder, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setitem(registry("certify")._objects, "batch", interrupted)
    assert main(["certify", "--batch", "list.csv", "--results", "r.csv"]) == 130
    assert "go on with: corollary certify --batch list.csv --results r.csv" in capsys.readouterr().err
    assert main(["certify", "--batch", "list.csv"]) == 130
    assert "go on" not in capsys.readouterr().err


def test_help_documents_the_exit_codes_and_stays_light(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["certify", "--help"])
    assert stop.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    for part in ('"unsat" 0', '"sat" 1', '"unknown" 3', '"timeout" 4', "NETWORK PROPERTY"):
        assert part in said
    program = "import sys; from corollary.cli import main\ntry: main(['certify', '--help'])\nexcept SystemExit: pass\n"
    program += "assert not {'torch', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
