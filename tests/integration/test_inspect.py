"""`inspect` shows rows as the trainer gets them, and what became of all of them."""

import html
import json
import re

import pytest

SUMS = [{"prompt": f"How much is {n} and {n}?", "completion": f"It is {2 * n}."} for n in range(60)]
WORDS = ("batch.effective_batch_size=2", "batch.min_optimizer_steps=1", "trainer.max_length=128")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in SUMS))
    return path


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return tmp_path_factory.mktemp("page") / "page.html"


@pytest.fixture(scope="module")
def shown(looked, page):
    return looked("--rows", "2", "--html", str(page))


@pytest.fixture(scope="module")
def looked(shared_workplace, rows, model_folder):
    def look(*words):
        model = (f"model.name_or_path={model_folder}", "model.from_scratch=false")
        return shared_workplace.sft("inspect", "tiny", f"data.train={rows}", *model, *WORDS, *words)

    return look


def test_the_loss_is_seen_to_look_at_the_answers_alone(shown):
    assert shown.returncode == 0, shown.stderr
    supervised = re.findall(r"⟦(.*?)⟧", shown.stdout.partition("\n\n")[2], re.DOTALL)
    assert supervised and all(re.fullmatch(r"It is \d+\.<\|im_end\|>⏎", text) for text in supervised)
    turns = r"^-- .*sums\.jsonl:\d+\n» prompt\n<\|im_start\|>user⏎\nHow much.*\n.*⏎\n» answer 1\n⟦It is"
    assert re.search(turns, shown.stdout, re.MULTILINE)
    assert "\033" not in shown.stdout
    for said in ("57 rows read", "3 rows read", "supervised", "tokens a row:", "of their tokens are examples'", "in both     none",
                 "end of turn <|im_end|>", "a step", "s to prepare"):  # fmt: skip
        assert said in shown.stdout, said


def test_json_is_a_row_an_object_as_the_trainer_gets_it(looked, rows, tokenizer):
    done = looked("--json")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(set(line) == {"source", "input_ids", "labels", "position_ids"} for line in lines)
    places = [place for line in lines for place in line["source"]]
    assert len(places) == len(set(places)) == 57 and all(place.startswith(f"{rows}:") for place in places)
    for line in lines:
        starts = [place for place, position in enumerate(line["position_ids"]) if position == 0]
        assert len(starts) == len(line["source"]) and len(line["labels"]) == len(line["input_ids"]) <= 128
        for source, start, end in zip(line["source"], starts, [*starts[1:], len(line["labels"])], strict=True):
            assert line["position_ids"][start:end] == list(range(end - start))
            row = SUMS[int(source.rpartition(":")[2]) - 1]
            said = tokenizer.decode([label for label in line["labels"][start:end] if label != -100])
            assert said == f"{row['completion']}<|im_end|>\n"
    assert "rows read" in done.stderr and "rows read" not in done.stdout


def test_a_page_shows_the_same(shown, page):
    assert shown.returncode == 0
    content = page.read_text()
    supervised = re.findall(r'<span class="supervised">(.*?)</span>', content, re.DOTALL)[1:]
    assert supervised and all(re.fullmatch(r"It is \d+\.|⏎\n", html.unescape(text)) for text in supervised)
    assert 'class="supervised control">&lt;|im_end|&gt;' in content and "rows read" in content
    assert "http" not in content


def test_odd_and_too_few_rows_are_shown_without_what_a_terminal_would_obey(shared_workplace, tmp_path, model_folder):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"\x1b[2J{n}", "completion": "<b>a</b>\x07"}) + "\n" for n in range(9))
    )
    model = (f"model.name_or_path={model_folder}", "model.from_scratch=false", f"data.train={path}")
    shown = shared_workplace.sft(
        "inspect", "tiny", *model, *WORDS, "batch.effective_batch_size=64", "--html", str(tmp_path / "page.html")
    )
    assert shown.returncode == 0, shown.stderr
    assert "\\x1b[2J" in shown.stdout and "\x1b" not in shown.stdout and "\x07" not in shown.stdout
    assert re.search(r"a run is refused: data.train: .*fewer than one effective batch of 64", shown.stdout)
    assert "&lt;b&gt;a" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(("words", "message"), [
    (("--html", "no/page.html"), "HTML: no folder no to write page.html to"), (("--rows", "0"), "ROWS: found '0', expected an integer"), (("--rows", "x"), "ROWS: found 'x', expected an integer"), (("data.train=none.jsonl",), "no file or folder 'none.jsonl'"),
])  # fmt: skip
def test_what_cannot_be_shown_is_one_line(looked, words, message):
    done = looked(*words)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and message in line
