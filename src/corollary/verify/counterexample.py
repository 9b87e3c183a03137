"""Counterexamples: an input and the output that violates a property, on file, and run again on the original network."""

import gzip
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, final

import numpy as np
import torch
from torch import Tensor, nn

from corollary.base.errors import BadInput
from corollary.base.files import atomic_write
from corollary.base.network import evaluating
from corollary.base.optional import optional
from corollary.verify.sets import Ball, Region
from corollary.verify.specification import Specification, contains

onnxruntime = optional("onnxruntime", extra="onnx", purpose="running the original .onnx network")

ASSIGNMENT = re.compile(r"\(\s*([XY])_(\d+)\s+([^\s()]+)\s*\)")
NEAR = 1e-5
"""How far outside its region, relative to its entries, a point may lie and still be moved in: rounding, no more."""


@final
@dataclass(frozen=True, eq=False)
class Counterexample:
    """An input and the network's output for it.

    Args:
        x: (1, *input), float64.
        y: (1, *output).
    """

    x: Tensor
    y: Tensor

    def text(self) -> str:
        """The form of VNN-COMP, `((X_0 v) ... (Y_0 v) ...)`, inputs and outputs flattened, every digit kept."""
        lines = [
            f"({letter}_{i} {value!r})"
            for letter, values in (("X", self.x), ("Y", self.y))
            for i, value in enumerate(values.double().flatten().tolist())
        ]
        return "(" + "\n ".join(lines) + ")\n"

    def write(self, path: str | Path) -> Path:
        """Write the text to a file."""
        return atomic_write(Path(path), self.text())

    @classmethod
    def read(cls, path: str | Path) -> "Counterexample":
        """A counterexample from a file, flat: x (1, inputs) and y (1, outputs) in float64.

        The first line of a VNN-COMP result, `sat`, may stand above it.
        Raises: BadInput, if there is no file, or no X_0, X_1, ... in it.
        """
        try:
            text = Path(path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
        found: dict[str, dict[int, float]] = {"X": {}, "Y": {}}
        try:
            for letter, index, value in ASSIGNMENT.findall(text):
                found[letter][int(index)] = float(value)
        except ValueError as error:
            raise BadInput(f"{path} gives a variable what is no number: {error}") from error
        for letter, values in found.items():
            if sorted(values) != list(range(len(values))) or (letter == "X" and not values):
                raise BadInput(
                    f"{path} is no counterexample in the form ((X_0 0.5) (X_1 0.25) ... (Y_0 1.0) ...): "
                    f"it assigns {len(values)} {letter}, not {letter}_0 and on"
                )
        x, y = (
            torch.tensor([[values[i] for i in range(len(values))]], dtype=torch.float64) for values in found.values()
        )
        return cls(x, y)


@final
class OnnxProgram:
    """An `.onnx` file (or `.onnx.gz`) as onnxruntime runs it, one sample at a time.

    `program(x)` takes a sample of any shape, cuts it in C order into the file's own inputs, in their types and shapes
    (open sizes are 1), and gives the outputs, flattened, as (1, outputs). `dtype` is the type of the inputs.

    Raises: BadInput, for a file that onnxruntime cannot run, or inputs that are not floating-point; MissingExtra.
    """

    def __init__(self, path: str | Path):
        library: Any = onnxruntime.load()
        options = library.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        path = Path(path)
        try:
            model = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else str(path)
            self._session = library.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors have no common class
            raise BadInput(f"onnxruntime cannot run {path}: {str(error).splitlines()[0]}") from error
        self.name = path.name
        self._inputs = self._session.get_inputs()
        kinds = {entry.type for entry in self._inputs}
        dtypes = {"tensor(float)": torch.float32, "tensor(double)": torch.float64, "tensor(float16)": torch.float16}
        if len(kinds) != 1 or not kinds <= dtypes.keys():
            raise BadInput(f"{path} takes inputs of type {', '.join(sorted(kinds))}; wanted one floating-point type")
        self.dtype = dtypes[kinds.pop()]

    def __call__(self, x: Tensor) -> Tensor:
        """The outputs for one sample.

        Raises: BadInput, for another number of entries than the file's inputs take.
        """
        flat = x.detach().cpu().to(self.dtype).flatten()
        shapes = [[size if isinstance(size, int) and size > 0 else 1 for size in entry.shape] for entry in self._inputs]
        sizes = [math.prod(shape) for shape in shapes]
        if sum(sizes) != len(flat):
            raise BadInput(f"{self.name} takes {sum(sizes)} inputs, and the sample has {len(flat)}")
        feeds = {
            entry.name: part.reshape(shape).numpy()
            for entry, part, shape in zip(self._inputs, flat.split(sizes), shapes, strict=True)
        }
        outputs = [torch.from_numpy(np.array(array)).flatten() for array in self._session.run(None, feeds)]
        return torch.cat(outputs)[None]


Network: TypeAlias = nn.Module | OnnxProgram | Callable[[Tensor], Tensor]
"""What takes inputs (batch, *input) and gives outputs (batch, *output)."""


def input_dtype(network: Network, specification: Specification) -> torch.dtype:
    """The floating type that a network computes in: of its file or its parameters; else the specification's."""
    if isinstance(network, OnnxProgram):
        return network.dtype
    if isinstance(network, nn.Module):
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.is_floating_point():
                return tensor.dtype
    return specification.cases[0].rows.dtype


def replay(network: Network | str | Path, specification: Specification, x: Tensor) -> Counterexample | None:
    """Run one input through the original network, and return it with its output if that violates the specification.

    The input is first moved to the nearest point of the region that the network's dtype can hold, so that rounding
    does not lead out of the region. Where the region holds no such number (a fixed input that is 0.1), the exact one is
    reported and the network runs on its nearest, as every reader of the counterexample will. Outputs are compared
    without tolerance.

    Args:
        network: the path of an `.onnx` file, which onnxruntime runs; or a module or function, called on one sample.
        x: one sample, of any shape.
    Returns: the counterexample, or None if the point is in no region of the specification or violates nothing.
    Raises: BadInput, MissingExtra, as for `OnnxProgram`.
    """
    program = OnnxProgram(network) if isinstance(network, str | Path) else network
    dtype = input_dtype(program, specification)
    for case in specification.cases:
        point = settled(case.region, x, dtype)
        if not bool(((point.flatten() - x.double().flatten()).abs() <= NEAR * (1 + x.double().flatten().abs())).all()):
            continue
        y = _run(program, point.to(dtype))
        if bool(case.margins(y.double()) <= 0) and contains(case.region, point):
            return Counterexample(point, y)
    return None


def settled(region: Region, x: Tensor, dtype: torch.dtype) -> Tensor:
    """The point of the region nearest to x, (1, *input) in float64, its entries numbers of `dtype` where there are any.

    In a ball, distances to the center shrink until the rounded point is inside.
    """
    if isinstance(region, Ball):
        return _settled_in_ball(region, x, dtype)
    lower, upper = region.lower.double(), region.upper.double()
    point = torch.minimum(torch.maximum(x.double().reshape(lower.shape), lower), upper)
    near = point.to(dtype)
    inward = torch.where(near.double() > upper, -torch.inf, torch.inf).to(dtype)
    outside = (near.double() > upper) | (near.double() < lower)
    near = torch.where(outside, torch.nextafter(near, inward), near).double()
    return torch.where((near < lower) | (near > upper), point, near)


def _settled_in_ball(region: Ball, x: Tensor, dtype: torch.dtype) -> Tensor:
    center = region.center.double()
    change = x.double().reshape(center.shape) - center
    length = torch.linalg.vector_norm(change.flatten(), region.norm)
    change = change * (region.radii.double() / length).clamp(max=1.0) if length > 0 else change
    for roundings in (0, 2, 8, 64, 512):
        point = (center + (1 - roundings * torch.finfo(dtype).eps) * change).to(dtype).double()
        if contains(region, point):
            return point
    return center


def _run(program: Network, x: Tensor) -> Tensor:
    if isinstance(program, nn.Module):
        parameter = next(program.parameters(), x)
        with evaluating(program), torch.no_grad():
            return program(x.to(parameter.device)).cpu()
    with torch.no_grad():
        return program(x)
