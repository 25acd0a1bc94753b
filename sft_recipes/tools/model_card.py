"""Write the model card of a finished run from its manifest, plan and metrics: `README.md` and its plots."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sft_recipes.config.schema import did_you_mean
from sft_recipes.data import licenses
from sft_recipes.monitor import metrics_log, plots
from sft_recipes.runtime import env, units
from sft_recipes.runtime.atomic_write import write_atomic
from sft_recipes.runtime.errors import SetupError
from sft_recipes.runtime.run_dir import RunDir, read_json
from sft_recipes.runtime.text import escape_unprintable

# Held-out metrics are every other `eval_…` of `metrics.jsonl`.
_NOT_QUALITY = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_num_tokens", "eval_entropy"}


def write(folder: RunDir, target: Path, repository: str | None, license_id: str | None) -> Path:
    """Write the card of a finished run to `target`, the folder of its model, with plots and license files.

    Args:
        repository: name on the Hub, if it is known.
        license_id: of a model whose base has no known license; None for no license.

    Raises:
        SetupError: as `license_metadata`.
    """
    from huggingface_hub import ModelCard, ModelCardData

    run, base = metrics_log.read(folder), read_json(folder.manifest).get("model", {})
    stated, terms = license_metadata(base, license_id), licenses.LLAMA.get(base.get("license", ""))
    shutil.rmtree(target / "plots", ignore_errors=True)
    base_folder = Path(read_json(folder.prepared).get("model", ""))
    for file in base_folder.iterdir() if (base_folder / "config.json").is_file() else ():
        if licenses.FILES.fullmatch(file.name):
            shutil.copyfile(file, target / file.name)
    if terms:
        write_atomic(target / "NOTICE", f"{terms['notice']}\n")

    def draw(name: str, unit: str, curves: Mapping[str, str]) -> str:
        """Write a plot; return its path in the card, empty if the run has none of its metrics."""
        svg = plots.svg(run, unit, curves, {})
        if svg:
            (target / "plots").mkdir(exist_ok=True)
            write_atomic(target / "plots" / f"{name}.svg", svg)
        return svg and f"plots/{name}.svg"

    reading, adapters = run.manifest["data"]["reading"] or {}, (target / "adapter_config.json").is_file()
    sources = [(part, name, source) for part, named in reading.items() for name, source in named.items()]
    datasets = sorted({source["hub"].partition(":")[0] for *_, source in sources if "hub" in source}) or None
    relation = "adapter" if adapters else "finetune"
    stated |= {"base_model": base["hub"], "base_model_relation": relation} if "hub" in base else {}
    tags = ["sft", "trl", "sft-recipes", *({run.plan.method} - {"full"})]
    library = {"library_name": "peft" if adapters else "transformers", "pipeline_tag": "text-generation"}
    metadata = ModelCardData(**stated, **library, datasets=datasets, tags=tags)
    recorded = {"run": run, "base": base, "stated": stated, "terms": terms, "adapters": adapters, "sources": sources}
    evaluation = [row for file in sorted(folder.evaluation.glob("*.json")) for row in read_json(file).get("rows", [])]
    shown = {"repository": repository or f"OWNER/{folder.name}", "evaluation": evaluation}
    shown["metrics"] = sorted({key for line in run.lines for key in line if key.startswith("eval_")} - _NOT_QUALITY)
    helpers = {"draw": draw, "cell": _cell, "units": units, "price": env.gpu_hour_price()}
    template = str(Path(__file__).with_name("model_card.md.j2"))
    card = ModelCard.from_template(metadata, template, **recorded, **shown, **helpers)
    write_atomic(target / "README.md", f"{card}".rstrip() + "\n")
    return target / "README.md"


def license_metadata(base: dict[str, Any], license_id: str | None) -> dict[str, str]:
    """Return the license fields of the card: the base model's, or `license_id` for a base without one.

    Raises:
        SetupError: `license_id` is not known to the Hub, or is not the base model's.
    """
    stated = {key: base[key] for key in ("license", "license_name", "license_link") if key in base}
    own = stated.get("license", "unknown")
    if license_id and license_id not in licenses.HUB_IDS:
        page = f"https://huggingface.co/docs/hub/repositories-licenses{did_you_mean(license_id, licenses.HUB_IDS)}"
        raise SetupError(f"LICENSE: found {license_id!r}, expected an identifier such as apache-2.0: {page}")
    if own == "unknown":
        return {"license": license_id} if license_id else {}
    if license_id not in (None, own):
        name = base.get("hub") or base.get("local")
        raise SetupError(f"LICENSE: found {license_id}, expected {own}, that of the base model {name}. Unset LICENSE")
    if own not in licenses.HUB_IDS:
        stated |= {"license": "other", "license_name": stated.get("license_name", own)}
    if "hub" in base and "://" not in (link := stated.get("license_link", "://")):  # a file next to the base's card
        stated["license_link"] = f"https://huggingface.co/{base['hub']}/blob/{base['commit'] or 'main'}/{link}"
    return stated


def _cell(value: Any) -> str:
    """Return a value for a cell of a Markdown table."""
    text = value if isinstance(value, str) else f"{value:.4g}" if isinstance(value, float) else json.dumps(value)
    return escape_unprintable(" ".join(text.split())).replace("|", "\\|").replace("<", "&lt;")
