"""Seeds, registry, optional modules, files and progress."""

import subprocess
import sys

import pytest
import torch

from corollary.base.errors import BadInput, MissingExtra
from corollary.base.files import atomic_write
from corollary.base.optional import optional
from corollary.base.progress import progress, track
from corollary.base.registry import Registry, registry
from corollary.base.seeds import Seeds


def test_streams_are_reproducible_and_independent():
    a, b = Seeds(7), Seeds(7)
    assert torch.equal(torch.rand(5, generator=a("x")), torch.rand(5, generator=b("x")))
    assert not torch.equal(torch.rand(5, generator=a("x")), torch.rand(5, generator=a("y")))
    assert Seeds(7).integer("x") != Seeds(8).integer("x")
    assert Seeds(7).child("part").integer("x") != Seeds(7).integer("x")
    assert 0 <= Seeds(7).integer("x") < 2**63


def test_registry_lists_registers_and_explains():
    known = Registry("nothing built in")
    assert known.names() == []
    known.register("mine", 3)
    assert known.names() == ["mine"]
    assert known.load("mine") == 3
    with pytest.raises(BadInput, match=r"there is no 'yours' among the nothing built in. Known: mine"):
        known.load("yours")


@pytest.mark.parametrize("kind", ["probes", "studies", "renderers"])
def test_every_built_in_entry_loads_and_carries_its_own_name(kind):
    names = registry(kind).names()
    assert names
    for name in names:
        thing = registry(kind).load(name)
        assert getattr(thing, "slug", getattr(thing, "name", name)) == name


def test_listing_imports_nothing_heavy():
    code = (
        "import sys, corollary\nfrom corollary.cli import main\n"
        "main(['study', 'list']); main(['probes'])\n"
        "heavy = {'torch', 'matplotlib', 'numpy', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_missing_extra_says_how_to_get_it():
    module = optional("no_such_module", extra="onnx", purpose="reading .onnx networks")
    with pytest.raises(MissingExtra, match=r"reading .onnx networks needs .*'no_such_module'(.|\n)*corollary\[onnx\]"):
        _ = module.anything
    assert optional("math", extra="x", purpose="y").pi == pytest.approx(3.14159, abs=1e-5)


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = atomic_write(tmp_path / "deep" / "file.txt", "old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        atomic_write(path, "new")
    assert path.read_text() == "old"
    assert [file.name for file in path.parent.iterdir()] == ["file.txt"]


def test_track_passes_items_through_and_is_silent_by_default(capsys, monkeypatch):
    assert list(track([1, 2, 3], "counting")) == [1, 2, 3]
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, to rich
    with progress(show=True):
        assert list(track(iter([1, 2]), "counting", total=2)) == [1, 2]
    assert "counting" in capsys.readouterr().err


def test_keeping_freed_memory_changes_no_value():
    from corollary.base.memory import keep_freed_memory

    keep_freed_memory()
    keep_freed_memory()  # asked for again, nothing changes
    assert bytes(bytearray(2**24)) == bytes(2**24)
