"""Evaluate the base and the trained model of a run with the lm-evaluation-harness, and compare them.

The harness runs as a subprocess in its own environment (`make setup-eval`), once per model. SELECTION is the tasks and
the limit, such as `default` or `gsm8k-limit-100`. `runs/NAME/eval/SELECTION/base/` and `…/trained/` have the results,
samples and log of the harness, `runs/NAME/eval/SELECTION.json` the comparison:

    run             its name
    tasks, limit    list of names as given; items per task, null for all
    backend         "vllm" or "hf" (transformers)
    versions        lm_eval, transformers
    base, trained   {"model": name, "chat_template": whether it was applied, "command": of the harness, as a list}
    summary         where the trained model is significantly worse; whether the base model has no chat template
    rows            one object per task and metric: task, metric (with its filter where it has one:
                    "exact_match,strict-match"), higher_is_better, base, base_stderr, trained, trained_stderr,
                    difference (trained - base), p_value (two-sided, paired; null without a score per item),
                    samples (items), worse (boolean: significantly)
"""

import glob
import json
import logging
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sft_recipes.planner import plan as plans
from sft_recipes.planner.render import format_table
from sft_recipes.runtime.errors import SetupError
from sft_recipes.runtime.paths import REPOSITORY, absolute
from sft_recipes.runtime.run_dir import RunDir, read_json, runs_root, write_json
from sft_recipes.tools import generate, paired_comparison
from sft_recipes.training import lora
from sft_recipes.training.library_logging import silence_libraries

log = logging.getLogger(__name__)

# Following instructions and arithmetic in words (generated answers), knowledge and language (multiple choice): what
# fine-tuning is for, and what it may damage.
TASK_SETS = {"default": ("ifeval", "gsm8k", "arc_challenge", "hellaswag")}
_NO_TEMPLATE = " The base model has no chat template: it was evaluated without, the trained model with one."


def download(tasks: str) -> None:
    """Download data, metric modules and nltk data of tasks: the harness scores one item of each, without a model.

    Raises:
        SetupError: a task is unknown or not downloadable.
    """
    log_file = runs_root() / ".eval" / "download.txt"
    log.info("downloading the tasks %s (log: %s)", tasks, log_file)
    _run(_command("dummy", {}, tasks, 1), log_file)


def evaluate(folder: RunDir, tasks: str, limit: int | None, arguments: Sequence[str]) -> dict[str, Any]:
    """Evaluate both models and return the comparison, which is written to the run's `eval/`.

    Args:
        tasks: tasks, groups or tags of the harness, `default`, or .yaml files of tasks, separated by commas.
        limit: items per task; None for all.
        arguments: more arguments of `lm_eval run`.

    Raises:
        UserError: the run is unfinished, its adapters are not merged, its base model does not exist, a task is
            unknown, or the harness fails.
    """
    python, plan = _harness_python(), plans.read(folder.plan)
    trained = generate.find_model(folder, merged=plan.method != "full")
    silence_libraries()
    import torch
    from transformers import AutoTokenizer

    gpus, trusted = torch.cuda.device_count(), plan.sections.model.trust_remote_code
    base = lora.find_base_folder(plan, folder)
    has_template = AutoTokenizer.from_pretrained(base, trust_remote_code=trusted).chat_template is not None
    shared: dict[str, Any] = {"dtype": "auto", "trust_remote_code": trusted}
    vllm = any(python.parents[1].glob("lib/python*/site-packages/vllm"))
    shared |= {"tensor_parallel_size": max(gpus, 1)} if vllm else {"parallelize": gpus > 1}
    device = ["--batch_size", "auto" if gpus else "8", "--device", "cuda" if gpus else "cpu"]
    backend, options = ("vllm", ["--batch_size", "auto"]) if vllm else ("hf", device)
    selection = re.sub("[^A-Za-z0-9._-]+", "-", tasks).strip("-.")[:100] + (f"-limit-{limit}" if limit else "")
    name = "the untrained model (from scratch, random weights)" if plan.sections.model.from_scratch else plan.model
    comparison = {"run": folder.name, "tasks": tasks.split(","), "limit": limit, "backend": backend}
    place, compared = folder.evaluation / selection, []
    for side, path, model, template in (("base", base, name, has_template), ("trained", trained, folder.name, True)):
        output = place / side
        shutil.rmtree(output, ignore_errors=True)
        more = [*options, "--log_samples", "--output_path", str(output / "harness.json"), *arguments]
        chat = ["--apply_chat_template"] if template else []
        command = _command(backend, {"pretrained": str(path.resolve()), **shared}, tasks, limit, *more, *chat)
        log.info("evaluating the %s model: %s (log: %s)", side, model, output / "log.txt")
        _run(command, output / "log.txt")
        compared.append(_read(output))
        comparison[side] = {"model": model, "chat_template": template, "command": command}
    rows, results = paired_comparison.compare(*compared), compared[-1][0]
    summary = paired_comparison.summarize(rows) + ("" if has_template else _NO_TEMPLATE)
    versions = {name: results[f"{name}_version"] for name in ("lm_eval", "transformers")}
    comparison |= {"versions": versions, "summary": summary, "rows": rows}
    write_json(place.with_name(f"{selection}.json"), comparison)
    return comparison


