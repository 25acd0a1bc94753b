"""Which checkpoint a start resumes from, outside a process group."""

from sft_recipes.planner import plan as plans
from sft_recipes.training.checkpoint import resume


class Alone:
    """What `resume` asks of accelerate, for one process."""

    is_main_process, process_index, num_processes = True, 0, 1


def chosen(folder):
    """What a start would go on from, and what it says."""
    said = []
    point = resume.newest(plans.read(folder.plan), folder, Alone(), said.append)
    return point, said
