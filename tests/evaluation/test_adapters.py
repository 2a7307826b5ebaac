from evaluation.adapters import split


def test_targets_and_settings_are_told_apart(tmp_path):
    (with_equals := tmp_path / "lr=1e-3").mkdir()
    targets = [str(with_equals), "s3://bucket/sweeps/lr=1e-3", "runs/lr=1e-3", "runs/demo"]
    settings = ["sampler.steps=5", "model.path=/models/a=b", "held_out={a-b: jpeg}", 'log.uri="http://x/?a=b"']
    assert split([settings[0], *targets, *settings[1:]]) == (targets, settings)
