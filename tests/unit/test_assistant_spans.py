"""Assistant spans are exact for randomly generated templates, or the template is rejected.

Templates are drawn from parts, so the expected spans are known independently of the code under test.
"""

import datetime
import itertools
import re

import pytest
from helpers.examples import tokenize_all
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sft_recipes.data.formats import Conversation
from sft_recipes.data.tokenize import ConversationTokenizer
from sft_recipes.data.toy.toy_model import train_tokenizer
from sft_recipes.runtime.errors import UserError

SPECIAL_TOKENS = ("<|a|>", "<|b|>", "<|c|>", "<|d|>", "<|e|>")
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
    made.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
    made.add_tokens(["<think>", "</think>"])
    return made


@st.composite
def templates(draw):
    """A template, and a function from an answer to the expected text of its span."""
    one_of = lambda *choices: draw(st.sampled_from(choices))  # noqa: E731
    opening = one_of("", "<|endoftext|>", "A default prompt.\n")
    user_header = one_of("<|a|>user\n", "<|a|>", "User: ", "[INST] ", "<|a|>user<|b|>\n\n")
    user_footer = one_of("<|c|>", "<|c|>\n", "\n", " [/INST]", "")
    header = one_of("<|a|>assistant\n", "<|d|>", "<|a|>assistant<|b|>\n\n", "<|d|>\nAnswer:")
    before = one_of(*CHARACTERS[:4])  # written by the model itself, after the generation prompt
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
@given(
    templates(),
    st.integers(1, 3).flatmap(
        lambda turns: st.lists(
            st.lists(st.tuples(TEXTS, TEXTS), min_size=turns, max_size=turns), min_size=2, max_size=3
        )
    ),
)
def test_spans_are_exact_in_generated_templates(tokenizer, template, rows):
    """Of several rows with the same turns."""
    source, answer = template
    tokenizer.chat_template = source
    conversations = [
        [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(itertools.chain(*pairs))]
        for pairs in rows
    ]
    given = [Conversation(messages, "here:1") for messages in conversations]
    examples = tokenize_all(ConversationTokenizer(tokenizer, datetime.date(2026, 11, 21)), given)
    for example, messages, pairs in zip(examples, conversations, rows, strict=True):
        answers = [tokenizer.decode(example.input_ids[start:end]) for start, end in example.spans]
        assert answers == [answer(text, number == len(pairs) - 1) for number, (_, text) in enumerate(pairs)]
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
def test_random_template_is_rejected_or_masked_correctly(tokenizer, parts):
    tokenizer.chat_template = "".join(parts)
    messages = [
        {"role": "user", "content": "abba"}, {"role": "assistant", "content": "baab"},
        {"role": "user", "content": "ÄÄÄ"}, {"role": "assistant", "content": "bbbbb"},
    ]  # fmt: skip
    try:
        (example,) = tokenize_all(
            ConversationTokenizer(tokenizer, datetime.date(2026, 11, 21)), [Conversation(messages, "here:1")]
        )
    except UserError as error:
        assert re.match("(here:1: )?chat template: ", str(error))
        return
    in_loss = "".join(tokenizer.decode(example.input_ids[start:end]) for start, end in example.spans)
    assert "baab" in in_loss and "bbbbb" in in_loss
    assert "abba" not in in_loss and "ÄÄÄ" not in in_loss
