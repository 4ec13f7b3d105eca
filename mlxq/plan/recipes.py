"""Recipes: how many bits a role gets, as data and short rules. Pure."""

from __future__ import annotations

from mlxq.errors import PlanError
from mlxq.plan.roles import Role

#: Lowest bits of a role, whatever the recipe; `--tensor-type` alone goes below. Routers decide which expert runs,
#: and an embedding's error enters every token unaveraged.
FLOORS: dict[Role, int] = {"router": 8, "embedding": 6}

#: Bits of a sensitive tensor in the mixed recipe, by the base bits: about the step that llama.cpp's Q4_K_M takes
#: (Q4_K to Q6_K) and those of its neighbours.
_MORE = {2: 4, 3: 5, 4: 6, 5: 6, 6: 8, 8: 8}

RECIPES = ("uniform", "mixed")


def _deserves_more(layer: int | None, n_layers: int) -> bool:
    """llama.cpp's `use_more_bits`: the first and last eighth of the layers, and every third between."""
    if layer is None:
        return False
    eighth = n_layers // 8
    return layer < eighth or layer >= 7 * n_layers // 8 or (layer - eighth) % 3 == 2


def recipe_bits(recipe: str, role: Role, layer: int | None, n_layers: int, bits: int) -> tuple[int, str]:
    """Bits for a tensor and the reason, under a recipe with base `bits`.

    Raises:
        PlanError: no such recipe.
    """
    if recipe not in RECIPES:
        raise PlanError(f"unknown recipe {recipe!r}: choose one of {', '.join(RECIPES)}")
    chosen, reason = bits, f"{recipe}: {role}"
    if recipe == "mixed":
        if role in ("head", "embedding"):
            chosen = _MORE[bits]
        elif role in ("value", "down") and _deserves_more(layer, n_layers):
            chosen = _MORE[bits]
            reason = f"mixed: {role} of a sensitive layer"
    floor = FLOORS.get(role, 0)
    if chosen < floor:
        return floor, f"{role}s get at least {floor} bits"
    return chosen, reason
