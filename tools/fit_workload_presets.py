"""Fit the workload presets from the public traces and write kvsim/presets/workloads/*.yaml.

Run ``python tools/fit_workload_presets.py TRACES``, where TRACES holds ``azure2023/`` (Azure/AzurePublicDataset,
CC-BY-4.0) and ``mooncake_fast25/`` (kvcache-ai/Mooncake, Apache-2.0). Only quantiles of lengths leave the traces.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from kvsim.data_files import preset_dir
from kvsim.documents import validate, write_atomic
from kvsim.requests import IntArray
from kvsim.specs.workload import SyntheticWorkload
from kvsim.traces import TraceRows, read_trace

PROBABILITIES = (
    *(0.0, 0.01, 0.02, 0.035),
    *(round(0.05 * step, 2) for step in range(1, 19)),
    *(0.92, 0.94, 0.95, 0.96, 0.97, 0.98, 0.985, 0.99, 0.995, 0.998, 1.0),
)
SYSTEM_TOKENS = 512
"""All Mooncake conversation requests share their first 512-token chunk."""
LONG_PROMPT_TOKENS = 4096
RAG_MAX_TOKENS = 16384
LONG_ANSWER_TOKENS = 1000
SESSION_MAX_TOKENS = 65536
AGENT_MIN_TURNS = 3
AGENT_MAX_TOKENS = 32768

AZURE = "Azure LLM inference trace 2023, {part} (Azure/AzurePublicDataset, CC-BY-4.0; Patel et al., ISCA 2024)"
MOONCAKE = "Mooncake FAST25 conversation trace (kvcache-ai/Mooncake, Apache-2.0; Qin et al., FAST 2025)"
MARGINALS = "Input and output lengths are fitted and drawn independently."
ROUND_RATE = "The arrival rate is a round figure, not fitted."
SYSTEM = f"The {SYSTEM_TOKENS}-token prefix is the first chunk that all requests of the trace share."
SESSIONS = (
    "Sessions are rebuilt from the prefix hashes: a request continues the latest one whose whole 512-token chunks (at "
    "least two) lead its own and whose prompt and answer are shorter than its prompt."
)


@dataclass(frozen=True, eq=False)
class Sessions:
    """Mooncake requests by rebuilt session; arrays have shape (num_requests,)."""

    previous: IntArray
    """Index of the turn before, or -1 for a first turn."""
    turns: IntArray
    """Turns of the session that the request belongs to."""
    longest_tokens: IntArray
    """Longest prompt of that session."""
    new_tokens: IntArray
    """Tokens added to the turn before, or the prompt without the system prompt for a first turn."""


def quantiles(tokens: IntArray) -> dict[str, Any]:
    """Length distribution as PROBABILITIES' quantiles, rounded."""
    values = np.rint(np.quantile(tokens, PROBABILITIES)).astype(int).tolist()
    return {"kind": "quantiles", "quantiles": [list(pair) for pair in zip(PROBABILITIES, values, strict=True)]}


def poisson(request_rate: float) -> dict[str, Any]:
    """Poisson arrivals."""
    return {"kind": "poisson", "request_rate": request_rate}


