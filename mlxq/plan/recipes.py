"""Recipes: how many bits a role gets, as data and short rules. Pure."""

from __future__ import annotations

from mlxq.errors import PlanError
from mlxq.plan import four_way
from mlxq.plan.roles import Role, is_sensitive

#: Lowest bits of a role, whatever the recipe; `--tensor-type` alone goes below. Routers decide which expert runs,
#: and an embedding's error enters every token unaveraged.
FLOORS: dict[Role, int] = {"router": 8, "embedding": 6}

#: Bits of a sensitive tensor in the mixed recipe, by the base bits: about the step that llama.cpp's Q4_K_M takes
#: (Q4_K to Q6_K) and those of its neighbours.
_MORE = {2: 4, 3: 5, 4: 6, 5: 6, 6: 8, 8: 8}

RECIPES = ("uniform", "mixed", "portable", "four-way")
#: Those whose codes an MLX directory and a GGUF file both hold.
RECIPES_OF_BOTH = ("portable", "four-way")

#: Bits and group size that ggml's blocks hold too: Q4_K or Q4_1, Q5_K or Q5_1, Q8_0.
PORTABLE_BITS = (4, 5, 8)
PORTABLE_GROUP = 32
_MORE_PORTABLE = {4: 5, 5: 8, 8: 8}
#: An embedding of 5 searched bits was measured to cost no more than one of 8 (KL 0.342 and 0.340 in a small model).
_PORTABLE_FLOORS: dict[Role, int] = {"router": 8, "embedding": 5}


def check_portable(bits: int, group_size: int) -> None:
    """Refuse a grid that ggml's blocks do not hold.

    Raises:
        PlanError: the message lists those they do.
    """
    if bits not in PORTABLE_BITS or group_size != PORTABLE_GROUP:
        legal = ", ".join(map(str, PORTABLE_BITS))
        raise PlanError(
            f"the portable recipe has {legal} bits and groups of {PORTABLE_GROUP}, as ggml's blocks do; "
            f"got {bits} bits and groups of {group_size}"
        )


def recipe_bits(recipe: str, role: Role, layer: int | None, n_layers: int, bits: int) -> tuple[int, str]:
    """Bits for a tensor and the reason, under a recipe with base `bits`.

    Raises:
        PlanError: no such recipe.
    """
    if recipe not in RECIPES:
        raise PlanError(f"unknown recipe {recipe!r}: choose one of {', '.join(RECIPES)}")
    if recipe == "four-way":
        return (four_way.BITS_BESIDE if role in ("embedding", "head") else bits), f"{recipe}: {role}"
    chosen, reason = bits, f"{recipe}: {role}"
    more = {"mixed": _MORE, "portable": _MORE_PORTABLE}.get(recipe)
    if more and role in ("head", "embedding"):
        chosen = more[bits]
    elif more and role in ("value", "down") and layer is not None and is_sensitive(layer, n_layers):
        chosen = more[bits]
        reason = f"{recipe}: {role} of a sensitive layer"
    floor = (_PORTABLE_FLOORS if recipe == "portable" else FLOORS).get(role, 0)
    if chosen < floor:
        return floor, f"{role}s get at least {floor} bits"
    return chosen, reason
