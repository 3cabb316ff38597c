"""Whole models of transformers on our kernels beside themselves with eager attention: logits, text and gradients."""

from __future__ import annotations

import copy
import pickle
import sys
import warnings

import pytest
import torch
from tiny_models import ALL, DECODERS, SEQ2SEQ, build, inputs

pytest.importorskip("transformers")

from fastattn.integrations import transformers_attention
from fastattn.integrations.transformers import disable, enable, register


@pytest.fixture(scope="module")
def models():
    """Each once: enabling and disabling leave them as they were, which every test proves anew."""
    return {}


def model_of(models, name):
    if name not in models:
        models[name] = build(name)
    return models[name]


def logits(model, given):
    with torch.no_grad():
        return model(**given).logits


def seen(given, name):
    """The positions of the output that count."""
    mask = given.get("attention_mask")
    return mask.bool() if mask is not None and name not in SEQ2SEQ else slice(None)


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("name", ALL)
def test_logits(name, padding, models):
    model, given = model_of(models, name), inputs(name, padding)
    if name == "Whisper" and padding:
        pytest.skip("its input has one length")
    expected = logits(model, given)
    enable(model)
    found = logits(model, given)
    disable(model)
    where = seen(given, name)
    torch.testing.assert_close(found[where], expected[where], atol=2e-4, rtol=2e-4)
    assert torch.equal(logits(model, given), expected)


@pytest.mark.parametrize("name", ALL)
def test_gradients(name, models):
    model, given = model_of(models, name), inputs(name, "right" if name != "Whisper" else None)

    def gradients():
        model.zero_grad()
        out = model(**given).logits[seen(given, name)]
        (out.log_softmax(-1) * torch.linspace(-1, 1, out.shape[-1])).mean().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    enable(model)
    try:
        found = gradients()
    finally:
        disable(model)
    assert found.keys() == expected.keys()
    scale = max(g.abs().max() for g in expected.values())
    for n, g in expected.items():
        torch.testing.assert_close(found[n], g, atol=1e-4 * scale, rtol=1e-3, msg=lambda m, n=n: f"{n}: {m}")


def generate(model, given, **call):
    given = {k: v for k, v in given.items() if k != "decoder_input_ids"}
    return model.generate(**given, do_sample=False, max_new_tokens=8, min_new_tokens=8, **call)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", [*DECODERS, *SEQ2SEQ])
