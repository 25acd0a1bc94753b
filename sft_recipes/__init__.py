"""Supervised fine-tuning recipes: planning decides, training carries out, `plan.json` stands between them."""
