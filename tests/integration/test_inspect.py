"""`inspect` shows rows with their loss mask as the trainer gets them, and a report on all rows."""

import json
import re

import pytest

SUMS = [{"prompt": f"How much is {n} and {n}?", "completion": f"It is {2 * n}."} for n in range(60)]
OVERRIDES = ("batch.effective_batch_size=2", "batch.min_optimizer_steps=1", "trainer.max_length=128")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in SUMS))
    return path


@pytest.fixture
def inspect(in_process, rows, model_folder, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # which the command sets: not for later tests

    def run(*arguments):
        model = (f"model.name_or_path={model_folder}", "model.from_scratch=false")
        return in_process("inspect", "tiny", f"data.train={rows}", *model, *OVERRIDES, *arguments)

    return run


def test_inspect_brackets_tokens_in_the_loss(inspect):
    shown = inspect("--rows", "2")
    assert shown.returncode == 0, shown.stderr
    in_loss = re.findall(r"⟦(.*?)⟧", shown.stdout.partition("\n\n")[2], re.DOTALL)
    assert in_loss and all(re.fullmatch(r"It is \d+\.<\|im_end\|>⏎", text) for text in in_loss)
    turns = r"^-- .*sums\.jsonl:\d+\n» prompt\n<\|im_start\|>user⏎\nHow much.*\n.*⏎\n» answer 1\n⟦It is"
    assert re.search(turns, shown.stdout, re.MULTILINE)
    assert "\033" not in shown.stdout
    for text in ("57 examples; 0 of 57 rows dropped", "3 examples; 0 of 3 rows dropped", "in the loss (", "tokens per row: ", "% full\n",
                 "train/eval overlap  0 of 3 validation rows\n", "loss mask           assistant turns including <|im_end|>\n",
                 "\nprepared            "):  # fmt: skip
        assert text in shown.stdout, text


def test_inspect_json_has_rows_of_trainer(inspect, rows, tokenizer):
    done = inspect("--json")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(set(line) == {"source", "input_ids", "labels", "position_ids"} for line in lines)
    locations = [location for line in lines for location in line["source"]]
    assert len(locations) == len(set(locations)) == 57
    assert all(location.startswith(f"{rows}:") for location in locations)
    for line in lines:
        starts = [index for index, position in enumerate(line["position_ids"]) if position == 0]
        assert len(starts) == len(line["source"]) and len(line["labels"]) == len(line["input_ids"]) <= 128
        for source, start, end in zip(line["source"], starts, [*starts[1:], len(line["labels"])], strict=True):
            assert line["position_ids"][start:end] == list(range(end - start))
            row = SUMS[int(source.rpartition(":")[2]) - 1]
            in_loss = tokenizer.decode([label for label in line["labels"][start:end] if label != -100])
            assert in_loss == f"{row['completion']}<|im_end|>\n"
    assert "rows dropped" in done.stderr and "rows dropped" not in done.stdout


def test_inspect_escapes_control_characters_and_reports_error(in_process, tmp_path, model_folder):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"\x1b[2J{n}", "completion": "<b>a</b>\x07"}) + "\n" for n in range(9))
    )
    model = (f"model.name_or_path={model_folder}", "model.from_scratch=false", f"data.train={path}")
    shown = in_process("inspect", "tiny", *model, *OVERRIDES, "batch.effective_batch_size=64")
    assert shown.returncode == 0, shown.stderr
    assert "\\x1b[2J" in shown.stdout and "\x1b" not in shown.stdout and "\x07" not in shown.stdout
    assert re.search(r"^error  .*data.train: .*effective batch", shown.stdout, re.MULTILINE)


@pytest.mark.parametrize(("arguments", "message"), [
    (("--rows", "0"), "ROWS: found '0', expected an integer"), (("data.train=none.jsonl",), "no file or folder 'none.jsonl'"),
])  # fmt: skip
def test_inspect_rejects_arguments(inspect, arguments, message):
    done = inspect(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and message in line
