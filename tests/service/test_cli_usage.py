"""`agentic-flow models usage` as users run it: tables, JSON, CSV and pictures of a real ledger."""

from __future__ import annotations

import asyncio
import csv
import io
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_process import Place

from agentic_flow.cli.main import main
from agentic_flow.core.sql import SqlDatabase
from agentic_flow.gateway.usage import UsageLedger, UsageRecord
from agentic_flow.gateway.usage_plot import MODELS_MAX, OTHER, amount_text, daily_series
from agentic_flow.gateway.usage_table import usage_table
from usage_records import DAY_S, NOON, database, record

SPAN = ("--since", "2026-11-15", "--until", "2026-11-25")
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def fill(place: Place, *records: UsageRecord) -> None:
    place.data_dir.mkdir(exist_ok=True)
    store = database(place.data_dir)
    ledger = UsageLedger(store)
    for one in records:
        ledger.record(one)
    asyncio.run(ledger.close())
    store.close()


@pytest.fixture
def used(place: Place) -> Place:
    """Three calls of two models on two days, and one of another tenant."""
    fill(
        place,
        record(model="small", cost_nano_usd=1_500),
        record(model="large", agent="", cost_nano_usd=2_000_000_000),
        record(model="large", at_s=NOON + DAY_S, cost_nano_usd=None, status="provider_failed"),
        record(model="large", tenant="team-b", cost_nano_usd=7),
    )
    return place


def test_an_empty_ledger_says_so(place: Place) -> None:
    """Catches an empty table, an error or a traceback where nothing was ever recorded."""
    done = place.run("models", "usage")
    assert done.code == 0
    assert done.out.startswith("no model call of tenant 'default' is recorded")
    done = place.run("models", "usage", "--json")
    assert (done.code, done.data["rows"], done.data["totals"]) == (0, [], None)
    done = place.run("models", "usage", "--plot", "empty.png")
    assert done.code == 0
    assert "nothing is drawn" in done.err
    assert not (place.folder / "empty.png").exists()


def test_the_table_shows_rows_and_totals(used: Place) -> None:
    """Catches rows of another tenant, a small cost shown as nothing, and unknown prices kept quiet."""
    done = used.run("models", "usage", *SPAN)
    assert done.code == 0, done.err
    lines = [line.split() for line in done.out.splitlines()]
    assert [line[0] for line in lines] == ["model", "large", "small", "total"]
    assert "$2.0000" in lines[1]
    assert "$0.0000015" in lines[2]
    assert lines[3][1:3] == ["3", "1"]
    assert "1 calls have no known price" in done.err
    done = used.run("models", "usage", *SPAN, "--by", "agent,status")
    assert "provider_failed" in done.out
    done = used.run("models", "usage", *SPAN, "--limit", "1")
    assert [line.split()[0] for line in done.out.splitlines()] == ["model", "large", "total"]
    assert "more groups are not shown" in done.err


