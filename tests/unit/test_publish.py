"""The model card says what the run recorded, and nothing is published without a license or beyond the allowed files."""

from __future__ import annotations

import json
import socket

import pytest
from helpers.simulated_runs import Simulated
from huggingface_hub import ModelCard

from sft_recipes.config import loader
from sft_recipes.data import licenses
from sft_recipes.planner import plan as plans
from sft_recipes.planner.plan import Topology
from sft_recipes.runtime.errors import SetupError
from sft_recipes.runtime.run_dir import RunDir, write_json
from sft_recipes.tools import generate, model_card, publish, serve

COMMIT = "0e9e39f249a16976918f6564b8830bc894c89659"
LLAMA = {"hub": "meta-llama/Llama-3.1-8B-Instruct", "commit": COMMIT, "license": "llama3.1"}
QWEN = {"hub": "Qwen/Qwen3-8B", "commit": COMMIT, "license": "apache-2.0"}
SCRATCH = {"from_scratch": True}
READING = {
    "train": {"chats": {"hub": "some/chats:train", "commit": COMMIT, "license": "mit", "rows": 1234}},
    "validation": {"own": {"rows": 56}},
}
NOTICE = (
    "Llama 3.1 is licensed under the Llama 3.1 Community License, Copyright © Meta Platforms, Inc. All Rights Reserved."
)


def finished_run(path, base, recipe="8b", **options):
    """Write a finished run of this base model, with a final model of a few bytes."""
    manifest = {"model": base, "data": {"reading": READING}, "best_step": 900, **options}
    manifest["held_out_metrics"] = {"exact_match": {"before": 0.5, "after": 0.75, "prompts": 40}}
    Simulated(recipe=recipe, manifest=manifest).write(path)
    folder = RunDir(path)
    folder.final.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder.final / name).write_text("{}")
    return folder


def card_of(folder, **options):
    arguments = {"repository": None, "license_id": None, **options}
    return ModelCard.load(model_card.write(folder, folder.final, **arguments))


def test_card_has_base_model_license_data_and_hyperparameters(tmp_path):
    card = card_of(finished_run(tmp_path / "a-run", QWEN), repository="me/my-model")
    data = card.data
    assert (data.base_model, data.base_model_relation, data.license) == (QWEN["hub"], "finetune", "apache-2.0")
    assert data.datasets == ["some/chats"] and data.library_name == "transformers"
    for text in (
        "# my-model", f"https://huggingface.co/{QWEN['hub']}/tree/{COMMIT}", 'from_pretrained("me/my-model"',
        "| train | [some/chats:train](https://huggingface.co/datasets/some/chats) | 0e9e39f2 | mit | 1,234 |",
        "| validation | own (not on the Hub) |  | not stated | 56 |", "| learning_rate | 2e-05 |", "torch 2.13.0",
        "those of step 900", "| exact_match (40 prompts) | 0.5 | | 0.75 |", "| GPU hours | 12.00 |", "Not evaluated on benchmarks",
    ):  # fmt: skip
        assert text in card.text, text
    assert str(tmp_path) not in card.content and "Built with" not in card.text


def test_card_has_held_out_metrics_and_the_evaluation_table(tmp_path):
    folder = finished_run(tmp_path / "a-run", QWEN)
    with folder.metrics.open("a") as lines:
        lines.write(json.dumps({"step": 1000, "eval_rouge": 0.4321}) + "\n")
    (folder.path / "eval").mkdir()
    rows = [{"task": "arc|easy", "base": 0.5, "trained": 0.625}, {"task": "mmlu", "trained": 0.25}]
    write_json(folder.path / "eval" / "default.json", {"rows": rows})
    text = card_of(folder).text
    assert "| eval_rouge | 0.4321 |  | 0.4321 |" in text
    assert (
        "| task | base | trained |" in text and "| arc\\|easy | 0.5 | 0.625 |" in text and "| mmlu |  | 0.25 |" in text
    )
    drawn = sorted(path.name for path in (folder.final / "plots").iterdir())
    assert drawn == ["grad_norm.svg", "learning_rate.svg", "loss.svg"]
    assert all(f"](plots/{name})" in text for name in drawn)


