"""Names as plain text wherever they are shown: no name of a class, a dataset or a choice is markup.

Figures draw text as it is (`figures.style`), in fonts that have its letters; tables, sentences and pages escape.
"""

import contextlib
import re
import sys
import unicodedata
import warnings
from collections.abc import Iterator
from html import escape

from matplotlib import font_manager

# Asked in this order for letters that the first font of a figure lacks: those found on the machine count.
FALLBACKS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "Noto Sans CJK TC", "Noto Sans SC", "Noto Sans JP",
    "Source Han Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Droid Sans Fallback", "IPAexGothic",
    "IPAGothic", "TakaoGothic", "VL Gothic", "NanumGothic", "UnDotum", "PingFang SC", "Hiragino Sans",
    "Hiragino Sans GB", "Apple SD Gothic Neo", "Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "SimHei",
    "Noto Sans Arabic", "Noto Sans Hebrew", "Noto Sans Devanagari", "Noto Sans Bengali", "Noto Sans Tamil",
    "Noto Sans Thai", "Noto Sans Ethiopic", "Noto Sans Symbols", "Noto Sans Symbols 2", "Noto Emoji", "Symbola",
    "FreeSans", "Arial Unicode MS", "Unifont", "Unifont Upper")  # fmt: skip
ELLIPSIS = "…"


def fallback_fonts() -> list[str]:
    """Those of FALLBACKS that matplotlib finds on this machine."""
    found = set(font_manager.get_font_names())
    return [name for name in FALLBACKS if name in found]


def line(text: object) -> str:
    """A text in one line; one of nothing but blanks as Python writes it."""
    written = str(text).encode(errors="replace").decode()
    if written and not any(unicodedata.category(letter)[0] in "LNPS" for letter in written):
        return ascii(written)
    return " ".join(written.split())


def short(text: object, columns: int = 16) -> str:
    """A name for a figure: in one line, and beyond so many letters' widths cut off by an ellipsis."""
    whole, kept, left = line(text), "", columns - len(ELLIPSIS)
    if sum(map(_columns, whole)) <= columns:
        return whole
    for letter in whole:
        left -= _columns(letter)
        if left < 0:
            break
        kept += letter
    return kept.rstrip() + ELLIPSIS


def _columns(letter: str) -> int:
    if unicodedata.category(letter) in ("Mn", "Me", "Cf"):  # it is drawn over another, or not at all
        return 0
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1


# ---- letters that no font has

MISSING = "Glyph [0-9]+ .* missing from font"  # how matplotlib's warning of each begins
_told: set[str] = set()


@contextlib.contextmanager
def missing_letters_told() -> Iterator[None]:
    """In the place of matplotlib's warning for each letter that no font has one line for all, once in a process."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", MISSING)
        yield
    missing = set()
    for each in caught:
        if re.match(MISSING, str(each.message)):
            missing.add(chr(int(str(each.message).split()[1])))
        else:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
    if missing := missing - _told:
        _told.update(missing)
        print(f"bagssl: no font on this machine has {' '.join(sorted(missing))}, which figures show as boxes: install "
              "one that has, for example Noto Sans CJK or Unifont", file=sys.stderr)  # fmt: skip


# ---- escaped

# JupyterLab looks for formulas, between dollars and after backslashes, before it reads Markdown and once more in what
# came of it, escaped or not: such a letter begins none in an element of its own.
_MARKS = re.compile(r"(?P<formula>[$\\])|[*`<|]|\](?=[(\[])|(?<!\s)~|~(?!\s)|&(?=[#\w])|(?<![^\W_])_|_(?![^\W_])"
                    r"|:(?=//)|(?<=[wW]{3})\.")  # fmt: skip


def cell(text: object) -> str:
    """A text as Markdown that reads as it stands, in a table or after other words of a line."""
    return _MARKS.sub(lambda mark: f"<span>&#{ord(mark[0])};</span>" if mark["formula"] else f"\\{mark[0]}", line(text))


def plain(text: object) -> str:
    """A text as Markdown that reads as it stands, also where a line or an item of a list begins with it.

    There a name could be a heading, a quotation, an item `1.` of another list, or a definition.
    """
    return re.sub(r"^(\d*)([#>+=:\[.)-])", r"\1\\\2", cell(text))


def html(text: object) -> str:
    """A text as HTML that reads as it stands."""
    return re.sub(r"[$\\]", r"<span>\g<0></span>", escape(line(text)))


# ---- LaTeX

_TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "`": r"\textasciigrave{}",
        "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}",
        "±": r"$\pm$", "×": r"$\times$", "–": "--", **{mark: f"\\{mark}" for mark in "&%$#_{}"}}  # fmt: skip


def tex(text: object) -> str:
    """A text as LaTeX that reads as it stands, in a table."""
    written = "".join(_TEX.get(letter, letter) for letter in re.sub(r"([-',])(?=\1)", "\\1\0", line(text)))
    written = re.sub(r"^[*\[]", r"{\g<0>}", written)  # after \\ an option, or a star of it
    return written.replace("\0", "{}")


def count(number: int) -> str:
    """A number of things in few letters, to two digits: 0, 100 k, 3 M."""
    size, unit = next(((size, unit) for size, unit in ((1e6, " M"), (1e3, " k")) if number >= 0.995 * size), (1, ""))
    return f"{float(f'{number / size:.2g}'):g}{unit}"
