"""Many properties at once: instances from a CSV file, each in a process with a time limit, and what became of them."""

import html
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeAlias, final

import torch

from corollary.base.errors import BadInput, CorollaryError
from corollary.base.files import atomic_write
from corollary.base.memory import keep_freed_memory
from corollary.base.progress import track
from corollary.evidence.store import environment
from corollary.graph import Network, load_network
from corollary.verify.certify import certify
from corollary.verify.instances import TIMEOUT, Instance, ResultsFile, Row, read_instances
from corollary.verify.verdict import CertifyConfig, Verdict
from corollary.verify.vnnlib import read_vnnlib
from corollary.verify.workers import Ended, run_in_processes

GRACE = 10.0
"""Seconds that a process may take beyond its instance's limit before it is killed."""
VERDICTS = ("unsat", "sat", "unknown", "timeout", "error")

Tell: TypeAlias = Callable[[str], None]


def certify_files(
    network: str | Path,
    property: str | Path,
    *,
    weights: str | Path | None = None,
    timeout: float = TIMEOUT,
    config: CertifyConfig | None = None,
    trust_pickle: bool = False,
    tell: Tell | None = None,
) -> Verdict:
    """Prove the property of a VNN-LIB file of a network, or find a counterexample.

    Args:
        network: all that `load_network` takes: .onnx, .pt2, package.module:factory.
        property: .vnnlib or .vnnlib.gz.
        weights, trust_pickle: as for `load_network`.
        timeout: seconds for everything, reading included.
        tell: called with each line of the log.
    Raises: BadInput, CannotCapture, MissingExtra.
    """
    load = partial(load_network, network, weights=weights, trust_pickle=trust_pickle)
    return _certified(load, property, timeout, config, tell)


def _certified(
    load: Callable[[], Network],
    property: str | Path,
    timeout: float,
    config: CertifyConfig | None,
    tell: Tell | None = None,
) -> Verdict:
    start = time.monotonic()
    if not (timeout > 0 and math.isfinite(timeout)):
        raise BadInput(f"the time limit must be a positive number of seconds, got {timeout:g}")
    specification = read_vnnlib(Path(property))
    network = load()
    spent = time.monotonic() - start
    verdict = certify(network, specification, timeout=max(timeout - spent, 0.0), config=config, tell=tell)
    verdict.seconds = {"load": spent, **verdict.seconds}
    return verdict


@final
@dataclass(frozen=True)
class BatchResult:
    """What became of every instance, in their order.

    Args: `configuration`: what the run was asked for.
    """

    rows: tuple[Row, ...]
    configuration: Mapping[str, Any]

    @property
    def contradictions(self) -> tuple[Row, ...]:
        """The rows that decide against the published verdict."""
        return tuple(row for row in self.rows if row.agreement == "contradicts")

    @property
    def errors(self) -> tuple[Row, ...]:
        """The rows that could not be run to an end."""
        return tuple(row for row in self.rows if row.verdict == "error")

    def by_suite(self) -> list[dict[str, Any]]:
        """Counts for each suite; `published` counts the instances that are decided there."""
        return [_counted(suite, [row for row in self.rows if row.suite == suite]) for suite in _suites(self.rows)]

    def markdown(self) -> str:
        """The counts as a Markdown table, with a last line for all suites where there are several."""
        suites = self.by_suite()
        suites += [_counted("all", list(self.rows))] if len(suites) > 1 else []
        if not any(row.published for row in self.rows):
            hidden = ("published", "contradictions")
            suites = [{key: value for key, value in suite.items() if key not in hidden} for suite in suites]
        lines = (
            [list(suites[0]), ["---"] * len(suites[0]), *(list(suite.values()) for suite in suites)] if suites else []
        )
        return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)

    def as_json(self) -> dict[str, Any]:
        """The summary, without the rows that are as they should be; `seconds` is the sum over the instances."""
        return {
            "configuration": dict(self.configuration),
            "seconds": round(sum(row.seconds for row in self.rows), 1),
            "environment": environment(),
            "suites": self.by_suite(),
            "contradictions": [asdict(row) for row in self.contradictions],
            "errors": [asdict(row) for row in self.errors],
        }

    def record(self, folder: str | Path, name: str, command: str = "") -> Path:
        """Write the summary to `folder/name.json`, beside the recorded results of studies."""
        content = {"slug": name, "title": "Properties of networks, certified", "command": command, **self.as_json()}
        return atomic_write(Path(folder) / f"{name}.json", json.dumps(content, indent=2) + "\n")

    def _repr_html_(self) -> str:
        lines = [line.strip("| \n").split(" | ") for line in self.markdown().splitlines()]
        rows = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in lines[2:]
        )
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in lines[0]) if lines else ""
        return f"<table><tr>{head}</tr>{rows}</table>"


