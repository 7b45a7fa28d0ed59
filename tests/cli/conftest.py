"""A simulator made of hand-made reports, in the place of the real one."""

from __future__ import annotations

import sys
import types

import pytest
from typer.testing import CliRunner

from kvsim.cli import build_app
from kvsim.compression import parse_compression
from kvsim.errors import InfeasibleScenario
from kvsim.simulate import Comparison


@pytest.fixture
def fake_simulate(monkeypatch, make_report):
    """Install a stand-in for kvsim.simulate; attributes steer it and record what it was asked."""
    module = types.ModuleType("kvsim.simulate")
    module.scenarios = []
    module.attainment = None
    module.error = None
    module.impossible = {"nvfp4"}

    def run(scenario, *, base_dir=None, progress=None, observer=None):
        module.scenarios.append(scenario)
        module.base_dir = base_dir
        if module.error is not None:
            raise module.error
        if scenario.compression.name in module.impossible:
            msg = "h100-sxm has no fp4"
            raise InfeasibleScenario(msg)
        return make_report(scenario, attainment=module.attainment, notes=("a note",))

    def compare(scenario, strategies, *, base_dir=None, method="simulation", progress=None):
        rows = []
        for name in strategies:
            variant = scenario.model_copy(update={"compression": parse_compression(name)})
            try:
                rows.append(Comparison(name, run(variant, base_dir=base_dir), None))
            except InfeasibleScenario as error:
                rows.append(Comparison(name, None, str(error), error))
        return tuple(rows)

    module.simulate = run
    module.estimate = lambda scenario, *, base_dir=None: run(scenario, base_dir=base_dir)
    module.compare = compare
    module.Comparison = Comparison
    monkeypatch.setitem(sys.modules, "kvsim.simulate", module)
    return module


@pytest.fixture
def invoke():
    """Run the command line in this process."""
    runner = CliRunner()
    app = build_app()

    def run(*arguments):
        return runner.invoke(app, [str(argument) for argument in arguments])

    return run


@pytest.fixture
def scenario_path(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text("model: llama-3.1-8b\ndevice: h100-sxm\nworkload: chat\n")
    return path


@pytest.fixture
def comparisons(make_report):
    """Three strategies with awkward names, one of which cannot run."""
    return (
        Comparison("native", make_report(strategy="native", notes=("read <a100> as a100-sxm",)), None),
        Comparison("<script>alert(1)</script>", make_report(fold=4.0, priced=False, count=10), None),
        Comparison("nvfp4", None, "no fp4 on <this> device"),
    )
