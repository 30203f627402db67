"""Decoding over the stages of a pipeline."""

from programs import on_devices, run_together


def test_stages_say_what_one_device_says(tmp_path):
    run_together([(on_devices(4), ["mesh_of_pipeline.py", tmp_path])])
