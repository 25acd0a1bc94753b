"""Entry point of `python -m sft_recipes COMMAND …`."""

import sys

from sft_recipes.cli import main

sys.exit(main())
