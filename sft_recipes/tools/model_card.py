"""Write the model card of a finished run from its manifest, plan and metrics: `README.md` and its plots."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sft_recipes.data import licenses
from sft_recipes.monitor import metrics_log, plots
from sft_recipes.monitor.metrics_log import Run
from sft_recipes.runtime.atomic_write import write_atomic
from sft_recipes.runtime.env import gpu_hour_price
from sft_recipes.runtime.errors import SetupError
from sft_recipes.runtime.run_dir import RunDir, read_json
from sft_recipes.runtime.text import escape_unprintable
from sft_recipes.runtime.units import GIB, format_duration

CARD, PLOTS, NOTICE = "README.md", "plots", "NOTICE"
_HYPERPARAMETERS = (
    "method", "parallelism", "precision", "world_size", "learning_rate", "lr_scheduler_type", "warmup_ratio",
    "warmup_steps", "num_train_epochs", "optimizer_steps", "effective_batch_size", "per_device_train_batch_size",
    "gradient_accumulation_steps", "max_length", "packing", "weight_decay", "max_grad_norm",
)  # fmt: skip
_PLOTS = {
    "loss": ("Loss", "nats per token", {"training": "loss", "validation": "eval_loss"}),
    "learning_rate": ("Learning rate", "learning rate", {"learning rate": "learning_rate"}),
    "grad_norm": ("Gradient norm", "norm", {"gradient norm": "grad_norm"}),
}
_NOT_QUALITY = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_num_tokens", "eval_entropy")


def write(folder: RunDir, target: Path, repository: str | None, license_id: str | None) -> Path:
    """Write the card of a finished run to `target`, the folder of its model, with plots and license files.

    Args:
        repository: name on the Hub, if it is known.
        license_id: of a model whose base has no known license; None for no license.

    Raises:
        SetupError: another license than the base model's.
    """
    from huggingface_hub import ModelCard, ModelCardData

    run, base = metrics_log.read(folder), base_model(folder)
    terms = licenses.LLAMA.get(base.get("license", ""))
    stated = license_metadata(base, license_id)
    shutil.rmtree(target / PLOTS, ignore_errors=True)
    (target / PLOTS).mkdir()
    drawn = {}
    for name, (title, unit, curves) in _PLOTS.items():
        if svg := plots.svg(run, unit, curves, {}):
            write_atomic(target / PLOTS / f"{name}.svg", svg)
            drawn[title] = f"{PLOTS}/{name}.svg"
    _copy_license_files(Path(read_json(folder.prepared).get("model", "")), target)
    if terms:
        write_atomic(target / NOTICE, f"{terms.notice}\n")
    adapters, on_hub = (target / "adapter_config.json").is_file(), base.get("name") and not base["local"]
    sources = list(_data_sources(run.manifest))
    data = ModelCardData(
        **stated,
        base_model=base["name"] if on_hub else None,
        base_model_relation=("adapter" if adapters else "finetune") if on_hub else None,
        datasets=sorted({source["hub"].partition(":")[0] for source in sources if source["hub"]}) or None,
        library_name="peft" if adapters else "transformers",
        pipeline_tag="text-generation",
        tags=["sft", "trl", "sft-recipes", *([run.plan.method] if run.plan.method != "full" else [])],
    )
    card = ModelCard.from_template(
        data,
        str(Path(__file__).with_name("model_card.md.j2")),
        name=repository.rpartition("/")[2] if repository else folder.name,
        repository=repository or "OWNER/NAME",
        run=run,
        plan=run.plan,
        manifest=run.manifest,
        base=base,
        stated=stated,
        terms=terms,
        adapters=adapters,
        sources=sources,
        hyperparameters=list(_hyperparameters(run)),
        metrics=list(_metrics(run)),
        evaluation=read_evaluation(folder),
        plots=drawn,
        cost=_cost(run),
        cell=_cell,
    )
    write_atomic(target / CARD, f"{card}".rstrip() + "\n")
    return target / CARD


def base_model(folder: RunDir) -> dict[str, Any]:
    """Return the base model and its license as the run recorded them (`licenses.describe_base`)."""
    return read_json(folder.manifest).get("model") or {}


def license_metadata(base: dict[str, Any], license_id: str | None) -> dict[str, str]:
    """Return the license fields of the card: the base model's, or `license_id` for a base without one.

    Raises:
        SetupError: `license_id` is not known to the Hub, or is not the base model's.
    """
    known = {key: base[key] for key in ("license", "license_name", "license_link") if key in base}
    if known.get("license", "unknown") == "unknown":
        known = {}
    elif known["license"] not in (*licenses.HUB_IDS, "other"):
        known = {"license_name": known["license"], **known, "license": "other"}
    if license_id and license_id not in licenses.HUB_IDS:
        from sft_recipes.config.schema import did_you_mean

        hint = did_you_mean(license_id, licenses.HUB_IDS)
        page = "https://huggingface.co/docs/hub/repositories-licenses"
        raise SetupError(f"LICENSE: found {license_id!r}, expected an identifier of {page}, such as apache-2.0{hint}")
    if license_id and known and known["license"] != license_id:
        raise SetupError(
            f"LICENSE: found {license_id}, expected {known['license']}, the license of the base model {base['name']}. "
            f"Remove LICENSE"
        )
    link = known.get("license_link", "")
    if link and "://" not in link and base["name"] and not base["local"]:  # a file of the base model's repository
        known["license_link"] = f"https://huggingface.co/{base['name']}/blob/{base['commit'] or 'main'}/{link}"
    return known or ({"license": license_id} if license_id else {})


def read_evaluation(folder: RunDir) -> list[dict[str, Any]]:
    """Return the rows of the evaluation table: the objects in `rows` of each `eval/*.json`, their keys the columns."""
    files = sorted((folder.path / "eval").glob("*.json"))
    return [row for file in files for row in read_json(file).get("rows", []) if isinstance(row, dict)]


def _copy_license_files(base: Path, target: Path) -> None:
    """Copy the base model's license, notice and use policy, which most licenses require of copies."""
    for file in base.iterdir() if (base / "config.json").is_file() else ():
        if licenses.FILES.fullmatch(file.name) and file.is_file():
            shutil.copyfile(file, target / file.name)


