"""Data preparation on one core, side by side: the tokenizer's own limit, ours, and TRL's as shipped; and packing.

    SFT_GSM8K=train.jsonl SFT_TOKENIZER=tokenizer.json .venv/bin/python benchmarks/data.py

`SFT_GSM8K` names a JSONL file of question/answer rows, `SFT_TOKENIZER` a `tokenizer.json` with ChatML's tokens; where
one is unset, the embedded rows or a tokenizer trained on the spot stand in, and the output says so. First ours and TRL
must give the same tokens and labels. Then every way prepares the same rows on the same core, one after another in each
of several rounds, so that a machine that slows down slows all of them; ratios are taken within a round. Last, ours
alone prepares all rows on all cores. Writes `results/data-N-cores.json`, which names the machine, and prints tables.

Favorable to TRL: its rows are a data set in memory already, as `messages` or `prompt` and
`completion`, and only `SFTTrainer._prepare_dataset` is timed. `ours, whole` reads JSONL and writes packed rows to disk.
"""

from __future__ import annotations

import argparse
import collections
import copy
import datetime
import gc
import hashlib
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

import machine  # noqa: E402
import numpy  # noqa: E402
import pyarrow  # noqa: E402

from sft_recipes.data import packing, tokenize_rows  # noqa: E402
from sft_recipes.data.formats import conversation_of  # noqa: E402
from sft_recipes.data.rows import RowStore  # noqa: E402
from sft_recipes.data.sources import RawRow, Source  # noqa: E402
from sft_recipes.data.tokenize import IGNORED, ConversationTokenizer  # noqa: E402
from sft_recipes.data.toy import toy_dataset, toy_model  # noqa: E402
from sft_recipes.training.library_logging import silence_libraries  # noqa: E402

LIBRARIES = ("tokenizers", "transformers", "datasets", "trl", "torch", "numpy", "pyarrow", "jinja2")
MAX_LENGTH = 4096
CAPACITIES = (4096, 32_768)
ROWS_A_CHUNK = 1000  # as sft_recipes.data.tokenize_rows takes them, and as the map of `datasets` does
CHECKED = 500
WARMING = 200
TODAY = datetime.date(2026, 1, 1)  # ChatML writes no date
STAND_IN_VOCABULARY = 4096

# scratch.CHAT_TEMPLATE with what TRL's assistant-only loss needs: the assistant's text and end of turn, marked.
MARKED_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

LIMIT, LABELLING, WHOLE = "limit", "ours, labelling", "ours, whole"
COMPLETION, ASSISTANT = "TRL, prompt-completion", "TRL, assistant-only"

Row = dict[str, Any]
Example = tuple[tuple[int, ...], tuple[int, ...]]  # token ids and labels


@dataclass(frozen=True)
class Measured:
    """Tokens of the prepared rows without padding, and what preparing them took, all threads together."""

    tokens: int
    seconds: float
    processor_seconds: float
    how: str = ""

    def to_json(self) -> dict[str, Any]:
        """The entry of the results file."""
        found: dict[str, Any] = {
            "tokens_per_second": round(self.tokens / self.seconds),
            "seconds": round(self.seconds, 4),
            "processor_seconds": round(self.processor_seconds, 4),
        }
        return {**found, "how": self.how} if self.how else found


class Stopwatch:
    """Wall time and processor time of a `with` block."""

    def __enter__(self) -> Stopwatch:
        gc.collect()
        self._started = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._started[0]
        self.processor_seconds = time.process_time() - self._started[1]

    def counted(self, tokens: int, how: str = "") -> Measured:
        """What was timed, with what it made."""
        return Measured(tokens, self.seconds, self.processor_seconds, how)


