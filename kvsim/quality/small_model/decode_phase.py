"""Compression during decode on the small model: a text is generated, and its cache is cut back every so many tokens.

Generation is teacher-forced, so tokens between two cuts can be read at once: they see what the last cut left and one
another, as they would one by one. Queries, entropy and distance that a cut scores by are those of the model as it ran,
with the cache as it was then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from kvsim.compression.selection.base import TokenSelection
from kvsim.compression.selector import Selector, layer_view
from kvsim.errors import NotRunnable
from kvsim.quality.small_model.architecture import ForwardPass, SmallTransformer
from kvsim.quality.small_model.caches import stack_layers
from kvsim.quality.small_model.evaluation import compare_logits
from kvsim.quality.small_model.outcomes import Outcome
from kvsim.quality.small_model.signals import by_cache, layer_distance, next_token_entropy
from kvsim.quality.small_model.tasks import TaskBatch
from kvsim.tensors import FloatArray, KvTensors, LayerKv, PromptSignals, Rope

HELD_QUERIES = 256
"""Newest queries that a cut may score with: as many as kvpress's DecodingPress holds hidden states."""


@dataclass(frozen=True)
class Schedule:
    """When the cache is cut: right after ``prompt_tokens``, and every ``interval`` tokens from there on."""

    prompt_tokens: int
    interval: int


@dataclass(frozen=True, eq=False)
class DecodeRun:
    """One teacher-forced generation.

    Attributes
    ----------
    batch : TaskBatch
    schedule : Schedule
    logits : (B, T - 1 - prompt_tokens, vocabulary)
        Of each token after the prompt, for the next one.
    held_share : float
        Tokens held per layer and head over tokens so far, mean over the generated tokens.
    """

    batch: TaskBatch
    schedule: Schedule
    logits: Tensor
    held_share: float

    @property
    def start(self) -> int:
        """First generated token whose distribution answers are scored by."""
        return max(self.schedule.prompt_tokens, self.batch.questions[0].answer - 1)

    @property
    def answer_logits(self) -> Tensor:
        """Logits from ``start`` on."""
        return self.logits[:, self.start - self.schedule.prompt_tokens :]


@torch.no_grad()  # type: ignore[untyped-decorator]
def decode_with_cuts(
    model: SmallTransformer,
    batch: TaskBatch,
    schedule: Schedule,
    cut: Selector,
    prompt_cut: Selector | None = None,
) -> DecodeRun:
    """Generate the batch's text behind its first tokens, and let ``cut`` decide after each interval what stays.

    ``cut`` gets what is held, with the newest queries as ``prompt_queries``, and entropy and distance of every token so
    far by position. ``prompt_cut`` takes its place right after the prompt.
    """
    end = batch.tokens.shape[1] - 1
    rows = [_nothing(model) for _ in batch.tokens]
    raw: tuple[Tensor | None, ...] = (None,) * model.shape.num_caches
    logits, held, at = [], [], 0
    for stop in (*range(schedule.prompt_tokens, end, schedule.interval), end):
        found = _read(model, batch, rows, raw, at, stop)
        if at:
            logits.append(found.logits)
            held += [_held_tokens(rows) + done + 1 for done in range(stop - at)]
        rows = [_extended(kv, found, row, at, model) for row, kv in enumerate(rows)]
        chosen = cut if at or prompt_cut is None else prompt_cut
        if stop < end:
            rows = [chosen.select(kv) for kv in rows]
        raw, at = tuple(new.last_raw_key for new in found.caches), stop
    so_far = np.arange(schedule.prompt_tokens + 1, end + 1)
    return DecodeRun(batch, schedule, torch.cat(logits, dim=1), float(np.mean(np.array(held) / so_far)))


@torch.no_grad()  # type: ignore[untyped-decorator]
def decode_without_cuts(model: SmallTransformer, batch: TaskBatch, schedule: Schedule) -> DecodeRun:
    """Generate the same text with the whole cache: what everything is compared with."""
    logits = model(torch.from_numpy(batch.tokens[:, :-1]), round_kv=True).logits
    return DecodeRun(batch, schedule, logits[:, schedule.prompt_tokens :], 1.0)


def decode_with(model: SmallTransformer, batch: TaskBatch, schedule: Schedule, selection: TokenSelection) -> DecodeRun:
    """Generate with a selection that is applied at each cut.

    One that says itself what a cut does while decoding (R-KV, InfoKV, prefill_decoding) does that, at the schedule's
    interval. Any other one is applied to all that is held, so its budget must be in tokens to hold for ever.

    Raises
    ------
    NotRunnable
        It must be trained, it learns from other sequences, it reads sparsely, or it wants signals that are not taken
        down while decoding.
    """
    prompt_cut, cut = selection.selector(), selection.cut_selector(schedule.prompt_tokens)
    nothing = _nothing(model)
    for index in range(nothing.num_layers):
        _refuse(selection.at_layer(layer_view(nothing, index)), prompt_cut)
    run: DecodeRun = decode_with_cuts(model, batch, schedule, cut, prompt_cut)
    return run


