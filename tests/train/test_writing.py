"""What the target writes is what it says by itself: greedy answers are compared with an engine's."""

import itertools
import json

import numpy as np
import pytest

from dflash_jax.engine.engine import Engine
from dflash_jax.engine.request import RequestError
from dflash_jax.train.openings import Opening, joints, opening_ids, own_openings, plain_words, read_openings
from dflash_jax.train.writing import Style, Writer
from tests.tiny import tiny_model

GREEDY = Style(question=0.8, answers=((0.0, 1.0),), answer_tokens=24)


def writer(model, **options):
    return Writer(
        model.target, joints(model.template, model.tokenizer), slots=4, room=256, style=GREEDY, seed=1, **options
    )


def openings(model, found):
    for opening in itertools.cycle(found):
        yield opening, opening_ids(opening, model.template, model.tokenizer)


def test_answers_to_given_questions_are_the_target_s_greedy_ones():
    model = tiny_model()
    found = [Opening(({"role": "user", "content": f"question {n}"},), whole=True) for n in range(6)]
    written = writer(model).write(openings(model, found), tokens=600)
    engine = Engine(model, dflash="off", pflash="off")
    try:
        seen = 0
        for index in range(len(written.samples)):
            tokens, answers = written.samples[index]
            first = int(np.argmax(answers))
            end = first + int(np.argmin(np.append(answers[first:], False)))
            text = model.tokenizer.decode(tokens[:first].tolist())
            question = next(opening for opening in found if opening.messages[0]["content"] in text)
            said = engine.generate(list(question.messages), max_tokens=end - first)
            assert list(said.token_ids) == tokens[first:end].tolist()
            seen += 1
        assert seen >= 6
    finally:
        engine.close()


def test_questions_are_completed_and_only_answers_are_marked():
    model = tiny_model()
    found = [Opening(({"role": "user", "content": "Write"},), whole=False)]
    written = writer(model).write(openings(model, found), tokens=500)
    between = joints(model.template, model.tokenizer)
    for index in range(len(written.samples)):
        tokens, answers = written.samples[index]
        first = int(np.argmax(answers))
        assert tokens[first - len(between.to_answer) : first].tolist() == between.to_answer.tolist()
        asked = opening_ids(found[0], model.template, model.tokenizer)
        assert tokens[: len(asked)].tolist() == asked.tolist()
        assert first > len(asked) + len(between.to_answer), "the target adds words of its own"


def test_prompts_that_leave_no_room_are_refused():
    model = tiny_model()
    found = [Opening(({"role": "user", "content": "x" * 300},), whole=True)]
    with pytest.raises(RequestError, match="no room"):
        writer(model).write(openings(model, found), tokens=500)


def test_broken_lines_and_empty_turns_are_skipped_and_counted(tmp_path):
    file = tmp_path / "prompts.jsonl"
    lines = [
        json.dumps({"prompt": "one"}),
        "{broken",
        json.dumps({"messages": []}),
        json.dumps({"messages": [{"role": "user", "content": " "}]}),
        json.dumps({"messages": [{"role": "user", "content": "two"}, {"role": "assistant", "content": "answer"}]}),
        json.dumps({"messages": [{"role": "assistant", "content": "alone"}]}),
        json.dumps([1, 2]),
        "",
    ]
    file.write_text("\n".join(lines), encoding="utf-8")
    found = read_openings(file)
    assert [opening.messages[-1]["content"] for opening in found.found] == ["one", "two"]
    assert found.skipped == 5
    file.write_text("{}\n", encoding="utf-8")
    with pytest.raises(RequestError, match="1 lines skipped"):
        read_openings(file)


def test_own_openings_are_many_and_render():
    model = tiny_model()
    words = plain_words(model.tokenizer) or ["bread", "Paris", "running"]
    found = own_openings(words).found
    assert len(found) > 1000
    asked = {opening.messages[-1]["content"] for opening in found}
    assert "Write a poem about bread" in asked
    assert asked == {opening.messages[-1]["content"] for opening in own_openings(words).found}
    assert all(len(opening_ids(opening, model.template, model.tokenizer)) > 5 for opening in found[::97])


def test_a_loop_ends_its_conversation():
    model = tiny_model()
    looping = writer(model)
    looping._rows.tokens[:, :200] = np.tile([5, 6, 7, 8], 50)
    looping._rows.length[:] = 150
    looping._rows.given[:] = [20, 20, 120, 20]
    looping._rows.live[:] = [True, False, True, True]
    looping._rows.tokens[3, 140] = 99
    assert looping._looping().tolist() == [True, False, False, False]
