"""Comparisons of the smoke test: losses with docker/golden.json, weights of two runs, flash attention, the summary.

python docker/smoke.py compare RUN GOLDEN | record RUN GOLDEN | compare_resumed RUN RUN | attention | summary STEPS
"""

import hashlib
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from a checkout the package is not on Python's path

# Relative, of a step's loss in bf16: parallelism strategies and devices round differently. Two CPU processes differ by
# up to 5e-3 from one (tests/strategies/test_trajectories.py); a wrong mask, batch or schedule is far outside.
TOLERANCE = 2e-2


def losses(run: Path) -> dict[str, float]:
    """Return the loss of each step and of each evaluation."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = {f"loss {line['step']}": line["loss"] for line in lines if "loss" in line}
    return {**train, **{f"eval_loss {line['step']}": line["eval_loss"] for line in lines if "eval_loss" in line}}


def compare(run: Path, golden: Path) -> str:
    """Check that the losses of a run equal the golden ones within the tolerance."""
    expected, measured = json.loads(golden.read_text()), losses(run)
    if missing := expected.keys() - measured.keys():
        sys.exit(f"not measured: {', '.join(sorted(missing))}")
    differences = {key: abs(measured[key] - value) / value for key, value in expected.items()}
    worst = max(differences, key=lambda key: differences[key])
    summary = f"loss {measured['loss 20']:.4f} at step 20, at most {differences[worst]:.1e} from golden"
    if not all(value <= TOLERANCE for value in differences.values()):
        found = f"found {measured[worst]:.4f}, expected {expected[worst]:.4f} within {TOLERANCE:.0e}"
        sys.exit(f"{worst}: {found}; {summary}")
    return summary


def record(run: Path, golden: Path) -> str:
    """Write the losses of a run as the golden ones."""
    golden.write_text(json.dumps(losses(run), indent=2) + "\n")
    return f"written: {golden}"


def compare_resumed(resumed: Path, uninterrupted: Path) -> str:
    """Check that both runs have the same final weights; on GPUs, whose sums have no fixed order, the same losses."""
    runs = (resumed, uninterrupted)
    digests = [hashlib.sha256((run / "last" / "model.safetensors").read_bytes()).hexdigest() for run in runs]
    if digests[0] == digests[1]:
        return "killed, resumed: same weights bit for bit"
    found, expected = (losses(run)["loss 20"] for run in runs)
    difference = abs(found - expected) / expected
    if json.loads((resumed / "plan.json").read_text())["gpus"] and difference <= TOLERANCE:
        return f"killed, resumed: last loss differs by {difference:.1e}"
    sys.exit(f"the resumed run has other weights: found loss {found}, expected {expected}")


def attention() -> str:
    """Return the attention implementation of runs on this GPU: flash-attn, or the fallback if it has no kernel.

    An installed flash-attn that computes wrong numbers or does not load is an error of the image, and fails.
    """
    import torch

    from sft_recipes.tools.doctor import check_flash_attention
    from sft_recipes.training.attention import find_fastest
    from sft_recipes.training.torch_probe import probe

    result = check_flash_attention(probe())
    if result.status == "error":
        sys.exit(str(result))
    if result.status == "ok":
        return f"flash-attn: {result.detail}"
    return f"flash-attn: {result.detail}; falling back to {find_fastest('cuda', torch.bfloat16)}"


def summary(steps: Path) -> str:
    """Return the results of all steps as one JSON object."""
    from sft_recipes.runtime.env import library_version

    names = ("name", "exit_code", "seconds", "last_line")
    results = [dict(zip(names, line.split("\t", 3), strict=True)) for line in steps.read_text().splitlines()]
    results = [{**row, "exit_code": int(row["exit_code"]), "seconds": int(row["seconds"])} for row in results]
    libraries = ("torch", "transformers", "trl", "accelerate", "deepspeed", "flash-attn")
    return json.dumps(
        {
            "passed": all(row["exit_code"] == 0 for row in results),
            "image": os.environ.get("SFT_RECIPES_IMAGE"),
            "versions": {name: library_version(name) for name in libraries},
            "steps": results,
        }
    )


if __name__ == "__main__":
    functions = {function.__name__: function for function in (compare, record, compare_resumed, attention, summary)}
    print(functions[sys.argv[1]](*map(Path, sys.argv[2:])))
