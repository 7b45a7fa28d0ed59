"""Seconds of drawing one token for each sampled sequence from its logits.

vLLM casts logits to fp32, takes the largest where the temperature is 0, and otherwise scales, truncates by top_k and
top_p, normalises and draws. Truncation sorts the whole vocabulary unless FlashInfer's sampler is on; it is off by
default (vLLM 0.15 ``v1/sample/sampler.py``, ``v1/sample/ops/topk_topp_sampler.py``).
"""

from __future__ import annotations

from kvsim.cost.priors import look_up
from kvsim.cost.rates import Rates
from kvsim.deployment import Deployment
from kvsim.ops import Numeric

CAST_BYTES = 2.0 + 4.0
"""Reading a 16-bit logit and writing it in fp32."""
ARGMAX_BYTES = 4.0
DRAW_BYTES = 8.0 + 12.0 + 4.0 + 12.0 + 4.0
"""Temperature in place, softmax (two reads, one write), exponential noise, the quotient, and its largest."""
GREEDY_LAUNCHES, DRAW_LAUNCHES = 11, 15
"""What one sequence takes, in elementwise launches: 25 us greedily on RTX 4090 in LLMServingSim's profile of vLLM 0.19
(230 us at 208 sequences of 128,256 entries, here 315), and four kernels more to draw."""


class SamplingPrice:
    """Sampling of one deployment at one edge."""

    def __init__(self, deployment: Deployment, rates: Rates) -> None:
        engine, sampling = deployment.engine, deployment.sampling
        vocabulary = deployment.model.vocab_size
        self.launch_s = self.per_sequence_s = 0.0
        # llama.cpp draws on the host; an engine-level fit has plain sampling in it.
        if engine.kind == "llamacpp":
            return
        if deployment.engine_fit is None:
            moved_bytes = CAST_BYTES + (ARGMAX_BYTES if sampling.is_greedy else DRAW_BYTES)
            launches = GREEDY_LAUNCHES if sampling.is_greedy else DRAW_LAUNCHES
            self.launch_s = launches * rates.elementwise_launch_s
            self.per_sequence_s = vocabulary * moved_bytes / rates.stream_bytes_per_s
        if sampling.truncates and not engine.use_flashinfer_sampler:
            launch, per_token = (
                look_up(table, deployment.device).cost(rates.edge)
                for table in (rates.priors.vocabulary_sort_s, rates.priors.vocabulary_sort_per_token_s)
            )
            self.launch_s += launch
            self.per_sequence_s += vocabulary * per_token

    def seconds(self, sampled: Numeric) -> Numeric:
        """Drawing one token for each of ``sampled`` sequences."""
        return self.launch_s + sampled * self.per_sequence_s
