import numpy as np
import pytest

from phyla.errors import InputError
from phyla.report.selection import (
    Examples,
    choose_examples,
    cluster_agreement,
    find_prototypes,
    margins,
    name_clusters,
    ranked_members,
    review_first,
    second_choice,
    summarize_clusters,
)
from phyla.types import Assignment, Neighbors


def assignment_of(rows):
    return Assignment(np.array(rows, dtype=np.float32), [str(i) for i in range(len(rows))])


def test_names_are_numbered_checked_and_told_apart():
    assert name_clusters(2) == ["Cluster 0", "Cluster 1"]
    assert name_clusters(3, ["cat", "dog", "cat"]) == ["cat (0)", "dog", "cat (2)"]
    with pytest.raises(InputError, match="3 clusters need 3 names, got 1"):
        name_clusters(3, ["cat"])


def test_members_come_by_falling_confidence_and_ties_in_order():
    found = list(ranked_members(assignment_of([[0.6, 0.4, 0], [0.9, 0.1, 0], [0.2, 0.8, 0], [0.9, 0.1, 0]])))
    assert [members.tolist() for members in found] == [[1, 3, 0], [2], []]


def test_prototype_is_the_surest_member_nearest_to_the_mean_of_ten():
    # 11 members on a line: the ten surest are 1..10, whose mean is 5.5; the least sure one lies exactly on it
    probabilities = [[0.5, 0.5]] + [[0.9, 0.1]] * 10 + [[0.1, 0.9]]
    embeddings = np.array([[5.5]] + [[float(i)] for i in range(1, 11)] + [[5.5]])
    assert find_prototypes(assignment_of(probabilities), embeddings).tolist() == [5, 11]


def test_prototype_of_a_small_cluster_is_its_own_image_and_of_an_empty_one_none():
    found = find_prototypes(assignment_of([[0.9, 0.1, 0], [0.8, 0.2, 0], [0.1, 0.9, 0]]), np.zeros((3, 2)))
    assert found.tolist() == [0, 2, -1]


def test_agreement_counts_neighbors_in_the_same_cluster():
    neighbors = Neighbors(np.array([[1, 2], [0, 2], [0, 1]]), np.full((3, 2), 0.5, np.float32))
    found = cluster_agreement(assignment_of([[1, 0, 0], [1, 0, 0], [0, 1, 0]]), neighbors)
    np.testing.assert_array_equal(found, [0.5, 0.0, np.nan])


@pytest.mark.parametrize("n_images", [1, 2, 3, 4, 9, 40])
def test_no_image_is_shown_twice_and_none_of_another_cluster(n_images):
    draw = np.random.default_rng(n_images)
    assignment = assignment_of(draw.dirichlet([0.5, 0.5], n_images))
    embeddings = draw.normal(size=(n_images, 3))
    for cluster in summarize_clusters(assignment, embeddings, names=["a", "b"], n_shown=4):
        assert len(set(cluster.rows)) == len(cluster.rows)
        assert set(assignment.labels[list(cluster.rows)]) <= {cluster.index}
        assert len(cluster.rows) == min(cluster.size, 1 + 3 * 4)


def test_summary_orders_images_and_adds_up():
    probabilities = [[1 - i / 100, i / 100] for i in range(40)]
    (cluster, empty) = summarize_clusters(assignment_of(probabilities), np.arange(40.0)[:, None], names=["a", "b"],
                                          n_shown=3)
    assert cluster.prototype == 4  # of rows 0 to 9, nearest to 4.5; the earlier of two
    assert cluster.surest == (0, 1, 2)
    assert cluster.doubtful == (39, 38, 37)
    assert all(3 <= row <= 36 for row in cluster.sampled)
    assert cluster.share == 1.0
    assert cluster.mean_confidence == pytest.approx(1 - 0.195)
    assert cluster.neighbor_agreement is None
    assert (empty.size, empty.prototype, empty.mean_confidence, empty.rows) == (0, None, None, ())


def test_images_at_random_are_the_same_for_the_same_seed():
    draw = np.random.default_rng(0)
    assignment, embeddings = assignment_of(draw.dirichlet([1, 1], 200)), draw.normal(size=(200, 2))
    one, same, other = (summarize_clusters(assignment, embeddings, names=["a", "b"], n_shown=5, seed=seed)
                        for seed in (1, 1, 2))
    assert one[0].sampled == same[0].sampled != other[0].sampled


def test_margin_review_and_second_choice():
    assignment = assignment_of([[0.5, 0.3, 0.2], [0.4, 0.2, 0.4], [0.02, 0.0, 0.98]])
    np.testing.assert_allclose(margins(assignment), [0.2, 0.0, 0.96], atol=1e-6)
    assert review_first(assignment, 5) == [1, 0]
    assert review_first(assignment, 1) == [1]
    assert second_choice(assignment, 1) == (2, pytest.approx(0.4))
    single = assignment_of([[1.0], [1.0]])
    assert margins(single).tolist() == [1, 1]
    assert review_first(single, 5) == []
    assert second_choice(single, 0) is None


def test_examples_are_prototypes_and_the_most_doubtful_none_twice():
    assignment = assignment_of([[0.9, 0.1, 0], [0.55, 0.45, 0], [0.1, 0.9, 0], [0.6, 0.4, 0], [0.3, 0.7, 0]])
    found = choose_examples(assignment, [1, 2, -1], review_first(assignment, 10), n_hardest=2)
    assert found == Examples(typical=(1, 2), hardest=(3, 4))  # 1 is the most doubtful, and a prototype already
    assert choose_examples(assignment, [1, 2, -1], review_first(assignment, 10), n_hardest=2) == found


def test_examples_of_many_clusters_are_spaced_by_size():
    sizes = [5, 1, 9, 3, 7]
    labels = np.repeat(np.arange(5), sizes)
    assignment = assignment_of(np.eye(5)[labels])
    first = np.flatnonzero(np.diff(labels, prepend=-1)).tolist()  # an image of each cluster
    found = choose_examples(assignment, first, review_first(assignment, 10), n_typical=3)
    assert assignment.labels[list(found.typical)].tolist() == [0, 1, 2]  # the largest, the middle and the smallest
    assert found.hardest == ()  # nothing is doubtful where all are certain
    alone = choose_examples(assignment, first, [], n_typical=1)
    assert assignment.labels[list(alone.typical)].tolist() == [2]


def test_no_more_examples_than_asked_of_a_thousand_clusters():
    draw = np.random.default_rng(0)
    assignment = assignment_of(draw.dirichlet(np.full(1000, 0.01), 1500))
    prototypes = find_prototypes(assignment, draw.normal(size=(1500, 2)))
    found = choose_examples(assignment, prototypes.tolist(), review_first(assignment, 24))
    assert (len(found.typical), len(found.hardest)) == (6, 4)
    assert len({*found.typical, *found.hardest}) == 10
