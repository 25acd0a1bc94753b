"""Evaluate the base and the trained model of a run with the lm-evaluation-harness, and compare them.

The harness runs as a subprocess in its own environment (`make setup-eval`), once per model. SELECTION is the tasks and
the limit, such as `default` or `gsm8k-limit-100`. `runs/NAME/eval/SELECTION/base/` and `…/trained/` have the results,
samples and log of the harness, `runs/NAME/eval/SELECTION.json` the comparison:

    run, date       name of the run; ISO 8601
    tasks, limit    names as given; items per task, null for all
    backend         "vllm" or "hf" (transformers)
    versions        lm_eval, transformers
    base, trained   {"model": name, "chat_template": whether it was applied, "command": of the harness, as a list}
    notes           sentences about what to know when comparing, such as a base model without a chat template
    summary         one sentence: where the trained model is significantly worse
    rows            one object per task and metric: task, metric (with its filter where it has one:
                    "exact_match,strict-match"), higher_is_better, base, base_stderr, trained, trained_stderr,
                    difference (trained - base), p_value (two-sided, paired; null without a score per item),
                    samples (items), worse (boolean: significantly)
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import json
import logging
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from sft_recipes.planner import plan as plans
from sft_recipes.planner.plan import Plan
from sft_recipes.planner.render import format_table
from sft_recipes.runtime.errors import SetupError
from sft_recipes.runtime.paths import REPOSITORY, absolute
from sft_recipes.runtime.run_dir import RunDir, read_json, runs_root, write_json
from sft_recipes.tools import paired_comparison
from sft_recipes.training import lora
from sft_recipes.training.library_logging import silence_libraries

log = logging.getLogger(__name__)

# Following instructions and arithmetic in words (generated answers), knowledge and language (multiple choice): what
# fine-tuning is for, and what it may damage.
TASK_SETS = {"default": ("ifeval", "gsm8k", "arc_challenge", "hellaswag")}


@dataclasses.dataclass(frozen=True)
class Selection:
    """What to evaluate a model on.

    Attributes:
        tasks: tasks, groups or tags of the harness, or `default`, separated by commas; or a .yaml file of a task.
        limit: items per task; None for all.
        include_path: folder with more tasks.
        arguments: more arguments of `lm_eval run`.
    """

    tasks: str
    limit: int | None = None
    include_path: str | None = None
    arguments: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name of its files."""
        limit = f"-limit-{self.limit}" if self.limit else ""
        return re.sub(r"[^A-Za-z0-9._-]+", "-", self.tasks).strip("-.")[:100] + limit

    def command(self, model: str, model_args: dict[str, Any], *options: str) -> list[str]:
        """Return the command that evaluates a model.

        Args:
            model: class of the harness: hf, vllm or dummy.
            model_args: its arguments.
        """
        tasks = [task for name in self.tasks.split(",") for task in TASK_SETS.get(name, (name,))]
        more = ["--limit", str(self.limit)] if self.limit else []
        more += ["--include_path", self.include_path] if self.include_path else []
        arguments = ["run", "--model", model, "--model_args", json.dumps(model_args), "--tasks", ",".join(tasks)]
        return [str(harness_python()), "-m", "lm_eval", *arguments, *more, *options, *self.arguments]


def harness_python() -> Path:
    """Return the Python of the harness's environment: that of EVAL_VENV, else of `.venv-eval`.

    Raises:
        SetupError: it does not exist.
    """
    python = absolute(os.environ.get("EVAL_VENV") or str(REPOSITORY / ".venv-eval")) / "bin" / "python"
    if not python.is_file():
        raise SetupError(f"EVAL_VENV: found no {python}, the harness's environment. Create it: make setup-eval")
    return python


def download(selection: Selection) -> None:
    """Download data, metric modules and nltk data of tasks: the harness scores one item of each, without a model.

    Raises:
        SetupError: a task is unknown, or not downloadable.
    """
    log_file = runs_root() / ".eval" / "download.txt"
    log.info("downloading the tasks %s (log: %s)", selection.tasks, log_file)
    _run(selection, dataclasses.replace(selection, limit=1).command("dummy", {}), log_file)


def evaluate(folder: RunDir, selection: Selection) -> dict[str, Any]:
    """Evaluate both models and return the comparison, which is written to the run's `eval/`.

    Raises:
        UserError: the run is unfinished, its base model does not exist, a task is unknown, or the harness fails.
    """
    harness_python()
    if folder.state() != "finished" or not any(folder.final.glob("*config.json")):
        raise SetupError(f"RUN: {folder.path} is not finished ({folder.state()}). Run `make train` to resume it")
    silence_libraries()
    from transformers import AutoTokenizer

    plan = plans.read(folder.plan)
    base, trusted = lora.find_base_folder(plan, folder).resolve(), plan.sections.model.trust_remote_code
    has_template = AutoTokenizer.from_pretrained(base, trust_remote_code=trusted).chat_template is not None
    name, notes = plan.model, []
    if plan.sections.model.from_scratch:
        name = "the untrained model"
        notes.append("The run starts from scratch: its base is the untrained model, with random weights.")
    if not has_template:
        notes.append("The base model has no chat template: it was evaluated without, the trained model with one.")
    if selection.limit:
        notes.append(f"Only the first {selection.limit} items of each task: a trial, not a result to publish.")
    backend, options, shared = _backend(plan)
    compared, sides, folder_of_sides = [], {}, folder.evaluation / selection.name
    for side, model, template, own in (
        ("base", name, has_template, {"pretrained": str(base)}),
        ("trained", folder.name, True, _trained_model(plan, folder, base, backend)),
    ):
        output = folder_of_sides / side
        shutil.rmtree(output, ignore_errors=True)
        more = [*options, *(["--apply_chat_template"] if template else []), "--log_samples"]
        command = selection.command(backend, own | shared, *more, "--output_path", str(output / "harness.json"))
        log.info("evaluating the %s model: %s (log: %s)", side, model, output / "log.txt")
        _run(selection, command, output / "log.txt")
        compared.append(_read(output))
        sides[side] = {"model": model, "chat_template": template, "command": command}
    rows = paired_comparison.compare(*compared)
    results, _ = compared[-1]
    comparison = {
        "run": folder.name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "tasks": selection.tasks.split(","),
        "limit": selection.limit,
        "backend": backend,
        "versions": {"lm_eval": results["lm_eval_version"], "transformers": results["transformers_version"]},
        **sides,
        "notes": notes,
        "summary": paired_comparison.summarize(rows),
        "rows": rows,
    }
    write_json(folder_of_sides.with_name(f"{selection.name}.json"), comparison)
    return comparison


