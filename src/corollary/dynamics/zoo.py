"""A zoo: networks of several widths, trained at several batch sizes, from several seeds, by one recipe.

Width is the load axis (data to model size) and batch size the temperature axis (a small batch is hot): the recipe is
the same in every cell, and is not tuned along the axes. All networks of a batch size train as one program.

On disk a zoo is a folder, with three files for each cell:

    width-4-batch-32.safetensors   tensors "<seed>/<epoch>/<name>": parameters and buffers, as in `module.state_dict()`
                                   of a network of that width; seeds count from 0, epochs are those kept
    width-4-batch-32.npz           the training record, see `TrainingRecord`
    width-4-batch-32.json          width, batch size, seeds, outcomes, epochs and the recipe, as text

The weights are read elsewhere with safetensors alone:

    tensors = safetensors.torch.load_file("width-4-batch-32.safetensors")
    model.load_state_dict({k.removeprefix("0/30/"): v for k, v in tensors.items() if k.startswith("0/30/")})
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, final

from safetensors.torch import load_file, save
from torch import Tensor, nn

from corollary.base.errors import BadInput
from corollary.base.files import atomic_write
from corollary.base.network import Batch, Loss, batch_length
from corollary.base.progress import track
from corollary.base.seeds import Seeds
from corollary.dynamics.states import stacked, state_of
from corollary.engine import (
    MemberOutcome,
    Members,
    Outcome,
    Population,
    TrainingRecord,
    cross_entropy,
    fingerprint,
    population,
    seeded,
    sgd,
    warmup_cosine,
)
from corollary.engine.arguments import checked_data

MakeModel: TypeAlias = Callable[[int], nn.Module]
"""width -> a network, with PyTorch's default generator."""


class Cell(NamedTuple):
    """A place on the grid."""

    width: int
    batch_size: int

    @property
    def name(self) -> str:
        """What its files are called."""
        return f"width-{self.width}-batch-{self.batch_size}"


@dataclass(frozen=True)
class Recipe:
    """How every network of a zoo is trained: SGD, a linear warm-up, then a cosine to 0.

    Args:
        epochs: passes over the data, the same for all: cells of small batches make more steps.
        warmup: share of the steps in which the learning rate rises. Without it narrow nets at small batches diverge.
        kept_epochs: epochs after which the weights are kept too, besides the last.
    """

    epochs: int = 30
    learning_rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.3
    kept_epochs: tuple[int, ...] = ()


@final
@dataclass(frozen=True)
class TrainedCell:
    """The networks of a cell, one for each seed.

    Attributes:
        members: after the last update; `kept`: after some epochs, the last among them.
        seeds: what initial weights and batch order were drawn from; no two cells share one.
        outcomes: how each ended. A network that diverged has the weights it had then.
        record: measurements of training, `[members]` each.
    """

    members: Members
    kept: Mapping[int, Members]
    seeds: tuple[int, ...]
    outcomes: tuple[MemberOutcome, ...]
    record: TrainingRecord

    @property
    def finished(self) -> tuple[int, ...]:
        """Indices of the networks that did not diverge."""
        return tuple(i for i, ending in enumerate(self.outcomes) if ending.outcome is not Outcome.DIVERGED)


@final
@dataclass(frozen=True)
class Zoo:
    """Trained networks by cell; `module(width, batch_size, i)` is one of them."""

    cells: Mapping[Cell, TrainedCell]
    recipe: Recipe

    @property
    def widths(self) -> tuple[int, ...]:
        """The load axis, ascending."""
        return tuple(sorted({cell.width for cell in self.cells}))

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """The temperature axis, ascending: from hot to cold."""
        return tuple(sorted({cell.batch_size for cell in self.cells}))

    def module(self, width: int, batch_size: int, index: int = 0) -> nn.Module:
        """One network, in evaluation mode."""
        return self.cells[Cell(width, batch_size)].members.module(index)

    def save(self, folder: Path | str) -> Path:
        """Write every cell to `folder`, in the form described above; `load_zoo` reads it."""
        for cell, trained in self.cells.items():
            _write(Path(folder), cell, trained, self.recipe, "")
        return Path(folder)


