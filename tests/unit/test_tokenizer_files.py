"""The tokenizer that is trained with gives the ids of its `tokenizer.json`, and so do the files of a trained model."""

import json
import shutil

import pytest
from helpers.workplace import SMALL_LLAMA
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from sft_recipes.data import tokenizer_files
from sft_recipes.data.tokenizer import load_tokenizer
from sft_recipes.data.toy.toy_model import CHAT_TEMPLATE
from sft_recipes.runtime.errors import UserError

TEXT = "In 2025 it's 10  spaces\n\ncafe\u0301 日本語 🙂"


def read(file):
    return json.loads(file.read_text())


def edit(file, **changes):
    content = {**read(file), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.fixture
def folder(tmp_path):
    """Make a model folder without weights."""

    def make(tokenizer, model_type="llama", **tokenizer_config):
        path = tmp_path / "model"
        tokenizer.save_pretrained(path)
        settings = {key: value for key, value in SMALL_LLAMA.items() if key != "model_type"}
        AutoConfig.for_model(model_type, **settings).save_pretrained(path)
        edit(path / "tokenizer_config.json", backend=None, **tokenizer_config)
        return path

    return make


def byte_level(merges, split, size=0):
    """A byte-level tokenizer whose file splits text in another way than any class, with at least `size` entries."""
    pieces = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pieces += ["".join(merge) for merge in merges]
    pieces += [f"<{number}>" for number in range(size - len(pieces))]
    tokenizer = Tokenizer(models.BPE(vocab={piece: id for id, piece in enumerate(pieces)}, merges=merges))
    byte_pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pattern = pre_tokenizers.Split(Regex(split), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pattern, byte_pre_tokenizer])
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|pad|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def digits():
    return byte_level([("2", "0")], r"\p{N}|[^\p{N}]+")


def saved(path, tmp_path, template=None, add_tokens=()):
    """Load a folder's tokenizer, save it; return it, the saved folder and the notes."""
    tokenizer = load_tokenizer(str(path), template, False, add_tokens)
    target = tmp_path / "saved"
    target.mkdir()
    return tokenizer, target, tokenizer_files.save(tokenizer, path, target, [TEXT], False)


def raw_ids(file):
    return Tokenizer.from_file(str(file)).encode(TEXT, add_special_tokens=False).ids


