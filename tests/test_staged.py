"""Decoding over the stages of a pipeline."""

import pytest
from programs import on_devices, run_together


@pytest.mark.parametrize("stages", ["4", pytest.param("2", marks=pytest.mark.exhaustive)])
def test_stages_say_what_one_device_says(stages, tmp_path):
    run_together([(on_devices(4), ["mesh_of_pipeline.py", tmp_path, stages])])
