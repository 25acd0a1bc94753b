"""Loads the weights of a saved model, and compares two models bit for bit."""

import torch
from safetensors.torch import load_file


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
