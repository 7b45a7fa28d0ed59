"""calibration/compiled holds one true entry per variant."""

import json
from pathlib import Path

import pytest

from kernels.harness import source_hash
from kernels.harness.source_hash import source_files, source_sha256
from kvsim.kernel_catalog import TARGETS, load_compiled_kernel

FOLDER = Path(__file__).resolve().parents[2] / "calibration" / "compiled"
PATHS = sorted(FOLDER.glob("*.json"))


def kernels_by_variant():
    pytest.importorskip("torch", reason="kernels need torch (the kernels extra)")
    pytest.importorskip("triton", reason="kernels need triton (the kernels extra)")
    from kernels.harness.entries import kernels_by_variant

    return kernels_by_variant()


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_entry_is_of_the_sources_as_they_are(path):
    entry = load_compiled_kernel(path)
    assert entry.source_sha256 == source_sha256(entry.kernel), "run tools/write_compiled_kernels.py"
    assert set(entry.targets) == set(TARGETS)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_every_case_agreed_with_the_reference(path):
    correctness = load_compiled_kernel(path).correctness
    assert correctness.where == "interpreter"
    assert correctness.passed == correctness.cases > 0


def test_every_variant_has_an_entry_and_every_entry_a_variant():
    variants = kernels_by_variant()
    from kernels.harness.entries import file_name

    assert [path.name for path in PATHS] == sorted(map(file_name, variants))
    for name, (kernel, variant) in variants.items():
        entry = load_compiled_kernel(FOLDER / file_name(name))
        assert entry.kernel == kernel
        assert entry.correctness.cases == len(variant.correctness_cases)
        assert (entry.operation, entry.form, entry.cost_unit) == (variant.operation, variant.form, variant.cost_unit)
        assert entry.kv_format == (variant.kv_format.name if variant.kv_format else None)


def test_entries_are_written_the_same_every_time():
    kernels_by_variant()
    from kernels.harness.entries import dump

    for path in PATHS:
        text = path.read_text(encoding="utf-8")
        assert dump(json.loads(text)) == text


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of two kernels: `first` imports a format that imports a helper, `second` only its own module."""
    files = {
        "contract.py": "",
        "launches.py": "",
        "harness/check.py": "",
        "formats/__init__.py": "",
        "formats/pages.py": "",
        "formats/base.py": "from .pages import PageLayout\n",
        "first/__init__.py": "",
        "first/cases.py": "import torch\nfrom ..contract import Variant\nfrom ..formats.base import KvFormat\n"
        "from ..harness import check\nfrom . import kernel\n",
        "first/kernel.py": "def plan():\n    from ..launches import Launch\n",
        "second/inner/cases.py": "from .kernel import plan\nfrom ...launches import Launch\n",
        "second/inner/kernel.py": "",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    monkeypatch.setattr(source_hash, "PACKAGE", tmp_path)
    source_hash._imported_files.cache_clear()
    yield tmp_path
    source_hash._imported_files.cache_clear()


def test_sources_are_followed_through_imports(package):
    def names(kernel):
        return [path.relative_to(package).as_posix() for path in source_files(kernel)]

    assert names("first") == ["first/cases.py", "first/kernel.py", "formats/base.py", "formats/pages.py"]
    assert names("second.inner") == ["second/inner/cases.py", "second/inner/kernel.py"]


@pytest.mark.parametrize(
    ("changed", "is_other"), [("formats/pages.py", True), ("first/kernel.py", True), ("contract.py", False),
                              ("harness/check.py", False), ("second/inner/kernel.py", False)],
)  # fmt: skip
def test_hash_changes_with_the_bytes_of_what_is_imported(package, changed, is_other):
    before = source_sha256("first")
    (package / changed).write_text("# another line\n", encoding="utf-8")
    assert (source_sha256("first") != before) is is_other
