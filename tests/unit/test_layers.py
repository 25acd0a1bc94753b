"""Imports go down only, and each heavy library stays in its packages (the layout of sft_recipes)."""

import ast
from collections import Counter

from helpers.workplace import REPOSITORY

PACKAGE = REPOSITORY / "sft_recipes"

# Top to bottom: a package imports those after it, and itself.
LAYERS = (
    "__main__", "cli", "tools", "launch", "sanity", "training", "data", "monitor", "planner", "config", "runtime",
    "__init__",
)  # fmt: skip
# launch starts training as a subprocess; data and monitor do not import each other.
NEVER = {("launch", "training"), ("launch", "data"), ("launch", "monitor"), ("data", "monitor")}
MAY_USE = {
    "torch": ("data/", "training/", "sanity/", "tools/"),
    "transformers": ("data/", "training/", "sanity/", "tools/"),
    "tokenizers": ("data/",),
    "datasets": ("data/", "training/", "sanity/"),
    "pyarrow": ("data/",),
    "accelerate": ("training/", "sanity/", "tools/"),
    "deepspeed": ("training/",),
    "trl": ("training/trainer.py", "training/dataset.py", "training/sft_config.py", "training/patches.py"),
    "numpy": ("data/", "training/", "sanity/"),
    "rich": ("training/callbacks/",),
    "matplotlib": ("monitor/",),
}
STANDARD_LIBRARY_AND = {"runtime": set(), "config": {"yaml", "pydantic"}, "planner": {"pydantic"}, "launch": {"yaml"}}


def modules():
    return sorted(PACKAGE.rglob("*.py"))


def layer(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    """The modules that a file imports, by full name, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_the_scan_covers_every_layer():
    assert {layer(path) for path in modules()} == set(LAYERS)


def test_imports_go_down_only():
    upward = []
    for path in modules():
        here = layer(path)
        for name in imports(path):
            there = name.split(".")[1] if name.startswith("sft_recipes.") else None
            if there and (LAYERS.index(there) < LAYERS.index(here) or (here, there) in NEVER):
                upward.append(f"{path.relative_to(PACKAGE)}: {name}")
    assert upward == []


def test_heavy_libraries_stay_in_their_packages():
    strayed = [
        f"{place}: {name}"
        for path in modules()
        for place in [path.relative_to(PACKAGE).as_posix()]
        for name in {name.split(".")[0] for name in imports(path)} & set(MAY_USE)
        if not place.startswith(MAY_USE[name])
    ]
    assert strayed == []


def test_planner_and_launcher_need_only_small_libraries():
    import sys

    foreign = [
        f"{path.relative_to(PACKAGE)}: {name}"
        for path in modules()
        if layer(path) in STANDARD_LIBRARY_AND
        for name in {name.split(".")[0] for name in imports(path)}
        - {"sft_recipes", *STANDARD_LIBRARY_AND[layer(path)], *sys.stdlib_module_names}
    ]
    assert foreign == []


def test_cli_imports_torch_only_inside_the_command_that_needs_it():
    top = [node for node in ast.parse((PACKAGE / "cli.py").read_text()).body if isinstance(node, ast.ImportFrom)]
    assert top
    assert not any(node.module.startswith(("sft_recipes.training", "sft_recipes.data")) for node in top)


def test_file_names_are_unique():
    names = Counter(path.name for path in modules() if path.name not in ("__init__.py", "__main__.py"))
    assert [name for name, count in names.items() if count > 1] == []


def test_every_module_has_a_docstring():
    assert [path for path in modules() if not ast.get_docstring(ast.parse(path.read_text()))] == []