def test_greedy_text(name, cache, models):
    model, given = model_of(models, name), inputs(name, None if name == "Whisper" else "left")
    call = {"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}
    expected = generate(model, given, **call)
    enable(model)
    try:
        with transformers_attention.called_modules() as called:
            found = generate(model, given, **call)
    finally:
        disable(model)
    assert called
    assert torch.equal(found, expected)
    assert len(expected.unique()) > 3, "a text of one token proves nothing"


def test_by_name_at_construction():
    register()
    model, eager = build("LLaMA", "fastattn"), build("LLaMA")
    given = inputs("LLaMA", "left")
    with transformers_attention.called_modules() as called:
        found = logits(model, given)
    assert len(called) == 2
    where = seen(given, "LLaMA")
    torch.testing.assert_close(found[where], logits(eager, given)[where], atol=2e-4, rtol=2e-4)
    eager.set_attn_implementation("fastattn")
    torch.testing.assert_close(logits(eager, given), found)


@pytest.mark.parametrize("name", ["T5", "UMT5"])
def test_biases_by_distance_are_lines(name, models, monkeypatch):
    """At lengths of several blocks of keys, beside a float mask too; and nothing as large as the scores is handed on."""
    model, given = model_of(models, name), inputs(name, "right", seqlen=150)
    hidden = given["attention_mask"][:, None, None].float().sub(1) * 1e4  # (batch, 1, 1, seqlen_k)
    lines = []
    attention = transformers_attention.attention

    def noted(q, k, v, *, relative_bias, **call):
        if relative_bias is not None:
            lines.append((relative_bias.shape[-1], q.shape[1], k.shape[1]))
        return attention(q, k, v, relative_bias=relative_bias, **call)

    monkeypatch.setattr(transformers_attention, "attention", noted)
    for mask in (given["attention_mask"], hidden.expand(2, 1, 150, 150)):
        call = (
            {**given, "attention_mask": mask}
            if mask.dim() == 2
            else {"input_ids": given["input_ids"], "attention_mask": mask}
        )
        part = model if mask.dim() == 2 else model.get_encoder()
        run = lambda part=part, call=call: next(iter(part(**call).values()))  # noqa: E731
        with torch.no_grad():
            expected = run()
            enable(model)
            found = run()
            disable(model)
        where = slice(None) if mask.dim() == 2 else given["attention_mask"].bool()
        torch.testing.assert_close(found[where], expected[where], atol=2e-4, rtol=2e-4)
    assert {n for n, *_ in lines} == {299, 11, 7}  # encoder, decoder, and the dry pass of enable()
    assert all(n == seqlen_q + seqlen_k - 1 for n, seqlen_q, seqlen_k in lines)


@pytest.mark.parametrize("name", ["T5", "UMT5"])
def test_an_enabled_model_told_to_attend_otherwise(name, models):
    """As the warning about weights advises: transformers' own attention gets its matrix of biases."""
    model, given = build(name), inputs(name, "right")
    expected = logits(model, given)
    enable(model)
    model.set_attn_implementation("eager")
    assert torch.equal(logits(model, given), expected)
    model.set_attn_implementation("fastattn")
    torch.testing.assert_close(logits(model, given), expected, atol=2e-4, rtol=2e-4)


def test_falcon_with_alibi_is_that_of_sdpa():
    """Its eager code adds ALiBi twice; see DESIGN of the mask in modeling_falcon.py."""
    given = inputs("Falcon", "left")
    model = build("Falcon", "sdpa", alibi=True)
    expected = logits(model, given)
    found = logits(enable(model), given)
    where = seen(given, "Falcon")
    torch.testing.assert_close(found[where], expected[where], atol=2e-4, rtol=2e-4)


def test_images_and_models_that_need_an_example():
    import transformers

    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    model = transformers.ViTModel(
        transformers.ViTConfig(**settings, image_size=32, patch_size=8, attn_implementation="eager")
    ).eval()
    given = {"pixel_values": torch.randn(2, 3, 32, 32)}
    with torch.no_grad():
        expected = model(**given).last_hidden_state
        torch.testing.assert_close(enable(model)(**given).last_hidden_state, expected, atol=2e-4, rtol=2e-4)
    model = build("LLaMA")
    model.main_input_name = "waveform"
    with pytest.raises(
        ValueError, match=r"example: expected the inputs of LlamaForCausalLM .its main one is 'waveform'"
    ):
        enable(model)
    enable(model, {"input_ids": torch.ones(1, 3, dtype=torch.long)})


def test_packed_sequences():
    """Positions that begin anew are sequences apart, which the mask says."""
    model, given = build("LLaMA"), inputs("LLaMA")
    given["position_ids"] = torch.cat([torch.arange(5), torch.arange(6)])[None].expand(2, -1)
    given["use_cache"] = False
    expected = logits(model, given)
    torch.testing.assert_close(logits(enable(model), given), expected, atol=2e-4, rtol=2e-4)


def test_dropout_is_ours_and_only_in_training():
    model = enable(build("LLaMA", attention_dropout=0.5))
    given = inputs("LLaMA")
    assert torch.equal(logits(model, given), logits(model, given))
    model.train()
    torch.manual_seed(3)
    first = logits(model, given)
    torch.manual_seed(3)
    assert torch.equal(logits(model, given), first)
    assert not torch.equal(logits(model, given), first)


@pytest.mark.parametrize("name", ["LLaMA", "T5"])
def test_compiled(name):
    torch._dynamo.reset()
    model, given = build(name), inputs(name)
    expected = logits(model, given)
    enable(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**given, use_cache=False).logits, expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("name", ["BLOOM", "LLaMA", "T5"])
def test_copies_and_pickles_of_enabled_models(name):
    model, given = build(name), inputs(name)
    expected = logits(enable(model), given)
    assert torch.equal(logits(copy.deepcopy(model), given), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), given), expected)
    again = build(name)
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits(enable(again), given), expected)
    disable(model)
    torch.testing.assert_close(
        logits(pickle.loads(pickle.dumps(model)), given), expected, atol=2e-4, rtol=2e-4
    )


