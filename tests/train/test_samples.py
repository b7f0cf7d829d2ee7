import numpy as np
import pytest

from dflash_jax.train.samples import LENGTHS, Samples


def some(lengths, vocabulary=1000):
    generator = np.random.default_rng(0)
    return Samples.of([(generator.integers(1, vocabulary, n), generator.random(n) < 0.5) for n in lengths])


@pytest.mark.parametrize("vocabulary", [1000, 200_000])
def test_samples_come_back_from_the_disk(tmp_path, vocabulary):
    samples = some([5, 700, 13], vocabulary)
    samples.save(tmp_path / "samples.npz")
    again = Samples.load(tmp_path / "samples.npz")
    for name in ("tokens", "answers", "starts"):
        np.testing.assert_array_equal(getattr(again, name), getattr(samples, name))


def test_another_file_is_refused(tmp_path):
    np.savez(tmp_path / "other.npz", a=np.ones(3))
    with pytest.raises(ValueError, match="holds no samples"):
        Samples.load(tmp_path / "other.npz")


def test_an_epoch_has_every_sample_that_fills_a_batch_once():
    samples = some([300] * 9 + [600] * 4 + [3000])
    batches = list(samples.batches(np.random.default_rng(1), 2048))
    assert sorted(batch.tokens.shape for batch in batches) == [(1, 2048), (2, 1024), (2, 1024), (4, 512), (4, 512)]
    rows = [tuple(row[row > 0]) for batch in batches for row in batch.tokens]
    whole = [tuple(samples[index][0][: LENGTHS[-1]]) for index in range(len(samples))]
    assert len(set(rows)) == len(rows)
    assert set(rows) <= set(whole)


def test_too_few_for_a_batch_are_repeated():
    (batch,) = some([100, 90]).batches(np.random.default_rng(0), 2048)
    assert batch.tokens.shape == (4, 512)
    assert (batch.answers.sum(axis=1) > 0).all()
