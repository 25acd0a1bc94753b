"""What the smoke test reads: losses against those of docker/golden.json, weights of two runs, attention, the summary.

python docker/smoke.py compare RUN GOLDEN | record RUN GOLDEN | same RUN RUN | attention | summary STEPS
"""

import hashlib
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package: from a checkout it is not on Python's path

# Relative, of a step's loss, in bf16, where engines and devices round at other places. Two processes on the CPU are up
# to 5e-3 from one (tests/strategies/test_trajectories.py); a wrong mask, batch or schedule is far outside.
TOLERANCE = 2e-2


def losses(run: Path) -> dict[str, float]:
    """Each step's loss, and each evaluation's."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {f"loss {line['step']}": line["loss"] for line in lines if "loss" in line}
    return {**found, **{f"eval_loss {line['step']}": line["eval_loss"] for line in lines if "eval_loss" in line}}


def compare(run: Path, golden: Path) -> str:
    """Whether the run trained as the golden one did."""
    wanted, found = json.loads(golden.read_text()), losses(run)
    if missing := wanted.keys() - found.keys():
        sys.exit(f"not measured: {', '.join(sorted(missing))}")
    off = {key: abs(found[key] - value) / value for key, value in wanted.items()}
    worst = max(off, key=lambda key: off[key])
    last = f"loss {found['loss 20']:.4f} at step 20, at most {off[worst]:.1e} off the golden run's"
    if not all(value <= TOLERANCE for value in off.values()):
        sys.exit(f"{worst}: {found[worst]:.4f} and not {wanted[worst]:.4f}; {last}, {TOLERANCE:.0e} are allowed")
    return last


def record(run: Path, golden: Path) -> str:
    """Writes the golden losses."""
    golden.write_text(json.dumps(losses(run), indent=2) + "\n")
    return f"written: {golden}"


def same(killed: Path, straight: Path) -> str:
    """Whether both ended with the same weights; on a GPU, whose sums have no fixed order, with the same losses."""
    digests = [
        hashlib.sha256((run / "last" / "model.safetensors").read_bytes()).hexdigest() for run in (killed, straight)
    ]
    if digests[0] == digests[1]:
        return "killed, gone on with, and the same weights to the bit"
    ends = [losses(run)["loss 20"] for run in (killed, straight)]
    off = abs(ends[0] - ends[1]) / ends[1]
    if json.loads((killed / "plan.json").read_text())["gpus"] and off <= TOLERANCE:
        return f"killed, gone on with, and the last loss {off:.1e} off"
    sys.exit(f"killed and gone on with, it ends with other weights: loss {ends[0]} and not {ends[1]}")


def attention() -> str:
    """Report how a run attends on this GPU: by flash-attn, or by what it falls back to where that has no kernel.

    An installed flash-attn that gives wrong numbers or does not load is a fault of the image, and fails.
    """
    import torch

    from sft_recipes.tools.doctor import attention as judge
    from sft_recipes.training.attention import fastest
    from sft_recipes.training.torch_probe import look

    finding = judge(look())
    if finding.colour == "red":
        sys.exit(str(finding))
    if finding.colour == "green":
        return f"flash-attn: {finding.found}"
    return f"flash-attn: {finding.found}; falling back to {fastest('cuda', torch.bfloat16)}"


def summary(steps: Path) -> str:
    """One object on the whole test."""
    from sft_recipes.runtime.env import library_version

    names = ("name", "exit_code", "seconds", "said")
    told = [dict(zip(names, line.split("\t", 3), strict=True)) for line in steps.read_text().splitlines()]
    told = [{**one, "exit_code": int(one["exit_code"]), "seconds": int(one["seconds"])} for one in told]
    libraries = ("torch", "transformers", "trl", "accelerate", "deepspeed", "flash-attn")
    return json.dumps(
        {
            "passed": all(one["exit_code"] == 0 for one in told),
            "image": os.environ.get("SFT_RECIPES_IMAGE"),
            "versions": {name: library_version(name) for name in libraries},
            "steps": told,
        }
    )


if __name__ == "__main__":
    what = {one.__name__: one for one in (compare, record, same, attention, summary)}[sys.argv[1]]
    print(what(*map(Path, sys.argv[2:])))
