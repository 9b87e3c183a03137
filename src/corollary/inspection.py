"""`inspect`: every probe that can be reached within the budget, on one network, as one value.

The file is not called inspect.py because the package's attribute of that name is the function.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from corollary.base.errors import BadInput, CannotCapture, CorollaryError
from corollary.base.files import atomic_write
from corollary.base.network import Inputs, Loss, Params, as_function, batch_length, call, evaluating, parameters_of
from corollary.base.progress import track
from corollary.base.registry import registry
from corollary.base.seeds import Seeds
from corollary.data import Dataset, Split, load
from corollary.engine import TrainingRecord
from corollary.evidence import Budget, Finding, Need, Probe, Subject, Training
from corollary.evidence.store import environment, standalone
from corollary.graph import Graph
from corollary.graph.archive import COUNTER, Network, load_network, read_checkpoint

SAMPLES_FOR_LADDER = 4
"""Enough to run and differentiate the network once, and no more."""


@dataclass(frozen=True)
class Section:
    """A probe with what it found, and the seconds it took."""

    probe: Probe
    finding: Finding
    seconds: float


@dataclass(frozen=True)
class Report:
    """What is known about a network.

    Args:
        facts: what was inspected, in words, by label.
        skipped: title of each probe that did not run, with the reason.
        notes: what the reader should know about how the data met the network.
    """

    name: str
    facts: Mapping[str, str]
    sections: tuple[Section, ...]
    skipped: Mapping[str, str]
    notes: tuple[str, ...]
    command: str
    seed: int
    seconds: float
    environment: Mapping[str, str]

    def as_json(self) -> dict[str, Any]:
        """The report without its pictures."""
        return {
            "name": self.name,
            "facts": dict(self.facts),
            "sections": [_section_as_json(section) for section in self.sections],
            "skipped": dict(self.skipped),
            "notes": list(self.notes),
            "command": self.command,
            "seed": self.seed,
            "seconds": round(self.seconds, 2),
            "environment": dict(self.environment),
        }

    def save(self, path: str | Path) -> Path:
        """Write the report to `path`: a page (.html) or its numbers (.json).

        Raises: BadInput, for another ending.
        """
        path = Path(path)
        match path.suffix:
            case ".html":
                return atomic_write(path, registry("renderers").load("report-page")(self))
            case ".json":
                return atomic_write(path, json.dumps(self.as_json(), indent=2, default=str) + "\n")
        raise BadInput(f"a report is saved as .html or .json, got {path.name!r}")

    def save_figures(self, folder: str | Path) -> list[Path]:
        """Write each figure's picture (SVG) and data (CSV) to `folder`."""
        written = []
        for section in self.sections:
            for figure in section.finding.figures:
                written.append(atomic_write(Path(folder) / f"{figure.name}.svg", standalone(figure.svg())))
                written.append(atomic_write(Path(folder) / f"{figure.name}.csv", figure.csv()))
        return written

    def _repr_html_(self) -> str:
        return registry("renderers").load("report-fragment")(self)


