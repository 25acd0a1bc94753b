"""Models and datasets are downloaded from the Hub once, by name and commit; later runs use no network.

The Hub is a local server with its protocol; the client is the real one.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
from helpers.workplace import FEW_STEPS
from huggingface_hub import ModelCard

from sft_recipes.config import loader
from sft_recipes.data import prepare
from sft_recipes.data.toy import toy_dataset
from sft_recipes.planner import plan as plans
from sft_recipes.runtime.errors import UserError

MODEL_CARD = "---\nlicense: apache-2.0\n---\nA small model\n"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CPU = ("--gpus", "0", "parallelism=ddp", "precision=fp32")
MODEL = ("model.from_scratch=false", "model.name_or_path=some/model", f"model.revision={COMMIT}")
DATA = ("data.train=some/rows:train_sft", "data.validation=some/rows:test_sft", f"data.revision={COMMIT}")
README = """---
license: mit
configs:
- config_name: default
  data_files:
  - {split: train_sft, path: data/train_sft-*}
  - {split: test_sft, path: data/test_sft-*}
---
"""


class Hub(ThreadingHTTPServer):
    """Serves the folders in `root` (`models/OWNER/NAME`, `datasets/OWNER/NAME`) like the Hub, all at one commit."""

    def __init__(self, root: Path, gated: bool = False):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root, self.gated, self.requests = root, gated, []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.server.requests.append(self.path)
        parts = unquote(urlparse(self.path).path).strip("/").split("/")
        if parts[0] == "api":
            self._api(parts[1:])
        else:
            kind = parts.pop(0) if parts[0] == "datasets" else "models"
            self._file(kind, "/".join(parts[:2]), parts[3], "/".join(parts[4:]))

    def _api(self, parts):
        folder = self.server.root / parts[0] / "/".join(parts[1:3])
        if not folder.is_dir():
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif parts[3:4] == ["revision"]:
            self._answer(200, json.dumps({"id": "/".join(parts[1:3]), "sha": COMMIT}).encode())
        elif parts[4] not in (COMMIT, "main"):
            self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        else:
            files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            entries = [
                {"type": "file", "path": str(path.relative_to(folder)), "size": path.stat().st_size, "oid": _oid(path)}
                for path in files
            ]
            self._answer(200, json.dumps(entries).encode())

    def _file(self, kind, name, revision, path):
        if self.server.gated and "Authorization" not in self.headers:
            self._answer(401, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to it is restricted."})
            return
        file = self.server.root / kind / name / path
        headers = {"ETag": f'"{_oid(file)}"', "X-Repo-Commit": COMMIT}
        self._answer(200, file.read_bytes(), headers)

    def _answer(self, code, content, headers=None):
        self.send_response(code)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


def _oid(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@pytest.fixture
def served(tmp_path, model_folder):
    """A root folder with a model and a dataset of two splits."""
    shutil.copytree(model_folder, tmp_path / "hub" / "models" / "some" / "model")
    model = tmp_path / "hub" / "models" / "some" / "model"
    for name, text in (("pytorch_model.bin", "a pickle"), ("README.md", MODEL_CARD), ("LICENSE", "The license")):
        (model / name).write_text(text)
    data = tmp_path / "hub" / "datasets" / "some" / "rows"
    (data / "data").mkdir(parents=True)
    (data / "README.md").write_text(README)
    for split, rows in (("train_sft", toy_dataset.rows(200, False)), ("test_sft", toy_dataset.rows(40, True))):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (data / "data" / f"{split}-00000-of-00001.jsonl").write_text(text)
    return tmp_path / "hub"


def test_downloaded_recipe_trains_offline(workplace, served):
    hub = Hub(served)
    home = str(workplace.path / "cache")
    downloaded = workplace.sft("download", "tiny", *MODEL, *DATA, HF_ENDPOINT=hub.url, HF_HOME=home)
    assert downloaded.returncode == 0, downloaded.stderr
    assert "some/model: " in downloaded.stdout and "some/rows: " in downloaded.stdout
    assert not any("pytorch_model.bin" in path for path in hub.requests), "pickles are not downloaded"
    assert any(COMMIT in path for path in hub.requests), "the revision is requested"
    hub.shutdown()
    hub.server_close()
    snapshots = sorted(path.name for path in Path(home, "hub").glob("*/snapshots/*"))
    assert snapshots == [COMMIT, COMMIT]
    run = workplace.trained("tiny", *FEW_STEPS, *CPU, *MODEL, *DATA, "lora.r=2", HF_HUB_OFFLINE="1", HF_HOME=home)
    adapters = json.loads((run / "final" / "adapter_config.json").read_text())
    assert (adapters["base_model_name_or_path"], adapters["revision"]) == ("some/model", COMMIT), "not a local path"
    check_license(workplace, run, home)
    check_offline_use(workplace, run, home)


def check_license(workplace, run, home):
    """The card of the run has what the downloaded model and dataset state of their licenses."""
    model = json.loads((run / "manifest.json").read_text())["model"]
    assert model == {"hub": "some/model", "commit": COMMIT, "license": "apache-2.0"}
    done = workplace.sft("publish", run.name, "--card-only", HF_HUB_OFFLINE="1", HF_HOME=home)
    assert done.returncode == 0, done.stderr
    card = ModelCard.load(run / "final" / "README.md")
    assert (card.data.base_model, card.data.base_model_relation, card.data.license) == (
        "some/model",
        "adapter",
        "apache-2.0",
    )
    assert card.data.datasets == ["some/rows"] and f"| {COMMIT[:8]} | mit | 200 |" in card.text
    assert (run / "final" / "LICENSE").read_text() == "The license"


# With this package, and with peft and transformers alone, on a machine whose cache is in another folder; then without the
# commit.
ELSEWHERE = """
import pathlib, sys, torch
from huggingface_hub import constants
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM
from sft_recipes.runtime.run_dir import RunDir
from sft_recipes.runtime.errors import UserError
from sft_recipes.tools import generate, merge_adapters
run, commit, prompt = RunDir(pathlib.Path(sys.argv[1])), sys.argv[2], sys.argv[3]
merge_adapters.merge(run)
generate.main(run, [prompt])
ids = torch.arange(20)[None]
adapted = AutoPeftModelForCausalLM.from_pretrained(run.final)
assert torch.equal(adapted(ids).logits, AutoModelForCausalLM.from_pretrained(run.final, revision=commit)(ids).logits)
constants.HF_HUB_CACHE = "/nowhere"
try:
    generate.main(run, [prompt])
