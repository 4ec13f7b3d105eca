"""The Modelfile's template says, letter for letter, what the model's own chat template says."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from mlxq.writers.gguf.chat_turns import chat_turns
from mlxq.writers.gguf.modelfile import go_template, modelfile, ollama_parameters

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\\n\\n' }}"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
GEMMA2 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\\n' + m.content | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
FIRST = (
    "{{ bos_token }}{% set rest = messages %}{% set lead = '' %}{% if messages[0].role == 'system' %}"
    "{% set lead = messages[0].content + '\\n\\n' %}{% set rest = messages[1:] %}{% endif %}{% for m in rest %}"
)
GEMMA3 = (
    FIRST + "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}"
    "{{ (lead if loop.first else '') + m.content | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
MISTRAL = (
    FIRST + "{% if m.role == 'user' %}{{ '[INST] ' + (lead if loop.last else '') + m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
DEFAULT = "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\n%s<|im_end|>\\n' }}{% endif %}" + CHATML
#: Template -> where its system prompt goes, and the one it has of its own.
KNOWN = {
    "chatml": (CHATML, "turn", None),
    "chatml with a system prompt": (DEFAULT.replace("%s", "You are helpful."), "turn", "You are helpful."),
    "chatml with an empty system prompt": (DEFAULT.replace("%s", ""), "turn", ""),
    "llama3": (LLAMA3, "turn", None),
    "gemma2": (GEMMA2, "none", None),
    "gemma3": (GEMMA3, "first user", None),
    "mistral": (MISTRAL, "last user", None),
    "zephyr": (ZEPHYR, "turn", None),
}
TODAY = "{{ strftime_now('%Y') }}" + CHATML
THINKING = CHATML.replace("m.content", "(m.content if loop.last else 'earlier: ' + m.content)")
SYSTEM = [{"role": "system", "content": "Be brief.\n\nAlways."}]
TALKS = {
    "one": [{"role": "user", "content": "Hello\n  there"}],
    "three": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello {{ you }}!"},
        {"role": "user", "content": 'say "it"'},
    ],
}


def rendered(template: str, messages: list[dict]) -> str:
    from jinja2 import Environment

    environment = Environment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        messages=messages, add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
    )


def conversations(place: str) -> list[list[dict]]:
    talks = list(TALKS.values())
    return talks if place == "none" else [*talks, *([*SYSTEM, *talk] for talk in talks)]


@pytest.mark.parametrize("name", KNOWN)
def test_known_templates(name):
    template, place, default = KNOWN[name]
    turns = chat_turns(template, "<s>", "</s>")
    assert turns is not None
    assert (turns.place, turns.default_system) == (place, default)
    for messages in conversations(place):
        assert turns.render(messages) == rendered(template, messages).removeprefix("<s>")


@pytest.mark.parametrize("template", [TODAY, THINKING, "{{ nonsense", "", "{{ messages[0].content }}", "{% for"])
def test_templates_without_a_plain_form(template):
    assert chat_turns(template, "<s>", "</s>") is None


GO_PROGRAM = """
package main

import (
	"encoding/json"
	"os"
	"text/template"
)

type Message struct{ Role, Content string }
type Case struct {
	Template, System string
	Messages         []*Message
}

func main() {
	var cases []Case
	var out []string
	if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil {
		panic(err)
	}
	for _, c := range cases {
		t := template.Must(template.New("").Option("missingkey=zero").Parse(c.Template))
		var b = new(strings.Builder)
		if err := t.Execute(b, map[string]any{"System": c.System, "Messages": c.Messages, "Response": ""}); err != nil {
			panic(err)
		}
		out = append(out, b.String())
	}
	json.NewEncoder(os.Stdout).Encode(out)
}
""".replace('"os"\n', '"os"\n\t"strings"\n')


def test_go_templates_say_the_same(tmp_path):
    """Through Go's own `text/template`, with the values that Ollama gives a template."""
    go = shutil.which("go")
    if go is None:
        pytest.skip("Go is not installed")
    cases, expected = [], []
    for template, place, _ in KNOWN.values():
        turns = chat_turns(template, "<s>", "</s>")
        for messages in conversations(place):
            has_system = messages[0]["role"] == "system"
            if turns.default_system and not has_system:
                messages = [{"role": "system", "content": turns.default_system}, *messages]
                has_system = True
            system = messages[0]["content"] if has_system else ""
            shown = [{"Role": m["role"], "Content": m["content"]} for m in messages]
            cases.append({"Template": go_template(turns), "System": system, "Messages": shown})
            expected.append(rendered(template, messages).removeprefix("<s>"))
    (tmp_path / "main.go").write_text(GO_PROGRAM)
    command = [go, "run", str(tmp_path / "main.go")]
    done = subprocess.run(command, input=json.dumps(cases), capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected


def test_modelfile():
    text = modelfile(
        "model-Q4_K_M.gguf",
        KNOWN["chatml with a system prompt"][0],
        ["<|im_end|>", "<|endoftext|>", "<|im_end|>"],
        {"temperature": 0.7, "top_k": 20},
        licence="MIT\n",
    )
    lines = text.splitlines()
    assert lines[0] == "FROM ./model-Q4_K_M.gguf"
    assert lines[1].startswith(
        'TEMPLATE """{{ range $i, $m := .Messages }}{{ if eq .Role "system" }}<|im_start|>system'
    )
    assert 'SYSTEM """You are helpful."""' in lines
    stops = [line for line in lines if line.startswith("PARAMETER stop")]
    assert stops == ['PARAMETER stop """<|im_end|>"""', 'PARAMETER stop """<|endoftext|>"""']
    assert "PARAMETER temperature 0.7" in lines
    assert 'LICENSE """MIT' in lines


@pytest.mark.parametrize(("template", "why"), [(TODAY, "does more than"), (None, "has no chat template")])
def test_no_template_says_why(template, why):
    text = modelfile("m.gguf", template, [], {})
    assert 'TEMPLATE "' not in text
    assert why in text
    assert all(line.startswith(("FROM ", "# ")) for line in text.splitlines())


def test_literals_that_go_would_read_are_not_written():
    turns = chat_turns(CHATML.replace("<|im_end|>", "{{"))
    assert turns.user[1] == "{{\n"
    assert go_template(turns) is None


def test_parameters():
    assert ollama_parameters({"temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1, "max_length": 3}) == {
        "temperature": 0.6,
        "top_p": 0.9,
        "repeat_penalty": 1.1,
    }
    assert ollama_parameters({"do_sample": False, "temperature": 1.0}) == {"temperature": 0}
    assert ollama_parameters({}) == {}


def test_smollm2(smollm2_gguf: Path):
    from mlxq.checkpoint.gguf.checkpoint import GgufCheckpoint

    with GgufCheckpoint(smollm2_gguf, metadata_only=True) as checkpoint:
        template = checkpoint.companion_files()["chat_template.jinja"].decode()
    turns = chat_turns(template)
    assert turns is not None
    assert turns.default_system == "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