def inspect(
    model: nn.Module | str | Path,
    data: Dataset | tuple[Any, Any] | Tensor | str | Path | None = None,
    *,
    weights: str | Path | None = None,
    loss: Loss | None = None,
    example: Inputs | None = None,
    training: Training | None = None,
    record: TrainingRecord | str | Path | None = None,
    checkpoints: Sequence[Params | nn.Module | str | Path] = (),
    budget: float = 60.0,
    probes: Sequence[str] | None = None,
    seed: int = 0,
    name: str | None = None,
    command: str | None = None,
    trust_pickle: bool = False,
    debug: bool = False,
) -> Report:
    """Everything the known probes can say about a network within `budget` seconds.

    A network that is hard to take apart costs probes, never the report: what did not run is listed with its reason.

    Args:
        model: a module (never written to), a file (.onnx, .pt2), or "package.module:factory".
        data: a `Dataset`, a pair (inputs, targets), inputs alone, a file, or a name such as "digits".
        weights: for a factory: a .safetensors file or a state dict.
        loss: mean over samples; by default cross-entropy for classification, mean square for regression.
        example: inputs to capture the network with; by default some of the data.
        training: the settings the network was trained with, for probes that compare with them.
        record: what was measured while it was trained: a `TrainingRecord` or the .npz file it was saved to.
        checkpoints: other runs of the same architecture: modules, parameters and buffers by name, or files of them.
        probes: names of the probes to run; by default all.
        command: what to print as the way to make the report again.
        debug: let an unexpected error in a probe through, with its traceback.
    Raises: BadInput, if the network or the data cannot be used at all.
    """
    whole = Budget(budget)
    selected = _selected(probes)
    dataset = as_dataset(data)
    notes: list[str] = []
    network = load_network(model, weights=weights, example=example, trust_pickle=trust_pickle)
    with evaluating(network.module):
        if dataset is not None:
            dataset = fit_data(network, dataset, notes)
            if isinstance(network.graph, CannotCapture) and example is None:  # only now is it known what it takes
                captured = load_network(network.module, example=dataset.train.x[:SAMPLES_FOR_LADDER])
                network = replace(network, graph=captured.graph)
        subject = Subject(
            name=name or network.name,
            module=network.module,
            program=network.graph,
            data=dataset,
            loss=loss or default_loss(dataset),
            seeds=Seeds(seed).child("inspect"),
            budget=whole,
            training=training or Training(),
            record=_record(record),
            checkpoints=tuple(_checkpoint(network.module, given, trust_pickle) for given in checkpoints),
        )
        reach = ladder(subject)
        sections, skipped = _run(selected, subject, reach, whole, debug)
    return Report(
        name=subject.name,
        facts=_facts(network, subject),
        sections=tuple(sections),
        skipped=skipped,
        notes=tuple(notes),
        command=command or f"corollary.inspect({subject.name}, seed={seed})",
        seed=seed,
        seconds=time.perf_counter() - whole.start,
        environment=environment(),
    )


def as_dataset(data: Any) -> Dataset | None:
    """What the caller gave as data, as a `Dataset`: integer targets mean classes, floating ones quantities.

    Raises: BadInput, saying what can be given.
    """
    if data is None or isinstance(data, Dataset):
        return data
    if isinstance(data, str | Path):
        return load(data)
    x, y = data if isinstance(data, tuple | list) and len(data) == 2 else (data, None)
    if not all(isinstance(part, Tensor | np.ndarray) for part in (x, y) if part is not None):
        raise BadInput(
            f"data of type {type(data).__name__} was given; wanted a Dataset, a pair (inputs, targets) of tensors or "
            "arrays, inputs alone, a file, or the name of a data set"
        )
    x = torch.as_tensor(x)
    y = None if y is None else torch.as_tensor(y)
    if y is None:
        return Dataset("your data", Split(x), None, "unlabelled")
    labels = not y.is_floating_point()
    classes = tuple(str(k) for k in range(int(y.max()) + 1)) if labels and y.numel() else None
    return Dataset("your data", Split(x, y), None, "classification" if labels else "regression", classes)


def default_loss(data: Dataset | None) -> Loss:
    """Cross-entropy for classes, mean square for quantities."""
    if data is not None and data.task == "regression":
        return nn.functional.mse_loss
    return nn.functional.cross_entropy


