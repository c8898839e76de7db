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


def read_yaml(text: str) -> Any:
    """What YAML 1.2 makes of text: 010 is ten, and neither 1:30 nor 0x10 nor 1_000 is a number, nor `no` false.

    (YAML 1.1, which PyYAML reads, makes 8, 90, 16, 1000 and False of them, and text of 1e-3.) Raises yaml.YAMLError.
    """
    return _Yaml(text).get_single_data()


_Yaml = type("_Yaml", (yaml.SafeLoader,), {"yaml_implicit_resolvers": {}})  # none of YAML 1.1's
for _kind, _pattern, _first in (("bool", "true|True|TRUE|false|False|FALSE", "tTfF"),
                                ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]), ("merge", "<<", "<"),
                                ("int", "[-+]?[0-9]+", "-+0123456789"),
                                ("float", r"[-+]?([0-9]+\.?|[0-9]*\.[0-9]+)([eE][-+]?[0-9]+)?", "-+.0123456789")):
    _Yaml.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"(?:{_pattern})$"), list(_first))
for _kind in (int, float):
    _Yaml.add_constructor(f"tag:yaml.org,2002:{_kind.__name__}", lambda loader, node, kind=_kind: kind(node.value))


def notebook_parameters(notebook: Path) -> dict[str, tuple[Any, str]]:
    """The `parameters` cell: name -> (default, annotation as text, or the default's type).

    Raises InputError unless there is one such cell, and it holds nothing but literals.
    """
    cells = [cell for cell in notebook_cells(notebook) if "parameters" in cell.get("metadata", {}).get("tags", [])]
    if len(cells) != 1:
        raise InputError(f"{notebook} must have one cell tagged 'parameters'; it has {len(cells)}")
    try:
        return _declared(ast.parse("".join(cells[0]["source"])).body)
    except (SyntaxError, ValueError) as error:
        raise InputError(f"{notebook}: the parameters cell must hold literals only ({error})") from None


def _declared(body: list[ast.stmt]) -> dict[str, tuple[Any, str]]:
    """The names that a cell sets to literals; annotations are read from the text: not every Python keeps them."""
    found = {}
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
            found[node.target.id] = (ast.literal_eval(node.value), ast.unparse(node.annotation))
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            value = ast.literal_eval(node.value)
            found[node.targets[0].id] = (value, _annotation_of(value))
    return found


def _annotation_of(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        kinds = {_annotation_of(item) for item in value}
        return f"list[{kinds.pop()}]" if len(kinds) == 1 else "list"
    return "object" if value is None else type(value).__name__


def conform(name: str, value: Any, annotation: str) -> Any:
    """`value` as the type that `annotation` names; text for no string is read as YAML, `1,4` as a list.

    An int passes for a float, a single value for a list of one. Raises InputError when the value does not fit.
    """
    sequence = annotation.startswith(("list", "tuple"))
    try:
        read = value if "str" in annotation else _numbers(value)
        if isinstance(value, str) and annotation != "str":
            read = read_yaml(f"[{value}]" if sequence and not value.lstrip().startswith("[") else value)
        elif sequence and isinstance(value, str | int | float):
            read = [value]
        return _fit(read, annotation)
    except (TypeError, ValueError, OverflowError, RecursionError, yaml.YAMLError):
        raise InputError(f"parameter {name} must be {annotation}, not {value!r}") from None


def _numbers(value: Any) -> Any:
    """Others read YAML as 1.1, in which 1e-3 is text: it is meant as a number."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    if isinstance(value, str) and re.fullmatch(r"[+-]?[0-9]+(\.[0-9]*)?[eE][+-]?[0-9]+", value):
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
    if kind == "float" and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    wanted = _TYPES.get(kind.split("[")[0], object)
    odd = wanted is int and isinstance(value, bool) or isinstance(value, float) and not math.isfinite(value)
    if odd or not isinstance(value, wanted):
        raise TypeError
    return value


_TYPES = {kind.__name__: kind for kind in (bool, int, float, str, dict, list)} | {"tuple": list, "None": type(None)}


def check_parameters(names: dict[str, Any]) -> dict[str, Any]:
    """Read the parameters of a running notebook, each in the type it is annotated with.

    names: the notebook's globals, changed in place; their "In" is the history of its cells. Returns parameter -> value.
    Plain papermill passes what it cannot read as text (`-p on true`), and a misspelt name like any other. Raises
    InputError, in one line, for a value that does not fit, or a name that papermill passed and that is no parameter.
    """
    known, injected, after = {}, [], False  # after: the cell of parameters, or this check
    for source in names.get("In", ()):
        declared, annotated = _literals(source)
        if annotated:
            known, injected = known | declared, []  # executed again, after a change perhaps
        elif after and source.startswith("# Parameters\n"):
            injected = list(declared)  # papermill's cell; corrected, the last one counts
        after = annotated or "check_parameters(" in source
    for name in injected:
        if name not in known and not name.startswith("PAPERMILL_"):
            raise InputError(f"there is no parameter {name!r}; {nearest(name, list(known))}")
    found = {name: conform(name, names[name], annotation) for name, (_, annotation) in known.items()}
    names.update(found)
    return found


def _literals(source: str) -> tuple[dict[str, tuple[Any, str]], bool]:
    """What a cell that only sets names to literals declares, and whether it annotates all; of other cells nothing."""
    with contextlib.suppress(SyntaxError, ValueError, TypeError, RecursionError):
        body = ast.parse(source).body
        if body and len(declared := _declared(body)) == len(body):
            return declared, all(isinstance(node, ast.AnnAssign) for node in body)
    return {}, False
