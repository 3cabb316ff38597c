"""``python -m fastattn.doctor [--json]``: what this machine has, which kernels would serve, why not others.

Needs nothing but torch: every other package is looked for, not imported.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from fastattn.args import AttentionArgs, SamplingArgs
from fastattn.backends import available_backends, resolve
from fastattn.backends.cpu import cpu_isa, cpu_isas
from fastattn.generate import INSTALL_DEFAULT, default_model

# extra: the packages, by import name, that it brings
EXTRAS = {
    "model": ("gguf", "safetensors", "tokenizers", "jinja2", "typer", "rich"),
    "hub": ("huggingface_hub",),
}

MAPS = Path("/proc/self/maps")  # Linux only; elsewhere the OpenMP runtimes are not listed

Section = dict[str, Any]


def examine() -> dict[str, Section]:
    """Everything that the report says, by section; the values are JSON."""
    return {
        "versions": _versions(),
        "cpu": _cpu(),
        "threads": _threads(),
        "cuda": _cuda(),
        "backends": available_backends(),
        "serving": _serving(),
        "extras": {extra: _missing(packages) for extra, packages in EXTRAS.items()},
        "model": {"default": None if (path := default_model()) is None else str(path)},
    }


def _versions() -> Section:
    versions: Section = {
        "fastattn": sys.modules["fastattn"].__version__,  # the package we are in; it stands a floor above
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for name in ("triton", "transformers"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _cpu() -> Section:
    try:
        active, problem = cpu_isa(), None
    except RuntimeError as error:
        active, problem = None, str(error)
    return {
        "name": _cpu_name(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "isas": list(cpu_isas()),
        "isa": active,
        "forced_by": f"FASTATTN_CPU_ISA={forced}" if (forced := os.environ.get("FASTATTN_CPU_ISA")) else None,
        "problem": problem,
    }


def _cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _threads() -> Section:
    runtimes = openmp_runtimes(MAPS.read_text()) if MAPS.is_file() else []
    return {
        "torch": torch.get_num_threads(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "openmp": runtimes,
        "warning": "several OpenMP runtimes share the cores: import torch before anything that brings its own"
        if len(runtimes) > 1
        else None,
    }


def openmp_runtimes(maps: str) -> list[str]:
    """Paths of the OpenMP runtimes in the text of a /proc/<pid>/maps, each once."""
    paths = re.findall(r"\s(/\S*/lib(?:gomp|omp|iomp5)[-.\w]*\.so[.\d]*)$", maps, re.MULTILINE)
    return list(dict.fromkeys(paths))


def _cuda() -> Section:
    devices = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            devices.append(f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})")
    try:
        found = re.search(r"Module\s+(\d[\d.]*)", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        found = None
    return {
        "devices": devices,
        "driver": found[1] if found else None,
        "torch_built_for": torch.version.cuda,
        "nvcc": shutil.which("nvcc"),
    }


def _serving() -> Section:
    """Which backend takes a plain call with ``backend="auto"``, or why none does."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    q = torch.zeros(1, 1, 1, 64, device=device)  # (batch, seqlen_q, nheads, headdim)
    row = torch.zeros(1, device=device)  # (batch,)
    ids = row.long()
    calls: dict[str, AttentionArgs | SamplingArgs] = {
        "attention": AttentionArgs(q, q, q, softmax_scale=0.125, causal=True),
        "sample": SamplingArgs(torch.zeros(1, 8, device=device), row, ids.int(), row, row, ids, ids),
    }
    serving: Section = {
        "forced_by": f"FASTATTN_BACKEND={name}" if (name := os.environ.get("FASTATTN_BACKEND")) else None
    }
    for call, args in calls.items():
        try:
            module = resolve("auto", args)
        except (ValueError, RuntimeError) as error:  # NotImplementedError is a RuntimeError
            serving[call] = f"nothing: {error}"
            continue
        is_served = hasattr(module, call)
        isa = f" ({cpu_isa()})" if module.NAME == "cpu" else ""
        serving[call] = f"{module.NAME}{isa}" if is_served else f"nothing: {module.NAME} has no {call}"
    return serving


def _missing(packages: tuple[str, ...]) -> list[str]:
    return [name for name in packages if importlib.util.find_spec(name) is None]


def render(found: dict[str, Section]) -> str:
    """The report as text: a label and what there is, in two columns."""
    cpu, threads, cuda, serving = (found[name] for name in ("cpu", "threads", "cuda", "serving"))
    rows: list[tuple[str, str]] = [
        (name, version or "not installed") for name, version in found["versions"].items()
    ]
    rows += [
        ("", ""),
        ("CPU", f"{cpu['name']}, {cpu['cores']} cores, {cpu['usable_cores']} usable"),
        ("instruction sets", ", ".join(cpu["isas"]) or "none built"),
        ("in use", cpu["isa"] or cpu["problem"]),
        ("forced by", cpu["forced_by"] or "nothing (FASTATTN_CPU_ISA)"),
        ("threads", f"{threads['torch']} (torch.get_num_threads)"),
        ("OpenMP", ", ".join(threads["openmp"]) or "no runtime found"),
    ]
    rows += [("warning", threads["warning"])] if threads["warning"] else []
    rows += [
        ("", ""),
        ("CUDA devices", ", ".join(cuda["devices"]) or "none"),
        ("CUDA driver", cuda["driver"] or "none"),
        ("torch built for", f"CUDA {cuda['torch_built_for']}" if cuda["torch_built_for"] else "CPU only"),
        ("nvcc", cuda["nvcc"] or "not on PATH"),
        ("", ""),
    ]
    rows += [(f"backend {name}", reason or "can run here") for name, reason in found["backends"].items()]
    rows += [(f"{call} is served by", serving[call]) for call in ("attention", "sample")]
    rows += [("forced by", serving["forced_by"] or "nothing (FASTATTN_BACKEND)"), ("", "")]
    for extra, missing in found["extras"].items():
        how = f"lacks {', '.join(missing)}: pip install 'fastattn[{extra}]'"
        rows.append((f"extra {extra}", how if missing else "installed"))
    rows.append(("default model", found["model"]["default"] or f"not found: {INSTALL_DEFAULT}"))
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {text}".rstrip() for label, text in rows)


def main(arguments: list[str] | None = None) -> None:
    """The command line of this module; prints the report."""
    parser = argparse.ArgumentParser(prog="fastattn doctor", description="What would serve on this machine.")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    found = examine()
    print(json.dumps(found, indent=2) if parser.parse_args(arguments).json else render(found))


if __name__ == "__main__":
    main()
