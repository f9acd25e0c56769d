"""Models are compared only on images that both have, that neither has seen, and that have the same class for both."""

from dataclasses import replace

import numpy as np
import pytest

from pipeline.comparison.pairing import Pairing, pair, take
from pipeline.core.errors import UserError
from pipeline.evaluation.predictions import Predictions
from tests.compared import candidate, predictions, random_predictions, shuffled


@pytest.fixture(name="model")
def _model() -> Predictions:
    return random_predictions(60, num_classes=3, accuracy=0.7, seed=1)


def rows(pairing: Pairing) -> list[tuple[str, int, int, int]]:
    """Return hash, actual class, and predicted classes of both models for each image."""
    a, b = pairing.a, pairing.b
    return list(zip(a.content_hashes, a.actual.tolist(), a.predicted.tolist(), b.predicted.tolist(), strict=True))


def test_images_in_another_order_are_paired_by_their_hash(model: Predictions) -> None:
    other = random_predictions(60, num_classes=3, accuracy=0.7, seed=2)
    expected = pair(candidate(model), candidate(other))
    found = pair(candidate(shuffled(model)), candidate(shuffled(other, seed=1)))
    assert rows(found) == rows(expected)
    np.testing.assert_array_equal(found.b.probabilities, expected.b.probabilities)
    assert found.a.content_hashes == found.b.content_hashes
    assert (len(found), found.same_split, found.not_common) == (60, True, (0, 0))


def test_classes_in_another_order_are_paired_by_their_name(model: Predictions) -> None:
    order = [2, 0, 1]  # the other model's class i is this model's class order[i]
    new_index = np.argsort(order)
    other = replace(
        model,
        class_names=tuple(model.class_names[index] for index in order),
        actual=new_index[model.actual],
        predicted=new_index[model.predicted],
        probabilities=model.probabilities[:, order],
        calibrated_probabilities=np.sqrt(model.probabilities[:, order]),
    )
    found = pair(candidate(model), candidate(other)).b
    np.testing.assert_array_equal(found.predicted, model.predicted)
    np.testing.assert_array_equal(found.probabilities, model.probabilities)
    np.testing.assert_array_equal(found.best_probabilities, np.sqrt(model.probabilities))


def test_only_images_in_both_splits_are_compared_and_the_others_counted(model: Predictions) -> None:
    found = pair(candidate(take(model, np.arange(50))), candidate(take(model, np.arange(20, 60))))
    assert (len(found), found.same_split, found.not_common) == (30, False, (20, 10))
    assert found.a.names == [f"{index}.png" for index in range(20, 50)]


def test_images_that_a_model_has_seen_are_left_out_and_counted_once(model: Predictions) -> None:
    a = candidate(model, leaked=[0, 1, 2], trained_on=[2, 3])
    b = candidate(model, leaked=[1, 4], trained_on=[])
    for pairing in (pair(a, b), pair(b, a)):
        assert (len(pairing), pairing.trained_on, pairing.leaked, pairing.relabeled) == (55, 2, 3, 0)
        assert pairing.a.content_hashes[0] == f"{5:016x}"


def test_images_with_another_class_in_the_other_data_set_are_left_out_and_counted(model: Predictions) -> None:
    actual = model.actual.copy()
    actual[:4] = (actual[:4] + 1) % 3
    found = pair(candidate(model, leaked=[0]), candidate(replace(model, actual=actual)))
    assert (len(found), found.leaked, found.relabeled) == (56, 1, 3)


def test_of_several_images_with_one_hash_each_is_paired_once(model: Predictions) -> None:
    actual = np.where(np.arange(60) < 3, 0, model.actual)
    twice = replace(model, actual=actual, content_hashes=["f" * 16] * 3 + list(model.content_hashes[3:]))
    once = take(twice, np.arange(1, 60))
    found = pair(candidate(twice), candidate(once))
    assert (len(found), found.not_common) == (59, (1, 0))
    assert found.a.content_hashes.count("f" * 16) == 2


def test_three_models_are_compared_on_the_images_that_all_can_be_compared_on(model: Predictions) -> None:
    found = pair(candidate(model), candidate(take(model, np.arange(40))), candidate(model, leaked=[0]))
    assert [len(each) for each in found.models] == [39, 39, 39]
    assert found.not_common == (20, 0, 20)


def test_models_without_a_common_image_are_refused_with_the_reasons(model: Predictions) -> None:
    other = replace(model, content_hashes=[f"{index:016x}" for index in range(100, 160)])
    with pytest.raises(UserError, match=r"a and b have no test image .* found 0 in common; allowed: one test split"):
        pair(candidate(model, "a"), candidate(other, "b"))
    few = take(model, np.arange(3))
    with pytest.raises(UserError, match=r"found 3 in common, of which 2 were used to train .*, 1 nearly equal"):
        pair(candidate(few, trained_on=[0, 1]), candidate(few, leaked=[1, 2]))


def test_models_of_other_classes_are_refused() -> None:
    a, b = predictions([0], [0]), predictions([0], [0], classes=("cat", "bird"))
    with pytest.raises(UserError, match="a and b know different classes: bird, dog belong to one of them only"):
        pair(candidate(a, "a"), candidate(b, "b"))


def test_predictions_without_content_hashes_are_refused() -> None:
    old = replace(predictions([0], [0]), content_hashes=[""])
    with pytest.raises(UserError, match="old: its predictions have no content hashes"):
        pair(candidate(old, "old"), candidate(old))
