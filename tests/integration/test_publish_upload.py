"""A finished run is published by the real client, to a server that speaks the Hub's HTTP and LFS protocol."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers.cli_errors import check_refused
from helpers.hub_server import FINE_GRAINED, READ, WRITE, HubServer, Repository
from helpers.workplace import Workplace
from huggingface_hub import ModelCard, save_torch_state_dict
from safetensors.torch import load_file

REPOSITORY = "me/my-model"
ALLOWED = {
    "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    "tokenizer_config.json", "plots/grad_norm.svg", "plots/learning_rate.svg", "plots/loss.svg",
}  # fmt: skip
PRIVATE = ("samples.jsonl", "train.jsonl", "log.txt", ".env", "id_rsa", "optimizer.pt")
ARGUMENTS = ("--repo", REPOSITORY, "--license", "mit")


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server
        server.shutdown()


@pytest.fixture
def run(workplace, short_run):
    return copy_run(workplace, short_run)


def copy_run(workplace, run):
    """Copy a run, whose folder of the model gets a card."""
    return shutil.copytree(run, workplace.runs / "short", ignore=shutil.ignore_patterns("checkpoint-*"))


def publish(workplace, hub, *arguments, token=WRITE):
    variables = {"HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HOME": str(workplace.path / "home")}
    return workplace.sft(
        "publish", "short", *arguments, **variables, HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_PROGRESS_BARS="1"
    )


@dataclass
class InterruptedUpload:
    """Of a model in several weight files, of which the server drops the largest."""

    hub: HubServer
    workplace: Workplace
    shards: list[Path]  # the smallest first
    command: Future[subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module", autouse=True)
def interrupted(short_run, tmp_path_factory):
    """The client waits half a minute between its attempts: the other tests of this file run in the meantime."""
    workplace = Workplace(tmp_path_factory.mktemp("interrupted"))
    final = copy_run(workplace, short_run) / "final"
    weights = load_file(final / "model.safetensors")
    (final / "model.safetensors").unlink()
    save_torch_state_dict(weights, final, max_shard_size="200KB")
    shards = sorted(final.glob("model-*.safetensors"), key=lambda path: path.stat().st_size)
    with HubServer(multipart=100_000) as hub:
        hub.dropped = hashlib.sha256(shards[-1].read_bytes()).hexdigest()
        with ThreadPoolExecutor() as pool:
            yield InterruptedUpload(hub, workplace, shards, pool.submit(publish, workplace, hub, *ARGUMENTS))
            hub.dropped = None  # ends the upload if no test has waited for it
        hub.shutdown()


def test_published_files_are_listed_first_and_the_repository_is_private(workplace, run, hub):
    for name in PRIVATE:
        (run / "final" / name).write_text("private")
    shown = publish(workplace, hub, *ARGUMENTS, "--card-only")
    assert shown.returncode == 0, shown.stderr
    assert not hub.repositories
    lines = re.findall(r"^ +([\d,]+)  (\S+)$", shown.stdout, re.M)
    listed = {name: int(size.replace(",", "")) for size, name in lines}
    assert set(listed) == ALLOWED
    done = publish(workplace, hub, *ARGUMENTS)
    assert done.returncode == 0, done.stderr
    assert f"{REPOSITORY} (private, new)" in done.stdout
    repository = hub.repositories[REPOSITORY]
    assert repository.private and repository.commits == ["Upload short"]
    assert set(repository.files) == {*ALLOWED, ".gitattributes"}
    for name in ALLOWED:
        assert (
            repository.files[name] == (run / "final" / name).read_bytes()
            and len(repository.files[name]) == listed[name]
        )
    card = ModelCard(repository.files["README.md"].decode())
    assert card.data.license == "mit" and f'from_pretrained("{REPOSITORY}"' in card.text
    assert str(workplace.path) not in card.content and WRITE not in done.stdout + done.stderr
    check_published_again(workplace, run, hub)


def check_published_again(workplace, run, hub):
    """The same command changes nothing; a new card is one more commit, of a private repository only."""
    sent = dict(hub.sent)
    again = publish(workplace, hub, *ARGUMENTS)
    assert again.returncode == 0 and f"{REPOSITORY} (private, exists)" in again.stdout
    (run / "eval").mkdir(exist_ok=True)
    (run / "eval" / "default.json").write_text('{"rows": [{"task": "toy", "trained": 0.5}]}')
    assert publish(workplace, hub, *ARGUMENTS).returncode == 0
    repository = hub.repositories[REPOSITORY]
    assert len(repository.commits) == 2 and b"| toy | 0.5 |" in repository.files["README.md"] and hub.sent == sent
    line = check_refused(publish(workplace, hub, *ARGUMENTS, "--public"), f"REPO: {REPOSITORY} exists and is private")
    assert "Unset PUBLIC" in line


def test_public_repository_has_to_be_asked_for(workplace, run, hub):
    hub.repositories[REPOSITORY] = Repository(private=False)
    check_refused(publish(workplace, hub, *ARGUMENTS), "exists and is public. Set PUBLIC=1")
    assert publish(workplace, hub, *ARGUMENTS, "--public").returncode == 0
    done = publish(workplace, hub, "--repo", "team/other", "--license", "mit", "--public")
    assert done.returncode == 0 and not hub.repositories["team/other"].private


def test_token_that_cannot_write_is_rejected(workplace, run, hub):
    check_refused(publish(workplace, hub, *ARGUMENTS, token=READ), "HF_TOKEN: found a token that can only read")
    check_refused(
        publish(workplace, hub, *ARGUMENTS, token=FINE_GRAINED), "the Hub refused it: 403 .*and the rights of HF_TOKEN"
    )
    for token in ("", "hf_unknown"):
        check_refused(publish(workplace, hub, *ARGUMENTS, token=token), "HF_TOKEN: not set, or not valid. Set HF_TOKEN")
    assert not hub.repositories


def test_repository_of_others_is_rejected(workplace, run, hub):
    check_refused(
        publish(workplace, hub, "--repo", "stranger/x", "--license", "mit"),
        "REPO: stranger/x: the Hub refused it: 403 .*and the rights of HF_TOKEN",
    )
    other = Repository(
        private=True, files={"README.md": b"another model", "model.safetensors": b"x"}, lfs={"model.safetensors"}
    )
    hub.repositories[REPOSITORY] = other
    line = check_refused(publish(workplace, hub, *ARGUMENTS), "exists with other content")
    assert "README.md, model.safetensors" in line and other.files["README.md"] == b"another model" and not other.commits


def test_card_alone_uses_no_network(workplace, run, hub):
    done = publish(workplace, hub, "--card-only")
    assert done.returncode == 0 and not hub.requests
    card = ModelCard.load(run / "final" / "README.md")
    assert card.data.license is None and "None stated" in card.text
    check_refused(publish(workplace, hub), "REPO: not set, expected a repository on the Hub. Set REPO=owner/name")


def test_interrupted_upload_resumes_when_the_command_is_repeated(interrupted):
    """The server drops the connection in the middle of the last of several weight files, however often it is tried."""
    hub, shards, first = interrupted.hub, interrupted.shards, interrupted.command.result()
    assert first.returncode == 1 and "Traceback" not in first.stderr
    last = first.stderr.splitlines()[-1]
    assert last.startswith(f"error: REPO: {REPOSITORY}: upload interrupted: ") and "Repeat the command" in last
    assert not hub.repositories[REPOSITORY].commits, "nothing incomplete is visible"
    arrived = hashlib.sha256(shards[0].read_bytes()).hexdigest()
    sent = hub.sent[arrived]
    assert sent == shards[0].stat().st_size and hub.sent[hub.dropped] > 0
    hub.dropped = None
    resumed = publish(interrupted.workplace, hub, *ARGUMENTS)
    assert resumed.returncode == 0, resumed.stderr
    files = hub.repositories[REPOSITORY].files
    assert all(files[path.name] == path.read_bytes() for path in shards)
    assert hub.sent[arrived] == sent, "it is not sent again"