def main() -> None:
    """Measures everything once and writes the results file."""
    arguments = _arguments()
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})  # before the libraries start threads, which inherit it
    environment = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    os.environ.update(environment)
    with tempfile.TemporaryDirectory() as name:
        tempfile.tempdir = name  # where `datasets` keeps what it does not cache
        os.environ["HF_DATASETS_CACHE"] = str(Path(name) / "cache")
        silence_libraries()
        import datasets

        datasets.disable_caching()
        folder = Path(name)
        rows, rows_from = _rows(max(arguments.rows, arguments.compared))
        tokenizer, tokenizer_from = _tokenizer(rows)
        print(f"rows: {rows_from['name']}; tokenizer: {tokenizer_from['name']}", flush=True)
        rows_file = _write(rows[: arguments.rows], folder / "rows.jsonl")
        compared = rows[: arguments.compared]
        compared_file = _write(compared, folder / "compared.jsonl")
        labels = check_labels(compared[:CHECKED], tokenizer, folder)
        rounds = measure_rounds(compared, compared_file, tokenizer, folder, arguments.rounds)
        packed = measure_packing(arguments.lengths, arguments.lengths_for_trl)
        os.sched_setaffinity(0, cores)
        every_core = measure_all_cores(rows_file, tokenizer, folder)
    ratios = _ratios(rounds)
    content = {
        "machine": {**machine.described(), "usable_cores": len(cores)},
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in LIBRARIES},
        "commit": _commit(),
        "rows": {**rows_from, "rows": arguments.rows, "compared": arguments.compared},
        "tokenizer": tokenizer_from,
        "labels": labels,
        "one_core": {
            "tokens": next(iter(rounds[0].values())).tokens,
            "median_tokens_per_second": {way: _median(rounds, way) for way in rounds[0]},
            "median_ratios": ratios,
            "rounds": [{way: measured.to_json() for way, measured in one.items()} for one in rounds],
        },
        "all_cores": every_core,
        "packing": packed,
    }
    print(_tables(content))
    if not arguments.no_write:
        file = REPOSITORY / "benchmarks" / "results" / f"data-{os.cpu_count()}-cores.json"
        file.write_text(json.dumps(content, indent=2) + "\n")
        print(f"written: {file.relative_to(REPOSITORY)}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000, help="rows that ours prepares on all cores")
    parser.add_argument("--compared", type=int, default=20_000, help="rows that every way prepares on one core")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lengths", type=int, default=1_000_000, help="examples to pack")
    parser.add_argument("--lengths-for-trl", type=int, help="examples that TRL packs, where fewer (600 bytes each)")
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    if min(arguments.rows, arguments.compared, arguments.rounds, arguments.lengths) < 1:
        parser.error("wanted at least one row, round and length")
    arguments.lengths_for_trl = min(arguments.lengths_for_trl or arguments.lengths, arguments.lengths)
    return arguments


# What is prepared


def _rows(many: int) -> tuple[list[Row], dict[str, Any]]:
    """Rows of one question and one answer, repeated up to the requested number, each with a unique number."""
    file = os.environ.get("SFT_GSM8K")
    if file:
        content = Path(file).read_bytes()
        base = [json.loads(line) for line in content.decode().splitlines() if line.strip()]
        rows = [
            {**row, "question": f"{row['question']} ({number})"}
            for number, row in enumerate(itertools.islice(itertools.cycle(base), many))
        ]
        origin = {"name": Path(file).name, "sha256": hashlib.sha256(content).hexdigest(), "distinct_rows": len(base)}
        return rows, origin
    # TRL's prompt-completion trains on the last answer alone, so rows have one.
    base = [row for row in toy_dataset.rows(toy_dataset.TRAIN_ROWS, held_out=False) if _answers(row["messages"]) == 1]
    rows = [copy.deepcopy(row) for row in itertools.islice(itertools.cycle(base), many)]
    for number, row in enumerate(rows):
        asked = next(message for message in row["messages"] if message["role"] == "user")
        asked["content"] += f" ({number})"
    return rows, {"name": "embedded rows (SFT_GSM8K is not set)", "distinct_rows": len(base)}


def _answers(messages: list[Row]) -> int:
    return sum(message["role"] == "assistant" for message in messages)


def _messages(row: Row) -> list[Row]:
    return conversation_of(RawRow(row, "benchmark")).messages


def _tokenizer(rows: list[Row]) -> tuple[Any, dict[str, Any]]:
    """The tokenizer with ChatML, and where it is from."""
    from transformers import PreTrainedTokenizerFast

    file = os.environ.get("SFT_TOKENIZER")
    if not file:
        texts = (message["content"] for row in rows[: 2 * ROWS_A_CHUNK] for message in _messages(row))
        found = toy_model.train_tokenizer(texts, STAND_IN_VOCABULARY)
        return found, {"name": "trained on these rows (SFT_TOKENIZER is not set)", "vocabulary": len(found)}
    found = PreTrainedTokenizerFast(
        tokenizer_file=file,
        eos_token=toy_model.END,
        pad_token=toy_model.PADDING,
        additional_special_tokens=[toy_model.START, toy_model.END_OF_TEXT],
    )
    found.chat_template = toy_model.CHAT_TEMPLATE
    digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    return found, {"name": Path(file).name, "sha256": digest, "vocabulary": len(found)}


def _write(rows: Iterable[Row], file: Path) -> Path:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def _chunks(rows: Iterable[Any]) -> Iterator[list[Any]]:
    rest = iter(rows)
    while chunk := list(itertools.islice(rest, ROWS_A_CHUNK)):
        yield chunk


# The ways


def _fresh(tokenizer: Any) -> Any:
    """A copy that has seen no text: a tokenizer keeps the words it met, and every run starts without any."""
    return copy.deepcopy(tokenizer)


def limit(texts: list[str], tokenizer: Any) -> Measured:
    """The tokenizer alone on texts that are rendered already, by the faster of its two calls."""
    found = []
    for how in ("encode_batch", "encode_batch_fast"):  # the latter tells no offsets, without which nothing is masked
        encode = getattr(_fresh(tokenizer).backend_tokenizer, how)
        tokens = 0
        with Stopwatch() as watch:
            for chunk in _chunks(texts):
                tokens += sum(map(len, encode(chunk, add_special_tokens=False)))
        found.append(watch.counted(tokens, how))
    return min(found, key=lambda one: one.seconds)


def ours_labelling(rows: list[RawRow], tokenizer: Any) -> Measured:
    """From rows in memory to labelled tokens."""
    chat = ConversationTokenizer(_fresh(tokenizer), TODAY)
    with Stopwatch() as watch:
        parts = [tokenize_rows.tokenize_chunk(chunk, chat, MAX_LENGTH) for chunk in _chunks(rows)]
    return watch.counted(sum(len(part.input_ids) for part in parts))


def ours_whole(file: Path, tokenizer: Any, target: Path) -> Measured:
    """From a file to packed rows on disk."""
    tokenizer = _fresh(tokenizer)
    with Stopwatch() as watch:
        chat = ConversationTokenizer(tokenizer, TODAY)
        store = RowStore(target.parent)
        for chunk in Source(files=(file,)).chunks():
            store.append(tokenize_rows.tokenize_chunk([*chunk.rows()], chat, MAX_LENGTH))
        prepared = _write_rows(store, target, packed=True)
    return watch.counted(_tokens(prepared))


def _write_rows(store: RowStore, target: Path, packed: bool) -> Any:
    from datasets import load_from_disk

    packing.write_dataset(target, packing.TrainerRows.arrange(store.read(), MAX_LENGTH, packed).tables())
    return load_from_disk(str(target))


def through_trl(rows: Any, way: str, tokenizer: Any, folder: Path, packed: bool = True) -> tuple[Any, Measured]:
    """What `SFTTrainer` makes of a data set before it trains, in this process, and what that took."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    class Timed(SFTTrainer):
        def _prepare_dataset(self, *arguments: Any, **named: Any) -> Any:
            with Stopwatch() as self.watch:
                self.prepared = super()._prepare_dataset(*arguments, **named)
            return self.prepared

    tokenizer = _fresh(tokenizer)
    tokenizer.chat_template = MARKED_TEMPLATE if way == ASSISTANT else toy_model.CHAT_TEMPLATE
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size))
    loss = {"assistant_only_loss": True} if way == ASSISTANT else {"completion_only_loss": True}
    settings = SFTConfig(
        output_dir=str(folder / "trl"),
        max_length=MAX_LENGTH,
        packing=packed,
        packing_strategy="bfd",
        dataset_num_proc=None,  # in this process
        use_cpu=True,
        bf16=False,
        report_to="none",
        **loss,
    )
    trainer = Timed(model=model, args=settings, train_dataset=rows, processing_class=tokenizer)
    return trainer.prepared, trainer.watch.counted(_tokens(trainer.prepared))


def _for_trl(rows: Iterable[Row], way: str) -> Any:
    """The rows as the data set that this way of TRL reads."""
    from datasets import Dataset

    said = [_messages(row) for row in rows]
    if way == ASSISTANT:
        return Dataset.from_list([{"messages": messages} for messages in said])
    return Dataset.from_list([{"prompt": messages[:-1], "completion": messages[-1:]} for messages in said])


def _tokens(prepared: Any) -> int:
    if "seq_lengths" in prepared.column_names:
        return sum(map(sum, prepared["seq_lengths"]))
    return sum(map(len, prepared["input_ids"]))


# What is compared


def check_labels(rows: list[Row], tokenizer: Any, folder: Path) -> dict[str, Any]:
    """That ours and both ways of TRL give the same examples; otherwise says how they differ, and ends."""
    raw = [RawRow(row, f"row {number}") for number, row in enumerate(rows, start=1)]
    store = RowStore(folder)
    store.append(tokenize_rows.tokenize_chunk(raw, ConversationTokenizer(tokenizer, TODAY), MAX_LENGTH))
    ours = _examples(_write_rows(store, folder / "checked", packed=False))
    differences = []
    for way in (COMPLETION, ASSISTANT):
        prepared, _ = through_trl(_for_trl(rows, way), way, tokenizer, folder, packed=False)
        theirs = _examples(prepared)
        if collections.Counter(ours) != collections.Counter(theirs):
            differences += [f"{way}: {line}" for line in _differences(ours, theirs, tokenizer)]
    if differences:
        sys.exit("\n".join(["ours and TRL do not prepare the same examples", *differences]))
    supervised = sum(label != IGNORED for _, labels in ours for label in labels)
    print(f"labels: {len(ours)} examples, the same tokens and labels from ours and both ways of TRL", flush=True)
    tokens = sum(len(ids) for ids, _ in ours)
    return {"examples": len(ours), "tokens": tokens, "supervised_tokens": supervised, "same": [COMPLETION, ASSISTANT]}


def _examples(prepared: Any) -> list[Example]:
    return [(tuple(row["input_ids"]), tuple(row["labels"])) for row in prepared]


def _differences(ours: list[Example], theirs: list[Example], tokenizer: Any) -> Iterator[str]:
    """How many examples differ, and how the first of each side does."""
    only_ours = collections.Counter(ours) - collections.Counter(theirs)
    only_theirs = collections.Counter(theirs) - collections.Counter(ours)
    yield f"{len(ours)} examples of ours, {len(theirs)} of TRL's"
    yield f"{only_ours.total()} stand in ours alone, {only_theirs.total()} in TRL's alone"
    for whose, examples, others in (("ours", only_ours, only_theirs), ("TRL", only_theirs, only_ours)):
        if not examples:
            continue
        ids, labels = next(iter(examples))
        yield f"{whose} has {tokenizer.decode(ids)!r}, trained on {sum(label != IGNORED for label in labels)} tokens"
        other = next((its for its_ids, its in others if its_ids == ids), None)
        if other is None:
            yield "  which the other has not with the same tokens"
        else:
            places = [place for place, pair in enumerate(zip(labels, other, strict=True)) if pair[0] != pair[1]]
            yield f"  the other labels tokens {places[:10]} otherwise: {tokenizer.decode([ids[at] for at in places])!r}"


def measure_rounds(rows: list[Row], file: Path, tokenizer: Any, folder: Path, rounds: int) -> list[dict[str, Measured]]:
    """Every way in each round, beginning with another one each time; ends where they disagree on the tokens."""
    for_trl = {way: _for_trl(rows, way) for way in (COMPLETION, ASSISTANT)}
    few = _write(rows[:WARMING], folder / "few.jsonl")
    warming = _ways(rows[:WARMING], few, tokenizer, folder, {way: _for_trl(rows[:WARMING], way) for way in for_trl})
    ways = _ways(rows, file, tokenizer, folder, for_trl)
    for way in warming.values():  # imports and compiled templates
        way()
    gc.collect()
    gc.freeze()  # the rows that wait here are no way's own, and no collection shall go through them
    found = []
    for number in range(rounds):
        names = collections.deque(ways)
        names.rotate(-number)
        measured = {way: ways[way]() for way in names}
        found.append({way: measured[way] for way in ways})
        speeds = ", ".join(f"{way} {_speed(found[-1][way]):,.0f}" for way in ways)
        print(f"round {number + 1} of {rounds}, tokens/s: {speeds}", flush=True)
        tokens = {way: one.tokens for way, one in found[-1].items()}
        if len(set(tokens.values())) > 1:
            sys.exit(f"the ways do not prepare the same tokens (rows longer than {MAX_LENGTH}?): {tokens}")
    gc.unfreeze()
    return found


def _ways(
    rows: list[Row], file: Path, tokenizer: Any, folder: Path, for_trl: dict[str, Any]
) -> dict[str, Callable[[], Measured]]:
    texts = [tokenizer.apply_chat_template(_messages(row), tokenize=False) for row in rows]
    raw = list(Source(files=(file,)).rows())
    return {
        LIMIT: lambda: limit(texts, tokenizer),
        LABELLING: lambda: ours_labelling(raw, tokenizer),
        WHOLE: lambda: ours_whole(file, tokenizer, folder / "prepared"),
        COMPLETION: lambda: through_trl(for_trl[COMPLETION], COMPLETION, tokenizer, folder)[1],
        ASSISTANT: lambda: through_trl(for_trl[ASSISTANT], ASSISTANT, tokenizer, folder)[1],
    }


def _speed(one: Measured) -> float:
    return one.tokens / one.seconds


def _median(rounds: list[dict[str, Measured]], way: str) -> int:
    return round(statistics.median(_speed(one[way]) for one in rounds))


def _ratios(rounds: list[dict[str, Measured]]) -> dict[str, dict[str, float]]:
    """How many times as fast each way is as each other: the median over the rounds of the ratio within a round."""
    return {
        way: {
            other: round(statistics.median(_speed(one[way]) / _speed(one[other]) for one in rounds), 3)
            for other in rounds[0]
            if other != way
        }
        for way in rounds[0]
    }


def measure_all_cores(file: Path, tokenizer: Any, folder: Path) -> dict[str, Any]:
    """Ours on all cores that this process may use, from a file to labelled tokens, and from there to packed rows."""
    chat, source, store = ConversationTokenizer(_fresh(tokenizer), TODAY), Source(files=(file,)), RowStore(folder)
    before = os.times()
    with Stopwatch() as reading:
        tokenize_rows.tokenize_source(source, chat, "data.train", store, MAX_LENGTH)
    after = os.times()
    with Stopwatch() as writing:
        tokens = _tokens(_write_rows(store, folder / "all", packed=True))
    return {
        "cores": len(os.sched_getaffinity(0)),
        "rows": store.rows,
        "tokens": tokens,
        "labelling_seconds": round(reading.seconds, 2),
        "processor_seconds": round(sum(after[:4]) - sum(before[:4]), 2),  # with the workers', which are gone by now
        "packing_and_writing_seconds": round(writing.seconds, 2),
        "rows_per_second": round(store.rows / reading.seconds),
        "tokens_per_second": round(tokens / reading.seconds),
    }


def measure_packing(many: int, many_for_trl: int) -> dict[str, Any]:
    """Ours over all lengths at once, and `trl.pack_dataset` as shipped, a thousand examples at a time.

    TRL's seconds hold moving one column of single bytes, the least that it can be given; ours only decide.
    """
    drawn = numpy.random.default_rng(0).lognormal(numpy.log(612) - 0.5, 1.0, many)
    lengths = numpy.clip(drawn.round().astype(numpy.int64), 1, 4096)
    found = []
    for capacity in CAPACITIES:
        with Stopwatch() as watch:
            order, sizes = packing.pack(lengths, capacity)
        if not (numpy.sort(order) == numpy.arange(many)).all():
            sys.exit(f"ours lost or repeated examples at {capacity}")
        row_starts = numpy.cumsum(sizes) - sizes
        if numpy.add.reduceat(lengths[order], row_starts).max() > capacity:
            sys.exit(f"ours filled a row beyond {capacity}")
        found.append(_packed("ours", capacity, int(lengths.sum()), many, len(sizes), watch))
    fewer = lengths[:many_for_trl]
    examples = _dummies(fewer)
    for capacity in CAPACITIES:
        from trl import pack_dataset

        with Stopwatch() as watch:
            rows = pack_dataset(examples, capacity, "bfd")
        tokens = _flat_tokens(rows)
        if tokens != int(fewer.sum()):
            sys.exit(f"TRL packed {tokens} of {int(fewer.sum())} tokens into {capacity}")
        found.append(_packed("TRL, bfd, as shipped", capacity, tokens, many_for_trl, len(rows), watch))
    return {"mean_length": round(float(lengths.mean()), 1), "ways": found}


def _packed(way: str, capacity: int, tokens: int, examples: int, rows: int, watch: Stopwatch) -> dict[str, Any]:
    return {
        "way": way,
        "capacity": capacity,
        "examples": examples,
        "rows": rows,
        "seconds": round(watch.seconds, 3),
        "non_padding": round(tokens / (rows * capacity), 5),
    }


def _dummies(lengths: numpy.ndarray) -> Any:
    """Examples of these lengths whose ids are all nought."""
    from datasets import Dataset
    from datasets.table import InMemoryTable

    ends = pyarrow.array(numpy.concatenate([[0], numpy.cumsum(lengths)]), pyarrow.int32())
    ids = pyarrow.array(numpy.zeros(int(lengths.sum()), numpy.int8))
    return Dataset(InMemoryTable(pyarrow.table({"input_ids": pyarrow.ListArray.from_arrays(ends, ids)})))


def _flat_tokens(rows: Any) -> int:
    return sum(len(chunk.flatten()) for chunk in rows.data.column("input_ids").chunks)


# Output


def _tables(content: dict[str, Any]) -> str:
    one, every = content["one_core"], content["all_cores"]
    against = (LIMIT, COMPLETION, ASSISTANT)
    lines = [
        f"\n{content['rows']['compared']:,} rows of {one['tokens']:,} tokens on one core, median of "
        f"{len(one['rounds'])} rounds; to the right, how many times as fast as",
        f"{'':24}{'tokens/s':>12}" + "".join(f"{way:>24}" for way in against),
    ]
    for way, speed in one["median_tokens_per_second"].items():
        ratios = "".join(f"{one['median_ratios'][way].get(other, 1.0):>24.2f}" for other in against)
        lines.append(f"{way:24}{speed:>12,}{ratios}")
    shares = [way["processor_seconds"] / way["seconds"] for rounds in one["rounds"] for way in rounds.values()]
    busy = every["processor_seconds"] / every["labelling_seconds"]
    lines += [
        f"each had {min(shares):.2f} to {max(shares):.2f} processors",
        f"\nours on {every['cores']} cores: {every['rows']:,} rows of {every['tokens']:,} tokens labelled in "
        f"{every['labelling_seconds']} s,",
        f"{every['rows_per_second']:,} rows/s and {every['tokens_per_second']:,} tokens/s with {busy:.2f} processors; "
        f"packed and written in {every['packing_and_writing_seconds']} s more",
        f"\npacking lengths of {content['packing']['mean_length']} on average",
        f"{'':24}{'into':>10}{'examples':>12}{'seconds':>10}{'non-padding':>14}",
    ]
    for way in content["packing"]["ways"]:
        lines.append(
            f"{way['way']:24}{way['capacity']:>10,}{way['examples']:>12,}{way['seconds']:>10.2f}"
            f"{way['non_padding']:>14.5f}"
        )
    return "\n".join(lines)


def _commit() -> dict[str, Any]:
    """The commit, and whether the working tree differs from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout

    return {"commit": git("rev-parse", "HEAD").strip(), "dirty": bool(git("status", "--porcelain").strip())}


if __name__ == "__main__":
    main()
