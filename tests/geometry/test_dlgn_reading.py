"""A DLGN in words: the inequalities are the gates, and the strongest path is that of brute force."""

import re

import torch
from torch import nn

from corollary.geometry.dlgn import DLGN
from corollary.geometry.dlgn_reading import gated_part, inequality, path_inequalities, strongest_path
from corollary.geometry.path_kernel import all_paths


def model(d_out: int = 1, mode: str = "pwc") -> DLGN:
    torch.manual_seed(0)
    return DLGN(4, 3, 3, d_out, mode=mode).double()  # type: ignore[arg-type]


X = torch.randn(200, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def test_inequality_writes_the_largest_terms_first_and_counts_the_rest():
    normal = torch.tensor([0.1, -0.9, 0.0, 0.3, 0.2, 0.05])
    names = list("abcdef")
    assert inequality(normal, -0.25, names) == "−0.90 b + 0.30 d + 0.20 e + 0.10 a + (2 terms of norm 0.05) ≥ −0.25"
    assert inequality(torch.tensor([1.0, 0.0]), 0.5, names) == "1.00 a ≥ 0.50"
    assert inequality(torch.zeros(2), 0.0, names) == "0 ≥ 0.00"


def test_written_inequalities_hold_where_the_gates_are_open():
    net, path = model(), (2, 0, 1)
    gates = torch.stack([gate[:, unit] for gate, unit in zip(net.gates(X, hard=True), path, strict=True)])
    for text, is_open in zip(path_inequalities(net, path), gates.bool(), strict=True):
        left, right = text.replace("−", "-").split("≥")
        value = torch.zeros(len(X), dtype=torch.float64)
        for sign, number, feature in re.findall(r"(^-|[+-] |^)([\d.]+) x(\d)", left.strip()):
            value += (-1 if "-" in sign else 1) * float(number) * X[:, int(feature)]
        clear = (value - float(right)).abs() > 0.05  # four coefficients and a bound, written with an error of 0.005
        assert clear.sum() > 150
        assert torch.equal((value > float(right))[clear], is_open[clear])


def test_strongest_path_is_the_one_most_often_dominant():
    net = model(d_out=2)
    found = strongest_path(net, X)
    assert found is not None
    paths = all_paths(net)
    gates = net.gates(X, hard=True)
    is_open = torch.stack([gates[layer][:, paths.units[:, layer]] for layer in range(3)]).prod(0).bool()
    output = int(net(X, hard=True).argmax(1).bincount().argmax())
    value = torch.where(is_open, paths.values[:, output, 0], 0.0)[net(X, hard=True).argmax(1) == output]
    best = value.abs().argmax(1)[value.abs().amax(1) > 0]
    assert found.output == output
    assert found.samples == len(value)
    assert len(found.rows) == int(best.bincount().max())
    index = int(best.bincount().argmax())
    assert found.units == tuple(paths.units[index].tolist())
    torch.testing.assert_close(found.values, paths.values[index, output].detach().expand(len(found.rows)))


def test_without_an_open_path_there_is_none():
    net = model()
    with torch.no_grad():
        net.gating[0].bias.fill_(-100.0)  # type: ignore[union-attr]
    assert strongest_path(net, X) is None


def test_a_dlgn_is_found_where_it_stands_with_what_it_reads():
    net = model()
    whole = nn.Sequential(nn.Flatten(), nn.Linear(4, 4).double(), net)
    found = gated_part(whole, X.reshape(-1, 2, 2))
    assert found is not None
    assert found[:2] == ("2", net)
    torch.testing.assert_close(found[2], whole[1](X).detach())
    assert gated_part(net, X)[0] == ""  # type: ignore[index]
    assert gated_part(whole[1], X) is None
    assert not net._forward_pre_hooks
