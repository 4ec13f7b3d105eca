"""`mlxq inspect`: what a model is and weighs, from its headers alone."""

from __future__ import annotations

import json
import sys

from mlxq.cli.options import DEFAULT_CONTEXT, Context, Json, Revision, Source


def inspect(
    model: Source, context: Context = DEFAULT_CONTEXT, as_json: Json = False, revision: Revision = None
) -> None:
    """Show architecture, formats, bits per weight, bytes, and the memory to run it. Reads no weights."""
    from mlxq.evaluate.inspect import inspect as run

    inspection = run(model, revision=revision, context=context)
    if as_json:
        json.dump(inspection.to_dict(), sys.stdout, indent=1, ensure_ascii=False)
        sys.stdout.write("\n")
        return
    from mlxq.cli.render import print_inspection

    print_inspection(inspection)
