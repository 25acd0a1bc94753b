"""The assistant's places are found in templates nobody has seen, or the template is refused: never a wrong place.

Templates are drawn from parts, so what is to be supervised is known without looking at how it is found.
"""

import datetime

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sft_recipes.data.formats import Conversation
from sft_recipes.data.tokenize import Chat
from sft_recipes.data.toy.toy_model import train_tokenizer
from sft_recipes.runtime.errors import UserError

MARKS = ("<|a|>", "<|b|>", "<|c|>", "<|d|>", "<|e|>")
TRIMS = {
    "": lambda text: text,
    " | trim": str.strip,
    ".strip()": str.strip,
    ".lstrip('\n')": lambda text: text.lstrip("\n"),
}
TEXTS = st.text(alphabet="ab <|>\n\tÄ🎉", min_size=1, max_size=12).filter(lambda text: text.strip())
CHARACTERS = ("", "\n", " ", "\n\n", ": ", "Answer:", "ab")


@pytest.fixture(scope="module")
def tokenizer():
    made = train_tokenizer(["ab Answer: user assistant system"] * 20, 320)
    made.add_special_tokens({"additional_special_tokens": list(MARKS)})
    made.add_tokens(["<think>", "</think>"])
    return made


@st.composite
def templates(draw):
    """A template, and what it writes behind an answer: of an earlier turn, and of the last."""
    one_of = lambda *choices: draw(st.sampled_from(choices))  # noqa: E731
    opening = one_of("", "<|endoftext|>", "A default prompt.\n")
    user_header = one_of("<|a|>user\n", "<|a|>", "User: ", "[INST] ", "<|a|>user<|b|>\n\n")
    user_footer = one_of("<|c|>", "<|c|>\n", "\n", " [/INST]", "")
    header = one_of("<|a|>assistant\n", "<|d|>", "<|a|>assistant<|b|>\n\n", "<|d|>\nAnswer:")
    before = one_of(*CHARACTERS[:4])  # written by the model itself, behind the generation prompt
    footer = one_of("<|e|>", "<|e|>\n", "\n<|e|>", "<|c|>\n") if draw(st.booleans()) else "<|e|>"
    last = one_of("", "", "<|endoftext|>", "\n")
    user_trim, trim = one_of(*TRIMS), one_of(*TRIMS)
    quoted = lambda text: "'" + text.replace("\n", "\\n") + "'"  # noqa: E731
    source = (
        f"{{{{ {quoted(opening)} }}}}{{% for m in messages %}}{{% if m['role'] == 'assistant' %}}"
        f"{{{{ {quoted(header + before)} + (m['content']{trim}) + {quoted(footer)} }}}}{{% else %}}"
        f"{{{{ {quoted(user_header)} + (m['content']{user_trim}) + {quoted(user_footer)} }}}}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {quoted(header)} }}}}{{% else %}}{{{{ {quoted(last)} }}}}{{% endif %}}"
    )
    return source, lambda text, final: before + TRIMS[trim](text) + footer + (last if final else "")


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(templates(), st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3))
def test_in_a_template_of_any_parts_the_answers_are_found_to_the_character(tokenizer, template, said):
    source, answer = template
    tokenizer.chat_template = source
    turns = [text for pair in said for text in pair]
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]
    (example,) = Chat(tokenizer, datetime.date(2026, 11, 21)).label([Conversation(messages, "here:1")])
    found = [tokenizer.decode(example.input_ids[start:end]) for start, end in example.spans]
    assert found == [answer(text, number == len(said) - 1) for number, (_, text) in enumerate(said)]
    assert tokenizer.decode(example.input_ids) == tokenizer.apply_chat_template(messages, tokenize=False)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.sampled_from(
            [
                "{{ bos_token }}", "{% for m in messages %}", "{% endfor %}", "{{ m['content'] }}", "{{ m.content | trim }}",
                "{{ '<|e|>' }}", "{% if m['role'] == 'assistant' %}", "{% else %}", "{% endif %}", "{{ m['role'] }}",
                "{% if add_generation_prompt %}", "<|a|>", "{% generation %}", "{% endgeneration %}", "{{ messages }}",
                "{{ loop.index }}", "{{ raise_exception('no') }}", "{{ undefined.x }}", "{% if loop.last %}", "\n",
            ]
        ),
        max_size=12,
    )
)  # fmt: skip
def test_a_template_of_rubble_is_refused_or_supervises_the_answers_alone(tokenizer, parts):
    tokenizer.chat_template = "".join(parts)
    messages = [
        {"role": "user", "content": "abba"}, {"role": "assistant", "content": "baab"},
        {"role": "user", "content": "ÄÄÄ"}, {"role": "assistant", "content": "bbbbb"},
    ]  # fmt: skip
    try:
        (example,) = Chat(tokenizer, datetime.date(2026, 11, 21)).label([Conversation(messages, "here:1")])
    except UserError as error:
        assert "here:1" in str(error) or "template" in str(error)
        return
    supervised = "".join(tokenizer.decode(example.input_ids[start:end]) for start, end in example.spans)
    assert "baab" in supervised and "bbbbb" in supervised
    assert "abba" not in supervised and "ÄÄÄ" not in supervised
