"""Writes tests/data/llamacpp_logits.safetensors: what llama.cpp computes with the tiny GGUF files of the model tests.

Run it by hand: ``python tests/make_llamacpp_logits.py``. It needs llama-cpp-python beside the test requirements; the
tests only read what it wrote. A file's weights follow from its name (``decoder_checks.randomised``), so the tests
write the same file again.

For model NAME:
    NAME.logits  (KEPT, vocab) float32, of the last tokens of ``decoder_checks.prompt(SEQLEN)``
    NAME.greedy  (GREEDY,) int32, the tokens that follow it
    NAME.sum     () float64, of all weights, to tell a changed random generator from a wrong result
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import test_model_gated
import test_model_gpt
import torch
from decoder_checks import prompt

OUT = Path(__file__).parent / "data" / "llamacpp_logits.safetensors"
SEQLEN, KEPT, GREEDY = 24, 12, 12
# llama.cpp names GPT-J without running it, asks for every bias that GPT-NeoX may have, and knows no window of Llama.
LEFT_OUT = {"gptj", "gptj-inner", "gpt_neox-plain", "mistral-window"}
NAMES = [
    name for name in (*test_model_gpt.GGUF_MODELS, *test_model_gated.GGUF_MODELS) if name not in LEFT_OUT
]

# Keys of the file that llama.cpp reads of other architectures only.
SETTINGS = {"llama-yarn": {"yarn_beta_fast": 2.0, "yarn_beta_slow": 0.25}}


def written(name: str, path: Path) -> float:
    """The sum of the weights of a model of the model tests, written into a GGUF file as they do."""
    tests = test_model_gpt if name in test_model_gpt.MODELS else test_model_gated
    model = tests.random_model(name)
    tests.write_gguf(path, model)
    return sum(p.double().sum().item() for p in model.parameters())


@functools.cache
def _silent(c):
    """A log callback that says nothing, kept alive."""
    return c.llama_log_callback(lambda level, text, data: None)


class LlamaCpp:
    """A model in llama.cpp: float32 KV cache, no flash attention, one thread, no tokenizer."""

    def __init__(self, path: Path, **settings: float) -> None:
        from llama_cpp import llama_cpp as c

        self.c = c
        c.llama_log_set(_silent(c), None)
        self.model = c.llama_model_load_from_file(str(path).encode(), c.llama_model_default_params())
        assert self.model, path
        params = c.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = 64, 64, 64
        params.n_threads = params.n_threads_batch = 1
        params.type_k = params.type_v = c.GGML_TYPE_F32
        params.flash_attn_type = 0
        for key, value in settings.items():
            setattr(params, key, value)
        self.context = c.llama_init_from_model(self.model, params)
        self.vocab = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self.model))
        self.seqlen = 0

    def __call__(self, ids: list[int]) -> torch.Tensor:
        """Logits (len(ids), vocab) of the next tokens."""
        import numpy as np

        batch = self.c.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, self.seqlen + i, 1, True
            batch.seq_id[i][0] = 0
        assert self.c.llama_decode(self.context, batch) == 0
        self.seqlen += len(ids)
        rows = [
            np.ctypeslib.as_array(self.c.llama_get_logits_ith(self.context, i), (self.vocab,))
            for i in range(len(ids))
        ]
        logits = torch.tensor(np.stack(rows))  # (len(ids), vocab)
        self.c.llama_batch_free(batch)
        return logits


def main() -> None:
    """Write the fixture."""
    from safetensors.torch import save_file

    tensors = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in NAMES:
            path = Path(folder, f"{name}.gguf")
            total = written(name, path)
            model = LlamaCpp(path, **SETTINGS.get(name, {}))
            logits = model(prompt(SEQLEN).tolist())  # (SEQLEN, vocab)
            greedy, last = [], logits[-1]
            for _ in range(GREEDY):
                greedy.append(int(last.argmax()))
                last = model(greedy[-1:])[0]
            tensors[f"{name}.logits"] = logits[-KEPT:].clone()
            tensors[f"{name}.greedy"] = torch.tensor(greedy, dtype=torch.int32)
            tensors[f"{name}.sum"] = torch.tensor(total, dtype=torch.float64)
            print(name, greedy)
    save_file(tensors, OUT)
    print(OUT, OUT.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
