"""Hashes what a module's code does, for keys of cached results."""

from __future__ import annotations

import ast
import hashlib
from pathlib import Path

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def code_hash(module: Path) -> str:
    """SHA-256 (hexadecimal) of a Python file's syntax tree without docstrings; comments and layout do not count.

    Python's version is part of it: each has its own syntax tree.
    """
    tree = ast.parse(module.read_bytes(), filename=str(module))
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()