def _data_sources(manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield part, name, Hub name, commit, license and rows of each source; of local files only the name."""
    for part, readings in ((manifest.get("data") or {}).get("reading") or {}).items():
        for name, reading in readings.items():
            hub = {key: reading.get(key) for key in ("hub", "commit", "license")}
            yield {"part": part.replace("_", " "), "name": name, "rows": reading["rows"], **hub}


def _hyperparameters(run: Run) -> Iterator[tuple[str, Any]]:
    yield from ((key, getattr(run.plan, key)) for key in _HYPERPARAMETERS)
    trainer = run.plan.sections.trainer
    yield "optimizer", trainer.get("optim", "adamw_torch_fused")
    yield from ((key, trainer[key]) for key in sorted(trainer) if key.startswith(("adam_", "neftune", "seed")))
    if run.plan.sections.lora:
        yield from ((f"lora.{key}", value) for key, value in vars(run.plan.sections.lora).items())


def _metrics(run: Run) -> Iterator[tuple[str, str, str, str]]:
    """Yield name, first, best and last value of the held-out metrics: every `eval_…` of `metrics.jsonl`."""
    keys = sorted({key for line in run.lines for key in line if key.startswith("eval_")} - {*_NOT_QUALITY})
    for key in keys:
        values = [value for _, value in run.points(key)]
        if values:
            best = f"{min(values):.4g}" if key.endswith("loss") else ""
            yield key, f"{values[0]:.4g}", best, f"{values[-1]:.4g}"
    if (after := run.manifest.get("exact_match_after")) is not None:
        before = run.manifest.get("exact_match_before")
        yield "exact_match", "" if before is None else f"{before:.4g}", "", f"{after:.4g}"


def _cost(run: Run) -> list[tuple[str, str]]:
    manifest, gpus, price = run.manifest, run.plan.gpus, gpu_hour_price()
    seconds = manifest.get("training_seconds", 0.0)
    hardware = f"{gpus} x {run.plan.gpu_type}" if gpus else f"CPU, {run.plan.world_size} process(es)"
    cost = [("hardware", hardware), ("training time", format_duration(seconds))]
    cost += [("tokens", f"{manifest.get('tokens_seen', 0):,}")]
    cost += [("tokens in the loss", f"{manifest.get('supervised_tokens_seen', 0):,}")]
    if gpus:
        cost.append(("GPU hours", f"{gpus * seconds / 3600:.2f}"))
    if gpus and price is not None:
        cost.append((f"cost at {price:g} per GPU hour", f"{gpus * seconds / 3600 * price:.2f}"))
    if peak := manifest.get("peak_memory_bytes"):
        cost.append(("peak memory per GPU", f"{peak / GIB:.1f} GiB"))
    return cost


def _cell(value: Any) -> str:
    """Return a value for a cell of a Markdown table."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return escape_unprintable(" ".join(text.split())).replace("|", "\\|").replace("<", "&lt;")
