"""Prompts as they come from a shell: bytes, which need not be UTF-8."""

from __future__ import annotations

import functools
import sys

import command
import pytest
import tiny

mlxq = functools.partial(command.mlxq, stdin=b"")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.make_model(tmp_path_factory.mktemp("prompts") / "model")


@pytest.mark.skipif(sys.platform == "darwin", reason="arguments of macOS programs are UTF-8")
@pytest.mark.parametrize("option", ["-p", "--system"])
def test_an_argument_that_is_not_utf8(model, option):
    done = mlxq("generate", model, "-p", "hi", option, b"caf\xe9")
    assert done.returncode == 1
    assert done.stdout == b""
    assert done.stderr.count(b"\n") == 1
    assert b"not valid Unicode: character 4 is a lone surrogate" in done.stderr


def test_standard_input_that_is_not_utf8(model):
    done = mlxq("generate", model, stdin=b"caf\xe9 au lait")
    assert done.returncode == 1
    assert done.stdout == b""
    assert done.stderr.count(b"\n") == 1
    assert b"standard input is not UTF-8 text: byte 0xe9 at offset 3" in done.stderr


@pytest.mark.slow
def test_standard_input_is_utf8_whatever_the_locale(model):
    arguments = ("generate", model, "-m", "4", "--no-chat-template")
    expected = mlxq(*arguments, "-p", "日本\nnaïve")
    assert expected.returncode == 0, expected.stderr
    text = "\ufeff日本\r\nnaïve\n".encode()
    done = mlxq(*arguments, stdin=text, PYTHONUTF8="0", LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONIOENCODING="utf-8")
    assert (done.returncode, done.stdout) == (0, expected.stdout), done.stderr
