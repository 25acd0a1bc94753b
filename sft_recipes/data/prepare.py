"""Prepares a plan's data once per node, before any rank starts, and caches it by the content it depends on.

Run as `python -m sft_recipes.data.prepare PLAN`: reads, checks, renders, tokenizes, masks and packs the rows, builds
the model of a from-scratch recipe, and writes `prepared.json` next to the plan. Exits with 2 on invalid input. A later
run with the same data, tokenizer, template, lengths and code uses the cached result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import itertools
import json
import logging
import os
import random
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_recipes.config.schema import Model
from sft_recipes.data import model_files, model_layers, sources, tokenizer_files, validate
from sft_recipes.data.formats import Conversation, Message, conversation_of, read_conversations
from sft_recipes.data.sources import Source
from sft_recipes.planner import batch
from sft_recipes.planner import plan as plans
from sft_recipes.planner.plan import Plan, Prepared
from sft_recipes.runtime import library_imports
from sft_recipes.runtime import log as run_log
from sft_recipes.runtime.atomic_write import sha256, sync
from sft_recipes.runtime.errors import DataError, UserError
from sft_recipes.runtime.run_dir import read_json, runs_root, write_json

if TYPE_CHECKING:
    from sft_recipes.data.tokenize import ConversationTokenizer
    from sft_recipes.data.tokenize_rows import TokenizedRows

log = logging.getLogger("sft_recipes.data.prepare")  # __name__ is "__main__" in the process that prepares

_MAX_PROMPTS = 1000
_OVERFIT_CANDIDATES = 10  # rows read per row to overfit: some may have no token in the loss
_SAMPLED_ROWS = 200  # of each source, for the comparison of tokenizers
_CHECKSUMS = "checksums.json"
_TOKENIZER_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".tiktoken")
# Modules that do not change the rows.
_NOT_IN_CACHE_KEY = ("inspect.py", "download.py", "hub.py", "model_files.py")


def main(plan_file: str) -> int:
    """Prepare the data of the plan in `plan_file`; return 0, or 2 after one line on standard error."""
    run_log.to_console()
    path = Path(plan_file)
    try:
        plan, started = plans.read(path), time.monotonic()
        # Rows need none of them, whatever the run needs. DeepSpeed would also print a warning.
        library_imports.skip_unused_libraries("full", "adamw_torch", [], False, plan.sections.model.trust_remote_code)
        prepared = prepare(plan)
        plan = replace(plan, packing=plan.packing and prepared.packing)
        details = json.loads((Path(prepared.folder) / "details.json").read_text(encoding="utf-8"))
        for line in summary(plan, details, time.monotonic() - started):
            log.info("%s", line)
    except (UserError, OSError) as error:  # a full or unmounted disk is the user's to fix
        log.error("%s", " ".join(str(error).split()))
        return 2
    write_json(path.with_name("prepared.json"), asdict(prepared))
    return 0


def prepare(plan: Plan, store: Path | None = None, rows_only: bool = False) -> Prepared:
    """Return the plan's prepared data, from the cache in `store` if it is there.

    Args:
        rows_only: for displaying rows: needs the model's tokenizer only, and skips the checks of model and limits.

    Raises:
        DataError: rows, model or tokenizer are invalid.
    """
    store = store or runs_root() / ".prepared"
    store.mkdir(parents=True, exist_ok=True, mode=0o700)  # it contains the data
    base = _base_folder(plan, rows_only)
    data = plan.sections.data
    toy_folder = store / f"toy-{_code_hash('toy/toy_dataset.py')[:8]}"
    parts = ("train", "validation", *(["retention_eval"] if data.retention_eval else []))
    named = {part: sources.resolve_all(data, f"data.{part}", toy_folder) for part in parts}
    folder = store / _cache_key(plan, named, base)
    if corrupt := _find_corrupt(folder):
        if folder.exists():
            log.warning("data: %s: checksum mismatch. Preparing the data again", corrupt[0])
        partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
        try:
            _prepare_folder(plan, named, base, partial)
            if _find_corrupt(folder):  # another process may have finished the same meanwhile
                shutil.rmtree(folder, ignore_errors=True)
                partial.replace(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    if base and not rows_only and not plan.parent:
        _check_architecture_once(plan, base, folder)
    if not rows_only:
        validate.check_limits(plan, json.loads((folder / "details.json").read_text(encoding="utf-8")))
    stored = json.loads((folder / "prepared.json").read_text(encoding="utf-8"))
    base = base or (folder / "model").resolve()
    local = {"folder": str(folder.resolve()), "model": str(base), "architecture": model_files.architecture_of(base)}
    return Prepared(**{**stored, **local})


def _find_corrupt(folder: Path) -> list[Path]:
    """Return the files whose checksum differs, or the list of checksums if it is missing."""
    checksums = {folder / name: checksum for name, checksum in read_json(folder / _CHECKSUMS).items()}
    corrupt = [path for path, checksum in checksums.items() if not path.is_file() or sha256(path) != checksum]
    return corrupt if checksums else [folder / _CHECKSUMS]


def is_local(plan: Plan) -> bool:
    """Return whether data and tokenizer are on this machine, so that preparing them uses no network."""
    model, data = plan.sections.model, plan.sections.data
    named = [*data.training, *data.held_out, *data.retention]
    return (model.from_scratch or Path(str(model.name_or_path)).is_dir()) and all(
        sources.hub_name(source.path) is None for source in named
    )


def summary(plan: Plan, details: Mapping[str, Any], seconds: float) -> list[str]:
    """Return one line on the prepared data, and one per thing that a user should know before the run starts."""
    train, validation = details["train"], details["validation"]
    packed = f" packed into {details['rows']:,} rows of {plan.max_length} tokens" if plan.packing else ""
    share = train["supervised_tokens"] / max(train["tokens"], 1)
    retention = details.get("retention_eval")
    retained = f", {retention['examples']:,} retention examples" if retention else ""
    lines = [
        f"data: {train['examples']:,} training examples{packed}, {train['tokens']:,} tokens, {share:.0%} in the loss; "
        f"{validation['examples']:,} validation examples{retained}; {seconds:.1f} s"
    ]
    if details["source_weights"]:
        names = [
            f"{source['name']} {rows:,} x {weight:g}"
            for source, (rows, weight) in zip(details["sources"]["train"], details["source_weights"], strict=True)
        ]
        lines.append(f"data: rows per epoch (rows x weight): {', '.join(names)}")
    parts = {"train": train, "validation": validation, **({"retention_eval": retention} if retention else {})}
    lines += [
        f"data: {part}: {stats['truncated']:,} of {stats['rows_read']:,} rows truncated to {plan.max_length} tokens, "
        f"{stats['dropped']:,} dropped (no token in the loss), {stats['lost_answers']:,} lost an answer "
        f"(increase trainer.max_length to keep more)"
        for part, stats in parts.items()
        if stats["truncated"]
    ]
    if count := train["special_tokens_as_text"]:
        lines.append(f"data: train: {count:,} rows contain special tokens as text, encoded as text")
    lines += [f"data: {line}" for line in validate.reading_lines(details)]
    return lines + [f"data: note: {note}" for note in details["notes"]]


def _base_folder(plan: Plan, rows_only: bool) -> Path | None:
    """Return the folder with the run's tokenizer; None for a from-scratch recipe.

    It is that of the run that this one starts from: `last/`, or for adapters the base model that was built for it.
    """
    model = plan.sections.model
    if plan.parent and (plan.method == "full" or model.from_scratch):
        folder = plan.parent.last if plan.method == "full" else Path(read_json(plan.parent.prepared).get("model", ""))
        return model_files.check_model(dataclasses.replace(model, name_or_path=str(folder)))
    if model.from_scratch:
        return None
    return model_files.tokenizer_folder(model) if rows_only else model_files.check_model(model)


def _check_architecture_once(plan: Plan, base: Path, folder: Path) -> None:
    """Check the architecture, or skip it if it was found right before: building the model to count it takes seconds."""
    model = plan.sections.model
    cached = folder / "architecture.json"
    stated = json.dumps([model.architecture, str(base)], sort_keys=True)
    if not cached.is_file() or cached.read_text(encoding="utf-8") != stated:
        model_files.check_architecture(model.architecture, base, model.trust_remote_code)
        cached.write_text(stated, encoding="utf-8")


def _code_hash(file: str) -> str:
    return sha256(Path(__file__).parent / file)


def _cache_key(plan: Plan, named: Mapping[str, Mapping[str, Source]], base: Path | None) -> str:
    """Hash everything that determines the prepared rows: content, tokenizer, template, lengths, code, libraries.

    Args:
        named: the sources of train, validation and, only if the recipe has them, retention_eval.
    """
    model, data = plan.sections.model, plan.sections.data
    tokenizer, template = _read_tokenizer_files(base), _template_override(model)
    dated = b"strftime_now" in template.encode() or any(b"strftime_now" in text for text in tokenizer.values())
    package = Path(__file__).parent
    code = sorted(
        str(path.relative_to(package)) for path in package.rglob("*.py") if path.name not in _NOT_IN_CACHE_KEY
    )
    parts = {
        **{
            part: [[name, source.fingerprint()] for name, source in part_sources.items()]
            for part, part_sources in named.items()
        },
        "validation_fraction": data.validation_fraction,
        "max_eval_samples": data.max_eval_samples,
        "max_rejected_fraction": data.max_rejected_fraction,
        "overfit": [data.overfit_rows, plan.effective_batch_size] if data.overfit_rows else None,
        "model": asdict(model),
        "tokenizer": {name: hashlib.sha256(text).hexdigest() for name, text in tokenizer.items()},
        "template": template,
        "max_length": plan.max_length,
        "packing": plan.packing,
        "seed": plan.sections.trainer["seed"],
        "data_seed": plan.sections.trainer["data_seed"],
        "date": plan.created[:10] if dated else None,
        "code": {name: _code_hash(name) for name in code},
        "libraries": {name: metadata.version(name) for name in ("transformers", "tokenizers", "trl", "jinja2")},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _read_tokenizer_files(folder: Path | None) -> dict[str, bytes]:
    """Read every file of a model's folder except its weights: configuration, tokenizer, templates."""
    if folder is None:
        return {}
    files = sorted(file for file in folder.rglob("*") if file.suffix in _TOKENIZER_SUFFIXES and file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files if ".index." not in file.name}