def test_card_states_the_price_of_the_training(tmp_path, monkeypatch):
    monkeypatch.setenv("GPU_HOUR_PRICE", "2.5")
    assert "| cost at 2.5 per GPU hour | 30.00 |" in card_of(finished_run(tmp_path / "a-run", QWEN)).text


def test_card_of_a_model_from_scratch_has_no_license_and_no_base(tmp_path):
    data = card_of(finished_run(tmp_path / "a-run", SCRATCH, recipe="tiny")).data
    assert data.license is None and data.base_model is None


def test_card_of_a_llama_has_attribution_notice_and_the_license_files(tmp_path):
    folder, base = finished_run(tmp_path / "a-run", LLAMA), tmp_path / "base"
    base.mkdir()
    for name in ("config.json", "LICENSE", "USE_POLICY.md", "README.md", "license_key.pem"):
        (base / name).write_text(f"of the base: {name}")
    write_json(folder.prepared, {"model": str(base)})
    card = card_of(folder)
    assert card.data.license == "llama3.1" and "**Built with Llama**" in card.text and NOTICE in card.text
    assert (folder.final / "NOTICE").read_text() == f"{NOTICE}\n"
    assert (folder.final / "LICENSE").read_text() == "of the base: LICENSE"
    assert (folder.final / "USE_POLICY.md").is_file() and not (folder.final / "license_key.pem").exists()


def test_license_is_the_base_models_and_no_other():
    assert model_card.license_metadata(QWEN, None) == {"license": "apache-2.0"}
    assert model_card.license_metadata(QWEN, "apache-2.0") == {"license": "apache-2.0"}
    with pytest.raises(
        SetupError, match="LICENSE: found mit, expected apache-2.0, that of the base model Qwen/Qwen3-8B"
    ):
        model_card.license_metadata(QWEN, "mit")
    own = {**QWEN, "license": "other", "license_name": "qwen", "license_link": "LICENSE"}
    link = f"https://huggingface.co/Qwen/Qwen3-8B/blob/{COMMIT}/LICENSE"
    assert model_card.license_metadata(own, None) == {"license": "other", "license_name": "qwen", "license_link": link}
    assert model_card.license_metadata({**QWEN, "license": "unknown"}, "mit") == {"license": "mit"}
    assert model_card.license_metadata(SCRATCH, None) == {}


def test_unknown_license_id_is_rejected_with_the_nearest():
    with pytest.raises(SetupError, match="LICENSE: found 'apache2'.*did you mean apache-2.0"):
        model_card.license_metadata(SCRATCH, "apache2")


def described(overrides, base, recipe="8b"):
    return licenses.describe_base(plans.resolve(loader.load(recipe, overrides), Topology(0, 1)), base)


def test_base_model_and_license_are_read_from_the_models_card(tmp_path):
    snapshot = tmp_path / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    recipe = ("parallelism=ddp",)
    assert described(recipe, snapshot) == LLAMA, "without a card the recipe's"
    (snapshot / "README.md").write_text("---\nlicense: other\nlicense_name: own\nlanguage: [en]\n---\nText\n")
    assert described(recipe, snapshot) == {**LLAMA, "license": "other", "license_name": "own"}
    (snapshot / "README.md").write_text("---\n: [\n---\n")
    assert described(recipe, snapshot) == LLAMA, "a card that is not YAML"
    assert described((), snapshot, "tiny") == {"from_scratch": True}


def test_local_base_model_is_named_without_its_path(tmp_path):
    base = tmp_path / "secret-project" / "base"
    base.mkdir(parents=True)
    overrides = ("parallelism=ddp", f"model.name_or_path={base}")
    assert described(overrides, base) == {"local": "base"}
    run = tmp_path / "runs" / "llama-1"
    run.mkdir(parents=True)
    write_json(run / "manifest.json", {"model": LLAMA})
    overrides = ("parallelism=ddp", f"model.name_or_path={run / 'final'}")
    assert described(overrides, run / "final") == {**LLAMA, "trained_from": "llama-1"}


