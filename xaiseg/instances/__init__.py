"""Connected components, size filter, matching with a reference."""

from xaiseg.instances.components import instances_of, label_components
from xaiseg.instances.matching import Match, Matching, match_instances

__all__ = ["Match", "Matching", "instances_of", "label_components", "match_instances"]
