"""Networks from files and factories: `.pt2`, `.onnx`, "package.module:factory", and weights beside them."""

import importlib
import importlib.util
import sys
import traceback
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from corollary.base.errors import BadInput, CannotCapture
from corollary.base.network import Inputs
from corollary.graph.capture import capture
from corollary.graph.evaluate import GraphModule
from corollary.graph.graph import Graph
from corollary.graph.pt2 import read_pt2

PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle", ".tar")
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network")
"""Where training scripts put the state dict in a checkpoint that holds more."""
COUNTER = "num_batches_tracked"
WANTED = "wanted model.onnx, model.pt2, package.module:factory or path/to/file.py:factory"


@dataclass(frozen=True)
class Network:
    """A network that was loaded.

    Args:
        module: computes it and holds its parameters.
        graph: its program, or why there is none.
        origin: where it came from.
    """

    name: str
    module: nn.Module
    graph: Graph | CannotCapture
    origin: str


def load_network(
    spec: str | Path | nn.Module,
    *,
    weights: str | Path | None = None,
    example: Inputs | None = None,
    trust_pickle: bool = False,
) -> Network:
    """A network, from wherever it is.

    Args:
        spec: a module; `model.onnx`; `model.pt2`; or `package.module:factory` or `path/to/file.py:factory`, where the
            factory is a module, a class or function that gives one without arguments, or one that gives the pair
            (module, example). The working folder is importable.
        weights: for a factory or module: a .safetensors file, or a state dict saved by `torch.save`.
        example: inputs to capture the network with.
        trust_pickle: read pickles, which run any code that they contain.
    Raises:
        BadInput, saying what was found and what is wanted: no such file, not a network, no such factory, weights that
        do not fit, a pickle. CannotCapture, if a file's own program cannot be read.
    """
    if isinstance(spec, nn.Module):
        return _captured(type(spec).__name__, spec, weights, example, trust_pickle, "a module")
    text = str(spec)
    if _is_program(text):
        if weights is not None:
            raise BadInput(f"{text} holds its own weights: leave out weights ({weights})")
        graph = _read_program(_existing(text), trust_pickle)
        return Network(Path(text).name.partition(".")[0], GraphModule(graph), graph, text)
    path, colon, name = text.rpartition(":")
    if colon and name.isidentifier():
        module, own_example = _made(path, name)
        example = own_example if example is None else example
        return _captured(name, module, weights, example, trust_pickle, text)
    module = _unpickled_network(_existing(text), trust_pickle)
    return _captured(type(module).__name__, module, weights, example, trust_pickle, text)


def load_weights(module: nn.Module, path: str | Path, *, trust_pickle: bool = False) -> None:
    """Put the weights of a file into the module.

    Raises: BadInput, listing the names that are missing, unexpected or of another shape.
    """
    module.load_state_dict(read_checkpoint(module, path, trust_pickle=trust_pickle))


