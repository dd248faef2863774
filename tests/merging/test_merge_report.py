"""The numbers in the report of a merge, computed from sums of squares."""

from __future__ import annotations

import math

import pytest

from vera_convert.assembly.addends import Numbers
from vera_convert.merging.report import TensorReport, number_findings, total, values_in_words, worst

SOME = Numbers(values=8, changed=2, base=100.0, change=4.0, loss=1.0)
LOST = Numbers(values=8, changed=0, base=100.0, change=4.0, loss=4.0)
NONE = Numbers(values=8, changed=0, base=100.0, change=0.0, loss=0.0)


def report(name: str, numbers: Numbers | None) -> TensorReport:
    return TensorReport(name, "BF16", (2, 4), (0,), "added", numbers)


def codes(*numbers: Numbers | None) -> list[str]:
    reports = [report(f"w{n}", each) for n, each in enumerate(numbers)]
    return [finding.code for finding in number_findings(reports, [1.0], place="base")]


def test_shares_are_ratios_of_norms() -> None:
    assert SOME.changed_share == 0.25
    assert SOME.relative_change == 0.2
    assert SOME.relative_loss == 0.5


def test_empty_sums_do_not_divide_by_zero() -> None:
    nothing = Numbers()
    assert (nothing.changed_share, nothing.relative_change, nothing.relative_loss) == (0, 0, 0)
    assert Numbers(1, 1, 0.0, 4.0, 0.0).relative_change == 1


def test_numbers_of_a_part_of_the_values_are_called_a_sample() -> None:
    assert values_in_words([report("a", SOME), report("b", LOST)]) == "all 16 values"
    half = Numbers(values=4, changed=2, base=100.0, change=4.0, loss=1.0)
    assert values_in_words([report("a", SOME), report("b", half)]) == "12 sampled values"


def test_a_number_in_the_record_has_four_digits() -> None:
    found = report("w", Numbers(3, 1, 1.0, 1 / 9, 1e-9)).record()
    assert found["changed"] == 0.3333
    assert found["relative_change"] == 0.3333
    assert found["relative_loss"] == pytest.approx(math.sqrt(9e-9), abs=1e-8)
    assert "looked_at" not in report("w", None).record()


def test_the_worst_tensor_is_the_tensor_that_loses_most() -> None:
    last = worst([report("a", SOME), report("b", LOST), report("c", None)])
    assert last is not None
    assert last[0] == "b"
    assert worst([report("c", None)]) is None
    assert total([report("a", SOME), report("b", LOST), report("c", None)]) == SOME + LOST


def test_a_delta_that_is_lost_in_rounding_is_a_warning() -> None:
    assert codes(SOME) == []
    assert codes(SOME, LOST) == ["V537"]
    (finding,) = number_findings([report("a", SOME), report("b", LOST)], [1.0], place="base")
    assert "in 1 of 2 tensors" in finding.reason
    assert "87.5% of all values stay as they were" in finding.reason
    assert "b, which loses 100% of its delta" in finding.reason


def test_an_adapter_without_effect_is_a_warning() -> None:
    assert codes(NONE, NONE) == ["V303"]
    assert codes(NONE, SOME) == []
    (finding,) = number_findings([report("a", NONE)], [0.0, 0.0], place="base")
    assert "because the weight of every adapter is 0" in finding.reason
    (finding,) = number_findings([report("a", NONE)], [1.0, -1.0], place="base")
    assert finding.reason.startswith("the delta is 0 at all ")
    assert codes() == []
    assert codes(None) == []
