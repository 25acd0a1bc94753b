"""User errors: one line on standard error, exit code 2, no traceback."""

import re


def check_refused(done, message):
    """Check that a command failed with a user error, and return its line."""
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    assert re.search(message, lines[0]), lines[0]
    assert "Traceback" not in done.stdout
    return lines[0]


MODEL = ("model.from_scratch=false",)
