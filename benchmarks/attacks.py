"""FGSM and PGD against torchattacks and Foolbox: the same adversarial examples, and ratios of time.

Run: `pip install torchattacks==3.5.1 foolbox==3.3.4` in an environment of its own, then `python benchmarks/attacks.py`;
a peer that is not installed is left out, with the reason. The aims are equal examples (to 1e-6, where the float32
gradient of the cross-entropy has not rounded to zero) and a time no longer than the peer's. Contenders take turns, and
each one's shortest run counts, in seconds of processor time.
"""

import time
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from corollary.verify.adversarial_curve import adversarial_error_curve
from corollary.verify.attacks import fgsm, pgd

RADIUS, STEP, STEPS = 0.1, 0.02, 20
ROUNDS = 7

Attack = Callable[[], Tensor]


def shortest(tasks: dict[str, Attack]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What each task returned, and the seconds of its shortest run, the tasks taking turns."""
    best, values = dict.fromkeys(tasks, float("inf")), {}
    for _ in range(ROUNDS):
        for name, task in tasks.items():
            start = time.process_time()
            values[name] = task()
            best[name] = min(best[name], time.process_time() - start)
    return values, best


def networks() -> dict[str, tuple[nn.Module, Tensor]]:
    """A perceptron and a small convolutional network, with images in [0, 1] away from its ends."""
    torch.manual_seed(0)
    perceptron = [nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)]
    images = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()]
    return {
        "perceptron, 512 inputs": (nn.Sequential(*perceptron).eval(), torch.rand(512, 784)),
        "convolutional, 128 images": (
            nn.Sequential(*images, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, 10)).eval(),
            torch.rand(128, 1, 28, 28),
        ),
    }


def torchattacks_tasks(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, Attack]:
    """The two attacks of torchattacks."""
    peer: Any = import_module("torchattacks")
    single = peer.FGSM(net, eps=RADIUS)
    many = peer.PGD(net, eps=RADIUS, alpha=STEP, steps=STEPS, random_start=False)
    return {"FGSM": lambda: single(x, y), "PGD": lambda: many(x, y)}


def foolbox_tasks(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, Attack]:
    """The two attacks of Foolbox."""
    peer: Any = import_module("foolbox")
    model = peer.PyTorchModel(net, bounds=(0, 1), device="cpu")
    single = peer.attacks.LinfFastGradientAttack(random_start=False)
    many = peer.attacks.LinfProjectedGradientDescentAttack(abs_stepsize=STEP, steps=STEPS, random_start=False)
    return {
        "FGSM": lambda: single(model, x, y, epsilons=RADIUS)[1],
        "PGD": lambda: many(model, x, y, epsilons=RADIUS)[1],
    }


def compare(peer: str, tasks: Callable[[nn.Module, Tensor, Tensor], dict[str, Attack]]) -> None:
    """Print examples and times beside those of one peer."""
    for name, (net, x) in networks().items():
        y = net(x).argmax(1)
        ours: dict[str, Attack] = {
            "FGSM": lambda net=net, x=x, y=y: fgsm(net, x, y, RADIUS, clip=(0, 1)),
            "PGD": lambda net=net, x=x, y=y: pgd(net, x, y, RADIUS, steps=STEPS, step=STEP, clip=(0, 1), keep="last"),
        }
        for attack, theirs in tasks(net, x, y).items():
            values, seconds = shortest({"ours": ours[attack], "peer": theirs})
            away = (values["ours"] - values["peer"]).abs()
            print(
                f"{name}, {attack}: {seconds['peer'] / seconds['ours']:.2f} times as fast as {peer} {version(peer)}; "
                f"largest difference {float(away.max()):.1e}, above 1e-6 in {int((away > 1e-6).sum())} of "
                f"{away.numel()} entries"
            )


def curve_against_loop() -> None:
    """The curve of 25 sizes in one pass against an attack for each size, as one would write it with either peer."""
    net, x = networks()["perceptron, 512 inputs"]
    y = net(x).argmax(1)
    eps = torch.logspace(-4, -0.5, 25)

    def loop() -> Tensor:
        with torch.no_grad():
            return torch.stack([net(fgsm(net, x, y, float(size), clip=(0, 1))).argmax(1) != y for size in eps])

    values, seconds = shortest({"ours": lambda: adversarial_error_curve(net, x, y, eps).flipped, "loop": loop})
    print(
        f"FGSM curve of 25 sizes: {seconds['loop'] / seconds['ours']:.2f} times as fast as an attack for each size; "
        f"{int((values['ours'] != values['loop']).sum())} answers differ"
    )


def main() -> None:
    """Compare with each peer that is installed."""
    torch.set_num_threads(1)
    for peer, tasks in (("torchattacks", torchattacks_tasks), ("foolbox", foolbox_tasks)):
        try:
            import_module(peer)
        except ImportError as error:
            print(f"{peer} is left out: {error}")
            continue
        compare(peer, tasks)
    curve_against_loop()


if __name__ == "__main__":
    main()
