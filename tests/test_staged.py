"""Decoding over the stages of a pipeline."""

import pytest
from programs import on_devices, run_together


@pytest.mark.parametrize("stages", ["4", pytest.param("2", marks=pytest.mark.exhaustive)])
def test_stages_say_what_one_device_says(stages, tmp_path):
    run_together([(on_devices(4), ["mesh_of_pipeline.py", tmp_path, stages])])


@pytest.mark.exhaustive
def test_batches_that_follow_each_other_keep_all_stages_at_work():
    run_together([(on_devices(4), ["-c", """
from sled.bench.stages import run_stages_bench
*_, full = report = run_stages_bench(batch_size=2, new_tokens=8).rows
assert all(row.equal == 1 and row.steps_per_token == row.layers / 4 for row in report)
assert (full.layers, full.after_another, full.following) == (16, 4 * 8 * 4, 8 * 4 + 3)
"""])])
