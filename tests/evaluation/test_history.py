"""What a report says is printed, whoever wrote it there."""

from __future__ import annotations

import sparsecraft as sc
from sparsecraft.evaluation.history import history_lines

RUN = {"stage": "train", "steps": 2, "loss": 1.5, "log": [{"loss": 1.25}], "settings": {}}


def lines(**report) -> str:
    return "\n".join(history_lines(sc.recipes.camelidae(), report))


def test_a_report_of_an_older_version_is_read():
    assert "Trained (train): 2 steps, mean loss 1.500, last logged 1.250." in lines(training=[RUN])
    assert "At the start: claimed exact, not measured." in lines()
    old = {"max_difference": 2e-6, "scale": 3.0, "tolerance": 3e-5, "dtype": "float32"}
    found = lines(conversion={"certificate": {**old, "layers": 0}})
    assert "measured max |logit difference| 2.0e-06." in found


def test_what_no_line_is_made_for_is_printed_as_it_stands():
    found = lines(
        conversion={
            "certificate": {
                "max_difference": 0.0,
                "layers": 3,
                "ran": 2,
                "unreached": ["tower.0"],
                "power": 1e-3,
                "lifted": 2,
                "reached": None,
            },
            "left_out": {"model.layers.*.mixer": "a Mamba mixer"},
        },
        training=[
            RUN
            | {
                "counts": {"rows": 40, "too_long": 2},
                "unused_fields": {"a.jsonl": ["lang", "source"]},
                "moved": {"should": 3, "moved": 2, "unmoved": {"x[1]": "no token reached it"}},
            }
        ],
    )
    for line in (
        "At the start: claimed exact, measured max |layer output difference| 0.0e+00 in 2 of 3 "
        "layers (did not run: tower.0), an error of 1e-03 would be seen.",
        "  certificate: lifted: 2",
        "  left out: model.layers.*.mixer a Mamba mixer",
        "  rows: rows 40, too long 2",
        "  unused fields: a.jsonl lang, source",
        "  2 of 3 tensors that should train have moved.",
        "    not moved: x[1]: no token reached it",
    ):
        assert line in found.splitlines(), (line, found)
    assert "reached" not in found.replace("reached it", "")


def test_long_lists_are_cut_and_fields_are_not():
    counts = dict.fromkeys(["rows", *"abcdefgh", "packs"], 3)
    found = lines(training=[RUN | {"counts": counts}])
    assert found.endswith("rows: rows 3, a 3, b 3, c 3, d 3, e 3, f 3, g 3, h 3, packs 3")
    assert "6 more" in lines(conversion={"left_out": [f"layer {n}" for n in range(14)]})
