"""A function for another process that fails; apart, so that little is imported there."""

from mono_internvl.errors import RecipeError
from mono_internvl.training.distributed import barrier, rank


def fail_in_second() -> None:
    """The second process fails while the first waits for it."""
    if rank() == 1:
        raise RecipeError("the second process does not like its recipe")
    barrier()
