"""The GGUF reader: every value and tensor type, and every way a file can be broken, by the message it gives.

Files are built byte by byte here (``File``), so that a test can write what no library would.
"""

from __future__ import annotations

import re
import resource
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from oracles import weight_of

from fastattn.model import ModelFileError, load_decoder
from fastattn.model.gguf import GGUFFile

gguf = pytest.importorskip("gguf")
np = pytest.importorskip("numpy")

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
CODES = {
    U8: "B",
    I8: "b",
    U16: "H",
    I16: "h",
    U32: "I",
    I32: "i",
    F32: "f",
    BOOL: "?",
    U64: "Q",
    I64: "q",
    F64: "d",
}


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def payload(kind: int, value) -> bytes:
    """The bytes of a value; an array is (item kind, items)."""
    if kind == ARRAY:
        item, values = value
        return struct.pack("<IQ", item, len(values)) + b"".join(payload(item, v) for v in values)
    return string(value) if kind == STRING else struct.pack("<" + CODES[kind], value)


@dataclass
class Entry:
    """A tensor: ``offset`` None means where the data of the one before ends, padded."""

    name: str
    dims: list[int]
    kind: int
    data: bytes
    offset: int | None = None


@dataclass
class File:
    """A GGUF file in pieces; counts that are None are the true ones."""

    keys: list[tuple[str | bytes, int, bytes]] = field(default_factory=list)
    tensors: list[Entry] = field(default_factory=list)
    magic: bytes = b"GGUF"
    version: int = 3
    tensor_count: int | None = None
    kv_count: int | None = None
    alignment: int = 32

    def set(self, key: str, kind: int, value) -> None:
        """Add the key or replace its value."""
        entry = (key, kind, payload(kind, value))
        where = [i for i, k in enumerate(self.keys) if k[0] == key]
        if where:
            self.keys[where[0]] = entry
        else:
            self.keys.append(entry)

    def drop(self, key: str) -> None:
        self.keys = [k for k in self.keys if k[0] != key]

    def tensor(self, name: str) -> Entry:
        return next(t for t in self.tensors if t.name == name)

    def header(self) -> bytes:
        counts = (
            len(self.tensors) if self.tensor_count is None else self.tensor_count,
            len(self.keys) if self.kv_count is None else self.kv_count,
        )
        out = self.magic + struct.pack("<IQQ", self.version, *counts)
        for key, kind, value in self.keys:
            out += string(key) + struct.pack("<I", kind) + value
        end = 0
        for t in self.tensors:
            offset = end if t.offset is None else t.offset
            out += string(t.name) + struct.pack(f"<I{len(t.dims)}QIQ", len(t.dims), *t.dims, t.kind, offset)
            end += -(-len(t.data) // self.alignment) * self.alignment
        return out

    def build(self) -> bytes:
        def padded(raw: bytes) -> bytes:
            return raw + bytes(-len(raw) % self.alignment)

        # The last tensor is not padded: what a truncated file lacks is always needed.
        data = [padded(t.data) for t in self.tensors[:-1]] + [t.data for t in self.tensors[-1:]]
        return padded(self.header()) + b"".join(data)


def tiny_llama() -> File:
    """A valid model of one layer: hidden 32, two heads, one KV head, vocabulary 16, tied; F32 and Q8_0."""
    file = File()
    file.set("general.architecture", STRING, "llama")
    file.set("llama.context_length", U32, 64)
    file.set("llama.embedding_length", U32, 32)
    file.set("llama.block_count", U32, 1)
    file.set("llama.feed_forward_length", U32, 32)
    file.set("llama.attention.head_count", U32, 2)
    file.set("llama.attention.head_count_kv", U64, 1)
    file.set("llama.attention.layer_norm_rms_epsilon", F32, 1e-5)
    file.set("llama.rope.freq_base", F32, 10000.0)
    file.set("llama.rope.dimension_count", U32, 16)
    file.set("tokenizer.ggml.tokens", ARRAY, (STRING, [f"token {i} é" for i in range(16)]))
    file.set("tokenizer.ggml.token_type", ARRAY, (I32, [1] * 16))
    file.set("tokenizer.ggml.add_bos_token", BOOL, False)
    file.set("tokenizer.ggml.eos_token_id", U32, 2)
    file.set("tokenizer.ggml.eot_token_id", U32, 3)
    rng = np.random.default_rng(0)

    def add(name: str, rows: int | None = None, quantised: bool = False) -> None:
        values = rng.standard_normal((rows or 1, 32)).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0 if quantised else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(values, kind).tobytes()
        file.tensors.append(Entry(f"{name}.weight", [32] if rows is None else [32, rows], int(kind), data))

    add("token_embd", 16, quantised=True)
    add("output_norm")
    add("blk.0.attn_norm")
    for part, rows in {"attn_q": 32, "attn_k": 16, "attn_v": 16, "attn_output": 32}.items():
        add(f"blk.0.{part}", rows, quantised=part != "attn_v")
    add("blk.0.ffn_norm")
    for part in ("ffn_gate", "ffn_up", "ffn_down"):
        add(f"blk.0.{part}", 32, quantised=True)
    return file


def load_bytes(tmp_path: Path, raw: bytes):
    path = tmp_path / "model.gguf"
    path.write_bytes(raw)
    return load_decoder(path)


def error_of(tmp_path: Path, raw: bytes) -> str:
    """The message; it names the file, and an offset inside the file if any."""
    with pytest.raises(ModelFileError) as caught:
        load_bytes(tmp_path, raw)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "model.gguf"))
    offset = re.search(r"\(at byte (\d+)\)$", message)
    assert offset is None or int(offset[1]) <= len(raw)
    return message


