"""Hash a module's code without docstrings and comments, for the keys of cached results."""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from pathlib import Path

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def code_hash(module: Path) -> str:
    """Return the SHA-256 (hexadecimal) of a Python file's syntax tree without docstrings.

    Comments and layout do not change it. Python's version does: each has its own syntax tree.
    """
    return _hash_source(module.read_bytes())


@cache
def _hash_source(source: bytes) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()
