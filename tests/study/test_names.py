"""A name is plain text wherever it is shown: each way gives it back to who reads it as a browser or TeX does."""

from __future__ import annotations

import json
import re
import warnings
from html.parser import HTMLParser
from unittest import mock

import matplotlib
import matplotlib.pyplot as plt
import mistune
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from nbconvert.filters.markdown_mistune import MarkdownWithMath
from test_claims import GOOD
from test_explore import bags, content

from bagssl.batch import report
from bagssl.data import Images
from bagssl.study import claims, explore, figures, names, tables

cases = settings(max_examples=60, deadline=None, derandomize=True, database=None,
                 suppress_health_check=list(HealthCheck))  # fmt: skip
TYPED = ["$1_$5", "$5_$9", "[x](y)", "![i](u)", "<b>x</b>", "&lt;", "&#36;", "1. a", "- a", "# a", "> a", "a | b",
         "www.a.b", "http://a/_b_", "~~a~~", "[ ] x", "[^1]", r"\(x\)", r"\begin{a}", r"a\|b", "```", "---", "[a]: b",
         ": a", "*a*", "**a**", "__a__", "_a_", "a_b_c", "a__b", "</script>", "007", "{{ a }}", "日本語", "שלום עולם",
         "é\u0301\u0302", "👩‍👩‍👧", "a" * 200, "日" * 200, "\u202eabc", " a  b "]  # fmt: skip
MARKS = st.sampled_from(list("\\`*_{}[]()#+-.!|<>$~&^:;=\"', 1a日é\u0301"))
NAMES = (st.sampled_from(TYPED) | st.text(MARKS, min_size=1)
         | st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="/"), min_size=1))  # fmt: skip


class Page(HTMLParser):
    """The text of each cell and item, and the tags, of HTML."""

    def __init__(self, source: str):
        super().__init__()
        self.texts, self.tags, self.text = [], set(), None
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag in ("td", "th", "li"):
            self.text = ""

    def handle_endtag(self, tag):
        if tag in ("td", "th", "li") and self.text is not None:
            self.texts.append(" ".join(self.text.split()))
            self.text = None

    def handle_data(self, data):
        self.text = None if self.text is None else self.text + data


PLUGINS = ["table", "strikethrough", "url", "task_lists", "def_list", "math", "footnotes"]
READERS = {
    "mistune": mistune.create_markdown(escape=False, plugins=PLUGINS), "the page of results": report._html,
    "nbconvert": lambda source: MarkdownWithMath(renderer=report._Cells(escape=False, attachments={})).render(source),
}  # fmt: skip


def table_of(name: str) -> pd.DataFrame:
    return pd.DataFrame([[name, "1"], ["x", name]], columns=[name, "b"])


def sentence(name: str, plain=names.plain, cell=names.cell) -> str:
    return f"Some:\n\n- {plain(name)}: +1.0 points\n- of **all** {cell(name)} *is* best\n"


def words(*texts: str) -> list[str]:
    return [" ".join(text.split()) for text in texts]


@pytest.mark.parametrize("reader", READERS)
def test_markdown_gives_a_name_back(reader):
    @cases
    @given(NAMES)
    def holds(name):
        shown = names.line(name)
        table = Page(READERS[reader](tables.markdown(table_of(name))))
        assert table.texts == words(shown, "b", shown, "1", "x", shown)
        listed = Page(READERS[reader](sentence(name)))
        assert listed.texts == words(f"{shown}: +1.0 points", f"of all {shown} is best")

    holds()


@pytest.mark.parametrize("name", ["$1_$5 $x$", "[x](y)", "<b>x</b>", "*a*", "- a", "# a", "&lt;", "~~a~~", r"\*"])
def test_a_name_that_is_not_escaped_is_lost(name):
    read = Page(READERS["mistune"](sentence(name, str, str)))
    assert read.texts != words(f"{name}: +1.0 points", f"of all {name} is best")
    assert Page(READERS["mistune"](sentence(name))).texts == words(f"{name}: +1.0 points", f"of all {name} is best")


def test_no_name_holds_what_jupyterlab_takes_for_a_formula():
    """It looks for dollars and backslashes before Markdown is read, and again in the text of each element after it."""
    @cases
    @given(NAMES)
    def holds(name):
        source = names.plain(name) + names.cell(name)
        assert "$" not in source and not re.search(r"\\[a-zA-Z\\]", source)
        for text in re.split(r"<[^>]*>", names.html(name)):
            assert text in ("$", "\\") or not set(text) & set("$\\")

    holds()
    assert "$" in READERS["mistune"](r"\$5 and \$6"), "what an escape would leave"


@cases
@given(NAMES)
def test_a_table_as_html_gives_a_name_back(name):
    html = tables.Table(table_of(name))._repr_html_()
    shown = names.line(name)
    assert Page(html).texts == words(shown, "b", shown, "1", "x", shown)
    assert Page(html).tags <= {"style", "div", "table", "thead", "tbody", "tr", "td", "th", "span", "script"}


