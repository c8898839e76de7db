"""README.md, GUIDE.md and the other texts: what they link to is there, and the commands that they show are known."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from bagssl.cli import build_parser

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ["README.md", "GUIDE.md", "results/README.md", "data/README.md", "tests/README.md"]
LINK = re.compile(r"\]\((?!\w+:)([^()\s]*)")  # to a file or a heading, not to the web
MAKE = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))


def headings(text: str) -> set[str]:
    """The anchors of a text, as GitHub names them."""
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken(path: Path) -> list[str]:
    found = []
    for link in LINK.findall(path.read_text(encoding="utf-8")):
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        if not target.exists() or (anchor and anchor not in headings(target.read_text(encoding="utf-8"))):
            found.append(link)
    return found


def absent(text: str) -> list[str]:
    """The files of the package and the notebooks that a text names in `code`, and that are not there."""
    named = re.findall(r"`((?:bagssl|notebooks)/[\w./-]+\.\w+)`", text)
    return [each for each in named if not (ROOT / each).exists()]


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command that stands in `code`, or on an indented line, without its comment."""
    indented = re.findall(r"^    (\S.*)$", text.replace("\\\n", " "), flags=re.MULTILINE)
    for line in re.findall(r"`([^`\n]+)`", text) + indented:
        line = re.sub(r"^(\w+=\S* )+", "", line)  # the environment
        words = re.split(r"[\s\[\]]+", re.sub(r'"[^"]*"', "", line.partition(" #")[0]).strip(" []"))
        if words[0] == "torchrun" and "bagssl.cli" in words:
            words = ["bagssl", *words[words.index("bagssl.cli") + 1 :]]
        if words[0] in ("bagssl", ".venv/bin/bagssl", "make") and len(words) > 1:
            yield [Path(words[0]).name, *words[1:]]


def unknown(words: list[str]) -> list[str]:
    """What of a command its parser, or the Makefile, does not know."""
    if words[0] == "make":
        return [word for word in words[1:] if not (re.fullmatch(r"[A-Z]+=.*", word) or word in MAKE)][:1]
    parser, wrong = build_parser(), []
    for word in words[1:]:
        branches = [each for each in parser._actions if isinstance(each, argparse._SubParsersAction)]
        if branches and not word.startswith("-"):
            chosen = [each for each in word.split("|") if each != "…"]
            if strange := [each for each in chosen if each not in branches[0].choices]:
                return wrong + strange
            parser = branches[0].choices[chosen[0]] if chosen else parser
        elif word.startswith("--") and word.partition("=")[0] not in parser._option_string_actions:
            wrong.append(word)
    return wrong


@pytest.mark.parametrize("name", TEXTS)
def test_no_link_of_a_text_is_broken(name, tmp_path):
    assert broken(ROOT / name) == []
    other = tmp_path / "other.md"
    other.write_text("# A title, *with* signs\n[x](nowhere.md) [y](#a-title-with-signs) [z](#a-title) [w](https://w.org)")
    assert broken(other) == ["nowhere.md", "#a-title"]


def test_files_that_texts_and_notebooks_name_are_there():
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in TEXTS]
    for path in sorted(ROOT.glob("notebooks/*.ipynb")):
        texts += ["".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]
    assert absent("\n".join(texts)) == []
    assert absent("`bagssl/config.py` or `bagssl/paper_values.csv`") == ["bagssl/paper_values.csv"]


@pytest.mark.parametrize("name", TEXTS)
def test_the_commands_that_a_text_shows_are_known(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert [(words, wrong) for words in commands(text) if (wrong := unknown(words))] == []


def test_of_a_command_what_is_not_known_is_named():
    def named(text: str) -> list[str]:
        return [each for words in commands(text) for each in unknown(words)]

    assert len(list(commands((ROOT / "GUIDE.md").read_text(encoding="utf-8")))) > 30
    assert named("`bagssl reprodcue X`, `bagssl runs list|shwo`, `make lba`") == ["reprodcue", "shwo", "lba"]
    assert named("    bagssl reproduce X --profile laptop --jbos 2  # --no matter\n") == ["--jbos"]
    assert named("    torchrun -m bagssl.cli pretrain --objectve tcr\n`make lab LAB=x`") == ["--objectve"]
    assert named("`bagssl --loud runs list`") == ["--loud"]
