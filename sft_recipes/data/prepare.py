"""Prepares a plan's data once per node, before any rank starts, and caches it by the content it depends on.

Run as `python -m sft_recipes.data.prepare PLAN`: reads, checks, renders, tokenizes, masks and packs the rows, builds
the model of a from-scratch recipe, and writes `prepared.json` next to the plan. Exits with 2 on invalid input. A later
run with the same data, tokenizer, template, lengths and code uses the cached result.
"""

import contextlib
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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy
import pyarrow.compute

from sft_recipes.data import held_out_metrics, model_files, model_layers, sources, tokenizer_files, validate
from sft_recipes.data.forked_call import ForkedCall
from sft_recipes.data.formats import conversation_of
from sft_recipes.data.packing import TrainerRows, rows_per_epoch, write_dataset
from sft_recipes.data.rows import Rows, RowStore, concatenate
from sft_recipes.data.sources import Source, attempt
from sft_recipes.data.tokenize import ConversationTokenizer
from sft_recipes.data.tokenize_rows import split_digests, tokenize_source
from sft_recipes.data.tokenizer import FIX_MISTRAL_REGEX, load_tokenizer, new_tokens
from sft_recipes.data.validate import Sources
from sft_recipes.planner import batch
from sft_recipes.planner import plan as plans
from sft_recipes.planner.plan import Plan, Prepared
from sft_recipes.runtime import library_imports
from sft_recipes.runtime import log as run_log
from sft_recipes.runtime.atomic_write import sha256, sync
from sft_recipes.runtime.code_hash import code_hash
from sft_recipes.runtime.errors import DataError, UserError
from sft_recipes.runtime.run_dir import read_json, runs_root, write_json

log = logging.getLogger("sft_recipes.data.prepare")  # __name__ is "__main__" in the process that prepares

_MAX_PROMPTS = 1000
_OVERFIT_CANDIDATES = 10  # rows read per row to overfit: some may have no token in the loss
_SAMPLED_ROWS = 200  # of each source, for the comparison of tokenizers
_CHECKSUMS = "checksums.json"
_TOKENIZER_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".tiktoken")


def main(plan_file: str) -> int:
    """Prepare the data of the plan in `plan_file`; return 0, or 2 after one line on standard error."""
    run_log.to_console()
    path = Path(plan_file)
    try:
        plan, started = plans.read(path), time.monotonic()
        # Rows need none of them, whatever the run needs. DeepSpeed would also print a warning.
        library_imports.skip_unused_libraries("full", "adamw_torch", [], False, plan.sections.model.trust_remote_code)
        prepared = prepare(plan)
        details = read_json(Path(prepared.folder) / "details.json")
        for line in summary(plan.max_length, details, time.monotonic() - started):
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
    held_out_metrics.load(plan.sections.generation)  # before hours of training
    store = (store or runs_root() / ".prepared").resolve()  # the cache key has the path of the toy dataset
    store.mkdir(parents=True, exist_ok=True, mode=0o700)  # it contains the data
    base = _base_folder(plan, rows_only)
    toy_files = sorted((Path(__file__).parent / "toy").glob("toy_dataset.*"))
    toy_folder = store / "-".join(["toy", *(sha256(file)[:8] for file in toy_files)])
    named = {part: sources.resolve_all(plan.sections.data, part, toy_folder) for part in sources.PARTS}
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
        model_files.check_architecture(plan.sections.model.architecture, base)
    details = read_json(folder / "details.json")
    if not rows_only:
        validate.check_limits(plan, details)
    base = base or folder / "model"
    local = {"folder": str(folder), "model": str(base), "architecture": model_files.architecture_of(base)}
    return Prepared(**local, **details["prepared"])


def _find_corrupt(folder: Path) -> list[Path]:
    """Return the files whose checksum differs, or the list of checksums if it is missing."""
    checksums = {folder / name: checksum for name, checksum in read_json(folder / _CHECKSUMS).items()}
    corrupt = [path for path, checksum in checksums.items() if not path.is_file() or sha256(path) != checksum]
    return corrupt if checksums else [folder / _CHECKSUMS]