@pytest.mark.parametrize(
    ("base", "options", "message"),
    [
        (SCRATCH, {}, "LICENSE: not set, and the license of a model from scratch is not known. Set LICENSE="),
        (QWEN, {"repository": "model"}, "REPO: found 'model', expected an owner too. Set REPO=owner/model"),
        (QWEN, {"repository": "me/a b"}, "REPO: me/a b: the Hub refused it: Repo id must use alphanumeric chars"),
        (QWEN, {"repository": "me/a/b"}, "REPO: me/a/b: the Hub refused it: Repo id must be in the form"),
        (LLAMA, {}, "REPO: found my-model: the license llama3.1 requires .* Set REPO=me/Llama-my-model"),
    ],
)  # fmt: skip
def test_invalid_name_or_license_is_rejected_before_the_network_is_used(tmp_path, base, options, message):
    folder = finished_run(tmp_path / "a-run", base)
    with pytest.raises(SetupError, match=message):
        publish.publish(folder, options.get("repository", "me/my-model"), None, merged=False, public=False)


def test_adapters_of_a_base_that_is_not_on_the_hub_are_rejected(tmp_path):
    folder = finished_run(tmp_path / "a-run", LLAMA, recipe="8b-lora")
    for base, is_accepted in (("runs/other-1/final", False), (LLAMA["hub"], True)):
        write_json(folder.final / "adapter_config.json", {"base_model_name_or_path": base})
        if is_accepted:
            publish._check_name_and_license(folder, "me/Llama-x", None, folder.final)
            continue
        with pytest.raises(SetupError, match="adapters without their base: .* Run `make merge RUN=a-run`.* MERGED=1"):
            publish.publish(folder, "me/Llama-x", None, merged=False, public=False)


def test_only_allowed_files_are_uploaded(tmp_path):
    allowed = {
        "model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.json", "README.md",
        "LICENSE", "LICENSE.txt", "USE_POLICY.md", "NOTICE", "plots/loss.svg", "adapter_config.json", "tokenizer.model",
    }  # fmt: skip
    forbidden = {
        "complete.json", "samples.jsonl", "train.jsonl", "data/train.parquet", "log.txt", ".env", "token", "id_rsa",
        "key.pem", "optimizer.pt", "training_args.bin", "pytorch_model.bin", "trainer_state.json", "plots/rows.csv",
        "tokenizer_rows.jsonl", "backup/model.safetensors", "modeling_own.py", "LICENSE.key/secret", ".git/config",
    }  # fmt: skip
    for name in allowed | forbidden:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert set(publish._list_files(tmp_path, trust_remote_code=False)) == allowed
    assert set(publish._list_files(tmp_path, trust_remote_code=True)) == {*allowed, "modeling_own.py"}


@pytest.mark.parametrize("state", ["running", "stopped", "failed", "diverged"])
def test_unfinished_run_has_no_model_to_publish_or_serve(tmp_path, state):
    folder = finished_run(tmp_path / "a-run", QWEN, state=state)
    for find in (generate.find_model, lambda run: serve.configure(run, 0)):
        with pytest.raises(SetupError, match=f"RUN: .*a-run is {state}, expected a finished run"):
            find(folder)


def test_merged_model_is_of_adapters_only(tmp_path):
    with pytest.raises(SetupError, match="MERGED: a-run has no adapters"):
        generate.find_model(finished_run(tmp_path / "a-run", QWEN), merged=True)


def test_serving_needs_merged_adapters_and_their_base(tmp_path):
    folder = finished_run(tmp_path / "a-run", LLAMA, recipe="8b-lora")
    write_json(folder.final / "adapter_config.json", {})
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    write_json(folder.prepared, {"model": str(base)})
    with pytest.raises(SetupError, match="RUN: found no .*merged. Run `make merge RUN=a-run`"):
        serve.configure(folder, 0)


def test_port_in_use_is_rejected(tmp_path):
    folder = finished_run(tmp_path / "a-run", QWEN)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(SetupError, match=f"PORT: {port}: .*Address already in use. Set PORT to a free port"):
            serve.configure(folder, port)
