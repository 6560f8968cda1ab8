"""Tables of docs/compatibility.md, loops.md, experiments.md and strict.md."""

from __future__ import annotations

from report_tables import NONE, load, table


def difference(value: float) -> str:
    """One digit, or two where the second is not zero: 2e-6, 2.5e-7."""
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def _differences(row: dict) -> str:
    notes = (f"[{part['note']}]" if "note" in part else "" for part in row["difference"])
    parts = ((part.get("of", ""), difference(part["value"]), note) for part, note in zip(row["difference"], notes))
    return "; ".join(" ".join(filter(None, part)) for part in parts)


def _faster(row: dict) -> str:
    return "; ".join(f"{part.get('of', '')} {part['8 rows']} / {part['64 rows']}".strip() for part in row["faster"])


def _code_base(row: dict) -> list[str]:
    return [row["code base"], ", ".join(filter(None, (row["commit"], row.get("date")))), row["where"], row["what"]]


def compatible_loops() -> str:
    """Heads whose loop is taken over, by code base."""
    rows = load("compatibility-cpu.json")["loops"]["rows"]
    head = ["code base", "commit", "where the head is", "what its loop does", "difference", "faster, 8 / 64 rows"]
    return table(head, [[*_code_base(row), _differences(row), _faster(row)] for row in rows])


def compatible_networks() -> str:
    """Heads whose network alone is served, by code base."""
    rows = load("compatibility-cpu.json")["networks"]["rows"]
    head = ["code base", "commit", "where the network is", "its loop", "difference"]
    return table(head, [[*_code_base(row), _differences(row)] for row in rows])


def compatible_networks_on_a_cpu() -> str:
    """Their seconds."""
    rows = load("compatibility-cpu.json")["networks on a cpu"]["rows"]
    return table(
        ["", "rows", "faster"], [[row["what"], row["rows"], ", ".join(map(str, row["faster"]))] for row in rows]
    )


def compatible_mar_loops() -> str:
    """Code bases that keep MAR's loop."""
    rows = load("compatibility-cpu.json")["mar loops"]["rows"]
    lines = [
        [row["code base"], row["commit"], row["what"]]
        + [NONE if row[key] is None else difference(row[key]) for key in ("float32", "bfloat16")]
        for row in rows
    ]
    return table(["code base", "commit", "what was seen", "float32", "bfloat16 or autocast"], lines)


def network_calls() -> str:
    """How many times as fast as its own forward, and as ``torch.compile`` of it, a patched network is."""
    found: dict[tuple[str, str, str], dict[str, list[str]]] = {}
    for row in load("network-cpu.json")["rows"]:
        name, rows = row["size"].split(" N=")
        way, dtype = row["backend"].rsplit(" ", 1)
        weights = '`weights="frozen"`' if way == "patched frozen" else "weights followed"
        ratio = "wrong" if row["ratio"] is None else f"{row['ratio']:.2f}"
        found.setdefault((name, dtype, weights), {}).setdefault(rows, []).append(ratio)
    counts = list(dict.fromkeys(rows for case in found.values() for rows in case))
    lines = [
        [", ".join(case), *(" / ".join(ratios[rows]) for rows in counts)]
        for case, ratios in sorted(found.items(), key=lambda item: _order(item[0], list(found)))
    ]
    return table(["", "1 row", *counts[1:]], lines)


def _order(case: tuple[str, str, str], cases: list[tuple[str, str, str]]) -> tuple[int, bool, bool]:
    """Networks as they were measured, float32 first, frozen weights first."""
    return [name for name, _, _ in cases].index(case[0]), case[1] != "float32", "frozen" not in case[2]


TRAINED = ("digits head, learned variance", "trained")  # as the programs name the head, and as the page does


def experiments(which: str) -> dict[str, list[dict]]:
    """Rows of an experiment by head, in the page's words."""
    found: dict[str, list[dict]] = {}
    for row in load("experiments-cpu.json")["rows"]:
        if row["experiment"] == which and "head" in row:
            found.setdefault(row["head"].replace(*TRAINED), []).append(row)
    return found


METHODS = {  # as the program names them, and as the page does
    "secant (shipped)": "secant",
    "Picard": "Picard (x0)",
    "Anderson, x0": "Anderson, x0",
    "Anderson, eps": "Anderson, eps",
}


def anderson() -> str:
    """Sweeps by method, the best setting of each."""
    lines = []
    for head, rows in experiments("anderson").items():
        best = {row["method"]: row["sweeps"] for row in rows if row.get("best setting")}
        lines.append([head, *(" / ".join(map(str, best[method])) for method in METHODS)])
    return table(["head", *METHODS.values()], lines)


def step_speculation() -> str:
    """Rounds a token with the frozen guess, by how many steps are guessed, and sweeps beside them."""
    lines = []
    for head, rows in experiments("step speculation").items():
        rounds = [row["rounds"] for row in rows if row["method"] == "frozen"]
        sweeps = next(row["sweeps"] for row in rows if row["method"] == "sweeps")
        lines.append([
            head, *(f"{each['mean']:.1f} ({each['least']}..{each['most']})" for each in rounds),
            *(f"{mean:.1f} (at most {most})" for mean, most in sweeps.values()),
        ])  # fmt: skip
    return table(["head", "L = 4", "L = 8", "L = 16", "L = all", "sweeps at 1e-3", "at 1e-5"], lines)


def by_hand(name: str) -> dict:
    """An entry of ``by-hand.json``."""
    return next(row for row in load("by-hand.json")["rows"] if row["name"] == name)


def context_relaxation() -> str:
    """What the rule measures on the digits, and what it saves."""
    value = by_hand("context relaxation on the digits")["value"]
    lines = [
        [what, *(", ".join(_plain(each) for each in column) for column in columns)] for what, columns in value.items()
    ]
    return table(["", "16 steps, a token each", "8 steps, about two"], lines)


def _plain(value: float | list[float]) -> str:
    """A number, or a number with its bounds."""
    return f"{value[0]} ({value[1]} to {value[2]})" if isinstance(value, list) else str(value)


def entropy_draft() -> str:
    """Acceptance behind unusual and usual entropy."""
    value = by_hand("entropy draft on the digits")["value"]
    head = ["steps below the threshold", "their expected acceptance", "that of the others"]
    lines = [
        [case, f"{100 * each[head[0]]:.0f} %", *(str(each[name]) for name in head[1:])] for case, each in value.items()
    ]
    return table(["on the digits, at relaxation 1", *head], lines)
