"""The command line. Nothing heavy is imported before a verb needs it: `--help` and `study list` answer at once.

Exit codes, one scheme for all verbs: 0 done (a claim that does not replicate is a result, not a failure) and, of
`certify`, proved; 1 the answer of `certify` is no: the property is violated, or a batch has an error or contradicts a
published verdict; 2 misuse, with a message that says what to do; 3 `certify` could decide nothing; 4 it ran out of
time; 70 a failure of Corollary's own; 130 interrupted; 141 nobody reads what is printed.
"""

import json as json_format
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from corollary.base.errors import BadInput, CannotCapture, CorollaryError, MissingExtra
from corollary.base.progress import progress
from corollary.base.registry import registry
from corollary.cli_certify import certify

if TYPE_CHECKING:
    from corollary.evidence import Source, StudyResult
    from corollary.inspection import Report


PROGRAM = "corollary"
VERDICT_STYLE = {"replicated": "green", "not replicated": "yellow"}
MISUSE, FAILED, INTERRUPTED, UNREAD = 2, 70, 130, 141


def inspect(
    model: Positional[str],
    /,
    data: str | None = None,
    target: int | str = -1,
    task: Literal["classification", "regression", "unlabelled"] | None = None,
    weights: Path | None = None,
    optimizer: Literal["sgd", "adam"] = "sgd",
    learning_rate: float | None = None,
    batch_size: int | None = None,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    epochs: int | None = None,
    record: Path | None = None,
    checkpoints: str | None = None,
    budget: float = 60.0,
    probes: str | None = None,
    output: Path | None = None,
    figures: Path | None = None,
    name: str | None = None,
    seed: int = 0,
    json: bool = False,
    trust_pickle: bool = False,
    debug: bool = False,
) -> int:
    """Say what theory knows about a trained network: an HTML report, and its numbers as JSON beside it.

    Args:
        model: network.onnx, network.pt2, or package.module:factory (also path/to/file.py:factory).
        data: a file (.npz, .csv, .idx, a folder of images) or a name: digits, iris, mnist, ...
        target: of a table, the column to predict, by name or number.
        task: what the data is for; by default read off its targets: integers are classes.
        weights: for a factory, its weights: .safetensors, or a state dict saved with torch.save.
        optimizer: what the network was trained with; so are the next five, where they are known.
        learning_rate: at the end of training.
        batch_size: samples a step.
        momentum: of SGD.
        weight_decay: as PyTorch's optimizers take it.
        epochs: passes over the training set.
        record: what was measured while it was trained: a TrainingRecord saved as .npz.
        checkpoints: files of other runs of the same architecture, with commas between: weights or programs.
        budget: seconds to spend; probes that do not fit say so in the report.
        probes: names of the probes to run, with commas between; default: all (see `corollary probes`).
        output: where the page goes; the JSON goes beside it. Default: corollary-report-NAME.html.
        figures: a folder for every figure as SVG with its data as CSV.
        name: what to call the network. Default: the name of its file.
        seed: the integer that reproduces the report.
        json: print the numbers as JSON instead of a summary.
        trust_pickle: load weights that are a pickle, which can run any code: only from a source you trust.
        debug: show the traceback of a probe that fails.
    """
    from corollary.data import load
    from corollary.evidence import Training
    from corollary.inspection import inspect as inspect_network

    training = Training(optimizer, learning_rate, batch_size, momentum, weight_decay, epochs)
    flags = {"data": data, "target": target, "task": task, "weights": weights, "record": record}
    flags |= {"checkpoints": checkpoints, "probes": probes, "seed": seed}
    flags |= {name: value for name, value in asdict(training).items() if value != getattr(Training, name)}
    with progress():
        report = inspect_network(
            model,
            load(data, target=target, task=task) if data else None,
            weights=weights,
            training=training,
            record=record,
            checkpoints=checkpoints.split(",") if checkpoints else (),
            budget=budget,
            probes=probes.split(",") if probes else None,
            seed=seed,
            name=name,
            command=_command(model, **flags),
            trust_pickle=trust_pickle,
            debug=debug,
        )
    if figures:
        report.save_figures(figures)
    return _delivered(report, output or Path(f"corollary-report-{report.name}.html"), json)


def list_probes(*, json: bool = False) -> int:
    """List the probes that `inspect` runs.

    Args:
        json: print as JSON.
    """
    entries = registry("probes").entries()
    if json:
        _print_json({name: entry.about for name, entry in entries.items()})
        return 0
    table = Table("probe", "what it shows", box=None, header_style="bold")
    for name, entry in entries.items():
        table.add_row(name, entry.about.get("title", ""))
    Console().print(table)
    return 0


