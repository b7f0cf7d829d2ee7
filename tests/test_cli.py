from __future__ import annotations

import json
import queue
import socket
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import ClassVar

import pytest
from click.testing import CliRunner, Result

import checkpoints
import dflash_jax
import dflash_jax.bench
from dflash_jax.cli import main
from dflash_jax.engine.request import Finished, Request, RequestError, Sampling
from dflash_jax.engine.tokenizer import TokenizerError
from dflash_jax.models.config import ConfigError
from tests.conftest import REPOSITORY
from tests.server.fake_engine import FakeEngine

ENGINE_DEFAULTS = {
    "drafter": None,
    "dflash": "auto",
    "tree": None,
    "pflash": "auto",
    "scorer": None,
    "keep_ratio": None,
    "pflash_scope": "agent",
    "bsa": False,
    "context_length": None,
}


class _Engine(FakeEngine):
    """A fake engine with what `generate` calls, which remembers how it was loaded."""

    loaded: tuple[Path | None, dict] | None = None
    last: _Engine | None = None
    options: ClassVar[dict] = {}

    @staticmethod
    def load(path=None, *, progress=None, **options):
        progress("loading", 0, 0)
        _Engine.loaded = (path, options)
        _Engine.last = _Engine(**_Engine.options)
        return _Engine.last

    def stream(self, prompt, **sampling):
        events: queue.SimpleQueue = queue.SimpleQueue()
        text, messages = (prompt, None) if isinstance(prompt, str) else (None, prompt)
        self.submit(Request(messages=messages, prompt=text, sampling=Sampling(**sampling)), events.put)
        while True:
            event = events.get()
            yield event
            if isinstance(event, Finished):
                return


@pytest.fixture(autouse=True)
def engine(monkeypatch):
    monkeypatch.setitem(vars(dflash_jax), "Engine", _Engine)  # without importing the real one
    monkeypatch.setattr(_Engine, "options", {})
    monkeypatch.setattr(_Engine, "loaded", None)
    monkeypatch.delenv("DFLASH_JAX_DEBUG", raising=False)
    return _Engine


def run(*arguments: str, **options) -> Result:
    return CliRunner().invoke(main, list(arguments), **options)


def _fails(result: Result, line: str) -> None:
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.splitlines()[-1] == f"error: {line}"
    assert "Traceback" not in result.stderr


def _raising(error: Exception):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (
            ["serve"],
            "--drafter --scorer --dflash --pflash --keep-ratio --pflash-scope --bsa --context-length --max-sessions "
            "--host --port --api-key",
        ),
        (["generate"], "-p --max-tokens --temperature --dflash --pflash --json"),
        (["convert"], "--weights --group-size --role"),
        (["bench", "decode"], "--prompts --json --max-tokens --drafter"),
        (["bench", "prefill"], "--prompts --json"),
        (["bench", "kernels"], "--operation --tune --json"),
        (["inspect"], "--json"),
    ],
)
def test_help_names_the_promised_options(command, options):
    result = run(*command, "--help")
    assert result.exit_code == 0
    for option in options.split():
        assert option in result.stdout.split() or f"{option}," in result.stdout, option


