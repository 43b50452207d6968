"""The miniature: a small rendered world, its text and its tokenizer, written to ordinary files."""

from mono_internvl.miniature.stages import WorldSize
from mono_internvl.miniature.world import FULL, QUICK, WorldFiles, write_world

__all__ = ["FULL", "QUICK", "WorldFiles", "WorldSize", "write_world"]
