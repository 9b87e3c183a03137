"""Batches: every instance gets its row whatever it does to its process, and a run that stopped goes on where it was."""

import csv
import importlib
import json
import math
import multiprocessing
import sys
import textwrap
import types
from dataclasses import replace
from pathlib import Path

import pytest

from corollary.base.errors import BadInput, CorollaryError
from corollary.verify import certify_batch
from corollary.verify.batch import BatchResult
from corollary.verify.instances import Instance, ResultsFile, Row, read_instances
from corollary.verify.workers import run_in_processes

NETWORKS = """
    import os, time
    import torch
    from torch import nn

    def small():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))

    def dies():
        os._exit(3)

    def hangs():
        time.sleep(1000)
"""
PROPERTY = """
    (declare-const X_0 Real) (declare-const X_1 Real) (declare-const Y_0 Real)
    (assert (>= X_0 -1)) (assert (<= X_0 1)) (assert (>= X_1 -1)) (assert (<= X_1 1))
    (assert (>= Y_0 {}))
"""
INSTANCES = """\
suite,onnx,vnnlib,timeout_s,verdict
good,nets.py:small,never.vnnlib,60,unsat
good,nets.py:small,always.vnnlib,60,sat
bad,nets.py:dies,never.vnnlib,60,unsat
bad,nowhere.onnx,never.vnnlib,60,sat
bad,nets.py:small,nowhere.vnnlib,60,
bad,too,short
bad,nets.py:small,never.vnnlib,soon,unsat
good,nets.py:small,never.vnnlib,60,sat
bad,nets.py:hangs,never.vnnlib,0.2,unsat
"""
VERDICTS = ["unsat", "sat", "error", "error", "error", "error", "error", "unsat", "timeout"]


def filled(folder: Path) -> Path:
    """A folder with networks, properties and a list of instances."""
    (folder / "nets.py").write_text(textwrap.dedent(NETWORKS))
    (folder / "never.vnnlib").write_text(PROPERTY.format(100))
    (folder / "always.vnnlib").write_text(PROPERTY.format(-100))
    (folder / "instances.csv").write_text(INSTANCES)
    return folder / "instances.csv"


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[BatchResult, Path]:
    """One batch with all that can go wrong, and its folder."""
    folder = tmp_path_factory.mktemp("batch")
    return certify_batch(filled(folder), timeout=30.0, jobs=2, grace=0.3, results=folder / "results.csv"), folder


def test_every_instance_has_its_row_whatever_it_does(ran):
    result, _ = ran
    assert [row.verdict for row in result.rows] == VERDICTS
    reasons = [row.reason for row in result.rows]
    assert "its process ended with 3" in reasons[2]
    assert "there is no file" in reasons[3]
    assert "nowhere.vnnlib" in reasons[4]
    assert "line 7" in reasons[5]
    assert "wanted 5" in reasons[5]
    assert "'soon' is no positive number" in reasons[6]
    assert "stopped from outside" in reasons[8]
    assert all(not reasons[i] for i in (0, 1, 7))
    assert multiprocessing.active_children() == []


def test_contradictions_are_counted_by_suite(ran):
    result, _ = ran
    assert [(row.onnx, row.published) for row in result.contradictions] == [("nets.py:small", "sat")]
    assert [row.agreement for row in result.rows] == ["agrees", "agrees", "", "", "", "", "", "contradicts", ""]
    good, bad = result.by_suite()
    assert {key: good[key] for key in ("suite", "instances", "unsat", "sat", "solved", "contradictions")} == {
        "suite": "good", "instances": 3, "unsat": 2, "sat": 1, "solved": 3, "contradictions": 1,
    }  # fmt: skip
    assert (bad["timeout"], bad["error"], bad["solved"]) == (1, 5, 0)
    lines = result.markdown().splitlines()
    assert lines[0].startswith(
        "| suite | instances | unsat | sat | unknown | timeout | error | solved | published | contradictions"
    )
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| good", "| bad", "| all"]
    assert "<td>contradictions</td>" not in result._repr_html_()
    assert "<th>contradictions</th>" in result._repr_html_()


