"""How fast it is: routing, and the expert implementations behind one definition."""

from mono_internvl.experts.routing import Routing

__all__ = ["Routing"]
