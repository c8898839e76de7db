"""The parameters of notebooks: one annotated literal a line in the cell tagged `parameters`."""

import ast
import contextlib
import json
import math
import re
from pathlib import Path
from typing import Any

import yaml

from bagssl.errors import InputError, nearest


def notebook_cells(notebook: Path) -> list[dict]:
    """The cells of a notebook, as its file has them; raises InputError for a file that is none."""
    try:
        return json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{notebook} is not a readable notebook: {error}") from None


def notebook_parameters(notebook: Path) -> dict[str, tuple[Any, str]]:
    """The `parameters` cell: name -> (default, annotation as text, or the default's type).

    Raises InputError unless there is one such cell, and it holds nothing but literals.
    """
    cells = [cell for cell in notebook_cells(notebook) if "parameters" in cell.get("metadata", {}).get("tags", [])]
    if len(cells) != 1:
        raise InputError(f"{notebook} must have one cell tagged 'parameters'; it has {len(cells)}")
    found = {}
    try:
        for node in ast.parse("".join(cells[0]["source"])).body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
                found[node.target.id] = (ast.literal_eval(node.value), ast.unparse(node.annotation))
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                value = ast.literal_eval(node.value)
                found[node.targets[0].id] = (value, _annotation_of(value))
    except (SyntaxError, ValueError) as error:
        raise InputError(f"{notebook}: the parameters cell must hold literals only ({error})") from None
    return found


def _annotation_of(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        kinds = {_annotation_of(item) for item in value}
        return f"list[{kinds.pop()}]" if len(kinds) == 1 else "list"
    return "object" if value is None else type(value).__name__


def conform(name: str, value: Any, annotation: str) -> Any:
    """`value` as the type that `annotation` names; text for no string is read as YAML, `1,4` as a list.

    An int passes for a float. Raises InputError when the value does not fit.
    """
    try:
        read = _numbers(value) if isinstance(value, dict) else value
        if isinstance(value, str) and annotation != "str":
            sequence = annotation.startswith(("list", "tuple")) and not value.lstrip().startswith("[")
            read = _numbers(yaml.safe_load(f"[{value}]" if sequence else value))
        return _fit(read, annotation)
    except (TypeError, ValueError, OverflowError, RecursionError, yaml.YAMLError):
        raise InputError(f"parameter {name} must be {annotation}, not {value!r}") from None


def _numbers(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as text: within lists and mappings, too, it is meant as a number."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        return float(value)
    return value


def _fit(value: Any, kind: str) -> Any:
    """The value in the type that the text `kind` names, or TypeError."""
    inner = re.fullmatch(r"(?:list|tuple)\[([\w |]+)(?:, \.\.\.)?\]", kind)
    if inner and isinstance(value, list):
        return [_fit(item, inner[1]) for item in value]
    if "|" in kind and not inner:
        for each in kind.split("|"):
            with contextlib.suppress(TypeError):
                return _fit(value, each.strip())
        raise TypeError
    if kind == "float" and isinstance(value, (int, str)) and not isinstance(value, bool):
        value = float(value)  # a str, because YAML 1.1 reads 1e-3 as text
    wanted = _TYPES.get(kind.split("[")[0], object)
    odd = wanted is int and isinstance(value, bool) or isinstance(value, float) and not math.isfinite(value)
    if odd or not isinstance(value, wanted):
        raise TypeError
    return value


_TYPES = {kind.__name__: kind for kind in (bool, int, float, str, dict, list)} | {"tuple": list, "None": type(None)}


def check_parameters(names: dict[str, Any]) -> dict[str, Any]:
    """Read the parameters of a running notebook, each in the type it is annotated with.

    names: the notebook's globals, changed in place. Returns parameter -> value. Plain papermill passes what it cannot
    read as text (`-p on true`), and a misspelt name like any other. Raises InputError, in one line, for a value that
    does not fit, or a name that papermill passed and that is no parameter.
    """
    annotations = names.get("__annotations__", {}).items()
    known = {name: kind.__name__ if type(kind) is type else str(kind) for name, kind in annotations}
    for source in names.get("In", ()):  # the history of the kernel
        for node in ast.parse(source).body if source.lstrip().startswith("# Parameters") else ():
            for target in getattr(node, "targets", ()):
                if target.id not in known:
                    raise InputError(f"there is no parameter {target.id!r}; {nearest(target.id, list(known))}")
    found = {name: conform(name, names[name], kind) for name, kind in known.items()}
    names.update(found)
    return found
