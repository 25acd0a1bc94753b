"""The short form: a few kills, a few file operations, the disk that refuses each of them in turn. `make chaos` is the
long one."""

import shutil

import pytest
from helpers import chaos_elsewhere

from chaos.faults import FAULTS, STAIRS, tried
from chaos.harness import REPOSITORY, Chaos
from chaos.kills import EACH_STEP, kill_points

needs_a_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="the shim that counts file operations is C")


@pytest.fixture(scope="module")
def chaos(tmp_path_factory):
    return Chaos(tmp_path_factory.mktemp("chaos"), seed=1)


@needs_a_compiler
def test_a_run_killed_in_the_middle_of_a_save_goes_on_and_ends_equal(chaos):
    """In the optimizer's file, before the folder gets its name, and while an older one is removed."""
    chaos.uninterrupted("single", *EACH_STEP, **chaos.harmed("whole-single-0", "single", 0))
    operations = chaos.operations("whole-single-0")

    def first(call, path):
        return next(number for number, made, at, _ in operations if made == call and at.endswith(path))

    # Behind a kill a start does a little more, so the later two fall a few operations earlier in their saves.
    numbers = [first("write", ".saving/checkpoint-1/optimizer.pt") + 2, first("rename", ".saving/checkpoint-2")]
    numbers.append(first("unlink", ".removing/checkpoint-1/optimizer.pt"))
    points = kill_points(chaos, "single", 0, numbers)
    assert len(points) == 3 and not any(point.differences for point in points), points
    assert points[0].path == ".saving/checkpoint-N/optimizer.pt" and points[-1].resumed_from >= 2, points


@needs_a_compiler
def test_a_disk_that_refuses_each_operation_of_a_save_in_turn_costs_that_save_alone(chaos):
    fault = next(one for one in FAULTS if one.words == STAIRS and one.engine == "single")
    found = tried(chaos, fault)
    assert found.codes == [0] and found.differences == []
    name = next(path.stem for path in chaos.place.glob("18-*.operations"))
    failed = [operation for operation in chaos.operations(name) if operation[3]]
    assert ("rename", ".saving/checkpoint-") in {(call, path.rstrip("0123456789")) for _, call, path, _ in failed}


def test_every_fault_has_its_place():
    """53 of them: tried here, held by a test that is there, or listed with a reason."""
    numbers = set()
    for said in [*(fault.number for fault in FAULTS), *chaos_elsewhere.HELD, *chaos_elsewhere.NOT_DONE]:
        first, to, last = said.partition(" to ")
        numbers |= set(range(int(first), int(last) + 1)) if to else {int(one) for one in said.split(", ")}
    assert numbers == set(range(1, 54))
    files = [one for _, where in chaos_elsewhere.HELD.values() for one in where.split(", ") if one.startswith("tests/")]
    assert len(files) > 10 and all((REPOSITORY / file.partition(";")[0]).is_file() for file in files), files
