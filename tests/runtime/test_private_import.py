"""mlx-lm's model files, imported privately by several threads at once."""

from __future__ import annotations

import subprocess
import sys

#: The first thread is held up in the middle of the preparation; the second must wait for it.
_RACE = """
import importlib, threading, time
from mlxq.architectures import registry

original = importlib.import_module
def slow(name, *rest):
    if name.endswith("models.base"):
        time.sleep(0.3)
    return original(name, *rest)

registry.importlib.import_module = slow
found = []
def use(name):
    module = registry.import_private(f"models.{name}")
    found.append(type(module.scaled_dot_product_attention).__name__)

threads = [threading.Thread(target=use, args=(name,)) for name in ("llama", "qwen2")]
for thread in threads:
    thread.start()
    time.sleep(0.1)
for thread in threads:
    thread.join()
print(found)
"""


def test_no_model_takes_a_function_before_it_can_be_overridden():
    done = subprocess.run([sys.executable, "-c", _RACE], capture_output=True, text=True, check=False)
    assert done.stdout == "['_Overridable', '_Overridable']\n", done.stderr
