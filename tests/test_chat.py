"""What the loss looks at, for templates of the families that people start from, each on a tokenizer of its own."""

import datetime

import pytest

from sft_recipes.data.chat import IGNORED, Chat, load_tokenizer
from sft_recipes.data.scratch import CHAT_TEMPLATE, train_tokenizer
from sft_recipes.planning.schema import RecipeError

DAY = datetime.date(2026, 11, 21)
MARKERS = [
    "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<s>", "</s>", "[INST]", "[/INST]",
]  # fmt: skip

# Written for this test after the published shapes of the families' own templates.
TEMPLATES = {
    "chatml": CHAT_TEMPLATE,
    "llama 3": (
        "{{ '<|begin_of_text|>' }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "llama 3.2, with today's date": (
        "{% set date_string = date_string if date_string is defined else strftime_now('%d %b %Y') %}"
        "{{ '<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday: ' + date_string + '\n\n' }}"
        "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] | trim }}"
        "{% set messages = messages[1:] %}{% endif %}{{ '<|eot_id|>' }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ '<s>' }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] + '</s>' }}"
        "{% else %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
    ),
    "phi 3, with an end of text behind the last turn": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}"
    ),
    "qwen 3, with an empty reasoning block before the last answer": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}
CONVERSATIONS = {
    "one turn": [("user", "Add 1 and 2."), ("assistant", "3")],
    "a system turn": [("system", "Be short."), ("user", "Add 1 and 2."), ("assistant", "It is 3.")],
    "several turns": [("user", "Hi"), ("assistant", "Hello!"), ("user", "Hi"), ("assistant", "Hello!"), ("user", "x"), ("assistant", "y")],
    "an answer that repeats the question": [("user", "same words"), ("assistant", "same words")],
    "white space at its ends": [("user", " a "), ("assistant", "b\n"), ("user", "c"), ("assistant", "d")],
    "an answer that stands in the markers": [("user", "end"), ("assistant", "im"), ("user", "n"), ("assistant", "end")],
    "several lines and other scripts": [("user", "línea\n\n2"), ("assistant", "第一行\n\n  第二行 🎉")],
}  # fmt: skip


def messages(turns):
    return [{"role": role, "content": content} for role, content in turns]


@pytest.fixture(scope="module")
def made():
    tokenizer = train_tokenizer(["Be short. Add 1 and 2. It is 3. Hello there!"] * 20, 400)
    tokenizer.add_special_tokens({"additional_special_tokens": [*MARKERS, "<|im_start|>", "<|endoftext|>"]})
    return tokenizer


def chat(tokenizer, template):
    tokenizer.chat_template = template
    return Chat(tokenizer, DAY)


@pytest.mark.parametrize("turns", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_every_assistant_turn_is_supervised_with_its_end_and_nothing_else(made, template, turns):
    subject = chat(made, template)
    rendered = subject.render(messages(turns), "here:1")
    (tokenized,) = subject.tokenize([rendered], ["here:1"])
    supervised = [label for label in tokenized.labels if label != IGNORED]
    ends = {"<|im_end|>", "<|eot_id|>", "</s>"}
    said = made.decode(supervised)
    for end in ends:
        said = said.replace(end, "|")
    answers = [content for role, content in turns if role == "assistant"]
    pieces = said.removesuffix("|").split("|")
    assert [piece.replace("<think>\n\n</think>\n\n", "").strip() for piece in pieces] == [a.strip() for a in answers]
    assert said.count("|") == len(answers), "an end of turn is not supervised"
    assert subject.end_of_turn_ids(tokenized) <= set(made.convert_tokens_to_ids(sorted(ends)))


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_what_is_trained_on_is_what_the_template_renders_at_inference(made, template):
    subject = chat(made, template)
    turns = messages(CONVERSATIONS["several turns"])
    rendered = subject.render(turns, "here:1")
    (tokenized,) = subject.tokenize([rendered], ["here:1"])
    expected = made.apply_chat_template(turns, tokenize=True, return_dict=True, date_string="21 Nov 2026")["input_ids"]
    assert tokenized.input_ids == expected
    assert tokenized.input_ids.count(made.convert_tokens_to_ids("<|begin_of_text|>")) <= 1
    prompt = subject.prompt(turns[:-1])
    assert tokenized.input_ids[: len(prompt)] == prompt


def test_a_template_that_writes_the_date_gets_the_plans(made):
    subject = chat(made, TEMPLATES["llama 3.2, with today's date"])
    assert "Today: 21 Nov 2026" in subject.render(messages(CONVERSATIONS["one turn"]), "here:1").text


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
         "ends the assistant's turn with .*, no special token"),
        ("{{ messages | length }}{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}",
         "renders what comes before turn 2 otherwise when an answer follows"),
        ("{% for m in messages %}{{ '<|im_start|>' + m['content'] }}{% if m['role'] == 'assistant' and loop.last %}{{ '<|im_end|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}",
         "otherwise when more turns follow, so its end cannot be told"),
        ("{{ raise_exception('no such roles') }}", "the chat template refuses this conversation: no such roles"),
    ],
)  # fmt: skip
def test_a_template_that_would_train_the_wrong_tokens_is_refused(made, template, message):
    subject = chat(made, template)
    turns = messages(CONVERSATIONS["several turns"])
    with pytest.raises(RecipeError, match=f"here:1: .*{message}"):
        subject.tokenize([subject.render(turns, "here:1")], ["here:1"])


def test_a_hostile_template_runs_nothing(made, tmp_path):
    reach = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(RecipeError, match="the chat template refuses"):
        chat(made, reach).render(messages(CONVERSATIONS["one turn"]), "here:1")


def test_a_tokenizer_without_a_chat_template_is_refused_with_the_way_out(made, tmp_path):
    made.chat_template = None
    made.save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="has no chat template .*model.chat_template="):
        load_tokenizer(str(tmp_path), None, None, False)
    template = tmp_path / "mine.jinja"
    template.write_text(CHAT_TEMPLATE)
    assert load_tokenizer(str(tmp_path), None, str(template), False).chat_template == CHAT_TEMPLATE
    with pytest.raises(RecipeError, match="model.chat_template: .*none.jinja cannot be read"):
        load_tokenizer(str(tmp_path), None, str(tmp_path / "none.jinja"), False)


def test_padding_takes_a_token_that_is_not_the_end_of_turn_where_there_is_one(tmp_path):
    tokenizer = train_tokenizer(["a b c"] * 10, 300)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path), None, None, False)
    assert loaded.pad_token == "<|pad|>" != loaded.eos_token


def test_any_text_fits_the_tokenizer_that_is_trained_on_the_spot(tokenizer):
    for text in ("plain", "línea", "第一行 🎉", "\t\x01 odd", "1234567"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) <= 320
    assert len(tokenizer("1234")["input_ids"]) == 4
