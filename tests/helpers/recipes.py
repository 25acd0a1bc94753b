"""The recipes of this repository; `recipes/` may also have a user's own (`make recipe`)."""

from pathlib import Path

from sft_recipes.config import loader

GOLDEN = Path(__file__).parent / "golden"
SHIPPED = [name for name in loader.names() if (GOLDEN / f"{name}.json").is_file()]