def _refuse(selection: TokenSelection, selector: Selector) -> None:
    if selector.needs_calibration:
        raise NotRunnable(selection.kind, "it learns from other sequences, which cuts while decoding do not give it")
    if type(selection).read_mask is not TokenSelection.read_mask:
        raise NotRunnable(selection.kind, "it reads sparsely and cuts nothing")
    missing = selection.needs_signals - {"entropy", "distance"}
    if missing:
        raise NotRunnable(selection.kind, f"it wants {' and '.join(sorted(missing))}, not taken down while decoding")


def outcome_of(run: DecodeRun, reference: DecodeRun) -> Outcome:
    """Score a run's answers against the whole cache's."""
    return compare_logits(run, run.answer_logits, reference.answer_logits, 16.0 * run.held_share)


def mean_divergence(run: DecodeRun, reference: DecodeRun) -> FloatArray:
    """KL in nats from the whole cache's distributions, mean over all generated tokens, per sequence (B,)."""
    log_p, log_q = reference.logits.log_softmax(dim=-1), run.logits.log_softmax(dim=-1)
    divergence: FloatArray = (log_p.exp() * (log_p - log_q)).sum(dim=-1).mean(dim=1).numpy()
    return divergence


def _nothing(model: SmallTransformer) -> KvTensors:
    """A sequence before its first token."""
    shape = model.shape
    heads, dim = shape.num_kv_heads, shape.head_dim
    none = np.zeros((heads, 0, dim), dtype=np.float32)
    asked = np.zeros((shape.num_heads * shape.layers_per_cache, 0, dim), dtype=np.float32)
    layer = LayerKv(none, none, np.zeros((heads, 0), dtype=np.int64), asked, asked)
    signals = PromptSignals(
        entropy=np.zeros(0, dtype=np.float32), distance=np.zeros((shape.num_caches, 0), dtype=np.float32)
    )
    source = f"small model {shape.architecture}, generating"
    rope = Rope.plain(dim, shape.rope_theta)
    return KvTensors((layer,) * shape.num_caches, rope, dim**-0.5, source, signals=signals)


def _read(
    model: SmallTransformer,
    batch: TaskBatch,
    rows: Sequence[KvTensors],
    raw_keys: Sequence[Tensor | None],
    start: int,
    stop: int,
) -> ForwardPass:
    """Read tokens ``start`` to ``stop`` - 1 with what is held."""
    tokens = torch.from_numpy(batch.tokens)
    if start == 0:
        first: ForwardPass = model(tokens[:, :stop], round_kv=True, keep_hidden=True)
        return first
    past = [stack_layers([kv.layers[index] for kv in rows], start, raw_key) for index, raw_key in enumerate(raw_keys)]
    before = tokens[:, start - 1 : start]
    later: ForwardPass = model(tokens[:, start:stop], past, start, before, round_kv=True, keep_hidden=True)
    return later


def _extended(kv: KvTensors, found: ForwardPass, row: int, start: int, model: SmallTransformer) -> KvTensors:
    """Append the tokens just read."""
    asked = by_cache(found, model.shape)
    layers = tuple(
        _longer(layer, new.keys[row], new.values[row], queries[row], start)
        for layer, new, queries in zip(kv.layers, found.caches, asked, strict=True)
    )
    entropy, distance = kv.signals.entropy, kv.signals.distance
    later = (next_token_entropy(found.logits[row : row + 1])[0], layer_distance(found, model.shape)[row])
    signals = PromptSignals(
        entropy=later[0] if entropy is None else np.concatenate((entropy, later[0])),
        distance=later[1] if distance is None else np.concatenate((distance, later[1]), axis=1),
    )
    return replace(kv, layers=layers, signals=signals)


def _longer(layer: LayerKv, keys: Tensor, values: Tensor, queries: Tensor, start: int) -> LayerKv:
    heads, count = keys.shape[:2]
    # Rounded as what is held elsewhere.
    asked = np.concatenate((layer.prompt_queries, queries.bfloat16().float().numpy()), axis=1)
    weights = layer.log_weights
    if weights is not None:
        weights = np.concatenate((weights, np.zeros((heads, count), dtype=np.float32)), axis=1)
    return LayerKv(
        keys=np.concatenate((layer.keys, keys.numpy()), axis=1),
        values=np.concatenate((layer.values, values.numpy()), axis=1),
        positions=np.concatenate((layer.positions, np.tile(np.arange(start, start + count), (heads, 1))), axis=1),
        queries=layer.queries,
        prompt_queries=asked[:, -HELD_QUERIES:],
        log_weights=weights,
    )


def _held_tokens(rows: Sequence[KvTensors]) -> float:
    """Tokens that queries may see, mean over sequences, layers and heads."""
    return float(np.mean([layer.is_seen.sum() / layer.num_kv_heads for kv in rows for layer in kv.layers]))