def train_zoo(
    make_model: MakeModel,
    data: Batch,
    widths: Sequence[int],
    batch_sizes: Sequence[int],
    *,
    seeds: int = 3,
    recipe: Recipe = Recipe(),
    loss: Loss = cross_entropy,
    seed: int = 0,
    padded: bool = True,
    folder: Path | str | None = None,
) -> Zoo:
    """Train a network for each width, batch size and seed.

    Every network has initial weights and a batch order of its own. With `folder`, each cell is written as soon as it is
    trained; the same call goes on where it was stopped, and cells that are there are read and not trained again.

    Args:
        make_model: width -> network, drawing from PyTorch's default generator.
        data: training set `(inputs, targets)`; the dtype and device of everything.
        seeds: networks in a cell.
        loss: mean over samples.
        seed: of all streams; equal seeds give equal zoos, to the bit.
        padded: whether the widths of a batch size train as one program, padded with zeros to the widest, which is
            fastest for small networks. False trains cell by cell: for large networks, and for those that mix units
            (LayerNorm, attention).
        folder: where to keep the zoo, and to resume from.
    Raises: BadInput, for an empty or repeated axis; if `folder` holds cells trained otherwise; as `population`.
    Source: Schürholt et al. 2025, arXiv 2504.18072; load and temperature as in Yang et al. 2021, arXiv 2107.11228.
    """
    checked_data(data)
    _refuse_axes(widths, batch_sizes, seeds, recipe)
    place = None if folder is None else Path(folder)
    streams = Seeds(seed).child("zoo")
    drawn = {
        Cell(width, batch): tuple(streams.integer(f"width {width} batch {batch} network {i}") for i in range(seeds))
        for width in widths
        for batch in batch_sizes
    }
    identities = {} if place is None else _identities(make_model, drawn, fingerprint(data[0], data[1], recipe, loss))
    cells: dict[Cell, TrainedCell] = {}
    for group in track(_groups(widths, batch_sizes, padded), "training a zoo"):
        missing = [cell for cell in group if place is None or not _is_written(place, cell, identities[cell])]
        checkpoint = None if place is None else place / f"{group[0].name}.training"
        if missing:
            # A checkpoint is of the whole group: where there is one, the group was stopped before all were written.
            todo = group if checkpoint is not None and checkpoint.exists() else missing
            trained = _train(make_model, data, {cell: drawn[cell] for cell in todo}, recipe, loss, checkpoint)
            cells |= _split(make_model, trained, todo, drawn, recipe)
            if place is not None:
                for cell in missing:
                    _write(place, cell, cells[cell], recipe, identities[cell])
        if checkpoint is not None:
            checkpoint.unlink(missing_ok=True)
    for cell in drawn:
        if cell not in cells and place is not None:
            cells[cell] = _read(place, cell, make_model)[0]
    return Zoo({cell: cells[cell] for cell in drawn}, recipe)


def load_zoo(folder: Path | str, make_model: MakeModel) -> Zoo:
    """The zoo in `folder`, as `train_zoo(..., folder=)` or `Zoo.save` wrote it.

    Args: `make_model`: width -> network of the same architecture; the weights are read.
    Raises: BadInput, if there is no cell, or a cell does not fit the network.
    """
    descriptions = sorted(Path(folder).glob("width-*-batch-*.json"))
    if not descriptions:
        raise BadInput(f"there is no zoo in {folder}: train one with train_zoo(..., folder={str(folder)!r})")
    found = [Cell(**{axis: json.loads(path.read_text())[axis] for axis in Cell._fields}) for path in descriptions]
    read = {cell: _read(Path(folder), cell, make_model) for cell in sorted(found)}
    recipes = {recipe for _, recipe in read.values()}
    if len(recipes) > 1:
        raise BadInput(f"the cells in {folder} were trained by {len(recipes)} recipes: keep each zoo in its own folder")
    return Zoo({cell: trained for cell, (trained, _) in read.items()}, recipes.pop())


# ------------------------------------------------------------------------------------------------------------ training


def _refuse_axes(widths: Sequence[int], batch_sizes: Sequence[int], seeds: int, recipe: Recipe) -> None:
    for name, axis in (("widths", widths), ("batch_sizes", batch_sizes)):
        if not axis or len(set(axis)) < len(axis) or min(axis) < 1:
            raise BadInput(f"a zoo needs {name} that are different and 1 or more, got {list(axis)}")
    if seeds < 1:
        raise BadInput(f"a cell holds at least 1 network, got seeds={seeds}")
    if outside := [epoch for epoch in recipe.kept_epochs if not 0 <= epoch <= recipe.epochs]:
        raise BadInput(f"weights are to be kept after epochs {outside}, but training has epochs 0 to {recipe.epochs}")


def _groups(widths: Sequence[int], batch_sizes: Sequence[int], padded: bool) -> list[list[Cell]]:
    rows = [[Cell(width, batch) for width in widths] for batch in batch_sizes]
    return rows if padded else [[cell] for row in rows for cell in row]


def _train(
    make_model: MakeModel,
    data: Batch,
    seeds: Mapping[Cell, tuple[int, ...]],
    recipe: Recipe,
    loss: Loss,
    checkpoint: Path | None,
) -> Population:
    """One program of all networks of these cells, which share a batch size."""
    per_epoch = math.ceil(batch_length(data[0]) / next(iter(seeds)).batch_size)
    return population(
        make_model,
        data,
        seeds=[seed for own in seeds.values() for seed in own],
        width=[cell.width for cell, own in seeds.items() for _ in own],
        loss=loss,
        optimizer=sgd(recipe.momentum),
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        schedule=warmup_cosine(max(1, recipe.epochs * per_epoch), recipe.warmup),
        batch_size=next(iter(seeds)).batch_size,
        epochs=recipe.epochs,
        record_every=per_epoch,
        snapshots=[epoch * per_epoch for epoch in _kept(recipe)],
        checkpoint=checkpoint,
    )