def _template_override(model: Model) -> str:
    """Return the recipe's own template, or its name if there is no such file (loading it then fails)."""
    name = model.chat_template or ""
    return Path(name).read_text(encoding="utf-8", errors="replace") if Path(name).is_file() else name


def _prepare_folder(plan: Plan, named: Mapping[str, Mapping[str, Source]], base: Path | None, folder: Path) -> None:
    """Prepare the rows of all sources and write them to `folder`."""
    with library_imports.without_garbage_collection():
        import datasets
        import transformers.models.auto.tokenization_auto

    from sft_recipes.data.packing import rows_per_epoch
    from sft_recipes.data.tokenize import ConversationTokenizer
    from sft_recipes.data.tokenizer import FIX_MISTRAL_REGEX, load_tokenizer

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    started = time.monotonic()
    folder.mkdir(parents=True)
    model, data = plan.sections.model, plan.sections.data
    overfit_rows = data.overfit_rows
    if base is None:
        splits = not named["validation"] and not overfit_rows
        base = _build_from_scratch(plan, named["train"], splits, folder / "model")
    config = model_layers.load_config(base, model.trust_remote_code)
    model_notes = model_layers.check_positions(plan, config) if config else []
    leak = model_layers.find_leak(plan, config) if config and plan.packing else None
    plan = replace(plan, packing=plan.packing and not leak)
    loaded = load_tokenizer(str(base), model.chat_template, model.trust_remote_code, model.add_tokens)
    (folder / tokenizer_files.FOLDER).mkdir()
    tokenizer_notes = tokenizer_files.save(
        loaded, base, folder / tokenizer_files.FOLDER, _sample_texts(named), model.trust_remote_code
    )
    tokenizer = ConversationTokenizer(loaded, datetime.date.fromisoformat(plan.created[:10]))
    tokenized = _tokenize_sources(plan, named, tokenizer)
    reading = {
        part: {name: rows.report.describe(named[part][name].settings) for name, rows in part_rows.items()}
        for part, part_rows in tokenized.items()
    }
    training, validation = tokenized["train"], tokenized["validation"]
    if overfit_rows:
        training = validation = _select_first(training, overfit_rows)
    else:
        if not validation:
            training, validation = _split(plan, training)
        validation = _limit_eval_rows(plan, validation)
    retention_eval = _limit_eval_rows(plan, tokenized.get("retention_eval", {}))
    counted = validate.summarize(training, validation, retention_eval)
    if not counted["train"]["examples"] or not counted["validation"]["examples"]:
        validate.check_limits(plan, {**counted, "new_tokens": []})  # no row can be shown or trained
    rows, rows_by_source, validation_rows = _write_rows(plan, training, validation, folder)
    weights = _source_weights(plan, rows_by_source, training)
    repeats = len(rows) / max(sum(map(len, validation_rows)), 1) if overfit_rows else 1.0
    per_epoch = _count_per_epoch(counted["sources"]["train"], [weight for _, weight in weights], repeats)
    retention_rows = _write_retention_eval(plan, retention_eval, folder)
    _write_prompts(plan, tokenizer, named["validation"] or named["train"], validation, folder / "prompts.jsonl")
    every_source = [*training.values(), *validation.values(), *retention_eval.values()]
    vocabulary = _describe_vocabulary(loaded, model.add_tokens, model_files.embeddings_of(base), every_source)
    notes = [f"{note} ({count:,} rows)" for note, count in counted["template_notes"].items()]
    notes += [*vocabulary.pop("notes"), *tokenizer_notes, *model_notes]
    notes += [model_layers.describe_unpacked(leak, plan, per_epoch)] if leak else []
    if data.chat_template_kwargs:
        stated = json.dumps(data.chat_template_kwargs)
        notes.append(f"the chat template gets {stated}: pass it at inference too (chat_template_kwargs)")
    details = {
        **counted,
        **vocabulary,
        "reading": reading,
        "files": {
            part: {name: source.file_names() for name, source in part_sources.items()}
            for part, part_sources in named.items()
        },
        "end_of_turn": loaded.convert_ids_to_tokens(counted["end_of_turn_ids"]),
        "padding_token": loaded.pad_token,
        "tokenizer": {
            "class": type(loaded).__name__,
            FIX_MISTRAL_REGEX: loaded.init_kwargs.get(FIX_MISTRAL_REGEX),
            "notes": tokenizer_notes,
        },
        "notes": notes,
        "rows": len(rows),
        "source_weights": weights,
        "validation_rows": {name: len(part) for name, part in zip(validation, validation_rows, strict=True)},
        **({"retention_eval_rows": sum(map(len, retention_rows))} if retention_eval else {}),
        "seconds": time.monotonic() - started,
    }
    prepared = Prepared(
        fingerprint=_fingerprint([rows, *validation_rows, *retention_rows], weights),
        folder=str(folder),
        model=str(base),
        architecture={},
        rows=rows_per_epoch(weights) if weights else len(rows),
        **per_epoch,
        validation_rows=sum(map(len, validation_rows)),
        notes=notes,
        packing=plan.packing,
    )
    write_json(folder / "details.json", details)
    write_json(folder / "prepared.json", asdict(prepared))
    _write_checksums(folder)


