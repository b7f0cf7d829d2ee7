"""`train-drafter` from end to end on a tiny model: it learns, goes on after a stop, and its drafter serves."""

import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

import checkpoints
from checkpoints.hf_names import drafter_name
from checkpoints.random_models import random_target
from dflash_jax.cli import main
from dflash_jax.engine.engine import Engine
from dflash_jax.engine.loading import load_model
from dflash_jax.models.drafter import Drafter
from dflash_jax.train.learner import Learner
from dflash_jax.train.openings import Opening, joints, opening_ids
from dflash_jax.train.recipe import Recipe
from dflash_jax.train.samples import Samples
from dflash_jax.train.writing import Style, Writer
from tests.tiny import F32, TARGET, TEMPLATE, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.slow

RECIPE = Recipe(layers=2, features=1, block_size=8, window=64, path_rank=16, batch_tokens=2048, tokens_per_anchor=8)
DEEP = dataclasses.replace(TARGET, layers=TARGET.layers * 2)
"""Has as many layers as a drafter reads by default."""


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A tiny target as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("model")
    names = {"embed": "model.embed_tokens.weight", "final_norm": "model.norm.weight"}
    tensors = {}
    for ours, value in random_target(DEEP).items():
        name = names.get(ours) or f"model.{drafter_name(ours)}"
        tensors[name] = np.asarray(value)
    save_file(tensors, folder / "model.safetensors")
    layer = TARGET.layers[0]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": TARGET.hidden_size,
        "intermediate_size": layer.mlp_width,
        "num_hidden_layers": DEEP.num_layers,
        "num_attention_heads": TARGET.num_heads,
        "num_key_value_heads": layer.num_kv_heads,
        "head_dim": layer.head_dim,
        "rms_norm_eps": TARGET.norm_eps,
        "rope_theta": 1e4,
        "vocab_size": TARGET.vocab_size,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "eos_token_id": 257,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    source = tiny_tokenizer()
    source._with_special.add_special_tokens(["<|mask|>"])
    (folder / "tokenizer.json").write_text(source._with_special.to_str(), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder


def train(*arguments):
    result = CliRunner().invoke(main, ["train-drafter", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


OPTIONS = (
    *("--layers", 1, "--features", 2, "--block-size", 6, "--path-rank", 8, "--batch-tokens", 1024, "--room", 256),
    *("--slots", 8, "--tokens", 4000, "--minutes", 5),
)


@pytest.fixture(scope="module")
def trained(model_folder, tmp_path_factory):
    """A drafter that has learnt for two steps. Nothing may be written there."""
    folder = tmp_path_factory.mktemp("trained") / "drafter"
    train(model_folder, folder, *OPTIONS, "--steps", 2)
    return folder


def test_a_drafter_is_trained_goes_on_and_serves(model_folder, tmp_path):
    out = tmp_path / "drafter"
    assert "(4 steps)" in train(model_folder, out, *OPTIONS, "--steps", 4)
    samples = (out / "samples.npz").read_bytes()
    assert "(7 steps)" in train(model_folder, out, *OPTIONS, "--steps", 7), "goes on where it was"
    assert (out / "samples.npz").read_bytes() == samples, "nothing is written anew"
    assert json.loads((out / "training.json").read_text())["recipe"]["block_size"] == 6
    # The folder can be moved: it needs none of its training state.
    shutil.rmtree(out / "training")
    model = load_model(model_folder, drafter=out)
    assert model.drafter is not None
    assert model.drafter.config.mask_id == tiny_mask(model_folder)
    answers = []
    for dflash in ("off", "on"):
        engine = Engine(model, dflash=dflash, pflash="off")
        answers.append(engine.generate("a question", max_tokens=40).token_ids)
        engine.close()
    assert answers[0] == answers[1]


def test_a_run_begins_with_another_drafter(model_folder, trained, tmp_path):
    first, second = shutil.copytree(trained, tmp_path / "first"), tmp_path / "second"
    samples = ("--samples", first / "samples.npz")
    assert "(1 steps)" in train(model_folder, second, *OPTIONS, *samples, "--start", first, "--steps", 1)
    refused = CliRunner().invoke(
        main,
        [
            *map(str, ("train-drafter", model_folder, tmp_path / "third", *OPTIONS, *samples, "--start", first)),
            *("--layers", "2", "--steps", "1"),
        ],
    )
    assert refused.exit_code == 1
    assert "another shape" in refused.output
    other = CliRunner().invoke(
        main, [*map(str, ("train-drafter", model_folder, first, *OPTIONS)), "--layers", "2", "--steps", "9"]
    )
    assert other.exit_code == 1
    assert "choose another folder" in other.output


@pytest.mark.parametrize(("weights", "nearness"), [("w8", 0.01), ("w4", 0.15)])
def test_a_run_begins_with_a_quantised_drafter(model_folder, trained, tmp_path, weights, nearness):
    """A rate that changes nothing leaves what the quantised weights stand for, which is near to the trained drafter."""
    checkpoints.convert(trained, tmp_path / weights, weights=weights, role="drafter", progress=lambda *_: None)
    samples = ("--samples", trained / "samples.npz")
    options = (*OPTIONS, *samples, "--start", tmp_path / weights, "--steps", 1, "--rate", 1e-12)
    train(model_folder, tmp_path / "out", *options)
    before, after = (checkpoints.load(folder).parameters for folder in (trained, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        old, new = np.asarray(value, np.float32), np.asarray(after[name], np.float32)
        assert np.linalg.norm(new - old) <= nearness * np.linalg.norm(old), name


def test_a_run_adds_a_convolution_to_another_drafter(model_folder, trained, tmp_path):
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    shutil.copytree(trained, first)
    samples = ("--samples", first / "samples.npz")
    train(model_folder, second, *OPTIONS, *samples, "--start", first, "--convolution", "--steps", 2)
    model = load_model(model_folder, drafter=second)
    assert model.drafter is not None
    assert model.drafter.config.convolution_group == 16
    taps = np.asarray(model.drafter.layers[0].mlp_convolution.taps.get_value())
    assert 0 < np.abs(taps - [[1], [0], [1], [0]]).max() < 0.1, "it has learnt a little, from one that changes nothing"
    assert "another shape" in refusal(model_folder, third, *OPTIONS, *samples, "--start", second)
    assert "has a run with convolution True" in refusal(model_folder, second, *OPTIONS, *samples)
    # Runs of versions before the choice go on.
    note = first / "training" / "run.json"
    written = json.loads(note.read_text())
    del written["recipe"]["convolution"]
    note.write_text(json.dumps(written))
    assert "(3 steps)" in train(model_folder, first, *OPTIONS, "--steps", 3)


def refusal(*arguments):
    result = CliRunner().invoke(main, ["train-drafter", *map(str, arguments)])
    assert result.exit_code == 1, result.output
    return result.output


def test_a_folder_that_holds_something_else_is_left_alone(model_folder, tmp_path):
    before = {file.name: file.read_bytes() for file in model_folder.iterdir()}
    assert "holds other files" in refusal(model_folder, model_folder, *OPTIONS)
    assert {file.name: file.read_bytes() for file in model_folder.iterdir()} == before
    out = tmp_path / "out"
    (out / "training").mkdir(parents=True)
    (out / "training" / "target.json").write_text('{"vocabulary": 7}', encoding="utf-8")
    assert "for another model" in refusal(model_folder, out, *OPTIONS)
    (out / "training" / "target.json").write_text("{", encoding="utf-8")
    assert "damaged" in refusal(model_folder, out, *OPTIONS)
    assert "is the folder that is written" in refusal(model_folder, out, *OPTIONS, "--start", out)


def test_prompts_that_the_template_refuses_are_skipped(model_folder, tmp_path):
    strict = tmp_path / "strict"
    shutil.copytree(model_folder, strict)
    alternate = "{% if 'bad' in messages[0].content %}{{ raise_exception('no') }}{% endif %}"
    (strict / "chat_template.jinja").write_text(alternate + TEMPLATE, encoding="utf-8")
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "good"}\n{"prompt": "bad"}\n{broken\n', encoding="utf-8")
    output = train(strict, tmp_path / "out", *OPTIONS, "--tokens", 300, "--steps", 1, "--data", data)
    assert "prompts skipped" in output
    data.write_text('{"prompt": "bad"}\n', encoding="utf-8")
    assert "refuses all prompts" in refusal(strict, tmp_path / "none", *OPTIONS, "--data", data)


def test_samples_of_something_else_are_refused(model_folder, tmp_path):
    other, strange = tmp_path / "other.npz", tmp_path / "strange.npz"
    np.savez(other, a=np.ones(3))
    Samples.of([([1, 2, 70_000], [False, True, True])]).save(strange)
    text = tmp_path / "text.npz"
    text.write_text("PK\x03\x04 but no archive", encoding="utf-8")
    reasons = {other: "holds no samples", strange: "whose vocabulary is 300", text: "holds no samples"}
    for file, reason in reasons.items():
        assert reason in refusal(model_folder, tmp_path / "out", "--features", 2, "--samples", file)


@pytest.mark.parametrize("change", [{}, {"labels": "target", "convolution": True}], ids=str)
def test_what_it_learnt_is_accepted(change):
    """On its own data a drafter gets beyond two tokens a block, and decoding agrees with what training says."""
    model = tiny_model()
    openings = [Opening(({"role": "user", "content": f"question {n}"},), whole=True) for n in range(12)]
    given = [(opening, opening_ids(opening, model.template, model.tokenizer)) for opening in openings]
    between = joints(model.template, model.tokenizer)
    style = Style(answers=((0.0, 1.0),), answer_tokens=64)
    writer = Writer(model.target, between, slots=8, room=256, style=style)
    samples = writer.write(itertools.cycle(given), tokens=1500).samples.cut(512)
    recipe = dataclasses.replace(RECIPE, **change)
    learner = Learner(model.target, recipe.config_for(model.target.config, mask_id=290), recipe)
    state, length, step = learner.start(), 0.0, 0
    batches = list(samples.batches(np.random.default_rng(0), RECIPE.batch_tokens))
    while length < 2.5 and step < 600:
        for batch in batches:
            state, progress = learner.learn(state, batch, jax.random.fold_in(jax.random.key(0), step), 3e-3)
            length, step = float(progress.path_accept_length), step + 1
    assert length >= 2.5
    drafter = Drafter(learner.config, state.parameters, dtype=F32)
    answers = {}
    for dflash in ("on", "off"):
        engine = Engine(dataclasses.replace(model, drafter=drafter), dflash=dflash, pflash="off")
        answers[dflash] = [engine.generate(list(opening.messages), max_tokens=48) for opening in openings]
        engine.close()
    assert [each.token_ids for each in answers["on"]] == [each.token_ids for each in answers["off"]]
    drafted = [each.stats.dflash for each in answers["on"]]
    committed, steps = sum(s.committed_tokens for s in drafted), sum(s.verify_steps for s in drafted)
    assert committed / steps > 1.8


def tiny_mask(folder):
    tokens = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    return next(token["id"] for token in tokens if token["content"] == "<|mask|>")


@pytest.mark.parametrize("devices", [2])
def test_two_devices_learn_what_one_learns(devices):
    """The same rows on one device and spread over two: another random draw of anchors, the same direction."""
    script = """
import jax, numpy as np, sys
from tests.tiny import tiny_model
from tests.train.test_run import RECIPE
from dflash_jax.train.learner import Learner
from dflash_jax.train.samples import Batch
model = tiny_model()
learner = Learner(model.target, RECIPE.config_for(model.target.config, mask_id=290), RECIPE)
state = learner.start()
tokens = np.random.default_rng(0).integers(0, 256, (4, 512)).astype(np.int32)
answers = np.ones((4, 512), np.bool_)
losses = []
for step in range(4):
    state, progress = learner.learn(state, Batch(tokens, answers), jax.random.key(step), 1e-3)
    losses.append(float(progress.loss))
print(learner.devices, *losses)
"""
    outputs = []
    for count in (1, devices):
        flags = f"--xla_force_host_platform_device_count={count}"
        done = subprocess.run(
            [sys.executable, "-c", script], env={**os.environ, "XLA_FLAGS": flags}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        outputs.append([float(number) for number in done.stdout.split()])
    assert [output[0] for output in outputs] == [1, devices]
    np.testing.assert_allclose(outputs[0][1:], outputs[1][1:], rtol=0.05)
