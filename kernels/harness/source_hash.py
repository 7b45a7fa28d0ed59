"""A hash of the source that a kernel is made of, so that a stored figure can be told from a stale one.

Only the standard library is used, and nothing of what is hashed is imported.
"""

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
"""The folder of the kernels package, whatever name it is installed under."""
MACHINERY = ("contract.py", "launches.py", "harness/")
"""What runs kernels but is no part of one: a change there leaves the machine code as it was."""


def source_sha256(kernel: str) -> str:
    """Hash the sources of a kernel.

    Parameters
    ----------
    kernel : str
        A name of ``KERNELS``, such as ``decode_attention.native``.

    Returns
    -------
    str
        SHA-256 in hexadecimal over the names and raw bytes of `source_files`.
    """
    digest = hashlib.sha256()
    for path in source_files(kernel):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(PACKAGE).as_posix()}\n{len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def source_files(kernel: str) -> tuple[Path, ...]:
    """Give the files of this package that a kernel's ``cases.py`` imports, however far removed, sorted by name."""
    found: set[Path] = set()
    left = [PACKAGE.joinpath(*kernel.split("."), "cases.py")]
    while left:
        path = left.pop()
        name = path.relative_to(PACKAGE).as_posix()
        if path not in found and not name.startswith(MACHINERY):
            found.add(path)
            left.extend(_imported_files(path))
    return tuple(sorted(found))


@cache
def _imported_files(path: Path) -> tuple[Path, ...]:
    return tuple(_relative_imports(path))


def _relative_imports(path: Path) -> Iterator[Path]:
    """Find the files that a module's relative imports name: a module, a package, or modules of a package."""
    for node in ast.walk(ast.parse(path.read_bytes(), str(path))):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = path.parents[node.level - 1]
        if node.module:
            base = base.joinpath(*node.module.split("."))
        if base.with_suffix(".py").is_file() and not base.is_dir():
            yield base.with_suffix(".py")
            continue
        modules = [base / f"{alias.name}.py" for alias in node.names]
        yield from (module for module in modules if module.is_file())
        # A name that is no module is defined by the package itself.
        if not all(module.is_file() for module in modules) and (base / "__init__.py").is_file():
            yield base / "__init__.py"
