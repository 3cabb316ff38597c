"""The documents' tables and the plot from ``benchmarks/results/*.json``: ``python benchmarks/report.py``.

``--check`` changes nothing and fails if a document or the plot is not what the results say.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable
from typing import Any

from gpu_tables import cuda_table, mutants_table, triton_table
from measure import RESULTS, ROOT

PLOT = RESULTS / "attention.svg"
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
Row = dict[str, Any]


def percent(share: float) -> str:
    """A share, in whole percent."""
    return f"{share:.0%}".replace("%", " %")


def marked(text: str, row: Row) -> str:
    """Italics where the row misses what is required of it."""
    return text if row["met"] else f"*{text}*"


def limit_cell(row: Row) -> str:
    """Rate, share of the limit, speed-up over SDPA."""
    rate = f"{row['rate']['fastattn'] / 1e9:.0f}, {percent(row['share_of_limit'])}"
    return marked(rate + (f", {row['speedup']:.1f}x" if "speedup" in row else ""), row)


def speedup_cell(row: Row) -> str:
    """Milliseconds, speed-up over SDPA."""
    return marked(f"{row['seconds']['fastattn']['min'] * 1e3:.2f} ms, {row['speedup']:.1f}x", row)


def grid(rows: list[Row], title: str, cell: Callable[[Row], str], least: Callable[[Row], str]) -> list[str]:
    """One line per shape, one column per dtype, and what is required."""
    dtypes = [dtype for dtype in DTYPES if any(row["dtype"] == dtype for row in rows)]
    lines = [
        f"| {title} | {' | '.join(DTYPES[dtype] for dtype in dtypes)} | required |",
        "|---" * (len(dtypes) + 2) + "|",
    ]
    by_shape: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_shape.setdefault(f"{row['model']} ({row['heads']}): {row['work']}", {})[row["dtype"]] = row
    for shape, by_dtype in by_shape.items():
        cells = [cell(by_dtype[dtype]) if dtype in by_dtype else "" for dtype in dtypes]
        wanted = list(dict.fromkeys(least(row) for row in by_dtype.values()))
        lines.append(f"| {shape} | {' | '.join(cells)} | {' / '.join(wanted)} |")
    return [*lines, ""]


def least_share(row: Row) -> str:
    """The required share, or that it must not be slower than SDPA."""
    share = row["required"].get("share")
    return percent(share) if share else "1x"


def least_speedup(row: Row) -> str:
    """The required speed-up."""
    return f"{row['required']['speedup']:.1f}x"


GRIDS = {
    "forward": ("forward, GFLOP/s", limit_cell, least_share),
    "training": ("forward + backward, GFLOP/s", limit_cell, least_share),
    "decode": ("decode, one query: GB/s of K and V", limit_cell, least_share),
    "short": ("short, 32 sequences", speedup_cell, least_speedup),
    "avx2": ("forward, AVX2 forced, GFLOP/s", limit_cell, least_share),
}


def odds_and_ends(kinds: dict[str, list[Row]]) -> list[str]:
    """Call overhead, memory and the price of features, a sentence each."""
    lines = []
    for row in kinds.get("overhead", []):
        us = {who: f"{t['min'] * 1e6:.1f}" for who, t in row["seconds"].items()}
        lines.append(
            f"* One call on 1x1x1x64 takes {marked(us['fastattn'] + ' us', row)}, SDPA {us['sdpa']} us."
        )
    for work, name in (("forward", "Forward"), ("training", "Forward + backward")):
        rows = [row for row in kinds.get("memory", []) if row["pass"] == work]
        above = [
            f"{marked(format(row['bytes_above']['fastattn'] / 2**20, '.1f'), row)} "
            f"({row['seqlen_q']}, {DTYPES[row['dtype']]}; SDPA {row['bytes_above']['sdpa'] / 2**20:.1f})"
            for row in rows
        ]
        if rows:
            lines.append(
                f"* {name}, peak MiB above inputs and outputs by seqlen, 4 heads of 64: {', '.join(above)}."
            )
    if features := kinds.get("feature"):
        prices = [f"{row['feature']} {row['relative']['min']:.2f}" for row in features]
        shape = f"{features[0]['model']}, {features[0]['work']}, {DTYPES[features[0]['dtype']]}"
        lines.append(f"* Time relative to plain attention ({shape}): {', '.join(prices)}.")
    return [*lines, ""] if lines else []


def by_kind(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows of each kind of work, in their order."""
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(row["kind"], []).append(row)
    return kinds


def disturbances(rows: list[Row]) -> list[str]:
    """How many rows were measured while others were at work."""
    taken = sum(row.get("free_cores", 1.0) < 0.9 for row in rows)
    return (
        [f"While {taken} of {len(rows)} rows were measured, somebody else had the cores.", ""]
        if taken
        else []
    )


def grids(kinds: dict[str, list[Row]]) -> list[str]:
    """A table for every kind of work that has one."""
    return [line for kind, layout in GRIDS.items() if kind in kinds for line in grid(kinds[kind], *layout)]