def test_results_are_on_file_row_by_row(ran):
    _, folder = ran
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = ["suite", "onnx", "vnnlib", "verdict", "seconds", "domains", "published", "agreement", "reason"]
    assert list(rows[0]) == names
    assert sorted(row["verdict"] for row in rows) == sorted(VERDICTS)


def test_the_summary_is_recorded_like_a_studys(ran):
    result, folder = ran
    content = json.loads(result.record(folder, "certify-tiny", "corollary certify ...").read_text())
    assert {"slug", "command", "configuration", "seconds", "environment", "suites"} <= content.keys()
    assert content["configuration"]["seed"] == 0
    assert "torch" in content["environment"]
    assert content["seconds"] == pytest.approx(sum(row.seconds for row in result.rows), abs=0.06)


def test_a_run_that_was_cut_off_goes_on_where_it_was(ran, tmp_path, monkeypatch):
    """Rows that are on file are not run again; half a line is; and no process is started for what needs none."""
    result, folder = ran
    filled(tmp_path)
    whole = (folder / "results.csv").read_text().splitlines(keepends=True)
    last = next(line for line in whole if "soon" in line)
    kept = [line for line in whole if line != last]
    (tmp_path / "results.csv").write_text("".join(kept) + last[:20])
    started = []
    monkeypatch.setattr(
        importlib.import_module("corollary.verify.batch"),
        "run_in_processes",
        lambda work, jobs, limits, processes: (started.extend(jobs), (yield from ()))[0],
    )
    again = certify_batch(tmp_path / "instances.csv", results=tmp_path / "results.csv")
    assert started == []
    assert again.rows == result.rows
    assert sorted((tmp_path / "results.csv").read_text().splitlines()) == sorted("".join(whole).splitlines())


def test_an_interrupt_keeps_what_is_finished_and_leaves_no_process(tmp_path, monkeypatch):
    listed = [Instance("a.onnx", "b", problem="none"), *(Instance(f"{n}.onnx", str(tmp_path / "b")) for n in "bc")]
    append = ResultsFile.append

    def interrupted(self: ResultsFile, row: Row) -> None:
        if row.onnx == "c.onnx":
            raise KeyboardInterrupt
        append(self, row)

    monkeypatch.setattr(ResultsFile, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        certify_batch(listed, results=tmp_path / "results.csv")
    assert multiprocessing.active_children() == []
    rows = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    assert [row["onnx"] for row in rows] == ["a.onnx", "b.onnx"]


def test_instances_from_python_and_a_table_without_published_verdicts():
    result = certify_batch([Instance("a.onnx", "b.vnnlib", problem="not today")])
    assert [row.reason for row in result.rows] == ["not today"]
    assert "contradictions" not in result.markdown()
    assert result.configuration["instances"] == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [({"jobs": 0}, "jobs 1 or more"), ({"timeout": 0.0}, "timeout must be positive"), ({"grace": -1.0}, "grace 0")],
)
def test_limits_that_are_none_are_refused(options, said):
    with pytest.raises(BadInput, match=said):
        certify_batch([Instance("a", "b")], **options)


# --------------------------------------------------------------------------------------------------------------- files


def test_rows_without_names_are_those_of_vnn_comp(tmp_path):
    file = tmp_path / "acasxu" / "instances.csv"
    file.parent.mkdir()
    file.write_text("onnx/a.onnx,vnnlib/p.vnnlib,116\n\nonnx/b.onnx,vnnlib/q.vnnlib,5.5\n")
    assert read_instances(file) == [
        Instance("onnx/a.onnx", "vnnlib/p.vnnlib", 116.0, "acasxu"),
        Instance("onnx/b.onnx", "vnnlib/q.vnnlib", 5.5, "acasxu"),
    ]


