"""The form that every benchmark's report takes."""

import dataclasses
import json

from sled.bench.report import BenchReport, column


@dataclasses.dataclass
class Row:
    way: str = column("the way")
    batch: int = column("batch")
    best: float | None = column("best s")


def test_a_report_is_a_table_under_its_head_and_json_by_name():
    report = BenchReport("Racing", {"laps": 3}, [Row("left", 1, 1 / 3), Row("right", 8, None)], ["No wind."],
                    date="2026-11-24", hardware="a track", versions={"shoes": "2.0", "socks": "1.0"})
    assert report.markdown().split("\n") == [
        "Racing; 2026-11-24; a track; shoes 2.0, socks 1.0", "",
        "| the way | batch | best s |", "|---|---|---|", "| left | 1 | 0.33 |", "| right | 8 | - |", "", "No wind."]
    assert json.loads(report.json()) == {
        "date": "2026-11-24", "hardware": "a track", "versions": {"shoes": "2.0", "socks": "1.0"}, "laps": 3,
        "notes": ["No wind."], "rows": [{"way": "left", "batch": 1, "best": 1 / 3},
                                        {"way": "right", "batch": 8, "best": None}]}


def test_rows_of_two_kinds_are_two_tables():
    @dataclasses.dataclass
    class Other:
        speed: float = column("speed")

    report = BenchReport("Racing", {}, [Row("left", 1, 0.5), Other(2.0), Other(3.0)])
    assert report.markdown().split("\n")[5:] == ["", "| speed |", "|---|", "| 2.00 |", "| 3.00 |"]
    assert json.loads(report.json())["rows"][1:] == [{"speed": 2.0}, {"speed": 3.0}]


def test_a_report_says_when_and_with_what_it_was_made():
    report = BenchReport("Racing", {}, [Row("left", 1, 0.5)])
    assert report.date and report.hardware and report.versions["jax"]
    assert report.markdown().endswith("| left | 1 | 0.50 |")
