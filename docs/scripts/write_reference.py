#!/usr/bin/env python3
"""Write docs/reference.md from the code: commands, variables, recipe keys, exit codes, files of a run directory.

.venv/bin/python docs/scripts/write_reference.py [--check]

With --check nothing is written; exit code 1 if the page is stale.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from sft_recipes import cli  # noqa: E402
from sft_recipes.config import schema, strategies  # noqa: E402
from sft_recipes.planner import plan as plans  # noqa: E402
from sft_recipes.runtime import run_dir  # noqa: E402

PAGE = REPOSITORY / "docs" / "reference.md"
HEAD = """# Reference

Generated from the code by `docs/scripts/write_reference.py`; do not edit. `make lint` fails if this page is stale.

A command is `make TARGET VARIABLE=value …` or, without Make, `python -m sft_recipes COMMAND [options] [key=value …]`.
`key=value` overrides a recipe's value by its dotted name and is recorded in the plan.
"""


def cell(text: str) -> str:
    """Return `text` for a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def table(header: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    """Return a Markdown table."""
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    lines += [f"| {' | '.join(cell(text) for text in row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def help_lines() -> Iterator[str]:
    """Yield the lines of `make help`."""
    done = subprocess.run(["make", "--silent", "help"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    yield from done.stdout.rstrip().splitlines()


def commands(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield a section per command of the command line."""
    (action,) = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
    for name, command in action.choices.items():
        options = [a for a in command._actions if not isinstance(a, argparse._HelpAction)]
        yield f"### `{name}`\n\n{helps.get(name, '')}\n"
        rows = []
        for option in options:
            names = ", ".join(option.option_strings) or option.metavar or option.dest
            if option.option_strings and option.nargs != 0:
                names += f" {option.metavar or option.dest.upper()}"
            rows.append((f"`{names}`", option.help or ""))
        if rows:
            yield table(("argument", "meaning"), iter(rows))


def attribute_docs(documented: object, heading: str = "Attributes") -> dict[str, str]:
    """Return the entries under a heading of a docstring."""
    entries: dict[str, str] = {}
    name = ""
    _, _, attributes = (inspect.getdoc(documented) or "").partition(f"{heading}:\n")
    for line in attributes.splitlines():
        if entry := re.fullmatch(r" {4}(\w+): (.*)", line):
            name = entry[1]
            entries[name] = entry[2]
        elif name and line.strip():
            entries[name] += f" {line.strip()}"
    return entries


def type_of(field: dataclasses.Field[object]) -> str:
    """Return a field's type with its bounds: `float (ge=0, le=1)`."""
    bounds = {"Fraction": "float (ge=0, le=1)", "Size": "int (ge=1, le=100_000)", "Name": "str"}
    bounds |= {"Count": "int (ge=1)", "NonNegativeFloat": "float (ge=0)", "Columns": "dict[str, str]"}
    bounds |= {"TemplateVariables": "dict[str, Any]", "StoppingAlert": "str"}
    bounds |= {"Attention": "str", "TargetModules": "str | list[str]"}
    text = re.sub(r"Annotated\[(.*), AfterValidator\(.*?\)\]", r"\1", str(field.type))
    text = re.sub(r"Annotated\[(\w+), Field\((.*?)\)\]", r"\1 (\2)", text)
    return re.sub(r"\w+", lambda word: bounds.get(word[0], word[0]), text)


def default_of(field: dataclasses.Field[object]) -> str:
    """Return how a field's default is written in YAML."""
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    if value is None:
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def recipe_keys() -> Iterator[str]:
    """Yield a section per part of a recipe."""
    documented = attribute_docs(schema.Recipe)
    top = [f for f in dataclasses.fields(schema.Recipe) if f.name not in (*schema.SECTIONS, "name", "origins")]
    yield "### At the top\n"
    rows = []
    for field in top:
        meaning = documented.get(field.name) or TOP_KEYS[field.name]
        rows.append((f"`{field.name}`", default_of(field) if field.name != "trainer" else "", meaning))
    yield table(("key", "default", "meaning"), iter(rows))
    for name, section in schema.SECTIONS.items():
        entries = attribute_docs(section)
        summary = (inspect.getdoc(section) or "").partition("Attributes:")[0].strip()
        yield f"### `{name}:`\n\n{summary}\n"
        header: tuple[str, ...] = ("key", "type", "default", "meaning") if entries else ("key", "type", "default")
        rows = []
        for field in dataclasses.fields(section):
            row: tuple[str, ...] = (f"`{name}.{field.name}`", f"`{type_of(field)}`", default_of(field))
            rows.append((*row, entries.get(field.name, "")) if entries else row)
        yield table(header, iter(rows))
    yield "### `trainer:`\n\nAny other field of `trl.SFTConfig`, by its own name. Defaults:\n"
    yield table(
        ("key", "default"), ((f"`trainer.{k}`", f"`{str(v).lower()}`") for k, v in schema.defaults()["trainer"].items())
    )
    yield "Fields that a recipe may not set, with what sets them:\n"
    yield table(("field", "set by"), ((f"`{k}`", v) for k, v in schema.owned_trainer_fields().items()))


TOP_KEYS = {
    "size": "a size class of `recipes/sizes.yaml`, or a size such as `20b`, which selects the nearest",
    "parallelism": f"one of {', '.join(strategies.STRATEGIES)}",
    "precision": "one of bf16, fp32",
    "allow_out_of_range": "keys that may be outside the range of the size class",
    "trainer": "fields of `trl.SFTConfig`: below",
}


def strategy_rows() -> Iterator[tuple[str, ...]]:
    """Yield the values of `parallelism`."""
    for name, strategy in strategies.STRATEGIES.items():
        sharded = [
            part
            for part, value in (
                ("parameters", strategy.shards_parameters),
                ("gradients", strategy.shards_gradients),
                ("optimizer state", strategy.shards_optimizer),
            )
            if value
        ]
        yield f"`{name}`", ", ".join(sharded) or "nothing"


def exit_codes() -> Iterator[tuple[str, ...]]:
    """Yield the exit codes in order."""
    yield from attribute_docs(run_dir, "Exit codes").items()


def run_files() -> Iterator[tuple[str, ...]]:
    """Yield what a run directory contains."""
    for entry in vars(run_dir.RunDir).values():
        if isinstance(entry, run_dir.Entry):
            yield f"`{entry.name}`", entry.content
    yield "`checkpoint-N/`", "A checkpoint; the two latest are kept. `complete.json` in it has sizes and SHA-256."
    yield "`best-N/`", "Weights of the three best evaluated steps."


def page() -> str:
    """Return the page."""
    parts = [HEAD, "## Make\n", "```text", *help_lines(), "```\n", "## Commands\n", *commands(cli.build_parser())]
    parts += ["## Recipe keys\n", *recipe_keys()]
    parts += [
        "## Values of `parallelism`\n",
        table(("value", "sharded"), strategy_rows()),
        "Details: [strategies](strategies.md).\n",
    ]
    parts += ["## Exit codes\n", table(("code", "meaning"), exit_codes())]
    parts += ["Make itself exits with 0 or 2 only; call `python -m sft_recipes` where the code matters.\n"]
    parts += ["## Run directory\n", "In `runs/NAME/`, or `$RUNS_DIR/NAME/`:\n", table(("name", "content"), run_files())]
    parts += [
        "## `plan --json`\n",
        "Fields:\n",
        ", ".join(f"`{f.name}`" for f in dataclasses.fields(plans.Plan)) + ".\n",
    ]
    return "\n".join(parts).rstrip() + "\n"


def main(arguments: list[str]) -> int:
    """Write the page, or compare it."""
    if "--check" in arguments:
        if PAGE.read_text(encoding="utf-8") == page():
            return 0
        print(
            f"docs/reference.md is stale: run .venv/bin/python {Path(__file__).relative_to(REPOSITORY)}",
            file=sys.stderr,
        )
        return 1
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
