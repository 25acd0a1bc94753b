"""Fields of the schema. Run as a program, this file regenerates `trainer_fields.json` from the installed TRL."""

import dataclasses
import json
import re
from pathlib import Path

from sft_recipes.config import schema

FILE = Path(schema.__file__).with_name("trainer_fields.json")


def installed_fields() -> dict[str, list[str]]:
    from trl import SFTConfig

    def kinds(annotation) -> list[str]:
        text = annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("NoneType", "None")
        return [
            kind for kind in ("str", "int", "float", "bool", "dict", "list", "None") if re.search(rf"\b{kind}\b", text)
        ]

    fields = sorted((field for field in dataclasses.fields(SFTConfig) if field.init), key=lambda field: field.name)
    return {field.name: kinds(field.type) for field in fields}


def test_trainer_fields_match_installed_trl():
    assert schema.trainer_fields() == installed_fields()


def test_fields_owned_by_the_plan_exist():
    names = set(installed_fields())
    assert len(schema.owned_trainer_fields()) > 30
    assert set(schema.owned_trainer_fields()) <= names
    assert set(schema.defaults()["trainer"]) <= names


if __name__ == "__main__":
    lines = [f"  {json.dumps(name)}: {json.dumps(kinds)}" for name, kinds in installed_fields().items()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
