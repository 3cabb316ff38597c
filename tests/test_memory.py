"""No call holds a buffer of seqlen_q x seqlen_k: the peak of a process that makes one is looked at, Linux only."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tree import ROOT

SEQLEN = 6144
# One score per pair takes 36 MiB as a byte. Above 32 MiB glibc's malloc always maps and unmaps, so that no memory
# that an earlier call has freed can hide one.
LIMIT = 16 << 20

PROGRAM = """
import sys
from pathlib import Path
import torch
from fastattn import attention, attention_varlen

SEQLEN, HEADDIM = int(sys.argv[1]), 32
torch.set_num_threads(2)
q, k, v, dout = (torch.randn(1, SEQLEN, 1, HEADDIM) for _ in range(4))
narrow = [x.bfloat16() for x in (q, k, v)]
cu = torch.tensor([0, SEQLEN // 3, SEQLEN], dtype=torch.int32)
row = torch.randn(1, 1, 1, SEQLEN)

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

def by_hand(q, k, v):
    return torch.softmax((q[:, :, 0] @ k[:, :, 0].mT), -1) @ v[:, :, 0]

CALLS = {
    "plain": lambda q, k, v: attention(q, k, v, causal=True),
    "modifiers": lambda q, k, v: attention(q, k, v, softcap=9.0, alibi_slopes=torch.ones(1), sinks=torch.zeros(1)),
    "window": lambda q, k, v: attention(q, k, v, window_size=(500, 20)),
    "mask": lambda q, k, v: attention(q, k, v, attn_mask=row > 0),
    "bias": lambda q, k, v: attention(q, k, v, attn_bias=row.requires_grad_()),
    "dropout": lambda q, k, v: attention(q, k, v, dropout_p=0.2),
    "varlen": lambda q, k, v: attention_varlen(q[0], k[0], v[0], cu, cu, SEQLEN, SEQLEN, causal=True),
    "bfloat16": lambda q, k, v: attention(*narrow, causal=True),
    "by hand": by_hand,
}

def measure(call, backward):
    x = [t.detach().requires_grad_(backward) for t in (q, k, v)]
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = status("VmRSS")
    out = call(*x)
    if backward and out.requires_grad:
        out.backward(dout.view_as(out))
    return status("VmHWM") - before

narrow = [x.requires_grad_() for x in narrow]
for name, call in CALLS.items():
    for backward in (False, True):
        measure(call, backward)  # each thread's working memory, which stays
        print(name, "backward" if backward else "forward", measure(call, backward), sep="/")
"""


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak of a call is read from Linux's /proc"
)
def test_memory_does_not_grow_with_the_scores():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(SEQLEN)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    peaks = {line.rpartition("/")[0]: int(line.rpartition("/")[2]) for line in done.stdout.splitlines()}
    by_hand = [peaks.pop(f"by hand/{which}") for which in ("forward", "backward")]
    assert min(by_hand) > 4 * SEQLEN**2  # what would be seen
    assert len(peaks) == 16
    assert {name: peak for name, peak in peaks.items() if peak > LIMIT} == {}
