"""The CUDA lock on a machine without a driver: all installed packages and all modules of this project can be imported."""

import subprocess
import sys

from helpers.workplace import REPOSITORY

# Top-level modules of the locked packages, and all modules of this project.
IMPORT = """
import importlib, importlib.metadata, pkgutil
import torch
import sft_recipes
from sft_recipes.tools.doctor import locked
assert torch.version.cuda is not None and not torch.cuda.is_available()
locked_names = {name.lower().replace("_", "-") for name in locked("cuda")}
names = {
    module for module, packages in importlib.metadata.packages_distributions().items()
    if module.isidentifier() and not module.startswith("_")
    and any(package.lower().replace("_", "-") in locked_names for package in packages)
}
names |= {module.name for module in pkgutil.walk_packages(sft_recipes.__path__, "sft_recipes.")}
names -= {name for name in names if name.endswith("__main__")}
failed = []
for name in sorted(names):
    try:
        importlib.import_module(name)
    except Exception as error:
        failed.append(f"{name}: {type(error).__name__}: {error}")
print(len(names), "modules", *failed, sep="\\n")
"""


def test_every_module_imports_without_a_driver():
    done = subprocess.run(
        [sys.executable, "-c", IMPORT], cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    count = lines.index("modules") - 1
    assert int(lines[count]) > 150 and lines[count + 2 :] == []


def test_torch_is_the_locked_cuda_build():
    import torch

    locked = (REPOSITORY / "requirements" / "cuda.txt").read_text()
    assert f"\ntorch=={torch.__version__.partition('+')[0]} " in locked
    runtime = locked.partition("nvidia-cuda-runtime==")[2].split()[0]
    assert runtime.startswith(torch.version.cuda)
