"""Chats that call tools, on top of the toy dataset, and a ChatML template that writes tools, calls and results."""

from __future__ import annotations

from sft_recipes.data.toy import toy_dataset

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}},
    },
}
TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\nTools: ' }}"
    "{% for tool in tools %}{{ tool | tojson }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + (message['content'] or '') }}"
    "{% for call in message.tool_calls or [] %}"
    "{{ 'call ' + call.function.name + ' ' + (call.function.arguments | tojson) }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def rows(count: int) -> list[dict]:
    """Return toy rows, every third with a tool that is called, half of those with a system turn too."""
    mixed: list[dict] = []
    for number, row in enumerate(toy_dataset.rows(count, False)):
        if number % 3:
            mixed.append(row)
            continue
        a, b = number % 10, number % 7
        call = {"type": "function", "function": {"name": "add", "arguments": {"a": a, "b": b}}}
        system = [{"role": "system", "content": "Use the tool."}] if number % 2 else []
        turns = [
            {"role": "user", "content": f"Add {a} and {b}, é."},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "name": "add", "content": str(a + b)},
            {"role": "assistant", "content": f"It is {a + b}."},
        ]
        mixed.append({"messages": system + turns, "tools": [ADD]})
    return mixed
