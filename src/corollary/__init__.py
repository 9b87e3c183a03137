"""Neural-network science you can run. Importing this imports nothing heavy: each name loads at its first use."""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from corollary.evidence import run_study as study
    from corollary.graph.capture import capture
    from corollary.inspection import inspect
    from corollary.verify import certify

__version__ = version("corollary")
__all__ = ["__version__", "capture", "certify", "inspect", "study"]

_FACE = {
    "inspect": "corollary.inspection:inspect",
    "certify": "corollary.verify:certify",
    "study": "corollary.evidence:run_study",
    "capture": "corollary.graph.capture:capture",
}


def __getattr__(name: str) -> Any:
    if name not in _FACE:
        raise AttributeError(f"module 'corollary' has no attribute {name!r}; it has {', '.join(__all__)}")
    module, _, attribute = _FACE[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return __all__
