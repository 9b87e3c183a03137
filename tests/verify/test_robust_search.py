"""The search: its spaces, its proposals, its training and its reward."""

import pytest
import torch
from torch import nn

from corollary.base.errors import BadInput
from corollary.data import Dataset, Split, digits
from corollary.verify.attacks import step_least_likely
from corollary.verify.classifier import predictions
from corollary.verify.robust_search import (
    AdversariallyTrained,
    SearchResult,
    Space,
    Trial,
    _Proposals,
    cell_space,
    cnn_space,
    mlp_space,
    robust_search,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("space", "size"), [(mlp_space(), 96), (cnn_space(), 432), (cell_space(1), 6 * 144), (cell_space(2), 6 * 144 * 324)]
)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 7, 5)])
def test_every_architecture_is_a_classifier(space, size, shape):
    assert space.size == size
    draws = generator()
    for _ in range(12):
        net = space.build(space.draw(draws), shape, 7)
        x = torch.randn(4, *shape, requires_grad=True)
        out = net(x)
        assert out.shape == (4, 7)
        (gradient,) = torch.autograd.grad(out.sum(), x, allow_unused=True)
        assert gradient is not None


def test_every_choice_matters_to_the_network():
    for space in (mlp_space(), cnn_space()):
        base = {name: values[0] for name, values in space.choices.items()}
        for name, values in space.choices.items():
            built = [repr(space.build({**base, name: value}, (1, 8, 8), 3)) for value in values]
            assert len(set(built)) == len(values), name


def test_a_mutation_changes_one_choice():
    space, draws = cell_space(), generator()
    changed = set()
    for _ in range(300):
        parent = space.draw(draws)
        child = space.mutate(parent, draws)
        different = [name for name in parent if parent[name] != child[name]]
        assert len(different) == 1
        assert child[different[0]] in space.choices[different[0]]
        changed.update(different)
    assert changed == set(space.choices)


def climb(strategy: str, seed: int) -> float:
    """The best of 60 proposals where the reward is the sum of ten choices."""
    space = Space({str(i): tuple(range(8)) for i in range(10)}, lambda *_: nn.Identity())
    proposals = _Proposals(space, strategy, 10, 4, generator(seed))
    best = 0.0
    for _ in range(60):
        candidate = proposals.next()
        reward = float(sum(int(value) for value in candidate.values()))
        proposals.tell(Trial(candidate, 1, 0.0, reward))
        best = max(best, reward)
    return best


def test_evolution_climbs_where_chance_does_not():
    gain = [climb("evolution", seed) - climb("random", seed) for seed in range(10)]
    assert sum(gain) / len(gain) > 3


def test_no_architecture_is_tried_twice_and_a_small_space_is_exhausted():
    space = Space({"width": (4, 8), "layers": (1, 2)}, _tiny)
    result = robust_search(_data(), space, 0.05, trials=50, epochs=1, population=2, tournament=1)
    assert len(result.trials) == 4
    assert len({tuple(trial.architecture.values()) for trial in result.trials}) == 4


def test_the_result_is_the_best_trial_and_its_network_is_worth_it():
    data = _data()
    result = robust_search(data, mlp_space(), 0.1, trials=4, epochs=4, population=2, tournament=2, seed=3)
    assert result.best == max(result.trials, key=lambda trial: trial.adversarial_accuracy)
    assert result.best.clean_accuracy > 0.6
    assert result.best.parameters == sum(p.numel() for p in result.network.parameters())
    assert not isinstance(result.network, AdversariallyTrained)
    again = robust_search(data, mlp_space(), 0.1, trials=4, epochs=4, population=2, tournament=2, seed=3)
    assert again.trials == result.trials
    other = robust_search(data, mlp_space(), 0.1, trials=4, epochs=1, strategy="random", seed=4)
    assert other.trials != result.trials


def test_correlations():
    trials = tuple(Trial({}, 10**i, c, a) for i, (c, a) in enumerate([(0.1, 0.3), (0.2, 0.2), (0.3, 0.1)]))
    result = SearchResult(trials, trials[0], nn.Identity())
    assert result.correlation("clean_accuracy") == pytest.approx(-1)
    assert result.correlation("parameters") == pytest.approx(-1)


def test_half_of_a_training_batch_is_attacked_and_none_in_evaluation():
    torch.manual_seed(0)
    seen: list[torch.Tensor] = []
    net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    wrapped = AdversariallyTrained(net, 0.1, None)
    x = torch.randn(9, 5)
    wrapped.train()
    statistics = net[1].running_mean.clone()
    expected = step_least_likely(net, x[:4], 0.1)
    assert torch.equal(net[1].running_mean, statistics)  # making examples leaves no trace
    net.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    wrapped(x).sum().backward()
    assert torch.equal(seen[-1][:4], expected)
    assert torch.equal(seen[-1][4:], x[4:])
    assert net.training
    assert net[0].weight.grad is not None
    wrapped.eval()
    wrapped(x)
    assert torch.equal(seen[-1], x)


def test_adversarial_training_pays():
    data = _data()
    assert data.train.y is not None
    result = robust_search(data, _one_width(64), 0.15, trials=1, epochs=12, population=1, tournament=1)
    from corollary.engine import fit

    plain = fit(mlp_space().build(result.best.architecture, (1, 8, 8), 10), tuple(data.train), epochs=12, batch_size=64)
    assert data.test is not None
    x, y = data.test
    assert y is not None
    robust, usual = (
        float((predictions(net, step_least_likely(net, x, 0.15, clip=(0, 1))) == y).double().mean())
        for net in (result.network, plain.module)
    )
    assert robust > usual + 0.05


def test_misuse_is_explained():
    unlabelled = Dataset("u", Split(torch.rand(20, 3)), None, "unlabelled")
    with pytest.raises(BadInput, match="the task of 'u' is 'unlabelled'"):
        robust_search(unlabelled, mlp_space(), 0.1)
    with pytest.raises(BadInput, match="a tournament of 3 in a population of 2"):
        robust_search(_data(), mlp_space(), 0.1, population=2)
    with pytest.raises(BadInput, match="use mlp_space"):
        cnn_space().build({name: values[0] for name, values in cnn_space().choices.items()}, (64,), 10)


def _data() -> Dataset:
    data = digits(image=True)
    return data.subset(700, generator())


def _one_width(width: int) -> Space:
    choices = {"hidden layers": (1, 2), "width": (width,), "activation": ("relu",), "normalisation": ("none",)}
    return Space(choices, mlp_space().build)


def _tiny(architecture, shape, classes) -> nn.Module:
    width = int(architecture["width"])
    hidden = [nn.Linear(width, width) for _ in range(int(architecture["layers"]))]
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), *hidden, nn.ReLU(), nn.Linear(width, classes))