def _tokenize_sources(
    plan: Plan, named: Mapping[str, Mapping[str, Source]], tokenizer: ConversationTokenizer
) -> dict[str, dict[str, TokenizedRows]]:
    """Tokenize the rows of each source of each part; only the first candidates with OVERFIT."""
    from sft_recipes.data.tokenize_rows import tokenize_source

    data = plan.sections.data
    max_rows = _OVERFIT_CANDIDATES * data.overfit_rows if data.overfit_rows else None
    return {
        part: {
            name: tokenize_source(
                source, tokenizer, plan.max_length, f"data.{part}", name, data.max_rejected_fraction, max_rows
            )
            for name, source in part_sources.items()
        }
        for part, part_sources in named.items()
    }


def _count_per_epoch(sources: Sequence[Mapping[str, int]], weights: Sequence[float], repeats: float) -> dict[str, int]:
    """Return the examples and tokens that an epoch uses.

    Args:
        sources: statistics of each training source.
        weights: of each source; empty without weights, and each row is then used `repeats` times.
    """
    shares = weights or [repeats] * len(sources)
    return {
        key: round(sum(share * source[key] for share, source in zip(shares, sources, strict=True)))
        for key in ("examples", "supervised_tokens", "tokens")
    }


def _select_first(training: Mapping[str, TokenizedRows], count: int) -> dict[str, TokenizedRows]:
    """Return the first rows of the first source with a token in the loss; all of its rows if none has one."""
    name, rows = next(iter(training.items()))
    usable = rows.supervised_tokens > 0
    return {name: rows.select(usable & (usable.cumsum() <= count)) if usable.any() else rows}


