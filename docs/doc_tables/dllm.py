"""`hasten bench dllm`: every row, and the bars."""

from __future__ import annotations

from doc_tables.results import (
    VERDICT,
    Columns,
    Row,
    below_each_other,
    documents,
    hardware_and_versions,
    known,
    percent,
    table,
    times,
)

COLUMNS: Columns = {
    "nfe": ("evaluations", lambda value: f"{value:.2f}"),
    "tokens_per_forward": ("tokens each", lambda value: f"{value:.2f}"),
    "token_layers": ("token-layers", lambda value: f"{value:.0f}"),
    "of_sequential": ("of sequential", lambda value: f"{100 * value:.1f} %"),
    "speedup": ("speed-up", times),
    "exact_match": ("exact match", lambda value: f"{100 * value:.1f} %"),
    "exact_insert": ("insert", percent),
    "exact_shuffle": ("shuffle", percent),
    "agreement": ("agreement", percent),
    "position_agreement": ("of tokens", percent),
}


def bars() -> str:
    """One row per bar, model and workload."""
    rows = [
        [f"`{document['rows'][0]['model']}`", str(bar["workload"]), str(bar["bar"]), f"{VERDICT[bar['met']]}: {bar['detail']}"]
        for _, document in documents("dllm")
        for bar in document["bars"]
    ]
    return table(["model", "on", "bar", "met"], rows, left=4)


def dllm() -> str:
    """All rows by rising work, a table for each model and workload."""
    parts = []
    for file, document in documents("dllm"):
        rows: list[Row] = document["rows"]
        for work in dict.fromkeys(str(row["workload"]) for row in rows):
            mine = [row for row in rows if row["workload"] == work and "nfe" in row]
            refused = [row for row in rows if row["workload"] == work and "nfe" not in row]
            columns = {key: value for key, value in COLUMNS.items() if any(key in row for row in mine)}
            body = table(
                ["recipe", "control", *(heading for heading, _ in columns.values())],
                [
                    [f"`{row['recipe']}`", str(row.get("control", "")), *(known(row, key, columns) for key in columns)]
                    for row in sorted(mine, key=lambda row: row["token_layers"])
                ],
                left=2,
            )
            where = hardware_and_versions(document, file)
            parts.append(f"### `{rows[0]['model']}`, {work}\n{mine[0]['n']} texts, batches of {document['batch']}; {where}\n\n{body}")
            if refused:
                reasons = [[f"`{row['recipe']}`", str(row["note"])] for row in refused]
                parts.append("Refused:\n\n" + table(["recipe", "because"], reasons, left=2))
    return below_each_other(parts)
