"""The house: imports point down, never in a circle; the method needs no notebook software; nothing is too long."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from test_setup import NOTEBOOK_SOFTWARE, ROOT

STOREYS = ("method", "study", "batch", "bench", "commands", "cli")  # an import points to the left
LONGEST_FUNCTION, LONGEST_FILE = 60, 450  # lines
LONGEST = {"bagssl.pretraining.step": 30, "bagssl.pretraining.train": 40}  # the mathematics of a step, and the loop


@dataclass(frozen=True)
class Room:
    """A module: its name (`bagssl.study.claims`), its source, and the modules that it imports, wherever in it."""

    name: str
    source: str
    imports: frozenset[str]

    @property
    def storey(self) -> int:
        return storey(self.name)


def storey(name: str) -> int:
    part = name.split(".")[1]
    return STOREYS.index(part) if part in STOREYS else 0


def house(root: Path) -> dict[str, Room]:
    """All modules of root/bagssl by name, but bagssl itself, which any of them may ask for its version."""
    sources = {}
    for path in sorted((root / "bagssl").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        sources[".".join(parts).removesuffix(".__init__")] = path.read_text(encoding="utf-8")
    return {name: Room(name, text, frozenset(imported(name, text, sources)))
            for name, text in sources.items() if name != "bagssl"}  # fmt: skip


def imported(name: str, source: str, known: dict[str, str]) -> Iterator[str]:
    """The modules that a module imports: of `known` by their full name, of others as they are written."""
    folder = any(other.startswith(f"{name}.") for other in known)  # a dot in its __init__.py is itself
    parts = [*name.split("."), *["__init__"] * folder]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = parts[: -node.level] if node.level else []
            module = ".".join([*start, *(node.module or "").split(".")]).rstrip(".")
            yield from (full if (full := f"{module}.{alias.name}") in known else module for alias in node.names)


def upwards(rooms: dict[str, Room]) -> list[str]:
    return [f"{room.name} imports {other}" for room in rooms.values() for other in sorted(room.imports)
            if other in rooms and storey(other) > room.storey]  # fmt: skip


def circles(rooms: dict[str, Room]) -> list[str]:
    """What is left when rooms that import nothing which is left are taken away, again and again."""
    left = set(rooms)
    while free := {name for name in left if not rooms[name].imports & left}:
        left -= free
    return [f"{name} imports {other}" for name in sorted(left) for other in sorted(rooms[name].imports & left)]


def notebook_software(rooms: dict[str, Room]) -> list[str]:
    """In the method: what a box that only trains does not have."""
    return [f"{room.name} imports {other}" for room in rooms.values() for other in sorted(room.imports)
            if room.storey == 0 and other.split(".")[0] in NOTEBOOK_SOFTWARE]  # fmt: skip


def long_functions(rooms: dict[str, Room]) -> list[str]:
    return [f"{name} has {lines} lines" for name, lines in functions(rooms)
            if lines > LONGEST.get(name, LONGEST_FUNCTION)]  # fmt: skip


def functions(rooms: dict[str, Room]) -> list[tuple[str, int]]:
    """The functions of the method, also those in classes and in functions, with their lines."""
    return [(f"{room.name}.{node.name}", node.end_lineno - node.lineno + 1)
            for room in rooms.values() if room.storey == 0
            for node in ast.walk(ast.parse(room.source)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def long_files(rooms: dict[str, Room]) -> list[str]:
    return [f"{room.name} has {lines} lines" for room in rooms.values()
            if (lines := len(room.source.splitlines())) > LONGEST_FILE]  # fmt: skip


RULES = [upwards, circles, notebook_software, long_functions, long_files]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps_the_rule(rule):
    rooms = house(ROOT)
    assert len(rooms) > 30 and "bagssl.study.claims" in rooms["bagssl.batch.report"].imports
    assert LONGEST.keys() <= {name for name, _ in functions(rooms)}
    assert rule(rooms) == []


def function(lines: int, name: str = "long") -> str:
    return "\n".join([f"def {name}():", *["    pass"] * (lines - 1)])


SOUND = {"data.py": "import torch\nfrom bagssl import __version__", "study/__init__.py": "",
         "study/figures.py": "import pandas\nimport bagssl.data", "bench/race.py": "from bagssl import data",
         "bench/__init__.py": "from . import race\nfrom ..batch.report import page",
         "batch/report.py": f"def page():\n    from ..study import figures, __doc__\n{function(61)}",
         "cli.py": "from bagssl import batch, data",
         "probes.py": f"from bagssl.data import SPLITS\n{function(60)}", "claims.py": "pass\n" * 450}  # fmt: skip
LEANING = [
    (upwards, {"patches.py": "from bagssl import data, study"}, "patches imports bagssl.study"),
    (upwards, {"patches.py": "def f():\n    from bagssl.study import figures"}, "patches imports bagssl.study.figures"),
    (upwards, {"study/claims.py": "from ..batch import report"}, "study.claims imports bagssl.batch.report"),
    (upwards, {"batch/stages.py": "import bagssl.bench as b"}, "batch.stages imports bagssl.bench"),
    (upwards, {"bench/__init__.py": "if 0:\n    from ..cli import main"}, "bench imports bagssl.cli"),
    (upwards, {"bench/race.py": "from ..cli import main"}, "bench.race imports bagssl.cli"),
    (upwards, {"study/figures.py": "from bagssl.bench.race import timed"}, "study.figures imports bagssl.bench.race"),
    (circles, {"data.py": "def f():\n    from .probes import g"}, "data imports bagssl.probes"),
    (circles, {"study/a.py": "from . import b", "study/b.py": "import bagssl.study.c",
               "study/c.py": "from .a import x"}, "study.c imports bagssl.study.a"),
    (circles, {"data.py": "import bagssl.data"}, "data imports bagssl.data"),
    (circles, {"bench/race.py": "from bagssl.bench import ROWS"}, "bench imports bagssl.bench.race"),
    (notebook_software, {"data.py": "import torch, pandas as pd"}, "data imports pandas"),
    (notebook_software, {"data.py": "def f():\n    from IPython.display import SVG"}, "data imports IPython.display"),
    (notebook_software, {"probes.py": "try:\n    import matplotlib.pyplot\nexcept ImportError:\n    pass"},
     "probes imports matplotlib.pyplot"),
    (long_functions, {"data.py": function(61)}, "data.long has 61 lines"),
    (long_functions, {"data.py": "class A:\n" + "\n".join(f"    {line}" for line in function(61).splitlines())},
     "data.long has 61 lines"),
    (long_functions, {"pretraining.py": function(31, "step")}, "pretraining.step has 31 lines"),
    (long_functions, {"pretraining.py": function(41, "train")}, "pretraining.train has 41 lines"),
    (long_files, {"study/figures.py": "pass\n" * 451}, "study.figures has 451 lines"),
]  # fmt: skip


@pytest.mark.parametrize("rule, files, fault", LEANING)
def test_a_house_that_leans_is_seen(rule, files, fault, tmp_path):
    for folder, content in (("sound", SOUND), ("leaning", SOUND | files)):
        for name, source in content.items():
            path = tmp_path / folder / "bagssl" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source, encoding="utf-8")
    sound, leaning = (house(tmp_path / folder) for folder in ("sound", "leaning"))
    assert [each(sound) for each in RULES] == [[]] * len(RULES)
    assert f"bagssl.{fault}" in rule(leaning)
    assert [each.__name__ for each in RULES if each(leaning)] == [rule.__name__]


def ruff(*words: str) -> str:
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise", *words],
                          cwd=ROOT, capture_output=True, text=True, check=False)  # fmt: skip
    return done.stdout


def test_ruff_finds_nothing_in_code_tests_and_notebooks(tmp_path):
    assert ruff(".").splitlines() == ["All checks passed!"]
    # negative control: a line of 121 columns, and imports in another order
    (tmp_path / "long.py").write_text(f"import sys\nimport os\n\nprint(sys, os)  {'#' * 106}\n")
    found = ruff("--config", "pyproject.toml", str(tmp_path / "long.py"))  # ruff takes a $ in this path for a variable
    assert "E501" in found and "I001" in found
