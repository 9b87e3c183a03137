"""Prove a property of a network, or find a counterexample, within a time limit."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from corollary.base.errors import BadInput, CannotCapture, NoRule
from corollary.base.network import Inputs
from corollary.base.seeds import Seeds
from corollary.graph import Graph, GraphModule, Network, capture, load_network
from corollary.verify.counterexample import Counterexample, OnnxProgram, replay
from corollary.verify.falsify import falsify
from corollary.verify.input_splitting import split_inputs
from corollary.verify.jumps import Cut, Part, parts_at_jump
from corollary.verify.limit import OutOfTime, until
from corollary.verify.linear_bounds import lower_bounds
from corollary.verify.posed import Posed, rounding_decides
from corollary.verify.prepared import Prepared
from corollary.verify.queries import OpenBoxes, Queries
from corollary.verify.refined_search import refined_search, rooted
from corollary.verify.relevance import relevant_entries
from corollary.verify.search import Margin, Outcome
from corollary.verify.sets import Box, Region
from corollary.verify.slopes import Ascent
from corollary.verify.specification import Case, Halfspaces, Specification
from corollary.verify.sweep import Sweep, sweep
from corollary.verify.verdict import CertifyConfig, Verdict

CASES_AT_ONCE = 64
"""Regions of one specification whose first bounds are found together."""
JUMPS = 6
"""A region is taken apart at so many jumps of floors, one within the other; what is left is for neuron splitting."""


def certify(
    model: nn.Module | Graph | Network | str | Path,
    region: Specification | Region,
    unsafe: Sequence[Halfspaces] | None = None,
    *,
    timeout: float = 60.0,
    example: Inputs | None = None,
    config: CertifyConfig | None = None,
    tell: Callable[[str], None] | None = None,
) -> Verdict:
    """Whether some input of the region has an unsafe output.

    Args:
        model: a module, a captured graph, what `load_network` gave, or the path of a network (.onnx, .pt2): a
            counterexample is replayed on it.
        region: a whole specification, or a box or ball of one or more samples, with
        unsafe: the outputs that must not occur, a union of conjunctions of halfspaces.
        timeout: seconds of wall-clock time, all told.
        example: input that the module is captured with; by default the middle of the region.
        tell: called with each line of the log as it is written.

    Raises: BadInput, for a property that does not fit the network, or NaN among the network's numbers; CannotCapture.
    Source: Shi et al. 2025, arXiv 2405.21063.
    """
    start = time.monotonic()
    specification = _specification(region, unsafe)
    return _Run(model, specification, start, timeout, example, config or CertifyConfig(), tell).run()


def _specification(region: Specification | Region, unsafe: Sequence[Halfspaces] | None) -> Specification:
    if isinstance(region, Specification):
        if unsafe is not None:
            raise BadInput("a specification holds its unsafe outputs: give them with a region only")
        return region
    if unsafe is None:
        raise BadInput("a region needs the outputs that must not occur: give unsafe=(Halfspaces(...), ...)")
    return Specification(tuple(Case(region[slice(i, i + 1)], tuple(unsafe)) for i in range(len(region))))


class _Run:
    def __init__(
        self,
        model: nn.Module | Graph | Network | str | Path,
        specification: Specification,
        start: float,
        timeout: float,
        example: Inputs | None,
        config: CertifyConfig,
        tell: Callable[[str], None] | None,
    ):
        self.start, self.deadline, self.config = start, start + timeout, config
        self.timeout, self.tell = timeout, tell
        self.posed: dict[torch.dtype, Posed] = {}
        self.verdict = Verdict("unknown")
        self.graph, self.original = _graph_and_original(model, specification, example)
        for name, tensor in self.graph.tensors.items():
            if count := int(tensor.isnan().sum()):
                raise BadInput(f"the network's {name} has {count} NaN of {tensor.numel()} numbers: nothing holds of it")
        self.specification = self._fitting(specification)
        self._mark("read")

    def _fitting(self, specification: Specification) -> Specification:
        """The specification on inputs of the network's shape."""
        if len(self.graph.inputs) != 1 or len(self.graph.outputs) != 1:
            raise BadInput(
                f"a property is about one input and one output; the network has {len(self.graph.inputs)} and "
                f"{len(self.graph.outputs)}"
            )
        shape = tuple(size for size in self.graph.inputs[0].shape[1:] if isinstance(size, int))
        fitting = specification.reshape(shape)
        outputs = 1
        for size in self.graph.outputs[0].shape[1:]:
            outputs *= size if isinstance(size, int) else 1
        if fitting.outputs != outputs:
            raise BadInput(f"the property is about {fitting.outputs} outputs; the network has {outputs}")
        return fitting

    def _mark(self, phase: str) -> None:
        known = sum(self.verdict.seconds.values())
        self.verdict.seconds[phase] = self.verdict.seconds.get(phase, 0.0) + time.monotonic() - self.start - known

    def _say(self, line: str) -> None:
        self.verdict.log.append(f"{time.monotonic() - self.start:7.2f} s  {line}")
        if self.tell is not None:
            self.tell(self.verdict.log[-1])

    def run(self) -> Verdict:
        verdict = self.verdict
        try:
            with torch.no_grad(), until(self.deadline):
                self._decide()
        except OutOfTime:
            verdict.status = "timeout"
            self._say("out of time")
        except NoRule as refusal:
            verdict.status, verdict.reason = "unknown", str(refusal)
            self._say("no bounds: " + verdict.reason.splitlines()[0])
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            verdict.status, verdict.reason = "unknown", "the bounds of a single region do not fit into memory"
            self._say("out of memory")
        self._mark("end")
        return verdict

    def _decide(self) -> None:
        if self._attacked(min(self.config.attack[0], self.timeout / 20)):
            return
        posed = self._posed(self.config.dtype or torch.float32)
        self._mark("prepare")
        if self._splits_inputs(posed.queries):
            self._boxes(posed)
            return
        for part in torch.arange(len(posed.queries), device=posed.network.device).split(CASES_AT_ONCE):
            if not self._cases(posed, part):
                return
        self.verdict.status = "unsat"

    def _posed(self, dtype: torch.dtype) -> Posed:
        if dtype not in self.posed:
            self.posed[dtype] = Posed.of(self.graph, self.specification, dtype)
        return self.posed[dtype]

    def _splits_inputs(self, queries: Queries) -> bool:
        if self.config.split == "inputs" and not isinstance(queries.region, Box):
            raise BadInput(f"inputs are split in boxes only, not in balls of norm {queries.region.norm:g}")
        if self.config.split != "auto":
            return self.config.split == "inputs"
        return isinstance(queries.region, Box) and int(_varying(queries.region).sum(1).max()) <= self.config.few_inputs

    def _attacked(self, seconds: float) -> bool:
        """Whether a counterexample was found by an attack of so many seconds."""
        if seconds <= 0:
            return False
        with torch.enable_grad():
            found = falsify(
                GraphModule(self.graph),
                self.specification,
                generator=Seeds(self.config.seed)("attack"),
                deadline=min(self.deadline, time.monotonic() + seconds),
                confirm=self._replayed,
            )
        self._mark("attack")
        if found is None:
            self._say("no counterexample by random points and gradients")
            return False
        self.verdict.status, self.verdict.counterexample = "sat", found
        self._say("a counterexample by random points and gradients")
        return True

    def _replayed(self, x: Tensor) -> Counterexample | None:
        if isinstance(self.original, Path):
            self.original = OnnxProgram(self.original)  # made once, and only where there is something to replay
        return replay(self.original, self.specification, x)

    def _conclude(self, outcome: Outcome) -> bool:
        """Enter how a search ended; whether it proved its part."""
        verdict = self.verdict
        self._say(f"{outcome.status} after {verdict.domains} domains, smallest open margin {outcome.worst:.4g}")
        if outcome.status == "proved":
            verdict.status = "unsat"
            return True
        verdict.worst = outcome.worst
        if outcome.status == "found":
            verdict.status = "sat"
        elif outcome.status == "timeout":
            verdict.status = "timeout"
        else:
            verdict.status, verdict.reason = "unknown", "nothing was left to split"
        return False

    def _backing_off(self, search: Callable[[int | None], Outcome]) -> Outcome:
        """A search, again with fewer domains at once where memory does not suffice."""
        at_once: int | None = None
        while True:
            try:
                return search(at_once)
            except (MemoryError, RuntimeError) as error:
                if not _out_of_memory(error) or at_once == 1:
                    raise
                at_once = 256 if at_once is None else max(1, at_once // 4)
                self._say(f"out of memory: again with {at_once} domains at once")

    def _boxes(self, posed: Posed) -> None:
        """Prove all cases by cutting boxes; what rounding leaves open in float64."""
        outcome = self._inputs(posed, None, min(self.deadline, time.monotonic() + self.timeout / 10))
        if outcome.status == "timeout":
            if self._attacked(min(self.config.attack[1], self.timeout / 10)):
                return
            outcome = self._inputs(posed, outcome.rest, self.deadline)
        if outcome.status == "stuck" and outcome.rest is not None and self.config.dtype is None:
            self._say(f"{len(outcome.rest)} boxes are too small for float32: again in float64")
            finer = self._posed(torch.float64)
            outcome = self._inputs(finer, outcome.rest.within(finer.queries), self.deadline)
        self._conclude(outcome)
        self._mark("input splitting")

    def _inputs(self, posed: Posed, begin: OpenBoxes | None, deadline: float) -> Outcome:
        def search(at_once: int | None) -> Outcome:
            return split_inputs(
                posed.network, posed.queries, posed.margin, deadline=deadline, begin=begin, at_once=at_once,
                confirm=self._confirmed,
            )  # fmt: skip

        outcome = self._backing_off(search)
        self.verdict.domains += outcome.domains
        return outcome

    def _confirmed(self, point: Tensor) -> bool:
        """Whether a point that bounds led to is a counterexample of the network as given."""
        found = self._replayed(point)
        if found is not None:
            self.verdict.counterexample = found
        return found is not None

    def _cases(self, posed: Posed, part: Tensor, attack: bool = True) -> bool:
        """Prove some of the cases; whether all of them are."""
        network, queries, margin = posed.network, posed.queries[part], posed.margin
        output = network.graph.outputs[0]
        found = sweep(network, [queries.region])
        bound = lower_bounds(network, output, queries.on(output), [queries.region], found.known)
        allowed = margin.allowance(bound, queries.offsets)
        margins = queries.margins(bound.lower - queries.offsets - allowed)
        queries = replace(queries, open=queries.open & ~(margins > 0))
        left = queries.open.any(1).nonzero()[:, 0]
        self.verdict.domains += len(queries)
        self._say(f"linear bounds: {len(queries) - len(left)} of {len(queries)} regions proved")
        self._mark("linear bounds")
        if attack and len(left) and self._attacked(min(self.config.attack[1], self.timeout / 10)):
            return False
        for i in left:
            only = torch.tensor([int(i)], device=network.device)
            coarse = network.dtype == torch.float32 and self.config.dtype is None
            if coarse and rounding_decides(network, queries[only], allowed[only]):
                self._say("margins as small as rounding errors of float32: again in float64")
                if not self._cases(self._posed(torch.float64), part[only], attack=False):
                    return False
                continue
            one = Sweep(found.known.at(only), {node: p[only] for node, p in found.positions.items()})
            outcome = self._backing_off(
                lambda at_once, one=one, only=only: self._neurons(network, queries[only], one, margin, at_once)
            )
            self._mark("neuron splitting")
            self.verdict.domains += outcome.domains
            if not self._conclude(outcome):
                return False
        return True

    def _neurons(
        self,
        network: Prepared,
        query: Queries,
        found: Sweep,
        margin: Margin,
        at_once: int | None,
        cuts: tuple[Cut, ...] = (),
    ) -> Outcome:
        output, query = network.graph.outputs[0], query.only_open()
        relevant = relevant_entries(network, output, query.on(output), found.known)
        parts = parts_at_jump(network, found.known, relevant) if len(cuts) < JUMPS else None
        if parts is not None:
            return self._parts(network, query, parts, margin, at_once, cuts)
        ascent = Ascent(self.config.iterations, deadline=self.deadline, thrifty=True)
        query, root, margins = rooted(network, query, found, margin, ascent, cuts)
        worst = float(margins.min())
        self._say(f"optimised bounds: {int(query.open.sum())} disjuncts left, smallest margin {worst:.4g}")
        self._mark("optimised bounds")
        if not bool(query.open.any()):
            return Outcome("proved", None, 0, worst)
        if self.config.split == "none" or not network.bounded:
            return Outcome("stuck", None, 0, worst)
        branching = self.config.branching if at_once is None else replace(self.config.branching, batch=at_once)
        return refined_search(
            network, query, root, margin, refinable=found.positions, ascent=ascent, deadline=self.deadline,
            branching=branching, generator=Seeds(self.config.seed)("branching"), confirm=self._confirmed, say=self._say,
        )  # fmt: skip

    def _parts(
        self,
        network: Prepared,
        query: Queries,
        parts: Sequence[Part],
        margin: Margin,
        at_once: int | None,
        cuts: tuple[Cut, ...],
    ) -> Outcome:
        """Prove a region part by part."""
        output, domains = network.graph.outputs[0], 0
        for part in parts:
            found = sweep(network, [query.region], held=part.bounds)
            bound = lower_bounds(network, output, query.on(output), [query.region], found.known)
            margins = query.margins(margin.below(bound, query.offsets))
            open_ = query.open & ~(margins > 0)
            domains += 1
            self._say(f"at a jump, depth {len(cuts) + 1}: {int(open_.sum())} disjuncts left")
            if not bool(open_.any()):
                continue
            outcome = self._neurons(network, replace(query, open=open_), found, margin, at_once, (*cuts, part.cut))
            domains += outcome.domains
            if outcome.status != "proved":
                return replace(outcome, domains=domains)
        return Outcome("proved", None, domains, 0.0)


def _graph_and_original(
    model: nn.Module | Graph | Network | str | Path, specification: Specification, example: Inputs | None
) -> tuple[Graph, nn.Module | Path | OnnxProgram]:
    """The network as a graph, and as it was given: what counterexamples are replayed on."""
    if isinstance(model, Graph):
        return model, GraphModule(model)
    if isinstance(model, str | Path):
        model = load_network(str(model))
        if not isinstance(model.graph, Graph):
            raise model.graph
    if isinstance(model, Network) and isinstance(model.graph, Graph):
        is_file = model.origin.endswith((".onnx", ".onnx.gz"))
        return model.graph, Path(model.origin) if is_file else model.module
    module = model.module if isinstance(model, Network) else model
    try:
        return capture(module, _example(module, specification) if example is None else example), module
    except CannotCapture as refusal:
        if not isinstance(model, Network):
            raise
        raise CannotCapture(f"{model.graph}\nOn the middle of the property's region: {refusal}") from refusal


def _varying(region: Region) -> Tensor:
    """Which inputs of each sample vary, (batch, inputs)."""
    box = region if isinstance(region, Box) else region.box()
    return (box.lower < box.upper).flatten(1)


def _example(model: nn.Module, specification: Specification) -> Tensor:
    """The middle of the first region, in the network's dtype."""
    region = specification.cases[0].region
    middle = region.center
    first = next(model.parameters(), middle)
    return middle.to(first.dtype if first.is_floating_point() else middle.dtype).to(first.device)


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)