def to_text(comparison: dict[str, Any]) -> str:
    """Return a comparison as a table, followed by its summary."""
    table = [["task", "metric", "items", "base", "stderr", "trained", "stderr", "difference", "p", ""]]
    for row in comparison["rows"]:
        numbers = (row[key] for key in ("base", "base_stderr", "trained", "trained_stderr"))
        scores = ["" if number is None else f"{number:.4f}" for number in numbers]
        p_value = "not tested" if row["p_value"] is None else f"{row['p_value']:.2g}"
        line = [row["task"], row["metric"], str(row["samples"]), *scores, f"{row['difference']:+.4f}", p_value]
        table.append([*line, "WORSE" if row["worse"] else ""])
    return "\n".join([format_table(table), comparison["summary"]])


def _harness_python() -> Path:
    """Return the Python of the harness's environment: that of EVAL_VENV, else of `.venv-eval`.

    Raises:
        SetupError: it does not exist.
    """
    python = absolute(os.environ.get("EVAL_VENV") or str(REPOSITORY / ".venv-eval")) / "bin" / "python"
    if not python.is_file():
        raise SetupError(f"EVAL_VENV: found no {python}, the harness's environment. Create it: make setup-eval")
    return python


def _command(model: str, model_args: dict[str, Any], tasks: str, limit: int | None, *options: str) -> list[str]:
    """Return the harness's command for one of its model classes (hf, vllm, dummy) and the arguments of that class."""
    names = [task for name in tasks.split(",") for task in TASK_SETS.get(name, (name,))]
    more = ["--model_args", json.dumps(model_args), *(["--limit", str(limit)] if limit else []), *options]
    return [str(_harness_python()), "-m", "lm_eval", "run", "--model", model, "--tasks", ",".join(names), *more]


def _run(command: list[str], log_file: Path) -> None:
    """Run the harness with its output in a file.

    Raises:
        SetupError: it failed.
    """
    log_file.parent.mkdir(parents=True, exist_ok=True)
    # datasets follows HF_HUB_OFFLINE, evaluate does not
    variables = {"HF_EVALUATE_OFFLINE": os.environ.get("HF_HUB_OFFLINE", ""), **os.environ}
    with log_file.open("w", encoding="utf-8") as output:
        done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=variables, check=False)
    if done.returncode == 0:
        return
    last = log_file.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
    unknown = re.search("Tasks not found: (.*)", last)
    if not unknown:
        raise SetupError(f"eval: the harness exited with code {done.returncode}: {last[:200]}. Read {log_file}")
    raise SetupError(f"TASKS: the harness has no {unknown[1]}. List its tasks: {' '.join(command[:3])} ls tasks")


def _read(output: Path) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Return the results that the harness wrote to a folder, and the samples of each task.

    Raises:
        SetupError: it wrote none: it only warns where it cannot.
    """
    results = next((read_json(path) for path in output.glob("harness_*.json")), {})
    if not results:
        raise SetupError(f"eval: the harness wrote no results to {output}. Read {output / 'log.txt'}")
    samples = {}
    for task in results["configs"]:
        (path,) = output.glob(f"samples_{glob.escape(task)}_20*.jsonl")
        samples[task] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return results, samples
