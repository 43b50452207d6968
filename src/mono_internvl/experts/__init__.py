"""How fast it is: routing, and the expert implementations behind one definition."""

from mono_internvl.experts.registry import check_implementation, run_implementation
from mono_internvl.experts.routing import KeptRows, Routing, labelled_rows

__all__ = ["KeptRows", "Routing", "check_implementation", "labelled_rows", "run_implementation"]
