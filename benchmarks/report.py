"""Tables from ``benchmarks/results/*.json`` into README.md, between their markers: ``python benchmarks/report.py``.

``--check`` changes nothing and fails if README is not what the results say.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

from measure import RESULTS, ROOT


def attention_table(record: dict[str, Any]) -> list[str]:
    """Ours beside torch SDPA, and how much of the machine's limit ours reaches."""
    peak, bandwidth = record["fma_peak"] / 1e9, record["read_bandwidth"] / 1e9
    lines = [
        f"Limits measured in the same run: {peak:.0f} GFLOP/s fp32 FMA peak, {bandwidth:.0f} GB/s read bandwidth.",
        "",
        "| shape (heads/KV heads, headdim) | dtype | fastattn | torch SDPA | share of limit | speed-up (min, median) |",
        "|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        if row["dtype"] == "float16":  # in the JSON; close to bfloat16
            continue
        forward = row["kind"] == "forward"
        unit = "GFLOP/s" if forward else "GB/s"
        work = (
            f"{row['seqlen_q']} tokens{', causal' if row['causal'] else ''}"
            if forward
            else f"1 query, {row['seqlen_k']} keys"
        )
        shape = f"{row['model']}: {work} ({row['nheads']}/{row['nheads_k']}, {row['headdim']})"
        ours, theirs = row["rate"]["fastattn"] / 1e9, row["rate"]["sdpa"] / 1e9
        lines.append(
            f"| {shape} | {row['dtype']} | {ours:.0f} {unit} | {theirs:.0f} | {row['share_of_limit']:.0%} | "
            f"{row['speedup']:.1f}x, {row['speedup_median']:.1f}x |"
        )
    return [*lines, "", footnote(record["environment"])]


def generate_table(record: dict[str, Any]) -> list[str]:
    """Tokens per second of the whole loop beside transformers."""
    lines = [
        "| SmolLM2-135M, dequantised to | work | fastattn | transformers | speed-up (min, median) |",
        "|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        rate = row["tokens_per_second"]
        work = f"prompt of {row['tokens']}" if row["what"] == "prompt" else f"{row['tokens']} new tokens"
        lines.append(
            f"| {row['dtype']} | {work} | {rate['fastattn']:.0f} tok/s | {rate['transformers']:.0f} tok/s | "
            f"{row['speedup']:.1f}x, {row['speedup_median']:.1f}x |"
        )
    first = f"From the command to the first token of text: {record['first_token_seconds']:.1f} s."
    return [*lines, "", first + " " + footnote(record["environment"])]


def footnote(environment: dict[str, Any]) -> str:
    """Where and when."""
    e = environment
    return (
        f"<sub>{e['cpu']}, {e['threads']} threads, ISA {e['isa']}, torch {e['torch']}, commit {e['commit']}, "
        f"{e['date']} UTC.</sub>"
    )


def render(text: str) -> str:
    """README with every table made anew."""
    for name, table in (("attention", attention_table), ("generate", generate_table)):
        path = RESULTS / f"{name}.json"
        if not path.exists():
            continue
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        block = "\n".join((begin, *table(json.loads(path.read_text())), end))
        pattern = f"{re.escape(begin)}.*?{re.escape(end)}"
        text, count = re.subn(pattern, block.replace("\\", r"\\"), text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"README.md: expected one pair of markers {begin} ... {end}, found {count}")
    return text


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text()
    made = render(text)
    if "--check" in sys.argv:
        raise SystemExit(
            0 if made == text else "README.md differs from benchmarks/results: run benchmarks/report.py"
        )
    readme.write_text(made)


if __name__ == "__main__":
    main()
