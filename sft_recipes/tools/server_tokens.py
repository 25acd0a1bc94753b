"""Print the token ids that `transformers serve` gives to chats: run with its Python and the model's folder.

One request body per line of standard input. The calls are those of transformers/cli/serving/chat_completion.py (5.23).
"""

import json
import sys

from transformers import AutoProcessor
from transformers.cli.serving.utils import BaseHandler, Modality

processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code="--trust-remote-code" in sys.argv)
for line in sys.stdin:
    body = json.loads(line)
    messages = BaseHandler.get_processor_inputs_from_messages(body["messages"], Modality.LLM)
    options = {"tools": body.get("tools"), **body.get("chat_template_kwargs", {})}
    encoded = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, **options
    )
    print(json.dumps(list(encoded["input_ids"])))
