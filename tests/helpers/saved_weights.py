"""Weights of a saved model, and whether two models hold the same bits."""

import torch
from safetensors.torch import load_file


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
