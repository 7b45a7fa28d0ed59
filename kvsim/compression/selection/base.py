"""What a selection answers: which tokens are kept, and which of them a decode step reads."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING

from kvsim.compression.base import HeadCurves, LayerView, StrategyPart, TokenCurve
from kvsim.compression.selector import KeepByLayer, Selector
from kvsim.specs.model import LayerGroup, LayerKind
from kvsim.specs.prior import Prior

if TYPE_CHECKING:
    from kvsim.ops import OpCall, Work
    from kvsim.specs.model import ModelSpec
    from kvsim.tensors import BoolArray, IntArray, KvTensors, LayerKv, SignalName

LOG_WEIGHT_BYTES = 4.0
"""An fp32 added to the logit, per entry and KV head, where entries stand for several tokens."""


class TokenSelection(StrategyPart):
    """Which tokens are kept and read.

    ``prompt_tokens`` is everything processed before the first decode step (after a preemption it includes the
    tokens generated so far); curves then run over the tokens generated since. A selection acts on full-attention
    layers that keep K and V per head (:func:`acts_on`) and is only asked about those: sliding and chunked layers
    keep their window, latent layers keep everything.
    """

    def at_layer(self, layer: LayerView) -> TokenSelection:
        """Give what it does in one layer, where layers have selections of their own."""
        return self

    @abstractmethod
    def resident_tokens(self, prompt_tokens: int, layer: LayerView) -> TokenCurve:
        """Tokens held in memory in this layer after prefill, over generated tokens: on average over its heads.

        Where the heads are of several kinds (`head_curves`), those of the kind that holds most.
        """

    def attended_tokens(self, prompt_tokens: int, layer: LayerView) -> TokenCurve:
        """Tokens whose K and V one decode step reads in this layer: all that are held, unless it reads fewer."""
        return self.resident_tokens(prompt_tokens, layer)

    def trained_group(self, group: LayerGroup) -> LayerGroup:
        """Shape of a group of layers in a model that was trained with the method: as it is, unless it needs another.

        A shape whose kind decides what is read (an indexer) takes the place of the selection.
        """
        return group

    def head_curves(self, prompt_tokens: int, layer: LayerView) -> tuple[HeadCurves, ...]:
        """Kinds of KV heads with what each holds and reads; shares add up to 1. One kind unless the method has more."""
        resident = self.resident_tokens(prompt_tokens, layer)
        return (HeadCurves(1.0, resident, self.attended_tokens(prompt_tokens, layer)),)

    def layer_band(self, layer: LayerView) -> int:
        """Band of a layer: layers of one group and band have equal curves and equal work."""
        return 0

    def prefill_resident_tokens(self, processed_tokens: int, layer: LayerView) -> int:
        """Tokens held while the prompt is still being processed; uncompressed unless the method bounds it."""
        return processed_tokens

    def scanned_tokens(self, prompt_tokens: int, layer: LayerView) -> TokenCurve | None:
        """Tokens whose metadata a decode step reads to choose what to attend (Quest's page bounds), or None."""
        return None

    def scan_bytes_per_token(self, group: LayerGroup, element_bytes: float) -> float:
        """Metadata bytes read, and held, per scanned token in one layer."""
        return 0.0

    def scan_flops_per_token(self, group: LayerGroup, model: ModelSpec) -> float:
        """Vector FLOPs per scanned token, sequence and layer in each decode step (Quest's page scores), 0 if none."""
        return 0.0

    def prefill_ops(self, prompt_tokens: int, layer: LayerView, model: ModelSpec) -> Iterable[OpCall]:
        """Work at the end of prefill for one sequence and layer: scoring, top-k, compaction."""
        return ()

    def decode_ops(self, layer: LayerView, model: ModelSpec) -> Iterable[OpCall]:
        """Work per decode step, sequence and layer that does not grow with context."""
        return ()

    def decode_score_flops_per_token(self, group: LayerGroup, model: ModelSpec) -> float:
        """FLOPs per attended token, sequence and layer in each decode step (H2O's score update), 0 if none."""
        return 0.0

    def decode_score_work(self, group: LayerGroup, model: ModelSpec) -> Work | None:
        """Work per attended token, sequence and layer in each decode step to score it anew (TOVA), or None.

        Beside `decode_score_flops_per_token`, where a step does more than add up what attention hands out. Keys are
        read again as the model made them: an upper bound where they are stored smaller.
        """
        return None

    def decode_cuts(self, prompt_tokens: int, layer: LayerView) -> TokenCurve | None:
        """1 after each number of generated tokens at which the cache is cut back, else 0; None where it never is."""
        return None

    def cut_ops(self, prompt_tokens: int, layer: LayerView, model: ModelSpec) -> Iterable[OpCall]:
        """Work of one such cut of one sequence in one layer: scoring, top-k, compaction. Part of the step it ends."""
        return ()

    def held_bytes_per_token(self, layer: LayerView) -> float:
        """Bytes held beside a kept token in one layer that no step reads: what a later cut scores it by."""
        return 0.0

    def buffer_bytes(self, layer: LayerView, model: ModelSpec) -> float:
        """Bytes per sequence and layer whatever its length: the newest queries, where a later cut scores with them."""
        return 0.0

    @property
    def evicts(self) -> bool:
        """Whether tokens leave memory for good, so that a cached prefix cannot be reused by another request."""
        return False

    @property
    def granularity(self) -> str:
        """Where the kept set may differ: 'none', 'layer', 'head' (equally many per head), 'ragged' (pages per head)."""
        return "none"

    @property
    def query_aware(self) -> bool:
        """Whether the method looks at the question when it compresses (SnapKV's observation window)."""
        return False

    @property
    def masks(self) -> bool:
        """Whether tokens that are not kept are merely hidden, so that nothing is freed and everything is read."""
        return False

    @property
    def needs_signals(self) -> frozenset[SignalName]:
        """What its algorithm wants to know of a prompt beside K, V and Q; taken down only where some method asks."""
        return frozenset()

    @property
    def fits_on_signals(self) -> frozenset[SignalName]:
        """What it wants to know of the sequences that it calibrates on."""
        return self.needs_signals

    @property
    def expected_share(self) -> Prior | None:
        """Share of tokens kept that pricing expects, where the data decide how many stay; None where they do not."""
        return None

    def prefill_scratch_tokens(self, layer: LayerView) -> int:
        """Tokens held in this layer beside the prompt's own while it is scored (a second reading's chunk), at most."""
        return 0

    @property
    def keeps_newest(self) -> bool:
        """Whether the prompt's last token always stays; not where a score alone decides."""
        return True

    @property
    def moves_budgets(self) -> bool:
        """Whether a prompt's content decides which layers keep more: a layer's tokens are then the mean over layers."""
        return False

    @property
    def unit_tokens(self) -> int:
        """Tokens that stay or go together (ChunkKV), so that a longer prompt may leave fewer, by less than a unit."""
        return 1

    @property
    def merges(self) -> bool:
        """Whether an entry that stays may hold other numbers than its token's own K and V."""
        return False

    @abstractmethod
    def keep(self, kv: KvTensors, layer: LayerView) -> IntArray | None:
        """Choose the tokens of ``kv.layers[layer.index]`` that stay, as indices (H, kept) ascending per head.

        As many as `resident_tokens` says of the prompt's length; None keeps all.

        Raises
        ------
        InvalidSpec
            The method scores with queries of the prompt, and the cache has none.
        NotRunnable
            Its `selector` does more than to keep equally many tokens per head.
        """

    def selector(self) -> Selector:
        """Give the algorithm, as code that runs on tensors.

        Raises
        ------
        NotRunnable
            It must be trained into the model.
        """
        return KeepByLayer(self)

    def cut_selector(self, prompt_tokens: int) -> Selector:
        """Give the algorithm of a cut in the middle of decode, for a sequence that began with so many tokens.

        What it is given are the tokens held, with the newest queries as ``prompt_queries``. A selection that says
        nothing of cuts does what it does to a prompt; raise as `selector`.
        """
        return self.selector()

    def read_mask(self, layer_kv: LayerKv, layer: LayerView) -> BoolArray | None:
        """Which kept tokens each of the layer's queries reads, (Hq, m, n); None reads all."""
        return None

    def index_bits(self, layer_kv: LayerKv, layer: LayerView, native_bits: int) -> float:
        """Bits of what is held beside the kept tokens (Quest's page bounds, log-weights of atoms), 0 if nothing."""
        return 0.0


def acts_on(group: LayerGroup) -> bool:
    """Whether token selections apply to a group: full attention with K and V per head, not a shared latent."""
    return group.kind is LayerKind.FULL and not group.is_latent and group.num_kv_heads > 0
