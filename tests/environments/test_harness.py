"""`eval`: base and trained model on local tasks by the real lm-evaluation-harness, without a network; `make test-eval`."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers.cli_errors import check_refused
from helpers.workplace import FEW_STEPS, REPOSITORY

# The variable names another environment of the harness; both are absolute, since the commands run elsewhere.
ENVIRONMENT = Path(os.environ.get("EVAL_VENV") or REPOSITORY / ".venv-eval").absolute()

ROW_KEYS = {
    *("task", "metric", "higher_is_better", "base", "base_stderr", "trained", "trained_stderr"),
    *("difference", "p_value", "samples", "worse"),
}
TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
target_delimiter: ""
"""
CHOICE = """output_type: multiple_choice
doc_to_text: "Which digit is largest here: {{digits}}"
doc_to_choice: choices
doc_to_target: label
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
# Training lowers the perplexity of right answers, so a task that rewards a high one has a significantly worse model.
SURPRISE = """output_type: loglikelihood
doc_to_text: "Which digit is largest here: {{digits}}"
doc_to_target: "{{choices[label]}}"
metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with a multiple-choice and a perplexity task of twelve items each."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = folder / "rows.jsonl"
    items = [
        {"digits": f"{first}{second}5", "choices": ["3", "5", "9"], "label": 1} for first in "1234" for second in "234"
    ]
    rows.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    for name, content in (("largest_digit", CHOICE), ("surprise", SURPRISE)):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, rows=rows) + content, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def adapted(shared_workplace, short_run, few_rows, tmp_path_factory):
    """A LoRA run on a model that has no chat template; the run's template is the one of the model it is a copy of."""
    base = tmp_path_factory.mktemp("models") / "base"
    shutil.copytree(short_run / "final", base)
    template = base.parent / "template.jinja"
    (base / "chat_template.jinja").rename(template)
    overrides = (f"model.chat_template={template}", f"data.train={few_rows}", "lora.r=4", "trainer.learning_rate=1e-2")
    run = shared_workplace.trained(
        *("tiny", "--name", "adapted-for-eval", f"--model={base}", "trainer.packing=false", *FEW_STEPS, *overrides)
    )
    return run, base


@pytest.fixture
def evaluate(shared_workplace, tasks, tmp_path):
    """Function that runs `eval` offline, with an empty cache of the Hub."""

    def run(folder, *arguments, **variables):
        return shared_workplace.sft(
            *("eval", str(folder), f"--harness-args=--include_path={tasks}", *arguments),
            **{"EVAL_VENV": str(ENVIRONMENT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"), **variables},
        )

    return run


def test_a_worse_model_is_named_in_output_file_and_report(short_run, evaluate):
    done = evaluate(short_run, "--tasks", "largest_digit,surprise")
    assert done.returncode == 0, done.stderr
    comparison = json.loads((short_run / "eval" / "largest_digit-surprise.json").read_text())
    rows = {row["task"]: row for row in comparison["rows"]}
    assert {key: row["metric"] for key, row in rows.items()} == {
        "largest_digit": "acc",
        "surprise": "perplexity",
    }
    for row in rows.values():
        assert row.keys() == ROW_KEYS and row["samples"] == 12 and 0 <= row["p_value"] <= 1
    surprise = rows["surprise"]
    assert surprise["worse"] and surprise["trained"] < surprise["base"] and surprise["p_value"] < 0.05
    assert "significantly WORSE than the base model on 1 of 2 tested metrics" in comparison["summary"]
    assert f"surprise perplexity {surprise['difference']:+.4g}" in comparison["summary"]
    assert comparison["summary"] in done.stdout
    report = (short_run / "report.html").read_text()
    assert "significantly WORSE" in report and "surprise" in report
    assert comparison["base"]["chat_template"] and "random weights" in comparison["base"]["model"]
    assert comparison["backend"] == "hf" and comparison["versions"]["lm_eval"]


def test_adapters_are_scored_merged_with_the_template_of_training(adapted, evaluate, shared_workplace):
    """The harness's log-likelihoods are those of transformers and peft, for the prompt of training."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, base = adapted
    check_refused(evaluate(run, "--tasks", "largest_digit"), "found no .*merged. Run `make merge RUN=adapted-for-eval`")
    assert shared_workplace.sft("merge", run.name).returncode == 0
    done = evaluate(run, "--tasks", "largest_digit", "--limit", "3")
    assert done.returncode == 0, done.stderr
    comparison = json.loads((run / "eval" / "largest_digit-limit-3.json").read_text())
    assert not comparison["base"]["chat_template"] and comparison["trained"]["chat_template"]
    assert "The base model has no chat template" in done.stdout

    tokenizer = AutoTokenizer.from_pretrained(run / "final")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run / "final").eval()
    (samples,) = (run / "eval" / "largest_digit-limit-3" / "trained").glob("samples_*.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(lines) == 3
    for sample in lines:
        message = {"role": "user", "content": f"Which digit is largest here: {sample['doc']['digits']}"}
        prompt = tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
        for choice, response in zip(sample["doc"]["choices"], sample["resps"], strict=True):
            ids = tokenizer(prompt + choice, add_special_tokens=False, return_tensors="pt").input_ids
            with torch.no_grad():
                scores = model(ids).logits[0].log_softmax(-1)
            # The harness counts the line break that ends the prompt to each choice.
            expected = sum(scores[position - 1, ids[0, position]].item() for position in (-2, -1))
            assert float(response[0][0]) == pytest.approx(expected, abs=1e-3)


def test_an_unknown_task_is_named(short_run, evaluate):
    done = evaluate(short_run, "--tasks", "hellaswagg")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: TASKS: the harness has no hellaswagg. List its tasks: ") and "ls tasks" in error


def test_download_prepares_a_task_without_a_model(workplace, tasks, tmp_path):
    variables = {"EVAL_VENV": str(ENVIRONMENT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = workplace.sft("download", "tiny", "--tasks", str(tasks / "largest_digit.yaml"), **variables)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "datasets").rglob("*.arrow"))