def summary(max_length: int, details: Mapping[str, Any], seconds: float) -> list[str]:
    """Return one line on the prepared data, and one per thing that a user should know before the run starts."""
    train, evaluated = details["train"], [part for part in ("validation", "retention_eval") if part in details]
    packed = f" packed into {details['rows']:,} rows of {max_length} tokens" if details["prepared"]["packing"] else ""
    share = train["supervised_tokens"] / max(train["tokens"], 1)
    first = f"{train['examples']:,} training examples{packed}, {train['tokens']:,} tokens, {share:.0%} in the loss; "
    first += ", ".join(f"{details[part]['examples']:,} {part} examples" for part in evaluated) + f"; {seconds:.1f} s"
    return [f"data: {line}" for line in (first, *validate.reading_lines(details))]


def _base_folder(plan: Plan, rows_only: bool) -> Path | None:
    """Return the folder with the run's tokenizer; None for a from-scratch recipe.

    It is that of the run that this one starts from: `last/`, or for adapters the base model that was built for it.
    """
    model = plan.sections.model
    if plan.parent and (plan.method == "full" or model.from_scratch):
        folder = plan.parent.last if plan.method == "full" else Path(read_json(plan.parent.prepared).get("model", ""))
        return model_files.check_model(replace(model, name_or_path=str(folder)))
    if model.from_scratch:
        return None
    return model_files.tokenizer_folder(model) if rows_only else model_files.check_model(model)