def test_help_imports_nothing_heavy():
    program = (
        "import sys; from dflash_jax.cli import main; main(['--help'], standalone_mode=False); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert "Commands:" in done.stdout
    loaded = set(done.stdout.splitlines()[-1].split())
    assert not loaded & {"jax", "numpy", "pydantic", "starlette", "uvicorn", "rich", "checkpoints"}


def test_python_m_runs_the_same_command():
    command = [sys.executable, "-m", "dflash_jax", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert done.stdout.startswith("dflash-jax ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["nothing"],
        ["generate"],
        ["generate", "-p", "x", "--max-tokens", "0"],
        ["generate", "-p", "x", "--temperature", "-1"],
        ["generate", "-p", "x", "--presence-penalty", "3"],
        ["generate", "-p", "x", "--logprobs", "2"],
        ["serve", "--pflash=maybe"],
        ["serve", "--port", "70000"],
        ["serve", "--keep-ratio", "0"],
        ["serve", "--keep-ratio", "1.5"],
        ["convert", "a"],
        ["convert", "a", "b", "--weights", "w3"],
        ["convert", "a", "b", "--group-size", "64"],
        ["bench", "decode", "--prompts", "no-such-file"],
    ],
)
def test_wrong_usage_has_status_2(arguments):
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Error: " in result.stderr


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (
            "serve --tree some/model",
            "'some/model' is not a number of rows, and --tree takes the word after it: put --tree last",
        ),
        ("bench decode --tree some/model", "'some/model' is not a number of rows"),
        ("serve some/model --tree=abc", "'abc' is not a number of rows"),
        ("serve --tree 1", "a tree has 2 rows at least"),
        ("serve --tree 33", "33 is not in the range 0<=x<=32"),
    ],
)
def test_a_tree_of_no_number_of_rows(arguments, reason):
    result = run(*arguments.split())
    assert result.exit_code == 2
    assert reason in result.stderr


@pytest.mark.parametrize(
    ("arguments", "rows"), [("m -p x --tree", 16), ("--tree=16 m -p x", 16), ("--tree 8 m -p x", 8), ("m -p x", None)]
)
def test_a_tree_may_leave_its_number_out(engine, arguments, rows):
    assert run("generate", *arguments.split()).exit_code == 0
    assert engine.loaded == (Path("m"), {**ENGINE_DEFAULTS, "tree": rows})


def test_generate_streams_text(engine):
    result = run("generate", "some/model", "-p", "What is the capital?", "--max-tokens", "4")
    assert (result.exit_code, result.stdout) == (0, "Paris is the capital\n")
    assert engine.loaded == (Path("some/model"), ENGINE_DEFAULTS)
    request = engine.last.handles[0].request
    assert request.messages == [{"role": "user", "content": "What is the capital?"}]
    assert request.sampling == Sampling(max_tokens=4, temperature=0.0)


def test_generate_json():
    result = run("generate", "-p", "What is the capital?", "--json")
    answer = json.loads(result.stdout)
    assert (answer["text"], answer["token_ids"]) == ("Paris is the capital.", [1, 2, 3, 4, 5])
    stats = answer["stats"]
    assert (stats["prompt_tokens"], stats["completion_tokens"], stats["finish_reason"]) == (4, 5, "stop")
    assert stats["dflash"] == {
        "verify_steps": 4,
        "committed_tokens": 14,
        "accept_length": 3.5,
        "steps_by_count": [],
    }
    assert stats["pflash"]["kept_tokens"] == 25


def test_generate_passes_its_options_on(engine):
    options = "--drafter d --scorer s --dflash on --tree --pflash off --keep-ratio 0.2 --pflash-scope all --bsa on"
    run("generate", "m", "-p", "x", "--raw", "--temperature", "0.5", "--context-length", "40", *options.split())
    assert engine.loaded == (
        Path("m"),
        {
            "drafter": Path("d"),
            "scorer": Path("s"),
            "dflash": "on",
            "tree": 16,
            "pflash": "off",
            "keep_ratio": 0.2,
            "pflash_scope": "all",
            "bsa": True,
            "context_length": 40,
        },
    )
    request = engine.last.handles[0].request
    assert (request.prompt, request.messages, request.sampling.temperature) == ("x", None, 0.5)


def test_generate_passes_sampling_options_on(engine):
    options = "--top-k 5 --top-p 0.5 --min-p 0.1 --seed 3 --repetition-penalty 1.2 --presence-penalty 1"
    result = run("generate", "-p", "x", *options.split(), "--frequency-penalty", "-1", "--logprobs", "1", "--json")
    assert engine.last.handles[0].request.sampling == Sampling(
        top_k=5,
        top_p=0.5,
        min_p=0.1,
        seed=3,
        repetition_penalty=1.2,
        presence_penalty=1,
        frequency_penalty=-1,
        logprobs=1,
    )
    first = json.loads(result.stdout)["logprobs"][0]
    top = [{"token_id": 100, "token": "\ufffd\0", "logprob": -1.0}]
    assert first == {"token_id": 1, "token": "Paris", "logprob": -0.5, "top": top}