def _sample_texts(named: Mapping[str, Mapping[str, Source]]) -> Iterator[str]:
    """Yield the texts of the first rows of each source."""

    def texts(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, list | dict):
            for inner in value.values() if isinstance(value, dict) else value:
                yield from texts(inner)

    for source in (source for part_sources in named.values() for source in part_sources.values()):
        with contextlib.suppress(DataError, RecursionError):  # reading all rows reports it
            for row in itertools.islice(source.rows(), _SAMPLED_ROWS):
                yield from texts(row.values)


def _write_checksums(folder: Path) -> None:
    """Flush a folder to the disk and write its checksums, the commit marker."""
    paths = sorted(folder.rglob("*"))
    for path in paths:
        sync(path)
    files = [path for path in paths if path.is_file()]
    write_json(folder / _CHECKSUMS, {str(path.relative_to(folder)): sha256(path) for path in files})


def _write_rows(
    plan: Plan, training: Mapping[str, TokenizedRows], validation: Mapping[str, TokenizedRows], folder: Path
) -> tuple[Any, list[int], list[Any]]:
    """Write the rows with a token in the loss.

    Returns:
        The training rows; how many of each source, or of all together without weights; each source's validation rows.
    """
    from datasets import concatenate_datasets

    from sft_recipes.data.packing import to_dataset
    from sft_recipes.data.tokenize_rows import concatenate

    usable = [_usable(part) for part in training.values()]
    groups = usable if _is_weighted(plan) else [concatenate(usable)]  # a row of two sources has no weight
    parts = [to_dataset(group, plan.max_length, plan.packing) for group in groups]
    rows = concatenate_datasets(parts)
    if plan.sections.data.overfit_rows and len(rows):
        count = batch.fill_effective_batch(len(rows), plan.effective_batch_size)
        rows = rows.select([index % len(rows) for index in range(count)])
    validation_rows = [to_dataset(_usable(part), plan.max_length, plan.packing) for part in validation.values()]
    rows.save_to_disk(folder / "train")
    concatenate_datasets(validation_rows).save_to_disk(folder / "validation")
    return rows, [len(part) for part in parts], validation_rows


