"""A copy of a run, as after a stop at a given step."""

import json
import shutil

from helpers.workplace import manifest

from sft_recipes.runtime.run_dir import RunDir


def stopped(run, name, step=10):
    """A copy of a run, as after a stop at this step."""
    folder = RunDir(run.parent / name)
    shutil.copytree(run, folder.path)
    for kind, place in (("checkpoint", folder.checkpoint), ("best", folder.best)):
        for later in folder.numbered(kind):
            if later > step:
                shutil.rmtree(place(later))
    for published in (folder.final, folder.last):
        shutil.rmtree(published)
    lines = folder.metrics.read_text().splitlines()
    folder.metrics.write_text("".join(f"{line}\n" for line in lines if '"final/' not in line))
    folder.manifest.write_text(json.dumps({**manifest(run), "state": "stopped", "saved_step": step}))
    assert folder.numbered("checkpoint")[-1] == step
    return folder