def read_tex(source: str) -> str:
    """What TeX would set: its commands for letters, its escapes, an empty group as nothing; no command else."""
    letters = {"textbackslash": "\\", "textasciitilde": "~", "textasciicircum": "^", "textasciigrave": "`",
               "textless": "<", "textgreater": ">", "textbar": "|", "textquotedbl": '"'}  # fmt: skip
    found, place = "", 0
    while place < len(source):
        rest = source[place:]
        if command := re.match(r"\\([a-z]+)\{\}", rest):
            found, place = found + letters[command[1]], place + command.end()
        elif sign := re.match(r"\$\\(pm|times)\$", rest):
            found, place = found + {"pm": "±", "times": "×"}[sign[1]], place + sign.end()
        elif rest[0] == "\\":
            assert rest[1] in "&%$#_{}", source
            found, place = found + rest[1], place + 2
        elif group := re.match(r"\{([*\[]?)\}", rest):
            found, place = found + group[1], place + group.end()
        elif rest.startswith("--"):
            found, place = found + "–", place + 2
        else:
            assert rest[0] not in "&%$#_{}~^`<>|\"" and not re.match("''|,,", rest), source
            found, place = found + rest[0], place + 1
    return found


@cases
@given(NAMES)
@example("[a]--b")
@example("* 'x''")
def test_latex_gives_a_name_back(name):
    head, row = (line.removesuffix(r" \\") for line in tables.latex(table_of(name)).splitlines()[2:6:2])
    for cell in (head.removesuffix(" & b"), row.removesuffix(" & 1")):
        assert read_tex(cell) == names.line(name)
        assert not cell.startswith(("[", "*")), "after the end of a row these are TeX's own"


@pytest.mark.parametrize("wrong", ["a_b", "50 %", "$x$", r"\alpha", "a~b", "{a", "it''s"])
def test_what_is_no_plain_text_in_latex_is_found(wrong):
    with pytest.raises((AssertionError, KeyError)):
        read_tex(wrong)
    assert read_tex(names.tex(wrong)) == wrong


@cases
@given(NAMES)
def test_a_short_name_is_the_name_or_its_beginning(name):
    whole, short = names.line(name), names.short(name, 8)
    assert len(short.split("\n")) == 1 and any(letter.isprintable() and not letter.isspace() for letter in short)
    if short != whole:
        assert short.endswith(names.ELLIPSIS) and whole.startswith(short.removesuffix(names.ELLIPSIS).rstrip())
        assert sum(map(names._columns, short)) <= 8 < sum(map(names._columns, whole))


@pytest.mark.parametrize(("name", "line", "short"), [
    ("horse", "horse", "horse"), ("aquarium_fish and more", "aquarium_fish and more", "aquarium_fish a…"),
    (7, "7", "7"),
    ("日" * 9, "日" * 9, "日" * 7 + "…"), ("  ", "'  '", "'  '"), ("\u200b", r"'\u200b'", r"'\u200b'"), ("", "", ""),
    ("a\nb\u2028 c", "a b c", "a b c"), ("e\u0301" * 16, "e\u0301" * 16, "e\u0301" * 16), ("\udcff", "?", "?"),
])  # fmt: skip
def test_names_in_one_line(name, line, short):
    assert (names.line(name), names.short(name)) == (line, short)


# ---- figures


@pytest.fixture
def styled():
    with plt.rc_context(), warnings.catch_warnings(), mock.patch.object(names, "_told", set()):
        figures.style()
        yield


def titled(name: str) -> plt.Figure:
    return figures.gallery(torch.zeros(1, 2, 3, 4, 4).byte(), None, [[name, name]], "Nearest")


def test_figures_draw_names_as_they_are(styled, capsys):
    @settings(cases, max_examples=15)
    @given(NAMES)
    @example("$1_$5")
    @example("a\\$b$")
    def holds(name):
        figure = titled(name)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", names.MISSING)
            figure.canvas.draw()
        texts = [axis.title.get_text() for axis in figure.axes if axis.images]
        assert texts == [names.short(name)] * 2 and (name not in texts or names.line(name) == name)
        plt.close(figure)

    holds()


def test_as_formulas_they_would_fail_or_be_changed(styled):
    matplotlib.rcParams["text.parse_math"] = True
    with pytest.raises(ValueError, match="1_"):
        titled("$1_$5").canvas.draw()


def test_a_formula_of_our_own_is_one(styled, tmp_path):
    def drawn(asked: bool, math: bool) -> bytes:
        with plt.rc_context({"text.parse_math": math}):
            figure, axis = plt.subplots()
            axis.semilogy([1, 2, 3], [1e-9, 1, 20])
            axis.set_ylabel(r"$|\,L_C\,|$")
            if asked:
                figures.formulas(axis.yaxis)
            figures.save_figure(figure, tmp_path, "formula")
        return (tmp_path / "figures" / "formula.png").read_bytes()

    usual = drawn(asked=False, math=True)
    assert drawn(asked=True, math=False) == usual != drawn(asked=False, math=False)


