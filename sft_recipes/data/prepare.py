"""Prepares a plan's data once a node, before any rank starts, and keeps it by what it was made from.

Run as `python -m sft_recipes.data.prepare PLAN`: reads, checks, renders, tokenizes, masks and packs the rows, builds
the model of a recipe that starts from nothing, and writes `prepared.json` beside the plan. Leaves with 2 where the
user's input is wrong. A second start with the same data, tokenizer, template, lengths and code finds it all there.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from sft_recipes.data import hub, sources
from sft_recipes.data.formats import Message, messages_of
from sft_recipes.data.sources import Source
from sft_recipes.planning import plan as plans
from sft_recipes.planning.memory import DENSE_KEYS, DENSE_KINDS, parameter_count
from sft_recipes.planning.plan import Plan, Prepared
from sft_recipes.planning.run_folder import runs_root, write_json
from sft_recipes.planning.schema import Data, RecipeError

_RENDERED_TOGETHER = 1000


@dataclass(frozen=True)
class Conversation:
    """A checked conversation and where it was written."""

    messages: list[Message]
    where: str


@dataclass
class Seen:
    """Token ids that stood in the rows."""

    end_of_turn_ids: set[int] = field(default_factory=set)
    largest_token_id: int = 0


@dataclass(frozen=True)
class Counts:
    """What became of a source's rows; tokens count each example's own, before packing."""

    examples: int
    cut: int
    dropped: int
    tokens: int
    supervised_tokens: int
    rows: int


def main(plan_file: str) -> int:
    """Prepares the data of the plan in `plan_file`; 0, or 2 with one line on standard error."""
    path = Path(plan_file)
    try:
        prepared = prepare(plans.read(path), runs_root() / ".prepared")
    except (RecipeError, OSError) as error:  # a disk that is full or closed is the user's to mend
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    write_json(path.with_name("prepared.json"), asdict(prepared))
    return 0


def prepare(plan: Plan, store: Path) -> Prepared:
    """The plan's data, made or found in `store`.

    Raises:
        RecipeError: rows, model or tokenizer are not what a run can start from.
    """
    data, model = Data(**plan.sections["data"]), plan.sections["model"]
    base: Path | None = None
    if not model["from_scratch"]:
        base = check_model(model["name_or_path"], model["revision"], model["trust_remote_code"], model["ungated"])
    embedded = store / f"embedded-{hashlib.sha256(_code('embedded.py').encode()).hexdigest()[:8]}"
    train = sources.resolve(data.train, "data.train", embedded, data.revision_of(data.train))
    validation = (
        sources.resolve(data.validation, "data.validation", embedded, data.revision_of(data.validation))
        if data.validation
        else None
    )
    key = _key(plan, train, validation, base)
    folder = store / key
    if not (folder / "prepared.json").is_file():
        partial = store / f"{key}.{os.getpid()}.partial"
        try:
            _make(plan, train, validation, base, partial)
            shutil.rmtree(folder, ignore_errors=True)
            partial.replace(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    found = json.loads((folder / "prepared.json").read_text(encoding="utf-8"))
    base = base or (folder / "model").resolve()
    here = {"folder": str(folder.resolve()), "model": str(base), "architecture": architecture_of(base)}
    return Prepared(**{**found, **here})


def _code(file: str) -> str:
    return Path(__file__).with_name(file).read_text(encoding="utf-8")


def check_model(name_or_path: str, revision: str | None, trust_remote_code: bool, ungated: str | None = None) -> Path:
    """The folder of a whole model: a local one, or the Hub's, brought where it is not there.

    Raises:
        RecipeError: no such folder, no config, no weights, a shard missing, or code that would have to run.
    """
    key = "model.name_or_path"
    folder = Path(os.path.expanduser(name_or_path))  # noqa: PTH111  Path's own raises for a user that is not there
    if not folder.is_dir():
        if (
            name_or_path.startswith((".", "/", "~"))
            or name_or_path.count("/") > 1
            or any(c.isspace() for c in name_or_path)
        ):
            raise RecipeError(
                f"{key}: no folder {name_or_path!r}; name a folder with config.json and weights, or a Hub name"
            )
        folder = hub.model(name_or_path, revision, ungated)
    config = folder / "config.json"
    if not config.is_file():
        raise RecipeError(f"{key}: {folder} has no config.json; name the folder that save_pretrained wrote")
    if not any(folder.glob("*.safetensors")):
        other = "; weights in *.bin are pickles: convert them to safetensors" if any(folder.glob("*.bin")) else ""
        raise RecipeError(f"{key}: {folder} has no weights (*.safetensors){other}")
    index = folder / "model.safetensors.index.json"
    shards = set(_json_of(index).get("weight_map", {}).values()) if index.is_file() else set()
    missing = sorted(shard for shard in shards if not (folder / shard).is_file())
    if missing:
        raise RecipeError(f"{key}: {folder} lacks {', '.join(missing)}, which its index names; bring the whole model")
    if not trust_remote_code and "auto_map" in _json_of(config):
        raise RecipeError(
            f"{key}: {folder} wants its own code to run (auto_map); say model.trust_remote_code=true if you trust it"
        )
    return folder


def architecture_of(folder: Path) -> dict[str, Any]:
    """The numbers of a model's configuration that forecasts are made from; nothing for a kind that they do not know."""
    config = _json_of(folder / "config.json")
    if config.get("model_type") not in DENSE_KINDS:
        return {}
    wanted = (*DENSE_KEYS, "model_type", "num_key_value_heads", "head_dim", "tie_word_embeddings", "attention_bias")
    return {key: config[key] for key in wanted if config.get(key) is not None}


