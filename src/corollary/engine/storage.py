"""Plain values on disk: written whole or not at all, and read back without running any code stored in the file."""

import dataclasses
import enum
import functools
import hashlib
import io
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from corollary.base.errors import BadInput
from corollary.base.files import atomic_write

_ARRAY, _GENERATOR = "__array__", "__generator__"


def save_plain(path: Path | str, value: Any) -> Path:
    """Write `value` to `path`, atomically.

    Args: `value`: numbers, strings, None, tensors, numpy arrays, `torch.Generator`s, and lists, tuples and dicts of
        these, nested as you like.
    Raises: BadInput, naming the place in `value` of anything else (an object would need code to be read back).
    """
    buffer = io.BytesIO()
    torch.save(_encode(value, "value"), buffer)
    return atomic_write(Path(path), buffer.getvalue())


def load_plain(path: Path | str) -> Any:
    """Read what `save_plain` wrote: equal to the bit, with each generator in the state it had.

    Raises: BadInput, if the file is missing, damaged, or holds anything but plain values.
    """
    if not Path(path).is_file():
        raise BadInput(f"there is no file {path} to read values from")
    try:
        if not zipfile.is_zipfile(path):  # PyTorch would try its older, pickled format
            raise RuntimeError("not a file of stored values, or cut short")
        return _decode(torch.load(Path(path), weights_only=True))
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise BadInput(
            f"cannot read {path}: {type(error).__name__}, {(str(error) or 'no details').splitlines()[0]}. "
            "If the file is damaged, delete it to start afresh."
        ) from error


def fingerprint(*values: Any) -> str:
    """A short hash of `values`: equal for equal contents, in every process and session.

    Tensors and arrays count by dtype, shape and bytes; dataclasses by name and fields; modules by class and state; a
    function by its qualified name (its code is not read), a partial also by its arguments.
    Raises: BadInput, for an object whose contents cannot be seen.
    """
    digest = hashlib.sha256()
    for value in values:
        _digest(digest, value)
    return digest.hexdigest()[:20]


def _encode(value: Any, place: str) -> Any:
    if value is None or type(value) in (bool, int, float, str) or type(value) in (Tensor, nn.Parameter):
        return value.detach() if isinstance(value, Tensor) else value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return {_ARRAY: torch.from_numpy(np.array(value))}
    if isinstance(value, torch.Generator):
        return {_GENERATOR: value.get_state(), "device": str(value.device)}
    if type(value) in (list, tuple):
        items = [_encode(item, f"{place}[{i}]") for i, item in enumerate(value)]
        return items if type(value) is list else tuple(items)
    if isinstance(value, Mapping):
        return {_key(key, place): _encode(item, f"{place}[{key!r}]") for key, item in value.items()}
    raise BadInput(
        f"{place} is a {type(value).__qualname__}, which cannot be stored without code: use numbers, strings, tensors, "
        "numeric arrays, and lists, tuples or dicts of these (for a NamedTuple, `._asdict()`)."
    )


def _key(key: Any, place: str) -> str | int:
    if type(key) in (str, int):
        return key
    raise BadInput(f"{place} has the key {key!r}: keys are stored as strings or integers only")


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        if _ARRAY in value:
            return value[_ARRAY].numpy()
        if _GENERATOR in value:
            generator = torch.Generator(value["device"])
            generator.set_state(value[_GENERATOR])
            return generator
        return {key: _decode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_decode(item) for item in value)
    return value


def _digest(digest: Any, value: Any) -> None:
    def tag(text: str) -> None:
        digest.update(f"<{text}>".encode())

    if value is None or isinstance(value, bool | int | float | complex | str | bytes | Path | enum.Enum | torch.dtype):
        tag(f"{type(value).__name__}:{value!r}")
    elif isinstance(value, np.generic):
        _digest(digest, value.item())
    elif isinstance(value, Tensor):
        whole = value.detach().cpu().clone(memory_format=torch.contiguous_format)  # one entry, expanded, has stride 0
        _digest(digest, whole.flatten().view(torch.uint8).numpy().tobytes())
        tag(f"tensor:{value.dtype}:{tuple(value.shape)}")
    elif isinstance(value, np.ndarray) and value.dtype.kind in "biufcSU":
        tag(f"array:{value.dtype}:{value.shape}")
        digest.update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, list | tuple):
        tag(f"{type(value).__name__}:{len(value)}")
        for item in value:
            _digest(digest, item)
    elif isinstance(value, Mapping):
        tag(f"mapping:{len(value)}")
        for key in sorted(value, key=repr):
            _digest(digest, key)
            _digest(digest, value[key])
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        tag(type(value).__qualname__)
        _digest(digest, {field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    elif isinstance(value, nn.Module):
        tag(type(value).__qualname__)
        _digest(digest, dict(value.state_dict()))
    elif isinstance(value, functools.partial):
        _digest(digest, (value.func, value.args, value.keywords))
    elif callable(value):
        named = value if hasattr(value, "__qualname__") else type(value)
        tag(f"{named.__module__}.{named.__qualname__}")
    else:
        raise BadInput(
            f"a {type(value).__qualname__} cannot be told from another by its contents: give numbers, strings, "
            "tensors, arrays, dataclasses, or lists, tuples or dicts of these"
        )
