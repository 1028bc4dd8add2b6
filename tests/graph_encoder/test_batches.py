import torch

from graph_encoder.batches import count_images, first_images


def test_first_images_are_cut_out_of_tensors_and_out_of_every_tensor_of_a_tuple() -> None:
    x, y = torch.arange(6), torch.arange(6) + 10

    single = first_images(x.split(4), 5)
    double = first_images(list(zip(x.split(4), y.split(4), strict=True)), 5)

    assert [batch.tolist() for batch in single] == [[0, 1, 2, 3], [4]]
    assert [[part.tolist() for part in batch] for batch in double] == [[[0, 1, 2, 3], [10, 11, 12, 13]], [[4], [14]]]
    assert count_images(single) == count_images(double) == 5


def test_first_images_are_all_where_there_are_fewer_and_end_at_whole_batches() -> None:
    batches = torch.arange(6).split(3)

    assert count_images(first_images(batches, 10)) == 6
    assert [len(batch) for batch in first_images(batches, 3)] == [3]


def test_inputs_of_no_dimension_hold_for_all_images_and_are_not_cut() -> None:
    scale, x = torch.tensor(2.0), torch.arange(6)

    batches = first_images([(scale, part) for part in x.split(4)], 5)

    assert [[part.tolist() for part in batch] for batch in batches] == [[2.0, [0, 1, 2, 3]], [2.0, [4]]]
    assert count_images(batches) == 5
    assert count_images(first_images([scale, scale, scale], 2)) == 2
