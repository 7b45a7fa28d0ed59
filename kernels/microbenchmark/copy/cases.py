"""Sizes of the copy."""

from collections.abc import Mapping
from typing import Any

import torch

from ...contract import CountedLoop, Traffic
from ...launches import Launch, LaunchConfig
from ..words import CHUNK_WORDS, WORD_BYTES, WordsCase, WordsVariant
from .kernel import plan_copy


class Copy(WordsVariant):
    """Device-to-device copy; its bytes are those read and those written."""

    operation = "microbenchmark/copy"

    def reference(self, case: WordsCase, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        return {"target": inputs["source"]}

    def allocate(self, case: WordsCase, inputs: Mapping[str, Any], config: LaunchConfig) -> dict[str, torch.Tensor]:
        return {"target": torch.empty_like(inputs["source"])}

    def plan(
        self, case: WordsCase, inputs: Mapping[str, Any], buffers: Mapping[str, torch.Tensor], config: LaunchConfig
    ) -> tuple[Launch, ...]:
        return (plan_copy(self.check_source(case, inputs), buffers["target"], config),)

    def counted_loop(self, case: WordsCase, config: LaunchConfig) -> CountedLoop:
        return CountedLoop("copy_kernel", "whole", units=CHUNK_WORDS * WORD_BYTES)

    def traffic(self, case: WordsCase) -> Traffic:
        return Traffic(read_bytes=case.num_bytes, written_bytes=case.num_bytes, flops=0, units=case.num_bytes)


VARIANTS = (Copy(),)
