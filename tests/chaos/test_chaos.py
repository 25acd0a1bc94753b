"""The short form: a few kills and file operations, and a disk that fails each of them in turn; `make chaos` runs all."""

import shutil

import pytest
from helpers.chaos_coverage import COVERED, NOT_COVERED
from helpers.workplace import REPOSITORY

from chaos.faults import FAULTS, STAIRS, run_fault
from chaos.harness import Chaos
from chaos.kills import EACH_STEP, kill_points

needs_c_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="the library that counts file operations is C")


@pytest.fixture(scope="module")
def chaos(tmp_path_factory):
    return Chaos(tmp_path_factory.mktemp("chaos"), seed=1)


@needs_c_compiler
def test_kill_during_save_resumes_bitwise_equal(chaos):
    """Inside the optimizer file, before the directory is renamed, and while an older one is removed."""
    chaos.uninterrupted("single", *EACH_STEP, **chaos.with_faults("reference-single-0", "single", 0))
    operations = chaos.operations("reference-single-0")

    def first(call, path):
        return next(number for number, made, at, _ in operations if made == call and at.endswith(path))

    # After a kill a start does a little more, so the later two fall a few operations earlier in their saves.
    numbers = [first("write", ".saving/checkpoint-1/optimizer.pt") + 2, first("rename", ".saving/checkpoint-2")]
    numbers.append(first("unlink", ".removing/checkpoint-1/optimizer.pt"))
    points = kill_points(chaos, "single", 0, numbers)
    assert len(points) == 3 and not any(point.differences for point in points), points
    assert points[0].path == ".saving/checkpoint-N/optimizer.pt" and points[-1].resumed_from >= 2, points


@needs_c_compiler
def test_disk_error_in_save_costs_only_that_save(chaos):
    fault = next(fault for fault in FAULTS if fault.arguments == STAIRS and fault.setup == "single")
    result = run_fault(chaos, fault)
    assert result.codes == [0] and result.differences == []
    name = next(path.stem for path in chaos.place.glob("18-*.operations"))
    failed = [operation for operation in chaos.operations(name) if operation[3]]
    assert ("rename", ".saving/checkpoint-") in {(call, path.rstrip("0123456789")) for _, call, path, _ in failed}


def numbers(labels):
    """The fault numbers of labels such as `12, 13` or `47 to 53`."""
    expanded = set()
    for label in labels:
        first, to, last = label.partition(" to ")
        expanded |= set(range(int(first), int(last) + 1)) if to else {int(number) for number in label.split(", ")}
    return expanded


def test_every_fault_is_covered_except_the_named_ones():
    injected, elsewhere, uncovered = numbers(fault.number for fault in FAULTS), numbers(COVERED), numbers(NOT_COVERED)
    assert uncovered == {7, 34} and not uncovered & (injected | elsewhere)
    assert injected | elsewhere == set(range(1, 54)) - uncovered


def test_covering_tests_exist():
    named = [place for _, places in COVERED.values() for place in places.split(", ") if place.startswith("tests/")]
    assert len(named) > 10
    for place in named:
        file, _, test = place.partition(";")[0].partition("::")
        assert (REPOSITORY / file).is_file(), place
        assert not test or f"def {test}(" in (REPOSITORY / file).read_text(), place
