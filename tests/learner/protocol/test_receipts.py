import numpy as np
import pytest

from diffusion.snapshot import Snapshot
from diffusion.trajectory import Receipt
from learner.protocol import receipts
from learner.protocol.receipts import RanksDiverged, StaleWeights


def test_version_and_hash_must_both_be_those_of_one_published_version():
    published = {2: "aaa", 3: "bbb"}
    for version, sha256 in [*published.items(), (1, "aaa"), (3, "aaa"), (2, "bbb"), (4, "bbb")]:
        receipt = Receipt(version, sha256, (), (), "", 0.0)
        if (version, sha256) in published.items():
            receipts.check(receipt, published, "chunk 1")
        else:
            said = f"chunk 1 was sampled by adapter {sha256}.*version 2 is aaa and version 3 is bbb"
            with pytest.raises(StaleWeights, match=said):
                receipts.check(receipt, published, "chunk 1")


def test_the_same_adapter_is_no_new_version_and_ranks_must_agree():
    before, same, moved = (Snapshot(i, np.zeros(1, np.float32), sha) for i, sha in enumerate(("aaa", "aaa", "bbb")))
    receipts.check_moved(before, moved)
    with pytest.raises(StaleWeights, match="version 1 is bitwise version 0"):
        receipts.check_moved(before, same)
    receipts.check_ranks(["aaa", "aaa"])
    with pytest.raises(RanksDiverged, match="rank 0 aaa, rank 1 bbb"):
        receipts.check_ranks(["aaa", "bbb"])