def test_loads(tmp_path):
    decoder, file = load_bytes(tmp_path, tiny_llama().build())
    config = decoder.config
    assert (config.vocab_size, config.nheads, config.nheads_k, config.headdim) == (16, 2, 1, 16)
    assert config.eos_ids == (2, 3)
    assert file.metadata["tokenizer.ggml.tokens"][3] == "token 3 é"
    assert file.kind == "gguf"
    assert file.tokenizer_json is None
    logits = decoder.forward(torch.tensor([1, 2, 3]), [3], decoder.new_cache(1, 4))
    assert logits.shape == (1, 16)
    assert logits.isfinite().all()


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_versions_and_alignments(tmp_path, version, alignment):
    file = tiny_llama()
    wanted = load_bytes(tmp_path, file.build())[0]
    file.version, file.alignment = version, alignment
    file.set("general.alignment", U32, alignment)
    decoder = load_bytes(tmp_path, file.build())[0]
    assert torch.equal(decoder.embedding, wanted.embedding)
    assert torch.equal(weight_of(decoder.layers[0].mlp.gate_up), weight_of(wanted.layers[0].mlp.gate_up))


VALUES = {
    U8: 200,
    I8: -100,
    U16: 60000,
    I16: -30000,
    U32: 4_000_000_000,
    I32: -2_000_000_000,
    F32: 0.25,
    BOOL: True,
    STRING: "naïve 你好 🙂",
    U64: 2**63 + 1,
    I64: -(2**62),
    F64: 1e-300,
}


def test_values(tmp_path):
    file = tiny_llama()
    for kind, value in VALUES.items():
        file.set(f"scalar.{kind}", kind, value)
        file.set(f"array.{kind}", ARRAY, (kind, [value] * 3))
        file.set(f"empty.{kind}", ARRAY, (kind, []))
    metadata = load_bytes(tmp_path, file.build())[1].metadata
    for kind, value in VALUES.items():
        assert metadata[f"scalar.{kind}"] == value
        assert type(metadata[f"scalar.{kind}"]) is type(value)
        assert metadata[f"array.{kind}"] == [value] * 3
        assert metadata[f"empty.{kind}"] == []


