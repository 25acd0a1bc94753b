"""Publish a finished run on the Hub: the model's files and its card, private unless asked otherwise."""

import fnmatch
import logging
from pathlib import Path
from typing import Any

from sft_recipes.data import licenses
from sft_recipes.planner import plan as plans
from sft_recipes.runtime.atomic_write import sha256
from sft_recipes.runtime.errors import SetupError
from sft_recipes.runtime.run_dir import RunDir, read_json
from sft_recipes.tools import generate, model_card

log = logging.getLogger(__name__)

# With `licenses.FILES`, all that is uploaded: no data, samples, logs, keys, optimizer states or pickles.
_ALLOWED = Path(__file__).with_name("published_files.txt").read_text(encoding="utf-8").split()
_TOKEN_FIX = "Set HF_TOKEN to a token with write access (https://huggingface.co/settings/tokens)"


def publish(folder: RunDir, repository: str, license_id: str | None, merged: bool, public: bool) -> None:
    """Write the card, list what is uploaded, and upload it.

    A repeated upload resumes an interrupted one: the Hub keeps the files that it has received.

    Args:
        repository: `owner/name` on the Hub.
        license_id: for a model whose base has no known license.
        merged: publish the merged model instead of the adapters.

    Raises:
        SetupError: the run is not finished, its license is unknown, the token cannot write, or the repository has other
            content.
        ConnectionError: the upload was interrupted.
    """
    import httpx2  # of huggingface_hub
    from huggingface_hub import HfApi

    target, api = generate.find_model(folder, merged), HfApi()
    _check_name_and_license(folder, repository, license_id, target)
    files = write_card(folder, target, repository, license_id)
    try:
        exists = _check_repository(api, repository, public, target)
        if api.whoami().get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise SetupError(f"HF_TOKEN: found a token that can only read. {_TOKEN_FIX}")
        visibility = "public" if public else "private"
        log.info(f"repository  {api.endpoint}/{repository} ({visibility}, {'exists' if exists else 'new'})")
        if not exists:
            api.create_repo(repository, private=not public, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository, folder_path=target, allow_patterns=files, commit_message=f"Upload {folder.name}"
        )
    except (httpx2.HTTPError, OSError, RuntimeError, ValueError) as error:
        raise _explain(error, repository) from error
    log.info(f"published   {api.endpoint}/{repository} at commit {commit.oid}")


def write_card(folder: RunDir, target: Path, repository: str | None, license_id: str | None) -> list[str]:
    """Write the model card, and return the files to upload, which it lists with their sizes.

    Raises:
        SetupError: as `model_card.write`.
    """
    log.info(f"model card  {model_card.write(folder, target, repository, license_id)}")
    files = _list_files(target, plans.read(folder.plan).sections.model.trust_remote_code)
    sizes = [(target / file).stat().st_size for file in files]
    for file, size in zip(files, sizes, strict=True):
        log.info(f"{size:>18,}  {file}")
    log.info(f"{sum(sizes):>18,}  bytes in {len(files)} files")
    return files


def _explain(error: Exception, name: str) -> Exception:
    """Return the error to report for one of huggingface_hub."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    cause = error.__cause__ if type(error) is RuntimeError and error.__cause__ else error  # of one file
    reason = " ".join(str(cause).split())[:200].rstrip(".") or type(cause).__name__
    status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else 500
    if status == 401 or isinstance(cause, LocalTokenNotFoundError):
        return SetupError(f"HF_TOKEN: not set, or not valid. {_TOKEN_FIX}")
    if status < 500 or isinstance(cause, ValueError):
        return SetupError(f"REPO: {name}: the Hub refused it: {reason}. Check the name, and the rights of HF_TOKEN")
    again = "Repeat the command: files that the Hub has received are not sent again"
    return ConnectionError(f"REPO: {name}: upload interrupted: {reason}. {again}")


def _check_name_and_license(folder: RunDir, repository: str, license_id: str | None, target: Path) -> None:
    """Check what needs no network.

    Raises:
        SetupError: the repository has no owner, the license is unknown or requires another name, or adapters are for a
            base model that is not on the Hub.
    """
    base, run = read_json(folder.manifest).get("model", {}), folder.name
    owner, _, name = repository.rpartition("/")
    if not owner:
        raise SetupError(f"REPO: found {name!r}, expected an owner too. Set REPO=owner/{name}")
    stated = model_card.license_metadata(base, license_id)
    if not stated:
        whose = base.get("hub") or base.get("local") or "a model from scratch"
        raise SetupError(f"LICENSE: not set, and the license of {whose} is not known. Set LICENSE=<id>, as apache-2.0")
    prefix = licenses.LLAMA.get(stated["license"], {}).get("prefix", "").replace(" ", "-")
    if not name.startswith(prefix):
        requires = f"the license {stated['license']} requires a name that begins with {prefix}"
        raise SetupError(f"REPO: found {name}: {requires}. Set REPO={owner}/{prefix}-{name}")
    if read_json(target / "adapter_config.json").get("base_model_name_or_path", base.get("hub")) != base.get("hub"):
        fix = f"Run `make merge RUN={run}`, and publish with MERGED=1"
        raise SetupError(f"RUN: {run} has adapters without their base: it is not on the Hub. {fix}")


def _list_files(target: Path, trust_remote_code: bool) -> list[str]:
    """Return the paths, relative to `target`, of the files to upload."""
    patterns = [*_ALLOWED, *(["*.py"] if trust_remote_code else [])]
    names = [path.relative_to(target).as_posix() for path in sorted(target.rglob("*")) if path.is_file()]
    return [n for n in names if licenses.FILES.fullmatch(n) or any(fnmatch.fnmatchcase(n, p) for p in patterns)]


def _check_repository(api: Any, name: str, public: bool, target: Path) -> bool:
    """Return whether the repository exists, with nothing in it or with weights of this model.

    Raises:
        SetupError: it has other content, or another visibility.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        private = api.repo_info(name).private
    except RepositoryNotFoundError:
        return False
    files = {file.path: getattr(file, "lfs", None) for file in api.list_repo_tree(name, recursive=True)}
    files.pop(".gitattributes", None)
    own = {sha256(path) for path in target.glob("*.safetensors")}
    if files and not any(lfs and lfs.sha256 in own for lfs in files.values()):
        fix = "Set another REPO, or delete them there"
        raise SetupError(f"REPO: {name} exists with other content: found {', '.join(sorted(files)[:3])}. {fix}")
    if private == public:
        found, fix = ("private", "Unset PUBLIC") if private else ("public", "Set PUBLIC=1")
        raise SetupError(f"REPO: {name} exists and is {found}. {fix}, or change it in the repository's settings")
    return True
