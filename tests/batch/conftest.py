"""A stand-in for the simulator, and where to find it."""

from __future__ import annotations

import sys
import types

import pytest

from kvsim.errors import WeightsDoNotFit


@pytest.fixture
def fake_simulate(monkeypatch, make_report):
    """Answers from hand-made reports; 13 sequences do not fit, 66 hit a bug."""
    module = types.ModuleType("kvsim.simulate")
    module.calls = []

    def run(scenario, *, base_dir=None):
        module.calls.append((scenario, base_dir))
        if scenario.engine.max_num_seqs == 13:
            msg = "no room"
            raise WeightsDoNotFit(msg)
        if scenario.engine.max_num_seqs == 66:
            return 1 / 0
        return make_report(scenario, fold=float(scenario.engine.max_num_seqs))

    module.simulate = module.estimate = run
    monkeypatch.setitem(sys.modules, "kvsim.simulate", module)
    return module
