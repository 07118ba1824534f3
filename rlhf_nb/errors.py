"""What ends a run, and what keeps it going when memory runs out."""
import logging
import traceback
from dataclasses import dataclass

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

logger = logging.getLogger(__name__)


class RunError(RuntimeError):
    "A run that cannot continue."


def first_line(e: Exception) -> str:
    "The start of an exception's message; without one, its kind."
    return next(iter(str(e).strip().splitlines()), type(e).__name__)


def halve_on_out_of_memory(e: RuntimeError,  # What a pass raised
                           rows: int,        # Rows of that pass
                           saves: str,       # Settings that would have saved the attempt
                           otherwise: str,   # What else would help
                           in_step: bool,    # Do other processes wait within the same pass?
) -> int:
    "Half the rows, memory freed, and a warning; `RunError` where nothing is left to halve; others are raised."
    if not should_reduce_batch_size(e): raise e
    traceback.clear_frames(e.__traceback__) # They hold the tensors of the pass
    clear_device_cache(garbage_collection=True)
    if rows == 1: raise RunError(f"Out of memory with one row at a time. What helps: {otherwise}") from e
    if in_step:
        raise RunError(
            f"Out of memory with {rows} rows at a time, and weights are sharded: other processes wait within the pass."
            f" What helps: {saves}, {otherwise}"
        ) from e
    logger.warning("Out of memory with %d rows at a time: %d from now on; %s saves the attempt", rows, rows // 2, saves)
    return rows // 2


@dataclass
class Skips:
    "Updates that were skipped because a number was not finite."
    total: int = 0
    in_a_row: int = 0
    since: int = 0    # The first update of the row
    what: str = ""    # What was not finite in it

    def count(self, step: int, problem: str | None): # The update, from 1 on; None: it is complete
        "Note how an update ended."
        if problem is None:
            self.in_a_row = 0
            return
        if not self.in_a_row: self.since, self.what = step, problem
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        logger.warning("Update %d is skipped: %s not finite", step, problem)
