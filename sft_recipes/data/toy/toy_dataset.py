"""The data of the embedded recipe: small chats whose every answer follows from the prompt by a rule.

A model with random weights learns these rules within minutes on a CPU, so a run of the whole pipeline can be judged
by exact match. Nothing is downloaded: `write` draws all rows from a seeded generator.

What is held out does not depend on the seed. The checksum of a question's subject (the letters or numbers it is
about) puts that question, in every phrasing, either into training or into validation, so no user prompt of one file
that has a subject stands in the other.
"""

import json
import random
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

Row = dict[str, list[dict[str, str]]]

TRAIN_ROWS = 12_000
VALIDATION_ROWS = 400
HELD_OUT_SHARE = 0.1  # of the subjects of every task
SYSTEM_SHARE = 0.2
MULTI_TURN_SHARE = 0.3  # of the rows that do not have several turns by their nature

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FIRST_NAMES = ("Ada", "Ben", "Carl", "Dora", "Emil", "Finn", "Gina", "Hugo", "Ivan", "Jana", "Kim", "Lea", "Mia", "Tom")
LAST_NAMES = ("Adler", "Baker", "Cook", "Diaz", "Evans", "Fox", "Gray", "Hill", "Irwin", "Jones", "Klein", "Lopez")
THINGS = ("bell", "book", "coat", "cup", "drum", "fork", "hat", "jar", "key", "lamp", "map", "pen", "ring", "tent")
SYSTEM_PROMPTS = ("Answer with the result only.", "You are a careful assistant. Keep it short.")


def _digits(rng: random.Random, count: int) -> str:
    return "".join(rng.choices("0123456789", k=count))


def _letters(rng: random.Random, count: int) -> str:
    return " ".join(rng.choices(ALPHABET, k=count))


def _reverse(rng: random.Random) -> tuple[str, str]:
    digits = _digits(rng, 4)
    return digits, digits[::-1]


def _sort(rng: random.Random) -> tuple[str, str]:
    digits = rng.sample("0123456789", 3)
    return "".join(digits), "".join(sorted(digits))


def _spell(rng: random.Random) -> tuple[str, str]:
    digits = _digits(rng, 4)
    return digits, " ".join(DIGIT_WORDS[int(digit)] for digit in digits)


def _largest(rng: random.Random) -> tuple[str, str]:
    digits = _digits(rng, 4)
    return digits, max(digits)


def _add(rng: random.Random) -> tuple[str, str]:
    """A sum in which no digit is carried."""
    tens, ones, more = rng.randint(1, 9), rng.randint(0, 8), rng.randint(1, 9)
    more = min(more, 9 - ones)
    return f"{tens}{ones} + {more}", f"{tens}{ones + more}"


def _capitals(rng: random.Random) -> tuple[str, str]:
    letters = _letters(rng, 4)
    return letters, letters.upper()


def _last(rng: random.Random) -> tuple[str, str]:
    letters = _letters(rng, rng.randint(3, 6))
    return letters, letters[-1]


def _count(rng: random.Random) -> tuple[str, str]:
    count = rng.randint(2, 7)
    return _letters(rng, count), str(count)


# Per kind of task: the phrasings, and what draws a subject and its answer.
TASKS: dict[str, tuple[tuple[str, ...], Callable[[random.Random], tuple[str, str]]]] = {
    "reverse": (("Reverse these digits: {}", "Write backwards: {}"), _reverse),
    "sort": (("Sort these digits: {}", "Put these digits in rising order: {}"), _sort),
    "spell": (("Spell out these digits: {}", "Write digit by digit in words: {}"), _spell),
    "largest": (("What is the largest digit of this number: {}", "Which digit is largest here: {}"), _largest),
    "add": (("Add these numbers: {}", "What is the sum: {}"), _add),
    "capitals": (("Write these letters in capitals: {}", "Make these upper case: {}"), _capitals),
    "last": (("What is the last letter here: {}", "Which letter comes last: {}"), _last),
    "count": (("How many letters are here: {}", "Count these letters: {}"), _count),
}
REMEMBER = ("What does {} have?", "Tell me what {} has.")


def _is_held_out(task: str, subject: str) -> bool:
    return zlib.crc32(f"{task} {subject}".encode()) < HELD_OUT_SHARE * 2**32


def _draw(rng: random.Random, task: str, held_out: bool) -> tuple[str, str]:
    """One question of a task and its answer, from the wanted side of the split."""
    phrasings, draw = TASKS[task]
    while True:
        subject, answer = draw(rng)
        if _is_held_out(task, subject) == held_out:
            return rng.choice(phrasings).format(subject), answer


def _draw_remember(rng: random.Random, held_out: bool) -> tuple[tuple[str, str], tuple[str, str]]:
    """Two turns: the first tells what a person has, the second asks for it."""
    while True:
        name = f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"
        if _is_held_out("remember", name) == held_out:
            fact = f"{name} has a {rng.choice(THINGS)}."
            return (f"Remember: {fact}", "Noted."), (rng.choice(REMEMBER).format(name), fact)


def _row(rng: random.Random, task: str, held_out: bool) -> Row:
    """A chat whose last turn is of the given task."""
    others = [_draw(rng, rng.choice(list(TASKS)), held_out) for _ in range(rng.randint(1, 2))]
    if task == "remember":
        told, asked = _draw_remember(rng, held_out)
        turns = [told, *others[: rng.randint(0, 1)], asked]
    else:
        turns = [*(others if rng.random() < MULTI_TURN_SHARE else ()), _draw(rng, task, held_out)]
    messages = [{"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}] if rng.random() < SYSTEM_SHARE else []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


def rows(count: int, held_out: bool, seed: int = 0) -> list[Row]:
    """Rows whose last turns go through all tasks in equal shares, in random order.

    Args:
        count: how many rows.
        held_out: whether they are for validation; no subject is on both sides.
        seed: what the draws follow from, together with `held_out`.
    """
    rng = random.Random(f"{seed} {held_out}")
    tasks = [*TASKS, "remember"]
    drawn = [_row(rng, tasks[index % len(tasks)], held_out) for index in range(count)]
    rng.shuffle(drawn)
    return drawn


def write(folder: Path, seed: int = 0) -> None:
    """Write `train.jsonl` and `validation.jsonl` into a folder, made where it is missing.

    Each file takes its name only when it is whole, and replaces one that is there.

    Raises:
        OSError: the folder or a file in it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_lines(folder / "train.jsonl", rows(TRAIN_ROWS, held_out=False, seed=seed))
    _write_lines(folder / "validation.jsonl", rows(VALIDATION_ROWS, held_out=True, seed=seed))


def _write_lines(path: Path, lines: Iterable[Row]) -> None:
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    unfinished.replace(path)
