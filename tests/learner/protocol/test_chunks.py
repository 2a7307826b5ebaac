from learner.protocol.chunks import evaluation_chunks, training_chunks


def test_an_epoch_is_cut_into_chunks_with_every_trajectory_once(small_config):
    chunks = training_chunks(small_config(), ["a", "b", "c"], epoch=3)
    assert [chunk.trajectory_ids for chunk in chunks] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert all(chunk.epoch == 3 and chunk.purpose == "train" for chunk in chunks)
    assert all(chunk.prompts[::2] == chunk.prompts[1::2] for chunk in chunks)


def test_prompts_come_in_shuffled_passes_over_the_whole_set(small_config):
    prompts = [str(i) for i in range(8)]
    chunks = [chunk for epoch in range(6) for chunk in training_chunks(small_config(), prompts, epoch)]
    drawn = [prompt for chunk in chunks for prompt in chunk.prompts[::2]]
    passes = [drawn[i : i + 8] for i in range(0, len(drawn), 8)]
    assert all(sorted(part) == prompts for part in passes) and passes[0] != passes[1]


def test_the_evaluation_set_is_the_same_for_every_run_seed(small_config):
    one = evaluation_chunks(small_config("run.seed=1"), ["a", "b"])
    assert one == evaluation_chunks(small_config("run.seed=2"), ["a", "b"])
    assert [chunk.prompts for chunk in one] == [("a", "b", "a", "b")]