def _cache_key(plan: Plan, named: Mapping[str, Mapping[str, Source]], base: Path | None) -> str:
    """Hash everything that determines the prepared rows: content, tokenizer, template, lengths, code, libraries.

    Args:
        named: the sources of each part, by name.
        base: the folder whose files, except weights, configure model, tokenizer and templates.
    """
    model, data, package = plan.sections.model, plan.sections.data, Path(__file__).parent
    files = sorted(file for file in base.rglob("*") if file.suffix in _TOKENIZER_SUFFIXES) if base else []
    files = [file for file in (*files, Path(model.chat_template or "")) if file.is_file()]
    dated = any(b"strftime_now" in file.read_bytes() for file in files)
    parts = {
        "sources": [[part, name, named[part][name].identity()] for part in named for name in named[part]],
        "data": [data.validation_fraction, data.max_eval_samples, data.max_rejected_fraction, data.overfit_rows],
        "model": asdict(model),
        "tokenizer": [(file.name, sha256(file)) for file in files],
        "plan": [plan.max_length, plan.packing, plan.effective_batch_size if data.overfit_rows else None],
        "seeds": [plan.sections.trainer["seed"], plan.sections.trainer["data_seed"]],
        "date": plan.created[:10] if dated else None,
        "code": [code_hash(file) for file in sorted(package.rglob("*.py"))],
        "tables": [sha256(file) for file in sorted(package.rglob("*.yaml"))],
        "libraries": {name: metadata.version(name) for name in ("transformers", "tokenizers", "trl", "jinja2")},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _prepare_folder(plan: Plan, named: Mapping[str, Mapping[str, Source]], base: Path | None, folder: Path) -> None:
    """Prepare the rows of all sources and write them to `folder`."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    started = time.monotonic()
    folder.mkdir(parents=True)
    model, data = plan.sections.model, plan.sections.data
    base = base or _build_from_scratch(plan, named["train"], folder / "model")
    config = model_layers.load_config(base, model.trust_remote_code)
    model_notes = model_layers.check_positions(plan, config) if config else []
    leak = model_layers.find_leak(plan, config) if config and plan.packing else None
    plan = replace(plan, packing=plan.packing and not leak)
    loaded = load_tokenizer(str(base), model.chat_template, model.trust_remote_code, model.add_tokens)
    saved = folder / tokenizer_files.FOLDER
    saved.mkdir()
    texts = [*_sample_texts(named)]
    # Loads large files several times.
    with ForkedCall(tokenizer_files.save, loaded, base, saved, texts, model.trust_remote_code) as saving:
        tokenizer = ConversationTokenizer(loaded, datetime.date.fromisoformat(plan.created[:10]))
        reading, parts = _tokenize_sources(plan, named, tokenizer, folder, saving.check)
        tokenizer_notes = saving.result()
    if data.overfit_rows:
        parts["train"] = parts["validation"] = _select_first(parts["train"], data.overfit_rows)
    elif not parts["validation"]:
        parts |= _split(plan, parts["train"])
    parts |= {part: _limit_eval_rows(plan, parts[part]) for part in ("validation", "retention_eval")}
    counted = validate.summarize(parts)
    if not counted["train"]["examples"] or not counted["validation"]["examples"]:
        validate.check_limits(plan, {**counted, "new_tokens": []})  # no row can be shown or trained
    groups, weights = _training_rows(plan, parts["train"])
    evaluated = {
        part: [TrainerRows.arrange(_usable(rows), plan.max_length, plan.packing) for rows in parts[part].values()]
        for part in ("validation", "retention_eval")
    }
    count = train_rows = sum(map(len, groups))
    tables = itertools.chain.from_iterable(group.tables() for group in groups)
    if data.overfit_rows and count:
        train_rows = batch.fill_effective_batch(count, plan.effective_batch_size)
        tables = iter([pyarrow.concat_tables(tables).take(pyarrow.array(numpy.arange(train_rows) % count))])
    prompts = (plan, tokenizer, named["validation"] or named["train"], parts["validation"], folder)
    with ForkedCall(_write_prompts, *prompts) as writing:
        files = [write_dataset(folder / "train", tables)]
        for part, sets in evaluated.items():
            if sets:
                rows = itertools.chain.from_iterable(each.tables() for each in sets)
                files.append(write_dataset(folder / part, rows))
        fingerprint, ids = _read_back(files, weights)
        writing.result()
    validation_rows = [*map(len, evaluated["validation"])]
    repeats = train_rows / max(sum(validation_rows), 1) if data.overfit_rows else 1.0
    shares = [weight for _, weight in weights] or [repeats] * len(parts["train"])
    per_epoch = {  # the examples and tokens that an epoch uses
        key: round(sum(share * source[key] for share, source in zip(shares, counted["sources"]["train"], strict=True)))
        for key in ("examples", "supervised_tokens", "tokens")
    }
    new, regex_fixed = new_tokens(loaded, model.add_tokens), loaded.init_kwargs.get(FIX_MISTRAL_REGEX)
    embeddings = getattr(config.get_text_config(), "vocab_size", None) if config else None
    resizing = [token for token, id in new.items() if embeddings is not None and id >= embeddings]
    notes = [f"{note} ({count:,} rows)" for note, count in counted["template_notes"].items()]
    if resizing:
        notes.append(f"new tokens {', '.join(resizing)}: the model's embeddings are resized from {embeddings:,} rows")
    notes += [*tokenizer_notes, *model_notes]
    if leak:
        packed = max(-(-per_epoch["tokens"] // plan.max_length), 1)
        cost = f"{per_epoch['examples']:,} padded rows per epoch instead of about {packed:,} packed ones"
        notes.append(f"packing is off: {leak}. {cost}")
    details = {
        **counted,
        "largest_token_id": max(ids, default=0),
        "largest_known_token_id": max(ids.difference(new.values()), default=0),
        "new_tokens": resizing,
        "reading": reading,
        "end_of_turn": loaded.convert_ids_to_tokens(counted["end_of_turn_ids"]),
        "tokenizer": {"class": type(loaded).__name__, FIX_MISTRAL_REGEX: regex_fixed, "notes": tokenizer_notes},
        "notes": notes,
        "rows": train_rows,
        "source_weights": weights,
        "validation_rows": dict(zip(parts["validation"], validation_rows, strict=True)),
        "retention_eval_rows": sum(map(len, evaluated["retention_eval"])),
        "seconds": time.monotonic() - started,
        "prepared": {  # with the folders, the fields of Prepared
            "fingerprint": fingerprint,
            "rows": rows_per_epoch(weights) if weights else train_rows,
            **per_epoch,
            "validation_rows": sum(validation_rows),
            "notes": notes,
            "packing": plan.packing,
        },
    }
    write_json(folder / "details.json", details)
    _write_checksums(folder)


def _tokenize_sources(
    plan: Plan,
    named: Mapping[str, Mapping[str, Source]],
    tokenizer: ConversationTokenizer,
    folder: Path,
    check: Callable[[], None],
) -> tuple[dict[str, dict[str, Any]], dict[str, Sources]]:
    """Tokenize each source of each part (OVERFIT: the first candidates only); return what was read, and the rows.

    Args:
        check: as in `tokenize_source`.
    """
    data, store = plan.sections.data, RowStore(folder)
    max_rows = _OVERFIT_CANDIDATES * data.overfit_rows if data.overfit_rows else None
    limits = (plan.max_length, data.max_rejected_fraction, max_rows)
    reading: dict[str, dict[str, Any]] = {part: {} for part in named}
    bounds: dict[str, dict[str, slice]] = {part: {} for part in named}
    for part, name, source in ((part, *item) for part, by_name in named.items() for item in by_name.items()):
        first = store.rows
        reading[part][name] = tokenize_source(source, tokenizer, f"data.{part}", store, *limits, check)
        bounds[part][name] = slice(first, store.rows)
    rows = store.read()
    return reading, {part: {name: rows.select(each) for name, each in bounds[part].items()} for part in bounds}


def _usable(rows: Rows) -> Rows:
    """Return the rows with a token in the loss."""
    return rows.select(rows["supervised_tokens"] > 0)


def _select_first(training: Sources, count: int) -> Sources:
    """Return the first rows of the first source with a token in the loss; all of its rows if none has one."""
    name, rows = next(iter(training.items()))
    return {name: _usable(rows).select(slice(count)) if len(_usable(rows)) else rows}


def _sample_texts(named: Mapping[str, Mapping[str, Source]]) -> Iterator[str]:
    """Yield the first rows of each source as text."""
    for source in itertools.chain.from_iterable(by_name.values() for by_name in named.values()):
        with contextlib.suppress(DataError, RecursionError):  # reading all rows reports it
            for row in itertools.islice(source.rows(), _SAMPLED_ROWS):
                yield json.dumps(row.values, ensure_ascii=False, default=str)


def _write_checksums(folder: Path) -> None:
    """Flush a folder to the disk and write its checksums, the commit marker."""
    paths = sorted(folder.rglob("*"))
    for path in paths:
        sync(path)
    write_json(folder / _CHECKSUMS, {str(path.relative_to(folder)): sha256(path) for path in paths if path.is_file()})


def _training_rows(plan: Plan, training: Sources) -> tuple[list[TrainerRows], list[tuple[int, float]]]:
    """Return the training rows in one group, or if not all weights are 1, one per source with its rows and weight."""
    data, usable = plan.sections.data, [_usable(rows) for rows in training.values()]
    is_weighted = not data.overfit_rows and any(source.weight != 1 for source in data.sources("train"))
    examples = usable if is_weighted else [concatenate(usable)]  # a row of two sources has no weight
    groups = [TrainerRows.arrange(each, plan.max_length, plan.packing) for each in examples]
    weighted = data.sources("train") if is_weighted else []
    weights = [(len(group), source.weight) for group, source in zip(groups, weighted, strict=False)]
    return groups, weights


def _build_from_scratch(plan: Plan, train: Mapping[str, Source], folder: Path) -> Path:
    """Build the model of a from-scratch recipe; its tokenizer is trained on the rows of the training sources."""
    from sft_recipes.data.toy import toy_model

    rows = (attempt(conversation_of, row, source.settings) for source in train.values() for row in source.rows())
    conversations = (row for row in rows if not isinstance(row, DataError))  # tokenization reports the others
    messages = itertools.chain.from_iterable(conversation.messages for conversation in conversations)
    texts = (text for message in messages for text in (message["role"], message["content"]))
    toy_model.build(plan.sections.model.architecture, texts, folder, plan.sections.trainer["seed"])
    return folder


def _read_back(files: list[Path], weights: list[tuple[int, float]]) -> tuple[str, set[int]]:
    """Return the data fingerprint and the token ids of the rows in these files.

    The fingerprint is a hash of their tokens, labels and weights, so that a run resumes after changes of code or paths
    that keep the rows.
    """
    digest, ids = hashlib.sha256(json.dumps(weights).encode()), set[int]()
    for file in files:
        with file.open("rb") as opened, pyarrow.ipc.open_stream(opened) as batches:
            for batch in batches:
                for column in batch.drop_columns("source").columns:
                    digest.update(column.value_lengths().to_numpy())
                    digest.update(column.flatten().to_numpy())
                ids.update(pyarrow.compute.unique(batch["input_ids"].flatten()).to_pylist())
    return digest.hexdigest()[:16], ids


def _split(plan: Plan, training: Sources) -> dict[str, Sources]:
    """Split each source by seed, keeping its order. Conversations with the same first prompt stay together over all
    sources, so that no prompt is trained on in one source and evaluated in another."""
    digests = {name: split_digests(rows) for name, rows in training.items()}
    held_out: list[numpy.ndarray] = []
    for name, part in digests.items():
        prompts = numpy.unique(part)
        if len(prompts) < 2:
            raise DataError(f"data.train: {name}: found one text in all rows. Set data.validation=<a file>")
        count = round(len(prompts) * plan.sections.data.validation_fraction)
        generator = random.Random(plan.sections.trainer["data_seed"])
        held_out.append(prompts[generator.sample(range(len(prompts)), min(max(count, 1), len(prompts) - 1))])
    masks = {name: numpy.isin(part, numpy.concatenate(held_out)) for name, part in digests.items()}
    return {
        "train": {name: rows.select(~masks[name]) for name, rows in training.items()},
        "validation": {name: rows.select(masks[name]) for name, rows in training.items()},
    }


def _limit_eval_rows(plan: Plan, rows_by_source: Sources) -> Sources:
    """Limit evaluation rows to `data.max_eval_samples`: a seeded choice, each source in proportion."""
    limit, total = plan.sections.data.max_eval_samples, sum(map(len, rows_by_source.values()))
    if limit is None or total <= limit or plan.sections.data.overfit_rows:
        return rows_by_source
    generator = numpy.random.default_rng(plan.sections.trainer["data_seed"])
    return {
        name: rows.select(numpy.sort(generator.permutation(len(rows))[: max(round(limit * len(rows) / total), 1)]))
        for name, rows in rows_by_source.items()
    }


def _write_prompts(
    plan: Plan, tokenizer: ConversationTokenizer, by_name: Mapping[str, Source], validation: Sources, folder: Path
) -> None:
    """Write a seeded choice of validation conversations up to their last answer, for generations during training."""
    locations = pyarrow.compute.unique(concatenate([*validation.values()]).take("location")).sort()
    generator = random.Random(plan.sections.trainer["data_seed"])
    sample = generator.sample(range(len(locations)), min(len(locations), _MAX_PROMPTS))
    chosen = locations.take(pyarrow.array(sample)).to_pylist()
    order, conversations = {location: number for number, location in enumerate(chosen)}, {}
    for source in by_name.values():
        conversations |= {order[row.location]: conversation_of(row, source.settings) for row in source.rows(order)}
    with (folder / "prompts.jsonl").open("w", encoding="utf-8") as lines:
        for _, conversation in sorted(conversations.items()):
            *before, answer = conversation.messages
            if answer["content"] and len(before) not in conversation.untrained:
                ids = tokenizer.tokenizer(answer["content"], add_special_tokens=False)["input_ids"]
                prompt = {
                    "messages": before,
                    "tools": conversation.tools,
                    "template_kwargs": conversation.template_kwargs,
                    "answer": answer["content"],
                    "answer_tokens": len(ids),
                    "input_ids": tokenizer.tokenize_prompt(replace(conversation, messages=before)),
                }
                lines.write(json.dumps(prompt, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
