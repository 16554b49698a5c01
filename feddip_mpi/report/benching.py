"""The exchange benchmark in tables: what was measured, what it consists of, what is predicted for more ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from feddip_mpi.report import terminal

Json = Mapping[str, Any]

PHASES = ("encode", "transfer", "wait", "exchange", "decode", "apply")
KINDS = ("values", "indices", "other", "frame")
MODES = ("dense-allreduce", "values+int32", "allgatherv", "sharded", "node", "dense")  # columns, the yardsticks first


def show(result: Json) -> None:
    """Print everything."""
    terminal.print_tables(
        headline(result),
        table(
            "Whole exchange, encode to averaged result (ms; slowest rank, median of the repeats)", seconds_rows(result)
        ),
        table(
            "Where the time goes (ms; slowest rank of each phase; transfer runs beside the others)", phase_rows(result)
        ),
        table("Bytes of the busiest rank, and times fewer than dense-allreduce (received)", byte_rows(result)),
        *(part for group in result["predicted"] for part in _predicted(group)),
        *remarks(result),
    )


def headline(result: Json) -> str:
    """What was measured, where, in three lines."""
    processors = ", ".join(sorted({f"{h['processor']} ({h['cores']} cores)" for h in result["hardware"]}))
    return (
        f"{result['size']:,} weights, {result['prunable']:,} prunable; {result['clients']} clients on {result['ranks']} "
        f"rank(s), {result['nodes']} node(s); messages {'overlap' if result['overlap'] else 'do not overlap'}\n"
        f"{processors}; {result['mpi']}\n{network_lines(result['networks'])}"
    )


def network_lines(networks: Sequence[Json]) -> str:
    """What was fitted."""
    if not networks:
        return "network: one rank, nothing is sent"
    return "\n".join(
        f"network, fitted to transfers {'in the background' if network['background'] else 'that block'}: latency "
        f"{1e6 * network['latency_seconds']:.0f} us a step, bandwidth {8e-6 * network['bandwidth_bytes']:.0f} Mbit/s "
        f"a rank, error of the fit {network['relative_error']:.0%}"
        for network in networks
    )


def against(case: Json, dense: Json | None) -> dict[str, float | None]:
    """How many times faster than the dense Allreduce a case is, and how many times fewer bytes a rank receives."""
    if dense is None:
        return {"times_faster": None, "times_fewer_bytes": None}
    there, here = dense["received"], case["received"]
    return {
        "times_faster": dense["seconds"]["median"] / case["seconds"]["median"],
        # Where all ranks share memory (node) nothing but lengths goes through MPI, and there is nothing to compare.
        "times_fewer_bytes": there["total"] / here["total"] if there["values"] and here["values"] else None,
    }


def seconds_rows(result: Json) -> list[list[str]]:
    """Header and a row a case."""
    rows = [["mode", "sparsity", "values", "median", "min", "max", "predicted", "off", "vs dense"]]
    for case in result["cases"]:
        took, predicted = case["seconds"], case["predicted"]
        rows.append([
            *_name(case), *(_ms(took[name]) for name in ("median", "min", "max")),
            _ms(predicted["seconds"]) if predicted else "-",
            f"{predicted['seconds'] / took['median'] - 1:+.0%}" if predicted else "-",
            _times(case["times_faster"]),
        ])  # fmt: skip
    return rows


def phase_rows(result: Json) -> list[list[str]]:
    """Header and a row a case."""
    rows = [["mode", "sparsity", "values", *PHASES]]
    rows += [[*_name(case), *(_ms(case["phases"][name]) for name in PHASES)] for case in result["cases"]]
    return rows


def byte_rows(result: Json) -> list[list[str]]:
    """Header and a row a case."""
    rows = [["mode", "sparsity", "values", "sent", *KINDS, "received", "vs dense"]]
    for case in result["cases"]:
        sizes = [terminal.size(case["sent"][kind]) for kind in ("total", *KINDS)]
        received = terminal.size(case["received"]["total"])
        rows.append([*_name(case), *sizes, received, _times(case["times_fewer_bytes"])])
    return rows


def predicted_rows(group: Json) -> list[list[str]]:
    """Header and a row for each number of ranks; `crossover`: participants from which `sharded` wins there."""
    modes = [mode for mode in MODES if mode in group["rows"][0]["seconds"]]
    rows = [["ranks", "participants", *modes, "sharded wins from"]]
    for row in group["rows"]:
        fewest = "never" if row["crossover"] is None else f"{row['crossover']} participants"
        rows.append([str(row["ranks"]), str(row["participants"]), *(_ms(row["seconds"][m]) for m in modes), fewest])
    return rows


def remarks(result: Json) -> list[str]:
    """What a reader must not overlook."""
    said = []
    blocking = next((case["blocking"] for case in result["cases"] if case["blocking"] is not None), None)
    if blocking is not None:
        said.append(f"dense-allreduce: MPI_{'A' if blocking else 'Ia'}llreduce, the faster of the two here")
    if len(result["cases"]) and not result["unchecked"]:
        said.append("checked: all ranks hold the same result; allgatherv, sharded and node bit for bit the same one")
    if result["unchecked"]:
        said.append(f"not compared (nothing to compare with): {', '.join(result['unchecked'])}")
    if result["nodes"] == 1 < result["ranks"] and any(case["mode"] == "node" for case in result["cases"]):
        said.append("node: all ranks share one node's memory; MPI is handed the lengths of payloads alone")
    cold = [" ".join(filter(None, _name(case))) for case in result["cases"] if case["cold"]]
    if cold:
        said.append(f"one cold run only: {', '.join(cold)}")
    if result["left_out"]:
        said.append(f"--seconds was used up, left out: {'; '.join(result['left_out'])}")
    return said


def table(title: str, rows: Sequence[Sequence[str]]) -> Any:
    """A light table from rows of text; numbers to the right."""
    header, *body = rows
    made = terminal.table(*header, right=[name for name in header if name not in ("mode", "values")])
    made.title, made.title_justify, made.title_style = title, "left", ""
    for row in body:
        made.add_row(*row)
    return made


def _predicted(group: Json) -> list[Any]:
    what = f"sparsity {group['sparsity']:g}, {group['values']}"
    ranks = group["crossover_ranks"]
    wins = f"from {ranks} ranks on" if ranks else "on no number of ranks up to the last"
    return [
        table(
            f"PREDICTED seconds of a whole exchange for more ranks on such a network (ms; {what})",
            predicted_rows(group),
        ),
        f"predicted: with as many clients a rank as here sharded wins over allgatherv {wins}",
    ]


def _name(case: Json) -> list[str]:
    kind = case["values"] or "fp32"
    if case["download"] not in (None, "fp32"):
        kind += f", back {case['download']}"
    return [case["mode"], "-" if case["sparsity"] is None else f"{case['sparsity']:g}", kind]


def _ms(seconds: float) -> str:
    """Milliseconds in three figures."""
    value = 1e3 * seconds
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.3g}"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.3g}x"