except UserError as error:
    print(error, file=sys.stderr)
"""


def check_offline_use(workplace, run, home):
    """Adapters load from a cache that has the commit and no `refs/main`, by this package and by peft alone."""
    assert not list(Path(home).glob("hub/models--*/refs/*"))
    saved = {path.parent.name: json.loads(path.read_text()) for path in run.glob("*/adapter_config.json")}
    assert {"final", "last", "best-8", "checkpoint-8"} <= saved.keys()
    assert {config["revision"] for config in saved.values()} == {COMMIT}
    prompt = "How much is 1 and 1?"
    moved = Path(home).rename(workplace.path / "moved")
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(run), COMMIT, prompt], capture_output=True, text=True, check=False,
        env=workplace.environment(HF_HUB_OFFLINE="1", HF_HOME=str(moved)),
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout, done.stderr
    assert (run / "merged" / "model.safetensors").is_file()
    error = done.stderr.splitlines()[-1]
    assert error.startswith(f"model.name_or_path: some/model at {COMMIT} is not in the Hub's cache")


def test_download_includes_retention_eval(workplace, served):
    shutil.copytree(served / "datasets" / "some" / "rows", served / "datasets" / "some" / "known")
    hub = Hub(served)
    overrides = (*DATA, "data.retention_eval=some/known:test_sft")
    downloaded = workplace.sft(
        "download", "tiny", *overrides, HF_ENDPOINT=hub.url, HF_HOME=str(workplace.path / "cache")
    )
    assert downloaded.returncode == 0, downloaded.stderr
    assert "some/rows: " in downloaded.stdout and "some/known: " in downloaded.stdout
    missing = workplace.sft("download", "tiny", *DATA, "data.retention_eval=some/gone", HF_ENDPOINT=hub.url)
    assert missing.returncode == 2 and "error: data.retention_eval: " in missing.stderr


def test_train_offline_without_download_is_rejected(workplace):
    done = workplace.sft("train", "tiny", *CPU, *MODEL, HF_HUB_OFFLINE="1", HF_HOME=str(workplace.path / "empty"))
    assert done.returncode == 2
    assert "some/model at " in done.stderr and "not in the Hub's cache and not downloadable" in done.stderr
    assert "make download" in done.stderr and "HF_TOKEN" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stdout
    assert workplace.names() == []


@pytest.mark.parametrize("command", [("download", "8b"), ("train", "8b", "--gpus", "0")], ids=["download", "train"])
def test_gated_model_error_names_token_and_alternative(workplace, served, command):
    shutil.copytree(served / "models" / "some" / "model", served / "models" / "meta-llama" / "Llama-3.1-8B-Instruct")
    hub = Hub(served, gated=True)
    small = "model.architecture={}"  # its forecast does not fit a small machine's CPU
    arguments = (*command, f"model.revision={COMMIT}", "precision=fp32", small)
    done = workplace.sft(*arguments, HF_ENDPOINT=hub.url, HF_HOME=str(workplace.path / "cache"), HF_TOKEN="")
    hub.shutdown()
    hub.server_close()
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "meta-llama/Llama-3.1-8B-Instruct is gated" in line and "Accept its license on" in line
    assert "HF_TOKEN" in line and "MODEL=Qwen/Qwen3-8B" in line
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.name_or_path=some/other",), "some/other is no public model on the Hub"),
        (("model.revision=" + "f" * 40,), "some/model has no revision ffff"),
        (("data.train=some/other:train",), "some/other is no public dataset on the Hub"),
    ],
)
def test_download_reports_missing_repository(workplace, served, overrides, message):
    hub = Hub(served)
    done = workplace.sft(
        "download", "tiny", *MODEL, *DATA, *overrides, HF_ENDPOINT=hub.url, HF_HOME=str(workplace.path / "cache")
    )
    hub.shutdown()
    hub.server_close()
    (line,) = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    assert done.returncode == 2 and line.startswith("error: ") and message in line


def test_prepare_rejects_architecture_of_another_model(model_folder, few_rows, tmp_path):
    """The recipe's architecture, on which the forecast depends, must equal the model's configuration."""
    stated = "{model_type: llama, hidden_size: 64, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 1, vocab_size: 320, tie_word_embeddings: true}"
    settings = ("precision=fp32", "parallelism=ddp", "model.revision=", f"model.name_or_path={model_folder}")
    recipe = loader.load("8b", (*settings, f"model.architecture={stated}", f"data.train={few_rows}"))
    with pytest.raises(UserError, match="model.architecture: found hidden_size 64, expected 32"):
        prepare.prepare(plans.resolve(recipe, plans.Topology(gpus=0, processes=1)), tmp_path / "store")


def test_check_architecture_compares_with_the_configuration(tmp_path):
    from helpers.workplace import SMALL_LLAMA
    from transformers import AutoConfig

    from sft_recipes.data.model_files import check_architecture

    AutoConfig.for_model(**SMALL_LLAMA).save_pretrained(tmp_path)
    check_architecture(SMALL_LLAMA, tmp_path)
    with pytest.raises(UserError, match="attention_bias True, expected False"):
        check_architecture({**SMALL_LLAMA, "attention_bias": True}, tmp_path)


def test_inspect_downloads_no_weights(workplace, served):
    hub = Hub(served)
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(workplace.path / "cache")}
    shown = workplace.sft("inspect", "tiny", *MODEL, *DATA, "batch.min_optimizer_steps=1", "--rows", "1", **settings)
    assert shown.returncode == 0, shown.stderr
    assert "⟦" in shown.stdout and "-- some/rows:train_sft, row " in shown.stdout
    assert any("tokenizer.json" in path for path in hub.requests)
    assert not any(path.startswith("/some/model") and path.endswith(".safetensors") for path in hub.requests)
