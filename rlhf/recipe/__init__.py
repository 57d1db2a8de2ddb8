"""What a recipe may say: schema, strict YAML, overrides, suggestions. Imports no torch, so `rlhf check` answers at once."""

from rlhf.recipe.load import load_recipe, load_source
from rlhf.recipe.schema import Recipe

__all__ = ["Recipe", "load_recipe", "load_source"]