def read_checkpoint(module: nn.Module, path: str | Path, *, trust_pickle: bool = False) -> Mapping[str, Tensor]:
    """Parameters and buffers of a file, by the names they have in `module`, which is not changed.

    Args:
        path: a .safetensors file, a state dict, or a program (.pt2, .onnx) of the same architecture.
    Raises: BadInput, listing the names that are missing, unexpected or of another shape.
    """
    file = _existing(str(path))
    if _is_program(str(path)):
        found: Mapping[str, Tensor] = GraphModule(_read_program(file, trust_pickle)).state_dict()
    else:
        found = _read_weights(file, trust_pickle)
    wanted = module.state_dict()
    # How many batches a normalisation saw matters to its training alone, and a program leaves it out.
    missing = sorted(name for name in wanted.keys() - found.keys() if not name.endswith(COUNTER))
    unexpected = sorted(name for name in found.keys() - wanted.keys() if not name.endswith(COUNTER))
    shapes = [
        f"{name} is {tuple(found[name].shape)}, wanted {tuple(wanted[name].shape)}"
        for name in sorted(wanted.keys() & found.keys())
        if found[name].shape != wanted[name].shape
    ]
    complaints = [
        f"{len(names)} {what}: {_some(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]
    if complaints:
        raise BadInput(f"the weights in {path} do not fit {type(module).__name__}.\n" + "\n".join(complaints))
    counters = {name: value for name, value in wanted.items() if name.endswith(COUNTER)}
    return counters | {name: value for name, value in found.items() if name in wanted}


def _captured(
    name: str,
    module: nn.Module,
    weights: str | Path | None,
    example: Inputs | None,
    trust_pickle: bool,
    origin: str,
) -> Network:
    if weights is not None:
        load_weights(module, weights, trust_pickle=trust_pickle)
    if example is None:
        reason = "no example input was given: pass data, or let the factory return the pair (module, example)"
        return Network(name, module, CannotCapture(reason), origin)
    try:
        return Network(name, module, capture(module, example), origin)
    except CannotCapture as refusal:
        return Network(name, module, refusal, origin)


def _is_program(text: str) -> bool:
    return text.endswith((".onnx", ".pt2", ".onnx.gz"))


def _read_program(path: Path, trust_pickle: bool) -> Graph:
    if path.suffix == ".pt2":
        return read_pt2(path, trust_pickle=trust_pickle)
    from corollary.graph.onnx import read_onnx  # its extra is needed only here

    return read_onnx(path)


def _existing(text: str) -> Path:
    path = Path(text)
    if path.is_file():
        return path
    if path.is_dir():
        raise BadInput(f"{text} is a folder; {WANTED}")
    beside = sorted(entry.name for entry in path.parent.glob("*") if entry.suffix == path.suffix and path.suffix)
    hint = f" The folder {path.parent} has {_some(beside)}." if beside else ""
    raise BadInput(f"there is no file {text}; {WANTED}.{hint}")


def _unpickled_network(path: Path, trust_pickle: bool) -> nn.Module:
    """A whole module in a pickle; any other file is no network.

    Raises: BadInput, saying what the file is instead.
    """
    if path.suffix not in PICKLES or not trust_pickle:
        raise BadInput(f"{path} is {_what_it_is(path)}; {WANTED}")
    found = torch.load(path, weights_only=False, map_location="cpu")
    if not isinstance(found, nn.Module):
        raise BadInput(
            f"{path} holds a {type(found).__name__}, no network. If it holds weights, pass them as weights beside the "
            "network's factory"
        )
    return found


def _what_it_is(path: Path) -> str:
    if path.suffix == ".safetensors":
        return "weights without a program: pass it as weights beside the network's factory"
    if path.suffix == ".py":
        return f"Python code: say which factory, as in {path}:make"
    names = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else []
    if any("/code/" in name for name in names):
        return "a TorchScript archive: save the network with torch.export.save instead"
    if path.suffix in PICKLES or any(name.endswith("data.pkl") for name in names):
        return (
            "a pickled checkpoint: if it holds weights, pass it as weights beside the network's factory; if it holds a "
            "whole module that you trust, pass trust_pickle (--trust-pickle)"
        )
    return f"a file of a kind that is not read here ({path.suffix or 'no ending'})"


def _made(place: str, name: str) -> tuple[nn.Module, Inputs | None]:
    """What a factory gives."""
    source = _imported(place)
    if not hasattr(source, name):
        raise BadInput(f"{place} has no {name!r}. It has {_some(_networks_in(source)) or 'no function or class'}.")
    factory = getattr(source, name)
    if isinstance(factory, nn.Module):
        return factory, None
    if not callable(factory):
        raise BadInput(f"{place}:{name} is a {type(factory).__name__}; wanted a function that gives a module")
    try:
        made = factory()
    except Exception as error:
        line = traceback.extract_tb(error.__traceback__)[-1]
        raise BadInput(
            f"{place}:{name}() raised {type(error).__name__} at {line.filename}:{line.lineno}: {error}.\n"
            "A factory takes no arguments and gives a torch.nn.Module."
        ) from error
    module, example = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(module, nn.Module):
        raise BadInput(f"{place}:{name}() gave a {type(module).__name__}; wanted a torch.nn.Module")
    return module, example


def _imported(place: str) -> ModuleType:
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        path = _existing(place)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if spec is None or spec.loader is None:
            raise BadInput(f"{place} cannot be loaded as Python code")
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(path.stem, module)  # dataclasses and pickles look their module up by name
        spec.loader.exec_module(module)
        return module
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(
            f"{place!r} cannot be imported: {type(error).__name__}: {error}.\nModules are looked for in {folder} and "
            "where Python looks."
        ) from error


def _networks_in(source: ModuleType) -> list[str]:
    """Names in a module that may be factories."""
    own = {name: thing for name, thing in vars(source).items() if not name.startswith("_")}
    return sorted(
        name
        for name, thing in own.items()
        if isinstance(thing, nn.Module) or (callable(thing) and getattr(thing, "__module__", "") == source.__name__)
    )


def _read_weights(path: Path, trust_pickle: bool) -> Mapping[str, Tensor]:
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except Exception as error:  # the reader's errors share no class
            raise BadInput(f"{path} cannot be read as safetensors: {error}") from error
    try:
        found = torch.load(path, weights_only=not trust_pickle, map_location="cpu")
    except Exception as error:
        raise BadInput(
            f"{path} cannot be read as a state dict without running code from it: "
            f"{str(error).splitlines()[0]}\nPass trust_pickle (--trust-pickle) if you trust it, or save it again with "
            "safetensors or torch.save(model.state_dict(), ...)."
        ) from error
    return _state_dict(found, path)


def _state_dict(found: Any, path: Path) -> Mapping[str, Tensor]:
    if isinstance(found, nn.Module):
        return found.state_dict()
    if isinstance(found, Mapping):
        for name in WRAPPERS:
            if isinstance(found.get(name), Mapping):
                return _state_dict(found[name], path)
        if found and all(isinstance(value, Tensor) for value in found.values()):
            return found
        raise BadInput(f"{path} holds a mapping with {_some([str(k) for k in found]) or 'nothing'}: no state dict")
    raise BadInput(f"{path} holds a {type(found).__name__}; wanted a state dict")


def _some(names: Sequence[str], most: int = 8) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
