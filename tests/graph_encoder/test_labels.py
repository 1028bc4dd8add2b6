"""Classes of labels."""

import pytest

from graph_encoder.labels import CONSTANT, IntArray, LabelClasses


@pytest.mark.parametrize("pairs", ["each with the last", "each with the next"])
def test_one_large_class_is_made_in_a_few_rounds(pairs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    classes, rounds = LabelClasses(), []
    find = LabelClasses.find

    def counted(self: LabelClasses, labels: IntArray) -> IntArray:
        rounds.append(len(labels))
        return find(self, labels)

    monkeypatch.setattr(LabelClasses, "find", counted)
    labels = classes.fresh(4096)

    classes.union(labels[:-1], labels[-1:] if pairs == "each with the last" else labels[1:])

    assert (classes.find(labels.numpy()) == int(labels[0])).all()
    assert len(rounds) < 40


def test_channels_of_an_empty_tensor_have_no_labels() -> None:
    classes = LabelClasses()
    labels = classes.fresh(3)[None, :, None].expand(0, 3, 4)

    assert classes.along(labels, 1).tolist() == [CONSTANT] * 3
    assert not classes.frozen_reasons()
