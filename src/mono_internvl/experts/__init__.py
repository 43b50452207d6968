"""How fast it is: routing, and the expert implementations behind one definition."""

from mono_internvl.experts.registry import EXPERT_PATHS, check_expert_path, run_fast_path
from mono_internvl.experts.routing import Routing

__all__ = ["EXPERT_PATHS", "Routing", "check_expert_path", "run_fast_path"]
