"""The tables of README.md and the plot, made from results/*.json alone; numbers in, text out."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from speed_parts import multiplied

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
MARKS = ("<!-- made by speed.py table -->\n", "<!-- end -->\n")
WARM_UP = 3  # steps that nobody is timed in
# A row is void where a loss is further from ours of the same round: the first one (the same weights
# see the same kind of rows), and the mean of the last three.
FIRST, LAST = 0.005, 0.02
TITLES = {
    "lora": "LoRA on all linear layers, 40M, 4 rows of 256 tokens",
    "others": "The same beside LitGPT and LLaMA-Factory",
    "top": "Top 2 of 8 layers adapted, 3 epochs",
    "nf4": "NF4 QLoRA against bf16 LoRA",
    "chat": "Conversations at their real lengths, 8 rows a step, 1,024 tokens at most",
    "nano": "The whole command on nano, 200 steps of 16 rows of 256 tokens",
    "scale": "Cost against size and length",
    "gpu": "One H200: LoRA on all linear layers, 1B, 8 rows of 1,024 tokens",
    "ceiling": "Matmul ceiling",
}
NOT_RUN = {
    "Unsloth, Axolotl, torchtune": "they need a GPU, on which they were not installed",
    "LitGPT and LLaMA-Factory on a GPU": "not installed there",
}


def compact(found: dict[str, Any]) -> str:
    """Results as JSON: a line for each key, and for each measurement."""
    lines = []
    for key, value in found.items():
        if isinstance(value, list):
            rows = ",\n  ".join(json.dumps(row) for row in value)
            lines.append(
                f"{json.dumps(key)}: [\n  {rows}\n ]" if rows else f"{json.dumps(key)}: []"
            )
        else:
            lines.append(f"{json.dumps(key)}: {json.dumps(value)}")
    return "{\n " + ",\n ".join(lines) + "\n}\n"


def steps_counted(work: str, run: dict[str, Any]) -> dict[str, range]:
    """The steps that are timed, by what they show; none where the whole command is."""
    steps = len(run["seconds"])
    if work == "nano" or steps <= WARM_UP:
        return {}
    if work == "top":
        return {"epoch 1: ": range(WARM_UP, steps // 3), "later: ": range(steps // 3, steps)}
    return {"": range(WARM_UP, steps)}


def rate(run: dict[str, Any], steps: Sequence[int]) -> float:
    """Tokens that are not padding, a second."""
    return sum(run["tokens"][n] for n in steps) / sum(run["seconds"][n] for n in steps)


def disagreement(run: dict[str, Any], ours: dict[str, Any]) -> str | None:
    """What makes a row void, if anything."""
    pairs = {
        "first": (run["losses"][0], ours["losses"][0], FIRST),
        "last": (statistics.fmean(run["losses"][-3:]), statistics.fmean(ours["losses"][-3:]), LAST),
    }
    for name, (theirs, mine, most) in pairs.items():
        if not abs(theirs - mine) <= most * mine:
            return f"void: {name} loss {theirs:.3f}, ours {mine:.3f}"
    return None


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Median (least to most)."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:,.{digits}f} ({low:,.{digits}f}–{high:,.{digits}f})"


def figures(work: str, run: dict[str, Any]) -> dict[str, float]:
    """What a run is judged by: tokens a second, or the seconds of the whole command."""
    counted = steps_counted(work, run)
    rates = {f"{part}tokens/s": rate(run, steps) for part, steps in counted.items()}
    return rates or {"s, whole command": run["wall_s"]}


def races(found: dict[str, Any]) -> list[str]:
    """A table of contenders: speed, ours against theirs, share of the ceiling, peak memory."""
    shape = "1b" if found["work"] == "gpu" else "40m"
    work, runs = found["work"], found["runs"]
    of: dict[str, list[dict[str, Any]]] = {}
    for row in runs:
        of.setdefault(row["who"], []).append(row)
    ours = next(iter(of.values()))
    in_round = {row["round"]: row for row in ours}
    names = [*figures(work, ours[0])]
    head = ["", *(title for name in names for title in (name, "ours against it"))]
    lines = table_head(
        [*head, "of the ceiling", "peak MiB", "ours against it", "loss, first to last"]
    )
    for who, those in of.items():
        pairs = [(row, in_round[row["round"]]) for row in those if row["round"] in in_round]
        void = next(filter(None, (disagreement(*pair) for pair in pairs)), None)
        cells = [who]
        for name in names:
            theirs, mine = ([figures(work, row)[name] for row in rows] for rows in (those, ours))
            cells.append(spread(theirs, 1 if work == "nano" else 0))
            cells.append(void or against(mine, theirs))
        cells.append(share_of_ceiling(found, shape, those) if work not in ("top", "nano") else "")
        theirs, mine = ([row["rss_mib"] for row in rows] for rows in (those, ours))
        cells += [spread(theirs), void or against(mine, theirs)]
        losses = those[0]["losses"]
        cells.append(f"{losses[0]:.3f} to {statistics.fmean(losses[-3:]):.3f}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def against(ours: Sequence[float], theirs: Sequence[float]) -> str:
    return f"{statistics.median(ours) / statistics.median(theirs):.2f}×"


def share_of_ceiling(found: dict[str, Any], shape: str, runs: list[dict[str, Any]]) -> str:
    """4 FLOP for each weight and token (forward, input gradient) against the matmuls beside it."""
    ceilings = [row["gflops"][shape] for row in found["ceilings"]]
    if not ceilings:
        return ""
    done = 4e-9 * multiplied(shape) * measure_all(found["work"], runs)
    return f"{done / statistics.median(ceilings):.0%}"


def measure_all(work: str, runs: list[dict[str, Any]]) -> float:
    """The median rate over all steps that are timed."""
    return statistics.median(
        rate(run, [n for part in steps_counted(work, run).values() for n in part]) for run in runs
    )


def scale(found: dict[str, Any]) -> tuple[list[str], dict[str, tuple[str, int, float]]]:
    """The table of shapes, and (shape, tokens a row, seconds for 1,000 tokens) of each."""
    head = ["", "tokens/s", "s for 1,000 tokens", "of the ceiling", "peak MiB", "predicted", "off"]
    lines, points = table_head(head), {}
    for who in dict.fromkeys(row["who"] for row in found["runs"]):
        runs = [row for row in found["runs"] if row["who"] == who]
        shape, rows = who.split()
        rates = [measure_all("scale", [run]) for run in runs]
        share = share_of_ceiling(found, shape, runs)
        points[who] = shape, int(rows.split("x")[1]), 1000 / statistics.median(rates)
        memory = [run["memory"] or {} for run in runs]
        expected = next((m["predicted_mib"] for m in memory if m.get("predicted_mib")), None)
        measured = statistics.median(m.get("measured_mib") or math.nan for m in memory)
        cells = [who, spread(rates), f"{points[who][2]:.3f}", share, f"{measured:,.0f}"]
        cells += [f"{expected:,.0f}", f"{expected / measured - 1:+.1%}"] if expected else ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return lines, points


def table_head(titles: list[str]) -> list[str]:
    return ["| " + " | ".join(titles) + " |", "|---" + "|--:" * (len(titles) - 1) + "|"]


def plot(panels: dict[str, tuple[str, dict[float, float]]]) -> str:
    """An SVG of log-log lines beside each other: {title: (name of x, {x: cost})}."""
    width, height, edge = 460, 300, 56
    parts = []
    for number, (title, (name, points)) in enumerate(panels.items()):
        xs, ys = [*map(math.log, points)], [*map(math.log, points.values())]
        low_x, low_y = min(xs), min(ys) - 0.2
        wide, high = max(xs) - low_x or 1, max(max(ys) - low_y, 1)
        left, bottom = number * width + edge, height - edge
        across = [left + (x - low_x) / wide * (width - 2 * edge) for x in xs]
        up = [bottom - (y - low_y) / high * (height - 2 * edge) for y in ys]
        corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(across, up, strict=True))
        parts += [
            f'<text x="{left}" y="22" font-weight="bold">{title}</text>',
            f'<text x="{left}" y="{height - 10}">{name}</text>',
            f'<polyline points="{corners}" fill="none" stroke="#2563eb" stroke-width="2"/>',
        ]
        for x, y, (value, cost) in zip(across, up, points.items(), strict=True):
            parts += [
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="#2563eb"/>',
                f'<text x="{x:.1f}" y="{y - 8:.1f}" text-anchor="middle">{cost:.2f}</text>',
                f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{value:,.0f}</text>',
            ]
    size = f'width="{width * len(panels)}" height="{height}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">\n'
        f'<rect {size} fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def section(found: dict[str, Any]) -> list[str]:
    """A work's heading, table, machine, versions and commands."""
    who = found["machine"]
    lines = [f"### {TITLES[found['work']]}", ""]
    if found["work"] == "scale":
        lines += [*scale(found)[0], "", "![Cost against size and length](results/scale.svg)"]
    elif found["runs"]:
        lines += races(found)
    values = [v for row in found["ceilings"] for v in row["gflops"].values()]
    if values:
        lines += ["", f"Ceiling beside it: {spread(values)} GFLOP/s in bf16."]
    rounds = max((row["round"] for row in found["runs"] + found["ceilings"]), default=0)
    lines += [
        "",
        f"- {found['date']}, rounds: {rounds}; {who['cores']} cores, {who['threads']} threads, "
        f"{who['memory_gib']} GiB; {who['cpu']}; bf16 {'yes' if who['bf16'] else 'no'}, "
        f"AMX {'yes' if who['amx'] else 'no'}; {who.get('gpu', 'no GPU')}; Python {who['python']}",
    ]
    for name, versions in found["versions"].items():
        listed = ", ".join(f"{key} {value}" for key, value in versions.items())
        lines.append(f"- {name}: {listed}")
    commands = dict.fromkeys(found["commands"].values())
    lines += [f"- `{command}`" for command in commands]
    lines += [f"- {name} could not be run: `{reason}`" for name, reason in found["failed"].items()]
    return [*lines, ""]