def test_generate_reads_files_and_stdin(engine, tmp_path):
    (tmp_path / "prompt.txt").write_text("from a file")
    for argument, text in ((f"@{tmp_path}/prompt.txt", "from a file"), ("-", "from stdin")):
        assert run("generate", "-p", argument, input="from stdin").exit_code == 0
        assert engine.last.handles[0].request.messages == [{"role": "user", "content": text}]


def test_a_prompt_file_that_is_missing(tmp_path):
    _fails(run("generate", "-p", f"@{tmp_path}/no.txt"), f"{tmp_path}/no.txt: No such file or directory")


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_a_generation_that_fails_has_status_1(engine, as_json):
    engine.options = {"fail_at": 1}
    result = run("generate", "-p", "x", *as_json)
    assert result.exit_code == 1
    assert result.stdout.strip() == ""
    assert result.stderr.splitlines()[-1] == "error: ValueError: the device is on fire"


@pytest.mark.parametrize(
    "error", [RequestError, ConfigError, TokenizerError, lambda text: checkpoints.CheckpointError(text), OSError]
)
def test_what_a_user_got_wrong_is_one_line(engine, monkeypatch, error):
    monkeypatch.setattr(engine, "load", _raising(error("model x is\n  odd: convert it again")))
    _fails(run("generate", "-p", "x"), "model x is odd: convert it again")
    monkeypatch.setenv("DFLASH_JAX_DEBUG", "1")
    assert "odd" in str(run("generate", "-p", "x").exception)


def test_a_full_device_names_the_flags_that_help(engine, monkeypatch):
    monkeypatch.setattr(engine, "load", _raising(RuntimeError("RESOURCE_EXHAUSTED: 90 GB\nlong story")))
    result = run("generate", "m", "-p", "hi")
    assert result.exit_code == 1
    assert "--context-length" in result.stderr and len(result.stderr.splitlines()) == 1


def test_a_kernel_that_does_not_fit_is_no_full_device(engine, monkeypatch):
    message = "RESOURCE_EXHAUSTED: Shared memory size limit exceeded: requested 393216, available: 232448"
    monkeypatch.setattr(engine, "load", _raising(RuntimeError(message)))
    result = run("generate", "m", "-p", "hi")
    assert message in str(result.exception) and "--context-length" not in result.stderr


def test_a_prompt_that_is_not_text(engine, tmp_path):
    (tmp_path / "p").write_bytes(b"\x7fELF\xff\xfe")
    result = run("generate", "-p", f"@{tmp_path / 'p'}")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: not UTF-8 text") and len(result.stderr.splitlines()) == 1


def test_an_empty_api_key_is_no_key(engine):
    result = run("serve", "--api-key", " ")
    assert result.exit_code == 2
    assert "the API key is empty" in result.stderr


def test_a_bug_keeps_its_trace(engine, monkeypatch):
    monkeypatch.setattr(engine, "load", _raising(KeyError("bug")))
    assert isinstance(run("generate", "-p", "x").exception, KeyError)


def test_serve_hands_over(monkeypatch, engine):
    import dflash_jax.server.serve

    calls = []

    def serve(load, *arguments):
        calls.append((load(lambda *_: None), *arguments))

    monkeypatch.setattr(dflash_jax.server.serve, "serve", serve)
    assert run("serve", "--pflash=auto", "--bsa=on").exit_code == 0
    assert engine.loaded == (None, {**ENGINE_DEFAULTS, "bsa": True, "max_sessions": None})
    assert calls[-1][1:] == ("127.0.0.1", 8080, None)
    run("serve", "m", "--host", "0.0.0.0", "--port", "9000", "--max-sessions", "2", env={"DFLASH_JAX_API_KEY": "k"})
    assert calls[-1][1:] == ("0.0.0.0", 9000, "k")
    assert engine.loaded == (Path("m"), {**ENGINE_DEFAULTS, "max_sessions": 2})


