"""The built-in toy dataset: small chats in which a rule determines each answer from its prompt.

A model with random weights learns these rules within minutes on a CPU, so a run of the complete pipeline can be judged
by exact match. Nothing is downloaded: `write` generates all rows from a seed.

The split does not depend on the seed. The checksum of a question's subject (the letters or numbers it is about) assigns
the question, in every phrasing, to training or to validation, so the two files share no prompt with a subject.
"""

import json
import random
import zlib
from collections.abc import Callable
from pathlib import Path

import yaml

from sft_recipes.runtime.atomic_write import write_atomic

Row = dict[str, list[dict[str, str]]]

TRAIN_ROWS = 12_000
VALIDATION_ROWS = 400
HELD_OUT_SHARE = 0.1  # of the subjects of every task
SYSTEM_SHARE = 0.2
MULTI_TURN_SHARE = 0.3  # of the rows of single-turn tasks

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
_WORDS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
TASKS: dict[str, list[str]] = _WORDS["tasks"]
REMEMBER: list[str] = _WORDS["remember"]
SYSTEM_PROMPTS: list[str] = _WORDS["system_prompts"]


def _digits(rng: random.Random) -> str:
    return "".join(rng.choices("0123456789", k=4))


def _letters(rng: random.Random, least: int, most: int) -> str:
    return " ".join(rng.choices(ALPHABET, k=rng.randint(least, most)))


def _sum_without_carry(rng: random.Random) -> str:
    tens, ones, more = rng.randint(1, 9), rng.randint(0, 8), rng.randint(1, 9)
    return f"{tens}{ones} + {min(more, 9 - ones)}"


# How each task draws a subject and answers it.
_RULES: dict[str, tuple[Callable[[random.Random], str], Callable[[str], str]]] = {
    "reverse": (_digits, lambda digits: digits[::-1]),
    "sort": (lambda rng: "".join(rng.sample("0123456789", 3)), lambda digits: "".join(sorted(digits))),
    "spell": (_digits, lambda digits: " ".join(_WORDS["digits"][int(digit)] for digit in digits)),
    "largest": (_digits, max),
    "add": (_sum_without_carry, lambda terms: str(sum(map(int, terms.split(" + "))))),
    "capitals": (lambda rng: " ".join(rng.choices(ALPHABET, k=4)), str.upper),
    "last": (lambda rng: _letters(rng, 3, 6), lambda letters: letters[-1]),
    "count": (lambda rng: _letters(rng, 2, 7), lambda letters: str(len(letters.split()))),
}


def _is_held_out(task: str, subject: str) -> bool:
    return zlib.crc32(f"{task} {subject}".encode()) < HELD_OUT_SHARE * 2**32


def _draw(rng: random.Random, task: str, held_out: bool) -> tuple[str, str]:
    """Draw a question of a task and its answer from one side of the split."""
    draw, answer = _RULES[task]
    while True:
        subject = draw(rng)
        if _is_held_out(task, subject) == held_out:
            return rng.choice(TASKS[task]).format(subject), answer(subject)


def _draw_remember(rng: random.Random, held_out: bool) -> tuple[tuple[str, str], tuple[str, str]]:
    """Draw two turns: the first states what a person has, the second asks for it."""
    while True:
        name = f"{rng.choice(_WORDS['first_names'])} {rng.choice(_WORDS['last_names'])}"
        if _is_held_out("remember", name) == held_out:
            fact = f"{name} has a {rng.choice(_WORDS['things'])}."
            return (f"Remember: {fact}", "Noted."), (rng.choice(REMEMBER).format(name), fact)


def _row(rng: random.Random, task: str, held_out: bool) -> Row:
    """Draw a chat whose last turn is of the given task."""
    others = [_draw(rng, rng.choice(list(TASKS)), held_out) for _ in range(rng.randint(1, 2))]
    if task == "remember":
        fact, question = _draw_remember(rng, held_out)
        turns = [fact, *others[: rng.randint(0, 1)], question]
    else:
        turns = [*(others if rng.random() < MULTI_TURN_SHARE else ()), _draw(rng, task, held_out)]
    messages = [{"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}] if rng.random() < SYSTEM_SHARE else []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


def rows(count: int, held_out: bool, seed: int = 0) -> list[Row]:
    """Draw rows whose last turns cover all tasks equally, in random order.

    Args:
        count: number of rows.
        held_out: draw validation rows; no subject is in both splits.
        seed: of the generator, together with `held_out`.
    """
    rng = random.Random(f"{seed} {held_out}")
    tasks = [*TASKS, "remember"]
    drawn = [_row(rng, tasks[index % len(tasks)], held_out) for index in range(count)]
    rng.shuffle(drawn)
    return drawn


def write(folder: Path, seed: int = 0) -> None:
    """Write `train.jsonl` and `validation.jsonl` atomically to a folder, creating it if necessary.

    Raises:
        OSError: the folder or a file in it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", TRAIN_ROWS), ("validation", VALIDATION_ROWS)):
        lines = rows(count, held_out=name == "validation", seed=seed)
        write_atomic(folder / f"{name}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
