"""Print the token ids that `transformers serve` gives to a chat, in the environment of the server.

Run with the server's Python and the model's folder: one chat per line of standard input, as the body of a request.
"""

import json
import sys

from transformers import AutoProcessor
from transformers.cli.serving.utils import BaseHandler, Modality


def main(folder: str, trust_remote_code: bool) -> None:
    """Render and tokenize as `transformers.cli.serving.chat_completion` does (5.23)."""
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    for line in sys.stdin:
        body = json.loads(line)
        messages = BaseHandler.get_processor_inputs_from_messages(body["messages"], Modality.LLM)
        encoded = processor.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tools=body.get("tools"),
            tokenize=True,
            return_dict=True,
            **body.get("chat_template_kwargs", {}),
        )
        print(json.dumps(list(encoded["input_ids"])))


if __name__ == "__main__":
    main(sys.argv[1], len(sys.argv) > 2)