def fit_data(network: Network, data: Dataset, notes: list[str]) -> Dataset:
    """The data in the dtype, device and shape the network takes.

    The shape is changed only to another one of as many entries (the one a program states, a flat one, an image), and
    that is noted.
    Raises: BadInput, naming both shapes, if the network fails on it in every form, or if a label has no output.
    """
    module = network.module
    anchor = next((t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()), None)
    if anchor is not None:
        data = data.to(anchor.dtype, anchor.device)
    sample_shape = tuple(data.train.x.shape[1:])
    failures: list[str] = []
    for shape in _shapes_to_try(sample_shape, network):
        reshaped = data if shape == sample_shape else _reshaped(data, shape)
        try:
            with torch.no_grad():
                outputs = call(module, reshaped.train.x[:SAMPLES_FOR_LADDER])
        except (RuntimeError, ValueError, TypeError, IndexError, CorollaryError) as error:
            failures.append(f"{list(shape)}: {str(error).splitlines()[0]}")
            continue
        if shape != sample_shape:
            notes.append(f"Samples of shape {list(sample_shape)} were given to the network as {list(shape)}.")
        _check_outputs(outputs, reshaped)
        return reshaped
    raise BadInput(
        f"the network does not take samples of shape {list(sample_shape)} (data set {data.name!r}). It said, by shape "
        "tried:\n  " + "\n  ".join(failures) + "\nGive data of the shape the network was trained on."
    )


def ladder(subject: Subject) -> dict[Need, str]:
    """For each rung the network does not reach, why: an empty dict means that every probe can run."""
    missing: dict[Need, str] = {}
    if isinstance(subject.program, CannotCapture):
        missing[Need.PROGRAM] = f"the network's program could not be captured: {subject.program}"
    if subject.data is None:
        return missing
    x, _ = subject.sample(SAMPLES_FOR_LADDER)
    try:
        params = parameters_of(subject.module)
        function = as_function(subject.module)
        torch.func.grad(lambda p: function(p, x).float().square().mean())(params)
    except (RuntimeError, CorollaryError) as error:
        missing[Need.GRADIENTS] = f"gradients could not be computed: {str(error).splitlines()[0]}"
    return missing


def _selected(names: Sequence[str] | None) -> list[Probe]:
    known = registry("probes")
    return [known.load(name) for name in (names if names is not None else known.names())]


def _run(
    probes: list[Probe], subject: Subject, missing: Mapping[Need, str], budget: Budget, debug: bool
) -> tuple[list[Section], dict[str, str]]:
    """Run the probes that can be reached, each with its share of what is left of the budget."""
    sections: list[Section] = []
    skipped: dict[str, str] = {}
    for i, probe in enumerate(track(probes, "probing", total=len(probes))):
        reason = _out_of_reach(probe, subject, missing)
        if reason is None and budget.remaining() <= 0:
            reason = f"the budget of {budget.seconds:.0f} s was spent: raise it with --budget"
        if reason is None:
            share = Budget(budget.remaining() / (len(probes) - i))
            start = time.perf_counter()
            try:
                finding = probe.run(replace(subject, budget=share))
                sections.append(Section(probe, finding, time.perf_counter() - start))
                continue
            except CorollaryError as error:
                reason = str(error)
            except Exception as error:  # a probe that fails on a strange network must not cost the others
                if debug:
                    raise
                reason = f"it failed with {type(error).__name__}: {error}"
        skipped[probe.title] = reason
    return sections, skipped


def _out_of_reach(probe: Probe, subject: Subject, missing: Mapping[Need, str]) -> str | None:
    if probe.needs in missing:
        return missing[probe.needs]
    if probe.data != "none" and subject.data is None:
        return "it needs data: give inspect a data set (--data FILE or NAME)"
    if probe.data == "targets" and subject.task == "unlabelled":
        return "it needs targets: give the data set a y"
    return None


def _shapes_to_try(shape: tuple[int, ...], network: Network) -> list[tuple[int, ...]]:
    """What the program states, the given shape, flat, and square images of 1 or 3 channels: all of as many entries."""
    entries = int(np.prod(shape))
    stated = network.graph.inputs[0].shape[1:] if isinstance(network.graph, Graph) else ()
    sizes = tuple(size for size in stated if isinstance(size, int))
    found = [sizes] if stated and len(sizes) == len(stated) and int(np.prod(sizes)) == entries else []
    found += [shape, (entries,)]
    for channels in (1, 3):
        side = round((entries / channels) ** 0.5)
        if channels * side * side == entries:
            found += [(channels, side, side), (side, side)] if channels == 1 else [(channels, side, side)]
    return list(dict.fromkeys(found))


