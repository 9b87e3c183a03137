"""Stored data of a study with numbers changed, to see each claim fail."""

from typing import Any

import numpy as np


def changed(data: Any, table: str, column: str, rows: Any, value: Any) -> dict:
    """The data with stored numbers replaced; `rows` says which by the values of columns, or is an index."""
    stored = {name: np.array(kept, copy=True) for name, kept in data[table].items()}
    if isinstance(rows, dict):
        rows = np.logical_and.reduce([stored[name] == wanted for name, wanted in rows.items()])
    stored[column][rows] = value
    return {**data, table: stored}
