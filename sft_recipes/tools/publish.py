"""Publish a finished run on the Hub: the model's files and its card, private unless asked otherwise."""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_recipes.data import licenses
from sft_recipes.planner import plan as plans
from sft_recipes.runtime.atomic_write import sha256
from sft_recipes.runtime.errors import SetupError
from sft_recipes.runtime.run_dir import RunDir
from sft_recipes.tools import final_model, model_card

log = logging.getLogger(__name__)

# With `licenses.FILES`, all that is uploaded: no data, samples, logs, keys, optimizer states or pickles.
_ALLOWED = (
    "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "adapter_model.safetensors",
    "adapter_config.json", "config.json", "generation_config.json", "processor_config.json",
    "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tokenizer.model.v3",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
    "tiktoken.model", "tekken.json", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates/*.jinja", model_card.CARD, f"{model_card.PLOTS}/*.svg",
)  # fmt: skip
_TOKEN_FIX = "Set HF_TOKEN to a token with write access (https://huggingface.co/settings/tokens)"


@dataclass(frozen=True)
class Publication:
    """What to publish, and where.

    Attributes:
        repository: `owner/name` on the Hub.
        license_id: for a model whose base has no known license.
        merged: publish the merged model instead of the adapters.
        public: create a public repository.
    """

    folder: RunDir
    repository: str
    license_id: str | None = None
    merged: bool = False
    public: bool = False

    @property
    def visibility(self) -> str:
        """The visibility of the repository."""
        return "public" if self.public else "private"


def publish(publication: Publication, dry_run: bool = False) -> None:
    """Write the card, list what is uploaded, and upload it.

    A repeated upload resumes an interrupted one: the Hub keeps the files that it has received.

    Raises:
        SetupError: the run is not finished, its license is unknown, the token cannot write, or the repository has other
            content.
        ConnectionError: the upload was interrupted.
    """
    import httpx2  # of huggingface_hub
    from huggingface_hub import HfApi, errors

    folder, name = publication.folder, publication.repository
    target = final_model.find(folder, publication.merged)
    _check_publication(publication, target)
    model_card.write(folder, target, name, publication.license_id)
    files = list(_allowed_files(target, plans.read(folder.plan).sections.model.trust_remote_code))
    api = HfApi()
    try:
        _check_token(api, name.partition("/")[0])
        exists = _check_repository(api, publication, target)
        _show(f"{api.endpoint}/{name} ({publication.visibility}, {'exists' if exists else 'new'})", target, files)
        if dry_run:
            return
        if not exists:
            api.create_repo(name, private=not publication.public, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name, folder_path=target, allow_patterns=files, commit_message=f"Upload {folder.name}"
        )
    except errors.LocalTokenNotFoundError as error:
        raise SetupError(f"HF_TOKEN: not set, and no token is saved. {_TOKEN_FIX}") from error
    except (httpx2.HTTPError, OSError, RuntimeError, ValueError) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        reason = " ".join(str(cause).split())[:200] or type(cause).__name__
        status = cause.response.status_code if isinstance(cause, errors.HfHubHTTPError) else 0
        if status == 401:
            raise SetupError(f"HF_TOKEN: invalid: {reason}. {_TOKEN_FIX}") from error
        if 400 <= status < 500 or isinstance(cause, ValueError):
            raise SetupError(
                f"REPO: the Hub refused {name}: {reason}. Check the name and the rights of HF_TOKEN"
            ) from error
        raise ConnectionError(
            f"REPO: upload to {name} interrupted: {reason}. Repeat the command: files that arrived are not sent again"
        ) from error
    log.info(f"published   {api.endpoint}/{name} at commit {commit.oid}")


def _check_publication(publication: Publication, target: Path) -> None:
    """Check name and license before the network is used.

    Raises:
        SetupError: the repository name is invalid, the license is unknown or requires another name, or adapters are for
            a base model that is not on the Hub.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    name, base = publication.repository, model_card.base_model(publication.folder)
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise SetupError(f"REPO: {' '.join(str(error).split())} Set REPO=owner/name") from error
    owner, _, model = name.partition("/")
    if not model:
        raise SetupError(f"REPO: found {name!r}, expected an owner too. Set REPO=owner/{name}")
    stated = model_card.license_metadata(base, publication.license_id)
    if not stated:
        whose = f"of the base model {base['name']}" if base.get("name") else "of a model trained from scratch"
        raise SetupError(
            f"LICENSE: not set, and the license {whose} is not known. Set LICENSE=<id>, such as apache-2.0"
        )
    terms = licenses.LLAMA.get(stated["license"])
    if terms and not model.replace("-", " ").startswith(terms.prefix):
        prefix = terms.prefix.replace(" ", "-")
        raise SetupError(
            f"REPO: found {model}, expected a name that begins with {prefix}: the license {stated['license']} requires "
            f"it. Set REPO={owner}/{prefix}-{model}"
        )
    if (target / "adapter_config.json").is_file() and (not base.get("name") or base["local"]):
        run = publication.folder.name
        raise SetupError(
            f"RUN: {run} has adapters whose base model is not on the Hub, so others cannot load them. Run "
            f"`make merge RUN={run}`, and publish with MERGED=1"
        )


def _allowed_files(target: Path, trust_remote_code: bool) -> Iterator[str]:
    """Yield the paths, relative to `target`, of what is uploaded; links are not."""
    patterns = (*_ALLOWED, *(["*.py"] if trust_remote_code else []))
    for path in sorted(target.rglob("*")):
        name = path.relative_to(target).as_posix()
        allowed = any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns) or licenses.FILES.fullmatch(name)
        if allowed and path.is_file() and not path.is_symlink():
            yield name


def _show(repository: str, target: Path, files: list[str]) -> None:
    sizes = [(target / name).stat().st_size for name in files]
    log.info(f"repository  {repository}")
    for name, size in zip(files, sizes, strict=True):
        log.info(f"{size:>18,}  {name}")
    log.info(f"{sum(sizes):>18,}  bytes in {len(files)} files of {target}")


def _check_token(api: Any, owner: str) -> None:
    """Check that the token may write to repositories of an owner.

    Raises:
        SetupError: it may only read, or the owner is another account.
    """
    account = api.whoami()
    token = account.get("auth", {}).get("accessToken") or {}
    scopes = token.get("fineGrained", {}).get("scoped", [])
    granted = {permission for scope in scopes for permission in scope.get("permissions", [])}
    if token.get("role") == "read" or (token.get("role") == "fineGrained" and scopes and "repo.write" not in granted):
        raise SetupError(f"HF_TOKEN: found a token that can only read, expected one that can write. {_TOKEN_FIX}")
    owners = [account["name"], *(organization["name"] for organization in account.get("orgs", []))]
    if owner.lower() not in map(str.lower, owners):
        raise SetupError(f"REPO: found the owner {owner}, expected one of {', '.join(owners)}. Set REPO={owners[0]}/…")


def _check_repository(api: Any, publication: Publication, target: Path) -> bool:
    """Return whether the repository exists, with nothing in it or with this model.

    Raises:
        SetupError: it has other content, or another visibility.
    """
    from huggingface_hub.errors import RepositoryNotFoundError
    from huggingface_hub.hf_api import RepoFile
    from huggingface_hub.utils.sha import git_hash

    name = publication.repository
    try:
        is_private = api.repo_info(name).private
    except RepositoryNotFoundError:
        return False
    files = [file for file in api.list_repo_tree(name, recursive=True) if isinstance(file, RepoFile)]
    equal, other = [], []
    for file in (file for file in files if file.path != ".gitattributes"):
        path = target / file.path
        own = (sha256(path) if file.lfs else git_hash(path.read_bytes())) if path.is_file() else None
        (equal if own == (file.lfs.sha256 if file.lfs else file.blob_id) else other).append(file.path)
    if other and not any(path.endswith(".safetensors") for path in equal):
        raise SetupError(
            f"REPO: {name} exists with other content: found {', '.join(sorted(other)[:3])}, expected this model or an "
            f"empty repository. Set another REPO, or delete its files"
        )
    if is_private == publication.public:
        fix = (
            "Unset PUBLIC, or change it in the settings of the repository"
            if is_private
            else "Set PUBLIC=1, or make it private"
        )
        found = "private" if is_private else "public"
        raise SetupError(f"REPO: {name} exists: found {found}, expected {publication.visibility}. {fix}")
    return True
