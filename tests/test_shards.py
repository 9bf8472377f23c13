"""Shards: whole or not there, kept for the same work and not for another."""

import numpy as np
import pytest

from phyla.errors import CorruptFileError, InputError
from phyla.shards import Shards, work_folder

WHAT = {"classifier": "abc", "views": {"mean": (0.1, 0.2)}}


def shards(folder, *, n=10, what=WHAT, keys=None, size=4) -> Shards:
    return Shards(folder / "work", n, what=what, keys=keys, size=size)


def begun(folder, **options) -> Shards:
    made = shards(folder, **options)
    made.begin()
    return made


def test_shards_cover_all_items_in_order(tmp_path):
    made = shards(tmp_path)
    assert len(made) == 3 and [list(made.span(i)) for i in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len(shards(tmp_path, n=8)) == 2 and len(shards(tmp_path, n=0)) == 0


def test_workers_share_them_without_gap_or_overlap(tmp_path):
    made = begun(tmp_path, n=100)
    shares = [made.missing((i, 3)) for i in range(3)]
    assert sorted(shard for share in shares for shard in share) == list(range(25)) == made.missing()
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_finished_ones_are_there_after_a_restart(tmp_path):
    first = begun(tmp_path)
    first.write(1, values=np.arange(3), names=np.frombuffer(b"text", np.uint8))
    again = begun(tmp_path)
    assert again.missing() == [0, 2] and again.missing((1, 2)) == []
    assert again.read(1)["values"].tolist() == [0, 1, 2] and set(again.read(1, "names")) == {"names"}
    again.remove()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", [{"n": 11}, {"what": WHAT | {"classifier": "d"}}, {"size": 5}])
def test_other_work_starts_over_but_not_under_the_hands_of_others(tmp_path, change):
    begun(tmp_path).write(0, values=np.arange(3))
    with pytest.raises(InputError, match=r"holds shards of another classifier.*same arguments"):
        shards(tmp_path, **change).begin(shared=True)
    shards(tmp_path).begin(shared=True)
    assert shards(tmp_path).missing() == [1, 2]
    assert 0 in begun(tmp_path, **change).missing()


def test_a_changed_key_costs_its_own_shard(tmp_path):
    begun(tmp_path, keys=["a", "b", "c"]).write(0, values=np.arange(3))
    begun(tmp_path, keys=["a", "b", "c"]).write(1, values=np.arange(3))
    assert begun(tmp_path, keys=["a", "x", "c"]).missing() == [1, 2]


@pytest.mark.parametrize("damage", [b"", b"PK\3\4 cut", None])
def test_a_damaged_shard_is_named(tmp_path, damage):
    made = begun(tmp_path)
    made.write(0, values=np.arange(3))
    path = next(made.folder.glob("*.npz"))
    path.unlink() if damage is None else path.write_bytes(damage)
    with pytest.raises(CorruptFileError, match=r"00000\.npz cannot be read.*that shard alone"):
        made.read(0)


def test_a_damaged_manifest_starts_over(tmp_path):
    made = begun(tmp_path)
    made.write(0, values=np.arange(3))
    (made.folder / "manifest.json").write_text("{")
    assert begun(tmp_path).missing() == [0, 1, 2]


def test_the_work_lies_hidden_beside_its_result(tmp_path):
    assert work_folder(tmp_path / "labels.csv") == tmp_path / ".labels.csv.shards"
