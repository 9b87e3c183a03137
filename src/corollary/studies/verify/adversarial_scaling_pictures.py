"""The figures of the study `adversarial-scaling`, from its stored tables."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from corollary.evidence import PALETTE, Data, Figure

MARKS = {2: "o", 3: "s", 4: "^"}


def figures(data: Data) -> tuple[Figure, ...]:
    """Curves with their laws, gap distributions, linear response, low entropy, the search."""
    return (
        Figure(
            "adversarial-error",
            "Adversarial error is a power law of the perturbation",
            "Share of right answers that one step of the fast gradient sign method changes, with the fitted law where "
            "the error lies between 0.005 and 0.15. Grey: exponent 1.",
            _curves(data),
            _draw_curves,
        ),
        Figure(
            "logit-gaps",
            "Logit gaps near zero",
            "Share of inputs whose gap to the j-th largest logit is below t, for each model; t in units of the median "
            "gap 2.",
            dict(data["gap_quantiles"]),
            _draw_gaps,
        ),
        Figure(
            "linear-response",
            "Linear response predicts the error",
            "Left: the linear model, whose error under the worst step towards any class is exactly the distribution "
            "of eps*. Right: the trained perceptron under projected gradient on the margin; the band is a factor of "
            "1.26 (0.1 in the logarithm) either way.",
            {
                **{f"linear_{name}": data["linear"][name] for name in ("eps", "predicted", "attacked")},
                **{f"perceptron_{name}": data["response"][name] for name in ("eps", "predicted", "measured")},
            },
            _draw_response,
            size=(8.4, 3.8),
            panels=(1, 2),
        ),
        Figure(
            "low-entropy",
            "Training for low entropy",
            "Accuracy of three networks each, as they are and at eps 0.05, after plain training and with the entropy "
            "added to the loss. FGSM by the rounded float32 gradient of the cross-entropy looks weaker than it is.",
            dict(data["entropy"]),
            _draw_entropy,
        ),
        Figure(
            "robust-search",
            "A small architecture search",
            "Every architecture that the search on digits trained on adversarial examples. Accuracy under attack "
            f"correlates with clean accuracy (left, {_correlation(data, 'clean_accuracy'):.2f}) and with the logarithm "
            f"of the size (right, {_correlation(data, 'parameters'):.2f}).",
            dict(data["search"]),
            _draw_search,
            size=(8.4, 3.8),
            panels=(1, 2),
        ),
    )


def _correlation(data: Data, column: str) -> float:
    values = np.asarray(data["search"][column], dtype=float)
    values = np.log(values) if column == "parameters" else values
    with np.errstate(invalid="ignore"):
        return float(np.corrcoef(values, np.asarray(data["search"]["adversarial_accuracy"]))[0, 1])


def _curves(data: Data) -> dict[str, Any]:
    """The curves of the first attack, and the law's value beside each point inside its window (NaN elsewhere)."""
    curves, laws = data["curves"], data["laws"]
    attack = np.asarray(curves["attack"])
    shown = attack == attack[0]
    columns = {name: np.asarray(curves[name])[shown] for name in ("model", "eps", "error")}
    fitted = np.full(shown.sum(), np.nan)
    for model, name, exponent, amplitude in zip(
        laws["model"], laws["law_attack"], laws["exponent"], laws["amplitude"], strict=True
    ):
        if name == attack[0]:
            mine = (columns["model"] == model) & (columns["error"] > 0.005) & (columns["error"] < 0.15)
            fitted[mine] = amplitude * columns["eps"][mine] ** exponent
    return {**columns, "law": fitted}


def _draw_curves(axes: Any, data: Mapping[str, Any]) -> None:
    model, eps, error = (np.asarray(data[name]) for name in ("model", "eps", "error"))
    for place, name in enumerate(dict.fromkeys(model.tolist())):
        mine = (model == name) & (error > 0)
        axes.plot(eps[mine], error[mine], "o", color=PALETTE[place], ms=3.5, label=name)
        axes.plot(eps[model == name], np.asarray(data["law"])[model == name], color=PALETTE[place])
    guide = np.array([2e-3, 2e-2])
    axes.plot(guide, 0.3 * guide, color=PALETTE[6], ls="--", lw=1, label="exponent 1")
    axes.set(xscale="log", yscale="log", xlabel="size of the perturbation, eps", ylabel="adversarial error")
    axes.legend()