def list_studies(*, json: bool = False, names: bool = False) -> int:
    """List the studies: published findings that can be replicated.

    Args:
        json: print as JSON.
        names: print the names alone.
    """
    entries = registry("studies").entries()
    if names:
        print("\n".join(entries))
    elif json:
        _print_json({name: entry.about for name, entry in entries.items()})
    else:
        table = Table("study", "room", "finding", "source", box=None, header_style="bold")
        for name, entry in entries.items():
            table.add_row(name, *(entry.about.get(key, "") for key in ("room", "title", "source")))
        Console().print(table)
    return 0


def run_study(slug: str, arguments: Sequence[str]) -> int:
    """Run a study: its fields are its flags, and the options of every run come after them."""
    from corollary.evidence import record as record_result
    from corollary.evidence import run_study as run

    study_type = registry("studies").load(slug)

    def with_options(
        study: Annotated[Any, tyro.conf.arg(name="")],
        output: Path = Path("runs"),
        record: Path | None = None,
        fresh: bool = False,
        json: bool = False,
    ) -> int:
        """Replicate a published finding.

        Args:
            study: the study's own settings.
            output: the folder of result folders.
            record: also write the summary to this folder, as <slug>.json.
            fresh: compute everything anew, even parts that an interrupted run has kept.
            json: print the result as JSON instead of a table.
        """
        with progress():
            result = run(study, root=output, fresh=fresh)
        if record:
            record_result(result, record)
        if json:
            _print_json(result.summary())
        else:
            _show_study(result)
        return 0

    with_options.__annotations__["study"] = Annotated[study_type, tyro.conf.arg(name="")]
    with_options.__doc__ = f"{study_type.title}\n\n{with_options.__doc__}"
    return tyro.cli(with_options, prog=f"{PROGRAM} study run {slug}", args=list(arguments))


def show_study(slug: Positional[str], /, output: Path = Path("runs"), json: bool = False) -> int:
    """Show the stored result of a study, judged again from its data.

    Args:
        slug: the study's name.
        output: the folder of result folders.
        json: print as JSON.
    """
    from corollary.evidence import load_result

    result = load_result(slug, root=output)
    if json:
        _print_json(result.summary())
    else:
        _show_study(result)
    return 0


def report_study(slug: Positional[str], /, output: Path = Path("runs"), to: Path | None = None) -> int:
    """Write the page of a study's stored result: claims, figures, data.

    Args:
        slug: the study's name.
        output: the folder of result folders.
        to: where the page goes. Default: corollary-report-SLUG.html.
    """
    from corollary.base.files import atomic_write
    from corollary.evidence import load_result

    result = load_result(slug, root=output)
    page = atomic_write(to or Path(f"corollary-report-{slug}.html"), registry("renderers").load("study-page")(result))
    Console().print(f"The page: [bold]{page}[/bold]")
    return 0


def cite(what: Positional[list[str]], /) -> int:
    """Print BibTeX of the papers behind a report or a study.

    Args:
        what: report.json files, or names of studies.
    """
    from corollary.evidence import Source

    found: dict[str, Source] = {}
    for item in what:
        for source in _sources(item, Source):
            found.setdefault(source.key, source)
    print("\n\n".join(source.bibtex() for source in found.values()))
    return 0


def demo(*, folder: Path = Path(), budget: float = 60.0) -> int:
    """Train a small network on real handwritten digits, and inspect it.

    Args:
        folder: where the network and the report go.
        budget: seconds for the inspection.
    """
    from corollary.demo import train_and_save

    trained = train_and_save(folder)
    page = folder / "corollary-report-demo.html"
    return main(["inspect", *trained, "--data", "digits", "--budget", str(budget), "--output", str(page)])


def choose_study() -> int:
    """Replicate a published finding: study run NAME [--scale smoke|desk|paper] [--seed N] [its own flags].

    All flags of a study: study run NAME --help.
    """
    raise BadInput(f"name the study to run. Known: {', '.join(registry('studies').names())}")


def choose_verb() -> int:
    """Replicate published findings: study list, study run NAME, study show NAME, study report NAME."""
    raise BadInput("say what to do: study list, study run NAME, study show NAME or study report NAME")


