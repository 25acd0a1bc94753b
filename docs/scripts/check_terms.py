#!/usr/bin/env python3
"""Report phrases that docs/design/glossary.md replaces, in the tracked text of the repository.

    docs/scripts/check_terms.py [PATH ...]

Every phrase in `code` of an "instead of" column is a regular expression, matched as whole words in any case. Prints
`file:line: 'phrase', use …` per occurrence; exit code 1 if there is one. Lines that end with EXEMPTION are skipped.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
GLOSSARY = "docs/design/glossary.md"
EXEMPTION = "language: ok"  # at the end of a line
# Generated results, other projects' text, and the glossary itself.
EXCLUDED = re.compile(
    r"LICENSE|requirements/.*\.txt|.*\.(json|jsonl|svg|png|lock|jinja)|docs/CHAOS\.md|docs/design/glossary\.md"
)
NEXT_HEADING = re.compile(r"^## (?!Unreleased)", re.M)  # in CHANGELOG.md: everything from there on is history


def read_terms(glossary: str) -> list[tuple[re.Pattern[str], str]]:
    """Return the rejected phrases with what to use, from the tables `| use | instead of |` of `glossary`."""
    terms, in_table = [], False
    for line in glossary.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) != 2:
            in_table = False
        elif cells == ["use", "instead of"]:
            in_table = True
        elif in_table:
            for phrase in re.findall(r"`([^`]+)`", cells[1]):
                pattern = phrase.replace(r"\|", "|").replace(" ", r"\s+")
                start = "" if pattern[0] in ";," else r"(?<!\w)"
                terms.append((re.compile(rf"{start}(?:{pattern})(?!\w)", re.IGNORECASE), cells[0].replace(r"\|", "|")))
    return terms


def find_phrases(text: str, terms: list[tuple[re.Pattern[str], str]]) -> Iterator[tuple[int, str, str]]:
    """Yield line number, phrase and replacement of every rejected phrase in `text`."""
    for number, line in enumerate(text.splitlines(), 1):
        if EXEMPTION not in line:
            for pattern, use in terms:
                for match in pattern.finditer(line):
                    yield number, match.group(), use


def read_text(path: str) -> str:
    """Return the text of a tracked file that is checked; empty if it is binary or no longer there."""
    try:
        text = (REPOSITORY / path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
    if path == "CHANGELOG.md" and (history := NEXT_HEADING.search(text)):
        return text[: history.start()]
    return text


def main(paths: list[str]) -> int:
    """Check the tracked files under `paths`, or all of them."""
    terms = read_terms((REPOSITORY / GLOSSARY).read_text(encoding="utf-8"))
    listed = subprocess.run(
        ["git", "ls-files", "--", *paths], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    hits = 0
    for path in listed:
        if EXCLUDED.fullmatch(path):
            continue
        for number, phrase, use in find_phrases(read_text(path), terms):
            print(f"{path}:{number}: {phrase!r}, use {use}")
            hits += 1
    if hits:
        print(f"{hits} phrases that {GLOSSARY} replaces", file=sys.stderr)
    return int(hits > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