def test_json_and_csv_hold_the_same_rows(used: Place) -> None:
    """Catches two exports that disagree, and talk on standard output."""
    wanted = ("models", "usage", *SPAN, "--all-tenants", "--by", "tenant,model,day")
    as_json = used.run(*wanted, "--json").data
    assert as_json["tenant"] == "*"
    assert sum(row["cost_nano_usd"] for row in as_json["rows"]) == 2_000_001_507
    assert as_json["totals"]["calls"] == 4
    rows = list(csv.DictReader(io.StringIO(used.run(*wanted, "--csv").out)))
    shown = [{k: "" if v is None else str(v) for k, v in row.items()} for row in as_json["rows"]]
    assert rows == shown
    assert {row["tenant"] for row in rows} == {"default", "team-b"}
    only = used.run("models", "usage", *SPAN, "--tenant", "team-b", "--json").data
    assert (only["totals"]["calls"], only["totals"]["cost_usd"]) == (1, 7e-9)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--by", "colour"), "colour"),
        (("--since", "yesterday"), "yesterday"),
        (("--since", "2026-11-20", "--until", "2026-11-19"), "2026-11-20"),
        (("--json", "--csv"), "--csv"),
        (("--tenant", "a", "--all-tenants"), "--all-tenants"),
        (("--plot", "picture.jpg"), "picture.jpg"),
        (("--measure", "euros"), "euros"),
        (("--limit", "0"), "0"),
    ],
)
def test_wrong_options_are_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], named: str
) -> None:
    """Catches an option that is ignored, and an error that does not show what was given."""
    assert main(["--data-dir", str(tmp_path), "models", "usage", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert named in said
    assert "hint: " in said


def test_a_gateway_elsewhere_is_not_answered_from_here(place: Place) -> None:
    """Catches an empty table of this machine shown for a gateway that runs on another."""
    for done in (
        place.run("models", "usage", AGENTIC_FLOW_PEERS__PLATFORM_URL="http://127.0.0.1:1"),
        place.run("models", "usage", "--url", "http://127.0.0.1:1"),
    ):
        assert done.code == 7
        assert "http://127.0.0.1:1" in done.problem


def test_pictures_hold_what_the_table_says(used: Place) -> None:
    """Catches a picture without legend, unit or the calls that are not in it, and one that is overwritten."""
    done = used.run("models", "usage", *SPAN, "--plot", "usage.svg", "--json")
    assert done.code == 0, done.err
    assert done.data["measure"] == "cost"
    svg = (used.folder / "usage.svg").read_text("utf-8")
    texts = {
        "".join(element.itertext()).strip()
        for element in ET.fromstring(svg).iter()
        if element.tag.endswith("text")
    }
    assert "Cost of model calls per day" in texts
    assert "US dollars per day" in texts
    assert "large  ($2.00)" in texts
    assert "small  ($0.0000015)" in texts
    assert {"20 Nov", "21 Nov"} <= texts
    assert any("1 calls without a known price are not in it" in text for text in texts)
    again = used.run("models", "usage", *SPAN, "--plot", "usage.svg")
    assert again.code == 5
    assert (used.folder / "usage.svg").read_text("utf-8") == svg
    done = used.run("models", "usage", *SPAN, "--plot", "usage.png", "--measure", "tokens")
    assert done.code == 0
    assert (used.folder / "usage.png").read_bytes().startswith(PNG_MAGIC)
    assert sorted(path.name for path in used.folder.iterdir() if path.is_file()) == ["usage.png", "usage.svg"]


def test_the_plot_extra_that_is_missing_is_named(used: Place) -> None:
    """Catches a traceback where matplotlib is not installed."""
    hidden = used.folder / "hidden" / "matplotlib"
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").write_text("raise ImportError('not here')\n")
    path = f"{hidden.parent}:{used.environment['PYTHONPATH']}"
    done = used.run("models", "usage", *SPAN, "--plot", "usage.png", PYTHONPATH=path)
    assert done.code == 7
    assert "matplotlib" in done.problem
    assert "agentic-flow[plot]" in done.err
    assert used.run("models", "usage", *SPAN, PYTHONPATH=path).code == 0


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqlDatabase]:
    made = database(tmp_path)
    yield made
    made.close()


def test_days_without_calls_and_small_models_stay_in_the_picture(store: SqlDatabase) -> None:
    """Catches an axis that skips days, and amounts that go missing when models share a colour."""
    ledger = UsageLedger(store)
    for number in range(12):
        ledger.record(
            record(model=f"m{number:02}", at_s=NOON + DAY_S * (number % 2) * 3, cost_nano_usd=10**9)
        )
    asyncio.run(ledger.close())
    rows = usage_table(store, None, ("day", "model"), 0, 1e12, 100)
    drawn = daily_series(rows, "cost")
    assert [day.day for day in drawn.days] == [20, 21, 22, 23]
    assert len(drawn.series) == MODELS_MAX
    assert sum(drawn.series[OTHER]) == 5.0
    assert [sum(day) for day in zip(*drawn.series.values(), strict=True)] == [6.0, 0.0, 0.0, 6.0]
    tokens = daily_series(rows, "tokens")
    assert sum(map(sum, tokens.series.values())) == 12 * 1200


def test_amounts_are_short_and_never_nothing() -> None:
    """Catches a small cost rounded to zero and a large number that fills the legend."""
    assert [amount_text(value, "cost") for value in (0, 12.345, 0.0042, 1.5e-6, 12_345.6)] == [
        "$0.00", "$12.35", "$0.0042", "$0.0000015", "$12,346",
    ]  # fmt: skip
    assert [amount_text(value, "tokens") for value in (0, 999, 1500, 2_340_000, 5e9)] == [
        "0", "999", "1.5k", "2.34M", "5G",
    ]  # fmt: skip