def _is_weighted(plan: Plan) -> bool:
    data = plan.sections.data
    return not data.overfit_rows and any(source.weight != 1 for source in data.training)


def _source_weights(plan: Plan, rows_by_source: list[int], names: Iterable[str]) -> list[tuple[int, float]]:
    """Return rows and weight of each training source; empty without weights.

    Raises:
        DataError: a weight is so small that no row of its source is used.
    """
    from sft_recipes.data.packing import rows_per_epoch

    if not _is_weighted(plan):
        return []
    weights = [(rows, source.weight) for rows, source in zip(rows_by_source, plan.sections.data.training, strict=True)]
    for name, part in zip(names, weights, strict=True):
        if not rows_per_epoch([part]):
            raise DataError(
                f"data.train: {name}: weight: found {part[1]:g} of {part[0]} rows, which uses no row. Set a weight of "
                f"{1 / max(part[0], 1):.2g} or more, or remove the source"
            )
    return weights


def _usable(rows: TokenizedRows) -> TokenizedRows:
    return rows.select(rows.supervised_tokens > 0)


def _write_retention_eval(plan: Plan, retention_eval: Mapping[str, TokenizedRows], folder: Path) -> list[Any]:
    """Write the rows of the retention eval set, if there is one, in the form of the validation rows."""
    from sft_recipes.data.packing import to_dataset

    parts = [to_dataset(_usable(rows), plan.max_length, plan.packing) for rows in retention_eval.values()]
    for dataset in parts:
        dataset.save_to_disk(folder / "retention_eval")
    return parts


