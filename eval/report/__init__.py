"""An evaluation from methods to a written report with paired comparisons."""
