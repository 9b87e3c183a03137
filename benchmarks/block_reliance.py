"""Block reliance against scikit-learn's permutation importance, and training on slab data against a DataLoader loop.

Ranking: perceptrons on scikit-learn's breast cancer data (30 columns, one block each) and on the digits (64 pixels);
Spearman correlation of the accuracy that is lost, and the first five.
Speed: milliseconds an update of `engine.population` (index tensors into one tensor) against the loop that the paper's
repository uses (`TensorDataset`, `DataLoader`, `torch.optim.SGD`): networks 50-100-100-2, batches of 256. CPU time of
one thread. Run: `python benchmarks/block_reliance.py`.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import sklearn
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from sklearn.inspection import permutation_importance
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from corollary.data import Dataset, digits, load
from corollary.dynamics.reliance import reliance_profile
from corollary.dynamics.slab_data import SlabData, slab_data
from corollary.engine import fit, population, seeded


class Fitted:
    """A network as scikit-learn sees a classifier."""

    def __init__(self, net: nn.Module):
        self.net = net

    def fit(self, x: np.ndarray, y: np.ndarray) -> "Fitted":
        """Nothing: the network is trained already."""
        return self

    def score(self, x: np.ndarray, y: np.ndarray) -> float:
        """Accuracy."""
        with torch.no_grad():
            return float((self.net(torch.from_numpy(x)).argmax(1).numpy() == y).mean())


def perceptron(inputs: int, classes: int) -> nn.Module:
    """The network whose columns are ranked."""
    return nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, classes))


def compare_ranking(data: Dataset, repeats: int) -> str:
    """Rank correlation of lost accuracy by both, the overlap of the first five, and CPU seconds."""
    x, y = data.train.x, data.train.y
    assert y is not None  # both sets have labels
    classes = int(y.max()) + 1
    net = fit(seeded(lambda: perceptron(x.shape[1], classes), 0), (x, y), steps=300, batch_size=64).module
    start = time.process_time()
    peer: Any = permutation_importance(Fitted(net), x.numpy(), y.numpy(), n_repeats=repeats, random_state=0)  # type: ignore[arg-type]  # anything with fit and score will do
    seconds = [time.process_time() - start]
    start = time.process_time()
    blocks = {str(i): torch.tensor([i]) for i in range(x.shape[1])}
    profile = reliance_profile(net, x, y, blocks, repeats=repeats)
    seconds.append(time.process_time() - start)
    table = profile.table()
    ours, theirs = np.subtract(table["accuracy"], table["without_accuracy"]), peer["importances_mean"]
    first = {
        name: set(np.argsort(-lost, kind="stable")[:5].tolist()) for name, lost in (("us", ours), ("them", theirs))
    }
    return (
        f"{data.name}: {len(blocks)} columns, {len(x)} samples: rank correlation {spearmanr(ours, theirs)[0]:.3f}, "
        f"largest difference of lost accuracy {np.abs(ours - theirs).max():.4f}, {len(first['us'] & first['them'])} of "
        f"the first 5 in common; {seconds[0]:.2f} s theirs (lost accuracy), {seconds[1]:.2f} s ours (accuracy, AUC and "
        "logits, without each and with each alone)"
    )


def train_loop(data: SlabData, members: int, steps: int) -> None:
    """The loop of the paper's repository, one network after the other."""
    for _ in range(members):
        net = nn.Sequential(nn.Linear(50, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 2))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=5e-5)
        loader = DataLoader(TensorDataset(data.x, data.y), batch_size=256, shuffle=True)
        done = 0
        while done < steps:
            for x, y in loader:
                optimizer.zero_grad()
                F.cross_entropy(net(x), y).backward()
                optimizer.step()
                done += 1
                if done == steps:
                    break


def train_population(data: SlabData, members: int, steps: int) -> None:
    """The same networks as one batched program."""
    population(
        lambda: nn.Sequential(nn.Linear(50, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 2)),
        (data.x, data.y),
        size=members,
        learning_rate=0.1,
        weight_decay=5e-5,
        batch_size=256,
        steps=steps,
        record_every=steps,
    )


def milliseconds(train: Callable[[SlabData, int, int], None], data: SlabData, members: int, steps: int) -> float:
    """CPU milliseconds for one update of one network."""
    start = time.process_time()
    train(data, members, steps)
    return (time.process_time() - start) / (members * steps) * 1e3


def standardised(name: str) -> Dataset:
    """A data set with its columns brought to one scale."""
    data = digits() if name == "digits" else load(name).split(0.2, torch.Generator().manual_seed(0))
    return data.standardised()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--permutations", type=int, default=20)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, scikit-learn {sklearn.__version__}")
    for name in ("breast_cancer", "digits"):
        print(compare_ranking(standardised(name), arguments.permutations))
    data = slab_data(50_000)
    for members in (1, 3, 10):
        loop, ours = (
            min(milliseconds(train, data, members, arguments.steps) for _ in range(arguments.repeats))
            for train in (train_loop, train_population)
        )
        print(
            f"{members} network(s): {loop:.2f} ms an update with a DataLoader, {ours:.2f} ms here, "
            f"{loop / ours:.1f} times as fast"
        )
