"""samples: rows that a program holds, a list of dicts or a table such as a datasets.Dataset, as `read_rows` gives a
file's."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from minitune.arguments import short
from minitune.data.jsonl import decode_value
from minitune.errors import InputError

NAME = "samples"
"""What stands in messages and in the ledger in the place of a file."""


def are_samples(value: Any) -> bool:
    """Whether `value` holds rows: it has a length and places, and what lies in the first one has fields."""
    if isinstance(value, str | bytes | Mapping) or not (hasattr(value, "__len__") and hasattr(value, "__getitem__")):
        return False
    try:
        return len(value) > 0 and isinstance(value[0], Mapping)
    except (KeyError, IndexError, TypeError):       # places of another kind, as a data frame's
        return False


def how_to_give(value: Any) -> str:
    """What to write in the place of a table that is not taken as it is; empty for anything else."""
    if isinstance(value, Mapping):
        name = next((name for name, table in value.items() if are_samples(table)), None)
        if name is not None:
            return f"give one of its tables, such as data[{name!r}]"
        columns = value and not any(isinstance(share, int | float) for share in value.values())
        return "give a list of dicts, one a sample" if columns else ""
    if hasattr(value, "to_dict") and hasattr(value, "columns"):
        return 'give data.to_dict("records")'
    return ""


def rows_of(samples: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (where, row) for each sample, in order; ``where`` is "samples: row 3", counted from 1.

    They are as strict as a file of JSON lines: each is read as the JSON that it would be there. A table gives the
    objects of a column one set of fields; one that is None within such an object is taken as absent. InputError names
    the row.
    """
    is_table = not isinstance(samples, list | tuple)
    for number, sample in enumerate(samples, 1):
        where = f"{NAME}: row {number}"
        if not isinstance(sample, Mapping):
            raise InputError(f"{where}: is {short(sample)}; each must be a dict, as the first one is")
        row = {name: _without_nulls(value) for name, value in sample.items()} if is_table else dict(sample)
        try:
            text = json.dumps(row)
            if "NaN" in text:
                _refuse_nan(row, where)
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"{where}: holds what JSON cannot say ({error}); give texts, numbers, lists and "
                             "dicts") from None
        yield where, decode_value(text, 0, where)[0]


def _refuse_nan(row: Mapping[str, Any], where: str) -> None:
    """InputError that names the field of a row that is NaN, as data frames say that there is no value."""
    for name, value in row.items():
        if isinstance(value, float) and math.isnan(value):
            raise InputError(f"{where}: the field {short(name)} is NaN; write a number, or None where there is no "
                             "value (of a pandas data frame: data.astype(object).where(data.notna(), None))")


def _without_nulls(value: Any) -> Any:
    """`value` without the fields of its objects that are None; elements of lists stay."""
    if isinstance(value, Mapping):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


__all__ = ["NAME", "are_samples", "how_to_give", "rows_of"]
