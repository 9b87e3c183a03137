"""How a network was trained, as far as its owner says: what probes of training compare their findings with."""

from dataclasses import dataclass

from corollary.base.errors import BadInput

OPTIMIZERS = ("sgd", "adam")


@dataclass(frozen=True)
class Training:
    """The settings a network was trained with; what is not known is None.

    Args:
        optimizer: "sgd" or "adam".
        learning_rate: at the end of training, the rate at which the final weights had to be stable.
        batch_size: samples a step.
        momentum: heavy-ball momentum of SGD.
        weight_decay: as PyTorch's optimizers take it: the gradient of `weight_decay / 2` times the squared norm.
        epochs: passes over the training set.
    Raises: BadInput, naming the setting that is out of its range.
    """

    optimizer: str = "sgd"
    learning_rate: float | None = None
    batch_size: int | None = None
    momentum: float = 0.0
    weight_decay: float = 0.0
    epochs: int | None = None

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise BadInput(f"the optimizer is one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise BadInput(f"the learning rate must be above 0, got {self.learning_rate}")
        if self.batch_size is not None and self.batch_size < 1:
            raise BadInput(f"a batch holds at least 1 sample, got batch_size={self.batch_size}")
        if not 0 <= self.momentum < 1:
            raise BadInput(f"momentum lies in [0, 1), got {self.momentum}")
        if not self.weight_decay >= 0:
            raise BadInput(f"weight decay is at least 0, got {self.weight_decay}")
        if self.epochs is not None and self.epochs < 1:
            raise BadInput(f"training takes at least 1 epoch, got epochs={self.epochs}")

    def __str__(self) -> str:
        given = {
            "learning rate": self.learning_rate,
            "batch size": self.batch_size,
            "momentum": self.momentum or None,
            "weight decay": self.weight_decay or None,
            "epochs": self.epochs,
        }
        said = [f"{name} {value:g}" for name, value in given.items() if value is not None]
        return ", ".join([self.optimizer, *said]) if said else "not said"