def test_serve_on_a_port_in_use_fails_at_once_and_fast():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        command = [sys.executable, "-m", "dflash_jax", "serve", "--port", str(port)]
        started = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=20)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: port {port} is in use; choose another with --port\n"
    assert time.monotonic() - started < 10


def test_convert(monkeypatch):
    calls = []

    def convert(source, out, *, progress, **options):
        progress("writing", 1, 2)
        calls.append((source, out, options))
        return checkpoints.Conversion(groups=3, continued=0, bytes=1_500_000_000)

    monkeypatch.setattr(checkpoints, "convert", convert, raising=False)
    result = run("convert", "in.gguf", "out", "--weights", "w4", "--group-size", "128", "--role", "drafter")
    assert (result.exit_code, result.stdout) == (0, "out is ready\n")
    assert "writing (1/2)" in result.stderr
    assert "1.50 GB in 0 s" in result.stderr
    assert calls == [(Path("in.gguf"), Path("out"), {"weights": "w4", "group_size": 128, "role": "drafter"})]


def test_a_full_disk(monkeypatch):
    error = OSError(28, "No space left on device", "out/weights")
    monkeypatch.setattr(checkpoints, "convert", _raising(error), raising=False)
    _fails(run("convert", "in.gguf", "out"), "out/weights: No space left on device")


def test_inspect(monkeypatch):
    description = {"family": "llama", "shapes": {"layers": 30, "hidden_size": 576}, "weights": "w4", "path": Path("x")}
    monkeypatch.setattr(checkpoints, "describe", lambda path: description, raising=False)
    table = run("inspect", "x").stdout
    assert all(word in table for word in ("family", "llama", "shapes.layers", "30", "shapes.hidden_size", "576"))
    assert json.loads(run("inspect", "x", "--json").stdout) == {**description, "path": "x"}


def test_inspect_verify(monkeypatch):
    monkeypatch.setattr(checkpoints, "describe", lambda path: {"family": "llama", "bytes": 62_000_000_000})
    damaged = []
    monkeypatch.setattr(checkpoints, "verify", lambda path, progress: damaged)
    result = run("inspect", "x", "--verify")
    assert result.exit_code == 0
    assert "all checksums are right" in result.stdout and "62,000,000,000 (62.00 GB)" in result.stdout
    damaged.append("group 0003 (embed) is damaged: its checksum differs")
    result = run("inspect", "x", "--verify", "--json")
    assert (result.exit_code, json.loads(result.stdout)["verified"]) == (1, "damaged")
    line = "error: x: group 0003 (embed) is damaged: its checksum differs; convert the model again"
    assert result.stderr.splitlines()[-1] == line


@pytest.mark.parametrize(
    ("name", "arguments", "options"),
    [
        (
            "decode",
            "--max-tokens 16 --drafter d --limit 3 --dflash auto --tree 32 --temperature 0.7",
            {"max_tokens": 16, "drafter": Path("d"), "limit": 3, "dflash": "auto", "tree": 32, "temperature": 0.7},
        ),
        (
            "prefill",
            "--scorer s --keep-ratio 0.1 --pflash-scope document --bsa on --context-length 9000",
            {
                "scorer": Path("s"),
                "keep_ratio": 0.1,
                "pflash_scope": "document",
                "bsa": True,
                "context_length": 9000,
            },
        ),
    ],
)
def test_bench(monkeypatch, tmp_path, name, arguments, options):
    calls = []
    module = types.ModuleType(f"dflash_jax.bench.{name}")
    monkeypatch.setattr(module, "run", lambda *a, **k: calls.append((a, k)), raising=False)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(dflash_jax.bench, name, module, raising=False)
    (tmp_path / "p.jsonl").write_text("{}")
    files = ["--prompts", f"{tmp_path}/p.jsonl", "--json", "out.json"]
    assert run("bench", name, "m", *files, *arguments.split()).exit_code == 0
    file = tmp_path / "p.jsonl"
    expected = {
        "prompts": (file,) if name == "decode" else file,
        "json_file": Path("out.json"),
        "plot": None,
        **options,
    }
    assert calls == [((Path("m"),), expected)]
