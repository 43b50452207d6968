"""How fast it is: routing, and the expert implementations behind one definition."""

from mono_internvl.experts.registry import check_implementation, run_implementation
from mono_internvl.experts.routing import Routing

__all__ = ["Routing", "check_implementation", "run_implementation"]
