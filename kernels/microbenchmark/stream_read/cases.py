"""Sizes of the read-only stream."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.functional import pad

from ...contract import CountedLoop, Traffic
from ...launches import Launch, LaunchConfig
from ..words import CHUNK_WORDS, WORD_BYTES, WordsCase, WordsVariant
from .kernel import plan_stream_read


class StreamRead(WordsVariant):
    """Exclusive or of each chunk of words."""

    operation = "microbenchmark/stream_read"

    def reference(self, case: WordsCase, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        source = inputs["source"]
        words = pad(source, (0, -len(source) % CHUNK_WORDS)).view(-1, CHUNK_WORDS)
        while (width := words.shape[1]) > 1:
            words = words[:, : width // 2] ^ words[:, width // 2 :]
        return {"result": words[:, 0]}

    def allocate(self, case: WordsCase, inputs: Mapping[str, Any], config: LaunchConfig) -> dict[str, torch.Tensor]:
        return {"result": inputs["source"].new_empty(-(-case.num_words // CHUNK_WORDS))}

    def plan(
        self, case: WordsCase, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
    ) -> tuple[Launch, ...]:
        return (plan_stream_read(self.check_source(case, inputs), buffers["result"], config),)

    def counted_loop(self, case: WordsCase, config: LaunchConfig) -> CountedLoop:
        return CountedLoop("stream_read_kernel", "whole", units=CHUNK_WORDS * WORD_BYTES)

    def traffic(self, case: WordsCase) -> Traffic:
        chunks = -(-case.num_words // CHUNK_WORDS)
        return Traffic(read_bytes=case.num_bytes, written_bytes=chunks * WORD_BYTES, flops=0, units=case.num_bytes)


VARIANTS = (StreamRead(),)
