"""The pages of the code: every module and notebook has one, and no link leads nowhere."""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from bagssl import cli
from bagssl.batch import docs

ROOT = Path(__file__).resolve().parents[2]


class Page(HTMLParser):
    """The ids of a page, and where its links lead."""

    def __init__(self, path: Path):
        super().__init__()
        self.links, self.names = [], set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.names |= {values[name] for name in ("id", "name") if values.get(name)}
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])


def broken(folder: Path) -> list[str]:
    """Links within a folder of pages to what is not there: a page, a file, or a place in a page."""
    pages = {path.resolve(): Page(path) for path in folder.rglob("*.html")}
    found = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            there = target.exists() and (not parts.fragment or target not in pages or
                                         unquote(parts.fragment) in pages[target].names)  # fmt: skip
            found += [] if there else [f"{path.relative_to(folder)}: {link}"]
    return found


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> Path:
    return docs.write_docs(tmp_path_factory.mktemp("docs")).parent


def test_every_module_and_notebook_has_a_page_that_the_first_leads_to(pages):
    links = Page(pages / "index.html").links
    modules = {path.relative_to(ROOT).with_suffix(".html") for path in (ROOT / "bagssl").rglob("*.py")
               if path.stem != "__init__"}  # fmt: skip
    notebooks = {f"notebooks/{path.stem}.html" for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert set(links) == {f"api/{path}" for path in modules} | notebooks | {"api/bagssl.html"}
    order = [link for link in links if link.startswith("api/bagssl/")]
    assert order.index("api/bagssl/patches.html") < order.index("api/bagssl/pretraining.html")  # as README has them
    assert "minimise" in (pages / "api/bagssl/objectives.html").read_text(encoding="utf-8")


def test_no_link_is_broken(pages):
    assert broken(pages) == []
    (pages / "stray.html").write_text('<a href="api/nothing.html">x</a> <a href="index.html#nowhere">y</a>')
    try:
        assert broken(pages)[-2:] == ["stray.html: api/nothing.html", "stray.html: index.html#nowhere"]
    finally:
        (pages / "stray.html").unlink()


def test_without_pdoc_or_a_checkout_it_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "pdoc", None)
    assert cli.main(["docs", "--to", str(tmp_path / "docs")]) == 2
    assert "pip install 'bagssl[docs]'" in capsys.readouterr().err and not (tmp_path / "docs").exists()