def attention_table(record: Row) -> list[str]:
    """One table per kind of work, and the plot."""
    kinds = by_kind(record["rows"])
    bandwidth = " to ".join(dict.fromkeys(f"{limit / 1e9:.0f}" for limit in record["read_bandwidth"]))
    lines = [
        "![Share of the machine's limit by shape, fastattn and torch SDPA](benchmarks/results/attention.svg)",
        "",
        "Each figure: rate, share of the limit, speed-up over torch SDPA in the same loop; *italics* miss what we "
        f"require. Limits: {record['fma_peak'] / 1e9:.0f} GFLOP/s fp32 FMA peak (for the 16-bit types too), "
        f"{bandwidth} GB/s read bandwidth, measured in turn with every row.",
        "",
    ]
    lines += grids(kinds)
    lines += odds_and_ends(kinds)
    lines += disturbances(record["rows"])
    for skipped in record["skipped"]:
        lines.append(f"Not measured: {skipped['kind']}, {skipped['row']}: {skipped['reason']}.")
    return [*lines, *([""] if record["skipped"] else []), footnote(record["environment"])]


def amx_table(record: Row) -> list[str]:
    """The rows of another machine, one whose bf16 runs on tile registers."""
    lines = [
        "The same on a CPU with AMX, where bf16 runs on tile registers, ours and SDPA's. Limit: "
        f"{record['fma_peak'] / 1e9:.0f} GFLOP/s fp32 FMA peak.",
        "",
    ]
    return [
        *lines,
        *grids(by_kind(record["rows"])),
        *disturbances(record["rows"]),
        footnote(record["environment"]),
    ]


def generate_table(record: Row) -> list[str]:
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


# What enable() puts its hands on in each model of model_rows.py.
SWITCHED = {
    "BERT-base": "interface: self-attention",
    "T5-small": "adapter: self- and cross-attention, position bias by distance, with its gradient",
    "GPT-2": "interface: causal self-attention",
    "BLOOM-560M": "adapter: causal self-attention with ALiBi",
    "Llama-3.2-1B": "interface: causal self-attention, 4 queries to a key",
}


def models_table(record: Row) -> list[str]:
    """Whole models: milliseconds, and how much faster than their default and than the best other way."""
    lines = [
        "| dtype | model, layers | tokens | forward | training step | error of the logits |",
        "|---|---|---|---|---|---|",
    ]
    by_shape: dict[tuple[str, str, int], dict[str, Row]] = {}
    for row in record["rows"]:
        by_shape.setdefault((row["dtype"], row["model"], row["seqlen"]), {})[row["what"]] = row
    for (dtype, model, seqlen), rows in by_shape.items():
        cells = []
        for what in ("forward", "training"):
            if what not in rows:
                cells.append("not measured")
                continue
            row = rows[what]
            cell = f"{row['seconds']['fastattn']['min'] * 1e3:.0f} ms, {row['speedup']:.2f}x {row['default']}"
            if row["best"] != row["default"]:
                cell += f", {row['speedup_best']:.2f}x {row['best']}"
            if row.get("limit"):
                cell += f", limit {row['limit']:.2f}x"
            cells.append(cell if row["speedup_best"] >= 1 else f"*{cell}*")
        first = next(iter(rows.values()))
        named = f"{dtype} | {model}, {first['layers']}"
        lines.append(f"| {named} | {seqlen} | {' | '.join(cells)} | {first['error']:.0e} |")
    means = ", ".join(f"{mean:.2f}x ({name})" for name, mean in record["geometric_means"].items())
    switched = "; ".join(f"{model}: {what}" for model, what in SWITCHED.items())
    return [
        *lines,
        "",
        f"Each cell: our time, the speed-up over the model's default attention, by name, and over another way that is "
        f"faster than it; *italics* where that other way is faster than ours; the limit is the speed-up of attention "
        f"that costs nothing, where the model lets itself be given one. Geometric mean over the defaults: {means}. The "
        f"error is relative to the largest logit. What is switched: {switched}. "
        + footnote(record["environment"]),
    ]


def sampling_table(record: Row) -> list[str]:
    """Microseconds and reads of each work, the peers beside, and the other kinds a sentence each."""
    kinds = by_kind(record["rows"])
    vocabularies = sorted({row["vocab"] for row in kinds["work"]})
    by_work: dict[str, dict[int, Row]] = {}
    for row in kinds["work"]:
        by_work.setdefault(row["work"], {})[row["vocab"]] = row
    lines = [
        "Microseconds of the median draw, its reads of the row beyond a call's fixed cost (mean and 99th percentile of "
        "the draws in brackets), times faster than transformers' processors with softmax and multinomial; batch 1, one "
        "thread; *italics* miss what we require.",
        "",
        f"| sampling from | {' | '.join(map(str, vocabularies))} | required |",
        "|---" * (len(vocabularies) + 2) + "|",
    ]
    for work, by_vocab in by_work.items():
        cells = [sampling_cell(by_vocab[vocab]) if vocab in by_vocab else "" for vocab in vocabularies]
        (need,) = {tuple(row["required"].items()) for row in by_vocab.values()}
        wanted = ", ".join(
            f"{limit:.0f} reads" if name == "reads" else f"{limit:.0f}x" for name, limit in need
        )
        lines.append(f"| {work} | {' | '.join(cells)} | {wanted} |")
    if penalties := {row["vocab"]: row for row in kinds.get("penalties", [])}:
        cells = [
            marked(f"{penalties[vocab]['reads']:.1f} reads more", penalties[vocab])
            if vocab in penalties
            else ""
            for vocab in vocabularies
        ]
        (first, *_) = penalties.values()
        lines.append(
            f"| {first['work']} | {' | '.join(cells)} | {first['required']['reads']:.0f} read more |"
        )
    return [*lines, "", *sampling_sentences(kinds), "", footnote(record["environment"])]


