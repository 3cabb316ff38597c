"""Sampling: ``sample`` from logits to tokens in one call, and the building blocks that users know by name.

The blocks have FlashInfer's signatures; what they keep follows ``sample``'s one total order: larger value first, then
lower id, exactly k of them.
"""

from __future__ import annotations

from fastattn.sampling.blocks import (
    min_p_sampling_from_probs,
    top_k_mask_logits,
    top_k_renorm_probs,
    top_k_top_p_sampling_from_logits,
    top_p_renorm_probs,
)
from fastattn.sampling.draw import SampledTokens, sample
from fastattn.sampling.speculative import SpeculativeTokens, speculative_sample

__all__ = [
    "SampledTokens",
    "SpeculativeTokens",
    "min_p_sampling_from_probs",
    "sample",
    "speculative_sample",
    "top_k_mask_logits",
    "top_k_renorm_probs",
    "top_k_top_p_sampling_from_logits",
    "top_p_renorm_probs",
]