def test_named_columns_come_in_any_order_and_others_are_passed_over(tmp_path):
    file = tmp_path / "list.csv"
    file.write_text("verdict,evidence,vnnlib,onnx,timeout\nholds,9 tools,p.vnnlib,a.onnx,\n")
    (instance,) = read_instances(file)
    assert instance == Instance("a.onnx", "p.vnnlib", 60.0, tmp_path.name, "holds")
    assert Row.of(instance, "unsat").agreement == "agrees"
    assert Row.of(replace(instance, published="unknown"), "unsat").agreement == ""


@pytest.mark.parametrize("content", [None, "", "\n\n", "onnx,vnnlib,timeout_s\n"])
def test_a_list_that_is_none_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "list.csv").write_text(content)
    with pytest.raises(BadInput, match="rows onnx,vnnlib,timeout"):
        read_instances(tmp_path / "list.csv")


@pytest.mark.parametrize("timeout", [0.0, -1.0, math.inf, math.nan])
def test_an_instance_needs_a_limit(timeout):
    with pytest.raises(BadInput, match="positive number of seconds"):
        Instance("a", "b", timeout)


@pytest.mark.parametrize("content", ["these,are,no,results\n", "suite,onnx\na,b\n", "notes"])
def test_a_file_that_holds_something_else_is_not_appended_to(tmp_path, content):
    (tmp_path / "results.csv").write_text(content)
    with pytest.raises(BadInput, match="holds no results of a batch"):
        ResultsFile(tmp_path / "results.csv")
    assert (tmp_path / "results.csv").read_text() == content


def test_the_same_instance_twice_is_run_twice(tmp_path):
    instance = Instance("a", "b", suite="s")
    ResultsFile(tmp_path / "results.csv").append(Row.of(instance, "unsat", seconds=1.25, domains=7))
    held = ResultsFile(tmp_path / "results.csv")
    assert held.take(instance) == Row("s", "a", "b", "unsat", 1.25, 7, "", "", "")
    assert held.take(instance) is None


# ----------------------------------------------------------------------------------------------------------- processes


def test_a_job_that_dies_or_overruns_costs_itself_alone():
    jobs = ["6 * 7", "__import__('os')._exit(5)", "__import__('time').sleep(1000)", "'after'"]
    ended = {entry.index: entry for entry in run_in_processes(eval, jobs, [60.0, 60.0, 0.2, 60.0], processes=1)}
    assert [ended[i].how for i in range(4)] == ["done", "died", "overran", "done"]
    assert (ended[0].answer, ended[1].exit_code, ended[3].answer) == (42, 5, "after")
    assert 0.2 <= ended[2].seconds < 30
    assert multiprocessing.active_children() == []


def test_a_process_that_cannot_start_is_an_error_and_not_an_endless_loop(capfd, monkeypatch):
    def work(job: str) -> str:
        return job

    work.__module__, work.__qualname__ = "no_such_module", "work"
    module = types.ModuleType("no_such_module")
    monkeypatch.setattr(module, "work", work, raising=False)
    monkeypatch.setitem(sys.modules, "no_such_module", module)  # here it can be sent; there it cannot be found
    with pytest.raises(CorollaryError, match="ended as it started"):
        list(run_in_processes(work, ["a"], [60.0], processes=1))
    assert "no_such_module" in capfd.readouterr().err


def test_no_jobs_need_no_process():
    assert list(run_in_processes(eval, [], [], processes=4)) == []


# ------------------------------------------------------------------------------------------------------ real instances


@pytest.mark.slow
def test_published_verdicts_on_real_networks(real_data, tmp_path):
    pytest.importorskip("onnxruntime")
    folder = real_data / "vnn"
    with (folder / "instances.csv").open() as file:
        rows = [
            row
            for row in csv.DictReader(file)
            if row["suite"] == "acasxu" and row["onnx"].endswith("1_1_batch_2000.onnx")
        ]
    with (tmp_path / "few.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["suite", "onnx", "vnnlib", "timeout_s", "verdict"], extrasaction="ignore")
        writer.writeheader()
        for row in rows[:2]:
            writer.writerow(row | {"onnx": folder / row["onnx"], "vnnlib": folder / row["vnnlib"]})
    result = certify_batch(tmp_path / "few.csv", timeout=60.0)
    assert not result.contradictions
    assert not result.errors