def check_architecture(stated: dict[str, Any], folder: Path, trust_remote_code: bool) -> None:
    """Refuses a recipe whose numbers are not its model's: memory and time were worked out from them.

    Raises:
        RecipeError: the model's own config says otherwise, or the model has another number of parameters.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if not stated:
        return
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    wrong = [f"{key} {value!r}, not {getattr(config, key, None)!r}" for key, value in stated.items()
             if getattr(config, key, None) != value]  # fmt: skip
    if wrong:
        raise RecipeError(
            f"model.architecture: the recipe says {'; '.join(wrong)} as {folder / 'config.json'} does; correct it: "
            f"memory and time are worked out from it"
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    counted, planned = model.num_parameters(), parameter_count(stated)
    if planned is not None and counted != planned:
        raise RecipeError(
            f"model.architecture: the model has {counted:,} parameters and the plan counts {planned:,}; it is no dense "
            f"Llama-shaped model: leave model.architecture out, and the plan makes no forecast"
        )


def _json_of(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecipeError(f"model.name_or_path: {file} is not JSON ({error}); bring the whole model") from error
    if not isinstance(content, dict):
        raise RecipeError(f"model.name_or_path: {file} holds no JSON object; bring the whole model")
    return content


def _key(plan: Plan, train: Source, validation: Source | None, base: Path | None) -> str:
    """SHA-256 over all that decides the prepared rows: content, tokenizer, template, lengths, code, libraries."""
    model = plan.sections["model"]
    parts = {
        "train": train.fingerprint(),
        "validation": validation.fingerprint() if validation else plan.sections["data"]["validation_fraction"],
        "model": model,
        "tokenizer": _tokenizer_files(base),
        "template": _given_template(model),
        "max_length": plan.max_length,
        "packing": plan.packing,
        "dropped_at_most": plan.sections["data"]["dropped_at_most"],
        "validation_at_most": plan.sections["data"]["validation_at_most"],
        "seed": plan.sections["trainer"]["seed"],
        "data_seed": plan.sections["trainer"]["data_seed"],
        "date": plan.created[:10] if _may_write_the_date(model, base) else None,
        "code": {path.name: _code(path.name) for path in sorted(Path(__file__).parent.glob("*.py"))},
        "libraries": {name: metadata.version(name) for name in ("transformers", "tokenizers", "trl", "jinja2")},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _tokenizer_files(folder: Path | None) -> dict[str, str]:
    if folder is None:
        return {}
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "config.json")
    return {name: _text_of(folder / name) for name in names if (folder / name).is_file()}


def _text_of(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")


def _may_write_the_date(model: dict[str, Any], base: Path | None) -> bool:
    """Whether the template may ask for today's date."""
    return "strftime_now" in _given_template(model) + "".join(_tokenizer_files(base).values())


