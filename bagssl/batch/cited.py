"""Numbers and tables that a text takes from results/: each says where it stands, and is brought up to date from there.

A number or a verdict is a link to the table that has it; the link's title says how it is written, and which row it is:

    [67.2](laptop/x/tables/accuracy.csv "{accuracy_mean:.1f} | objective == 'tcr' and k == 64 and probe == 'linear'")

A table stands below a comment that names its file: a .md as it is, of a .csv the columns that the text has, of the
bench the rows that it has.
"""

import re
from pathlib import Path

import pandas as pd

from bagssl.errors import InputError
from bagssl.paths import write_text
from bagssl.study import tables

TEXTS = ("README.md", "results/README.md")  # of a checkout
CITED = re.compile(r'\[(?P<shown>[^\[\]]*)\]\((?P<path>[^()\s]+\.csv)\s+"(?P<how>[^"]*)"\)')
TABLE = re.compile(r"<!-- (?P<path>\S+) -->\n(?P<shown>(?:\|.*\n)*)")


def refresh(path: Path) -> list[str]:
    """Bring what a text cites up to date, in its file; what was otherwise before, each in a line, as of `cite`."""
    text, changed = cite(path)
    if changed:
        write_text(path, text)
    return changed


def cite(path: Path) -> tuple[str, list[str]]:
    """The text with what it cites as that is now, and a line for each number and table that the file has otherwise.

    Raises InputError where what is cited is not there, by the line of the text.
    """
    changed: list[str] = []

    def now(match: re.Match[str]) -> str:
        place = f"{path}:{match.string.count(chr(10), 0, match.start()) + 1}: {match['path']}"
        try:
            true = (_number if "how" in match.groupdict() else _table)(path.parent / match["path"], match)
        except (OSError, ValueError, LookupError, SyntaxError, pd.errors.UndefinedVariableError) as error:
            raise InputError(f"{place}: {error or type(error).__name__}") from None
        if true != match["shown"]:
            changed.append(f"{place}: {match['shown']} is now {true}" if "how" in match.groupdict() else place)
        start, end = (at - match.start() for at in match.span("shown"))
        return match[0][:start] + true + match[0][end:]

    return TABLE.sub(now, CITED.sub(now, path.read_text(encoding="utf-8"))), changed


def _number(path: Path, match: re.Match[str]) -> str:
    how, _, which = match["how"].partition("|")
    table = pd.read_csv(path, keep_default_na=False, na_values=[""])
    rows = table.query(which.strip()) if which.strip() else table
    if len(rows) != 1:
        raise ValueError(f"{len(rows)} rows are {which.strip() or 'there'}; one must be")
    return how.strip().format(**rows.iloc[0].to_dict())


def _table(path: Path, match: re.Match[str]) -> str:
    shown = match["shown"].splitlines(keepends=True)
    if path.suffix == ".csv":
        table = pd.read_csv(path, keep_default_na=False).replace("", tables.DASH)
        return tables.markdown(table[_cells(shown[0])] if shown else table)
    true = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if path.parent.name == "bench" and shown:
        wanted = {_cells(row)[0] for row in shown}
        true = [row for row in true if _cells(row)[0] in wanted]
    return "".join(true)


def _cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip().strip("|").split("|")]
