"""Prepares a plan's data once a node, before any rank starts, and keeps it by what it was made from.

Run as `python -m sft_recipes.data.prepare PLAN`: reads, checks, renders, tokenizes, masks and packs the rows, builds
the model of a recipe that starts from nothing, and writes `prepared.json` beside the plan. Leaves with 2 where the
user's input is wrong. A second start with the same data, tokenizer, template, lengths and code finds it all there.
"""

from __future__ import annotations

import datetime
import hashlib
import itertools
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_recipes.config.schema import Model
from sft_recipes.data import model_files, sources, validate
from sft_recipes.data.formats import Conversation, conversation_of
from sft_recipes.data.sources import Source
from sft_recipes.planner import plan as plans
from sft_recipes.planner.plan import Plan, Prepared
from sft_recipes.runtime import library_imports
from sft_recipes.runtime.atomic_write import sha256, sync
from sft_recipes.runtime.code_hash import code_hash
from sft_recipes.runtime.errors import DataError, UserError
from sft_recipes.runtime.run_dir import read_json, runs_root, write_json

if TYPE_CHECKING:
    from sft_recipes.data.tokenize_rows import Labelled

_PROMPTS = 1000
_CHECKSUMS = "checksums.json"
_NO_WEIGHTS = (".json", ".jinja", ".model", ".txt", ".tiktoken")
# Modules that do not decide what the rows are: they show or bring what others made.
_NOT_THE_ROWS = ("inspect.py", "download.py", "hub.py", "model_files.py")


def main(plan_file: str) -> int:
    """Prepares the data of the plan in `plan_file`; 0, or 2 with one line on standard error."""
    path = Path(plan_file)
    try:
        plan, started = plans.read(path), time.monotonic()
        library_imports.leave_out_what_is_not_used(plan)
        prepared = prepare(plan)
        details = json.loads((Path(prepared.folder) / "details.json").read_text(encoding="utf-8"))
        print(announcement(plan, details, time.monotonic() - started))
    except (UserError, OSError) as error:  # a disk that is full or closed is the user's to mend
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    write_json(path.with_name("prepared.json"), asdict(prepared))
    return 0


