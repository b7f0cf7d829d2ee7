from __future__ import annotations

import sys

import pytest

from tools import compile_for_gpu


def test_says_what_to_install_where_there_is_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["compile_for_gpu.py"])
    monkeypatch.setattr(compile_for_gpu, "_PLUGINS", ("jax_plugins_nowhere.xla_cuda12", "jax.nowhere"))
    with pytest.raises(SystemExit, match=r'pip install "jax\[cuda12\]=='):
        compile_for_gpu.main()


def test_names_a_case_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["compile_for_gpu.py", "--case", "nothing"])
    monkeypatch.setattr(compile_for_gpu, "_PLUGINS", ("jax",))
    monkeypatch.setattr(compile_for_gpu, "_COMPILERS", ("jax.numpy",))
    with pytest.raises(SystemExit, match="no case 'nothing'"):
        compile_for_gpu.main()
