"""The model in other people's engines and harnesses, which find it by entry points.

Nothing here is imported by the package itself, and none of those tools is a dependency.
"""