def prepare(plan: Plan, store: Path | None = None, rows_alone: bool = False) -> Prepared:
    """The plan's data, made or found in `store`.

    Args:
        rows_alone: to look at rows, whatever they are: the model's tokenizer is enough, and a broken contract is not
            refused.

    Raises:
        DataError: rows, model or tokenizer are not what a run can start from.
    """
    store = store or runs_root() / ".prepared"
    store.mkdir(parents=True, exist_ok=True, mode=0o700)  # it holds the data
    base = _base(plan, rows_alone)
    data = plan.sections.data
    embedded = store / f"embedded-{_code('toy/toy_dataset.py')[:8]}"
    parts = ("train", "validation", *(["retention_eval"] if data.retention_eval else []))
    named = {part: sources.resolve_all(data, f"data.{part}", embedded) for part in parts}
    folder = store / _key(plan, named, base)
    if wrong := _not_as_written(folder):
        if folder.exists():
            print(f"data: {wrong[0]} is not as it was written; it is prepared again", file=sys.stderr)
        partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
        try:
            _make(plan, named, base, partial)
            if _not_as_written(folder):  # another start may have made the same meanwhile
                shutil.rmtree(folder, ignore_errors=True)
                partial.replace(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    if base and not rows_alone:
        _check_architecture_once(plan, base, folder)
    if not rows_alone:
        validate.check(plan, json.loads((folder / "details.json").read_text(encoding="utf-8")))
    found = json.loads((folder / "prepared.json").read_text(encoding="utf-8"))
    base = base or (folder / "model").resolve()
    here = {"folder": str(folder.resolve()), "model": str(base), "architecture": model_files.architecture_of(base)}
    return Prepared(**{**found, **here})


def _not_as_written(folder: Path) -> list[Path]:
    """The files that are not as they were made, or the list of their checksums where there is none."""
    listed = {folder / name: checksum for name, checksum in read_json(folder / _CHECKSUMS).items()}
    wrong = [path for path, checksum in listed.items() if not path.is_file() or sha256(path) != checksum]
    return wrong if listed else [folder / _CHECKSUMS]


def is_at_hand(plan: Plan) -> bool:
    """Whether data and tokenizer lie on this machine, or are made here, so that preparing them asks no network."""
    model, data = plan.sections.model, plan.sections.data
    model_is = model.from_scratch or Path(model.name_or_path).is_dir()
    return model_is and all(
        sources.hub_name(source) is None
        for source in [*data.training, *data.held_out, *([data.retention_eval] if data.retention_eval else [])]
    )


def announcement(plan: Plan, details: Mapping[str, Any], seconds: float) -> str:
    """One line on what the data came to, and one on each thing that a user should know before the start."""
    train, validation = details["train"], details["validation"]
    packed = f" packed into {details['rows']:,} rows of {plan.max_length}" if plan.packing else ""
    share = train["supervised_tokens"] / max(train["tokens"], 1)
    retain = details.get("retention_eval")
    retained = f" and {retain['examples']:,} retain examples" if retain else ""
    said = [
        f"data: {train['examples']:,} training examples{packed}, {train['tokens']:,} tokens, {share:.0%} of them "
        f"supervised; {validation['examples']:,} validation examples{retained}; {seconds:.1f} s"
    ]
    for name, counts in (
        ("training", train),
        ("validation", validation),
        *([("retention_eval", retain)] if retain else []),
    ):
        if counts["cut"]:
            said.append(
                f"data: {counts['cut']:,} {name} examples were longer than {plan.max_length} tokens and lost their "
                f"ends; {counts['dropped']:,} were dropped, no answer being left; {counts['unanswered']:,} lost an "
                f"answer with its question (trainer.max_length=… keeps more)"
            )
    if train["markers_as_text"]:
        said.append(f"data: {train['markers_as_text']:,} training rows write control tokens; they are encoded as text")
    said += [f"data: note: {note}" for note in details["notes"]]
    return "\n".join(said)


def _base(plan: Plan, rows_alone: bool) -> Path | None:
    """The folder that the run's tokenizer is in; None for a recipe that starts from nothing."""
    model = plan.sections.model
    if model.from_scratch:
        return None
    if rows_alone:
        return model_files.tokenizer_folder(model.name_or_path, model.revision, model.open_alternative)
    return model_files.check_model(model.name_or_path, model.revision, model.trust_remote_code, model.open_alternative)


def _check_architecture_once(plan: Plan, base: Path, folder: Path) -> None:
    """Building the model to count it takes seconds, so what was found right is remembered."""
    model = plan.sections.model
    remembered = folder / "architecture.json"
    stated = json.dumps([model.architecture, str(base)], sort_keys=True)
    if not remembered.is_file() or remembered.read_text(encoding="utf-8") != stated:
        model_files.check_architecture(model.architecture, base, model.trust_remote_code)
        remembered.write_text(stated, encoding="utf-8")


def _code(file: str) -> str:
    return code_hash(Path(__file__).parent / file)


def _key(plan: Plan, named: Mapping[str, Mapping[str, Source]], base: Path | None) -> str:
    """SHA-256 over all that decides the prepared rows: content, tokenizer, template, lengths, code, libraries.

    `named` are the sources of each part that the recipe names: train, validation and, only where it does, retain.
    """
    model, data = plan.sections.model, plan.sections.data
    beside, template = _beside_the_weights(base), _given_template(model)
    dated = b"strftime_now" in template.encode() or any(b"strftime_now" in text for text in beside.values())
    here = Path(__file__).parent
    code = sorted(str(path.relative_to(here)) for path in here.rglob("*.py") if path.name not in _NOT_THE_ROWS)
    parts = {
        **{part: [[name, source.fingerprint()] for name, source in of_it.items()] for part, of_it in named.items()},
        "validation_fraction": data.validation_fraction,
        "max_eval_samples": data.max_eval_samples,
        "model": asdict(model),
        "tokenizer": {name: hashlib.sha256(text).hexdigest() for name, text in beside.items()},
        "template": template,
        "max_length": plan.max_length,
        "packing": plan.packing,
        "seed": plan.sections.trainer["seed"],
        "data_seed": plan.sections.trainer["data_seed"],
        "date": plan.created[:10] if dated else None,
        "code": {name: _code(name) for name in code},
        "libraries": {name: metadata.version(name) for name in ("transformers", "tokenizers", "trl", "jinja2")},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _beside_the_weights(folder: Path | None) -> dict[str, bytes]:
    """Whatever stands beside a model's weights: configuration, tokenizer, templates."""
    if folder is None:
        return {}
    files = sorted(file for file in folder.rglob("*") if file.suffix in _NO_WEIGHTS and file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files if ".index." not in file.name}


def _given_template(model: Model) -> str:
    """The template that the recipe gives, or its name where there is no such file, which loading it will say."""
    name = model.chat_template or ""
    return Path(name).read_text(encoding="utf-8", errors="replace") if Path(name).is_file() else name


def _make(plan: Plan, named: Mapping[str, Mapping[str, Source]], base: Path | None, folder: Path) -> None:
    with library_imports.swiftly():
        import datasets
        import transformers.models.auto.tokenization_auto

    from sft_recipes.data.tokenize import Chat
    from sft_recipes.data.tokenize_rows import label
    from sft_recipes.data.tokenizer import load_tokenizer

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    started = time.monotonic()
    folder.mkdir(parents=True)
    model = plan.sections.model
    if base is None:
        base = _build(plan, named["train"], bool(named["validation"]), folder / "model")
    tokenizer = load_tokenizer(str(base), model.chat_template, model.trust_remote_code, model.add_tokens)
    chat = Chat(tokenizer, datetime.date.fromisoformat(plan.created[:10]))
    labelled = {
        part: {name: label(source, chat, plan.max_length, f"data.{part}", name) for name, source in of_it.items()}
        for part, of_it in named.items()
    }
    training, held_out = labelled["train"], labelled["validation"]
    if not held_out:
        training, held_out = _split(plan, training)
    held_out, retained = _at_most(plan, held_out), _at_most(plan, labelled.get("retention_eval", {}))
    rows, validation_rows = _write_rows(plan, training, held_out, folder)
    retain_rows = _write_retain(plan, retained, folder)
    _write_prompts(plan, chat, named["validation"] or named["train"], held_out, folder / "prompts.jsonl")
    counted = validate.describe(training, held_out, retained)
    everything = [*training.values(), *held_out.values(), *retained.values()]
    vocabulary = _vocabulary(tokenizer, model.add_tokens, model_files.embeddings_of(base), everything)
    notes = [f"{note} ({many:,} rows)" for note, many in counted["noted"].items()] + vocabulary.pop("notes")
    details = {
        **counted,
        **vocabulary,
        "end_of_turn": tokenizer.convert_ids_to_tokens(counted["end_of_turn_ids"]),
        "padding": tokenizer.pad_token,
        "notes": notes,
        "rows": len(rows),
        "validation_rows": {name: len(part) for name, part in zip(held_out, validation_rows, strict=True)},
        **({"retain_rows": sum(map(len, retain_rows))} if retained else {}),
        "seconds": time.monotonic() - started,
    }
    prepared = Prepared(
        fingerprint=_fingerprint([rows, *validation_rows, *retain_rows]),
        folder=str(folder),
        model=str(base),
        architecture={},
        examples=counted["train"]["examples"],
        rows=len(rows),
        supervised_tokens=counted["train"]["supervised_tokens"],
        tokens=counted["train"]["tokens"],
        validation_rows=sum(map(len, validation_rows)),
        notes=notes,
    )
    write_json(folder / "details.json", details)
    write_json(folder / "prepared.json", asdict(prepared))
    _seal(folder)


def _seal(folder: Path) -> None:
    """Has all of it on the disk, and its checksums beside it."""
    inside = sorted(folder.rglob("*"))
    for path in inside:
        sync(path)
    files = [path for path in inside if path.is_file()]
    write_json(folder / _CHECKSUMS, {str(path.relative_to(folder)): sha256(path) for path in files})


def _write_rows(
    plan: Plan, training: Mapping[str, Labelled], held_out: Mapping[str, Labelled], folder: Path
) -> tuple[Any, list[Any]]:
    """Writes the rows in which something is left to learn; the training rows, and each source's validation rows."""
    from datasets import concatenate_datasets

    from sft_recipes.data.packing import to_dataset
    from sft_recipes.data.tokenize_rows import together

    trained = together([one.take(one.trained > 0) for one in training.values()])
    validated = [one.take(one.trained > 0) for one in held_out.values()]
    rows = to_dataset(trained, plan.max_length, plan.packing)
    validation_rows = [to_dataset(one, plan.max_length, plan.packing) for one in validated]
    rows.save_to_disk(folder / "train")
    concatenate_datasets(validation_rows).save_to_disk(folder / "validation")
    return rows, validation_rows


def _write_retain(plan: Plan, retained: Mapping[str, Labelled], folder: Path) -> list[Any]:
    """Writes the rows of what the model should not forget, as the validation rows are; none where none are named."""
    from sft_recipes.data.packing import to_dataset

    rows = [to_dataset(one.take(one.trained > 0), plan.max_length, plan.packing) for one in retained.values()]
    for one in rows:
        one.save_to_disk(folder / "retention_eval")
    return rows


def _vocabulary(
    tokenizer: Any, add_tokens: list[str], embeddings: int | None, labelled: Sequence[Labelled]
) -> dict[str, Any]:
    """The largest ids in the rows, of all tokens and of those that are not new, and the tokens for which the model's
    embeddings have to grow."""
    import numpy

    from sft_recipes.data.tokenizer import new_tokens

    new = new_tokens(tokenizer, add_tokens)
    ids = numpy.unique(numpy.concatenate([numpy.unique(one.ids) for one in labelled]))
    grown = [token for token, id in new.items() if embeddings is not None and id >= embeddings]
    note = f"new tokens {', '.join(grown)}: the model's embeddings grow from {embeddings or 0:,} rows"
    return {
        "largest_token_id": int(ids.max(initial=0)),
        "largest_known_token_id": int(ids[~numpy.isin(ids, list(new.values()))].max(initial=0)),
        "new_tokens": grown,
        "notes": [note] if grown else [],
    }


def _build(plan: Plan, train: Mapping[str, Source], all_of_it: bool, folder: Path) -> Path:
    """The model of a recipe that starts from nothing; its tokenizer is trained on the training rows."""
    from sft_recipes.data.tokenize_rows import asked_digests
    from sft_recipes.data.toy import toy_model

    texts = []
    for name, source in train.items():
        conversations = [conversation_of(row) for row in source.rows()]
        if not conversations:
            raise DataError(f"data.train: {source.named} holds no rows")
        asked = asked_digests(conversations)
        held_out = set() if all_of_it else _held_out(plan, asked, name)
        for conversation, question in zip(conversations, asked.tolist(), strict=True):
            if question not in held_out:
                texts += [text for message in conversation.messages for text in (message["role"], message["content"])]
    toy_model.build(plan.sections.model.architecture, texts, folder, plan.sections.trainer["seed"])
    return folder


def _fingerprint(made: list[Any]) -> str:
    """SHA-256 over the tokens and labels of the rows, so that a run goes on where code or paths changed and rows did
    not."""
    digest = hashlib.sha256()
    for rows in made:
        for name in ("input_ids", "labels", *(["seq_lengths"] if "seq_lengths" in rows.column_names else [])):
            for chunk in rows.data.column(name).chunks:
                digest.update(chunk.value_lengths().to_numpy().tobytes())
                digest.update(chunk.flatten().to_numpy().tobytes())
    return digest.hexdigest()[:16]


def _held_out(plan: Plan, asked: Any, name: str) -> set[int]:
    """The digests of the questions that a seeded split holds out."""
    questions = sorted(set(asked.tolist()))
    if len(questions) < 2:
        raise DataError(
            f"data.train: all rows of {name} ask the same, so none can be held out; say data.validation=<a file>"
        )
    wanted = round(len(questions) * plan.sections.data.validation_fraction)
    return set(
        random.Random(plan.sections.trainer["data_seed"]).sample(questions, min(max(wanted, 1), len(questions) - 1))
    )


def _split(plan: Plan, training: Mapping[str, Labelled]) -> tuple[dict[str, Labelled], dict[str, Labelled]]:
    """A seeded split of each source, in its written order; conversations with the same opening stay together, over
    all sources, so that none is trained on in one and asked in another."""
    import numpy

    held_out = set().union(*(_held_out(plan, one.asked, name) for name, one in training.items()))
    chosen = {name: numpy.isin(one.asked, sorted(held_out)) for name, one in training.items()}
    for name, mask in chosen.items():
        if mask.all():
            raise DataError(
                f"data.train: every question of {name} is held out with another source's; say data.validation=<a file>"
            )
    return (
        {name: one.take(~chosen[name]) for name, one in training.items()},
        {name: one.take(chosen[name]) for name, one in training.items()},
    )


def _at_most(plan: Plan, held_out: Mapping[str, Labelled]) -> dict[str, Labelled]:
    """No more examples than the recipe wants to evaluate, each source's share of them, a seeded choice."""
    import numpy

    at_most = plan.sections.data.max_eval_samples
    many = sum(map(len, held_out.values()))
    if at_most is None or many <= at_most:
        return dict(held_out)
    generator = numpy.random.default_rng(plan.sections.trainer["data_seed"])
    fewer = {}
    for name, one in held_out.items():
        mask = numpy.zeros(len(one), bool)
        mask[generator.permutation(len(one))[: max(round(at_most * len(one) / many), 1)]] = True
        fewer[name] = one.take(mask)
    return fewer


def _write_prompts(
    plan: Plan, chat: Any, asked: Mapping[str, Source], held_out: Mapping[str, Labelled], file: Path
) -> None:
    """Held-out conversations up to their last answer, a seeded choice, for answers before and after training."""
    wheres = {where for one in held_out.values() for where in one.where}
    chosen = random.Random(plan.sections.trainer["data_seed"]).sample(sorted(wheres), min(len(wheres), _PROMPTS))
    wanted, found = set(chosen), {}
    for row in itertools.chain.from_iterable(source.rows() for source in asked.values()):
        if row.where in wanted:
            found[row.where] = conversation_of(row)
    with file.open("w", encoding="utf-8") as lines:
        for where in chosen:
            *before, answer = found[where].messages
            if answer["content"]:
                lines.write(json.dumps(_prompt(chat, found[where], before, answer), ensure_ascii=False) + "\n")


def _prompt(chat: Any, one: Conversation, before: list[dict[str, Any]], answer: dict[str, Any]) -> dict[str, Any]:
    return {
        "messages": before,
        "answer": answer["content"],
        "answer_tokens": len(chat.tokenizer(answer["content"], add_special_tokens=False)["input_ids"]),
        "input_ids": chat.prompt(before, one.tools, one.where),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
