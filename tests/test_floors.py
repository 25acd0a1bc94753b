"""The rooms import downwards alone, and each heavy library stays in its rooms (the shape of the package)."""

import ast

import pytest
from conftest import REPOSITORY

PACKAGE = REPOSITORY / "sft_recipes"

# A room and the rooms below it. `cli` alone reaches all.
MAY_IMPORT = {
    "planning": {"planning"},
    "data": {"data", "planning"},
    "launching": {"launching", "planning"},
    "training": {"training", "data", "planning"},
    "reporting": {"reporting", "planning"},
    "cli": {"planning", "launching", "training", "data", "reporting"},
    "__main__": {"cli"},
    "__init__": set(),
}
MAY_USE = {
    "torch": ("data", "training"),
    "transformers": ("data", "training"),
    "tokenizers": ("data",),
    "datasets": ("data", "training"),
    "pyarrow": ("data",),
    "accelerate": ("training",),
    "deepspeed": ("training",),
    "trl": ("training/trainer.py",),
    "numpy": ("data", "training/digests.py"),
    "rich": ("training/callbacks",),
    "matplotlib": ("reporting",),
    "yaml": ("planning", "launching"),
}
STANDARD_LIBRARY_ONLY = {"planning": {"yaml"}, "launching": {"yaml"}}


def modules():
    return sorted(path for path in PACKAGE.rglob("*.py"))


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "sft_recipes":
                yield from ((f"sft_recipes.{alias.name}", node) for alias in node.names)
            else:
                yield node.module, node


def test_the_sweep_sees_the_whole_package():
    assert len(modules()) >= 30
    assert {room(path) for path in modules()} == set(MAY_IMPORT)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_and_never_up(path):
    ours = {name.split(".")[1] for name, _ in imports(path) if name.startswith("sft_recipes.")}
    assert ours <= MAY_IMPORT[room(path)]


def test_the_schema_stands_on_the_ground():
    assert [name for name, _ in imports(PACKAGE / "planning" / "schema.py") if name.startswith("sft_recipes")] == []


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_each_heavy_library_stays_in_its_rooms(path):
    place = path.relative_to(PACKAGE).as_posix()
    used = {name.split(".")[0] for name, _ in imports(path)}
    strayed = {name for name in used & set(MAY_USE) if not place.startswith(MAY_USE[name])}
    assert strayed == set()


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_office_needs_the_standard_library_and_yaml_alone(path):
    import sys

    allowed = STANDARD_LIBRARY_ONLY.get(room(path))
    if allowed is None:
        return
    used = {name.split(".")[0] for name, _ in imports(path)}
    assert used <= allowed | {"sft_recipes"} | set(sys.stdlib_module_names)


def test_the_command_line_imports_heavy_rooms_inside_the_verb_that_needs_them():
    tree = ast.parse((PACKAGE / "cli.py").read_text())
    at_the_top = {name for node in tree.body for name in _names(node)}
    assert not any(name.startswith(("sft_recipes.training", "sft_recipes.data")) for name in at_the_top)


def _names(node):
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) else []


def test_every_module_says_what_only_it_does():
    described = [ast.get_docstring(ast.parse(path.read_text())) for path in modules()]
    assert all(described)
    assert len(set(described)) == len(described)