QUANTISED = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
# Where the float16 scales of a block are: random bytes there would be NaN or huge.
SCALES = {"Q6_K": [208], "Q8_0": [0], "Q4_0": [0], "Q5_0": [0]}


def random_blocks(name: str, rows: int, cols: int) -> np.ndarray:
    """(rows, bytes per row) of random blocks with scales near 0.01."""
    block, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    rng = np.random.default_rng(nbytes)
    blocks = rng.integers(0, 256, (rows * cols // block, nbytes), dtype=np.uint8)
    for at in SCALES.get(name, [0, 2]):
        blocks[:, at : at + 2] = rng.uniform(-0.01, 0.01, (len(blocks), 1)).astype(np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", *QUANTISED])
@pytest.mark.parametrize(("rows", "cols"), [(1, 256), (7, 512), (1100, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensor_types(tmp_path, name, rows, cols, dtype):
    """Every type decodes to what the gguf package says; 1100 rows take several chunks."""
    kind = gguf.GGMLQuantizationType[name]
    if name in QUANTISED:
        packed = random_blocks(name, rows, cols)
    else:
        values = np.random.default_rng(1).standard_normal((rows, cols)).astype(np.float32)
        packed = gguf.quants.quantize(values, kind).view(np.uint8).reshape(rows, -1)
    wanted = torch.tensor(gguf.quants.dequantize(packed, kind))
    assert 1e-4 < wanted.std() < 100
    path = tmp_path / "one.gguf"
    before = Entry("before", [8], 0, bytes(32))  # so that the tensor does not lie at the start of the data
    path.write_bytes(File(tensors=[before, Entry("x", [cols, rows], int(kind), packed.tobytes())]).build())
    source = GGUFFile(path)
    assert source.shapes()["x"] == (rows, cols)
    out = torch.full((2 * rows, cols), 7.0, dtype=dtype)
    source.read_into("x", out[:rows])
    assert torch.equal(out[:rows], wanted.to(dtype))
    assert (out[rows:] == 7).all()
    flipped = torch.empty(cols, rows, dtype=dtype)
    source.read_into("x", flipped.T)
    assert torch.equal(flipped, wanted.T.to(dtype))


def test_truncation(tmp_path):
    """Every prefix of a file is an error that names the file; inside the header it says where it ends."""
    file = tiny_llama()
    raw = file.build()
    header = len(file.header())
    step_in_data = 97
    for size in [*range(header), *range(header, len(raw), step_in_data), len(raw) - 1]:
        message = error_of(tmp_path, raw[:size])
        if size < header:
            assert re.search(r"left|has \d+", message), message
            assert "(at byte " in message
        else:
            assert re.search(r"tensor '.*its data is at bytes|take \d+ bytes", message), message


def edit(change: Callable[[File], object]) -> Callable[[], bytes]:
    """The bytes of tiny_llama after a change."""

    def made() -> bytes:
        file = tiny_llama()
        change(file)
        return file.build()

    return made


def set_key(key: str, kind: int, value) -> Callable[[], bytes]:
    return edit(lambda f: f.set(key, kind, value))


def set_raw(key: str | bytes, kind: int, raw: bytes) -> Callable[[], bytes]:
    """The key's type and value as they are given, in front of all others."""
    return edit(lambda f: f.keys.insert(0, (key, kind, raw)))


def set_tensor(tensor: str, **values) -> Callable[[], bytes]:
    return edit(lambda f: f.tensor(tensor).__dict__.update(values))


HUGE = 2**63
MALFORMED = {
    "empty": (lambda: b"", r"header: the magic number takes 4 bytes, but the file has 0 left \(at byte 0\)"),
    "magic": (
        edit(lambda f: setattr(f, "magic", b"GGML")),
        r"not a GGUF file: the magic number is b'GGML'.*byte 0",
    ),
    "version 1": (edit(lambda f: setattr(f, "version", 1)), r"version 1 is not supported.*\(at byte 4\)"),
    "version 4": (edit(lambda f: setattr(f, "version", 4)), "version 4 is not supported, only 2 and 3 are"),
    "big-endian": (edit(lambda f: setattr(f, "version", 3 << 24)), "big-endian"),
    "tensor count": (
        edit(lambda f: setattr(f, "tensor_count", HUGE)),
        rf"the tensor count is {HUGE}, but the file has only \d+ bytes left \(at byte 8\)",
    ),
    "tensor count + 1": (
        edit(lambda f: setattr(f, "tensor_count", 12)),
        "tensor '': expected 1 to 4 dimensions, got ",
    ),
    "key count": (
        edit(lambda f: setattr(f, "kv_count", 10**6)),
        r"the key count is 1000000, but the file has only \d+ bytes left \(at byte 16\)",
    ),
    "key count + 1": (
        edit(lambda f: setattr(f, "kv_count", 16)),
        "tensor 1 of 11: the length of the name is",
    ),
    "key length": (set_raw("k" * 70000, U8, b"0"), "key 1 of 16: the key has 70000 bytes, at most 65535 are"),
    "key utf-8": (set_raw(b"ab\xff", U8, b"0"), r"the key is not UTF-8: invalid start byte \(at byte 34\)"),
    "key twice": (set_raw("llama.block_count", U8, b"1"), "key 'llama.block_count': given twice"),
    "value type": (set_raw("x", 13, b"0"), r"key 'x': unknown value type 13 \(at byte 33\)"),
    "string length": (
        set_raw("x", STRING, struct.pack("<Q", HUGE)),
        rf"key 'x': the length of the value is {HUGE}",
    ),
    "string utf-8": (set_raw("x", STRING, string(b"\xc3\x28")), "key 'x': the value is not UTF-8"),
    "bool": (set_raw("x", BOOL, b"\x02"), "key 'x': expected a bool, 0 or 1, got 2"),
    "array type": (set_raw("x", ARRAY, struct.pack("<IQ", 99, 1)), "key 'x': unknown array type 99"),
    "array nested": (
        set_raw("x", ARRAY, struct.pack("<IQIQ", ARRAY, 1, U8, 0)),
        "key 'x': nested arrays are not supported",
    ),
    "array length": (
        set_raw("x", ARRAY, struct.pack("<IQ", F64, HUGE)),
        rf"key 'x': the array's length is {HUGE}, but the file has only \d+ bytes left",
    ),
    "array of strings length": (
        set_raw("x", ARRAY, struct.pack("<IQ", STRING, 2**32)),
        "key 'x': the array's length is 4294967296, but the file has only",
    ),
    "array string length": (
        set_raw("x", ARRAY, struct.pack("<IQ", STRING, 2) + string("ok") + struct.pack("<Q", HUGE)),
        rf"key 'x': the length of item 1 of the array is {HUGE}",
    ),
    "array string utf-8": (
        set_raw("x", ARRAY, struct.pack("<IQ", STRING, 2) + string("ok") + string(b"\xff")),
        "key 'x': item 1 of the array is not UTF-8",
    ),
    "array bool": (set_raw("x", ARRAY, struct.pack("<IQ", BOOL, 2) + b"\x01\x07"), "key 'x': expected bools"),
    "alignment 0": (
        set_key("general.alignment", U32, 0),
        r"key 'general.alignment': expected an integer in \[8",
    ),
    "alignment 24": (set_key("general.alignment", U32, 24), "expected a power of two, got 24"),
    "alignment type": (set_key("general.alignment", STRING, "32"), "expected an integer in .*, got '32'"),
    "alignment huge": (
        set_key("general.alignment", U32, 2**30),
        "expected an offset that is a multiple of 1073741824, got",
    ),
    "split": (set_key("split.count", U16, 2), "key 'split.count': split files are not supported"),
    "tensor name": (
        set_tensor("output_norm.weight", name="n" * 65),
        "the name has 65 bytes, at most 64 are allowed",
    ),
    "tensor twice": (
        set_tensor("blk.0.attn_norm.weight", name="output_norm.weight"),
        "tensor 'output_norm.weight': given twice",
    ),
    "n_dims 0": (
        set_tensor("output_norm.weight", dims=[]),
        "'output_norm.weight': expected 1 to 4 dimensions, got 0",
    ),
    "n_dims 5": (
        set_tensor("output_norm.weight", dims=[32, 1, 1, 1, 1]),
        "expected 1 to 4 dimensions, got 5",
    ),
    "dim 0": (
        set_tensor("output_norm.weight", dims=[32, 0]),
        r"expected dimensions of at least 1, got \[32, 0\]",
    ),
    "dims overflow": (
        set_tensor("output_norm.weight", dims=[2**63, 2**63, 2**63, 4]),
        r"'output_norm.weight': dimensions .* of F32 take \d+ bytes, the file has \d+",
    ),
    "dims wrap": (
        set_tensor("output_norm.weight", dims=[2**32, 2**32]),
        "of F32 take 73786976294838206464 bytes",
    ),
    "type unknown": (
        set_tensor("output_norm.weight", kind=777),
        "'output_norm.weight': type number 777 is not supp",
    ),
    "type Q2_K": (
        set_tensor("output_norm.weight", kind=10),
        "'output_norm.weight': type Q2_K is not supported; F32, ",
    ),
    "type I8": (set_tensor("output_norm.weight", kind=24), "type I8 is not supported"),
    "blocks": (
        set_tensor("output_norm.weight", kind=12),
        "expected rows of whole Q4_K blocks of 256, got 32",
    ),
    "offset": (
        set_tensor("output_norm.weight", offset=2**20),
        "'output_norm.weight': its data is at bytes 10",
    ),
    "offset overflow": (
        set_tensor("output_norm.weight", offset=2**64 - 32),
        "'output_norm.weight': its data is at",
    ),
    "offset misaligned": (
        set_tensor("output_norm.weight", offset=16),
        "'output_norm.weight': expected an offset that is a multiple of 32, got 16",
    ),
    "overlap": (
        set_tensor("output_norm.weight", offset=32),
        "'output_norm.weight': its data at byte .* overlaps that of 'token_embd.weight'",
    ),
    "architecture": (
        set_key("general.architecture", STRING, "mamba"),
        "key 'general.architecture': expected one of llama, .*, gpt2, .*, got 'mamba'",
    ),
    "block count": (set_key("llama.block_count", U32, 2), "tensor 'blk.1.attn_q.weight' is missing"),
    "block count huge": (
        set_key("llama.block_count", U32, 2**31 - 1),
        r"llama.block_count.*in \[1, 65536\], got 2147483647",
    ),
    "block count per layer": (
        set_key("llama.block_count", ARRAY, (U32, [1])),
        r"expected an integer in .*, got \[1\]",
    ),
    "hidden size": (
        set_key("llama.embedding_length", U32, 64),
        r"tensor 'blk.0.attn_q.weight': expected shape \(64, 64\), got \(32, 32\)",
    ),
    "vocabulary": (
        set_key("llama.vocab_size", U32, 2**31 - 1),
        r"tensor 'token_embd.weight': expected shape \(2147483647, 32\), got \(16, 32\)",
    ),
    "head count": (
        set_key("llama.attention.head_count", U32, 3),
        "expected a divisor of llama.embedding_length=32 that leaves at most 512, got 3",
    ),
    "head size": (
        set_key("llama.attention.key_length", U32, 1024),
        r"expected an integer in \[1, 512\], got 1024",
    ),
    "value size": (set_key("llama.attention.value_length", U32, 8), "only 16 is supported, got 8"),
    "context": (
        set_key("llama.context_length", I32, -5),
        r"expected an integer in \[1, 2147483647\], got -5",
    ),
    "epsilon": (
        set_key("llama.attention.layer_norm_rms_epsilon", F32, float("nan")),
        "expected a number > 0, got nan",
    ),
    "rotary": (
        set_key("llama.rope.dimension_count", U32, 17),
        "expected an even number of at most headdim=16, got 17",
    ),
    "scaling": (
        set_key("llama.rope.scaling.type", STRING, "longrope"),
        "rotary scaling 'longrope' is not supported",
    ),
    "matrix for vector": (
        set_tensor("output_norm.weight", dims=[32, 1]),
        r"tensor 'output_norm.weight': expected shape \(32,\), got \(1, 32\)",
    ),
    "bias of one part": (
        edit(lambda f: f.tensors.append(Entry("blk.0.attn_q.bias", [32], 0, bytes(128)))),
        "tensor 'blk.0.attn_k.bias' is missing",
    ),
    "tensor unknown": (
        edit(lambda f: f.tensors.append(Entry("blk.0.attn_q_norm.weight", [16], 0, bytes(64)))),
        "tensor 'blk.0.attn_q_norm.weight': not a part of this architecture",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed(tmp_path, name):
    """The message, within 200 MB and 2 seconds of processor time: a bound on harm, not a measurement."""
    make, pattern = MALFORMED[name]
    raw = make()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kB
    start = time.process_time()
    message = error_of(tmp_path, raw)
    assert time.process_time() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 200_000
    assert re.search(pattern, message), message
    assert len(message) < 500


REQUIRED = [
    "general.architecture",
    "llama.context_length",
    "llama.embedding_length",
    "llama.block_count",
    "llama.feed_forward_length",
    "llama.attention.head_count",
    "llama.attention.layer_norm_rms_epsilon",
]


@pytest.mark.parametrize("key", REQUIRED)
def test_missing_keys(tmp_path, key):
    message = error_of(tmp_path, edit(lambda f: f.drop(key))())
    assert message.endswith(f"key '{key}': missing")


@pytest.mark.parametrize("name", [t.name for t in tiny_llama().tensors])
def test_missing_tensors(tmp_path, name):
    raw = edit(lambda f: f.tensors.remove(f.tensor(name)))()
    message = error_of(tmp_path, raw)
    wanted = "key 'llama.vocab_size': missing" if name.startswith("token") else f"tensor '{name}' is missing"
    assert message.endswith(wanted)


@pytest.mark.parametrize("name", [t.name for t in tiny_llama().tensors])
def test_wrong_shapes(tmp_path, name):
    """One block column more: the tensor, what was expected and what came."""

    def change(file: File) -> None:
        entry = file.tensor(name)
        entry.dims[0] *= 2
        entry.data *= 2

    message = error_of(tmp_path, edit(change)())
    assert re.search(rf"tensor '{name}': expected shape \(.*32,?\), got \(.*64,?\) \(at byte \d+\)", message)


def test_defaults(tmp_path):
    """head_count_kv, rope.* may be missing; an output tensor unties the head."""
    file = tiny_llama()
    for key in ("llama.rope.freq_base", "llama.rope.dimension_count"):
        file.drop(key)
    wanted = load_bytes(tmp_path, tiny_llama().build())[0]
    decoder = load_bytes(tmp_path, file.build())[0]
    assert decoder.config == wanted.config
    assert decoder.config.tie_embeddings
    embedding = file.tensor("token_embd.weight")
    file.tensors.append(Entry("output.weight", embedding.dims, embedding.kind, embedding.data))
    decoder = load_bytes(tmp_path, file.build())[0]
    assert not decoder.config.tie_embeddings
    assert torch.equal(weight_of(decoder.head), decoder.embedding)


def test_memory_is_not_claimed_by_numbers(tmp_path):
    """A long context costs nothing before it is used."""
    decoder, _ = load_bytes(tmp_path, set_key("llama.context_length", U32, 2**31 - 1)())
    cache = decoder.new_cache(1, 4)
    decoder.forward(torch.tensor([1]), [1], cache)
    assert cache.nbytes < 10_000


def test_missing_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"needs the package 'gguf': pip install 'fastattn\[model\]'"):
        load_bytes(tmp_path, tiny_llama().build())
