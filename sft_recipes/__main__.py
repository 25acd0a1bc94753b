"""Lets `python -m sft_recipes VERB …` reach the command line."""

import sys

from sft_recipes.cli import main

sys.exit(main())