def test_a_letter_that_the_first_font_lacks_is_taken_from_one_that_has_it(tmp_path, capsys, monkeypatch):
    def drawn(fallbacks: tuple[str, ...], name: str) -> bytes:
        monkeypatch.setattr(names, "FALLBACKS", fallbacks)
        with plt.rc_context(), warnings.catch_warnings():
            warnings.simplefilter("error")
            figures.style()
            figures.save_figure(titled(name), tmp_path, "name")
            figures.save_figure(titled(name), tmp_path, "again")
        return b"".join((tmp_path / "figures" / f"name.{suffix}").read_bytes() for suffix in ("png", "pdf"))

    lacking, serif = "\u1d15", ("No Font At All", "DejaVu Serif")  # matplotlib brings both fonts of DejaVu
    with mock.patch.object(names, "_told", set()):
        plain = drawn((), "horse")
        assert drawn(serif, "horse") == plain, "the first font stays the first"
        found = drawn(serif, lacking)
        assert capsys.readouterr().err == ""
        assert drawn((), lacking) != found
        (told,) = capsys.readouterr().err.splitlines()  # once, for two figures in two formats
        assert told.startswith(f"bagssl: no font on this machine has {lacking}, which figures show as boxes")


def test_a_fallback_without_bold_letters_is_no_matter(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(names, "FALLBACKS", ("cmsy10",))  # matplotlib brings it, in one weight
    with plt.rc_context(), warnings.catch_warnings():
        figures.style()
        assert matplotlib.rcParams["font.family"][1:] == ["cmsy10"]
        figures.save_figure(titled("horse"), tmp_path, "name")  # its heading is bold
        assert caplog.messages == []


def test_another_warning_stays_a_warning():
    with pytest.warns(UserWarning, match="of another kind"), names.missing_letters_told():
        warnings.warn("of another kind", UserWarning, stacklevel=1)


# ---- the explorer, the ledger


@settings(cases, max_examples=15)
@given(st.lists(NAMES, min_size=3, max_size=3, unique=True))
def test_the_explorer_holds_the_names_and_draws_them(classes):
    found = bags()
    some = found.__class__(**{**vars(found), "images": Images(found.images.pixels, found.images.labels, tuple(classes)),
                              "bank": Images(found.bank.pixels, found.bank.labels, tuple(classes))})  # fmt: skip
    html = some._repr_html_()
    assert content(html)["classes"] == [names.line(name) for name in classes]
    assert html.count("</script>") == html.count("<script>") == 1
    assert "mathjax_ignore" in html and not re.search(r"\.innerHTML = .*\$\{data", html)
    with plt.rc_context(), warnings.catch_warnings():
        figures.style()
        figure = explore.growth_figure(some, ks=[1])
        figure.canvas.draw()
        assert [text.get_text() for text in figure.axes[1].get_xticklabels()] == [names.short(name) for name in classes]
    plt.close("all")


@settings(cases, max_examples=25)
@given(NAMES.map(names.line))
@example("007")
@example("1e5")
@example("true")
@example("nan")
def test_the_ledger_gives_back_the_names_of_datasets_and_settings(tmp_path_factory, name):
    folder = tmp_path_factory.mktemp("results")
    rows = pd.DataFrame([{**GOOD, "measure": each.measure, "dataset": name, "setting": name}
                         for each in claims.CLAIMS["C2"].conditions])  # fmt: skip
    ruling = claims.write_evidence(folder / "smoke" / "one", "C2", rows)
    (folder / "smoke" / "one" / "provenance.json").write_text(json.dumps({"hardware": {}}))
    ledger = claims.write_ledger(folder, "smoke")
    assert name in ledger[ledger["claim"] == "C2"]["dataset"].tolist()
    shown = Page(READERS["mistune"]((folder / "smoke" / "claims.md").read_text(encoding="utf-8")))
    assert " ".join(name.split()) in shown.texts and "a" in shown.tags, "the links to the table and the notebook"
    assert shown.texts.count("table, notebook") == 1
    verdict = Page(READERS["nbconvert"](f"- {ruling._repr_markdown_()}")).texts[0]
    assert f" {' '.join(name.split())}: holds." in verdict


@pytest.mark.parametrize("number, short", [(0, "0"), (7, "7"), (994, "990"), (999, "1 k"), (99_968, "100 k"),
                                           (999_680, "1 M"), (2_999_040, "3 M"), (9_996_800, "10 M")])  # fmt: skip
def test_a_number_of_things_in_few_letters(number, short):
    assert names.count(number) == short
