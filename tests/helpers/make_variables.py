"""The variables that make passes to its commands."""

import re
from pathlib import Path

_MAKEFILE = Path(__file__).resolve().parents[2] / "Makefile"
VARIABLES = set(re.findall(r"^VARIABLES := (.*)$", _MAKEFILE.read_text(encoding="utf-8"), re.MULTILINE)[0].split())
GIVEN_BY_MAKE = {"MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS", *VARIABLES}