def certify_batch(
    instances: str | Path | Sequence[Instance],
    *,
    timeout: float = math.inf,
    jobs: int = 1,
    results: str | Path | None = None,
    config: CertifyConfig | None = None,
    grace: float = GRACE,
) -> BatchResult:
    """Certify every instance, each in a process that is killed where it overruns its limit.

    Args:
        instances: a CSV file (see `read_instances`), or instances with paths relative to the working folder.
        timeout: seconds at most for an instance, whatever its row says.
        jobs: processes at once, with one thread of PyTorch each.
        results: a CSV file that each row is appended to as soon as it is known. Instances that stand in it already are
            not run again, whatever their verdict, so that an interrupted run goes on where it was.
        grace: seconds beyond its limit after which a process is killed.
    Returns: a row for every instance. A file that is missing or cannot be read, and a process that dies, are rows with
        the verdict "error" and the reason.
    Raises: BadInput, for a file of instances or results that cannot be used as one.
    """
    if not timeout > 0 or jobs < 1 or not grace >= 0:
        raise BadInput(f"timeout must be positive, jobs 1 or more, grace 0 or more; got {timeout:g}, {jobs}, {grace:g}")
    folder = Path() if isinstance(instances, Sequence) and not isinstance(instances, str) else Path(instances).parent
    listed = read_instances(instances) if isinstance(instances, str | Path) else list(instances)
    listed = [replace(instance, timeout=min(instance.timeout, timeout)) for instance in listed]
    kept = ResultsFile(None if results is None else Path(results))
    rows = [kept.take(instance) for instance in listed]
    todo = [index for index, row in enumerate(rows) if row is None]
    settings = config or CertifyConfig()
    with closing(_outcomes([listed[index] for index in todo], folder, jobs, settings, grace)) as found:
        for position, row in track(found, "instances certified", total=len(todo)):
            kept.append(row)
            rows[todo[position]] = row
    return BatchResult(
        tuple(row for row in rows if row is not None),
        {
            "instances": str(instances) if isinstance(instances, str | Path) else len(listed),
            "timeout": None if math.isinf(timeout) else timeout,
            "jobs": jobs,
            "split": settings.split,
            "dtype": "auto" if settings.dtype is None else str(settings.dtype).removeprefix("torch."),
            "seed": settings.seed,
        },
    )


# ------------------------------------------------------------------------------------------------------- the processes


def _outcomes(
    instances: Sequence[Instance], folder: Path, jobs: int, config: CertifyConfig, grace: float
) -> Generator[tuple[int, Row], None, None]:
    """The row of each instance with its position, as soon as it is known."""
    for index, instance in enumerate(instances):
        if instance.problem:
            yield index, Row.of(instance, "error", instance.problem)
    runnable = [index for index, instance in enumerate(instances) if not instance.problem]
    tasks = [_Task(instances[index], str(folder), config) for index in runnable]
    limits = [task.instance.timeout + grace for task in tasks]
    with closing(run_in_processes(_answer, tasks, limits, processes=jobs)) as all_ended:
        for ended in all_ended:
            yield runnable[ended.index], _ended_row(instances[runnable[ended.index]], ended, grace)


@final
@dataclass(frozen=True)
class _Task:
    instance: Instance
    folder: str
    config: CertifyConfig


def _ended_row(instance: Instance, ended: Ended[Row], grace: float) -> Row:
    if ended.answer is not None:
        return ended.answer
    if ended.how == "overran":
        return Row.of(instance, "timeout", f"stopped from outside {grace:g} s after its limit", seconds=ended.seconds)
    code = ended.exit_code
    how = (
        f"was killed by signal {-code}: did memory run out?" if code is not None and code < 0 else f"ended with {code}"
    )
    return Row.of(instance, "error", f"its process {how}", seconds=ended.seconds)


def _answer(task: _Task) -> Row:
    """In a process of its own: certify one instance, whatever happens."""
    torch.set_num_threads(1)
    keep_freed_memory()
    start, instance, folder = time.monotonic(), task.instance, Path(task.folder)
    try:
        load = partial(_last_network, str(_beside(folder / instance.onnx)))
        verdict = _certified(load, _beside(folder / instance.vnnlib), instance.timeout, task.config)
    except CorollaryError as error:
        return Row.of(instance, "error", str(error), seconds=time.monotonic() - start)
    except Exception as error:  # one instance must not cost the others, whatever is wrong with it
        return Row.of(instance, "error", f"{type(error).__name__}: {error}", seconds=time.monotonic() - start)
    return Row.of(instance, verdict.status, verdict.reason, seconds=time.monotonic() - start, domains=verdict.domains)


@lru_cache(maxsize=1)
def _last_network(path: str) -> Network:
    """The network of the instance before, where it is the same: reading can take as long as proving."""
    return load_network(path)


def _beside(path: Path) -> Path:
    """The path, or the compressed file that lies there in its place."""
    packed = path.with_name(path.name + ".gz")
    return packed if not path.exists() and packed.exists() else path


def _suites(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.suite for row in rows))


def _counted(suite: str, rows: list[Row]) -> dict[str, Any]:
    count = Counter(row.verdict for row in rows)
    return {
        "suite": suite,
        "instances": len(rows),
        **{verdict: count[verdict] for verdict in VERDICTS},
        "solved": count["unsat"] + count["sat"],
        "published": sum(row.published in ("unsat", "sat") for row in rows),
        "contradictions": sum(row.agreement == "contradicts" for row in rows),
        "seconds": round(sum(row.seconds for row in rows), 1),
    }