def _given_template(model: dict[str, Any]) -> str:
    """The template that the recipe gives, or its name where there is no such file, which loading it will say."""
    name = model["chat_template"] or ""
    return _text_of(Path(name)) if Path(name).is_file() else name


def _make(plan: Plan, train: Source, validation: Source | None, base: Path | None, folder: Path) -> None:
    import datasets
    import transformers

    from sft_recipes.data.chat import Chat, load_tokenizer

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    started = time.monotonic()
    training = _conversations(train, "data.train")
    if validation is not None:
        held_out = _conversations(validation, "data.validation")
    else:
        training, held_out = _split(training, plan.sections["data"]["validation_fraction"], plan)
    held_out = _at_most(held_out, plan)
    folder.mkdir(parents=True)
    model = plan.sections["model"]
    if base is not None:
        check_architecture(model["architecture"], base, model["trust_remote_code"])
    else:
        from sft_recipes.data import scratch

        base = folder / "model"
        texts = [text for one in training for message in one.messages for text in message.values()]
        scratch.build(model["architecture"], texts, base, plan.sections["trainer"]["seed"])
    tokenizer = load_tokenizer(str(base), None, model["chat_template"], model["trust_remote_code"])
    chat = Chat(tokenizer, datetime.date.fromisoformat(plan.created[:10]))
    seen = Seen()
    counts = _write_rows(plan, chat, training, folder / "train", "data.train", seen)
    held_out_counts = _write_rows(plan, chat, held_out, folder / "validation", "data.validation", seen)
    _write_prompts(chat, held_out, folder / "prompts.jsonl", plan.sections["trainer"]["data_seed"])
    prepared = Prepared(
        fingerprint=_fingerprint(folder),
        folder=str(folder),
        model=str(base),
        architecture={},
        examples=counts.examples,
        rows=counts.rows,
        supervised_tokens=counts.supervised_tokens,
        tokens=counts.tokens,
        validation_rows=held_out_counts.rows,
    )
    ids = {"end_of_turn_ids": sorted(seen.end_of_turn_ids), "largest_token_id": seen.largest_token_id}
    write_json(folder / "details.json", {"train": asdict(counts), "validation": asdict(held_out_counts), **ids})
    write_json(folder / "prepared.json", asdict(prepared))
    _report(plan, counts, held_out_counts, time.monotonic() - started)


