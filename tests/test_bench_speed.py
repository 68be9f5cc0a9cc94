"""The tables of scripts/bench: what the results say, and no figure of whoever did not train."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parent.parent / "scripts" / "bench"


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("speed_table")


def run(who: str, second: float, losses: list[float], number: int = 1) -> dict[str, Any]:
    """Six steps of 1,000 tokens; the first three, in which nobody is timed, take a minute each."""
    return {
        **{"round": number, "who": who, "wall_s": 200.0, "rss_mib": 1000, "losses": losses},
        **{"seconds": [60.0] * 3 + [second] * 3, "tokens": [1000] * 6},
    }


def results(*runs: dict[str, Any], work: str = "lora") -> dict[str, Any]:
    machine = {"cpu": "x", "bf16": True, "amx": False, "cores": 2, "threads": 2}
    return {
        **{"work": work, "date": "2026-11-21", "versions": {}, "commands": {}, "failed": {}},
        **{"machine": {**machine, "memory_gib": 8, "python": "3.11"}, "runs": list(runs)},
        "ceilings": [{"round": 1, "who": "before", "gflops": {"40m": 200.0}}],
    }


LEARNED = [10.4, 10.3, 10.1, 9.9, 9.7, 9.6]


def rows(table: Any, found: dict[str, Any]) -> dict[str, list[str]]:
    """The cells of a work's table by contender."""
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in table.races(found)[2:]]
    return {name: rest for name, *rest in cells}


def test_speed_is_counted_after_the_warm_up_and_compared_by_medians(table: Any) -> None:
    seconds = {"lora_kit": (0.5, 0.4, 2.0), "slow": (2.0, 1.0, 1.0)}
    runs = [
        run(who, second, LEARNED, number)
        for who, taken in seconds.items()
        for number, second in enumerate(taken, 1)
    ]
    found = rows(table, results(*runs))
    assert found["lora_kit"][:2] == ["2,000 (500–2,500)", "1.00×"]
    assert found["slow"][:2] == ["1,000 (500–1,000)", "2.00×"]
    # 4 FLOP for each of 41.7 million weights, 2,000 times a second, of 200 GFLOP/s.
    assert table.multiplied("40m") == 8 * (4 * 512**2 + 3 * 512 * 1376) + 32_000 * 512
    assert found["lora_kit"][2] == "167%"


@pytest.mark.parametrize(
    "losses",
    [
        [10.4] * 6,  # learned nothing
        [10.7, *LEARNED[1:]],  # began with other weights, or other rows
        [float("nan")] * 6,
        [*LEARNED[:3], 0.0, 0.0, 0.0],
    ],
)
def test_a_row_with_other_losses_is_void(table: Any, losses: list[float]) -> None:
    ours, fast = run("lora_kit", 1.0, LEARNED), run("fast", 0.1, losses)
    later = run("fast", 0.1, LEARNED, 2)
    found = rows(table, results(ours, fast, run("lora_kit", 1.0, LEARNED, 2), later))
    assert found["fast"][1].startswith("void: ") and found["fast"][4].startswith("void: ")
    honest = run("fast", 0.1, [loss * 1.001 for loss in LEARNED])
    assert rows(table, results(ours, honest))["fast"][1] == "0.10×"


def test_epochs_are_told_apart_and_whole_commands_by_their_time(table: Any) -> None:
    one = {**run("lora_kit", 1.0, LEARNED), "tokens": [1000] * 18, "losses": LEARNED * 3}
    one["seconds"] = [9.0] * 3 + [1.0] * 3 + [0.5] * 12
    assert table.figures("top", one) == {"epoch 1: tokens/s": 1000, "later: tokens/s": 2000}
    assert table.figures("nano", one) == {"s, whole command": 200.0}


def test_results_are_read_back_as_they_were_written(table: Any) -> None:
    found = results(run("lora_kit", 1.0, LEARNED), run("b", 1.0, LEARNED))
    assert json.loads(table.compact(found)) == found


def test_the_tables_in_the_readme_are_those_of_the_results(table: Any) -> None:
    files = sorted((BENCH / "results").glob("*.json"))
    found = [json.loads(f.read_text()) for f in files if f.stem.partition("-")[2] in table.TITLES]
    text = (BENCH / "README.md").read_text(encoding="utf-8")
    assert text.split(table.MARKS[0])[1].split(table.MARKS[1])[0] == table.render(found)
