"""The tests of the Triton kernels tested: planted bugs, each of which they must see.

A mutant is a copy of the package with one line of a kernel changed. A compiler's error would be no merit of the tests:
only a failed assertion or a fault that ttsem names counts.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tree import ROOT


class Mutant(NamedTuple):
    file: str
    old: str
    new: str
    tests: str  # file and -k of those that must see it
    seen_by: str = "values"  # or what ttsem says


MUTANTS = {
    "no mask on the tail's store": Mutant(
        "attention.py", "stored = rows.inside[:, None] & (d < headdim_v)[None, :]",
        "stored = (rows.i >= 0)[:, None] & (d < headdim_v)[None, :]",
        "test_triton_forward.py::test_blocks[32-16]", "past the end of the tensor|race",
    ),
    "no mask on the tail's keys": Mutant(
        "primitives.py", "    if MASKED and EVEN_D:\n        return tl.load(at, mask=inside[:, None], other=0.0)",
        "    if MASKED and EVEN_D:\n        return tl.load(at)",
        "test_triton_forward.py::test_blocks[32-16]", "past the end of the tensor",
    ),
    "accumulator not rescaled": Mutant(
        "primitives.py", "acc = state.acc * shrink[:, None]\n    acc = tl.dot", "acc = state.acc\n    acc = tl.dot",
        "test_triton_forward.py::test_blocks[32-16]",
    ),
    "stale maximum": Mutant(
        "primitives.py", "    return State(top, total, acc)", "    return State(state.top, total, acc)",
        "test_triton_forward.py::test_blocks[32-16]",
    ),
    "causal edge one key too far": Mutant(
        "primitives.py", "distance >= -modifiers.right", "distance > -modifiers.right - 2",
        "test_triton_forward.py::test_blocks[32-16]",
    ),
    "causal edge's last key not visited": Mutant(
        "primitives.py", "end = tl.minimum(end, rows.last + offset + right + 1)",
        "end = tl.minimum(end, rows.last + offset + right)", "test_triton_forward.py::test_features",
    ),
    "unmasked blocks reach into the window's edge": Mutant(
        "primitives.py", "(tl.maximum(rows.last + offset - left, 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N",
        "tl.maximum(rows.last + offset - left, 0) // BLOCK_N * BLOCK_N", "test_triton_forward.py::test_blocks",
    ),
    "page of the place before the padding": Mutant(
        "primitives.py", "table + place // page_size", "table + j // page_size",
        "test_triton_decode.py::test_cache",
    ),
    "split one key too long": Mutant(
        "decode.py", "last_key = tl.minimum(first_key + SPLIT * split_factor, seq.seqlen_k)",
        "last_key = tl.minimum(first_key + SPLIT * split_factor + 1, seq.seqlen_k)",
        "test_triton_decode.py::test_cache",
    ),
    "parts that nobody wrote are read": Mutant(
        "combine.py", "used = (weight > 0)[:, None]", "used = (weight >= 0)[:, None]",
        "test_triton_decode.py::test_combine",
    ),
    "dropout not in dP": Mutant(
        "attention_backward.py", "dp = tl.where(keep, dp * dropout_scale, 0.0)", "dp = dp * dropout_scale",
        "test_triton_backward.py::test_gradients_of_out_and_lse",
    ),
    "gradient of lse forgotten": Mutant(
        "attention_backward.py", "total -= tl.load(dlse", "total -= 0 * tl.load(dlse",
        "test_triton_backward.py::test_gradients_of_out_and_lse",
    ),
    "a query block too few for dK": Mutant(
        "primitives.py", "end = tl.minimum(end, first_key + BLOCK_N - offset + left)",
        "end = tl.minimum(end, first_key - offset + left)", "test_triton_backward.py::test_packed_sequences",
    ),
    "ties all kept": Mutant(
        "sampling_row.py", "found = tl.min(tl.where((running >= target)", "found = tl.max(tl.where((running >= target)",
        "test_triton_sampling.py::test_zeros_are_equal_whatever_their_sign",
    ),
    "nucleus too small": Mutant(
        "sampling.py", "target = tl.ceil(top_p * total.to(tl.float64))", "target = tl.ceil(0.9 * top_p * total.to(tl.float64))",
        "test_triton_sampling.py::test_every_k_and_every_p",
    ),
    "a greedy row keeps all": Mutant(
        "sampling.py", "    cut_id = best\n", "    cut_id = vocab - 1\n",
        "test_triton_sampling.py::test_every_k_and_every_p",
    ),
    "min_p on the wrong side": Mutant(
        "sampling.py", "& ~(log_odds < log_min_p)", "& ~(log_odds > log_min_p)",
        "test_triton_sampling.py::test_extreme_logits",
    ),
    "a row without a token keeps some": Mutant(
        "sampling.py", "(keeps & ~is_bad)", "keeps",
        "test_triton_sampling.py::test_a_row_that_has_no_token_is_minus_one_and_harms_nobody",
    ),
    "tokens of the prompt count as unseen": Mutant(
        "sampling_edits.py", "is_seen = is_seen | (", "is_seen = is_seen & (",
        "test_triton_sampling_edits.py::test_penalties_per_row[dense]",
    ),
    "presence of tokens never written": Mutant(
        "sampling_edits.py", "tl.where(count > 0, written, scaled)", "written",
        "test_triton_sampling_edits.py::test_penalties_per_row[sparse]",
    ),
    "penalties of the first row": Mutant(
        "sampling_edits.py", "presence + row * presence_row", "presence",
        "test_triton_sampling_edits.py::test_penalties_per_row[sparse]",
    ),
    "divides where it multiplies": Mutant(
        "sampling_edits.py", "tl.where(x > 0, inverse, penalties.repetition)", "tl.where(x < 0, inverse, penalties.repetition)",
        "test_triton_sampling_edits.py::test_penalties_per_row[dense]",
    ),
    "NaN hidden by the mask": Mutant(
        "sampling_edits.py", "is_allowed(dense, ids, inside, PACKED) | (x != x)", "is_allowed(dense, ids, inside, PACKED)",
        "test_triton_sampling_edits.py::test_rows_that_edits_break",
    ),
    "packed bits from the other end": Mutant(
        "sampling_edits.py", "(word >> (ids % 32)", "(word >> (31 - ids % 32)",
        "test_triton_sampling_edits.py::test_edited_rows_beside_plain_ones[sparse-a]",
    ),
    "only the first bias of a token": Mutant(
        "sampling_edits.py", "        same = same & (i < listed.n)\n", "        same = same & (i < 0)\n",
        "test_triton_sampling_edits.py::test_biases_of_a_token_add_up_in_their_order",
    ),
    "every bias of a token taken for its first": Mutant(
        "sampling_edits.py", "leads = (ids >= 0) & (ids != before)", "leads = ids >= 0",
        "test_triton_sampling_edits.py::test_biases_of_a_token_add_up_in_their_order", "KernelFault|AssertionError",
    ),
    "biased tokens written by two programs": Mutant(
        "sampling_edits.py", "written = inside & ~has_bias", "written = inside",
        "test_triton_sampling_edits.py::test_edited_rows_beside_plain_ones[sparse-pb]", "both touch element",
    ),
    "biased tokens pay no penalties": Mutant(
        "sampling_edits.py", "at, is_seen = look_up(seen, ids, leads)", "at, is_seen = look_up(seen, ids, ids < 0)",
        "test_triton_sampling_edits.py::test_edited_rows_beside_plain_ones[sparse-pb]",
    ),
    "a search that ends one step too early": Mutant(
        "sampling_edits.py", "while open > 1:", "while open > 4:",
        "test_triton_sampling_edits.py::test_edited_rows_beside_plain_ones[sparse-pb]",
    ),
    "seen tokens past the list's end": Mutant(
        "sampling_edits.py", "inside = i < seen.n", "inside = i >= 0",
        "test_triton_sampling_edits.py::test_edited_rows_beside_plain_ones[sparse-p]", "KernelFault",
    ),
    "ids below the padding's not noticed": Mutant(
        "sampling_edits.py", "(tl.load(biased.ids) < -1) | ", "",
        "test_triton_sampling_edits.py::test_rows_that_edits_break",
    ),
    "ids above the vocabulary not noticed": Mutant(
        "sampling_edits.py", " | (tl.load(biased.ids + biases - 1) >= vocab)", "",
        "test_triton_sampling_edits.py::test_rows_that_edits_break", "KernelFault",
    ),
    "biases in the order of the list": Mutant(
        "sampling_edits.py", "args.edits.with_ascending_bias()", "args.edits",
        "test_triton_sampling_edits.py::test_edited_rows_beside_plain_ones[sparse-b]",
    ),
    "the edited row has the stride of logits": Mutant(
        "sampling_edits.py", "edited + row * vocab, penalties", "edited + row * logits_row, penalties",
        "test_triton_sampling_edits.py::test_edited_logits_are_rounded_once", "KernelFault|AssertionError",
    ),
    "a token is ahead of itself": Mutant(
        "sampling_logprobs.py", "other[None, :] > mine[:, None]", "other[None, :] >= mine[:, None]",
        "test_triton_sampling_edits.py::test_logprobs_of_all_tokens[70]", "KernelFault|AssertionError",
    ),
    "blocks collect into the same slots": Mutant(
        "sampling_logprobs.py", "            before += here\n", "",
        "test_triton_sampling_edits.py::test_logprobs[dtype0]", "KernelFault|AssertionError",
    ),
    "the best include nothing that is not finite": Mutant(
        "sampling_logprobs.py", "cut_key = tl.zeros([], tl.uint32)", "cut_key = tl.full([], R.LOWEST_KEY, tl.uint32)",
        "test_triton_sampling_edits.py::test_what_is_not_finite_comes_last", "KernelFault|AssertionError",
    ),
    "the softmax without its maximum": Mutant(
        "sampling_logprobs.py", "norm = wide + tl.log(", "norm = tl.log(",
        "test_triton_sampling_edits.py::test_logprobs_of_extreme_logits",
    ),
    "a row without a softmax keeps its token": Mutant(
        "sampling_logprobs.py", "tl.store(tokens + row, -1)", "pass",
        "test_triton_sampling_edits.py::test_logprobs_of_rows_without_a_softmax",
    ),
    "ids of the other end": Mutant(
        "sampling_logprobs.py", "ids = (mine & ID_MASK) ^ ID_MASK", "ids = mine & ID_MASK",
        "test_triton_sampling_edits.py::test_logprobs_of_extreme_logits", "KernelFault|AssertionError",
    ),
    "log-probabilities of the edited logits": Mutant(
        "sampling.py", "rank(args, tokens) if", "rank(args._replace(logits=edited(args)), tokens) if",
        "test_triton_sampling_edits.py::test_logprobs_are_those_of_the_logits_as_they_came",
    ),
}  # fmt: skip
# `make test-slow` plants the other ones of sampling.
CORE = {
    "ties all kept", "nucleus too small", "biased tokens written by two programs", "only the first bias of a token",
    "blocks collect into the same slots",
}  # fmt: skip
SAMPLING = {name for name, mutant in MUTANTS.items() if mutant.file.startswith("sampling")}
CASES = [pytest.param(name, marks=pytest.mark.slow if name in SAMPLING - CORE else ()) for name in MUTANTS]


def run_mutant(mutant: Mutant, folder: Path) -> subprocess.CompletedProcess[str]:
    package = folder / "fastattn"
    shutil.copytree(ROOT / "fastattn", package, ignore=shutil.ignore_patterns("__pycache__", "kernels"))
    shutil.copytree(ROOT / "kernels", package / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    source = package / "kernels" / mutant.file
    text = source.read_text()
    assert text.count(mutant.old) == 1, f"{mutant.file} has {text.count(mutant.old)} of: {mutant.old}"
    source.write_text(text.replace(mutant.old, mutant.new))
    command, environment = ["ttsem.sanitize", "pytest"], {}
    if mutant.seen_by == "values":
        command, environment = ["pytest"], {"TRITON_INTERPRET": "1"}
    tests = f"{ROOT}/tests/triton_kernels/{mutant.tests}"
    return subprocess.run(
        [sys.executable, "-m", *command, "-x", "-q", "-p", "no:cacheprovider", tests],
        cwd=folder, env={**os.environ, **environment, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory):
    """Every mutant that is asked for, two at a time."""
    wanted = [
        item.callspec.params["name"] for item in request.session.items if item.function is test_mutant_is_seen
    ]
    with ThreadPoolExecutor(2) as pool:
        yield {
            name: pool.submit(run_mutant, MUTANTS[name], tmp_path_factory.mktemp("mutant")) for name in wanted
        }


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(find_spec("ttsem") is None, reason="ttsem is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the kernels' own tests run on it")
@pytest.mark.parametrize("name", CASES)
def test_mutant_is_seen(name, outcomes):
    done = outcomes[name].result()
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-2000:]
    assert "CompilationError" not in done.stdout, done.stdout[-3000:]
    assert "InterpreterError" not in done.stdout, done.stdout[-3000:]
    expected = "AssertionError" if MUTANTS[name].seen_by == "values" else MUTANTS[name].seen_by
    assert re.search(expected, done.stdout), done.stdout[-3000:]