def to_text(comparison: dict[str, Any]) -> str:
    """Return a comparison as a table, followed by its notes and its summary."""
    table = [["task", "metric", "items", "base", "trained", "difference", "p"]]
    for row in comparison["rows"]:
        scores = [
            f"{row[side]:.4f}" + ("" if row[f"{side}_stderr"] is None else f" ± {row[f'{side}_stderr']:.4f}")
            for side in ("base", "trained")
        ]
        p_value = "not tested" if row["p_value"] is None else f"{row['p_value']:.2g}"
        table.append(
            [row["task"], row["metric"], str(row["samples"]), *scores, f"{row['difference']:+.4f}", p_value]
            + ["WORSE"] * row["worse"]
        )
    width = max(len(line) for line in table)
    lines = [line + [""] * (width - len(line)) for line in table]
    return "\n".join([format_table(lines), *comparison["notes"], comparison["summary"]])


def _backend(plan: Plan) -> tuple[str, list[str], dict[str, Any]]:
    """Return the harness's model class, options, and arguments of both models: vLLM if it is installed."""
    import torch

    gpus = torch.cuda.device_count()
    shared: dict[str, Any] = {"dtype": "auto", "trust_remote_code": plan.sections.model.trust_remote_code}
    if any(harness_python().parents[1].glob("lib/python*/site-packages/vllm")):
        return "vllm", ["--batch_size", "auto"], shared | {"tensor_parallel_size": max(gpus, 1)}
    options = ["--device", "cuda" if gpus else "cpu", "--batch_size", "auto" if gpus else "8"]
    return "hf", options, shared | ({"parallelize": True} if gpus > 1 else {})


def _trained_model(plan: Plan, folder: RunDir, base: Path, backend: str) -> dict[str, Any]:
    """Return the harness's arguments for the trained model: adapters on their base model, where there are any.

    Raises:
        SetupError: 4-bit adapters that are not merged; the harness cannot quantize with transformers 5.
    """
    final = str(folder.final.resolve())
    if plan.method == "full":
        return {"pretrained": final}
    if plan.method == "qlora":
        if not folder.merged.is_dir():
            raise SetupError(f"RUN: QLoRA adapters are evaluated merged. Run make merge RUN={folder.name} first")
        return {"pretrained": str(folder.merged.resolve())}
    rank = read_json(folder.final / "adapter_config.json").get("r", 16)
    adapters = {"lora_local_path": final, "max_lora_rank": rank} if backend == "vllm" else {"peft": final}
    return {"pretrained": str(base), "tokenizer": final, **adapters}


def _run(selection: Selection, command: list[str], log_file: Path) -> None:
    """Run the harness with its output in a file.

    Raises:
        SetupError: it failed.
    """
    variables = dict(os.environ)
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        variables |= {"HF_DATASETS_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with log_file.open("w", encoding="utf-8") as output:
        done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=variables, check=False)
    if done.returncode == 0:
        return
    last = log_file.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
    if unknown := re.search("Tasks not found: (.*)", last):
        raise SetupError(f"TASKS: the harness has no {unknown[1]}. {_similar_tasks(selection, unknown[1])}")
    raise SetupError(f"eval: the harness exited with code {done.returncode}: {last[:200]}. Read {log_file}")


def _similar_tasks(selection: Selection, unknown: str) -> str:
    command = [str(harness_python()), "-m", "lm_eval", "ls", "tasks"]
    command += ["--include_path", selection.include_path] if selection.include_path else []
    listing = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    names = [*TASK_SETS, *re.findall(r"^\|\s*([^\s|:]+)\s*\|", listing, re.MULTILINE)]
    similar = [name for task in unknown.split(", ") for name in difflib.get_close_matches(task, names)]
    return f"Similar: {', '.join(dict.fromkeys(similar)) or 'none'}. List all: {' '.join(command)}"


def _read(output: Path) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Return the results that the harness wrote to a folder, and the samples of each task.

    Raises:
        SetupError: it wrote none: it only warns where it cannot.
    """
    results = [read_json(path) for path in output.glob("harness_*.json")]
    if len(results) != 1 or not results[0]:
        raise SetupError(f"eval: the harness wrote no results to {output}. Read {output / 'log.txt'}")
    samples = {}
    for path in output.glob("samples_*.jsonl"):
        task = re.sub(r"samples_(.*)_\d{4}-\d{2}-\d{2}T.*", r"\1", path.stem)
        samples[task] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return results[0], samples
