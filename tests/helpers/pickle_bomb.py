"""A pickle that writes a file when it is loaded."""

import os

import torch


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def plant(path, marker):
    with path.open("wb") as file:  # torch takes no name that begins with a dot
        torch.save(Bomb(marker), file)