def _describe_vocabulary(
    tokenizer: Any, add_tokens: list[str], embeddings: int | None, every_source: Sequence[TokenizedRows]
) -> dict[str, Any]:
    """Return the largest ids in the rows, with and without new tokens, and the tokens that need new embeddings."""
    import numpy

    from sft_recipes.data.tokenizer import new_tokens

    new = new_tokens(tokenizer, add_tokens)
    ids = numpy.unique(numpy.concatenate([numpy.unique(rows.input_ids) for rows in every_source]))
    without_embedding = [token for token, id in new.items() if embeddings is not None and id >= embeddings]
    note = (
        f"new tokens {', '.join(without_embedding)}: the model's embeddings are resized from {embeddings or 0:,} rows"
    )
    return {
        "largest_token_id": int(ids.max(initial=0)),
        "largest_known_token_id": int(ids[~numpy.isin(ids, list(new.values()))].max(initial=0)),
        "new_tokens": without_embedding,
        "notes": [note] if without_embedding else [],
    }


def _build_from_scratch(plan: Plan, train: Mapping[str, Source], splits: bool, folder: Path) -> Path:
    """Build the model of a from-scratch recipe; its tokenizer is trained on the training rows.

    Args:
        splits: whether validation rows are split off `train`.
    """
    from sft_recipes.data.tokenize_rows import prompt_digests, row_digests, split_digests
    from sft_recipes.data.toy import toy_model

    texts = []
    for name, source in train.items():
        conversations = list(read_conversations(source))
        if not conversations:
            first = next(source.rows(), None)
            if first is not None:
                conversation_of(first, source.settings)  # raises its error
            raise DataError(f"data.train: {source.display_name}: found no rows, expected at least one")
        digests = split_digests(prompt_digests(conversations), row_digests(conversations))
        held_out = _choose_held_out(plan, digests, name) if splits else set()
        for conversation, digest in zip(conversations, digests.tolist(), strict=True):
            if digest not in held_out:
                texts += [text for message in conversation.messages for text in (message["role"], message["content"])]
    toy_model.build(plan.sections.model.architecture, texts, folder, plan.sections.trainer["seed"])
    return folder


def _fingerprint(datasets: list[Any], weights: list[tuple[int, float]]) -> str:
    """Hash the rows' tokens and labels and their weights, so that a run resumes after changes of code or paths that
    keep the rows."""
    digest = hashlib.sha256(json.dumps(weights).encode() if weights else b"")
    for rows in datasets:
        for name in ("input_ids", "labels", *(["seq_lengths"] if "seq_lengths" in rows.column_names else [])):
            for chunk in rows.data.column(name).chunks:
                digest.update(chunk.value_lengths().to_numpy().tobytes())
                digest.update(chunk.flatten().to_numpy().tobytes())
    return digest.hexdigest()[:16]


