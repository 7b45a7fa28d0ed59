"""Record K, V and Q of a Hugging Face causal language model while it reads a text (extra ``capture``).

The model runs as it is, with its attention replaced by the same attention that also writes down what it was given: keys
and queries after RoPE (and after Qwen3's norms), as a cache holds them. Weights are read from safetensors only, and no
code of a model repository is run.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from kvsim.errors import IncompatibleScenario, InvalidSpec
from kvsim.quality.capture_signals import (
    Requests,
    distance_from_last,
    hidden_states,
    layer_outputs,
    next_token_entropy,
    second_reading,
)
from kvsim.quality.model_attention import attention_of
from kvsim.tensors import FloatArray, KvTensors, LayerKv, PromptSignals, Rope, SignalName

FAMILIES: Final = ("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe")
"""``model_type`` of families whose RoPE has the half-split layout and whose attention is plain softmax over K and V."""
SIGNALS: Final[tuple[SignalName, ...]] = ("hidden", "repeat_queries", "entropy", "distance")
"""What can be recorded beside K, V and Q."""
_EXTRA: Final = 'needs torch and transformers; install them with: pip install "kvsim[capture]"'


@dataclass(frozen=True, eq=False)
class Captured:
    """A text as the model read it.

    Attributes
    ----------
    kv : KvTensors
        The cache after the prompt; ``queries`` are those of the continuation.
    continuation : tuple of int
        Token ids after the prompt.
    log_probabilities : (m, vocabulary)
        The model's own next-token distribution after each of them.
    """

    kv: KvTensors
    continuation: tuple[int, ...]
    log_probabilities: FloatArray


def load_model(path_or_id: str) -> tuple[Any, Any]:
    """Load model and tokenizer from a folder or the Hub, in the dtype that the checkpoint has.

    Raises
    ------
    InvalidSpec
        The extra is not installed, or nothing loadable is there.
    IncompatibleScenario
        The family's cache is not K and V per head with RoPE.
    """
    try:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        msg = f"--model {path_or_id}: {_EXTRA}"
        raise InvalidSpec(msg) from error
    if path_or_id.startswith(("/", ".", "~")) and not Path(path_or_id).is_dir():
        msg = f"--model {path_or_id}: no such folder"
        raise InvalidSpec(msg)
    try:
        check_family(AutoConfig.from_pretrained(path_or_id), path_or_id)
        model = AutoModelForCausalLM.from_pretrained(path_or_id, dtype="auto", use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(path_or_id)
    except (OSError, ValueError) as error:
        msg = f"--model {path_or_id}: cannot load it: {str(error).splitlines()[0]}"
        raise InvalidSpec(msg) from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval(), tokenizer


def check_family(config: Any, name: str) -> None:
    """Raise IncompatibleScenario where a model's cache cannot be captured, with what can."""
    if config.model_type not in FAMILIES:
        msg = f"{name}: model type {config.model_type!r} cannot be captured; families that can: {', '.join(FAMILIES)}"
        raise IncompatibleScenario(msg)


def read_text(text: Path) -> str:
    """Read what the model is to read; raise InvalidSpec if it cannot be read as UTF-8."""
    try:
        return text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8"
        msg = f"--text {text}: cannot read: {reason}"
        raise InvalidSpec(msg) from error


def encode_text(tokenizer: Any, text: Path, tokens: int) -> list[int]:
    """First ``tokens`` token ids of a file.

    Raises
    ------
    InvalidSpec
        The file cannot be read as UTF-8, or is too short.
    """
    ids: list[int] = tokenizer(read_text(text))["input_ids"]
    if len(ids) < tokens:
        msg = f"--text {text}: has {len(ids)} tokens, but --tokens and --queries ask for {tokens} together"
        raise InvalidSpec(msg)
    return ids[:tokens]


