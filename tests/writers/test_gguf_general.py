"""What a GGUF file says of its model."""

import pytest
from gguf_tokenizers import write_gguf

from mlxq.checkpoint.gguf.file import GgufFile
from mlxq.writers.gguf.general import general_metadata

CARD = """---
license: apache-2.0
base_model: Some-Org/Base-1B
language:
- en
- no
tags: [small, chat]
---
# A model
"""


def general(source="model", **options) -> dict:
    metadata = general_metadata(source, **({"architecture": "llama", "file_type": 15} | options))
    return {k.removeprefix("general."): v for k, v in metadata.items()}


def test_what_every_file_says():
    found = general()
    assert found["architecture"] == ("string", "llama")
    assert found["file_type"] == ("uint32", 15)
    assert found["quantization_version"] == ("uint32", 2)
    assert found["quantized_by"] == ("string", "mlxq")
    assert found["name"] == ("string", "Model")


def test_a_hub_name_is_taken_apart():
    found = general("SomeOrg/Small-1.5-3B-Instruct", parameters=(3_100_000_000, 0, 0))
    assert found["organization"] == ("string", "SomeOrg")
    assert found["basename"] == ("string", "Small-1.5")
    assert found["finetune"] == ("string", "Instruct")
    assert found["size_label"] == ("string", "3B")
    assert found["source.repo_url"] == ("string", "https://huggingface.co/SomeOrg/Small-1.5-3B-Instruct")


def test_a_directory_gives_its_name(tmp_path):
    path = tmp_path / "my-model"
    path.mkdir()
    found = general(str(path) + "/", parameters=(226_000_000, 0, 0))
    assert found["name"] == ("string", "My Model")
    assert found["size_label"] == ("string", "226M")
    assert not any(k.startswith(("source", "organization")) for k in found)


def test_phi3_keeps_the_name_that_llamacpp_looks_for():
    assert general("some/Phi-3-mini-4k-instruct")["name"] == ("string", "Phi-3 Mini 4k Instruct")
    assert general("some/phi-4")["name"] == ("string", "Phi 4")


def test_experts_are_counted_apart():
    # 8 experts of 1e9 parameters each beside 2e9 others.
    assert general(parameters=(10_000_000_000, 8_000_000_000, 8))["size_label"] == ("string", "8x3.0B")


def test_the_card(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(CARD)
    found = general(readme=readme, licence_files={"LICENSE": b"MIT License"})
    assert found["license"] == ("string", "apache-2.0")
    assert found["base_model.count"] == ("uint32", 1)
    assert found["base_model.0.repo_url"] == ("string", "https://huggingface.co/Some-Org/Base-1B")
    assert found["languages"] == ("string[]", ["en", "no"])
    assert found["tags"] == ("string[]", ["small", "chat"])


@pytest.mark.parametrize("text", ["", "no front matter", "---\n: [broken\n---\n", "---\n- a list\n---\n"])
def test_a_card_that_says_nothing(tmp_path, text):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    assert "license" not in general(readme=readme)


@pytest.mark.parametrize(
    ("text", "identifier"),
    [
        (b"\n            Apache License\n        Version 2.0, January 2004\n", "apache-2.0"),
        (b"MIT License\n\nCopyright (c) 2024", "mit"),
        (b"LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\n", "llama3.1"),
    ],
)
def test_known_licence_texts(text, identifier):
    found = general(licence_files={"NOTICE": b"x", "LICENSE.txt": text})
    assert found["license"] == ("string", identifier)


def test_an_unknown_licence_is_named_by_its_first_line():
    found = general(licence_files={"LICENSE": b"\n The Very Own Licence \nof us"})
    assert found["license"] == ("string", "other")
    assert found["license.name"] == ("string", "The Very Own Licence")


def test_sampling():
    found = general(generation_config={"temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": 2})
    assert found["sampling.temp"] == ("float32", 0.6)
    assert found["sampling.top_k"] == ("int32", 20)
    assert found["sampling.top_p"] == ("float32", 0.95)
    assert not any(k.startswith("sampling") for k in general(generation_config={"do_sample": False, "top_k": 5}))


def test_a_gguf_source_is_kept():
    previous = {
        "general.architecture": "qwen2",
        "general.name": "Old Name",
        "general.license": "mit",
        "general.file_type": 7,
        "general.alignment": 64,
        "general.tags": ["a"],
        "general.base_model.count": 0,
        "llama.block_count": 3,
    }
    found = general("x/old.gguf", previous=previous)
    assert found["name"] == ("string", "Old Name")
    assert found["tags"] == ("string[]", ["a"])
    assert found["base_model.count"] == ("uint32", 0)
    assert found["file_type"] == ("uint32", 15)
    assert found["architecture"] == ("string", "llama")
    assert "alignment" not in found
    assert "llama.block_count" not in found


def test_a_file_holds_it(tmp_path):
    """The kinds are those of the values, and what is read back is what was said."""
    readme = tmp_path / "README.md"
    readme.write_text(CARD)
    said = general_metadata(
        "org/a-1b", architecture="llama", file_type=1, readme=readme, generation_config={"top_k": 3, "temperature": 0.5}
    )
    rest = {k: v for k, v in said.items() if k != "general.architecture"}
    file = GgufFile(write_gguf(tmp_path / "m.gguf", rest, 8))
    assert {k: v for k, v in file.metadata.items() if k.startswith("general.")} == {k: v for k, (_, v) in said.items()}
    file.close()
