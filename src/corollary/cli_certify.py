"""The verb `certify` of the command line: one property, or a batch of them."""

import json as json_format
import os
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.console import Console
from tyro.conf import Positional, arg

from corollary.base.errors import BadInput
from corollary.base.memory import keep_freed_memory
from corollary.base.progress import progress
from corollary.base.registry import registry

EXIT_CODE = {"unsat": 0, "sat": 1, "unknown": 3, "timeout": 4}
SMALL_ENOUGH_TO_SHOW = 20
"""Inputs and outputs of a counterexample that is printed."""


def certify(
    network: Positional[Annotated[str | None, arg(metavar="NETWORK")]] = None,
    property: Positional[Annotated[str | None, arg(metavar="PROPERTY")]] = None,
    /,
    timeout: float | None = None,
    counterexample: Path | None = None,
    split: Literal["auto", "inputs", "neurons", "none"] = "auto",
    dtype: Literal["auto", "float32", "float64"] = "auto",
    seed: int = 0,
    weights: Path | None = None,
    trust_pickle: bool = False,
    batch: Path | None = None,
    jobs: int = 1,
    results: Path | None = None,
    record: Path | None = None,
    json: bool = False,
) -> int:
    """Prove a property of a network, or find a counterexample. The last line printed is the verdict.

    Verdicts and exit codes: "unsat" 0, proved, no input violates the property; "sat" 1, a violating input was found and
    run on the network as given; "unknown" 3, with the reason; "timeout" 4. A batch ends with 0 if nothing was an error
    and no verdict contradicts a published one, else with 1.

    Args:
        network: network.onnx, network.pt2, or package.module:factory, which may give the pair (module, example).
        property: a VNN-LIB file, .vnnlib or .vnnlib.gz.
        timeout: seconds for everything. Default: 60; in a batch, what its rows say, and this at most.
        counterexample: where a violating input goes, in the form of VNN-COMP: ((X_0 0.5) ... (Y_0 1.0) ...).
        split: what branch and bound splits. "auto": the inputs where at most 20 of them vary, else neurons.
        dtype: of the bounds. "auto": float32, with a wider margin, and float64 where its rounding would decide.
        seed: the integer that reproduces the search.
        weights: for a factory, its weights: .safetensors, or a state dict saved with torch.save.
        trust_pickle: load weights that are a pickle, which can run any code: only from a source you trust.
        batch: instead of one network and property, a CSV file of them: rows onnx,vnnlib,timeout, or columns named
            suite, onnx, vnnlib, timeout_s, verdict (a published one); paths are relative to the file.
        jobs: of a batch, processes at once.
        results: of a batch, a CSV file that rows are appended to; what it holds already is not run again.
        record: of a batch, also write the summary to this folder, as certify-NAME.json.
        json: print one JSON object instead.
    """
    config = partial(_config, split, dtype, seed)
    if batch is not None:
        if network or property or counterexample or weights:
            raise BadInput(
                "a batch names its own networks and properties: leave out the others, weights, counterexample"
            )
        return _certify_batch(batch, timeout, jobs, results, record, json, config())
    if not (network and property):
        raise BadInput(
            "give a network and a property, as in: corollary certify net.onnx property.vnnlib; or --batch FILE"
        )
    if results or record or jobs != 1:
        raise BadInput("--results, --record and --jobs are for a batch: give --batch FILE")
    timeout = 60.0 if timeout is None else timeout
    console = Console(stderr=True)
    show = console.is_terminal and not json
    keep_freed_memory()
    _one_thread()
    with console.status(f"certifying {Path(network).name}") if show else nullcontext():
        verdict = registry("certify").load("files")(
            network,
            property,
            weights=weights,
            timeout=timeout,
            config=config(),
            trust_pickle=trust_pickle,
            tell=partial(console.print, style="dim", highlight=False, markup=False) if show else None,
        )
    if counterexample and verdict.counterexample is not None:
        verdict.counterexample.write(counterexample)
    if json:
        _print_json(_verdict_as_json(verdict, network, property, split, dtype, seed, timeout))
    else:
        _show_verdict(verdict, counterexample, console)
    return EXIT_CODE[verdict.status]


def _one_thread() -> None:
    """One thread of PyTorch unless OMP_NUM_THREADS says more: small products wait for each other on busy cores."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def _config(split: str, dtype: str, seed: int) -> Any:
    import torch

    precision = None if dtype == "auto" else getattr(torch, dtype)
    return registry("certify").load("config")(split=split, dtype=precision, seed=seed)


def _certify_batch(
    instances: Path,
    timeout: float | None,
    jobs: int,
    results: Path | None,
    record: Path | None,
    json: bool,
    config: object,
) -> int:
    limit = float("inf") if timeout is None else timeout
    with progress():
        found = registry("certify").load("batch")(instances, timeout=limit, jobs=jobs, results=results, config=config)
    if record:
        name = instances.stem if instances.stem != "instances" else instances.absolute().parent.name
        settings = {key: found.configuration[key] for key in ("timeout", "jobs", "split", "dtype", "seed")}
        flags = [f"--{key} {value}" for key, value in settings.items() if value is not None]
        found.record(record, f"certify-{name}", " ".join(["corollary certify", "--batch", str(instances), *flags]))
    if json:
        _print_json(found.as_json())
    else:
        _show_batch(found)
    return 1 if found.errors or found.contradictions else 0


def _verdict_as_json(verdict: Any, network: str, property: str, *settings: Any) -> dict[str, Any]:
    from corollary.evidence.store import environment

    configuration = dict(zip(("split", "dtype", "seed", "timeout"), settings, strict=True))
    found = {"network": network, "property": property, **verdict.as_json()}
    return {**found, "configuration": configuration, "environment": environment()}


def _show_verdict(verdict: Any, file: Path | None, console: Console) -> None:
    """The reason and, on a terminal, the counterexample on standard error; the verdict alone on standard output."""
    if verdict.reason:
        print(f"corollary: {verdict.reason}", file=sys.stderr)
    found = verdict.counterexample
    if found is not None and console.is_terminal:
        if file:
            console.print(f"The counterexample: [bold]{file}[/bold]")
        elif found.x.numel() + found.y.numel() <= SMALL_ENOUGH_TO_SHOW:
            console.print(found.text(), end="", highlight=False, markup=False)
        else:
            console.print("A counterexample was found: --counterexample FILE keeps it", style="dim")
    print(verdict.status)


def _show_batch(found: Any) -> None:
    for row in (*found.errors, *found.contradictions):
        what = row.reason if row.verdict == "error" else f"{row.verdict}, published is {row.published}"
        print(f"corollary: {row.onnx} {row.vnnlib}: {what}", file=sys.stderr)
    print(found.markdown(), end="")


def _print_json(content: Any) -> None:
    print(json_format.dumps(content, indent=2))