def test_enabling_leaves_no_trace():
    model = build("T5").train()
    model.encoder.eval()
    modes = {n: m.training for n, m in model.named_modules()}
    state, before = torch.get_rng_state(), model.config._attn_implementation
    enable(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert all(p.grad is None for p in model.parameters())
    disable(model)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("name", ["BLOOM", "GPT-2", "BERT", "T5", "MPT", "Falcon"])
def test_who_asks_for_weights_is_told_once(name, monkeypatch):
    monkeypatch.setattr(transformers_attention, "_warned", False)
    model = enable(build(name))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            model(**inputs(name), output_attentions=True)
    assert len([w for w in caught if "output_attentions: fastattn never holds" in str(w.message)]) == 1


def state_of(model):
    return [
        (n, type(m), getattr(getattr(m, "config", None), "_attn_implementation", None))
        for n, m in model.named_modules()
    ]


def test_what_cannot_be_switched_is_refused_and_left_alone():
    import transformers

    neo = transformers.GPTNeoForCausalLM(
        transformers.GPTNeoConfig(
            hidden_size=32, num_layers=1, num_heads=4, attention_types=[[["global"], 1]], vocab_size=60
        )
    )
    before = state_of(neo)
    with pytest.raises(
        NotImplementedError,
        match=r"GPTNeoForCausalLM .*attn.attention \(GPTNeoSelfAttention\) computes attention itself",
    ):
        enable(neo)
    assert state_of(neo) == before
    with pytest.raises(TypeError, match=r"expected a transformers.PreTrainedModel, got Linear"):
        enable(torch.nn.Linear(2, 2))
    model = build("BLOOM")
    with pytest.raises(ValueError, match="BloomForCausalLM is not enabled"):
        disable(model)
    enable(model)
    for again in (model,):
        with pytest.raises(ValueError, match="BloomForCausalLM is enabled already"):
            enable(again)
    disable(model)


def test_a_layer_that_does_not_call_us_is_found():
    model = build("LLaMA")
    layer = model.model.layers[1].self_attn
    layer.forward = lambda hidden_states, **kwargs: (hidden_states, None)
    before = state_of(model)
    with pytest.raises(
        NotImplementedError, match=r"had not called fastattn: model.layers.1.self_attn \(LlamaAttention\)"
    ):
        enable(model)
    assert state_of(model) == before
    with pytest.raises(NotImplementedError, match=r"its forward pass fails: ValueError"):
        enable(model, {"nonsense": 1})


MASKS = {
    "expected a bool or float dtype, got torch.int64": torch.ones(2, 1, 11, 11, dtype=torch.int64),
    r"expected \(batch, 1 or nheads, seqlen_q=11, seqlen_k=11\), got \(2, 1, 5, 11\)": torch.ones(2, 1, 5, 11, dtype=torch.bool),
    r"seqlen_k=11\), got \(2, 1, 11, 7\)": torch.ones(2, 1, 11, 7, dtype=torch.bool),
    r"attn_mask: expected a shape that broadcasts to \(2, 4, 11, 11\), got \(3, 1, 11, 11\)": torch.ones(3, 1, 11, 11, dtype=torch.bool),
}  # fmt: skip


@pytest.mark.parametrize("message", MASKS)
def test_masks_that_no_rule_covers_name_the_layer(message):
    model = enable(build("LLaMA"))
    with pytest.raises((ValueError, TypeError), match=r"LlamaAttention of layer 0: .*" + message):
        model(input_ids=inputs("LLaMA")["input_ids"], attention_mask=MASKS[message])


def test_dtypes_and_devices_without_a_kernel(monkeypatch):
    """The meta device stands in for a GPU without its module."""
    model = build("LLaMA").to("meta")
    before = state_of(model)
    with pytest.raises(
        NotImplementedError, match=r"no kernel for .*, float32 on meta .*cpu: lacks device 'meta'"
    ):
        enable(model)
    assert state_of(model) == before
    monkeypatch.setattr(sys.modules["fastattn.backends.cpu"], "_ATTENTION_DTYPES", (torch.float32,))
    model = build("LLaMA").double()
    before = state_of(model)
    with pytest.raises(
        NotImplementedError, match=r"LlamaForCausalLM: no kernel for .*float64 on cpu .*lacks dtype 'float64'"
    ):
        enable(model)
    assert state_of(model) == before
    monkeypatch.setenv("FASTATTN_BACKEND", "reference")
    logits(enable(model), inputs("LLaMA"))


def test_half_and_double():
    given = inputs("LLaMA")
    truth = logits(build("LLaMA").double(), given)
    torch.testing.assert_close(logits(enable(build("LLaMA").double()), given), truth, atol=1e-5, rtol=1e-5)
    for dtype in (torch.bfloat16, torch.float16):
        model = build("LLaMA").to(dtype)
        allowed = (logits(model, given).double() - truth).abs().max()
        found = logits(enable(model), given)
        assert found.dtype == dtype
        assert (found.double() - truth).abs().max() <= 2 * allowed


def test_weights_are_noticed_without_enable_too(monkeypatch):
    monkeypatch.setattr(transformers_attention, "_warned", False)
    register()
    with pytest.warns(UserWarning, match="output_attentions: fastattn never holds"):
        build("GPT-2", "fastattn")(**inputs("GPT-2"), output_attentions=True)
