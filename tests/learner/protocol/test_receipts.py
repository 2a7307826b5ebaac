import numpy as np
import pytest

from diffusion.snapshot import Snapshot
from diffusion.trajectory import Receipt
from learner.protocol import receipts
from learner.protocol.receipts import RanksDiverged, StaleWeights


def snapshot(version: int, sha256: str) -> Snapshot:
    return Snapshot(version, np.zeros(1, np.float32), sha256)


def receipt(version: int, sha256: str) -> Receipt:
    return Receipt(version, sha256, (), (), "", 0.0)


def test_version_and_hash_must_both_be_the_published_ones():
    receipts.check(receipt(3, "aaa"), snapshot(3, "aaa"), "chunk 1")
    for version, sha256 in [(2, "aaa"), (3, "bbb"), (2, "bbb")]:
        with pytest.raises(StaleWeights, match="chunk 1 was sampled by adapter"):
            receipts.check(receipt(version, sha256), snapshot(3, "aaa"), "chunk 1")


def test_the_same_adapter_is_no_new_version():
    receipts.check_moved(snapshot(0, "aaa"), snapshot(1, "bbb"))
    with pytest.raises(StaleWeights, match="version 1 is bitwise version 0"):
        receipts.check_moved(snapshot(0, "aaa"), snapshot(1, "aaa"))


def test_ranks_must_agree():
    receipts.check_ranks(["aaa", "aaa"])
    with pytest.raises(RanksDiverged, match="rank 0 aaa, rank 1 bbb"):
        receipts.check_ranks(["aaa", "bbb"])


def test_one_of_several_recent_versions_will_do_with_its_own_hash():
    recent = {2: "aaa", 3: "bbb"}
    for version, sha256 in recent.items():
        receipts.check_recent(receipt(version, sha256), recent, "chunk 1")
    for version, sha256 in [(1, "aaa"), (3, "aaa"), (2, "bbb"), (4, "bbb")]:
        with pytest.raises(StaleWeights, match="version 2 is aaa and version 3 is bbb"):
            receipts.check_recent(receipt(version, sha256), recent, "chunk 1")
