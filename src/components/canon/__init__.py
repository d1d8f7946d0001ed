"""Canon layers: short causal weighted sums over neighbouring tokens (*Physics of Language Models, Part 4.1*)."""

from src.components.canon.config import POINTS, CanonConfig
from src.components.canon.layer import Canon, canon_at

__all__ = ["POINTS", "Canon", "CanonConfig", "canon_at"]