def _choose_held_out(plan: Plan, digests: Any, name: str) -> set[int]:
    """Return the digests of the prompts that a seeded split holds out."""
    prompts = sorted(set(digests.tolist()))
    if len(prompts) < 2:
        raise DataError(
            f"data.train: {name}: found one text in all rows, expected two or more to split off validation. "
            f"Set data.validation=<a file>"
        )
    count = round(len(prompts) * plan.sections.data.validation_fraction)
    generator = random.Random(plan.sections.trainer["data_seed"])
    return set(generator.sample(prompts, min(max(count, 1), len(prompts) - 1)))


def _split(
    plan: Plan, training: Mapping[str, TokenizedRows]
) -> tuple[dict[str, TokenizedRows], dict[str, TokenizedRows]]:
    """Split each source by seed, keeping its order. Conversations with the same first prompt stay together over all
    sources, so that no prompt is trained on in one source and evaluated in another."""
    import numpy

    from sft_recipes.data.tokenize_rows import split_digests

    digests = {name: split_digests(rows.prompt_digests, rows.row_digests) for name, rows in training.items()}
    held_out = set().union(*(_choose_held_out(plan, part, name) for name, part in digests.items()))
    masks = {name: numpy.isin(part, sorted(held_out)) for name, part in digests.items()}
    for name, mask in masks.items():
        if mask.all():
            raise DataError(
                f"data.train: {name}: found all its prompts in another source's validation split. Set "
                f"data.validation=<a file>"
            )
    return (
        {name: rows.select(~masks[name]) for name, rows in training.items()},
        {name: rows.select(masks[name]) for name, rows in training.items()},
    )


def _limit_eval_rows(plan: Plan, rows_by_source: Mapping[str, TokenizedRows]) -> dict[str, TokenizedRows]:
    """Limit evaluation rows to `data.max_eval_samples`: a seeded choice, each source in proportion."""
    import numpy

    limit = plan.sections.data.max_eval_samples
    total = sum(map(len, rows_by_source.values()))
    if limit is None or total <= limit:
        return dict(rows_by_source)
    generator = numpy.random.default_rng(plan.sections.trainer["data_seed"])
    limited = {}
    for name, rows in rows_by_source.items():
        mask = numpy.zeros(len(rows), bool)
        mask[generator.permutation(len(rows))[: max(round(limit * len(rows) / total), 1)]] = True
        limited[name] = rows.select(mask)
    return limited


def _write_prompts(
    plan: Plan,
    tokenizer: ConversationTokenizer,
    by_name: Mapping[str, Source],
    validation: Mapping[str, TokenizedRows],
    file: Path,
) -> None:
    """Write a seeded choice of validation conversations up to their last answer, for generations during training."""
    locations = {location for rows in validation.values() for location in rows.locations}
    generator = random.Random(plan.sections.trainer["data_seed"])
    chosen = generator.sample(sorted(locations), min(len(locations), _MAX_PROMPTS))
    remaining, conversations = set(chosen), {}
    for source in by_name.values():
        for row in source.rows():
            if row.location in remaining:
                conversations[row.location] = conversation_of(row, source.settings)
            if len(conversations) == len(remaining):
                break
    with file.open("w", encoding="utf-8") as lines:
        for location in chosen:
            *before, answer = conversations[location].messages
            if answer["content"] and len(before) not in conversations[location].untrained:
                prompt = _make_prompt(tokenizer, conversations[location], before, answer)
                lines.write(json.dumps(prompt, ensure_ascii=False) + "\n")


def _make_prompt(
    tokenizer: ConversationTokenizer, conversation: Conversation, before: list[Message], answer: Message
) -> dict[str, Any]:
    return {
        "messages": before,
        "answer": answer["content"],
        "answer_tokens": len(tokenizer.tokenizer(answer["content"], add_special_tokens=False)["input_ids"]),
        "input_ids": tokenizer.tokenize_prompt(
            before, conversation.tools, conversation.location, conversation.template_kwargs
        ),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
