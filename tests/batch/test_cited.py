"""What texts cite from results/ is what stands there, now and after it has changed; what is not there is named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bagssl.batch import cited
from bagssl.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
ACCURACY = "objective,k,accuracy,verdict\ntcr,4,61.94,holds\ntcr,64,67.16,holds\nsimclr,64,,does not hold\n"
TABLE = "| k  | accuracy |\n| -- | -------- |\n| 4  | 61.94    |\n| 64 | 67.16    |\n| 64 | –        |\n"
BENCH = "| row | value |\n| --- | ----- |\n| a   | 1     |\n| b   | 2     |\n"


@pytest.fixture
def text(tmp_path):
    (tmp_path / "bench").mkdir()
    (tmp_path / "accuracy.csv").write_text(ACCURACY, encoding="utf-8")
    (tmp_path / "whole.md").write_text(TABLE, encoding="utf-8")
    (tmp_path / "bench" / "cpu.md").write_text(BENCH, encoding="utf-8")

    def written(body: str) -> Path:
        (tmp_path / "text.md").write_text(body, encoding="utf-8")
        return tmp_path / "text.md"

    return written


def number(shown: str, how: str = "{accuracy:.1f} | objective == 'tcr' and k == 64", path: str = "accuracy.csv") -> str:
    return f'[{shown}]({path} "{how}")'


def test_numbers_and_tables_that_are_right_stay_and_others_are_mended_and_told(text):
    right = (f"A bag of 64: {number('67.2')} %, {number('holds', '{verdict} | k == 4')}; [a link](accuracy.csv).\n\n"
             f"<!-- accuracy.csv -->\n{TABLE}\nand\n\n<!-- whole.md -->\n{TABLE}\n"
             f"<!-- bench/cpu.md -->\n| row | value |\n| --- | ----- |\n| b   | 2     |\n\nEnd.\n")  # fmt: skip
    path = text(right)
    assert cited.refresh(path) == [] and path.read_text(encoding="utf-8") == right
    wrong = right.replace("[67.2]", "[99.9]").replace("| b   | 2     |", "| b   | 7     |").replace("61.94 ", "61.95 ")
    changed = cited.refresh(text(wrong))
    assert path.read_text(encoding="utf-8") == right and len(changed) == 4
    assert f"{path}:1: accuracy.csv: 99.9 is now 67.2" in changed
    assert {line.rsplit(": ", 1)[-1] for line in changed if "now" not in line} == {"accuracy.csv", "whole.md",
                                                                                   "bench/cpu.md"}  # fmt: skip
    # what a run changes, the text follows
    (path.parent / "accuracy.csv").write_text(ACCURACY.replace("67.16", "70.04"), encoding="utf-8")
    assert cited.cite(path)[0].startswith(f"A bag of 64: {number('70.0')} %") and len(cited.cite(path)[1]) == 2


@pytest.mark.parametrize(
    ("body", "names"),
    [
        (number("1", "{accuracy:.1f} | k == 64"), "2 rows are k == 64"),
        (number("1", "{accuracy:.1f} | k == 65"), "0 rows are k == 65"),
        (number("1", "{accuracy:.1f}"), "3 rows are there; one must be"),
        (number("1", "{accurcy:.1f} | k == 4"), "accurcy"),
        (number("1", "{accuracy:.1f} | kk == 4"), "kk"),
        (number("1", "{accuracy:.1f} | k === 4"), "invalid syntax"),
        (number("1", "{accuracy:q} | k == 4"), "format code 'q'"),
        (number("1", path="absent.csv"), "No such file"),
        ("<!-- absent.md -->\n| a |\n", "No such file"),
        ("<!-- accuracy.csv -->\n| a |\n", "are in the"),
    ],
)
def test_what_is_not_there_is_one_line_with_its_place_and_nothing_is_written(text, body, names):
    path = text(f"One line.\n\nThen {number('99.9')} and\n{body}")
    with pytest.raises(InputError) as error:
        cited.refresh(path)
    said = str(error.value)
    assert names in said and "\n" not in said and re.match(rf"{re.escape(str(path))}:[45]: (absent|accuracy)\.", said)
    assert "[99.9]" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", cited.TEXTS)
def test_the_texts_of_this_checkout_say_what_its_record_says(name):
    path = ROOT / name
    text, changed = cited.cite(path)
    assert not changed, f"{changed}; `bagssl report --readme` mends it"
    assert len(cited.CITED.findall(text)) + len(cited.TABLE.findall(text)) > 3
    for link in re.findall(r"\]\((?!https?:)([^)#\s]+)", text):
        assert (path.parent / link).exists(), f"{name} names {link}, which is not there"


def uncited(text: str) -> list[str]:
    """Numbers that a text says by itself: those of names (CIFAR-10, C2), of settings (K = 16) and of code left out."""
    text = re.sub(r"`[^`\n]*`|https?:\S+|arXiv \S+|\]\([^)]*\)", "", cited.TABLE.sub("", cited.CITED.sub("", text)))
    text = re.sub(r"\b(?:C|CIFAR-|ResNet-|H)\d+|\bK = [\d, ]*\d|\b\d+ px\b|\b95 %", "", text)
    return re.findall(r"\S*\d\S*", text)


def test_what_we_learnt_has_no_number_but_from_a_table():
    assert uncited((ROOT / "results" / "README.md").read_text(encoding="utf-8")) == []
    text = f"C2 on CIFAR-10 with K = 4, 16 at 32 px: `a1`, {number('9')} but 67.2 %, and 3 seeds."
    assert uncited(text) == ["67.2", "3"]
