"""The lint of docs/design/glossary.md: it finds old phrases, and the pages are free of them."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
from helpers.workplace import REPOSITORY

SCRIPT = REPOSITORY / "docs" / "scripts" / "check_terms.py"
spec = importlib.util.spec_from_file_location("check_terms", SCRIPT)
check_terms = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check_terms)
TERMS = check_terms.read_terms((REPOSITORY / "docs" / "design" / "glossary.md").read_text(encoding="utf-8"))
GO_ON = "goes " + "on"  # in two parts, so that the lint does not find it here
PLANTED = {  # line: phrase, split for the same reason
    "the run goes |on from step 3": "goes |on",
    "a loss that is no |number": "is no |number",
    "found 3; |wanted 4": "; |wanted",
    "7,000 tokens |a second": "tokens |a second",
    "no GPU here; sa|y GPUS=0": "sa|y GPUS=0",
    "def take|_up(state):": "take|_up",
    "the newest |whole step": "newest |whole",
}


@pytest.mark.parametrize(("line", "phrase"), PLANTED.items(), ids=PLANTED.values())
def test_check_terms_finds_a_planted_phrase(line, phrase):
    hits = [
        found
        for number, found, _ in check_terms.find_phrases(f"first\n{line}\n".replace("|", ""), TERMS)
        if number == 2
    ]
    assert phrase.replace("|", "") in hits


def test_check_terms_accepts_plain_lines_and_the_exemption():
    text = f"resuming from checkpoint-450\nit {GO_ON}  # language: ok\ngoose onward, figurehead"
    assert list(check_terms.find_phrases(text, TERMS)) == []


def test_check_terms_takes_a_new_row_of_the_glossary():
    table = "| use | instead of |\n|---|---|\n| `x` | y, `old (word\\|term)` |\n\nother | table | `kept` |"
    ((pattern, use),) = check_terms.read_terms(table)
    assert use == "`x`" and pattern.search("an Old Term.") and not pattern.search("old terminal")


def test_check_terms_names_file_and_line_and_fails(tmp_path):
    for path in ("docs/scripts/check_terms.py", "docs/design/glossary.md"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes((REPOSITORY / path).read_bytes())
    (tmp_path / "page.md").write_text(f"fine\nthe run {GO_ON}\n")
    changelog = f"## Unreleased\n- {GO_ON}\n\n## 0.1.0\n- {GO_ON}\n"
    (tmp_path / "CHANGELOG.md").write_text(changelog)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run(["git", "add", "-A"], cwd=tmp_path, check=True)
    script = [sys.executable, tmp_path / "docs/scripts/check_terms.py"]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    assert done.returncode == 1 and [line.split(": ")[0] for line in lines] == ["CHANGELOG.md:2", "page.md:2"]
    assert lines[1].endswith(f"{GO_ON!r}, use resume, continue; restore_state")