def render(results: list[dict[str, Any]]) -> str:
    """All tables, in the order of TITLES."""
    order = list(TITLES)
    lines = []
    for found in sorted(results, key=lambda found: order.index(found["work"])):
        lines += section(found)
    lines += ["### Not run", "", *(f"- {name}: {reason}" for name, reason in NOT_RUN.items())]
    return "\n".join(lines) + "\n"


def write_tables() -> None:
    """Write the tables between the marks of README.md, and results/scale.svg."""
    files = [f for f in sorted(RESULTS.glob("*.json")) if f.stem.partition("-")[2] in TITLES]
    results = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    for found in results:
        if found["work"] != "scale" or not found["runs"]:
            continue
        points = scale(found)[1].values()
        sizes = {multiplied(s) / 1e6: cost for s, length, cost in points if length == 256}
        lengths = {float(length): cost for s, length, cost in points if s == "40m"}
        panels: dict[str, tuple[str, dict[float, float]]] = {
            "Seconds for 1,000 tokens, by size": ("million weights in matmuls", sizes),
            "... of the 40M shape, by length": ("tokens a row", lengths),
        }
        (RESULTS / "scale.svg").write_text(plot(panels), encoding="utf-8")
    readme = HERE / "README.md"
    before, rest = readme.read_text(encoding="utf-8").split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    readme.write_text(before + MARKS[0] + render(results) + MARKS[1] + after, encoding="utf-8")