def _reshaped(data: Dataset, shape: tuple[int, ...]) -> Dataset:
    def change(part: Split) -> Split:
        return Split(part.x.reshape(len(part.x), *shape), part.y)

    return replace(
        data,
        train=change(data.train),
        test=None if data.test is None else change(data.test),
        feature_names=data.feature_names if len(shape) == 1 else None,
    )


def _check_outputs(outputs: Any, data: Dataset) -> None:
    if not isinstance(outputs, Tensor):
        raise BadInput(
            f"the network returns {type(outputs).__name__}; wanted one tensor: wrap it in a module that picks one"
        )
    if data.task != "classification" or data.classes is None:
        return
    if outputs.ndim != 2:
        raise BadInput(
            f"for classification the network must return [batch, classes], got {list(outputs.shape)} for "
            f"{batch_length(data.train.x[:SAMPLES_FOR_LADDER])} samples"
        )
    if len(data.classes) > outputs.shape[1] > 1:
        raise BadInput(
            f"labels run to {len(data.classes) - 1}, but the network has {outputs.shape[1]} outputs: "
            "the data belongs to another network, or its labels do not start at 0"
        )


def _record(given: TrainingRecord | str | Path | None) -> TrainingRecord | None:
    return TrainingRecord.load(given) if isinstance(given, str | Path) else given


def _checkpoint(module: nn.Module, given: Params | nn.Module | str | Path, trust_pickle: bool) -> Params:
    """Parameters and buffers of another run, by name, in the module's dtype and on its device."""
    if isinstance(given, str | Path):
        given = read_checkpoint(module, given, trust_pickle=trust_pickle)
    wanted = module.state_dict()
    found = {name: wanted[name] for name in wanted if name.endswith(COUNTER)}  # matters to training alone
    found |= given.state_dict() if isinstance(given, nn.Module) else given
    found = {name: tensor for name, tensor in found.items() if name in wanted or not name.endswith(COUNTER)}
    if {name: t.shape for name, t in found.items()} != {name: t.shape for name, t in wanted.items()}:
        odd = sorted(name for name in found.keys() | wanted.keys() if name not in found or name not in wanted)
        raise BadInput(
            "a checkpoint is of another architecture than the network: it differs in "
            + (", ".join(odd[:8]) or "the shapes of its parameters")
        )
    return {name: found[name].detach().to(t) for name, t in wanted.items()}


def _facts(network: Network, subject: Subject) -> dict[str, str]:
    facts = {"network": network.origin}
    if isinstance(network.graph, Graph):
        facts["program"] = f"captured: {len(network.graph.computing())} operations"
    else:
        facts["program"] = "not captured: probes that need the program were skipped"
    facts["data"] = "none" if subject.data is None else subject.data.describe()
    facts["training"] = str(subject.training)
    if subject.record is not None:
        facts["record"] = f"{len(subject.record)} steps of {', '.join(subject.record.columns)}"
    if subject.checkpoints:
        facts["checkpoints"] = f"{len(subject.checkpoints)} of the same architecture"
    return facts


def _section_as_json(section: Section) -> dict[str, Any]:
    finding = section.finding
    return {
        "probe": section.probe.name,
        "room": section.probe.room,
        "title": section.probe.title,
        "sources": [asdict(source) for source in section.probe.sources],
        "measurements": [{**asdict(measurement), "status": measurement.status} for measurement in finding.measurements],
        "figures": {
            figure.name: {key: np.asarray(column).tolist() for key, column in figure.data.items()}
            for figure in finding.figures
        },
        "notes": list(finding.notes),
        "seconds": round(section.seconds, 3),
    }
