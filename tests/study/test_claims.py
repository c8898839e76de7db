"""The rules on made-up results: each verdict, per claim; evidence that cannot be judged is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd
import pytest

from bagssl.errors import InputError
from bagssl.study import claims, comparison
from bagssl.study.claims import CLAIMS, FAILS, HOLDS, MISSING, UNDECIDED, Condition


def row(condition: Condition, shift: float, half: float = 0.0, dataset: str = "") -> dict:
    """Evidence for one condition: its threshold shifted to the right side (up or down), an interval around it."""
    value = condition.above + shift if condition.below is None else condition.below - shift
    return {"dataset": condition.dataset or dataset or "cifar10", "setting": "simclr, K = 16", "unit": condition.unit,
            "measure": condition.measure, "value": value, "low": value - half, "high": value + half}


CROP, BAG = CLAIMS["C2"].conditions
SEVERAL = [*({**row(CROP, shift, 1.0), "setting": f"arm {shift}"} for shift in (9.0, 0.5, 4.0)), row(BAG, 9.0, 1.0)]


def evidence(claim: str, dataset: str, shifts: dict[int, float] | None = None, half: float = 0.0) -> pd.DataFrame:
    """All conditions met by 5e-5, but for the conditions that `shifts` names by position."""
    conditions = CLAIMS[claim].on(dataset)
    return pd.DataFrame([row(each, (shifts or {}).get(i, 5e-5 if not each.below or each.below > 5e-5 else 5e-11),
                             half, dataset) for i, each in enumerate(conditions)])


def verdict(claim: str, frame: pd.DataFrame) -> str:
    """What the ledger says of evidence from one dataset."""
    (entry,) = claims.Ruling(claim, claims.checked(claim, frame, f"evidence for {claim}")).entries
    return entry["verdict"]


CASES = [(claim, dataset) for claim in CLAIMS
         for dataset in (("discrete joints", "synthetic") if claim == "C1" else ("cifar10",))]
each_claim = pytest.mark.parametrize(("claim", "dataset"), CASES, ids=[" ".join(case) for case in CASES])


@each_claim
def test_it_holds_when_every_interval_is_past_its_threshold(claim, dataset):
    assert verdict(claim, evidence(claim, dataset)) == HOLDS
    assert verdict(claim, pd.concat([evidence(claim, dataset)] * 3)) == HOLDS


@each_claim
def test_one_condition_on_the_wrong_side_is_enough_for_it_not_to_hold(claim, dataset):
    for i in range(len(CLAIMS[claim].on(dataset))):
        wrong = evidence(claim, dataset, {i: -1e-3})
        assert verdict(claim, wrong) == FAILS
        assert verdict(claim, pd.concat([evidence(claim, dataset), wrong])) == FAILS


@each_claim
def test_an_interval_across_the_threshold_leaves_it_undecided(claim, dataset):
    for i in range(len(CLAIMS[claim].on(dataset))):
        wide = evidence(claim, dataset)
        wide.loc[i, ["low", "high"]] = [wide.loc[i, "value"] - 10, wide.loc[i, "value"] + 10]
        assert verdict(claim, wide) == UNDECIDED


@each_claim
def test_a_condition_without_evidence_leaves_it_undecided_but_cannot_save_it(claim, dataset):
    count = len(CLAIMS[claim].on(dataset))
    for i in range(count if count > 1 else 0):
        assert verdict(claim, evidence(claim, dataset).drop(index=i)) == UNDECIDED
        other = (i + 1) % count
        assert verdict(claim, evidence(claim, dataset, {other: -1e-3}).drop(index=i)) == FAILS


@each_claim
def test_without_evidence_it_is_not_measured(claim, dataset):
    assert verdict(claim, evidence(claim, dataset).iloc[:0]) == MISSING


@pytest.mark.parametrize(("claim", "measure", "good", "bad"), [
    ("C1", "identity error", 9e-11, 1.1e-10),
    ("C1", "gap to the closed form", 9e-5, 1.1e-4),
    ("C1", "correlation, spectral", 0.91, 0.89),
    ("C1", "correlation, spectral over untrained", 0.01, -0.01),
    ("C2", "patch-based bag over multi-scale centre crop", -1.9, -2.1),
    ("C2", "patch-based bag over multi-scale bag", -1.9, -2.1),
    ("C3", "small-patch bag over untrained", 0.1, -0.1),
    ("C3", "small-patch bag over the largest scale", -1.9, -2.1),
    ("C4", "centred cosine", 0.81, 0.79),
    ("C4", "centred cosine over another image's patches", 0.01, -0.01),
    ("C4", "centred cosine over an untrained encoder", 0.01, -0.01),
    ("C5", "position R2 of patches", 0.01, -0.01),
    ("C5", "neighbours of the same class over chance", 0.01, -0.01),
    ("C5", "shift sensitivity, patch over bag", 0.01, -0.01),
    ("C6", "position R2, h over z", 0.01, -0.01),
    ("C6", "shift sensitivity, h over z", 0.01, -0.01),
    ("C6", "scale sensitivity, h over z", 0.01, -0.01),
    ("C6", "colour sensitivity, h over z", 0.01, -0.01),
    ("C7", "bag over centre crop", 0.1, -0.1),
    ("C7", "median gain over objectives", 2.1, 1.9),
])  # fmt: skip
def test_the_thresholds_are_those_that_were_fixed(claim, measure, good, bad):
    (condition,) = (each for each in CLAIMS[claim].conditions if each.measure == measure)
    assert condition.judge(good, good)[0] == HOLDS
    assert condition.judge(bad, bad)[0] == FAILS
    assert condition.judge(*sorted((good, bad)))[0] == UNDECIDED


def test_no_rule_is_left_out_of_the_list_above():
    (listed,) = test_the_thresholds_are_those_that_were_fixed.pytestmark
    assert {case[:2] for case in listed.args[1]} == {(c, each.measure) for c in CLAIMS for each in CLAIMS[c].conditions}


@pytest.mark.parametrize("condition", [Condition("m", above=0.5), Condition("m", below=0.5)])
def test_the_threshold_itself_is_on_the_wrong_side(condition):
    assert condition.judge(0.5, 0.5)[0] == FAILS
    assert condition.judge(0.4, 0.6)[0] == UNDECIDED


def test_a_measure_that_no_rule_names_decides_nothing():
    raw = {"measure": "raw cosine", "value": -9, "low": -9, "high": -9}
    more = pd.DataFrame([{**evidence("C4", "cifar10").iloc[0], **raw}])
    assert verdict("C4", pd.concat([evidence("C4", "cifar10"), more])) == HOLDS


def test_rows_without_an_encoder_are_our_own_whatever_stands_in_for_it(tmp_path):
    ours, theirs = evidence("C5", "cifar10", {0: -0.2}), evidence("C5", "cifar10")
    rows = [*ours.to_dict("records"), *theirs.assign(encoder="theirs").to_dict("records")]
    ruling = claims.write_evidence(tmp_path, "C5", pd.DataFrame(rows))  # NaN, where a row has no such key
    assert [(each["encoder"], each["verdict"]) for each in ruling.entries] == [("", FAILS), ("theirs", HOLDS)]
    assert len(ruling.rows) == len(rows)


def test_a_measure_that_is_asked_on_another_dataset_is_listed():
    other = evidence("C1", "discrete joints").iloc[:1].assign(dataset="synthetic")
    rows = pd.concat([evidence("C1", "synthetic"), other])
    shown = claims.Ruling("C1", claims.checked("C1", rows, "rows")).rows
    assert shown["state"].tolist() == [HOLDS, HOLDS, "decides nothing"]


# ---- random weights, a control


def random_weights(claim: str, shifts: dict[int, float], keep: int | None = None) -> pd.DataFrame:
    return evidence(claim, "cifar10", shifts).assign(setting="untrained", weights="random").iloc[:keep]


@pytest.mark.parametrize(("shifts", "keep", "said"), [
    ({}, None, HOLDS), ({2: -0.1}, None, FAILS), ({2: -0.1}, 2, HOLDS)], ids=["all", "one fails", "it is not asked"])
def test_random_weights_decide_nothing_and_the_ledger_says_what_the_rule_says_of_them(shifts, keep, said, tmp_path):
    control, ours = random_weights("C5", shifts, keep), evidence("C5", "cifar10", {0: -0.2})
    ruling = claims.write_evidence(tmp_path, "C5", pd.concat([ours, control]))
    (found,) = ruling.entries
    assert (found["verdict"], found[claims.CONTROL]) == (FAILS, said) and "untrained" not in found["value"]
    assert (ruling.rows["state"] == "decides nothing").sum() == len(control)
    assert f"random weights by the same rule: {said}" in ruling._repr_html_()
    assert f"Random weights by the same rule, cifar10: {said}." in ruling._repr_markdown_()
    read = claims.checked("C5", pd.read_csv(tmp_path / "tables/claim_c5.csv", keep_default_na=False), "read")
    assert claims.Ruling("C5", read).entries == ruling.entries
    (without,) = claims.write_evidence(tmp_path, "C5", ours).entries
    assert without[claims.CONTROL] == "" and {**found, claims.CONTROL: ""} == without


def test_random_weights_of_another_scale_than_the_rule_asks_for_are_not_asked(tmp_path):
    small, large = (random_weights("C4", {0: shift}, 2).assign(scale=scale)
                    for shift, scale in ((-0.1, 0.2), (0.1, 0.6)))
    both = pd.concat([evidence("C4", "cifar10").assign(scale=0.2), small, large])
    assert claims.control("C4", both) == FAILS
    assert claims.control("C4", both[both["scale"] == 0.6]) == ""


@pytest.mark.parametrize(("frame", "said"), [
    (random_weights("C5", {}), "on cifar10, random weights alone decide nothing"),
    (evidence("C5", "cifar10").assign(weights="trained"), "its weights are neither empty nor random"),
])
def test_a_control_that_can_not_be_one_is_refused(frame, said, tmp_path):
    with pytest.raises(InputError, match=said):
        claims.write_evidence(tmp_path, "C5", frame)


# ---- rules that were changed


def at_scales(**nearness: float) -> pd.DataFrame:
    """Evidence for C4: how far the centred cosine is above its threshold with patches of each scale."""
    return pd.concat([evidence("C4", "cifar10", {0: shift}).assign(scale=float(scale[1:]) / 100, setting=scale)
                      for scale, shift in nearness.items()])  # fmt: skip


@pytest.mark.parametrize(("frame", "now", "before"), [
    (at_scales(s20=-0.2, s40=0.07, s66=0.16), FAILS, "does not hold at 0.2; holds at 0.4, 0.66"),
    (at_scales(s10=-0.3, s20=0.05, s25=0.06, s66=0.1), HOLDS, "does not hold at 0.1; holds at 0.2, 0.25, 0.66"),
    (at_scales(s20=0.05, s25=-0.01), FAILS, "holds at 0.2; does not hold at 0.25"),  # all of the scales that decide
    (at_scales(s10=0.1, s66=0.1), UNDECIDED, "holds at 0.1, 0.66"),  # none of them was asked
    (evidence("C4", "cifar10"), HOLDS, HOLDS), (evidence("C4", "cifar10", {0: -0.1}), FAILS, FAILS),  # no scale
])  # fmt: skip
def test_c4_is_decided_at_small_patches_and_the_verdict_before_is_told_of_each_scale(frame, now, before):
    (entry,) = claims.Ruling("C4", checked := claims.checked("C4", frame, "")).entries
    assert (entry["verdict"], entry[claims.FORMER]) == (now, before)
    assert "0.2 to 0.25" in entry["rule"] and "changed: " in entry["rule"]
    if now == UNDECIDED:
        assert entry["value"] == MISSING
    shown = claims.Ruling("C4", checked)
    nothing = int((~checked["scale"].between(0.2, 0.25) & checked["scale"].notna()).sum())
    assert shown.rows["state"].tolist().count("decides nothing") == nothing
    for text in (shown._repr_markdown_(), shown._repr_html_()):
        assert before in text.replace("\\", "") and "0.2 to 0.25" in text


def test_the_verdict_before_leaves_out_what_was_added_and_a_rule_that_was_kept_has_none():
    (entry,) = claims.Ruling("C2", claims.checked("C2", evidence("C2", "cifar10", {1: -1.0}), "")).entries
    assert (entry["verdict"], entry[claims.FORMER]) == (FAILS, HOLDS)
    (entry,) = claims.Ruling("C2", claims.checked("C2", evidence("C2", "cifar10", {0: -1.0}), "")).entries
    assert (entry["verdict"], entry[claims.FORMER]) == (FAILS, FAILS)
    (entry,) = claims.Ruling("C7", claims.checked("C7", evidence("C7", "cifar10"), "")).entries
    assert entry[claims.FORMER] == "" and "changed" not in entry["rule"]


def test_scales_read_back_from_the_table_and_stand_in_the_ledger(tmp_path):
    frame = pd.concat([at_scales(s20=-0.2, s66=0.1), at_scales(s20=0.05, s66=0.1).assign(encoder="theirs")])
    experiment(tmp_path, "one", {"C4": frame.fillna({"encoder": ""})})
    found = claims.write_ledger(tmp_path, "smoke").query("claim == 'C4'").set_index("encoder")
    assert found["verdict"].to_dict() == {"": FAILS, "theirs": HOLDS}
    assert found[claims.FORMER].to_dict() == {"": "does not hold at 0.2; holds at 0.66", "theirs": "holds at 0.2, 0.66"}
    assert claims.FORMER in (tmp_path / "smoke/claims.md").read_text()


GOOD = row(CLAIMS["C2"].conditions[0], 5.0, 1.0)


@pytest.mark.parametrize(("claim", "frame", "fault"), [
    ("C9", [GOOD], "no such claim"),
    ("C2", [{k: v for k, v in GOOD.items() if k not in ("low", "unit")}], "missing columns: low, unit"),
    ("C2", [GOOD, {**GOOD, "value": float("nan")}], "finite"),
    ("C2", [GOOD, {**GOOD, "high": "many\nlines"}], "finite"),
    ("C2", [{**GOOD, "high": float("inf")}], "finite"),
    ("C2", [GOOD, {**GOOD, "low": 5.0, "high": 4.0}], "low is above high"),
    ("C2", [{**GOOD, "unit": "%"}], "unit"), ("C2", [{**GOOD, "scale": 20}], "no share of an image's area"),
    ("C2", [{**GOOD, "measure": "patch based bag"}], "none of its measures is in the rule"),
    ("C1", [{**GOOD, "measure": "correlation, spectral"}], "none of its measures is in the rule"),
])  # fmt: skip
def test_wrong_evidence_is_refused_in_one_line(claim, frame, fault, tmp_path):
    for refuse in (lambda: verdict(claim, pd.DataFrame(frame)),
                   lambda: claims.write_evidence(tmp_path, claim, pd.DataFrame(frame))):
        with pytest.raises(InputError, match=fault) as error:
            refuse()
        assert "\n" not in str(error.value)
    assert list(tmp_path.rglob("*")) == []
    claims.write_evidence(tmp_path, "C2", pd.DataFrame([GOOD]))  # and what is right is taken


@pytest.mark.parametrize(("changed", "shown"), [
    ({}, "+3.0 points (2.0 to 4.0)"),
    ({"value": -0.5, "low": -3.0, "high": 2.0}, "-0.5 points (-3.0 to 2.0)"),
    ({"measure": "centred cosine", "unit": "", "value": 0.95123, "low": 0.95, "high": 0.9567},
     "0.951 (0.950 to 0.957)"),
    ({"measure": "identity error", "unit": "", "value": 3.11e-16, "low": 3.11e-16, "high": 3.11e-16}, "3.11e-16"),
    ({"measure": "position R2, h over z", "unit": "", "value": 0.25, "low": 0.2, "high": 0.3},
     "+0.250 (0.200 to 0.300)"),
])  # fmt: skip
def test_a_value_is_shown_with_its_interval_and_a_difference_with_its_sign(changed, shown):
    assert claims.text({**GOOD, **changed}) == shown


# ---- what an experiment shows of its evidence


def test_a_ruling_shows_what_the_ledger_will_say(tmp_path):
    frame = pd.DataFrame([*SEVERAL, {**row(BAG, 1.0, 0.5, "food"), "measure": CROP.measure},
                          {**row(BAG, 1.0), "measure": "something else"}])
    experiment(tmp_path, "one", {"C2": frame})
    ruling = claims.write_evidence(tmp_path / "two", "C2", frame)
    said = [entry(claims.ledger(tmp_path, "smoke"), "C2", dataset) for dataset in ("cifar10", "food")]
    assert [each["verdict"] for each in said] == [UNDECIDED, UNDECIDED]  # of food the bag is missing
    html = ruling._repr_html_()
    for each in said:
        for shown in (repr(ruling), ruling._repr_markdown_(), html):
            assert each["verdict"] in shown and each["dataset"] in shown
        assert f"C2, {each['dataset']}: {each['verdict']} ({each['measure']} {each['value']})" in repr(ruling)
        assert f"{each['measure']}: {each['value']}" in html
    assert html.count("<circle") == 3, "the intervals of the measure that decides"
    assert ruling.rows["state"].tolist().count("decides nothing") == 1 and len(ruling.rows) == len(frame) + 1
    assert ruling.rows.query("measure == @CROP.measure")["asked"].eq("above -2 points").all()


def test_a_ruling_without_evidence_says_that_nothing_was_measured(tmp_path):
    ruling = claims.write_evidence(tmp_path, "C4", evidence("C4", "cifar10").iloc[:0])
    for shown in (repr(ruling), ruling._repr_markdown_(), ruling._repr_html_()):
        assert MISSING in shown and "nan" not in shown


def test_nothing_in_evidence_is_markup(tmp_path):
    frame = evidence("C4", "cifar10").assign(setting="<script>alert(1)</script>", dataset="<b>")
    html = claims.write_evidence(tmp_path, "C4", frame)._repr_html_()
    assert "<script>alert" not in html and "<b>:" not in html and "&lt;script&gt;alert" in html


# ---- the ledger


def experiment(results: Path, name: str, written: dict[str, pd.DataFrame], processor: str = "Abacus") -> Path:
    folder = results / "smoke" / name
    for claim, frame in written.items():
        claims.write_evidence(folder, claim, frame)
    made = {"hardware": {"processor": processor, "cores": 2, "gpu": None}, "data": {}, "notebook": "02.ipynb"}
    (folder / "provenance.json").write_text(json.dumps(made))
    return folder


def entry(ledger: pd.DataFrame, claim: str, dataset: str = "") -> dict:
    (found,) = ledger[(ledger["claim"] == claim) & (ledger["dataset"] == dataset)].to_dict("records")
    return found


def test_an_encoder_that_others_trained_has_rows_of_its_own(tmp_path):
    """Neither does it decide of our models, nor they of it, in the ledger, in a notebook and after a table is read."""
    ours, theirs = evidence("C4", "cifar10"), evidence("C4", "cifar10", {0: -3.0}).assign(encoder="vicreg-others")
    experiment(tmp_path, "ours", {"C4": ours})
    experiment(tmp_path, "both", {"C4": pd.concat([ours.assign(encoder=""), theirs])})
    ledger = claims.ledger(tmp_path, "smoke")
    found = ledger[ledger["claim"] == "C4"].set_index("encoder")["verdict"].to_dict()
    assert found == {"": HOLDS, "vicreg-others": FAILS}
    tables = [tmp_path / "smoke" / name / "tables/claim_c4.csv" for name in ("ours", "both")]
    header = [path.read_text().splitlines()[0] for path in tables]
    columns = "dataset,setting,measure,value,low,high,unit"
    assert header == [columns, f"{columns},encoder"]
    ruling = claims.Ruling("C4", claims.checked("C4", pd.concat([ours.assign(encoder=""), theirs]), ""))
    assert ruling.verdicts == "cifar10: C4 holds\ncifar10, vicreg-others: C4 does not hold"
    for shown in (ruling._repr_html_(), ruling._repr_markdown_()):
        assert "cifar10, vicreg-others" in shown
    assert "encoder" in ruling.rows and "encoder" not in claims.Ruling("C4", claims.checked("C4", ours, "")).rows
    claims.write_ledger(tmp_path, "smoke")
    assert "vicreg-others" in (tmp_path / "smoke/claims.md").read_text()


@pytest.mark.parametrize(("verdicts", "words"), [
    ([claims.FAILS] * 3, "holds at none of 3 points from 0 to 2,000 crops"),
    ([claims.HOLDS] * 3, "holds at each of 3 points from 0 to 2,000 crops"),
    ([claims.UNDECIDED] * 3, "is undecided at each of 3 points from 0 to 2,000 crops"),
    ([claims.FAILS, claims.UNDECIDED, claims.UNDECIDED],
     "does not hold at 0, then is undecided from 1,000 to 2,000 crops"),
    ([claims.FAILS, claims.HOLDS, claims.FAILS],
     "does not hold at 0, then holds at 1,000, then does not hold at 2,000 crops"),
])  # fmt: skip
def test_verdicts_along_a_training_are_told_in_their_order(verdicts, words):
    along = dict(zip((0, 1000, 2000), verdicts, strict=True))
    assert claims.story(along) == claims.story(dict(reversed(along.items()))) == words


def test_the_ledger_says_where_the_models_were_trained(tmp_path):
    folder = experiment(tmp_path, "one", {"C4": evidence("C4", "cifar10")})
    machines = {"a": {"processor": "Abacus", "cores": 2}, "b": {"gpu": "Engine"}, "c": {"gpu": "Engine"}}
    record = json.loads((folder / "provenance.json").read_text()) | {"runs": []}
    models = folder.with_name("runs")
    for name, made in {**machines, "another's": {"gpu": "Loom"}}.items():
        (models / name).mkdir(parents=True)
        (models / name / "provenance.json").write_text(json.dumps({"hardware": made}))
    for name in machines:
        record["runs"].append(name)
        (folder / "provenance.json").write_text(json.dumps(record))
        assert claims.hardware(folder) == "Abacus, 2 cores" + "; models from Engine" * (name != "a")
    (models / "c/provenance.json").write_text("damaged")
    assert claims.hardware(folder) == "Abacus, 2 cores; models from Engine"


def test_the_ledger_has_a_row_per_claim_and_dataset_with_the_worst_value(tmp_path):
    several = pd.DataFrame(SEVERAL)
    experiment(tmp_path, "one", {"C2": several, "C4": evidence("C4", "cifar10").drop(index=1)})
    other = pd.concat([several.assign(dataset="synthetic", setting="arm"), evidence("C2", "food", {0: -3.0})])
    experiment(tmp_path, "two", {"C2": other.iloc[[0, 3, 4, 5]]}, "Difference engine")
    ledger = claims.ledger(tmp_path, "smoke")

    assert list(ledger.columns) == claims.LEDGER
    assert ledger["claim"].tolist() == ["C1", "C2", "C2", "C2", "C3", "C4", "C5", "C6", "C7"]
    found = entry(ledger, "C2", "cifar10")
    assert found["verdict"] == UNDECIDED and found["value"] == "-1.5 points (-2.5 to -0.5); worst of 3: arm 0.5"
    sides = ("centre crop", "bag")
    rule = [f"patch-based bag over multi-scale {side} above -2 points" for side in sides]
    assert found["rule"] == "; ".join([*rule, CLAIMS["C2"].notes]) and "harder" in CLAIMS["C2"].notes
    assert (found["table"], found["notebook"]) == ("one/tables/claim_c2.csv", "one/one.ipynb")
    assert entry(ledger, "C2", "synthetic")["verdict"] == HOLDS
    assert entry(ledger, "C2", "synthetic")["hardware"] == "Difference engine, 2 cores"
    assert entry(ledger, "C2", "food")["verdict"] == FAILS
    missing = entry(ledger, "C4", "cifar10")
    assert missing["verdict"] == UNDECIDED and missing["value"] == MISSING
    assert missing["measure"] == "centred cosine over another image's patches" and missing["table"]
    assert entry(ledger, "C3", "imagenet")["verdict"] == MISSING
    nothing = entry(ledger, "C7")
    assert nothing["verdict"] == MISSING and nothing["value"] == "" and nothing["rule"].count(" above ") == 2


def test_imagenet_stays_in_the_ledger_beside_what_was_measured(tmp_path):
    experiment(tmp_path, "scale", {"C3": evidence("C3", "cifar10")})
    ledger = claims.ledger(tmp_path, "smoke")
    assert entry(ledger, "C3", "cifar10")["verdict"] == HOLDS and entry(ledger, "C3", "imagenet")["verdict"] == MISSING
    experiment(tmp_path, "imagenet", {"C3": evidence("C3", "imagenet", {0: -1.0})})
    assert entry(claims.ledger(tmp_path, "smoke"), "C3", "imagenet")["verdict"] == FAILS


def test_unfinished_and_failed_experiments_are_no_evidence(tmp_path):
    folder = experiment(tmp_path, "one", {"C2": evidence("C2", "cifar10")})
    folder.rename(folder.with_name(".one.failed"))
    claims.write_evidence(tmp_path / "smoke" / "running", "C2", evidence("C2", "cifar10"))  # no provenance yet
    assert set(claims.ledger(tmp_path, "smoke")["verdict"]) == {MISSING}


def test_evidence_reads_back_as_it_was_written(tmp_path):
    frame = evidence("C1", "discrete joints", {0: 9.99e-11}).assign(setting="4 x 4, |V| = 2, \"none\"", unit="")
    folder = experiment(tmp_path, "one", {"C1": frame})
    found = claims.collect(tmp_path, "smoke")
    pd.testing.assert_frame_equal(found[claims.COLUMNS], frame[claims.COLUMNS], rtol=1e-5)
    assert "9.99e-11" not in (folder / "tables/claim_c1.md").read_text()  # the value, not its distance
    assert re.search(r"1.00e-13", (folder / "tables/claim_c1.md").read_text())


@pytest.mark.parametrize("content", ["", "dataset,value\nx,1\n", "\x00\xff", "a,b\n1,2,3\n1,2,3,4,5\n"])
def test_a_damaged_table_is_named_in_one_line(content, tmp_path):
    folder = experiment(tmp_path, "one", {"C2": evidence("C2", "cifar10")})
    (folder / "tables/claim_c2.csv").write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=r"claim_c2\.csv") as error:
        claims.write_ledger(tmp_path, "smoke")
    assert "\n" not in str(error.value) and not (tmp_path / "smoke/claims.csv").exists()


def test_the_ledger_is_written_twice_the_same(tmp_path):
    experiment(tmp_path, "one", {"C2": evidence("C2", "cifar10")})
    ledger = claims.write_ledger(tmp_path, "smoke")
    files = [tmp_path / "smoke" / f"claims.{suffix}" for suffix in ("csv", "md")]
    before = [path.read_bytes() for path in files]
    pd.testing.assert_frame_equal(pd.read_csv(files[0], keep_default_na=False), ledger)
    assert b"[table](one/tables/claim_c2.csv), [notebook](one/one.ipynb)" in before[1]
    claims.write_ledger(tmp_path, "smoke")
    assert [path.read_bytes() for path in files] == before
    assert sorted(path.name for path in (tmp_path / "smoke").iterdir()) == ["claims.csv", "claims.md", "one"]


def gains(points: float) -> pd.DataFrame:
    pairs = [("patch-based, K = 16", "multi-scale, K = 16"), ("patch-based, K = 16", "multi-scale, centre crop"),
             ("multi-scale, K = 16", "untrained, K = 16")]
    return pd.DataFrame([{"objective": "tcr", "probe": probe, "first": first, "second": second, "points": points,
                          "low": points - 1, "high": points + 1, "seeds": 2, "verdict": "above"}
                         for probe in ("linear", "knn") for first, second in pairs])


@pytest.mark.parametrize(("points", "expected"), [(5, HOLDS), (-0.5, HOLDS), (-2, UNDECIDED), (-5, FAILS)])
def test_the_comparison_decides_c2_by_the_bag_over_the_centre_crop_and_over_the_bag(points, expected):
    found = comparison.evidence(gains(points), "cifar10")
    assert found["setting"].tolist() == ["tcr, linear, K = 16, 2 seeds"] * 2 + ["tcr, knn, K = 16, 2 seeds"] * 2
    alone = comparison.evidence(gains(points).assign(seeds=1), "cifar10")
    assert alone["setting"].iloc[0] == "tcr, linear, K = 16, 1 seed"
    assert verdict("C2", found) == expected
    crop, bag = (gains(points)["second"] == f"multi-scale, {side}" for side in ("centre crop", "K = 16"))
    for part in (~crop, ~bag):  # half of the evidence
        assert verdict("C2", comparison.evidence(gains(points)[part], "cifar10")) in (UNDECIDED, FAILS)
    assert verdict("C2", comparison.evidence(gains(points)[~crop & ~bag], "cifar10")) == MISSING
    worse = gains(points).where(~bag, gains(-9))
    assert verdict("C2", comparison.evidence(worse, "cifar10")) == FAILS
