"""The pages of the code, by `make docs`: those of the modules, from their docstrings, and the committed notebooks."""

import ast
import os
import re
from pathlib import Path

from bagssl.batch.report import inline, notebook_page
from bagssl.errors import InputError, optional
from bagssl.parameters import notebook_cells
from bagssl.paths import home, write_text
from bagssl.study import tables

STOREYS = {"": "the method", "study": "what the notebooks measure and show", "batch": "what executes notebooks",
           "bench": "the bench"}  # fmt: skip


def write_docs(folder: Path | None = None) -> Path:
    """Write the pages into `folder`, by default build/docs of this checkout; the path of the first.

    Raises InputError where pdoc is absent, or there is no checkout with notebooks.
    """
    folder = Path(folder or home() / "build" / "docs")
    pdoc = optional("pdoc", "the pages of the code are made by pdoc", "docs")
    paths = sorted((home() / "notebooks").glob("*.ipynb"))
    if not paths:
        raise InputError(f"{home()} has no notebooks: `bagssl docs` needs a checkout")
    pdoc.render.configure(math=False, show_source=True, footer_text="bagssl")
    pdoc.pdoc("bagssl", output_directory=folder / "api")
    for path in paths:
        page = folder / "notebooks" / f"{path.stem}.html"
        write_text(page, _led(notebook_page(path), path.parent, page.parent))
    titles = [(path.stem, _title(path)) for path in paths]
    page = tables.render("docs.html.j2", Path(__file__).parent, notebooks=titles, storeys=_modules())
    write_text(folder / "index.html", page)
    return folder / "index.html"


def _led(page: str, here: Path, there: Path) -> str:
    """A page of a notebook in `here` with its links as they are from `there`: to pages of notebooks, and to files."""
    def link(match: re.Match[str]) -> str:
        target = (here / match[1]).resolve()
        own = target.parent == here.resolve() and target.suffix == ".ipynb"
        return f'href="{target.stem}.html"' if own else f'href="{os.path.relpath(target, there.resolve())}"'

    return re.sub(r'href="((?!#|\w+:)[^"?#]+)"', link, page)


def _title(path: Path) -> str:
    first, *_ = notebook_cells(path)
    return "".join(first["source"]).splitlines()[0].removeprefix("# ")


def _modules() -> dict[str, list[tuple[str, str, str]]]:
    """Of each storey its modules: name, page, the first sentence of what it says of itself. In README's order."""
    package = home() / "bagssl"
    readme = (home() / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"\w+", readme.partition("## The code")[2])
    place = {word: at for at, word in reversed(list(enumerate(named)))}
    found: dict[str, list[tuple[str, str, str]]] = {storey: [] for storey in STOREYS.values()}
    for path in sorted(package.rglob("*.py"), key=lambda each: place.get(each.stem, 0)):
        name = ".".join(path.relative_to(package.parent).with_suffix("").parts)
        if path.stem == "__init__" or (said := ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))) is None:
            continue
        first = inline(said.split("\n\n")[0])
        storey = path.parent.name if path.parent != package else ""
        found[STOREYS[storey]].append((name.removeprefix("bagssl."), f"api/{name.replace('.', '/')}.html", first))
    return found