def _fingerprint(folder: Path) -> str:
    """SHA-256 over the rows that were made, so that a run goes on where code changed and rows did not."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*/*.arrow")):
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:16]


def _conversations(source: Source, key: str) -> list[Conversation]:
    found = [Conversation(messages_of(row), row.where) for row in source.rows()]
    if not found:
        named = source.hub_name or ", ".join(str(file) for file in source.files)
        raise RecipeError(f"{key}: {named} holds no rows")
    return found


def _split(rows: list[Conversation], fraction: float, plan: Plan) -> tuple[list[Conversation], list[Conversation]]:
    """A seeded split, both halves in their written order; conversations with the same opening stay together."""
    openings = sorted({_opening(row) for row in rows})
    if len(openings) < 2:
        raise RecipeError("data.train: all rows ask the same, so none can be held out; say data.validation=<a file>")
    wanted = min(max(round(len(openings) * fraction), 1), len(openings) - 1)
    held_out = set(random.Random(plan.sections["trainer"]["data_seed"]).sample(openings, wanted))
    return [row for row in rows if _opening(row) not in held_out], [row for row in rows if _opening(row) in held_out]


def _at_most(held_out: list[Conversation], plan: Plan) -> list[Conversation]:
    """No more validation examples than the recipe wants, a seeded choice in their written order."""
    at_most = plan.sections["data"]["validation_at_most"]
    if at_most is None or len(held_out) <= at_most:
        return held_out
    chosen = random.Random(plan.sections["trainer"]["data_seed"]).sample(range(len(held_out)), at_most)
    return [held_out[index] for index in sorted(chosen)]


def _opening(row: Conversation) -> str:
    asked = next(message["content"] for message in row.messages if message["role"] == "user")
    return " ".join(asked.split())


def _write_rows(plan: Plan, chat: Any, conversations: list[Conversation], folder: Path, key: str, seen: Seen) -> Counts:
    from sft_recipes.data.chat import IGNORED, Tokenized
    from sft_recipes.data.packing import to_dataset

    kept, cut, tokens, supervised = [], 0, 0, 0
    for one in _tokenized(chat, conversations):
        seen.end_of_turn_ids |= chat.end_of_turn_ids(one)
        seen.largest_token_id = max(seen.largest_token_id, *one.input_ids)
        whole = len(one.input_ids)
        short = Tokenized(one.input_ids[: plan.max_length], one.labels[: plan.max_length])
        # The first token is never predicted, so a label there is none.
        trained = sum(label != IGNORED for label in short.labels[1:])
        cut += whole > plan.max_length
        if trained:
            kept.append(short)
            tokens += len(short.input_ids)
            supervised += trained
    dropped = len(conversations) - len(kept)
    at_most = plan.sections["data"]["dropped_at_most"]
    if dropped > at_most * len(conversations):
        raise RecipeError(
            f"{key}: trainer.max_length={plan.max_length} leaves {dropped} of {len(conversations)} rows without a "
            "token to "
            f"learn from, more than data.dropped_at_most={at_most:g}; say a larger trainer.max_length"
        )
    rows = to_dataset(kept, plan.max_length, plan.packing)
    rows.save_to_disk(folder)
    return Counts(len(kept), cut, dropped, tokens, supervised, len(rows))


def _tokenized(chat: Any, conversations: Sequence[Conversation]) -> Iterator[Any]:
    for first in range(0, len(conversations), _RENDERED_TOGETHER):
        part = conversations[first : first + _RENDERED_TOGETHER]
        rendered = [chat.render(one.messages, one.where) for one in part]
        yield from chat.tokenize(rendered, [one.where for one in part])


def _write_prompts(chat: Any, held_out: list[Conversation], file: Path, seed: int) -> None:
    """The held-out conversations up to their last answer, shuffled, for answers before and after training."""
    shuffled = random.Random(seed).sample(held_out, len(held_out))
    with file.open("w", encoding="utf-8") as lines:
        for one in shuffled[:1000]:
            *before, answer = one.messages
            line = {
                "messages": before,
                "answer": answer["content"],
                "answer_tokens": len(chat.tokenizer(answer["content"], add_special_tokens=False)["input_ids"]),
                "input_ids": chat.prompt(before, one.where),
            }
            lines.write(json.dumps(line, ensure_ascii=False) + "\n")


def _report(plan: Plan, train: Counts, validation: Counts, seconds: float) -> None:
    packed = f" packed into {train.rows:,} rows of {plan.max_length}" if plan.packing else ""
    share = train.supervised_tokens / max(train.tokens, 1)
    print(
        f"data: {train.examples:,} training examples{packed}, {train.tokens:,} tokens, {share:.0%} of them supervised; "
        f"{validation.examples:,} validation examples; {seconds:.1f} s"
    )
    for name, counts in (("training", train), ("validation", validation)):
        if counts.cut:
            print(
                f"data: {counts.cut:,} {name} examples were longer than {plan.max_length} tokens and lost their ends; "
                f"{counts.dropped:,} of them were dropped, no answer being left (trainer.max_length=… keeps more)"
            )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
