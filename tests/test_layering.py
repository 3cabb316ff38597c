"""The house keeps its floors: imports go strictly downwards, kernels know no framework."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# A module may import only modules of a lower floor, or of its own folder where the folder shares a floor.
FLOORS = {
    "fastattn._C": 3,
    "fastattn._cuda": 3,
    "fastattn.calls": 3,
    "fastattn.gradient_sums": 2,
    "fastattn.kernels": 3,
    "fastattn.backends.reference": 4,
    "fastattn.backends.reference_sampling": 4,
    "fastattn.backends.reference_dropout": 4,
    "fastattn.backends.cpu": 4,
    "fastattn.backends.triton": 4,
    "fastattn.backends.cuda": 4,
    "fastattn.backends.cpu_sampling": 4,
    "fastattn.args": 5,
    "fastattn.checks": 5,
    "fastattn.attention_checks": 5,
    "fastattn.sampling_checks": 5,
    "fastattn.token_counts": 5,
    "fastattn.ops": 5,
    "fastattn.plain": 5,
    "fastattn.backends": 5,
    "fastattn.attention": 6,
    "fastattn.varlen": 6,
    "fastattn.kvcache": 6,
    "fastattn.merge": 6,
    "fastattn.sdpa": 6,
    "fastattn.flash_attn": 7,
    "fastattn.nn": 7,
    "fastattn.integrations": 8,
    "fastattn.sampling": 6,
    "fastattn.linear": 6,
    "fastattn.fused": 6,
    "fastattn.model": 7,
    "fastattn.tokenizer": 8,
    "fastattn.vocabulary": 8,
    "fastattn.decoding": 8,
    "fastattn.choice": 8,
    "fastattn.perplexity": 8,
    "fastattn.prompts": 8,
    "fastattn.generate": 8,
    "fastattn.info": 8,
    "fastattn.doctor": 8,
    "fastattn.cli": 8,
    "fastattn.commands": 8,
    "fastattn.__main__": 8,
    "fastattn": 9,
}
SHARED = {5, 7, 8}  # floors whose modules may import each other


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor_of(module: str) -> int | None:
    while module:
        if module in FLOORS:
            return FLOORS[module]
        module = module.rpartition(".")[0]
        if module == "fastattn":  # a module that nobody gave a floor
            return None
    return None


def imports_of(tree: ast.Module) -> list[str]:
    """Run-time imports of our own modules, wherever they stand; what only the type checker sees is exempt."""
    found: list[str] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.extend(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module:
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            known = [name for name in submodules if name in FLOORS or is_module(name)]
            found.extend(known or [node.module])
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return [name for name in found if name.split(".")[0] == "fastattn"]


def is_module(name: str) -> bool:
    path = ROOT / Path(*name.split("."))
    return path.with_suffix(".py").exists() or path.is_dir()


def test_imports_go_downwards():
    wrong = []
    for path in sorted((ROOT / "fastattn").rglob("*.py")):
        module = module_of(path)
        own = floor_of(module)
        assert own is not None, f"{module} has no floor: give it one in FLOORS, and a line in DESIGN.md"
        for target in imports_of(ast.parse(path.read_text())):
            floor = floor_of(target)
            assert floor is not None, f"{module} imports {target}, which has no floor"
            one_backend = own == floor == 4 and target.startswith(module)  # reference and reference_sampling
            one_folder = (
                own == floor == 6
                and module.startswith("fastattn.sampling")
                and target.startswith("fastattn.sampling.")
            )
            if not (floor < own or (floor == own and own in SHARED) or one_backend or one_folder):
                wrong.append(f"{module} (floor {own}) imports {target} (floor {floor})")
    assert not wrong, "\n".join(wrong)


def test_backends_do_not_know_each_other():
    files = [p for p in (ROOT / "fastattn" / "backends").glob("*.py") if p.name != "__init__.py"]
    for path in files:
        backend = path.stem.split("_")[0]
        for other in {p.stem for p in files if p.stem.split("_")[0] != backend}:
            assert f"backends.{other}" not in path.read_text(), f"{path.name} imports {other}"


def test_triton_kernels_know_only_each_other():
    for path in sorted((ROOT / "kernels").glob("*.py")):
        for target in imports_of(ast.parse(path.read_text())):
            assert target.startswith("fastattn.kernels"), f"{path.name} imports {target}"


def test_kernels_include_no_framework_and_no_standard_library():
    allowed = {"cstdint", "cstddef", "cstring", "immintrin.h", "arm_neon.h", "cpuid.h"}
    bindings = {"bindings.cpp", "bindings_cuda.cpp", "binding_params.h"}
    hosts = {
        "features.h",
        "registry.h",
        "registry.cpp",
        "scratch.h",
        "scratch.cpp",
        "turns.h",
        "turns.cpp",
        *bindings,
        "plain_attention.h",
        "plain_attention.cpp",
        "plain_kvcache.cpp",
        "plain_sampling.cpp",
        "plain_tensor.h",
        "plain_tensor.cpp",
    }  # compiled without -m flags
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix not in {".h", ".cpp", ".inc", ".cu", ".cuh"}:
            continue
        text = path.read_text()
        assert "torch" not in re.sub(r"//.*", "", text) or path.name in bindings, path
        assert ("pybind11" not in text) or path.name in bindings, path
        if path.name in hosts:
            continue
        system = set(re.findall(r"#include <([^>]+)>", text))
        assert system <= allowed, f"{path}: {system - allowed}"
        assert "std::" not in text, path


def test_sizes():
    """Soft sizes made hard where they matter: setup.py, and nothing grows past twice the soft size of a file."""
    assert len((ROOT / "setup.py").read_text().splitlines()) <= 150
    for folder, patterns in (
        ("fastattn", ["*.py"]),
        ("csrc", ["*.h", "*.cpp", "*.cu", "*.cuh"]),
        ("benchmarks", ["*.py"]),
        ("kernels", ["*.py"]),
    ):
        for pattern in patterns:
            for path in (ROOT / folder).rglob(pattern):
                assert len(path.read_text().splitlines()) <= 500, f"{path} is too long"
