"""Which checkpoint a run resumes from, outside of a process group, and what is logged."""

import contextlib
import logging

from sft_recipes.planner import plan as plans
from sft_recipes.training.checkpoint import resume


class OneRank:
    """The attributes of accelerate's Accelerator that `resume` uses, for one process."""

    is_main_process, process_index, num_processes = True, 0, 1


@contextlib.contextmanager
def logged_lines():
    """Collect what is logged."""
    lines, logger = [], logging.getLogger("sft_recipes")
    handler, level = logging.Handler(), logger.level
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def find_checkpoint(folder):
    """The checkpoint that a run resumes from, and the logged lines."""
    with logged_lines() as lines:
        return resume.find_latest_valid(plans.read(folder.plan), folder, OneRank()), lines
