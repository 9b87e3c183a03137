"""The network of `corollary demo`: a small one, trained in seconds on real handwritten digits."""

from pathlib import Path

import torch
from torch import nn

from corollary.data import Dataset, digits
from corollary.engine import Moment, TrainingRecord, every, fit, schedule, seeded
from corollary.engine.record import Value
from corollary.evidence import Training

TRAINING = Training("sgd", learning_rate=0.05, batch_size=32, momentum=0.9, epochs=30)
RUNS = 3
"""The network itself, and further runs of it for what only several show."""


def network() -> nn.Module:
    """64-96-48-10 with batch normalisation: small enough to take apart in seconds, large enough to be worth it."""
    return nn.Sequential(
        nn.Linear(64, 96),
        nn.BatchNorm1d(96),
        nn.ReLU(),
        nn.Linear(96, 48),
        nn.ReLU(),
        nn.Linear(48, 10),
    )


def train_and_save(folder: Path, *, seed: int = 0) -> list[str]:
    """Train the network on the digits, some times over, and write to `folder` what `inspect` takes.

    Returns: the words that follow `corollary inspect`: the first run as a .pt2 archive, which needs no code to be
        read, its settings, its record, and the other runs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = digits()
    programs = []
    for run in range(RUNS):
        module, record = _trained(data, seed + run)
        program = torch.export.export(
            module, (data.train.x[:4],), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False
        )
        programs.append(folder / (f"demo-run-{run}.pt2" if run else "demo.pt2"))
        torch.export.save(program, programs[-1])
        if run == 0:
            record.save(folder / "demo-record.npz")
    settings = {
        "learning-rate": TRAINING.learning_rate,
        "batch-size": TRAINING.batch_size,
        "momentum": TRAINING.momentum,
        "epochs": TRAINING.epochs,
        "record": folder / "demo-record.npz",
        "checkpoints": ",".join(map(str, programs[1:])),
    }
    return [str(programs[0]), *(str(word) for name, value in settings.items() for word in (f"--{name}", value))]


def _trained(data: Dataset, seed: int) -> tuple[nn.Module, TrainingRecord]:
    """One run, measured often at first and evenly later, with the loss of every training sample."""
    (x, y), test = data.train, data.test
    assert y is not None  # the digits have labels
    assert test is not None
    assert test.y is not None
    rate = TRAINING.learning_rate
    assert rate is not None  # set above
    at_first, later = schedule("log", per_decade=20), every(20)

    def per_sample(moment: Moment) -> dict[str, Value]:
        with torch.no_grad():
            return {"per_sample_loss": nn.functional.cross_entropy(moment.module(x), y, reduction="none")}

    done = fit(
        seeded(network, seed),
        (x, y),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=rate, momentum=TRAINING.momentum),
        epochs=TRAINING.epochs,
        batch_size=TRAINING.batch_size,
        seed=seed,
        validation={"test": (test.x, test.y), "train": (x, y)},
        callbacks=(per_sample,),
        record_every=lambda step: at_first(step) or later(step),
    )
    return done.module.eval(), done.record