def rebuild_sessions(trace: TraceRows) -> Sessions:
    """Follow prefix hashes from request to request (SESSIONS says how)."""
    hashes = trace.prefix_hashes or ()
    prompts, outputs = trace.prompt_tokens.tolist(), trace.output_tokens.tolist()
    latest: dict[int, int] = {}
    previous = np.full(len(prompts), -1)
    root = np.arange(len(prompts))
    depth = np.ones(len(prompts), dtype=np.int64)
    for row, ids in enumerate(hashes):
        whole = ids[: prompts[row] // trace.hash_block_tokens]
        found = next((latest[chunk] for chunk in reversed(whole[1:]) if chunk in latest), None)
        if found is not None and prompts[row] > prompts[found] + outputs[found]:
            previous[row], root[row], depth[row] = found, root[found], depth[found] + 1
        if len(whole) >= 2:
            latest[whole[-1]] = row
    turns, longest = np.zeros_like(depth), np.zeros_like(depth)
    np.maximum.at(turns, root, depth)
    np.maximum.at(longest, root, trace.prompt_tokens)
    context = np.where(previous >= 0, (trace.prompt_tokens + trace.output_tokens)[previous], SYSTEM_TOKENS)
    return Sessions(previous, turns[root], longest[root], trace.prompt_tokens - context)


def session_preset(trace: TraceRows, sessions: Sessions, chosen: np.typing.NDArray[np.bool_]) -> dict[str, Any]:
    """Multi-turn parameters of the chosen requests (whole sessions)."""
    first = chosen & (sessions.previous < 0)
    later = chosen & (sessions.previous >= 0)
    return {
        "input_len": quantiles(sessions.new_tokens[later]),
        "output_len": quantiles(trace.output_tokens[chosen]),
        "shared_prefix_tokens": SYSTEM_TOKENS,
        "conversations": {
            "turns": quantiles(sessions.turns[first]),
            "first_input_len": quantiles(sessions.new_tokens[first]),
        },
    }


def azure_presets(conv: TraceRows, code: TraceRows) -> dict[str, dict[str, Any]]:
    """Presets whose lengths come from the Azure traces alone."""
    talk = {"input_len": quantiles(conv.prompt_tokens), "output_len": quantiles(conv.output_tokens)}
    origin = AZURE.format(part="conversation")
    if conv.arrival_s is None:
        message = "the Azure conversation trace has no times"
        raise ValueError(message)
    gaps_s = np.diff(conv.arrival_s)
    rate = round(float(1 / gaps_s.mean()), 4)
    burstiness = round(float((gaps_s.mean() / gaps_s.std()) ** 2), 4)
    twin = (
        f"{origin}, all {len(conv)} requests; gamma arrivals at the trace's own mean rate ({rate}/s) and variation of "
        f"gaps (burstiness {burstiness}). {MARGINALS}"
    )
    return {
        "azure-conv": {
            **{"num_prompts": len(conv), **talk},
            "arrivals": {"kind": "gamma", "request_rate": rate, "burstiness": burstiness},
            "fitted_from": twin,
        },
        "chat": {**talk, "arrivals": poisson(4.0), "fitted_from": f"{origin}, all requests. {MARGINALS} {ROUND_RATE}"},
        "code": {
            "input_len": quantiles(code.prompt_tokens),
            "output_len": quantiles(code.output_tokens),
            "arrivals": poisson(4.0),
            "fitted_from": f"{AZURE.format(part='code')}, all {len(code)} requests. {MARGINALS} {ROUND_RATE}",
        },
        "offline-batch": {
            **talk,
            "arrivals": {"kind": "burst"},
            "fitted_from": f"{origin}, all requests. {MARGINALS} All requests come at once: an assumption.",
        },
        "phone-assistant": {
            **{"num_prompts": 100, **talk},
            "arrivals": {"kind": "concurrency", "max_concurrency": 1, "think_time_s": "10 s"},
            "fitted_from": (
                f"{origin}, all requests: a cloud chat service, because no phone trace is public. {MARGINALS} One user "
                "who pauses 10 s between requests is an assumption."
            ),
        },
    }


def mooncake_presets(trace: TraceRows) -> dict[str, dict[str, Any]]:
    """Presets of single requests taken from subsets of the Mooncake trace."""
    own, outputs = trace.prompt_tokens - SYSTEM_TOKENS, trace.output_tokens
    rag = (trace.prompt_tokens > LONG_PROMPT_TOKENS) & (trace.prompt_tokens <= RAG_MAX_TOKENS)
    summary = (trace.prompt_tokens > LONG_PROMPT_TOKENS) & (trace.prompt_tokens >= 10 * outputs) & (outputs >= 100)
    return {
        "rag": {
            "input_len": quantiles(own[rag]),
            "output_len": quantiles(outputs[rag]),
            "shared_prefix_tokens": SYSTEM_TOKENS,
            "arrivals": poisson(1.0),
            "fitted_from": (
                f"{MOONCAKE}: the {int(rag.sum())} of {len(trace)} requests with {LONG_PROMPT_TOKENS} < prompt tokens "
                f"<= {RAG_MAX_TOKENS}. No public retrieval trace was at hand: this is a chat service's long prompts, "
                f"in retrieval's usual range. {SYSTEM} {MARGINALS} {ROUND_RATE}"
            ),
        },
        "summarization": {
            "input_len": quantiles(own[summary]),
            "output_len": quantiles(outputs[summary]),
            "shared_prefix_tokens": SYSTEM_TOKENS,
            "arrivals": poisson(0.5),
            "fitted_from": (
                f"{MOONCAKE}: the {int(summary.sum())} of {len(trace)} requests with more than {LONG_PROMPT_TOKENS} "
                "prompt tokens, an answer of at least 100 tokens and a prompt at least 10 times as long. No public "
                f"summarisation trace was at hand. {SYSTEM} {MARGINALS} {ROUND_RATE}"
            ),
        },
    }


def session_presets(trace: TraceRows) -> dict[str, dict[str, Any]]:
    """Presets of several turns, over the sessions that the Mooncake prefix hashes reveal."""
    sessions = rebuild_sessions(trace)
    chat = sessions.longest_tokens <= SESSION_MAX_TOKENS
    agent = (sessions.turns >= AGENT_MIN_TURNS) & (sessions.longest_tokens <= AGENT_MAX_TOKENS)
    long_chat, agentic = (session_preset(trace, sessions, chosen) for chosen in (chat, agent))
    long_chat["conversations"] |= {"think_time_s": "60 s", "max_context_tokens": 2 * SESSION_MAX_TOKENS}
    agentic["conversations"] |= {"think_time_s": "2 s", "max_context_tokens": 2 * SESSION_MAX_TOKENS}
    return {
        "long-context-chat": {
            **long_chat,
            "arrivals": poisson(1.0),
            "fitted_from": (
                f"{MOONCAKE}: the {int(chat.sum())} of {len(trace)} requests in sessions with prompts of up to "
                f"{SESSION_MAX_TOKENS} tokens. {SESSIONS} {SYSTEM} Turns and lengths are drawn independently. The "
                f"think time of 60 s is an assumption. {ROUND_RATE}"
            ),
        },
        "agentic": {
            **agentic,
            "arrivals": poisson(1.0),
            "fitted_from": (
                f"{MOONCAKE}: the {int(agent.sum())} of {len(trace)} requests in sessions of at least "
                f"{AGENT_MIN_TURNS} turns with prompts of up to {AGENT_MAX_TOKENS} tokens. {SESSIONS} {SYSTEM} It is a "
                "chat trace: its turn structure stands in for tool calls, because no agent trace was at "
                "hand. Turns and lengths are drawn independently. The 2 s between turns (a tool's run time) are an "
                f"assumption. {ROUND_RATE}"
            ),
        },
    }


def reasoning_preset(conv: TraceRows, trace: TraceRows) -> dict[str, Any]:
    """Short questions with the longest answers that a public trace has."""
    long_answers = trace.output_tokens >= LONG_ANSWER_TOKENS
    return {
        "input_len": quantiles(conv.prompt_tokens),
        "output_len": quantiles(trace.output_tokens[long_answers]),
        "arrivals": poisson(1.0),
        "fitted_from": (
            f"prompts: {AZURE.format(part='conversation')}, all requests; answers: {MOONCAKE}, the "
            f"{int(long_answers.sum())} of {len(trace)} requests with at least {LONG_ANSWER_TOKENS} output tokens. "
            "That trace stops answers at 2,000 tokens, so the chains of thought of reasoning models are longer than "
            f"this: set output_len where yours are known. {MARGINALS} {ROUND_RATE}"
        ),
    }


def fit_presets(traces: Path) -> dict[str, dict[str, Any]]:
    """All presets by name."""
    conv = read_trace("azure", traces / "azure2023" / "AzureLLMInferenceTrace_conv.csv")
    code = read_trace("azure", traces / "azure2023" / "AzureLLMInferenceTrace_code.csv")
    mooncake = read_trace("mooncake", traces / "mooncake_fast25" / "conversation_trace.jsonl.gz")
    return {
        **azure_presets(conv, code),
        **mooncake_presets(mooncake),
        **session_presets(mooncake),
        "reasoning": reasoning_preset(conv, mooncake),
    }


class _PlainDumper(yaml.SafeDumper):
    """SafeDumper that never writes anchors: presets share length distributions."""

    def ignore_aliases(self, _data: Any) -> bool:
        return True


def preset_yaml(name: str, preset: dict[str, Any]) -> str:
    """One preset as checked YAML text."""
    document = {"kind": "synthetic", "num_prompts": 1000, **preset}
    validate(SyntheticWorkload, document, name, require_units=True)
    body = yaml.dump(document, Dumper=_PlainDumper, sort_keys=False, default_flow_style=None, width=100)
    return f"# Written by tools/fit_workload_presets.py; change it there.\n{body}"


def main() -> None:
    """Write every preset."""
    parser = argparse.ArgumentParser(description="Fit the workload presets from the public traces.")
    parser.add_argument("traces", type=Path, help="folder with azure2023/ and mooncake_fast25/")
    parser.add_argument("--output", type=Path, default=preset_dir("workloads"), help="folder to write to")
    arguments = parser.parse_args()
    for name, preset in sorted(fit_presets(arguments.traces).items()):
        write_atomic(arguments.output / f"{name}.yaml", preset_yaml(name, preset).encode())
        print(name)


if __name__ == "__main__":
    main()