def sampling_cell(row: Row) -> str:
    """Microseconds, reads, speed-up over transformers."""
    us, more = row["draws"]["median"] * 1e6, f"{row['reads_mean']:.1f}, {row['reads_p99']:.1f}"
    return marked(f"{us:.0f} us, {row['reads']:.1f} ({more}) reads, {row['speedup']:.0f}x", row)


def sampling_sentences(kinds: dict[str, list[Row]]) -> list[str]:
    """The other peers, rows that are meant to hurt, batches, and a call's fixed cost."""
    lines = []
    beside = [row for row in kinds["work"] if len(row["speedups"]["min"]) > 1]
    for peer, name in (("torch.topk", "`torch.topk` and multinomial"), ("partial_sort", "llama.cpp's way")):
        times = [f"{row['speedups']['min'][peer]:.1f}x ({row['vocab']})" for row in beside]
        if times:
            lines.append(f"* {beside[0]['work']}, speed-up over {name}: {', '.join(times)}.")
    if dense := kinds.get("dense"):
        times = [f"{row['reads']:.1f} ({row['vocab']})" for row in dense]
        lines.append(f"* {dense[0]['work']}: {', '.join(times)} reads more.")
    if hurt := kinds.get("adversarial"):
        worst = max(hurt, key=lambda row: row["times"])
        missed, most = sum(not row["met"] for row in hurt), worst["required"]["times"]
        lines.append(
            f"* Rows ascending, all equal and of two values: at most {marked(format(worst['times'], '.1f'), worst)} "
            f"times the random row ({worst['work']}, {worst['row']}, {worst['vocab']}); {missed} of {len(hurt)} are "
            f"above {most:.0f} times."
        )
    if batch := kinds.get("batch"):
        speedups = [f"{marked(format(row['speedup'], '.2f'), row)}" for row in batch]
        reads = ", ".join(f"{row['read_speedup']:.2f}" for row in batch)
        lines.append(
            f"* Batch {batch[0]['batch']}, two threads over one, in the order of the table: {', '.join(speedups)}; "
            f"a read of the same rows and nothing else: {reads}."
        )
    if fixed := kinds.get("fixed"):
        costs = [
            f"{marked(format(row['call_seconds'] * 1e6, '.1f') + ' us', row)} ({row['work']})"
            for row in fixed
        ]
        lines.append(f"* A call's fixed cost: {', '.join(costs)}.")
    return lines


def footnote(environment: Row) -> str:
    """Where and when."""
    e = environment
    return (
        f"<sub>{e['cpu']}, {e['threads']} threads, ISA {e['isa']}, load average {e['load_average']:.1f}, "
        f"torch {e['torch']}, commit {e['commit']}, {e['date']} UTC.</sub>"
    )


def digest() -> str:
    """Of the data that the plot shows: stands in the plot, so that a stale one is found without drawing it."""
    return "sha256 " + hashlib.sha256((RESULTS / "attention.json").read_bytes()).hexdigest()


TABLES = {
    "README.md": {
        "attention": attention_table,
        "attention_amx": amx_table,
        "sampling": sampling_table,
        "generate": generate_table,
    },
    "docs/drop-in.md": {"models": models_table},
    "docs/gpu.md": {"gpu_static": cuda_table, "cuda_mutants": mutants_table, "triton_static": triton_table},
}


def render(document: str, text: str) -> str:
    """The document with every table made anew."""
    for name, table in TABLES[document].items():
        path = RESULTS / f"{name}.json"
        if not path.exists():
            continue
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        block = "\n".join((begin, *table(json.loads(path.read_text())), end))
        pattern = f"{re.escape(begin)}.*?{re.escape(end)}"
        text, count = re.subn(pattern, block.replace("\\", r"\\"), text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"{document}: expected one pair of markers {begin} ... {end}, found {count}")
    return text


def main() -> None:
    texts = {document: (ROOT / document).read_text() for document in TABLES}
    made = {document: render(document, text) for document, text in texts.items()}
    if "--check" in sys.argv:
        if made != texts or digest() not in PLOT.read_text():
            raise SystemExit(
                "a document or the plot differs from benchmarks/results: run benchmarks/report.py"
            )
        return
    from plot import draw  # matplotlib: only who draws needs it

    for document, text in made.items():
        (ROOT / document).write_text(text)
    draw(json.loads((RESULTS / "attention.json").read_text())["rows"], PLOT, digest())


if __name__ == "__main__":
    main()