def ids(tokenizer):
    return tokenizer(TEXT, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("model", [True, False], ids=["model", "adapters"])
@pytest.mark.parametrize("named", ["GPT2Tokenizer", "GPT2TokenizerFast", "Qwen2Tokenizer", "PreTrainedTokenizerFast"])
def test_tokenizer_json_decides_the_ids_also_in_final(folder, tmp_path, named, model):
    """The file splits digits; the classes of the test do not."""
    path = folder(digits(), tokenizer_class=named)
    tokenizer, target, notes = saved(path, tmp_path)
    expected = raw_ids(path / "tokenizer.json")
    assert ids(tokenizer) == expected == raw_ids(target / "tokenizer.json")
    assert (named != "PreTrainedTokenizerFast") == (ids(AutoTokenizer.from_pretrained(path)) != expected)
    assert bool(notes) == (named != "PreTrainedTokenizerFast")
    if model:
        shutil.copy(path / "config.json", target)
    assert ids(AutoTokenizer.from_pretrained(target)) == expected


def test_model_type_whose_class_cannot_be_chosen_is_reported(folder, tmp_path):
    """Transformers 5 takes Qwen2Tokenizer for qwen2, whatever its files say."""
    path = folder(digits(), "qwen2", tokenizer_class="PreTrainedTokenizerFast")
    tokenizer, target, notes = saved(path, tmp_path)
    assert ids(tokenizer) == raw_ids(path / "tokenizer.json") == ids(PreTrainedTokenizerFast.from_pretrained(target))
    assert "Load it from final/ with PreTrainedTokenizerFast" in notes[-1]


def test_files_are_the_bases_own(folder, tmp_path):
    path = folder(digits(), tokenizer_class="PreTrainedTokenizerFast", chat_template=CHAT_TEMPLATE)
    edit(path / "tokenizer_config.json", additional_special_tokens=["<|im_start|>"], extra_special_tokens=None)
    (path / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>"}')
    (path / "chat_template.jinja").unlink()
    _, target, notes = saved(path, tmp_path)
    names = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    assert {file.name for file in target.iterdir()} == names and not notes
    assert all((path / name).read_bytes() == (target / name).read_bytes() for name in names)


def test_only_changed_values_are_written(folder, tmp_path):
    """A padding token in place of the end of turn, a new token, and the recipe's template."""
    path = folder(digits(), tokenizer_class="PreTrainedTokenizerFast", pad_token="<|im_end|>")
    template = tmp_path / "template.jinja"
    template.write_text(CHAT_TEMPLATE + "{# other #}")
    tokenizer, target, _ = saved(path, tmp_path, str(template), ["<|new|>"])
    before, after = read(path / "tokenizer_config.json"), read(target / "tokenizer_config.json")
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    assert changed == {"pad_token", "additional_special_tokens"}
    loaded = AutoTokenizer.from_pretrained(target)
    assert loaded.get_vocab() == tokenizer.get_vocab() and "<|new|>" in loaded.get_vocab()
    assert loaded.pad_token == tokenizer.pad_token != "<|im_end|>"
    assert loaded.chat_template == template.read_text()


@pytest.mark.parametrize("numbers", [False, True])
def test_correction_of_mistrals_regex_is_decided_once(folder, tmp_path, numbers):
    """Mistral's regex never merges digits, so a vocabulary with numbers is another model's."""
    merges = [("A", "b"), ("Ab", "c"), *([("1", "0")] if numbers else [])]
    tokenizer = byte_level(merges, r"\p{L}{1,2}|\p{N}{1,3}|\s+|[^\s\p{L}\p{N}]+", 100_100)
    path = folder(tokenizer, "mistral", tokenizer_class="LlamaTokenizerFast")
    edit(path / "config.json", transformers_version="4.50.0")
    tokenizer, target, notes = saved(path, tmp_path)
    assert tokenizer.tokenize("Abc10") == (["Ab", "c", "10"] if numbers else ["Abc", "1", "0"])
    assert read(target / "tokenizer_config.json")["fix_mistral_regex"] is not numbers
    assert bool(notes) is not numbers
    shutil.copy(path / "config.json", target)
    for loaded in (AutoTokenizer.from_pretrained(target), load_tokenizer(str(target), None, False)):
        assert loaded.tokenize("Abc10") == tokenizer.tokenize("Abc10")
    assert raw_ids(target / "tokenizer.json") == ids(tokenizer)


def test_sentencepiece_file_alone_names_the_packages(folder, tmp_path):
    path = folder(digits(), tokenizer_class="LlamaTokenizer")
    (path / "tokenizer.json").rename(path / "tokenizer.model")
    with pytest.raises(UserError, match=r"not loadable .*if it lacks tokenizer.json, `pip install sent"):
        load_tokenizer(str(path), None, False)


@pytest.mark.parametrize("named", ["LlamaTokenizer", "Qwen2Tokenizer", "GPT2Tokenizer", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("left", [None, "vocab.json"])
def test_tokenizer_without_vocabulary_is_rejected(folder, named, left):
    """Transformers 5 builds one with an empty vocabulary, or without merges."""
    path = folder(digits(), tokenizer_class=named)
    vocabulary = read(path / "tokenizer.json")["model"]["vocab"]
    (path / "tokenizer.json").unlink()
    if left:
        (path / left).write_text(json.dumps(vocabulary))
    with pytest.raises(UserError, match="tokenizer of .* not loadable"):
        load_tokenizer(str(path), None, False)


def test_vocabulary_and_merges_without_tokenizer_json_are_read(folder, tmp_path):
    """As GPT-2's first files; the saved files have a tokenizer.json, and load again with the same ids."""
    path = folder(digits(), tokenizer_class="GPT2Tokenizer")
    content = read(path / "tokenizer.json")["model"]
    (path / "vocab.json").write_text(json.dumps(content["vocab"]))
    (path / "merges.txt").write_text("#version: 0.2\n2 0\n")
    (path / "tokenizer.json").unlink()
    tokenizer, target, _ = saved(path, tmp_path)
    assert ids(tokenizer) == raw_ids(target / "tokenizer.json") == ids(AutoTokenizer.from_pretrained(target))