def _draw_gaps(axes: Any, data: Mapping[str, Any]) -> None:
    model, j, share, gap = (np.asarray(data[name]) for name in ("model", "quantile_j", "share", "gap"))
    for place, name in enumerate(dict.fromkeys(model.tolist())):
        middle = np.interp(0.5, share[(model == name) & (j == 2)], gap[(model == name) & (j == 2)])
        for number, mark in MARKS.items():
            mine = (model == name) & (j == number) & (gap > 0)
            label = name if number == 2 else None
            axes.plot(gap[mine] / middle, share[mine], mark, ls="-", lw=0.8, ms=3, color=PALETTE[place], label=label)
    low = share.min()
    for number, mark in MARKS.items():  # to the right of the points of its own j, over a factor of 10
        start = 2 * max(line.get_xdata()[0] for line in axes.get_lines() if line.get_marker() == mark)
        axes.plot([start, start * 10 ** (1 / (number - 1))], [low, 10 * low], color=PALETTE[6], ls="--", lw=1)
    for number, mark in MARKS.items():
        axes.plot([], [], mark, color=PALETTE[6], ls="none", label=f"j = {number}, dashed: exponent {number - 1}")
    axes.set(
        xscale="log", yscale="log", ylim=(0.7 * low, 1.5), xlabel="t / median gap 2", ylabel="share of inputs below t"
    )
    axes.legend()


def _draw_response(axes: Any, data: Mapping[str, Any]) -> None:
    left, right = axes
    eps, predicted, attacked = (np.asarray(data[f"linear_{name}"]) for name in ("eps", "predicted", "attacked"))
    shown = predicted > 0
    left.plot(eps[shown], predicted[shown], color=PALETTE[0], label="predicted, distribution of eps*")
    left.plot(eps[shown], attacked[shown], "o", color=PALETTE[1], ms=4, label="attacked")
    left.set(xscale="log", yscale="log", xlabel="eps", ylabel="adversarial error", title="linear model")
    left.legend()
    found = np.asarray(data["perceptron_measured"])
    expected = np.asarray(data["perceptron_predicted"])
    scale = np.array([0.8 * expected.min(), 1.25 * expected.max()])
    right.fill_between(scale, scale / 10**0.1, scale * 10**0.1, color=PALETTE[6], alpha=0.2, label="0.1 in log10")
    right.plot(scale, scale, color=PALETTE[6], lw=1, ls="--", label="equal")
    right.plot(expected, found, "o", color=PALETTE[0], label="trained perceptron")
    right.set(xscale="log", yscale="log", xlabel="predicted error", ylabel="measured error", title="perceptron")
    right.legend()


def _draw_entropy(axes: Any, data: Mapping[str, Any]) -> None:
    regime = np.asarray(data["regime"])
    attacks = {
        "clean": "clean",
        "plain_fgsm": "FGSM, rounded\ngradient",
        "fgsm": "FGSM",
        "margin_pgd": "PGD on\nthe margin",
    }
    for place, name in enumerate(dict.fromkeys(regime.tolist())):
        for spot, column in enumerate(attacks):
            values = np.asarray(data[column])[regime == name]
            where = spot + 0.22 * (place - 1) + np.linspace(-0.05, 0.05, len(values))
            axes.plot(where, values, "o", color=PALETTE[place], ms=4, label=name if spot == 0 else None)
    axes.set_xticks(range(len(attacks)), attacks.values())
    axes.set(ylabel="accuracy", ylim=(0, 1.03))
    axes.legend()


def _draw_search(axes: Any, data: Mapping[str, Any]) -> None:
    left, right = axes
    robust = np.asarray(data["adversarial_accuracy"])
    order = np.arange(len(robust))
    for panel, column, label in ((left, "clean_accuracy", "clean accuracy"), (right, "parameters", "parameters")):
        drawn = panel.scatter(np.asarray(data[column]), robust, c=order, s=22)
        panel.set(xlabel=label, ylabel="accuracy under attack")
    right.set_xscale("log")
    right.figure.colorbar(drawn, ax=right, label="order of trial")
