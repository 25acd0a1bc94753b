"""Hash a module's code without docstrings and comments, for the keys of cached results."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from types import CodeType


def code_hash(module: Path) -> str:
    """Return the SHA-256 (hexadecimal) of a Python file's compiled code without docstrings and `assert`.

    Comments, empty lines and edits of docstrings do not change it. Python's version does, since each has its own
    bytecode; a statement that is broken into other lines and a new docstring may.
    """
    return _hash_source(module.read_bytes())


@cache
def _hash_source(source: bytes) -> str:
    code = compile(source, "", "exec", dont_inherit=True, optimize=2)
    return hashlib.sha256(repr(_describe(code)).encode()).hexdigest()


def _describe(constant: object) -> object:
    """Return what a constant of compiled code is, without line numbers and in a fixed order."""
    if isinstance(constant, CodeType):
        code = constant
        arguments = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
        names = (code.co_qualname, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
        return code.co_code, code.co_exceptiontable, arguments, names, [_describe(item) for item in code.co_consts]
    if isinstance(constant, tuple):
        return tuple(_describe(item) for item in constant)
    if isinstance(constant, frozenset):  # its order differs from process to process
        return "frozenset", sorted(map(repr, constant))
    return constant