def _kept(recipe: Recipe) -> list[int]:
    return sorted({*recipe.kept_epochs, recipe.epochs})


def _split(
    make_model: MakeModel,
    trained: Population,
    cells: Sequence[Cell],
    seeds: Mapping[Cell, tuple[int, ...]],
    recipe: Recipe,
) -> dict[Cell, TrainedCell]:
    """The population cell by cell, without its padding."""
    steps = trained.snapshots.keys()
    found, start = {}, 0
    for cell in cells:
        rows = range(start, start := start + len(seeds[cell]))
        model = seeded(make_model, 0, cell.width)
        kept = {
            epoch: stacked(model, [state_of(trained.snapshots[step].module(row)) for row in rows])
            for epoch, step in zip(_kept(recipe), steps, strict=True)
        }
        record = TrainingRecord({"width": cell.width, "batch_size": cell.batch_size})
        for step, values in zip(trained.record.steps.tolist(), _rows(trained.record), strict=True):
            record.log(step, **{name: value[rows] for name, value in values.items()})
        outcomes = tuple(trained.outcomes[row] for row in rows)
        found[cell] = TrainedCell(kept[recipe.epochs], kept, seeds[cell], outcomes, record)
    return found


def _rows(record: TrainingRecord) -> list[dict[str, Any]]:
    columns = {name: record[name] for name in record.columns}
    return [{name: values[row] for name, values in columns.items()} for row in range(len(record))]


# --------------------------------------------------------------------------------------------------------------- files


def _identities(make_model: MakeModel, seeds: Mapping[Cell, tuple[int, ...]], common: str) -> dict[Cell, str]:
    """For each cell a fingerprint of all that decides its weights: what is common to all, its seeds and its start."""
    starts = {cell: dict(seeded(make_model, own[0], cell.width).state_dict()) for cell, own in seeds.items()}
    return {cell: fingerprint(common, own, starts[cell]) for cell, own in seeds.items()}


def _is_written(folder: Path, cell: Cell, identity: str) -> bool:
    path = folder / f"{cell.name}.json"
    if not path.exists():
        return False
    if json.loads(path.read_text())["identity"] != identity:
        raise BadInput(
            f"{path} belongs to a zoo of other data, networks, seeds or recipe. Give this zoo a folder of its own, or "
            "delete that file to train the cell anew."
        )
    return True


def _write(folder: Path, cell: Cell, trained: TrainedCell, recipe: Recipe, identity: str) -> None:
    """The description is written last: a cell that has one is whole."""
    tensors: dict[str, Tensor] = {}
    for epoch, members in trained.kept.items():
        for index in range(len(members)):
            state = members.module(index).state_dict()
            tensors |= {f"{index}/{epoch}/{name}": tensor.contiguous().clone() for name, tensor in state.items()}
    description = {
        **cell._asdict(),
        "seeds": list(trained.seeds),
        "outcomes": [[ending.outcome.name, ending.step] for ending in trained.outcomes],
        "epochs": list(trained.kept),
        "recipe": asdict(recipe),
        "identity": identity,
    }
    atomic_write(folder / f"{cell.name}.safetensors", save(tensors, {"zoo": json.dumps(description)}))
    trained.record.save(folder / f"{cell.name}.npz")
    atomic_write(folder / f"{cell.name}.json", json.dumps(description, indent=2) + "\n")


def _read(folder: Path, cell: Cell, make_model: MakeModel) -> tuple[TrainedCell, Recipe]:
    description = json.loads((folder / f"{cell.name}.json").read_text())
    path = folder / f"{cell.name}.safetensors"
    tensors = load_file(path)
    kept: dict[int, Members] = {}
    for epoch in description["epochs"]:
        networks = [seeded(make_model, 0, cell.width) for _ in description["seeds"]]
        for index, network in enumerate(networks):
            start = f"{index}/{epoch}/"
            state = {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}
            try:
                network.load_state_dict(state)
            except RuntimeError as error:
                raise BadInput(
                    f"{path} does not fit the network that make_model({cell.width}) gives: {error}"
                ) from error
        kept[epoch] = stacked(networks[0], [state_of(network) for network in networks])
    recipe = Recipe(**{**description["recipe"], "kept_epochs": tuple(description["recipe"]["kept_epochs"])})
    outcomes = tuple(MemberOutcome(Outcome[name], step) for name, step in description["outcomes"])
    record = TrainingRecord.load(folder / f"{cell.name}.npz")
    return TrainedCell(kept[recipe.epochs], kept, tuple(description["seeds"]), outcomes, record), recipe
