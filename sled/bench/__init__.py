"""Measurements behind `sled bench`: every rival runs beside us, in the same run, round by round (see `sled.timing`)."""