def capture(
    model: Any,
    token_ids: Sequence[int],
    *,
    num_queries: int,
    num_prompt_queries: int,
    source: str,
    signals: Collection[SignalName] = (),
    requests: Requests | None = None,
) -> Captured:
    """Let the model read a text, and record the cache of all but the last ``num_queries`` tokens.

    ``signals``: what else to take down of those; ``requests`` is what the model is told before it reads them again.

    Raises
    ------
    InvalidSpec
        Too few tokens, or more than the model's context.
    IncompatibleScenario
        A layer does not keep K and V of all tokens per head.
    """
    import torch

    prompt = len(token_ids) - num_queries
    _check_size(model.config, len(token_ids), prompt, num_queries, num_prompt_queries)
    recorder = _Recorder(prompt, num_prompt_queries)
    ids = torch.tensor([list(token_ids)], device=model.device)
    noting = hidden_states(model, prompt) if "hidden" in signals else nullcontext()
    outputs = layer_outputs(model, prompt) if "distance" in signals else nullcontext()
    with torch.no_grad(), attention_of(model, recorder.attend), noting as hidden, outputs as written:
        logits = model(ids, use_cache=False).logits[0]
    if len(recorder.layers) != model.config.num_hidden_layers:
        found = f"{len(recorder.layers)} of {model.config.num_hidden_layers} layers"
        msg = f"{source}: only {found} call the attention that can be recorded"
        raise IncompatibleScenario(msg)
    bits = torch.finfo(model.dtype).bits
    layers = tuple(recorder.layers[index] for index in sorted(recorder.layers))
    kv = KvTensors(layers, _rope(model), recorder.scale, source, native_bits=bits)
    known: dict[str, Any] = {} if hidden is None else {"hidden": tuple(hidden)}
    if "repeat_queries" in signals:
        known |= second_reading(model, token_ids[:prompt], kv, requests or Requests())
    if "entropy" in signals:
        known["entropy"] = next_token_entropy(logits[:prompt])
    if written is not None:
        known["distance"] = distance_from_last(written)
    kv = replace(kv, signals=PromptSignals(**known))
    probabilities = torch.log_softmax(logits[prompt:].float(), dim=-1)
    return Captured(kv, tuple(token_ids[prompt:]), probabilities.cpu().numpy())


def _check_size(config: Any, tokens: int, prompt: int, queries: int, prompt_queries: int) -> None:
    if queries < 1 or prompt < 1 or not 0 <= prompt_queries <= prompt:
        msg = (
            f"{prompt} prompt tokens, {queries} queries after them and {prompt_queries} in the prompt: at least one "
            "prompt token and one query are needed, and no more prompt queries than prompt tokens"
        )
        raise InvalidSpec(msg)
    if tokens > config.max_position_embeddings:
        msg = f"{tokens} tokens are more than the model's context of {config.max_position_embeddings}"
        raise InvalidSpec(msg)
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True) and window < tokens:
        msg = f"the model attends to a window of {window} tokens; ask for fewer than that in all, not {tokens}"
        raise IncompatibleScenario(msg)


class _Recorder:
    """Causal attention that keeps what it is given."""

    def __init__(self, prompt: int, num_prompt_queries: int) -> None:
        self.prompt, self.window = prompt, num_prompt_queries
        self.layers: dict[int, LayerKv] = {}
        self.scale = 0.0

    def attend(
        self, module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **options: Any
    ) -> tuple[Any, None]:
        """Stand in for a function of transformers' attention interface; tensors are (1, heads, tokens, D)."""
        from torch.nn.functional import scaled_dot_product_attention

        self.scale = float(scaling)
        count = self.prompt
        positions = np.broadcast_to(np.arange(count), (key.shape[1], count)).copy()
        queries = _array(query[0, :, count - self.window :])
        self.layers[module.layer_idx] = LayerKv(
            keys=_array(key[0, :, :count]),
            values=_array(value[0, :, :count]),
            positions=positions,
            queries=queries[:, self.window :],
            prompt_queries=queries[:, : self.window],
        )
        output = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return output.transpose(1, 2).contiguous(), None


def _array(tensor: Any) -> FloatArray:
    array: FloatArray = tensor.detach().float().cpu().numpy()
    return np.ascontiguousarray(array)


def _rope(model: Any) -> Rope:
    """RoPE's frequencies as the model uses them, after the scaling that its config asks for (linear, Llama 3, YaRN).

    A scaling that depends on the length is taken as it was for the text that has just been read.
    """
    frequencies = model.base_model.rotary_emb.inv_freq
    return Rope(frequencies.detach().float().cpu().numpy().copy())