STUDY_VERBS: dict[str, Callable[..., Any]] = {
    "list": list_studies,
    "run": choose_study,
    "show": show_study,
    "report": report_study,
}
VERBS: dict[str, Callable[..., Any]] = {
    "inspect": inspect,
    "certify": certify,
    "study": choose_verb,
    "cite": cite,
    "probes": list_probes,
    "demo": demo,
}
DESCRIPTION = """Neural-network science you can run.

Exit codes: 0 done (a claim that does not replicate is a result), of certify: proved; 1 of certify: violated, or a batch
with errors or contradictions; 2 misuse; 3 of certify: unknown; 4 of certify: timeout; 70 Corollary failed; 130
interrupted."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _dispatch(given)
    except (BadInput, MissingExtra, CannotCapture) as error:
        print(f"corollary: {error}", file=sys.stderr)
        return MISUSE
    except CorollaryError as error:
        print(f"corollary: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        again = shlex.join([PROGRAM, *given])
        keeps = given[:2] == ["study", "run"] or (given[:1] == ["certify"] and "--results" in given)
        kept = f" What was finished is kept; go on with: {again}" if keeps else ""
        print(f"\ncorollary: interrupted.{kept}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again as it ends
        return UNREAD
    except Exception:
        traceback.print_exc()  # Python's own exit code for it is 1, which would read as a violated property
        return FAILED


def _dispatch(given: list[str]) -> int:
    match given:
        case ["study", "run", slug, *rest] if not slug.startswith("-"):
            return run_study(slug, rest)
        case ["study", *rest]:
            return tyro.extras.subcommand_cli_from_dict(STUDY_VERBS, prog=f"{PROGRAM} study", args=rest or ["--help"])
        case _:
            return tyro.extras.subcommand_cli_from_dict(
                VERBS, prog=PROGRAM, args=given or ["--help"], description=DESCRIPTION
            )


def _sources(item: str, source_type: "type[Source]") -> "list[Source]":
    """The papers behind a report's JSON, a study's JSON, or a study's name."""
    if not item.endswith(".json"):
        return list(registry("studies").load(item).sources)
    path = Path(item)
    if not path.exists():
        raise BadInput(f"there is no file {item!r}: give the .json beside a report, or the name of a study")
    content = json_format.loads(path.read_text())
    rows = [*content.get("sources", []), *(row for part in content.get("sections", []) for row in part["sources"])]
    return [source_type(**{**row, "authors": tuple(row["authors"])}) for row in rows]


def _command(model: str, **flags: object) -> str:
    """The command line that makes the same report again; flags left at "not given" are left out."""
    given = [str(word) for flag, value in flags.items() if value not in (None, -1) for word in (_flag(flag), value)]
    return shlex.join([PROGRAM, "inspect", model, *given])


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _delivered(report: "Report", page: Path, json: bool) -> int:
    """Write the page and the JSON beside it, and say on standard output what is in them."""
    report.save(page)
    report.save(page.with_suffix(".json"))
    if json:
        _print_json(report.as_json())
    else:
        _show_report(report, page)
    return 0


def _show_report(report: "Report", page: Path) -> None:
    console = Console()
    table = Table(title=report.name, box=None, header_style="bold", title_justify="left")
    for heading in ("measured", "value", "usually"):
        table.add_column(heading, overflow="fold")
    for section in report.sections:
        for measurement in section.finding.measurements:
            if measurement.headline:
                style = "yellow" if measurement.status == "outside" else ""
                table.add_row(measurement.name, measurement.text(), str(measurement.reference or ""), style=style)
    console.print(table)
    for title, reason in report.skipped.items():
        console.print(f"[dim]not run: {title}: {reason}[/dim]")
    console.print(f"\n{len(report.sections)} probes in {report.seconds:.1f} s. The page: [bold]{page}[/bold]")


def _show_study(result: "StudyResult") -> None:
    console = Console()
    table = Table(title=result.study.title, header_style="bold", title_justify="left", show_lines=True)
    for heading in ("", "claim", "criterion", "measured", "verdict"):
        table.add_column(heading, overflow="fold")
    for claim in result.claims:
        verdict = claim.verdict.value
        table.add_row(
            claim.id, claim.statement, claim.criterion, claim.measured, verdict, style=VERDICT_STYLE.get(verdict, "")
        )
    console.print(table)
    console.print(f"{result.command}: {result.seconds:.1f} s. Kept in [bold]{result.folder}[/bold]")


def _print_json(content: Any) -> None:
    print(json_format.dumps(content, indent=2, default=str))
